//! Public keys and certificates, as they come from files and from the agent.

mod private;

use std::path::{Path, PathBuf};

use cms::cert::x509::Certificate;
use cms::cert::x509::der::{self, Decode as _, Encode as _};
use openssl::ec::EcKey;
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest};
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, Id, PKey, PKeyRef, Public};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Verifier};
use openssl::x509::X509;

pub use self::private::PrivateKey;
use crate::dsse::{Pae, digest_of_release_0_2_0};
use crate::files;
use crate::hash::Digest;
use crate::ml_dsa::MlDsaKey;
pub use crate::ml_dsa::ParameterSet;
use crate::path::PathError;

/// The shortest RSA modulus: 112 bits of security (NIST SP 800-57).
const LEAST_RSA_BITS: u32 = 2048;

/// Why an encrypted key cannot be read.
pub const NO_PASSWORD: &str = "it needs a password";

/// What a file may not hold that should: see [`KeyError::Content`].
pub const PUBLIC_KEY: &str = "a public key";

/// How files in PEM begin that hold a private key (RFC 7468, RFC 5915; and before them, for RSA).
pub const PRIVATE_KEYS: [&str; 4] =
    ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"];

/// A file with a key or certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It does not hold what it should.
    #[error("{path} does not hold {what} in PEM{}", .instead.map(|label| format!(", but: {label}")).unwrap_or_default())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What it says that it holds, if that is something else.
        instead: Option<&'static str>,
    },
    /// It is not the JSON that it should be.
    #[error("{path} is not {what} in JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
    },
    /// A trusted root that cannot be used.
    #[error("{path} is not a usable Sigstore trusted root")]
    TrustedRoot {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<sigstore_verify::Error>,
    },
    /// The private key is encrypted, and there is no password, or a wrong one.
    #[error("{path} cannot be decrypted: {reason}")]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The environment variable with the password is not set.
    #[error("the environment variable {0} is not set")]
    Variable(String),
    /// A key that nobody can use here.
    #[error(
        "{0}: omsign takes ECDSA on P-256, P-384 or P-521, RSA from 2048 bits, Ed25519 and ML-DSA (OMS, algorithm registry)"
    )]
    Unsupported(String),
    /// A key that OMS does not name.
    #[error("{0} is not an algorithm of OMS (algorithm registry): few verifiers take it")]
    Nonstandard(&'static str),
    /// A certificate of another key.
    #[error("the signing certificate is for another key than the one that signs")]
    Certificate,
    /// A chain that nobody could verify.
    #[error("nobody could verify what this certificate chain signs")]
    Chain(#[source] PathError),
    /// OpenSSL could not sign.
    #[error("OpenSSL could not sign: {0}")]
    Sign(String),
}

/// How a key signs. For elliptic curves, curve and hash go together (OMS algorithm registry); the others are in the
/// Sigstore registry only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// ECDSA on NIST P-256 with SHA-256.
    P256,
    /// ECDSA on NIST P-384 with SHA-384.
    P384,
    /// ECDSA on NIST P-521 with SHA-512.
    P521,
    /// RSA with SHA-256, PKCS#1 v1.5 or PSS padding.
    Rsa,
    /// Ed25519.
    Ed25519,
    /// ML-DSA (FIPS 204).
    MlDsa(ParameterSet),
}

impl Algorithm {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::P256 => "ECDSA P-256 with SHA-256",
            Self::P384 => "ECDSA P-384 with SHA-384",
            Self::P521 => "ECDSA P-521 with SHA-512",
            Self::Rsa => "RSA with SHA-256",
            Self::Ed25519 => "Ed25519",
            Self::MlDsa(ParameterSet::MlDsa44) => "ML-DSA-44",
            Self::MlDsa(ParameterSet::MlDsa65) => "ML-DSA-65",
            Self::MlDsa(ParameterSet::MlDsa87) => "ML-DSA-87",
        }
    }

    /// Whether OMS names it, so that other verifiers take it.
    pub fn is_standard(self) -> bool {
        matches!(self, Self::P256 | Self::P384 | Self::P521)
    }

    /// The digest that is signed; none where the message itself is.
    pub fn digest(self, pae: &Pae<'_>) -> Option<Vec<u8>> {
        Some(digest(self.hash()?, pae))
    }

    fn hash(self) -> Option<MessageDigest> {
        match self {
            Self::P256 | Self::Rsa => Some(MessageDigest::sha256()),
            Self::P384 => Some(MessageDigest::sha384()),
            Self::P521 => Some(MessageDigest::sha512()),
            Self::Ed25519 | Self::MlDsa(_) => None,
        }
    }

    fn of(key: &PKeyRef<impl HasPublic>) -> Result<Self, KeyError> {
        match key.id() {
            Id::ED25519 => return Ok(Self::Ed25519),
            Id::RSA if key.bits() < LEAST_RSA_BITS => {
                return Err(KeyError::Unsupported(format!("the key is an RSA key of {} bits", key.bits())));
            }
            Id::RSA => return Ok(Self::Rsa),
            _ => {}
        }
        let curve = key.ec_key().ok().and_then(|key| key.group().curve_name());
        match curve {
            Some(Nid::X9_62_PRIME256V1) => Ok(Self::P256),
            Some(Nid::SECP384R1) => Ok(Self::P384),
            Some(Nid::SECP521R1) => Ok(Self::P521),
            Some(other) => {
                let name = other.long_name().unwrap_or("unknown");
                Err(KeyError::Unsupported(format!("the key is on the curve {name}")))
            }
            None if key.id() == Id::RSA_PSS => {
                Err(KeyError::Unsupported("the key is one for RSASSA-PSS only (id-RSASSA-PSS)".into()))
            }
            None => Err(KeyError::Unsupported("the key is of another kind".into())),
        }
    }
}

