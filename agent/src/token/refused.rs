//! PINs that devices refused, kept beside the audit log: an agent that is started again, whoever does that, offers them no
//! more than the one before. (A unit that is restarted whenever it fails would block a device within seconds.)

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, openat, renameat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::config::{self, Device, PinSource};

/// Where it is kept that a device refused what a source holds.
#[derive(Clone)]
pub(crate) struct Refusals {
    /// The audit log's.
    directory: PathBuf,
    /// In there: each device and source has its own, since a TPM's keys have values of their own.
    file: String,
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
        let file = format!("refused-pin-{}.json", hex::encode(place));
        Self { directory: directory.to_owned(), file, source: token.pin.clone() }
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
        let place = self.directory.join(&self.file);
        let mut text = String::new();
        let refused = self
            .open()
            .and_then(|file| File::from(file).read_to_string(&mut text))
            .and_then(|_| Ok(serde_json::from_str::<Refused>(&text)?));
        let how = match &self.source {
            PinSource::File(path) => format!("write the right one into {} anew", path.display()),
            _ => "have the right one there".to_owned(),
        };
        match refused {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                Some(format!("whether it refused the PIN cannot be told: {}: {error}", place.display()))
            }
            Ok(refused) if self.source_is_other(&refused) => None,
            Ok(refused) => Some(format!(
                "{}; it is not offered again: {how}, then unlock it, or remove {}",
                refused.reason,
                place.display()
            )),
        }
    }

    fn source_is_other(&self, refused: &Refused) -> bool {
        matches!(self.source, PinSource::File(_)) && refused.written != self.written()
    }

    /// Keeps that what the source held, when its file was written so, was refused. It outlives a crash of the machine.
    pub(super) fn keep(&self, reason: &str, written: Option<Written>) -> io::Result<()> {
        let directory = self.directory()?;
        let new = format!("{}.new", self.file);
        match unlinkat(&directory, &new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut file = File::from(openat(&directory, &new, flags, Mode::RUSR | Mode::WUSR)?);
        // Made by root, it is the directory's owner's, as if their agent had made it.
        let owner = fstat(&directory)?;
        if rustix::process::geteuid().is_root() {
            fchown(&file, Some(owner.st_uid), Some(owner.st_gid))?;
        }
        file.write_all(&serde_json::to_vec(&Refused { reason: reason.to_owned(), written })?)?;
        file.sync_all()?;
        renameat(&directory, &new, &directory, &self.file)?;
        File::from(directory).sync_all()
    }

    /// Forgets it: the device took what the source holds.
    pub(crate) fn forget(&self) {
        // Most were never refused.
        let _ = self.directory().map(|directory| unlinkat(directory, &self.file, AtFlags::empty()));
    }

    fn directory(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(CWD, &self.directory, flags, Mode::empty())?)
    }

    /// Whoever owns the directory may put links in it: it is in this one, or nowhere.
    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(openat(self.directory()?, &self.file, flags, Mode::empty())?)
    }
}
