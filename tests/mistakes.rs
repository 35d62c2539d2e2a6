//! Every mistake that a user can make gets a clear error, the right exit status, and leaves nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, PIN};
use omsign_tests::agent::{Agent, refused};
use omsign_tests::world::{World, key_section, text, token_section};
use openssl::pkey::PKey;

/// Every path below a directory.
fn listing(root: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
            found.insert(entry.path());
        }
    }
    Ok(found)
}

/// Runs `omsign`, which has to fail like this and leave nothing.
fn fails(world: &World, status: i32, arguments: &[&str], expected: &[&str]) -> anyhow::Result<()> {
    let before = listing(&world.path(""))?;
    let errors = world.omsign_fails(status, arguments)?;
    for part in expected {
        ensure!(errors.contains(part), "{arguments:?}: {errors:?} does not contain {part:?}");
    }
    ensure!(errors.starts_with("error: "), "{errors}");
    let after = listing(&world.path(""))?;
    // The agent's own log and audit entries are not what a failing client leaves.
    let left: Vec<_> = after.difference(&before).filter(|path| !path.ends_with("audit.jsonl")).collect();
    ensure!(left.is_empty(), "{arguments:?} left {left:?}");
    Ok(())
}

fn world_with_agent() -> anyhow::Result<(World, Agent)> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    Ok((world, agent))
}

#[test]
fn models_that_cannot_be_signed() -> anyhow::Result<()> {
    let (world, _agent) = world_with_agent()?;
    let sign = |model: &str, more: &[&str], expected: &[&str]| {
        fails(&world, 2, &[&["sign", model, "--key", "k"], more].concat(), expected)
    };
    sign("nowhere", &[], &["cannot read nowhere", "No such file"])?;
    fs::create_dir(world.path("empty"))?;
    fs::write(world.path("empty/.gitignore"), "")?;
    sign("empty", &[], &["empty has no files to sign"])?;
    sign("model", &["--key", "x"], &["error: the argument '--key <NAME>' cannot be used multiple times"])?;
    sign(
        "model",
        &["--ignore-paths", "nothing"],
        &["--ignore-paths nothing: there is nothing of this name"],
    )?;
    sign("model", &["--ignore-paths", "*.json"], &["patterns are not part of OMS"])?;
    sign("model", &["--signature", "no/such/dir.sig"], &["cannot write no/such/dir.sig"])?;
    symlink("config.json", world.path("model/link"))?;
    sign("model", &[], &["model/link is a symbolic link", "hint: --allow-symlinks"])?;
    fs::remove_file(world.path("model/link"))?;
    symlink(world.path("agent.toml"), world.path("model/out"))?;
    sign("model", &["--allow-symlinks"], &["model/out is a symbolic link that leads out of the model"])?;
    fs::remove_file(world.path("model/out"))?;
    let name = world.path("model").join(std::ffi::OsStr::from_bytes(b"\xff"));
    fs::write(&name, "x")?;
    sign("model", &[], &["is not valid UTF-8 (OMS 6.1.2)", "hint: rename it"])?;
    fs::remove_file(&name)?;
    let mut mkfifo = Command::new("mkfifo");
    ensure!(mkfifo.arg(world.path("model/pipe")).status()?.success());
    sign("model", &[], &["model/pipe is neither a file nor a directory"])?;
    fs::remove_file(world.path("model/pipe"))?;
    // A typing mistake does not cost a model, a key or anything else that is no bundle.
    for precious in ["model/config.json", "agent.toml", "model"] {
        let before = fs::read(world.path(precious)).unwrap_or_default();
        sign(
            "model",
            &["--signature", precious],
            &["exists and is not a bundle", "hint: choose another --signature"],
        )?;
        ensure!(fs::read(world.path(precious)).unwrap_or_default() == before);
    }
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    Ok(())
}

/// Root may read everything, so this one drops to nobody.
#[test]
fn an_unreadable_file_is_named() -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = World::new()?;
    world.model()?;
    fs::set_permissions(world.path(""), PermissionsExt::from_mode(0o755))?;
    fs::set_permissions(world.path("model/config.json"), PermissionsExt::from_mode(0o000))?;
    fs::copy(built("omsign")?, world.path("omsign"))?;
    let mut command = Command::new(world.path("omsign"));
    let output =
        command.args(["digest", "model"]).current_dir(world.path("")).uid(65534).gid(65534).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{output:?}");
    ensure!(errors.contains("cannot read model/config.json: Permission denied"), "{errors}");
    Ok(())
}

