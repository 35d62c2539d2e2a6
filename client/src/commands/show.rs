//! `omsign digest` and `omsign inspect`: what a model and a bundle hold, without trusting either.

use std::collections::BTreeMap;

use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::hash::Digest;
use omsign::manifest::{Manifest, Method, Plan};
use omsign::manifest_file::{self, PartOf};
use omsign::statement;
use omsign::trust::name;
use openssl::x509::X509;
use serde_json::json;

use super::hasher::Hashing;
use super::{Done, Failure, checked};
use crate::cli;
use crate::report;

pub(crate) fn digest(arguments: &cli::Digest) -> Done {
    let cli::Digest { model, files, work, .. } = arguments;
    let selection = files.selection(model).map_err(Failure::Usage)?;
    let hashing = Hashing::start(work, model)?;
    let serialization = selection.serialization()?;
    let model = serialization.walk(model)?;
    let plan = Plan::new(&model, serialization, &hashing.hasher)?;
    let part =
        arguments.part.map(|part| PartOf { part, resources: plan.resources(), listing: plan.listing() });
    let plan = if let Some(PartOf { part, .. }) = part { plan.part(part) } else { plan };
    let (manifest, bytes) = plan.hash(&hashing.hasher)?;
    hashing.end();
    if arguments.json {
        report::result(manifest_file::to_json(&manifest, bytes, part))
    } else {
        report::result(format_args!("sha256:{}", manifest.root_digest()))
    }
}

pub(crate) fn inspect(arguments: &cli::Inspect) -> Done {
    let bundle = Bundle::read(&arguments.bundle).map_err(|error| checked(error.into()))?;
    let manifest = statement::decode(&bundle.payload).map_err(|error| checked(error.into()))?;
    let (method, signer) = match &bundle.material {
        Material::PublicKey(KeyIdentifier::Hint(hint)) => {
            ("key", format!("key sha256:{}", hint.escape_debug()))
        }
        Material::PublicKey(KeyIdentifier::Pem(pem)) => {
            ("key", format!("key sha256:{}", Digest::sha256(pem)))
        }
        Material::CertificateChain(chain) => {
            let subject = |der: &Vec<u8>| match X509::from_der(der) {
                Ok(certificate) => name(certificate.subject_name()),
                Err(_) => "a malformed certificate".to_owned(),
            };
            ("certificate", chain.iter().map(subject).collect::<Vec<_>>().join(" <- "))
        }
        Material::Sigstore => ("sigstore", "a Fulcio certificate".into()),
    };
    let root = format!("sha256:{}", manifest.root_digest());
    let shard_size = match manifest.serialization.method {
        Method::Files => None,
        Method::Shards(bytes) => Some(bytes),
    };
    if arguments.json {
        report::result(json!({
            "verified": false,
            "method": method,
            "claimed_signer": signer,
            "model": manifest.model_name,
            "root_digest": root,
            "hash_type": manifest.serialization.algorithm.name(),
            "shard_size": shard_size,
            "allow_symlinks": manifest.serialization.allow_symlinks,
            "ignore_paths": manifest.serialization.ignore_paths,
            "files": digests(&manifest),
        }))?;
        return Ok(());
    }
    let ignored: Vec<_> = manifest.serialization.ignore_paths.iter().map(String::as_str).collect();
    report::result("NOT VERIFIED: this is what the bundle says of itself")?;
    report::result(format_args!("method          {method}"))?;
    report::result(format_args!("claimed signer  {signer}"))?;
    report::result(format_args!("model           {}", manifest.model_name.escape_debug()))?;
    report::result(format_args!("root digest     {root}"))?;
    let of = shard_size.map_or_else(String::new, |bytes| format!(" of every {bytes} bytes"));
    report::result(format_args!("hashed with     {}{of}", manifest.serialization.algorithm))?;
    report::result(format_args!("left out        {}", ignored.join(" ").escape_debug()))?;
    report::result(format_args!("files           {}", manifest.files()))?;
    for resource in &manifest.resources {
        report::result(format_args!("  {}  {}", resource.digest, resource.name().escape_debug()))?;
    }
    Ok(())
}

/// The digest of every file, or shard, by name.
fn digests(manifest: &Manifest) -> BTreeMap<String, String> {
    manifest.resources.iter().map(|resource| (resource.name(), resource.digest.to_string())).collect()
}
