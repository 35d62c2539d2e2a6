//! Statements that are correctly signed and wrong: each is refused for what is wrong with it, not for its signature.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context as _, ensure};
use omsign_tests::certified::world_with_signer;
use omsign_tests::forge;
use omsign_tests::sigstore::{Flaw, Sigstore};
use omsign_tests::world::World;
use openssl::pkey::{PKey, Private};
use serde_json::{Value, json};

const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("sub/weights.bin", "0123456789")];
const IDENTITY: &str = "ann@acme.com";
const PROVIDER: &str = "https://accounts.example";

fn key(world: &World) -> anyhow::Result<PKey<Private>> {
    forge::private_key(&world.path("k.key"))
}

const BY_KEY: [&str; 6] = ["verify", "model", "--signature", "k.sig", "--public-key", "k.pub"];
const BY_CERTIFICATE: [&str; 6] =
    ["verify", "model", "--signature", "c.sig", "--certificate-chain", "root.pem"];
const KEYLESS: [&str; 10] = [
    "verify",
    "model",
    "--signature",
    "s.sig",
    "--identity",
    IDENTITY,
    "--identity-provider",
    PROVIDER,
    "--trusted-root",
    "root.json",
];

/// Signs a statement by the key and the certificate methods.
fn sign(world: &World, payload: &[u8]) -> anyhow::Result<()> {
    let key = key(world)?;
    let signature = forge::sign(&key, payload)?;
    world.write("k.sig", forge::bundle(&forge::key_material(&key)?, payload, &signature).to_string())?;
    let chain = forge::chain_material(&world.path("k.pem"))?;
    world.write("c.sig", forge::bundle(&chain, payload, &signature).to_string())?;
    Ok(())
}

type Change = fn(&mut Value);

/// Every way to be wrong that the statement alone shows, and what is said about it.
const WRONG: &[(Change, &str)] = &[
    (|s| s["_type"] = "https://in-toto.io/Statement/v0.1".into(), "not in-toto Statement v1 (OMS 6.6)"),
    (|s| s["predicateType"] = "https://slsa.dev/provenance/v1".into(), "not an OMS v1.0 signature (OMS 5.1)"),
    (
        |s| s["predicateType"] = "https://model_signing/Digests/v0.1".into(),
        "not an OMS v1.0 signature (OMS 5.1)",
    ),
    (|s| remove(s, "_type"), "malformed (OMS 5): missing field `_type`"),
    (|s| remove(s, "subject"), "malformed (OMS 5): missing field `subject`"),
    (|s| remove(s, "predicate"), "malformed (OMS 5): missing field `predicate`"),
    (|s| remove(&mut s["predicate"], "resources"), "malformed (OMS 5): missing field `resources`"),
    (|s| remove(&mut s["predicate"], "serialization"), "malformed (OMS 5): missing field `serialization`"),
    (|s| s["predicate"]["resources"] = json!([]), "lists no files (OMS 5.2.1)"),
    (|s| s["subject"] = json!([]), "0 subjects instead of one (OMS 6.5)"),
    (|s| s["subject"] = json!([s["subject"][0], s["subject"][0]]), "2 subjects instead of one (OMS 6.5)"),
    (
        |s| s["subject"][0]["digest"]["sha256"] = "00".repeat(32).into(),
        "root digest is not that of the listed files",
    ),
    (|s| remove(&mut s["subject"][0], "digest"), "missing field `digest`"),
    (|s| s["more"] = 1.into(), "unknown field `more`"),
    // No lists where objects have to be, and no digests that are none.
    (|s| s["subject"][0] = json!(["model", { "sha256": "00" }]), "malformed (OMS 5): invalid type: sequence"),
    (|s| list(s, &["resources", "serialization"], "predicate"), "malformed (OMS 5): invalid type: sequence"),
    (
        |s| list(&mut s["predicate"]["resources"], &["name", "digest", "algorithm"], "0"),
        "invalid type: sequence",
    ),
    (|s| s["subject"][0]["digest"]["sha512"] = "ZZ".into(), "the subject's sha512 digest is not hexadecimal"),
    (|s| s["predicate"]["serialization"]["shard_size"] = json!(null), "malformed (OMS 5)"),
    (|s| s["predicate"]["more"] = 1.into(), "unknown field `more`"),
    (|s| rename(s, "sub/weights.bin"), "lists \"sub/weights.bin\" twice (OMS 5.2.1)"),
    (|s| rename(s, "/etc/passwd"), "\"/etc/passwd\", which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "../config.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "sub/../config.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "./config.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "."), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "sub//config.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "config.json/"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "sub\\config.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, "config\0.json"), "which is not a canonical path (OMS 6.1.2)"),
    (|s| rename(s, ""), "which is not a canonical path (OMS 6.1.2)"),
    (|s| upper_case(s), "the digest of \"config.json\" is malformed (OMS 5.2.1)"),
    (
        |s| s["predicate"]["resources"][0]["digest"] = "ab".into(),
        "the digest of \"config.json\" is malformed",
    ),
    (
        |s| s["predicate"]["resources"][0]["algorithm"] = "blake3".into(),
        "but the manifest says \"sha256\" (OMS 7)",
    ),
    (
        |s| s["predicate"]["resources"][0]["algorithm"] = "md5".into(),
        "but the manifest says \"sha256\" (OMS 7)",
    ),
    (|s| s["predicate"]["serialization"]["hash_type"] = "md5".into(), "unknown hash_type \"md5\" (OMS 7)"),
    (
        |s| s["predicate"]["serialization"]["hash_type"] = "blake3".into(),
        "but the manifest says \"blake3\" (OMS 7)",
    ),
    (
        |s| s["predicate"]["serialization"]["method"] = "zip".into(),
        "unknown serialization method \"zip\" (OMS 6.3)",
    ),
    (
        |s| s["predicate"]["serialization"]["shard_size"] = 5.into(),
        "a shard_size but is not sharded (OMS 5.2.2)",
    ),
    (
        |s| s["predicate"]["serialization"]["ignore_paths"] = json!(["a/../x"]),
        "which is not a canonical path (OMS 6.2.1)",
    ),
    (|s| s["predicate"]["serialization"]["allow_symlinks"] = "no".into(), "malformed (OMS 5)"),
    (|s| remove(&mut s["predicate"]["serialization"], "allow_symlinks"), "missing field `allow_symlinks`"),
];

