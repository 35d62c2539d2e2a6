//! What operators do with the slots of a card.

use x509_cert::der::Encode as _;
use yubikey::certificate::CertInfo;
use yubikey::piv::{self, AlgorithmId, Origin, SlotAlgorithmId, SlotId};
use yubikey::{Certificate, Error, MgmKey, PinPolicy, TouchPolicy};

use super::super::{Notify, refused};
use super::errors::classify;
use super::{Card, is_factorys, keys, line};
use crate::algorithm::{KeyType, Padding};
use crate::config::{Object, PIV_SLOTS};
use crate::host::task::{self, Done, Evidence, Listed, Need, Task, Template};
use crate::host::wire::{Class, Failure, KeySpec};
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;

/// The key that signs attestations, made in the factory (Yubico, "PIV attestation").
const ATTESTATION: u8 = 0xf9;

/// MOVE KEY, and the firmware that has it (Yubico, "PIV extensions").
const MOVE_KEY: u8 = 0xf6;
const DELETES: (u8, u8) = (5, 7);

pub(super) fn operate(card: &mut Card<'_>, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
    match task {
        Task::List(_) => list(card),
        Task::Generate(key, template) => generate(card, key, template, notify),
        Task::Find(key, need) => {
            let found = keys::find(card, &key.object, key.padding, notify).map(|(_, public)| public);
            match found {
                Err(failure) if failure.class == Class::Refused && *need == Need::Shown => {
                    shown(card, slot(key)?, key).ok_or(failure)
                }
                found => found,
            }
            .map(Done::Key)
        }
        Task::Sign(key, message) => {
            let (key, public) = keys::find(card, &key.object, key.padding, notify)?;
            let input = key.input(&public.algorithm.content(message))?;
            card.sign(&key, &input, notify).map(Done::Signature)
        }
        Task::Store(key, certificate) => {
            let slot = slot(key)?;
            let bytes = certificate.len();
            let certificate = Certificate::from_bytes(certificate.clone())
                .map_err(|error| classify("read the certificate", &error))?;
            manage(card, notify)?;
            let written = certificate.write(card.yubikey, slot, CertInfo::Uncompressed);
            written.map(|()| Done::Nothing).map_err(|error| match error {
                yubikey::Error::SizeError => refused(format!(
                    "the certificate has {bytes} bytes, more than a card takes; name its file as the key's certificate_chain"
                )),
                error => classify("store the certificate", &error),
            })
        }
        Task::Attest(key, _) => attest(card, slot(key)?),
        Task::Delete(key, _) => delete(card, slot(key)?, notify),
    }
}

/// The public half that the card has with a key, also where it does not sign.
fn shown(card: &mut Card<'_>, slot: SlotId, key: &KeySpec) -> Option<PublicKey> {
    let public = piv::metadata(card.yubikey, slot).ok()?.public?;
    let spki = SpkiDer(public.to_der().ok()?);
    let algorithm = spki.algorithm(key.padding).ok()?;
    Some(PublicKey { algorithm, spki, hashes: false })
}

fn slot(key: &KeySpec) -> Result<SlotId, Failure> {
    match key.object {
        Object::PivSlot(number) => {
            SlotId::try_from(number).map_err(|_| refused(format!("there is no slot {number:02x}")))
        }
        ref object => Err(refused(format!("{object} is not a PIV slot"))),
    }
}

fn list(card: &mut Card<'_>) -> Result<Done, Failure> {
    let mut listed = Vec::new();
    for number in PIV_SLOTS.into_iter().flatten() {
        let Ok(slot) = SlotId::try_from(number) else { continue };
        let metadata = match piv::metadata(card.yubikey, slot) {
            Ok(metadata) => metadata,
            Err(Error::NotFound) => continue,
            // One that this version does not know, such as the policies of a YubiKey Bio.
            Err(Error::ParseError) => {
                let notes = vec!["its metadata cannot be read".to_owned()];
                let (object, algorithm) = (Object::PivSlot(number), "unknown".to_owned());
                listed.push(Listed { object, algorithm, public_key: Vec::new(), certificate: false, notes });
                continue;
            }
            Err(error) => return Err(classify("read the slot's metadata", &error)),
        };
        let SlotAlgorithmId::Asymmetric(algorithm) = metadata.algorithm else { continue };
        let spki = metadata.public.and_then(|public| public.to_der().ok()).map(SpkiDer);
        let known = spki.as_ref().and_then(|spki| spki.algorithm(Default::default()).ok());
        let mut notes = Vec::new();
        if let Some((pin, touch)) = metadata.policy {
            notes.push(
                format!("PIN policy {pin:?}, touch policy {touch:?}").to_lowercase().replace("pin", "PIN"),
            );
        }
        notes.extend((metadata.origin == Some(Origin::Imported)).then(|| "imported".to_owned()));
        listed.push(Listed {
            object: Object::PivSlot(number),
            public_key: spki.map(|spki| spki.0).unwrap_or_default(),
            algorithm: known.map_or_else(|| format!("{algorithm:?}"), |known| known.name().to_owned()),
            certificate: Certificate::read(card.yubikey, slot).is_ok(),
            notes,
        });
    }
    Ok(Done::Listed(listed))
}

