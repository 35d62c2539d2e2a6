//! Curve × method × hash × serialization × odd names × ignored paths × links, in both directions with the reference
//! where it can follow: its command line knows files and SHA-256 only, its Python interface more. And with the Go tool where
//! OMSIGN_TEST_GO_TOOL names it.

use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use omsign_tests::forge;
use omsign_tests::peer::cache;
use omsign_tests::pki::{Certificate, Pki};
use omsign_tests::world::World;

const CURVES: [&str; 3] = ["P-256", "P-384", "P-521"];
const METHODS: [&str; 2] = ["key", "certificate"];

/// Names that serializers, shells and sorting get wrong. (No backslash, nor anything but UTF-8: those are refused.)
const ODD: [&str; 12] = [
    "ü/é.bin",
    "日本語",
    "with space",
    "quote'and\"double",
    "-dash",
    "a:0:5",
    "sub-1/x",
    "sub/x",
    "UPPER/lower",
    "tab\there",
    "emoji-🦀",
    ".hidden/.file",
];

/// A model of each kind in `NAME/`, and what has to be said to sign it.
fn models(world: &World) -> anyhow::Result<Vec<(&'static str, Vec<String>)>> {
    for name in ["plain", "ignored", "linked"] {
        for (file, content) in
            [("config.json", "{}"), ("weights/1.bin", "1"), ("weights/2.bin", ""), ("secret/x", "x")]
        {
            world.write(&format!("{name}/{file}"), content)?;
        }
    }
    for file in ODD {
        world.write(&format!("odd/{file}"), file)?;
    }
    symlink("config.json", world.path("linked/link"))?;
    let flags = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>();
    Ok(vec![
        ("plain", flags(&[])),
        ("odd", flags(&[])),
        ("ignored", flags(&["--ignore-paths", "ignored/secret"])),
        ("linked", flags(&["--allow-symlinks"])),
    ])
}

/// Keys, certificates and public keys of each curve: `CURVE.key`, `CURVE.pem`, `CURVE.pub`, and `root.pem`.
fn keys(world: &World) -> anyhow::Result<()> {
    let pki = Pki::new(world);
    pki.root("root")?;
    for curve in CURVES {
        let key = format!("EC -pkeyopt ec_paramgen_curve:{curve}");
        pki.issue(curve, "root", Certificate { key: &key, ..Certificate::default() })?;
        let public = forge::private_key(&world.path(&format!("{curve}.key")))?.public_key_to_pem()?;
        world.write(&format!("{curve}.pub"), public)?;
    }
    Ok(())
}

/// Has the reference do all of this; says what each came to.
fn reference(world: &World, jobs: &[Vec<String>]) -> anyhow::Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/reference_batch.py");
    let mut command = Command::new(cache("reference/bin/python")?);
    command.arg(script).current_dir(world.path("")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::null()).spawn()?;
    let mut input = child.stdin.take().context("standard input")?;
    for job in jobs {
        writeln!(input, "{}", serde_json::to_string(job)?)?;
    }
    drop(input);
    let said = String::from_utf8(child.wait_with_output()?.stdout)?;
    let said: Vec<String> = said.lines().map(str::to_owned).collect();
    ensure!(said.len() == jobs.len(), "{said:?}");
    Ok(said)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn both_directions_with_the_reference() -> anyhow::Result<()> {
    let world = World::new()?;
    keys(&world)?;
    let models = models(&world)?;
    let (mut theirs, mut verified_by_us) = (Vec::new(), Vec::new());
    let mut what = Vec::new();
    for curve in CURVES {
        let (key, leaf, public) = (format!("{curve}.key"), format!("{curve}.pem"), format!("{curve}.pub"));
        for method in METHODS {
            let trust = match method {
                "key" => ["--public_key", &public],
                _ => ["--certificate_chain", "root.pem"],
            };
            for (model, flags) in &models {
                let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
                let ours = format!("ours-{curve}-{method}-{model}.sig");
                let chain = ["--signing-certificate", &leaf, "--certificate-chain", "root.pem"];
                let chain = if method == "key" { &[][..] } else { &chain };
                let sign = ["sign", model, "--private-key", &key, "--signature", &ours];
                world.omsign_ok(&[&sign, &flags[..], chain].concat())?;
                // Release 1.1.1 spells flags in its own way.
                let mut flags = flags;
                flags
                    .iter_mut()
                    .filter(|flag| **flag == "--allow-symlinks")
                    .for_each(|flag| *flag = "--allow_symlinks");
                theirs.push(words(
                    &[&["verify", method, "--signature", &ours], &trust[..], &flags, &[model]].concat(),
                ));
                what.push(format!("they verify {ours}"));

                let bundle = format!("theirs-{curve}-{method}-{model}.sig");
                let chain = ["--signing_certificate", &leaf, "--certificate_chain", "root.pem"];
                let chain = if method == "key" { &[][..] } else { &chain };
                let sign = ["sign", method, "--private_key", &key, "--signature", &bundle];
                theirs.push(words(&[&sign, &flags[..], chain, &[model]].concat()));
                what.push(format!("they sign {bundle}"));
                verified_by_us
                    .push(words(&[&["verify", method, model, "--signature", &bundle], &trust[..]].concat()));
            }
        }
    }
    for (what, said) in what.iter().zip(reference(&world, &theirs)?) {
        ensure!(said == "done", "{what}: {said}");
    }
    for arguments in verified_by_us {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        world.omsign_ok(&arguments)?;
        let model = world.path(arguments[2]);
        // And not with one byte more somewhere.
        let file = if model.join("config.json").exists() { "config.json" } else { ODD[0] };
        let content = std::fs::read(model.join(file))?;
        std::fs::write(model.join(file), [&content[..], b" "].concat())?;
        world.omsign_refuses(1, &arguments, &["changed"])?;
        std::fs::write(model.join(file), content)?;
    }
    Ok(())
}

