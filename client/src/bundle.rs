//! The bundle file: a Sigstore bundle v0.3 around a DSSE envelope (OMS v1.0, 4), read strictly, written by
//! rename.

use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::dsse::PAYLOAD_TYPE;

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// A larger file is not a bundle: one of a million files is half of this.
const LARGEST_BYTES: u64 = 512 << 20;

/// What is in a bundle. Nothing in it is verified yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// What the signer says about the key.
    pub material: Material,
    /// The signed bytes: an in-toto statement.
    pub payload: Vec<u8>,
    /// The signature over the payload's PAE.
    pub signature: Vec<u8>,
}

/// Verification material, by signing method (OMS v1.0, 4.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Material {
    /// Method "key".
    PublicKey(KeyIdentifier),
    /// Method "certificate": DER, leaf first.
    CertificateChain(Vec<Vec<u8>>),
    /// Method "sigstore".
    Sigstore,
}

/// How a bundle names its public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyIdentifier {
    /// Hexadecimal SHA-256 of the key's PEM.
    Hint(String),
    /// The PEM itself, as before 1.1.
    Pem(Vec<u8>),
}

/// What is wrong with a bundle file.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written. What was there before is untouched.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not JSON, a field missing, doubled or unknown, or of the wrong type.
    #[error("the bundle is malformed (OMS 4): {0}")]
    Malformed(String),
    /// Something else is where the bundle is to be written. It stays.
    #[error("{0} exists and is not a bundle")]
    Occupied(PathBuf),
    /// Larger than any bundle.
    #[error("the bundle is larger than {} MiB", LARGEST_BYTES >> 20)]
    TooLarge,
    /// Another media type.
    #[error("the bundle's mediaType is {0:?}, not {MEDIA_TYPE:?} (OMS 8.1)")]
    MediaType(String),
    /// Another payload type.
    #[error("the envelope's payloadType is {0:?}, not {PAYLOAD_TYPE:?} (OMS 6.7)")]
    PayloadType(String),
    /// Not exactly one signature.
    #[error("the envelope has {0} signatures instead of one")]
    Signatures(usize),
    /// Not exactly one of publicKey, x509CertificateChain and certificate.
    #[error("the bundle's verificationMaterial names {0} signing methods instead of one (OMS 4.1)")]
    Methods(usize),
    /// A chain without certificates.
    #[error("the bundle's certificate chain is empty (OMS 4.1)")]
    EmptyChain,
    /// Not base64.
    #[error("the bundle's {0} is not base64 (RFC 4648, 4)")]
    Base64(&'static str),
}