fn generate(
    card: &mut Card<'_>,
    key: &KeySpec,
    template: &Template,
    notify: Notify<'_>,
) -> Result<Done, Failure> {
    let slot = slot(key)?;
    if template.no_da {
        return Err(refused("--no-da is for keys of a TPM".into()));
    }
    if template.key_type().is_rsa() && key.padding == Padding::Pss {
        return Err(refused("an RSA key on a card signs with padding = \"pkcs1\"".into()));
    }
    let algorithm = match template.key_type() {
        KeyType::P256 => AlgorithmId::EccP256,
        KeyType::P384 => AlgorithmId::EccP384,
        KeyType::Rsa2048 => AlgorithmId::Rsa2048,
        KeyType::Rsa3072 => AlgorithmId::Rsa3072,
        KeyType::Rsa4096 => AlgorithmId::Rsa4096,
        KeyType::Ed25519 => AlgorithmId::Ed25519,
        KeyType::P521 | KeyType::MlDsa44 | KeyType::MlDsa65 | KeyType::MlDsa87 => {
            return Err(refused("a YubiKey has no such keys; use p256 or p384".into()));
        }
    };
    match piv::metadata(card.yubikey, slot) {
        Err(Error::NotFound) => {}
        Ok(_) => {
            return Err(refused(format!(
                "the card has a key in {} already; choose another slot",
                key.object
            )));
        }
        Err(error) => return Err(classify("read the slot's metadata", &error)),
    }
    let (pin, touch) = policies(card, template)?;
    manage(card, notify)?;
    piv::generate(card.yubikey, slot, algorithm, pin, touch).map_err(|error| match error {
        Error::AlgorithmError => {
            refused("the card's firmware has no such keys, or not with this policy".into())
        }
        error => classify("make the key", &error),
    })?;
    // What follows may need the PIN again: the management key took its place.
    card.verify(notify).map_err(|error| classify("verify the PIN", &error))?;
    keys::find(card, &key.object, key.padding, notify).map(|(_, public)| Done::Key(public))
}

/// Shows the card the management key, which the card keeps for whoever knows the PIN. One from the factory is never
/// used: whoever has the card in hand for a moment could use it too.
fn manage(card: &mut Card<'_>, notify: Notify<'_>) -> Result<(), Failure> {
    if is_factorys(card.yubikey, 0x9b) {
        return Err(refused(
            "its management key is the one from the factory; run `omsign-agent init yubikey`, or \
             `ykman piv access change-management-key --generate --protect`"
                .into(),
        ));
    }
    card.verify_again(notify)?;
    let key = MgmKey::get_protected(card.yubikey).map_err(|_| {
        refused(
            "its management key is not kept on the card; run `ykman piv access change-management-key --protect`"
                .into(),
        )
    })?;
    card.yubikey.authenticate(&key).map_err(|error| classify("show the management key", &error))
}

fn attest(card: &mut Card<'_>, slot: SlotId) -> Result<Done, Failure> {
    let own = piv::attest(card.yubikey, slot).map_err(|error| match error {
        Error::NotSupported => refused("its firmware is older than 4.3 and attests nothing".into()),
        Error::GenericError => {
            refused("the card attests only keys that it made itself, and this one was imported".into())
        }
        error => classify("attest the key", &error),
    })?;
    let by = SlotId::try_from(ATTESTATION).map_err(|error| classify("find slot f9", &error))?;
    let by = Certificate::read(card.yubikey, by).map_err(|_| {
        refused("slot f9 has no certificate: somebody replaced the factory's attestation key".into())
    })?;
    let by = by.cert.to_der().map_err(|error| refused(error.to_string()))?;
    Ok(Done::Attested(Evidence::Piv { certificates: vec![own.to_vec(), by] }))
}

/// The key first: when that fails, nothing is lost.
fn delete(card: &mut Card<'_>, slot: SlotId, notify: Notify<'_>) -> Result<Done, Failure> {
    let version = card.yubikey.version();
    if (version.major, version.minor) < DELETES {
        return Err(refused(format!(
            "its firmware {version} cannot delete keys, 5.7 can; make another key in the slot with ykman"
        )));
    }
    manage(card, notify)?;
    let sent = line::command(card.yubikey, [0, MOVE_KEY, 0xff, slot.into()], &[]);
    match sent.map_err(|error| classify("delete the key", &error))?.1 {
        line::DONE => {}
        // Another program used the card in between.
        line::NOT_ALLOWED => return Err(refused("the card did not let us delete the key; try again".into())),
        status => {
            return Err(refused(format!("the card answered {status:04x} when it was to delete the key")));
        }
    }
    let deleted = Certificate::delete(card.yubikey, slot);
    deleted
        .map(|()| Done::Nothing)
        .map_err(|error| classify("delete its certificate; the key is deleted", &error))
}

/// As it was said, or as those of the key whose place it is to take, or the card's own.
fn policies(card: &mut Card<'_>, template: &Template) -> Result<(PinPolicy, TouchPolicy), Failure> {
    let pin = template.pin_policy.map(|policy| match policy {
        task::PinPolicy::Never => PinPolicy::Never,
        task::PinPolicy::Once => PinPolicy::Once,
        task::PinPolicy::Always => PinPolicy::Always,
    });
    let touch = template.touch_policy.map(|policy| match policy {
        task::TouchPolicy::Never => TouchPolicy::Never,
        task::TouchPolicy::Always => TouchPolicy::Always,
        task::TouchPolicy::Cached => TouchPolicy::Cached,
    });
    let like = match template.like {
        Some(Object::PivSlot(number)) if pin.is_none() || touch.is_none() => {
            let slot = SlotId::try_from(number).map_err(|error| classify("find the present slot", &error))?;
            let present = piv::metadata(card.yubikey, slot).map_err(|error| {
                let failure = classify("read the policies of the present key", &error);
                Failure {
                    message: format!("{}; say --pin-policy and --touch-policy", failure.message),
                    ..failure
                }
            })?;
            keys::policies(number, present.policy)
        }
        _ => (PinPolicy::Default, TouchPolicy::Default),
    };
    Ok((pin.unwrap_or(like.0), touch.unwrap_or(like.1)))
}
