//! A key in a PIV slot: what its metadata says, and the proof that it signs.

use x509_cert::der::Encode as _;
use yubikey::piv::{self, AlgorithmId, SlotAlgorithmId, SlotId};
use yubikey::{Error, PinPolicy, TouchPolicy};

use super::super::{gone, refused};
use super::Card;
use super::errors::classify;
use crate::algorithm::{Algorithm, SpkiDer};
use crate::config::Object;
use crate::host::wire::{Failure, PublicKey};

/// A key that can be used.
pub(super) struct Key {
    pub(super) slot: SlotId,
    pub(super) algorithm: Algorithm,
    pub(super) algorithm_id: AlgorithmId,
    pub(super) pin: PinPolicy,
    pub(super) touch: TouchPolicy,
}

/// Reads a slot's metadata. The card itself names the public half; a key that needs no touch also signs a
/// challenge.
pub(super) fn find(card: &mut Card, object: &Object) -> Result<(Key, PublicKey), Failure> {
    let Object::PivSlot(number) = object else { return Err(refused(format!("{object} is not a PIV slot"))) };
    let slot = SlotId::try_from(*number).map_err(|_| refused(format!("there is no slot {number:02x}")))?;
    let metadata = piv::metadata(&mut card.yubikey, slot).map_err(|error| match error {
        Error::NotFound => refused(format!("slot {number:02x} is empty")),
        Error::NotSupported => {
            refused("its firmware is older than 5.3 and does not tell what its slots hold".into())
        }
        error => classify("read the slot's metadata", &error),
    })?;
    let SlotAlgorithmId::Asymmetric(algorithm_id) = metadata.algorithm else {
        return Err(refused(format!("slot {number:02x} holds no key that signs")));
    };
    let spki = metadata.public.and_then(|public| public.to_der().ok()).map(SpkiDer);
    let spki = spki.ok_or_else(|| refused(format!("slot {number:02x} does not show its public key")))?;
    let algorithm = Algorithm::from_spki(&spki).map_err(|error| refused(error.to_string()))?;
    let (pin, touch) = metadata.policy.unwrap_or((PinPolicy::Default, TouchPolicy::Default));
    // FIPS 201: the signature slot asks before every use.
    let pin = match pin {
        PinPolicy::Default if *number == 0x9c => PinPolicy::Always,
        PinPolicy::Default => PinPolicy::Once,
        pin => pin,
    };
    let touch = if touch == TouchPolicy::Default { TouchPolicy::Never } else { touch };
    let key = Key { slot, algorithm, algorithm_id, pin, touch };
    if touch == TouchPolicy::Never {
        let mut challenge = vec![0; algorithm.digest_len()];
        getrandom::fill(&mut challenge).map_err(|error| gone(format!("no random challenge: {error}")))?;
        let signature = card.sign(&key, &challenge)?;
        if !algorithm.verifies(&spki, &challenge, &signature).unwrap_or(false) {
            return Err(gone(format!("slot {number:02x} makes signatures that do not verify")));
        }
    }
    Ok((key, PublicKey { algorithm, spki }))
}
