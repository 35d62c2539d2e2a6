//! Where a file is, and in which state it was there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, fstatfs, openat, stat, statat};
use rustix::io::{Errno, retry_on_intr};

use super::HashError;
use super::source::SourceError;

/// A directory that files are below. Their paths are looked up from here on: a long way to it is gone once. So whoever
/// says something of what is at its path asks at the end whether it still is there.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    directory: OwnedFd,
    /// Whether a file there is known by its inode's number.
    pub(super) inodes_last: bool,
}

/// Types of file systems (statfs(2)) that give a file another number once they forgot it, under memory pressure: FUSE, SMB, CIFS,
/// FAT, exFAT.
const FORGETFUL: [u32; 5] = [0x6573_5546, 0xfe53_4d42, 0xff53_4d42, 0x4d44, 0x2011_bab0];

impl Root {
    /// Opens a directory, which need not be readable.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_really(path, path)
    }

    /// The same, where it is known what `path` leads to: there is not to be another way to it a moment later.
    pub(crate) fn open_really(path: &Path, real: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(real, flags, Mode::empty())?;
        let kind = fstatfs(&directory).ok().and_then(|found| u32::try_from(found.f_type).ok());
        let inodes_last = kind.is_none_or(|kind| !FORGETFUL.contains(&kind));
        Ok(Self { path: path.to_owned(), directory, inodes_last })
    }

    /// Whether another directory, or none, is in its place now: a link to it may lead to the next release.
    pub(crate) fn check_in_place(&self) -> Result<(), HashError> {
        let same = self.identity().is_some_and(|own| stat(&self.path).map(identity) == Ok(own));
        if same { Ok(()) } else { Err(HashError::Changed(self.path.clone())) }
    }

    /// Its device and inode.
    pub(crate) fn identity(&self) -> Option<(u64, u64)> {
        fstat(&self.directory).map(identity).ok()
    }

    /// The path of a file below it.
    pub(crate) fn path_of(&self, below: &Path) -> PathBuf {
        self.path.join(below)
    }
}

fn identity(found: Stat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}

/// A lease ends by itself before that, unless somebody set fs.lease-break-time higher; and how often it is asked for.
const LEASE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);

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
        let begun = Instant::now();
        loop {
            match retry_on_intr(|| openat(&self.root.directory, self.path, flags, Mode::empty())) {
                // Somebody has a lease on it, and was just asked to give it back.
                Err(Errno::WOULDBLOCK) if begun.elapsed() < LEASE => std::thread::sleep(PAUSE),
                opened => return Ok(File::from(opened?)),
            }
        }
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
    /// When it was written to.
    pub(crate) modified: Time,
    /// When its inode changed: no program can set it.
    pub(crate) changed: Time,
    /// Whether others than root and the user can write to it.
    pub(crate) open_to_others: bool,
}

/// Seconds and nanoseconds since 1970. Of many files there are many: nothing is left between them.
#[repr(Rust, packed(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Time(pub(crate) i64, pub(crate) u32);

/// Whether somebody else can write to a file, by its owner and mode. A group with the number of the owner is that user's
/// own (pam_umask(8), usergroups), as files are made for on many systems.
fn open_to_others(found: &Stat) -> bool {
    static USER: LazyLock<u32> = LazyLock::new(|| rustix::process::geteuid().as_raw());
    let is_ours = found.st_uid == 0 || found.st_uid == *USER;
    let group = found.st_mode & 0o020 != 0 && found.st_gid != found.st_uid;
    !is_ours || group || found.st_mode & 0o002 != 0
}

impl Stamp {
    /// Whether a file is in the same state at two times.
    fn is_same(&self, other: &Self, inodes_last: bool) -> bool {
        let state = |stamp: &Self| (stamp.device, stamp.size, stamp.modified, stamp.changed);
        state(self) == state(other) && (!inodes_last || self.inode == other.inode)
    }

    /// Whether an open file is in this state.
    pub(super) fn is_of(&self, file: &File, inodes_last: bool) -> io::Result<bool> {
        Ok(self.is_same(&Self::from(&fstat(file)?), inodes_last))
    }
}

/// They are fewer than there are in a second.
fn nanoseconds(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl From<&Stat> for Stamp {
    fn from(found: &Stat) -> Self {
        Self {
            device: found.st_dev,
            inode: found.st_ino,
            size: found.st_size.cast_unsigned(),
            modified: Time(found.st_mtime, nanoseconds(found.st_mtime_nsec)),
            changed: Time(found.st_ctime, nanoseconds(found.st_ctime_nsec)),
            open_to_others: open_to_others(found),
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
    pub(crate) fn new(root: &'a Root, paths: Vec<&'a Path>, stamps: Vec<Stamp>) -> Self {
        Self { root, paths, stamps }
    }

    /// The files' sizes, in their order.
    pub fn sizes(&self) -> impl ExactSizeIterator<Item = u64> {
        self.stamps.iter().map(|stamp| stamp.size)
    }

    /// Whether the same number of files are in the same states.
    pub(crate) fn check_same(&self, later: &Self) -> Result<(), HashError> {
        let pairs = self.stamps.iter().zip(&later.stamps).zip(&later.paths);
        match pairs.into_iter().find(|((before, after), _)| !after.is_same(before, self.root.inodes_last)) {
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

    /// Whether a file was in this state.
    pub(crate) fn was(&self, file: usize, now: &Stamp) -> bool {
        self.stamps.get(file).is_some_and(|before| now.is_same(before, self.root.inodes_last))
    }

    /// In which state a file was.
    pub(crate) fn stamp(&self, file: usize) -> Option<&Stamp> {
        self.stamps.get(file)
    }

    pub(super) fn get(&self, file: usize) -> (Place<'a>, Stamp) {
        let place = |path: &&'a Path| Place { root: self.root, path };
        let found = self.paths.get(file).map(place).zip(self.stamps.get(file).copied());
        found.expect("a piece is of one of the files")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was not: its file system had forgotten it.
    #[test]
    fn another_inode_where_they_do_not_last() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("file"), "1").expect("written");
        let root = Root::open(directory.path()).expect("opened");
        assert!(root.inodes_last, "not on FUSE, CIFS or FAT");
        let before = Place { root: &root, path: "file".as_ref() }.look().expect("looked at");
        let other = Stamp { inode: before.inode + 1, ..before };
        assert!(before.is_same(&before, true) && !before.is_same(&other, true));
        assert!(before.is_same(&other, false));
        assert!(!before.is_same(&Stamp { changed: Time(7, 8), ..other }, false));
    }

    #[test]
    fn another_directory_in_its_place() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        for release in ["v1", "v2"] {
            std::fs::create_dir(path(release)).expect("made");
            std::fs::write(path(release).join("file"), release).expect("written");
        }
        let link = |to: &str| {
            let _ = std::fs::remove_file(path("current"));
            std::os::unix::fs::symlink(to, path("current")).expect("linked");
        };
        link("v1");
        let root = Root::open(&path("current")).expect("opened");
        assert!(root.check_in_place().is_ok());
        link("v2");
        let changed =
            |result| matches!(result, Err(HashError::Changed(changed)) if changed == path("current"));
        assert!(changed(root.check_in_place()));
        let file = Place { root: &root, path: "file".as_ref() }.open().expect("opened");
        assert_eq!(std::io::read_to_string(file).expect("read"), "v1");
        link("v1");
        assert!(root.check_in_place().is_ok());
        std::fs::remove_file(path("current")).expect("removed");
        assert!(changed(root.check_in_place()));
    }
}
