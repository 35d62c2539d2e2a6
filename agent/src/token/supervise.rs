//! Keeps a token's process alive: starts it, replaces it when it dies or hangs, stops asking when an operator
//! has to act.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::command::{Command, Login, Outcome};
use super::launch::{launch, unblock};
use super::line::Host;
use super::process::{End, Lost, Process};
use super::{State, Token, TokenError};
use crate::host::wire::{Class, Failure, Opened};
use crate::secret::Pin;

/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A process that lived this long, or answered a request, earns an immediate replacement.
const HEALTHY: Duration = Duration::from_secs(10);

/// How long before the token is opened anew for keys that could not be used: at first, and at most. All of its keys wait for
/// that, and sign a challenge.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60 * 60));

/// What comes after a life of the process, or after a try at one.
enum Next {
    /// It is opened, as somebody asked for or by itself.
    Open(Option<Login>),
    /// Not now.
    Rest(Failure),
    Stop(oneshot::Sender<()>),
}

/// What is known from one life to the next.
struct Supervisor {
    token: Arc<Token>,
    commands: mpsc::Receiver<Command>,
    /// The one after the next failure.
    pause: Duration,
    look_again: Duration,
    /// When the configured PIN was refused last.
    refused: Option<Instant>,
}

/// Runs until told to stop.
pub(super) async fn supervise(token: Arc<Token>, commands: mpsc::Receiver<Command>) {
    let (pause, look_again, refused) = (PAUSES.0, LOOK_AGAIN.0, None);
    let mut supervisor = Supervisor { token, commands, pause, look_again, refused };
    let mut next = Next::Open(None);
    loop {
        next = match next {
            Next::Open(login) => supervisor.open(login).await,
            Next::Rest(failure) => supervisor.rest(failure).await,
            Next::Stop(stopped) => {
                let _ = stopped.send(());
                return;
            }
        };
    }
}

impl Supervisor {
    /// Has the device opened, where that may be, and lives with it.
    async fn open(&mut self, login: Option<Login>) -> Next {
        let token = Arc::clone(&self.token);
        let (pin, unlocks, lifts) = match login {
            Some(Login { pin, done, lifts, asked, .. }) => (pin, Some(done), lifts.then_some(asked)),
            None => (None, None, None),
        };
        let by_operator = unlocks.is_some();
        // What an operator typed, or enters on the device, is not ours to offer again.
        let from_source = pin.is_none() && !token.pin().is_by_hand();
        let refused = token.refused_source().filter(|_| from_source);
        let unlocks_at = lifts.filter(|asked| token.lock.was_closed_at(*asked));
        let told = from_source && unlocks_at.is_some() && token.lock.tells();
        let closed = match (unlocks_at, &refused) {
            // Whoever ends a lock may not know that the PIN was refused before that.
            (Some(_), Some(refused)) if !told => Some(format!(
                "before it was locked, {refused}; unlock it once more, and that is offered again"
            )),
            (Some(_), _) => None,
            (None, _) => token.locked_by_operator().or_else(|| refused.filter(|_| !by_operator)),
        };
        let started = Instant::now();
        let opening = match closed {
            Some(message) => Err(Failure { class: Class::Locked, message }),
            None => self.launch(pin, by_operator, from_source).await,
        };
        let failure = match opening {
            Ok((host, process)) => {
                token.unanswered.store(false, Ordering::Relaxed);
                let lifted = match unlocks_at {
                    Some(asked) => token.lock.lift(asked).await,
                    None => Ok(()),
                };
                // Somebody may have locked it meanwhile.
                if let Some(message) = token.locked_by_operator() {
                    process.bury().await;
                    Failure { class: Class::Locked, message }
                } else {
                    warn_of_changed_keys(&token, &host.opened);
                    token.last_opened.send_replace(Some(host.opened.clone()));
                    let (device, sessions) = (&host.opened.device, host.opened.sessions);
                    tracing::info!(token = %token.name, %device, sessions, "token is ready");
                    let host = Arc::new(host);
                    token.state.send_replace(State::Ready(Arc::clone(&host)));
                    answer(unlocks, lifted);
                    return self.live(host, process, from_source, started).await;
                }
            }
            Err(failure) => failure,
        };
        answer(unlocks, Err(failure.clone().into()));
        // Of one that was never open whoever started it tells, or asks at the terminal: this line would be in the way.
        let asked = !by_operator && token.pin().is_by_hand() && token.last_opened.borrow().is_none();
        if failure.class == Class::Locked && !asked {
            warn_of_lock(&token, &failure);
        }
        Next::Rest(failure)
    }

    /// Starts a process that opens it.
    async fn launch(
        &mut self,
        pin: Option<Pin>,
        by_operator: bool,
        from_source: bool,
    ) -> Result<(Host, Process), Failure> {
        if from_source {
            self.token.refuse_source(None);
        }
        self.token.state.send_replace(State::Starting);
        let launched = launch(&self.token, pin, by_operator).await;
        if let Err(Failure { class: Class::Locked, message }) = &launched
            && from_source
        {
            self.refused = Some(Instant::now());
            self.token.refuse_source(Some(message.clone()));
        }
        launched
    }

