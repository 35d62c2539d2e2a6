//! Digests that are remembered: a file that is the same file, of the same size, with the same times, was not written to.
//!
//! A cache holds one model.

mod file;

use std::collections::HashMap;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{fstatfs, syncfs};

use super::digest::{Algorithm, Digest};
use super::schedule::Hashed;
use super::{Looked, Piece, Stamp};
use crate::user_directory;

/// A file that was written to so shortly before it is hashed may be written to again without its times changing: file
/// systems count in steps of up to two seconds.
const RACY: Duration = Duration::from_secs(2);

/// What was not looked at is kept up to so many entries (5 MB), or as many as were. Others hash a part of the model.
const SPARE_ENTRIES: usize = 1 << 15;

/// What statfs(2) calls ext4, XFS, Btrfs, F2FS, and overlays of them: the first write to a mapped page sets a file's times
/// there, and so does the first one after it was written to the disk. On tmpfs nothing ever does; of network file systems,
/// which others write to, nobody knows. What an overlay lies on cannot be asked: mostly one of these.
const TIMED: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x794c_7630];

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
    algorithm: &'static str,
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

/// Where caches are: `$XDG_CACHE_HOME/omsign/digests`.
pub fn directory() -> Result<PathBuf, CacheError> {
    Ok(user_directory("XDG_CACHE_HOME", ".cache").ok_or(CacheError::Nowhere)?.join("omsign/digests"))
}

/// Removes all caches. Returns how many there were.
pub fn clear(directory: &Path) -> Result<usize, CacheError> {
    let error = |source| CacheError::Io { path: directory.to_owned(), source };
    let entries = match std::fs::read_dir(directory) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(error)?,
    };
    let mut count = 0;
    for entry in entries {
        let entry = entry.map_err(error)?;
        match std::fs::remove_file(entry.path()) {
            // Another omsign has just put its own in place of it.
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => continue,
            removed => removed.map_err(error)?,
        }
        // The rest of a write that was cut off is not a cache.
        count += usize::from(entry.file_name().len() == 2 * Algorithm::Sha256.digest_bytes());
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
        let path = directory.join(Digest::sha256(real.as_os_str().as_bytes()).to_string());
        for path in [directory, &path] {
            match path.symlink_metadata() {
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
    pub(super) fn get(&self, algorithm: Algorithm, stamp: Stamp, piece: &Piece) -> Option<Digest> {
        // What was remembered elsewhere may have changed without a trace.
        let settled = self.settled.as_ref().is_ok_and(|device| *device == stamp.device);
        self.entries.get(&entry(algorithm, stamp, piece)).copied().filter(|_| settled)
    }

    /// Remembers what was hashed, of so many files of a model, and forgets what took its place. Files that are too young to
    /// be told from themselves after another write are left out.
    pub(super) fn keep(
        &mut self,
        algorithm: Algorithm,
        files: usize,
        hashed: impl Iterator<Item = (Stamp, Piece, Digest)>,
    ) -> Result<(), CacheError> {
        let seen: HashMap<_, _> =
            hashed.map(|(stamp, piece, digest)| (entry(algorithm, stamp, &piece), digest)).collect();
        let stamps: HashMap<_, _> =
            seen.keys().map(|entry| ((entry.stamp.device, entry.stamp.inode), entry.stamp)).collect();
        let settled = self.settled.clone().map_err(CacheError::Untimed)?;
        // Others hash another part of it, and may end at the same time: what they remembered is kept.
        let _turn = file::turn(&self.path);
        self.entries = HashMap::new();
        self.entries = file::load(&self.path)?;
        let before = self.entries.len();
        // Other ranges and algorithms of the same state of a file are as true as before, and so is what was not
        // looked at.
        self.entries.retain(|old, _| {
            let now = stamps.get(&(old.stamp.device, old.stamp.inode));
            now.is_none_or(|stamp| *stamp == old.stamp)
        });
        if self.entries.len() > (2 * seen.len().max(files)).max(SPARE_ENTRIES) {
            self.entries.retain(|old, _| seen.contains_key(old));
        }
        let kept = self.entries.len();
        let youngest = self.opened.checked_sub(RACY).unwrap_or(UNIX_EPOCH);
        let old = |entry: &Entry| written(&entry.stamp).is_some_and(|written| written < youngest);
        let elsewhere = seen.keys().any(|entry| entry.stamp.device != settled);
        let lasting = |entry: &Entry| entry.stamp.device == settled && old(entry);
        self.entries.extend(seen.into_iter().filter(|(entry, _)| lasting(entry)));
        if kept != before || self.entries.len() != kept {
            file::write(&self.path, &self.entries)
                .map_err(|source| CacheError::Io { path: self.path.clone(), source })?;
        }
        if elsewhere { Err(CacheError::Elsewhere) } else { Ok(()) }
    }
}

/// A program that has a file mapped changes its times only with its first write to a page since that was last written
/// to the disk. All are written now, so that every later write is seen. Returns whose files that is true of.
fn settle(model: &Path) -> Option<u64> {
    let file = std::fs::File::open(model).ok()?;
    let timed = TIMED.contains(&fstatfs(&file).ok()?.f_type);
    syncfs(&file).ok()?;
    timed.then_some(file.metadata().ok()?.dev())
}

fn entry(algorithm: Algorithm, stamp: Stamp, piece: &Piece) -> Entry {
    Entry { stamp, start: piece.range.start, end: piece.range.end, algorithm: algorithm.name() }
}

/// When a file was last written to, or its inode changed.
fn written(stamp: &Stamp) -> Option<SystemTime> {
    let (seconds, nanoseconds) = stamp.modified.max(stamp.changed);
    let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanoseconds).ok()?);
    UNIX_EPOCH.checked_add(since)
}

