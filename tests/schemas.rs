//! Bundles and results are what their schemas say: the official ones of OMS v1.0, and ours of `verify --json`.

use std::path::Path;

use anyhow::{Context as _, ensure};
use jsonschema::{Registry, Validator};
use omsign_tests::certified::world_with_signer;
use omsign_tests::forge;
use omsign_tests::pki::Pki;
use omsign_tests::sigstore::{Flaw, Sigstore};
use openssl::base64::{decode_block, encode_block};
use serde_json::{Value, json};

fn read(path: &str) -> anyhow::Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// The official schemas of a bundle and of the statement in it.
struct Official {
    bundle: Validator,
    statement: Validator,
}

impl Official {
    fn read() -> anyhow::Result<Self> {
        let mut registry = Registry::new();
        for name in ["envelope", "predicate"] {
            let schema = read(&format!("data/schemas/{name}.schema.json"))?;
            let id = schema["$id"].as_str().context("an id")?.to_owned();
            registry = registry.add(id, schema)?;
        }
        let registry = registry.prepare()?;
        let validator = |name: &str| -> anyhow::Result<Validator> {
            let schema = read(&format!("data/schemas/{name}.schema.json"))?;
            Ok(jsonschema::options().with_registry(&registry).build(&schema)?)
        };
        Ok(Self { bundle: validator("bundle")?, statement: validator("statement")? })
    }

    /// What is wrong with a bundle.
    fn mistakes(&self, bundle: &Value) -> anyhow::Result<Vec<String>> {
        let mut mistakes: Vec<_> = self.bundle.iter_errors(bundle).map(|error| error.to_string()).collect();
        let payload = bundle["dsseEnvelope"]["payload"].as_str().unwrap_or_default();
        let statement: Value = serde_json::from_slice(&decode_block(payload)?).unwrap_or_default();
        mistakes.extend(self.statement.iter_errors(&statement).map(|error| error.to_string()));
        Ok(mistakes)
    }
}

const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("weights.bin", "0123456789")];

#[test]
fn what_we_write_is_what_the_official_schemas_say() -> anyhow::Result<()> {
    let official = Official::read()?;
    let world = world_with_signer(&FILES)?;
    for hash in ["sha256", "blake2b", "blake3"] {
        for serialization in [&["--serialization", "files"][..], &["--shard-size", "4"]] {
            for chain in [&[][..], &["--certificate-chain", "k.pem"]] {
                let sign = ["sign", "model", "--private-key", "k.key", "--hash-type", hash];
                world.omsign_ok(&[&sign[..], serialization, chain].concat())?;
                let bundle: Value = serde_json::from_slice(&std::fs::read(world.path("model.sig"))?)?;
                let mistakes = official.mistakes(&bundle)?;
                ensure!(mistakes.is_empty(), "{hash} {serialization:?} {chain:?}: {mistakes:?}");
            }
        }
    }
    Ok(())
}

