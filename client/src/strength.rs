//! Is a signature algorithm of a CRL (RFC 5280) or of signed data (RFC 5652) strong enough? OpenSSL asks of
//! certificates only.

use cms::cert::x509::der::asn1::{AnyRef, ObjectIdentifier};
use cms::cert::x509::der::{self, Decode as _, Encode as _};
use cms::cert::x509::spki::AlgorithmIdentifierOwned;
use openssl::hash::MessageDigest;

const SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2");
const SHA512: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3");

/// RSA PKCS#1 v1.5 and ECDSA with SHA-256, -384 and -512; Ed25519.
const SIGNATURES: [ObjectIdentifier; 7] = [
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"),
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12"),
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.4"),
    ObjectIdentifier::new_unwrap("1.3.101.112"),
];

/// Says nothing of a hash: in CMS that is told beside it (RFC 3370, 3.2).
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");

/// SHA-256, SHA-384 or SHA-512; None of any other.
pub(crate) fn strong_hash(algorithm: ObjectIdentifier) -> Option<MessageDigest> {
    match algorithm {
        SHA256 => Some(MessageDigest::sha256()),
        SHA384 => Some(MessageDigest::sha384()),
        SHA512 => Some(MessageDigest::sha512()),
        _ => None,
    }
}

/// Whether it signs with one of these hashes, or leaves the hash to be told beside it.
pub(crate) fn is_strong_signature(algorithm: &AlgorithmIdentifierOwned) -> bool {
    match algorithm.oid {
        RSA_PSS => pss_hash(algorithm).and_then(strong_hash).is_some(),
        RSA_ENCRYPTION => true,
        other => SIGNATURES.contains(&other),
    }
}

/// RSASSA-PSS-params (RFC 4055, 3.1): `[0] hashAlgorithm`, SHA-1 where it is absent.
fn pss_hash(algorithm: &AlgorithmIdentifierOwned) -> Option<ObjectIdentifier> {
    let parameters = algorithm.parameters.as_ref()?.to_der().ok()?;
    let parameters = AnyRef::from_der(&parameters).ok()?;
    let first = parameters.sequence(|reader| {
        let first = AnyRef::decode(reader)?;
        skip_rest(reader)?;
        Ok(first)
    });
    let hash = AlgorithmIdentifierOwned::from_der(first.ok()?.value()).ok()?;
    Some(hash.oid)
}

/// Skips the elements that are left.
pub(crate) fn skip_rest<'a>(reader: &mut impl der::Reader<'a>) -> der::Result<()> {
    while !reader.is_finished() {
        AnyRef::decode(reader)?;
    }
    Ok(())
}
