//! Which core hashes what, when: every core keeps as many independent streams going as its vectors hold.
//!
//! One way for one big file, 160 big files and 100,000 small ones: the work is a list of units, the longest first;
//! each core takes units until it has its share of streams, advances them together by what they all have in their
//! buffers, and puts the next unit in the place of one that ends at once.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::HashError;
use super::digest::Digest;
use super::source::{self, Buffer, Feed, PAGE_BYTES, Stamp};

/// A hash algorithm, as streams that are advanced side by side.
pub(super) trait Streams: Sync {
    /// Where a stream is.
    type State: Send;
    /// Bytes that streams are advanced by, or a multiple.
    const BLOCK: usize;
    /// How many streams at once are fastest.
    fn lanes(&self) -> usize;
    /// A stream at its start.
    fn start(&self, unit: &Unit) -> Self::State;
    /// Advances each stream by its data: whole blocks, as many for each.
    fn update(&self, states: &mut [&mut Self::State], data: &[&[u8]]);
    /// A stream's end: less than a block is left.
    fn finish(&self, state: Self::State, rest: &[u8], unit: &Unit) -> Digest;
}

/// Bytes that are hashed one after the other, on one core.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    /// The piece that asked for it.
    pub(super) piece: usize,
    /// Where its bytes are in the file.
    pub(super) range: Range<u64>,
    /// Where they are in the piece.
    pub(super) offset: u64,
    /// Whether they are the whole piece.
    pub(super) whole: bool,
}

impl Unit {
    /// A piece that is hashed in one go.
    pub(super) fn whole(piece: usize, range: Range<u64>) -> Self {
        Self { piece, range, offset: 0, whole: true }
    }
}

/// The most that all buffers together may hold; each core's share should fit into its own cache.
const BUFFERS_BYTES: usize = 32 << 20;
const CORE_BYTES: usize = 512 << 10;
/// A power of two: BLAKE3 fills its vectors with subtrees of so many chunks.
const LARGEST_BUFFER: usize = 128 << 10;
/// Waking another core costs as much as hashing 100 KiB.
const LARGEST_AHEAD: usize = 1 << 20;
const SMALLEST_BUFFER: usize = 4 << 10;

/// Descriptors that are left to the rest of the process.
const SPARE_DESCRIPTORS: usize = 64;

/// What to do when a file has no digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// Nothing more: the model cannot be signed.
    Stop,
    /// The other files: whoever verifies wants to know all that is wrong.
    GoOn,
}

/// What came of hashing.
pub(super) struct Hashed {
    /// In the units' order, or the pieces'. [`Digest::NONE`] where there is a failure, or was one before.
    pub(super) digests: Vec<Digest>,
    /// The pieces that have none, and why, in no order.
    pub(super) failures: Vec<(usize, HashError)>,
}

/// Hashes units. `input` says which file a unit is of.
pub(super) fn run<'a, S: Streams>(
    streams: &'a S,
    units: &'a [Unit],
    input: impl Fn(&Unit) -> (&'a Path, Stamp) + Sync,
    on_failure: OnFailure,
    pool: &rayon::ThreadPool,
    hashed: &'a AtomicU64,
) -> Hashed {
    let mut longest_first: Vec<(usize, &Unit)> = units.iter().enumerate().collect();
    longest_first.sort_by_key(|(_, unit)| std::cmp::Reverse(unit.range.end - unit.range.start));
    let jobs = pool.current_num_threads();
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let descriptors = descriptors.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let affordable = (descriptors.saturating_sub(SPARE_DESCRIPTORS) / jobs).max(1);
    // A core that took all that its vectors hold would leave none to the others where there is little.
    let lanes = streams.lanes().min(units.len().div_ceil(jobs)).min(affordable);
    // And of more cores than share the buffers, each takes fewer.
    let lanes = lanes.min(BUFFERS_BYTES / jobs / (SMALLEST_BUFFER + PAGE_BYTES)).max(1);
    // Cores that would have nothing to hash read for those that have.
    let ahead = units.len() < jobs;
    let buffer = if ahead {
        (BUFFERS_BYTES / (units.len().max(1) * source::AHEAD_BUFFERS)).min(LARGEST_AHEAD)
    } else {
        let share = (BUFFERS_BYTES / jobs / lanes).saturating_sub(PAGE_BYTES);
        share.min(CORE_BYTES / lanes).min(LARGEST_BUFFER)
    };
    let buffer = buffer.max(SMALLEST_BUFFER) / SMALLEST_BUFFER * SMALLEST_BUFFER;
    let work = Work {
        streams,
        input,
        longest_first,
        next: AtomicUsize::new(0),
        on_failure,
        stopped: AtomicBool::new(false),
        lanes,
        buffer,
        ahead,
        digests: Mutex::new(vec![Digest::NONE; units.len()]),
        failures: Mutex::default(),
        hashed,
    };
    pool.broadcast(|_| work.core());
    let digests = work.digests.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failures = work.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    Hashed { digests, failures }
}

