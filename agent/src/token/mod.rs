//! The front half of a token: a bounded queue, deadlines, and what callers are told. The process that owns the
//! device is started, watched and replaced in `supervise.rs`.

mod command;
mod error;
mod kept;
mod launch;
mod line;
mod lock;
mod process;
mod refused;
mod requests;
mod state;
mod supervise;
mod touch;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use self::command::{Command, Login, Outcome};
pub use self::error::TokenError;
pub(crate) use self::launch::{prepare, survey, unblock};
use self::line::Queue;
use self::lock::Lock;
pub(crate) use self::refused::Refusals;
use self::refused::Written;
pub use self::state::State;
use crate::config;
use crate::host::wire::{Fresh, KeySpec, Opened};
use crate::public_key::PublicKey;
use crate::secret::Pin;

/// How long requests that have begun keep a token open that a new configuration does not have, or a process that is to look
/// for keys anew: somebody may be on the way to touch it.
const LAST_REQUESTS: Duration = Duration::from_secs(20);

/// A finished signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// DER.
    pub signature: Vec<u8>,
    /// The key that made it: SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
}

/// A token whose place another one takes.
#[derive(Clone)]
pub(crate) struct Before {
    pub(crate) token: Arc<Token>,
    /// What is known of its PIN was taken over by another one, before this.
    pub(crate) has_heir: bool,
}

/// A token as the rest of the agent sees it.
pub struct Token {
    /// Its name in the configuration.
    pub name: String,
    config: config::Token,
    /// What its keys are, in the order of the wire's index.
    keys: Vec<KeySpec>,
    state: watch::Sender<State>,
    /// How the device answered when it was last open. Kept while it is away.
    last_opened: watch::Sender<Option<Opened>>,
    commands: mpsc::Sender<Command>,
    /// Who does what operators ask for has this.
    tasks: Semaphore,
    waiting: Arc<Queue>,
    /// It is to be closed, whatever it is at.
    stopping: watch::Sender<bool>,
    /// It was closed, and stays so.
    over: AtomicBool,
    /// Why what the configured PIN source holds is not offered again: it was refused once. Only an operator who has
    /// it read anew clears this.
    refused_source: Mutex<Option<String>>,
    /// Where that outlives this process.
    refusals: Refusals,
    lock: Arc<Lock>,
    /// Who waits until it is closed, since it is locked.
    closing: Mutex<Vec<Outcome>>,
    /// A PIN was not answered, and the device may have counted it: the next process looks at the tries that are left first.
    unanswered: AtomicBool,
}

impl Token {
    /// Starts the token's supervisor, which starts its process. Returns at once.
    /// Tokens that it takes the place of are closed first: a device belongs to one process. `audit` is the log's directory.
    pub(crate) fn start(
        name: &str,
        config: config::Token,
        keys: Vec<KeySpec>,
        before: Vec<Before>,
        audit: &Path,
    ) -> Arc<Self> {
        let (commands, inbox) = mpsc::channel(8);
        let same = before.iter().find(|before| before.token.name == name);
        let lock = same.map_or_else(|| Arc::new(Lock::of(name, audit)), |same| Arc::clone(&same.token.lock));
        let token = Arc::new(Self {
            name: name.to_owned(),
            refusals: Refusals::of(&config, audit),
            lock,
            closing: Mutex::default(),
            config,
            keys,
            state: watch::Sender::new(State::Starting),
            last_opened: watch::Sender::new(None),
            commands,
            tasks: Semaphore::new(1),
            waiting: Arc::default(),
            stopping: watch::Sender::new(false),
            over: AtomicBool::new(false),
            refused_source: Mutex::default(),
            unanswered: AtomicBool::new(false),
        });
        let supervised = Arc::clone(&token);
        tokio::spawn(async move {
            for Before { token: before, has_heir } in before {
                before.close().await;
                // The same PIN is no other one, and the device may be the same, whatever it is called by now.
                if !has_heir && before.config.pin == supervised.config.pin {
                    if let Some(reason) = before.refused_source() {
                        supervised.refuse_source(Some(reason));
                    }
                    let unanswered = before.unanswered.load(Ordering::Relaxed);
                    supervised.unanswered.fetch_or(unanswered, Ordering::Relaxed);
                }
            }
            let refusals = supervised.refusals.clone();
            if let Some(reason) = tokio::task::spawn_blocking(move || refusals.kept()).await.ok().flatten() {
                supervised.refuse_source(Some(reason));
            }
            supervise::supervise(supervised, inbox).await;
        });
        token
    }

