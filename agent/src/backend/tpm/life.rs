//! What operators do with the keys of a TPM.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use tss_esapi::Context;
use tss_esapi::constants::CapabilityType;
use tss_esapi::handles::{KeyHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::dynamic_handles::Persistent;
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::Provision;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Auth, CapabilityData, CreateKeyResult, Digest, EccScheme, HashScheme, Public, PublicBuilder,
    PublicEccParametersBuilder, PublicKeyRsa, PublicRsaParametersBuilder, RsaExponent, RsaScheme,
};

use super::super::refused;
use super::errors::{classify, is_about_parameters, kept, owners};
use super::guard::Guard;
use super::keyfile::{self, KeyFile};
use super::keys::Key;
use super::public::encoded;
use super::{attest, keys};
use crate::algorithm::{KeyType, Padding};
use crate::config::Object;
use crate::host::task::{Done, Listed, Need, Task, Template};
use crate::host::wire::{Class, Failure, KeySpec};

/// The first persistent handle, and the most that are asked for (TPM 2.0 Part 2, 7.5).
const PERSISTENT: (u32, u32) = (0x8100_0000, 64);

pub(super) fn operate(context: &mut Context, auth: Option<&Auth>, task: &Task) -> Result<Done, Failure> {
    match task {
        Task::List(objects) => list(context, objects).map(Done::Listed),
        Task::Generate(key, template) => {
            generate(context, key, template, auth)?;
            open(context, auth, key, |_, key, _| Ok(Done::Key(key.public.clone())))
        }
        Task::Find(key, need) => {
            let found = open(context, auth, key, |_, key, _| Ok(Done::Key(key.public.clone())));
            match found {
                Err(failure) if failure.class == Class::Refused && *need == Need::Shown => {
                    keys::shown(context, key).map(Done::Key).map_err(|_| failure)
                }
                found => found,
            }
        }
        Task::Sign(key, message) => open(context, auth, key, |context, key, handle| {
            let algorithm = key.public.algorithm;
            let content = algorithm.content(message);
            let digest = algorithm.bytes(&content).map_err(refused)?;
            key.sign(context, handle, digest).map(Done::Signature)
        }),
        Task::Store(..) => Err(refused(
            "a TPM has no place for a key's certificate; name its file in the configuration: certificate_chain".into(),
        )),
        Task::Attest(key, asking) => open(context, auth, key, |context, _, handle| {
            attest::attest(context, handle, asking).map(Done::Attested)
        }),
        Task::Delete(key, _) => delete(context, &key.object),
    }
}

/// Opens a key for this alone: a TPM has room for three keys or so.
fn open(
    context: &mut Context,
    auth: Option<&Auth>,
    key: &KeySpec,
    then: impl FnOnce(&mut Context, &Key, KeyHandle) -> Result<Done, Failure>,
) -> Result<Done, Failure> {
    let opened = keys::open(context, key, auth.cloned(), false).map_err(|failure| keys_own(auth, failure));
    let (key, handle) = opened?;
    let done = then(context, &key, handle);
    key.release(context, handle)?;
    done
}

/// A key that waits for a value while none is configured is no reason to lock the TPM's other keys.
pub(super) fn keys_own(auth: Option<&Auth>, failure: Failure) -> Failure {
    match failure.class {
        Class::Locked if auth.is_none() => refused(failure.message),
        _ => failure,
    }
}

fn list(context: &mut Context, objects: &[Object]) -> Result<Vec<Listed>, Failure> {
    let asked = context.execute_without_session(|context| {
        context.get_capability(CapabilityType::Handles, PERSISTENT.0, PERSISTENT.1)
    });
    let (data, _) = asked.map_err(|error| classify("list the persistent handles", &error))?;
    let CapabilityData::Handles(handles) = data else { return Ok(Vec::new()) };
    let mut listed = Vec::new();
    for handle in handles.into_inner() {
        let TpmHandle::Persistent(number) = handle else { continue };
        let object = Object::TpmHandle(number.into());
        let public = keys::public_area(context, &object)?;
        // Storage keys and the like are no keys to sign with.
        if public.object_attributes().sign_encrypt() {
            listed.push(shown(&object, &public));
        }
    }
    for object in objects {
        if let Object::TpmFile(path) = object
            && let Ok(file) = KeyFile::read(path)
        {
            listed.push(shown(object, &file.public));
        }
    }
    Ok(listed)
}

