//! Checks what a key signed, many times over. OpenSSL does the arithmetic: nothing else that is kept well checks
//! ECDSA and RSA over a digest, and its P-256 takes an eighth of the p256 crate's time. ML-DSA is not in Debian 12's.

use openssl::ec::EcKey;
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::md::Md;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Verifier as MessageVerifier};

use crate::algorithm::{Algorithm, Content, Curve, ParameterSet};
use crate::spki::SpkiDer;

/// A public key that was read once.
pub struct Verifier {
    algorithm: Algorithm,
    key: Key,
}

enum Key {
    Ec(EcKey<Public>),
    /// RSA and Ed25519.
    Other(PKey<Public>),
    MlDsa(ParameterSet, SpkiDer),
    /// Of another kind than the algorithm wants, or malformed: nothing verifies.
    None,
}

impl Verifier {
    /// For signatures of this algorithm.
    pub fn new(spki: &SpkiDer, algorithm: Algorithm) -> Self {
        let read = || PKey::public_key_from_der(&spki.0).ok();
        let of = |kind| read().filter(|key| key.id() == kind).map(Key::Other);
        let key = match algorithm {
            Algorithm::Ecdsa(curve) => read()
                .and_then(|key| key.ec_key().ok())
                .filter(|key| key.group().curve_name() == Some(named(curve)))
                .map(Key::Ec),
            Algorithm::RsaPkcs1 | Algorithm::RsaPss => of(Id::RSA),
            Algorithm::Ed25519 => of(Id::ED25519),
            Algorithm::MlDsa(set) => Some(Key::MlDsa(set, spki.clone())),
        };
        Self { algorithm, key: key.unwrap_or(Key::None) }
    }

    /// Whether the private half made this signature of what it was given.
    pub fn verifies(&self, content: &Content, signature: &[u8]) -> bool {
        let Ok(bytes) = self.algorithm.bytes(content) else { return false };
        let checked = match &self.key {
            Key::Ec(key) => ecdsa(key, bytes, signature),
            Key::Other(key) if self.algorithm == Algorithm::Ed25519 => {
                MessageVerifier::new_without_digest(key)
                    .and_then(|mut verifier| verifier.verify_oneshot(signature, bytes))
            }
            Key::Other(key) => rsa(key, self.algorithm == Algorithm::RsaPss, bytes, signature),
            Key::MlDsa(set, spki) => return ml_dsa(*set, spki, bytes, signature),
            Key::None => return false,
        };
        // What OpenSSL cannot read is no signature either.
        checked.unwrap_or(false)
    }
}

fn named(curve: Curve) -> Nid {
    match curve {
        Curve::P256 => Nid::X9_62_PRIME256V1,
        Curve::P384 => Nid::SECP384R1,
        Curve::P521 => Nid::SECP521R1,
    }
}

fn ecdsa(key: &EcKey<Public>, digest: &[u8], signature: &[u8]) -> Result<bool, ErrorStack> {
    let parsed = EcdsaSig::from_der(signature)?;
    // Verifiers take DER only; OpenSSL reads a little more.
    Ok(parsed.to_der()? == signature && parsed.verify(digest, key)?)
}

fn rsa(key: &PKey<Public>, pss: bool, digest: &[u8], signature: &[u8]) -> Result<bool, ErrorStack> {
    // As long as the modulus (RFC 8017, 8.1.2 and 8.2.2); OpenSSL takes shorter ones.
    if signature.len() != key.size() {
        return Ok(false);
    }
    let mut context = PkeyCtx::new(key)?;
    context.verify_init()?;
    context.set_rsa_padding(if pss { Padding::PKCS1_PSS } else { Padding::PKCS1 })?;
    context.set_signature_md(Md::sha256())?;
    if pss {
        context.set_rsa_mgf1_md(Md::sha256())?;
        context.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
    }
    context.verify(digest, signature)
}

