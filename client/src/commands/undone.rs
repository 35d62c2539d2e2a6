//! What is said about a model that was not signed, as JSON: what a script can do about it.

use omsign::Error;
use omsign::agent::AgentError;
use serde_json::json;
use tonic::Code;

use super::{Done, Failure};
use crate::report;

/// Prints it. It grows by fields and reasons; what is there keeps its meaning.
pub(super) fn print(failure: &Failure) -> Done {
    // The result was lost on its way to where this would go, too.
    if matches!(failure, Failure::Unprinted(_)) {
        return Ok(());
    }
    let (reason, retry) = reason(failure);
    report::json(&json!({ "signed": false, "reason": reason, "retry": retry, "error": failure.text() }))
}

/// Why, in a word, and whether the same again may work without anybody's doing.
fn reason(failure: &Failure) -> (&'static str, bool) {
    let error = match failure {
        Failure::Usage(_) => return ("usage", false),
        Failure::Wrong(_) => return ("model", false),
        Failure::Undone(error) => error,
        Failure::NotReady | Failure::Unprinted(_) => return ("other", false),
    };
    match error {
        Error::Agent(AgentError::NotRunning { .. } | AgentError::Broken(_)) => ("unreachable", true),
        Error::Agent(AgentError::NoPermission(_) | AgentError::Untrusted { .. }) => ("denied", false),
        Error::Agent(AgentError::KeyNotReady { locked: true, .. }) => ("locked", false),
        Error::Agent(AgentError::KeyNotReady { .. }) => ("unavailable", true),
        Error::Agent(AgentError::Status(status)) => match status.code() {
            Code::PermissionDenied => ("denied", false),
            Code::NotFound => ("unknown-key", false),
            Code::ResourceExhausted => ("busy", true),
            Code::Unavailable | Code::DeadlineExceeded => ("unavailable", true),
            _ => ("other", false),
        },
        Error::Model(_) | Error::Hash(_) => ("model", false),
        _ => ("other", false),
    }
}
