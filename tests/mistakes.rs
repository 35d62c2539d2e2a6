//! Keys, certificates, PINs and configurations as they should not be: a clear error, the right exit status, nothing
//! left behind.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, PIN};
use omsign_tests::agent::{Agent, refused};
use omsign_tests::hashed;
use omsign_tests::world::{World, key_section, text, token_section};
use openssl::pkey::PKey;

#[test]
fn keys_that_cannot_be_used() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "good", KeyType::P256)?;
    token.generate("public", KeyType::P256, Objects::PublicOnly)?;
    token.generate("private", KeyType::P256, Objects::PrivateOnly)?;
    token.generate("certified", KeyType::P384, Objects::Certified)?;
    token.generate("twin", KeyType::P256, Objects::Pair)?;
    token.generate("twin", KeyType::P256, Objects::Pair)?;
    let names = ["good", "public", "private", "certified", "twin", "absent"];
    let mut config = world.listen() + &token_section("t", &token, "sessions = 3");
    for name in names {
        config += &key_section(name, "t", name);
    }
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    for (name, reason) in [
        ("public", "the token has a public half with label \"public\" but no private key"),
        ("private", "no public-key object, EC point or certificate of it is on the token"),
        ("twin", "2 private keys match label \"twin\"; tell them apart with object = { id"),
        ("absent", "the token has no private key with label \"absent\""),
    ] {
        world.omsign_refuses(2, &["sign", "model", "--key", name], &["cannot sign", reason])?;
    }
    world.omsign_refuses(
        2,
        &["sign", "model", "--key", "nobody"],
        &["no key \"nobody\" is configured", "`omsign keys` and `omsign agent status` list"],
    )?;
    // What one key lacks does not take the others down; a certificate does for a public key.
    for name in ["good", "certified"] {
        world.omsign_ok(&["sign", "model", "--key", name, "--signature", "s.sig"])?;
        let public = text(&token.public_key(name));
        world.omsign_ok(&["verify", "model", "--signature", "s.sig", "--public-key", &public])?;
        fs::remove_file(world.path("s.sig"))?;
    }
    let listed = world.omsign_ok(&["keys", "--json"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let states: Vec<_> =
        listed["keys"].as_array().context("keys")?.iter().map(|key| key["state"].clone()).collect();
    ensure!(states.iter().filter(|state| *state == "unusable").count() == 4, "{states:?}");
    drop(agent);

    // The doctor finds the same, before anybody starts an agent.
    let mut doctor = Command::new(built("omsign-agent")?);
    world.without_surprises(&mut doctor);
    let output = doctor.args(["doctor", "--config"]).arg(world.path("agent.toml")).output()?;
    let report = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(
        report.contains("ok      key.good: label \"good\": ecdsa-p256-sha256, signs and verifies"),
        "{report}"
    );
    ensure!(
        report.contains("ERROR   key.absent: the token has no private key with label \"absent\""),
        "{report}"
    );
    ensure!(report.contains("ok      token.t: its PIN source can be read"), "{report}");
    ensure!(!report.contains(PIN));
    Ok(())
}

#[test]
fn certificates_that_do_not_fit() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let public = PKey::public_key_from_pem(&fs::read(world.path("t/k.pub.pem"))?)?;
    let (root, other) = (Ca::create("Root")?, Ca::create("Other")?);
    write_chain(&world.path("root.pem"), &[&root.certificate])?;
    write_chain(&world.path("other.pem"), &[&other.certificate])?;
    write_chain(&world.path("leaf.pem"), &[&root.code_signing("k", &public)?])?;
    let (server, _) = root.server("k")?;
    write_chain(&world.path("server.pem"), &[&server])?;
    let sign = ["sign", "model", "--key", "k", "--signing-certificate"];
    world.omsign_refuses(
        2,
        &[&sign[..], &["server.pem"]].concat(),
        &["the signing certificate is for another key"],
    )?;
    world.omsign_refuses(
        2,
        &[&sign[..], &["t/k.pub.pem"]].concat(),
        &["does not hold a certificate in PEM"],
    )?;
    let usage = root.tls_server_for("k", &public)?;
    write_chain(&world.path("usage.pem"), &[&usage])?;
    world.omsign_refuses(
        2,
        &[&sign[..], &["usage.pem"]].concat(),
        &["its ExtendedKeyUsage has no codeSigning"],
    )?;
    let expired = root.expired("k", &public)?;
    write_chain(&world.path("expired.pem"), &[&expired])?;
    world.omsign_refuses(
        2,
        &[&sign[..], &["expired.pem"]].concat(),
        &["nobody could verify what this certificate chain signs: CN=k expired on "],
    )?;
    world.omsign_ok(&[&sign[..], &["leaf.pem", "--signature", "c.sig"]].concat())?;
    let verify = ["verify", "model", "--signature", "c.sig"];
    world.omsign_ok(&[&verify[..], &["--certificate-chain", "root.pem"]].concat())?;
    world.omsign_refuses(
        1,
        &[&verify[..], &["--certificate-chain", "other.pem"]].concat(),
        &["was not issued by a trusted certificate"],
    )?;
    let by_key = [&verify[..], &["--public-key", "t/k.pub.pem"]].concat();
    world.omsign_refuses(
        1,
        &by_key,
        &["was signed with the certificate method", "hint: `omsign verify MODEL --certificate-chain"],
    )?;
    Ok(())
}