fn shown(object: &Object, public: &Public) -> Listed {
    let spki = encoded(public);
    let algorithm = spki.as_ref().ok().and_then(|spki| spki.algorithm(Default::default()).ok());
    let attributes = public.object_attributes();
    let flags = [
        (attributes.restricted(), "is restricted: it signs only what the TPM itself made"),
        (!attributes.user_with_auth(), "asks for a policy"),
        (attributes.no_da(), "outside the protection against guessing"),
        (!attributes.fixed_tpm(), "may be moved to another TPM"),
    ];
    Listed {
        object: object.clone(),
        algorithm: algorithm.map_or_else(|| "unknown".to_owned(), |algorithm| algorithm.name().to_owned()),
        public_key: spki.map(|spki| spki.0).unwrap_or_default(),
        certificate: false,
        notes: flags.into_iter().filter(|(set, _)| *set).map(|(_, note)| note.to_owned()).collect(),
    }
}

/// Makes a key below the owner's storage primary, and leaves it where the configuration says: under a persistent
/// handle, or in a file that no other TPM can use. What is there already stays.
fn generate(
    context: &mut Context,
    key: &KeySpec,
    template: &Template,
    auth: Option<&Auth>,
) -> Result<(), Failure> {
    if template.pin_policy.is_some() || template.touch_policy.is_some() {
        return Err(refused("--pin-policy and --touch-policy are for a YubiKey's keys".into()));
    }
    let key_type = template.key_type();
    if key_type == KeyType::Ed25519 || key_type.is_ml_dsa() {
        return Err(refused("TPMs have neither Ed25519 nor ML-DSA; use p256".into()));
    }
    if key_type.is_rsa() && key.padding == Padding::Pss {
        return Err(refused("a TPM's RSA key signs with padding = \"pkcs1\"".into()));
    }
    let no_da = template.no_da
        || match template.like.as_ref().map(|like| keys::public_area(context, like)) {
            // One that is gone says nothing.
            None => false,
            Some(Err(failure)) if failure.class == Class::Refused => false,
            Some(present) => present?.object_attributes().no_da(),
        };
    if auth.is_none() && !no_da && key.pcrs.is_none() && matches!(key.object, Object::TpmHandle(_)) {
        return Err(refused(
            "nobody could tell whether this key has an authorization value: give the token one (pin = …), or say --no-da"
                .into(),
        ));
    }
    let taken = match &key.object {
        Object::TpmHandle(handle) => match keys::persistent(context, *handle) {
            Ok(_) => true,
            Err(failure) if failure.class == Class::Refused => false,
            Err(failure) => return Err(failure),
        },
        Object::TpmFile(path) => path.exists(),
        object => return Err(keys::not_ours(object)),
    };
    if taken {
        return Err(refused(format!(
            "there is a key with {} already; choose another handle or file",
            key.object
        )));
    }
    let guard = Guard { pcrs: key.pcrs.clone(), auth: auth.is_some() };
    let policy = guard.policy(context)?;
    let public = public(template, no_da, policy).map_err(|error| classify("describe the key", &error))?;
    let parent = keys::storage_primary(context)?;
    let made = context.execute_with_session(Some(AuthSession::Password), |context| {
        context.create(parent, public, auth.cloned(), None, None, None)
    });
    let cannot = |error: tss_esapi::Error| {
        let mut failure = classify("make the key", &error);
        if is_about_parameters(&error) {
            failure.message =
                format!("this TPM makes no keys of type {key_type} ({}); use p256", failure.message);
        }
        failure
    };
    let done = made.map_err(cannot).and_then(|made| match &key.object {
        Object::TpmHandle(handle) => persist(context, parent, made, *handle),
        Object::TpmFile(path) => {
            let text = keyfile::encode(&made.out_public, &made.out_private, auth.is_some())?;
            write_new(path, &text).map_err(|error| {
                refused(format!("the key file {} cannot be written: {error}", path.display()))
            })
        }
        object => Err(keys::not_ours(object)),
    });
    context.flush_context(parent.into()).map_err(|error| kept("flush the parent key", &error))?;
    done
}

