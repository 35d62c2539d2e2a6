//! What is correctly signed and unusual: other tools write it, and it is accepted.

use std::fs;

use anyhow::{Context as _, ensure};
use omsign_tests::certified::world_with_signer;
use omsign_tests::forge;
use omsign_tests::peer::cache;
use omsign_tests::world::World;
use openssl::base64::encode_block;
use serde_json::{Value, json};

const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("sub/weights.bin", "0123456789")];

/// Verifies a statement by the key and by the certificate method, the bundle changed as well.
fn verify(
    world: &World,
    model: &str,
    statement: &Value,
    change: fn(&mut Value),
) -> anyhow::Result<Vec<String>> {
    let key = forge::private_key(&world.path("k.key"))?;
    let payload = serde_json::to_vec(statement)?;
    let signature = forge::sign(&key, &payload)?;
    let mut said = Vec::new();
    for (material, trust) in [
        (forge::key_material(&key)?, ["--public-key", "k.pub"]),
        (forge::chain_material(&world.path("k.pem"))?, ["--certificate-chain", "root.pem"]),
    ] {
        let mut bundle = forge::bundle(&material, &payload, &signature);
        change(&mut bundle);
        world.write("m.sig", bundle.to_string())?;
        let output = world.omsign(&[&["verify", model, "--signature", "m.sig"][..], &trust].concat())?;
        said.push(String::from_utf8([output.stdout, output.stderr].concat())?);
    }
    Ok(said)
}

fn accepts(world: &World, model: &str, statement: &Value, change: fn(&mut Value)) -> anyhow::Result<()> {
    let said = verify(world, model, statement, change)?;
    ensure!(said.iter().all(|said| said.starts_with("verified ")), "{said:?}: {statement}");
    Ok(())
}

fn as_it_is(_: &mut Value) {}

fn parameters(statement: &mut Value) -> &mut Value {
    &mut statement["predicate"]["serialization"]
}

#[test]
fn envelopes_and_material() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let statement = forge::statement(&FILES);
    let changes: [fn(&mut Value); 5] = [
        as_it_is,
        |bundle| drop(bundle["verificationMaterial"].as_object_mut().map(|it| it.remove("tlogEntries"))),
        |bundle| bundle["dsseEnvelope"]["signatures"][0]["keyid"] = json!(null),
        |bundle| drop(bundle["dsseEnvelope"]["signatures"][0].as_object_mut().map(|it| it.remove("keyid"))),
        // As sigstore-python writes it where there is no proof of time.
        |bundle| {
            bundle["verificationMaterial"]["timestampVerificationData"] = json!({ "rfc3161Timestamps": [] })
        },
    ];
    for change in changes {
        accepts(&world, "model", &statement, change)?;
    }
    Ok(())
}

/// Entries of a log that a bundle of another method has: no check of them is claimed.
#[test]
fn log_entries_that_nobody_asked_for() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let key = forge::private_key(&world.path("k.key"))?;
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    let mut bundle = forge::bundle(&forge::key_material(&key)?, &payload, &forge::sign(&key, &payload)?);
    let verify = |bundle: &Value| {
        world.write("m.sig", bundle.to_string())?;
        world.omsign_ok(&["verify", "model", "--signature", "m.sig", "--public-key", "k.pub"])
    };
    let note = "transparency log entries in the bundle (of no use to its method)";
    ensure!(!verify(&bundle)?.contains(note));
    bundle["verificationMaterial"]["tlogEntries"] = json!([{
        "logIndex": "1", "logId": { "keyId": "AA==" }, "kindVersion": { "kind": "dsse", "version": "0.0.1" },
        "canonicalizedBody": "AA==",
    }]);
    ensure!(verify(&bundle)?.contains(note));
    Ok(())
}

