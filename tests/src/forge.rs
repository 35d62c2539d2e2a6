//! Bundles that no tool writes: any payload, correctly signed.

use std::path::Path;

use anyhow::Context as _;
use openssl::base64::encode_block;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::sha::sha256;
use openssl::sign::Signer;
use serde_json::{Value, json};

/// A private key from a PEM file.
pub fn private_key(path: &Path) -> anyhow::Result<PKey<Private>> {
    PKey::private_key_from_pem(&std::fs::read(path)?).with_context(|| path.display().to_string())
}

/// Signs a payload as DSSE does.
pub fn sign(key: &PKey<Private>, payload: &[u8]) -> anyhow::Result<Vec<u8>> {
    sign_pae(key, &pae(payload))
}

/// DSSE v1.0: the bytes that are signed.
pub fn pae(payload: &[u8]) -> Vec<u8> {
    let kind = "application/vnd.in-toto+json";
    let mut bytes = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    bytes.extend(payload);
    bytes
}

/// Signs any bytes, with the hash that belongs to the key.
pub fn sign_pae(key: &PKey<Private>, pae: &[u8]) -> anyhow::Result<Vec<u8>> {
    let hash = match key.bits() {
        384 => MessageDigest::sha384(),
        521 => MessageDigest::sha512(),
        _ => MessageDigest::sha256(),
    };
    Ok(Signer::new(hash, key)?.sign_oneshot_to_vec(pae)?)
}

/// Verification material of the key method.
pub fn key_material(key: &PKey<Private>) -> anyhow::Result<Value> {
    Ok(json!({ "publicKey": { "hint": hex::encode(sha256(&key.public_key_to_pem()?)) }, "tlogEntries": [] }))
}

/// Verification material of the certificate method.
pub fn chain_material(chain: &Path) -> anyhow::Result<Value> {
    let chain = openssl::x509::X509::stack_from_pem(&std::fs::read(chain)?)?;
    let mut certificates = Vec::new();
    for certificate in chain {
        certificates.push(json!({ "rawBytes": encode_block(&certificate.to_der()?) }));
    }
    Ok(json!({ "x509CertificateChain": { "certificates": certificates }, "tlogEntries": [] }))
}

/// The bundle.
pub fn bundle(material: &Value, payload: &[u8], signature: &[u8]) -> Value {
    json!({
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": material,
        "dsseEnvelope": envelope(payload, signature),
    })
}

/// The envelope.
pub fn envelope(payload: &[u8], signature: &[u8]) -> Value {
    json!({
        "payload": encode_block(payload),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{ "sig": encode_block(signature), "keyid": "" }],
    })
}

/// A right statement about a model of these files.
pub fn statement(files: &[(&str, &str)]) -> Value {
    let digests: Vec<_> = files.iter().map(|(_, content)| sha256(content.as_bytes())).collect();
    let resources: Vec<Value> = files
        .iter()
        .zip(&digests)
        .map(|((name, _), digest)| json!({ "name": name, "digest": hex::encode(digest), "algorithm": "sha256" }))
        .collect();
    let root = hex::encode(sha256(&digests.concat()));
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{ "name": "model", "digest": { "sha256": root } }],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "resources": resources,
            "serialization": {
                "method": "files", "hash_type": "sha256", "allow_symlinks": false,
                "ignore_paths": [".git", ".gitattributes", ".github", ".gitignore"],
            },
        },
    })
}

/// Corrects the root digest after resources were changed.
pub fn reroot(statement: &mut Value) -> anyhow::Result<()> {
    let mut digests = Vec::new();
    for resource in statement["predicate"]["resources"].as_array().context("resources")? {
        digests.extend(hex::decode(resource["digest"].as_str().context("a digest")?).unwrap_or_default());
    }
    statement["subject"][0]["digest"]["sha256"] = hex::encode(sha256(&digests)).into();
    Ok(())
}
