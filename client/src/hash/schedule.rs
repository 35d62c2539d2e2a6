//! Which core hashes what, when: every core keeps as many independent streams going as its vectors hold.
//!
//! One way for one big file, 160 big files and 100,000 small ones: the work is a list of units, the longest first;
//! each core takes units until it has its share of streams, advances them together by what they all have in their
//! buffers, and puts the next unit in the place of one that ends at once, as long as that leaves the others theirs.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::HashError;
use super::cores::{Cores, Worker, spare_descriptors};
use super::digest::Digest;
use super::place::{Place, Stamp};
use super::share::Share;
use super::source::{self, Buffer, Feed, PAGE_BYTES, SMALL_BYTES};
use super::streams::{Streams, Unit};

/// The most that all buffers together may hold.
const BUFFERS_BYTES: usize = 32 << 20;
/// And those of a core. Long reads cost less for each byte, and what a core's own cache does not hold comes from further
/// away: with sixteen streams twice as much took 2 % less time on Zen 4 and 7 % more on Emerald Rapids, half as much 6 %
/// more and 5 % less.
const CORE_BYTES: usize = 1 << 20;
/// A power of two: BLAKE3, of which a core has one stream, fills its vectors with subtrees of so many chunks.
const LARGEST_BUFFER: usize = 256 << 10;
/// Waking another core costs as much as hashing 100 KiB.
const LARGEST_AHEAD: usize = 1 << 20;
const SHORT_BUFFER: usize = 28 << 10;
/// Of a thread that waits for small files: all of them have 2 MiB.
const WAITING_BUFFER: usize = 32 << 10;
const SMALLEST_BUFFER: usize = 4 << 10;

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

/// Told from time to time what digests there are, in the order of what is hashed; [`Digest::NONE`] where there is none yet.
pub(super) type Kept<'a> = &'a (dyn Fn(&[Digest]) + Sync);

/// Who is told how far it is.
#[derive(Clone, Copy)]
pub(super) struct Watch<'a> {
    /// Bytes that were hashed.
    pub(super) hashed: &'a AtomicU64,
    /// Who keeps what there is, should it end before its time; and how often.
    pub(super) kept: Option<(Kept<'a>, Duration)>,
}

/// Hashes units. `input` says which file a unit is of.
pub(super) fn run<'a, S: Streams>(
    streams: &'a S,
    units: &'a [Unit],
    input: impl Fn(&Unit) -> (Place<'a>, Stamp) + Sync,
    on_failure: OnFailure,
    cores: &Cores,
    watch: Watch<'a>,
) -> Hashed {
    let mut longest_first: Vec<(usize, &Unit)> = units.iter().enumerate().collect();
    longest_first.sort_by_key(|(_, unit)| std::cmp::Reverse(unit.bytes()));
    let jobs = cores.count();
    let spare = spare_descriptors();
    let affordable = (spare / jobs).max(1);
    // A core that took all that its vectors hold would leave none to the others where there is little.
    let lanes = streams.lanes().min(units.len().div_ceil(jobs)).min(affordable);
    // And of more cores than share the buffers, each takes fewer: short reads cost more than lanes save.
    let lanes = lanes.min(BUFFERS_BYTES / jobs / (SHORT_BUFFER + PAGE_BYTES)).max(1);
    // Cores that would have nothing to hash read for those that have.
    let ahead = units.len() < jobs;
    let buffer = if ahead {
        let share = BUFFERS_BYTES / (units.len().max(1) * source::AHEAD_BUFFERS);
        share.saturating_sub(PAGE_BYTES).min(LARGEST_AHEAD)
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
        share: Share::new(units.iter().fold(0, |sum, unit| sum.saturating_add(unit.bytes())), jobs, lanes),
        on_failure,
        stopped: AtomicBool::new(false),
        lanes,
        buffer,
        ahead,
        digests: Mutex::new(vec![Digest::NONE; units.len()]),
        failures: Mutex::default(),
        watch,
        kept: Mutex::new(Instant::now()),
    };
    cores.run(spare.saturating_sub(jobs * lanes), |worker| work.work(worker));
    let digests = work.digests.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failures = work.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    Hashed { digests, failures }
}

struct Work<'a, S, I> {
    streams: &'a S,
    input: I,
    longest_first: Vec<(usize, &'a Unit)>,
    next: AtomicUsize,
    share: Share,
    on_failure: OnFailure,
    stopped: AtomicBool,
    lanes: usize,
    buffer: usize,
    ahead: bool,
    /// In the units' order. Nobody holds the lock for longer than it takes to write one.
    digests: Mutex<Vec<Digest>>,
    failures: Mutex<Vec<(usize, HashError)>>,
    watch: Watch<'a>,
    /// When that was told last.
    kept: Mutex<Instant>,
}

