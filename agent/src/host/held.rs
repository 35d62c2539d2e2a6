//! How many answers are held back to be given together, and for how long.

use std::time::{Duration, Instant};

/// Answers are given together while more requests for the same key wait here than answers are held back, until the next
/// would come later than this: each time the agent is woken, which costs as much as a quick signature.
pub(super) const TOGETHER: Duration = Duration::from_millis(2);

/// How many answers may be held back for that.
const TOGETHER_COUNT: usize = 8;

/// What is held back.
#[derive(Default)]
pub(super) struct Held {
    pub(super) count: usize,
    since: Option<Instant>,
    /// All of it was made with this one.
    pub(super) key: Option<usize>,
}

impl Held {
    /// Whether one more answer may wait for the next, with so many requests here, if that takes as long.
    pub(super) fn may_wait(
        &mut self,
        key: Option<usize>,
        took: Duration,
        waiting: usize,
        now: Instant,
    ) -> bool {
        let since = *self.since.get_or_insert(now);
        (self.count, self.key) = (self.count + 1, key);
        let waits = key.is_some()
            && self.count < waiting.min(TOGETHER_COUNT)
            && now.duration_since(since) + took < TOGETHER;
        if !waits {
            *self = Self::default();
        }
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_wait_only_for_what_is_here_and_as_quick() {
        let (mut held, quick, now) = (Held::default(), Duration::from_micros(100), Instant::now());
        assert!(held.may_wait(Some(3), quick, 2, now), "two more are here");
        assert!(!held.may_wait(Some(3), quick, 1, now), "the last one answers for both");
        assert!(!held.may_wait(Some(3), quick, 0, now) && held.count == 0);
        assert!(!held.may_wait(None, quick, 8, now), "an operator's task");
        assert!(held.may_wait(Some(3), quick, 8, now) && held.key == Some(3));
        assert!(!held.may_wait(Some(3), TOGETHER, 8, now), "the next would come too late");
        for _ in 1..TOGETHER_COUNT {
            assert!(held.may_wait(Some(3), Duration::ZERO, 64, now));
        }
        assert!(!held.may_wait(Some(3), Duration::ZERO, 64, now), "enough");
    }
}
