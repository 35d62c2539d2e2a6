//! Signs and verifies machine-learning models, and any other directory of files, in the OpenSSF Model Signing
//! (OMS) v1.0 format. The path of a signature: [`model`] (which files) → [`hash`] → [`manifest`] →
//! [`statement`] → [`dsse`] → [`agent`] or [`key`] (the signature) → [`trust`] (checked) → [`bundle`] (written).

pub mod address;
pub mod agent;
pub mod bundle;
pub mod certificate;
pub mod crl;
pub mod differences;
pub mod dsse;
pub mod files;
pub mod hash;
pub mod key;
pub mod keyless;
mod left_out;
mod lengths;
mod listing;
pub mod manifest;
pub mod manifest_file;
mod ml_dsa;
pub mod model;
mod object;
pub mod oneshot;
mod pairs;
mod parts;
pub mod path;
pub mod policy;
pub mod predicate;
pub mod proof;
mod provider;
mod replace;
pub mod selection;
mod sha256sum;
pub mod sign;
pub mod statement;
mod strength;
pub mod terms;
pub mod timestamp;
mod tls;
pub mod trust;
pub mod verify;
mod walk;
pub mod wanted;

/// Why something was not done, or was found wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's files.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// Reading and hashing them.
    #[error(transparent)]
    Hash(#[from] hash::HashError),
    /// Remembered digests.
    #[error(transparent)]
    Cache(#[from] hash::cache::CacheError),
    /// Files with manifests.
    #[error(transparent)]
    ManifestFile(#[from] manifest_file::ManifestFileError),
    /// The bundle file.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// The statement in it.
    #[error(transparent)]
    Statement(#[from] statement::StatementError),
    /// Its signature and signer.
    #[error(transparent)]
    Trust(#[from] trust::TrustError),
    /// The signed files are not the files that are there.
    #[error(transparent)]
    Differs(#[from] Box<differences::Differences>),
    /// The signed statement is about something else.
    #[error(transparent)]
    Subject(#[from] verify::SubjectError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] agent::AgentError),
    /// On which terms to trust.
    #[error(transparent)]
    Terms(#[from] terms::TermsError),
    /// The trust policy.
    #[error(transparent)]
    Policy(#[from] policy::PolicyError),
    /// A key or certificate file.
    #[error(transparent)]
    Key(#[from] key::KeyError),
}

/// A directory of the user's (XDG Base Directory Specification): what the variable says, or one below `HOME`.
fn user_directory(variable: &str, below_home: &str) -> Option<std::path::PathBuf> {
    let set = |name| std::env::var_os(name).map(std::path::PathBuf::from).filter(|path| path.is_absolute());
    set(variable).or_else(|| Some(set("HOME")?.join(below_home)))
}

/// An error with its causes, in one line. A message never repeats its cause, so the whole is the chain.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl Error {
    /// Whether the bundle or the model was checked and found wrong, as opposed to could not be checked.
    pub fn found_wrong(&self) -> bool {
        match self {
            Self::Model(error) => error.found_wrong(),
            Self::Subject(verify::SubjectError::Ambiguous(_)) => false,
            Self::Hash(hash::HashError::Changed(_)) | Self::Statement(_) | Self::Subject(_) => true,
            Self::Differs(differences) => !differences.none_known(),
            Self::Bundle(error) => error.found_wrong(),
            Self::Trust(error) => error.found_wrong(),
            Self::Hash(
                hash::HashError::Read { .. } | hash::HashError::Kernel(..) | hash::HashError::Threads(..),
            )
            | Self::Cache(_)
            | Self::ManifestFile(_)
            | Self::Agent(_)
            | Self::Terms(_)
            | Self::Policy(_)
            | Self::Key(_) => false,
        }
    }
}