/// The same for shards of four bytes.
const WRONG_SHARDS: &[(Change, &str)] = &[
    (
        |s| remove(&mut s["predicate"]["serialization"], "shard_size"),
        "shard_size is not a positive whole number",
    ),
    (
        |s| s["predicate"]["serialization"]["shard_size"] = 0.into(),
        "shard_size is not a positive whole number",
    ),
    (
        |s| s["predicate"]["serialization"]["shard_size"] = json!(4.5),
        "shard_size is not a positive whole number",
    ),
    (
        |s| s["predicate"]["serialization"]["shard_size"] = 5.into(),
        "are not of the manifest's shard_size at byte 0",
    ),
    (|s| rename_shard(s, 1, "sub/weights.bin:2:6"), "overlap at byte 2 (OMS 6.3.2)"),
    (|s| rename_shard(s, 1, "sub/weights.bin:5:9"), "have a gap at byte 4 (OMS 6.3.2)"),
    (|s| rename_shard(s, 0, "sub/weights.bin:1:4"), "have a gap at byte 0 (OMS 6.3.2)"),
    (|s| rename_shard(s, 1, "sub/weights.bin:0:4"), "twice (OMS 5.2.1)"),
    (
        |s| rename_shard(s, 1, "sub/weights.bin"),
        "is not the name of a shard: <path>:<start>:<end> (OMS 6.3.2)",
    ),
    (|s| rename_shard(s, 1, "sub/weights.bin:8:4"), "is not the name of a shard"),
    (|s| rename_shard(s, 1, "sub/weights.bin:04:8"), "is not the name of a shard"),
    (|s| rename_shard(s, 1, "../weights.bin:4:8"), "which is not a canonical path (OMS 6.1.2)"),
    (
        |s| rename_shard(s, 2, "sub/weights.bin:8:12"),
        "its shards end at byte 12, the file has 10 bytes (OMS 6.3.2)",
    ),
    (
        |s| drop(s["predicate"]["resources"].as_array_mut().expect("a list").pop()),
        "its shards end at byte 8, the file has 10 bytes",
    ),
];

fn remove(value: &mut Value, name: &str) {
    value.as_object_mut().expect("an object").remove(name).expect("there");
}

/// Puts a list of an object's values in its place.
fn list(parent: &mut Value, names: &[&str], which: &str) {
    let object = parent.pointer_mut(&format!("/{which}")).expect("there");
    *object = names.iter().map(|name| object[*name].clone()).collect();
}

fn rename(statement: &mut Value, name: &str) {
    statement["predicate"]["resources"][0]["name"] = name.into();
}

fn rename_shard(statement: &mut Value, index: usize, name: &str) {
    statement["predicate"]["resources"][index]["name"] = name.into();
}

fn upper_case(statement: &mut Value) {
    let digest = &mut statement["predicate"]["resources"][0]["digest"];
    *digest = digest.as_str().expect("text").to_uppercase().into();
}

