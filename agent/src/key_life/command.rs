//! What operators can ask for over a key's life, and what they get.

use serde::{Deserialize, Serialize};

use super::attestation::Attestation;
use super::certificate::Subject;
use crate::config::Config;
use crate::host::task::{Asking, Listed, Need, Template};

/// After a key's name: the key that is to take its place.
pub const NEXT: &str = "/next";

/// And so are those whose place a key took, where keys are listed.
pub const PREVIOUS: &str = "/previous";

/// What an operator asks for. Names are those of the configuration, with [`NEXT`] for a key's `next`: nothing else
/// can be reached.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Every key on a token, or on all.
    List {
        /// Name of the token.
        token: Option<String>,
    },
    /// Makes a key on the first of its tokens.
    Generate {
        /// Name of the key.
        key: String,
        /// What kind.
        template: Template,
    },
    /// The public half, which has to be the same on all of its tokens.
    Public {
        /// Name of the key.
        key: String,
        /// What for.
        need: Need,
    },
    /// A certificate request (PKCS#10, RFC 2986), signed by the key.
    Csr {
        /// Name of the key.
        key: String,
        /// Whose certificate it will be.
        subject: Subject,
    },
    /// A certificate by the key about itself.
    SelfSign {
        /// Name of the key.
        key: String,
        /// Whose certificate it is.
        subject: Subject,
        /// How long it is valid.
        days: u32,
    },
    /// Keeps the key's certificate beside it on the device.
    ImportCertificate {
        /// Name of the key.
        key: String,
        /// PEM.
        certificate: String,
    },
    /// Proof of how the key came to be.
    Attest {
        /// Name of the key.
        key: String,
        /// From whoever wants to know.
        asking: Asking,
    },
    /// Has an agent read its configuration anew; without one there is nothing to do.
    Reload,
    /// Deletes a key and what belongs to it.
    Delete {
        /// Name of the key.
        key: String,
        /// Its public half as it was confirmed: SubjectPublicKeyInfo, PEM. Names may come to mean other keys.
        public: String,
    },
}

/// What an operator gets.
#[derive(Debug, Serialize, Deserialize)]
pub enum Output {
    /// Public key, request or certificate.
    Pem(String),
    /// Keys, by token.
    Listed(Vec<TokenKeys>),
    /// How a key came to be.
    Attested(Box<Attestation>),
    /// Nothing but that it is done.
    Done,
}

/// The keys on one token.
#[derive(Debug, Serialize, Deserialize)]
pub struct TokenKeys {
    /// The token's name in the configuration.
    pub token: String,
    /// Its keys, or why it cannot say.
    pub keys: Result<Vec<Named>, String>,
}

/// A key on a token, and what callers name it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Named {
    /// Names in the configuration.
    pub names: Vec<String>,
    /// What the device shows.
    pub listed: Listed,
}

impl Command {
    /// The tokens that it is about.
    pub fn tokens<'a>(&'a self, config: &'a Config) -> Vec<&'a str> {
        let key = match self {
            Self::List { token: Some(token) } => return vec![token],
            Self::List { token: None } => return config.tokens.keys().map(String::as_str).collect(),
            Self::Reload => return Vec::new(),
            Self::Generate { key, .. }
            | Self::Public { key, .. }
            | Self::Csr { key, .. }
            | Self::SelfSign { key, .. }
            | Self::ImportCertificate { key, .. }
            | Self::Attest { key, .. }
            | Self::Delete { key, .. } => key,
        };
        let found = config.keys.get(key.strip_suffix(NEXT).unwrap_or(key));
        let tokens = found.map(|key| key.tokens.as_slice()).unwrap_or_default();
        let everywhere =
            matches!(self, Self::Delete { .. } | Self::Public { .. } | Self::ImportCertificate { .. });
        let all = if everywhere { tokens.len() } else { 1 };
        tokens.iter().take(all).map(String::as_str).collect()
    }

    /// What the record calls it, and the key; none where nothing is recorded.
    pub(super) fn recorded(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::List { .. } | Self::Public { .. } | Self::Reload => None,
            Self::Generate { key, .. } => Some(("generate", key)),
            Self::Csr { key, .. } => Some(("csr", key)),
            Self::SelfSign { key, .. } => Some(("self-sign", key)),
            Self::ImportCertificate { key, .. } => Some(("import-certificate", key)),
            Self::Attest { key, .. } => Some(("attest", key)),
            Self::Delete { key, .. } => Some(("delete", key)),
        }
    }

    /// Whether it changes what is on the device: then the log has to work before it is begun.
    pub(super) fn changes(&self) -> bool {
        matches!(self, Self::Generate { .. } | Self::ImportCertificate { .. } | Self::Delete { .. })
    }
}
