//! The devices that can hold keys: a room each, and the only ones that name a hardware crate.

mod piv;
mod pkcs11;
mod tpm;

pub(crate) use self::piv::holder as card_holder;
pub(crate) use self::tpm::{attest as tpm_attestation, credential as tpm_credential};

use std::time::Duration;

use crate::algorithm::Content;
use crate::config::{self, PinSource};
use crate::host::task::{Done, Task};
use crate::host::wire::{Class, Failure, Fresh, KeySpec, OpenSpec, Opened, Survey};
use crate::pin::read_pin;
use crate::public_key::PublicKey;
use crate::secret::Pin;
use crate::verifier::Verifier;

/// How often an idle device is asked whether it is still there.
const PROBE_EVERY: Duration = Duration::from_secs(10);

/// Why a PIN is not offered while nobody knows whether a wrong one was counted.
const UNANSWERED: &str =
    "it may have counted a PIN that it did not answer; an operator has to unlock it with the right one";

/// Why a PIN is not offered although there is one.
const LAST_TRY: &str = "one wrong PIN more would block it; an operator has to unlock it with the right one";

/// What it is about while it does what it was asked for.
pub(crate) enum Doing<'a> {
    /// It waits for a person, who is told which device.
    AwaitsTouch(&'a str),
    /// The PIN is offered now. Whatever happens before `LoggedIn` may have cost a try.
    LogsIn,
    /// It was right, or did not get as far as the device.
    LoggedIn,
}

