//! What a YubiHSM 2's certificate about one of its keys says (docs.yubico.com/hardware/oid, 1.3.6.1.4.1.41482.4; the numbers
//! of origins and capabilities: Yubico/yubihsm-shell, lib/yubihsm.h).

use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::asn1::{BitStringRef, OctetStringRef, Utf8StringRef};

use super::attestation::Findings;

const FIRMWARE: &str = "1.3.6.1.4.1.41482.4.1";
const SERIAL: &str = "1.3.6.1.4.1.41482.4.2";
const ORIGIN: &str = "1.3.6.1.4.1.41482.4.3";
const CAPABILITIES: &str = "1.3.6.1.4.1.41482.4.5";
const OBJECT: &str = "1.3.6.1.4.1.41482.4.6";
const LABEL: &str = "1.3.6.1.4.1.41482.4.9";

/// Made there, and nothing else: 0x11 was made there, left under a wrap key and came back.
const GENERATED: u64 = 0x01;

const EXPORTABLE: u64 = 1 << 16;
/// What keys sign with, and what makes others trust them.
const SIGNING: [(u64, &str); 5] = [
    (1 << 5, "sign-pkcs"),
    (1 << 6, "sign-pss"),
    (1 << 7, "sign-ecdsa"),
    (1 << 8, "sign-eddsa"),
    (1 << 34, "sign-attestation-certificate"),
];
/// The highest that there is in firmware 2.4: what later ones allow is not known here.
const HIGHEST: u32 = 55;

/// What the certificate, which the device's own was shown to have signed, says of its key.
pub(super) fn findings(about_key: &Certificate, of_device: &Certificate) -> Result<Findings, String> {
    let serial = number(about_key, SERIAL)?;
    if number(of_device, SERIAL)? != serial {
        return Err("the two certificates are of different devices".into());
    }
    let firmware: &OctetStringRef = one(about_key, FIRMWARE)?;
    let [major, minor, patch] = firmware.as_bytes() else { return Err(malformed(FIRMWARE)) };
    let label: Utf8StringRef<'_> = one(about_key, LABEL)?;
    let (object, origin) = (number(about_key, OBJECT)?, bits(about_key, ORIGIN)?);
    let capabilities = bits(about_key, CAPABILITIES)?;
    let may: Vec<_> =
        SIGNING.iter().filter(|(bit, _)| capabilities & bit != 0).map(|(_, name)| *name).collect();
    let mut findings = Findings::default();
    let (proven, unproven) = (&mut findings.proven, &mut findings.unproven);
    match origin {
        GENERATED => proven.push(format!("made inside the YubiHSM 2: object 0x{object:04x}")),
        _ => unproven.push(format!(
            "that it was made inside the YubiHSM 2, and nowhere else: its origin is 0x{origin:02x}, imported"
        )),
    }
    proven.push(format!("serial {serial}"));
    proven.push(format!("firmware {major}.{minor}.{patch}"));
    proven.push(format!("capabilities 0x{capabilities:016x} ({})", may.join(", ")));
    if capabilities & EXPORTABLE != 0 {
        unproven.push("that it never leaves the device: it has the capability exportable-under-wrap".into());
    }
    if capabilities.checked_ilog2().is_some_and(|bit| bit > HIGHEST) {
        unproven.push("what it may be used for: it has capabilities that are not known here".into());
    }
    findings.noted.push(format!("its label: {}", label.as_str()));
    Ok(findings)
}

/// The value of an extension that has to be there once.
fn one<'a, T: Decode<'a, Error = x509_cert::der::Error>>(
    certificate: &'a Certificate,
    oid: &str,
) -> Result<T, String> {
    let extensions = certificate.tbs_certificate().extensions().into_iter().flatten();
    let mut found = extensions.filter(|extension| extension.extn_id.to_string() == oid);
    match (found.next(), found.next()) {
        (Some(extension), None) => T::from_der(extension.extn_value.as_bytes()).map_err(|_| malformed(oid)),
        _ => Err(format!("the certificate is not one by a YubiHSM 2 about a key: {oid} is not there once")),
    }
}

fn malformed(oid: &str) -> String {
    format!("the certificate's {oid} is malformed")
}

fn number(certificate: &Certificate, oid: &str) -> Result<u64, String> {
    one(certificate, oid)
}

/// The bytes of a BIT STRING as one number: bit n of that is the n-th of its list, other than in X.680, 22.7.
fn bits(certificate: &Certificate, oid: &str) -> Result<u64, String> {
    let bits: BitStringRef<'_> = one(certificate, oid)?;
    let bytes = bits.as_bytes().filter(|bytes| bytes.len() <= size_of::<u64>());
    let bytes = bytes.ok_or_else(|| malformed(oid))?;
    Ok(bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}
