//! How commands to a card are cut up, and the status words of its answers (ISO 7816-4).

use super::tlv::{parse, value};

// Status words (ISO 7816-4, 5.6).
pub(super) const OK: u16 = 0x9000;
pub(super) const WRONG_LENGTH: u16 = 0x6700;
pub(super) const NOT_SATISFIED: u16 = 0x6982;
pub(super) const BLOCKED: u16 = 0x6983;
pub(super) const OUT_OF_ORDER: u16 = 0x6985;
pub(super) const WRONG_DATA: u16 = 0x6a80;
pub(super) const NOT_FOUND: u16 = 0x6a82;
pub(super) const NO_REFERENCE: u16 = 0x6a88;
pub(super) const UNKNOWN: u16 = 0x6d00;
pub(super) const FAILED: u16 = 0x6f00;

/// The data of a command, and how many bytes of answer it takes (ISO 7816-4, 5.2).
pub(super) fn split(body: &[u8]) -> Option<(&[u8], usize)> {
    let most = |le: usize, all: usize| if le == 0 { all } else { le };
    match body {
        [] => Some((&[], 256)),
        [le] => Some((&[], most(usize::from(*le), 256))),
        [0, high, low] => Some((&[], most(usize::from(u16::from_be_bytes([*high, *low])), 65_536))),
        [0, high, low, rest @ ..] => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            Some((rest.get(..length)?, 65_536))
        }
        [length, rest @ ..] => {
            let (data, le) = rest.split_at_checked(usize::from(*length))?;
            Some((data, most(le.first().map_or(0, |le| usize::from(*le)), 256)))
        }
    }
}

/// The fields of a dynamic authentication template.
pub(super) fn template(data: &[u8]) -> Result<Vec<(u8, &[u8])>, u16> {
    let outer = parse(data).ok_or(WRONG_DATA)?;
    value(&outer, 0x7c).and_then(parse).ok_or(WRONG_DATA)
}

/// Two values of 8 bytes.
pub(super) fn halves(data: &[u8]) -> Result<([u8; 8], [u8; 8]), u16> {
    let (old, new) = data.split_at_checked(8).ok_or(WRONG_DATA)?;
    Ok((old.try_into().map_err(|_| WRONG_DATA)?, new.try_into().map_err(|_| WRONG_DATA)?))
}
