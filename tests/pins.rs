//! A PIN is offered once, and a refusal is remembered: C_Login is counted by a module in between.

use std::time::Duration;

use anyhow::ensure;
use omsign_fixtures::kryoptic::{Kryoptic, SO_PIN};
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, PIN, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_proto::v1::UnlockTokenRequest;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::device::debian_module;
use omsign_tests::operator::unblocking;
use omsign_tests::world::{World, key, key_section, text, token_section};
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);
const DIGEST: [u8; 32] = [7; 32];

/// SoftHSM never blocks a PIN; kryoptic does, at the tenth wrong one.
#[test]
fn a_token_that_blocks_its_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    token.generate("k")?;
    let config = world.listen() + &token.section("t")? + &key_section("k", "t", "k");
    world.model()?;
    let wrong =
        || token.tool(&["--login", "--token-label", "kry", "--pin", "wrong-pin-0000", "--list-objects"]);
    for _ in 0..9 {
        ensure!(wrong().is_err());
    }
    // The last try is an operator's to spend.
    let agent = Agent::start(&world, &config)?;
    let sign = ["sign", "model", "--key", "k", "--signature", "k.sig"];
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("one wrong PIN more would block it"), "{errors}");
    world.omsign_ok(&["agent", "unlock", "t"])?;
    world.omsign_ok(&sign)?;
    ensure!(agent.stop()?.success());
    for _ in 0..10 {
        ensure!(wrong().is_err());
    }
    let agent = Agent::start(&world, &config)?;
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("its user PIN is blocked; reset it"), "{errors}");
    let errors = world.omsign_fails(2, &["agent", "unlock", "t"])?;
    ensure!(errors.contains("its user PIN is blocked"), "{errors}");
    // The security officer has it set anew, in the agent that runs.
    let unblock = |answers: &str, expected: &str| {
        let output = unblocking(&world, "t", answers)?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() == (expected == "done") && errors.contains(expected), "{errors}");
        anyhow::Ok(())
    };
    let officer = format!("{SO_PIN}\n");
    unblock("not-the-officer\n", "it refused the security officer's PIN")?;
    unblock("\n", "none was given")?;
    // Callers are told of their PIN, not of somebody's mistakes.
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("its user PIN is blocked; reset it"), "{errors}");
    unblock(&officer, "done")?;
    world.omsign_ok(&sign)?;
    unblock(&officer, "it is not locked")?;
    let agent_log = agent.log()?;
    ensure!(agent.stop()?.success());
    // Without an agent, and to a PIN that is typed.
    for _ in 0..10 {
        ensure!(wrong().is_err());
    }
    unblock(&officer, "done")?;
    world.write(
        "agent.toml",
        config.replace(&format!("{{ file = \"{}\" }}", token.pin_file().display()), "\"prompt\""),
    )?;
    unblock(&format!("{SO_PIN}\nnew-pin-3141\nnew-pin-2718\n"), "those are not the same PIN")?;
    unblock(&format!("{SO_PIN}\nnew-pin-3141\nnew-pin-3141\n"), "done")?;
    token.tool(&["--login", "--token-label", "kry", "--pin", "new-pin-3141", "--list-objects"])?;
    // Each was recorded, before and after, and no secret is anywhere.
    let audit = std::fs::read_to_string(world.path("audit/audit.jsonl"))?;
    let recorded = |outcome: &str| audit.matches(&format!(r#""outcome":"{outcome}""#)).count();
    ensure!(audit.matches(r#""action":"unblock""#).count() == 12 && recorded("begun") == 6, "{audit}");
    for secret in [omsign_fixtures::kryoptic::PIN, SO_PIN, "new-pin-3141", "not-the-officer"] {
        ensure!(!audit.contains(secret) && !agent_log.contains(secret));
    }
    Ok(())
}

/// What cannot set a PIN anew says what can.
#[test]
fn a_tpm_ends_its_lockout_otherwise() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = "\n[token.chip]\nbackend = \"tpm\"\ntcti = \"device:/dev/tpmrm-of-nobody\"\n";
    world.write("agent.toml", world.listen() + chip + &key("c", "chip", "handle = \"0x81000010\""))?;
    for (token, expected) in
        [("chip", "tpm2_dictionarylockout --clear-lockout"), ("none", "there is no [token.none]")]
    {
        let output = unblocking(&world, token, "")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{errors}");
    }
    Ok(())
}

#[test]
fn a_wrong_pin_is_offered_once() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-8142\n")?;
    let proxy = world.proxy()?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for id in 0..20 {
            let refused = sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await;
            ensure!(refused.as_ref().is_err_and(|s| s.code() == Code::FailedPrecondition), "{refused:?}");
        }
        ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
        // Still wrong: an operator's word is worth one more try, and no more.
        let errors = world.omsign_fails(2, &["agent", "unlock", "t"])?;
        ensure!(errors.contains("it refused the PIN"), "{errors}");
        let refused = sign(&mut client, request("k", 100, &DIGEST), SECOND * 10).await;
        ensure!(refused.is_err_and(|s| s.code() == Code::FailedPrecondition));
        ensure!(proxy.calls("C_Login") == 2, "{} logins", proxy.calls("C_Login"));
        // The right one heals it.
        omsign_fixtures::write_private(&token.pin_file(), format!("{PIN}\n").as_bytes())?;
        world.omsign_ok(&["agent", "unlock", "t"])?;
        sign(&mut client, request("k", 101, &DIGEST), SECOND * 10).await?;
        ensure!(proxy.calls("C_Login") == 3, "{} logins", proxy.calls("C_Login"));
        Ok(())
    })?;
    let log = agent.log()?;
    ensure!(!log.contains(PIN) && !log.contains("wrong-pin-8142"), "a PIN in the log: {log}");
    let audit = std::fs::read_to_string(world.path("audit/audit.jsonl"))?;
    ensure!(audit.contains(r#""action":"unlock""#) && !audit.contains(PIN), "{audit}");
    Ok(())
}

/// Whatever is asked for in the log: what goes to the device is not there.
#[test]
fn no_pin_in_the_finest_log() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let card = VirtualPiv::create(&world.path("card"), 7_000_022)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    let keys = key_section("k", "t", "k") + &key("c", "card", "slot = \"9c\"");
    let config = world.listen() + &token_section("t", &token, "") + &card.section("card") + &keys;
    let agent = Agent::start_with(&world, &config, |command| {
        command.env("OMSIGN_LOG", "trace");
    })?;
    world.model()?;
    for name in ["k", "c"] {
        world.omsign_ok(&["sign", "model", "--key", name])?;
    }
    let log = agent.log()?;
    ensure!(log.contains("\"TRACE\"") || log.contains("\"DEBUG\""), "{log}");
    for pin in [PIN, omsign_fixtures::piv::PIN] {
        // As text, and as the bytes of a command to a card.
        let bytes = format!("{:?}", pin.as_bytes());
        let bytes = bytes.trim_matches(['[', ']']);
        for form in [pin, &hex::encode(pin), &hex::encode_upper(pin), bytes] {
            ensure!(!log.contains(form), "a PIN in the log, as {form}");
        }
    }
    Ok(())
}

