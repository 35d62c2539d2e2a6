//! TPM 2.0 keys: persistent handles and wrapped key files. A TPM does one thing at a time, so there is one
//! context, and, after anything unexpected, another process with another context.

pub(crate) mod attest;
pub(crate) mod credential;
mod errors;
mod guard;
mod keyfile;
mod keys;
mod life;
mod public;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::sync::{Mutex, PoisonError};

use tss_esapi::constants::{CapabilityType, PropertyTag, StartupType};
use tss_esapi::handles::{KeyHandle, ObjectHandle};
use tss_esapi::structures::{Auth, CapabilityData};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::{Context, WrapperErrorKind};

use self::errors::{Code, classify, code, describe};
use self::keys::Key;
use super::{Device, Doing, Notify, Signer, gone, locked, open_keys, pin_for, refused, usable};
use crate::algorithm::Content;
use crate::config::{self, PinSource, Tcti};
use crate::host::task::{Done, Task};
use crate::host::wire::{Failure, KeySpec, OpenSpec, Opened, Survey, SurveyedToken};
use crate::pin::read_pin;
use crate::secret::Pin;
use crate::verifier::Verifier;

/// TPMA_PERMANENT (TPM 2.0 Part 2, 8.6).
const OWNER_AUTH_SET: u32 = 1;
const IN_LOCKOUT: u32 = 1 << 9;

/// The first handles of keys that are loaded, not kept, and of sessions (TPM 2.0 Part 2, 7.5).
const LEFTOVERS: [u32; 2] = [0x8000_0000, 0x0200_0000];

/// An open TPM.
struct OpenTpm {
    chip: Mutex<Chip>,
    /// In the order of the configuration; none where the key cannot be used.
    keys: Vec<Option<Key>>,
    /// The authorization value of new keys, and of those that an operator looks at.
    auth: Option<Auth>,
}

/// The TPM as it is now.
struct Chip {
    context: Context,
    /// The one key file that is loaded, by its key's place: there is room for three, and loading takes two.
    loaded: Option<(usize, KeyHandle)>,
}

impl Chip {
    /// The handle of a key, which is loaded unless it is the one that signed last.
    fn handle(&mut self, index: usize, key: &Key, keys: &[Option<Key>]) -> Result<KeyHandle, Failure> {
        match self.loaded {
            Some((loaded, handle)) if loaded == index => Ok(handle),
            _ if !key.is_file() => key.handle(&mut self.context),
            _ => {
                self.unload(keys)?;
                let handle = key.handle(&mut self.context)?;
                self.loaded = Some((index, handle));
                Ok(handle)
            }
        }
    }

    fn unload(&mut self, keys: &[Option<Key>]) -> Result<(), Failure> {
        let Some((index, handle)) = self.loaded.take() else { return Ok(()) };
        match keys.get(index) {
            Some(Some(key)) => key.release(&mut self.context, handle),
            _ => Ok(()),
        }
    }
}

/// Connects, finds or loads every key, and has each sign a random challenge.
pub(super) fn open(
    tcti: &Tcti,
    spec: &OpenSpec,
    pin: Option<Pin>,
    notify: Notify<'_>,
) -> Result<(Box<dyn Device>, Opened), Failure> {
    let mut context = connect(tcti)?;
    if tcti.is_simulator() {
        flush_leftovers(&mut context)?;
    }
    let device = device(&mut context)?;
    own(&mut context, &spec.token)?;
    let auth = authorization(&mut context, spec, pin)?;
    let offered = auth.is_some();
    if offered {
        // The agent has to know before the TPM does: its dictionary-attack counter may count what happens now.
        notify(Doing::LogsIn);
    }
    let mut waits = None;
    let (keys, public) = open_keys(&spec.keys, |key| {
        let opened = keys::open(&mut context, key, auth.clone(), spec.by_operator).map_err(|failure| {
            let own = life::keys_own(auth.as_ref(), failure.clone());
            if own.class != failure.class {
                waits = Some(failure);
            }
            own
        });
        let (key, handle) = opened?;
        if key.is_file() {
            key.release(&mut context, handle)?;
        }
        let public = key.public.clone();
        Ok((key, public))
    })?;
    // With nothing to sign with, it is the TPM that waits.
    if let Some(failure) = waits.filter(|_| public.iter().all(Result::is_err)) {
        return Err(failure);
    }
    if offered {
        notify(Doing::LoggedIn);
    }
    let opened = Opened { device, sessions: 1, keys: public, touch: BTreeMap::new() };
    Ok((Box::new(OpenTpm { chip: Mutex::new(Chip { context, loaded: None }), keys, auth }), opened))
}

