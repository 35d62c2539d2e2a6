//! `omsign inspect`: what a bundle says of itself, without trusting it.

use std::collections::BTreeMap;

use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::certificate;
use omsign::hash::Digest;
use omsign::keyless;
use omsign::manifest::{Manifest, Method};
use omsign::statement::{self, StatementError};
use omsign::timestamp;
use openssl::x509::X509;
use serde_json::{Map, Value, json};

use super::{Done, checked, outline};
use crate::cli;
use crate::report;

pub(crate) fn inspect(arguments: &cli::Inspect) -> Done {
    let bundle = match Bundle::read(&arguments.bundle, arguments.max_bundle_size.get()) {
        Ok(bundle) => bundle,
        Err(error) => {
            // Whoever looks into it wants to know what it is all the more.
            if error.found_wrong()
                && let Some(outline) = outline::of_bundle(&arguments.bundle)
            {
                print_outline(outline, arguments.json)?;
            }
            return Err(checked(error.into()));
        }
    };
    let claims = Claims::of(&bundle);
    let (statement, legacy) = match statement::decode(&bundle.payload) {
        Err(StatementError::PredicateType(other)) => match statement::decode_release_0_2_0(&bundle.payload) {
            Ok(manifest) => (Ok(manifest), true),
            Err(_) => (Err(StatementError::PredicateType(other)), false),
        },
        statement => (statement, false),
    };
    if arguments.json {
        let mut json = claims.json(&bundle);
        json["legacy"] = legacy.into();
        if let (Some(json), Ok(Value::Object(more))) =
            (json.as_object_mut(), statement.as_ref().map(manifest_json))
        {
            json.extend(more);
        }
        if statement.is_err() {
            json["outline"] = outline::of_statement(&bundle.payload).into();
        }
        report::json(&json)?;
    } else {
        claims.print(&bundle)?;
        if legacy {
            line("form", "of release 0.2.0 of model-signing, whose signatures promise less")?;
        }
        match &statement {
            Ok(manifest) => print_manifest(manifest)?,
            Err(_) => print_lines(&outline::of_statement(&bundle.payload))?,
        }
    }
    // What is above it was shown all the same.
    statement.map(drop).map_err(|error| checked(error.into()))
}

/// Who the bundle says signed it.
struct Claims {
    signer: String,
    certificates: Vec<X509>,
    malformed: usize,
    keyless: Option<(String, String)>,
    /// Of time stamps and log entries.
    times: Vec<String>,
}

impl Claims {
    fn of(bundle: &Bundle) -> Self {
        let chain = match &bundle.material {
            Material::CertificateChain(chain) => chain.as_slice(),
            Material::Keyless { certificate, .. } => std::slice::from_ref(certificate),
            Material::PublicKey(_) => &[],
        };
        let certificates: Vec<X509> = chain.iter().filter_map(|der| certificate::parse(der)).collect();
        let keyless = match &bundle.material {
            Material::Keyless { certificate, .. } => keyless::claimed_identity(certificate),
            _ => None,
        };
        let signer = match &bundle.material {
            Material::PublicKey(KeyIdentifier::Hint(hint)) => format!("key sha256:{hint}"),
            Material::PublicKey(KeyIdentifier::Pem(pem)) => format!("key sha256:{}", Digest::sha256(pem)),
            Material::CertificateChain(_) => {
                let subjects = certificates.iter().map(|certificate| certificate::subject(certificate));
                subjects.collect::<Vec<_>>().join(" <- ")
            }
            Material::Keyless { .. } => match &keyless {
                Some((identity, provider)) => format!("{identity} (says {provider})"),
                None => "a certificate that is not Fulcio's".into(),
            },
        };
        let stamps = bundle.timestamps.iter().filter_map(|stamp| timestamp::claimed_time(stamp));
        let mut times: Vec<String> = stamps.map(|time| format!("{time} (RFC 3161 time stamp)")).collect();
        if let Material::Keyless { log, .. } = &bundle.material {
            times.extend(log.claimed_times().iter().map(|time| format!("{time} (transparency log)")));
        }
        Self { signer, malformed: chain.len() - certificates.len(), certificates, keyless, times }
    }