#[test]
fn a_model_that_changes_while_it_is_hashed() -> anyhow::Result<()> {
    let (world, _agent) = world_with_agent()?;
    let big = world.path("model/big.bin");
    fs::File::create(&big)?.set_len(256 << 20)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::Write as _;
            let mut writer = fs::OpenOptions::new().append(true).open(&big).expect("opened");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                writer.write_all(b"x").expect("appended");
            }
        });
        let expected = ["big.bin changed while it was hashed", "hint: try again when nothing writes"];
        let result = fails(&world, 2, &["sign", "model", "--key", "k"], &expected);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })
}

/// A file system of 64 KiB, for this process and its children only.
fn on_a_small_disk(world: &World, script: &str) -> anyhow::Result<std::process::Output> {
    fs::create_dir_all(world.path("disk"))?;
    let mount = "mount -t tmpfs -o size=64k,mode=0777 tmpfs \"$0\"";
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "--mount", "sh", "-ec"]).arg(format!("{mount}\n{script}"));
    unshare.arg(world.path("disk")).current_dir(world.path(""));
    world.without_surprises(&mut unshare);
    unshare.output().context("unshare (apt: util-linux)")
}

#[test]
fn a_full_disk_while_the_bundle_is_written() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut openssl = Command::new("openssl");
    openssl.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]).arg(world.path("k.pem"));
    ensure!(openssl.status()?.success());
    // 300 files make a bundle of more than 40 KB.
    for number in 0..300 {
        world.write(&format!("model/{number:040}"), "")?;
    }
    let script = r#"
        head -c 32768 /dev/zero > disk/filler
        echo '{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","old":1}' > disk/model.sig
        "$OMSIGN" sign model --private-key k.pem --signature disk/model.sig || echo "status $?"
        ls -A disk; cat disk/model.sig
    "#;
    let output = on_a_small_disk(&world, &script.replace("$OMSIGN", &text(&built("omsign")?)))?;
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(errors.contains("cannot write disk/model.sig: No space left on device"), "{out}{errors}");
    ensure!(out.contains("status 2\nfiller\nmodel.sig\n{") && out.ends_with("\"old\":1}\n"), "{out}{errors}");
    Ok(())
}

#[test]
fn a_full_disk_under_the_audit_log() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.model()?;
    let config = world.listen().replace("\"audit\"", "\"disk/audit\"") + &token_section("t", &token, "");
    world.write("agent.toml", config + &key_section("k", "t", "k"))?;
    // Started in the namespace that has the small disk; asked from the same shell.
    let script = r#"
        "$AGENT" serve --config agent.toml > /dev/null 2> agent.log &
        trap 'kill %1; wait' EXIT
        while ! [ -S agent.sock ]; do :; done
        "$OMSIGN" sign model --key k --signature 1.sig
        head -c 70000 /dev/zero > disk/filler || true
        # A few more lines fit into the last page of the file.
        for i in $(seq 20); do "$OMSIGN" sign model --key k --signature full.sig >/dev/null || echo "status $?"; done
        rm -f full.sig disk/filler
        "$OMSIGN" sign model --key k --signature 2.sig
        ls ?.sig; cat disk/audit/audit.jsonl > audit.jsonl
    "#;
    let script =
        script.replace("$AGENT", &text(&built("omsign-agent")?)).replace("$OMSIGN", &text(&built("omsign")?));
    let output = on_a_small_disk(&world, &script)?;
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(out.matches("status 2").count() > 5 && out.contains("1.sig\n2.sig\n"), "{out}{errors}");
    ensure!(errors.contains("the audit log cannot be written: No space left on device"), "{out}{errors}");
    for line in fs::read_to_string(world.path("audit.jsonl"))?.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("half a line: {line}"))?;
    }
    Ok(())
}

