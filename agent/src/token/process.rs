//! One life of a token's process: spawned, opened, fed with requests, watched for hangs, ended.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message as _;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command as Spawn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use zeroize::Zeroizing;

use super::command::{Command, Login};
use super::line::Host;
use super::{LAST_REQUESTS, Token, TokenError};
use crate::backend::card_holder;
use crate::config;
use crate::host::wire::{self, Answer, Class, Failure, Fresh, OpenSpec, Opening, Purpose, Request, Survey};
use crate::secret::Pin;

/// How long a process may take to close its device when it is told to, or a supervisor to answer.
pub(super) const GRACE: Duration = Duration::from_secs(2);

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
    child: Child,
    socket: UnixStream,
    requests: mpsc::UnboundedReceiver<Request>,
    timeout: Duration,
    /// Whether other programs may hold its device.
    is_card: bool,
}

/// Starts the process and has it open the device.
pub(super) async fn launch(
    token: &Token,
    pin: Option<Pin>,
    by_operator: bool,
) -> Result<(Host, Process), Failure> {
    let spec = OpenSpec {
        token: token.config.clone(),
        keys: token.keys.clone(),
        by_operator,
        unanswered: token.unanswered.load(Ordering::Relaxed),
        purpose: Purpose::Open,
    };
    let logging_in = AtomicBool::new(false);
    let mut stopping = token.stopping.subscribe();
    let started = tokio::select! {
        biased;
        started = start(&token.name, &spec, pin, None, &logging_in) => started,
        // Its process, which may hang, is killed.
        _ = stopping.wait_for(|stopping| *stopping) => Err(unopened("it was closed", &logging_in)),
    };
    let (child, socket, opening) = started?;
    match opening {
        Opening::Opened(opened) => {
            let (host, inbox) = Host::new(opened, &token.config);
            let is_card = token.is_card();
            let timeout = token.config.timeout;
            Ok((host, Process { child, socket, requests: inbox, timeout, is_card }))
        }
        Opening::Failed(failure) => {
            // The device counted it, or not, and went away: the next process looks before it offers another, as far as the
            // device tells. It is the last one.
            // (A TPM's keys have values of their own, which it counts and forgives by itself.)
            let offers = !matches!(token.config.device, config::Device::Tpm(_));
            let lost = offers && logging_in.load(Ordering::Relaxed) && failure.class == Class::Gone;
            if lost && token.unanswered.swap(true, Ordering::Relaxed) {
                return Err(Failure { class: Class::Locked, message: while_logging_in(&failure.message) });
            }
            Err(failure)
        }
        Opening::Surveyed(_) | Opening::Prepared | Opening::LoggingIn | Opening::LoggedIn => {
            Err(gone("its process did what was not asked".into()))
        }
    }
}

/// Has a process of its own look at a module without logging in.
pub(crate) async fn survey(name: &str, token: &config::Token) -> Result<Survey, String> {
    let spec = OpenSpec {
        token: token.clone(),
        keys: Vec::new(),
        by_operator: false,
        unanswered: false,
        purpose: Purpose::Survey,
    };
    match start(name, &spec, None, None, &AtomicBool::default()).await {
        Ok((_, _, Opening::Surveyed(survey))) => Ok(survey),
        Ok((_, _, Opening::Failed(failure))) | Err(failure) => Err(failure.message),
        Ok(_) => Err("its process did what was not asked".into()),
    }
}

/// Has a process of its own give a device secrets of its own.
pub(crate) async fn prepare(
    name: &str,
    token: &config::Token,
    pin: Option<Pin>,
    fresh: Fresh,
) -> Result<(), String> {
    give(name, token, pin, fresh, Purpose::Prepare).await.map_err(|failure| failure.message)
}

/// Has a process of its own set a PIN anew.
pub(crate) async fn unblock(name: &str, token: &config::Token, fresh: Fresh) -> Result<(), TokenError> {
    Ok(give(name, token, None, fresh, Purpose::Unblock).await?)
}

async fn give(
    name: &str,
    token: &config::Token,
    pin: Option<Pin>,
    fresh: Fresh,
    purpose: Purpose,
) -> Result<(), Failure> {
    let spec =
        OpenSpec { token: token.clone(), keys: Vec::new(), by_operator: true, unanswered: false, purpose };
    match start(name, &spec, pin, Some(fresh), &AtomicBool::default()).await? {
        (_, _, Opening::Prepared) => Ok(()),
        (_, _, Opening::Failed(failure)) => Err(failure),
        _ => Err(gone("its process did what was not asked".into())),
    }
}

/// `logging_in` says afterwards whether a PIN was on its way.
async fn start(
    name: &str,
    spec: &OpenSpec,
    pin: Option<Pin>,
    fresh: Option<Fresh>,
    logging_in: &AtomicBool,
) -> Result<(Child, UnixStream, Opening), Failure> {
    // Opening takes several operations, and so does every key; most are quick where one is slow.
    let more_keys = u32::try_from(spec.keys.len().saturating_sub(1)).unwrap_or(u32::MAX);
    let limit = spec.token.timeout.saturating_mul(more_keys.saturating_add(3));
    let opening = async {
        let (mut socket, child) = spawn(name, &spec.token)?;
        let spec = serde_json::to_string(spec).map_err(io::Error::other)?;
        let open = wire::Open { spec, pin: pin.map(|pin| pin.expose().to_owned()), fresh };
        let message = Zeroizing::new(open.encode_to_vec());
        drop(Zeroizing::new(open.pin.unwrap_or_default()));
        let mut frame = Zeroizing::new(Vec::with_capacity(message.len() + 4));
        wire::put_bytes(&mut frame, &message);
        socket.write_all(&frame).await?;
        loop {
            let answer = wire::read_async(&mut socket).await?;
            match serde_json::from_slice(&answer).map_err(io::Error::other)? {
                Opening::LoggingIn => logging_in.store(true, Ordering::Relaxed),
                Opening::LoggedIn => logging_in.store(false, Ordering::Relaxed),
                opening => return io::Result::Ok((child, socket, opening)),
            }
        }
    };
    // When this future is dropped, so is the child, which kills it.
    match timeout(limit, opening).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Err(unopened(
            "its process ended while opening the device; the module may have crashed",
            logging_in,
        )),
        Ok(Err(error)) => Err(unopened(&format!("its process cannot be started: {error}"), logging_in)),
        Err(_) => {
            let message = format!("the device did not open within {} s", limit.as_secs_f64());
            Err(unopened(&message, logging_in))
        }
    }
}

