//! Private keys in PEM files.

use std::path::Path;

use openssl::pkey::{PKey, Private};
use zeroize::Zeroizing;

use super::{Algorithm, KeyError, NO_PASSWORD, PRIVATE_KEYS, PublicKey, read, sign_error};
use crate::dsse::Pae;

/// A private key from a PEM file.
pub struct PrivateKey {
    /// Its public half.
    pub public: PublicKey,
    key: PKey<Private>,
}

impl PrivateKey {
    /// Reads PKCS#8 or SEC 1 PEM. `password` is asked only when the file is encrypted.
    pub fn read(path: &Path, password: impl FnOnce() -> Option<Zeroizing<String>>) -> Result<Self, KeyError> {
        let pem = Zeroizing::new(read(path)?);
        let mut asked = None;
        let parsed = PKey::private_key_from_pem_callback(&pem, |buffer| {
            let given = password();
            asked = Some(given.is_some());
            let Some(given) = given else { return Ok(0) };
            match buffer.get_mut(..given.len()) {
                Some(space) => space.copy_from_slice(given.as_bytes()),
                None => return Ok(0),
            }
            Ok(given.len())
        });
        let key = parsed.map_err(|_| match asked {
            None => KeyError::content(path, "a private key", &PRIVATE_KEYS, &pem),
            Some(true) => KeyError::Password { path: path.to_owned(), reason: "the password is wrong" },
            Some(false) => KeyError::Password { path: path.to_owned(), reason: NO_PASSWORD },
        })?;
        Algorithm::of(&key)?;
        let public = PublicKey::from_spki(&key.public_key_to_der().map_err(sign_error)?)?;
        Ok(Self { public, key })
    }

    /// Signs: ECDSA in DER, RSA with PKCS#1 v1.5 padding, Ed25519.
    pub fn sign(&self, pae: &Pae<'_>) -> Result<Vec<u8>, KeyError> {
        let signer = match self.public.algorithm.hash() {
            Some(hash) => openssl::sign::Signer::new(hash, &self.key),
            None => openssl::sign::Signer::new_without_digest(&self.key),
        };
        signer.and_then(|mut signer| signer.sign_oneshot_to_vec(&pae.to_bytes())).map_err(sign_error)
    }
}
