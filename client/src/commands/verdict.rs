//! What is said about a model that was verified: for people, and as JSON (docs/verify.schema.json).

use omsign::Error;
use omsign::differences::Differences;
use omsign::keyless::KeylessError;
use omsign::proof::Signer;
use omsign::trust::TrustError;
use omsign::verify::Verified;
use serde_json::{Value, json};

use super::{Done, Failure};
use crate::report::{self, count, size};

/// Of the JSON objects. It grows by fields; what is there keeps its meaning.
const VERSION: u32 = 1;

/// Names in each list of a JSON object; there is a count beside it.
const LISTED: usize = 1000;

pub(crate) fn print(verified: &Verified, from_cache: usize) -> Done {
    let (files, size) = (count(verified.files, "file"), size(verified.bytes));
    let proof = &verified.proof;
    let signer = match &proof.signer {
        Signer::Key => format!("the key sha256:{}", proof.key_hint),
        Signer::Certificate { subject, .. } => format!("the certificate {subject}"),
        Signer::Keyless { identity, .. } => identity.clone(),
    };
    let cached = match from_cache {
        0 => String::new(),
        digests => format!(", {} believed from the cache", count(digests, "digest")),
    };
    report::result(format_args!("verified {files}, {size}, signed by {signer}{cached}"))?;
    let line = |name: &str, text: &str| report::result(format_args!("  {name:<12} {text}"));
    if !verified.model_name.is_empty() {
        line("model", &verified.model_name)?;
    }
    match &proof.signer {
        Signer::Key => {}
        Signer::Certificate { names, fingerprint, .. } => {
            if !names.is_empty() {
                line("names", &names.join(", "))?;
            }
            line("certificate", fingerprint)?;
        }
        Signer::Keyless { identity_provider, .. } => {
            line("vouched by", identity_provider)?;
        }
    }
    line("signed with", proof.algorithm.name())?;
    if let Some(at) = &proof.signed_at {
        line("signed at", &format!("{}, or before ({})", at.time, at.source))?;
    }
    if let Some(entry) = &proof.accepted_by {
        line("accepted by", entry)?;
    }
    let (checked, not_checked) = checks(verified, from_cache);
    line("checked", &checked.join(", "))?;
    if !not_checked.is_empty() {
        line("not checked", &not_checked.join(", "))?;
    }
    if proof.legacy {
        report::warning("this is a bundle of release 0.2.0 of model-signing, whose signatures promise less");
    }
    if !verified.ignored.is_empty() {
        report::warning(&format!("{} not signed and ignored", count(verified.ignored.len(), "file")));
    }
    if !verified.left_out.is_empty() && !verified.partial {
        let paths = count(verified.left_out.len(), "path");
        let first = verified.left_out.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        report::warning(&format!("{paths} not looked at: {first}"));
    }
    Ok(())
}

/// What was checked, and what was not.
fn checks(verified: &Verified, from_cache: usize) -> (Vec<&'static str>, Vec<&'static str>) {
    let proof = &verified.proof;
    let (certified, keyless) = match proof.signer {
        Signer::Key => (false, false),
        Signer::Certificate { .. } => (true, false),
        Signer::Keyless { .. } => (false, true),
    };
    let timed = proof.signed_at.is_some();
    let (partial, cached) = (verified.partial, from_cache > 0);
    let all_looked_at = verified.ignored.is_empty() && verified.left_out.is_empty() && !partial;
    let facts = [
        (true, true, "signature"),
        (!cached || partial, !partial, "content of every signed file"),
        (cached && !partial, true, "content of every signed file, or what the digest cache says of it"),
        (partial && !cached, true, "content of the files asked for"),
        (partial && cached, true, "content of the files asked for, or what the digest cache says of it"),
        (true, all_looked_at, "no unsigned files"),
        (certified, true, "path to a trusted certificate"),
        (certified, timed, "validity when it was signed"),
        (certified && !timed, true, "validity of the certificates now"),
        (certified, proof.revocation_checked, "revocation (CRL)"),
        (certified && timed, proof.authority_revocation_checked, "revocation of the time-stamp authority"),
        (keyless, true, "Fulcio certificate"),
        (keyless, true, "certificate transparency"),
        (keyless, true, "transparency log"),
        (keyless, true, "identity and identity provider"),
        (!certified, timed, "when it was signed"),
    ];
    let (mut checked, mut not_checked) = (Vec::new(), Vec::new());
    for (concerns, holds, text) in facts {
        if concerns {
            if holds { &mut checked } else { &mut not_checked }.push(text);
        }
    }
    if proof.unchecked_log_entries {
        not_checked.push("transparency log entries in the bundle (of no use to its method)");
    }
    if proof.unchecked_timestamps > 0 {
        not_checked.push("time stamps in the bundle (no --timestamp-root)");
    }
    (checked, not_checked)
}

