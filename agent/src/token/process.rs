//! One life of a token's process: spawned, opened, fed with requests, watched for hangs, ended.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command as Spawn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use zeroize::Zeroizing;

use super::{Command, Place, Token, TokenError, Unlocked};
use crate::algorithm::{Content, KeyType};
use crate::config;
use crate::host::wire::{
    self, Answer, Class, Failure, KeySpec, OpenSpec, Opened, Opening, PublicKey, Sign, Survey,
};
use crate::replay::{Step, Tell};
use crate::secret::Pin;

/// Requests a session may have before it: enough that it never waits for the next one.
const AHEAD: usize = 4;

/// How long a `touch_command` may run.
const NOTIFY: Duration = Duration::from_secs(30);

/// How long a process may take to close its device when it is told to.
const GRACE: Duration = Duration::from_secs(2);

type Outcome = Result<Vec<u8>, Failure>;

/// The line to a token's process.
pub(super) struct Host {
    pub(super) opened: Opened,
    /// Requests that may be with the process at once. Closed when the process is being replaced.
    pub(super) window: Arc<Semaphore>,
    requests: mpsc::UnboundedSender<Sign>,
    pending: Mutex<Pending>,
    /// Where to run it, and what.
    touch_command: (PathBuf, Vec<String>),
    next_id: AtomicU64,
}

#[derive(Default)]
struct Pending {
    waiting: HashMap<u64, Waiting>,
    last_answer: Option<Instant>,
    /// Why the process ended. Nothing is sent after that.
    ended: Option<String>,
}

/// A request that is with the process, whether or not its caller still waits.
struct Waiting {
    done: oneshot::Sender<Result<Outcome, String>>,
    tell: Tell,
    sent: Instant,
    /// Its place in the window and in the queue, held until it is answered: otherwise callers in a hurry could
    /// pile up work without bound.
    _held: Held,
}

/// What a request holds while it is with the process.
pub(super) struct Held {
    pub(super) _turn: OwnedSemaphorePermit,
    pub(super) _place: Place,
}

impl Host {
    /// Has the process sign. The outer error says why the process was replaced before it answered.
    pub(super) async fn sign(
        &self,
        key: usize,
        content: Content,
        tell: &Tell,
        held: Held,
    ) -> Result<Outcome, String> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (done, outcome) = oneshot::channel();
        {
            let mut pending = self.pending();
            if let Some(reason) = &pending.ended {
                return Err(reason.clone());
            }
            pending
                .waiting
                .insert(id, Waiting { done, tell: tell.clone(), sent: Instant::now(), _held: held });
        }
        // The window bounds how many there can be.
        let _ = self.requests.send(Sign::new(id, key, content));
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

    /// Whether it was of any use.
    pub(super) fn has_answered(&self) -> bool {
        self.pending().last_answer.is_some()
    }

    fn answered(&self, answer: Answer) {
        let mut pending = self.pending();
        pending.last_answer = Some(Instant::now());
        if !answer.touch.is_empty() {
            if let Some(waiting) = pending.waiting.get_mut(&answer.id) {
                waiting.sent = Instant::now();
                waiting.tell.send_replace(Step::Touch(answer.touch.clone()));
            }
            self.notify(answer.touch);
            return;
        }
        let waiting = pending.waiting.remove(&answer.id);
        drop(pending);
        if let Some(waiting) = waiting {
            // The caller may have given up at its deadline.
            let _ = waiting.done.send(Ok(answer.outcome()));
        }
    }

    /// Runs the operator's command, such as a desktop notification. What becomes of it is its own affair.
    fn notify(&self, message: String) {
        let Some((program, arguments)) = self.touch_command.1.split_first() else { return };
        let mut command = Spawn::new(program);
        command.current_dir(&self.touch_command.0);
        command.args(arguments).arg(message).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let program = program.clone();
        tokio::spawn(async move {
            match command.spawn() {
                Ok(mut child) => drop(timeout(NOTIFY, child.wait()).await),
                Err(error) => tracing::warn!(%program, %error, "touch_command cannot be run"),
            }
        });
    }

