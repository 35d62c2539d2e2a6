//! `omsign digest` and `omsign inspect`: what a model and a bundle hold, without trusting either.

use std::collections::BTreeMap;

use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::hash::Digest;
use omsign::manifest::Manifest;
use omsign::statement;
use omsign::trust::name;
use openssl::x509::X509;
use serde_json::json;

use super::{Done, checked};
use crate::cli;
use crate::report;

pub(crate) fn digest(arguments: &cli::Digest) -> Done {
    let files = &arguments.files;
    let (manifest, bytes) = Manifest::of_model(&files.model, files.selection().serialization()?)?;
    let root = format!("sha256:{}", manifest.root_digest());
    if arguments.json {
        report::result(
            json!({ "root_digest": root, "bytes": bytes, "algorithm": "sha256", "files": digests(&manifest) }),
        )?;
    } else {
        report::result(root)?;
    }
    Ok(())
}

pub(crate) fn inspect(arguments: &cli::Inspect) -> Done {
    let bundle = Bundle::read(&arguments.bundle).map_err(|error| checked(error.into()))?;
    let manifest = statement::decode(&bundle.payload).map_err(|error| checked(error.into()))?;
    let (method, signer) = match &bundle.material {
        Material::PublicKey(KeyIdentifier::Hint(hint)) => {
            ("key", format!("key sha256:{}", hint.escape_debug()))
        }
        Material::PublicKey(KeyIdentifier::Pem(pem)) => ("key", format!("key sha256:{}", Digest::of(pem))),
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
    if arguments.json {
        report::result(json!({
            "verified": false,
            "method": method,
            "claimed_signer": signer,
            "model": manifest.model_name,
            "root_digest": root,
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
    report::result(format_args!("left out        {}", ignored.join(" ").escape_debug()))?;
    report::result(format_args!("files           {}", manifest.resources.len()))?;
    for resource in &manifest.resources {
        report::result(format_args!("  {}  {}", resource.digest, resource.name.escape_debug()))?;
    }
    Ok(())
}

/// The digest of every file, by name.
fn digests(manifest: &Manifest) -> BTreeMap<&str, String> {
    manifest.resources.iter().map(|resource| (resource.name.as_str(), resource.digest.to_string())).collect()
}
