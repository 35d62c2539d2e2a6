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
}