    /// Logs in again: with this PIN, or with the configured source read anew, whether an operator locked it or not. Not once
    /// the other end of `waits` is gone.
    pub(crate) async fn unlock_for(
        &self,
        waits: Weak<()>,
        pin: Option<Pin>,
        deadline: Instant,
    ) -> Result<(), TokenError> {
        let asked = Instant::now();
        self.command(|done| Command::Unlock(Login { pin, done, lifts: true, waits, asked }), deadline).await
    }

    /// The same, for whoever waits for this, if no operator locked it.
    pub async fn unlock(&self, pin: Option<Pin>, deadline: Instant) -> Result<(), TokenError> {
        let (here, asked) = (Arc::new(()), Instant::now());
        let waits = Arc::downgrade(&here);
        self.command(|done| Command::Unlock(Login { pin, done, lifts: false, waits, asked }), deadline).await
    }

    /// Signs nothing more from now on, until an unlock has opened it. The error: not for the next agent.
    pub(crate) async fn lock(&self) -> Result<(), TokenError> {
        let when = self.lock.close();
        let why = self.locked_by_operator().unwrap_or_default();
        // Its process, if it is at something else, is told later.
        self.state.send_if_modified(|state| {
            let open = matches!(state, State::Ready(_));
            if open {
                *state = State::Locked(why);
            }
            open
        });
        self.lock.keep(when).await
    }

    /// Closes the device of one that is locked. What is with it has some time to end.
    pub(crate) async fn shut(&self, deadline: Instant) -> Result<(), TokenError> {
        match self.command(Command::Lock, deadline).await {
            Err(TokenError::Deadline) => {
                let still = "it is locked; its device is still at work, and is closed then";
                Err(TokenError::Unavailable(still.into()))
            }
            // Or another token of this name takes its place, which is locked as well.
            _ => Ok(()),
        }
    }

    /// Whether it is locked: `asks` is answered once it is closed. If it was unlocked since, at once.
    fn waits_to_close(&self, asks: Outcome) -> bool {
        let locked = self.lock.why().is_some();
        match locked {
            true => self.closing.lock().unwrap_or_else(PoisonError::into_inner).push(asks),
            false => drop(asks.send(Ok(()))),
        }
        locked
    }

