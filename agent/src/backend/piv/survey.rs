//! What cards there are, before anybody offers a PIN, and what everybody knows of a new one.

use getrandom::SysRng;
use yubikey::piv::{self, SlotId, SlotMetadata};
use yubikey::{MgmKey, YubiKey};
use zeroize::Zeroizing;

use super::super::{locked, refused};
use super::errors::{TELLS_NOTHING, classify, tries_left};
use super::login::is_fit;
use super::{FACTORY_PIN, LONGEST_PIN, SHORTEST_PIN, connect, in_use};
use crate::config::{Object, PIV_SLOTS};
use crate::host::wire::{Factory, Failure, Fresh, Survey, SurveyedToken};
use crate::secret::Pin;

/// See [`FACTORY_PIN`].
const FACTORY_PUK: &[u8] = b"12345678";

/// Its key reference (NIST SP 800-73-4, part 1, table 4b).
const PUK: u8 = 0x81;

/// Looks at a card without offering a PIN; serial 0 stands for all cards.
pub(in super::super) fn survey(serial: u32) -> Result<Survey, Failure> {
    let serials = match serial {
        0 => connected()?,
        serial => vec![serial],
    };
    let tokens = serials.into_iter().map(surveyed).collect::<Result<_, _>>()?;
    Ok(Survey { library: "PC/SC".into(), tokens })
}

fn surveyed(serial: u32) -> Result<SurveyedToken, Failure> {
    let mut yubikey = connect(serial)?;
    let tries = yubikey.get_pin_retries().map_err(|error| classify("ask for the PIN tries", &error))?;
    let mut notes = vec![format!("{tries} PIN tries left")];
    let (factory, of_factory): (Vec<_>, Vec<_>) = factorys(&mut yubikey).into_iter().unzip();
    notes.extend(of_factory);
    let device = format!("YubiKey (serial {serial}, firmware {})", yubikey.version());
    let mut objects = Vec::new();
    for number in PIV_SLOTS.into_iter().flatten() {
        let Ok(slot) = SlotId::try_from(number) else { continue };
        match piv::metadata(&mut yubikey, slot) {
            // What this version does not know is there all the same.
            Ok(_) | Err(yubikey::Error::ParseError) => objects.push(Object::PivSlot(number)),
            Err(yubikey::Error::NotFound) => {}
            Err(yubikey::Error::NotSupported) => return Err(refused(TELLS_NOTHING.into())),
            Err(error) => return Err(classify("read the slot's metadata", &error)),
        }
    }
    leave(yubikey);
    Ok(SurveyedToken {
        slot: 0,
        label: serial.to_string(),
        device,
        selected: true,
        factory,
        wants_login: true,
        has_pad: false,
        tries: Some(tries),
        has_owner_auth: false,
        objects,
        notes,
    })
}

/// Lets go of a card as it is. Dropped, it would be reset, which whoever else uses it would notice.
fn leave(yubikey: YubiKey) {
    let _ = yubikey.disconnect(pcsc::Disposition::LeaveCard);
}

/// What of a card everybody knows, and what to do about it.
pub(super) fn factorys(yubikey: &mut YubiKey) -> Vec<(Factory, String)> {
    let mut found = Vec::new();
    for (which, name, reference) in [
        (Factory::Pin, "PIN", 0x80),
        (Factory::Puk, "PUK", PUK),
        (Factory::ManagementKey, "management key", 0x9b),
    ] {
        // A PUK that is blocked nobody can change.
        let blocked = which == Factory::Puk && tries_of(yubikey, reference) == Some(0);
        if !blocked && is_factorys(yubikey, reference) {
            let how = "change it with `omsign-agent init yubikey` or `ykman piv access`";
            found.push((
                which,
                format!("its {name} is the one from the factory, which everybody knows; {how}"),
            ));
        }
    }
    found
}

/// Whether a PIN, PUK or management key is one that everybody knows; no, where the firmware does not tell.
pub(super) fn is_factorys(yubikey: &mut YubiKey, reference: u8) -> bool {
    known_of(yubikey, reference).is_some_and(|metadata| metadata.default == Some(true))
}

/// How often it may still be wrong, where the firmware tells.
fn tries_of(yubikey: &mut YubiKey, reference: u8) -> Option<u8> {
    Some(known_of(yubikey, reference)?.retries?.remaining_count)
}

fn known_of(yubikey: &mut YubiKey, reference: u8) -> Option<SlotMetadata> {
    piv::metadata(yubikey, SlotId::try_from(reference).ok()?).ok()
}

/// The serial numbers of all cards.
fn connected() -> Result<Vec<u32>, Failure> {
    let failed = |error: yubikey::Error| classify("list the cards", &error);
    let mut readers = yubikey::reader::Context::open().map_err(failed)?;
    let (mut serials, mut held) = (Vec::new(), false);
    for reader in readers.iter().map_err(failed)? {
        match reader.open() {
            Ok(yubikey) => {
                serials.push(yubikey.serial().0);
                leave(yubikey);
            }
            Err(yubikey::Error::PcscError { inner: Some(pcsc::Error::SharingViolation) }) => held = true,
            // No card, or not a YubiKey.
            Err(_) => {}
        }
    }
    if serials.is_empty() && held {
        return Err(in_use("the card"));
    }
    Ok(serials)
}

