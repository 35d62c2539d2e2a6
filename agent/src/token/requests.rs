//! What is asked of a token: it waits its turn, for the process that is there by then, until its deadline.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::line::{Held, Host, Place};
use super::state::State;
use super::{Signed, Token, TokenError};
use crate::algorithm::Content;
use crate::host::task::{Done, Need, Task};
use crate::host::wire::{Asked, Class, Failure};
use crate::identity::Caller;
use crate::public_key::PublicKey;
use crate::replay::{Step, Tell};

/// How long a request waits before it asks a device again that is busy: at first, and at most.
const BUSY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

impl Token {
    /// Signs with the key of this index. Waits while the token starts or has others before it, until the deadline, and,
    /// when it is `the_last` that could, while it says that it is busy. `tell` learns when the device waits for a touch.
    pub(crate) async fn sign(
        &self,
        key: usize,
        (content, caller): (&Content, &Caller),
        tell: &Tell,
        deadline: Instant,
        the_last: bool,
    ) -> Result<Signed, TokenError> {
        let place = Arc::new(self.queue(Some(caller))?);
        let (mut retried, mut pause) = (false, BUSY.0);
        let mut before: Option<Vec<u8>> = None;
        loop {
            let host = self.ready(deadline).await?;
            let (public_key, fit) = match host.opened.keys.get(key) {
                Some(Ok(public @ PublicKey { spki, .. })) => {
                    let fit = public.fit(content).map_err(TokenError::Refused)?;
                    if before.is_some_and(|before| before != spki.0) {
                        let message = "the key was replaced by another meanwhile; look at it again";
                        return Err(TokenError::Unavailable(message.into()));
                    }
                    before = Some(spki.0.clone());
                    (spki.0.clone(), fit)
                }
                Some(Err(reason)) => return Err(TokenError::Refused(reason.clone())),
                None => return Err(TokenError::Refused("no such key".into())),
            };
            host.announce(key, tell);
            let asked = Asked::Sign(key, fit);
            let Some(answer) = self.ask(&host, asked, tell, &place, deadline).await? else { continue };
            let failure = match answer {
                Ok(Ok(signature)) => return Ok(Signed { signature, public_key }),
                Ok(Err(failure)) => failure,
                Err(killed) => return Err(TokenError::Unavailable(killed)),
            };
            if failure.class == Class::Busy && the_last && Instant::now() + pause < deadline {
                // Out of sessions or memory, and nothing was signed: others may be done in a moment.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BUSY.1);
                continue;
            }
            if failure.class != Class::Gone || retried {
                return Err(failure.into());
            }
            // The host said itself that nothing was signed and that it starts over: one more try is safe.
            retried = true;
            self.replaced(&host, deadline).await?;
        }
    }

    /// Does what an operator asks for. But for a look, what was begun is not tried again: nobody knows what a device did
    /// before it failed.
    pub(crate) async fn operate(
        &self,
        task: Task,
        tell: &Tell,
        deadline: Instant,
    ) -> Result<Done, TokenError> {
        let place = Arc::new(self.queue(None)?);
        // One at a time: what waits in the process would be taken for a hang, and keep signatures from their turn.
        let turn = timeout_at(deadline, self.tasks.acquire()).await.map_err(|_| TokenError::Deadline)?;
        let _turn = turn.map_err(|_| TokenError::Unavailable("the agent is stopping".into()))?;
        let mut again = task.only_looks();
        loop {
            let host = self.ready(deadline).await?;
            let asked = Asked::Do(task.clone());
            let Some(answer) = self.ask(&host, asked, tell, &place, deadline).await? else { continue };
            let failure = match answer {
                Ok(Ok(done)) => {
                    return serde_json::from_slice(&done)
                        .map_err(|error| TokenError::Unavailable(error.to_string()));
                }
                Ok(Err(failure)) if failure.class == Class::Busy && again => {
                    // Others may be done in a moment.
                    again = false;
                    tokio::time::sleep(BUSY.0).await;
                    continue;
                }
                Ok(Err(failure)) if failure.class != Class::Gone => return Err(failure.into()),
                Ok(Err(failure)) => failure.into(),
                Err(killed) => TokenError::Unavailable(killed),
            };
            // Its process has ended, or will: the next one tells.
            if !std::mem::take(&mut again) {
                return Err(failure);
            }
            self.replaced(&host, deadline).await?;
        }
    }

