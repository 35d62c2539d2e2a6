//! PKCS#11 tokens: opened once, logged in once, every key checked, then signed with.

mod errors;
mod generate;
mod life;
mod login;
mod objects;
mod signer;
mod turn;
mod ways;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Info as LibraryInfo, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::object::AttributeType;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;

use self::errors::{classify, describe};
use self::login::Again;
use self::objects::{Found, find_key};
use self::signer::Signer;
use self::ways::Ways;
use super::{Device, Notify, PROBE_EVERY, gone, locked, open_keys, refused};
use crate::config::{ObjectSelector, PinSource, Profile, TokenSelector};
use crate::host::task::{Done, Task};
use crate::host::wire::{Class, Failure, Fresh, OpenSpec, Opened, Survey, SurveyedToken};
use crate::pin::read_pin;
use crate::secret::Pin;

/// A token that is logged in.
struct OpenToken {
    pkcs11: Pkcs11,
    slot: Slot,
    keys: Vec<Option<Key>>,
    sessions: usize,
    /// Whether operators' tasks have a thread of their own.
    beside: bool,
    /// Stays open so that the login outlives the other sessions: closing the last one logs out.
    anchor: Mutex<Session>,
    ways: Ways,
    profile: Profile,
    /// Whether the next process can log in as this one did, with nobody there.
    heals: bool,
    /// Since when signing has failed for want of memory, and when it did last.
    starved: Mutex<Option<(Instant, Instant)>>,
}

/// A key that passed its check.
struct Key {
    name: String,
    object: ObjectSelector,
    found: Found,
}

/// Loads the module, finds the token, logs in, finds every key and checks that its halves match.
pub(super) fn open(
    module: &Path,
    select: &TokenSelector,
    profile: &Profile,
    spec: &OpenSpec,
    pin: Option<Pin>,
    notify: Notify<'_>,
) -> Result<(Box<dyn Device>, Opened), Failure> {
    let heals = pin.is_none() && !spec.token.pin.is_by_hand();
    // Until it is open.
    let turn = turn::wait(profile);
    let pkcs11 = load(module)?;
    let (slot, info) = find_token(&pkcs11, select)?;
    let (pin, info, _turn) = match &spec.token.pin {
        source @ PinSource::Command(_) if pin.is_none() && !info.user_pin_locked() => {
            // A program may take its time to print it: others may open their tokens meanwhile, and what is known of the tries
            // that are left may change.
            drop(turn);
            let printed = read_pin(source, spec.token.timeout).map_err(|reason| source.unread(reason))?;
            let turn = turn::wait(profile);
            let info = pkcs11.get_token_info(slot).map_err(|error| classify("look at the token", &error))?;
            (Some(printed), info, turn)
        }
        _ => (pin, info, turn),
    };
    let anchor = open_session(&pkcs11, slot, profile).map_err(|error| classify("open a session", &error))?;
    let sessions = ways::sessions(spec.token.sessions, info.max_session_count(), profile);
    let one_only = || refused("the token allows one session at a time; two are needed".into());
    let sessions = sessions.ok_or_else(one_only)?;
    let again = Again::new(&pkcs11, slot, login::log_in(&anchor, &info, profile, spec, pin, notify)?);
    let ways = Ways::new(&pkcs11, slot, profile, again);
    let mut token_failure = None;
    let (keys, public) = open_keys(&spec.keys, |key| {
        // One of its own, in case that an operation that failed is left in it.
        let found = open_session(&pkcs11, slot, profile)
            .map_err(|error| classify("open a session", &error))
            .and_then(|session| find_key(&session, life::selector(key)?, key.padding, &ways, notify));
        let found = found.map_err(|failure| match failure.class {
            // One refused PIN is one try: the next process would offer it again to look for this key.
            Class::Locked => locked(format!("key {}: {failure}", key.name)),
            Class::Refused => failure,
            Class::Gone | Class::Busy => {
                let own = refused(failure.message.clone());
                token_failure.get_or_insert(failure);
                own
            }
        })?;
        let (name, object, public) = (key.name.clone(), life::selector(key)?.clone(), found.public.clone());
        Ok((Key { name, object, found }, public))
    })?;
    // A key that fails while others pass is that key's own affair; when none passes, the token's.
    if public.iter().all(Result::is_err)
        && let Some(failure) = token_failure
    {
        return Err(failure);
    }
    let beside = ways::operates_beside(info.max_session_count(), profile);
    let opened = Opened { device: device(&info), sessions, keys: public, touch: BTreeMap::new() };
    let (anchor, profile) = (Mutex::new(anchor), profile.clone());
    Ok((
        Box::new(OpenToken {
            pkcs11,
            slot,
            keys,
            sessions,
            beside,
            anchor,
            ways,
            profile,
            heals,
            starved: Mutex::default(),
        }),
        opened,
    ))
}

