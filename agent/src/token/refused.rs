//! PINs that devices refused, kept beside the audit log: an agent that is started again, whoever does that, offers them no
//! more than the one before. (A unit that is restarted whenever it fails would block a device within seconds.)

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::config::{self, Device, PinSource};

/// Where a token's is kept.
#[derive(Clone)]
pub(super) struct Refusals {
    directory: PathBuf,
    /// As whoever looks there knows it.
    token: String,
    device: String,
    source: PinSource,
}

/// A file about one.
#[derive(Serialize, Deserialize)]
struct Refused {
    token: String,
    device: String,
    source: PinSource,
    /// The state of the file that it was in. One that was written since is another PIN.
    file: Option<Written>,
    reason: String,
}

/// When a file was written: inode, size, and the change of both in nanoseconds.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Written(u64, u64, i64, i64);

impl Refusals {
    /// Of a token, in an audit log's directory.
    pub(super) fn of(name: &str, token: &config::Token, directory: &Path) -> Self {
        let device = match &token.device {
            Device::Pkcs11 { module, select, .. } => serde_json::to_string(&(module, select, &token.env)),
            device => serde_json::to_string(device),
        };
        Self {
            directory: directory.join("refused-pins"),
            token: name.to_owned(),
            // What cannot be said in JSON is no other device's.
            device: device.unwrap_or_default(),
            source: token.pin.clone(),
        }
    }

    /// Named after the device: a key without an agent has always the same name.
    fn file(&self) -> PathBuf {
        self.directory.join(format!("{}.json", hex::encode(Sha256::digest(&self.device))))
    }

    /// Why what the source holds is not to be offered, if it was refused before.
    pub(super) fn kept(&self) -> Option<String> {
        let refused: Refused = serde_json::from_slice(&std::fs::read(self.file()).ok()?).ok()?;
        let same = refused.source == self.source && refused.file == written(&self.source);
        let before = match &self.source {
            PinSource::File(path) => format!("; {} holds what it did then", path.display()),
            _ => String::new(),
        };
        same.then_some(refused.reason + &before)
    }

    /// Keeps that it was refused, so that it outlives a crash of the machine.
    pub(super) fn keep(&self, reason: &str) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let (token, device, source) = (self.token.clone(), self.device.clone(), self.source.clone());
        let refused = Refused { token, device, file: written(&source), source, reason: reason.to_owned() };
        let mut file = NamedTempFile::new_in(&self.directory)?;
        file.write_all(&serde_json::to_vec(&refused)?)?;
        file.as_file().sync_all()?;
        file.persist(self.file())?;
        File::open(&self.directory)?.sync_all()
    }

    /// Forgets it: the device took what the source holds.
    pub(super) fn forget(&self) {
        // Most were never refused.
        let _ = std::fs::remove_file(self.file());
    }
}

fn written(source: &PinSource) -> Option<Written> {
    let PinSource::File(path) = source else { return None };
    let found = std::fs::metadata(path).ok()?;
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    let modified = nanoseconds(found.mtime(), found.mtime_nsec());
    Some(Written(found.ino(), found.size(), modified, nanoseconds(found.ctime(), found.ctime_nsec())))
}