    /// Whether an operation takes longer than `limit`. Requests are taken in order and each session has at
    /// most [`AHEAD`] of them, so a request that is older than that many operations is stuck, and so is
    /// everything when nothing at all was answered for one.
    fn hangs(&self, limit: Duration) -> bool {
        let pending = self.pending();
        let Some(oldest) = pending.waiting.values().map(|waiting| waiting.sent).min() else { return false };
        let ahead = u32::try_from(AHEAD).unwrap_or(u32::MAX);
        let quiet_since = pending.last_answer.map_or(oldest, |last| last.max(oldest));
        quiet_since.elapsed() > limit || oldest.elapsed() > limit.saturating_mul(ahead)
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// How a process's life ended.
pub(super) enum End {
    Died(String),
    /// A PIN was refused in the middle of its life: somebody changed it.
    Locked(String),
    /// An operator wants it opened again, since some keys were not usable.
    Reopen(Option<Pin>, Unlocked),
    Stop(oneshot::Sender<()>),
}

/// What to start.
pub(super) struct Launch<'a> {
    pub(super) token: &'a Token,
    pub(super) pin: Option<Pin>,
    pub(super) by_operator: bool,
}

/// A running process and our end of its socketpair.
pub(super) struct Process {
    child: Child,
    socket: UnixStream,
    requests: mpsc::UnboundedReceiver<Sign>,
    timeout: Duration,
}

/// Starts the process and has it open the device.
pub(super) async fn launch(launch: Launch<'_>) -> Result<(Host, Process), Failure> {
    let token = launch.token;
    let spec = OpenSpec {
        token: token.config.clone(),
        keys: token.keys.clone(),
        by_operator: launch.by_operator,
        generate: None,
        survey: false,
    };
    let (child, socket, opening) = start(&token.name, &spec, launch.pin).await?;
    match opening {
        Opening::Opened(opened) => {
            let (requests, inbox) = mpsc::unbounded_channel();
            let host = Host {
                window: Arc::new(Semaphore::new(opened.sessions * AHEAD)),
                opened,
                requests,
                pending: Mutex::default(),
                touch_command: (token.config.directory.clone(), token.config.touch_command.clone()),
                next_id: AtomicU64::new(0),
            };
            Ok((host, Process { child, socket, requests: inbox, timeout: token.config.timeout }))
        }
        Opening::Failed(failure) => Err(failure),
        Opening::Surveyed(_) | Opening::LoggingIn | Opening::LoggedIn => {
            Err(gone("its process did what was not asked".into()))
        }
    }
}

/// Has a process of its own look at a module without logging in.
pub(crate) async fn survey(name: &str, token: &config::Token) -> Result<Survey, String> {
    let spec =
        OpenSpec { token: token.clone(), keys: Vec::new(), by_operator: false, generate: None, survey: true };
    match start(name, &spec, None).await {
        Ok((_, _, Opening::Surveyed(survey))) => Ok(survey),
        Ok((_, _, Opening::Failed(failure))) | Err(failure) => Err(failure.message),
        Ok(_) => Err("its process did what was not asked".into()),
    }
}

/// Has a process of its own make a key, and check it as every key is checked.
pub(crate) async fn generate(
    name: &str,
    token: &config::Token,
    key: KeySpec,
    key_type: KeyType,
    pin: Option<Pin>,
) -> Result<PublicKey, String> {
    let (token, generate) = (token.clone(), Some(key_type));
    let spec = OpenSpec { token, keys: vec![key], by_operator: true, generate, survey: false };
    match start(name, &spec, pin).await {
        Ok((mut child, socket, Opening::Opened(opened))) => {
            // End of file tells it to close the device.
            drop(socket);
            let _ = timeout(GRACE, child.wait()).await;
            opened.keys.into_iter().next().unwrap_or_else(|| Err("the device did not answer".into()))
        }
        Ok((_, _, Opening::Failed(failure))) | Err(failure) => Err(failure.message),
        Ok(_) => Err("its process did what was not asked".into()),
    }
}

async fn start(
    name: &str,
    spec: &OpenSpec,
    pin: Option<Pin>,
) -> Result<(Child, UnixStream, Opening), Failure> {
    // Opening takes several operations.
    let limit = spec.token.timeout.saturating_mul(3);
    let logging_in = AtomicBool::new(false);
    let opening = async {
        let (mut socket, child) = spawn(name, &spec.token)?;
        let spec = serde_json::to_string(spec).map_err(io::Error::other)?;
        let open = wire::Open { spec, pin: pin.map(|pin| pin.expose().to_owned()) };
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
    let failure = |message: String| match logging_in.load(Ordering::Relaxed) {
        // The PIN was offered and nobody knows what became of it: no second try without an operator.
        true => Failure { class: Class::Locked, message: format!("while logging in: {message}") },
        false => gone(message),
    };
    // When this future is dropped, so is the child, which kills it.
    match timeout(limit, opening).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(failure("its process ended while opening the device; the module may have crashed".into()))
        }
        Ok(Err(error)) => Err(failure(format!("its process cannot be started: {error}"))),
        Err(_) => Err(failure(format!("the device did not open within {} s", limit.as_secs_f64()))),
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
    /// Passes requests and answers until the process dies, hangs, or we are told to stop.
    pub(super) async fn drive(&mut self, host: &Host, commands: &mut mpsc::Receiver<Command>) -> End {
        let (reader, mut writer) = self.socket.split();
        let mut reader = BufReader::new(reader);
        let write = async {
            let (mut batch, mut buffer) = (Vec::new(), Vec::new());
            while self.requests.recv_many(&mut batch, 64).await > 0 {
                buffer.clear();
                batch.drain(..).for_each(|request| wire::put(&mut buffer, &request));
                writer.write_all(&buffer).await?;
            }
            io::Result::Ok(())
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
                    return format!(
                        "an operation took longer than {} s and was ended",
                        self.timeout.as_secs_f64()
                    );
                }
            }
        };
        let told = async {
            loop {
                match commands.recv().await {
                    Some(Command::Unlock(pin, done)) if host.opened.keys.iter().any(Result::is_err) => {
                        return End::Reopen(pin, done);
                    }
                    Some(Command::Unlock(_, done)) => {
                        let _ = done.send(Err(TokenError::Refused("it is not locked".into())));
                    }
                    Some(Command::Stop(stopped)) => return End::Stop(stopped),
                    None => return End::Stop(oneshot::channel().0),
                }
            }
        };
        let end = tokio::select! {
            result = write => End::Died(ended(&result)),
            result = read => match result {
                Ok(reason) => End::Locked(reason),
                Err(error) => End::Died(ended(&Err(error))),
            },
            reason = watch => End::Died(reason),
            end = told => end,
        };
        if matches!(end, End::Stop(_) | End::Reopen(..)) {
            // End of file tells it to close the device.
            let _ = writer.shutdown().await;
        }
        end
    }

    /// Sees the process off: in peace if it was told to end, by force otherwise. One that does not die even so
    /// (a driver in the kernel) is left to the system.
    pub(super) async fn bury(mut self, end: &End) {
        if !matches!(end, End::Died(_) | End::Locked(_)) {
            let _ = timeout(GRACE, self.child.wait()).await;
        }
        let _ = timeout(GRACE, self.child.kill()).await;
    }
}

fn ended(result: &io::Result<()>) -> String {
    match result {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => format!("its process ended: {error}"),
        _ => "its process ended".to_owned(),
    }
}

fn gone(message: String) -> Failure {
    Failure { class: Class::Gone, message }
}

impl From<Failure> for TokenError {
    fn from(failure: Failure) -> Self {
        match failure.class {
            Class::Gone | Class::Busy => Self::Unavailable(failure.message),
            Class::Locked => Self::Locked(failure.message),
            Class::Refused => Self::Refused(failure.message),
        }
    }
}
