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

/// What an operator asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Every key on a token of this name, or on all.
    List(Option<String>),
    /// Something with a key, by its name in the configuration, with [`NEXT`] for its `next`: nothing else can be reached.
    Key(String, Action),
    /// Has an agent read its configuration anew; without one there is nothing to do.
    Reload,
}

/// What to do with a key.
#[derive(Debug, Serialize, Deserialize)]
pub enum Action {
    /// Makes it on the first of its tokens.
    Generate(Template),
    /// Its public half, which has to be the same on all of its tokens.
    Public(Need),
    /// A certificate request (PKCS#10, RFC 2986), signed by the key.
    Csr(Subject),
    /// A certificate by the key about itself, valid for so many days.
    SelfSign(Subject, u32),
    /// Keeps its certificate, PEM, beside it on the device.
    ImportCertificate(String),
    /// Proof of how it came to be.
    Attest(Asking),
    /// Deletes it and what belongs to it, if this is its public half as it was confirmed: SubjectPublicKeyInfo, PEM.
    /// Names may come to mean other keys.
    Delete(String),
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
        let (key, action) = match self {
            Self::List(Some(token)) => return vec![token],
            Self::List(None) => return config.tokens.keys().map(String::as_str).collect(),
            Self::Reload => return Vec::new(),
            Self::Key(key, action) => (key, action),
        };
        let found = config.keys.get(key.strip_suffix(NEXT).unwrap_or(key));
        let tokens = found.map(|key| key.tokens.as_slice()).unwrap_or_default();
        let everywhere =
            matches!(action, Action::Delete(_) | Action::Public(_) | Action::ImportCertificate(_));
        let all = if everywhere { tokens.len() } else { 1 };
        tokens.iter().take(all).map(String::as_str).collect()
    }
}

impl Action {
    /// What the record calls it; none where nothing is recorded.
    pub(super) fn recorded(&self) -> Option<&'static str> {
        Some(match self {
            Self::Public(_) => return None,
            Self::Generate(_) => "generate",
            Self::Csr(_) => "csr",
            Self::SelfSign(..) => "self-sign",
            Self::ImportCertificate(_) => "import-certificate",
            Self::Attest(_) => "attest",
            Self::Delete(_) => "delete",
        })
    }

    /// Whether it changes what is on the device: then the log has to work before it is begun.
    pub(super) fn changes(&self) -> bool {
        matches!(self, Self::Generate(_) | Self::ImportCertificate(_) | Self::Delete(_))
    }
}
