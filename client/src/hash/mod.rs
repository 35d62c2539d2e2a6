//! Digests of files, as fast as the machine can: `schedule` keeps every core busy with several streams at once,
//! `source` brings their bytes, `kernels` advance them.

mod blake;
pub mod cache;
mod cores;
mod digest;
mod kernels;
mod place;
mod schedule;
mod sha256;
mod share;
mod source;
mod streams;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rayon::prelude::*;

use self::blake::{Blake2b, Blake3, subtree_bytes};
use self::cache::{Cache, CacheUse, Remembered};
use self::cores::Cores;
pub use self::cores::MOST_JOBS;
pub use self::digest::{Algorithm, Digest};
use self::place::Place;
pub use self::place::{Looked, Root};
pub(crate) use self::place::{Stamp, Time};
use self::schedule::{Hashed, Kept, OnFailure, Watch};
use self::sha256::Sha256;
pub use self::streams::Piece;
use self::streams::Unit;

/// Why a file has no digest.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was written to, truncated or replaced meanwhile: its digest would be of no state it ever had.
    #[error("{0} changed while it was hashed")]
    Changed(PathBuf),
    /// The system does not give as many threads.
    #[error("{0} threads cannot be started: {1}")]
    Threads(usize, String),
    /// The kernel that was asked for is not one of this CPU.
    #[error("there is no hash kernel {0:?} on this CPU; there are {known}", known = .1.join(", "))]
    Kernel(String, Vec<&'static str>),
}

/// How much of the work is done, for whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    hashed: AtomicU64,
}

impl Progress {
    /// Bytes that are to be hashed; zero until that is known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that were hashed.
    pub fn hashed(&self) -> u64 {
        self.hashed.load(Ordering::Relaxed)
    }
}

/// Of so many files some bytes are read to tell one model from another. Training changes the largest ones; reading more of them
/// would cost each of many machines, which is to hash a part, nearly as much as the whole where files are small.
const SAMPLED_FILES: usize = 1000;

/// How many bytes of the smallest of them are compared whole: configurations, tokenizers.
const SAMPLED_WHOLE: u64 = 64 << 20;

/// How many files, of which these are the sizes, the smallest first, that is.
fn sampled_whole(sizes: impl Iterator<Item = u64>) -> usize {
    sizes.scan(SAMPLED_WHOLE, |left, bytes| left.checked_sub(bytes).map(|rest| *left = rest)).count()
}

/// How often digests are remembered while others are computed: who is stopped, hours later, has all that were complete a minute
/// before.
const KEPT_EVERY: Duration = Duration::from_secs(60);

/// Hashes files with all cores. Its buffers take 35 MiB at most, whatever it hashes.
pub struct Hasher {
    cores: Cores,
    sha256: Sha256,
    progress: Arc<Progress>,
    cache: Option<Mutex<Remembered>>,
}

impl Hasher {
    /// A hasher with as many threads, or one for each core, and the fastest kernel for this CPU, or the one named.
    pub fn new(jobs: Option<NonZeroUsize>, kernel: Option<&str>) -> Result<Self, HashError> {
        let unknown = |known| HashError::Kernel(kernel.unwrap_or_default().to_owned(), known);
        let sha256 = Sha256::new(kernel).map_err(unknown)?;
        Ok(Self { cores: Cores::new(jobs)?, sha256, progress: Arc::default(), cache: None })
    }

    /// Has it look digests up in a cache, and remember them there.
    #[must_use]
    pub fn with_cache(self, cache: Cache) -> Self {
        Self { cache: Some(Mutex::new(Remembered::new(cache))), ..self }
    }

    /// What the cache saved, if there is one.
    pub fn into_cache_use(self) -> Option<CacheUse> {
        self.cache.map(|cache| cache.into_inner().unwrap_or_else(PoisonError::into_inner).into_used())
    }

    /// How far it is.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Looks at files, by their paths below a directory: their sizes, and what tells whether they change.
    pub fn look<'a>(&self, root: &'a Root, paths: Vec<&'a Path>) -> Result<Looked<'a>, HashError> {
        let stamps = self.look_each(root, &paths).into_iter().collect::<Result<_, _>>()?;
        Ok(Looked::new(root, paths, stamps))
    }

