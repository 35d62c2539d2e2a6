//! Keeps a token's process alive: starts it, replaces it when it dies or hangs, stops asking when an operator
//! has to act.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::command::{Command, Login, Unlocked};
use super::launch::{launch, unblock};
use super::process::{End, Lost};
use super::{State, Token, TokenError};
use crate::config::PinSource;
use crate::host::wire::{Class, Failure, Opened};

/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A process that lived this long, or answered a request, earns an immediate replacement.
const HEALTHY: Duration = Duration::from_secs(10);

/// How long before the token is opened anew for keys that could not be used: at first, and at most. All of its keys wait for
/// that, and sign a challenge.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60 * 60));

/// Runs until told to stop.
pub(super) async fn supervise(token: Arc<Token>, mut commands: mpsc::Receiver<Command>) {
    let mut pause = PAUSES.0;
    let mut look_again = LOOK_AGAIN.0;
    let mut login: Option<Login> = None;
    // When the configured PIN was refused last.
    let mut refused = None;
    loop {
        token.state.send_replace(State::Starting);
        let (pin, mut unlocked) = match login.take() {
            Some(Login { pin, done, .. }) => (pin, Some(done)),
            None => (None, None),
        };
        let by_operator = unlocked.is_some();
        // What an operator typed, or enters on the device, is not ours to offer again.
        let from_source = pin.is_none() && *token.pin() != PinSource::Device;
        if from_source && by_operator {
            token.refuse_source(None);
        }
        let started = Instant::now();
        let opening = match token.refused_source().filter(|_| from_source) {
            Some(message) => Err(Failure { class: Class::Locked, message }),
            None => {
                let launched = launch(&token, pin, by_operator).await;
                let locked = launched.as_ref().err().is_some_and(|failure| failure.class == Class::Locked);
                if from_source && locked {
                    refused = Some(Instant::now());
                }
                launched
            }
        };
        let failure = match opening {
            Ok((host, mut process)) => {
                token.unanswered.store(false, Ordering::Relaxed);
                warn_of_changed_keys(&token, &host.opened);
                token.last_opened.send_replace(Some(host.opened.clone()));
                let (device, sessions) = (&host.opened.device, host.opened.sessions);
                tracing::info!(token = %token.name, %device, sessions, "token is ready");
                let host = Arc::new(host);
                token.state.send_replace(State::Ready(Arc::clone(&host)));
                answer(&mut unlocked, Ok(()));
                let missing = host.opened.keys.iter().any(Result::is_err);
                look_again = if missing { (look_again * 2).min(LOOK_AGAIN.1) } else { LOOK_AGAIN.0 };
                let wait = from_source.then_some(look_again);
                let end = match process.drive(&token, &host, &mut commands, wait).await {
                    // A card tells how many tries are left: the next process looks at them first.
                    (end @ (End::Died(_) | End::LookAgain), Some(Lost::Unanswered(_))) if token.is_card() => {
                        token.unanswered.store(true, Ordering::Relaxed);
                        end
                    }
                    (
                        End::Died(_) | End::LookAgain,
                        Some(Lost::Refused(reason) | Lost::Unanswered(reason)),
                    ) => End::Locked(reason),
                    (End::Reopen(login), Some(Lost::Refused(reason) | Lost::Unanswered(reason))) => {
                        unlocked = Some(login.done);
                        End::Locked(reason)
                    }
                    (End::Stop(stopped), Some(Lost::Refused(reason) | Lost::Unanswered(reason))) => {
                        // For the one that takes this token's place, and for the next agent.
                        token.refuse_source(Some(reason.clone()));
                        if from_source {
                            token.keep_refusal(&reason, token.written().await).await;
                        }
                        End::Stop(stopped)
                    }
                    (end, _) => end,
                };
                // Requests that wait for this host must find the new state, so it is set before they are freed.
                token.state.send_replace(State::Starting);
                match &end {
                    End::Died(reason) => {
                        tracing::warn!(token = %token.name, %reason, "the token's process ended; starting another");
                        host.fail_pending(reason);
                    }
                    End::Locked(reason) => {
                        token.state.send_replace(State::Locked(reason.clone()));
                        host.fail_pending(reason);
                    }
                    End::Stop(_) | End::Reopen(..) | End::LookAgain => {
                        host.fail_pending("the token is being closed")
                    }
                }
                process.bury().await;
                match end {
                    End::Stop(stopped) => {
                        let _ = stopped.send(());
                        return;
                    }
                    End::Reopen(asked) => {
                        login = Some(asked);
                        continue;
                    }
                    End::LookAgain => continue,
                    End::Locked(message) => {
                        // Wherever this PIN came from, it is not the token's any more.
                        token.refuse_source(Some(message.clone()));
                        if from_source {
                            token.keep_refusal(&message, token.written().await).await;
                        }
                        Failure { class: Class::Locked, message }
                    }
                    // The first death costs nothing; a second one soon after waits.
                    End::Died(_) if started.elapsed() >= HEALTHY || host.has_answered() => {
                        pause = PAUSES.0;
                        continue;
                    }
                    End::Died(_) if pause == PAUSES.0 => {
                        pause = PAUSES.0 * 2;
                        continue;
                    }
                    End::Died(_) => {
                        Failure { class: Class::Gone, message: "its process keeps ending".into() }
                    }
                }
            }
            Err(failure) => failure,
        };
        answer(&mut unlocked, Err(failure.clone().into()));
        let wake = if failure.class == Class::Locked {
            // Of one that was never open whoever started it tells, or asks at the terminal: this line would be in the way.
            if by_operator || !token.pin().is_by_hand() || token.last_opened.borrow().is_some() {
                tracing::warn!(
                    token = %token.name, reason = %failure,
                    "token is locked; no PIN is offered again until `{}`", token.how_to_unlock()
                );
            }
            if from_source {
                token.refuse_source(Some(failure.message.clone()));
            }
            token.state.send_replace(State::Locked(failure.message));
            None
        } else {
            let pause_ms = pause.as_millis();
            tracing::warn!(token = %token.name, reason = %failure, pause_ms, "token cannot be opened");
            token.state.send_replace(State::Down(failure.message));
            let wake = Instant::now() + pause;
            pause = (pause * 2).min(PAUSES.1);
            Some(wake)
        };
        match command_or_wake(&token, &mut commands, wake, refused).await {
            None | Some(Command::LookAgain { .. } | Command::Unblock(..)) => {}
            Some(Command::Unlock(asked)) => login = Some(asked),
            Some(Command::Stop(stopped)) => {
                let _ = stopped.send(());
                return;
            }
        }
    }
}

