//! What people give in the wrong place, or look for there: each is told where it goes.

use std::fs;
use std::process::Command;

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::softhsm::{KeyType, MODULE, PIN};
use omsign_tests::agent::Agent;
use omsign_tests::operator::typing;
use omsign_tests::world::{World, key_section, text, token_section};

#[test]
fn keys_of_another_kind() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    world.write("release.pem", "")?;
    // A name with a dot is a name.
    world.omsign_refuses(
        2,
        &["sign", "model", "--key", "release.pem"],
        &["no key \"release.pem\" is configured"],
    )?;
    for (key, option) in [
        ("pkcs11:token=t;object=k", "--key-uri"),
        ("piv:serial=1;slot=9c", "--key-uri"),
        ("./release.pem", "--private-key"),
    ] {
        let expected = ["error: --key takes the name of an agent's key", option];
        world.omsign_refuses(2, &["sign", "model", "--key", key], &expected)?;
    }
    Ok(())
}

/// Whoever signs without an agent, too, has to tell verifiers with which key.
#[test]
fn a_public_key_without_an_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let uri = format!("pkcs11:token=t;object=k?module-path={MODULE}&pin-source={}", text(&token.pin_file()));
    let mut export = Command::new(built("omsign")?);
    world.without_surprises(export.args(["keys", "export", "--key-uri", &uri]).current_dir(world.path("")));
    let output = export.env("SOFTHSM2_CONF", token.config()).output()?;
    ensure!(output.status.success() && output.stdout == fs::read(token.public_key("k"))?, "{output:?}");
    let errors = world.omsign_fails(2, &["keys", "export", "k", "--key-uri", &uri])?;
    ensure!(errors.contains("cannot be used with"), "{errors}");
    Ok(())
}

/// The two programs have alike names, and one of them a command that sets a PIN anew.
#[test]
fn commands_of_the_other_program() -> anyhow::Result<()> {
    for (arguments, expected) in [
        (&["unlock", "release", "--ask-pin"][..], "`omsign agent unlock release --ask-pin`"),
        (&["lock", "release"], "`omsign agent lock release`"),
        (&["status"], "`omsign agent status`"),
    ] {
        let output = Command::new(built("omsign-agent")?).args(arguments).output()?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{errors}");
    }
    Ok(())
}

/// From a vault, say, where nobody sits at a terminal.
#[test]
fn a_pin_on_standard_input() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let pin = format!("pin = {{ file = \"{}\" }}", text(&token.pin_file()));
    let section = token_section("t", &token, "").replace(&pin, "pin = \"prompt\"");
    ensure!(section.contains("prompt"), "{section}");
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    let unlock = |line: &str| {
        let mut unlock = Command::new(built("omsign")?);
        unlock.args(["agent", "unlock", "t", "--pin-stdin"]).current_dir(world.path(""));
        world.without_surprises(unlock.env("OMSIGN_AGENT", world.path("agent.sock")));
        typing(&mut unlock, line)
    };
    let output = unlock("\n")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && errors.contains("the PIN is empty"), "{errors}");
    let output = unlock(&format!("{PIN}\n"))?;
    ensure!(output.status.success(), "{output:?}");
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    ensure!(
        !agent.log()?.contains(PIN) && agent.log()?.contains("token waits for its PIN"),
        "{}",
        agent.log()?
    );
    Ok(())
}