    /// Looks at files, whatever comes of each.
    pub(crate) fn look_each(&self, root: &Root, paths: &[&Path]) -> Vec<Result<Stamp, HashError>> {
        let look = |path: &&Path| Place { root, path }.look();
        self.cores.pool.install(|| paths.par_iter().with_min_len(64).map(look).collect())
    }

    /// How many to look at together: some for each thread, and of all that there are no more than that.
    pub(crate) fn looks(&self) -> usize {
        (64 * self.cores.count()).max(4096)
    }

    /// A digest of some bytes of the largest files, at sixteen places at most, and of all of the small ones among them: two
    /// models of the same names and sizes mostly have different ones, but not where they differ only elsewhere.
    pub fn sample(&self, files: &Looked<'_>) -> Result<Digest, HashError> {
        let sample = |file: usize, whole: bool| {
            let (place, stamp) = files.get(file);
            source::sample(place, stamp, whole).map_err(|error| place.failed(error))
        };
        let mut largest: Vec<(u64, usize)> = files.sizes().zip(0..).collect();
        largest.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        largest.truncate(SAMPLED_FILES);
        let parts = largest.len() - sampled_whole(largest.iter().rev().map(|(bytes, _)| *bytes));
        let sampled = largest.into_par_iter().enumerate().with_min_len(16);
        let sampled = sampled.map(|(index, (_, file))| sample(file, index >= parts));
        let samples: Vec<Digest> = self.cores.pool.install(|| sampled.collect::<Result<_, _>>())?;
        let samples: Vec<u8> = samples.iter().flat_map(|sample| sample.as_bytes().to_vec()).collect();
        Ok(Digest::sha256(&samples))
    }

    /// The digests of pieces, in their order. A file that is not, from start to end, in the state of its stamp is an
    /// error that names it.
    pub fn digests(
        &self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
    ) -> Result<Vec<Digest>, HashError> {
        let Hashed { digests, failures } = self.look_up(algorithm, files, pieces, OnFailure::Stop);
        failures.into_iter().next().map_or(Ok(digests), |(_, error)| Err(error))
    }

    /// The digest of each piece that has one, and why the others do not.
    pub(crate) fn digests_of_each(
        &self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
    ) -> (Vec<Digest>, BTreeMap<usize, HashError>) {
        let Hashed { digests, failures } = self.look_up(algorithm, files, pieces, OnFailure::GoOn);
        (digests, failures.into_iter().collect())
    }

    /// Looks digests up in the cache, if there is one, and hashes what is not there.
    fn look_up(
        &self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
        on_failure: OnFailure,
    ) -> Hashed {
        let hash =
            |pieces: &[Piece], kept: Option<Kept<'_>>| self.hash(algorithm, files, pieces, on_failure, kept);
        let Some(remembered) = &self.cache else { return hash(pieces, None) };
        let mut remembered = remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.look_up(algorithm, files, pieces, |pieces, kept| hash(pieces, Some(kept)))
    }

