//! The card's secrets: its PIN and PUK, what is checked and how often it may be wrong, and its management key.

use openssl::error::ErrorStack;
use openssl::symm::{Cipher, Crypter, Mode};

use super::apdu::{BLOCKED, FAILED, WRONG_DATA};

/// A PIN or PUK: its value and the tries that are left.
pub(super) struct Secret {
    pub(super) value: [u8; 8],
    pub(super) left: u8,
}

impl Secret {
    pub(super) fn status(&self) -> u16 {
        if self.left == 0 { BLOCKED } else { 0x63c0 | u16::from(self.left) }
    }

    pub(super) fn check(&mut self, given: &[u8]) -> Result<(), u16> {
        if given.len() != 8 {
            return Err(WRONG_DATA);
        }
        if self.left == 0 {
            return Err(BLOCKED);
        }
        if given == self.value {
            self.left = 3;
            return Ok(());
        }
        self.left -= 1;
        Err(self.status())
    }
}

/// One block, encrypted.
pub(super) fn encrypted(cipher: Cipher, key: &[u8], block: &[u8]) -> Result<Vec<u8>, u16> {
    if block.len() != cipher.block_size() {
        return Err(WRONG_DATA);
    }
    let encrypt = || {
        let mut crypter = Crypter::new(cipher, Mode::Encrypt, key, None)?;
        crypter.pad(false);
        let mut out = vec![0; block.len() * 2];
        let length = crypter.update(block, &mut out)?;
        out.truncate(length);
        Ok::<_, ErrorStack>(out)
    };
    encrypt().map_err(|_| FAILED)
}
