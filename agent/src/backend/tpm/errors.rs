//! What a TPM_RC means for the one who asked: decided here, once.

use tss_esapi::Error;
pub(super) use tss_esapi::constants::response_code::Tss2ResponseCodeKind as Code;

use crate::host::wire::{Class, Failure};

/// The class of a failure to do `what`. Whatever is not known to be somebody's fault counts as gone: after an
/// error of the transmission interface, a context answers nothing but errors.
pub(super) fn classify(what: &str, error: &Error) -> Failure {
    let message = format!("cannot {what}: {}", describe(error));
    let class = match error {
        Error::Tss2Error(_) => match code(error) {
            Some(
                Code::AuthFail | Code::BadAuth | Code::Lockout | Code::AuthMissing | Code::AuthUnavailable,
            ) => Class::Locked,
            Some(
                Code::Attributes
                | Code::Hash
                | Code::Value
                | Code::KeySize
                | Code::Type
                | Code::Handle
                | Code::Scheme
                | Code::Size
                | Code::Key
                | Code::Integrity
                | Code::Curve
                | Code::EccPoint
                | Code::Ticket
                | Code::Policy
                | Code::PolicyFail
                | Code::PolicyCc
                | Code::Parent
                | Code::AuthType
                | Code::Range
                | Code::Hierarchy
                | Code::Disabled
                | Code::NvSpace
                | Code::NvDefined,
            ) => Class::Refused,
            Some(
                Code::ObjectMemory
                | Code::SessionMemory
                | Code::SessionHandles
                // Somebody ended the session.
                | Code::ReferenceS0
                // Any register, of whatever bank (TPM 2.0 Part 3, 23.7).
                | Code::PcrChanged
                | Code::Memory
                | Code::Retry
                | Code::Yielded
                | Code::Testing
                | Code::NvRate,
            ) => Class::Busy,
            _ => Class::Gone,
        },
        Error::WrapperError(_) => Class::Refused,
    };
    Failure { class, message }
}

/// The same of a key or session that the TPM does not let go of: whatever the reason, there is room for three. Another process
/// begins without any.
pub(super) fn kept(what: &str, error: &Error) -> Failure {
    Failure { class: Class::Gone, ..classify(what, error) }
}

/// What the TPM, or the way to it, answered.
pub(super) fn code(error: &Error) -> Option<Code> {
    let Error::Tss2Error(code) = error else { return None };
    code.kind()
}

/// The same where a key that was found is used. Its handle is of nothing when somebody took the key from the TPM: then it is
/// looked for anew.
pub(super) fn using(what: &str, error: &Error) -> Failure {
    let failure = classify(what, error);
    match code(error) {
        Some(Code::Handle) => Failure {
            class: Class::Gone,
            message: format!("{}: the key is not in the TPM any more", failure.message),
        },
        _ => failure,
    }
}

/// Whether a TPM does not know what a key is to be.
pub(super) fn is_about_parameters(error: &Error) -> bool {
    use Code::{Curve, KeySize, Value};
    matches!(code(error), Some(Curve | KeySize | Value))
}

/// The same where the owner hierarchy's value is asked for: that it is missing is no reason to lock our own keys.
pub(super) fn owners(what: &str, error: &Error) -> Failure {
    let failure = classify(what, error);
    match failure.class {
        Class::Locked => {
            let message = format!(
                "{} of the owner hierarchy; owner_auth = … is missing, cannot be read (the log says why), or is wrong",
                failure.message
            );
            Failure { class: Class::Refused, message }
        }
        _ => failure,
    }
}

/// In words, and as the number that `tpm2_rc_decode` explains.
pub(super) fn describe(error: &Error) -> String {
    match code(error) {
        Some(Code::AuthFail | Code::BadAuth) => "it refused the authorization value".to_owned(),
        Some(Code::Lockout) => "the TPM is in lockout after wrong authorization values".to_owned(),
        _ => error.to_string(),
    }
}
