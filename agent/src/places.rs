//! How many connections there may be: of all callers together, and of each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::{Caller, Identity};

/// How many connections each socket may have open at once.
const CONNECTIONS: usize = 1024;

/// How many of these one caller may have: nobody keeps the others out.
const CONNECTIONS_OF_ONE: usize = 256;

/// How many each caller has.
type Taken = Arc<Mutex<HashMap<Caller, usize>>>;

/// The places of one socket.
pub(crate) struct Places {
    pub(crate) all: Arc<Semaphore>,
    pub(crate) taken: Taken,
}

/// A place, given back when dropped.
pub(crate) struct Place {
    _one: OwnedSemaphorePermit,
    caller: Caller,
    taken: Taken,
}

impl Places {
    /// All of them free.
    pub(crate) fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(CONNECTIONS)), taken: Arc::default() }
    }
}

impl Place {
    /// The place of a caller who is known now. None: this caller has enough.
    pub(crate) fn of(identity: &Identity, one: OwnedSemaphorePermit, taken: &Taken) -> Option<Self> {
        let caller = identity.caller();
        let mut of_each = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = of_each.entry(caller.clone()).or_default();
        if *count >= CONNECTIONS_OF_ONE {
            tracing::warn!(caller = %identity, "has {CONNECTIONS_OF_ONE} connections already; this one is closed");
            return None;
        }
        *count += 1;
        drop(of_each);
        Some(Self { _one: one, caller, taken: Arc::clone(taken) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_each = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = of_each.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                of_each.remove(&self.caller);
            }
        }
    }
}
