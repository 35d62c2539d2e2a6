//! The keys of the virtual card: generated, imported, signed with, attested.

use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::{BigNum, BigNumContext};
use openssl::ec::{EcGroup, EcKey, EcPoint, PointConversionForm};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private, Public};
use openssl::rsa::{Padding, Rsa, RsaPrivateKeyBuilder};
use openssl::x509::{X509, X509Builder, X509Extension, X509Name};

use super::tlv::{tlv, value};

/// A key in a slot.
pub(super) struct Slot {
    pub(super) key: PKey<Private>,
    /// 1 never, 2 once, 3 always.
    pub(super) pin_policy: u8,
    /// 1 never, 2 always, 3 cached.
    pub(super) touch_policy: u8,
    pub(super) imported: bool,
}

impl Slot {
    /// Policies are asked for in the fields; the slots for signatures and for card authentication have their own defaults.
    pub(super) fn new(number: u8, key: PKey<Private>, fields: &[(u8, &[u8])], imported: bool) -> Self {
        let asked = |tag| value(fields, tag).and_then(|field| field.first()).copied().unwrap_or(0);
        let pin_policy = match asked(0xaa) {
            0 if number == 0x9c => 3,
            0 if number == 0x9e => 1,
            0 => 2,
            policy => policy,
        };
        Self { key, pin_policy, touch_policy: asked(0xab).max(1), imported }
    }
}

/// PIV's number of a key's algorithm (Yubico, "PIV extensions").
pub(super) fn algorithm(key: &PKey<Private>) -> u8 {
    match (key.id(), key.bits()) {
        (Id::RSA, 2048) => 0x07,
        (Id::RSA, 3072) => 0x05,
        (Id::RSA, 4096) => 0x16,
        (Id::RSA, _) => 0x06,
        (Id::EC, 256) => 0x11,
        (Id::EC, _) => 0x14,
        _ => 0xe0,
    }
}

/// Makes a key; none for a number that is not known, to older firmware or at all.
pub(super) fn generate(algorithm: u8, new_firmware: bool) -> Option<PKey<Private>> {
    match algorithm {
        0x05 | 0x16 | 0xe0 if !new_firmware => None,
        0x06 => PKey::from_rsa(Rsa::generate(1024).ok()?).ok(),
        0x07 => PKey::from_rsa(Rsa::generate(2048).ok()?).ok(),
        0x05 => PKey::from_rsa(Rsa::generate(3072).ok()?).ok(),
        0x16 => PKey::from_rsa(Rsa::generate(4096).ok()?).ok(),
        0xe0 => PKey::generate_ed25519().ok(),
        _ => {
            let group = group(algorithm)?;
            PKey::from_ec_key(EcKey::generate(&group).ok()?).ok()
        }
    }
}

/// Takes a key over from the fields of IMPORT ASYMMETRIC KEY.
pub(super) fn import(algorithm: u8, fields: &[(u8, &[u8])]) -> Option<PKey<Private>> {
    let number = |tag| value(fields, tag).and_then(|bytes| BigNum::from_slice(bytes).ok());
    match algorithm {
        0x05..=0x07 | 0x16 => {
            let (p, q) = (number(1)?, number(2)?);
            let e = BigNum::from_u32(65537).ok()?;
            let mut context = BigNumContext::new().ok()?;
            let (mut n, mut phi, mut d) = (BigNum::new().ok()?, BigNum::new().ok()?, BigNum::new().ok()?);
            n.checked_mul(&p, &q, &mut context).ok()?;
            let (mut p1, mut q1) = (p.to_owned().ok()?, q.to_owned().ok()?);
            p1.sub_word(1).ok()?;
            q1.sub_word(1).ok()?;
            phi.checked_mul(&p1, &q1, &mut context).ok()?;
            d.mod_inverse(&e, &phi, &mut context).ok()?;
            let rsa = RsaPrivateKeyBuilder::new(n, e, d).ok()?.set_factors(p, q).ok()?;
            let rsa = rsa.set_crt_params(number(3)?, number(4)?, number(5)?).ok()?.build();
            PKey::from_rsa(rsa).ok()
        }
        0xe0 => PKey::private_key_from_raw_bytes(value(fields, 7)?, Id::ED25519).ok(),
        _ => {
            let (group, secret) = (group(algorithm)?, number(6)?);
            let mut public = EcPoint::new(&group).ok()?;
            public.mul_generator2(&group, &secret, &mut *BigNumContext::new().ok()?).ok()?;
            PKey::from_ec_key(EcKey::from_private_components(&group, &secret, &public).ok()?).ok()
        }
    }
}

