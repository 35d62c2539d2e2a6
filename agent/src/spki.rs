//! Public halves: built from what devices show, and told apart.

use der::asn1::{Any, BitString, ObjectIdentifier, OctetString, UintRef};
use der::{Decode as _, Encode as _, Sequence};
use serde::{Deserialize, Serialize};
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

use crate::algorithm::{Algorithm, Curve, KeyType, Padding, ParameterSet};

const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const P521: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.35");
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ED25519_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
// RFC 9881, 2.
const ML_DSA_44: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.3.17");
const ML_DSA_65: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.3.18");
const ML_DSA_87: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.3.19");

/// The shortest RSA modulus, in bits: 112 bits of security (NIST SP 800-57).
const LEAST_RSA_BITS: usize = 2048;

/// A SubjectPublicKeyInfo in DER (RFC 5280, 4.1.2.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpkiDer(pub Vec<u8>);

/// `RSAPublicKey` (RFC 8017, A.1.1).
#[derive(Sequence)]
struct RsaPublicKey<'a> {
    modulus: UintRef<'a>,
    exponent: UintRef<'a>,
}

/// Why a public key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Of a kind that is not supported.
    #[error("{0}: omsign signs with ECDSA on P-256, P-384 or P-521, RSA from 2048 bits, Ed25519 and ML-DSA")]
    Unsupported(String),
    /// The device's answer is not a key.
    #[error("the public key is malformed: {0}")]
    Malformed(String),
}

impl ParameterSet {
    pub(crate) fn oid(self) -> ObjectIdentifier {
        match self {
            Self::MlDsa44 => ML_DSA_44,
            Self::MlDsa65 => ML_DSA_65,
            Self::MlDsa87 => ML_DSA_87,
        }
    }
}

impl Curve {
    fn oid(self) -> ObjectIdentifier {
        match self {
            Self::P256 => P256,
            Self::P384 => P384,
            Self::P521 => P521,
        }
    }

    /// The curve in DER `ECParameters` (RFC 5480, 2.1.1).
    pub fn from_params(params: &[u8]) -> Result<Self, KeyError> {
        let oid = ObjectIdentifier::from_der(params)
            .map_err(|_| KeyError::Unsupported("its EC parameters do not name a curve".into()))?;
        [Self::P256, Self::P384, Self::P521]
            .into_iter()
            .find(|curve| curve.oid() == oid)
            .ok_or_else(|| KeyError::Unsupported(format!("it is on the curve {oid}")))
    }
}

impl SpkiDer {
    /// From CKA_EC_POINT: an uncompressed point (SEC 1, 2.3.3), bare or, as PKCS#11 asks, inside a DER OCTET
    /// STRING. Tokens do both.
    pub fn from_ec_point(curve: Curve, point: &[u8]) -> Result<Self, KeyError> {
        Self::new(EC, Some(Any::from(curve.oid())), &unwrapped(point, 1 + 2 * curve.field_len()))
    }