/// Each end says what is wrong with the other's certificate, or with a file.
#[test]
fn certificates_of_the_wrong_one() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.tls("ours")?;
    world.tls("other")?;
    let tls = "[listen]\ntls = { address = \"127.0.0.1:0\", certificate = \"ours-server.pem\", \
               private_key = \"ours-server.key\", client_ca = \"ours-ca.pem\" }\n";
    let listen = world.listen().replacen("[listen]\n", tls, 1);
    let agent =
        Agent::start(&world, &(listen + &token_section("t", &token, "") + &key_section("k", "t", "k")))?;
    let url = agent.tls_url()?;
    let elsewhere = url.replace("127.0.0.1", "127.0.0.2").replace("localhost", "127.0.0.2");
    for (url, ca, certificate, key, expected) in [
        (
            &url,
            "other-ca.pem",
            "ours-client.pem",
            "ours-client.key",
            "it was not issued by a CA of other-ca.pem",
        ),
        (
            &url,
            "ours-ca.pem",
            "other-client.pem",
            "other-client.key",
            "hint: the agent's log says why; over https it may not take the client certificate",
        ),
        (
            &url,
            "ours-ca.pem",
            "ours-client.key",
            "ours-client.pem",
            "ours-client.key: it holds no certificate in PEM",
        ),
        (
            &url,
            "ours-ca.pem",
            "ours-client.pem",
            "ours-client.pem",
            "ours-client.pem: it holds no private key in PEM",
        ),
        (
            &url,
            "ours-client.key",
            "ours-client.pem",
            "ours-client.key",
            "ours-client.key: it holds no certificate in PEM",
        ),
    ] {
        let tls = ["--agent", url, "--agent-ca", ca, "--agent-certificate", certificate, "--agent-key", key];
        let errors = world.omsign_fails(2, &[&["keys"], &tls[..]].concat())?;
        ensure!(errors.contains(expected) && !errors.contains("omsign-agent serve"), "{expected}: {errors}");
    }
    let tls = [
        "--agent-ca",
        "ours-ca.pem",
        "--agent-certificate",
        "ours-client.pem",
        "--agent-key",
        "ours-client.key",
    ];
    if elsewhere != url {
        let errors = world.omsign_fails(2, &[&["keys", "--agent", &elsewhere], &tls[..]].concat())?;
        ensure!(errors.contains("no agent answers") || errors.contains("is not taken"), "{errors}");
    }
    Ok(())
}

#[test]
fn a_model_that_is_not_here() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let verify =
        |model: &'static str| ["verify", model, "--signature", "model.sig", "--public-key", "t/k.pub.pem"];
    // The directory that the model is in.
    fs::create_dir(world.path("around"))?;
    fs::rename(world.path("model"), world.path("around/model"))?;
    world.omsign_refuses(
        1,
        &verify("around"),
        &["hint: no signed file is here, of a model called \"model\""],
    )?;
    world.omsign_ok(&verify("around/model"))?;
    // What Git LFS leaves where nothing was fetched.
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n";
    fs::write(world.path("around/model/config.json"), pointer)?;
    let expected =
        ["1 changed", "hint: config.json is a Git LFS pointer, not the file itself: `git lfs pull`"];
    world.omsign_refuses(1, &verify("around/model"), &expected)?;
    fs::write(world.path("around/model/config.json"), "{}")?;
    let errors = world.omsign_fails(1, &verify("around/model"))?;
    ensure!(!errors.contains("hint:"), "{errors}");
    Ok(())
}

/// One object either way, and in it what a script can do.
#[test]
fn what_a_script_is_told_when_nothing_is_signed() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let mine = key_section("mine", "t", "k").replace("uid = 0", "uid = 54321");
    let absent = token_section("away", &token, "").replace("label = \"t\"", "label = \"nowhere\"");
    let keys = key_section("k", "t", "k") + &mine + &key_section("gone", "away", "k");
    let agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &absent + &keys))?;
    world.model()?;
    let told = |key: &str, code: i32| {
        let output = world.omsign(&["sign", "model", "--key", key, "--json"])?;
        ensure!(output.status.code() == Some(code), "{output:?}");
        anyhow::Ok(serde_json::from_slice::<serde_json::Value>(&output.stdout)?)
    };
    ensure!(told("k", 0)?["signed"] == true);
    for (key, reason, retry) in [
        ("mine", "denied", false),
        ("nobody", "unknown-key", false),
        ("gone", "unavailable", true),
        ("tpm:handle=0x81000001", "usage", false),
    ] {
        let told = told(key, 2)?;
        ensure!(told["signed"] == false && told["reason"] == reason && told["retry"] == retry, "{told}");
        ensure!(told["error"].as_str().is_some_and(|error| !error.is_empty()), "{told}");
    }
    ensure!(agent.stop()?.success());
    let told = told("k", 2)?;
    ensure!(told["reason"] == "unreachable" && told["retry"] == true, "{told}");
    Ok(())
}
