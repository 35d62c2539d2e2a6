//! The one login. A PIN is offered once, and never when that could block the token.

use std::sync::{Mutex, PoisonError};

use cryptoki::context::{Function, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;

use super::super::{Doing, LAST_TRY, Notify, UNANSWERED, factory_pin, locked, refused};
use super::errors::{classify, is_throttled};
use crate::config::{PinSource, Profile};
use crate::host::wire::{Class, Failure, Fresh, OpenSpec};
use crate::pin::read_pin;
use crate::secret::Pin;

/// How a token was logged in to.
pub(super) enum Login {
    /// It was not: it asks for none.
    None,
    Pin(AuthPin),
    /// With a PIN that was entered on the device.
    OnDevice,
}

/// Logs in as the user, if the token asks for it, with the PIN given or else the configured one.
pub(super) fn log_in(
    session: &Session,
    info: &TokenInfo,
    profile: &Profile,
    spec: &OpenSpec,
    given: Option<Pin>,
    notify: Notify<'_>,
) -> Result<Login, Failure> {
    // Some tokens do not say that their keys ask for it, and some modules do that themselves.
    let none = given.is_none() && spec.token.pin == PinSource::None;
    if none && (!info.login_required() || profile.may_hold_pin) {
        return Ok(Login::None);
    }
    if info.user_pin_locked() {
        let how = "reset it with the security officer's PIN: omsign-agent unblock";
        return Err(locked(format!("its user PIN is blocked; {how}")));
    }
    if info.user_pin_final_try() && !spec.by_operator {
        return Err(locked(LAST_TRY.into()));
    }
    if spec.unanswered && info.user_pin_count_low() && !spec.by_operator {
        return Err(locked(UNANSWERED.into()));
    }
    // Nobody stands there when a token is opened by itself.
    let by_hand = given.is_none() && spec.token.pin == PinSource::Device && spec.by_operator;
    let login = match given {
        Some(pin) => fit(&pin, profile)?,
        None if by_hand && info.protected_authentication_path() => Login::OnDevice,
        None if by_hand => return Err(locked(NO_PAD.into())),
        None => {
            let source = &spec.token.pin;
            let pin = read_pin(source, spec.token.timeout).map_err(|reason| source.unread(reason))?;
            fit(&pin, profile)?
        }
    };
    // The agent has to know before the token does: a module that hangs or crashes now may have counted a try.
    notify(Doing::LogsIn);
    match session.login(UserType::User, login.pin()) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
        Err(Error::Pkcs11(RvError::PinIncorrect, _)) => {
            let form = match profile.pin.as_str() {
                "" => String::new(),
                form => format!(" (for this device, {form})"),
            };
            return Err(locked(format!("it refused the PIN; correct the PIN{form}, then unlock it")));
        }
        Err(Error::Pkcs11(RvError::FunctionCanceled | RvError::FunctionRejected, _)) if by_hand => {
            return Err(locked(
                "no PIN was entered on the device; unlock it again, and enter it there".into(),
            ));
        }
        Err(Error::Pkcs11(RvError::UserPinNotInitialized, _)) => {
            // There was none that it could have been compared with.
            notify(Doing::LoggedIn);
            let message = "its user PIN was never set; initialize it with the vendor's tool";
            return Err(locked(message.into()));
        }
        // Modules that have it from a server say so of whatever went wrong there, a wrong PIN too.
        Err(error @ Error::Pkcs11(RvError::UserTypeInvalid, _)) => {
            return Err(locked(classify("log in", &error).message));
        }
        Err(error) if is_throttled(profile, &error) => {
            return Err(Failure { class: Class::Busy, ..classify("log in", &error) });
        }
        // There is no second try where the first may have counted.
        Err(error) => return Err(classify("log in", &error)),
    }
    notify(Doing::LoggedIn);
    Ok(login)
}

impl Login {
    fn pin(&self) -> Option<&AuthPin> {
        match self {
            Self::Pin(pin) => Some(pin),
            Self::None | Self::OnDevice => None,
        }
    }
}

fn fit(pin: &Pin, profile: &Profile) -> Result<Login, Failure> {
    is_fit(pin, profile)?;
    Ok(Login::Pin(AuthPin::new(pin.expose().into())))
}

const NO_PAD: &str = "nothing says that a PIN can be entered on it (CKF_PROTECTED_AUTHENTICATION_PATH); write pin = \"prompt\"";

/// A PIN that not everybody knows.
pub(super) fn is_fit(pin: &Pin, profile: &Profile) -> Result<(), Failure> {
    match profile.factory_pins.get(pin.expose()) {
        Some(how) => Err(factory_pin(how)),
        None => Ok(()),
    }
}

