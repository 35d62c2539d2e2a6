//! Data objects of the virtual card (NIST SP 800-73-4, part 1, table 2; Yubico's own for its management key).

use openssl::error::ErrorStack;
use openssl::rand::rand_bytes;

use super::tlv::tlv;

/// Where Yubico's tools keep the management key; reading it takes the PIN.
pub(super) const PRINTED: [u8; 3] = [0x5f, 0xc1, 9];

/// Where they say that they did.
pub(super) const ADMIN: [u8; 3] = [0x5f, 0xff, 0];

/// The card holder unique identifier, which OpenSC asks for: FASC-N, a random GUID, expiry, no signature.
pub(super) fn card_holder() -> Result<Vec<u8>, ErrorStack> {
    let fasc_n = [
        0xd4, 0xe7, 0x39, 0xda, 0x73, 0x9c, 0xed, 0x39, 0xce, 0x73, 0x9d, 0x83, 0x68, 0x58, 0x21, 0x08, 0x42,
        0x10, 0x84, 0x21, 0xc8, 0x42, 0x10, 0xc3, 0xeb,
    ];
    let mut guid = [0; 16];
    rand_bytes(&mut guid)?;
    let fields = [(0x30, &fasc_n[..]), (0x34, &guid), (0x35, b"20400101"), (0x3e, &[]), (0xfe, &[])];
    Ok(fields.iter().flat_map(|(tag, content)| tlv(&[*tag], content)).collect())
}

/// What [`PRINTED`] holds: the management key.
pub(super) fn protected(key: &[u8]) -> Vec<u8> {
    tlv(&[0x88], &tlv(&[0x89], key))
}

/// What [`ADMIN`] holds: a flag for a management key that is kept.
pub(super) fn admin() -> Vec<u8> {
    tlv(&[0x80], &tlv(&[0x81], &[2]))
}
