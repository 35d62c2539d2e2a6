//! The daemon from start to stop.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use omsign_proto::v1::FILE_DESCRIPTOR_SET;
use omsign_proto::v1::agent_service_server::AgentServiceServer;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::LayerExt as _;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::agent::Agent;
use crate::algorithm::Padding;
use crate::audit::Audit;
use crate::config::{self, Config, Key, KeyUri, Listen, PRIVATE_RULE};
use crate::health;
use crate::intake;
use crate::key_life::how_to_unlock;
use crate::listen::{Connection, ListenError, Listeners, SocketFiles};
use crate::operator::{self, Reloaded};
use crate::policy::{Match, Rule};
use crate::secret::Pin;
use crate::server::{DEADLINE, Service};
use crate::tls::Tls;
use crate::token::{State, Token};

/// How long a configuration may take to be read, with its certificates and users.
const LOAD: Duration = Duration::from_secs(30);

/// The one key of a private agent.
const PRIVATE_KEY: &str = "key";

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The audit log cannot be opened.
    #[error("nothing is signed without an audit log")]
    Audit(#[source] std::io::Error),
    /// A token that is `required`.
    #[error("token {token} is required, and cannot be opened: {reason}")]
    Required {
        /// Its name.
        token: String,
        /// Why.
        reason: String,
    },
    /// A URI that names no key.
    #[error("{0}")]
    Uri(String),
    /// A terminal, socket or signal handler failed.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// The gRPC server ended.
    #[error("the gRPC server ended")]
    Grpc(#[from] tonic::transport::Error),
}

/// Runs the daemon until SIGTERM or SIGINT. SIGHUP has it read its configuration, from `path`, anew.
pub async fn serve(config: Config, path: &Path) -> Result<(), ServeError> {
    // First: who sees the socket may send a signal, and is not to end an agent that leaves its files behind.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let hangup = signal(SignalKind::hangup())?;
    let tls = config.listen.tls.as_ref().map(Tls::load).transpose().map_err(ListenError::from)?.map(Arc::new);
    let listeners = Listeners::bind(&config.listen, tls.as_ref())?;
    let audit = Audit::open(&config.audit).map_err(ServeError::Audit)?;
    let (operators, _operators_file) = match &config.listen.operator {
        Some(path) => (Some(operator::bind(path, &config.operators)?), SocketFiles(vec![path.clone()])),
        None => (None, SocketFiles::default()),
    };
    let shutdown_timeout = config.listen.shutdown_timeout;
    let (listen, audit_config) = (config.listen.clone(), config.audit.clone());
    let required: Vec<_> =
        config.tokens.iter().filter(|(_, token)| token.required).map(|(name, _)| name.clone()).collect();
    let agent = Arc::new(Agent::start(config, audit));
    let tokens = &agent.setup().tokens;
    tokio::spawn(ask_for_pins(tokens.values().cloned().collect()));
    let incoming = ReceiverStream::new(listeners.accept());
    let required: Vec<_> = required.iter().filter_map(|name| tokens.get(name)).cloned().collect();
    let (missing, failed) = tokio::sync::oneshot::channel();
    let stop = async move {
        let ready = async {
            for token in required {
                if let Err(error) = ready(&token).await {
                    let _ = missing.send(error);
                    return;
                }
            }
            // Without systemd there is nobody to tell.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = ready => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: no new requests, those in flight are finished");
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    };
    let (ask, asked) = mpsc::channel(1);
    let served = operators.map(|socket| tokio::spawn(operator::serve(socket, Arc::clone(&agent), ask)));
    let reload = Reload {
        path: path.to_owned(),
        listen,
        tls,
        audit: audit_config,
        hangup,
        reading: Arc::new(Semaphore::new(1)),
        asked,
    };
    run(agent, incoming, shutdown_timeout, stop, Some(reload)).await?;
    if let Some(served) = served {
        served.abort();
    }
    match failed.await {
        Ok(error) => Err(error),
        Err(_) => Ok(()),
    }
}

/// Waits for a token that has to be there.
async fn ready(token: &Token) -> Result<(), ServeError> {
    loop {
        let change = token.watch();
        match token.state() {
            State::Ready => return Ok(()),
            State::Starting => drop(change.await),
            // Only an operator helps, and can with an agent that runs. Ending would offer the PIN again at each restart.
            State::Locked(_) => return Ok(()),
            State::Down(reason) => {
                return Err(ServeError::Required { token: token.name.clone(), reason });
            }
        }
    }
}

/// Runs a private agent for the process at the other end of `socket`, for the key that a URI names,
/// until that process closes it.
pub async fn one_shot(uri: &str, socket: std::os::unix::net::UnixStream) -> Result<(), ServeError> {
    let config = private_config(uri)?;
    // A file for each call: private agents of one user may run side by side.
    let name = format!(
        "one-shot-{}-{}.jsonl",
        humantime::format_rfc3339_micros(SystemTime::now()),
        std::process::id()
    );
    let audit = Audit::open_own(&config.audit, &name).map_err(ServeError::Audit)?;
    let agent = Arc::new(Agent::start(config, audit));
    let (closed, end) = tokio::sync::oneshot::channel();
    let connection = Connection::private(socket, closed)?;
    // Its stream of connections has this one and stays open: tonic would take its end for ours.
    let incoming = tokio_stream::once(Ok(connection)).chain(tokio_stream::pending());
    let stop = async { drop(end.await) };
    run(agent, incoming, Duration::ZERO, stop, None).await
}

fn private_config(uri: &str) -> Result<Config, ServeError> {
    let KeyUri { device, object, pcrs, pin, owner_auth } =
        KeyUri::parse(uri).map_err(|error| ServeError::Uri(error.to_string()))?;
    let token = config::Token {
        device,
        pin,
        owner_auth,
        sessions: 1,
        timeout: Duration::from_secs(60),
        queue: 16,
        required: false,
        touch_command: Vec::new(),
        directory: std::path::PathBuf::from("."),
        env: BTreeMap::new(),
        hidden_env: Vec::new(),
    };
    let own = Rule { name: PRIVATE_RULE.into(), matches: Match::Uid(rustix::process::geteuid().as_raw()) };
    let key = Key {
        tokens: vec![PRIVATE_KEY.into()],
        object,
        next: None,
        previous: Vec::new(),
        padding: Padding::Pkcs1,
        pcrs,
        certificate_chain: Vec::new(),
        allow: vec![own.clone()],
    };
    let audit =
        config::Audit { directory: config::default_audit_directory(), durability: config::Durability::Fsync };
    Ok(Config {
        listen: Listen::default(),
        audit,
        tokens: BTreeMap::from([(PRIVATE_KEY.to_owned(), token)]),
        keys: BTreeMap::from([(PRIVATE_KEY.to_owned(), key)]),
        operators: vec![own],
    })
}

async fn run(
    agent: Arc<Agent>,
    incoming: impl Stream<Item = std::io::Result<Connection>> + Send + 'static,
    shutdown_timeout: Duration,
    stop: impl Future<Output = ()> + Send + 'static,
    reload: Option<Reload>,
) -> Result<(), ServeError> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    reporter.set_service_status(health::SERVICE, ServingStatus::Serving).await;
    tokio::spawn(health::of_audit(Arc::clone(&agent), reporter.clone()));
    for token in agent.setup().tokens.values() {
        tokio::spawn(health::of_token(Arc::clone(token), Arc::clone(&agent), reporter.clone()));
    }
    if let Some(reload) = reload {
        tokio::spawn(reload.run(Arc::clone(&agent), reporter.clone()));
    }
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    const COMPILED: &str = "the descriptors were compiled with this binary";
    let reflection = described().build_v1().expect(COMPILED);
    // The older version is all that gRPC's own Python client knows.
    let older_reflection = described().build_v1alpha().expect(COMPILED);
    let (stopping, mut stopped) = tokio::sync::watch::channel(false);
    let stop = async move {
        stop.await;
        stopping.send_replace(true);
    };
    let (serving, working) = (Arc::clone(&agent), Arc::clone(&agent));
    let service = AgentServiceServer::new(Service(agent)).max_decoding_message_size(intake::LARGEST);
    let server = Server::builder()
        // Of a request that never comes to its end nothing is kept for ever.
        .timeout(DEADLINE + Duration::from_secs(10))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .max_concurrent_streams(256)
        .add_service(health_service.max_decoding_message_size(intake::SMALL))
        .add_service(reflection.max_decoding_message_size(intake::SMALL))
        .add_service(older_reflection.max_decoding_message_size(intake::SMALL))
        .add_service(intake::metered().named_layer(service))
        .serve_with_incoming_shutdown(incoming, stop);
    let overdue = async {
        if stopped.wait_for(|stopping| *stopping).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(shutdown_timeout).await;
    };
    let ended = tokio::select! {
        ended = server => ended,
        () = overdue => {
            tracing::warn!("requests were still in flight at the end of shutdown_timeout; they are dropped");
            Ok(())
        }
    };
    let close = async {
        for token in serving.setup().tokens.values() {
            token.stop().await;
        }
    };
    // What operators have begun is finished and recorded first.
    let operators = u32::try_from(operator::CONNECTIONS).unwrap_or(u32::MAX);
    if timeout(shutdown_timeout, working.operators.acquire_many(operators)).await.is_err() {
        tracing::warn!(
            "an operator's command was still at work at the end of shutdown_timeout; it is dropped"
        );
    }
    let _ = timeout(Duration::from_secs(5), close).await;
    Ok(ended?)
}

/// How the configuration is read anew.
struct Reload {
    path: PathBuf,
    /// What cannot be changed while it runs, as it was at the start.
    listen: Listen,
    audit: config::Audit,
    /// But not what is in these files.
    tls: Option<Arc<Tls>>,
    hangup: Signal,
    /// One at a time, also where the one before had its time and goes on.
    reading: Arc<Semaphore>,
    /// Operators who wait for it.
    asked: mpsc::Receiver<Reloaded>,
}

impl Reload {
    /// At each signal, and whenever an operator asks.
    async fn run(mut self, agent: Arc<Agent>, reporter: HealthReporter) {
        loop {
            tokio::select! {
                Some(()) = self.hangup.recv() => {
                    if let Err(mistakes) = self.once(&agent, &reporter).await {
                        tracing::error!(mistakes, "the configuration is not reloaded");
                    }
                }
                Some(done) = self.asked.recv() => {
                    // An operator who hung up needs no answer.
                    let _ = done.send(self.once(&agent, &reporter).await);
                }
                else => return,
            }
        }
    }

    /// A configuration with mistakes changes nothing.
    async fn once(&self, agent: &Arc<Agent>, reporter: &HealthReporter) -> Result<Vec<String>, String> {
        let (path, tls) = (self.path.clone(), self.tls.clone());
        let busy = |_| "the files of a reload before this one are still being read".to_owned();
        let reading = Arc::clone(&self.reading).try_acquire_owned().map_err(busy)?;
        // The user database may be a slow directory server.
        let loaded = tokio::task::spawn_blocking(move || {
            let config = Config::load(&path).map_err(|mistakes| {
                mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            })?;
            // Other files take a restart, and those of before may be gone.
            let tls = tls.filter(|tls| tls.is_for(config.listen.tls.as_ref()));
            let files = tls.map(|tls| tls.read()).transpose().map_err(|error| error.to_string())?;
            drop(reading);
            Ok::<_, String>((config, files))
        });
        let late =
            |_| "the configuration could not be read in time; the user database may not answer".to_owned();
        let (config, files) =
            timeout(LOAD, loaded).await.map_err(late)?.map_err(|error| error.to_string())??;
        if let Some((tls, files)) = self.tls.as_ref().zip(files) {
            tls.renew(files);
        }
        let mut notes = Vec::new();
        let sections = [("[listen]", config.listen != self.listen), ("[audit]", config.audit != self.audit)];
        for (section, _) in sections.iter().filter(|(_, changed)| *changed) {
            let note = format!("{section} changed, which takes a restart of the agent");
            tracing::warn!("{note}");
            notes.push(note);
        }
        if let Some(path) = &self.listen.operator {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(operator::mode(&config.operators));
            if let Err(error) = std::fs::set_permissions(path, mode) {
                tracing::warn!(%error, "who can connect to the operators' socket could not be changed");
            }
        }
        let (closed, new) = agent.reload(config);
        // A certificate may say now whose key it is.
        agent.setup().keys.values().for_each(|key| key.check());
        tracing::info!(closed = closed.len(), opened = new.len(), "the configuration is reloaded");
        for token in new.iter().filter(|token| token.wants_prompt()) {
            let note = format!("is opened anew and waits for its PIN: {}", how_to_unlock(&token.name));
            tracing::warn!(token = %token.name, "it {note}");
            notes.push(format!("token {} {note}", token.name));
        }
        for token in closed {
            let (mut reporter, agent) = (reporter.clone(), Arc::clone(agent));
            tokio::spawn(async move {
                token.close().await;
                // There may be one of this name again.
                if !agent.setup().tokens.contains_key(&token.name) {
                    reporter.clear_service_status(&format!("token.{}", token.name)).await;
                }
            });
        }
        for token in new {
            tokio::spawn(health::of_token(token, Arc::clone(agent), reporter.clone()));
        }
        Ok(notes)
    }
}

/// Whether the terminal is ours: from the background, asking at it or setting it would stop the whole agent.
pub fn is_in_the_foreground() -> bool {
    rustix::termios::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// `pin = "prompt"`: asked here when somebody sits at a terminal; else the token waits for an operator.
async fn ask_for_pins(tokens: Vec<Arc<Token>>) {
    if !std::io::stdin().is_terminal() || !is_in_the_foreground() {
        return;
    }
    for token in tokens.iter().filter(|token| token.wants_prompt()) {
        let question = format!("PIN for token {}: ", token.name);
        let asked = tokio::task::spawn_blocking(move || rpassword::prompt_password(question)).await;
        let Ok(Ok(Some(pin))) = asked.map(|asked| asked.map(Pin::new)) else { continue };
        if let Err(error) = token.unlock(Some(pin), Instant::now() + Duration::from_secs(120)).await {
            tracing::error!(token = %token.name, %error, "token is not unlocked");
        }
    }
}
