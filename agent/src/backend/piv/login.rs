//! The PIN, when a card is opened: offered once, and never when that could block the card.

use yubikey::YubiKey;
use yubikey::piv::{self, ManagementSlotId, SlotId};

use super::super::{Doing, LAST_TRY, Notify, UNANSWERED, factory_pin, locked, pin_for};
use super::errors::{self, classify};
use super::{FACTORY_PIN, LONGEST_PIN, SHORTEST_PIN};
use crate::host::wire::{Failure, OpenSpec};
use crate::secret::Pin;

/// Offers the PIN, once, unless that could block it.
pub(super) fn verified(
    yubikey: &mut YubiKey,
    spec: &OpenSpec,
    pin: Option<Pin>,
    notify: Notify<'_>,
) -> Result<Option<Pin>, Failure> {
    let Some(pin) = pin_for(spec, pin)? else { return Ok(None) };
    let tries = yubikey.get_pin_retries().map_err(|error| classify("ask for the PIN tries", &error))?;
    if tries == 0 {
        return Err(locked(errors::PIN_BLOCKED.into()));
    }
    if tries == 1 && !spec.by_operator {
        return Err(locked(LAST_TRY.into()));
    }
    if spec.unanswered && !spec.by_operator && !has_all_tries(yubikey) {
        return Err(locked(UNANSWERED.into()));
    }
    is_fit(&pin)?;
    // The agent has to know before the card does.
    notify(Doing::LogsIn);
    yubikey.verify_pin(pin.expose().as_bytes()).map_err(|error| {
        match classify("verify the PIN", &error) {
            // A card that is not there may have taken it: the next process looks first. Whatever else went wrong may have
            // cost a try.
            failure if matches!(error, yubikey::Error::PcscError { .. }) => failure,
            failure => locked(failure.message),
        }
    })?;
    notify(Doing::LoggedIn);
    Ok(Some(pin))
}

/// Whether nobody entered a wrong PIN since the last right one.
fn has_all_tries(yubikey: &mut YubiKey) -> bool {
    let pin = piv::metadata(yubikey, SlotId::Management(ManagementSlotId::Pin));
    let retries = pin.ok().and_then(|metadata| metadata.retries);
    retries.is_some_and(|retries| retries.remaining_count == retries.retry_count)
}

/// A PIN that a card can have, and that not everybody knows.
pub(super) fn is_fit(pin: &Pin) -> Result<(), Failure> {
    if pin.expose().as_bytes() == FACTORY_PIN {
        return Err(factory_pin("`omsign-agent init yubikey` or `ykman piv access change-pin`"));
    }
    if !(SHORTEST_PIN..=LONGEST_PIN).contains(&pin.expose().len()) {
        let message = format!("its PIN has {SHORTEST_PIN} to {LONGEST_PIN} bytes, and the one given has not");
        return Err(locked(message));
    }
    Ok(())
}