struct Lane<'a, S> {
    /// The unit's place in the list.
    index: usize,
    unit: &'a Unit,
    place: Place<'a>,
    state: S,
    feed: Feed,
    /// Bytes that are not hashed yet.
    left: u64,
}

fn left<S>(lanes: &[Lane<'_, S>]) -> u64 {
    lanes.iter().fold(0, |sum, lane| sum.saturating_add(lane.left))
}

impl<'a, S: Streams, I: Fn(&Unit) -> (Place<'a>, Stamp)> Work<'a, S, I> {
    /// One thread's work: until nothing is left.
    fn work(&self, mut worker: Worker<'_>) {
        // Those that were added hash one file after the other: they are there to wait for them.
        let (most, buffer) = match worker.core {
            Some(_) => (self.lanes, self.buffer),
            None => (1, self.buffer.min(WAITING_BUFFER)),
        };
        let mut lanes: Vec<Lane<'_, S::State>> = Vec::new();
        let mut buffers: Vec<Buffer> = Vec::new();
        while !self.stopped.load(Ordering::Relaxed) {
            if let Some(core) = worker.core {
                self.share.holds(core, left(&lanes));
            }
            let mut next = 0;
            while let Some(lane) = lanes.get_mut(next) {
                if lane.feed.available().is_empty()
                    && !lane.feed.ended()
                    && let Err(error) = lane.feed.refill()
                {
                    self.fail(lane.unit, lane.place.failed(error));
                    lanes.swap_remove(next);
                    continue;
                }
                if lane.feed.available().len() >= S::BLOCK {
                    next += 1;
                    continue;
                }
                let Lane { index, unit, state, feed, .. } = lanes.swap_remove(next);
                // Buffers hold whole blocks.
                assert!(feed.ended(), "less than a block is left in the middle of a range");
                let rest = feed.available();
                let rest_bytes = rest.len() as u64;
                let digest = self.streams.finish(state, rest, unit);
                let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(place) = digests.get_mut(index) {
                    *place = digest;
                }
                drop(digests);
                self.hashed(rest_bytes);
                buffers.push(feed.into_buffer());
            }
            if lanes.len() < most
                && self.takes(&lanes)
                && let Some(lane) = self.take(&mut buffers, buffer)
            {
                if lane.left <= SMALL_BYTES {
                    worker.took_small();
                }
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
            for lane in &mut lanes {
                lane.feed.take(step);
                lane.left -= step as u64;
            }
            self.hashed((step * lanes.len()) as u64);
        }
    }

    /// So many bytes more were hashed. Hours may have passed since the last one of a long file.
    fn hashed(&self, bytes: u64) {
        self.watch.hashed.fetch_add(bytes, Ordering::Relaxed);
        let Some((kept, every)) = self.watch.kept else { return };
        // Whoever comes while somebody tells it need not.
        if let Ok(mut last) = self.kept.try_lock()
            && last.elapsed() >= every
        {
            let digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner).clone();
            kept(&digests);
            *last = Instant::now();
        }
    }

    /// Whether the next unit is for a core with these. Should another core take it first: none behind it is longer.
    fn takes(&self, lanes: &[Lane<'_, S::State>]) -> bool {
        let Some((_, unit)) = self.longest_first.get(self.next.load(Ordering::Relaxed)) else { return false };
        lanes.is_empty() || self.share.takes(left(lanes), unit.bytes())
    }

    /// The next unit that can be opened.
    fn take(&self, buffers: &mut Vec<Buffer>, buffer: usize) -> Option<Lane<'a, S::State>> {
        while !self.stopped.load(Ordering::Relaxed) {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let &(index, unit) = self.longest_first.get(next)?;
            self.share.taken(unit.bytes());
            let (place, stamp) = (self.input)(unit);
            let buffer = buffers.pop().unwrap_or_else(|| Buffer::new(buffer));
            match Feed::open(place, stamp, &unit.range, buffer, self.ahead) {
                Ok(feed) => {
                    let (state, left) = (self.streams.start(unit), unit.bytes());
                    return Some(Lane { index, unit, place, state, feed, left });
                }
                Err(error) => self.fail(unit, place.failed(error)),
            }
        }
        None
    }

    fn fail(&self, unit: &Unit, error: HashError) {
        self.stopped.fetch_or(self.on_failure == OnFailure::Stop, Ordering::Relaxed);
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push((unit.piece, error));
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::PathBuf;

    use super::super::place::Root;
    use super::*;

    /// Does nothing but write down what it is asked for.
    #[derive(Default)]
    struct Recorder {
        started: Mutex<Vec<usize>>,
        side_by_side: Mutex<Vec<usize>>,
    }

    impl Streams for Recorder {
        type State = ();
        const BLOCK: usize = 64;

        fn lanes(&self) -> usize {
            3
        }

        fn start(&self, unit: &Unit) {
            self.started.lock().expect("unpoisoned").push(unit.piece);
        }

        fn update(&self, states: &mut [&mut ()], data: &[&[u8]]) {
            assert!(data.iter().all(|one| one.len() == data[0].len() && one.len() % 64 == 0));
            self.side_by_side.lock().expect("unpoisoned").push(states.len());
        }

        fn finish(&self, (): (), rest: &[u8], unit: &Unit) -> Digest {
            assert_eq!(rest.len() as u64, (unit.range.end - unit.range.start) % 64);
            Digest::sha256(&unit.piece.to_le_bytes())
        }
    }

    struct Files {
        directory: tempfile::TempDir,
        root: Root,
        files: Vec<(PathBuf, Stamp)>,
        units: Vec<Unit>,
    }

    fn files(blocks: &[u64]) -> Files {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::open(directory.path()).expect("a directory");
        let file = |(index, blocks): (usize, &u64)| {
            let path = PathBuf::from(index.to_string());
            let file = std::fs::File::create(directory.path().join(&path));
            file.and_then(|file| file.set_len(blocks * 64 + 7)).expect("written");
            let stamp = Place { root: &root, path: &path }.look().expect("looked at");
            (path, stamp)
        };
        let files: Vec<_> = blocks.iter().enumerate().map(file).collect();
        let units = files.iter().enumerate().map(|(piece, (_, stamp))| Unit::whole(piece, 0..stamp.size));
        let units = units.collect();
        Files { directory, root, files, units }
    }

    fn run_on(
        jobs: usize,
        Files { root, files, units, .. }: &Files,
        on_failure: OnFailure,
    ) -> (Recorder, Hashed) {
        let recorder = Recorder::default();
        let input = |unit: &Unit| {
            let (path, stamp) = &files[unit.piece];
            (Place { root, path }, *stamp)
        };
        let cores = Cores::new(NonZeroUsize::new(jobs)).expect("threads");
        let hashed = run(
            &recorder,
            units,
            input,
            on_failure,
            &cores,
            Watch { hashed: &AtomicU64::new(0), kept: None },
        );
        (recorder, hashed)
    }

    /// The longest first, as many as there are lanes, and the next in the place of one that ends.
    #[test]
    fn lanes_are_full_as_long_as_there_is_something_for_them() {
        let files = files(&[20, 900, 40, 700, 800, 10, 30, 60]);
        let (recorder, hashed) = run_on(1, &files, OnFailure::Stop);
        assert_eq!(*recorder.started.lock().expect("unpoisoned"), [1, 4, 3, 7, 2, 6, 0, 5]);
        let side_by_side = recorder.side_by_side.into_inner().expect("unpoisoned");
        // All three lanes until only two units are left, and then one.
        let full = side_by_side.iter().filter(|lanes| **lanes == 3).count();
        assert!(full >= 5 && side_by_side.is_sorted_by(|one, next| one >= next), "{side_by_side:?}");
        assert!(hashed.failures.is_empty());
        for (piece, digest) in hashed.digests.iter().enumerate() {
            assert_eq!(*digest, Digest::sha256(&piece.to_le_bytes()));
        }
    }

    /// Of few units, no core takes more than its share.
    #[test]
    fn cores_share_what_there_is() {
        let files = files(&[500, 500, 500, 500]);
        let (recorder, _) = run_on(2, &files, OnFailure::Stop);
        let most = recorder.side_by_side.into_inner().expect("unpoisoned").into_iter().max();
        assert!(most.is_some_and(|most| most <= 2), "{most:?} side by side");
    }

    /// With so many cores and lanes that a core's share of the buffers is no whole number of blocks.
    #[test]
    fn buffers_hold_whole_blocks() {
        let files = files(&[5000; 150]);
        let (_, hashed) = run_on(50, &files, OnFailure::Stop);
        assert!(hashed.failures.is_empty() && hashed.digests.len() == 150);
    }

    #[test]
    fn a_failure_stops_all_or_nothing() {
        let files = files(&[40, 500, 400, 300, 30, 20, 10]);
        std::fs::remove_file(files.directory.path().join(&files.files[1].0)).expect("removed");
        for (on_failure, done) in [(OnFailure::Stop, 0), (OnFailure::GoOn, 6)] {
            let (_, hashed) = run_on(1, &files, on_failure);
            let failed: Vec<_> = hashed.failures.iter().map(|(piece, _)| *piece).collect();
            assert_eq!(failed, [1]);
            assert_eq!(hashed.digests.iter().filter(|digest| **digest != Digest::NONE).count(), done);
            assert_eq!(hashed.digests[1], Digest::NONE);
        }
    }
}
