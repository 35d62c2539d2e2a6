//! The table of signature algorithms. A key's algorithm follows from its public half; nobody chooses it.

use omsign_proto::v1::SignatureAlgorithm;
use serde::{Deserialize, Serialize};
use x509_cert::der::{Decode as _, Encode as _, asn1::BitString, asn1::ObjectIdentifier};
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const P521: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.35");

/// How a key signs: curve and hash go together, as in the OMS algorithm registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// ECDSA on NIST P-256 over a SHA-256 digest.
    EcdsaP256Sha256,
    /// ECDSA on NIST P-384 over a SHA-384 digest.
    EcdsaP384Sha384,
    /// ECDSA on NIST P-521 over a SHA-512 digest.
    EcdsaP521Sha512,
}

/// A SubjectPublicKeyInfo in DER (RFC 5280, 4.1.2.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpkiDer(pub Vec<u8>);

/// Why a public key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not an elliptic-curve key, or a curve that OMS does not use.
    #[error("{0}: OMS signs with ECDSA on P-256, P-384 or P-521")]
    Unsupported(String),
    /// The token's answer is not a key.
    #[error("the public key is malformed: {0}")]
    Malformed(String),
}

impl Algorithm {
    /// Length of the digest that is signed, in bytes.
    pub fn digest_len(self) -> usize {
        match self {
            Self::EcdsaP256Sha256 => 32,
            Self::EcdsaP384Sha384 => 48,
            Self::EcdsaP521Sha512 => 64,
        }
    }

    /// Length of a coordinate of its curve, in bytes.
    pub fn field_len(self) -> usize {
        match self {
            Self::EcdsaP256Sha256 => 32,
            Self::EcdsaP384Sha384 => 48,
            Self::EcdsaP521Sha512 => 66,
        }
    }

    /// The name in logs, errors and the audit file.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256Sha256 => "ecdsa-p256-sha256",
            Self::EcdsaP384Sha384 => "ecdsa-p384-sha384",
            Self::EcdsaP521Sha512 => "ecdsa-p521-sha512",
        }
    }

    /// The contract's name for it.
    pub fn to_proto(self) -> SignatureAlgorithm {
        match self {
            Self::EcdsaP256Sha256 => SignatureAlgorithm::EcdsaP256Sha256,
            Self::EcdsaP384Sha384 => SignatureAlgorithm::EcdsaP384Sha384,
            Self::EcdsaP521Sha512 => SignatureAlgorithm::EcdsaP521Sha512,
        }
    }

    fn curve(self) -> ObjectIdentifier {
        match self {
            Self::EcdsaP256Sha256 => P256,
            Self::EcdsaP384Sha384 => P384,
            Self::EcdsaP521Sha512 => P521,
        }
    }

    /// The algorithm of a key on this curve, given as DER `ECParameters` (RFC 5480, 2.1.1).
    pub fn from_ec_params(params: &[u8]) -> Result<Self, KeyError> {
        let curve = ObjectIdentifier::from_der(params)
            .map_err(|_| KeyError::Unsupported("its EC parameters do not name a curve".into()))?;
        [Self::EcdsaP256Sha256, Self::EcdsaP384Sha384, Self::EcdsaP521Sha512]
            .into_iter()
            .find(|algorithm| algorithm.curve() == curve)
            .ok_or_else(|| KeyError::Unsupported(format!("it is on the curve {curve}")))
    }

    /// The algorithm of the key in a SubjectPublicKeyInfo.
    pub fn from_spki(spki: &SpkiDer) -> Result<Self, KeyError> {
        let info = SubjectPublicKeyInfoOwned::from_der(&spki.0).map_err(malformed)?;
        if info.algorithm.oid != EC_PUBLIC_KEY {
            return Err(KeyError::Unsupported(format!("its algorithm is {}", info.algorithm.oid)));
        }
        let params = info.algorithm.parameters.ok_or_else(|| KeyError::Malformed("no curve".into()))?;
        Self::from_ec_params(&params.to_der().map_err(malformed)?)
    }

    /// Builds the SubjectPublicKeyInfo from CKA_EC_POINT: an uncompressed point (SEC 1, 2.3.3), bare or, as
    /// PKCS#11 asks, inside a DER OCTET STRING. Tokens do both.
    pub fn spki_from_point(self, ec_point: &[u8]) -> Result<SpkiDer, KeyError> {
        let wrapped = x509_cert::der::asn1::OctetString::from_der(ec_point);
        let point = match &wrapped {
            Ok(octets) => octets.as_bytes(),
            Err(_) => ec_point,
        };
        let info = SubjectPublicKeyInfoOwned {
            algorithm: AlgorithmIdentifierOwned {
                oid: EC_PUBLIC_KEY,
                parameters: Some(x509_cert::der::Any::from(self.curve())),
            },
            subject_public_key: BitString::from_bytes(point).map_err(malformed)?,
        };
        Ok(SpkiDer(info.to_der().map_err(malformed)?))
    }

    /// DER `Ecdsa-Sig-Value` (RFC 3279, 2.2.3) from the fixed-width r‖s of PKCS#11. Fails when r or s is
    /// zero or not below the group order.
    pub fn der_from_raw(self, raw: &[u8]) -> Result<Vec<u8>, KeyError> {
        Ok(match self {
            Self::EcdsaP256Sha256 => {
                p256::ecdsa::Signature::from_slice(raw).map_err(malformed)?.to_der().as_bytes().to_vec()
            }
            Self::EcdsaP384Sha384 => {
                p384::ecdsa::Signature::from_slice(raw).map_err(malformed)?.to_der().as_bytes().to_vec()
            }
            Self::EcdsaP521Sha512 => {
                p521::ecdsa::Signature::from_slice(raw).map_err(malformed)?.to_der().as_bytes().to_vec()
            }
        })
    }

    /// Whether `signature` (DER) over `digest` was made by the private half of `spki`.
    pub fn verifies(self, spki: &SpkiDer, digest: &[u8], signature: &[u8]) -> Result<bool, KeyError> {
        macro_rules! verify {
            ($curve:ident) => {{
                use $curve::ecdsa::signature::hazmat::PrehashVerifier as _;
                use $curve::pkcs8::DecodePublicKey as _;
                let key = $curve::ecdsa::VerifyingKey::from_public_key_der(&spki.0).map_err(malformed)?;
                let signature = $curve::ecdsa::Signature::from_der(signature).map_err(malformed)?;
                key.verify_prehash(digest, &signature).is_ok()
            }};
        }
        Ok(match self {
            Self::EcdsaP256Sha256 => verify!(p256),
            Self::EcdsaP384Sha384 => verify!(p384),
            Self::EcdsaP521Sha512 => verify!(p521),
        })
    }
}