/// Everybody knows it: nothing is signed with it, by an agent or without one, and no try is spent.
#[test]
fn a_factory_pin_signs_nothing() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 7_000_021)?;
    card.generate("9c", "ECCP256", &[])?;
    omsign_fixtures::write_private(&card.pin_file(), b"123456\n")?;
    let calm = world.token("calm", "calm", KeyType::P256)?;
    let tokens = card.section("card") + &token_section("calm", &calm, "");
    let keys = key("k", "card", "slot = \"9c\"") + &key_section("calm", "calm", "calm");
    let agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    world.model()?;
    let expected = "its PIN is the one from the factory, which everybody knows; change it with";
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains(expected) && errors.contains("omsign agent unlock card"), "{errors}");
    world.omsign_ok(&["sign", "model", "--key", "calm", "--signature", "calm.sig"])?;
    ensure!(agent.stop()?.success());
    // Nor without an agent, nor through the modules by which others reach the same card.
    let modules = ["libykcs11.so", "opensc-pkcs11.so"].map(debian_module);
    let keys = modules.map(|module| format!("pkcs11:slot-id=0;id=%02?module-path={module}&"));
    for key in [String::from("piv:serial=7000021;slot=9c?")].iter().chain(&keys) {
        let uri = format!("{key}pin-source={}", text(&card.pin_file()));
        let mut without = std::process::Command::new(omsign_fixtures::built("omsign")?);
        without.args(["sign", "model", "--key-uri", &uri]).current_dir(world.path(""));
        world.without_surprises(&mut without);
        let output = without.env("PCSCLITE_CSOCK_NAME", card.socket()).output()?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{uri}: {errors}");
    }
    let (_, report) = world.doctor()?;
    ensure!(
        report.contains("3 PIN tries left") && report.contains("PIN is the one from the factory"),
        "{report}"
    );
    Ok(())
}

