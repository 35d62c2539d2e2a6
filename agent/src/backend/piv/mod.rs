//! PIV keys on a YubiKey. Every step is a short transaction of its own, so that ykman and others can use the card in
//! between; what they undo (the selected application, the verified PIN) is done again. An idle card is let go of, since
//! gpg wants one for itself.

mod connect;
mod errors;
mod keys;
mod life;
mod line;
mod login;
mod survey;

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use yubikey::{PinPolicy, TouchPolicy, YubiKey, piv};

use self::connect::{connect, connect_again, in_use};
use self::errors::classify;
pub(crate) use self::errors::holder;
use self::keys::Key;
use self::survey::{factorys, is_factorys};
pub(super) use self::survey::{prepare, survey, unblock};
use super::{Device, Doing, LAST_TRY, Notify, PROBE_EVERY, Signer, gone, locked, open_keys, refused, usable};
use crate::algorithm::{Algorithm, Content};
use crate::host::task::{Done, Task};
use crate::host::wire::{Class, Failure, OpenSpec, Opened};
use crate::secret::Pin;
use crate::verifier::Verifier;

/// How long a touch counts for a key whose touch policy is "cached" (Yubico, "PIN and touch policies").
const CACHED: Duration = Duration::from_secs(15);

/// What every YubiKey has when it is new (Yubico, "PIV").
const FACTORY_PIN: &[u8] = b"123456";

/// In bytes (NIST SP 800-73-4, part 2, 2.4.3). One of another length is not shown to a card, which would count it.
const LONGEST_PIN: usize = 8;
const SHORTEST_PIN: usize = 6;

/// An idle card is let go of after this long: connecting takes a few of its commands.
const LET_GO: Duration = Duration::from_secs(2);

/// A signature that needs no finger takes less, on curves; on the largest RSA keys, a few times this.
const QUICK: Duration = Duration::from_millis(500);

/// A card that refuses after this long waited for a finger; without one it refuses at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// A card whose PIN was accepted.
struct OpenPiv {
    held: Mutex<Held>,
    /// In the order of the configuration; none where the key cannot be used.
    keys: Vec<Option<Key>>,
}

/// The card, and what is known of it while it is let go of.
struct Held {
    yubikey: Option<YubiKey>,
    last_used: Instant,
    known: Known,
}

struct Known {
    serial: u32,
    /// Where the card was when it was opened.
    reader: String,
    /// Keys of slot 9c want it before every signature.
    pin: Option<Pin>,
    /// Since the card was connected; pcscd switches one off that nobody uses.
    verified: bool,
    /// When the card began to wait for the last one.
    last_touch: Option<Instant>,
}

/// What whoever waits is told.
fn touch_me(serial: u32) -> String {
    format!("touch your YubiKey (serial {serial})")
}

/// A card that is connected.
struct Card<'a> {
    yubikey: &'a mut YubiKey,
    known: &'a mut Known,
}

/// Connects, verifies the PIN once, and reads every key's metadata. Keys that need no touch sign a challenge.
pub(super) fn open(
    serial: u32,
    spec: &OpenSpec,
    pin: Option<Pin>,
    notify: Notify<'_>,
) -> Result<(Box<dyn Device>, Opened), Failure> {
    let mut yubikey = connect(serial)?;
    let device = format!("YubiKey (serial {serial}, firmware {})", yubikey.version());
    for (_, note) in factorys(&mut yubikey) {
        tracing::warn!(card = serial, "{note}");
    }
    let pin = login::verified(&mut yubikey, spec, pin, notify)?;
    let reader = yubikey.name().to_owned();
    let mut known = Known { serial, reader, verified: pin.is_some(), pin, last_touch: None };
    let mut card = Card { yubikey: &mut yubikey, known: &mut known };
    let (keys, public) =
        open_keys(&spec.keys, |key| keys::find(&mut card, &key.object, key.padding, notify))?;
    let always = |key: &Key| key.touch == TouchPolicy::Always;
    let touch = keys.iter().enumerate().filter(|(_, key)| key.as_ref().is_some_and(always));
    let touch = touch.map(|(index, _)| (index, touch_me(serial))).collect();
    let opened = Opened { device, sessions: 1, keys: public, touch };
    let held = Held { yubikey: Some(yubikey), last_used: Instant::now(), known };
    Ok((Box::new(OpenPiv { held: Mutex::new(held), keys }), opened))
}

