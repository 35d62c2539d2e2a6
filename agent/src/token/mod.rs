//! The front half of a token: a bounded queue, deadlines, and what callers are told. The process that owns the
//! device is started, watched and replaced in `supervise.rs`.

mod command;
mod error;
mod line;
mod process;
mod state;
mod supervise;
mod touch;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use self::command::{Command, Login, Unlocked};
pub use self::error::TokenError;
use self::line::{Held, Host, Place};
pub(crate) use self::process::{prepare, survey, unblock};
pub use self::state::State;
use self::state::Status;
use crate::algorithm::Content;
use crate::config;
use crate::host::task::{Done, Task};
use crate::host::wire::{Asked, Class, Failure, Fresh, KeySpec, Opened};
use crate::public_key::PublicKey;
use crate::replay::Tell;
use crate::secret::Pin;

/// How long requests that have begun keep a token open that a new configuration does not have, or a process that is to look
/// for keys anew: somebody may be on the way to touch it.
const LAST_REQUESTS: Duration = Duration::from_secs(20);

/// How long a request waits before it asks a device again that is busy: at first, and at most.
const BUSY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

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
    /// It was closed, and stays so.
    over: AtomicBool,
    /// Why what the configured PIN source holds is not offered again: it was refused once. Only an operator who has
    /// it read anew clears this.
    refused_source: Mutex<Option<String>>,
    /// A PIN was not answered, and the device may have counted it: the next process looks at the tries that are left first.
    unanswered: AtomicBool,
}

impl Token {
    /// Starts the token's supervisor, which starts its process. Returns at once.
    /// Tokens that it takes the place of are closed first: a device belongs to one process.
    pub(crate) fn start(
        name: &str,
        config: config::Token,
        keys: Vec<KeySpec>,
        before: Vec<Arc<Self>>,
    ) -> Arc<Self> {
        let (commands, inbox) = mpsc::channel(8);
        let token = Arc::new(Self {
            name: name.to_owned(),
            config,
            keys,
            state: watch::Sender::new(Status::Starting),
            last_opened: watch::Sender::new(None),
            commands,
            waiting: Arc::default(),
            over: AtomicBool::new(false),
            refused_source: Mutex::default(),
            unanswered: AtomicBool::new(false),
        });
        let supervised = Arc::clone(&token);
        tokio::spawn(async move {
            for before in before {
                before.close().await;
                // The same PIN is no other one, and the device may be the same, whatever it is called by now.
                if before.config.pin == supervised.config.pin {
                    if let Some(reason) = before.refused_source() {
                        supervised.refuse_source(Some(reason));
                    }
                    let unanswered = before.unanswered.load(Ordering::Relaxed);
                    supervised.unanswered.fetch_or(unanswered, Ordering::Relaxed);
                }
            }
            supervise::supervise(supervised, inbox).await;
        });
        token
    }

    /// Signs with the key of this index. Waits while the token starts or has others before it, until the deadline, and,
    /// when it is `the_last` that could, while it says that it is busy. `tell` learns when the device waits for a touch.
    pub(crate) async fn sign(
        &self,
        key: usize,
        content: &Content,
        tell: &Tell,
        deadline: Instant,
        the_last: bool,
    ) -> Result<Signed, TokenError> {
        let place = Arc::new(self.queue()?);
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
        let place = Arc::new(self.queue()?);
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
        let held = Held { turn, _place: Arc::clone(place) };
        let answer = timeout_at(deadline, host.ask(asked, tell, held)).await;
        answer.map(Some).map_err(|_| TokenError::Deadline)
    }

    /// Logs in again: with this PIN, or with the configured source read anew. Not once the other end of `waits` is gone.
    pub(crate) async fn unlock_for(
        &self,
        waits: Weak<()>,
        pin: Option<Pin>,
        deadline: Instant,
    ) -> Result<(), TokenError> {
        let asked = Instant::now();
        self.command(|done| Command::Unlock(Login { pin, done, waits, asked }), deadline).await
    }

    /// The same, for whoever waits for this.
    pub async fn unlock(&self, pin: Option<Pin>, deadline: Instant) -> Result<(), TokenError> {
        let here = Arc::new(());
        self.unlock_for(Arc::downgrade(&here), pin, deadline).await
    }

    /// Has the PIN of a token that is locked set anew; it stays locked.
    pub(crate) async fn unblock(&self, fresh: Fresh, deadline: Instant) -> Result<(), TokenError> {
        self.command(|done| Command::Unblock(fresh, done), deadline).await
    }

    async fn command<C: FnOnce(Unlocked) -> Command>(
        &self,
        c: C,
        deadline: Instant,
    ) -> Result<(), TokenError> {
        let (done, outcome) = oneshot::channel();
        let stopping = || TokenError::Unavailable("the agent is stopping".into());
        let sent = timeout_at(deadline, self.commands.send(c(done)));
        sent.await.map_err(|_| TokenError::Deadline)?.map_err(|_| stopping())?;
        timeout_at(deadline, outcome).await.map_err(|_| TokenError::Deadline)?.map_err(|_| stopping())?
    }

    /// Has the keys found anew. No, where a person has to give the PIN again for that.
    pub(crate) async fn look_again(&self, deleted: bool) -> bool {
        let (looks, looked_for) = oneshot::channel();
        // A supervisor that ended looks at nothing any more, and one that opens the device looks by itself.
        let sent = self.commands.send(Command::LookAgain { deleted, looks }).await;
        sent.is_err() || timeout(process::GRACE, looked_for).await.ok().and_then(Result::ok).unwrap_or(true)
    }

    /// Whether it is what this configuration asks for.
    pub(crate) fn is_for(&self, config: &config::Token, keys: &[KeySpec]) -> bool {
        self.config == *config && self.keys == keys
    }

    /// Whether it is this device's.
    pub(crate) fn is_of(&self, config: &config::Token) -> bool {
        self.config.device == config.device
    }

    /// Closes the device once the requests that have begun are answered, or have had their time.
    pub(crate) async fn close(&self) {
        let deadline = Instant::now() + LAST_REQUESTS;
        while self.waiting.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.stop().await;
    }

    /// Why the configured PIN is not offered again, if that was refused.
    pub(crate) fn refused_source(&self) -> Option<String> {
        self.refused_source.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn refuse_source(&self, reason: Option<String>) {
        *self.refused_source.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Whether it was closed.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Closes the device. Requests in flight should have ended.
    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Stop(done)).await.is_ok() {
            let _ = stopped.await;
        }
        self.over.store(true, Ordering::Relaxed);
        self.state.send_replace(Status::Down("it was closed".into()));
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

    /// How long any operation of the device may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.config.timeout
    }

    /// The kind of device.
    pub fn backend(&self) -> &'static str {
        self.config.device.backend()
    }

    /// How long it takes for the requests that wait.
    pub(crate) fn busy(&self) -> Duration {
        let waiting = u32::try_from(self.waiting.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        match &*self.state.borrow() {
            Status::Ready(host) => host.takes().saturating_mul(waiting),
            _ => Duration::ZERO,
        }
    }

    /// Whether other programs may hold it, and it tells how many tries of its PIN are left.
    fn is_card(&self) -> bool {
        matches!(self.config.device, config::Device::Piv { .. })
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
        Place::take(&self.waiting, self.config.queue).map_err(|waiting| TokenError::Full { waiting })
    }
}