fn malformed(error: impl std::fmt::Display) -> KeyError {
    KeyError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use p256::ecdsa::signature::hazmat::PrehashSigner as _;
    use p256::pkcs8::EncodePublicKey as _;

    #[test]
    fn a_point_becomes_the_same_key_bare_or_wrapped() {
        let secret = p256::ecdsa::SigningKey::from_slice(&[7; 32]).expect("a scalar");
        let der = secret.verifying_key().to_public_key_der().expect("encodes").into_vec();
        let point = secret.verifying_key().to_sec1_point(false);
        let algorithm = Algorithm::from_spki(&SpkiDer(der.clone())).expect("P-256");
        let mut wrapped = vec![4, 65];
        wrapped.extend(point.as_bytes());
        assert_eq!(algorithm.spki_from_point(point.as_bytes()).expect("bare").0, der);
        assert_eq!(algorithm.spki_from_point(&wrapped).expect("wrapped").0, der);
    }

    #[test]
    fn signatures_are_tied_to_key_and_digest() {
        let secret = p256::ecdsa::SigningKey::from_slice(&[7; 32]).expect("a scalar");
        let spki = SpkiDer(secret.verifying_key().to_public_key_der().expect("encodes").into_vec());
        let raw: p256::ecdsa::Signature = secret.sign_prehash(&[1; 32]).expect("signs");
        let algorithm = Algorithm::EcdsaP256Sha256;
        let der = algorithm.der_from_raw(&raw.to_bytes()).expect("in range");
        assert!(algorithm.verifies(&spki, &[1; 32], &der).expect("well-formed"));
        assert!(!algorithm.verifies(&spki, &[2; 32], &der).expect("well-formed"));
        assert!(algorithm.der_from_raw(&[0; 64]).is_err());
        assert!(algorithm.der_from_raw(&[1; 8]).is_err());
    }

    #[test]
    fn other_curves_are_refused_by_name() {
        let secp256k1 = [6, 5, 0x2b, 0x81, 4, 0, 10];
        let error = Algorithm::from_ec_params(&secp256k1).expect_err("not in the registry");
        assert!(error.to_string().contains("1.3.132.0.10"));
    }
}
