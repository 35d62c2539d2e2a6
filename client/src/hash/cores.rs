//! The threads that hash: one for each core, and more while they wait for files that are small, and far away.

use std::num::NonZeroUsize;
use std::sync::Once;
use std::thread::{Builder, Scope, scope};

use nix::sys::resource::{UsageWho, getrusage};
use rustix::process::{Resource, getrlimit};

use super::HashError;

/// More threads than any machine has cores do nothing but wait for each other.
pub const MOST_JOBS: usize = 512;

/// How many small files are waited for at once. A disk that is asked for one on each core is idle most of the time: on two
/// cores and a virtual disk 20,000 files of 10 KiB took 0.6 s, and 1.4 with no more threads. Another machine's is further away.
const WAITED_FOR: usize = 64;

/// As many threads as were asked for, or one for each core.
pub(super) struct Cores {
    pub(super) pool: rayon::ThreadPool,
    /// What may be added to them: nothing, where somebody said how many there are to be.
    more: usize,
}

/// Descriptors that are left to the rest of the process.
const SPARE_DESCRIPTORS: usize = 64;

/// Who works.
pub(super) struct Worker<'a> {
    /// Which of the cores; none for those that were added.
    pub(super) core: Option<usize>,
    taken: usize,
    /// How often it had slept when it was last asked.
    slept: i64,
    add: &'a (dyn Fn() + Sync),
}

impl Cores {
    pub(super) fn new(jobs: Option<NonZeroUsize>) -> Result<Self, HashError> {
        let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let count = jobs.map_or_else(cores, NonZeroUsize::get).min(MOST_JOBS);
        // Each has a file open.
        let count = count.min(spare_descriptors()).max(1);
        let more = if jobs.is_some() { 0 } else { WAITED_FOR.saturating_sub(count) };
        let mut pool = threads(count);
        // Where fewer may be started than there are cores: in a container, say.
        let mut fewer = count;
        while jobs.is_none() && pool.is_err() && fewer > 1 {
            fewer /= 2;
            pool = threads(fewer);
        }
        Ok(Self { pool: pool?, more })
    }

    /// Threads, without those that may be added.
    pub(super) fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Has every thread do `work`, and those that are added: so many at most.
    pub(super) fn run(&self, most: usize, work: impl Fn(Worker<'_>) + Sync) {
        let (work, added, more) = (&work, Once::new(), self.more.min(most));
        scope(|scope| {
            let add = || added.call_once(|| add(more, scope, work));
            self.pool.broadcast(|core| work(Worker::new(Some(core.index()), &add)));
        });
    }
}

fn add<'scope>(more: usize, scope: &'scope Scope<'scope, '_>, work: &'scope (impl Fn(Worker<'_>) + Sync)) {
    for _ in 0..more {
        let added =
            Builder::new().name("waits".into()).spawn_scoped(scope, || work(Worker::new(None, &|| ())));
        // Those that there are do it all.
        if added.is_err() {
            break;
        }
    }
}

/// How many files may be open at a time.
pub(super) fn spare_descriptors() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    limit
        .map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
        .saturating_sub(SPARE_DESCRIPTORS)
}

fn threads(count: usize) -> Result<rayon::ThreadPool, HashError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
    pool.map_err(|error| HashError::Threads(count, error.to_string()))
}

/// How many files a thread takes before it is asked again how often it slept.
const ASKED_AFTER: usize = 32;

impl<'a> Worker<'a> {
    fn new(core: Option<usize>, add: &'a (dyn Fn() + Sync)) -> Self {
        Self { core, taken: 0, slept: i64::MAX, add }
    }