/// Makes a token in a slot that has none yet.
pub(super) fn prepare(module: &Path, fresh: &Fresh) -> Result<(), Failure> {
    let pkcs11 = load(module)?;
    let slots = pkcs11.get_slots_with_token().map_err(|error| classify("list slots", &error))?;
    let empty = |slot: &Slot| pkcs11.get_token_info(*slot).is_ok_and(|info| !info.token_initialized());
    let slot = slots
        .into_iter()
        .find(empty)
        .ok_or_else(|| refused("every slot of the module has a token".into()))?;
    let officer = AuthPin::new(fresh.puk.as_str().into());
    pkcs11.init_token(slot, &officer, &fresh.label).map_err(|error| classify("make the token", &error))?;
    let session = pkcs11.open_rw_session(slot).map_err(|error| classify("open a session", &error))?;
    session.login(UserType::So, Some(&officer)).map_err(|error| classify("log in", &error))?;
    let set = session.init_pin(&AuthPin::new(fresh.pin.as_str().into()));
    set.map_err(|error| classify("set the user's PIN", &error))
}

/// Has the security officer set the user's PIN (PKCS#11 v3.1, 5.5.7).
pub(super) fn unblock(
    module: &Path,
    select: &TokenSelector,
    profile: &Profile,
    pin: &Pin,
    fresh: &Fresh,
) -> Result<(), Failure> {
    login::is_fit(pin, profile)?;
    let pkcs11 = load(module)?;
    let (slot, info) = find_token(&pkcs11, select)?;
    let session = pkcs11.open_rw_session(slot).map_err(|error| classify("open a session", &error))?;
    login::set_pin(&session, &info, pin, fresh)
}

/// Looks at a module without logging in.
pub(super) fn survey(module: &Path, select: &TokenSelector) -> Result<Survey, Failure> {
    let pkcs11 = load(module)?;
    let library = library(&pkcs11)?;
    let selected = is_library(select, &library);
    let slots = pkcs11.get_slots_with_token().map_err(|error| classify("list slots", &error))?;
    let (mut tokens, mut empty) = (Vec::new(), Vec::new());
    for slot in slots {
        let Ok(info) = pkcs11.get_token_info(slot) else { continue };
        if !info.token_initialized() {
            empty.push(slot.id().to_string());
            continue;
        }
        tokens.push(SurveyedToken {
            slot: slot.id(),
            label: info.label().to_owned(),
            device: device(&info),
            selected: selected && selects(&pkcs11, select, slot, &info),
            factory: Vec::new(),
            wants_login: info.login_required(),
            has_pad: info.protected_authentication_path(),
            tries: None,
            has_owner_auth: false,
            objects: Vec::new(),
            notes: login::notes(&info),
        });
    }
    let empty = match empty.as_slice() {
        [] => String::new(),
        slots => format!("; not initialized: slot {}", slots.join(", ")),
    };
    Ok(Survey { library: format!("module {}: {}{empty}", module.display(), shown(&library)), tokens })
}

impl Device for OpenToken {
    fn signers(&self) -> Result<Vec<Box<dyn super::Signer + '_>>, Failure> {
        let signer = |_| Signer::new(self).map(|signer| Box::new(signer) as Box<dyn super::Signer>);
        (0..self.sessions).map(signer).collect()
    }

    fn rests(&self) -> Duration {
        self.profile.keep_alive_s.map_or(PROBE_EVERY, Duration::from_secs)
    }

    fn probe(&self) -> Result<(), Failure> {
        let asked = match self.profile.keep_alive_s {
            // The device itself has to hear of it, and within the login.
            Some(_) => {
                let anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
                anchor.generate_random_slice(&mut [0])
            }
            None => self.pkcs11.get_token_info(self.slot).map(drop),
        };
        asked.map_err(|error| gone(format!("the token no longer answers: {}", describe(&error))))?;
        // Somebody may have deleted a key: whoever asks is to know before they sign. Not where all keys would be lost for it.
        if !self.heals {
            return Ok(());
        }
        let anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        let deleted = |key: &&Key| {
            let shown = anchor.get_attributes(key.found.handle, &[AttributeType::Class]);
            matches!(shown, Err(Error::Pkcs11(RvError::ObjectHandleInvalid | RvError::KeyHandleInvalid, _)))
        };
        match self.keys.iter().flatten().find(deleted) {
            Some(key) => Err(gone(format!("key {} is not on it any more", key.name))),
            None => Ok(()),
        }
    }

    fn operates_beside(&self) -> bool {
        self.beside
    }

    fn operate(&self, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
        life::operate(self, task, notify)
    }

    /// Logs out and finalizes the module.
    fn close(self: Box<Self>) {
        drop(self.anchor);
        if let Err(error) = self.pkcs11.finalize() {
            tracing::debug!(%error, "C_Finalize");
        }
    }
}