fn group(algorithm: u8) -> Option<EcGroup> {
    let curve = match algorithm {
        0x11 => Nid::X9_62_PRIME256V1,
        0x14 => Nid::SECP384R1,
        _ => return None,
    };
    EcGroup::from_curve_name(curve).ok()
}

/// The public half as GENERATE and GET METADATA give it: modulus and exponent, or a point.
pub(super) fn public(key: &PKey<Private>) -> Result<Vec<u8>, ErrorStack> {
    if let Ok(rsa) = key.rsa() {
        return Ok([tlv(&[0x81], &rsa.n().to_vec()), tlv(&[0x82], &rsa.e().to_vec())].concat());
    }
    let point = match key.ec_key() {
        Ok(ec) => {
            let mut context = BigNumContext::new()?;
            ec.public_key().to_bytes(ec.group(), PointConversionForm::UNCOMPRESSED, &mut context)?
        }
        Err(_) => key.raw_public_key()?,
    };
    Ok(tlv(&[0x86], &point))
}

/// What GENERAL AUTHENTICATE does: ECDSA over a digest, Ed25519 over a message, RSA over padded bytes.
pub(super) fn sign(key: &PKey<Private>, input: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    if let Ok(rsa) = key.rsa() {
        let mut out = vec![0; rsa.size() as usize];
        rsa.private_encrypt(input, &mut out, Padding::NONE)?;
        return Ok(out);
    }
    match key.ec_key() {
        Ok(ec) => openssl::ecdsa::EcdsaSig::sign(input, &ec)?.to_der(),
        Err(_) => openssl::sign::Signer::new_without_digest(key)?.sign_oneshot_to_vec(input),
    }
}

/// The certificate of the attestation key, which stands in for Yubico's.
pub(super) fn attestation_ca(key: &PKey<Private>) -> Result<Vec<u8>, ErrorStack> {
    let mut builder = certificate("Virtual PIV Attestation", "Virtual PIV Attestation", key)?;
    let constraints = openssl::x509::extension::BasicConstraints::new().critical().ca().build()?;
    builder.append_extension(constraints)?;
    builder.sign(key, MessageDigest::sha256())?;
    builder.build().to_der()
}

/// A certificate that says how the key in a slot came to be (Yubico, "PIV attestation").
pub(super) fn attest(
    number: u8,
    slot: &Slot,
    serial: u32,
    version: [u8; 3],
    by: &PKey<Private>,
) -> Result<Vec<u8>, ErrorStack> {
    let subject = format!("YubiKey PIV Attestation {number:02x}");
    let mut builder = certificate(&subject, "Virtual PIV Attestation", &slot.key)?;
    let integer = [&[2, 4][..], &serial.to_be_bytes()].concat();
    let extensions: [(&str, &[u8]); 4] = [
        ("1.3.6.1.4.1.41482.3.3", &version),
        ("1.3.6.1.4.1.41482.3.7", &integer),
        ("1.3.6.1.4.1.41482.3.8", &[slot.pin_policy, slot.touch_policy]),
        ("1.3.6.1.4.1.41482.3.9", &[1]),
    ];
    for (oid, content) in extensions {
        let (oid, content) = (Asn1Object::from_str(oid)?, Asn1OctetString::new_from_bytes(content)?);
        builder.append_extension(X509Extension::new_from_der(&oid, false, &content)?)?;
    }
    builder.sign(by, MessageDigest::sha256())?;
    builder.build().to_der()
}

fn certificate(subject: &str, issuer: &str, key: &PKey<Private>) -> Result<X509Builder, ErrorStack> {
    let public: PKey<Public> = PKey::public_key_from_der(&key.public_key_to_der()?)?;
    let name = |text: &str| {
        let mut name = X509Name::builder()?;
        name.append_entry_by_text("CN", text)?;
        Ok::<_, ErrorStack>(name.build())
    };
    let mut builder = X509::builder()?;
    let mut serial = BigNum::new()?;
    serial.rand(63, openssl::bn::MsbOption::ONE, false)?;
    builder.set_version(2)?;
    builder.set_serial_number(&*serial.to_asn1_integer()?)?;
    builder.set_subject_name(&*name(subject)?)?;
    builder.set_issuer_name(&*name(issuer)?)?;
    builder.set_not_before(&*Asn1Time::days_from_now(0)?)?;
    builder.set_not_after(&*Asn1Time::days_from_now(3650)?)?;
    builder.set_pubkey(&public)?;
    Ok(builder)
}