/// A cache and what came of it.
pub(super) struct Remembered {
    cache: Cache,
    used: CacheUse,
}

/// What a digest cache saved.
#[derive(Debug, Default)]
pub struct CacheUse {
    /// Digests that were taken from it, of whole files or of shards.
    pub digests: usize,
    /// Bytes that were not read.
    pub bytes: u64,
    /// What is not remembered, and why: the digests are right all the same.
    pub problem: Option<CacheError>,
}

impl Remembered {
    pub(super) fn new(cache: Cache) -> Self {
        Self { cache, used: CacheUse::default() }
    }

    pub(super) fn into_used(self) -> CacheUse {
        self.used
    }

    /// Takes what digests of pieces it has, has the others made, and remembers these.
    pub(super) fn look_up(
        &mut self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
        hash: impl FnOnce(&[Piece]) -> Hashed,
    ) -> Hashed {
        let stamp = |piece: &Piece| files.get(piece.file).1;
        let get = |piece: &Piece| self.cache.get(algorithm, stamp(piece), piece);
        let mut digests: Vec<Option<Digest>> = pieces.iter().map(get).collect();
        let numbered = pieces.iter().enumerate().zip(&digests);
        let unknown = numbered.filter(|(_, known)| known.is_none()).map(|(numbered, _)| numbered);
        let (places, unknown): (Vec<usize>, Vec<Piece>) =
            unknown.map(|(place, piece)| (place, piece.clone())).unzip();
        self.used.digests += pieces.len() - unknown.len();
        let saved = Piece::total(pieces).saturating_sub(Piece::total(&unknown));
        self.used.bytes = self.used.bytes.saturating_add(saved);
        let mut made = hash(&unknown);
        made.failures
            .iter_mut()
            .for_each(|(index, _)| *index = places.get(*index).copied().unwrap_or(*index));
        let mut hashed = made.digests.into_iter();
        digests.iter_mut().filter(|digest| digest.is_none()).for_each(|digest| *digest = hashed.next());
        let digests: Vec<Digest> = digests.into_iter().flatten().collect();
        // Whoever tries again after a failure need not begin anew.
        let all = pieces.iter().zip(&digests).filter(|(_, digest)| **digest != Digest::NONE);
        let all = all.map(|(piece, digest)| (stamp(piece), piece.clone(), *digest));
        self.used.problem = self.cache.keep(algorithm, files.sizes().len(), all).err();
        Hashed { digests, failures: made.failures }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Stamp = Stamp { device: 1, inode: 2, size: 3, modified: (-5, 9), changed: (100, 1) };

    fn cache(directory: &Path) -> Cache {
        Cache { settled: Ok(OLD.device), ..Cache::read(directory, Path::new("/")).expect("read") }
    }

    #[test]
    fn only_a_whole_cache_of_an_old_file_is_believed() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = &directory.path().join("made");
        let piece = Piece { file: 0, range: 0..3 };
        let digest = Digest::sha256(b"x");
        let young = Stamp { inode: 7, changed: (i64::MAX, 0), ..OLD };
        let both = [(OLD, piece.clone(), digest), (young, piece.clone(), digest)];
        cache(directory).keep(Algorithm::Sha256, 2, both.into_iter()).expect("kept");
        let elsewhere = [(Stamp { device: 9, inode: 8, ..OLD }, piece.clone(), digest)];
        let told = cache(directory).keep(Algorithm::Sha256, 1, elsewhere.into_iter());
        assert!(matches!(told, Err(CacheError::Elsewhere)) && cache(directory).entries.len() == 1);
        let other_range = [(OLD, Piece { file: 0, range: 1..2 }, digest)];
        cache(directory).keep(Algorithm::Sha256, 1, other_range.into_iter()).expect("kept");
        let read = cache(directory);
        assert_eq!(read.get(Algorithm::Sha256, OLD, &piece), Some(digest));
        assert_eq!(read.get(Algorithm::Sha256, young, &piece), None);
        assert_eq!(read.get(Algorithm::Blake3, OLD, &piece), None);
        for other in [
            Stamp { device: 8, ..OLD },
            Stamp { inode: 8, ..OLD },
            Stamp { size: 8, ..OLD },
            Stamp { modified: (-5, 8), ..OLD },
            Stamp { changed: (100, 2), ..OLD },
        ] {
            let read = Cache { settled: Ok(other.device), ..cache(directory) };
            assert_eq!(read.get(Algorithm::Sha256, other, &piece), None, "{other:?}");
        }
        assert_eq!(read.get(Algorithm::Sha256, OLD, &Piece { file: 0, range: 0..2 }), None);
        // Every byte of it counts, and so does its end.
        let whole = std::fs::read(&read.path).expect("read");
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            std::fs::write(&read.path, &bad).expect("written");
            assert_eq!(cache(directory).get(Algorithm::Sha256, OLD, &piece), None, "byte {at}");
            std::fs::write(&read.path, &whole[..at]).expect("written");
            assert_eq!(cache(directory).get(Algorithm::Sha256, OLD, &piece), None, "cut at {at}");
        }
        assert_eq!(clear(directory).expect("cleared"), 1);
        assert_eq!(clear(&directory.join("none")).expect("nothing there"), 0);
    }

    /// Parts of a model that are hashed side by side, on one machine, by processes that began with the same cache.
    #[test]
    fn parts_do_not_make_it_forget_each_other() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = 2 * SPARE_ENTRIES + 2;
        let part = |first: usize| {
            let stamp = move |file: usize| Stamp { inode: file as u64, ..OLD };
            let one = move |file| (stamp(file), Piece { file, range: 0..3 }, Digest::sha256(b"x"));
            (first..files).step_by(2).map(one)
        };
        let (mut even, mut odd) = (cache(directory.path()), cache(directory.path()));
        even.keep(Algorithm::Sha256, files, part(0)).expect("kept");
        odd.keep(Algorithm::Sha256, files, part(1)).expect("kept");
        assert_eq!(cache(directory.path()).entries.len(), files);
        // Who looks at few files of many forgets the others in the end: they may be gone.
        odd.keep(Algorithm::Sha256, 10, part(files - 5)).expect("kept");
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
                    own.keep(Algorithm::Sha256, parts * files, mine).expect("kept");
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
