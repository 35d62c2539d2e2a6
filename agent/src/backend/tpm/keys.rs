//! A key of a TPM: found or loaded, its public half, the proof that it signs, and signing.

use tss_esapi::Context;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
use tss_esapi::handles::{KeyHandle, ObjectHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Auth, Digest, EccPoint, HashScheme, HashcheckTicket, Public, PublicBuilder, PublicEccParametersBuilder,
    Signature, SignatureScheme, SymmetricDefinitionObject,
};
use tss_esapi::tss2_esys::TPMT_TK_HASHCHECK;

use super::super::{challenge, gone, locked, refused};
use super::errors::{classify, kept, owners};
use super::guard::Guard;
use super::is_last_try;
use super::keyfile::KeyFile;
use super::public::{encoded, padded};
use crate::algorithm::{Algorithm, Curve};
use crate::config::Object;
use crate::host::wire::{Class, Failure, KeySpec};
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;
use crate::verifier::Verifier;

/// The owner hierarchy (TPM 2.0 Part 2, 7.4): the parent of a key file is then its standard primary key.
pub(super) const OWNER: u32 = 0x4000_0001;

/// A key that passed its check.
pub(super) struct Key {
    source: Source,
    pub(super) public: PublicKey,
    pub(super) verifier: Verifier,
    guard: Guard,
}

/// Where a key is when it is to sign.
enum Source {
    /// In the TPM.
    Kept(KeyHandle),
    /// In a file, which is loaded for the purpose.
    File(KeyFile, Option<Auth>),
}

/// Finds or loads a key and has it sign a random challenge. Its handle is the caller's to [`Key::release`].
pub(super) fn open(
    context: &mut Context,
    key: &KeySpec,
    auth: Option<Auth>,
    by_operator: bool,
) -> Result<(Key, KeyHandle), Failure> {
    let (source, auth) = match &key.object {
        Object::TpmHandle(handle) => (Source::Kept(persistent(context, *handle)?), auth),
        Object::TpmFile(path) => {
            let file = KeyFile::read(path)?;
            let auth = auth.filter(|_| file.has_auth);
            if file.has_auth && auth.is_none() {
                return Err(waits(&key.object));
            }
            (Source::File(file, auth.clone()), auth)
        }
        object => return Err(not_ours(object)),
    };
    let handle = source.handle(context)?;
    match check(context, handle, key, auth, by_operator) {
        Ok((public, verifier, guard)) => Ok((Key { source, public, verifier, guard }, handle)),
        Err(failure) => {
            // If this fails, too, the next use of the TPM says so.
            let _ = source.release(context, handle);
            Err(failure)
        }
    }
}

impl Source {
    fn handle(&self, context: &mut Context) -> Result<KeyHandle, Failure> {
        match self {
            Self::Kept(handle) => Ok(*handle),
            Self::File(file, auth) => {
                let handle = load(context, file)?;
                let set = auth.iter().try_for_each(|auth| context.tr_set_auth(handle.into(), auth.clone()));
                set.map_err(|error| {
                    // If this fails, too, the next use of the TPM says so.
                    let _ = self.release(context, handle);
                    classify("set the authorization value", &error)
                })?;
                Ok(handle)
            }
        }
    }

    fn release(&self, context: &mut Context, handle: KeyHandle) -> Result<(), Failure> {
        let released = match self {
            Self::Kept(_) => context.tr_close(&mut handle.into()),
            Self::File(..) => context.flush_context(handle.into()),
        };
        released.map_err(|error| kept("let go of the key", &error))
    }
}

/// What a TPM, or a key file, says of a key; a file is not loaded for that.
pub(super) fn public_area(context: &mut Context, object: &Object) -> Result<Public, Failure> {
    match object {
        Object::TpmFile(path) => Ok(KeyFile::read(path)?.public),
        Object::TpmHandle(handle) => {
            let found = persistent(context, *handle)?;
            let read = read_public(context, found);
            Source::Kept(found).release(context, found)?;
            read
        }
        object => Err(not_ours(object)),
    }
}

pub(super) fn read_public(context: &mut Context, key: KeyHandle) -> Result<Public, Failure> {
    let read = context.execute_without_session(|context| context.read_public(key));
    read.map(|(public, ..)| public).map_err(|error| classify("read the public key", &error))
}

/// The configuration names objects of other devices, too.
pub(super) fn not_ours(object: &Object) -> Failure {
    refused(format!("{object} is not a key of a TPM"))
}

