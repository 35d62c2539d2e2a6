//! The line to a token's process: what is with it, who waits for that, and whether it hangs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::Place;
use super::touch::TouchCommand;
use crate::config;
use crate::host::wire::{Answer, Asked, Failure, Opened, Request};
use crate::replay::{Step, Tell};

/// Requests a session may have before it: enough that it never waits for the next one.
const AHEAD: usize = 4;

/// How long a device waits for a finger; YubiKeys take 15 s.
const TOUCH: Duration = Duration::from_secs(16);

/// How long a device may take to make a key: YubiKeys and TPMs need minutes for some RSA keys.
const TASK: Duration = Duration::from_secs(300);

type Outcome = Result<Vec<u8>, Failure>;

/// The line to a token's process.
pub(super) struct Host {
    pub(super) opened: Opened,
    /// Requests that may be with the process at once. Closed when the process is being replaced.
    pub(super) window: Arc<Semaphore>,
    requests: mpsc::UnboundedSender<Request>,
    pending: Mutex<Pending>,
    touch_command: TouchCommand,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Pending {
    waiting: HashMap<u64, Waiting>,
    last_answer: Option<Instant>,
    /// When a request ended that the device was busy with.
    free_since: Option<Instant>,
    /// Why the process ended. Nothing is sent after that.
    ended: Option<String>,
}

/// A request that is with the process, whether or not its caller still waits.
struct Waiting {
    done: oneshot::Sender<Result<Outcome, String>>,
    tell: Tell,
    sent: Instant,
    /// It takes its time: somebody has to touch the device, or an operator's task.
    busy_until: Option<Instant>,
    /// Its place in the window and in the queue, held until it is answered: otherwise callers in a hurry could
    /// pile up work without bound.
    _held: Held,
}

/// What a request holds while it is with the process.
pub(super) struct Held {
    pub(super) _turn: OwnedSemaphorePermit,
    pub(super) _place: Place,
}

impl Pending {
    /// The device is busy with this request, for this long at most; everybody else waits behind it.
    fn allow(&mut self, id: u64, busy: Duration) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.busy_until = Some(Instant::now() + busy);
        }
    }

    fn take(&mut self, id: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        if waiting.busy_until.is_some() {
            self.free_since = Some(Instant::now());
        }
        Some(waiting)
    }
}

impl Host {
    /// The line to a process that has opened its device, and the end of it that the process is fed from.
    pub(super) fn new(opened: Opened, token: &config::Token) -> (Self, mpsc::UnboundedReceiver<Request>) {
        let (requests, inbox) = mpsc::unbounded_channel();
        let host = Self {
            window: Arc::new(Semaphore::new(opened.sessions * AHEAD)),
            opened,
            requests,
            pending: Mutex::default(),
            touch_command: TouchCommand::of(token),
            next_id: AtomicU64::new(0),
        };
        (host, inbox)
    }

    /// Has the process do it. The outer error says why the process was replaced before it answered.
    pub(super) async fn ask(&self, asked: Asked, tell: &Tell, held: Held) -> Result<Outcome, String> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (done, outcome) = oneshot::channel();
        {
            let mut pending = self.pending();
            if let Some(reason) = &pending.ended {
                return Err(reason.clone());
            }
            let (tell, sent) = (tell.clone(), Instant::now());
            pending.waiting.insert(id, Waiting { done, tell, sent, busy_until: None, _held: held });
        }
        // The window bounds how many there can be.
        let _ = self.requests.send(Request::new(id, asked));
        outcome.await.unwrap_or_else(|_| Err("its process ended".into()))
    }

    /// Frees everybody who waits for this process.
    pub(super) fn fail_pending(&self, reason: &str) {
        let waiting = {
            let mut pending = self.pending();
            pending.ended = Some(reason.to_owned());
            std::mem::take(&mut pending.waiting)
        };
        for waiting in waiting.into_values() {
            let _ = waiting.done.send(Err(reason.to_owned()));
        }
        self.window.close();
    }

    /// Whether somebody still waits for a request; otherwise it is forgotten.
    pub(super) fn is_wanted(&self, id: u64) -> bool {
        let mut pending = self.pending();
        let wanted = pending.waiting.get(&id).is_some_and(|waiting| !waiting.done.is_closed());
        if !wanted {
            pending.take(id);
        }
        wanted
    }

    /// Whether no request is with it.
    pub(super) fn is_idle(&self) -> bool {
        self.pending().waiting.is_empty()
    }

    /// Whether it was of any use.
    pub(super) fn has_answered(&self) -> bool {
        self.pending().last_answer.is_some()
    }

    pub(super) fn answered(&self, answer: Answer) {
        let mut pending = self.pending();
        pending.last_answer = Some(Instant::now());
        if answer.begun {
            pending.allow(answer.id, TASK);
            return;
        }
        if !answer.touch.is_empty() {
            // A person gets the time that the device gives them, before anybody calls it a hang.
            pending.allow(answer.id, TOUCH);
            if let Some(waiting) = pending.waiting.get_mut(&answer.id) {
                let over = waiting.done.is_closed();
                waiting.tell.send_if_modified(|step| {
                    let tells = !over && !matches!(step, Step::Done(_));
                    if tells {
                        *step = Step::Touch(answer.touch.clone());
                    }
                    tells
                });
            }
            self.touch_command.run(answer.touch);
            return;
        }
        let waiting = pending.take(answer.id);
        drop(pending);
        if let Some(waiting) = waiting {
            // The caller may have given up at its deadline.
            let _ = waiting.done.send(Ok(answer.outcome()));
        }
    }

    /// Whether an operation takes longer than `limit`. Requests are taken in order and each session has at
    /// most [`AHEAD`] of them, so a request that is older than that many operations is stuck, and so is
    /// everything when nothing at all was answered for one.
    pub(super) fn hangs(&self, limit: Duration) -> bool {
        let pending = self.pending();
        let now = Instant::now();
        let busy = |waiting: &Waiting| waiting.busy_until.is_some_and(|until| until > now);
        // With one session, everybody waits behind it; with more, the others go on.
        if self.opened.sessions == 1 && pending.waiting.values().any(busy) {
            return false;
        }
        let sent = pending.waiting.values().filter(|waiting| !busy(waiting)).map(|waiting| waiting.sent);
        let Some(oldest) = sent.map(|sent| pending.free_since.map_or(sent, |free| free.max(sent))).min()
        else {
            return false;
        };
        let ahead = u32::try_from(AHEAD).unwrap_or(u32::MAX);
        let quiet_since = pending.last_answer.map_or(oldest, |last| last.max(oldest));
        quiet_since.elapsed() > limit || oldest.elapsed() > limit.saturating_mul(ahead)
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