#[test]
fn keys_that_cannot_be_used() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "good", KeyType::P256)?;
    token.generate("rsa", KeyType::Rsa, Objects::Pair)?;
    token.generate("public", KeyType::P256, Objects::PublicOnly)?;
    token.generate("private", KeyType::P256, Objects::PrivateOnly)?;
    token.generate("certified", KeyType::P384, Objects::Certified)?;
    token.generate("twin", KeyType::P256, Objects::Pair)?;
    token.generate("twin", KeyType::P256, Objects::Pair)?;
    let names = ["good", "rsa", "public", "private", "certified", "twin", "absent"];
    let mut config = world.listen() + &token_section("t", &token, "sessions = 3");
    for name in names {
        config += &key_section(name, "t", name);
    }
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    for (name, reason) in [
        ("rsa", "is of type CKK_RSA; OMS signs with ECDSA on P-256, P-384 or P-521: generate an EC key"),
        ("public", "the token has a public half with label \"public\" but no private key"),
        ("private", "no public-key object, EC point or certificate of it is on the token"),
        ("twin", "2 private keys match label \"twin\"; tell them apart with object = { id"),
        ("absent", "the token has no private key with label \"absent\""),
    ] {
        fails(&world, 2, &["sign", "model", "--key", name], &["cannot sign", reason])?;
    }
    fails(
        &world,
        2,
        &["sign", "model", "--key", "nobody"],
        &["no key \"nobody\" is configured", "`omsign keys` lists"],
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
    ensure!(states.iter().filter(|state| *state == "unusable").count() == 5, "{states:?}");
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
    ensure!(report.contains("ERROR   key.rsa: the key with label \"rsa\" is of type CKK_RSA"), "{report}");
    ensure!(report.contains("ok      token.t: its PIN source can be read"), "{report}");
    ensure!(!report.contains(PIN));
    Ok(())
}

#[test]
fn certificates_that_do_not_fit() -> anyhow::Result<()> {
    let (world, _agent) = world_with_agent()?;
    let public = PKey::public_key_from_pem(&fs::read(world.path("t/k.pub.pem"))?)?;
    let (root, other) = (Ca::create("Root")?, Ca::create("Other")?);
    write_chain(&world.path("root.pem"), &[&root.certificate])?;
    write_chain(&world.path("other.pem"), &[&other.certificate])?;
    write_chain(&world.path("leaf.pem"), &[&root.code_signing("k", &public)?])?;
    let (server, _) = root.server("k")?;
    write_chain(&world.path("server.pem"), &[&server])?;
    let sign = ["sign", "model", "--key", "k", "--signing-certificate"];
    fails(
        &world,
        2,
        &[&sign[..], &["server.pem"]].concat(),
        &["the signing certificate is for another key"],
    )?;
    fails(&world, 2, &[&sign[..], &["t/k.pub.pem"]].concat(), &["does not hold a certificate in PEM"])?;
    let usage = root.tls_server_for("k", &public)?;
    write_chain(&world.path("usage.pem"), &[&usage])?;
    fails(&world, 2, &[&sign[..], &["usage.pem"]].concat(), &["its ExtendedKeyUsage has no codeSigning"])?;
    let expired = root.expired("k", &public)?;
    write_chain(&world.path("expired.pem"), &[&expired])?;
    fails(&world, 2, &[&sign[..], &["expired.pem"]].concat(), &["the signing certificate is not valid now"])?;
    world.omsign_ok(&[&sign[..], &["leaf.pem", "--signature", "c.sig"]].concat())?;
    let verify = ["verify", "model", "--signature", "c.sig"];
    world.omsign_ok(&[&verify[..], &["--certificate-chain", "root.pem"]].concat())?;
    fails(
        &world,
        1,
        &[&verify[..], &["--certificate-chain", "other.pem"]].concat(),
        &["the signing certificate does not lead to a trusted one (RFC 5280, 6.1)"],
    )?;
    let by_key = [&verify[..], &["--public-key", "t/k.pub.pem"]].concat();
    fails(
        &world,
        1,
        &by_key,
        &["was signed with the certificate method", "hint: verify it with --certificate-chain"],
    )?;
    Ok(())
}

