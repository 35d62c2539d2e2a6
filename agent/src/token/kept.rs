//! Small files beside the audit log: what the next agent has to know of a token, whoever starts it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, openat, renameat, unlinkat};
use rustix::io::Errno;

/// More than any of them holds, in bytes.
const LONGEST: u64 = 64 << 10;

/// One of them.
#[derive(Clone)]
pub(super) struct Kept {
    /// The audit log's.
    directory: PathBuf,
    file: String,
}

impl Kept {
    pub(super) fn new(directory: &Path, file: String) -> Self {
        Self { directory: directory.to_owned(), file }
    }

    /// Where it is.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(&self.file)
    }

    /// What it holds. None: it is not there.
    pub(super) fn read(&self) -> io::Result<Option<String>> {
        let file = match self.open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = String::new();
        File::from(file).take(LONGEST).read_to_string(&mut text)?;
        Ok(Some(text))
    }

    /// Keeps this. It outlives a crash of the machine.
    pub(super) fn write(&self, text: &[u8]) -> io::Result<()> {
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
        file.write_all(text)?;
        file.sync_all()?;
        renameat(&directory, &new, &directory, &self.file)?;
        File::from(directory).sync_all()
    }

    /// Forgets it, if it is there.
    pub(super) fn remove(&self) -> io::Result<()> {
        let directory = match self.directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            directory => directory?,
        };
        match unlinkat(directory, &self.file, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
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