impl Held {
    /// The card, connected again where it was let go of.
    fn card(&mut self) -> Result<Card<'_>, Failure> {
        self.used();
        let Self { yubikey, known, .. } = self;
        let yubikey = match yubikey.take() {
            Some(connected) => yubikey.insert(connected),
            // That another program has it for a while is no reason to start over, which may need a person's PIN.
            None => yubikey.insert(connect_again(known).map_err(|failure| match failure {
                Failure { class: Class::Busy, message } => refused(message),
                other => other,
            })?),
        };
        Ok(Card { yubikey, known })
    }

    fn used(&mut self) {
        self.last_used = Instant::now();
    }

    fn let_go(&mut self) {
        if let Some(yubikey) = self.yubikey.take() {
            let _ = yubikey.disconnect(pcsc::Disposition::LeaveCard);
        }
        (self.known.verified, self.known.last_touch) = (false, None);
    }
}

impl Card<'_> {
    /// Selects our application again, and connects again after a reset; neither costs a try. Not the crate's own way
    /// to connect again: it offers the PIN without a look at the tries that are left. Returns those.
    fn renew(&mut self) -> Result<u8, Failure> {
        let tries = match self.yubikey.get_pin_retries() {
            Err(yubikey::Error::PcscError { inner: Some(pcsc::Error::ResetCard) }) => {
                let old = std::mem::replace(self.yubikey, connect_again(self.known)?);
                // Dropped, it would reset the card once more.
                let _ = old.disconnect(pcsc::Disposition::LeaveCard);
                self.known.last_touch = None;
                self.yubikey.get_pin_retries()
            }
            asked => asked,
        };
        // To select it again takes the PIN back.
        self.known.verified = false;
        tries.map_err(|error| classify("select the PIV application", &error))
    }

    /// Signs; does again what other programs undid, once.
    fn sign(&mut self, key: &Key, input: &[u8], notify: Notify<'_>) -> Result<Vec<u8>, Failure> {
        match key.pin {
            PinPolicy::Always => self.may_verify()?,
            // A card may wait for a finger before it asks for the PIN.
            PinPolicy::Once if !self.known.verified => self.verify_again(notify)?,
            _ => {}
        }
        let (started, waits) = (Instant::now(), self.waits_for_touch(key));
        if waits {
            notify(Doing::AwaitsTouch(&touch_me(self.known.serial)));
        }
        let error = match self.attempt(key, input, notify)? {
            Ok(signature) => return Ok(signature),
            Err(error) => error,
        };
        match error {
            // Without a touch to wait for, it was another program that had the card.
            yubikey::Error::AuthenticationError if waits && started.elapsed() >= PATIENCE => {
                return Err(refused("nobody touched it in time".into()));
            }
            // Another program reset the card, as most do when they end, or used it.
            yubikey::Error::PcscError { inner: Some(pcsc::Error::ResetCard) }
            | yubikey::Error::AuthenticationError
            | yubikey::Error::GenericError => {}
            yubikey::Error::SizeError if key.algorithm == Algorithm::Ed25519 => {
                let length = input.len();
                return Err(refused(format!(
                    "the statement has {length} bytes, more than the card takes for an Ed25519 key; use a P-256 key"
                )));
            }
            error => return Err(classify("sign", &error)),
        }
        match key.pin {
            PinPolicy::Never => drop(self.renew()?),
            PinPolicy::Always => self.may_verify()?,
            _ => self.verify_again(notify)?,
        }
        // What it knew of a touch may be gone.
        if !waits && self.waits_for_touch(key) {
            notify(Doing::AwaitsTouch(&touch_me(self.known.serial)));
        }
        self.attempt(key, input, notify)?.map_err(|error| classify("sign", &error))
    }

    /// Whether the card may be shown the PIN that it accepted before: somebody may have changed it, and entered wrong ones.
    fn may_verify(&mut self) -> Result<(), Failure> {
        if self.renew()? <= 1 && self.known.pin.is_some() { Err(locked(LAST_TRY.into())) } else { Ok(()) }
    }

    fn verify_again(&mut self, notify: Notify<'_>) -> Result<(), Failure> {
        self.may_verify()?;
        self.verify(notify).map_err(|error| classify("verify the PIN", &error))
    }

    /// Inside, what may have been another program's doing. That a PIN was not accepted is not: the card may have counted it.
    fn attempt(
        &mut self,
        key: &Key,
        input: &[u8],
        notify: Notify<'_>,
    ) -> Result<Result<Vec<u8>, yubikey::Error>, Failure> {
        if key.pin == PinPolicy::Always {
            match self.verify(notify) {
                Ok(()) => {}
                // The card was not shown it.
                Err(reset @ yubikey::Error::PcscError { inner: Some(pcsc::Error::ResetCard) }) => {
                    return Ok(Err(reset));
                }
                Err(error) => return Err(classify("verify the PIN", &error)),
            }
        }
        Ok(self.attempt_verified(key, input))
    }

    fn attempt_verified(&mut self, key: &Key, input: &[u8]) -> Result<Vec<u8>, yubikey::Error> {
        let started = Instant::now();
        let signature = if key.algorithm == Algorithm::Ed25519 {
            line::sign_message(self.yubikey, key.slot, input)?
        } else {
            piv::sign_data(self.yubikey, input, key.algorithm_id, key.slot)?.to_vec()
        };
        // One that was quick waited for nobody: a touch before it still counted, for how long only the card knows.
        let is_rsa = matches!(key.algorithm, Algorithm::RsaPkcs1 | Algorithm::RsaPss);
        let quick = if is_rsa { PATIENCE } else { QUICK };
        if key.touch != TouchPolicy::Never && started.elapsed() >= quick {
            self.known.last_touch = Some(started);
        }
        Ok(signature)
    }

    /// The PIN was accepted before. Refused now, somebody changed it: that is the last time it is offered.
    fn verify(&mut self, notify: Notify<'_>) -> Result<(), yubikey::Error> {
        match &self.known.pin {
            Some(pin) => {
                // The agent has to know before the card does.
                notify(Doing::LogsIn);
                let verified = self.yubikey.verify_pin(pin.expose().as_bytes());
                if verified.is_ok() {
                    notify(Doing::LoggedIn);
                }
                if matches!(verified, Err(yubikey::Error::WrongPin { .. })) {
                    self.known.pin = None;
                }
                self.known.verified = verified.is_ok();
                verified
            }
            // Without a PIN the key says itself that it wants one.
            None => Ok(()),
        }
    }

    /// Whether the next signature of this key needs a finger.
    fn waits_for_touch(&self, key: &Key) -> bool {
        match key.touch {
            TouchPolicy::Default | TouchPolicy::Never => false,
            TouchPolicy::Always => true,
            TouchPolicy::Cached => self.known.last_touch.is_none_or(|last| last.elapsed() >= CACHED),
        }
    }
}