/// A session to sign with.
fn open_session(pkcs11: &Pkcs11, slot: Slot, profile: &Profile) -> cryptoki::error::Result<Session> {
    if profile.only_writing_sessions { pkcs11.open_rw_session(slot) } else { pkcs11.open_ro_session(slot) }
}

fn load(module: &Path) -> Result<Pkcs11, Failure> {
    let shown = module.display();
    let pkcs11 = Pkcs11::new(module).map_err(|error| match error {
        Error::MissingSymbol(_) | Error::NullFunctionPointer => {
            refused(format!("{shown} is a library but not a PKCS#11 module: it has no C_GetFunctionList"))
        }
        Error::LibraryLoading(error) if error.to_string().contains("C_Get") => {
            refused(format!("{shown} is a library but not a PKCS#11 module: it has no C_GetFunctionList"))
        }
        Error::LibraryLoading(error) => refused(format!("{shown} cannot be loaded: {error}")),
        error => classify("load the module", &error),
    })?;
    // Without this flag SoftHSM crashes when several threads sign.
    pkcs11
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .map_err(|error| classify("initialize the module", &error))?;
    Ok(pkcs11)
}

fn find_token(pkcs11: &Pkcs11, wanted: &TokenSelector) -> Result<(Slot, TokenInfo), Failure> {
    let library = library(pkcs11)?;
    if !is_library(wanted, &library) {
        return Err(refused(format!("the module is {}, not one with {wanted}", shown(&library))));
    }
    let slots = pkcs11.get_slots_with_token().map_err(|error| classify("list slots", &error))?;
    let mut found = None;
    let mut others = Vec::new();
    for slot in slots {
        let Ok(info) = pkcs11.get_token_info(slot) else { continue };
        if !info.token_initialized() {
            continue;
        }
        if !selects(pkcs11, wanted, slot, &info) {
            others.push(format!("{:?}", info.label()));
        } else if found.replace((slot, info)).is_some() {
            let message =
                format!("two tokens match {wanted}; tell them apart with token = {{ serial = \"…\" }}");
            return Err(refused(message));
        }
    }
    found.ok_or_else(|| {
        others.sort();
        let present = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
        gone(format!("no token with {wanted} is present; tokens present: {present}"))
    })
}

fn library(pkcs11: &Pkcs11) -> Result<LibraryInfo, Failure> {
    pkcs11.get_library_info().map_err(|error| classify("ask the module", &error))
}

fn shown(library: &LibraryInfo) -> String {
    format!(
        "{} by {}, version {}",
        library.library_description().trim(),
        library.manufacturer_id().trim(),
        library.library_version()
    )
}

/// Whether what is asked for fits the text of a field padded with blanks (PKCS#11, 3.1).
fn same(wanted: &Option<String>, actual: &str) -> bool {
    wanted.as_ref().is_none_or(|wanted| wanted == unpadded(actual))
}

/// Without the blanks that PKCS#11 pads with, and what else some modules do (tpm2-pkcs11).
fn unpadded(text: &str) -> &str {
    text.trim_matches(['\0', ' '])
}

fn is_library(wanted: &TokenSelector, library: &LibraryInfo) -> bool {
    let version = library.library_version();
    same(&wanted.library_description, library.library_description())
        && same(&wanted.library_manufacturer, library.manufacturer_id())
        && wanted.library_version.is_none_or(|wanted| wanted == (version.major(), version.minor()))
}

fn selects(pkcs11: &Pkcs11, wanted: &TokenSelector, slot: Slot, info: &TokenInfo) -> bool {
    let in_slot = || {
        pkcs11.get_slot_info(slot).is_ok_and(|found| {
            same(&wanted.slot_description, found.slot_description())
                && same(&wanted.slot_manufacturer, found.manufacturer_id())
        })
    };
    same(&wanted.label, info.label())
        && same(&wanted.serial, info.serial_number())
        && same(&wanted.model, info.model())
        && same(&wanted.manufacturer, info.manufacturer_id())
        && wanted.slot.is_none_or(|id| id == slot.id())
        && (wanted.slot_description.is_none() && wanted.slot_manufacturer.is_none() || in_slot())
}

fn device(info: &TokenInfo) -> String {
    let (label, model) = (unpadded(info.label()), unpadded(info.model()));
    let serial = unpadded(info.serial_number());
    format!("{label} ({model}, serial {serial})")
}