/// A public key that OMS can use.
#[derive(Clone, Debug)]
pub struct PublicKey {
    /// How it signs.
    pub algorithm: Algorithm,
    half: Half,
}

/// The SubjectPublicKeyInfo of a certificate, DER.
fn spki(certificate: &X509) -> der::Result<Vec<u8>> {
    let der = certificate.to_der().map_err(|_| der::ErrorKind::Failed)?;
    Certificate::from_der(&der)?.tbs_certificate.subject_public_key_info.to_der()
}

/// A public key as the library that verifies with it has it.
#[derive(Clone, Debug)]
enum Half {
    OpenSsl(PKey<Public>),
    MlDsa(MlDsaKey),
}

impl PublicKey {
    /// From a PEM file.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        Self::from_pem(&read(path)?, path)
    }

    /// From PEM. `path` is where it came from, for errors.
    pub(crate) fn from_pem(pem: &[u8], path: &Path) -> Result<Self, KeyError> {
        let content = || KeyError::content(path, PUBLIC_KEY, &["PUBLIC KEY"], pem);
        let spki = match der::pem::decode_vec(pem) {
            Ok(("PUBLIC KEY", spki)) => spki,
            // With text around it, or of another kind.
            _ => {
                let key = PKey::public_key_from_pem(pem).map_err(|_| content())?;
                key.public_key_to_der().map_err(|_| content())?
            }
        };
        Self::from_spki(&spki)
    }

    /// From SubjectPublicKeyInfo, DER.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        if let Some((set, key)) = MlDsaKey::from_spki(der) {
            return Ok(Self { algorithm: Algorithm::MlDsa(set), half: Half::MlDsa(key) });
        }
        let key = PKey::public_key_from_der(der);
        Self::new(key.map_err(|_| KeyError::Unsupported("the public key is malformed".into()))?)
    }

    /// The key that a certificate certifies.
    pub fn of_certificate(certificate: &X509) -> Result<Self, KeyError> {
        let malformed = |_| KeyError::Unsupported("the certificate's key is malformed".into());
        certificate.public_key().map_err(malformed).and_then(Self::new).or_else(|error| {
            // OpenSSL does not know these, or has others to verify with.
            let known = spki(certificate).ok().and_then(|spki| MlDsaKey::from_spki(&spki));
            let (set, key) = known.ok_or(error)?;
            Ok(Self { algorithm: Algorithm::MlDsa(set), half: Half::MlDsa(key) })
        })
    }

    fn new(key: PKey<Public>) -> Result<Self, KeyError> {
        let algorithm = Algorithm::of(&key)?;
        // However its point was written, its PEM is one, and so its hint.
        let key = match key.ec_key() {
            Ok(ec) => EcKey::from_public_key(ec.group(), ec.public_key()).and_then(PKey::from_ec_key),
            Err(_) => Ok(key),
        };
        Ok(Self { algorithm, half: Half::OpenSsl(key.map_err(sign_error)?) })
    }

    /// SubjectPublicKeyInfo in PEM, lines of 64 characters, newline at the end.
    pub fn to_pem(&self) -> Vec<u8> {
        match &self.half {
            Half::OpenSsl(key) => key.public_key_to_pem().expect("a parsed key always serializes"),
            Half::MlDsa(key) => key.to_pem(),
        }
    }

    /// Lower-case hexadecimal SHA-256 of the PEM: what `publicKey.hint` holds.
    pub fn hint(&self) -> String {
        Digest::sha256(&self.to_pem()).to_string()
    }

    /// Whether `signature` is this key's over `pae`. Nothing about an RSA key tells how it pads; both ways are safe.
    pub fn verifies(&self, pae: &Pae<'_>, signature: &[u8]) -> bool {
        let key = match &self.half {
            Half::OpenSsl(key) => key,
            Half::MlDsa(key) => return key.verifies(&pae.to_bytes(), signature),
        };
        let verified = match self.algorithm {
            Algorithm::P256 | Algorithm::P384 | Algorithm::P521 => {
                let digest = self.algorithm.digest(pae);
                return digest.is_some_and(|digest| verifies_ecdsa(key, &digest, signature));
            }
            Algorithm::MlDsa(_) => return false,
            Algorithm::Ed25519 => Verifier::new_without_digest(key)
                .and_then(|mut verifier| verifier.verify_oneshot(signature, &pae.to_bytes())),
            Algorithm::Rsa => verifies_rsa(key, Padding::PKCS1, pae, signature).map(|verified| {
                verified || verifies_rsa(key, Padding::PKCS1_PSS, pae, signature).unwrap_or(false)
            }),
        };
        verified.unwrap_or(false)
    }

    /// Whether `signature` is this key's over a payload as release 0.2.0 of the reference made it: ECDSA with SHA-256 on
    /// every curve, over another encoding.
    pub(crate) fn verifies_as_release_0_2_0(&self, payload: &[u8], signature: &[u8]) -> bool {
        match (&self.half, self.algorithm) {
            (Half::OpenSsl(key), Algorithm::P256 | Algorithm::P384 | Algorithm::P521) => {
                verifies_ecdsa(key, digest_of_release_0_2_0(payload).as_bytes(), signature)
            }
            _ => false,
        }
    }

    /// Whether two keys are the same.
    pub fn same_as(&self, other: &Self) -> bool {
        match (&self.half, &other.half) {
            (Half::OpenSsl(one), Half::OpenSsl(other)) => one.public_eq(other),
            (Half::MlDsa(one), Half::MlDsa(other)) => one == other,
            (Half::OpenSsl(_), Half::MlDsa(_)) | (Half::MlDsa(_), Half::OpenSsl(_)) => false,
        }
    }
}