/// Hash by serialization, through the reference's Python interface: its command line has no flags for them. Its shards are
/// not OMS's, which it does not verify; we verify both.
#[test]
fn hashes_and_serializations_of_the_reference() -> anyhow::Result<()> {
    let world = World::new()?;
    keys(&world)?;
    let models = models(&world)?;
    let (key, public) = (format!("{}.key", CURVES[0]), format!("{}.pub", CURVES[0]));
    let (mut jobs, mut theirs) = (Vec::new(), Vec::new());
    for (model, flags) in &models {
        if !flags.is_empty() {
            continue;
        }
        for (hash, their_name) in [("sha256", "sha256"), ("blake2b", "blake2"), ("blake3", "blake3")] {
            let ours = format!("{model}-{hash}.ours");
            world.omsign_ok(&[
                "sign",
                model,
                "--private-key",
                &key,
                "--hash-type",
                hash,
                "--signature",
                &ours,
            ])?;
            jobs.push(words(&["api", "verify", model, &ours, &public, their_name, "0"]));
            for shard_size in ["0", "3"] {
                let bundle = format!("{model}-{hash}-{shard_size}.sig");
                jobs.push(words(&["api", "sign", model, &bundle, &key, their_name, shard_size]));
                theirs.push((*model, bundle));
            }
        }
    }
    ensure!(theirs.len() >= 12, "{theirs:?}");
    for (job, said) in jobs.iter().zip(reference(&world, &jobs)?) {
        ensure!(said == "done", "{job:?}: {said}");
    }
    for (model, bundle) in theirs {
        let verify = ["verify", model, "--signature", &bundle, "--public-key", &public];
        world.omsign_ok(&verify)?;
        let file = if world.path(model).join("config.json").exists() { "config.json" } else { ODD[0] };
        let file = world.path(model).join(file);
        let content = std::fs::read(&file)?;
        std::fs::write(&file, [&content[..], b" "].concat())?;
        world.omsign_refuses(1, &verify, &["1 changed"])?;
        std::fs::write(&file, content)?;
    }
    Ok(())
}

#[test]
fn whatever_we_sign_we_verify() -> anyhow::Result<()> {
    let world = World::new()?;
    keys(&world)?;
    let models = models(&world)?;
    let serializations = [&["--serialization", "files"][..], &["--shard-size", "3"]];
    for curve in CURVES {
        let (key, leaf, public) = (format!("{curve}.key"), format!("{curve}.pem"), format!("{curve}.pub"));
        for (model, flags) in &models {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            // The reference does not look behind links to directories.
            if *model == "linked" && !world.path("linked/more").exists() {
                symlink("weights", world.path("linked/more"))?;
            }
            for hash in ["sha256", "blake2b", "blake3"] {
                for serialization in serializations {
                    let sign = ["sign", model, "--private-key", &key, "--hash-type", hash];
                    world.omsign_ok(&[&sign, &flags[..], serialization].concat())?;
                    world.omsign_ok(&["verify", model, "--public-key", &public])?;
                    let chain = ["--certificate-chain", &leaf];
                    world.omsign_ok(&[&sign, &flags[..], serialization, &chain].concat())?;
                    world.omsign_ok(&["verify", model, "--certificate-chain", "root.pem"])?;
                }
            }
        }
    }
    Ok(())
}

/// Its repository is no Go module of its own name, so that nobody but its user can build it:
/// `OMSIGN_TEST_GO_TOOL=/path/to/model-signing ./tests/run --run-ignored only -E 'test(go_tool)'`. Bundles that it wrote
/// are in the conformance suite.
#[test]
#[ignore = "needs the Go tool, which cannot be installed by its name"]
fn both_directions_with_the_go_tool() -> anyhow::Result<()> {
    let tool = std::env::var_os("OMSIGN_TEST_GO_TOOL").context("OMSIGN_TEST_GO_TOOL names the Go tool")?;
    let world = World::new()?;
    keys(&world)?;
    world.write("model/config.json", "{}")?;
    world.write("model/weights/1.bin", "1")?;
    let go = |arguments: &[&str]| -> anyhow::Result<()> {
        let output = Command::new(&tool).args(arguments).current_dir(world.path("")).output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    for curve in CURVES {
        let (key, public) = (format!("{curve}.key"), format!("{curve}.pub"));
        world.omsign_ok(&["sign", "model", "--private-key", &key, "--signature", "ours.sig"])?;
        go(&["verify", "key", "--signature", "ours.sig", "--public-key", &public, "model"])?;
        go(&["sign", "key", "--signature", "theirs.sig", "--private-key", &key, "model"])?;
        world.omsign_ok(&["verify", "key", "model", "--signature", "theirs.sig", "--public-key", &public])?;
    }
    Ok(())
}