    /// Has it sign until the process ends, however that comes.
    async fn live(
        &mut self,
        host: Arc<Host>,
        mut process: Process,
        from_source: bool,
        started: Instant,
    ) -> Next {
        let token = Arc::clone(&self.token);
        let missing = host.opened.keys.iter().any(Result::is_err);
        self.look_again = if missing { (self.look_again * 2).min(LOOK_AGAIN.1) } else { LOOK_AGAIN.0 };
        let wait = from_source.then_some(self.look_again);
        let (end, lost) = process.drive(&token, &host, &mut self.commands, wait).await;
        let mut failure = None;
        if let Some(Lost::Refused(reason) | Lost::Unanswered(reason)) = &lost {
            let ends = matches!(end, End::Died(_) | End::LookAgain);
            if ends && token.is_card() && matches!(lost, Some(Lost::Unanswered(_))) {
                // A card tells how many tries are left: the next process looks at them first.
                token.unanswered.store(true, Ordering::Relaxed);
            } else {
                failure = Some(Failure { class: Class::Locked, message: reason.clone() });
            }
        }
        if let End::Locked(message) = &end {
            failure = Some(Failure { class: Class::Locked, message: message.clone() });
        }
        // Requests that wait for this host must find the new state, so it is set before they are freed.
        let locked =
            || token.locked_by_operator().or_else(|| failure.as_ref().map(|failure| failure.message.clone()));
        let locked = if matches!(end, End::Stop(_)) { None } else { locked() };
        token.state.send_replace(locked.clone().map_or(State::Starting, State::Locked));
        host.fail_pending(match (&locked, &end) {
            (Some(reason), _) => reason,
            (None, End::Died(reason)) => {
                tracing::warn!(token = %token.name, %reason, "the token's process ended; starting another");
                reason
            }
            _ => "the token is being closed",
        });
        if let Some(failure) = &failure {
            // Wherever this PIN came from, it is not the token's any more: not for the one that takes its place either, and
            // not for the next agent.
            token.refuse_source(Some(failure.message.clone()));
            if from_source {
                token.keep_refusal(&failure.message, token.written().await).await;
            }
        }
        process.bury().await;
        match (end, failure) {
            (End::Stop(stopped), _) => Next::Stop(stopped),
            (End::Lock, _) => Next::Open(None),
            (end, Some(failure)) => {
                if let End::Reopen(login) = end {
                    answer(Some(login.done), Err(failure.clone().into()));
                }
                warn_of_lock(&token, &failure);
                Next::Rest(failure)
            }
            (End::Reopen(login), None) => Next::Open(Some(login)),
            (End::LookAgain | End::Locked(_), None) => Next::Open(None),
            // The first death costs nothing; a second one soon after waits.
            (End::Died(_), None) if started.elapsed() >= HEALTHY || host.has_answered() => {
                self.pause = PAUSES.0;
                Next::Open(None)
            }
            (End::Died(_), None) if self.pause == PAUSES.0 => {
                self.pause = PAUSES.0 * 2;
                Next::Open(None)
            }
            (End::Died(_), None) => {
                Next::Rest(Failure { class: Class::Gone, message: "its process keeps ending".into() })
            }
        }
    }

    /// Waits until somebody acts or, where it is not locked, for a while.
    async fn rest(&mut self, failure: Failure) -> Next {
        let token = Arc::clone(&self.token);
        let failure = match token.locked_by_operator() {
            Some(message) => Failure { class: Class::Locked, message },
            None => failure,
        };
        let wake = if failure.class == Class::Locked {
            token.state.send_replace(State::Locked(failure.message));
            None
        } else {
            let pause_ms = self.pause.as_millis();
            tracing::warn!(token = %token.name, reason = %failure, pause_ms, "token cannot be opened");
            token.state.send_replace(State::Down(failure.message));
            let wake = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(PAUSES.1);
            Some(wake)
        };
        token.tell_closed();
        let wake = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(wake);
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = &mut wake => return Next::Open(None),
            };
            match command {
                Some(Command::Unlock(login)) => match login.wanted() {
                    // What was refused since it was asked for is not offered once more.
                    Some(Login { pin: None, done, asked, .. })
                        if self.refused.is_some_and(|at| asked < at) =>
                    {
                        let reason = token.refused_source().unwrap_or_default();
                        answer(Some(done), Err(TokenError::Locked(reason)));
                    }
                    Some(login) => return Next::Open(Some(login)),
                    None => {}
                },
                Some(Command::Lock(done)) => {
                    if token.waits_to_close(done) {
                        return Next::Open(None);
                    }
                }
                // Nobody waits for this one any more.
                Some(Command::Unblock(_, done)) if done.is_closed() => {}
                // No other process has the device, and what the token waits for stays what it is.
                Some(Command::Unblock(fresh, done)) => {
                    answer(Some(done), unblock(&token.name, &token.config, fresh).await);
                }
                // It is not open, and will be looked at when it is.
                Some(Command::LookAgain { looks, .. }) => drop(looks.send(true)),
                Some(Command::Stop(stopped)) => return Next::Stop(stopped),
                // Nobody waits for this one.
                None => return Next::Stop(oneshot::channel().0),
            }
        }
    }
}

fn warn_of_lock(token: &Token, failure: &Failure) {
    tracing::warn!(
        token = %token.name, reason = %failure,
        "token is locked; no PIN is offered again until `{}`", token.how_to_unlock()
    );
}

fn answer(asks: Option<Outcome>, outcome: Result<(), TokenError>) {
    if let Some(asks) = asks {
        // An operator who hung up no longer waits for it.
        let _ = asks.send(outcome);
    }
}

/// The same name with another key behind it is worth a line in the log: verifiers will notice.
fn warn_of_changed_keys(token: &Token, opened: &Opened) {
    let before = token.last_opened.borrow();
    let Some(before) = before.as_ref() else { return };
    for (key, (old, new)) in token.keys.iter().zip(before.keys.iter().zip(&opened.keys)) {
        if let (Ok(old), Ok(new)) = (old, new)
            && old.spki != new.spki
        {
            tracing::warn!(token = %token.name, key = %key.name, "the key has another public half than before");
        }
    }
}
