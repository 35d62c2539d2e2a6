//! How a card is found, and who has it when it cannot be had.

use yubikey::{Serial, YubiKey};

use super::super::gone;
use super::Known;
use super::errors::{classify, hidden, holder};
use crate::host::wire::{Class, Failure};

pub(super) fn in_use(what: &str) -> Failure {
    Failure { class: Class::Busy, message: format!("{what} is in use by another program{}", holder()) }
}

/// Looks for a card in all readers.
pub(super) fn connect(serial: u32) -> Result<YubiKey, Failure> {
    YubiKey::open_by_serial(Serial(serial)).map_err(|error| unconnected(serial, error))
}

/// Looks for it where it was, and then in all: a card that another process has wait for a finger would not answer until
/// that is over.
pub(super) fn connect_again(Known { serial, reader, .. }: &mut Known) -> Result<YubiKey, Failure> {
    let unconnected = |error| unconnected(*serial, error);
    let mut readers = yubikey::reader::Context::open().map_err(unconnected)?;
    let there = readers.iter().map_err(unconnected)?.find(|there| there.name() == *reader);
    match there.map(|there| there.open()) {
        Some(Ok(yubikey)) if yubikey.serial() == Serial(*serial) => return Ok(yubikey),
        // Dropped, it would be reset.
        Some(Ok(other)) => drop(other.disconnect(pcsc::Disposition::LeaveCard)),
        Some(Err(held @ yubikey::Error::PcscError { inner: Some(pcsc::Error::SharingViolation) })) => {
            return Err(unconnected(held));
        }
        _ => {}
    }
    let yubikey = connect(*serial)?;
    yubikey.name().clone_into(reader);
    Ok(yubikey)
}

fn unconnected(serial: u32, error: yubikey::Error) -> Failure {
    match error {
        yubikey::Error::NotFound => gone(format!("no YubiKey with serial {serial} is connected{}", hidden())),
        yubikey::Error::PcscError { inner: Some(pcsc::Error::SharingViolation) } => {
            in_use(&format!("YubiKey {serial}"))
        }
        error => classify(&format!("open YubiKey {serial}"), &error),
    }
}
