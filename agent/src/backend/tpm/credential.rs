//! What shows that two keys are of one TPM: a secret that is encrypted for its endorsement key and names the other one.
//! Made here, in software, by whoever asks (TPM2_MakeCredential); only that TPM can read it (TPM2_ActivateCredential).

use openssl::bn::{BigNum, BigNumContext};
use openssl::derive::Deriver;
use openssl::ec::{EcGroupRef, EcKey, EcPointRef};
use openssl::encrypt::Encrypter;
use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest};
use openssl::pkey::{Id, PKey, Public as PublicHalf};
use openssl::rand::rand_bytes;
use openssl::rsa::Padding;
use openssl::sign::Signer;
use openssl::symm::{Cipher, encrypt};
use openssl::x509::X509;
use sha2::{Digest as _, Sha256};
use tss_esapi::Context;
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Digest, EncryptedSecret, IdObject, Nonce, SymmetricDefinition};

use crate::host::task::Challenge;

/// The names that the secret's seed and keys are derived under (TPM 2.0 Part 1, 24).
const IDENTITY: &[u8] = b"IDENTITY\0";
const STORAGE: &[u8] = b"STORAGE\0";
const INTEGRITY: &[u8] = b"INTEGRITY\0";

/// A key's name: of its hash algorithm, SHA-256, and of its public area (TPM 2.0 Part 1, 16).
pub(super) fn name(public: &[u8]) -> Vec<u8> {
    [&[0, 0x0b][..], &Sha256::digest(public)].concat()
}

/// The public half of an endorsement key, and what its standard template says beside (TCG EK Credential Profile, B.3
/// and B.4): every maker's certificates are about keys of those.
struct Endorsement {
    key: PKey<PublicHalf>,
    hash: MessageDigest,
    cipher: Cipher,
}

/// Encrypts a secret for the TPM with this endorsement certificate, DER, if it also has this attestation key,
/// TPMT_PUBLIC.
pub(crate) fn make(
    endorsement_certificate: &[u8],
    attestation_key: &[u8],
    secret: &[u8; 32],
) -> Result<Challenge, String> {
    let certificate = X509::from_der(endorsement_certificate);
    let key = certificate.and_then(|certificate| certificate.public_key());
    let key = key.map_err(|error| format!("the endorsement certificate is malformed: {error}"))?;
    let (hash, cipher) = match (key.id(), key.bits()) {
        (Id::EC, 256) | (Id::RSA, 2048) => (MessageDigest::sha256(), Cipher::aes_128_cfb128()),
        (Id::EC, 384) | (Id::RSA, 3072 | 4096) => (MessageDigest::sha384(), Cipher::aes_256_cfb128()),
        _ => return Err("its endorsement key is of a kind that is not known here".into()),
    };
    let endorsement = Endorsement { key, hash, cipher };
    endorsement.encrypted(&name(attestation_key), secret).map_err(|error| error.to_string())
}

impl Endorsement {
    fn encrypted(&self, name: &[u8], secret: &[u8; 32]) -> Result<Challenge, ErrorStack> {
        let (seed, encrypted_secret) = match self.key.ec_key() {
            Ok(key) => self.shared(&key)?,
            Err(_) => self.wrapped()?,
        };
        let storage = self.derived(&seed, STORAGE, name, self.cipher.key_len())?;
        let inner = encrypt(self.cipher, &storage, Some(&[0; 16]), &sized(secret))?;
        let key = self.derived(&seed, INTEGRITY, &[], self.hash.size())?;
        let integrity = self.hmac(&key, &[&inner, name])?;
        Ok(Challenge { credential: [sized(&integrity), inner].concat(), secret: encrypted_secret })
    }