    /// Hashes pieces, and tells somebody of their digests from time to time.
    fn hash(
        &self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
        on_failure: OnFailure,
        kept: Option<Kept<'_>>,
    ) -> Hashed {
        self.progress.total.fetch_add(Piece::total(pieces), Ordering::Relaxed);
        let of = |unit: &Unit| files.get(pieces.get(unit.piece).map_or(0, |piece| piece.file));
        let pieces_of = || pieces.iter().enumerate();
        let whole = || pieces_of().map(|(i, piece)| Unit::whole(i, piece.range.clone())).collect::<Vec<_>>();
        let (cores, hashed) = (&self.cores, &self.progress.hashed);
        let watch = |kept| Watch { hashed, kept: Option::zip(kept, Some(KEPT_EVERY)) };
        match algorithm {
            Algorithm::Sha256 => schedule::run(&self.sha256, &whole(), of, on_failure, cores, watch(kept)),
            Algorithm::Blake2b => schedule::run(&Blake2b, &whole(), of, on_failure, cores, watch(kept)),
            Algorithm::Blake3 => {
                let subtree = subtree_bytes(Piece::total(pieces));
                let units =
                    pieces_of().flat_map(|(index, piece)| Blake3::units(index, &piece.range, subtree));
                let units: Vec<Unit> = units.collect();
                let merge = |parts: &[Digest]| Blake3::merge(parts, &units, pieces, subtree);
                let merging = kept.map(|kept| move |parts: &[Digest]| kept(&merge(parts)));
                let kept = merging.as_ref().map(|merging| merging as Kept<'_>);
                let Hashed { digests: parts, failures } =
                    schedule::run(&Blake3, &units, of, on_failure, cores, watch(kept));
                Hashed { digests: merge(&parts), failures }
            }
        }
    }
}

/// What fuzzing reaches that nobody else may.
#[cfg(any(test, fuzzing))]
pub mod fuzzing {
    pub use super::sha256::agree_with_sha2;
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn hash_one(path: &Path) -> Result<Digest, HashError> {
        let hasher = Hasher::new(None, None)?;
        let root = Root::open("/".as_ref()).expect("a directory");
        let files = hasher.look(&root, vec![path])?;
        let pieces: Vec<_> = files.sizes().map(|size| Piece { file: 0, range: 0..size }).collect();
        Ok(hasher.digests(Algorithm::Sha256, &files, &pieces)?.remove(0))
    }

    /// Sizes around the buffers' borders, few and many files, every algorithm, against each algorithm's own crate.
    #[test]
    fn files_of_every_size_and_number() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut sizes = vec![0, 1, 63, 64, 4095, (9 << 20) + 77, (4 << 20) + 1, 3 << 20];
        // Around the ends of one and two buffers, for many cores and lanes, for few, and where one file is read ahead.
        for buffer in [32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20] {
            sizes.extend([buffer - 64, buffer - 1, buffer, buffer + 1, buffer + 63, buffer + 64, 2 * buffer]);
        }
        let content = |index: usize| -> Vec<u8> {
            (0..sizes[index % sizes.len()] + index / sizes.len())
                .map(|i| (i * 7 + index + i / 253).to_le_bytes()[0])
                .collect()
        };
        for count in [1, 3, 40] {
            let root = Root::open(directory.path()).expect("a directory");
            let names: Vec<String> = (0..count).map(|i: usize| i.to_string()).collect();
            // One of one file is a long one: it is read ahead.
            let of = |index: usize| content(if count == 1 { 5 } else { index });
            let write = |(i, name)| std::fs::write(directory.path().join(name), of(i)).expect("written");
            names.iter().enumerate().for_each(write);
            let known = Sha256::new(Some("abacus")).err().expect("unknown");
            let ways = [1, 2, 5].map(|jobs| (jobs, None)).into_iter();
            for (jobs, kernel) in ways.chain(known.into_iter().map(|name| (2, Some(name)))) {
                let hasher = Hasher::new(NonZeroUsize::new(jobs), kernel).expect("a hasher");
                let files = hasher.look(&root, names.iter().map(Path::new).collect()).expect("looked");
                let piece = |(file, size)| Piece { file, range: 0..size };
                let pieces: Vec<_> = files.sizes().enumerate().map(piece).collect();
                let all = [Algorithm::Sha256, Algorithm::Blake2b, Algorithm::Blake3];
                for algorithm in all.into_iter().take(if kernel.is_some() { 1 } else { 3 }) {
                    let digests = hasher.digests(algorithm, &files, &pieces).expect("hashed");
                    for (index, digest) in digests.iter().enumerate() {
                        let expected = match algorithm {
                            Algorithm::Sha256 => Digest::sha256(&of(index)),
                            Algorithm::Blake2b => {
                                Digest::from_bytes(blake2b_simd::blake2b(&of(index)).as_bytes())
                            }
                            Algorithm::Blake3 => Digest::from_bytes(blake3::hash(&of(index)).as_bytes()),
                        };
                        assert_eq!(
                            *digest, expected,
                            "{algorithm}, {count} files, {jobs} jobs, {kernel:?}, file {index}"
                        );
                    }
                }
                assert_eq!(hasher.progress().hashed(), hasher.progress().total());
            }
        }
    }