    /// The public key that a certificate, DER, is about.
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        let certificate = x509_cert::Certificate::from_der(der).ok()?;
        certificate.tbs_certificate().subject_public_key_info().to_der().ok().map(Self)
    }

    /// From the point of an Edwards curve, bare or wrapped: 32 bytes for Ed25519.
    pub fn from_edwards_point(point: &[u8]) -> Result<Self, KeyError> {
        let point = unwrapped(point, 32);
        if point.len() != 32 {
            return Err(KeyError::Unsupported(format!("its point has {} bytes", point.len())));
        }
        Self::new(ED25519_KEY, None, &point)
    }

    /// From the encoded public key of ML-DSA (FIPS 204, 7.2).
    pub fn from_ml_dsa(set: ParameterSet, key: &[u8]) -> Result<Self, KeyError> {
        Self::new(set.oid(), None, key)
    }

    /// From a modulus and an exponent, big-endian.
    pub fn from_rsa(modulus: &[u8], exponent: &[u8]) -> Result<Self, KeyError> {
        let key = RsaPublicKey {
            modulus: UintRef::new(modulus).map_err(malformed)?,
            exponent: UintRef::new(exponent).map_err(malformed)?,
        };
        Self::new(RSA, Some(Any::null()), &key.to_der().map_err(malformed)?)
    }

    /// What would be asked for to make one like it.
    pub fn key_type(&self) -> Option<KeyType> {
        Some(match self.algorithm(Padding::default()).ok()? {
            Algorithm::Ecdsa(Curve::P256) => KeyType::P256,
            Algorithm::Ecdsa(Curve::P384) => KeyType::P384,
            Algorithm::Ecdsa(Curve::P521) => KeyType::P521,
            Algorithm::Ed25519 => KeyType::Ed25519,
            Algorithm::MlDsa(ParameterSet::MlDsa44) => KeyType::MlDsa44,
            Algorithm::MlDsa(ParameterSet::MlDsa65) => KeyType::MlDsa65,
            Algorithm::MlDsa(ParameterSet::MlDsa87) => KeyType::MlDsa87,
            Algorithm::RsaPkcs1 | Algorithm::RsaPss => {
                match openssl::pkey::PKey::public_key_from_der(&self.0).ok()?.bits() {
                    2048 => KeyType::Rsa2048,
                    3072 => KeyType::Rsa3072,
                    4096 => KeyType::Rsa4096,
                    _ => return None,
                }
            }
        })
    }

    fn new(oid: ObjectIdentifier, parameters: Option<Any>, key: &[u8]) -> Result<Self, KeyError> {
        let info = SubjectPublicKeyInfoOwned {
            algorithm: AlgorithmIdentifierOwned { oid, parameters },
            subject_public_key: BitString::from_bytes(key).map_err(malformed)?,
        };
        Ok(Self(info.to_der().map_err(malformed)?))
    }

    /// How its private half signs.
    pub fn algorithm(&self, padding: Padding) -> Result<Algorithm, KeyError> {
        let info = SubjectPublicKeyInfoOwned::from_der(&self.0).map_err(malformed)?;
        match info.algorithm.oid {
            EC => {
                let params = info.algorithm.parameters;
                let params = params.ok_or_else(|| KeyError::Malformed("no curve".into()))?;
                Curve::from_params(&params.to_der().map_err(malformed)?).map(Algorithm::Ecdsa)
            }
            RSA => {
                let key = RsaPublicKey::from_der(info.subject_public_key.raw_bytes()).map_err(malformed)?;
                let bits = key.modulus.as_bytes().len() * 8;
                if bits < LEAST_RSA_BITS {
                    return Err(KeyError::Unsupported(format!("it is an RSA key of {bits} bits")));
                }
                Ok(match padding {
                    Padding::Pkcs1 => Algorithm::RsaPkcs1,
                    Padding::Pss => Algorithm::RsaPss,
                })
            }
            ED25519_KEY => Ok(Algorithm::Ed25519),
            ML_DSA_44 => Ok(Algorithm::MlDsa(ParameterSet::MlDsa44)),
            ML_DSA_65 => Ok(Algorithm::MlDsa(ParameterSet::MlDsa65)),
            ML_DSA_87 => Ok(Algorithm::MlDsa(ParameterSet::MlDsa87)),
            other => Err(KeyError::Unsupported(format!("its algorithm is {other}"))),
        }
    }
}

/// By its length: some bare points are also valid OCTET STRINGs.
fn unwrapped(point: &[u8], bare: usize) -> Vec<u8> {
    match OctetString::from_der(point) {
        Ok(octets) if point.len() != bare => octets.as_bytes().to_vec(),
        _ => point.to_vec(),
    }
}

fn malformed(error: impl std::fmt::Display) -> KeyError {
    KeyError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use p256::pkcs8::EncodePublicKey as _;

    fn key() -> (p256::ecdsa::SigningKey, SpkiDer) {
        let secret = p256::ecdsa::SigningKey::from_slice(&[7; 32]).expect("a scalar");
        let spki = SpkiDer(secret.verifying_key().to_public_key_der().expect("encodes").into_vec());
        (secret, spki)
    }

    #[test]
    fn a_point_becomes_the_same_key_bare_or_wrapped() {
        let (secret, spki) = key();
        let point = secret.verifying_key().to_sec1_point(false);
        let wrapped = [&[4, 65], point.as_bytes()].concat();
        assert_eq!(SpkiDer::from_ec_point(Curve::P256, point.as_bytes()).expect("bare"), spki);
        assert_eq!(SpkiDer::from_ec_point(Curve::P256, &wrapped).expect("wrapped"), spki);
        assert_eq!(spki.algorithm(Padding::Pkcs1).expect("P-256"), Algorithm::Ecdsa(Curve::P256));
    }

    #[test]
    fn a_bare_point_that_looks_wrapped() {
        // 04 3f: an OCTET STRING of 63 bytes, or the start of a point with an x of 3f….
        let point = [&[4, 0x3f][..], &[7; 63]].concat();
        let spki = SpkiDer::from_ec_point(Curve::P256, &point).expect("encodes");
        assert!(spki.0.ends_with(&point), "{spki:?}");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let secp256k1 = [6, 5, 0x2b, 0x81, 4, 0, 10];
        let error = Curve::from_params(&secp256k1).expect_err("not supported");
        assert!(error.to_string().contains("1.3.132.0.10"));
        let short = SpkiDer::from_rsa(&[0xff; 128], &[1, 0, 1]).expect("encodes");
        let error = short.algorithm(Padding::Pkcs1).expect_err("too short");
        assert!(error.to_string().contains("an RSA key of 1024 bits"));
        assert!(SpkiDer::from_edwards_point(&[9; 57]).is_err());
    }
}