fn shards() -> Value {
    let shards: [(&str, &str); 3] =
        [("sub/weights.bin:0:4", "0123"), ("sub/weights.bin:4:8", "4567"), ("sub/weights.bin:8:10", "89")];
    let mut statement = forge::statement(&shards);
    statement["predicate"]["serialization"]["method"] = "shards".into();
    statement["predicate"]["serialization"]["shard_size"] = 4.into();
    statement
}

#[test]
fn by_the_key_and_the_certificate_method() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    sign(&world, &serde_json::to_vec(&forge::statement(&FILES))?)?;
    world.omsign_ok(&BY_KEY)?;
    world.omsign_ok(&BY_CERTIFICATE)?;
    let refuse = |statement: &Value, expected: &str| -> anyhow::Result<()> {
        sign(&world, &serde_json::to_vec(statement)?)?;
        for arguments in [&BY_KEY, &BY_CERTIFICATE] {
            world.omsign_refuses(1, arguments, &[expected]).with_context(|| statement.to_string())?;
        }
        Ok(())
    };
    for (change, expected) in WRONG {
        let mut statement = forge::statement(&FILES);
        change(&mut statement);
        refuse(&statement, expected)?;
    }
    fs::remove_file(world.path("model/config.json"))?;
    sign(&world, &serde_json::to_vec(&shards())?)?;
    world.omsign_ok(&BY_KEY)?;
    for (change, expected) in WRONG_SHARDS {
        let mut statement = shards();
        change(&mut statement);
        if expected.starts_with("its shards end") {
            forge::reroot(&mut statement)?;
        }
        refuse(&statement, expected)?;
    }
    // No JSON, twice the same field, and nothing but the start of one.
    let whole = serde_json::to_string(&shards())?;
    for payload in ["", "{}", &whole[..whole.len() - 1], &whole.replacen('{', "{\"subject\":[],", 1)] {
        sign(&world, payload.as_bytes())?;
        let expected = if payload.is_empty() { "payload is empty (OMS 4)" } else { "malformed (OMS 5)" };
        world.omsign_refuses(1, &BY_KEY, &[expected])?;
    }
    Ok(())
}

#[test]
fn by_the_sigstore_method() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let sigstore = Sigstore::new(&world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    let sign = |statement: &Value| -> anyhow::Result<()> {
        let bundle = sigstore.sign(&serde_json::to_vec(statement)?, IDENTITY, PROVIDER, Flaw::None)?;
        world.write("s.sig", bundle.to_string()).map(drop)
    };
    sign(&forge::statement(&FILES))?;
    world.omsign_ok(&KEYLESS)?;
    for (change, expected) in WRONG {
        let mut statement = forge::statement(&FILES);
        change(&mut statement);
        sign(&statement)?;
        world.omsign_refuses(1, &KEYLESS, &[expected]).with_context(|| statement.to_string())?;
    }
    // What release 0.2.0 of the reference signed so: a subject for each file, in an envelope as DSSE has it.
    let mut old = forge::statement(&FILES);
    let hashed = |(name, content): &(&str, &str)| json!({ "name": name, "digest": { "sha256": hex::encode(openssl::sha::sha256(content.as_bytes())) } });
    old["subject"] = FILES.iter().map(hashed).collect();
    old["predicateType"] = "https://model_signing/Digests/v0.1".into();
    old["predicate"] = json!({ "unused": "Unused, just passed due to API requirements" });
    sign(&old)?;
    world.omsign_refuses(1, &KEYLESS, &["not an OMS v1.0 signature", "--allow-legacy accepts it"])?;
    let accepting = [&KEYLESS[..], &["--allow-legacy"]].concat();
    world.omsign_ok(&accepting)?;
    old["subject"][0]["digest"]["sha256"] = "0".repeat(64).into();
    sign(&old)?;
    world.omsign_refuses(1, &accepting, &["1 changed"])?;
    Ok(())
}