#[test]
fn pem_keys_and_their_passwords() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let openssl = |arguments: &[&str]| {
        let status = Command::new("openssl").args(arguments).current_dir(world.path("")).status()?;
        ensure!(status.success(), "openssl {arguments:?}");
        anyhow::Ok(())
    };
    openssl(&["ecparam", "-name", "secp521r1", "-genkey", "-noout", "-out", "sec1.pem"])?;
    openssl(&["pkcs8", "-topk8", "-in", "sec1.pem", "-out", "pkcs8.pem", "-passout", "pass:secret-3391"])?;
    openssl(&["ec", "-in", "sec1.pem", "-pubout", "-out", "pub.pem"])?;
    openssl(&["genrsa", "-out", "rsa.pem", "2048"])?;
    world.write("password", "secret-3391\n")?;
    world.write("wrong", "secret-0000\n")?;
    let sign = ["sign", "model", "--private-key"];
    for more in [&["sec1.pem"][..], &["pkcs8.pem", "--password-file", "password"]] {
        world.omsign_ok(&[&sign[..], more].concat())?;
        world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", "pub.pem"])?;
        fs::remove_file(world.path("model.sig"))?;
    }
    let wrong = [&sign[..], &["pkcs8.pem", "--password-file", "wrong"]].concat();
    world.omsign_refuses(2, &wrong, &["pkcs8.pem cannot be decrypted: the password is wrong"])?;
    let nowhere = [&sign[..], &["pkcs8.pem", "--password-file", "nowhere"]].concat();
    world.omsign_refuses(2, &nowhere, &["cannot read nowhere: No such file"])?;
    let unset = [&sign[..], &["pkcs8.pem", "--password-env", "OMSIGN_TEST_UNSET"]].concat();
    world.omsign_refuses(2, &unset, &["the environment variable OMSIGN_TEST_UNSET is not set"])?;
    let none = [&sign[..], &["pkcs8.pem"]].concat();
    world.omsign_refuses(
        2,
        &none,
        &["it needs a password", "hint: give the password with --password-file"],
    )?;
    world.omsign_refuses(
        2,
        &[&sign[..], &["rsa.pem"]].concat(),
        &["RSA with SHA-256 is not an algorithm of OMS", "hint: --allow-nonstandard-key signs all the same"],
    )?;
    world.omsign_refuses(
        2,
        &[&sign[..], &["pub.pem"]].concat(),
        &["pub.pem does not hold a private key in PEM, but: PUBLIC KEY"],
    )?;
    world.omsign_refuses(
        2,
        &["verify", "model", "--signature", "pub.pem", "--public-key", "rsa.pem"],
        &["rsa.pem does not hold a public key in PEM, but: ", "hint: `openssl pkey -in rsa.pem -pubout`"],
    )?;
    Ok(())
}

