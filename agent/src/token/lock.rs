//! A token that an operator locked: nothing is signed with it, whatever the configuration makes of its name, by this agent
//! or one that is started again with the same log, until an unlock has opened it.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::TokenError;
use super::kept::Kept;
use crate::audit;

/// Whether one did. Of one name there is one, which those who take each other's place share.
pub(super) struct Lock {
    file: Kept,
    closed: Mutex<Option<Closed>>,
    /// Of those who lock and unlock it, each is done with the file before the next one.
    turn: tokio::sync::Mutex<()>,
}

struct Closed {
    why: String,
    /// An unlock that was asked for before does not end it.
    since: Instant,
    /// Somebody has tried to unlock it since.
    told: bool,
}

impl Closed {
    fn now(why: String) -> Self {
        Self { why, since: Instant::now(), told: false }
    }
}

impl Lock {
    /// Of the token of this name, in an audit log's directory. What was left there by an agent before this one counts from
    /// the start; what cannot be read does not let it be opened.
    pub(super) fn of(name: &str, directory: &Path) -> Self {
        let file = Kept::new(directory, format!("locked-{name}.json"));
        let why = match file.read() {
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
        Self { file, closed: Mutex::new(why.map(Closed::now)), turn: tokio::sync::Mutex::default() }
    }

    fn closed(&self) -> MutexGuard<'_, Option<Closed>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the token is not opened, if it is locked.
    pub(super) fn why(&self) -> Option<String> {
        self.closed().as_ref().map(|closed| closed.why.clone())
    }

    /// Whether it was locked already when somebody asked for something.
    pub(super) fn was_closed_at(&self, asked: Instant) -> bool {
        self.closed().as_ref().is_some_and(|closed| closed.since <= asked)
    }

    /// Whether somebody has tried to unlock it before, and knows of its PIN. They have now.
    pub(super) fn tells(&self) -> bool {
        self.closed().as_mut().is_some_and(|closed| std::mem::replace(&mut closed.told, true))
    }

    /// Locks it: when.
    pub(super) fn close(&self) -> String {
        let now = audit::now();
        *self.closed() = Some(Closed::now(since(&now)));
        now
    }

    /// Has it locked for the next agent, too.
    pub(super) async fn keep(&self, now: String) -> Result<(), TokenError> {
        let _turn = self.turn.lock().await;
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
        if self.closed().take_if(|closed| closed.since <= asked).is_none() {
            return Ok(());
        }
        let file = self.file.clone();
        off_thread(move || file.remove()).await.map_err(|error| {
            let place = self.file.path();
            let left = "it is unlocked, but an agent that is started again finds it locked; remove";
            TokenError::Unavailable(format!("{left} {}: {error}", place.display()))
        })
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
