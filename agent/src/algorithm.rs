//! The table of signature algorithms. A key's algorithm follows from its public half and its configuration;
//! callers never choose it.

use omsign_proto::v1::SignatureAlgorithm;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// How a key signs, as in the Sigstore algorithm registry. OMS names only ECDSA; clients ask before they use others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Algorithm {
    /// ECDSA on a curve, over a digest as wide as the curve.
    Ecdsa(Curve),
    /// RSA of 2048 to 4096 bits, PKCS#1 v1.5 padding, over a SHA-256 digest (RFC 8017, 8.2).
    RsaPkcs1,
    /// The same with PSS padding and a salt of 32 bytes (RFC 8017, 8.1).
    RsaPss,
    /// Ed25519 over the message itself (RFC 8032).
    Ed25519,
    /// ML-DSA over the message itself, without a context (FIPS 204, 5.2).
    MlDsa(ParameterSet),
}

/// A parameter set of ML-DSA (FIPS 204, 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ParameterSet {
    /// ML-DSA-44, security category 2.
    MlDsa44,
    /// ML-DSA-65, security category 3.
    MlDsa65,
    /// ML-DSA-87, security category 5.
    MlDsa87,
}

/// A NIST curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Curve {
    /// P-256, with SHA-256.
    P256,
    /// P-384, with SHA-384.
    P384,
    /// P-521, with SHA-512.
    P521,
}

/// What kind of key to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KeyType {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// ECDSA on P-521.
    P521,
    /// RSA of 2048 bits. Not in OMS.
    Rsa2048,
    /// RSA of 3072 bits. Not in OMS.
    Rsa3072,
    /// RSA of 4096 bits. Not in OMS.
    Rsa4096,
    /// Ed25519. Not in OMS.
    Ed25519,
    /// ML-DSA-44. Not in OMS.
    #[serde(rename = "ml-dsa-44")]
    #[value(name = "ml-dsa-44")]
    MlDsa44,
    /// ML-DSA-65. Not in OMS.
    #[serde(rename = "ml-dsa-65")]
    #[value(name = "ml-dsa-65")]
    MlDsa65,
    /// ML-DSA-87. Not in OMS.
    #[serde(rename = "ml-dsa-87")]
    #[value(name = "ml-dsa-87")]
    MlDsa87,
}

impl KeyType {
    /// Whether the OMS algorithm registry names it: other tools verify what it signs.
    pub fn is_of_oms(self) -> bool {
        matches!(self, Self::P256 | Self::P384 | Self::P521)
    }

    /// Whether it is one of FIPS 204.
    pub fn is_ml_dsa(self) -> bool {
        matches!(self, Self::MlDsa44 | Self::MlDsa65 | Self::MlDsa87)
    }

    /// Whether it pads.
    pub fn is_rsa(self) -> bool {
        matches!(self, Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096)
    }
}

impl std::fmt::Display for KeyType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = clap::ValueEnum::to_possible_value(self).expect("every kind can be typed");
        f.write_str(value.get_name())
    }
}

/// How an RSA key pads; nothing about the key itself tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Padding {
    /// `padding = "pkcs1"`, the default.
    #[default]
    Pkcs1,
    /// `padding = "pss"`
    Pss,
}

/// What is signed. A digest is never taken for a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A digest of it, by the hash of the key's algorithm.
    Digest(Vec<u8>),
    /// The message itself.
    Message(Vec<u8>),
}

/// A signature that is not one.
#[derive(Debug, thiserror::Error)]
#[error("the signature is malformed: {0}")]
pub struct MalformedSignature(String);

