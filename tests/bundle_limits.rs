//! Bundles made to use up memory or time.

use std::fs::File;
use std::io::{BufWriter, Write as _};

use anyhow::{Context as _, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use omsign_tests::certified::world_with_signer;
use omsign_tests::forge;
use omsign_tests::hashed::world;
use omsign_tests::world::World;
use serde_json::json;

const MIB: usize = 1 << 20;

/// The largest size in memory, in bytes, of any command so far: all that the system says of children, so that a test
/// needs a process of its own.
fn most_memory() -> anyhow::Result<usize> {
    Ok(usize::try_from(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss())? * 1024)
}

const VERIFY: [&str; 6] = ["verify", "model", "--signature", "b.sig", "--public-key", "k.pub"];

const KEYLESS: [&str; 8] = [
    "verify",
    "model",
    "--signature",
    "b.sig",
    "--identity",
    "a@b.c",
    "--identity-provider",
    "https://p.example",
];

/// A bundle that is as long as this because of its payload, its log entries or something that nobody knows. Written
/// bit by bit: what this process ever held counts as its children's memory, too.
fn hostile(world: &World, kind: &str, bytes: usize, keyless: bool) -> anyhow::Result<()> {
    let key = forge::private_key(&world.path("k.key"))?;
    let mut whole = forge::bundle(&forge::key_material(&key)?, b"PAYLOAD", b"SIGNATURE");
    let payload = openssl::base64::encode_block(b"PAYLOAD");
    let (from, before, repeated, after) = match kind {
        "payload" => (payload, "", "QUJD", ""),
        "entries" => ("\"[]\"".into(), "[", "{},", "1]"),
        "small entries" => ("\"[]\"".into(), "[", "0,", "1]"),
        "signatures" => ("\"signatures\":[".into(), "\"signatures\":[", "{\"sig\":\"\"},", ""),
        "zeros" => (payload, "", "AAAA", ""),
        "nested entries" => ("\"[]\"".into(), "", "[", ""),
        // The JSON of a statement, in base64: subjects, digests of one subject. Each part is of whole groups of three.
        "subjects" => (payload, "eyJzdWJqZWN0IjpbICAg", "eyJkaWdlc3QiOnt9fSwg", "e31dfSAg"),
        "digests" => (payload, "eyJzdWJqZWN0IjpbeyJkaWdlc3QiOnsg", "ImEiOiIwIiwg", "ImIiOiIwIn19XX0g"),
        // What a signer may have said of each file.
        "values" => (
            payload,
            "eyJzdWJqZWN0IjpbeyJuYW1lIjoibSIsImRpZ2VzdCI6eyJzaGEyNTYiOiIwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwIn19XSwicHJlZGljYXRlIjp7ImEiOlsg",
            "eyIiOjB9LCAg",
            "MF19fSAg",
        ),
        "hashes" => (
            "\"[]\"".into(),
            r#"[{"logIndex":"1","logId":{"keyId":"AA=="},"kindVersion":{"kind":"dsse","version":"0.0.1"},"canonicalizedBody":"AA==","inclusionProof":{"rootHash":"AA==","treeSize":"1","hashes":["#,
            r#""AA==","#,
            r#""AA=="]}}]"#,
        ),
        "numbers" => ("\"[]\"".into(), "[", "9", "]"),
        "escapes" => ("{\"dsse".into(), "{\"", r"\u0041", "\":1,\"dsse"),
        _ => ("{\"dsse".into(), "{", " ", "\"dsse"),
    };
    if keyless {
        let certificate = openssl::x509::X509::from_pem(&std::fs::read(world.path("k.pem"))?)?;
        let certificate = openssl::base64::encode_block(&certificate.to_der()?);
        whole["verificationMaterial"] = json!({ "certificate": { "rawBytes": certificate } });
    }
    whole["verificationMaterial"]["tlogEntries"] = "[]".into();
    let text = whole.to_string();
    let (start, end) = text.split_once(&from).context("there")?;
    let mut file = BufWriter::new(File::create(world.path("b.sig"))?);
    write!(file, "{start}{before}")?;
    let block = repeated.repeat(1000);
    for _ in 0..bytes / block.len() {
        file.write_all(block.as_bytes())?;
    }
    write!(file, "{after}{end}")?;
    Ok(file.flush()?)
}

const KINDS: [&str; 13] = [
    "payload",
    "zeros",
    "entries",
    "small entries",
    "nested entries",
    "signatures",
    "escapes",
    "numbers",
    "space",
    "subjects",
    "digests",
    "hashes",
    "values",
];

#[test]
fn a_hundred_megabytes_are_refused_at_once() -> anyhow::Result<()> {
    let world = world_with_signer(&[("a", "a")])?;
    for kind in KINDS {
        hostile(&world, kind, 100_000_000, false)?;
        let expected = ["larger than 67108864 bytes", "hint: --max-bundle-size"];
        world.omsign_refuses(2, &VERIFY, &expected).context(kind)?;
        world.omsign_refuses(2, &["inspect", "b.sig"], &expected).context(kind)?;
        ensure!(most_memory()? < 64 * MIB, "{kind}: {} bytes", most_memory()?);
    }
    Ok(())
}

/// What is small enough to be looked at costs memory in proportion to its size, whatever it is. (What it costs in time
/// is in `./tests/bench verify`.)
#[test]
fn memory_grows_no_faster_than_the_bundle() -> anyhow::Result<()> {
    let world = world_with_signer(&[("a", "a")])?;
    for (kind, keyless) in KINDS.map(|kind| [(kind, false), (kind, true)]).concat() {
        hostile(&world, kind, 16 * MIB, keyless)?;
        world.omsign_fails(1, if keyless { &KEYLESS } else { &VERIFY }).context(kind)?;
        world.omsign(&["inspect", "b.sig"])?;
        ensure!(most_memory()? < 24 * MIB + 4 * 16 * MIB, "{kind}: {} bytes", most_memory()?);
    }
    Ok(())
}

#[test]
fn more_of_anything_than_a_signer_would_put_in() -> anyhow::Result<()> {
    let world = world_with_signer(&[("a", "a")])?;
    let key = forge::private_key(&world.path("k.key"))?;
    let payload = serde_json::to_vec(&forge::statement(&[("a", "a")]))?;
    let signature = forge::sign(&key, &payload)?;
    let whole = forge::bundle(&forge::key_material(&key)?, &payload, &signature);
    let certificate = json!({ "rawBytes": "AA==" });
    let entry = json!({
        "logIndex": "1", "logId": { "keyId": "AA==" }, "kindVersion": { "kind": "dsse", "version": "0.0.1" },
        "canonicalizedBody": "AA==",
    });
    let cases = [
        (1, "tlogEntries", json!(vec![entry; 17]), "17 transparency log entries instead of one"),
        (
            2,
            "timestampVerificationData",
            json!({ "rfc3161Timestamps": vec![json!({ "signedTimestamp": "AA==" }); 1000] }),
            "1000 time stamps, more than 16",
        ),
        (
            2,
            "x509CertificateChain",
            json!({ "certificates": vec![certificate; 500] }),
            "500 certificates, more than 16",
        ),
    ];
    for (status, field, value, expected) in cases {
        let mut bundle = whole.clone();
        if field == "x509CertificateChain" {
            bundle["verificationMaterial"] = json!({});
        }
        bundle["verificationMaterial"][field] = value;
        world.write("b.sig", bundle.to_string())?;
        world.omsign_refuses(status, &VERIFY, &[expected])?;
    }
    Ok(())
}

#[test]
fn what_would_not_fit_into_memory_is_refused() -> anyhow::Result<()> {
    let world = World::new()?;
    std::fs::create_dir(world.path("model"))?;
    std::fs::File::create(world.path("model/sparse"))?.set_len(1 << 40)?;
    for size in ["1M", "0", "MB", "-1", "99999999999GB"] {
        let size = format!("--shard-size={size}");
        world.omsign_refuses(
            2,
            &["digest", "model", &size],
            &["write a whole number, alone or with kB, MB, GB"],
        )?;
    }
    let shards = ["digest", "model", "--shard-size", "1000"];
    world.omsign_refuses(2, &shards, &["would have more than 16777216 shards; make them larger"])?;
    let sparse = std::fs::File::create(world.path("manifest.json"))?;
    sparse.set_len(1 << 40)?;
    let sign = ["sign", "--manifest", "manifest.json", "--key", "k"];
    world.omsign_refuses(2, &sign, &["manifest.json is larger than 1073741824 bytes, which no manifest is"])
}

/// Whoever signs hears of it, and not only everybody who verifies.
#[test]
fn a_bundle_that_nobody_takes_by_default() -> anyhow::Result<()> {
    let world = world()?;
    world.write("weights", vec![0; 400_000])?;
    let sign = ["sign", "weights", "--private-key", "k.pem", "--shard-size"];
    let said = |size| {
        let output = world.omsign(&[&sign[..], &[size]].concat())?;
        ensure!(output.status.success(), "{output:?}");
        Ok::<_, anyhow::Error>(String::from_utf8(output.stderr)?)
    };
    ensure!(said("1000")?.is_empty() && said("1")?.contains("--max-bundle-size"));
    let verify = ["verify", "weights", "--public-key", "k.pub", "--signature", "model.sig"];
    ensure!(world.omsign(&verify)?.status.code() == Some(2));
    world.omsign_ok(&[&verify[..], &["--max-bundle-size", "99000000"]].concat()).map(drop)
}
