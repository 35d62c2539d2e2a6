//! A key as its token showed it: its public half, and what it takes to sign.

use serde::{Deserialize, Serialize};

use crate::algorithm::{Algorithm, Content};
use crate::spki::SpkiDer;

/// A key's public half.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PublicKey {
    pub(crate) algorithm: Algorithm,
    pub(crate) spki: SpkiDer,
    /// Its token takes the message, and hashes that itself.
    pub(crate) hashes: bool,
}

impl PublicKey {
    /// Whether a digest is nothing that it signs.
    pub(crate) fn needs_message(&self) -> bool {
        self.hashes || self.algorithm.signs_messages()
    }

    /// What it signs of a message.
    pub(crate) fn content(&self, message: &[u8]) -> Content {
        if self.hashes { Content::Message(message.to_vec()) } else { self.algorithm.content(message) }
    }

    /// The bytes to sign, if this is what it signs.
    pub(crate) fn bytes<'a>(&self, content: &'a Content) -> Result<&'a [u8], String> {
        match content {
            Content::Message(message) if self.hashes => Ok(message),
            Content::Digest(_) if self.hashes => {
                Err("the key's token hashes what it signs: send the statement".into())
            }
            content => self.algorithm.bytes(content),
        }
    }

    /// Whether it can sign this: a message always, which it may take the digest of.
    pub(crate) fn takes(&self, content: &Content) -> Result<(), String> {
        match content {
            Content::Message(_) => Ok(()),
            Content::Digest(_) => self.bytes(content).map(drop),
        }
    }

    /// What it signs of this.
    pub(crate) fn fit(&self, content: &Content) -> Result<Content, String> {
        self.takes(content)?;
        Ok(match content {
            Content::Message(message) => self.content(message),
            digest => digest.clone(),
        })
    }

    /// What the audit log calls this, hexadecimal: the digest by the key's own hash, also of a message; by SHA-256 where the
    /// key has none.
    pub(crate) fn digest_hex(&self, content: &Content) -> String {
        match content {
            Content::Message(message) if !self.algorithm.signs_messages() => {
                self.algorithm.content(message).hex()
            }
            content => content.hex(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::Curve;

    #[test]
    fn what_was_sent_fits_the_token_or_is_refused() {
        let algorithm = Algorithm::Ecdsa(Curve::P384);
        let plain = PublicKey { algorithm, spki: SpkiDer(Vec::new()), hashes: false };
        let hashing = PublicKey { hashes: true, ..plain.clone() };
        let (message, digest) = (Content::Message(b"a".to_vec()), algorithm.content(b"a"));
        assert!(hashing.needs_message() && !plain.needs_message());
        assert!(plain.bytes(&digest).is_ok() && hashing.bytes(&message).is_ok());
        assert!(plain.bytes(&message).is_err() && hashing.bytes(&digest).is_err());
        // Two tokens of one key: what is sent for the one that hashes is hashed for the other.
        assert_eq!(plain.fit(&message).as_ref(), Ok(&digest));
        assert_eq!(hashing.fit(&message).as_ref(), Ok(&message));
        assert!(hashing.fit(&digest).is_err());
        assert_eq!(hashing.digest_hex(&message), digest.hex());
    }
}