fn persist(
    context: &mut Context,
    parent: KeyHandle,
    made: CreateKeyResult,
    number: u32,
) -> Result<(), Failure> {
    let failed = |error: tss_esapi::Error| owners("keep the key in the TPM", &error);
    let handle = PersistentTpmHandle::new(number).map_err(failed)?;
    let kept = context.execute_with_session(Some(AuthSession::Password), |context| {
        let loaded = context.load(parent, made.out_private, made.out_public)?;
        let kept = context.evict_control(Provision::Owner, loaded.into(), Persistent::Persistent(handle));
        context.clear_sessions();
        context.flush_context(loaded.into())?;
        kept
    });
    let mut kept = kept.map_err(failed)?;
    context.tr_close(&mut kept).map_err(failed)
}

/// Signs whatever it is given, with the TPM's own randomness, and never leaves this TPM.
fn public(template: &Template, no_da: bool, policy: Option<Digest>) -> tss_esapi::Result<Public> {
    // With a policy, that alone lets it sign.
    let attributes =
        keys::bound().with_user_with_auth(policy.is_none()).with_sign_encrypt(true).with_no_da(no_da);
    let guarded = |builder: PublicBuilder| match policy.clone() {
        Some(policy) => builder.with_auth_policy(policy).build(),
        None => builder.build(),
    };
    // With its hash, which is what callers send: the crate knows no elliptic-curve key without a scheme.
    let curve = |curve, hash| {
        let scheme = EccScheme::EcDsa(HashScheme::new(hash));
        let parameters = PublicEccParametersBuilder::new_unrestricted_signing_key(scheme, curve);
        keys::elliptic(attributes, parameters).and_then(&guarded)
    };
    let rsa = |bits| {
        let exponent = RsaExponent::default();
        let parameters =
            PublicRsaParametersBuilder::new_unrestricted_signing_key(RsaScheme::Null, bits, exponent);
        guarded(
            PublicBuilder::new()
                .with_public_algorithm(PublicAlgorithm::Rsa)
                .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
                .with_object_attributes(attributes.build()?)
                .with_rsa_parameters(parameters.build()?)
                .with_rsa_unique_identifier(PublicKeyRsa::default()),
        )
    };
    match template.key_type() {
        KeyType::P256 => curve(EccCurve::NistP256, HashingAlgorithm::Sha256),
        KeyType::P384 => curve(EccCurve::NistP384, HashingAlgorithm::Sha384),
        KeyType::P521 => curve(EccCurve::NistP521, HashingAlgorithm::Sha512),
        KeyType::Rsa2048 => rsa(RsaKeyBits::Rsa2048),
        KeyType::Rsa3072 => rsa(RsaKeyBits::Rsa3072),
        KeyType::Rsa4096 => rsa(RsaKeyBits::Rsa4096),
        // Refused before.
        KeyType::Ed25519 | KeyType::MlDsa44 | KeyType::MlDsa65 | KeyType::MlDsa87 => {
            Err(tss_esapi::Error::WrapperError(tss_esapi::WrapperErrorKind::UnsupportedParam))
        }
    }
}

/// A file that was not there, whole or not at all.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        // The key was never used: nothing is lost with it.
        let _ = std::fs::remove_file(path);
    }
    written
}

fn delete(context: &mut Context, object: &Object) -> Result<Done, Failure> {
    match object {
        Object::TpmHandle(number) => {
            let found = keys::persistent(context, *number)?;
            let failed = |error: tss_esapi::Error| owners("delete the key", &error);
            let handle = PersistentTpmHandle::new(*number).map_err(failed)?;
            let evicted = context.execute_with_session(Some(AuthSession::Password), |context| {
                context.evict_control(Provision::Owner, found.into(), Persistent::Persistent(handle))
            });
            evicted.map(|_| Done::Nothing).map_err(failed)
        }
        Object::TpmFile(path) => {
            let removed = std::fs::remove_file(path);
            removed.map(|()| Done::Nothing).map_err(|error| refused(format!("{}: {error}", path.display())))
        }
        object => Err(keys::not_ours(object)),
    }
}