#[test]
fn a_refusal_survives_the_respawn_of_the_process() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        // Somebody changes the PIN file; the running process does not care, its replacement does.
        omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-8142\n")?;
        sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await?;
        agent.kill_hosts()?;
        eventually("the refusal", || Ok(proxy.calls("C_Login") == 2))?;
        for id in 10..30 {
            let refused = sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await;
            ensure!(refused.is_err());
        }
        ensure!(agent.hosts()?.is_empty(), "a locked token needs no process");
        ensure!(proxy.calls("C_Login") == 2, "{} logins", proxy.calls("C_Login"));
        Ok(())
    })
}

/// A module that hangs in C_Login, or answers it with an error of its own, may have counted a try.
#[test]
fn a_login_without_a_clear_answer_is_not_tried_again() -> anyhow::Result<()> {
    for (fault, reason) in
        [("C_Login 0 60000\n", "did not open within"), ("C_Login 80000123 0\n", "cannot log in")]
    {
        let world = World::new()?;
        let token = world.token("t", "k", KeyType::P256)?;
        let proxy = world.proxy()?;
        proxy.set(fault)?;
        let section = proxy.before(&token_section("t", &token, "timeout = \"2s\""))?;
        let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
        run(async {
            let mut client = connect(world.path("agent.sock")).await?;
            for id in 0..10 {
                let refused = sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await;
                ensure!(refused.as_ref().is_err_and(|s| s.code() == Code::FailedPrecondition), "{refused:?}");
                ensure!(refused.is_err_and(|s| s.message().contains(reason)));
            }
            ensure!(proxy.calls("C_Login") == 1, "{} logins: {}", proxy.calls("C_Login"), agent.log()?);
            proxy.set("")?;
            world.omsign_ok(&["agent", "unlock", "t"])?;
            sign(&mut client, request("k", 100, &DIGEST), SECOND * 10).await?;
            Ok(())
        })?;
    }
    Ok(())
}

/// What a PIN file holds was refused; that an operator typed the right PIN does not make the file right.
#[test]
fn a_refused_pin_file_is_not_read_again_after_a_typed_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-8142\n")?;
    let proxy = world.proxy()?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        ensure!(sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await.is_err());
        let typed = UnlockTokenRequest { token: "t".into(), pin: Some(PIN.into()) };
        client.unlock_token(typed).await?;
        sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await?;
        ensure!(proxy.calls("C_Login") == 2);
        agent.kill_hosts()?;
        let locked = sign(&mut client, request("k", 3, &DIGEST), SECOND * 10).await;
        let locked = match locked {
            // Sent before the death was noticed.
            Err(status) if status.code() == Code::Unavailable => {
                sign(&mut client, request("k", 4, &DIGEST), SECOND * 10).await
            }
            other => other,
        };
        ensure!(locked.as_ref().is_err_and(|s| s.code() == Code::FailedPrecondition), "{locked:?}");
        ensure!(proxy.calls("C_Login") == 2, "{} logins", proxy.calls("C_Login"));
        Ok(())
    })
}