struct Work<'a, S, I> {
    streams: &'a S,
    input: I,
    longest_first: Vec<(usize, &'a Unit)>,
    next: AtomicUsize,
    on_failure: OnFailure,
    stopped: AtomicBool,
    lanes: usize,
    buffer: usize,
    ahead: bool,
    /// In the units' order. Nobody holds the lock for longer than it takes to write one.
    digests: Mutex<Vec<Digest>>,
    failures: Mutex<Vec<(usize, HashError)>>,
    hashed: &'a AtomicU64,
}

struct Lane<'a, S> {
    /// The unit's place in the list.
    index: usize,
    unit: &'a Unit,
    path: &'a Path,
    state: S,
    feed: Feed,
}

impl<'a, S: Streams, I: Fn(&Unit) -> (&'a Path, Stamp)> Work<'a, S, I> {
    /// One core's work: until nothing is left.
    fn core(&self) {
        let mut lanes: Vec<Lane<'_, S::State>> = Vec::new();
        let mut buffers: Vec<Buffer> = Vec::new();
        while !self.stopped.load(Ordering::Relaxed) {
            let mut next = 0;
            while let Some(lane) = lanes.get_mut(next) {
                if lane.feed.available().is_empty()
                    && !lane.feed.ended()
                    && let Err(error) = lane.feed.refill()
                {
                    self.fail(lane.unit, error.of(lane.path));
                    lanes.swap_remove(next);
                    continue;
                }
                if lane.feed.available().len() >= S::BLOCK {
                    next += 1;
                    continue;
                }
                let Lane { index, unit, state, feed, .. } = lanes.swap_remove(next);
                let rest = feed.available();
                self.hashed.fetch_add(rest.len() as u64, Ordering::Relaxed);
                let digest = self.streams.finish(state, rest, unit);
                let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(place) = digests.get_mut(index) {
                    *place = digest;
                }
                drop(digests);
                buffers.push(feed.into_buffer());
            }
            if lanes.len() < self.lanes
                && let Some(lane) = self.take(&mut buffers)
            {
                lanes.push(lane);
                continue;
            }
            if lanes.is_empty() {
                break;
            }
            let shortest = lanes.iter().map(|lane| lane.feed.available().len()).min().unwrap_or(0);
            let step = shortest / S::BLOCK * S::BLOCK;
            let (mut states, mut data) = (Vec::with_capacity(lanes.len()), Vec::with_capacity(lanes.len()));
            for Lane { state, feed, .. } in &mut lanes {
                states.push(state);
                data.push(feed.available().get(..step).unwrap_or_default());
            }
            self.streams.update(&mut states, &data);
            lanes.iter_mut().for_each(|lane| lane.feed.take(step));
            self.hashed.fetch_add((step * lanes.len()) as u64, Ordering::Relaxed);
        }
    }

    /// The next unit that can be opened.
    fn take(&self, buffers: &mut Vec<Buffer>) -> Option<Lane<'a, S::State>> {
        while !self.stopped.load(Ordering::Relaxed) {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let &(index, unit) = self.longest_first.get(next)?;
            let (path, stamp) = (self.input)(unit);
            let buffer = buffers.pop().unwrap_or_else(|| Buffer::new(self.buffer));
            match Feed::open(path, stamp, &unit.range, buffer, self.ahead) {
                Ok(feed) => return Some(Lane { index, unit, path, state: self.streams.start(unit), feed }),
                Err(error) => self.fail(unit, error.of(path)),
            }
        }
        None
    }

    fn fail(&self, unit: &Unit, error: HashError) {
        self.stopped.fetch_or(self.on_failure == OnFailure::Stop, Ordering::Relaxed);
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push((unit.piece, error));
    }
}

/// More threads than any machine has cores do nothing but wait for each other.
const MOST_JOBS: usize = 512;

/// A pool of as many threads as asked for, or as there are cores for this process.
pub(super) fn pool(jobs: Option<NonZeroUsize>) -> Result<rayon::ThreadPool, HashError> {
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(jobs.min(MOST_JOBS)).build();
    pool.map_err(|error| HashError::Threads(jobs, error.to_string()))
}