impl BundleError {
    /// Whether the bundle itself is wrong.
    pub fn found_wrong(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Write { .. } | Self::Occupied(_))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct BundleJson {
    media_type: String,
    verification_material: MaterialJson,
    dsse_envelope: EnvelopeJson,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MaterialJson {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<KeyJson>,
    #[serde(default, rename = "x509CertificateChain", skip_serializing_if = "Option::is_none")]
    certificate_chain: Option<ChainJson>,
    #[serde(default, skip_serializing)]
    certificate: Option<IgnoredAny>,
    /// Always written, always empty: some verifiers ask for it.
    #[serde(default)]
    tlog_entries: Vec<serde_json::Value>,
    #[serde(default, skip_serializing)]
    #[expect(dead_code, reason = "known, so not an unknown field; not used by this version")]
    timestamp_verification_data: Option<IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KeyJson {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(default, skip_serializing)]
    raw_bytes: Option<String>,
    #[serde(default, skip_serializing)]
    #[expect(dead_code, reason = "known, so not an unknown field; the key itself says what it is")]
    key_details: Option<IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainJson {
    certificates: Vec<CertificateJson>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CertificateJson {
    raw_bytes: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct EnvelopeJson {
    payload: String,
    payload_type: String,
    signatures: Vec<SignatureJson>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureJson {
    sig: String,
    /// Absent, empty and null mean the same (OMS v1.0, 4.1); it identifies nothing.
    #[serde(default)]
    keyid: Option<String>,
}

impl Bundle {
    /// Reads a bundle file.
    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let io = |source| BundleError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        let mut bytes = Vec::new();
        file.take(LARGEST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > LARGEST_BYTES) {
            return Err(BundleError::TooLarge);
        }
        Self::parse(&bytes)
    }

    /// Parses a bundle.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let bundle: BundleJson =
            serde_json::from_slice(bytes).map_err(|error| BundleError::Malformed(error.to_string()))?;
        let BundleJson { media_type, verification_material: material, dsse_envelope: envelope } = bundle;
        if media_type != MEDIA_TYPE {
            return Err(BundleError::MediaType(media_type));
        }
        if envelope.payload_type != PAYLOAD_TYPE {
            return Err(BundleError::PayloadType(envelope.payload_type));
        }
        let [signature] = envelope.signatures.as_slice() else {
            return Err(BundleError::Signatures(envelope.signatures.len()));
        };
        let material = match (material.public_key, material.certificate_chain, material.certificate) {
            (Some(key), None, None) => Material::PublicKey(key_identifier(key)?),
            (None, Some(chain), None) => Material::CertificateChain(certificates(&chain)?),
            (None, None, Some(_)) => Material::Sigstore,
            (key, chain, certificate) => {
                let given = [key.is_some(), chain.is_some(), certificate.is_some()];
                return Err(BundleError::Methods(given.into_iter().filter(|given| *given).count()));
            }
        };
        let payload = decode("payload", &envelope.payload)?;
        Ok(Self { material, payload, signature: decode("sig", &signature.sig)? })
    }

    /// The bundle as JSON, on one line.
    pub fn to_json(&self) -> Vec<u8> {
        let mut material = MaterialJson::default();
        match &self.material {
            Material::PublicKey(KeyIdentifier::Hint(hint)) => {
                let hint = Some(hint.clone());
                material.public_key = Some(KeyJson { hint, raw_bytes: None, key_details: None });
            }
            Material::CertificateChain(chain) => {
                let certificate = |der: &Vec<u8>| CertificateJson { raw_bytes: STANDARD.encode(der) };
                material.certificate_chain =
                    Some(ChainJson { certificates: chain.iter().map(certificate).collect() });
            }
            Material::PublicKey(KeyIdentifier::Pem(_)) | Material::Sigstore => {
                unreachable!("bundles of these kinds are only read")
            }
        }
        let bundle = BundleJson {
            media_type: MEDIA_TYPE.into(),
            verification_material: material,
            dsse_envelope: EnvelopeJson {
                payload: STANDARD.encode(&self.payload),
                payload_type: PAYLOAD_TYPE.into(),
                signatures: vec![SignatureJson {
                    sig: STANDARD.encode(&self.signature),
                    keyid: Some(String::new()),
                }],
            },
        };
        let mut json = serde_json::to_vec(&bundle).expect("strings and lists always serialize");
        json.push(b'\n');
        json
    }

    /// Whether a bundle may be written here: there is nothing yet, or an older bundle. A model, a key or a device
    /// must not be replaced because of a typing mistake.
    pub fn may_replace(path: &Path) -> Result<(), BundleError> {
        let io = |source| BundleError::Read { path: path.to_owned(), source };
        let occupied = || BundleError::Occupied(path.to_owned());
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io(error)),
            Ok(found) if !found.is_file() => return Err(occupied()),
            Ok(_) => {}
        }
        // Every writer puts the media type near the start; the whole may be large.
        let mut start = Vec::new();
        let file = std::fs::File::open(path).map_err(io)?;
        file.take(4096).read_to_end(&mut start).map_err(io)?;
        let start = String::from_utf8_lossy(&start);
        if start.starts_with('{') && start.contains("application/vnd.dev.sigstore.bundle") {
            return Ok(());
        }
        Err(occupied())
    }

    /// Writes the bundle: a temporary file beside it, synced, then renamed. On failure nothing is left and what
    /// was there before is untouched.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        let io = |source| BundleError::Write { path: path.to_owned(), source };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".omsign-").permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let mut file = builder.tempfile_in(directory).map_err(io)?;
        file.write_all(&self.to_json()).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
        std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)
    }
}

