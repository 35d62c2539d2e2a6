//! The operators' socket: commands over keys for an agent that runs, and so owns the devices. Local only; who may is
//! decided by the kernel's peer credentials and `[[operator]]`. Both ends are one program, so the form may change.

mod unblock;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

pub use self::unblock::{Unblock, unblock};
use crate::agent::Agent;
use crate::audit::{self, Audit, Entry};
use crate::config::{Config, PinSource, UnixListen};
use crate::host::wire;
use crate::identity::Identity;
use crate::key_life::{Command, KeyLifeError, Operator, Output, Say};
use crate::listen::{ListenError, SocketFile, bind_unix, met};
use crate::pin::BY_HAND;
use crate::places::Places;
use crate::policy::{Match, Rule, allowed};
use crate::secret::Pin;
use crate::token::{State, Token};

/// How many operators are served at a time.
pub(crate) const CONNECTIONS: usize = 8;

/// How long what they ask for may be: certificates are the longest of it.
const LARGEST: u32 = 256 << 10;

/// How long an operator's program may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a running agent may take to say anything: longer than it gives its devices.
const ANSWER: Duration = Duration::from_secs(330);

/// How long a device may take to open.
const OPEN: Duration = Duration::from_secs(60);

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Somebody else's agent.
    #[error("no [[operator]] rule lets you do this")]
    NotOperator,
    /// An agent that cannot be asked.
    #[error("an agent is running and owns the device, but {0}")]
    Agent(String),
    /// Nobody whose configuration could be read anew.
    #[error("no agent is running: it reads its configuration when it starts")]
    NoAgent,
    /// A PIN that nobody can be asked for.
    #[error("token {0} needs a PIN, and there is no terminal")]
    NoTerminal(String),
    /// A device that does not open.
    #[error("token {token}: {reason}")]
    Token {
        /// Its name.
        token: String,
        /// Why.
        reason: String,
    },
    /// What was asked for.
    #[error(transparent)]
    KeyLife(#[from] KeyLifeError),
    /// It was done elsewhere, and failed there.
    #[error("{0}")]
    Told(String),
    /// A configuration with mistakes.
    #[error("the configuration is not reloaded: {0}")]
    Reload(String),
    /// The log cannot be opened.
    #[error("nothing is done without an audit log")]
    Log(#[source] io::Error),
}

#[derive(Serialize, Deserialize)]
struct Ask {
    version: String,
    asked: Asked,
}

/// What an operator wants.
#[derive(Serialize, Deserialize)]
enum Asked {
    Command(Command),
    Unblock(Unblock),
}

#[derive(Serialize, Deserialize)]
enum Answer {
    /// Something that a person has to do meanwhile.
    Say(String),
    Done(Result<Output, String>),
}

/// An operator who wants the configuration read anew.
pub(crate) struct Reloaded {
    pub(crate) by: Identity,
    /// The rule that lets them.
    pub(crate) rule: String,
    /// Where it is told what has to be done then, or what is wrong with it.
    pub(crate) done: oneshot::Sender<Result<Vec<String>, String>>,
}

/// The socket of an agent.
pub(crate) fn bind(path: &Path, operators: &[Rule]) -> Result<(UnixListener, SocketFile), ListenError> {
    bind_unix(&UnixListen { path: path.to_owned(), mode: mode(operators), group: None })
}

/// Who can connect at all: with operators who are somebody else, everybody, and the rules alone decide.
pub(crate) fn mode(operators: &[Rule]) -> u32 {
    let own = rustix::process::geteuid().as_raw();
    let ours = |rule: &Rule| matches!(rule.matches, Match::Uid(uid) if uid == own || uid == 0);
    if operators.iter().all(ours) { 0o600 } else { 0o666 }
}

/// Serves operators until dropped.
pub(crate) async fn serve(socket: UnixListener, agent: Arc<Agent>, reload: mpsc::Sender<Reloaded>) {
    let places = Places::new();
    loop {
        let Ok(place) = Arc::clone(&places.all).acquire_owned().await else { return };
        let Ok((stream, _)) = socket.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (agent, reload, places) = (Arc::clone(&agent), reload.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            let Some((identity, _place)) = met(&stream, place, &places).await else { return };
            if let Err(error) = meet(stream, identity, &agent, reload).await {
                tracing::warn!(%error, "an operator's connection ended early");
            }
        });
    }
}

/// Strangers are told that they are.
async fn meet(
    mut stream: UnixStream,
    identity: Identity,
    agent: &Arc<Agent>,
    reload: mpsc::Sender<Reloaded>,
) -> io::Result<()> {
    if allowed(&agent.setup().config.operators, &identity).is_none() {
        let denied = deny(agent, &identity).await.map_err(|error| error.to_string());
        return timeout(PATIENCE, send(&mut stream, &Answer::Done(denied))).await?;
    }
    converse(stream, identity, agent, reload).await
}

