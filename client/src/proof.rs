//! What is proven about a signature.

use jiff::Timestamp;

use crate::key::Algorithm;

/// What is proven about a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Who signed.
    pub signer: Signer,
    /// How its key signs.
    pub algorithm: Algorithm,
    /// SHA-256 of the key's PEM, as in `publicKey.hint`.
    pub key_hint: String,
    /// A time at which the signature existed. Without one, certificates were valid when it was verified.
    pub signed_at: Option<SignedAt>,
    /// Whether CRLs were looked at.
    pub revocation_checked: bool,
    /// Whether they say that the time-stamp authorities are not revoked, either.
    pub authority_revocation_checked: bool,
    /// Time stamps that nothing is known about, because no authority was given.
    pub unchecked_timestamps: usize,
    /// Whether the bundle has entries of transparency logs that nobody looked at, as its method has no use for them.
    pub unchecked_log_entries: bool,
    /// Whether it is of release 0.2.0, and so a weaker promise.
    pub legacy: bool,
    /// The entry of the trust policy that accepted it, where there is one.
    pub accepted_by: Option<String>,
}

/// Who signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signer {
    /// Whoever has the key.
    Key,
    /// The owner of a certificate.
    Certificate {
        /// Its subject.
        subject: String,
        /// Its subject's alternative names.
        names: Vec<String>,
        /// SHA-256 of its DER.
        fingerprint: String,
    },
    /// A person or a workflow.
    Keyless {
        /// As the provider calls it.
        identity: String,
        /// Who vouches for it.
        identity_provider: String,
    },
}

/// A time at which a signature existed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedAt {
    /// The earliest that is proven.
    pub time: Timestamp,
    /// Who says so, for people.
    pub source: &'static str,
}
