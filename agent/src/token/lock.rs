//! A device that an operator locked: nothing is signed with it, by this agent or one that is started again with the same log,
//! until an operator unlocks it.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::TokenError;
use super::command::Outcome;
use super::kept::Kept;
use crate::audit;
use crate::config;

/// Whether one did.
pub(super) struct Lock {
    file: Kept,
    state: Mutex<State>,
    /// Of those who lock and unlock it, each is done with the file before the next one.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Why it is not opened, and since when it is not to be.
    closed: Option<(String, Instant)>,
    /// Who waits until the device is closed, too.
    asked: Vec<Outcome>,
}

impl Lock {
    /// Of a token's device, in an audit log's directory. What was left there by an agent before this one counts from the
    /// start; what cannot be read does not let it be opened.
    pub(super) fn of(token: &config::Token, directory: &Path) -> Self {
        let file = Kept::of_device(token, directory, "locked", "");
        let closed = match file.read() {
            Ok(None) => None,
            // Nothing else of it is repeated.
            Ok(Some(text)) => Some(match serde_json::from_str::<String>(&text) {
                Ok(time) if humantime::parse_rfc3339(&time).is_ok() => since(&time),
                _ => "an operator locked it".to_owned(),
            }),
            Err(error) => Some(format!(
                "whether an operator locked it cannot be told: {}: {error}",
                file.path().display()
            )),
        };
        let closed = closed.map(|why| (why, Instant::now()));
        Self {
            file,
            state: Mutex::new(State { closed, asked: Vec::new() }),
            turn: tokio::sync::Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the token is not opened, if it is locked.
    pub(super) fn why(&self) -> Option<String> {
        self.state().closed.as_ref().map(|(why, _)| why.clone())
    }

    /// Whether it was locked already when somebody asked for something.
    pub(super) fn was_closed_at(&self, asked: Instant) -> bool {
        self.state().closed.as_ref().is_some_and(|(_, since)| *since <= asked)
    }

    /// Locks it, from now on. The error: not for the next agent.
    pub(super) async fn close(&self) -> Result<(), TokenError> {
        let _turn = self.turn.lock().await;
        let now = audit::now();
        self.state().closed = Some((since(&now), Instant::now()));
        self.keep(now).await
    }

    /// Goes on with a lock of a token whose place this one's takes.
    pub(super) fn inherit(&self, other: &Self) {
        if let Some(closed) = other.state().closed.clone() {
            self.state().closed.get_or_insert(closed);
        }
    }

    /// Has it kept for the next agent what is so in this one.
    pub(super) async fn keep_on(&self) {
        let _turn = self.turn.lock().await;
        if self.why().is_some()
            && let Err(error) = self.keep(audit::now()).await
        {
            tracing::error!(%error, "an operator's lock cannot be kept");
        }
    }

    async fn keep(&self, now: String) -> Result<(), TokenError> {
        let file = self.file.clone();
        let kept = off_thread(move || file.write(&serde_json::to_vec(&now)?)).await;
        kept.map_err(|error| {
            let place = self.file.path();
            let lost = "it is locked, but an agent that is started again would open it";
            TokenError::Unavailable(format!("{lost}: {}: {error}", place.display()))
        })
    }

    /// Ends what was locked before somebody asked for that. The error: not for the next agent.
    pub(super) async fn lift(&self, asked: Instant) -> Result<(), TokenError> {
        let _turn = self.turn.lock().await;
        if !self.was_closed_at(asked) {
            return Ok(());
        }
        self.state().closed = None;
        let file = self.file.clone();
        off_thread(move || file.remove()).await.map_err(|error| {
            let place = self.file.path();
            let left = "it is unlocked, but an agent that is started again finds it locked; remove";
            TokenError::Unavailable(format!("{left} {}: {error}", place.display()))
        })
    }

    /// Whether it is locked: `asks` is answered once its device is closed. If it was unlocked since, at once.
    pub(super) fn waits(&self, asks: Outcome) -> bool {
        let mut state = self.state();
        let closed = state.closed.is_some();
        match closed {
            true => state.asked.push(asks),
            false => drop(asks.send(Ok(()))),
        }
        closed
    }

    /// The device is closed.
    pub(super) fn answer(&self) {
        for asks in self.state().asked.drain(..) {
            // An operator who hung up no longer waits for it.
            let _ = asks.send(Ok(()));
        }
    }
}

fn since(time: &str) -> String {
    format!("an operator locked it at {time}")
}

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