/// The security officer logs in, once, and sets the user's PIN.
pub(super) fn set_pin(session: &Session, info: &TokenInfo, pin: &Pin, fresh: &Fresh) -> Result<(), Failure> {
    if info.so_pin_locked() {
        let message = "its security officer's PIN is blocked, too: only a token that is made anew helps";
        return Err(refused(message.into()));
    }
    let shown = session.login(UserType::So, Some(&AuthPin::new(fresh.puk.as_str().into())));
    shown.map_err(|error| match error {
        Error::Pkcs11(RvError::PinIncorrect, _) => refused("it refused the security officer's PIN".into()),
        error => classify("log in as the security officer", &error),
    })?;
    let set = session.init_pin(&AuthPin::new(pin.expose().into()));
    set.map_err(|error| classify("set the user's PIN", &error))
}

/// The PIN for keys that ask for it before every signature (CKA_ALWAYS_AUTHENTICATE). It was accepted once;
/// refused now, it is offered to no other session.
pub(super) struct Again {
    login: Login,
    refused: Mutex<bool>,
    pkcs11: Pkcs11,
    slot: Slot,
}

impl Again {
    pub(super) fn new(pkcs11: &Pkcs11, slot: Slot, login: Login) -> Self {
        Self { login, refused: Mutex::new(false), pkcs11: pkcs11.clone(), slot }
    }

    /// Whether somebody is logged in.
    pub(super) fn is_logged_in(&self) -> bool {
        !matches!(self.login, Login::None)
    }

    /// Why there is no PIN to show again.
    pub(super) fn is_able(&self) -> Result<(), &'static str> {
        match self.login {
            Login::Pin(_) => Ok(()),
            Login::None => Err("its token asks for none"),
            Login::OnDevice => Err("nobody enters one on the device each time; write pin = \"prompt\""),
        }
    }

    /// Logs in for the operation that the session has begun (PKCS#11 v3.0, 5.6.8, CKU_CONTEXT_SPECIFIC).
    pub(super) fn log_in(&self, session: &Session, notify: Notify<'_>) -> Result<(), Error> {
        let refusal = Error::Pkcs11(RvError::PinIncorrect, Function::Login);
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pin) = self.login.pin().filter(|_| !*refused) else { return Err(refusal) };
        // Somebody may have changed it, and entered wrong ones, since it was accepted.
        if self.pkcs11.get_token_info(self.slot)?.user_pin_final_try() {
            return Err(Error::Pkcs11(RvError::PinLocked, Function::GetTokenInfo));
        }
        // The agent has to know before the token does, as above.
        notify(Doing::LogsIn);
        let answer = session.login(UserType::ContextSpecific, Some(pin));
        *refused = answer.as_ref().is_err_and(may_have_counted);
        // Whatever else goes wrong after a refusal, no other process is to offer it.
        if !*refused {
            notify(Doing::LoggedIn);
        }
        answer
    }
}

/// Whether the PIN was not offered again since a wrong one would be the last. No module has this of its own.
pub(super) fn is_last_try(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::PinLocked, Function::GetTokenInfo))
}

/// Whether the token may have counted a try: only the vendor knows, but where the PIN did not get as far as the token, or
/// none was asked for.
pub(super) fn may_have_counted(error: &Error) -> bool {
    let Error::Pkcs11(code, Function::Login) = error else { return false };
    !matches!(
        code,
        RvError::DeviceRemoved
            | RvError::TokenNotPresent
            | RvError::SessionHandleInvalid
            | RvError::SessionClosed
            | RvError::OperationNotInitialized
            | RvError::UserAlreadyLoggedIn
            | RvError::UserTypeInvalid
            | RvError::FunctionNotSupported
            // There was no session of the device's to try it in.
            | RvError::SessionCount
    )
}

/// What `doctor` tells about a token's PIN and limits.
pub(super) fn notes(info: &TokenInfo) -> Vec<String> {
    let flags = [
        (!info.login_required(), "needs no login"),
        (!info.user_pin_initialized(), "its user PIN was never set"),
        (info.user_pin_count_low(), "a wrong PIN was entered since the last login"),
        (info.user_pin_final_try(), "one wrong PIN more blocks it"),
        (info.user_pin_locked(), "its user PIN is blocked"),
        (info.protected_authentication_path(), "its PIN can be entered on the device (pin = \"device\")"),
        (info.write_protected(), "is write-protected"),
    ];
    flags.into_iter().filter(|(set, _)| *set).map(|(_, note)| note.to_owned()).collect()
}
