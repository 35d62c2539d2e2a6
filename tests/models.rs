//! Models, bundles and disks as they should not be: a clear error, the right exit status, nothing left behind.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_tests::hashed::while_it_hashes;
use omsign_tests::world::{World, key, key_section, text, token_section};

#[test]
fn models_that_cannot_be_signed() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let sign = |model: &str, more: &[&str], expected: &[&str]| {
        world.omsign_refuses(2, &[&["sign", model, "--key", "k"], more].concat(), expected)
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
    sign("model", &[], &["model/link is a symbolic link", "hint: `sign --allow-symlinks`"])?;
    fs::remove_file(world.path("model/link"))?;
    symlink(world.path("agent.toml"), world.path("model/out"))?;
    sign("model", &["--allow-symlinks"], &["model/out is a symbolic link that leads out of the model"])?;
    fs::remove_file(world.path("model/out"))?;
    let name = world.path("model").join(OsStr::from_bytes(b"\xff"));
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
    let mut openssl = Command::new("openssl");
    openssl.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]).arg(world.path("k.pem"));
    ensure!(openssl.status()?.success());
    fs::set_permissions(world.path("k.pem"), PermissionsExt::from_mode(0o644))?;
    fs::create_dir(world.path("writable"))?;
    fs::set_permissions(world.path("writable"), PermissionsExt::from_mode(0o777))?;
    let sign = ["sign", "model", "--private-key", "k.pem", "--signature", "writable/model.sig"];
    let fails = |arguments: &[&str], expected: &str| -> anyhow::Result<()> {
        let mut command = Command::new(world.path("omsign"));
        let output = command.args(arguments).current_dir(world.path("")).uid(65534).gid(65534).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{arguments:?}: {errors}");
        ensure!(fs::read_dir(world.path("writable"))?.next().is_none(), "something was left");
        Ok(())
    };
    let file = "cannot read model/config.json: Permission denied";
    fails(&["digest", "model"], file)?;
    fails(&sign, file)?;
    fs::create_dir(world.path("model/secret"))?;
    fs::set_permissions(world.path("model/secret"), PermissionsExt::from_mode(0o000))?;
    fails(&sign, "cannot read model/secret: Permission denied")?;
    // What cannot be read hides nothing else that is wrong, and is not wrong by itself.
    for path in ["model/config.json", "model/secret"] {
        fs::set_permissions(world.path(path), PermissionsExt::from_mode(0o755))?;
    }
    world.write("model/secret/1", "1")?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.pem"])?;
    for path in ["model/config.json", "model/secret"] {
        fs::set_permissions(world.path(path), PermissionsExt::from_mode(0o000))?;
    }
    let mut openssl = Command::new("openssl");
    openssl.args(["ec", "-pubout", "-in"]).arg(world.path("k.pem")).arg("-out").arg(world.path("k.pub"));
    ensure!(openssl.output()?.status.success());
    let verify = ["verify", "model", "--public-key", "k.pub"];
    let listed = "  not readable: config.json (Permission denied (os error 13))\n  not readable: secret (";
    fails(
        &verify,
        &format!("error: the model cannot be compared with what was signed: 2 not readable\n{listed}"),
    )?;
    fs::write(world.path("model/README.md"), "changed")?;
    let mut command = Command::new(world.path("omsign"));
    command.args(verify).arg("--json").current_dir(world.path("")).uid(65534).gid(65534);
    let output = command.output()?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(output.status.code() == Some(1) && json["changed"] == serde_json::json!(["README.md"]), "{json}");
    ensure!(json["missing_count"] == 0 && json["not_readable_count"] == 2, "{json}");
    // Of what was not signed nobody needs to know more, if that is accepted.
    fs::set_permissions(world.path("model/config.json"), PermissionsExt::from_mode(0o755))?;
    fs::set_permissions(world.path("model/secret"), PermissionsExt::from_mode(0o755))?;
    fs::remove_dir_all(world.path("model/secret"))?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.pem"])?;
    fs::create_dir(world.path("model/more"))?;
    fs::set_permissions(world.path("model/more"), PermissionsExt::from_mode(0o000))?;
    fails(&verify, "cannot be compared with what was signed: 1 not readable\n  not readable: more (")?;
    let mut command = Command::new(world.path("omsign"));
    command.args(verify).arg("--ignore-unsigned-files").current_dir(world.path("")).uid(65534).gid(65534);
    let output = command.output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn a_model_that_changes_while_it_is_hashed() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let big = world.path("model/big.bin");
    fs::File::create(&big)?.set_len(256 << 20)?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
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
        let sign = world.omsign_refuses(2, &["sign", "model", "--key", "k"], &expected);
        let verify = ["verify", "model", "--public-key", "t/k.pub.pem"];
        let expected = ["1 changed\n", "  changed: big.bin (it changed while it was hashed)\n"];
        let result = sign.and_then(|()| world.omsign_refuses(1, &verify, &expected));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })
}

