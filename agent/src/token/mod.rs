//! The front half of a token: a bounded queue, deadlines, and what callers are told. The process that owns the
//! device is started, watched and replaced in `supervise.rs`.

mod line;
mod process;
mod supervise;
mod touch;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use self::line::{Held, Host};
pub(crate) use self::process::{generate, survey};
use crate::algorithm::Content;
use crate::config;
use crate::host::wire::{Class, KeySpec, Opened, PublicKey};
use crate::replay::Tell;
use crate::secret::Pin;

/// Why a token did not sign, by what the caller can do.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenError {
    /// Too many requests wait. Try again after a moment.
    #[error("{waiting} requests already wait for it")]
    Full {
        /// How many wait.
        waiting: usize,
    },
    /// An operator has to act.
    #[error("it is locked: {0}")]
    Locked(String),
    /// Absent, failing or just replaced. Trying again helps once the cause ends.
    #[error("{0}")]
    Unavailable(String),
    /// It cannot do this with this key. Trying again does not help.
    #[error("{0}")]
    Refused(String),
    /// The deadline passed first.
    #[error("no answer within the deadline")]
    Deadline,
}

/// What a token is doing.
#[derive(Clone, Debug)]
pub enum State {
    /// Its process is being started and the device opened.
    Starting,
    /// Signing.
    Ready,
    /// Waits for an operator: no PIN is offered by itself.
    Locked(String),
    /// Absent or failing; it is tried again with growing pauses.
    Down(String),
}

/// A finished signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// DER.
    pub signature: Vec<u8>,
    /// The key that made it: SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
}

/// A token as the rest of the agent sees it.
pub struct Token {
    /// Its name in the configuration.
    pub name: String,
    config: config::Token,
    /// What its keys are, in the order of the wire's index.
    keys: Vec<KeySpec>,
    state: watch::Sender<Status>,
    /// How the device answered when it was last open. Kept while it is away.
    last_opened: watch::Sender<Option<Opened>>,
    commands: mpsc::Sender<Command>,
    waiting: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Status {
    Starting,
    Ready(Arc<Host>),
    Locked(String),
    Down(String),
}

/// Where the outcome of an unlock goes.
type Unlocked = oneshot::Sender<Result<(), TokenError>>;

/// What the supervisor can be told.
enum Command {
    Unlock(Option<Pin>, Unlocked),
    Stop(oneshot::Sender<()>),
}

impl Token {
    /// Starts the token's supervisor, which starts its process. Returns at once.
    pub(crate) fn start(name: &str, config: config::Token, keys: Vec<KeySpec>) -> Arc<Self> {
        let (commands, inbox) = mpsc::channel(8);
        let token = Arc::new(Self {
            name: name.to_owned(),
            config,
            keys,
            state: watch::Sender::new(Status::Starting),
            last_opened: watch::Sender::new(None),
            commands,
            waiting: Arc::default(),
        });
        tokio::spawn(supervise::supervise(Arc::clone(&token), inbox));
        token
    }

    /// Signs with the key of this index. Waits while the token starts or is busy, until the deadline.
    /// `tell` learns when the device waits for a touch.
    pub(crate) async fn sign(
        &self,
        key: usize,
        content: &Content,
        tell: &Tell,
        deadline: Instant,
    ) -> Result<Signed, TokenError> {
        let mut retried = false;
        loop {
            let place = self.queue()?;
            let host = self.ready(deadline).await?;
            let public_key = match host.opened.keys.get(key) {
                Some(Ok(PublicKey { algorithm, spki })) => {
                    algorithm.bytes(content).map_err(TokenError::Refused)?;
                    spki.0.clone()
                }
                Some(Err(reason)) => return Err(TokenError::Refused(reason.clone())),
                None => return Err(TokenError::Refused("no such key".into())),
            };
            // A closed window means that this process is being replaced: wait for the next one.
            let turn = timeout_at(deadline, Arc::clone(&host.window).acquire_owned());
            let Ok(turn) = turn.await.map_err(|_| TokenError::Deadline)? else {
                self.replaced(&host, deadline).await?;
                continue;
            };
            let held = Held { _turn: turn, _place: place };
            let answer = timeout_at(deadline, host.sign(key, content.clone(), tell, held)).await;
            let answer = answer.map_err(|_| TokenError::Deadline)?;
            let failure = match answer {
                Ok(Ok(signature)) => return Ok(Signed { signature, public_key }),
                Ok(Err(failure)) => failure,
                Err(killed) => return Err(TokenError::Unavailable(killed)),
            };
            if failure.class != Class::Gone || retried {
                return Err(failure.into());
            }
            // The host said itself that nothing was signed and that it starts over: one more try is safe.
            retried = true;
            self.replaced(&host, deadline).await?;
        }
    }

