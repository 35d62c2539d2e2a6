//! Some files of a model, and which bundle belongs to it.

use std::fs;

use anyhow::ensure;
use omsign_tests::certified::world_with_signer;
use omsign_tests::hashed::run;
use omsign_tests::world::{World, text};

fn world() -> anyhow::Result<World> {
    let files = ["config.json", "weights/1.bin", "weights/2.bin", "docs/a.md", "docs/deep/b.md"];
    let world = world_with_signer(&files.map(|name| (name, name)))?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.key"])?;
    Ok(world)
}

const VERIFY: [&str; 4] = ["verify", "model", "--public-key", "k.pub"];

fn partial<'a>(paths: &[&'a str]) -> Vec<&'a str> {
    [&VERIFY[..], &["--partial"], paths].concat()
}

/// What is typed in a directory of the model is not taken for another file at its root.
#[test]
fn from_within() -> anyhow::Result<()> {
    let world = world_with_signer(&[("w.bin", "root"), ("v2/w.bin", "v2"), ("v2/own.bin", "own")])?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.key"])?;
    world.write("model/v2/w.bin", "tampered with")?;
    let verify = "verify .. --signature ../../model.sig --public-key ../../k.pub --partial";
    let from_v2 = |path: &str| run(&world, &format!("cd model/v2 && omsign {verify} {path}"));
    for (path, code, said) in [
        ("./w.bin", 1, "changed: v2/w.bin"),
        ("$PWD/w.bin", 1, "changed: v2/w.bin"),
        ("w.bin", 2, "one path from the model's root and another from here"),
        ("../w.bin", 0, "verified 1 file"),
        ("own.bin", 0, "verified 1 file"),
        (".", 1, "changed: v2/w.bin"),
        ("v2/own.bin", 0, "verified 1 file"),
        ("./new.bin", 1, "nothing at or below ./new.bin was signed"),
    ] {
        let output = from_v2(path)?;
        let all = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.code() == Some(code) && all.contains(said), "{path}: {all}");
    }
    // Nor is another one left out when it is signed.
    world.write("model/cache/x", "x")?;
    world.write("model/v2/cache/x", "x")?;
    let sign = |path: &str| {
        let signs = "sign .. --private-key ../../k.key --signature ../../other.sig --ignore-paths";
        run(&world, &format!("cd model/v2 && omsign {signs} {path}"))
    };
    let ambiguous = sign("cache")?;
    ensure!(ambiguous.status.code() == Some(2), "{ambiguous:?}");
    let nothing = sign("./caches")?;
    ensure!(nothing.status.code() == Some(2), "{nothing:?}");
    world.write("model/extra", "not signed")?;
    let accepts = |path: &str| {
        let verify = "verify .. --signature ../../model.sig --public-key ../../k.pub --ignore-paths ../cache";
        run(&world, &format!("cd model/v2 && omsign {verify} --ignore-paths ./cache --ignore-paths {path}"))
    };
    let errors = String::from_utf8(accepts("./extra")?.stderr)?;
    ensure!(errors.contains("not signed: extra"), "{errors}");
    fs::remove_file(world.path("model/extra"))?;
    ensure!(sign("./cache")?.status.success());
    let signed = world.omsign_ok(&["inspect", "other.sig", "--json"])?;
    let signed: serde_json::Value = serde_json::from_str(&signed)?;
    ensure!(
        signed["files"].get("cache/x").is_some() && signed["files"].get("v2/cache/x").is_none(),
        "{signed}"
    );
    Ok(())
}