    /// It has opened a small file and read it, and there are none but small ones after it. If it slept for every second of
    /// them, the machine could do with more threads. (Who takes the core away from it, or the core from the machine, does
    /// not make it sleep.)
    pub(super) fn took_small(&mut self) {
        self.taken += 1;
        if self.core.is_none() || !self.taken.is_multiple_of(ASKED_AFTER) {
            return;
        }
        let slept = getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches());
        if slept.saturating_sub(self.slept) >= ASKED_AFTER as i64 / 2 {
            (self.add)();
        }
        self.slept = slept;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU64;
    use std::thread::sleep;
    use std::time::Duration;

    use super::super::digest::Digest;
    use super::super::place::{Place, Root};
    use super::super::schedule::{self, OnFailure, Watch};
    use super::super::sha256::Sha256;
    use super::super::streams::Unit;
    use super::*;

    fn cores(count: usize, more: usize) -> Cores {
        Cores { more, ..Cores::new(NonZeroUsize::new(count)).expect("threads") }
    }

    /// Hashes a thousand small files, each of which takes so long to be found. Returns which threads found them.
    fn found_by(cores: &Cores, far: Option<Duration>) -> BTreeSet<String> {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::open(directory.path()).expect("a directory");
        std::fs::write(directory.path().join("file"), "small").expect("written");
        let place = Place { root: &root, path: "file".as_ref() };
        let stamp = place.look().expect("looked at");
        let units: Vec<Unit> = (0..1000).map(|piece| Unit::whole(piece, 0..stamp.size)).collect();
        let threads = Mutex::new(BTreeSet::new());
        let input = |_: &Unit| {
            far.into_iter().for_each(sleep);
            let name = format!("{:?}", std::thread::current().id());
            threads.lock().expect("unpoisoned").insert(name);
            (place, stamp)
        };
        let streams = Sha256::new(None).expect("kernels");
        let watch = Watch { hashed: &AtomicU64::new(0), kept: None };
        let hashed = schedule::run(&streams, &units, input, OnFailure::Stop, cores, watch);
        assert_eq!(hashed.digests, vec![Digest::sha256(b"small"); 1000]);
        threads.into_inner().expect("unpoisoned")
    }

    /// Told of each look at the clock, whoever stops it then has what is done.
    #[test]
    fn digests_are_told_before_all_are_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::open(directory.path()).expect("a directory");
        let file = std::fs::File::create(directory.path().join("file")).expect("made");
        file.set_len(100 << 20).expect("grown");
        let place = Place { root: &root, path: "file".as_ref() };
        let stamp = place.look().expect("looked at");
        let units: Vec<Unit> = (0..4).map(|piece| Unit::whole(piece, 0..stamp.size)).collect();
        let told = Mutex::new(Vec::new());
        let kept = |digests: &[Digest]| {
            told.lock().expect("unpoisoned").push(digests.iter().filter(|one| **one != Digest::NONE).count());
        };
        let hashed = AtomicU64::new(0);
        let watch = |every| Watch { hashed: &hashed, kept: Some((&kept, every)) };
        let streams = Sha256::new(Some("portable")).expect("kernels");
        let run = |every| {
            let input = |_: &Unit| (place, stamp);
            schedule::run(&streams, &units, input, OnFailure::Stop, &cores(1, 0), watch(every)).digests
        };
        let digests = run(Duration::ZERO);
        let times = std::mem::take(&mut *told.lock().expect("unpoisoned"));
        assert!(times.is_sorted() && times.contains(&1) && times.contains(&3), "{times:?}");
        assert_eq!(run(Duration::from_secs(3600)), digests);
        assert!(told.lock().expect("unpoisoned").is_empty());
    }

    #[test]
    fn small_files_are_waited_for_by_more_threads_than_hash() {
        let far = Some(Duration::from_millis(1));
        assert!(found_by(&cores(1, 10), far).len() > 5);
        // Not where none has to wait, nor where somebody said how many there are to be.
        assert_eq!(found_by(&cores(1, 10), None).len(), 1);
        assert_eq!(found_by(&Cores::new(NonZeroUsize::new(1)).expect("threads"), far).len(), 1);
    }
}