/// Before 1.1 the key itself was in the bundle.
#[test]
fn a_key_in_the_bundle() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let key = forge::private_key(&world.path("k.key"))?;
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    let signature = forge::sign(&key, &payload)?;
    let verify = |public_key: Value| -> anyhow::Result<String> {
        let material = json!({ "publicKey": public_key, "tlogEntries": [] });
        world.write("m.sig", forge::bundle(&material, &payload, &signature).to_string())?;
        let output = world.omsign(&["verify", "model", "--signature", "m.sig", "--public-key", "k.pub"])?;
        Ok(String::from_utf8([output.stdout, output.stderr].concat())?)
    };
    let pem = String::from_utf8(key.public_key_to_pem()?)?;
    // The same key, however its lines end.
    for pem in [pem.clone(), pem.replace('\n', "\r\n"), pem.trim_end().to_owned()] {
        let pem = encode_block(pem.as_bytes());
        for details in ["PKIX_ECDSA_P256_SHA_256", "PKIX_ECDSA_P256_HMAC_SHA_256"] {
            let said = verify(json!({ "rawBytes": pem, "keyDetails": details }))?;
            ensure!(said.starts_with("verified "), "{details}: {said}");
        }
        let said = verify(json!({ "rawBytes": pem }))?;
        ensure!(said.starts_with("verified "), "{said}");
    }
    let said = verify(json!({ "rawBytes": encode_block(pem.as_bytes()), "keyDetails": { "a": [1] } }))?;
    ensure!(said.contains("malformed (OMS 4): invalid type: map, expected a string"), "{said}");
    // Another key than the one given, whoever signed.
    let other = omsign_tests::pki::Pki::new(&world);
    other.root("other")?;
    let other = encode_block(&forge::private_key(&world.path("other.key"))?.public_key_to_pem()?);
    let said = verify(json!({ "rawBytes": other, "keyDetails": "PKIX_ECDSA_P256_SHA_256" }))?;
    ensure!(said.contains("another key than the one given"), "{said}");
    Ok(())
}

#[test]
fn resources_in_any_order_and_unsaid_parameters() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    // The root digest is over the listed order.
    let mut statement = forge::statement(&[FILES[1], FILES[0]]);
    accepts(&world, "model", &statement, as_it_is)?;
    // As before 1.1; git's own files are then left out.
    parameters(&mut statement).as_object_mut().context("an object")?.remove("ignore_paths");
    accepts(&world, "model", &statement, as_it_is)?;
    world.write("model/.git/HEAD", "")?;
    accepts(&world, "model", &statement, as_it_is)?;
    // What the reference writes on Windows, where there is nothing of that name.
    parameters(&mut statement)["ignore_paths"] = json!(["logs\\tmp", ".git"]);
    accepts(&world, "model", &statement, as_it_is)?;
    // More about a file than we know.
    statement["predicate"]["resources"][0]["size"] = 10.into();
    accepts(&world, "model", &statement, as_it_is)
}

/// What the reference's guesser calls BLAKE2b.
#[test]
fn names_of_hashes() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    for (hash_type, algorithm) in
        [("blake2b", "blake2b"), ("blake2b", "blake2"), ("blake2", "blake2"), ("blake2", "blake2b")]
    {
        let mut statement = forge::statement(&FILES);
        parameters(&mut statement)["hash_type"] = hash_type.into();
        for (index, (_, content)) in FILES.iter().enumerate() {
            let resource = &mut statement["predicate"]["resources"][index];
            resource["algorithm"] = algorithm.into();
            let blake2b = openssl::hash::MessageDigest::from_name("blake2b512").context("BLAKE2b")?;
            let digest = openssl::hash::hash(blake2b, content.as_bytes())?;
            resource["digest"] = hex::encode(digest).into();
        }
        forge::reroot(&mut statement)?;
        accepts(&world, "model", &statement, as_it_is).context(algorithm)?;
    }
    Ok(())
}

