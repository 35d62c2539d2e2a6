//! A model is released once more: what lies beside it and in it from the time before, and what other tools make of it.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;

use anyhow::ensure;
use omsign_tests::forge;
use omsign_tests::hashed::shell;
use omsign_tests::world::World;
use serde_json::json;

const SIGN: [&str; 4] = ["sign", "model", "--private-key", "k.key"];
const VERIFY: [&str; 4] = ["verify", "model", "--public-key", "k.pub"];

fn world() -> anyhow::Result<World> {
    let world = World::new()?;
    world.write("model/config.json", "{}")?;
    world.write("model/sub/weights.bin", "0123456789")?;
    shell(&world, "openssl ecparam -name prime256v1 -genkey -noout -out k.key")?;
    shell(&world, "openssl ec -in k.key -pubout -out k.pub 2>&1")?;
    Ok(world)
}

fn warned(world: &World, arguments: &[&str]) -> anyhow::Result<String> {
    let output = world.omsign(arguments)?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

/// Signed where it is published, and once more from elsewhere: the bundle of the time before is no part of it.
#[test]
fn a_published_bundle_is_no_part_of_the_model() -> anyhow::Result<()> {
    let world = world()?;
    let root = world.omsign_ok(&["digest", "model"])?;
    warned(&world, &[&SIGN[..], &["--signature", "model/model.sig"]].concat())?;
    ensure!(world.omsign_ok(&["digest", "model"])? == root);
    world.write("model/config.json", "{\"new\": 1}")?;
    let notes = warned(&world, &SIGN)?;
    ensure!(notes.contains("note: model.sig in the model is a bundle, and no part of it"), "{notes}");
    fs::rename(world.path("model.sig"), world.path("model/model.sig"))?;
    world.omsign_ok(&VERIFY)?;
    // Nobody waits for a pipe of its name.
    fs::remove_file(world.path("model/model.sig"))?;
    shell(&world, "mkfifo model/model.sig")?;
    world.omsign_refuses(2, &["digest", "model"], &["is neither a file nor a directory"])?;
    fs::remove_file(world.path("model/model.sig"))?;
    // What is only called so is a file like others.
    world.write("model/model.sig", "no bundle")?;
    world.omsign_ok(&SIGN)?;
    let inspected: serde_json::Value =
        serde_json::from_str(&world.omsign_ok(&["inspect", "model.sig", "--json"])?)?;
    ensure!(inspected["files"]["model.sig"].is_string(), "{inspected}");
    Ok(())
}

#[test]
fn another_models_bundle_is_not_replaced_in_silence() -> anyhow::Result<()> {
    let world = world()?;
    world.write("other/x", "x")?;
    ensure!(warned(&world, &SIGN)?.is_empty() && warned(&world, &SIGN)?.is_empty());
    let notes = warned(&world, &["sign", "other", "--private-key", "k.key"])?;
    ensure!(notes.contains("warning: this replaced the bundle of a model called \"model\""), "{notes}");
    // A directory may be called anything; a model is called what its signer says.
    warned(&world, &[&SIGN[..], &["--model-name", "acme/llama"]].concat())?;
    let verified = world
        .omsign_ok(&[&VERIFY[..], &["--signature", "model.sig", "--model-name", "acme/llama"]].concat())?;
    ensure!(verified.contains("acme/llama"), "{verified}");
    let manifest = world.omsign_ok(&["digest", "model", "--json", "--model-name", "acme/llama"])?;
    ensure!(manifest.contains("\"model\":\"acme/llama\""), "{manifest}");
    Ok(())
}

/// What would come to nothing after hours of hashing is refused before: the model here takes them.
#[test]
fn refused_before_anything_is_hashed() -> anyhow::Result<()> {
    let world = world()?;
    let endless = fs::File::create(world.path("model/endless"))?;
    endless.set_len(1 << 42)?;
    let sign = |signature: &'static str| [&SIGN[..], &["--signature", signature]].concat();
    world.omsign_refuses(2, &sign("nowhere/model.sig"), &["cannot write nowhere/model.sig: No such file"])?;
    world.omsign_refuses(2, &sign("k.pub/model.sig"), &["cannot write k.pub/model.sig: not a directory"])?;
    world.omsign_refuses(2, &sign("/proc/model.sig"), &["cannot write /proc/model.sig: "])?;
    world.omsign_refuses(2, &sign("-"), &["name a file with --signature"])?;
    world.write("model/c[1].txt", "")?;
    for arguments in [&["--ignore-paths", "model/c[1].txt"][..], &["--signature", "model/model*.sig"]] {
        let arguments = [&SIGN[..], arguments].concat();
        world.omsign_refuses(
            2,
            &arguments,
            &["other verifiers take *, ? and [ in it for a pattern (6.2.1)"],
        )?;
    }
    // A bundle that a link gives a second name could be left out by one of the two only.
    symlink("sub", world.path("model/link"))?;
    let linked = [&SIGN[..], &["--allow-symlinks", "--signature", "model/sub/model.sig"]].concat();
    let expected = ["is one of several there, through a symbolic link; write it elsewhere"];
    world.omsign_refuses(2, &linked, &expected)?;
    fs::remove_file(world.path("model/link"))?;
    fs::remove_file(world.path("model/endless"))?;
    world.omsign_ok(&linked)?;
    symlink("sub/model.sig", world.path("model/latest.sig"))?;
    world.omsign_refuses(2, &linked, &expected)
}

/// What is behind a link would be hashed with the model, or stay what it was.
#[test]
fn no_bundle_is_written_through_a_link() -> anyhow::Result<()> {
    let world = world()?;
    world.omsign_ok(&[&SIGN[..], &["--signature", "v1.sig"]].concat())?;
    symlink("v1.sig", world.path("current.sig"))?;
    symlink("nowhere", world.path("dangling.sig"))?;
    for link in ["current.sig", "dangling.sig"] {
        let sign = [&SIGN[..], &["--signature", link]].concat();
        world.omsign_refuses(2, &sign, &["is a symbolic link; name the file that it leads to"])?;
    }
    Ok(())
}

/// What is one and the same, however it is written.
#[test]
fn other_spellings() -> anyhow::Result<()> {
    let world = world()?;
    world.omsign_ok(&SIGN)?;
    // A key's point, in its other form (RFC 5480, 2.2).
    shell(&world, "openssl ec -in k.key -pubout -conv_form compressed -out c.pub 2>&1")?;
    world.omsign_ok(&["verify", "model", "--public-key", "c.pub"])?;
    // All of a model is the whole of it.
    for all in [".", "model", "model/."] {
        let verified = world.omsign_ok(&[&VERIFY[..], &["--partial", all]].concat())?;
        ensure!(verified.contains("content of every signed file, no unsigned files"), "{verified}");
    }
    // From within a part of it, here is that part.
    let part =
        "cd model/sub && omsign verify .. --signature ../../model.sig --public-key ../../k.pub --partial .";
    ensure!(shell(&world, part)?.contains("content of the files asked for"));
    let verified = world.omsign_ok(&[&VERIFY[..], &["--partial", "sub", "config.json"]].concat())?;
    ensure!(verified.contains("verified 2 files") && verified.contains("content of the files asked for"));
    // A directory is called what the file system says; what was signed is the name of before.
    let name = std::ffi::OsStr::from_bytes(b"model-\xff");
    fs::rename(world.path("model"), world.path("").join(name))?;
    shell(&world, "omsign verify model-* --public-key k.pub --signature model.sig")?;
    let refused = shell(&world, "omsign sign model-* --private-key k.key 2>&1 || echo status $?")?;
    ensure!(refused.contains("not valid UTF-8 (OMS 6.1.2)"), "{refused}");
    fs::rename(world.path("").join(name), world.path("model"))?;
    // The Go tool records what is left out as it was typed.
    let mut statement = forge::statement(&[("config.json", "{}"), ("sub/weights.bin", "0123456789")]);
    statement["predicate"]["serialization"]["ignore_paths"] =
        json!(["cache/", "./logs/x/", "a/./b", ".", "./"]);
    let (key, payload) = (forge::private_key(&world.path("k.key"))?, statement.to_string());
    let signature = forge::sign(&key, payload.as_bytes())?;
    let bundle = forge::bundle(&forge::key_material(&key)?, payload.as_bytes(), &signature);
    world.write("model.sig", bundle.to_string())?;
    world.write("model/cache/x", "left out")?;
    world.write("model/logs/x/y", "left out")?;
    world.omsign_ok(&VERIFY)?;
    world.write("model/logs/y", "not left out")?;
    world.omsign_refuses(1, &VERIFY, &["not signed: logs/y"])
}

/// Files that are mistaken for a bundle.
#[test]
fn what_is_no_bundle() -> anyhow::Result<()> {
    let world = world()?;
    world.omsign_ok(&SIGN)?;
    let half = fs::read(world.path("model.sig"))?;
    world.write("half.sig", half.get(..300).unwrap_or_default())?;
    world.write("manifest.json", world.omsign_ok(&["digest", "model", "--json"])?)?;
    world.write("weights", [8, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'])?;
    for (file, what) in [
        ("k.pub", "it holds PUBLIC KEY in PEM"),
        ("/dev/null", "it is empty"),
        ("half.sig", "it ends in the middle, after 300 bytes"),
        ("manifest.json", "it is a manifest; `omsign sign --manifest` signs it"),
        ("weights", "it is no JSON object"),
    ] {
        let errors = world.omsign_fails(1, &[&VERIFY[..], &["--bundle", file]].concat())?;
        ensure!(errors.contains(&format!("{file} is no bundle: {what}")), "{errors}");
    }
    Ok(())
}

/// What is seen first, and what is said to do about it.
#[test]
fn hints_that_fit() -> anyhow::Result<()> {
    let world = world()?;
    world.omsign_ok(&SIGN)?;
    let says = |status, arguments: &[&str], hint: &str| -> anyhow::Result<()> {
        let errors = world.omsign_fails(status, arguments)?;
        ensure!(errors.contains(hint), "{errors:?} does not contain {hint:?}");
        Ok(())
    };
    world.write("model/.cache/huggingface/a.metadata", "x")?;
    says(1, &VERIFY, "hint: --ignore-paths .cache accepts what is below .cache alone")?;
    says(
        2,
        &["verify", "model", "--certificate-identity", "CN=x"],
        "hint: that is --public-key, --certificate-chain",
    )?;
    says(
        2,
        &["digest", "model", "--shard-size", "1.5GB"],
        "a whole number, alone or with kB, MB, GB, TB, KiB, MiB",
    )?;
    world.write("model/.cachet", "x")?;
    says(1, &VERIFY, "hint: --ignore-unsigned-files")?;
    fs::remove_dir_all(world.path("model/.cache"))?;
    fs::remove_file(world.path("model/.cachet"))?;
    // As a download cache does.
    fs::rename(world.path("model/config.json"), world.path("blob"))?;
    symlink("../blob", world.path("model/config.json"))?;
    says(1, &VERIFY, "hint: the signer followed no links; a copy without them can be verified: `cp -rL`")
}
