//! One life of a token's process: fed with requests, watched for hangs, ended.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::command::{Command, Login};
use super::line::Host;
use super::{LAST_REQUESTS, Token, TokenError};
use crate::backend::card_holder;
use crate::host::wire::{self, Answer, Request};

/// How long a process may take to close its device when it is told to, or a supervisor to answer.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// No operator's task takes longer, and no touch.
const LONGEST_TASK: Duration = Duration::from_secs(300);

/// How often a process looks for keys that could not be used.
const LOOK: Duration = Duration::from_secs(60);

/// How a process's life ended.
pub(super) enum End {
    Died(String),
    /// A PIN was refused in the middle of its life: somebody changed it.
    Locked(String),
    /// An operator wants it opened again, since some keys were not usable.
    Reopen(Login),
    /// The same, by itself: they may be there by now.
    LookAgain,
    /// An operator wants it closed, and to stay so.
    Lock,
    Stop(oneshot::Sender<()>),
}

/// Why a PIN is not to be offered again.
pub(super) enum Lost {
    Refused(String),
    /// Nobody knows what became of it.
    Unanswered(String),
}

/// A running process and our end of its socketpair.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) socket: UnixStream,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    pub(super) timeout: Duration,
    /// Whether other programs may hold its device.
    pub(super) is_card: bool,
}

impl Process {
    /// Passes requests and answers until the process dies, hangs, or we are told to stop. With unusable keys it ends after
    /// `look_again`, or where one is there before that, when nobody waits for it. Returns also what became of a PIN that
    /// was not taken.
    pub(super) async fn drive(
        &mut self,
        token: &Token,
        host: &Arc<Host>,
        commands: &mut mpsc::Receiver<Command>,
        look_again: Option<Duration>,
    ) -> (End, Option<Lost>) {
        let Self { child, socket, requests, timeout: limit, is_card } = self;
        let (reader, mut writer) = socket.split();
        let mut reader = BufReader::new(reader);
        let read = read(&mut reader, host);
        tokio::pin!(read);
        let end = tokio::select! {
            biased;
            result = &mut read => match result {
                Ok(reason) => return (End::Locked(reason), None),
                Err(error) => {
                    let why = ended(&error);
                    let lost = host.logs_in().then(|| Lost::Unanswered(while_logging_in(&why)));
                    return (End::Died(why), lost);
                }
            },
            error = write(&mut writer, requests, host) => End::Died(ended(&error)),
            reason = hang(host, *limit, *is_card) => End::Died(reason),
            end = told(token, host, commands, look_again.is_some()) => end,
            end = found(token, host, look_again) => end,
        };
        host.window.close();
        // It is told to end, in peace where that may be. What it says until then counts, too.
        let why = match &end {
            End::Died(reason) => {
                let _ = child.start_kill();
                reason
            }
            _ => {
                let _ = writer.shutdown().await;
                "its process was replaced"
            }
        };
        let refused = timeout(GRACE, read).await.ok().and_then(Result::ok);
        let unanswered = || host.logs_in().then(|| Lost::Unanswered(while_logging_in(why)));
        let lost = refused.map(Lost::Refused).or_else(unanswered);
        (end, lost)
    }

    /// Sees to it that the process, which had its time, has ended. One that does not die even so (a driver in the kernel)
    /// is left to the system.
    pub(super) async fn bury(mut self) {
        let _ = timeout(GRACE, self.child.kill()).await;
    }
}

/// Passes requests on, until that fails.
async fn write(
    writer: &mut WriteHalf<'_>,
    requests: &mut mpsc::UnboundedReceiver<Request>,
    host: &Host,
) -> io::Error {
    let (mut batch, mut buffer) = (Vec::new(), Vec::new());
    loop {
        requests.recv_many(&mut batch, 64).await;
        buffer.clear();
        // Nobody waits for some of them any more: the device is spared those.
        let wanted = batch.drain(..).filter(|request| host.is_wanted(request.id));
        wanted.for_each(|request| wire::put(&mut buffer, &request));
        if let Err(error) = writer.write_all(&buffer).await {
            return error;
        }
    }
}