fn ml_dsa(set: ParameterSet, spki: &SpkiDer, message: &[u8], signature: &[u8]) -> bool {
    macro_rules! verify {
        ($set:ty) => {{
            use ml_dsa::Verifier as _;
            use ml_dsa::pkcs8::DecodePublicKey as _;
            let key = ml_dsa::VerifyingKey::<$set>::from_public_key_der(&spki.0).ok();
            let signature = ml_dsa::Signature::<$set>::try_from(signature).ok();
            key.zip(signature).is_some_and(|(key, signature)| key.verify(message, &signature).is_ok())
        }};
    }
    match set {
        ParameterSet::MlDsa44 => verify!(ml_dsa::MlDsa44),
        ParameterSet::MlDsa65 => verify!(ml_dsa::MlDsa65),
        ParameterSet::MlDsa87 => verify!(ml_dsa::MlDsa87),
    }
}

#[cfg(test)]
mod tests {
    use openssl::ec::EcGroup;
    use openssl::pkey::Private;
    use openssl::rsa::Rsa;
    use openssl::sign::Signer;

    use super::*;

    fn verifier(key: &PKey<Private>, algorithm: Algorithm) -> Verifier {
        Verifier::new(&SpkiDer(key.public_key_to_der().expect("encodes")), algorithm)
    }

    #[test]
    fn ecdsa_signatures_are_tied_to_key_and_digest() {
        for (curve, another) in
            [(Curve::P256, Curve::P384), (Curve::P384, Curve::P521), (Curve::P521, Curve::P256)]
        {
            let algorithm = Algorithm::Ecdsa(curve);
            let make =
                || EcKey::generate(&EcGroup::from_curve_name(named(curve)).expect("a curve")).expect("a key");
            let (key, other) = (make(), PKey::from_ec_key(make()).expect("a key"));
            let (content, changed) = (algorithm.content(b"a"), algorithm.content(b"b"));
            let digest = algorithm.bytes(&content).expect("a digest");
            let der = EcdsaSig::sign(digest, &key).and_then(|made| made.to_der()).expect("signs");
            let key = PKey::from_ec_key(key).expect("a key");
            assert!(verifier(&key, algorithm).verifies(&content, &der));
            assert!(!verifier(&key, algorithm).verifies(&changed, &der));
            assert!(!verifier(&other, algorithm).verifies(&content, &der));
            assert!(!verifier(&key, Algorithm::Ed25519).verifies(&Algorithm::Ed25519.content(b"a"), &der));
            let mistaken = verifier(&key, Algorithm::Ecdsa(another));
            assert!(!mistaken.verifies(&Content::Digest(vec![7; another.field_len()]), &der));
            assert!(matches!(mistaken.key, Key::None));
            // A length in more octets than it needs is BER.
            if let [0x30, length @ 0..=0x7f, rest @ ..] = der.as_slice() {
                let longer = [&[0x30, 0x81, *length], rest].concat();
                assert!(!verifier(&key, algorithm).verifies(&content, &longer));
            }
        }
    }

    #[test]
    fn rsa_signatures_are_tied_to_digest_and_padding() {
        let key = PKey::from_rsa(Rsa::generate(2048).expect("a key")).expect("a key");
        for (algorithm, other) in
            [(Algorithm::RsaPkcs1, Algorithm::RsaPss), (Algorithm::RsaPss, Algorithm::RsaPkcs1)]
        {
            let mut signer = Signer::new(openssl::hash::MessageDigest::sha256(), &key).expect("a signer");
            if algorithm == Algorithm::RsaPss {
                signer.set_rsa_padding(Padding::PKCS1_PSS).expect("PSS");
                signer.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH).expect("a salt");
            }
            let signature = signer.sign_oneshot_to_vec(b"a").expect("signs");
            let content = algorithm.content(b"a");
            assert!(verifier(&key, algorithm).verifies(&content, &signature));
            assert!(!verifier(&key, algorithm).verifies(&algorithm.content(b"b"), &signature));
            assert!(!verifier(&key, other).verifies(&content, &signature));
            assert!(!verifier(&key, algorithm).verifies(&content, signature.get(1..).expect("bytes")));
        }
    }

    #[test]
    fn ed25519_signatures_are_tied_to_the_message() {
        let key = PKey::generate_ed25519().expect("a key");
        let signature =
            Signer::new_without_digest(&key).and_then(|mut signer| signer.sign_oneshot_to_vec(b"a"));
        let (signature, verifier) = (signature.expect("signs"), verifier(&key, Algorithm::Ed25519));
        assert!(verifier.verifies(&Algorithm::Ed25519.content(b"a"), &signature));
        assert!(!verifier.verifies(&Algorithm::Ed25519.content(b"b"), &signature));
    }
}
