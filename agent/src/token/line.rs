//! The line to a token's process: what is with it, who waits for that, and whether it hangs.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::TokenError;
use super::touch::TouchCommand;
use crate::config;
use crate::host::wire::{Answer, Asked, Class, Failure, Opened, Request, Said};
use crate::identity::Caller;
use crate::replay::{Step, Tell};

/// How much work a session may have before it: more than the event loop takes to come round to it under load, or while
/// the disk is written to, so that it never waits for the next request.
const AHEAD: Duration = Duration::from_millis(10);

/// The same in requests: two, or it would wait, and no more than this. Callers may give up on what is with a
/// process, and a slow device should not work for nobody.
const AHEAD_REQUESTS: RangeInclusive<u128> = 2..=64;

/// How long a device waits for a finger; YubiKeys take 15 s.
const TOUCH: Duration = Duration::from_secs(16);

type Outcome = Result<Vec<u8>, Failure>;

/// The line to a token's process.
pub struct Host {
    pub(super) opened: Opened,
    /// Requests that may be with the process at once. Closed when the process is being replaced.
    pub(super) window: Arc<Semaphore>,
    requests: mpsc::UnboundedSender<Request>,
    pending: Mutex<Pending>,
    touch_command: TouchCommand,
}

#[derive(Default)]
struct Pending {
    next_id: u64,
    /// By id, which is the order in which the process takes them.
    waiting: BTreeMap<u64, Waiting>,
    /// How wide the window is.
    window: usize,
    /// How long the device takes for one.
    took: Duration,
    last_answer: Option<Instant>,
    /// When a request ended that the device was busy with.
    free_since: Option<Instant>,
    /// It has offered the device a PIN, one at a time, which is not taken yet.
    logging_in: bool,
    /// Why the process ended. Nothing is sent after that.
    ended: Option<String>,
}

/// A request that is with the process, whether or not its caller still waits.
struct Waiting {
    done: oneshot::Sender<Result<Outcome, String>>,
    tell: Tell,
    sent: Instant,
    /// It was begun before this: a later request was answered then.
    begun: Option<Instant>,
    /// It takes its time: somebody has to touch the device, or an operator's task.
    busy_until: Option<Instant>,
    /// Its place in the window and in the queue, held until it is answered: otherwise callers in a hurry could
    /// pile up work without bound.
    held: Held,
}

impl Waiting {
    fn is_busy(&self, now: Instant) -> bool {
        self.busy_until.is_some_and(|until| until > now)
    }
}

/// What a request holds while it is with the process.
pub(super) struct Held {
    pub(super) turn: OwnedSemaphorePermit,
    /// Held, not read.
    pub(super) _place: Arc<Place>,
}

/// Who waits for a token: how many of each caller.
#[derive(Default)]
pub(super) struct Queue {
    of_each: Mutex<HashMap<Caller, usize>>,
    all: AtomicUsize,
}

/// A place in it, given back when dropped.
pub(super) struct Place {
    queue: Arc<Queue>,
    /// None: it is the agent's own, or an operator's.
    caller: Option<Caller>,
}

impl Place {
    /// Takes one of so many, of which one caller has no more than half: nobody keeps the others out.
    pub(super) fn take(
        queue: &Arc<Queue>,
        most: usize,
        caller: Option<&Caller>,
        soon: impl FnOnce() -> Duration,
    ) -> Result<Self, TokenError> {
        let own = caller.map(|caller| {
            let mut of_each = queue.of_each();
            let own = of_each.entry(caller.clone()).or_default();
            *own += 1;
            *own
        });
        let all = queue.all.fetch_add(1, Ordering::Relaxed);
        // Dropped where it may not be taken.
        let place = Self { queue: Arc::clone(queue), caller: caller.cloned() };
        match own {
            _ if all >= most => Err(TokenError::Full { waiting: all, whose: "", soon: soon() }),
            Some(own) if own > most.div_ceil(2) => {
                Err(TokenError::Full { waiting: own - 1, whose: " of this caller", soon: soon() })
            }
            _ => Ok(place),
        }
    }
}