/// Passes answers on, until one says that a PIN was refused: why.
async fn read(reader: &mut BufReader<ReadHalf<'_>>, host: &Host) -> io::Result<String> {
    loop {
        let frame = wire::read_async(reader).await?;
        let answer: Answer = wire::decode(&frame)?;
        if let Some(reason) = host.answered(answer) {
            return Ok(reason);
        }
    }
}

/// Waits until an operation takes longer than any may, and says so.
async fn hang(host: &Host, limit: Duration, is_card: bool) -> String {
    let mut tick = interval((limit / 8).clamp(Duration::from_millis(20), Duration::from_secs(1)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !host.hangs(limit) {
        tick.tick().await;
    }
    // One that keeps a card in a transaction of its own.
    let holder = match is_card {
        // It asks the system for names, which may be far away.
        true => {
            let asked = tokio::task::spawn_blocking(card_holder);
            timeout(GRACE, asked).await.ok().and_then(Result::ok).unwrap_or_default()
        }
        false => String::new(),
    };
    let others = if holder.is_empty() { "" } else { "; what else uses cards" };
    let seconds = limit.as_secs_f64();
    format!("an operation took longer than {seconds} s and was ended{others}{holder}")
}

/// Waits until somebody tells it to end. Where it `may_look`, it may be opened again without anybody's PIN.
async fn told(token: &Token, host: &Host, commands: &mut mpsc::Receiver<Command>, may_look: bool) -> End {
    let missing = host.opened.keys.iter().any(Result::is_err);
    loop {
        match commands.recv().await {
            Some(Command::Unlock(login)) if missing || token.locked_by_operator().is_some() => {
                let Some(login) = login.wanted() else { continue };
                drain(host).await;
                return End::Reopen(login);
            }
            Some(Command::Unlock(Login { done, .. }) | Command::Unblock(_, done)) => {
                let _ = done.send(Err(TokenError::Refused("it is not locked".into())));
            }
            Some(Command::Lock(done)) => {
                if token.waits_to_close(done) {
                    // Those that wait are told, or go to another token; what is with the device has its time.
                    host.window.close();
                    drain(host).await;
                    return End::Lock;
                }
            }
            // What an operator typed is not ours to offer again, and keys that are there need no look.
            Some(Command::LookAgain { deleted, looks }) if !may_look || !(missing || deleted) => {
                let _ = looks.send(!missing);
            }
            Some(Command::LookAgain { looks, .. }) => {
                let _ = looks.send(true);
                drain(host).await;
                return End::LookAgain;
            }
            Some(Command::Stop(stopped)) => return End::Stop(stopped),
            None => return End::Stop(oneshot::channel().0),
        }
    }
}

/// Waits until a key that was missing is there or, after `pause`, may be.
async fn found(token: &Token, host: &Arc<Host>, pause: Option<Duration>) -> End {
    let (missing, opened) = (host.opened.keys.iter().any(Result::is_err), Instant::now());
    let Some(pause) = pause.filter(|_| missing) else { return std::future::pending().await };
    let mut next = pause.min(LOOK);
    loop {
        tokio::time::sleep(next).await;
        next = (next * 2).min(LOOK);
        // Some modules show what is new only to a process that is.
        let anew = Instant::now() >= opened + pause;
        // Others are served meanwhile, and wait only where there is a reason.
        if token.finds_missing(host).await || anew && host.is_idle() {
            drain(host).await;
            return End::LookAgain;
        }
    }
}

/// Takes no more requests, and waits until those that are with the process are answered, or had their time. New
/// ones wait for the next process; while this one is at something long, they need not.
async fn drain(host: &Host) {
    let until = |at: Instant| move || Instant::now() < at;
    let (patient, last) = (until(Instant::now() + LONGEST_TASK), until(Instant::now() + LAST_REQUESTS));
    while host.takes_time() && patient() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    host.window.close();
    while !host.is_idle() && (last() || host.takes_time() && patient()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn ended(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "its process ended".to_owned(),
        _ => format!("its process ended: {error}"),
    }
}

/// The PIN was offered and nobody knows what became of it: no second try without an operator.
pub(super) fn while_logging_in(message: &str) -> String {
    format!("while logging in: {message}")
}