    /// A seed that the owner of the key can derive, too, and what it needs for that (TPM 2.0 Part 1, C.6.4).
    fn shared(&self, theirs: &EcKey<PublicHalf>) -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
        let group = theirs.group();
        let ours = EcKey::generate(group)?;
        let (x, y) = coordinates(group, ours.public_key())?;
        let (their_x, _) = coordinates(group, theirs.public_key())?;
        let private = PKey::from_ec_key(ours)?;
        let mut deriver = Deriver::new(&private)?;
        deriver.set_peer(&self.key)?;
        let agreed = deriver.derive_to_vec()?;
        // KDFe (TPM 2.0 Part 1, 11.4.10.3).
        let mut hasher = Hasher::new(self.hash)?;
        for part in [&1_u32.to_be_bytes()[..], &agreed, IDENTITY, &x, &their_x] {
            hasher.update(part)?;
        }
        Ok((hasher.finish()?.to_vec(), [sized(&x), sized(&y)].concat()))
    }

    /// A random seed, encrypted (TPM 2.0 Part 1, B.10.4).
    fn wrapped(&self) -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
        let mut seed = vec![0; self.hash.size()];
        rand_bytes(&mut seed)?;
        let mut encrypter = Encrypter::new(&self.key)?;
        encrypter.set_rsa_padding(Padding::PKCS1_OAEP)?;
        encrypter.set_rsa_oaep_md(self.hash)?;
        encrypter.set_rsa_mgf1_md(self.hash)?;
        encrypter.set_rsa_oaep_label(IDENTITY)?;
        let mut out = vec![0; encrypter.encrypt_len(&seed)?];
        let length = encrypter.encrypt(&seed, &mut out)?;
        out.truncate(length);
        Ok((seed, out))
    }

    /// KDFa (TPM 2.0 Part 1, 11.4.10.2), of the one block that is enough for all that is asked for.
    fn derived(
        &self,
        seed: &[u8],
        label: &[u8],
        context: &[u8],
        bytes: usize,
    ) -> Result<Vec<u8>, ErrorStack> {
        let bits = u32::try_from(bytes * 8).unwrap_or(u32::MAX);
        let mut block = self.hmac(seed, &[&1_u32.to_be_bytes(), label, context, &bits.to_be_bytes()])?;
        block.truncate(bytes);
        Ok(block)
    }

    fn hmac(&self, key: &[u8], parts: &[&[u8]]) -> Result<Vec<u8>, ErrorStack> {
        let key = PKey::hmac(key)?;
        let mut signer = Signer::new(self.hash, &key)?;
        parts.iter().try_for_each(|part| signer.update(part))?;
        signer.sign_to_vec()
    }
}

/// Both as wide as the field.
fn coordinates(group: &EcGroupRef, point: &EcPointRef) -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
    let (mut x, mut y) = (BigNum::new()?, BigNum::new()?);
    point.affine_coordinates(group, &mut x, &mut y, &mut *BigNumContext::new()?)?;
    let width = i32::try_from(group.degree().div_ceil(8)).unwrap_or(i32::MAX);
    Ok((x.to_vec_padded(width)?, y.to_vec_padded(width)?))
}

/// With its length before it, as TPM2B structures are.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}

/// Has the TPM read what was encrypted for it.
pub(super) fn activate(
    context: &mut Context,
    attestation_key: KeyHandle,
    endorsement_key: KeyHandle,
    challenge: &Challenge,
) -> tss_esapi::Result<Vec<u8>> {
    let blob = IdObject::try_from(challenge.credential.clone())?;
    let secret = EncryptedSecret::try_from(challenge.secret.clone())?;
    let (public, _, _) = context.execute_without_session(|context| context.read_public(endorsement_key))?;
    let policy = match public.object_attributes().user_with_auth() {
        true => None,
        false => Some(endorsers_policy(context)?),
    };
    let shown = policy.map_or(AuthSession::Password, AuthSession::from);
    let sessions = (Some(AuthSession::Password), Some(shown), None);
    let read = context.execute_with_sessions(sessions, |context| {
        context.activate_credential(attestation_key, endorsement_key, blob, secret)
    });
    let flushed = match policy {
        Some(policy) => context.flush_context(SessionHandle::from(policy).into()),
        None => Ok(()),
    };
    let read = read?.value().to_vec();
    flushed.map(|()| read)
}

/// The endorsement hierarchy's value, which is empty on nearly all, shown in a session (TCG EK Credential Profile, B.6.2).
fn endorsers_policy(context: &mut Context) -> tss_esapi::Result<PolicySession> {
    let started = context.execute_without_session(|context| {
        let (symmetric, hash) = (SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
        context.start_auth_session(None, None, None, SessionType::Policy, symmetric, hash)
    });
    let none = tss_esapi::Error::WrapperError(tss_esapi::WrapperErrorKind::WrongValueFromTpm);
    let policy = PolicySession::try_from(started?.ok_or(none)?)?;
    let shown = context.execute_with_session(Some(AuthSession::Password), |context| {
        let (none, empty) = (Nonce::default(), Digest::default());
        context.policy_secret(policy, AuthHandle::Endorsement, none.clone(), empty, none, None)
    });
    match shown {
        Ok(_) => Ok(policy),
        Err(error) => {
            context.flush_context(SessionHandle::from(policy).into())?;
            Err(error)
        }
    }
}
