//! Whether a token is asked that is up, and fails or hangs all the same: not for a while, then once, and again when that
//! went well (a circuit breaker). Where a key has no other token, nobody asks this.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long it is left alone: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What became of the last requests.
#[derive(Default)]
pub(crate) struct Breaker(Mutex<Option<Open>>);

#[derive(Clone, Copy)]
struct Open {
    since: Instant,
    pause: Duration,
    until: Instant,
}

impl Breaker {
    pub(crate) fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether its pause is over, for one who tries it: all others wait for what comes of that.
    pub(crate) fn try_it(&self, now: Instant) -> bool {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(open) if open.until <= now => {
                open.until = now + open.pause;
                true
            }
            _ => false,
        }
    }

    /// A request failed that began at this time. Those that were under way when the first one did tell nothing new.
    pub(crate) fn failed(&self, began: Instant, now: Instant) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = match *open {
            Some(open) if began < open.since => return,
            Some(open) => (open.pause * 2).min(PAUSES.1),
            None => PAUSES.0,
        };
        *open = Some(Open { since: now, pause, until: now + pause });
    }

    pub(crate) fn worked(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_less_and_less_often() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!breaker.is_open() && !breaker.try_it(start));
        // Ten that were with it when it failed are one failure.
        (0..10).for_each(|_| breaker.failed(start, after(1)));
        assert!(breaker.is_open() && !breaker.try_it(after(1)));
        assert!(breaker.try_it(after(2)) && !breaker.try_it(after(2)));
        breaker.failed(after(2), after(2));
        assert!(!breaker.try_it(after(3)) && breaker.try_it(after(4)));
        breaker.worked();
        assert!(!breaker.is_open());
        for failure in 10..40 {
            breaker.failed(after(failure), after(failure));
        }
        assert!(!breaker.try_it(after(39) + PAUSES.1 / 2) && breaker.try_it(after(39) + PAUSES.1));
    }
}