    /// It is closed.
    fn tell_closed(&self) {
        for asks in self.closing.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // An operator who hung up no longer waits for it.
            let _ = asks.send(Ok(()));
        }
    }

    /// Why it stays closed, if an operator locked it, and whatever else is known of its PIN.
    pub(crate) fn locked_by_operator(&self) -> Option<String> {
        let why = self.lock.why()?;
        Some(match self.refused_source() {
            Some(refused) => format!("{why}; {refused}"),
            None => why,
        })
    }

    /// Has the PIN of a token that is locked set anew; it stays locked.
    pub(crate) async fn unblock(&self, fresh: Fresh, deadline: Instant) -> Result<(), TokenError> {
        self.command(|done| Command::Unblock(fresh, done), deadline).await
    }

    async fn command<C: FnOnce(Outcome) -> Command>(
        &self,
        c: C,
        deadline: Instant,
    ) -> Result<(), TokenError> {
        let (done, outcome) = oneshot::channel();
        let stopping = || TokenError::Unavailable("it was closed meanwhile; try again".into());
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
        while self.waiting.all() > 0 && (Instant::now() < deadline || self.takes_time()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.stop().await;
    }

    /// Whether its device is at something that takes its time.
    fn takes_time(&self) -> bool {
        matches!(&*self.state.borrow(), State::Ready(host) if host.takes_time())
    }

    /// Why the configured PIN is not offered again, if that was refused.
    pub(crate) fn refused_source(&self) -> Option<String> {
        self.refused_source.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn refuse_source(&self, reason: Option<String>) {
        *self.refused_source.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// How the file is that its PIN comes from, if it comes from one.
    async fn written(&self) -> Option<Written> {
        let refusals = self.refusals.clone();
        tokio::task::spawn_blocking(move || refusals.written()).await.ok().flatten()
    }

    /// What its source held then was refused: no other process, of this agent or a later one, offers it by itself.
    async fn keep_refusal(&self, reason: &str, written: Option<Written>) {
        let (refusals, reason) = (self.refusals.clone(), reason.to_owned());
        let kept = tokio::task::spawn_blocking(move || refusals.keep(&reason, written)).await;
        if let Ok(Err(error)) = kept {
            tracing::error!(token = %self.name, %error, "that its PIN was refused cannot be kept for an agent that is started again");
        }
    }

    /// The device took what its source holds.
    async fn forget_refusal(&self) {
        let refusals = self.refusals.clone();
        let _ = tokio::task::spawn_blocking(move || refusals.forget()).await;
    }

    /// Its source holds another PIN now.
    pub(crate) async fn has_another_pin(&self) {
        self.refuse_source(None);
        self.forget_refusal().await;
    }

    /// Whether it was closed.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Whether another token takes over what is known of its PIN.
    pub(crate) fn has_heir_in(&self, other: &Self) -> bool {
        (self.name == other.name || other.is_of(&self.config)) && self.config.pin == other.config.pin
    }

    /// Whether its PIN is not to be offered again, or not before somebody has looked.
    pub(crate) fn knows_of_its_pin(&self) -> bool {
        self.refused_source().is_some() || self.unanswered.load(Ordering::Relaxed)
    }

    /// Closes the device. Requests in flight should have ended.
    pub async fn stop(&self) {
        self.stopping.send_replace(true);
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Stop(done)).await.is_ok() {
            let _ = stopped.await;
        }
        self.over.store(true, Ordering::Relaxed);
        self.state.send_replace(State::Down("it was closed".into()));
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// What it is doing, once it does not start any more.
    pub async fn settled(&self) -> State {
        let mut changes = self.state.subscribe();
        let settled = changes.wait_for(|status| !matches!(status, State::Starting)).await;
        settled.map_or_else(|_| State::Down("the agent is stopping".into()), |state| state.clone())
    }

    /// Waits until what it is doing changes.
    pub fn watch(&self) -> impl Future<Output = ()> + use<> {
        let mut changes = self.state.subscribe();
        async move { changes.changed().await.unwrap_or_default() }
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
        let waiting = u32::try_from(self.waiting.all()).unwrap_or(u32::MAX);
        match &*self.state.borrow() {
            State::Ready(host) => host.takes().saturating_mul(waiting),
            _ => Duration::ZERO,
        }
    }

    /// Whether other programs may hold it, and it tells how many tries of its PIN are left.
    fn is_card(&self) -> bool {
        matches!(self.config.device, config::Device::Piv { .. })
    }

    /// Whether the agent does not start without it.
    pub(crate) fn is_required(&self) -> bool {
        self.config.required
    }

    /// Where its PIN comes from.
    pub(crate) fn pin(&self) -> &config::PinSource {
        &self.config.pin
    }

    /// What an operator runs to have it opened.
    pub(crate) fn how_to_unlock(&self) -> String {
        self.config.pin.how_to_unlock(&self.name)
    }
}