async fn converse(
    mut stream: UnixStream,
    identity: Identity,
    agent: &Arc<Agent>,
    reload: mpsc::Sender<Reloaded>,
) -> io::Result<()> {
    let frame = Zeroizing::new(timeout(PATIENCE, wire::read_up_to(LARGEST, &mut stream)).await??);
    // What operators have begun is waited for when the agent stops.
    let Ok(_working) = Arc::clone(&agent.operators).acquire_owned().await else { return Ok(()) };
    let (say, mut said) = mpsc::unbounded_channel();
    let asked: Result<Ask, _> = serde_json::from_slice(&frame);
    let own = env!("CARGO_PKG_VERSION");
    let agent = Arc::clone(agent);
    // Finished and recorded even when the operator hangs up: what a device has begun, it does.
    let work = async move {
        match asked {
            Ok(Ask { version, asked }) if version == own => {
                let say = |message: &str| drop(say.send(message.to_owned()));
                attend(&agent, identity, asked, &reload, &say).await.map_err(|error| error.to_string())
            }
            _ => Err(format!("it is version {own}, and this program another; restart the agent")),
        }
    };
    tokio::pin!(work);
    let done = loop {
        tokio::select! {
            // An operator who hung up is told nothing.
            Some(message) = said.recv() => drop(send(&mut stream, &Answer::Say(message)).await),
            done = &mut work => break done,
        }
    };
    let last = async {
        while let Ok(message) = said.try_recv() {
            send(&mut stream, &Answer::Say(message)).await?;
        }
        send(&mut stream, &Answer::Done(done)).await
    };
    timeout(PATIENCE, last).await?
}

/// Records that somebody is no operator.
async fn deny(agent: &Agent, identity: &Identity) -> Result<Output, OperatorError> {
    let entry = Entry { action: "operate", outcome: "denied", reason: "operator", ..Entry::about(identity) };
    let recorded = agent.turn_away(entry, Instant::now() + audit::PATIENCE).await;
    recorded.map_err(|status| OperatorError::Told(status.message().to_owned()))?;
    Err(OperatorError::NotOperator)
}

/// Does what an operator asks of a running agent, if they are one.
async fn attend(
    agent: &Agent,
    identity: Identity,
    asked: Asked,
    reload: &mpsc::Sender<Reloaded>,
    say: Say<'_>,
) -> Result<Output, OperatorError> {
    let setup = agent.setup();
    // The rules may have changed since it was met.
    let rule = allowed(&setup.config.operators, &identity).ok_or(OperatorError::NotOperator)?;
    let command = match &asked {
        Asked::Command(command) => command,
        Asked::Unblock(unblock) => {
            let token = setup.tokens.get(&unblock.token);
            let token = token.ok_or_else(|| KeyLifeError::NoToken(unblock.token.clone()))?;
            return unblock.on(token, &agent.audit, &identity, &rule.name).await;
        }
    };
    if matches!(command, Command::Reload) {
        let (done, reloaded) = oneshot::channel();
        let asked = Reloaded { by: identity.clone(), rule: rule.name.clone(), done };
        let sent = reload.send(asked).await.is_ok();
        return match reloaded.await {
            Ok(Ok(notes)) if sent => {
                notes.iter().for_each(|note| say(note));
                Ok(Output::Done)
            }
            Ok(Err(mistakes)) => Err(OperatorError::Reload(mistakes)),
            _ => Err(OperatorError::Agent("it is stopping".into())),
        };
    }
    let (config, tokens, audit) = (&setup.config, &setup.tokens, &agent.audit);
    let operator = Operator { config, tokens, audit, identity: &identity, rule: &rule.name };
    Ok(operator.run(command, say).await?)
}

/// Does what whoever runs this asks for: in the agent, if one runs, else with a process of its own for the device.
pub async fn run(config: &Config, command: Command, say: Say<'_>) -> Result<Output, OperatorError> {
    if let Some(stream) = running(config).await? {
        return tell(stream, Asked::Command(command), say).await;
    }
    if matches!(command, Command::Reload) {
        return Err(OperatorError::NoAgent);
    }
    let ask =
        |token: &str| rpassword::prompt_password(format!("PIN for token {token}: ")).ok().and_then(Pin::new);
    alone(config, &command, say, &ask).await
}

