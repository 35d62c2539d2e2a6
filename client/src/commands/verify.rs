//! `omsign verify`.

use omsign::Error;
use omsign::key::{PublicKey, read_certificates};
use omsign::trust::Trust;
use serde_json::json;

use super::hasher::Hashing;
use super::{Done, checked};
use crate::cli;
use crate::report::{self, count, size};

pub(crate) fn verify(arguments: &cli::Verify) -> Done {
    let trust = match &arguments.public_key {
        Some(path) => Trust::PublicKey(PublicKey::read(path)?),
        None => Trust::Anchors(read_certificates(&arguments.certificate_chain)?),
    };
    let ignore = arguments.ignore_unsigned_files;
    let hashing = Hashing::start(&arguments.work, &arguments.model)?;
    let verified =
        omsign::verify::verify(&arguments.model, &arguments.signature, &trust, ignore, &hashing.hasher);
    let from_cache = hashing.end();
    if arguments.json {
        let printed = report::result(match &verified {
            Ok(verified) => json!({
                "verified": true,
                "method": if verified.signer.certificate_subject.is_some() { "certificate" } else { "key" },
                "algorithm": verified.signer.algorithm.name(),
                "certificate_subject": verified.signer.certificate_subject,
                "key_hint": verified.signer.key_hint,
                "root_digest": format!("sha256:{}", verified.root_digest),
                "files": verified.files,
                "bytes": verified.bytes,
                "ignored": verified.ignored,
                "digests_from_cache": from_cache,
            }),
            Err(Error::Differs(found)) => json!({
                "verified": false,
                "error": found.to_string(),
                "changed": found.changed,
                "missing": found.missing,
                "not_signed": found.extra,
                "digests_from_cache": from_cache,
            }),
            Err(error) => json!({
                "verified": false,
                "error": report::with_causes(error),
                "digests_from_cache": from_cache,
            }),
        });
        // That it is wrong matters more than that nobody could be told in JSON.
        return verified.map_err(checked).and(printed);
    }
    let verified = verified.map_err(checked)?;
    let (files, size) = (count(verified.files, "file"), size(verified.bytes));
    let signer = match &verified.signer.certificate_subject {
        Some(subject) => format!("the certificate {subject}"),
        None => format!("the key sha256:{}", verified.signer.key_hint),
    };
    let cached = match from_cache {
        0 => String::new(),
        digests => format!(", {} believed from the cache", count(digests, "digest")),
    };
    report::result(format_args!("verified {files}, {size}, signed by {signer}{cached}"))?;
    if !verified.ignored.is_empty() {
        report::warning(&format!("{} not signed and ignored", count(verified.ignored.len(), "file")));
    }
    Ok(())
}
