//! ML-DSA public keys (FIPS 204), which the OpenSSL of many systems does not know yet.

use ml_dsa::pkcs8::DecodePublicKey as _;
use ml_dsa::{MlDsa44, MlDsa65, MlDsa87, MlDsaParams, Signature, Verifier as _, VerifyingKey};

/// A parameter set (FIPS 204, 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterSet {
    /// ML-DSA-44.
    MlDsa44,
    /// ML-DSA-65.
    MlDsa65,
    /// ML-DSA-87.
    MlDsa87,
}

/// A public key: its SubjectPublicKeyInfo, DER, which was parsed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MlDsaKey {
    set: ParameterSet,
    spki: Vec<u8>,
}

impl MlDsaKey {
    /// None where it is a key of another kind (RFC 9881).
    pub(crate) fn from_spki(der: &[u8]) -> Option<(ParameterSet, Self)> {
        let set = match () {
            () if VerifyingKey::<MlDsa44>::from_public_key_der(der).is_ok() => ParameterSet::MlDsa44,
            () if VerifyingKey::<MlDsa65>::from_public_key_der(der).is_ok() => ParameterSet::MlDsa65,
            () if VerifyingKey::<MlDsa87>::from_public_key_der(der).is_ok() => ParameterSet::MlDsa87,
            () => return None,
        };
        Some((set, Self { set, spki: der.to_vec() }))
    }

    /// SubjectPublicKeyInfo in PEM.
    pub(crate) fn to_pem(&self) -> Vec<u8> {
        let pem = der::pem::encode_string("PUBLIC KEY", der::pem::LineEnding::LF, &self.spki);
        pem.expect("a parsed key always serializes").into_bytes()
    }

    /// Whether this key signed the message, without a context.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self.set {
            ParameterSet::MlDsa44 => self.verifies_with::<MlDsa44>(message, signature),
            ParameterSet::MlDsa65 => self.verifies_with::<MlDsa65>(message, signature),
            ParameterSet::MlDsa87 => self.verifies_with::<MlDsa87>(message, signature),
        }
    }

    fn verifies_with<P: MlDsaParams>(&self, message: &[u8], signature: &[u8]) -> bool
    where
        VerifyingKey<P>: ml_dsa::pkcs8::DecodePublicKey,
    {
        let key = VerifyingKey::<P>::from_public_key_der(&self.spki).ok();
        let signature = Signature::<P>::try_from(signature).ok();
        key.zip(signature).is_some_and(|(key, signature)| key.verify(message, &signature).is_ok())
    }
}