/// Has the context show the owner hierarchy's value wherever that is asked for. A TPM counts no wrong ones (TPM 2.0
/// Part 1, 19.8.3), and keys that need no owner sign without it.
fn own(context: &mut Context, token: &config::Token) -> Result<(), Failure> {
    if token.owner_auth == PinSource::None {
        return Ok(());
    }
    let value = read_pin(&token.owner_auth, token.timeout).and_then(|value| {
        let value = Auth::try_from(value.expose().as_bytes().to_vec());
        value.map_err(|_| "it is longer than a TPM takes".to_owned())
    });
    let value = match value {
        Ok(value) => value,
        Err(reason) => {
            tracing::warn!(%reason, "owner_auth cannot be used");
            return Ok(());
        }
    };
    let set = context.tr_set_auth(ObjectHandle::Owner, value);
    set.map_err(|error| classify("set the owner's authorization value", &error))
}

/// Looks at a TPM without using any key.
pub(super) fn survey(tcti: &Tcti) -> Result<Survey, Failure> {
    let mut context = connect(tcti)?;
    let device = device(&mut context)?;
    let state = property(&mut context, PropertyTag::Permanent)?;
    let notes = match state & IN_LOCKOUT != 0 {
        true => vec!["in lockout: wait, or run `tpm2_dictionarylockout --clear-lockout`".to_owned()],
        false => Vec::new(),
    };
    let found = SurveyedToken {
        slot: 0,
        label: device.clone(),
        device,
        selected: true,
        factory: Vec::new(),
        wants_login: false,
        has_pad: false,
        tries: None,
        has_owner_auth: state & OWNER_AUTH_SET != 0,
        objects: Vec::new(),
        notes,
    };
    Ok(Survey { library: format!("TPM at {tcti}"), tokens: vec![found] })
}

fn connect(tcti: &Tcti) -> Result<Context, Failure> {
    let cannot =
        |error: tss_esapi::Error| gone(format!("cannot reach the TPM at {tcti}: {}", describe(&error)));
    // Of what is wrong with a file, tpm2-tss says nothing.
    if let Some(path) = tcti.device()
        && let Err(error) = OpenOptions::new().read(true).write(true).open(path)
    {
        let what = match error.kind() {
            io::ErrorKind::NotFound => "is the TPM switched on in the firmware?",
            io::ErrorKind::PermissionDenied => {
                "add the user to the group that it belongs to (Debian: tss), or give the service that group: \
                 SupplementaryGroups=tss"
            }
            io::ErrorKind::ResourceBusy => {
                "another program has it; share it with others as device:/dev/tpmrm0"
            }
            _ => "is it a TPM?",
        };
        return Err(gone(format!("cannot open {}: {error}; {what}", path.display())));
    }
    let name: TctiNameConf = tcti.to_string().parse().map_err(cannot)?;
    let mut context = Context::new(name).map_err(cannot)?;
    // A TPM is started by the firmware, but a simulator after a reset by nobody. Started twice is no harm: it says so.
    let _ = context.startup(StartupType::Clear);
    Ok(context)
}

/// A process that was killed leaves its keys and sessions in a TPM that no resource manager clears, which has room for three
/// of each.
fn flush_leftovers(context: &mut Context) -> Result<(), Failure> {
    let failed = |error: tss_esapi::Error| classify("flush old keys and sessions", &error);
    for first in LEFTOVERS {
        let asked = context
            .execute_without_session(|context| context.get_capability(CapabilityType::Handles, first, 16));
        let (CapabilityData::Handles(handles), _) = asked.map_err(failed)? else { continue };
        for handle in handles.into_inner() {
            let object = context.execute_without_session(|context| context.tr_from_tpm_public(handle));
            match context.flush_context(object.map_err(failed)?) {
                // tss-esapi says so of a policy session that it has just flushed.
                Err(tss_esapi::Error::WrapperError(WrapperErrorKind::InvalidHandleState)) => {}
                // Whose it was has ended it.
                Err(error) if code(&error) == Some(Code::Handle) => {}
                flushed => flushed.map_err(failed)?,
            }
        }
    }
    Ok(())
}

