//! A token that an operator locked: nobody signs with it, by this agent or the next, until an operator unlocks it.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::TokenError;
use super::command::Outcome;
use super::kept::Kept;
use crate::audit;

/// Whether one did.
pub(super) struct Lock {
    file: Kept,
    why: Mutex<Option<String>>,
    /// Whoever did, and what they are told once the device is closed.
    asked: Mutex<Vec<(Outcome, Result<(), TokenError>)>>,
}

impl Lock {
    /// Of the token of this name, in an audit log's directory.
    pub(super) fn of(name: &str, directory: &Path) -> Self {
        Self {
            file: Kept::new(directory, format!("locked-{name}")),
            why: Mutex::default(),
            asked: Mutex::default(),
        }
    }

    /// Why the token is not opened, if it is locked.
    pub(super) fn why(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, why: Option<String>) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Learns what an operator told an agent before this one. What cannot be read does not let it be opened.
    pub(super) async fn recall(&self) {
        let file = self.file.clone();
        let left = off_thread(move || file.read()).await;
        let unknown = |error| {
            Some(format!(
                "whether an operator locked it cannot be told: {}: {error}",
                self.file.path().display()
            ))
        };
        self.set(left.unwrap_or_else(unknown));
    }

    /// Locks it; `asks` is answered when the device is closed, too.
    pub(super) async fn close(&self, asks: Outcome) {
        let why = format!("an operator locked it at {}", audit::now());
        self.set(Some(why.clone()));
        let file = self.file.clone();
        let kept = off_thread(move || file.write(why.as_bytes())).await;
        let kept = kept.map_err(|error| {
            let place = self.file.path();
            let lost = "it is locked, but an agent that is started again would open it";
            TokenError::Unavailable(format!("{lost}: {}: {error}", place.display()))
        });
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push((asks, kept));
    }

    /// The device is closed.
    pub(super) fn answer(&self) {
        for (asks, kept) in self.asked.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // An operator who hung up no longer waits for it.
            let _ = asks.send(kept);
        }
    }

    /// Ends it.
    pub(super) async fn lift(&self) {
        if self.why().is_none() {
            return;
        }
        self.set(None);
        let file = self.file.clone();
        if let Err(error) = off_thread(move || file.remove()).await {
            let place = self.file.path();
            tracing::error!(%error, place = %place.display(), "an agent that is started again finds the token locked");
        }
    }
}

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
