//! How a TPM shows that a key is its own: TPM2_Certify by an attestation key, which signs nothing but what the TPM
//! itself made, and the endorsement key's certificate by the TPM's maker.

use der::Decode as _;
use tss_esapi::Context;
use tss_esapi::abstraction::AsymmetricAlgorithmSelection;
use tss_esapi::abstraction::ek::{create_ek_object_2, retrieve_ek_pubcert};
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Attest, AttestInfo, Data, EccScheme, HashScheme, Public, PublicEccParametersBuilder, Signature,
    SignatureScheme,
};
use tss_esapi::traits::{Marshall as _, UnMarshall as _};

use super::super::refused;
use super::credential::{activate, name};
use super::errors::{classify, kept};
use super::keys::{bound, elliptic, read_public};
use super::public::{encoded, padded};
use crate::algorithm::{Algorithm, Curve};
use crate::host::task::{Asking, Challenge, Evidence};
use crate::host::wire::{Class, Failure};
use crate::spki::SpkiDer;
use crate::verifier::Verifier;

/// The endorsement keys that TPMs have certificates for, the better one first (TCG EK Credential Profile, 2.2.1.4).
const ENDORSEMENT: [AsymmetricAlgorithmSelection; 3] = [
    AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
    AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP384),
    AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048),
];

/// Has the attestation key certify a loaded key, and reads a challenge.
pub(super) fn attest(context: &mut Context, key: KeyHandle, asking: &Asking) -> Result<Evidence, Failure> {
    let failed = |error: tss_esapi::Error| classify("attest the key", &error);
    let nonce = Data::try_from(asking.nonce.clone())
        .map_err(|_| refused("the nonce is longer than a TPM takes".into()))?;
    let public = read_public(context, key)?;
    let (attestation_key, by) = primary(context, attestation_template().map_err(failed)?)?;
    let sessions = (Some(AuthSession::Password), Some(AuthSession::Password), None);
    let scheme = SignatureScheme::EcDsa { hash_scheme: HashScheme::new(HashingAlgorithm::Sha256) };
    let certified =
        context.execute_with_sessions(sessions, |context| context.certify(key.into(), by, nonce, scheme));
    let endorsed = endorsement(context, by, asking.challenge.as_ref());
    context.flush_context(by.into()).map_err(|error| kept("let go of the attestation key", &error))?;
    let (info, signature) = certified.map_err(failed)?;
    let (endorsement_certificate, answer) = endorsed?;
    Ok(Evidence::Tpm {
        public: public.marshall().map_err(failed)?,
        attestation_key: attestation_key.marshall().map_err(failed)?,
        certify_info: info.marshall().map_err(failed)?,
        signature: signature.marshall().map_err(failed)?,
        endorsement_certificate,
        answer,
    })
}

/// The certificate that the TPM's maker left, DER, empty where there is none; and what a challenge for that says.
fn endorsement(
    context: &mut Context,
    attestation_key: KeyHandle,
    challenge: Option<&Challenge>,
) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let Some((which, certificate)) = endorsement_certificate(context) else {
        return match challenge {
            None => Ok((Vec::new(), Vec::new())),
            Some(_) => {
                Err(refused("the TPM has no endorsement certificate, which a challenge is for".into()))
            }
        };
    };
    let Some(challenge) = challenge else { return Ok((certificate, Vec::new())) };
    // The endorsement hierarchy's value, if it has one, is not ours to know; it must not lock our own keys.
    let failed = |what: &str, error: tss_esapi::Error| match classify(what, &error) {
        failure if failure.class == Class::Locked => refused(failure.message),
        failure => failure,
    };
    let key = create_ek_object_2(context, which, None)
        .map_err(|error| failed("make the endorsement key", error))?;
    let answer = activate(context, attestation_key, key, challenge);
    context.flush_context(key.into()).map_err(|error| kept("let go of the endorsement key", &error))?;
    let answer = answer.map_err(|error| match failed("answer the challenge", error) {
        failure if failure.class == Class::Refused => {
            refused(format!("the challenge is for another TPM, or was changed: {}", failure.message))
        }
        failure => failure,
    })?;
    Ok((certificate, answer))
}

fn endorsement_certificate(context: &mut Context) -> Option<(AsymmetricAlgorithmSelection, Vec<u8>)> {
    ENDORSEMENT.into_iter().find_map(|which| {
        let stored = retrieve_ek_pubcert(context, which).ok()?;
        // Some makers pad the NV index. What they signed stays as it is: not all of them encode as DER has it.
        let (_, padding) = x509_cert::Certificate::from_der_partial(&stored).ok()?;
        let length = stored.len() - padding.len();
        Some((which, stored.into_iter().take(length).collect()))
    })
}