#[test]
fn models_that_are_not_what_was_signed() -> anyhow::Result<()> {
    let (world, _agent) = world_with_agent()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let verify = ["verify", "model", "--signature", "model.sig", "--public-key", "t/k.pub.pem"];
    world.omsign_ok(&verify)?;
    fs::write(world.path("model/config.json"), "{}")?;
    fs::remove_file(world.path("model/README.md"))?;
    fs::write(world.path("model/added\u{1b}[31m"), "")?;
    let expected = [
        "1 changed, 1 missing, 1 not signed",
        "  changed: config.json\n",
        "  missing: README.md\n",
        "  not signed: added\\u{1b}[31m\n",
    ];
    fails(&world, 1, &verify, &expected)?;
    let output = world.omsign(&[&verify[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(json["verified"] == false && json["changed"] == serde_json::json!(["config.json"]), "{json}");
    // What was added may be accepted, what was changed or removed never.
    fails(&world, 1, &[&verify[..], &["--ignore-unsigned-files"]].concat(), &["1 changed, 1 missing\n"])?;
    // A link where the signature allows none.
    symlink("config.json", world.path("model/link"))?;
    fails(&world, 1, &verify, &["model/link is a symbolic link"])?;
    // Not a bundle, not there, another key.
    let with = |signature: &str, key: &str| {
        ["verify", "model", "--signature", signature, "--public-key", key].map(str::to_owned)
    };
    for (status, signature, key, expected) in [
        (1, "model/tokenizer.json", "t/k.pub.pem", "the bundle is malformed (OMS 4)"),
        (2, "nowhere.sig", "t/k.pub.pem", "cannot read nowhere.sig"),
        (2, "model.sig", "agent.toml", "agent.toml does not hold a public key in PEM"),
    ] {
        let arguments = with(signature, key);
        fails(&world, status, &arguments.each_ref().map(String::as_str), &[expected])?;
    }
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
    fails(&world, 2, &wrong, &["pkcs8.pem cannot be decrypted: the password is wrong"])?;
    let nowhere = [&sign[..], &["pkcs8.pem", "--password-file", "nowhere"]].concat();
    fails(&world, 2, &nowhere, &["cannot read nowhere: No such file"])?;
    let unset = [&sign[..], &["pkcs8.pem", "--password-env", "OMSIGN_TEST_UNSET"]].concat();
    fails(&world, 2, &unset, &["the environment variable OMSIGN_TEST_UNSET is not set"])?;
    let none = [&sign[..], &["pkcs8.pem"]].concat();
    fails(&world, 2, &none, &["it needs a password", "hint: give the password with --password-file"])?;
    fails(
        &world,
        2,
        &[&sign[..], &["rsa.pem"]].concat(),
        &["the key is not an elliptic-curve key: OMS signs with"],
    )?;
    fails(&world, 2, &[&sign[..], &["pub.pem"]].concat(), &["pub.pem does not hold a private key in PEM"])?;
    Ok(())
}

#[test]
fn without_an_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P384)?;
    world.model()?;
    fails(
        &world,
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
        ("&pin-source=/nowhere".to_owned(), "the PIN file /nowhere: No such file"),
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
    starts(&config, 2, "another agent is listening on")?;
    let elsewhere = config.replace("agent.sock", "other.sock");
    starts(&elsewhere, 2, "nothing is signed without an audit log: audit log ")?;
    ensure!(!world.path("other.sock").exists(), "a socket of an agent that did not start");
    drop(agent);
    // A socket whose agent was killed is taken over; a file is not.
    Agent::start(&world, &config)?.stop()?;
    ensure!(!world.path("agent.sock").exists(), "a clean stop removes the socket");
    world.write("agent.sock", "precious")?;
    starts(&config, 2, "agent.sock exists and is not a socket; remove it or choose another path")?;
    ensure!(fs::read_to_string(world.path("agent.sock"))? == "precious");
    fs::remove_file(world.path("agent.sock"))?;
    world.write("file", "")?;
    starts(&config.replace("agent.sock", "file"), 2, "listen.unix.path: ")?;
    starts(
        &config.replace("directory = \"audit\"", "directory = \"file\""),
        2,
        "nothing is signed without an audit log",
    )?;
    starts(&config.replace("module", "modul"), 2, "token.t.modul: unknown key; did you mean \"module\"?")?;
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
