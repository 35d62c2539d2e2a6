//! The file behind the log: whole lines or nothing.

use std::fs::{DirBuilder, File, Metadata, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use crate::config::Durability;

pub(super) struct AuditFile {
    path: PathBuf,
    file: File,
    /// Which file it is, by device and inode.
    at: (u64, u64),
    lock: Option<Lock>,
    durability: Durability,
    /// Set by a failed fsync: the kernel may have dropped the pages, so what the file holds is unknown.
    lost: Option<String>,
    /// Part of a line could not be taken back.
    torn: bool,
}

impl AuditFile {
    /// Opens `directory/name`; with a lock, as the one process that owns the devices.
    pub(super) fn open(
        directory: &Path,
        name: &str,
        lock: Option<&str>,
        durability: Durability,
    ) -> io::Result<Self> {
        let with_path = |error: io::Error, path: &Path| {
            io::Error::new(error.kind(), format!("audit log {}: {error}", path.display()))
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| with_path(error, directory))?;
        let path = directory.join(name);
        let lock = lock.map(|lock| Lock::take(directory, lock, name)).transpose();
        let lock = lock.map_err(|error| with_path(error, directory))?;
        let file = opened(&path).map_err(|error| with_path(error, &path))?;
        let at = identity(&file.metadata()?);
        let mut file = Self { path, file, at, lock, durability, lost: None, torn: false };
        file.begin()?;
        Ok(file)
    }

    /// Sees to a file that was just opened.
    fn begin(&mut self) -> io::Result<()> {
        // The directory entry has to survive a power cut as well as the lines do.
        if let Some(directory) = self.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        self.finish_torn_line()
    }

    /// Begins another file where the one before was moved away, or removed: what is written to that one, nobody may find.
    fn follow(&mut self) -> io::Result<()> {
        if let Some(lock) = &mut self.lock {
            lock.follow()?;
        }
        let found = std::fs::metadata(&self.path).map(|found| identity(&found));
        if found.as_ref().is_ok_and(|found| *found == self.at) {
            return Ok(());
        }
        let file = opened(&self.path)?;
        let at = identity(&file.metadata()?);
        // Nothing of it changes unless all of it works: the next entry tries again.
        let before =
            (std::mem::replace(&mut self.file, file), std::mem::replace(&mut self.at, at), self.torn);
        self.torn = false;
        let begun = self.begin();
        if begun.is_err() {
            (self.file, self.at, self.torn) = before;
        } else {
            tracing::info!(path = %self.path.display(), "the audit log was moved away, and goes on in a new file");
        }
        begun
    }

    /// Takes the locks of those of these files that are there. None: another process has one, or that cannot be told.
    pub(super) fn hold(directory: &Path, names: [&str; 2]) -> Option<Vec<File>> {
        let mut held = Vec::new();
        for name in names {
            match File::open(directory.join(name)) {
                Ok(file) if file.try_lock().is_ok() => held.push(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => return None,
            }
        }
        Some(held)
    }

    /// A crash can leave half a line. Its signature was never released; the line is kept, ended.
    fn finish_torn_line(&mut self) -> io::Result<()> {
        if self.file.metadata()?.len() == 0 {
            return Ok(());
        }
        let mut last = [0];
        self.file.seek(SeekFrom::End(-1))?;
        self.file.read_exact(&mut last)?;
        if last != *b"\n" {
            tracing::warn!("the audit log ended in the middle of a line, as after a crash; the line is kept");
            self.write(b"\n")?;
        }
        Ok(())
    }

    /// Appends whole lines. On failure none of them are in the file, unless it cannot be cut: then some are that were not
    /// released, the last of them perhaps in part, which is ended before the next.
    pub(super) fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if let Some(reason) = &self.lost {
            return Err(io::Error::other(format!("fsync failed before ({reason}); restart the agent")));
        }
        self.follow()?;
        self.write(text)
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        let ended = if self.torn { [b"\n", text].concat() } else { Vec::new() };
        let text = if self.torn { &ended[..] } else { text };
        let mut rest = text;
        while !rest.is_empty() {
            let failed = match self.file.write(rest) {
                Ok(written) if written > 0 => {
                    rest = rest.get(written..).unwrap_or_default();
                    continue;
                }
                Ok(_) => io::ErrorKind::WriteZero.into(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            let written = u64::try_from(text.len() - rest.len()).unwrap_or(0);
            let cut =
                self.file.metadata().and_then(|file| self.file.set_len(file.len().saturating_sub(written)));
            self.torn |= written > 0 && cut.is_err();
            return Err(failed);
        }
        self.torn = false;
        if self.durability == Durability::Fsync
            && let Err(error) = self.file.sync_data()
        {
            self.lost = Some(error.to_string());
            return Err(error);
        }
        Ok(())
    }
}

/// That no other process owns the devices, or will.
struct Lock {
    path: PathBuf,
    /// Which file it is, by device and inode.
    at: (u64, u64),
    _held: File,
}

impl Lock {
    /// Takes it: of a file of its own, which only we can open; where a directory takes no new files, of the log as it is.
    fn take(directory: &Path, lock: &str, name: &str) -> io::Result<Self> {
        Self::of(directory.join(lock)).or_else(|error| match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::of(directory.join(name))
            }
            _ => Err(error),
        })
    }

    fn of(path: PathBuf) -> io::Result<Self> {
        let held = opened(&path)?;
        held.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(
                io::ErrorKind::ResourceBusy,
                "an agent, or an operator's command, is running and owns the devices",
            ),
            TryLockError::Error(error) => error,
        })?;
        Ok(Self { path, at: identity(&held.metadata()?), _held: held })
    }

    /// Takes it anew where its file was moved away, or removed: who starts next looks for the one that is there.
    fn follow(&mut self) -> io::Result<()> {
        if std::fs::metadata(&self.path).is_ok_and(|found| identity(&found) == self.at) {
            return Ok(());
        }
        *self = Self::of(self.path.clone())?;
        Ok(())
    }
}