/// The signature is a DER Ecdsa-Sig-Value (RFC 3279, 2.2.3).
fn verifies_ecdsa(key: &PKey<Public>, digest: &[u8], signature: &[u8]) -> bool {
    let Ok(parsed) = EcdsaSig::from_der(signature) else { return false };
    // d2i accepts bytes after the end, and BER.
    if parsed.to_der().ok().as_deref() != Some(signature) {
        return false;
    }
    let key: Result<EcKey<Public>, _> = key.ec_key();
    key.and_then(|key| parsed.verify(digest, &key)).unwrap_or(false)
}

fn verifies_rsa(
    key: &PKey<Public>,
    padding: Padding,
    pae: &Pae<'_>,
    signature: &[u8],
) -> Result<bool, ErrorStack> {
    let mut verifier = Verifier::new(MessageDigest::sha256(), key)?;
    verifier.set_rsa_padding(padding)?;
    if padding == Padding::PKCS1_PSS {
        verifier.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
    }
    pae.parts().iter().try_for_each(|part| verifier.update(part))?;
    verifier.verify(signature)
}

fn digest(algorithm: MessageDigest, pae: &Pae<'_>) -> Vec<u8> {
    let mut hasher = Hasher::new(algorithm).expect("SHA-2 is always there");
    pae.parts().iter().try_for_each(|part| hasher.update(part)).expect("hashing memory does not fail");
    hasher.finish().expect("hashing memory does not fail").to_vec()
}

fn sign_error(error: ErrorStack) -> KeyError {
    KeyError::Sign(error.to_string())
}

/// Reads the certificates of PEM files, in order.
pub fn read_certificates(paths: &[PathBuf]) -> Result<Vec<X509>, KeyError> {
    let mut certificates = Vec::new();
    for path in paths {
        certificates.extend(certificates_from_pem(&read(path)?, path)?);
    }
    Ok(certificates)
}

/// At least one certificate, in PEM. `path` is where it came from, for errors.
pub(crate) fn certificates_from_pem(pem: &[u8], path: &Path) -> Result<Vec<X509>, KeyError> {
    let found = X509::stack_from_pem(pem).unwrap_or_default();
    if found.is_empty() {
        return Err(KeyError::content(path, "a certificate", &["CERTIFICATE"], pem));
    }
    Ok(found)
}

impl KeyError {
    /// A file without what it should hold: that has one of these labels.
    fn content(path: &Path, what: &'static str, labels: &[&str], pem: &[u8]) -> Self {
        // Only these are shown: files may hold anything.
        let known =
            PRIVATE_KEYS.into_iter().chain(["PUBLIC KEY", "CERTIFICATE", "CERTIFICATE REQUEST", "X509 CRL"]);
        let begins = |label: &&str| {
            let begin = format!("-----BEGIN {label}-----");
            pem.windows(begin.len()).any(|window| window == begin.as_bytes())
        };
        let instead = known.filter(|label| !labels.contains(label)).find(begins);
        Self::Content { path: path.to_owned(), what, instead }
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, KeyError> {
    files::read(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })
}
