//! PINs that devices refused, kept beside the audit log: an agent that is started again, whoever does that, offers them no
//! more than the one before. (A unit that is restarted whenever it fails would block a device within seconds.)

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::kept::Kept;
use crate::config::{self, Device, PinSource};

/// Where it is kept that a device refused what a source holds.
#[derive(Clone)]
pub(crate) struct Refusals {
    /// Each device and source has its own, since a TPM's keys have values of their own.
    file: Kept,
    source: PinSource,
}

/// What is in it.
#[derive(Serialize, Deserialize)]
struct Refused {
    reason: String,
    /// How the source's file was. One that was written since holds another PIN.
    written: Option<Written>,
}

/// When a file was written: inode, size and modification time in nanoseconds.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Written(u64, u64, i64);

impl Refusals {
    /// Of a token, in an audit log's directory.
    pub(crate) fn of(token: &config::Token, directory: &Path) -> Self {
        let device = match &token.device {
            // What is known of the module changes with omsign's version.
            Device::Pkcs11 { module, select, .. } => format!("{module:?} {select:?} {:?}", token.env),
            device => format!("{device:?}"),
        };
        let place = Sha256::digest(format!("{device} {:?}", token.pin));
        let file = Kept::new(directory, format!("refused-pin-{}.json", hex::encode(place)));
        Self { file, source: token.pin.clone() }
    }

    /// How the source's file is now.
    pub(super) fn written(&self) -> Option<Written> {
        let PinSource::File(path) = &self.source else { return None };
        let found = std::fs::metadata(path).ok()?;
        let modified = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
        Some(Written(found.ino(), found.size(), modified))
    }

    /// Why what the source holds is not to be offered, if it was refused before, or nobody can tell.
    pub(super) fn kept(&self) -> Option<String> {
        let place = self.file.path();
        let refused = self.file.read().and_then(|text| {
            text.map(|text| serde_json::from_str::<Refused>(&text)).transpose().map_err(io::Error::from)
        });
        let how = match &self.source {
            PinSource::File(path) => format!("write the right one into {} anew", path.display()),
            _ => "have the right one there".to_owned(),
        };
        match refused {
            Err(error) => {
                Some(format!("whether it refused the PIN cannot be told: {}: {error}", place.display()))
            }
            Ok(None) => None,
            Ok(Some(refused)) if self.source_is_other(&refused) => None,
            Ok(Some(refused)) => Some(format!(
                "{}; it is not offered again: {how}, then unlock it, or remove {}",
                refused.reason.replace(char::is_control, " "),
                place.display()
            )),
        }
    }

    fn source_is_other(&self, refused: &Refused) -> bool {
        matches!(self.source, PinSource::File(_)) && refused.written != self.written()
    }

    /// Keeps that what the source held, when its file was written so, was refused.
    pub(super) fn keep(&self, reason: &str, written: Option<Written>) -> io::Result<()> {
        self.file.write(&serde_json::to_vec(&Refused { reason: reason.to_owned(), written })?)
    }

    /// Forgets it: the device took what the source holds.
    pub(crate) fn forget(&self) {
        // Most were never refused.
        let _ = self.file.remove();
    }
}