    fn json(&self, bundle: &Bundle) -> Value {
        let certificate = |certificate: &X509| {
            json!({
                "subject": certificate::subject(certificate),
                "names": certificate::names(certificate),
                "fingerprint": certificate::fingerprint(certificate).ok(),
                "not_before": certificate::time(certificate.not_before()),
                "not_after": certificate::time(certificate.not_after()),
            })
        };
        json!({
            "verified": false,
            "method": bundle.material.method(),
            "claimed_signer": self.signer,
            "certificates": self.certificates.iter().map(certificate).collect::<Vec<_>>(),
            "malformed_certificates": self.malformed,
            "identity": self.keyless.as_ref().map(|(identity, _)| identity),
            "identity_provider": self.keyless.as_ref().map(|(_, provider)| provider),
            "timestamps": bundle.timestamps.len(),
            "claimed_times": self.times,
        })
    }

    fn print(&self, bundle: &Bundle) -> Done {
        report::result("NOT VERIFIED: this is what the bundle says of itself")?;
        line("method", bundle.material.method())?;
        line("claimed signer", &self.signer)?;
        for certificate in &self.certificates {
            let (from, until) = (certificate.not_before(), certificate.not_after());
            let (from, until) = (certificate::time(from), certificate::time(until));
            let fingerprint = certificate::fingerprint(certificate).unwrap_or_default();
            line("certificate", &format!("{fingerprint}, valid from {from} until {until}"))?;
            for name in certificate::names(certificate) {
                line("  of", &name)?;
            }
        }
        if self.malformed > 0 {
            line("malformed", &report::count(self.malformed, "certificate"))?;
        }
        for time in &self.times {
            line("claimed time", time)?;
        }
        Ok(())
    }
}

/// Of a bundle that omsign would not take.
fn print_outline(outline: Map<String, Value>, as_json: bool) -> Done {
    if as_json {
        return report::json(&json!({ "verified": false, "outline": outline }));
    }
    report::result("NOT VERIFIED, and no verifier should: this is what can be told of the file")?;
    print_lines(&outline)
}

fn print_lines(outline: &Map<String, Value>) -> Done {
    outline.iter().try_for_each(|(name, value)| line(&name.replace('_', " "), &value.to_string()))
}

fn line(name: &str, value: &str) -> Done {
    report::result(format_args!("{name:<15} {value}"))
}

fn shard_size(manifest: &Manifest) -> Option<u64> {
    match manifest.serialization.method {
        Method::Files => None,
        Method::Shards(bytes) => Some(bytes.get()),
    }
}

fn manifest_json(manifest: &Manifest) -> Value {
    let digests: BTreeMap<String, String> =
        manifest.resources.iter().map(|resource| (resource.name(), resource.digest.to_string())).collect();
    json!({
        "model": manifest.model_name,
        "root_digest": format!("sha256:{}", manifest.root_digest()),
        "hash_type": manifest.serialization.algorithm.name(),
        "shard_size": shard_size(manifest),
        "allow_symlinks": manifest.serialization.allow_symlinks,
        "ignore_paths": manifest.serialization.left_out(),
        "files": digests,
    })
}

fn print_manifest(manifest: &Manifest) -> Done {
    let ignored: Vec<_> = manifest.serialization.left_out().iter().map(String::as_str).collect();
    line("model", &manifest.model_name)?;
    line("root digest", &format!("sha256:{}", manifest.root_digest()))?;
    let of = shard_size(manifest).map_or_else(String::new, |bytes| format!(" of every {bytes} bytes"));
    line("hashed with", &format!("{}{of}", manifest.serialization.algorithm))?;
    line("left out", &ignored.join(" "))?;
    line("files", &manifest.files().to_string())?;
    for resource in &manifest.resources {
        report::result(format_args!("  {}  {}", resource.digest, resource.name().escape_debug()))?;
    }
    Ok(())
}
