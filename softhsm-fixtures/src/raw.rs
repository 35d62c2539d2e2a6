//! Devices without us, as fast as one thread can: what benchmarks put beside the agent's figures.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use tss_esapi::Context;
use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
use tss_esapi::handles::{KeyHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{Auth, Digest, HashScheme, HashcheckTicket, SignatureScheme};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::tss2_esys::TPMT_TK_HASHCHECK;
use yubikey::piv::{AlgorithmId, SlotId, sign_data};
use yubikey::{Serial, YubiKey};

use crate::piv;
use crate::softhsm::{MODULE, PIN, slot};
use crate::swtpm::AUTH;

/// How fast it signs.
pub struct RawSpeed {
    /// Signatures per second.
    pub per_second: f64,
    /// The median, in microseconds.
    pub p50_us: f64,
}

fn measured(duration: Duration, mut sign: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<RawSpeed> {
    let (started, mut times) = (Instant::now(), Vec::new());
    while started.elapsed() < duration {
        let one = Instant::now();
        sign()?;
        times.push(one.elapsed());
    }
    let elapsed = started.elapsed().as_secs_f64();
    times.sort_unstable();
    let median = times.get(times.len() / 2).context("nothing was signed")?;
    Ok(RawSpeed { per_second: times.len() as f64 / elapsed, p50_us: median.as_secs_f64() * 1e6 })
}

/// A SoftHSM token: ECDSA over a digest as wide as the curve, RSA with PKCS#1 v1.5.
pub fn softhsm(label: &str, name: &str, duration: Duration) -> anyhow::Result<RawSpeed> {
    let pkcs11 = Pkcs11::new(MODULE)?;
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let session = pkcs11.open_ro_session(slot(&pkcs11, label)?)?;
    session.login(UserType::User, Some(&AuthPin::new(PIN.into())))?;
    let private = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Label(name.into())];
    let key = *session.find_objects(&private)?.first().context("no such key")?;
    let kind = session.get_attributes(key, &[AttributeType::KeyType, AttributeType::EcParams])?;
    let (mechanism, input) = match kind.as_slice() {
        [Attribute::KeyType(KeyType::RSA), ..] => (Mechanism::RsaPkcs, vec![7; 51]),
        // An OID of 7 bytes and less names P-384 and P-521, one of 10 P-256.
        [_, Attribute::EcParams(params)] if params.len() > 8 => (Mechanism::Ecdsa, vec![7; 32]),
        _ => (Mechanism::Ecdsa, vec![7; 48]),
    };
    measured(duration, || {
        session.sign(&mechanism, key, &input)?;
        Ok(())
    })
}

/// A TPM's persistent P-256 key.
pub fn tpm(tcti: &str, handle: u32, duration: Duration) -> anyhow::Result<RawSpeed> {
    let name: TctiNameConf = tcti.parse()?;
    let mut context = Context::new(name)?;
    let handle = TpmHandle::Persistent(PersistentTpmHandle::new(handle)?);
    let key = context.execute_without_session(|context| context.tr_from_tpm_public(handle))?;
    context.tr_set_auth(key, Auth::try_from(AUTH.as_bytes().to_vec())?)?;
    let key = KeyHandle::from(key);
    measured(duration, || {
        let ticket =
            TPMT_TK_HASHCHECK { tag: TPM2_ST_HASHCHECK, hierarchy: TPM2_RH_NULL, digest: Default::default() };
        let (ticket, digest) = (HashcheckTicket::try_from(ticket)?, Digest::try_from(vec![7; 32])?);
        let scheme = SignatureScheme::EcDsa { hash_scheme: HashScheme::new(HashingAlgorithm::Sha256) };
        context.execute_with_session(Some(AuthSession::Password), |context| {
            context.sign(key, digest, scheme, ticket)
        })?;
        Ok(())
    })
}

/// A card's P-256 key that asks for the PIN once.
pub fn card(serial: u32, number: u8, duration: Duration) -> anyhow::Result<RawSpeed> {
    let mut card = YubiKey::open_by_serial(Serial(serial))?;
    let Ok(slot) = SlotId::try_from(number) else { bail!("no slot {number:02x}") };
    card.verify_pin(piv::PIN.as_bytes())?;
    measured(duration, || {
        sign_data(&mut card, &[7; 32], AlgorithmId::EccP256, slot)?;
        Ok(())
    })
}