/// The next command, or `None` at the time given. A closed channel counts as a stop nobody waits for. A PIN is set anew
/// meanwhile: no other process has the device, and what the token waits for stays what it is.
async fn command_or_wake(
    token: &Token,
    commands: &mut mpsc::Receiver<Command>,
    wake: Option<Instant>,
    refused: Option<Instant>,
) -> Option<Command> {
    let wake = async {
        match wake {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(wake);
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Unlock(login)) => match login.wanted() {
                    // What was refused since it was asked for is not offered once more.
                    Some(Login { pin: None, done, asked, .. }) if refused.is_some_and(|at| asked < at) => {
                        let reason = token.refused_source().unwrap_or_default();
                        answer(&mut Some(done), Err(TokenError::Locked(reason)));
                    }
                    Some(login) => return Some(Command::Unlock(login)),
                    None => {}
                },
                // Nobody waits for this one any more.
                Some(Command::Unblock(_, done)) if done.is_closed() => {}
                Some(Command::Unblock(fresh, done)) => {
                    answer(&mut Some(done), unblock(&token.name, &token.config, fresh).await);
                }
                // It is not open, and will be looked at when it is.
                Some(Command::LookAgain { looks, .. }) => drop(looks.send(true)),
                Some(command) => return Some(command),
                None => return Some(Command::Stop(oneshot::channel().0)),
            },
            () = &mut wake => return None,
        }
    }
}

fn answer(unlocked: &mut Option<Unlocked>, outcome: Result<(), TokenError>) {
    if let Some(unlocked) = unlocked.take() {
        // An operator who hung up no longer waits for it.
        let _ = unlocked.send(outcome);
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