/// What the envelope and the material say is checked whatever was signed.
#[test]
fn bundles_around_a_right_statement() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    sign(&world, &serde_json::to_vec(&forge::statement(&FILES))?)?;
    let whole: Value = serde_json::from_slice(&fs::read(world.path("k.sig"))?)?;
    let mut older = whole.clone();
    older["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.3".into();
    world.write("k.sig", older.to_string())?;
    world.omsign_ok(&BY_KEY)?;
    let cases: &[(Change, &str)] = &[
        (|b| b["mediaType"] = "application/vnd.dev.sigstore.bundle.v0.2+json".into(), "(OMS 8.1)"),
        (|b| b["dsseEnvelope"]["payloadType"] = "application/json".into(), "(OMS 6.7)"),
        (|b| double(b), "the envelope has 2 signatures instead of one (OMS 8.1)"),
        (
            |b| b["dsseEnvelope"]["signatures"] = json!([]),
            "the envelope has 0 signatures instead of one (OMS 8.1)",
        ),
        (
            |b| b["verificationMaterial"]["publicKey"]["hint"] = "ab".repeat(32).into(),
            "another key than the one given",
        ),
        (
            |b| remove(&mut b["verificationMaterial"], "publicKey"),
            "names 0 signing methods instead of one (OMS 4.1)",
        ),
        (|b| both(b), "names 2 signing methods instead of one (OMS 4.1)"),
        (|b| remove(b, "dsseEnvelope"), "malformed (OMS 4): missing field `dsseEnvelope`"),
        (|b| b["more"] = 1.into(), "malformed (OMS 4): unknown field `more`"),
        (|b| b["dsseEnvelope"]["more"] = 1.into(), "malformed (OMS 4): unknown field `more`"),
        (|b| list(b, &["payload", "payloadType", "signatures"], "dsseEnvelope"), "invalid type: sequence"),
        (|b| b["dsseEnvelope"]["signatures"][0] = json!(["AA=="]), "invalid type: sequence"),
        (
            |b| *b = json!([b["mediaType"], b["verificationMaterial"], b["dsseEnvelope"]]),
            "no bundle: it is no JSON object (OMS 4)",
        ),
        (|b| b["verificationMaterial"]["tlogEntries"] = json!([5]), "malformed (OMS 4): tlogEntries"),
    ];
    for (change, expected) in cases {
        let mut bundle = whole.clone();
        change(&mut bundle);
        world.write("k.sig", bundle.to_string())?;
        world.omsign_refuses(1, &BY_KEY, &[expected])?;
    }
    // A chain where a key was given, and the other way round.
    world.omsign_refuses(
        1,
        &["verify", "model", "--signature", "c.sig", "--public-key", "k.pub"],
        &["signed with the certificate method, but a public key was given to verify it (OMS 4.1)"],
    )?;
    let no_log_needed = whole.to_string().replace(r#","tlogEntries":[]"#, "");
    ensure!(no_log_needed != whole.to_string());
    world.write("k.sig", no_log_needed)?;
    world.omsign_ok(&BY_KEY).map(drop)
}

fn double(bundle: &mut Value) {
    let signature = bundle["dsseEnvelope"]["signatures"][0].clone();
    bundle["dsseEnvelope"]["signatures"] = json!([signature, signature]);
}

fn both(bundle: &mut Value) {
    bundle["verificationMaterial"]["x509CertificateChain"] =
        json!({ "certificates": [{ "rawBytes": "AA==" }] });
}

/// The signed policy on links binds, whatever the command line says.
#[test]
fn links_are_what_the_signer_chose() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let mut statement = forge::statement(&[FILES[0], ("link", "{}"), FILES[1]]);
    let verify = |allow: bool, statement: &mut Value| -> anyhow::Result<std::process::Output> {
        statement["predicate"]["serialization"]["allow_symlinks"] = allow.into();
        sign(&world, &serde_json::to_vec(statement)?)?;
        world.omsign(&[&BY_KEY[..], &["--allow-symlinks"]].concat())
    };
    symlink("config.json", world.path("model/link"))?;
    let followed = verify(true, &mut statement)?;
    ensure!(followed.status.success(), "{followed:?}");
    ensure!(String::from_utf8_lossy(&followed.stderr).contains("--allow-symlinks has no effect"));
    for (allow, target, expected) in [
        (false, "config.json", "is a symbolic link, and symbolic links are not allowed here"),
        (true, "../k.pub", "is a symbolic link that leads out of the model"),
        (true, ".", "is a symbolic link to a directory that contains it"),
        (true, "nothing", "is a symbolic link that leads nowhere"),
        (true, "link", "is a symbolic link that leads nowhere"),
    ] {
        fs::remove_file(world.path("model/link"))?;
        symlink(target, world.path("model/link"))?;
        let output = verify(allow, &mut statement)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && errors.contains(expected), "{target}: {errors}");
    }
    Ok(())
}

/// Links to directories with links to directories: a few of them would be any number of files.
#[test]
fn links_do_not_multiply() -> anyhow::Result<()> {
    let world = world_with_signer(&FILES)?;
    let mut statement = forge::statement(&FILES);
    statement["predicate"]["serialization"]["allow_symlinks"] = true.into();
    sign(&world, &serde_json::to_vec(&statement)?)?;
    for level in 0..40 {
        world.write(&format!("model/{level}/x"), "")?;
        for link in ["a", "b"] {
            symlink(format!("../{}", level + 1), world.path(&format!("model/{level}/{link}")))?;
        }
    }
    world.write("model/40/x", "")?;
    world.omsign_refuses(
        2,
        &BY_KEY,
        &["more than 10000 directories or 1000000 files are reached through symbolic links"],
    )
}