    #[test]
    fn no_more_is_read_of_a_model_than_agreed() {
        let whole = |sizes: &[u64]| sampled_whole(sizes.iter().copied());
        assert_eq!((whole(&[0, 5, 1 << 20, 1 << 40]), whole(&[SAMPLED_WHOLE; 1000])), (3, 1));
        assert_eq!((whole(&[u64::MAX; 2]), whole(&[])), (0, 0));
    }

    #[test]
    fn sparse_files_that_claim_more_than_there_can_be() {
        let piece = Piece { file: 0, range: 0..i64::MAX.unsigned_abs() };
        assert_eq!(Piece::total(&[piece.clone(), piece.clone(), piece]), u64::MAX);
    }

    /// A disk's error, or a server's: of a file of the kernel's that says EINVAL to everybody. And of one that has no size.
    #[test]
    fn a_file_that_cannot_be_read_is_an_error_that_names_it() {
        for (path, why) in [
            ("/sys/class/net/lo/duplex", "Invalid argument (os error 22)"),
            ("/proc/version", "it says that it is empty, and is not"),
        ] {
            let error = hash_one(path.as_ref()).expect_err("nobody can hash that");
            assert_eq!(crate::with_causes(&error), format!("cannot read {path}: {why}"));
        }
    }

    #[test]
    fn a_file_that_grows_is_an_error_that_names_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(64 << 20).expect("grown");
        let path = file.path().to_owned();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut writer = std::fs::OpenOptions::new().append(true).open(&path).expect("opened");
                while !stop.load(Ordering::Relaxed) {
                    writer.write_all(b"x").expect("appended");
                }
            });
            let result = hash_one(&path);
            stop.store(true, Ordering::Relaxed);
            result
        });
        assert!(matches!(result, Err(HashError::Changed(changed)) if changed == path));
    }

    #[test]
    fn a_file_that_was_replaced_since_it_was_looked_at() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, other) = (directory.path().join("a"), directory.path().join("b"));
        let root = Root::open(directory.path()).expect("a directory");
        let hasher = Hasher::new(None, None).expect("a hasher");
        type Replace = fn(&Path, &Path) -> io::Result<()>;
        fn open(path: &Path) -> io::Result<std::fs::File> {
            std::fs::OpenOptions::new().write(true).open(path)
        }
        let link: Replace =
            |path, other| std::fs::remove_file(path).and_then(|()| std::os::unix::fs::symlink(other, path));
        let pipe: Replace = |path, _| {
            let mode = rustix::fs::Mode::RUSR;
            std::fs::remove_file(path)?;
            Ok(rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0)?)
        };
        let changes: [Replace; 5] = [
            |path, other| std::fs::rename(other, path),
            |path, _| open(path)?.set_len(2),
            |path, _| open(path)?.write_all(b"SIZE"),
            |path, _| open(path)?.set_modified(std::time::UNIX_EPOCH),
            pipe,
        ];
        for (replace, is_link) in changes.into_iter().map(|change| (change, false)).chain([(link, true)]) {
            std::fs::write(&other, "same").expect("written");
            std::fs::write(&path, "size").expect("written");
            let files = hasher.look(&root, vec!["a".as_ref()]).expect("looked");
            replace(&path, &other).expect("replaced");
            let pieces = [Piece { file: 0, range: 0..4 }];
            let result = hasher.digests(Algorithm::Sha256, &files, &pieces);
            let told = match result {
                Err(HashError::Changed(ref changed)) => changed == &path && !is_link,
                // Not followed.
                Err(HashError::Read { .. }) => is_link,
                _ => false,
            };
            assert!(told, "{result:?}");
            std::fs::remove_file(&path).expect("removed");
        }
        // Nor is a pipe taken for a file of no bytes.
        pipe(&other, &path).expect("made");
        assert!(
            matches!(hasher.look(&root, vec!["b".as_ref()]), Err(HashError::Changed(changed)) if changed == other)
        );
    }
}