pub(crate) fn verified_json(verified: &Verified, from_cache: usize) -> Value {
    let proof = &verified.proof;
    let (checked, not_checked) = checks(verified, from_cache);
    let mut json = json!({
        "version": VERSION,
        "outcome": "verified",
        "verified": true,
        "algorithm": proof.algorithm.name(),
        "key_hint": proof.key_hint,
        "model_name": verified.model_name,
        "root_digest": format!("sha256:{}", verified.root_digest),
        "files": verified.files,
        "bytes": verified.bytes,
        "not_looked_at": verified.not_looked_at,
        "ignored": bounded(&verified.ignored),
        "ignored_count": verified.ignored.len(),
        "left_out": bounded(&verified.left_out),
        "left_out_count": verified.left_out.len(),
        "signed_at": proof.signed_at.as_ref().map(|at| at.time.to_string()),
        "signed_at_source": proof.signed_at.as_ref().map(|at| at.source),
        "accepted_by": proof.accepted_by,
        "legacy": proof.legacy,
        "checked": checked,
        "not_checked": not_checked,
        "digests_from_cache": from_cache,
    });
    let who = match &proof.signer {
        Signer::Key => json!({ "method": "key" }),
        Signer::Certificate { subject, names, fingerprint } => json!({
            "method": "certificate",
            "certificate_subject": subject,
            "certificate_names": names,
            "certificate_fingerprint": fingerprint,
        }),
        Signer::Keyless { identity, identity_provider } => json!({
            "method": "sigstore",
            "identity": identity,
            "identity_provider": identity_provider,
        }),
    };
    if let (Some(json), Value::Object(who)) = (json.as_object_mut(), who) {
        json.extend(who);
    }
    json
}

pub(crate) fn failed_json(failure: &Failure, from_cache: usize) -> Value {
    let mut json = json!({
        "version": VERSION,
        "outcome": if matches!(failure, Failure::Wrong(_)) { "wrong" } else { "undone" },
        "verified": false,
        "reason": reason(failure),
        "error": failure.text(),
        "digests_from_cache": from_cache,
    });
    if let Failure::Wrong(Error::Differs(found)) | Failure::Undone(Error::Differs(found)) = failure
        && let Some(json) = json.as_object_mut()
    {
        json.extend(differences(found));
    }
    json
}

/// What kind of thing was wrong, for programs.
fn reason(failure: &Failure) -> &'static str {
    let Failure::Wrong(error) = failure else { return "undone" };
    match error {
        Error::Bundle(_) => "bundle",
        Error::Trust(error) => trust_reason(error),
        Error::Statement(_) => "statement",
        Error::Subject(_) => "subject",
        Error::Differs(_) => "differences",
        _ => "model",
    }
}

fn trust_reason(error: &TrustError) -> &'static str {
    match error {
        TrustError::Signature | TrustError::Keyless(KeylessError::Signature) => "signature",
        TrustError::Statement(_) | TrustError::Legacy => "statement",
        // What all of a policy's signers are refused for.
        TrustError::Refused { refusals, .. } => {
            let mut reasons = refusals.iter().map(|refusal| trust_reason(&refusal.why));
            let first = reasons.next();
            first.filter(|first| reasons.all(|reason| reason == *first)).unwrap_or("signer")
        }
        _ => "signer",
    }
}

fn differences(found: &Differences) -> serde_json::Map<String, Value> {
    let changed: Vec<&str> = found.changed.iter().map(|changed| changed.file.as_str()).collect();
    let odd: Vec<_> = bounded(&found.odd)
        .iter()
        .map(|odd| json!({ "name": odd.name, "reason": odd.what.to_string() }))
        .collect();
    let unreadable: Vec<_> =
        bounded(&found.unreadable).iter().map(|at| json!({ "name": at.name, "reason": at.why })).collect();
    let fields = [
        ("first_difference", json!(found.first())),
        ("changed", json!(bounded(&changed))),
        ("changed_count", json!(changed.len())),
        ("missing", json!(bounded(&found.missing))),
        ("missing_count", json!(found.missing.len())),
        ("not_possible", json!(odd)),
        ("not_possible_count", json!(found.odd.len())),
        ("not_signed", json!(bounded(&found.extra))),
        ("not_signed_count", json!(found.extra.len())),
        ("not_readable", json!(unreadable)),
        ("not_readable_count", json!(found.unreadable.len())),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn bounded<T>(names: &[T]) -> &[T] {
    names.get(..LISTED).unwrap_or(names)
}