/// The public half of a key that is in the TPM, or that it loads, which shows that both belong together; also of one that does
/// not sign.
pub(super) fn shown(context: &mut Context, key: &KeySpec) -> Result<PublicKey, Failure> {
    let source = match &key.object {
        Object::TpmHandle(handle) => Source::Kept(persistent(context, *handle)?),
        Object::TpmFile(path) => Source::File(KeyFile::read(path)?, None),
        object => return Err(not_ours(object)),
    };
    let handle = source.handle(context)?;
    let read = read_public(context, handle);
    source.release(context, handle)?;
    let public = read?;
    // Storage keys and those that attest are not ours to delete.
    let attributes = public.object_attributes();
    if !attributes.sign_encrypt() || attributes.restricted() {
        return Err(refused("it is no key to sign models with".into()));
    }
    let spki = encoded(&public).map_err(refused)?;
    let algorithm = spki.algorithm(key.padding).map_err(|error| refused(error.to_string()))?;
    Ok(PublicKey { algorithm, spki, hashes: false })
}

/// No value is configured, so none was offered.
fn waits(object: &Object) -> Failure {
    locked(format!(
        "the key with {object} may ask for an authorization value, and the token has none: pin = …"
    ))
}

/// Whether a key that was found or loaded can be used.
fn check(
    context: &mut Context,
    handle: KeyHandle,
    key: &KeySpec,
    auth: Option<Auth>,
    by_operator: bool,
) -> Result<(PublicKey, Verifier, Guard), Failure> {
    let object = &key.object;
    let public = read_public(context, handle)?;
    let guard = Guard { pcrs: key.pcrs.clone(), auth: auth.is_some() };
    guard.holds(context)?;
    // A key that came since the TPM was opened may have another value.
    if guard.auth && !public.object_attributes().no_da() && !by_operator && is_last_try(context)? {
        return Err(refused(
            "one wrong authorization value more would lock the TPM, so this one is not tried".into(),
        ));
    }
    match (auth, object) {
        (Some(auth), Object::TpmHandle(_)) => {
            let set = context.tr_set_auth(handle.into(), auth);
            set.map_err(|error| classify("set the authorization value", &error))?;
        }
        // It may have a value after all, and the TPM counts wrong ones, the empty one too.
        (None, Object::TpmHandle(_))
            if guard.pcrs.is_none() && !public.object_attributes().no_da() && !by_operator =>
        {
            return Err(waits(object));
        }
        // A key file's was set when it was loaded.
        _ => {}
    }
    let wrong = |what| refused(format!("the key with {object} {what}"));
    let spki = public_half(&public, &guard).map_err(wrong)?;
    let algorithm = spki.algorithm(key.padding).map_err(|error| wrong(format!("cannot be used: {error}")))?;
    let challenge = challenge()?;
    let content = algorithm.content(&challenge);
    let signature = sign(context, handle, algorithm, &guard, algorithm.bytes(&content).map_err(refused)?)?;
    let verifier = Verifier::new(&spki, algorithm);
    if !verifier.verifies(&content, &signature) {
        return Err(refused(format!("the key with {object} makes signatures that do not verify")));
    }
    Ok((PublicKey { algorithm, spki, hashes: false }, verifier, guard))
}

impl Key {
    /// Whether it is loaded for the purpose.
    pub(super) fn is_file(&self) -> bool {
        matches!(self.source, Source::File(..))
    }

    /// Where it is now: loaded, if it is in a file.
    pub(super) fn handle(&self, context: &mut Context) -> Result<KeyHandle, Failure> {
        self.source.handle(context)
    }

    /// Lets go of its handle: a TPM has room for three that are loaded, or so.
    pub(super) fn release(&self, context: &mut Context, handle: KeyHandle) -> Result<(), Failure> {
        self.source.release(context, handle)
    }

    /// Signs a digest.
    pub(super) fn sign(
        &self,
        context: &mut Context,
        handle: KeyHandle,
        digest: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        sign(context, handle, self.public.algorithm, &self.guard, digest)
    }
}