impl Device for OpenPiv {
    fn signers(&self) -> Result<Vec<Box<dyn Signer + '_>>, Failure> {
        Ok(vec![Box::new(self)])
    }

    fn verifier(&self, key: usize) -> Option<&Verifier> {
        usable(&self.keys, key).ok().map(|key| &key.verifier)
    }

    fn rests(&self) -> Duration {
        LET_GO
    }

    fn probe(&self) -> Result<(), Failure> {
        let mut held = self.held();
        if held.last_used.elapsed() < LET_GO {
            return Ok(());
        }
        // What it is asked connects it again.
        if held.yubikey.is_none() && held.last_used.elapsed() >= PROBE_EVERY {
            match held.card() {
                Ok(mut card) => self.ask(&mut card)?,
                Err(Failure { class: Class::Refused, .. }) => {}
                Err(failure) => return Err(failure),
            }
        }
        held.let_go();
        Ok(())
    }

    fn operate(&self, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
        let mut held = self.held();
        let mut card = held.card()?;
        // Other programs may have used it since.
        card.renew()?;
        let offered = Cell::new(false);
        let notify = |doing: Doing<'_>| {
            match doing {
                Doing::LogsIn => offered.set(true),
                Doing::LoggedIn => offered.set(false),
                Doing::AwaitsTouch(_) => {}
            }
            notify(doing);
        };
        let done = life::operate(&mut card, task, &notify).map_err(|failure| match failure.class {
            // That it answers shows that nobody has to start over, which may need a person's PIN; unless nobody knows what
            // became of one.
            Class::Gone if !offered.get() && card.renew().is_ok() => {
                refused(format!("{failure}; another program may have used the card meanwhile: try again"))
            }
            _ => failure,
        });
        held.used();
        done
    }

    fn close(self: Box<Self>) {}
}

impl OpenPiv {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is still there.
    fn ask(&self, card: &mut Card<'_>) -> Result<(), Failure> {
        let Some(Some(key)) = self.keys.iter().find(|key| key.is_some()) else { return Ok(()) };
        match piv::metadata(card.yubikey, key.slot) {
            // Another program may have selected its own application, or reset the card: it is there.
            Ok(_)
            | Err(yubikey::Error::GenericError | yubikey::Error::NotSupported)
            | Err(yubikey::Error::PcscError { inner: Some(pcsc::Error::ResetCard) }) => Ok(()),
            Err(error) => Err(gone(classify("ask the card", &error).message)),
        }
    }
}

/// For the one thread that signs.
impl Signer for &OpenPiv {
    fn sign(&mut self, key: usize, content: &Content, notify: Notify<'_>) -> Result<Vec<u8>, Failure> {
        let key = usable(&self.keys, key)?;
        let input = key.input(content)?;
        let mut held = self.held();
        let signature = held.card()?.sign(key, &input, notify)?;
        held.used();
        Ok(signature)
    }
}
