//! How many connections there may be: of all callers together, and of each.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::denials::Denials;
use crate::identity::Caller;

/// How many connections each socket may have open at once.
const CONNECTIONS: usize = 1024;

/// How many of these one caller may have: nobody keeps the others out.
const CONNECTIONS_OF_ONE: usize = 256;

/// The places of one socket, and how many of them each caller has.
pub(crate) struct Places {
    pub(crate) all: Arc<Semaphore>,
    of_each: Mutex<HashMap<Caller, OfOne>>,
    /// Who was turned away.
    denials: Denials,
}

#[derive(Default)]
struct OfOne {
    count: usize,
    turn: Turn,
}

/// Held by one connection of a caller at a time.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// A place, given back when dropped.
pub(crate) struct Place {
    _one: OwnedSemaphorePermit,
    caller: Caller,
    places: Arc<Places>,
    turn: Turn,
}

impl Places {
    /// All of them free.
    pub(crate) fn new() -> Arc<Self> {
        let all = Arc::new(Semaphore::new(CONNECTIONS));
        Arc::new(Self { all, of_each: Mutex::default(), denials: Denials::default() })
    }

    /// Logs that somebody did not prove who they are; of very many times only some.
    pub(crate) fn refused_handshake(&self, address: SocketAddr, error: &str) {
        // Of IPv6 one has as many addresses as fit in a /64.
        let network = match address.ip() {
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
            ip => ip,
        };
        if let Some(unlogged) = self.denials.admit(Caller::Address(network), "connect", "") {
            tracing::warn!(%address, error, unlogged, "TLS handshake refused");
        }
    }

    fn of_each(&self) -> MutexGuard<'_, HashMap<Caller, OfOne>> {
        self.of_each.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The place of a caller who is known now. None: this caller has enough.
    pub(crate) fn of(caller: Caller, one: OwnedSemaphorePermit, places: &Arc<Places>) -> Option<Self> {
        let mut of_each = places.of_each();
        let of_one = of_each.entry(caller.clone()).or_default();
        if of_one.count >= CONNECTIONS_OF_ONE {
            drop(of_each);
            if let Some(unlogged) = places.denials.admit(caller.clone(), "connect", "") {
                tracing::warn!(%caller, unlogged, "has {CONNECTIONS_OF_ONE} connections already; this one is closed");
            }
            return None;
        }
        of_one.count += 1;
        let turn = Arc::clone(&of_one.turn);
        drop(of_each);
        Some(Self { _one: one, caller, places: Arc::clone(places), turn })
    }

    /// For what one caller's connections do one after the other, so that it does not keep others from it.
    pub(crate) fn turn(&self) -> Turn {
        Arc::clone(&self.turn)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_each = self.places.of_each();
        if let Some(OfOne { count, .. }) = of_each.get_mut(&self.caller) {
            *count -= 1;
            // One who is still being looked up is not looked up beside that.
            if *count == 0 && self.turn.try_lock().is_ok() {
                of_each.remove(&self.caller);
            }
        }
    }
}