/// Told of it.
pub(crate) type Notify<'a> = &'a dyn Fn(Doing<'_>);

/// An open device: logged in, every key found and checked.
pub(crate) trait Device: Sync {
    /// What signs, one for each thread.
    fn signers(&self) -> Result<Vec<Box<dyn Signer + '_>>, Failure>;
    /// What checks the signatures of this key before they are answered, where another key could take its place unnoticed.
    fn verifier(&self, _key: usize) -> Option<&Verifier> {
        None
    }
    /// How long it may be left alone.
    fn rests(&self) -> Duration {
        PROBE_EVERY
    }
    /// Whether the device still answers. Asked when it is idle.
    fn probe(&self) -> Result<(), Failure>;
    /// Whether it does what operators ask for beside signing, in a thread of its own.
    fn operates_beside(&self) -> bool {
        false
    }
    /// Does what an operator asks for.
    fn operate(&self, task: &Task, notify: Notify<'_>) -> Result<Done, Failure>;
    /// Lets go of the device.
    fn close(self: Box<Self>);
}

/// One thread's way to the device's keys.
pub(crate) trait Signer: Send {
    /// Signs with the key of this index; the answer is as the bundle wants it.
    fn sign(&mut self, key: usize, content: &Content, notify: Notify<'_>) -> Result<Vec<u8>, Failure>;
}

/// Opens a device, logs in once, finds every key and has each sign a random challenge.
pub(crate) fn open(
    spec: &OpenSpec,
    pin: Option<Pin>,
    notify: Notify<'_>,
) -> Result<(Box<dyn Device>, Opened), Failure> {
    match &spec.token.device {
        config::Device::Pkcs11 { module, select, profile } => {
            pkcs11::open(module, select, profile, spec, pin, notify)
        }
        config::Device::Tpm(tcti) => tpm::open(tcti, spec, pin, notify),
        config::Device::Piv { serial } => piv::open(*serial, spec, pin, notify),
    }
}

/// Sets a PIN anew, whatever became of the old one.
pub(crate) fn unblock(token: &config::Token, fresh: &Fresh) -> Result<(), Failure> {
    match &token.device {
        config::Device::Pkcs11 { module, select, profile } => {
            pkcs11::unblock(module, select, profile, &new_pin(token, fresh)?, fresh)
        }
        config::Device::Piv { serial } => piv::unblock(*serial, &new_pin(token, fresh)?, fresh),
        config::Device::Tpm(_) => Err(refused(
            "a TPM ends its lockout with time, or with `tpm2_dictionarylockout --clear-lockout`; then unlock it"
                .into(),
        )),
    }
}

/// The one given, or else the configured one. A device would count what is empty as a wrong one.
fn new_pin(token: &config::Token, fresh: &Fresh) -> Result<Pin, Failure> {
    if fresh.puk.is_empty() {
        return Err(refused("it takes the security officer's PIN, or a card's PUK; none was given".into()));
    }
    Pin::new(fresh.pin.clone()).map_or_else(|| read_pin(&token.pin, token.timeout).map_err(refused), Ok)
}

/// A PIN that everybody knows signs nothing.
fn factory_pin(how_to_change: &str) -> Failure {
    let is = "its PIN is the one from the factory, which everybody knows";
    locked(format!("{is}; change it with {how_to_change}"))
}

/// Looks at a device without logging in, for `doctor`.
pub(crate) fn survey(token: &config::Token) -> Result<Survey, Failure> {
    match &token.device {
        config::Device::Pkcs11 { module, select, .. } => pkcs11::survey(module, select),
        config::Device::Tpm(tcti) => tpm::survey(tcti),
        config::Device::Piv { serial } => piv::survey(*serial),
    }
}

/// Gives a device that comes from the factory secrets of its own.
pub(crate) fn prepare(token: &config::Token, pin: Option<Pin>, fresh: &Fresh) -> Result<(), Failure> {
    match &token.device {
        config::Device::Pkcs11 { module, .. } => pkcs11::prepare(module, fresh),
        config::Device::Tpm(_) => Ok(()),
        config::Device::Piv { serial } => piv::prepare(*serial, pin, fresh),
    }
}

/// The PIN given, or else the configured one; none where none is configured.
fn pin_for(spec: &OpenSpec, given: Option<Pin>) -> Result<Option<Pin>, Failure> {
    match (given, &spec.token.pin) {
        (Some(pin), _) => Ok(Some(pin)),
        (None, PinSource::None) => Ok(None),
        (None, source) => {
            read_pin(source, spec.token.timeout).map(Some).map_err(|reason| source.unread(reason))
        }
    }
}

/// A key that can be used, by its index.
fn usable<K>(keys: &[Option<K>], index: usize) -> Result<&K, Failure> {
    keys.get(index).and_then(Option::as_ref).ok_or_else(|| refused("no such key".into()))
}

/// Keys in the order of the configuration: what signs with each, and what callers are told of it.
type Keys<K> = (Vec<Option<K>>, Vec<Result<PublicKey, String>>);

/// Opens each key. One that is refused is that key's own affair; any other failure is the device's, which is not
/// asked again: one refused PIN is one try.
fn open_keys<K>(
    keys: &[KeySpec],
    mut open: impl FnMut(&KeySpec) -> Result<(K, PublicKey), Failure>,
) -> Result<Keys<K>, Failure> {
    let (mut opened, mut public) = (Vec::new(), Vec::new());
    for key in keys {
        match open(key) {
            Ok((key, found)) => {
                opened.push(Some(key));
                public.push(Ok(found));
            }
            Err(failure) if failure.class != Class::Refused => return Err(failure),
            Err(failure) => {
                tracing::warn!(key = %key.name, reason = %failure, "key cannot be used");
                opened.push(None);
                public.push(Err(failure.message));
            }
        }
    }
    Ok((opened, public))
}

/// What a key signs to show that its two halves belong together.
fn challenge() -> Result<Vec<u8>, Failure> {
    let mut challenge = vec![0; 32];
    getrandom::fill(&mut challenge).map_err(|error| gone(format!("no random challenge: {error}")))?;
    Ok(challenge)
}

fn gone(message: String) -> Failure {
    Failure { class: Class::Gone, message }
}

pub(crate) fn refused(message: String) -> Failure {
    Failure { class: Class::Refused, message }
}

fn locked(message: String) -> Failure {
    Failure { class: Class::Locked, message }
}
