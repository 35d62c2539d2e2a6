//! BER-TLV with tags of one byte, as PIV commands have it (NIST SP 800-73-4, part 2).

/// Appends a tag, the length and the value.
pub(super) fn tlv(tag: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = tag.to_vec();
    let [high, low] = u16::try_from(value.len()).expect("shorter than 64 KiB").to_be_bytes();
    match value.len() {
        0..0x80 => out.push(low),
        0x80..0x100 => out.extend([0x81, low]),
        _ => out.extend([0x82, high, low]),
    }
    out.extend_from_slice(value);
    out
}

/// All tags and values; none if the bytes are not TLV.
pub(super) fn parse(mut bytes: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut found = Vec::new();
    while let Some((&tag, rest)) = bytes.split_first() {
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0x81 => rest.split_first().map(|(&length, rest)| (usize::from(length), rest))?,
            0x82 => rest
                .split_first_chunk()
                .map(|(length, rest)| (usize::from(u16::from_be_bytes(*length)), rest))?,
            length => (usize::from(length), rest),
        };
        let (value, rest) = rest.split_at_checked(length)?;
        found.push((tag, value));
        bytes = rest;
    }
    Some(found)
}

/// The value of a tag.
pub(super) fn value<'a>(fields: &[(u8, &'a [u8])], tag: u8) -> Option<&'a [u8]> {
    fields.iter().find(|(found, _)| *found == tag).map(|(_, value)| *value)
}
