//! Digests that are remembered: a file that is the same file, of the same size, with the same times, was not written to.
//!
//! A cache holds one model.

mod file;
mod look_up;
mod settled;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::statvfs;

pub use self::look_up::CacheUse;
pub(super) use self::look_up::Remembered;
use self::settled::settle;
use super::digest::{Algorithm, Digest};
use super::{Piece, Stamp, Time};
use crate::user_directory;

/// A file that was written to so shortly before it is hashed may be written to again without its times changing: file
/// systems count in steps of up to two seconds.
const RACY: Duration = Duration::from_secs(2);

/// What was not looked at is kept up to so many entries (5 MB), or as many as were. Others hash a part of the model.
const SPARE_ENTRIES: usize = 1 << 15;

/// A cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` says where.
    #[error("there is no place for a digest cache: neither XDG_CACHE_HOME nor HOME is set")]
    Nowhere,
    /// It cannot be read, made or removed.
    #[error("the digest cache {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Files there can be written to without anybody knowing.
    #[error("{0} is on a file system that does not say when a mapped file is written to")]
    Untimed(PathBuf),
    /// What is not on the model's own file system is not remembered.
    #[error("of files on other file systems than the model's directory")]
    Elsewhere,
    /// Some file systems have calls that exchange the content of files and leave their times as they are (ioctl_xfs,
    /// EXT4_IOC_MOVE_EXT): whoever can write to a file can use them.
    #[error("of files that are somebody else's, or that others can write to")]
    Shared,
    /// Whoever writes to it decides what is signed.
    #[error("the digest cache {0} belongs to, or can be written by, somebody else")]
    Others(PathBuf),
}

/// What one digest is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Entry {
    stamp: Stamp,
    start: u64,
    end: u64,
    algorithm: Algorithm,
}

/// The digest of a piece of a file in some state.
struct Known<'a> {
    stamp: &'a Stamp,
    piece: &'a Piece,
    digest: &'a Digest,
    /// Whether it was computed, and not remembered from before.
    made: bool,
}

/// The digests of one model's files.
pub struct Cache {
    path: PathBuf,
    entries: HashMap<Entry, Digest>,
    /// Before this cache's files were looked at.
    opened: SystemTime,
    /// The device whose files are remembered.
    settled: Result<u64, PathBuf>,
}

/// A cache's name is a digest, in hexadecimal.
const CACHE_NAME: usize = 64;

/// Where caches are: `$XDG_CACHE_HOME/omsign/digests`.
pub fn directory() -> Result<PathBuf, CacheError> {
    Ok(user_directory("XDG_CACHE_HOME", ".cache").ok_or(CacheError::Nowhere)?.join("omsign/digests"))
}

/// Removes all caches. Returns how many there were.
pub fn clear(directory: &Path) -> Result<usize, CacheError> {
    let error = |source| CacheError::Io { path: directory.to_owned(), source };
    // Whoever is just writing one has read what was there.
    let _turn = file::turn(directory);
    let entries = match std::fs::read_dir(directory) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(error)?,
    };
    let mut count = 0;
    for entry in entries {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // Whatever has a cache's name is in the place of one: damaged, of another version, a link. What else is there is somebody
        // else's; the rest of a write that was cut off is not a cache.
        let is_cache = name.len() == CACHE_NAME && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_cache && !name.starts_with(file::UNFINISHED) {
            continue;
        }
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let remove = if is_directory { std::fs::remove_dir } else { std::fs::remove_file };
        match remove(entry.path()) {
            // Another omsign has just put its own in place of it.
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => continue,
            removed => removed.map_err(error)?,
        }
        count += usize::from(is_cache);
    }
    Ok(count)
}

impl Cache {
    /// Reads the cache of a model, or starts one. Has all that was written to the model's file system brought to the
    /// disk.
    pub fn open(directory: &Path, model: &Path) -> Result<Self, CacheError> {
        let cache = Self::read(directory, model)?;
        Ok(Self { settled: settle(model).ok_or_else(|| model.to_owned()), ..cache })
    }