/// What comes while others are hashed is in no manifest: what would be signed was there at no time.
#[test]
fn a_file_that_comes_while_others_are_hashed() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let output =
        while_it_hashes(&world, &["sign", "model", "--key", "k"], || world.write("model/new", "").map(drop))?;
    let errors = String::from_utf8(output.stderr)?;
    let expected = "model/new changed while it was hashed";
    ensure!(output.status.code() == Some(2) && errors.contains(expected), "{errors}");
    ensure!(!world.path("model.sig").exists());
    Ok(())
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

/// Whatever the device is: what was signed is not given away.
#[test]
fn a_full_disk_under_the_audit_log() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    full_disk(&world, &(token_section("t", &token, "") + &key_section("k", "t", "k")))?;
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    token.generate("k")?;
    full_disk(&world, &(token.section("t")? + &key_section("k", "t", "k")))?;
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.persistent_key("k", "ecc256", 0x8100_0010, AUTH)?;
    full_disk(&world, &(chip.section("t") + &key("k", "t", "handle = \"0x81000010\"")))?;
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    full_disk(&world, &(card.section("t") + &key("k", "t", "slot = \"9c\"")))
}

fn full_disk(world: &World, device: &str) -> anyhow::Result<()> {
    world.model()?;
    let config = world.listen().replace("\"audit\"", "\"disk/audit\"") + device;
    world.write("agent.toml", config)?;
    // Started in the namespace that has the small disk; asked from the same shell.
    let script = r#"
        "$AGENT" serve --config agent.toml > /dev/null 2> agent.log &
        agent=$!
        trap 'kill $agent; wait' EXIT
        while ! [ -S agent.sock ]; do :; done
        "$OMSIGN" sign model --key k --signature 1.sig
        head -c 70000 /dev/zero > disk/filler || true
        # A few more lines fit into the last page of the file.
        for i in $(seq 20); do "$OMSIGN" sign model --key k --signature full.sig >/dev/null || echo "status $?"; done
        "$AGENT" doctor --config agent.toml > doctor.txt || true
        rm -f full.sig disk/filler
        "$OMSIGN" sign model --key k --signature 2.sig
        ls ?.sig; cat disk/audit/audit.jsonl > audit.jsonl
    "#;
    let script =
        script.replace("$AGENT", &text(&built("omsign-agent")?)).replace("$OMSIGN", &text(&built("omsign")?));
    let output = on_a_small_disk(world, &script)?;
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(out.matches("status 2").count() > 5 && out.contains("1.sig\n2.sig\n"), "{out}{errors}");
    ensure!(errors.contains("the audit log cannot be written: No space left on device"), "{out}{errors}");
    let doctor = fs::read_to_string(world.path("doctor.txt"))?;
    ensure!(doctor.contains("disk/audit cannot be written: No space left on device"), "{doctor}");
    // The agent in that shell ended with it, and removed its socket.
    ensure!(!world.path("agent.sock").exists(), "{out}{errors}");
    for line in fs::read_to_string(world.path("audit.jsonl"))?.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("half a line: {line}"))?;
    }
    Ok(())
}