/// Replaces what everybody knows: PIN, PUK, and the management key by a random one that the card keeps behind its PIN.
pub(in super::super) fn prepare(serial: u32, pin: Option<Pin>, fresh: &Fresh) -> Result<(), Failure> {
    let mut yubikey = connect(serial)?;
    let failed = |what: &'static str| move |error: yubikey::Error| classify(what, &error);
    let mut pin = pin;
    if !fresh.pin.is_empty() {
        let changed = yubikey.change_pin(FACTORY_PIN, fresh.pin.as_bytes());
        changed.map_err(failed("change the PIN"))?;
        pin = Pin::new(fresh.pin.clone());
    }
    // A wrong one changes nothing.
    let pin = pin.ok_or_else(|| locked("it waits for its PIN".into()))?;
    yubikey.verify_pin(pin.expose().as_bytes()).map_err(failed("verify the PIN"))?;
    if !fresh.puk.is_empty() {
        let changed = yubikey.change_puk(FACTORY_PUK, fresh.puk.as_bytes());
        changed.map_err(|error| of_puk("change the PUK, now that the PIN is right", error))?;
    }
    if fresh.management_key {
        let factory = MgmKey::get_default(&yubikey).map_err(failed("ask for the management key"))?;
        yubikey.authenticate(&factory).map_err(failed("show the management key"))?;
        let own = MgmKey::generate_for(&yubikey, &mut SysRng).map_err(failed("make a management key"))?;
        keep(&mut yubikey, &own).map_err(failed("keep the management key"))?;
        own.set_protected(&mut yubikey).map_err(failed("change the management key"))?;
    }
    Ok(())
}

/// Where a card keeps a management key behind its PIN, as ykman has it: the data object "Printed Information", and two tags.
const PRINTED: u32 = 0x005f_c109;
const PROTECTED: u8 = 0x88;
const KEY: u8 = 0x89;

/// Has the card keep a management key before it is the card's. Cut off in between, it would be nobody's: so the one from the
/// factory still is, and this can be done again.
fn keep(yubikey: &mut YubiKey, key: &MgmKey) -> yubikey::Result<()> {
    let key: &[u8] = key.as_ref();
    let length = u8::try_from(key.len()).map_err(|_| yubikey::Error::SizeError)?;
    let object = Zeroizing::new([&[PROTECTED, length + 2, KEY, length], key].concat());
    let ours = |found: &[u8]| found.starts_with(&[PROTECTED, length + 2, KEY, length]);
    match yubikey.fetch_object(PRINTED) {
        // What others keep there is left to the crate, which adds to it.
        Ok(found) if !found.is_empty() && !ours(&found) => return Ok(()),
        _ => yubikey.save_object(PRINTED, &mut object.clone())?,
    }
    if *yubikey.fetch_object(PRINTED)? == *object { Ok(()) } else { Err(yubikey::Error::GenericError) }
}

/// What came of showing the PUK.
fn of_puk(what: &str, error: yubikey::Error) -> Failure {
    match error {
        yubikey::Error::WrongPin { tries: 0 } | yubikey::Error::PinLocked => refused(
            "its PUK is blocked, too: only a reset helps, which deletes every key: ykman piv reset".into(),
        ),
        yubikey::Error::WrongPin { tries } => refused(format!("it refused the PUK; {}", tries_left(tries))),
        error => classify(what, &error),
    }
}

/// Sets the PIN anew with the PUK. One try.
pub(in super::super) fn unblock(serial: u32, pin: &Pin, fresh: &Fresh) -> Result<(), Failure> {
    is_fit(pin)?;
    let (puk, pin) = (fresh.puk.as_bytes(), pin.expose().as_bytes());
    if !(SHORTEST_PIN..=LONGEST_PIN).contains(&puk.len()) {
        let message = format!("a PUK has {SHORTEST_PIN} to {LONGEST_PIN} bytes, and the one given has not");
        return Err(refused(message));
    }
    let mut yubikey = connect(serial)?;
    // Firmware before 5.3 does not tell.
    if puk == FACTORY_PUK || is_factorys(&mut yubikey, PUK) {
        let message = "its PUK is the one from the factory, with which everybody can set its PIN: change that first, with \
                       `ykman piv access change-puk`";
        return Err(refused(message.into()));
    }
    if tries_of(&mut yubikey, PUK) == Some(1) {
        let message = "one wrong PUK more would block it, and only a reset would help, which deletes every key: if you are sure of \
                       yours, `ykman piv access unblock-pin`";
        return Err(refused(message.into()));
    }
    yubikey.unblock_pin(puk, pin).map_err(|error| of_puk("set the PIN", error))
}