#[test]
fn only_these() -> anyhow::Result<()> {
    let world = world()?;
    // Only what was asked for has to be there.
    fs::remove_dir_all(world.path("model/docs"))?;
    fs::write(world.path("model/weights/2.bin"), "changed")?;
    world.omsign_refuses(1, &VERIFY, &["1 changed, 2 missing"])?;
    let said = world.omsign_ok(&partial(&["config.json", "weights/1.bin"]))?;
    ensure!(said.starts_with("verified 2 files, 24 bytes"), "{said}");
    ensure!(
        said.contains("content of the files asked for")
            && said.contains("not checked  content of every signed file"),
        "{said}"
    );
    let json = world.omsign_ok(&[&partial(&["config.json"])[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    ensure!(json["files"] == 1 && json["not_looked_at"] == 4, "{json}");
    // As a path from here, or an absolute one, too; and directories.
    world.omsign_ok(&partial(&["model/config.json"]))?;
    world.omsign_ok(&partial(&[&text(&world.path("model/config.json"))]))?;
    world.omsign_refuses(1, &partial(&["weights"]), &["1 changed", "changed: weights/2.bin"])?;
    world.omsign_refuses(1, &partial(&["weights/", "config.json"]), &["1 changed"])?;
    world.omsign_refuses(1, &partial(&["docs/deep"]), &["1 missing", "missing: docs/deep/b.md"])?;
    // What is beside it was not signed.
    world.write("model/weights/3.bin", "more")?;
    fs::write(world.path("model/weights/2.bin"), "weights/2.bin")?;
    world.omsign_refuses(1, &partial(&["weights"]), &["1 not signed", "not signed: weights/3.bin"])?;
    world.omsign_ok(&partial(&["weights/2.bin"]))?;
    for path in ["weights/3.bin", "nothing", "weight", "../k.pub"] {
        world.omsign_refuses(
            1,
            &partial(&["config.json", path]),
            &[&format!("nothing at or below {path} was signed")],
        )?;
    }
    Ok(())
}

#[test]
fn the_bundle_where_it_was_not_said() -> anyhow::Result<()> {
    let world = world()?;
    world.omsign_ok(&VERIFY)?;
    fs::rename(world.path("model.sig"), world.path("model/model.sig"))?;
    world.omsign_ok(&VERIFY)?;
    fs::copy(world.path("model/model.sig"), world.path("model.sig"))?;
    world.omsign_refuses(
        2,
        &VERIFY,
        &["there is a model.sig in the model and one in the working directory"],
    )?;
    fs::remove_file(world.path("model.sig"))?;
    fs::remove_file(world.path("model/model.sig"))?;
    world.omsign_refuses(2, &VERIFY, &["say where the bundle is with --signature"])
}

/// A verifier may leave out what was not signed; what was signed is looked at all the same.
#[test]
fn what_a_verifier_may_leave_out() -> anyhow::Result<()> {
    let world = world()?;
    world.write("model/cache/x", "")?;
    world.write("model/.github/x", "")?;
    world.omsign_refuses(1, &VERIFY, &["not signed: cache/x"])?;
    let ignoring = |path: &'static str| [&VERIFY[..], &["--ignore-paths", path]].concat();
    world.omsign_ok(&ignoring("cache"))?;
    world.omsign_ok(&ignoring("model/cache/x"))?;
    world.omsign_ok(&[&ignoring("cache")[..], &["--ignore-paths", "not-there"]].concat())?;
    // Git's own files were left out by the signer, who said so.
    world.omsign_ok(&[&ignoring("cache")[..], &["--no-ignore-git-paths"]].concat())?;
    // Of a signer who left them in, an unsigned one is like any other file.
    let left_in = ["--no-ignore-git-paths", "--ignore-paths", "model/cache"];
    fs::remove_file(world.path("model.sig"))?;
    world.omsign_ok(&[&["sign", "model", "--private-key", "k.key"][..], &left_in].concat())?;
    world.omsign_ok(&VERIFY)?;
    world.write("model/.gitattributes", "")?;
    world.omsign_refuses(
        1,
        &VERIFY,
        &["1 not signed", "not signed: .gitattributes", "hint: --ignore-git-paths"],
    )?;
    world.omsign_ok(&[&VERIFY[..], &["--ignore-git-paths"]].concat())?;
    // The reference's default, with its command.
    let reference = ["verify", "key", "model", "--signature", "model.sig", "--public_key", "k.pub"];
    world.omsign_ok(&reference)?;
    world.omsign_refuses(1, &[&reference[..], &["--no-ignore-git-paths"]].concat(), &["1 not signed"])?;
    fs::remove_file(world.path("model/.gitattributes"))?;
    fs::write(world.path("model/weights/1.bin"), "changed")?;
    world.omsign_refuses(
        1,
        &[&ignoring("cache")[..], &["--ignore-paths", "weights"]].concat(),
        &["1 changed"],
    )?;
    Ok(())
}

/// All that differs is listed, up to a bound, with the count; and one reason.
#[test]
fn thousands_of_differences() -> anyhow::Result<()> {
    let world = world()?;
    for number in 0..1500 {
        world.write(&format!("model/extra/{number:04}"), "")?;
    }
    fs::write(world.path("model/config.json"), "changed")?;
    let errors = world.omsign_fails(1, &VERIFY)?;
    ensure!(
        errors.contains("1 changed, 1500 not signed") && errors.contains("not signed: 1450 more"),
        "{errors}"
    );
    ensure!(errors.contains("changed: config.json (") && errors.contains(" was signed, "), "{errors}");
    let output = world.omsign(&[&VERIFY[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(json["not_signed"].as_array().is_some_and(|list| list.len() == 1000), "{json}");
    ensure!(json["not_signed_count"] == 1500 && json["outcome"] == "wrong", "{json}");
    ensure!(
        json["first_difference"].as_str().is_some_and(|text| text.contains("\"config.json\" is not what")),
        "{json}"
    );
    Ok(())
}

/// `--partial` looks at the file that it names, not at one that a link on the way leads to.
#[test]
fn a_link_does_not_exchange_signed_files() -> anyhow::Result<()> {
    let world = world()?;
    fs::rename(world.path("model/weights"), world.path("model/.weights"))?;
    std::os::unix::fs::symlink("docs", world.path("model/weights"))?;
    world.write("model/docs/1.bin", "weights/1.bin")?;
    for path in ["weights/1.bin", "model/weights/1.bin", "weights"] {
        world.omsign_refuses(1, &partial(&[path]), &["symbolic links are not allowed here (OMS 6.1.1)"])?;
    }
    Ok(())
}

/// The result claims what was looked at, and no more.
#[test]
fn what_was_not_looked_at_is_said() -> anyhow::Result<()> {
    let world = world()?;
    let claims = |arguments: &[&str]| -> anyhow::Result<(bool, serde_json::Value)> {
        let json: serde_json::Value =
            serde_json::from_str(&world.omsign_ok(&[arguments, &["--json"]].concat())?)?;
        let checked =
            json["checked"].as_array().is_some_and(|checked| checked.contains(&"no unsigned files".into()));
        Ok((checked, json["left_out"].clone()))
    };
    ensure!(claims(&VERIFY)? == (true, serde_json::json!([])));
    ensure!(!claims(&partial(&["config.json"]))?.0);
    world.write("model/.github/evil.py", "")?;
    ensure!(claims(&VERIFY)? == (false, serde_json::json!([".github"])));
    let output = world.omsign(&VERIFY)?;
    ensure!(String::from_utf8_lossy(&output.stderr).contains("warning: 1 path not looked at: .github"));
    fs::remove_dir_all(world.path("model/.github"))?;
    world.write("model/evil.py", "")?;
    ensure!(
        claims(&[&VERIFY[..], &["--ignore-paths", "evil.py"]].concat())?
            == (false, serde_json::json!(["evil.py"]))
    );
    ensure!(!claims(&[&VERIFY[..], &["--ignore-unsigned-files"]].concat())?.0);
    fs::remove_file(world.path("model/evil.py"))?;
    // The bundle itself is no part of the model. Of empty files no shard can tell.
    fs::rename(world.path("model.sig"), world.path("model/model.sig"))?;
    ensure!(claims(&VERIFY)? == (true, serde_json::json!([])));
    fs::remove_file(world.path("model/model.sig"))?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.key", "--shard-size", "4"])?;
    ensure!(claims(&VERIFY)?.0);
    world.write("model/__init__.py", "")?;
    ensure!(!claims(&VERIFY)?.0);
    Ok(())
}

/// With `--json` there is one object, also where nothing could be tried; and nothing of others' reaches the terminal.
#[test]
fn whatever_comes_out() -> anyhow::Result<()> {
    let world = world()?;
    fs::rename(world.path("model.sig"), world.path("other.sig"))?;
    let output = world.omsign(&[&VERIFY[..], &["--json"]].concat())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(output.status.code() == Some(2) && json["outcome"] == "undone", "{json}");
    let bundle = fs::read_to_string(world.path("other.sig"))?;
    let name = r"\u001b[2K\rverified 5 files\u001b[8m\nverified";
    world.write("model.sig", bundle.replacen('{', &format!("{{\"{name}\":1,"), 1))?;
    let errors = world.omsign_fails(1, &VERIFY)?;
    ensure!(
        !errors.trim_end().contains(['\u{1b}', '\r', '\n']) && errors.contains("unknown field"),
        "{errors:?}"
    );
    world.write("model.sig", bundle)?;
    std::os::unix::fs::symlink("x", world.path("model/\u{1b}[2K\nverified"))?;
    let errors = world.omsign_fails(1, &VERIFY)?;
    ensure!(errors.lines().count() == 3 && errors.contains("symbolic link"), "{errors:?}");
    ensure!(!errors.contains('\u{1b}'), "{errors:?}");
    Ok(())
}
