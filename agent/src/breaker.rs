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
    pause: Duration,
    until: Instant,
}

/// Whom a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Everybody.
    Closed,
    /// Whoever got this answer: all others wait for what comes of it.
    Trial,
    /// Those who have nobody else.
    Open,
}

impl Breaker {
    pub(crate) fn ask(&self, now: Instant) -> Verdict {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Verdict::Closed,
            Some(open) if open.until <= now => {
                open.until = now + open.pause;
                Verdict::Trial
            }
            Some(_) => Verdict::Open,
        }
    }

    pub(crate) fn failed(&self, now: Instant) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = open.map_or(PAUSES.0, |open| (open.pause * 2).min(PAUSES.1));
        *open = Some(Open { pause, until: now + pause });
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
        let second = Duration::from_secs(1);
        assert_eq!(breaker.ask(start), Verdict::Closed);
        breaker.failed(start);
        assert_eq!(breaker.ask(start + second / 2), Verdict::Open);
        assert_eq!(breaker.ask(start + second), Verdict::Trial);
        assert_eq!(breaker.ask(start + second), Verdict::Open);
        breaker.failed(start + second);
        assert_eq!(breaker.ask(start + 2 * second), Verdict::Open);
        assert_eq!(breaker.ask(start + 3 * second), Verdict::Trial);
        breaker.worked();
        assert_eq!(breaker.ask(start + 3 * second), Verdict::Closed);
        for _ in 0..20 {
            breaker.failed(start);
        }
        assert_eq!(breaker.ask(start + PAUSES.1), Verdict::Trial);
    }
}
