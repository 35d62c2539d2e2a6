//! What an X.509 certificate says: whose it is, and what its key may do (RFC 5280).

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::x509::{X509, X509ExtendedKeyUsage, X509KeyUsage, X509NameEntryRef, X509NameRef, X509Ref};

/// Its key may not sign models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// KeyUsage without digitalSignature.
    #[error("the signing certificate may not sign: its KeyUsage has no digitalSignature (OMS 8.2)")]
    KeyUsage,
    /// ExtendedKeyUsage without codeSigning.
    #[error("the signing certificate may not sign: its ExtendedKeyUsage has no codeSigning (OMS 8.2)")]
    ExtendedKeyUsage,
}

/// Parses DER; None where it is anything but exactly one certificate in DER.
pub fn parse(der: &[u8]) -> Option<X509> {
    let certificate = X509::from_der(der).ok()?;
    // d2i accepts bytes after the end, and BER.
    (certificate.to_der().ok()? == der).then_some(certificate)
}

/// KeyUsage must allow digital signatures; an extended key usage, if there is one, code signing.
pub fn check_usage(leaf: &X509) -> Result<(), UsageError> {
    if let Some(usage) = leaf.key_usage()
        && !usage.contains(X509KeyUsage::DIGITAL_SIGNATURE)
    {
        return Err(UsageError::KeyUsage);
    }
    if let Some(usage) = leaf.extended_key_usage()
        && !usage.intersects(X509ExtendedKeyUsage::CODE_SIGN | X509ExtendedKeyUsage::ANYEKU)
    {
        return Err(UsageError::ExtendedKeyUsage);
    }
    Ok(())
}

/// The subject, for people and for comparison: `CN=…, O=…`.
pub fn subject(certificate: &X509Ref) -> String {
    name(certificate.subject_name())
}

/// A distinguished name, in the order in which it is encoded, values escaped as in RFC 4514, 2.4: `CN=…, O=…`.
pub(crate) fn name(name: &X509NameRef) -> String {
    let part = |entry: &X509NameEntryRef| {
        let kind = entry.object().nid();
        let kind = match kind.short_name() {
            Ok(known) if kind != Nid::UNDEF => known.to_owned(),
            _ => entry.object().to_string(),
        };
        let mut value = String::new();
        for character in entry.data().to_string().unwrap_or_default().chars() {
            match character {
                ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=' => value.extend(['\\', character]),
                _ => value.extend(character.escape_debug()),
            }
        }
        format!("{kind}={value}")
    };
    name.entries().map(part).collect::<Vec<_>>().join(", ")
}

/// The subject's alternative names: e-mail addresses, DNS names and URIs.
pub fn names(certificate: &X509Ref) -> Vec<String> {
    let names = certificate.subject_alt_names();
    let names = names.iter().flatten();
    names
        .filter_map(|name| name.email().or_else(|| name.dnsname()).or_else(|| name.uri()))
        .map(str::to_owned)
        .collect()
}

/// SHA-256 of its DER: `sha256:…`, lower-case hexadecimal.
pub fn fingerprint(certificate: &X509Ref) -> Result<String, ErrorStack> {
    Ok(format!("sha256:{}", hex::encode(certificate.digest(MessageDigest::sha256())?)))
}

/// Whether this is how somebody may call it: its SHA-256 fingerprint (with or without `sha256:` and colons), or its
/// subject, or one of its alternative names.
pub fn is_called(certificate: &X509Ref, wanted: &str) -> bool {
    let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted).replace(':', "").to_ascii_lowercase();
    // What looks like a fingerprint is one: a URI of a certificate may look like one, too.
    if digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return fingerprint(certificate).is_ok_and(|own| own == format!("sha256:{digits}"));
    }
    subject(certificate) == wanted || names(certificate).iter().any(|name| name == wanted)
}
