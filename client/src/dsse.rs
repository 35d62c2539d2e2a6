//! DSSE v1.0: the envelope, and the bytes that are signed.

use sha2::{Digest as _, Sha256};

use crate::hash::Digest;

/// `payloadType` of an in-toto statement.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";

/// A pre-authentication encoding: exactly the bytes that are signed.
pub struct Pae<'a> {
    header: Vec<u8>,
    /// Not copied: it may be tens of megabytes.
    payload: &'a [u8],
}

impl<'a> Pae<'a> {
    /// `DSSEv1 LEN(type) type LEN(payload) payload` (DSSE protocol, "PAE").
    pub fn of(payload: &'a [u8]) -> Self {
        let header = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
        Self { header: header.into_bytes(), payload }
    }

    /// The bytes, one part after the other.
    pub fn parts(&self) -> [&[u8]; 2] {
        [&self.header, self.payload]
    }

    /// The bytes together, for algorithms that take a message at once.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.parts().concat()
    }
}

/// SHA-256 of what release 0.2.0 of the reference signed instead: a misspelt version, and the text of a Python bytes
/// literal in the payload's place.
pub(crate) fn digest_of_release_0_2_0(payload: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(format!("DSSEV1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len()));
    python_literal(payload, |text| hasher.update(text));
    Digest::from_sha256(hasher)
}

/// As Python's `repr()` quotes and escapes. In pieces: it may be four times as long.
fn python_literal(payload: &[u8], mut each: impl FnMut(&[u8])) {
    let quote = if payload.contains(&b'\'') && !payload.contains(&b'"') { b'"' } else { b'\'' };
    each(&[b'b', quote]);
    for piece in payload.chunks(4096) {
        let mut text = Vec::with_capacity(piece.len() * 4);
        for &byte in piece {
            match byte {
                b'\\' => text.extend(b"\\\\"),
                b'\t' => text.extend(b"\\t"),
                b'\n' => text.extend(b"\\n"),
                b'\r' => text.extend(b"\\r"),
                _ if byte == quote => text.extend([b'\\', quote]),
                b' '..=b'~' => text.push(byte),
                _ => text.extend(format!("\\x{byte:02x}").bytes()),
            }
        }
        each(&text);
    }
    each(&[quote]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_in_bytes() {
        let expected = "DSSEv1 28 application/vnd.in-toto+json 3 ü!".as_bytes();
        assert_eq!(Pae::of("ü!".as_bytes()).to_bytes(), expected);
    }

    #[test]
    fn python_quotes_bytes_like_this() {
        let literal = |payload: &[u8]| {
            let mut text = Vec::new();
            python_literal(payload, |piece| text.extend(piece));
            String::from_utf8(text).expect("text")
        };
        assert_eq!(literal(b"{\n}"), r"b'{\n}'");
        assert_eq!(literal(b"a'\"\\"), r#"b'a\'"\\'"#);
        assert_eq!(literal("'ü".as_bytes()), r#"b"'\xc3\xbc""#);
    }
}