impl Algorithm {
    /// The name in logs, errors and the audit file.
    pub fn name(self) -> &'static str {
        self.names().0
    }

    /// The contract's name for it.
    pub fn to_proto(self) -> SignatureAlgorithm {
        self.names().1
    }

    fn names(self) -> (&'static str, SignatureAlgorithm) {
        match self {
            Self::Ecdsa(Curve::P256) => ("ecdsa-p256-sha256", SignatureAlgorithm::EcdsaP256Sha256),
            Self::Ecdsa(Curve::P384) => ("ecdsa-p384-sha384", SignatureAlgorithm::EcdsaP384Sha384),
            Self::Ecdsa(Curve::P521) => ("ecdsa-p521-sha512", SignatureAlgorithm::EcdsaP521Sha512),
            Self::RsaPkcs1 => ("rsa-pkcs1-sha256", SignatureAlgorithm::RsaPkcs1Sha256),
            Self::RsaPss => ("rsa-pss-sha256", SignatureAlgorithm::RsaPssSha256),
            Self::Ed25519 => ("ed25519", SignatureAlgorithm::Ed25519),
            Self::MlDsa(ParameterSet::MlDsa44) => ("ml-dsa-44", SignatureAlgorithm::MlDsa44),
            Self::MlDsa(ParameterSet::MlDsa65) => ("ml-dsa-65", SignatureAlgorithm::MlDsa65),
            Self::MlDsa(ParameterSet::MlDsa87) => ("ml-dsa-87", SignatureAlgorithm::MlDsa87),
        }
    }

    /// Whether it signs the message itself, and not a digest of it.
    pub fn signs_messages(self) -> bool {
        matches!(self, Self::Ed25519 | Self::MlDsa(_))
    }

    /// What a key signs of a message.
    pub fn content(self, message: &[u8]) -> Content {
        match self {
            Self::Ecdsa(Curve::P256) | Self::RsaPkcs1 | Self::RsaPss => {
                Content::Digest(Sha256::digest(message).to_vec())
            }
            Self::Ecdsa(Curve::P384) => Content::Digest(Sha384::digest(message).to_vec()),
            Self::Ecdsa(Curve::P521) => Content::Digest(Sha512::digest(message).to_vec()),
            Self::Ed25519 | Self::MlDsa(_) => Content::Message(message.to_vec()),
        }
    }

    /// The bytes to sign, if this is what a key of this algorithm signs. SoftHSM and others sign digests of any
    /// length, and a digest signed as a message would say something that nobody meant.
    pub fn bytes(self, content: &Content) -> Result<&[u8], String> {
        let wanted = match self {
            Self::Ecdsa(Curve::P256) | Self::RsaPkcs1 | Self::RsaPss => 32,
            Self::Ecdsa(Curve::P384) => 48,
            Self::Ecdsa(Curve::P521) => 64,
            Self::Ed25519 | Self::MlDsa(_) => {
                return match content {
                    Content::Message(message) => Ok(message),
                    Content::Digest(_) => Err(format!("{} signs messages: send the statement", self.name())),
                };
            }
        };
        match content {
            Content::Digest(digest) if digest.len() == wanted => Ok(digest),
            _ => Err(format!("{} signs digests of {wanted} bytes", self.name())),
        }
    }
}

impl Curve {
    /// Length of a coordinate, in bytes.
    pub fn field_len(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        }
    }

    /// DER `Ecdsa-Sig-Value` (RFC 3279, 2.2.3) from the fixed-width r‖s of PKCS#11. Fails when r or s is
    /// zero or not below the group order.
    pub fn der_from_raw(self, raw: &[u8]) -> Result<Vec<u8>, MalformedSignature> {
        macro_rules! der {
            ($curve:ident) => {
                $curve::ecdsa::Signature::from_slice(raw)
                    .map(|signature| signature.to_der().as_bytes().to_vec())
                    .map_err(|error| MalformedSignature(error.to_string()))
            };
        }
        match self {
            Self::P256 => der!(p256),
            Self::P384 => der!(p384),
            Self::P521 => der!(p521),
        }
    }
}

impl Content {
    /// What the audit log calls it: the digest, or the SHA-256 of the message; hexadecimal.
    pub fn hex(&self) -> String {
        match self {
            Self::Digest(digest) => hex::encode(digest),
            Self::Message(message) => hex::encode(Sha256::digest(message)),
        }
    }
}

/// A SHA-256 digest as PKCS#1 v1.5 signs it: a DER `DigestInfo` (RFC 8017, 9.2, note 1).
pub fn digest_info(digest: &[u8]) -> Vec<u8> {
    const SHA256: [u8; 19] = [
        0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
        0x04, 0x20,
    ];
    [&SHA256[..], digest].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_never_taken_for_a_message() {
        let digest = |length| Content::Digest(vec![7; length]);
        let p256 = Algorithm::Ecdsa(Curve::P256);
        assert!(p256.bytes(&digest(32)).is_ok() && p256.bytes(&digest(8)).is_err());
        assert!(p256.bytes(&Content::Message(vec![7; 32])).is_err());
        assert!(Algorithm::Ed25519.bytes(&digest(32)).is_err());
        assert!(Algorithm::Ed25519.bytes(&Content::Message(vec![7; 32])).is_ok());
    }

    #[test]
    fn malformed_signatures() {
        assert!(Curve::P256.der_from_raw(&[0; 64]).is_err());
        assert!(Curve::P256.der_from_raw(&[1; 8]).is_err());
    }
}
