//! Which core takes the next unit: not the first that could, when the others would have nothing to do.

use std::sync::atomic::{AtomicU64, Ordering};

/// What is left, and what the cores have of it.
pub(super) struct Share {
    /// Bytes that nobody has taken.
    untaken: AtomicU64,
    /// Bytes that each core has before it.
    loads: Vec<AtomicU64>,
    /// With so many times the largest unit left, nobody has to ask who takes it.
    plenty: u64,
}

impl Share {
    /// Of so many bytes, for so many cores with so many lanes each.
    pub(super) fn new(bytes: u64, jobs: usize, lanes: usize) -> Self {
        let loads = (0..jobs).map(|_| AtomicU64::new(0)).collect();
        Self { untaken: AtomicU64::new(bytes), loads, plenty: 2 * jobs as u64 * lanes as u64 }
    }

    /// A core has so many bytes before it.
    pub(super) fn holds(&self, core: usize, bytes: u64) {
        if let Some(load) = self.loads.get(core) {
            load.store(bytes, Ordering::Relaxed);
        }
    }

    /// A unit of so many bytes was taken.
    pub(super) fn taken(&self, bytes: u64) {
        self.untaken.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether a core with so many bytes before it takes a unit more, the largest that is left: when nobody has less,
    /// or when what is left fills all others up to the middle of that unit. (Files of one size end together, and the
    /// first core that is done would take all that remain.)
    pub(super) fn takes(&self, mine: u64, next: u64) -> bool {
        let untaken = self.untaken.load(Ordering::Relaxed);
        if untaken / self.plenty.max(1) >= next {
            return true;
        }
        let level = mine.saturating_add(next / 2);
        let loads = || self.loads.iter().map(|load| load.load(Ordering::Relaxed));
        let missing = loads().fold(0_u64, |sum, load| sum.saturating_add(level.saturating_sub(load)));
        missing <= untaken || loads().all(|load| load >= mine)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::{Condvar, Mutex};
    use std::time::Duration;

    use super::super::cores::Cores;
    use super::super::digest::Digest;
    use super::super::place::{Place, Root};
    use super::super::schedule::{self, OnFailure, Watch};
    use super::super::streams::{Streams, Unit};
    use super::*;

    /// What each core takes, one after the other, until nobody takes more: units of these sizes, the largest first.
    fn shared(units: &[u64], lanes: usize, loads: &[u64]) -> Vec<Vec<u64>> {
        let share = Share::new(units.iter().sum(), loads.len(), lanes);
        let mut taken: Vec<Vec<u64>> = vec![Vec::new(); loads.len()];
        let mine = |core: usize, taken: &[u64]| loads[core] + taken.iter().sum::<u64>();
        (0..loads.len()).for_each(|core| share.holds(core, mine(core, &[])));
        let mut units = units.iter();
        let mut asked = 0;
        while let Some(next) = units.as_slice().first() {
            // Each takes as long as it may; and again, when all others had their turn.
            let core = asked / 64 % loads.len();
            let has = mine(core, &taken[core]);
            if taken[core].len() < lanes && (has == 0 || share.takes(has, *next)) {
                taken[core].push(*next);
                share.taken(*next);
                share.holds(core, has + next);
                units.next();
            }
            asked += 1;
            assert!(asked < 64 * 64 * loads.len(), "nobody takes {next}: {taken:?}");
        }
        taken
    }

    fn counts(units: usize, lanes: usize, loads: &[u64]) -> Vec<usize> {
        shared(&vec![1000; units], lanes, loads).iter().map(Vec::len).collect()
    }

    #[test]
    fn what_remains_is_shared() {
        // Thirty-two of one size, when all others are nearly done: nobody takes sixteen of them.
        assert_eq!(counts(32, 16, &[0, 1, 1, 1, 1, 1, 1, 1]), [4; 8]);
        assert_eq!(counts(8, 16, &[0, 1]), [4, 4]);
        assert_eq!(counts(16, 16, &[0, 0]), [8, 8]);
        assert_eq!(counts(5, 4, &[0, 0]), [3, 2]);
        // What is no whole share for anybody is not left until somebody has nothing else.
        assert_eq!(counts(10, 4, &[0; 8]).iter().max(), Some(&2));
        // A core with a long way to go is left out.
        let loads = [50_000, 0, 0, 0, 0, 0, 0, 0];
        let mut shared = counts(16, 16, &loads);
        shared.sort_unstable();
        assert_eq!(shared, [0, 2, 2, 2, 2, 2, 3, 3]);
    }

    /// Two cores that end their units together.
    #[derive(Default)]
    struct Lockstep {
        ended: Mutex<usize>,
        changed: Condvar,
        side_by_side: Mutex<Vec<usize>>,
    }

    impl Streams for Lockstep {
        type State = ();
        const BLOCK: usize = 64;

        fn lanes(&self) -> usize {
            3
        }

        fn start(&self, _: &Unit) {}

        fn update(&self, states: &mut [&mut ()], _: &[&[u8]]) {
            self.side_by_side.lock().expect("unpoisoned").push(states.len());
        }

        fn finish(&self, (): (), _: &[u8], _: &Unit) -> Digest {
            let mut ended = self.ended.lock().expect("unpoisoned");
            *ended += 1;
            let both = ended.next_multiple_of(2);
            self.changed.notify_all();
            let limit = Duration::from_secs(10);
            let waited = self.changed.wait_timeout_while(ended, limit, |ended| *ended < both);
            assert!(!waited.expect("unpoisoned").1.timed_out(), "the other core has nothing to do");
            Digest::NONE
        }
    }

    #[test]
    fn cores_that_end_together_share_the_last_units() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("file"), [0; 32_007]).expect("written");
        let root = Root::open(directory.path()).expect("a directory");
        let place = Place { root: &root, path: "file".as_ref() };
        let stamp = place.look().expect("looked at");
        let units: Vec<_> = (0..8).map(|piece| Unit::whole(piece, 0..stamp.size)).collect();
        let (lockstep, cores) = (Lockstep::default(), Cores::new(NonZeroUsize::new(2)).expect("threads"));
        let input = |_: &Unit| (place, stamp);
        let watch = Watch { hashed: &AtomicU64::new(0), kept: None };
        schedule::run(&lockstep, &units, input, OnFailure::Stop, &cores, watch);
        let mut side_by_side = lockstep.side_by_side.into_inner().expect("unpoisoned");
        side_by_side.sort_unstable();
        assert_eq!(side_by_side, [1, 1, 3, 3]);
    }

    #[test]
    fn big_ones_are_shared_before_small_ones() {
        let units = [vec![1000; 4], vec![1; 60]].concat();
        let big = |taken: &Vec<u64>| taken.iter().filter(|unit| **unit == 1000).count();
        let shared = shared(&units, 64, &[0, 0]);
        assert_eq!(shared.iter().map(big).collect::<Vec<_>>(), [2, 2], "{shared:?}");
    }

    #[test]
    fn sparse_files_claim_more_than_there_can_be() {
        let share = Share::new(u64::MAX, 3, 16);
        share.holds(0, u64::MAX);
        assert!(share.takes(u64::MAX, u64::MAX), "more than all is left");
    }
}