/// The reference's dialect of shards.
#[test]
fn shards_of_the_reference() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let shards =
        [("config.json:0:2", "{}"), ("sub/weights.bin:0:8", "01234567"), ("sub/weights.bin:8:10", "89")];
    let sharded = |algorithm: &str, size: Value| {
        let mut statement = forge::statement(&shards);
        parameters(&mut statement)["method"] = "shards".into();
        parameters(&mut statement)["shard_size"] = size;
        for index in 0..shards.len() {
            statement["predicate"]["resources"][index]["algorithm"] = algorithm.into();
        }
        statement
    };
    for algorithm in ["sha256", "sha256-sharded-8"] {
        for size in [json!(8), json!(8.0)] {
            accepts(&world, "model", &sharded(algorithm, size), as_it_is)?;
        }
    }
    for algorithm in ["sha256-sharded-9", "sha256-sharded-", "sha256-sharded-08", "blake3-sharded-8"] {
        let said = verify(&world, "model", &sharded(algorithm, json!(8)), as_it_is)?;
        ensure!(
            said.iter().all(|said| said.contains(&format!("has the algorithm {algorithm:?}"))),
            "{said:?}"
        );
    }
    // An empty file has no shards, so that nobody can sign one.
    world.write("model/empty", "")?;
    let said = verify(&world, "model", &sharded("sha256", json!(8)), as_it_is)?;
    ensure!(said.iter().all(|said| said.contains("warning: 1 file not signed and ignored")), "{said:?}");
    Ok(())
}

/// The only file of a model that is one file is `.` for the reference, and has its own name for the specification.
#[test]
fn models_of_one_file() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    fs::rename(world.path("model/config.json"), world.path("weights.bin"))?;
    let file = "weights.bin";
    for name in [".", file] {
        accepts(&world, file, &forge::statement(&[(name, "{}")]), as_it_is)?;
        let mut statement = forge::statement(&[(&format!("{name}:0:1"), "{"), (&format!("{name}:1:2"), "}")]);
        parameters(&mut statement)["method"] = "shards".into();
        parameters(&mut statement)["shard_size"] = 1.into();
        accepts(&world, file, &statement, as_it_is)?;
    }
    let said = verify(&world, file, &forge::statement(&[(".", "{}"), ("more", "")]), as_it_is)?;
    ensure!(said.iter().all(|said| said.contains("\".\", which is not a canonical path")), "{said:?}");
    let said = verify(&world, file, &forge::statement(&[("other.bin", "{}")]), as_it_is)?;
    ensure!(said.iter().all(|said| said.contains("1 missing, 1 not signed")), "{said:?}");
    Ok(())
}

/// Every flag of the reference's verify commands is one of ours.
#[test]
fn flags_of_the_reference() -> anyhow::Result<()> {
    let world = World::new()?;
    let reference = cache("reference/bin/model_signing")?;
    let mut flags = 0;
    for method in ["key", "certificate", "sigstore"] {
        let help = |program: &std::path::Path| -> anyhow::Result<String> {
            let mut command = std::process::Command::new(program);
            let output = command.args(["verify", method, "--help"]).env("COLUMNS", "200").output()?;
            ensure!(output.status.success(), "{output:?}");
            Ok(String::from_utf8(output.stdout)?)
        };
        let theirs = help(&reference)?;
        let words = theirs.split(|at: char| at.is_whitespace() || matches!(at, ',' | '[' | ']' | '/' | '|'));
        for flag in words.filter(|word| word.starts_with("--") && word.len() > 2 && *word != "--help") {
            flags += 1;
            let flag = flag.trim_end_matches(['.', ';']);
            // One that there is not is "unexpected"; of one that there is, something else is missing.
            let output = world.omsign(&["verify", method, "model", flag])?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(!errors.contains("unexpected argument"), "verify {method} {flag}: {errors}");
        }
    }
    ensure!(flags > 20, "{flags} flags: is the help still read rightly?");
    Ok(())
}