/// Each source of a PIN, and PKCS#11 URIs instead of tables.
#[test]
fn a_pin_from_every_source() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.write("credentials/release", format!("{PIN}\n"))?;
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let selector = "token = { label = \"t\" }";
    let uri = format!("token = \"pkcs11:token=t?pin-source={}\"", token.pin_file().display());
    let section = token_section("t", &token, "");
    for (section, prompted) in [
        (section.replace(&file, "pin = { credential = \"release\" }"), false),
        (section.replace(&file, "pin = { env = \"OMSIGN_TEST_PIN\" }"), false),
        (section.replace(&file, "").replace(selector, &uri), false),
        (section.replace(&file, "pin = \"prompt\""), true),
    ] {
        let key =
            key_section("k", "t", "k").replace("{ label = \"k\" }", "\"pkcs11:object=k;id=k;type=private\"");
        let agent = Agent::start_with(&world, &(world.listen() + &section + &key), |command| {
            command.env("CREDENTIALS_DIRECTORY", world.path("credentials")).env("OMSIGN_TEST_PIN", PIN);
        })?;
        run(async {
            let mut client = connect(world.path("agent.sock")).await?;
            if prompted {
                let waits = sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await;
                ensure!(waits.is_err_and(|status| status.message().contains("it waits for its PIN")));
                let typed = UnlockTokenRequest { token: "t".into(), pin: Some(PIN.into()) };
                client.unlock_token(typed).await?;
            }
            sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await?;
            Ok(())
        })?;
        ensure!(!agent.log()?.contains(PIN));
    }
    Ok(())
}

#[test]
fn a_token_sees_no_pin_but_its_own() -> anyhow::Result<()> {
    let world = World::new()?;
    let (a, b) = (world.token("a", "k", KeyType::P256)?, world.token("b", "k", KeyType::P256)?);
    let section = |name: &str, token: &SoftHsm| {
        let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
        token_section(name, token, "")
            .replace(&file, &format!("pin = {{ env = \"OMSIGN_TEST_PIN_{name}\" }}"))
    };
    let config = world.listen() + &section("a", &a) + &section("b", &b);
    let keys = key_section("a", "a", "k") + &key_section("b", "b", "k");
    let agent = Agent::start_with(&world, &(config + &keys), |command| {
        command.env("OMSIGN_TEST_PIN_a", PIN).env("OMSIGN_TEST_PIN_b", PIN);
    })?;
    let listed = world.omsign_ok(&["keys"])?;
    ensure!(listed.matches(" ready ").count() == 2, "{listed}");
    let hosts = agent.hosts()?;
    ensure!(hosts.len() == 2, "{hosts:?}");
    for host in hosts {
        let environment = std::fs::read(format!("/proc/{host}/environ"))?;
        let environment = String::from_utf8_lossy(&environment).into_owned();
        ensure!(environment.matches("OMSIGN_TEST_PIN_").count() == 1, "{environment}");
    }
    Ok(())
}

/// A TPM counts wrong values, the empty one too.
#[test]
fn a_guarded_key_is_not_tried_without_its_value() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    stand_in.guarded_key("k", 0x8100_0010, AUTH)?;
    let uri = format!("tpm:handle=0x81000010?tcti={}", stand_in.tcti());
    let refused = ["the token needs a PIN, and there is no terminal to ask at"];
    world.omsign_refuses(2, &["sign", "model", "--key-uri", &uri], &refused)?;
    ensure!(stand_in.failed_tries()? == 0, "{} tries", stand_in.failed_tries()?);
    let uri = format!("{uri}&pin-source={}", stand_in.pin_file().display());
    world.omsign_ok(&["sign", "model", "--key-uri", &uri])?;
    Ok(())
}

/// One that locks a TPM's keys for everybody is an operator's to spend.
#[test]
fn the_last_value_that_a_tpm_takes() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    stand_in.guarded_key("k", 0x8100_0010, AUTH)?;
    stand_in.tool("tpm2_dictionarylockout", |tool| {
        tool.args(["-s", "-n", "3", "-t", "1000", "-l", "1000"]);
    })?;
    let config = world.listen() + &stand_in.section("t") + &key("k", "t", "handle = \"0x81000010\"");
    const LAST: &str = "one wrong authorization value more";
    for (tries, why) in [(1, "it refused"), (2, "it refused"), (2, LAST)] {
        write_private(&stand_in.pin_file(), b"wrong-auth-8142\n")?;
        let agent = Agent::start(&world, &config)?;
        world.omsign_refuses(2, &["sign", "model", "--key", "k"], &[why])?;
        ensure!(agent.stop()?.success());
        ensure!(stand_in.failed_tries()? == tries, "{} tries", stand_in.failed_tries()?);
    }
    write_private(&stand_in.pin_file(), format!("{AUTH}\n").as_bytes())?;
    let _agent = Agent::start(&world, &config)?;
    world.omsign_refuses(2, &["sign", "model", "--key", "k"], &[LAST])?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    world.omsign_ok(&["sign", "model", "--key", "k"]).map(drop)
}