    /// Whether a key that could not be used is there by now, of this process, which need not be opened anew to tell.
    pub(super) async fn finds_missing(&self, host: &Arc<Host>) -> bool {
        // What an operator asked for comes first.
        let Ok(_turn) = self.tasks.try_acquire() else { return false };
        let missing = self.keys.iter().zip(&host.opened.keys).filter(|(_, shown)| shown.is_err());
        let (tell, deadline) = (watch::Sender::new(Step::Working), Instant::now() + self.config.timeout);
        for (key, _) in missing {
            let Ok(place) = self.queue(None).map(Arc::new) else { return false };
            let find = Asked::Do(Task::Find(key.clone(), Need::Looked));
            if let Ok(Some(Ok(Ok(_)))) = self.ask(host, find, &tell, &place, deadline).await {
                return true;
            }
        }
        false
    }

    /// Has the process do it once it has room. None: nothing has begun, this process is being replaced; ask the next one.
    async fn ask(
        &self,
        host: &Arc<Host>,
        asked: Asked,
        tell: &Tell,
        place: &Arc<Place>,
        deadline: Instant,
    ) -> Result<Option<Result<Result<Vec<u8>, Failure>, String>>, TokenError> {
        // A closed window means that it is being replaced.
        let turn = timeout_at(deadline, Arc::clone(&host.window).acquire_owned());
        let Ok(turn) = turn.await.map_err(|_| TokenError::Deadline)? else {
            self.replaced(host, deadline).await?;
            return Ok(None);
        };
        // It may have been locked while others were before this one.
        if let Some(why) = self.locked_by_operator() {
            return Err(TokenError::Locked(why));
        }
        let held = Held { turn, _place: Arc::clone(place) };
        let answer = timeout_at(deadline, host.ask(asked, tell, held)).await;
        answer.map(Some).map_err(|_| TokenError::Deadline)
    }

    /// The host, once it is ready.
    async fn ready(&self, deadline: Instant) -> Result<Arc<Host>, TokenError> {
        if let Some(why) = self.locked_by_operator() {
            return Err(TokenError::Locked(why));
        }
        if let State::Ready(host) = &*self.state.borrow() {
            return Ok(Arc::clone(host));
        }
        let mut changes = self.state.subscribe();
        let settled = changes.wait_for(|status| !matches!(status, State::Starting));
        match timeout_at(deadline, settled).await.map_err(|_| TokenError::Deadline)?.as_deref() {
            Ok(State::Ready(host)) => Ok(Arc::clone(host)),
            Ok(State::Locked(reason)) => Err(TokenError::Locked(reason.clone())),
            Ok(State::Down(reason)) => Err(TokenError::Unavailable(reason.clone())),
            // Its sender is ours.
            Ok(State::Starting) | Err(_) => Err(TokenError::Unavailable("it is being replaced".into())),
        }
    }

    /// Waits until this host is no longer the current one.
    async fn replaced(&self, old: &Arc<Host>, deadline: Instant) -> Result<(), TokenError> {
        let mut changes = self.state.subscribe();
        let gone = |status: &State| !matches!(status, State::Ready(host) if Arc::ptr_eq(host, old));
        match timeout_at(deadline, changes.wait_for(gone)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TokenError::Deadline),
        }
    }

    fn queue(&self, caller: Option<&Caller>) -> Result<Place, TokenError> {
        Place::take(&self.waiting, self.config.queue, caller, || self.busy() / 2)
    }
}