/// Why a device is not open, when a PIN may have been on its way.
fn unopened(message: &str, logging_in: &AtomicBool) -> Failure {
    match logging_in.load(Ordering::Relaxed) {
        true => Failure { class: Class::Locked, message: while_logging_in(message) },
        false => gone(message.to_owned()),
    }
}

fn spawn(name: &str, config: &config::Token) -> io::Result<(UnixStream, Child)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    // The running binary itself, even when the file was replaced by an upgrade since.
    let mut command = Spawn::new("/proc/self/exe");
    for name in &config.hidden_env {
        command.env_remove(name);
    }
    let child = command
        .arg0(format!("omsign-agent: token {name}"))
        .arg("token-host")
        // tpm2-tss writes to standard error what its errors say anyway.
        .env("TSS2_LOG", "all+NONE")
        .envs(&config.env)
        .current_dir(&config.directory)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    Ok((UnixStream::from_std(ours)?, child))
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
        let (reader, mut writer) = self.socket.split();
        let mut reader = BufReader::new(reader);
        let write = async {
            let (mut batch, mut buffer) = (Vec::new(), Vec::new());
            loop {
                self.requests.recv_many(&mut batch, 64).await;
                buffer.clear();
                // Nobody waits for some of them any more: the device is spared those.
                let wanted = batch.drain(..).filter(|request| host.is_wanted(request.id));
                wanted.for_each(|request| wire::put(&mut buffer, &request));
                if let Err(error) = writer.write_all(&buffer).await {
                    return error;
                }
            }
        };
        let read = async {
            loop {
                let frame = wire::read_async(&mut reader).await?;
                let answer: Answer = wire::decode(&frame)?;
                let refused = answer.locks().then(|| answer.message.clone());
                host.answered(answer);
                if let Some(reason) = refused {
                    return io::Result::Ok(reason);
                }
            }
        };
        let watch = async {
            let mut tick =
                interval((self.timeout / 8).clamp(Duration::from_millis(20), Duration::from_secs(1)));
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                if host.hangs(self.timeout) {
                    // One that keeps a card in a transaction of its own.
                    let holder = match self.is_card {
                        // It asks the system for names, which may be far away.
                        true => {
                            let asked = tokio::task::spawn_blocking(card_holder);
                            timeout(GRACE, asked).await.ok().and_then(Result::ok).unwrap_or_default()
                        }
                        false => String::new(),
                    };
                    let others = if holder.is_empty() { "" } else { "; what else uses cards" };
                    let seconds = self.timeout.as_secs_f64();
                    return format!(
                        "an operation took longer than {seconds} s and was ended{others}{holder}"
                    );
                }
            }
        };
        let (missing, opened) = (host.opened.keys.iter().any(Result::is_err), Instant::now());
        let told = async {
            loop {
                match commands.recv().await {
                    Some(Command::Unlock(login)) if missing => {
                        let Some(login) = login.wanted() else { continue };
                        drain(host).await;
                        return End::Reopen(login);
                    }
                    Some(Command::Unlock(Login { done, .. }) | Command::Unblock(_, done)) => {
                        let _ = done.send(Err(TokenError::Refused("it is not locked".into())));
                    }
                    // What an operator typed is not ours to offer again, and keys that are there need no look.
                    Some(Command::LookAgain { deleted, looks })
                        if look_again.is_none() || !(missing || deleted) =>
                    {
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
        };
        let look_again = async {
            match look_again.filter(|_| missing) {
                Some(pause) => loop {
                    tokio::time::sleep(pause.min(LOOK)).await;
                    // Some modules show what is new only to a process that is.
                    let anew = Instant::now() >= opened + pause;
                    if host.is_idle() && (anew || token.finds_missing(host).await) {
                        drain(host).await;
                        return End::LookAgain;
                    }
                },
                None => std::future::pending().await,
            }
        };
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
            error = write => End::Died(ended(&error)),
            reason = watch => End::Died(reason),
            end = told => end,
            end = look_again => end,
        };
        host.window.close();
        // It is told to end, in peace where that may be. What it says until then counts, too.
        let why = match &end {
            End::Died(reason) => {
                let _ = self.child.start_kill();
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

/// Takes no more requests, and waits until those that are with the process are answered, or had their time. New
/// ones wait for the next process.
async fn drain(host: &Host) {
    host.window.close();
    let deadline = Instant::now() + LAST_REQUESTS;
    while !host.is_idle() && (Instant::now() < deadline || host.takes_time()) {
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
fn while_logging_in(message: &str) -> String {
    format!("while logging in: {message}")
}

fn gone(message: String) -> Failure {
    Failure { class: Class::Gone, message }
}