/// Opens a file, or makes it. Made by root, it is the directory's owner's, as if their agent had made it.
fn opened(path: &Path) -> io::Result<File> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    // Whoever owns the directory may put links in it, and others in its place: it is in this one, or nowhere.
    let directory = openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let (owner, us) = (fstat(&directory)?, rustix::process::geteuid());
    let follow = if owner.st_uid == us.as_raw() { OFlags::empty() } else { OFlags::NOFOLLOW };
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC;
    let there = || openat(&directory, name, flags | follow, Mode::empty()).map(File::from);
    match there() {
        Err(Errno::NOENT) => {}
        found => return Ok(found?),
    }
    let file = match openat(&directory, name, flags | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR)
    {
        Err(Errno::EXIST) => return Ok(there()?),
        made => File::from(made?),
    };
    if us.is_root() {
        std::os::unix::fs::fchown(&file, Some(owner.st_uid), Some(owner.st_gid))?;
    }
    Ok(file)
}

fn identity(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_kept_and_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("audit.jsonl");
        std::fs::write(&path, b"{\"whole\":1}\n{\"torn").expect("written");
        let mut file =
            AuditFile::open(directory.path(), "audit.jsonl", None, Durability::Fsync).expect("opened");
        file.append(b"{\"next\":1}\n").expect("appended");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "{\"whole\":1}\n{\"torn\n{\"next\":1}\n");
    }

    /// As where the log may only be appended to (chattr +a).
    #[test]
    fn a_line_that_cannot_be_taken_back_is_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("audit.jsonl");
        let mut file =
            AuditFile::open(directory.path(), "audit.jsonl", None, Durability::Os).expect("opened");
        std::fs::write(&path, b"{\"torn").expect("written");
        file.torn = true;
        file.append(b"{\"next\":1}\n").expect("appended");
        file.append(b"{\"last\":1}\n").expect("appended");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "{\"torn\n{\"next\":1}\n{\"last\":1}\n");
    }

    /// Whose directory it is may be who gains from it.
    #[test]
    fn a_link_in_the_place_of_a_file() {
        let (directory, elsewhere) =
            (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("another"));
        let (log, planted) = (directory.path().join("audit.jsonl"), elsewhere.path().join("planted"));
        std::os::unix::fs::symlink(&planted, &log).expect("linked");
        assert!(opened(&log).is_err() && !planted.exists());
        std::fs::write(&planted, b"theirs").expect("written");
        assert!(opened(&log).is_ok(), "our own link");
        // Root leaves what it makes to the directory's owner, and follows none of theirs.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(directory.path(), Some(54321), Some(54322)).expect("given away");
            assert!(opened(&log).is_err(), "another's link");
        }
        std::fs::remove_file(&log).expect("removed");
        let owner = std::fs::metadata(directory.path()).expect("there");
        let made = opened(&log).expect("made").metadata().expect("there");
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (owner.uid(), owner.gid(), 0o600));
    }

    /// As somebody does who makes room, or moves all of it away.
    #[test]
    fn a_lock_that_is_removed_is_taken_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = || AuditFile::open(directory.path(), "audit.jsonl", Some("audit.lock"), Durability::Os);
        let mut ours = open().expect("opened");
        std::fs::remove_file(directory.path().join("audit.lock")).expect("removed");
        ours.append(b"{}\n").expect("appended");
        assert!(open().is_err(), "a second owner");
        std::fs::remove_file(directory.path().join("audit.lock")).expect("removed");
        let theirs = open().expect("the first one has not noticed");
        let error = ours.append(b"{}\n").expect_err("somebody else owns the devices by now");
        assert!(error.to_string().contains("owns the devices"), "{error}");
        drop(theirs);
        ours.append(b"{}\n").expect("appended");
    }

    #[test]
    fn after_a_failed_fsync_nothing_is_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut file =
            AuditFile::open(directory.path(), "audit.jsonl", None, Durability::Fsync).expect("opened");
        file.lost = Some("input/output error".into());
        let error = file.append(b"{}\n").expect_err("refused");
        assert!(error.to_string().contains("restart the agent"));
        assert_eq!(std::fs::read(directory.path().join("audit.jsonl")).expect("read"), b"");
    }
}