/// A primary key of the endorsement hierarchy: the same template makes the same key each time.
fn primary(context: &mut Context, template: Public) -> Result<(Public, KeyHandle), Failure> {
    let made = context.execute_with_session(Some(AuthSession::Password), |context| {
        context.create_primary(Hierarchy::Endorsement, template, None, None, None, None)
    });
    // Its value, if it has one, is not ours to know; it must not lock our own keys.
    let made = made.map_err(|error| refused(classify("make the attestation key", &error).message))?;
    Ok((made.out_public, made.key_handle))
}

/// ECDSA on P-256, restricted: it signs only structures that begin with TPM_GENERATED (TPM 2.0 Part 1, 31.2).
fn attestation_template() -> tss_esapi::Result<Public> {
    let scheme = EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256));
    let parameters = PublicEccParametersBuilder::new_unrestricted_signing_key(scheme, EccCurve::NistP256);
    let attributes = bound().with_user_with_auth(true).with_sign_encrypt(true).with_restricted(true);
    elliptic(attributes.with_no_da(true), parameters.with_restricted(true))?.build()
}

/// The digest of what a key asks for (TPM 2.0 Part 1, 19.7).
fn policy(key: &Public) -> &[u8] {
    match key {
        Public::Rsa { auth_policy, .. }
        | Public::Ecc { auth_policy, .. }
        | Public::KeyedHash { auth_policy, .. }
        | Public::SymCipher { auth_policy, .. } => auth_policy.value(),
    }
}

/// What a proof says, once it holds.
pub(crate) struct Proven {
    pub(crate) key: SpkiDer,
    pub(crate) nonce: Vec<u8>,
    /// Attributes of the key worth knowing.
    pub(crate) notes: Vec<String>,
}

/// Checks TPM2_Certify on any machine: the attestation key's kind and signature, the key's name and attributes.
/// Whether the attestation key and the endorsement key are of one TPM, only that TPM can show.
pub(crate) fn verify(
    public: &[u8],
    attestation_key: &[u8],
    certify_info: &[u8],
    signature: &[u8],
) -> Result<Proven, String> {
    let malformed =
        |what: &'static str| move |error: tss_esapi::Error| format!("{what} is malformed: {error}");
    let attestation_key = Public::unmarshall(attestation_key).map_err(malformed("the attestation key"))?;
    let attributes = attestation_key.object_attributes();
    if !(attributes.restricted() && attributes.sign_encrypt() && attributes.fixed_tpm()) {
        return Err("the attestation key is not one: it signs more than what a TPM made".into());
    }
    let Signature::EcDsa(signature) = Signature::unmarshall(signature).map_err(malformed("the signature"))?
    else {
        return Err("the signature is not ECDSA".into());
    };
    let half = |number: &[u8]| padded(number, Curve::P256.field_len()).ok_or("the signature is malformed");
    let raw = [half(signature.signature_r().value())?, half(signature.signature_s().value())?].concat();
    let der = Curve::P256.der_from_raw(&raw).map_err(|error| error.to_string())?;
    let algorithm = Algorithm::Ecdsa(Curve::P256);
    let verifier = Verifier::new(&encoded(&attestation_key)?, algorithm);
    if !verifier.verifies(&algorithm.content(certify_info), &der) {
        return Err("the attestation key's signature does not verify".into());
    }
    let info = Attest::unmarshall(certify_info).map_err(malformed("what the TPM certified"))?;
    let AttestInfo::Certify { info: certified } = info.attested() else {
        return Err("the TPM certified something else than a key".into());
    };
    let key = Public::unmarshall(public).map_err(malformed("the key"))?;
    if certified.name().value() != name(public) {
        return Err("the TPM certified another key".into());
    }
    let attributes = key.object_attributes();
    if !(attributes.fixed_tpm() && attributes.fixed_parent() && attributes.sensitive_data_origin()) {
        return Err("the key may exist outside the TPM: it was imported, or may be moved".into());
    }
    let mut notes = vec!["made inside the TPM, and bound to it".to_owned()];
    notes.extend(attributes.no_da().then(|| "outside the protection against guessing".to_owned()));
    notes.push(match attributes.user_with_auth() {
        true => "signs with its authorization value alone".to_owned(),
        false => format!("signs only as its policy says: {}", hex::encode(policy(&key))),
    });
    Ok(Proven { key: encoded(&key)?, nonce: info.extra_data().value().to_vec(), notes })
}
