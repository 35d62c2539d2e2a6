//! What an X.509 certificate says: whose it is, and what its key may do (RFC 5280).

use cms::cert::x509::Certificate;
use cms::cert::x509::der::Decode as _;
use cms::cert::x509::ext::pkix::BasicConstraints;
use cms::cert::x509::name::RdnSequence;
use jiff::Timestamp;
use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::x509::{X509, X509ExtendedKeyUsage, X509KeyUsage, X509NameEntryRef, X509NameRef, X509Ref};

use crate::strength::is_strong_signature;

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

/// Whether it says that it is a CA (RFC 5280, 4.2.1.9). OpenSSL also takes what stood for that before.
pub(crate) fn says_ca(certificate: &X509Ref) -> bool {
    let parsed = certificate.to_der().ok().and_then(|der| Certificate::from_der(&der).ok());
    let constraints = parsed.and_then(|it| it.tbs_certificate.get::<BasicConstraints>().ok().flatten());
    constraints.is_some_and(|(_critical, constraints)| constraints.ca)
}

/// Whether it is signed with RSASSA-PSS over a hash that is broken, or not told.
pub(crate) fn is_weak_pss(certificate: &X509Ref) -> bool {
    let parsed = || Certificate::from_der(&certificate.to_der().ok()?).ok();
    certificate.signature_algorithm().object().nid() == Nid::RSASSAPSS
        && !parsed().is_some_and(|parsed| is_strong_signature(&parsed.signature_algorithm))
}

/// The subject, for people and for comparison: `CN=…, O=…`.
pub fn subject(certificate: &X509Ref) -> String {
    name(certificate.subject_name())
}

/// A distinguished name, in the order in which it is encoded, values escaped as in RFC 4514, 2.4: `CN=…, O=…`; `+`
/// between what is at the same level.
pub(crate) fn name(name: &X509NameRef) -> String {
    let levels = name.to_der().ok().and_then(|der| RdnSequence::from_der(&der).ok());
    let levels = levels.map_or_else(Vec::new, |name| name.0.iter().map(|level| level.0.len()).collect());
    let mut entries = name.entries().map(entry);
    let joined: Vec<String> = match levels.iter().sum::<usize>() == name.entries().count() {
        true => {
            levels.iter().map(|count| entries.by_ref().take(*count).collect::<Vec<_>>().join("+")).collect()
        }
        false => entries.collect(),
    };
    joined.join(", ")
}

fn entry(entry: &X509NameEntryRef) -> String {
    let kind = entry.object().nid();
    let kind = match kind.short_name() {
        Ok(known) if kind != Nid::UNDEF => known.to_owned(),
        _ => entry.object().to_string(),
    };
    let mut value = String::new();
    for character in entry.data().to_string().unwrap_or_default().chars() {
        match character {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=' => value.extend(['\\', character]),
            _ if character.is_control() => value.extend(character.escape_default()),
            _ => value.push(character),
        }
    }
    format!("{kind}={value}")
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

/// The end of a certificate that has none (RFC 5280, 4.1.2.5), in seconds since 1970: later than any [`Timestamp`].
const NEVER: i64 = 253_402_300_799;

/// A time in it, as RFC 3339 writes it.
pub fn time(time: &Asn1TimeRef) -> String {
    let since = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time)).ok();
    let seconds = since.map(|since| i64::from(since.days) * 24 * 60 * 60 + i64::from(since.secs));
    let time_of = |seconds| match seconds {
        NEVER => Some("9999-12-31T23:59:59Z".to_owned()),
        seconds => Timestamp::from_second(seconds).ok().map(|time| time.to_string()),
    };
    seconds.and_then(time_of).unwrap_or_else(|| time.to_string())
}

/// SHA-256 of its DER: `sha256:…`, lower-case hexadecimal.
pub fn fingerprint(certificate: &X509Ref) -> Result<String, ErrorStack> {
    Ok(format!("sha256:{}", hex::encode(certificate.digest(MessageDigest::sha256())?)))
}

/// Whether two names are one, from the most general part down, or the other way round, as RFC 4514 writes them, whatever blanks
/// there are between their parts.
fn is_same(own: &str, wanted: &str) -> bool {
    let parts = |name: &str| {
        let mut escaped = false;
        let split = |character| {
            let splits = character == ',' && !escaped;
            escaped = character == '\\' && !escaped;
            splits
        };
        let part = |part: &str| {
            let (kind, value) = part.split_once('=').unwrap_or((part, ""));
            (kind.trim().to_owned(), value.trim().to_owned())
        };
        name.split(split).map(part).collect::<Vec<_>>()
    };
    let (own, wanted) = (parts(own), parts(wanted));
    own == wanted || own.iter().eq(wanted.iter().rev())
}

/// Whether this is how somebody may call it: its SHA-256 fingerprint (with or without `sha256:` and colons), its subject
/// (`CN=…`), an e-mail address, a URI or a DNS name of it. What it looks like says which is meant, or else a name of one
/// kind would pass for one of another, which other rules let an issuer certify.
pub fn is_called(certificate: &X509Ref, wanted: &str) -> bool {
    let digits = wanted.strip_prefix("sha256:").unwrap_or(wanted).replace(':', "").to_ascii_lowercase();
    if digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return fingerprint(certificate).is_ok_and(|own| own == format!("sha256:{digits}"));
    }
    let names = certificate.subject_alt_names();
    let mut names = names.iter().flatten();
    match wanted {
        "" => false,
        uri if uri.contains("://") || uri.starts_with("urn:") => names.any(|name| name.uri() == Some(uri)),
        name if name.contains('=') => is_same(&subject(certificate), name),
        address if address.contains('@') => names.any(|name| name.email() == Some(address)),
        host => names.any(|name| name.dnsname() == Some(host)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_either_order() {
        let own = r"C=DE, O=Acme\, Inc., CN=Release";
        for same in [own, r"CN=Release,O=Acme\, Inc.,C=DE", r"C = DE,  O = Acme\, Inc. , CN=Release"] {
            assert!(is_same(own, same), "{same}");
        }
        let others = [
            "CN=Release",
            r"O=Acme\, Inc., C=DE, CN=Release",
            "C=DE, O=Acme, Inc., CN=Release",
            "C=DE, O=Acme\\, Inc., CN=release",
        ];
        for other in others {
            assert!(!is_same(own, other), "{other}");
        }
    }
}