fn key_identifier(key: KeyJson) -> Result<KeyIdentifier, BundleError> {
    match (key.hint, key.raw_bytes) {
        (Some(hint), None) => Ok(KeyIdentifier::Hint(hint)),
        (None, Some(raw)) => Ok(KeyIdentifier::Pem(decode("publicKey.rawBytes", &raw)?)),
        _ => Err(BundleError::Malformed("publicKey needs exactly one of hint and rawBytes".into())),
    }
}

fn certificates(chain: &ChainJson) -> Result<Vec<Vec<u8>>, BundleError> {
    if chain.certificates.is_empty() {
        return Err(BundleError::EmptyChain);
    }
    chain.certificates.iter().map(|certificate| decode("certificate", &certificate.raw_bytes)).collect()
}

fn decode(what: &'static str, text: &str) -> Result<Vec<u8>, BundleError> {
    STANDARD.decode(text).map_err(|_| BundleError::Base64(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        let material = Material::PublicKey(KeyIdentifier::Hint("ab".into()));
        Bundle { material, payload: b"{}".to_vec(), signature: vec![1, 2, 3] }
    }

    #[test]
    fn a_bundle_survives_the_round_trip() {
        assert_eq!(Bundle::parse(&bundle().to_json()).expect("valid"), bundle());
        let chain = Bundle { material: Material::CertificateChain(vec![vec![1], vec![2]]), ..bundle() };
        assert_eq!(Bundle::parse(&chain.to_json()).expect("valid"), chain);
    }

    #[test]
    fn each_wrong_bundle_has_its_own_error() {
        type Change = fn(&mut serde_json::Value);
        let cases: &[(Change, &str)] = &[
            (|b| b["mediaType"] = "text/plain".into(), "(OMS 8.1)"),
            (|b| b["dsseEnvelope"]["payloadType"] = "text/plain".into(), "(OMS 6.7)"),
            (|b| b["dsseEnvelope"]["signatures"] = serde_json::json!([]), "0 signatures"),
            (
                |b| b["dsseEnvelope"]["signatures"] = serde_json::json!([{"sig": ""}, {"sig": ""}]),
                "2 signatures",
            ),
            (|b| b["dsseEnvelope"]["payload"] = "e30".into(), "payload is not base64"),
            (|b| b["dsseEnvelope"]["payload"] = "e31=".into(), "payload is not base64"),
            (|b| b["verificationMaterial"] = serde_json::json!({"tlogEntries": []}), "0 signing methods"),
            (
                |b| b["verificationMaterial"]["certificate"] = serde_json::json!({"rawBytes": ""}),
                "2 signing methods",
            ),
            (|b| b["verificationMaterial"]["publicKey"] = serde_json::json!({}), "exactly one of hint"),
            (
                |b| {
                    b["verificationMaterial"] =
                        serde_json::json!({"x509CertificateChain": {"certificates": []}})
                },
                "empty",
            ),
            (|b| b["more"] = 1.into(), "unknown field `more`"),
            (|b| b["dsseEnvelope"]["signatures"][0]["more"] = 1.into(), "unknown field `more`"),
        ];
        for (change, expected) in cases {
            let mut json = serde_json::from_slice(&bundle().to_json()).expect("JSON");
            change(&mut json);
            let error = Bundle::parse(json.to_string().as_bytes()).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }

    #[test]
    fn keyid_may_be_absent_empty_or_null() {
        for keyid in [r#""keyid":"""#, r#""keyid":null"#, r#""keyid":"x""#] {
            let json = String::from_utf8(bundle().to_json()).expect("text").replace(r#""keyid":"""#, keyid);
            Bundle::parse(json.as_bytes()).expect(keyid);
        }
        let json = String::from_utf8(bundle().to_json()).expect("text").replace(r#","keyid":"""#, "");
        Bundle::parse(json.as_bytes()).expect("absent");
    }
}
