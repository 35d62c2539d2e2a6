//! The gRPC client of the agent. Blocking: there is one caller and one thing to wait for.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use omsign_proto::v1::agent_service_client::AgentServiceClient;
pub use omsign_proto::v1::sign_request::Content;
use omsign_proto::v1::sign_response::Event;
use omsign_proto::v1::{
    GetKeyRequest, Key, KeyState, LARGEST_STATEMENT_BYTES, ListKeysRequest, ListTokensRequest,
    LockTokenRequest, RETRY_PUSHBACK, SignRequest, Token, UnlockTokenRequest,
};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tower::service_fn;
use zeroize::Zeroizing;

use crate::address::Address;
use crate::tls;

/// How long a question about keys may take.
const ASK: Duration = Duration::from_secs(30);

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a signature may take: somebody may have to touch a key.
const SIGN: Duration = Duration::from_secs(120);

/// The first pause before a request is sent again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nobody answers there.
    #[error("no agent answers at {at}: {reason}")]
    NotRunning {
        /// Where.
        at: String,
        /// What the connection said.
        reason: String,
    },
    /// Its socket is there, and not for us.
    #[error("no permission to connect to {0}")]
    NoPermission(PathBuf),
    /// A file for TLS cannot be used.
    #[error("{path}: {reason}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Somebody answers there, and does not prove to be the agent.
    #[error("the certificate of whoever answers at {at} is not taken: {reason}")]
    Untrusted {
        /// Where.
        at: String,
        /// Why.
        reason: String,
    },
    /// The address is neither a path nor an https URL.
    #[error("{0:?} is not the address of an agent; expected a socket path or https://HOST:PORT")]
    Address(String),
    /// An https address without the files that it needs.
    #[error("an agent at an https address needs --agent-ca, --agent-certificate and --agent-key")]
    Credentials,
    /// The agent said no.
    #[error("the agent refused: {}", .0.message())]
    Status(Status),
    /// The key is there, but cannot sign now.
    #[error("key {key} cannot sign: {reason}")]
    KeyNotReady {
        /// Its name.
        key: String,
        /// The name of its token.
        token: String,
        /// Whether an operator has to unlock the token.
        locked: bool,
        /// Why.
        reason: String,
    },
    /// A key that signs no digests.
    #[error(
        "the key signs statements, of at most {bytes} bytes, and the one of so many files is longer",
        bytes = LARGEST_STATEMENT_BYTES
    )]
    Statement,
    /// The agent ended the stream without an answer, or answered nonsense.
    #[error("the agent answered {0}")]
    Answer(String),
    /// The connection ended instead.
    #[error("the agent answered nothing: {0}")]
    Broken(String),
    /// A private agent could not be started.
    #[error("cannot start omsign-agent: {0}")]
    Start(String),
    /// The token asks for a PIN, and nobody is there to give it.
    #[error("the token needs a PIN, and there is no terminal to ask at")]
    NoPin,
    /// A PIN was to be asked for, and nobody is there.
    #[error("there is no terminal to ask for a PIN at")]
    NoTerminal,
    /// A private agent could not use the key.
    #[error("{0}")]
    Private(String),
    /// The system failed us.
    #[error(transparent)]
    System(#[from] std::io::Error),
}

/// A connection to an agent.
pub struct Agent {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    /// Whether one that ended may be started again.
    comes_back: bool,
}