    fn read(directory: &Path, model: &Path) -> Result<Self, CacheError> {
        let error = |path: &Path, source| CacheError::Io { path: path.to_owned(), source };
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory).map_err(|source| error(directory, source))?;
        let real = model.canonicalize().map_err(|source| error(model, source))?;
        // Another file system may be there by now, with a device's number that is used again.
        let volume = statvfs(&real).map_err(|source| error(model, source.into()))?.f_fsid;
        let name = [real.as_os_str().as_bytes(), &[0], &volume.to_le_bytes()].concat();
        let path = directory.join(Digest::sha256(&name).to_string());
        for (path, found) in [(directory, directory.metadata()), (&path, path.symlink_metadata())] {
            match found {
                Ok(found)
                    if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 =>
                {
                    return Err(CacheError::Others(path.to_owned()));
                }
                Err(missing) if missing.kind() != io::ErrorKind::NotFound => {
                    return Err(error(path, missing));
                }
                _ => {}
            }
        }
        Ok(Self { entries: file::load(&path)?, path, opened: SystemTime::now(), settled: Err(real) })
    }

    /// The remembered digest of a piece.
    pub(super) fn get(&self, algorithm: Algorithm, stamp: &Stamp, piece: &Piece) -> Option<Digest> {
        // What was remembered elsewhere may have changed without a trace.
        let settled = self.settled.as_ref().is_ok_and(|device| *device == stamp.device);
        self.entries.get(&entry(algorithm, stamp, piece)).filter(|_| settled).cloned()
    }

    /// Remembers what was hashed, of so many files of a model, and forgets what took its place. Files that are too young to
    /// be told from themselves after another write are left out: returns of how many digests they are.
    fn keep<'a, K: Iterator<Item = Known<'a>>>(
        &mut self,
        algorithm: Algorithm,
        files: usize,
        known: impl Fn() -> K,
    ) -> Result<usize, CacheError> {
        let settled = self.settled.clone().map_err(CacheError::Untimed)?;
        // All of it is there already.
        if known().all(|known| !known.made) {
            return Ok(0);
        }
        let state = |Known { stamp, .. }| ((stamp.device, stamp.inode), stamp);
        let stamps: HashMap<_, _> = known().map(state).collect();
        // Others hash another part of it, and may end at the same time: what they remembered is kept.
        let _turn = self.path.parent().and_then(file::turn);
        self.entries = HashMap::new();
        let mut entries = file::load(&self.path)?;
        let before = entries.len();
        // Other ranges and algorithms of the same state of a file are as true as before, and so is what was not
        // looked at.
        entries.retain(|old, _| {
            let now = stamps.get(&(old.stamp.device, old.stamp.inode));
            now.is_none_or(|stamp| **stamp == old.stamp)
        });
        let entry = |known: &Known<'_>| entry(algorithm, known.stamp, known.piece);
        if entries.len() > (2 * known().count().max(files)).max(SPARE_ENTRIES) {
            let seen: HashSet<Entry> = known().map(|known| entry(&known)).collect();
            entries.retain(|old, _| seen.contains(old));
        }
        let kept = entries.len();
        let youngest = self.opened.checked_sub(RACY).unwrap_or(UNIX_EPOCH);
        let (mut elsewhere, mut shared, mut young) = (false, false, 0);
        entries.reserve(known().filter(|known| known.made).count());
        // What was remembered is there, or somebody has just had it forgotten.
        for known in known().filter(|known| known.made) {
            if known.stamp.device != settled {
                elsewhere = true;
            } else if known.stamp.open_to_others {
                shared = true;
            } else if written(known.stamp).is_some_and(|written| written < youngest) {
                entries.insert(entry(&known), known.digest.clone());
            } else {
                young += 1;
            }
        }
        if kept != before || entries.len() != kept {
            file::write(&self.path, &entries)
                .map_err(|source| CacheError::Io { path: self.path.clone(), source })?;
        }
        match (elsewhere, shared) {
            (true, _) => Err(CacheError::Elsewhere),
            (_, true) => Err(CacheError::Shared),
            _ => Ok(young),
        }
    }
}

fn entry(algorithm: Algorithm, stamp: &Stamp, piece: &Piece) -> Entry {
    Entry { stamp: *stamp, start: piece.range.start, end: piece.range.end, algorithm }
}