#[test]
fn models_that_are_not_what_was_signed() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let verify = ["verify", "model", "--signature", "model.sig", "--public-key", "t/k.pub.pem"];
    world.omsign_ok(&verify)?;
    fs::write(world.path("model/config.json"), "{}")?;
    fs::remove_file(world.path("model/README.md"))?;
    fs::write(world.path("model/added\u{1b}[31m"), "")?;
    let expected = [
        "1 changed, 1 missing, 1 not signed",
        "  changed: config.json (",
        "  missing: README.md\n",
        "  not signed: added\\u{1b}[31m\n",
    ];
    world.omsign_refuses(1, &verify, &expected)?;
    let output = world.omsign(&[&verify[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(json["verified"] == false && json["changed"] == serde_json::json!(["config.json"]), "{json}");
    // A typing mistake is told of, where it could matter.
    let ignoring = [&verify[..], &["--ignore-paths", "nothing"]].concat();
    let errors = world.omsign_fails(1, &ignoring)?;
    ensure!(errors.contains("warning: --ignore-paths nothing: there is nothing of this name"), "{errors}");
    // What was added may be accepted, what was changed or removed never.
    world.omsign_refuses(
        1,
        &[&verify[..], &["--ignore-unsigned-files"]].concat(),
        &["1 changed, 1 missing\n"],
    )?;
    // What no model can have hides nothing else: a link where the signature allows none, a pipe, a name.
    symlink("config.json", world.path("model/link"))?;
    ensure!(Command::new("mkfifo").arg(world.path("model/pipe")).status()?.success());
    fs::write(world.path("model").join(OsStr::from_bytes(b"\xff")), "x")?;
    let expected = [
        "1 changed, 1 missing, 3 not possible in a model, 1 not signed\n",
        "  not possible in a model: link (is a symbolic link, and symbolic links are not allowed here",
        "  not possible in a model: pipe (is neither a file nor a directory (OMS 6.1))\n",
        "  not possible in a model: \u{fffd} (has a name that is not valid UTF-8",
    ];
    world.omsign_refuses(1, &verify, &expected)?;
    let all_the_same = [&verify[..], &["--ignore-unsigned-files"]].concat();
    world.omsign_refuses(1, &all_the_same, &["1 changed, 1 missing\n"])?;
    let output = world.omsign(&[&verify[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(json["not_possible_count"] == 3 && json["not_possible"][0]["name"] == "link", "{json}");
    // Not even a link to the same content is the file that was signed.
    fs::rename(world.path("model/tokenizer.json"), world.path("elsewhere"))?;
    symlink("../elsewhere", world.path("model/tokenizer.json"))?;
    world.omsign_refuses(1, &all_the_same, &["1 changed, 1 missing, 1 not possible in a model\n"])?;
    fs::remove_file(world.path("model/tokenizer.json"))?;
    fs::rename(world.path("elsewhere"), world.path("model/tokenizer.json"))?;
    // What is no bundle is outlined all the same.
    let bundle = fs::read_to_string(world.path("model.sig"))?;
    world.write("odd.sig", bundle.replacen("{", "{\"more\":1,", 1))?;
    let output = world.omsign(&["inspect", "odd.sig"])?;
    let shown = String::from_utf8([output.stdout, output.stderr].concat())?;
    for line in [
        "fields          [\"dsseEnvelope\",\"mediaType\",\"more\",",
        "resources       9\n",
        "unknown field `more`",
    ] {
        ensure!(output.status.code() == Some(1) && shown.contains(line), "{line}: {shown}");
    }
    let output = world.omsign(&["inspect", "--json", "odd.sig"])?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(json["outline"]["signatures"] == 1 && json["verified"] == false, "{json}");
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
        world.omsign_refuses(status, &arguments.each_ref().map(String::as_str), &[expected])?;
    }
    Ok(())
}

#[test]
fn what_a_bundle_says_is_shown_and_not_trusted() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--ignore-paths", "model/README.md"])?;
    let shown = world.omsign_ok(&["inspect", "model.sig"])?;
    ensure!(shown.starts_with("NOT VERIFIED") && shown.contains("  config.json\n"), "{shown}");
    ensure!(shown.contains("left out        .git .gitattributes .github .gitignore README.md\n"), "{shown}");
    let json: serde_json::Value =
        serde_json::from_str(&world.omsign_ok(&["inspect", "model.sig", "--json"])?)?;
    ensure!(
        json["verified"] == false && json["method"] == "key" && json["files"]["README.md"].is_null(),
        "{json}"
    );
    // The digest alone is the one that is signed, and what was left out may change.
    let digest = world.omsign_ok(&["digest", "model", "--ignore-paths", "README.md"])?;
    ensure!(json["root_digest"] == digest.trim(), "{digest}");
    // A bundle inside the model is no part of it.
    fs::copy(world.path("model.sig"), world.path("model/model.sig"))?;
    let inside = ["digest", "model", "--ignore-paths", "README.md", "--signature", "model/model.sig"];
    ensure!(world.omsign_ok(&inside)? == digest, "{digest}");
    fs::remove_file(world.path("model/model.sig"))?;
    fs::write(world.path("model/README.md"), "rewritten")?;
    world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", "t/k.pub.pem"])?;
    // The same model gives the same payload, byte for byte; a bundle inside the model is not part of it.
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "model/a.sig"])?;
    let first = fs::read_to_string(world.path("model/a.sig"))?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "model/a.sig"])?;
    let payload = |text: &str| {
        serde_json::from_str(text).map(|b: serde_json::Value| b["dsseEnvelope"]["payload"].clone())
    };
    ensure!(payload(&first)? == payload(&fs::read_to_string(world.path("model/a.sig"))?)?);
    world.omsign_ok(&["verify", "model", "--signature", "model/a.sig", "--public-key", "t/k.pub.pem"])?;
    Ok(())
}
