//! The management application of a virtual YubiKey: what kind it is (Yubico, "YubiKey 5 management application").

use super::tlv::tlv;

/// Its application identifier.
pub(super) const APPLICATION: &[u8] = &[0xa0, 0, 0, 5, 0x27, 0x47, 0x11, 0x17];

/// What it answers to its selection.
pub(super) fn banner([major, minor, patch]: [u8; 3]) -> Vec<u8> {
    format!("Virtual mgr - FW version {major}.{minor}.{patch}").into_bytes()
}

/// READ CONFIG: PIV is all that it has, over USB.
pub(super) fn configuration(serial: u32, version: [u8; 3]) -> Vec<u8> {
    const PIV_ONLY: [u8; 2] = [0, 0x10];
    const USB_A_KEYCHAIN: u8 = 1;
    let fields = [
        tlv(&[1], &PIV_ONLY),
        tlv(&[2], &serial.to_be_bytes()),
        tlv(&[3], &PIV_ONLY),
        tlv(&[4], &[USB_A_KEYCHAIN]),
        tlv(&[5], &version),
    ]
    .concat();
    [vec![u8::try_from(fields.len()).expect("a few bytes")], fields].concat()
}
