//! What DER claims to hold, before anything is set aside for it.

/// How deep elements may lie in each other. Time stamps and their certificates have some twenty levels.
const DEEPEST: usize = 64;

/// Whether every element ends within the one that it is in (X.690, 8.1.3). The der crate sets memory aside for as much as an
/// element claims, before it looks for what is there.
pub(crate) fn fit(der: &[u8]) -> bool {
    fit_within(der, DEEPEST)
}

fn fit_within(elements: &[u8], levels: usize) -> bool {
    let mut rest = elements;
    while !rest.is_empty() {
        let Some((tag, content, next)) = first(rest) else { return false };
        let constructed = tag & 0x20 != 0;
        if constructed && (levels == 0 || !fit_within(content, levels - 1)) {
            return false;
        }
        rest = next;
    }
    true
}

/// The first element's tag and content, and what comes after it. No tag of what we read takes more than a byte.
fn first(elements: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, after) = elements.split_first().filter(|(tag, _)| *tag & 0x1f != 0x1f)?;
    let (&short, after) = after.split_first()?;
    let (length, after) = match short {
        0..=0x7f => (usize::from(short), after),
        0x81..=0x84 => {
            let (bytes, after) = after.split_at_checked(usize::from(short & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), after)
        }
        _ => return None,
    };
    let (content, next) = after.split_at_checked(length)?;
    Some((tag, content, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_claims_more_than_there_is() {
        assert!(fit(b"") && fit(b"\x05\x00") && fit(b"\x30\x04\x02\x02\x01\x02\x05\x00"));
        assert!(fit(b"\x04\x03\x30\x82\xff"), "what a string holds is somebody else's");
        for der in [
            &b"\x30"[..],
            b"\x30\x05\x02\x02\x01\x02",
            b"\x30\x04\x02\x03\x01\x02",
            // 80 MB inside of eight bytes, as a fuzzer found it.
            b"\xa0\x06\x30\x84\x04\xce\x90\x61",
            b"\x30\x80\x00\x00",
            b"\x30\x85\x00\x00\x00\x00\x00",
            b"\x3f\x81\x00\x00",
        ] {
            assert!(!fit(der), "{der:x?}");
        }
        let nested = |levels: u8| {
            (0..levels).fold(Vec::new(), |inside: Vec<u8>, level| [&[0x30, level * 2][..], &inside].concat())
        };
        assert!(fit(&nested(60)), "as deep as anything is");
        let deepest = (0..DEEPEST + 2).fold(Vec::new(), |inside: Vec<u8>, _| {
            let length = u16::try_from(inside.len()).expect("short").to_be_bytes();
            [&[0x30, 0x82][..], &length, &inside].concat()
        });
        assert!(!fit(&deepest));
    }
}