/// Manufacturer and firmware version, as the TPM names them (TPM 2.0 Part 2, 6.13).
fn device(context: &mut Context) -> Result<String, Failure> {
    let asked = [PropertyTag::Manufacturer, PropertyTag::FirmwareVersion1, PropertyTag::FirmwareVersion2];
    let mut found = [0; 3];
    for (tag, value) in asked.into_iter().zip(&mut found) {
        *value = property(context, tag)?;
    }
    let [manufacturer, first, second] = found;
    let name = manufacturer.to_be_bytes();
    let name = String::from_utf8_lossy(&name);
    let name = name.trim_end_matches(['\0', ' ']);
    Ok(format!("TPM 2.0 ({name}, firmware {first:x}.{second:x})"))
}

/// One property, as it is now: the crate's own getter remembers old answers.
fn property(context: &mut Context, tag: PropertyTag) -> Result<u32, Failure> {
    let (data, _) = context
        .execute_without_session(|context| {
            context.get_capability(CapabilityType::TpmProperties, tag.into(), 1)
        })
        .map_err(|error| classify("ask the TPM", &error))?;
    match data {
        CapabilityData::TpmProperties(list) => Ok(list.find(tag).map_or(0, |found| found.value())),
        _ => Ok(0),
    }
}

/// Whether authorization values of keys are refused at present, right or wrong.
fn locked_out(context: &mut Context) -> Result<bool, Failure> {
    Ok(property(context, PropertyTag::Permanent)? & IN_LOCKOUT != 0)
}

/// Whether one wrong authorization value more locks the TPM for everybody.
fn is_last_try(context: &mut Context) -> Result<bool, Failure> {
    let most = property(context, PropertyTag::MaxAuthFail)?;
    Ok(property(context, PropertyTag::LockoutCounter)?.saturating_add(1) >= most)
}

/// Whether opening the TPM may lock it for everybody: not without an operator's word, unless all keys
/// are outside of that.
fn spends_the_last_try(context: &mut Context, spec: &OpenSpec) -> Result<bool, Failure> {
    if spec.by_operator || !is_last_try(context)? {
        return Ok(false);
    }
    let counts = |key: &KeySpec| {
        keys::public_area(context, &key.object).is_ok_and(|public| !public.object_attributes().no_da())
    };
    Ok(spec.keys.iter().any(counts))
}

/// The authorization value of the keys, if they have one.
fn authorization(context: &mut Context, spec: &OpenSpec, pin: Option<Pin>) -> Result<Option<Auth>, Failure> {
    let Some(pin) = pin_for(spec, pin)? else { return Ok(None) };
    if locked_out(context)? {
        let message = "the TPM is in lockout after wrong authorization values; wait until it forgives them, or run \
                       `tpm2_dictionarylockout --clear-lockout`, then unlock it";
        return Err(locked(message.into()));
    }
    if spends_the_last_try(context, spec)? {
        // It is asked again: a TPM forgets one after the other.
        let message = "one wrong authorization value more would lock the TPM; none is offered until it forgives one, or an \
                       operator unlocks it with the right one";
        return Err(gone(message.into()));
    }
    let auth = Auth::try_from(pin.expose().as_bytes().to_vec());
    auth.map(Some).map_err(|_| locked("the authorization value is longer than a TPM takes".into()))
}

impl Device for OpenTpm {
    fn signers(&self) -> Result<Vec<Box<dyn Signer + '_>>, Failure> {
        Ok(vec![Box::new(self)])
    }

    fn verifier(&self, key: usize) -> Option<&Verifier> {
        usable(&self.keys, key).ok().map(|key| &key.verifier)
    }

    fn probe(&self) -> Result<(), Failure> {
        let mut chip = self.chip.lock().unwrap_or_else(PoisonError::into_inner);
        property(&mut chip.context, PropertyTag::Permanent).map(drop).map_err(|failure| gone(failure.message))
    }

    fn operate(&self, task: &Task, _: Notify<'_>) -> Result<Done, Failure> {
        let mut chip = self.chip.lock().unwrap_or_else(PoisonError::into_inner);
        // What operators do takes all the room that there is.
        chip.unload(&self.keys)?;
        life::operate(&mut chip.context, self.auth.as_ref(), task)
    }

    /// Dropping the context flushes the keys that were loaded from files.
    fn close(self: Box<Self>) {}
}

/// For the one thread that signs.
impl Signer for &OpenTpm {
    fn sign(&mut self, index: usize, content: &Content, _: Notify<'_>) -> Result<Vec<u8>, Failure> {
        let key = usable(&self.keys, index)?;
        let digest = key.public.algorithm.bytes(content).map_err(refused)?;
        let mut chip = self.chip.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = chip.handle(index, key, &self.keys)?;
        key.sign(&mut chip.context, handle, digest)
    }
}
