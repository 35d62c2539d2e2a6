//! What a hash algorithm makes of a file: names, lengths and text forms (OMS algorithm registry).

use sha2::{Digest as _, Sha256};

/// A file-hashing algorithm of OMS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// SHA-256 (FIPS 180-4): every verifier knows it.
    #[default]
    Sha256,
    /// BLAKE2b with 64 bytes of output (RFC 7693).
    Blake2b,
    /// BLAKE3 with 32 bytes of output.
    Blake3,
}

impl Algorithm {
    /// Its identifier in `hash_type` and `algorithm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake2b => "blake2b",
            Self::Blake3 => "blake3",
        }
    }

    /// The algorithm of an identifier. The reference also writes `blake2`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha256" => Some(Self::Sha256),
            "blake2b" | "blake2" => Some(Self::Blake2b),
            "blake3" => Some(Self::Blake3),
            _ => None,
        }
    }

    /// Bytes in one of its digests.
    pub fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 | Self::Blake3 => 32,
            Self::Blake2b => LONGEST,
        }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

const LONGEST: usize = 64;

/// A digest, of 32 or 64 bytes. Which algorithm made it is said where it stands.
#[derive(Clone, PartialEq, Eq)]
pub struct Digest(Bytes);

/// Those of a model of many files are most of what is known of it in memory: nearly all of them are short.
#[derive(Clone, PartialEq, Eq)]
enum Bytes {
    None,
    Short([u8; 32]),
    Long(Box<[u8; LONGEST]>),
}

impl Digest {
    /// Of nothing yet.
    pub(super) const NONE: Self = Self(Bytes::None);

    /// The SHA-256 digest of bytes in memory.
    pub fn sha256(bytes: &[u8]) -> Self {
        Self(Bytes::Short(Sha256::digest(bytes).into()))
    }

    /// Of what a hasher was fed.
    pub(crate) fn from_sha256(hasher: Sha256) -> Self {
        Self(Bytes::Short(hasher.finalize().into()))
    }

    /// From an algorithm's output.
    pub(super) fn from_bytes(output: &[u8]) -> Self {
        let short = || output.try_into().map(Bytes::Short);
        let long = || output.try_into().map(|bytes| Bytes::Long(Box::new(bytes)));
        Self(short().or_else(|_| long()).expect("an algorithm's digests have 32 or 64 bytes"))
    }

    /// Parses an algorithm's digest in lower-case hexadecimal, which alone is canonical.
    pub fn from_hex(algorithm: Algorithm, text: &str) -> Option<Self> {
        let mut bytes = [0; LONGEST];
        let bytes = base16ct::lower::decode(text, &mut bytes).ok()?;
        (bytes.len() == algorithm.digest_bytes()).then(|| Self::from_bytes(bytes))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::None => &[],
            Bytes::Short(bytes) => bytes,
            Bytes::Long(bytes) => bytes.as_slice(),
        }
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.as_bytes()))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_text_is_a_digest() {
        // FIPS 180-4, example "abc".
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::from_hex(Algorithm::Sha256, abc), Some(Digest::sha256(b"abc")));
        assert_eq!(Digest::sha256(b"abc").to_string(), abc);
        assert_eq!(Digest::from_hex(Algorithm::Sha256, &abc.to_uppercase()), None);
        assert_eq!(Digest::from_hex(Algorithm::Sha256, &abc[2..]), None);
        assert_eq!(Digest::from_hex(Algorithm::Blake2b, abc), None);
    }

    #[test]
    fn names_survive_the_round_trip() {
        for algorithm in [Algorithm::Sha256, Algorithm::Blake2b, Algorithm::Blake3] {
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(algorithm));
        }
        assert_eq!(Algorithm::from_name("md5"), None);
    }
}
