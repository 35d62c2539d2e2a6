//! Why an operator's command over a key was not carried out.

use super::certificate;
use crate::audit::AuditError;
use crate::token::TokenError;

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum KeyLifeError {
    /// The name is not in the configuration.
    #[error(
        "there is no [key.{name}] in the configuration that counts, but {known}: correct the name, or add it, and have an agent \
         that runs read it: omsign-agent key reload"
    )]
    NoKey {
        /// The name.
        name: String,
        /// Those that are there.
        known: String,
    },
    /// No key is to take its place.
    #[error("[key.{0}] has no `next`; begin with `omsign-agent key rotate {0}`")]
    NoNext(String),
    /// The name is not in the configuration.
    #[error("there is no [token.{0}] in the configuration")]
    NoToken(String),
    /// The device.
    #[error("token {token}: {error}")]
    Device {
        /// Its name.
        token: String,
        /// Why.
        error: TokenError,
    },
    /// It could be deleted on some of its tokens only.
    #[error(
        "token {token}: {error}; the key is gone from {gone}: to delete it on the others, too, name only those as the \
         token of [key.{key}]"
    )]
    Undeleted {
        /// The key's name.
        key: String,
        /// The token that it could not be deleted on.
        token: String,
        /// Why.
        error: TokenError,
        /// Where there is no key any more.
        gone: String,
    },
    /// A certificate that cannot be made or taken.
    #[error(transparent)]
    Certificate(#[from] certificate::CertificateError),
    /// DER.
    #[error("the public key cannot be encoded")]
    Der(#[from] der::Error),
    /// It was not recorded, so nothing is released.
    #[error(transparent)]
    Audit(#[from] AuditError),
}