/// Paths may be any bytes; JSON may not.
#[test]
fn paths_that_are_not_utf8() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let openssl = Command::new("openssl")
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
        .arg(world.path("k.pem"))
        .status()?;
    ensure!(openssl.success());
    fs::write(world.path("model").join("a\u{7f}b"), "x")?;
    let omsign = |arguments: &[&[u8]]| {
        let mut command = Command::new(built("omsign")?);
        command.args(arguments.iter().map(|bytes| std::ffi::OsStr::from_bytes(bytes)));
        command.current_dir(world.path(""));
        world.without_surprises(&mut command);
        anyhow::Ok(command.output()?)
    };
    let signed =
        omsign(&[b"sign", b"model", b"--private-key", b"k.pem", b"--signature", b"\xff.sig", b"--json"])?;
    ensure!(signed.status.success(), "{signed:?}");
    let signed: serde_json::Value = serde_json::from_slice(&signed.stdout)?;
    ensure!(signed["signature"] == "\u{fffd}.sig", "{signed}");
    let listed = omsign(&[b"trust", b"list", b"--policy", b"\xff.toml", b"--json"])?;
    ensure!(listed.status.code().is_some_and(|code| code < 3), "{listed:?}");
    // Names with control characters go through JSON and back.
    let manifest = world.omsign_ok(&["digest", "model", "--json"])?;
    let parsed: serde_json::Value = serde_json::from_str(&manifest)?;
    ensure!(parsed.to_string().contains('\u{7f}') && !manifest.contains('\u{7f}'), "{manifest}");
    world.write("manifest.json", manifest)?;
    world.omsign_ok(&["sign", "--manifest", "manifest.json", "--private-key", "k.pem"])?;
    let shown: serde_json::Value =
        serde_json::from_str(&world.omsign_ok(&["inspect", "model.sig", "--json"])?)?;
    ensure!(shown.to_string().contains('\u{7f}'), "{shown}");
    Ok(())
}

/// Verifiers take no such names: nothing is signed that they would refuse.
#[test]
fn names_with_a_backslash() -> anyhow::Result<()> {
    let world = hashed::world()?;
    world.write("we\\ird.bin", "weights")?;
    let sign = |model, signature| ["sign", model, "--private-key", "k.pem", "--signature", signature];
    let backslash = "a backslash";
    world.omsign_refuses(2, &sign("we\\ird.bin", "s"), &[backslash])?;
    world.omsign_refuses(2, &["digest", "we\\ird.bin", "--json"], &[backslash])?;
    world.omsign_refuses(2, &sign("model", "model/a\\b.sig"), &[backslash, "write it elsewhere"])?;
    ensure!(!world.path("s").exists() && !world.path("model/a\\b.sig").exists());
    Ok(())
}

/// What comes of a command does not depend on whether anybody can read what it says.
#[test]
fn a_standard_error_that_cannot_be_written_to() -> anyhow::Result<()> {
    let world = hashed::world()?;
    hashed::sign(&world, &[])?;
    let verify = "omsign verify model --public-key k.pub --signature model.sig";
    for (command, status) in [
        (format!("{verify} --progress plain --allow-symlinks"), 0),
        (format!("echo more > model/more; {verify}"), 1),
        ("omsign verify model --public-key none --signature model.sig".to_owned(), 2),
    ] {
        let output = hashed::run(&world, &format!("exec 2> /dev/full; {command}"))?;
        ensure!(output.status.code() == Some(status), "{command}: {output:?}");
    }
    Ok(())
}

#[test]
fn without_an_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P384)?;
    world.model()?;
    world.omsign_refuses(
        2,
        &["sign", "model", "--key", "k"],
        &["no agent answers at", "hint: start it with `omsign-agent serve`"],
    )?;
    let uri = format!("pkcs11:token=t;object=k?module-path={MODULE}");
    let sign = |query: &str, option: &str| {
        let uri = format!("{uri}{query}");
        let mut command = Command::new(built("omsign")?);
        command.args(["sign", "model", option, &uri]).current_dir(world.path(""));
        world.without_surprises(&mut command);
        Ok::<_, anyhow::Error>(command.env("SOFTHSM2_CONF", token.config()).output()?)
    };
    let pin_source = format!("&pin-source=file:{}", text(&token.pin_file()));
    for (query, option) in [(pin_source.clone(), "--key-uri"), (format!("&pin-value={PIN}"), "--pkcs11-uri")]
    {
        let output = sign(&query, option)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{errors}");
        ensure!(errors.contains("use pin-source=") == query.contains("pin-value"), "{errors}");
        ensure!(!errors.contains(PIN), "{errors}");
        let public = text(&token.public_key("k"));
        world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", &public])?;
        fs::remove_file(world.path("model.sig"))?;
    }
    {
        let both = sign(&format!("{pin_source}&pin-value={PIN}"), "--key-uri")?;
        ensure!(String::from_utf8_lossy(&both.stderr).contains("give pin-source or pin-value, not both"));
    }
    for (query, expected) in [
        ("&pin-value=wrong-pin-8142".to_owned(), "it refused the PIN"),
        (String::new(), "the token needs a PIN, and there is no terminal to ask at"),
        ("&pin-source=/nowhere".to_owned(), "the PIN file /nowhere does not exist; write the PIN into it"),
    ] {
        let output = sign(&query, "--key-uri")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{query}: {errors}");
        ensure!(!errors.contains("wrong-pin-8142"), "{errors}");
        ensure!(!world.path("model.sig").exists());
    }
    Ok(())
}

