//! What a caller sends to be signed, as far as it can be told what it is.

use std::sync::Arc;

use omsign_proto::v1::{LARGEST_STATEMENT_BYTES, sign_request};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::algorithm::Content;
use crate::key::KeyEntry;

/// A statement of more bytes takes as long to hash as some requests take in all.
const LONG: usize = 64 << 10;

/// What the key needs of what the caller wants signed, and how that is called: a statement may be long, and is not hashed
/// where everybody else waits.
pub(crate) async fn prepared(
    key: Arc<KeyEntry>,
    sent: Option<sign_request::Content>,
    deadline: Instant,
) -> Result<(Content, String), Status> {
    let is_long =
        matches!(&sent, Some(sign_request::Content::Statement(statement)) if statement.len() > LONG);
    let prepare = move || {
        let content = content(sent)?;
        key.takes(&content).map_err(Status::invalid_argument)?;
        let digest_hex = content.hex();
        Ok((key.needed(content), digest_hex))
    };
    if !is_long {
        return prepare();
    }
    match timeout_at(deadline, tokio::task::spawn_blocking(prepare)).await {
        Ok(Ok(prepared)) => prepared,
        Ok(Err(_)) => Err(Status::internal("the request was dropped")),
        Err(_) => Err(Status::deadline_exceeded("the statement could not be hashed in time")),
    }
}

/// What the caller wants signed, as far as can be said without knowing the key.
fn content(sent: Option<sign_request::Content>) -> Result<Content, Status> {
    match sent {
        Some(sign_request::Content::Digest(digest)) if matches!(digest.len(), 32 | 48 | 64) => {
            Ok(Content::Digest(digest))
        }
        Some(sign_request::Content::Digest(digest)) => Err(Status::invalid_argument(format!(
            "a digest of {} bytes; expected 32, 48 or 64",
            digest.len()
        ))),
        Some(sign_request::Content::Statement(statement)) if statement.len() <= LARGEST_STATEMENT_BYTES => {
            Ok(Content::Message(pae(&statement)))
        }
        Some(sign_request::Content::Statement(_)) => {
            Err(Status::invalid_argument("the statement is too long"))
        }
        None => Err(Status::invalid_argument("content is missing: set digest or statement")),
    }
}

/// What is recorded of a request that is denied.
pub(crate) fn digest_only(sent: Option<sign_request::Content>) -> Content {
    match sent {
        Some(sign_request::Content::Digest(digest)) if digest.len() <= 64 => Content::Digest(digest),
        _ => Content::Digest(Vec::new()),
    }
}

/// The pre-authentication encoding of a statement (DSSE protocol, "PAE").
fn pae(statement: &[u8]) -> Vec<u8> {
    const TYPE: &str = "application/vnd.in-toto+json";
    let head = format!("DSSEv1 {} {TYPE} {} ", TYPE.len(), statement.len());
    [head.as_bytes(), statement].concat()
}
