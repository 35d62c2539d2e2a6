//! Where a file is, and in which state it was there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat, statat};

use super::HashError;
use super::source::SourceError;

/// A directory that files are below. Their paths are looked up from here on: a long way to it is gone once, and whatever
/// is put in its place meanwhile is not read.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    directory: OwnedFd,
}

impl Root {
    /// Opens a directory, which need not be readable.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { path: path.to_owned(), directory: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// The path of a file below it.
    pub(crate) fn path_of(&self, below: &Path) -> PathBuf {
        self.path.join(below)
    }
}

/// A file: what is at a path below a directory, or at an absolute one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) root: &'a Root,
    pub(super) path: &'a Path,
}

impl Place<'_> {
    /// Opens it to be read. A link or a pipe put in the file's place since it was looked at is neither followed nor
    /// waited for.
    pub(super) fn open(self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(openat(&self.root.directory, self.path, flags, Mode::empty())?))
    }

    /// Looks at it without opening it. A link or a pipe put in its place since the walk is an error.
    pub(super) fn look(self) -> Result<Stamp, HashError> {
        let found = statat(&self.root.directory, self.path, AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(|errno| self.failed(SourceError::Io(errno.into())))?;
        let is_file = FileType::from_raw_mode(found.st_mode).is_file();
        if is_file { Ok(Stamp::from(&found)) } else { Err(self.failed(SourceError::Changed)) }
    }

    /// Why it has no digest.
    pub(super) fn failed(self, why: SourceError) -> HashError {
        let path = self.root.path_of(self.path);
        match why {
            SourceError::Io(source) => HashError::Read { path, source },
            SourceError::Changed => HashError::Changed(path),
        }
    }
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Bytes in the file.
    pub(crate) size: u64,
    /// Seconds and nanoseconds since 1970.
    pub(crate) modified: (i64, i64),
    /// Likewise, of the inode: no program can set it.
    pub(crate) changed: (i64, i64),
}

impl Stamp {
    /// Of an open file.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from(&fstat(file)?))
    }
}

impl From<&Stat> for Stamp {
    fn from(found: &Stat) -> Self {
        Self {
            device: found.st_dev,
            inode: found.st_ino,
            size: found.st_size.cast_unsigned(),
            modified: (found.st_mtime, found.st_mtime_nsec.cast_signed()),
            changed: (found.st_ctime, found.st_ctime_nsec.cast_signed()),
        }
    }
}

/// Files as they were looked at.
pub struct Looked<'a> {
    root: &'a Root,
    paths: Vec<&'a Path>,
    stamps: Vec<Stamp>,
}

impl<'a> Looked<'a> {
    /// None yet, of those below a directory.
    pub(crate) fn none(root: &'a Root) -> Self {
        Self { root, paths: Vec::new(), stamps: Vec::new() }
    }

    pub(super) fn new(root: &'a Root, paths: Vec<&'a Path>, stamps: Vec<Stamp>) -> Self {
        Self { root, paths, stamps }
    }

    /// The files' sizes, in their order.
    pub fn sizes(&self) -> impl ExactSizeIterator<Item = u64> {
        self.stamps.iter().map(|stamp| stamp.size)
    }

    /// Whether the same number of files are in the same states.
    pub(crate) fn check_same(&self, later: &Self) -> Result<(), HashError> {
        let pairs = self.stamps.iter().zip(&later.stamps).zip(&later.paths);
        match pairs.into_iter().find(|((before, after), _)| before != after) {
            Some((_, path)) => Err(HashError::Changed(later.root.path_of(path))),
            None => Ok(()),
        }
    }

    /// Adds a file, and returns its number.
    pub(crate) fn push(&mut self, path: &'a Path, stamp: Stamp) -> usize {
        self.paths.push(path);
        self.stamps.push(stamp);
        self.paths.len() - 1
    }

    pub(crate) fn has(&self, device: u64, inode: u64) -> bool {
        self.stamps.iter().any(|stamp| (stamp.device, stamp.inode) == (device, inode))
    }

    pub(super) fn get(&self, file: usize) -> (Place<'a>, Stamp) {
        let place = |path: &&'a Path| Place { root: self.root, path };
        let found = self.paths.get(file).map(place).zip(self.stamps.get(file).copied());
        found.expect("a piece is of one of the files")
    }
}