/// The operators' socket of the agent that runs, if one does.
async fn running(config: &Config) -> Result<Option<UnixStream>, OperatorError> {
    let closed = || OperatorError::Agent("you may not use its operators' socket, or it has none".into());
    let begun = Instant::now();
    loop {
        if let Some(path) = &config.listen.operator {
            match UnixStream::connect(path).await {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(closed()),
                Err(_) => {}
            }
        }
        let Some(unix) = &config.listen.unix else { return Ok(None) };
        if UnixStream::connect(&unix.path).await.is_err() {
            return Ok(None);
        }
        // It may be systemd that answers, and starts the agent now.
        if config.listen.operator.is_none() || begun.elapsed() > PATIENCE {
            return Err(closed());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn tell(mut stream: UnixStream, asked: Asked, say: Say<'_>) -> Result<Output, OperatorError> {
    let lost = |error: io::Error| OperatorError::Agent(format!("it does not answer: {error}"));
    let ask = Ask { version: env!("CARGO_PKG_VERSION").to_owned(), asked };
    // Strangers are answered before they ask; what was said before it hung up can still be read.
    let _ = send(&mut stream, &ask).await;
    loop {
        let frame = timeout(ANSWER, wire::read_async(&mut stream)).await;
        let frame = frame.map_err(|error| lost(error.into()))?.map_err(lost)?;
        match serde_json::from_slice(&frame).map_err(|error| lost(error.into()))? {
            Answer::Say(message) => say(&message),
            Answer::Done(done) => return done.map_err(OperatorError::Told),
        }
    }
}

/// Without an agent. `ask` is asked for the PINs of tokens that want one typed.
pub async fn alone(
    config: &Config,
    command: &Command,
    say: Say<'_>,
    ask: &dyn Fn(&str) -> Option<Pin>,
) -> Result<Output, OperatorError> {
    let (identity, rule, audit) = owner(config)?;
    let (mut tokens, mut failed) = (BTreeMap::new(), None);
    for name in command.tokens(config) {
        let Some(configured) = config.tokens.get(name) else { continue };
        let token = Token::start(name, configured.clone(), Vec::new(), Vec::new(), &config.audit.directory);
        if let Err(error) = open(&token, say, ask).await {
            failed = failed.or(Some(error));
        }
        tokens.insert(name.to_owned(), token);
    }
    let operator = Operator { config, tokens: &tokens, audit: &audit, identity: &identity, rule };
    let done = match failed {
        // A list says itself what is with each token.
        Some(error) if !matches!(command, Command::List(_)) => Err(error),
        _ => operator.run(command, say).await.map_err(OperatorError::from),
    };
    for token in tokens.values() {
        token.stop().await;
    }
    // The next command may follow at once.
    audit.close();
    done
}

/// Who runs this.
pub(crate) fn own_identity() -> Identity {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Identity::from_unix(uid, gid, None)
}

/// Who runs this, the rule that lets them, and the log. Whoever holds that owns the devices: an agent wherever it
/// listens, or another command.
fn owner(config: &Config) -> Result<(Identity, &str, Audit), OperatorError> {
    let identity = own_identity();
    let rule = allowed(&config.operators, &identity).ok_or(OperatorError::NotOperator)?;
    let audit = Audit::open(&config.audit).map_err(OperatorError::Log)?;
    Ok((identity, &rule.name, audit))
}

/// Waits for a token's device; asks for the PIN if it has to.
async fn open(token: &Token, say: Say<'_>, ask: &dyn Fn(&str) -> Option<Pin>) -> Result<(), OperatorError> {
    let name = &token.name;
    let failed = |reason: String| OperatorError::Token { token: name.clone(), reason };
    if let Some(locked) = token.locked_by_operator() {
        return Err(failed(locked));
    }
    if token.pin().is_by_hand() {
        let pin = match token.pin() {
            PinSource::Device => {
                say(&format!("enter the PIN of token {name} on the device"));
                None
            }
            _ => Some(ask(name).ok_or_else(|| OperatorError::NoTerminal(name.clone()))?),
        };
        let unlocked = token.unlock(pin, Instant::now() + OPEN + BY_HAND).await;
        unlocked.map_err(|error| failed(error.to_string()))?;
    }
    match timeout(OPEN, token.settled()).await {
        Ok(State::Ready(_)) => Ok(()),
        Ok(State::Locked(reason) | State::Down(reason)) => Err(failed(reason)),
        Ok(State::Starting) | Err(_) => Err(failed("it does not open".into())),
    }
}

async fn send(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    // It may hold secrets, which a vector that grows would leave behind.
    let mut text = Zeroizing::new(Vec::with_capacity(4096));
    serde_json::to_writer(&mut *text, message)?;
    let mut frame = Zeroizing::new(Vec::with_capacity(text.len() + 4));
    wire::put_bytes(&mut frame, &text);
    stream.write_all(&frame).await
}
