//! The daemon from start to stop.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use omsign_proto::v1::FILE_DESCRIPTOR_SET;
use omsign_proto::v1::agent_service_server::AgentServiceServer;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::LayerExt as _;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::agent::Agent;
use crate::algorithm::Padding;
use crate::audit::Audit;
use crate::config::{self, Config, Key, KeyUri, Listen, PRIVATE_RULE, PinSource};
use crate::connection::Connection;
use crate::health;
use crate::intake;
use crate::listen::{ListenError, Listeners, SocketFiles};
use crate::operator;
use crate::pin::BY_HAND;
use crate::policy::{Match, Rule};
use crate::reload::Reload;
use crate::secret::Pin;
use crate::server::{DEADLINE, Service};
use crate::tls::Tls;
use crate::token::{State, Token};

/// The one key of a private agent, and its token, whose name no section can have.
const PRIVATE_KEY: &str = "key";
const PRIVATE_TOKEN: &str = "key:";

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
    tls.iter().for_each(|tls| tls.warn());
    // Of two agents that start together, one has the log and the devices; its sockets are not taken from it.
    let audit = Audit::open(&config.audit).map_err(ServeError::Audit)?;
    let listeners = Listeners::bind(&config.listen, tls.as_ref())?;
    let operators = config.listen.operator.as_ref().map(|path| operator::bind(path, &config.operators));
    let (operators, operators_file) = operators.transpose()?.unzip();
    let _removed = SocketFiles(operators_file.iter().cloned().collect());
    let (listen, audit_config) = (config.listen.clone(), config.audit.clone());
    let agent = Arc::new(Agent::start(config, audit));
    let opened: Vec<_> = agent.setup().tokens.values().cloned().collect();
    let required: Vec<_> = opened.iter().filter(|token| token.is_required()).cloned().collect();
    tokio::spawn(ask_for_pins(opened.clone()));
    let incoming = ReceiverStream::new(listeners.accept());
    let (missing, failed) = tokio::sync::oneshot::channel();
    let stop = async move {
        let ready = async {
            for token in required {
                if let Err(error) = ready(&token).await {
                    let Some(locked) = refused(&opened).await else {
                        let _ = missing.send(error);
                        return;
                    };
                    tracing::error!(%error, "it runs all the same: the PIN of token {locked} was refused");
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
    let shutdown_timeout = listen.shutdown_timeout;
    let reload = Reload {
        path: path.to_owned(),
        listen,
        operators_file,
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
    match token.settled().await {
        State::Down(reason) => Err(ServeError::Required { token: token.name.clone(), reason }),
        // Where it is locked only an operator helps, and can with an agent that runs. Ending would offer the PIN again at each
        // restart.
        State::Ready(_) | State::Starting | State::Locked(_) => Ok(()),
    }
}

/// A token whose PIN was refused, once all have been opened, or not: whoever starts this agent again would have it offered
/// once more, and at each start.
async fn refused(tokens: &[Arc<Token>]) -> Option<&str> {
    for token in tokens {
        token.settled().await;
    }
    let refused = |token: &&Arc<Token>| !token.pin().is_by_hand() && token.refused_source().is_some();
    tokens.iter().find(refused).map(|token| token.name.as_str())
}

/// Runs a private agent for the process at the other end of `socket`, for the key that a URI names,
/// until that process closes it.
pub async fn one_shot(uri: &str, socket: std::os::unix::net::UnixStream) -> Result<(), ServeError> {
    let config = private_config(uri)?;
    let audit = Audit::open_own(&config.audit).map_err(ServeError::Audit)?;
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
        tokens: vec![PRIVATE_TOKEN.into()],
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
        tokens: BTreeMap::from([(PRIVATE_TOKEN.to_owned(), token)]),
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
    let denied = Arc::clone(&agent);
    tokio::spawn(async move { denied.record_denials_later().await });
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
    let watched = Arc::clone(&agent);
    let stop = async move {
        stop.await;
        // Whoever watches is told so, and waits for nothing more: their streams end.
        health::ends(&watched, reporter).await;
        stopping.send_replace(true);
    };
    let (serving, working) = (Arc::clone(&agent), Arc::clone(&agent));
    let service = AgentServiceServer::new(Service(agent)).max_decoding_message_size(intake::LARGEST);
    let server = Server::builder()
        // Of a request that never comes to its end nothing is kept for ever.
        .timeout(DEADLINE + Duration::from_secs(10))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .max_concurrent_streams(intake::STREAMS)
        .http2_max_header_list_size(intake::HEADERS)
        .layer(intake::shared())
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
        let stop = |token: &Arc<Token>| {
            let token = Arc::clone(token);
            tokio::spawn(async move { token.stop().await })
        };
        // Side by side: none is left open because another one hangs.
        let stopping: Vec<_> = serving.setup().tokens.values().map(stop).collect();
        let closed = async {
            for token in stopping {
                let _ = token.await;
            }
        };
        tokio::join!(serving.record_denials(), closed);
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

/// Whether the terminal is ours: from the background, asking at it or setting it would stop the whole agent.
pub fn is_in_the_foreground() -> bool {
    rustix::termios::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// `pin = "prompt"` and `pin = "device"`: asked for here when somebody sits at a terminal; else the token waits for an
/// operator.
async fn ask_for_pins(tokens: Vec<Arc<Token>>) {
    let here = std::io::stdin().is_terminal() && is_in_the_foreground();
    for token in tokens.iter().filter(|token| token.pin().is_by_hand()) {
        if token.locked_by_operator().is_some() {
            continue;
        }
        if !here {
            tracing::warn!(token = %token.name, "token waits for its PIN: {}", token.how_to_unlock());
            continue;
        }
        let mut pin = None;
        if *token.pin() == PinSource::Device {
            tracing::warn!(token = %token.name, "enter its PIN on the device");
        } else {
            let question = format!("PIN for token {}: ", token.name);
            let asked = tokio::task::spawn_blocking(move || rpassword::prompt_password(question)).await;
            let Ok(Ok(Some(typed))) = asked.map(|asked| asked.map(Pin::new)) else { continue };
            pin = Some(typed);
        }
        if let Err(error) = token.unlock(pin, Instant::now() + Duration::from_secs(120) + BY_HAND).await {
            tracing::error!(token = %token.name, %error, "token is not unlocked");
        }
    }
}