    /// Logs in again: with this PIN, or with the configured source read anew.
    pub async fn unlock(&self, pin: Option<Pin>, deadline: Instant) -> Result<(), TokenError> {
        let (done, outcome) = oneshot::channel();
        let stopping = || TokenError::Unavailable("the agent is stopping".into());
        let sent = timeout_at(deadline, self.commands.send(Command::Unlock(pin, done)));
        sent.await.map_err(|_| TokenError::Deadline)?.map_err(|_| stopping())?;
        timeout_at(deadline, outcome).await.map_err(|_| TokenError::Deadline)?.map_err(|_| stopping())?
    }

    /// Closes the device. Requests in flight should have ended.
    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Stop(done)).await.is_ok() {
            let _ = stopped.await;
        }
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        State::from(&*self.state.borrow())
    }

    /// Waits until what it is doing changes.
    pub fn watch(&self) -> impl Future<Output = State> + use<> {
        let mut changes = self.state.subscribe();
        async move {
            match changes.changed().await {
                Ok(()) => State::from(&*changes.borrow_and_update()),
                Err(_) => State::Down("the agent is stopping".into()),
            }
        }
    }

    /// The key of this index as the device last showed it: its public half, or why it cannot be used. `None`
    /// until the device was open once.
    pub(crate) fn key(&self, index: usize) -> Option<Result<PublicKey, String>> {
        self.last_opened.borrow().as_ref().and_then(|opened| opened.keys.get(index).cloned())
    }

    /// How the device names itself; empty until it was open once.
    pub fn device(&self) -> String {
        self.last_opened.borrow().as_ref().map(|opened| opened.device.clone()).unwrap_or_default()
    }

    /// The kind of device.
    pub fn backend(&self) -> &'static str {
        self.config.device.backend()
    }

    /// Whether it waits for a PIN that only a person can give.
    pub fn wants_prompt(&self) -> bool {
        self.config.pin == config::PinSource::Prompt
    }

    /// The host, once it is ready.
    async fn ready(&self, deadline: Instant) -> Result<Arc<Host>, TokenError> {
        match &*self.state.borrow() {
            Status::Ready(host) => return Ok(Arc::clone(host)),
            Status::Locked(reason) => return Err(TokenError::Locked(reason.clone())),
            Status::Down(reason) => return Err(TokenError::Unavailable(reason.clone())),
            Status::Starting => {}
        }
        let mut changes = self.state.subscribe();
        let started = changes.wait_for(|status| !matches!(status, Status::Starting));
        let status = match timeout_at(deadline, started).await {
            Err(_) => return Err(TokenError::Deadline),
            Ok(Err(_)) => return Err(TokenError::Unavailable("the agent is stopping".into())),
            Ok(Ok(status)) => status.clone(),
        };
        match status {
            Status::Ready(host) => Ok(host),
            Status::Locked(reason) => Err(TokenError::Locked(reason)),
            Status::Down(reason) => Err(TokenError::Unavailable(reason)),
            Status::Starting => Err(TokenError::Unavailable("it is being replaced".into())),
        }
    }

    /// Waits until this host is no longer the current one.
    async fn replaced(&self, old: &Arc<Host>, deadline: Instant) -> Result<(), TokenError> {
        let mut changes = self.state.subscribe();
        let gone = |status: &Status| !matches!(status, Status::Ready(host) if Arc::ptr_eq(host, old));
        match timeout_at(deadline, changes.wait_for(gone)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TokenError::Deadline),
        }
    }

    fn queue(&self) -> Result<Place, TokenError> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(&self.waiting));
        if waiting >= self.config.queue { Err(TokenError::Full { waiting }) } else { Ok(place) }
    }
}

/// A place in the queue, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl From<&Status> for State {
    fn from(status: &Status) -> Self {
        match status {
            Status::Starting => Self::Starting,
            Status::Ready(_) => Self::Ready,
            Status::Locked(reason) => Self::Locked(reason.clone()),
            Status::Down(reason) => Self::Down(reason.clone()),
        }
    }
}
