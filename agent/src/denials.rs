//! How often somebody who is turned away is recorded and logged: whoever asks on and on fills neither the disk nor the log.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::identity::{Caller, Identity};

/// So many are recorded each; and then one more for each pause, with the number of those before it.
const EACH: u32 = 100;
const PAUSE: Duration = Duration::from_secs(1);

/// With more of them known, those that have had their pause, and of whom nothing is to be recorded, are forgotten.
const KNOWN: usize = 1024;

/// Who was turned away lately.
#[derive(Default)]
pub(crate) struct Denials(Mutex<HashMap<Refused, Recorded>>);

/// Who, of what, and why: which rule is missing, or that there is no such key.
type Refused = (Caller, &'static str, String);

struct Recorded {
    left: u32,
    since: Instant,
    unrecorded: u64,
    /// Who it was, last time that it was not recorded.
    last: Option<Identity>,
}

/// Refusals that were not recorded: who, of what, why, and how many.
pub(crate) type Rest = (Identity, &'static str, String, u64);

impl Denials {
    /// Whether this one is recorded: then how many before it were not.
    pub(crate) fn admit(&self, caller: Caller, action: &'static str, why: &str) -> Option<u64> {
        self.admit_at((caller, action, why.to_owned()), Instant::now())
    }

    /// What was not recorded so far, and is now.
    pub(crate) fn rest(&self) -> Vec<Rest> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = all.iter_mut().filter(|(_, it)| it.unrecorded > 0).filter_map(|((_, action, why), it)| {
            Some((it.last.take()?, *action, why.clone(), std::mem::take(&mut it.unrecorded)))
        });
        rest.collect()
    }

    /// Remembers who it was that was not recorded, and that so many more could not be recorded after all.
    pub(crate) fn unrecorded(&self, identity: &Identity, action: &'static str, why: &str, count: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(it) = all.get_mut(&(identity.caller(), action, why.to_owned())) {
            it.unrecorded += count;
            it.last = Some(identity.clone());
        }
    }

    fn admit_at(&self, refused: Refused, now: Instant) -> Option<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() > KNOWN {
            let waits = |it: &Recorded| it.unrecorded > 0 && it.last.is_some();
            all.retain(|_, it| waits(it) || now.duration_since(it.since) < PAUSE * EACH);
        }
        let begin = Recorded { left: EACH, since: now, unrecorded: 0, last: None };
        let Recorded { left, since, unrecorded, .. } = all.entry(refused).or_insert(begin);
        let pauses = now.duration_since(*since).as_secs() / PAUSE.as_secs();
        *since += PAUSE * u32::try_from(pauses).unwrap_or(u32::MAX);
        *left = EACH.min(left.saturating_add(u32::try_from(pauses).unwrap_or(EACH)));
        if *left == 0 {
            *unrecorded += 1;
            return None;
        }
        *left -= 1;
        Some(std::mem::take(unrecorded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ones_and_then_one_a_second() {
        let (denials, now) = (Denials::default(), Instant::now());
        let admit = |caller, after| {
            denials.admit_at(
                (Caller::Uid(caller), "look", "no such key".into()),
                now + Duration::from_millis(after),
            )
        };
        for _ in 0..EACH {
            assert_eq!(admit(1, 0), Some(0));
        }
        assert_eq!((admit(1, 0), admit(1, 999), admit(2, 999)), (None, None, Some(0)));
        assert_eq!((admit(1, 1000), admit(1, 1001), admit(1, 2001)), (Some(2), None, Some(1)));
        // Of whom all was recorded in the end, nothing is kept for ever.
        let known =
            |uid| denials.0.lock().expect("no panic").keys().any(|(caller, ..)| *caller == Caller::Uid(uid));
        let one = Identity::Unix { uid: 1, user: None, groups: Vec::new(), pid: None };
        denials.unrecorded(&one, "look", "no such key", 0);
        assert_eq!((admit(1, 3001), admit(1, 3002)), (Some(0), None));
        denials.unrecorded(&one, "look", "no such key", 0);
        let others = 10_000..10_001 + u32::try_from(KNOWN).expect("few");
        assert!(others.into_iter().all(|uid| admit(uid, 500_000) == Some(0)));
        assert!(known(1) && denials.rest().len() == 1);
        assert_eq!(admit(2, 500_001), Some(0));
        assert!(!known(1));
        // Whoever waits is one like others again.
        assert_eq!((0..2 * EACH).filter(|_| admit(1, 1_000_000).is_some()).count(), EACH as usize);
    }
}