impl Queue {
    /// How many there are.
    pub(super) fn all(&self) -> usize {
        self.all.load(Ordering::Relaxed)
    }

    fn of_each(&self) -> MutexGuard<'_, HashMap<Caller, usize>> {
        self.of_each.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.all.fetch_sub(1, Ordering::Relaxed);
        let Some(caller) = self.caller.take() else { return };
        if let Entry::Occupied(mut own) = self.queue.of_each().entry(caller) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
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
        let window = opened.sessions * ahead(AHEAD);
        let host = Self {
            window: Arc::new(Semaphore::new(window)),
            opened,
            requests,
            pending: Mutex::new(Pending { window, took: AHEAD, ..Pending::default() }),
            touch_command: TouchCommand::of(token),
        };
        (host, inbox)
    }

    /// Has the process do it. The outer error says why the process was replaced before it answered.
    pub(super) async fn ask(&self, asked: Asked, tell: &Tell, held: Held) -> Result<Outcome, String> {
        let (done, outcome) = oneshot::channel();
        {
            let mut pending = self.pending();
            if let Some(reason) = &pending.ended {
                return Err(reason.clone());
            }
            let id = pending.next_id;
            pending.next_id += 1;
            let (tell, sent) = (tell.clone(), Instant::now());
            let waiting = Waiting { done, tell, sent, begun: None, busy_until: None, held };
            pending.waiting.insert(id, waiting);
            let alone = pending.waiting.len() == 1;
            // In the order of their ids; the window bounds how many there can be.
            let _ = self.requests.send(Request::new(id, asked, alone));
        }
        outcome.await.unwrap_or_else(|_| Err("its process ended".into()))
    }

    /// Each signature of some keys wants its own finger, which may as well be on its way while others are before it.
    pub(super) fn announce(&self, key: usize, tell: &Tell) {
        if let Some(message) = self.opened.touch.get(&key) {
            tell_touch(tell, message);
        }
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

    /// How long it takes for one request among many.
    pub(super) fn takes(&self) -> Duration {
        self.pending().took / u32::try_from(self.opened.sessions.max(1)).unwrap_or(u32::MAX)
    }

    /// Whether it is at something that takes its time: a touch, or an operator's task.
    pub(super) fn takes_time(&self) -> bool {
        let now = Instant::now();
        self.pending().waiting.values().any(|waiting| waiting.is_busy(now))
    }

    /// Whether no request is with it.
    pub(super) fn is_idle(&self) -> bool {
        self.pending().waiting.is_empty()
    }

    /// Whether it has offered its device a PIN that was not taken yet: it may have cost a try.
    pub(super) fn logs_in(&self) -> bool {
        self.pending().logging_in
    }

    /// Whether it was of any use.
    pub(super) fn has_answered(&self) -> bool {
        self.pending().last_answer.is_some()
    }

    /// Takes in what the process said. Returns why, where it was a PIN that was refused.
    pub(super) fn answered(&self, Answer { id, said, took_us }: Answer) -> Option<String> {
        let (mut pending, now) = (self.pending(), Instant::now());
        if !matches!(said, Some(Said::LogsIn(_))) {
            pending.last_answer = Some(now);
        }
        let outcome = match said? {
            Said::LogsIn(begins) => {
                pending.logging_in = begins;
                return None;
            }
            Said::Begun(may_take_s) => {
                pending.allow(id, Duration::from_secs(may_take_s.into()));
                return None;
            }
            Said::Touch(message) => {
                // A person gets the time that the device gives them, before anybody calls it a hang.
                pending.allow(id, TOUCH);
                if let Some(waiting) = pending.waiting.get(&id).filter(|waiting| !waiting.done.is_closed()) {
                    tell_touch(&waiting.tell, &message);
                }
                self.touch_command.run(message);
                return None;
            }
            Said::Done(result) => Ok(result),
            Said::Failed(failure) => Err(match serde_json::from_str::<Failure>(&failure) {
                Ok(failure) => failure.bounded(),
                Err(error) => Failure { class: Class::Gone, message: error.to_string() },
            }),
        };
        let locked = outcome.as_ref().err().filter(|failure| failure.class == Class::Locked);
        let locked = locked.map(|failure| failure.message.clone());
        // They were taken from the line before this one was.
        for (_, earlier) in pending.waiting.range_mut(..id) {
            earlier.begun.get_or_insert(now);
        }
        // Smoothed: one answer in many takes long only because the machine was busy.
        pending.took = (pending.took * 7 + Duration::from_micros(took_us)) / 8;
        let target = self.opened.sessions * ahead(pending.took);
        if pending.window < target {
            self.window.add_permits(target - pending.window);
            pending.window = target;
        }
        let Some(Waiting { done, held: Held { turn, .. }, .. }) = pending.take(id) else { return locked };
        if pending.window > target {
            // Nobody gets this turn: under load there is always somebody who waits for one.
            turn.forget();
            pending.window -= 1;
        }
        drop(pending);
        // The caller may have given up at its deadline.
        let _ = done.send(Ok(outcome));
        locked
    }

    /// Whether an operation takes longer than `limit`: one that is known to have begun so long ago, or, as one is
    /// always at work, any, when nothing at all was answered in that time.
    pub(super) fn hangs(&self, limit: Duration) -> bool {
        let pending = self.pending();
        let now = Instant::now();
        let busy = |waiting: &&Waiting| waiting.is_busy(now);
        // With one session, everybody waits behind it; with more, the others go on.
        if self.opened.sessions == 1 && pending.waiting.values().any(|waiting| busy(&waiting)) {
            return false;
        }
        let mut idle = pending.waiting.values().filter(|waiting| !busy(waiting));
        // The first is the oldest.
        let Some(oldest) = idle.next() else { return false };
        let quiet_since =
            [Some(oldest.sent), pending.free_since, pending.last_answer].into_iter().flatten().max();
        let mut begun = std::iter::once(oldest).chain(idle).filter_map(|waiting| waiting.begun);
        quiet_since.is_some_and(|since| since.elapsed() > limit) || begun.any(|begun| begun.elapsed() > limit)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whoever waits, once for each device.
fn tell_touch(tell: &Tell, message: &str) {
    tell.send_if_modified(|step| {
        let tells = match step {
            Step::Working => true,
            Step::Touch(said) => said != message,
            Step::Done(_) => false,
        };
        if tells {
            *step = Step::Touch(message.to_owned());
        }
        tells
    });
}

/// How many requests a session has before it whose device takes so long for one.
fn ahead(took: Duration) -> usize {
    let fits = AHEAD.as_micros() / took.as_micros().max(1);
    usize::try_from(fits.clamp(*AHEAD_REQUESTS.start(), *AHEAD_REQUESTS.end())).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_leaves_room_for_others() {
        let queue = Arc::new(Queue::default());
        let take =
            |caller: Option<u32>| Place::take(&queue, 4, caller.map(Caller::Uid).as_ref(), || Duration::ZERO);
        let of_one = [take(Some(1)).expect("room"), take(Some(1)).expect("room")];
        let full = take(Some(1)).err().expect("half of it").to_string();
        assert_eq!(full, "2 requests of this caller already wait for it");
        let others = [take(Some(2)).expect("room"), take(None).expect("room")];
        let full = take(None).err().expect("all of it").to_string();
        assert_eq!(full, "4 requests already wait for it");
        drop((of_one, others));
        assert_eq!((queue.all(), queue.of_each().len()), (0, 0));
        take(Some(1)).expect("room again");
    }
}