fn sign(
    context: &mut Context,
    handle: KeyHandle,
    algorithm: Algorithm,
    guard: &Guard,
    digest: &[u8],
) -> Result<Vec<u8>, Failure> {
    let (hash, rsa) = match algorithm {
        Algorithm::Ecdsa(Curve::P256) => (HashingAlgorithm::Sha256, false),
        Algorithm::Ecdsa(Curve::P384) => (HashingAlgorithm::Sha384, false),
        Algorithm::Ecdsa(Curve::P521) => (HashingAlgorithm::Sha512, false),
        Algorithm::RsaPkcs1 => (HashingAlgorithm::Sha256, true),
        // TPMs choose the salt's length themselves, and not all choose the hash's.
        Algorithm::RsaPss => {
            return Err(refused("a TPM's RSA key signs with padding = \"pkcs1\"".into()));
        }
        Algorithm::Ed25519 | Algorithm::MlDsa(_) => {
            return Err(refused("TPMs have neither Ed25519 nor ML-DSA".into()));
        }
    };
    let hash_scheme = HashScheme::new(hash);
    let scheme =
        if rsa { SignatureScheme::RsaSsa { hash_scheme } } else { SignatureScheme::EcDsa { hash_scheme } };
    let wrong = |error: tss_esapi::Error| classify("sign", &error);
    let digest = Digest::try_from(digest.to_vec()).map_err(wrong)?;
    // The digest was not made by the TPM, which a null ticket says (TPM 2.0 Part 2, 10.7.4).
    let ticket = HashcheckTicket::try_from(TPMT_TK_HASHCHECK {
        tag: TPM2_ST_HASHCHECK,
        hierarchy: TPM2_RH_NULL,
        digest: Default::default(),
    });
    let ticket = ticket.map_err(wrong)?;
    let signed = guard
        .with(context, "sign", |context| context.sign(handle, digest.clone(), scheme, ticket.clone()))?;
    let malformed = || gone("the TPM's signature is malformed".into());
    match (signed, algorithm) {
        (Signature::RsaSsa(signature), _) => Ok(signature.signature().value().to_vec()),
        (Signature::EcDsa(signature), Algorithm::Ecdsa(curve)) => {
            // The TPM leaves leading zeros out.
            let r = padded(signature.signature_r().value(), curve.field_len());
            let s = padded(signature.signature_s().value(), curve.field_len());
            let raw = r.zip(s).map(|(r, s)| [r, s].concat()).ok_or_else(malformed)?;
            curve.der_from_raw(&raw).map_err(|_| malformed())
        }
        _ => Err(gone("the TPM answered with a signature of another kind".into())),
    }
}

pub(super) fn persistent(context: &mut Context, handle: u32) -> Result<KeyHandle, Failure> {
    let wrong = |error: tss_esapi::Error| classify("use the handle", &error);
    let persistent = PersistentTpmHandle::new(handle).map_err(wrong)?;
    let found = context
        .execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::Persistent(persistent)));
    let found: ObjectHandle = found.map_err(|error| match classify("find it", &error) {
        failure if failure.class == Class::Refused => {
            refused(format!("the TPM has no key with handle {handle:#010x}"))
        }
        failure => failure,
    })?;
    Ok(found.into())
}

/// Loads a key below its parent.
fn load(context: &mut Context, file: &KeyFile) -> Result<KeyHandle, Failure> {
    let parent = match file.parent {
        OWNER => storage_primary(context)?,
        handle => persistent(context, handle)?,
    };
    let loaded = context.execute_with_session(Some(AuthSession::Password), |context| {
        context.load(parent, file.private.clone(), file.public.clone())
    });
    // A TPM has room for three keys or so.
    if file.parent == OWNER {
        context.flush_context(parent.into()).map_err(|error| kept("flush the parent key", &error))?;
    }
    loaded.map_err(|error| match classify("load the key file", &error) {
        failure if failure.class == Class::Refused => {
            refused("this TPM did not make the key file: it cannot unwrap it".into())
        }
        failure => failure,
    })
}

/// The standard ECC storage primary of the owner hierarchy (TCG EK Credential Profile, template H-2 without its
/// policy), which is what the key files of tpm2-openssl have for a parent.
pub(super) fn storage_primary(context: &mut Context) -> Result<KeyHandle, Failure> {
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(
        SymmetricDefinitionObject::AES_128_CFB,
        EccCurve::NistP256,
    );
    let attributes =
        bound().with_user_with_auth(true).with_decrypt(true).with_restricted(true).with_no_da(true);
    let template = elliptic(attributes, parameters).and_then(PublicBuilder::build);
    let template = template.map_err(|error| classify("make the storage primary key", &error))?;
    let made = context.execute_with_session(Some(AuthSession::Password), |context| {
        context.create_primary(Hierarchy::Owner, template, None, None, None, None)
    });
    made.map(|made| made.key_handle).map_err(|error| owners("make the storage primary key", &error))
}

/// Made in this TPM, and for ever there.
pub(super) fn bound() -> ObjectAttributesBuilder {
    ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
}

/// The template of a key on an elliptic curve.
pub(super) fn elliptic(
    attributes: ObjectAttributesBuilder,
    parameters: PublicEccParametersBuilder,
) -> tss_esapi::Result<PublicBuilder> {
    Ok(PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build()?)
        .with_ecc_parameters(parameters.build()?)
        .with_ecc_unique_identifier(EccPoint::default()))
}

/// A key's public half, or why it cannot sign.
fn public_half(public: &Public, guard: &Guard) -> Result<SpkiDer, String> {
    let attributes = public.object_attributes();
    if !attributes.sign_encrypt() {
        return Err("may not sign: its attribute \"sign\" is clear".into());
    }
    if attributes.restricted() {
        return Err("is restricted: it signs only what the TPM itself made".into());
    }
    match (attributes.user_with_auth(), &guard.pcrs) {
        (false, None) => {
            Err("asks for a policy; if that is about PCRs, write which: pcrs = \"sha256:0,7\"".into())
        }
        (true, Some(_)) => Err("signs whatever its PCRs are: its attribute \"userwithauth\" is set".into()),
        _ => encoded(public),
    }
}