#[test]
fn what_keeps_an_agent_from_starting() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let sections = token_section("t", &token, "") + &key_section("k", "t", "k");
    let config = world.listen() + &sections;
    let starts = |config: &str, status: i32, expected: &str| {
        let (code, errors) = refused(&world, config)?;
        ensure!(code == Some(status) && errors.contains(expected), "{code:?}: {errors:?} lacks {expected:?}");
        anyhow::Ok(())
    };
    let agent = Agent::start(&world, &config)?;
    starts(&config, 2, "an agent, or an operator's command, is running and owns the devices")?;
    starts(&config.replace("\"audit\"", "\"other\""), 2, "another agent is listening on")?;
    let elsewhere = config.replace("agent.sock", "other.sock");
    starts(&elsewhere, 2, "nothing is signed without an audit log: audit log ")?;
    ensure!(!world.path("other.sock").exists(), "a socket of an agent that did not start");
    drop(agent);
    // A socket whose agent was killed is taken over; a file is not.
    Agent::start(&world, &config)?.stop()?;
    ensure!(!world.path("agent.sock").exists(), "a clean stop removes the socket");
    ensure!(!world.path("agent.operator.sock").exists(), "and that of operators");
    world.write("agent.sock", "precious")?;
    starts(&config, 2, "agent.sock exists and is not a socket; remove it or choose another path")?;
    ensure!(fs::read_to_string(world.path("agent.sock"))? == "precious");
    fs::remove_file(world.path("agent.sock"))?;
    world.write("file", "")?;
    starts(&config.replace("agent.sock", "file"), 2, "listen.unix.path: ")?;
    starts(
        &config.replace("directory = \"audit\"", "directory = \"file\""),
        2,
        "file is not a directory; choose another place",
    )?;
    let operator =
        |path: &str| config.replacen("[audit]", &format!("operator = {{ path = \"{path}\" }}\n[audit]"), 1);
    starts(&operator("agent.sock"), 2, "listen.operator.path: ")?;
    starts(&operator("file"), 2, "file exists and is not a socket")?;
    let long = format!("l/{}.sock", "x".repeat(90));
    starts(&config.replace("agent.sock", &long), 2, "is too long for a Unix socket (107 bytes)")?;
    starts(&operator("./audit/../agent.sock"), 2, "is [listen] unix already; choose another path")?;
    for (written, named) in [
        ("pin = 314159 26", ": pin: "),
        ("pin 314159", "agent.toml"),
        ("pin = {\n value 314159\n}", "agent.toml"),
        ("314159", "agent.toml"),
    ] {
        let (_, errors) = refused(&world, &config.replace("[audit]", &format!("[audit]\n{written}\n")))?;
        ensure!(errors.contains(named) && errors.contains("text in quotes"), "{written}: {errors}");
        ensure!(!errors.contains("314159"), "{written}: {errors}");
    }
    starts(&config.replace("module", "modul"), 2, "token.t.modul: unknown key; did you mean \"module\"?")?;
    Ok(())
}

#[test]
fn results_that_cannot_be_written() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    for arguments in [&["keys", "export", "k"][..], &["digest", "model"], &["agent", "status", "--json"]] {
        let mut command = Command::new(built("omsign")?);
        world.without_surprises(command.args(arguments).current_dir(world.path("")));
        let output = command.stdout(fs::File::create("/dev/full")?).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{arguments:?}: {:?}: {errors}", output.status);
        ensure!(
            errors.contains("error: the result could not be written to standard output: No space"),
            "{errors}"
        );
        // Somebody who has seen enough is not an error.
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        ensure!(command.stdout(writer).output()?.status.success(), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn modules_that_are_none() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let text_file = text(&world.write("text.so", "not a library")?);
    for (module, expected) in [
        (text_file.as_str(), "cannot be loaded"),
        (
            "/lib/x86_64-linux-gnu/libc.so.6",
            "is a library but not a PKCS#11 module: it has no C_GetFunctionList",
        ),
    ] {
        let section = token_section("t", &token, "").replace(MODULE, module);
        let _agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
        world.model()?;
        let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
        ensure!(errors.contains(expected), "{errors}");
    }
    Ok(())
}
