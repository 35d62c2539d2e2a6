//! Verifying through the real binary: what it takes beyond hashing, to start, and to refuse.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use omsign_fixtures::built;
use serde_json::Value;

use super::hash::{Took, median, took};
use super::{Limit, Row};
use crate::forge;
use crate::pki::{Certificate, Pki};
use crate::sigstore::{Flaw, Sigstore};
use crate::world::{World, text};

const IDENTITY: &str = "https://github.com/acme/models/release.yml@refs/tags/v1";
const PROVIDER: &str = "https://github.example";

/// Runs all rows. Quick ones have models that are 20 times smaller.
pub fn run(rounds: usize, quick: bool) -> anyhow::Result<Vec<Row>> {
    let (world, omsign) = (World::new()?, built("omsign")?);
    // Differences of a few milliseconds need more rounds than ratios.
    let rounds = if quick { rounds } else { rounds * 7 };
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("k", "root", Certificate::default())?;
    world.write("k.pub", forge::private_key(&world.path("k.key"))?.public_key_to_pem()?)?;
    let path = |name: &str| text(&world.path(name));
    let run = |arguments: &[&str]| took(&omsign, arguments, &[]);
    let mut rows = Vec::new();

    let files = if quick { 1000 } else { 20_000 };
    for number in 0..files {
        world.write(&format!("many/{:02}/file-{number:05}.bin", number % 100), number.to_string())?;
    }
    let (many, bundle, key) = (path("many"), path("many.sig"), path("k.pub"));
    run(&["sign", &many, "--private-key", &path("k.key"), "--signature", &bundle])?;
    let (mut hashing, mut verifying) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        hashing.push(run(&["digest", &many])?);
        verifying.push(run(&["verify", "key", &many, "--signature", &bundle, "--public-key", &key])?);
    }
    // In pairs, so that both see the same machine.
    let difference = |figure: fn(&Took) -> f64| {
        let pairs = verifying.iter().zip(&hashing);
        median(pairs.map(|(verify, hash)| (figure(verify) - figure(hash)) * 1e3).collect())
    };
    let what = format!("verify minus digest, a bundle of {files} files: time in ms");
    rows.push(Row::limited(what, difference(|took| took.seconds), "ms", Limit::AtMost(10.0)));
    rows.push(Row::plain("  its CPU time", difference(|took| took.cpu_seconds), "ms"));
    rows.push(Row::plain(
        "  beside it, digest alone",
        median(hashing.iter().map(|took| took.seconds * 1e3).collect()),
        "ms",
    ));

    world.write("one/a", "a")?;
    let sigstore = Sigstore::new(&world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    let payload = serde_json::to_vec(&forge::statement(&[("a", "a")]))?;
    world.write("s.sig", sigstore.sign(&payload, IDENTITY, PROVIDER, Flaw::None)?.to_string())?;
    let (one, chain) = (path("one"), path("k.pem"));
    for (bundle, more) in [("k.sig", &[][..]), ("c.sig", &["--certificate-chain", &chain])] {
        let (signed, key) = (path(bundle), path("k.key"));
        run(&[&["sign", &one, "--private-key", &key, "--signature", &signed], more].concat())?;
    }
    let (by_key, by_certificate, keyless) = (path("k.sig"), path("c.sig"), path("s.sig"));
    let (root, instance) = (path("root.pem"), path("root.json"));
    let methods: [(&str, &[&str]); 3] = [
        ("key", &["--signature", &by_key, "--public-key", &key]),
        ("certificate", &["--signature", &by_certificate, "--certificate-chain", &root]),
        (
            "sigstore",
            &[
                "--signature",
                &keyless,
                "--identity",
                IDENTITY,
                "--identity-provider",
                PROVIDER,
                "--trusted-root",
                &instance,
            ],
        ),
    ];
    for (method, terms) in methods {
        let verify = [&["verify", method, &one], terms].concat();
        let times =
            (0..rounds).map(|_| Ok(run(&verify)?.seconds * 1e3)).collect::<anyhow::Result<Vec<f64>>>()?;
        let what = format!("start-up: verify {method}, a model of one byte");
        rows.push(Row::limited(what, median(times), "ms", Limit::AtMost(10.0)));
    }

    // A hostile bundle four times as long takes four times the CPU time, not sixteen.
    let mut times = Vec::new();
    for megabytes in [8, 32] {
        nested(&world.path("hostile.sig"), megabytes << 20)?;
        let refused = ["-c", "\"$0\" \"$@\" 2>/dev/null || [ $? = 1 ]"];
        let hostile = path("hostile.sig");
        let arguments = [&text(&omsign), "verify", &one, "--signature", &hostile, "--public-key", &key];
        let took = || Ok(took(Path::new("sh"), &[&refused[..], &arguments].concat(), &[])?.cpu_seconds);
        times.push(median((0..rounds).map(|_| took()).collect::<anyhow::Result<Vec<f64>>>()?));
    }
    let [small, large] = times.as_slice() else { anyhow::bail!("two sizes") };
    rows.push(Row::limited("CPU time to refuse 32 MiB ÷ 8 MiB", large / small, "", Limit::AtMost(6.0)));
    Ok(rows)
}

/// A bundle whose log entries are lists in lists.
fn nested(path: &Path, bytes: usize) -> anyhow::Result<()> {
    let whole: Value = forge::bundle(&serde_json::json!({ "tlogEntries": "HERE" }), b"x", b"x");
    let text = whole.to_string();
    let (start, end) = text.split_once("\"HERE\"").context("there")?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    write!(file, "{start}[{}0{}]{end}", "[0,".repeat(100), "]".repeat(100))?;
    let block = " ".repeat(1 << 16);
    for _ in 0..bytes / block.len() {
        file.write_all(block.as_bytes())?;
    }
    Ok(file.flush()?)
}
