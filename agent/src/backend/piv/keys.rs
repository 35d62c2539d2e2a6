//! A key in a PIV slot: what its metadata says, and the proof that it signs.

use x509_cert::der::Encode as _;
use yubikey::piv::{self, AlgorithmId, SlotAlgorithmId, SlotId};
use yubikey::{Error, PinPolicy, TouchPolicy};

use super::super::{Notify, challenge, refused};
use super::Card;
use super::errors::{TELLS_NOTHING, classify};
use crate::algorithm::{Algorithm, Content, Padding, digest_info};
use crate::config::Object;
use crate::host::wire::Failure;
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;
use crate::verifier::Verifier;

/// A key that can be used.
pub(super) struct Key {
    pub(super) slot: SlotId,
    pub(super) algorithm: Algorithm,
    pub(super) verifier: Verifier,
    pub(super) algorithm_id: AlgorithmId,
    pub(super) pin: PinPolicy,
    pub(super) touch: TouchPolicy,
}

impl Key {
    /// What the card is given: it does not pad RSA itself.
    pub(super) fn input(&self, content: &Content) -> Result<Vec<u8>, Failure> {
        let bytes = self.algorithm.bytes(content).map_err(refused)?;
        match self.algorithm {
            Algorithm::Ecdsa(_) | Algorithm::Ed25519 => Ok(bytes.to_vec()),
            Algorithm::RsaPkcs1 => {
                let size = match self.algorithm_id {
                    AlgorithmId::Rsa2048 => 256,
                    AlgorithmId::Rsa3072 => 384,
                    _ => 512,
                };
                // EMSA-PKCS1-v1_5 (RFC 8017, 9.2).
                let info = digest_info(bytes);
                let padding = vec![0xff; size - info.len() - 3];
                Ok([&[0, 1][..], &padding, &[0], &info].concat())
            }
            Algorithm::MlDsa(_) => Err(refused("a YubiKey has no ML-DSA".into())),
            Algorithm::RsaPss => Err(refused("an RSA key on a card signs with padding = \"pkcs1\"".into())),
        }
    }
}

/// When the key in a slot asks for the PIN, and when it waits for a touch.
pub(super) fn policies(slot: u8, said: Option<(PinPolicy, TouchPolicy)>) -> (PinPolicy, TouchPolicy) {
    let (pin, touch) = said.unwrap_or((PinPolicy::Default, TouchPolicy::Default));
    // FIPS 201: the signature slot asks before every use, the one for card authentication never.
    let pin = match (pin, slot) {
        (PinPolicy::Default, 0x9c) => PinPolicy::Always,
        (PinPolicy::Default, 0x9e) => PinPolicy::Never,
        (PinPolicy::Default, _) => PinPolicy::Once,
        (pin, _) => pin,
    };
    (pin, if touch == TouchPolicy::Default { TouchPolicy::Never } else { touch })
}

/// Reads a slot's metadata. The card itself names the public half; a key that needs no touch also signs a
/// challenge.
pub(super) fn find(
    card: &mut Card<'_>,
    object: &Object,
    padding: Padding,
    notify: Notify<'_>,
) -> Result<(Key, PublicKey), Failure> {
    let Object::PivSlot(number) = object else { return Err(refused(format!("{object} is not a PIV slot"))) };
    let slot = SlotId::try_from(*number).map_err(|_| refused(format!("there is no slot {number:02x}")))?;
    let metadata = piv::metadata(card.yubikey, slot).map_err(|error| match error {
        Error::NotFound => refused(format!("slot {number:02x} is empty")),
        Error::NotSupported => refused(TELLS_NOTHING.into()),
        error => classify("read the slot's metadata", &error),
    })?;
    let SlotAlgorithmId::Asymmetric(algorithm_id) = metadata.algorithm else {
        return Err(refused(format!("slot {number:02x} holds no key that signs")));
    };
    let spki = metadata.public.and_then(|public| public.to_der().ok()).map(SpkiDer);
    let spki = spki.ok_or_else(|| refused(format!("slot {number:02x} does not show its public key")))?;
    let algorithm = spki.algorithm(padding).map_err(|error| refused(error.to_string()))?;
    let (pin, touch) = policies(*number, metadata.policy);
    let key = Key { slot, algorithm, verifier: Verifier::new(&spki, algorithm), algorithm_id, pin, touch };
    if touch == TouchPolicy::Never {
        let content = algorithm.content(&challenge()?);
        let signature = card.sign(&key, &key.input(&content)?, notify)?;
        if !key.verifier.verifies(&content, &signature) {
            return Err(refused(format!("slot {number:02x} makes signatures that do not verify")));
        }
    }
    Ok((key, PublicKey { algorithm, spki, hashes: false }))
}