/// When a file was last written to, or its inode changed.
fn written(stamp: &Stamp) -> Option<SystemTime> {
    let Time(seconds, nanoseconds) = stamp.modified.max(stamp.changed);
    let since = Duration::new(u64::try_from(seconds).ok()?, nanoseconds);
    UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Stamp = Stamp {
        device: 1,
        inode: 2,
        size: 3,
        modified: Time(-5, 9),
        changed: Time(100, 1),
        open_to_others: false,
    };

    fn cache(directory: &Path) -> Cache {
        Cache { settled: Ok(OLD.device), ..Cache::read(directory, Path::new("/")).expect("read") }
    }

    fn keep(cache: &mut Cache, files: usize, known: &[(Stamp, Piece, Digest)]) -> Result<usize, CacheError> {
        let made = || known.iter().map(|(stamp, piece, digest)| Known { stamp, piece, digest, made: true });
        cache.keep(Algorithm::Sha256, files, made)
    }

    #[test]
    fn only_a_whole_cache_of_an_old_file_is_believed() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = &directory.path().join("made");
        let piece = Piece { file: 0, range: 0..3 };
        let digest = Digest::sha256(b"x");
        let young = Stamp { inode: 7, changed: Time(i64::MAX, 0), ..OLD };
        let both = [OLD, young].map(|stamp| (stamp, piece.clone(), digest.clone()));
        assert_eq!(keep(&mut cache(directory), 2, &both).expect("kept"), 1, "a young one");
        let elsewhere = [(Stamp { device: 9, inode: 8, ..OLD }, piece.clone(), digest.clone())];
        let told = keep(&mut cache(directory), 1, &elsewhere);
        assert!(matches!(told, Err(CacheError::Elsewhere)) && cache(directory).entries.len() == 1);
        let shared = [(Stamp { inode: 8, open_to_others: true, ..OLD }, piece.clone(), digest.clone())];
        let told = keep(&mut cache(directory), 1, &shared);
        assert!(matches!(told, Err(CacheError::Shared)) && cache(directory).entries.len() == 1);
        let other_range = [(OLD, Piece { file: 0, range: 1..2 }, digest.clone())];
        keep(&mut cache(directory), 1, &other_range).expect("kept");
        let read = cache(directory);
        assert_eq!(read.get(Algorithm::Sha256, &OLD, &piece), Some(digest));
        assert_eq!(read.get(Algorithm::Sha256, &young, &piece), None);
        assert_eq!(read.get(Algorithm::Blake3, &OLD, &piece), None);
        for other in [
            Stamp { device: 8, ..OLD },
            Stamp { inode: 8, ..OLD },
            Stamp { size: 8, ..OLD },
            Stamp { open_to_others: true, ..OLD },
            Stamp { modified: Time(-5, 8), ..OLD },
            Stamp { changed: Time(100, 2), ..OLD },
        ] {
            let read = Cache { settled: Ok(other.device), ..cache(directory) };
            assert_eq!(read.get(Algorithm::Sha256, &other, &piece), None, "{other:?}");
        }
        assert_eq!(read.get(Algorithm::Sha256, &OLD, &Piece { file: 0, range: 0..2 }), None);
        // Every byte of it counts, and so does its end.
        let whole = std::fs::read(&read.path).expect("read");
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            std::fs::write(&read.path, &bad).expect("written");
            assert_eq!(cache(directory).get(Algorithm::Sha256, &OLD, &piece), None, "byte {at}");
            std::fs::write(&read.path, &whole[..at]).expect("written");
            assert_eq!(cache(directory).get(Algorithm::Sha256, &OLD, &piece), None, "cut at {at}");
        }
        assert_eq!(clear(directory).expect("cleared"), 1);
        assert_eq!(clear(&directory.join("none")).expect("nothing there"), 0);
    }

    /// What was only looked up is there already.
    #[test]
    fn nothing_new_is_not_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let (piece, digest) = (Piece { file: 0, range: 0..3 }, Digest::sha256(b"x"));
        let mut cache = cache(directory.path());
        for (made, written) in [(false, false), (true, true)] {
            let known = || std::iter::once(Known { stamp: &OLD, piece: &piece, digest: &digest, made });
            assert_eq!(cache.keep(Algorithm::Sha256, 1, known).expect("kept"), 0);
            assert_eq!(cache.path.exists(), written);
        }
    }

    /// Parts of a model that are hashed side by side, on one machine, by processes that began with the same cache.
    #[test]
    fn parts_do_not_make_it_forget_each_other() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = 2 * SPARE_ENTRIES + 2;
        let part = |first: usize| {
            let stamp = move |file: usize| Stamp { inode: file as u64, ..OLD };
            let one = move |file| (stamp(file), Piece { file, range: 0..3 }, Digest::sha256(b"x"));
            (first..files).step_by(2).map(one).collect::<Vec<_>>()
        };
        let (mut even, mut odd) = (cache(directory.path()), cache(directory.path()));
        keep(&mut even, files, &part(0)).expect("kept");
        keep(&mut odd, files, &part(1)).expect("kept");
        assert_eq!(cache(directory.path()).entries.len(), files);
        // Who looks at few files of many forgets the others in the end: they may be gone.
        keep(&mut odd, 10, &part(files - 5)).expect("kept");
        assert_eq!(cache(directory.path()).entries.len(), 3);
    }

    /// The same, by processes that end at the same moment.
    #[test]
    fn parts_that_end_together() {
        let directory = tempfile::tempdir().expect("a directory");
        let (parts, files) = (8, 2000);
        let together = std::sync::Barrier::new(parts);
        std::thread::scope(|scope| {
            for part in 0..parts {
                let (mut own, together) = (cache(directory.path()), &together);
                scope.spawn(move || {
                    let mine = (part * files..(part + 1) * files).map(|file| {
                        let stamp = Stamp { inode: file as u64, ..OLD };
                        (stamp, Piece { file, range: 0..3 }, Digest::sha256(b"x"))
                    });
                    together.wait();
                    keep(&mut own, parts * files, &mine.collect::<Vec<_>>()).expect("kept");
                });
            }
        });
        assert_eq!(cache(directory.path()).entries.len(), parts * files);
    }

    #[test]
    fn what_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o770)).expect("set");
        assert!(matches!(Cache::open(directory.path(), Path::new("/")), Err(CacheError::Others(_))));
    }
}
