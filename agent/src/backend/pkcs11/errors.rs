//! What a CKR means for the one who asked: decided here, once.

use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};

use super::super::{LAST_TRY, locked};
use super::login::{is_last_try, may_have_counted};
use crate::config::Profile;
use crate::host::wire::{Class, Failure};

/// Whether a handle is stale, so that a fresh session and a fresh object handle may heal this.
pub(super) fn is_stale(error: &Error) -> bool {
    let stale = matches!(
        error,
        Error::Pkcs11(
            RvError::ObjectHandleInvalid
                | RvError::KeyHandleInvalid
                | RvError::SessionHandleInvalid
                | RvError::SessionClosed
                | RvError::OperationActive
                | RvError::OperationNotInitialized
                | RvError::FunctionCanceled
                | RvError::Cancel,
            _,
        )
    );
    stale && !may_have_counted(error)
}

/// The class of a failure to do `what`. Whatever is not known to be somebody's fault counts as gone: starting
/// over is the one cure that works for all modules.
pub(super) fn classify(what: &str, error: &Error) -> Failure {
    let mut message = format!("cannot {what}: {}", describe(error));
    let class = match error {
        error if is_last_try(error) => return locked(LAST_TRY.into()),
        // cryptoki's one call for all begins anew, which takes the login back.
        error if is_in_one_call_only(error) => {
            message += ": the module takes what it signs in one call only, and omsign cannot log in before that; use a key \
                        without CKA_ALWAYS_AUTHENTICATE there";
            Class::Refused
        }
        // Some modules take no PIN between C_SignInit and C_Sign: keys that ask for it each time cannot be used there.
        Error::Pkcs11(RvError::OperationNotInitialized | RvError::UserTypeInvalid, Function::Login) => {
            Class::Refused
        }
        error if may_have_counted(error) => Class::Locked,
        // A kind of key or an attribute that cryptoki does not know.
        Error::NotSupported => Class::Refused,
        Error::Pkcs11(code, function) if is_change(*function) && !is_of_device(code) => {
            if matches!(code, RvError::FunctionNotSupported | RvError::UserTypeInvalid) {
                message += ": the module does not let its users do that; use the device's own tools";
            }
            Class::Refused
        }
        Error::Pkcs11(code, _) => match code {
            RvError::PinIncorrect
            | RvError::PinInvalid
            | RvError::PinLenRange
            | RvError::PinExpired
            | RvError::PinLocked
            | RvError::UserPinNotInitialized => Class::Locked,
            RvError::SessionCount | RvError::HostMemory | RvError::DeviceMemory => Class::Busy,
            RvError::DataInvalid
            | RvError::DataLenRange
            | RvError::KeyFunctionNotPermitted
            | RvError::KeySizeRange
            | RvError::KeyTypeInconsistent
            | RvError::MechanismInvalid
            | RvError::MechanismParamInvalid
            | RvError::AttributeTypeInvalid
            | RvError::AttributeValueInvalid
            | RvError::AttributeSensitive
            | RvError::AttributeReadOnly
            | RvError::TemplateIncomplete
            | RvError::TemplateInconsistent
            | RvError::CurveNotSupported
            | RvError::DomainParamsInvalid
            | RvError::FunctionNotSupported
            | RvError::ActionProhibited
            | RvError::TokenWriteProtected
            | RvError::SessionReadOnly => Class::Refused,
            _ => Class::Gone,
        },
        _ => Class::Gone,
    };
    Failure { class, message }
}

/// Whether the device was asked for more than it does at a time, and did nothing.
pub(super) fn is_throttled(profile: &Profile, error: &Error) -> bool {
    profile.throttles && matches!(error, Error::Pkcs11(RvError::FunctionFailed, _))
}

/// Whether the module has no more memory.
pub(super) fn is_out_of_host_memory(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::HostMemory, _))
}

/// Whether a function makes, changes or removes objects. Of what they do not do, modules say so with whatever code comes to
/// mind; for that nobody's token is to be opened anew.
fn is_change(function: Function) -> bool {
    use Function::{CreateObject, DestroyObject, GenerateKeyPair};
    matches!(function, CreateObject | DestroyObject | GenerateKeyPair)
}

/// Whether a code is about the token, or the way to it.
fn is_of_device(code: &RvError) -> bool {
    matches!(
        code,
        RvError::CryptokiNotInitialized
            | RvError::DeviceError
            | RvError::DeviceRemoved
            | RvError::SessionClosed
            | RvError::SessionHandleInvalid
            | RvError::TokenNotPresent
            | RvError::TokenNotRecognized
            | RvError::UserNotLoggedIn
    )
}

/// Whether a mechanism takes nothing in parts (PKCS#11 v3.0, 2.3.6: CKM_ECDSA). SoftHSM and kryoptic say that no such
/// operation was begun, and then none is.
pub(super) fn is_in_one_call_only(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::OperationNotInitialized, Function::SignUpdate))
}

/// The C function and the name of its CKR, as vendors' documents and search engines know them.
pub(super) fn describe(error: &Error) -> String {
    let Error::Pkcs11(code, function) = error else { return error.to_string() };
    let mut name = String::from("CKR");
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    format!("C_{function:?} answered {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_classes() {
        let class = |code| classify("sign", &Error::Pkcs11(code, Function::Sign)).class;
        assert_eq!(class(RvError::DeviceRemoved), Class::Gone);
        assert_eq!(class(RvError::GeneralError), Class::Gone);
        assert_eq!(class(RvError::UserNotLoggedIn), Class::Gone);
        assert_eq!(class(RvError::PinIncorrect), Class::Locked);
        assert_eq!(class(RvError::PinLocked), Class::Locked);
        assert_eq!(class(RvError::DataLenRange), Class::Refused);
        assert_eq!(class(RvError::SessionCount), Class::Busy);
        assert_eq!(class(RvError::OperationNotInitialized), Class::Gone);
        assert_eq!((class(RvError::HostMemory), class(RvError::DeviceMemory)), (Class::Busy, Class::Busy));
        for function in [Function::CreateObject, Function::DestroyObject, Function::GenerateKeyPair] {
            let class = |code| classify("change", &Error::Pkcs11(code, function)).class;
            assert_eq!(
                (class(RvError::UserTypeInvalid), class(RvError::GeneralError)),
                (Class::Refused, Class::Refused)
            );
            assert_eq!(
                (class(RvError::DeviceRemoved), class(RvError::UserNotLoggedIn)),
                (Class::Gone, Class::Gone)
            );
        }
        let no_login = Error::Pkcs11(RvError::OperationNotInitialized, Function::Login);
        assert_eq!(classify("sign", &no_login).class, Class::Refused);
        // No fresh session is a reason to offer it again.
        let canceled = Error::Pkcs11(RvError::FunctionCanceled, Function::Login);
        assert_eq!((classify("sign", &canceled).class, is_stale(&canceled)), (Class::Locked, false));
        assert_eq!(classify("read attributes", &Error::NotSupported).class, Class::Refused);
    }

    #[test]
    fn the_message_names_step_and_c_function() {
        let failure = classify("sign", &Error::Pkcs11(RvError::DeviceRemoved, Function::Sign));
        assert_eq!(failure.message, "cannot sign: C_Sign answered CKR_DEVICE_REMOVED");
    }
}
