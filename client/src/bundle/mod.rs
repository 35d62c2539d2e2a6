//! The bundle: a Sigstore bundle v0.3 around a DSSE envelope (OMS v1.0, 4), read strictly, written by rename.

mod file;
mod json;
mod log;

use std::io;
use std::path::PathBuf;

use jiff::Timestamp;

use crate::dsse::PAYLOAD_TYPE;

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// As it was written at first (sigstore_bundle.proto, Bundle.media_type).
const OLDER_MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle+json;version=0.3";

/// So many bytes are repeated of what a bundle says in the wrong place: nothing in it is believed yet.
const SAID_BYTES: usize = 256;

/// The start of it.
pub(crate) fn said(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(SAID_BYTES));
    text
}

/// What a bundle may be long, in bytes, where nobody says otherwise: one of 400,000 files is about this long.
pub const LARGEST_BYTES: u64 = 64 << 20;

/// More of anything that has to be verified one by one is an attack.
const MOST: usize = 16;

/// What is in a bundle. Nothing in it is verified yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// What the signer says about the key.
    pub material: Material,
    /// RFC 3161: TimeStampResp, DER, over the signature.
    pub timestamps: Vec<Vec<u8>>,
    /// Whether entries of transparency logs are there that its method has no use for.
    pub idle_log_entries: bool,
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
    Keyless {
        /// From Fulcio, DER.
        certificate: Vec<u8>,
        /// What transparency logs say.
        log: LogEntries,
    },
}

/// Entries of transparency logs: a JSON list, as it is in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntries(String);

impl LogEntries {
    /// When logs say that they took entries in. Nothing about it is proven.
    pub fn claimed_times(&self) -> Vec<Timestamp> {
        #[derive(serde::Deserialize)]
        struct Entry<'a> {
            #[serde(default, rename = "integratedTime")]
            seconds: Option<&'a str>,
        }
        let entries: Vec<Entry<'_>> = serde_json::from_str(&self.0).unwrap_or_default();
        let seconds = entries.iter().filter_map(|entry| entry.seconds?.parse().ok());
        seconds.filter(|it| *it > 0).filter_map(|seconds| Timestamp::from_second(seconds).ok()).collect()
    }
}

/// How a bundle names its public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyIdentifier {
    /// Hexadecimal SHA-256 of the key's PEM.
    Hint(String),
    /// The PEM itself, as before 1.1.
    Pem(Vec<u8>),
}

impl Material {
    /// What OMS calls the method.
    pub fn method(&self) -> &'static str {
        match self {
            Self::PublicKey(_) => "key",
            Self::CertificateChain(_) => "certificate",
            Self::Keyless { .. } => "sigstore",
        }
    }
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
    /// Another kind of file.
    #[error("{path} is no bundle: {what} (OMS 4)")]
    NoBundle {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// Something else is where the bundle is to be written. It stays.
    #[error("{0} exists and is not a bundle")]
    Occupied(PathBuf),
    /// A link is where the bundle is to be written.
    #[error("{0} is a symbolic link; name the file that it leads to, or another one")]
    Link(PathBuf),
    /// Larger than what was expected.
    #[error("the bundle is larger than {0} bytes (a limit of omsign)")]
    TooLarge(u64),
    /// More than any signer would put in.
    #[error("the bundle has {count} {what}, more than {MOST} (a limit of omsign)")]
    TooMany {
        /// How many.
        count: usize,
        /// Of what.
        what: &'static str,
    },
    /// Another media type.
    #[error("the bundle's mediaType is {0:?}, not {MEDIA_TYPE:?} (OMS 8.1)")]
    MediaType(String),
    /// Another payload type.
    #[error("the envelope's payloadType is {0:?}, not {PAYLOAD_TYPE:?} (OMS 6.7)")]
    PayloadType(String),
    /// Not exactly one signature.
    #[error("the envelope has {0} signatures instead of one (OMS 8.1)")]
    Signatures(usize),
    /// Not exactly one of publicKey, x509CertificateChain and certificate.
    #[error("the bundle's verificationMaterial names {0} signing methods instead of one (OMS 4.1)")]
    Methods(usize),
    /// A chain without certificates.
    #[error("the bundle's certificate chain is empty (OMS 4.1)")]
    EmptyChain,
    /// More than one log entry, or the same time stamp twice: each proves one thing.
    #[error("the bundle has {count} {what} instead of one (OMS 4.1)")]
    NotOne {
        /// How many.
        count: usize,
        /// Of what.
        what: &'static str,
    },
    /// A keyless bundle that is in no log.
    #[error("the bundle has a Fulcio certificate, but no transparency log entries (OMS 4.1)")]
    NoLogEntries,
    /// No payload or no signature.
    #[error("the bundle's {0} is empty (OMS 4)")]
    Empty(&'static str),
    /// Not base64.
    #[error("the bundle's {0} is not base64 (RFC 4648, 4)")]
    Base64(&'static str),
}

impl BundleError {
    /// Whether the bundle itself is wrong.
    pub fn found_wrong(&self) -> bool {
        !matches!(
            self,
            Self::Read { .. }
                | Self::Write { .. }
                | Self::Occupied(_)
                | Self::Link(_)
                | Self::TooLarge(_)
                | Self::TooMany { .. }
        )
    }
}