/// Whatever the schemas refuse, we refuse: one change at a time in a bundle that both take.
#[test]
fn what_the_official_schemas_refuse_is_refused() -> anyhow::Result<()> {
    let official = Official::read()?;
    let world = world_with_signer(&FILES)?;
    let key = forge::private_key(&world.path("k.key"))?;
    let signed = |statement: &Value| -> anyhow::Result<Value> {
        let payload = serde_json::to_vec(statement)?;
        Ok(forge::bundle(&forge::key_material(&key)?, &payload, &forge::sign(&key, &payload)?))
    };
    let verify = |bundle: &Value, trust: &[&str]| -> anyhow::Result<bool> {
        world.write("b.sig", bundle.to_string())?;
        let verified = world.omsign(&[&["verify", "model", "--signature", "b.sig"], trust].concat())?;
        Ok(verified.status.success())
    };
    let statement = forge::statement(&FILES);
    // Of every method: with a key, with a chain and a time stamp, with the proofs of both versions of Rekor.
    let sigstore = Sigstore::new(&world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    let payload = serde_json::to_vec(&statement)?;
    let signature = forge::sign(&key, &payload)?;
    let mut chain = forge::chain_material(&world.path("k.pem"))?;
    let stamp = Pki::new(&world).stamp("tsa", &signature, None, "-sha256 -cert")?;
    chain["timestampVerificationData"] =
        json!({ "rfc3161Timestamps": [{ "signedTimestamp": encode_block(&stamp) }] });
    let (who, provider) = ("ann@acme.com", "https://p.example");
    let by_key = &["--public-key", "k.pub"][..];
    let by_chain = &["--certificate-chain", "root.pem", "--timestamp-root", "tsa-root.pem"][..];
    let keyless = &["--identity", who, "--identity-provider", provider, "--trusted-root", "root.json"][..];
    let wholes = [
        (signed(&statement)?, by_key),
        (forge::bundle(&chain, &payload, &signature), by_chain),
        (sigstore.sign(&payload, who, provider, Flaw::None)?, keyless),
        (sigstore.sign_v2(&payload, who, provider, Flaw::None)?, keyless),
    ];
    let values = [
        json!(null),
        json!(1),
        json!(""),
        json!("x"),
        json!([]),
        json!({}),
        json!(true),
        json!("AA=="),
        json!([{}]),
    ];
    let (mut refused, mut relaxed) = (0, Vec::new());
    let mut compare = |what: String, bundle: &Value, trust: &[&str]| -> anyhow::Result<()> {
        if official.mistakes(bundle).is_ok_and(|mistakes| mistakes.is_empty()) {
            return Ok(());
        }
        refused += 1;
        if verify(bundle, trust)? {
            relaxed.push(what);
        }
        Ok(())
    };
    for (whole, trust) in &wholes {
        ensure!(official.mistakes(whole)?.is_empty() && verify(whole, trust)?, "{whole}");
        for pointer in pointers(whole) {
            for value in &values {
                let mut bundle = whole.clone();
                *bundle.pointer_mut(&pointer).context("there")? = value.clone();
                compare(format!("{pointer} = {value}"), &bundle, trust)?;
            }
            let mut bundle = whole.clone();
            remove(&mut bundle, &pointer)?;
            compare(format!("{pointer} removed"), &bundle, trust)?;
        }
    }
    for pointer in pointers(&statement) {
        for value in &values {
            let mut changed = statement.clone();
            *changed.pointer_mut(&pointer).context("there")? = value.clone();
            compare(format!("payload {pointer} = {value}"), &signed(&changed)?, by_key)?;
        }
        let mut changed = statement.clone();
        remove(&mut changed, &pointer)?;
        compare(format!("payload {pointer} removed"), &signed(&changed)?, by_key)?;
    }
    // Null is no list, but means the same to every parser of Sigstore bundles. Releases before 1.1 left a model's
    // name out where it was ".".
    let known = [
        "/verificationMaterial/tlogEntries = null",
        "payload /subject/0/name = \"\"",
        "payload /subject/0/name removed",
    ];
    relaxed.retain(|what| !known.contains(&what.as_str()));
    ensure!(relaxed.is_empty(), "the schemas refuse, and we do not: {relaxed:?}");
    ensure!(refused > 400, "{refused} bundles tried");
    Ok(())
}

/// Every value in a document.
fn pointers(value: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(list) => {
            list.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => Vec::new(),
    };
    let mut found = Vec::new();
    for (name, child) in children {
        found.push(format!("/{name}"));
        found.extend(pointers(child).into_iter().map(|below| format!("/{name}{below}")));
    }
    found
}

fn remove(value: &mut Value, pointer: &str) -> anyhow::Result<()> {
    let (parent, name) = pointer.rsplit_once('/').context("a pointer")?;
    match value.pointer_mut(parent).context("there")? {
        Value::Object(map) => drop(map.remove(name)),
        Value::Array(list) => drop(list.remove(name.parse()?)),
        _ => {}
    }
    Ok(())
}

#[test]
fn results_of_verify_are_what_our_schema_says() -> anyhow::Result<()> {
    let schema = jsonschema::validator_for(&read("../docs/verify.schema.json")?)?;
    let world = world_with_signer(&FILES)?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.key", "--signature", "k.sig"])?;
    let chain = ["--certificate-chain", "k.pem"];
    world.omsign_ok(
        &[&["sign", "model", "--private-key", "k.key", "--signature", "c.sig"], &chain[..]].concat(),
    )?;
    let sigstore = Sigstore::new(&world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    let payload = serde_json::to_vec(&forge::statement(&FILES))?;
    world.write(
        "s.sig",
        sigstore.sign(&payload, "ann@acme.com", "https://p.example", Flaw::None)?.to_string(),
    )?;
    let check = |status: i32, outcome: &str, arguments: &[&str]| -> anyhow::Result<Value> {
        let output = world.omsign(&[&["verify", "model", "--json"], arguments].concat())?;
        let json: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(output.status.code() == Some(status) && json["outcome"] == outcome, "{arguments:?}: {json}");
        let mistakes: Vec<_> = schema.iter_errors(&json).map(|error| error.to_string()).collect();
        ensure!(mistakes.is_empty(), "{arguments:?}: {json}: {mistakes:?}");
        // And nothing that it does not know.
        let documented = read("../docs/verify.schema.json")?.to_string();
        for name in json.as_object().context("an object")?.keys() {
            ensure!(documented.contains(&format!("\"{name}\":{{")), "{name} is not documented");
        }
        Ok(json)
    };
    let key = ["--signature", "k.sig", "--public-key", "k.pub"];
    check(0, "verified", &key)?;
    check(0, "verified", &["--signature", "c.sig", "--certificate-chain", "root.pem"])?;
    let keyless = ["--signature", "s.sig", "--trusted-root", "root.json", "--identity", "ann@acme.com"];
    check(0, "verified", &[&keyless[..], &["--identity-provider", "https://p.example"]].concat())?;
    world.omsign_ok(&["trust", "add", "k", "--public-key", "k.pub"])?;
    check(0, "verified", &["--signature", "k.sig"])?;
    check(0, "verified", &[&key[..], &["--partial", "config.json"]].concat())?;
    let json = check(1, "wrong", &[&key[..], &["--model-name", "x"]].concat())?;
    ensure!(json["reason"] == "subject", "{json}");
    let json = check(2, "undone", &["--signature", "k.sig", "--public-key", "nowhere"])?;
    ensure!(json["reason"] == "undone", "{json}");
    let signed: Value = serde_json::from_str(&std::fs::read_to_string(world.path("k.sig"))?)?;
    let no_oms = serde_json::to_vec(&json!({ "_type": "https://in-toto.io/Statement/v1" }))?;
    let (private, sig) = (forge::private_key(&world.path("k.key"))?, "/dsseEnvelope/signatures/0/sig");
    for (pointer, value, reason) in [
        ("/mediaType", "x".to_owned(), "bundle"),
        ("/verificationMaterial/publicKey/hint", "0".repeat(64), "signer"),
        (sig, "MAA=".to_owned(), "signature"),
        ("/dsseEnvelope/payload", encode_block(&no_oms), "statement"),
    ] {
        let mut bundle = signed.clone();
        *bundle.pointer_mut(pointer).context("there")? = value.into();
        if reason == "statement" {
            let resigned = encode_block(&forge::sign(&private, &no_oms)?);
            *bundle.pointer_mut(sig).context("there")? = resigned.into();
        }
        world.write("wrong.sig", bundle.to_string())?;
        let json = check(1, "wrong", &["--signature", "wrong.sig", "--public-key", "k.pub"])?;
        ensure!(json["reason"] == reason, "{pointer}: {json}");
    }
    check(2, "undone", &["--signature", "nowhere.sig", "--public-key", "k.pub"])?;
    let stamped = sigstore.sign_v2(&payload, "ann@acme.com", "https://p.example", Flaw::None)?;
    world.write("s.sig", stamped.to_string())?;
    let json = check(0, "verified", &[&keyless[..], &["--identity-provider", "https://p.example"]].concat())?;
    ensure!(json["signed_at_source"] == "RFC 3161 time stamp", "{json}");
    std::os::unix::fs::symlink("nowhere", world.path("model/link"))?;
    let json = check(1, "wrong", &key)?;
    ensure!(json["not_possible"][0]["name"] == "link" && json["not_possible_count"] == 1, "{json}");
    std::fs::remove_file(world.path("model/link"))?;
    world.write("model/config.json", "{ }")?;
    world.write("model/more", "")?;
    let json = check(1, "wrong", &key)?;
    ensure!(
        json["reason"] == "differences"
            && json["changed_count"] == 1
            && json["not_signed"] == json!(["more"]),
        "{json}"
    );
    world.write("model/config.json", "{}")?;
    let json = check(0, "verified", &[&key[..], &["--ignore-unsigned-files"]].concat())?;
    ensure!(json["ignored"] == json!(["more"]), "{json}");
    Ok(())
}

#[test]
fn manifests_are_what_our_schema_says() -> anyhow::Result<()> {
    let schema = jsonschema::validator_for(&read("../docs/manifest.schema.json")?)?;
    let world = world_with_signer(&FILES)?;
    for hash in ["sha256", "blake2b", "blake3"] {
        for more in [&[][..], &["--shard-size", "4"], &["--part", "1/2"], &["--part", "3/3"]] {
            let arguments = [&["digest", "model", "--json", "--hash-type", hash], more].concat();
            let manifest: Value = serde_json::from_str(&world.omsign_ok(&arguments)?)?;
            let mistakes: Vec<_> = schema.iter_errors(&manifest).map(|error| error.to_string()).collect();
            ensure!(mistakes.is_empty(), "{hash} {more:?}: {mistakes:?}");
        }
    }
    // And what the schema refuses is not signed.
    let manifest: Value = serde_json::from_str(&world.omsign_ok(&["digest", "model", "--json"])?)?;
    let mut refused = 0;
    for pointer in pointers(&manifest) {
        for value in [json!(null), json!(-1), json!("x"), json!([]), json!({})] {
            let mut changed = manifest.clone();
            *changed.pointer_mut(&pointer).context("there")? = value.clone();
            if !schema.is_valid(&changed) {
                world.write("manifest.json", changed.to_string())?;
                let sign = ["sign", "--manifest", "manifest.json", "--private-key", "k.key"];
                world.omsign_fails(2, &sign).with_context(|| format!("{pointer} = {value}"))?;
                refused += 1;
            }
        }
    }
    ensure!(refused > 60, "{refused} manifests tried");
    Ok(())
}
