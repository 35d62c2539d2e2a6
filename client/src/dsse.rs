//! DSSE v1.0: the envelope, and the bytes that are signed.

/// `payloadType` of an in-toto statement.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";

/// A pre-authentication encoding: exactly the bytes that are signed.
pub struct Pae(Vec<u8>);

impl Pae {
    /// `DSSEv1 LEN(type) type LEN(payload) payload` (DSSE protocol, "PAE").
    pub fn of(payload: &[u8]) -> Self {
        let mut bytes =
            format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len()).into_bytes();
        bytes.extend_from_slice(payload);
        Self(bytes)
    }

    /// What release 0.2.0 of the reference signed instead: a misspelt version, and the text of a Python bytes literal
    /// in the payload's place.
    pub(crate) fn of_release_0_2_0(payload: &[u8]) -> Self {
        let length = payload.len();
        let mut text = format!("DSSEV1 {} {PAYLOAD_TYPE} {length} b", PAYLOAD_TYPE.len());
        // As Python's repr() quotes and escapes.
        let quote = if payload.contains(&b'\'') && !payload.contains(&b'"') { '"' } else { '\'' };
        text.push(quote);
        for &byte in payload {
            match byte {
                b'\\' => text.push_str("\\\\"),
                b'\t' => text.push_str("\\t"),
                b'\n' => text.push_str("\\n"),
                b'\r' => text.push_str("\\r"),
                _ if char::from(byte) == quote => text.extend(['\\', quote]),
                b' '..=b'~' => text.push(char::from(byte)),
                _ => text.push_str(&format!("\\x{byte:02x}")),
            }
        }
        text.push(quote);
        Self(text.into_bytes())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_in_bytes() {
        let expected = "DSSEv1 28 application/vnd.in-toto+json 3 ü!".as_bytes();
        assert_eq!(Pae::of("ü!".as_bytes()).as_bytes(), expected);
    }

    #[test]
    fn python_quotes_bytes_like_this() {
        let text = |payload: &[u8]| String::from_utf8(Pae::of_release_0_2_0(payload).0).expect("text");
        assert_eq!(text(b"{\n}"), r"DSSEV1 28 application/vnd.in-toto+json 3 b'{\n}'");
        assert!(text(b"a'\"\\").ends_with(r#" 4 b'a\'"\\'"#));
        assert!(text("'ü".as_bytes()).ends_with(r#" 3 b"'\xc3\xbc""#));
    }
}
