//! What a YubiKey's certificate about one of its keys says (Yubico, "PIV attestation": 1.3.6.1.4.1.41482.3).

use x509_cert::Certificate;

use super::attestation::Findings;

/// rsaEncryption (RFC 8017, A.1), and the firmware of YubiKeys that makes such keys badly (Yubico, YSA-2017-01).
const RSA: &str = "1.2.840.113549.1.1.1";
const FACTORABLE: std::ops::RangeInclusive<[u8; 3]> = [4, 2, 6]..=[4, 3, 4];

/// What the certificate, which the card's own was shown to have signed, says of its key.
pub(super) fn findings(certificate: &Certificate) -> Result<Findings, String> {
    let tbs = certificate.tbs_certificate();
    let mut proven = vec![format!("made inside the card: {}", tbs.subject())];
    let mut firmware = None;
    // Yubico, "PIV attestation": 1.3.6.1.4.1.41482.3.
    for extension in tbs.extensions().into_iter().flatten() {
        let value = extension.extn_value.as_bytes();
        proven.extend(match (extension.extn_id.to_string().as_str(), value) {
            ("1.3.6.1.4.1.41482.3.3", [major, minor, patch]) => {
                firmware = Some([*major, *minor, *patch]);
                Some(format!("firmware {major}.{minor}.{patch}"))
            }
            ("1.3.6.1.4.1.41482.3.7", [2, _, number @ ..]) => {
                let serial = number.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
                Some(format!("serial {serial}"))
            }
            ("1.3.6.1.4.1.41482.3.8", [pin, touch]) => {
                let pin = policy(*pin, ["never", "once", "always"]);
                let touch = policy(*touch, ["never", "always", "cached"]);
                Some(format!("PIN policy {pin}, touch policy {touch}"))
            }
            _ => None,
        });
    }
    // A certificate of another purpose, from a maker that the roots name too, says nothing of firmware.
    if !proven.iter().any(|line| line.starts_with("firmware ")) {
        return Err("the certificate is not one by a YubiKey about a key".into());
    }
    if !proven.iter().any(|line| line.starts_with("serial ")) {
        proven.push("no serial number: it is too old to say which card".to_owned());
    }
    let mut findings = Findings { proven, ..Findings::default() };
    let is_rsa = tbs.subject_public_key_info().algorithm.oid.to_string() == RSA;
    if is_rsa && firmware.is_some_and(|version| FACTORABLE.contains(&version)) {
        findings.unproven.push(
            "that nobody else knows the key: RSA keys that this firmware made can be factored (CVE-2017-15361)".to_owned(),
        );
    }
    Ok(findings)
}

/// What a number stands for, from 1 on.
fn policy(number: u8, names: [&str; 3]) -> String {
    let name = usize::from(number).checked_sub(1).and_then(|index| names.get(index).copied());
    name.map_or_else(|| number.to_string(), str::to_owned)
}