impl Agent {
    /// Connects.
    pub fn connect(address: &Address) -> Result<Self, AgentError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let not_running = |reason: String| AgentError::NotRunning { at: address.to_string(), reason };
        let channel = match address {
            Address::Unix(path) => {
                // What connect(2) says comes back as text only.
                if rustix::fs::access(path, rustix::fs::Access::WRITE_OK) == Err(rustix::io::Errno::ACCESS) {
                    return Err(AgentError::NoPermission(path.clone()));
                }
                // The URI is not used, but has to be one.
                let endpoint = Endpoint::from_static("http://agent.localhost").connect_timeout(CONNECT);
                let path = path.clone();
                let connector = service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { UnixStream::connect(path).await.map(TokioIo::new) }
                });
                runtime.block_on(endpoint.connect_with_connector(connector))
            }
            Address::Tls { url, credentials } => {
                let endpoint =
                    Endpoint::from_shared(url.clone()).map_err(|_| AgentError::Address(url.clone()))?;
                let tls = tls::config(credentials)?;
                let endpoint = endpoint.tls_config(tls).map_err(|error| AgentError::Tls {
                    path: credentials.certificate.clone(),
                    reason: deepest(&error),
                })?;
                let endpoint = endpoint.connect_timeout(CONNECT).tcp_nodelay(true);
                // tonic's own limit ends with TCP's handshake; TLS's may never come.
                match runtime.block_on(async { timeout(CONNECT, endpoint.connect()).await }) {
                    Ok(Err(error)) if let Some(reason) = tls::untrusted(&error, credentials) => {
                        return Err(AgentError::Untrusted { at: url.clone(), reason });
                    }
                    Ok(channel) => channel,
                    Err(_) => {
                        let seconds = CONNECT.as_secs();
                        return Err(not_running(format!("it does not answer within {seconds} s")));
                    }
                }
            }
        };
        let channel = channel.map_err(|error| not_running(deepest(&error)))?;
        Ok(Self { channel, runtime, comes_back: true })
    }

    /// Talks over a socketpair whose other end is a private agent.
    pub fn over(socket: std::os::unix::net::UnixStream) -> Result<Self, AgentError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        socket.set_nonblocking(true)?;
        let mut socket = Some(socket);
        let connector = service_fn(move |_: Uri| {
            let socket = socket.take();
            async move {
                let socket = socket.ok_or_else(|| std::io::Error::other("the private agent is gone"))?;
                UnixStream::from_std(socket).map(TokioIo::new)
            }
        });
        let endpoint = Endpoint::from_static("http://agent.localhost");
        let channel = runtime
            .block_on(endpoint.connect_with_connector(connector))
            .map_err(|error| AgentError::Start(deepest(&error)))?;
        Ok(Self { channel, runtime, comes_back: false })
    }

    /// The keys that we may use.
    pub fn list_keys(&self) -> Result<Vec<Key>, AgentError> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.list_keys(within(ASK, ListKeysRequest {})))?;
        Ok(answer.into_inner().keys)
    }

    /// One key. Waits for a token that is being opened.
    pub fn get_key(&self, name: &str) -> Result<Key, AgentError> {
        let started = Instant::now();
        loop {
            // The agent answers when the token's state changes, or after a few seconds.
            let key = self.ask_for_key(name)?;
            if key.state() != KeyState::Starting || started.elapsed() > SIGN {
                return Ok(key);
            }
        }
    }

    fn ask_for_key(&self, name: &str) -> Result<Key, AgentError> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let request = within(ASK, GetKeyRequest { name: name.to_owned() });
        let answer = self.runtime.block_on(client.get_key(request))?.into_inner();
        answer.key.ok_or_else(|| AgentError::Answer("without a key".into()))
    }

    /// One key, which must be able to sign.
    pub fn ready_key(&self, name: &str) -> Result<Key, AgentError> {
        let key = self.get_key(name)?;
        match key.state() {
            KeyState::Ready if !key.public_key.is_empty() => Ok(key),
            state => Err(AgentError::KeyNotReady {
                key: key.name,
                token: key.tokens.into_iter().next().unwrap_or_default(),
                locked: state == KeyState::Locked,
                reason: if state == KeyState::Starting {
                    "its token is being opened".into()
                } else {
                    key.state_detail
                },
            }),
        }
    }

    /// Has a digest or a statement signed. `waiting` is told what is waited for, if it takes a while. What passes by itself is
    /// asked for again until `patience` is over: to hash the model once more would take longer.
    pub fn sign(
        &self,
        key: &str,
        content: Content,
        context: &str,
        patience: Duration,
        waiting: &dyn Fn(&str),
    ) -> Result<Vec<u8>, AgentError> {
        let mut request_id = vec![0; 16];
        getrandom::fill(&mut request_id).map_err(|error| AgentError::System(std::io::Error::other(error)))?;
        let context = context.chars().take(256).collect();
        let request = SignRequest { key: key.to_owned(), request_id, content: Some(content), context };
        let (until, mut pause) = (Instant::now() + patience, PAUSES.0);
        loop {
            // The same request: of an agent that was not started anew, a signature that got lost on its way is no second one.
            match self.ask_to_sign(request.clone(), waiting) {
                Err(error) if self.passes(&error) && Instant::now() + pause < until => {
                    if pause == PAUSES.0 {
                        waiting(&format!("{error}; asking again for {} s", patience.as_secs()));
                    }
                    std::thread::sleep(error.retry_after().unwrap_or(pause).min(PAUSES.1));
                }
                done => return done,
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Whether the same request may be answered soon, without anybody's doing.
    fn passes(&self, error: &AgentError) -> bool {
        match error {
            AgentError::Broken(_) => self.comes_back,
            AgentError::Status(status) => {
                matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
            }
            _ => false,
        }
    }

    fn ask_to_sign(&self, request: SignRequest, waiting: &dyn Fn(&str)) -> Result<Vec<u8>, AgentError> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let signing = async {
            let mut events = client.sign(within(SIGN, request)).await?.into_inner();
            while let Some(event) = events.message().await? {
                match event.event {
                    Some(Event::Queued(queued)) => waiting(&queued.reason),
                    Some(Event::Touch(touch)) => waiting(&touch.message),
                    Some(Event::Signed(signed)) => return Ok(signed.signature),
                    // An event of a later version of the contract.
                    None => {}
                }
            }
            Err(AgentError::Answer("without a signature".into()))
        };
        // tonic's own clock stops at the first event, and an agent that was stopped sends no other.
        let late = || AgentError::Answer(format!("nothing within {} s", SIGN.as_secs()));
        self.runtime.block_on(async { timeout(SIGN, signing).await.unwrap_or_else(|_| Err(late())) })
    }

    /// The tokens that we may know of.
    pub fn list_tokens(&self) -> Result<Vec<Token>, AgentError> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.list_tokens(within(ASK, ListTokensRequest {})))?;
        Ok(answer.into_inner().tokens)
    }

    /// Has a token logged in, with this PIN or with its configured source.
    pub fn unlock(&self, token: &str, pin: Option<Zeroizing<String>>) -> Result<(), AgentError> {
        let pin = pin.map(|pin| pin.as_str().to_owned());
        let mut client = AgentServiceClient::new(self.channel.clone());
        let request = within(SIGN, UnlockTokenRequest { token: token.to_owned(), pin });
        self.runtime.block_on(client.unlock_token(request))?;
        Ok(())
    }

    /// Has a token closed until it is unlocked.
    pub fn lock(&self, token: &str) -> Result<(), AgentError> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let request = within(SIGN, LockTokenRequest { token: token.to_owned() });
        self.runtime.block_on(client.lock_token(request))?;
        Ok(())
    }

    /// Whether a service of the agent is serving, by grpc.health.v1; `""` is the agent itself.
    pub fn health(&self, service: &str) -> Result<bool, AgentError> {
        let mut client = HealthClient::new(self.channel.clone());
        let request = within(ASK, HealthCheckRequest { service: service.to_owned() });
        let answer = self.runtime.block_on(client.check(request))?.into_inner();
        Ok(answer.status() == ServingStatus::Serving)
    }
}

/// A request with a deadline, which the agent also learns.
fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

impl AgentError {
    /// When the agent says to come again.
    fn retry_after(&self) -> Option<Duration> {
        let Self::Status(status) = self else { return None };
        let said = status.metadata().get(RETRY_PUSHBACK)?.to_str().ok()?;
        said.parse().ok().map(Duration::from_millis)
    }
}

impl From<Status> for AgentError {
    fn from(status: Status) -> Self {
        // tonic reports a broken connection as a status of its own making, with a cause.
        if std::error::Error::source(&status).is_some() {
            return Self::Broken(deepest(&status));
        }
        Self::Status(status)
    }
}

/// The cause at the bottom, which says most.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
