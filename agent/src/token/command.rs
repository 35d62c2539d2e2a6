//! What the supervisor of a token can be told.

use std::sync::Weak;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::TokenError;
use crate::host::wire::Fresh;
use crate::secret::Pin;

/// Where the outcome goes.
pub(super) type Outcome = oneshot::Sender<Result<(), TokenError>>;

/// A login that somebody asks for.
pub(super) struct Login {
    /// None: with the configured source read anew.
    pub(super) pin: Option<Pin>,
    pub(super) done: Outcome,
    /// Whether it is to end an operator's lock, too.
    pub(super) lifts: bool,
    /// Gone when nobody waits for it any more.
    pub(super) waits: Weak<()>,
    pub(super) asked: Instant,
}

impl Login {
    /// The same, if anybody still waits for it: no PIN try is spent for nobody.
    pub(super) fn wanted(self) -> Option<Self> {
        if self.waits.strong_count() > 0 && !self.done.is_closed() {
            return Some(self);
        }
        let _ = self.done.send(Err(TokenError::Unavailable("it was given up; no PIN was offered".into())));
        None
    }
}

/// What the supervisor can be told.
pub(super) enum Command {
    Unlock(Login),
    /// Its PIN is to be set anew.
    Unblock(Fresh, Outcome),
    /// It is to be closed, and to stay so.
    Lock(Outcome),
    /// Keys were made, or one that it has was deleted. Whether they will be looked for.
    LookAgain {
        deleted: bool,
        looks: oneshot::Sender<bool>,
    },
    Stop(oneshot::Sender<()>),
}
