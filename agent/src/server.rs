//! The gRPC service: identify, authorise, sign, record, release.

use std::collections::BTreeMap;
use std::pin::Pin as Pinned;
use std::sync::Arc;
use std::time::Duration;

use omsign_proto::v1::agent_service_server::AgentService;
use omsign_proto::v1::sign_request::Content;
use omsign_proto::v1::sign_response::Event;
use omsign_proto::v1::{
    GetKeyRequest, GetKeyResponse, Key, KeyState, ListKeysRequest, ListKeysResponse, Queued, SignRequest,
    SignResponse, Signed, UnlockTokenRequest, UnlockTokenResponse,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::audit::{self, Audit, Entry};
use crate::config::{Config, ObjectSelector};
use crate::identity::Identity;
use crate::policy::{Rule, allowed};
use crate::replay::{Begin, Follow, Outcome, Replay};
use crate::secret::Pin;
use crate::token::{State, Token, TokenError};

/// A request without a deadline of its own gets this one: a person may have to touch something.
const DEADLINE: Duration = Duration::from_secs(120);

/// A caller that waits for two of these ticks is told what for. One clock serves all requests: a timer for
/// each would wake the event loop once more per signature.
const TICK: Duration = Duration::from_millis(100);

/// The longest that questions about keys wait for a token that starts.
const SETTLE: Duration = Duration::from_secs(5);

/// The least time that the audit log gets.
const RECORD: Duration = Duration::from_secs(5);

/// Longest `context`, in bytes.
const CONTEXT_BYTES: usize = 1024;

/// Everything that requests share.
pub(crate) struct Agent {
    pub(crate) tokens: BTreeMap<String, Arc<Token>>,
    keys: BTreeMap<Arc<str>, KeyEntry>,
    operators: Vec<Rule>,
    audit: Audit,
    replay: Replay,
    ticks: watch::Sender<u64>,
}

struct KeyEntry {
    name: Arc<str>,
    token: Arc<Token>,
    /// Index among the token's keys.
    index: usize,
    certificate_chain: Vec<Vec<u8>>,
    allow: Vec<Rule>,
}

/// The service that tonic serves; a handle.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) Arc<Agent>);

impl Agent {
    /// Starts every token.
    pub(crate) fn start(config: &Config, audit: Audit) -> Self {
        let mut objects: BTreeMap<&str, Vec<(String, ObjectSelector)>> = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (name, key) in &config.keys {
            let on_token = objects.entry(&key.token).or_default();
            places.insert(name, on_token.len());
            on_token.push((name.clone(), key.object.clone()));
        }
        let start = |(name, token): (&String, &crate::config::Token)| {
            let keys = objects.remove(name.as_str()).unwrap_or_default();
            (name.clone(), Token::start(name, token.clone(), keys))
        };
        let tokens: BTreeMap<_, _> = config.tokens.iter().map(start).collect();
        let entry = |(name, key): (&String, &crate::config::Key)| {
            let token = Arc::clone(tokens.get(&key.token)?);
            let name: Arc<str> = name.as_str().into();
            let index = places.get(&name.to_string()).copied()?;
            let certificate_chain = key.certificate_chain.clone();
            Some((
                Arc::clone(&name),
                KeyEntry { name, token, index, certificate_chain, allow: key.allow.clone() },
            ))
        };
        let keys = config.keys.iter().filter_map(entry).collect();
        let ticks = watch::Sender::new(0);
        tokio::spawn(tick(ticks.clone()));
        Self { tokens, keys, operators: config.operators.clone(), audit, replay: Replay::default(), ticks }
    }

    /// Ends between one and two ticks from now.
    async fn patience(&self) {
        let mut ticks = self.ticks.subscribe();
        let now = *ticks.borrow();
        if ticks.wait_for(|tick| *tick >= now + 2).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Signs after the caller was let in: the token, then the audit log, then the answer.
    async fn sign(&self, authorised: &Authorised, deadline: Instant) -> Outcome {
        if self.audit.failing() {
            // The log may work again: this line says so, if it gets through. Until it does, no token is touched.
            let reason = "entries before this one could not be written, and nothing was signed";
            self.record(&Entry { action: "audit", ..authorised.entry("resumed", reason, None) }, deadline)
                .await?;
        }
        let key = self.key(&authorised.key)?;
        let _announced = self.audit.announce();
        let signed = key.token.sign(key.index, &authorised.digest, deadline).await;
        let reason = signed.as_ref().err().map(TokenError::to_string).unwrap_or_default();
        let outcome = if signed.is_ok() { "signed" } else { "failed" };
        let algorithm = key.public().map(|public| public.algorithm.name());
        // The token's answer may have taken all of the caller's time; the record gets some of its own.
        let deadline = deadline.max(Instant::now() + RECORD);
        let written = self.record(&authorised.entry(outcome, &reason, algorithm), deadline).await;
        let signed = signed.map_err(|error| status(&key.token.name, &error))?;
        written?;
        Ok(signed)
    }

    /// Records a decision. Without the record nothing is released.
    async fn record(&self, entry: &Entry<'_>, deadline: Instant) -> Result<(), Status> {
        match timeout_at(deadline, self.audit.record(entry)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Status::unavailable(error.to_string())),
            Err(_) => Err(Status::unavailable("the audit log does not answer")),
        }
    }

    /// Has a token logged in for an operator, and records it.
    async fn unlock(
        &self,
        token: &Token,
        pin: Option<Pin>,
        entry: UnlockEntry,
        deadline: Instant,
    ) -> Result<(), Status> {
        let unlocked = token.unlock(pin, deadline).await;
        let reason = unlocked.as_ref().err().map(TokenError::to_string).unwrap_or_default();
        let outcome = if unlocked.is_ok() { "unlocked" } else { "failed" };
        self.record(&entry.with(outcome, &reason), deadline.max(Instant::now() + RECORD)).await?;
        unlocked.map_err(|error| status(&token.name, &error))
    }

    fn key(&self, name: &str) -> Result<&KeyEntry, Status> {
        self.keys.get(name).ok_or_else(|| Status::not_found(format!("no key {name:?} is configured")))
    }
}

impl KeyEntry {
    /// A caller that comes while the token starts wants the key, not the news that it starts.
    async fn settled(&self, deadline: Instant) {
        let change = self.token.watch();
        if matches!(self.token.state(), State::Starting) {
            let _ = timeout_at(deadline.min(Instant::now() + SETTLE), change).await;
        }
    }

    fn public(&self) -> Option<crate::host::wire::PublicKey> {
        self.token.key(self.index).and_then(Result::ok)
    }

    fn to_proto(&self) -> Key {
        let public = self.token.key(self.index);
        let (state, detail) = match (self.token.state(), &public) {
            (State::Ready, Some(Err(reason))) => (KeyState::Unusable, reason.clone()),
            (State::Ready, _) => (KeyState::Ready, String::new()),
            (State::Starting, _) => (KeyState::Starting, String::new()),
            (State::Locked(reason), _) => (KeyState::Locked, reason),
            (State::Down(reason), _) => (KeyState::Unavailable, reason),
        };
        let public = public.and_then(Result::ok);
        let algorithm = public.as_ref().map(|public| public.algorithm.to_proto()).unwrap_or_default();
        Key {
            name: self.name.to_string(),
            token: self.token.name.clone(),
            backend: "pkcs11".into(),
            device: self.token.device(),
            state: state.into(),
            state_detail: detail,
            algorithm: algorithm.into(),
            public_key: public.map(|public| public.spki.0).unwrap_or_default(),
            certificate_chain: self.certificate_chain.clone(),
        }
    }
}

/// A request whose caller was let in.
struct Authorised {
    identity: Arc<Identity>,
    rule: String,
    key: Arc<str>,
    request_id: String,
    digest: Vec<u8>,
    digest_hex: String,
    context: String,
}

impl Authorised {
    fn entry<'a>(&'a self, outcome: &'static str, reason: &'a str, algorithm: Option<&'a str>) -> Entry<'a> {
        Entry {
            time: audit::now(),
            action: "sign",
            request_id: &self.request_id,
            identity: &self.identity,
            rule: Some(&self.rule),
            key: &self.key,
            algorithm,
            digest: &self.digest_hex,
            claimed_context: &self.context,
            outcome,
            reason,
        }
    }
}

/// What is recorded of an unlock, whoever waits for it.
struct UnlockEntry {
    identity: Arc<Identity>,
    rule: Option<String>,
    token: String,
}

impl UnlockEntry {
    fn with<'a>(&'a self, outcome: &'static str, reason: &'a str) -> Entry<'a> {
        Entry {
            time: audit::now(),
            action: "unlock",
            request_id: "",
            identity: &self.identity,
            rule: self.rule.as_deref(),
            key: &self.token,
            algorithm: None,
            digest: "",
            claimed_context: "",
            outcome,
            reason,
        }
    }
}

type Events = Pinned<Box<dyn Stream<Item = Result<SignResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Service {
    type SignStream = Events;

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let usable: Vec<_> =
            self.0.keys.values().filter(|key| allowed(&key.allow, &caller).is_some()).collect();
        let settled = async {
            for key in &usable {
                key.settled(deadline).await;
            }
        };
        // All of them together may take no longer than one.
        let _ = timeout(SETTLE, settled).await;
        Ok(Response::new(ListKeysResponse { keys: usable.into_iter().map(KeyEntry::to_proto).collect() }))
    }

    async fn get_key(&self, request: Request<GetKeyRequest>) -> Result<Response<GetKeyResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let key = self.0.key(&request.get_ref().name)?;
        if allowed(&key.allow, &caller).is_none() {
            return Err(denied(&caller, "look at", &key.name, &format!("key.{}.allow", key.name)));
        }
        key.settled(deadline).await;
        Ok(Response::new(GetKeyResponse { key: Some(key.to_proto()) }))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<Events>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let key = self.0.key(&request.key)?;
        let id: [u8; 16] = request.request_id.as_slice().try_into().map_err(|_| {
            Status::invalid_argument("request_id must be 16 bytes, chosen at random for each request")
        })?;
        if request.context.len() > CONTEXT_BYTES {
            return Err(Status::invalid_argument(format!("context is longer than {CONTEXT_BYTES} bytes")));
        }
        let Some(Content::Digest(digest)) = request.content else {
            return Err(Status::invalid_argument("content is missing: set digest"));
        };
        if !matches!(digest.len(), 32 | 48 | 64) {
            return Err(Status::invalid_argument(format!(
                "a digest of {} bytes; expected 32, 48 or 64",
                digest.len()
            )));
        }
        let rule = allowed(&key.allow, &caller).map(|rule| rule.name.clone());
        let authorised = Authorised {
            identity: Arc::clone(&caller),
            rule: rule.clone().unwrap_or_default(),
            key: Arc::clone(&key.name),
            request_id: hex::encode(id),
            digest_hex: hex::encode(&digest),
            digest,
            context: request.context,
        };
        if rule.is_none() {
            let missing = format!("key.{}.allow", key.name);
            let algorithm = key.public().map(|public| public.algorithm.name());
            let entry = Entry { rule: None, ..authorised.entry("denied", &missing, algorithm) };
            self.0.record(&entry, deadline).await?;
            return Err(denied(&caller, "sign with", &key.name, &missing));
        }
        if let Some(public) = key.public().filter(|p| p.algorithm.digest_len() != authorised.digest.len()) {
            let (name, length) = (public.algorithm.name(), public.algorithm.digest_len());
            return Err(Status::invalid_argument(format!("{name} signs digests of {length} bytes")));
        }
        let mut follow = match self.0.replay.begin(&caller, id, &key.name, &authorised.digest) {
            Begin::Conflict => {
                return Err(Status::already_exists(
                    "this request_id was used for another key or digest; choose a new one",
                ));
            }
            Begin::Again(follow) => follow,
            Begin::New(tell, follow) => {
                let agent = Arc::clone(&self.0);
                // A task of its own: the work is finished and recorded even when the caller hangs up.
                tokio::spawn(async move {
                    let outcome = agent.sign(&authorised, deadline).await;
                    tell.send_replace(Some(outcome));
                });
                follow
            }
        };
        tokio::select! {
            biased;
            outcome = outcome(&mut follow) => {
                let event = outcome.map(signed)?;
                return Ok(Response::new(Box::pin(tokio_stream::once(Ok(event)))));
            }
            () = self.0.patience() => {}
        }
        let reason = match key.token.state() {
            State::Starting => "the token is being opened",
            _ => "the token is busy",
        };
        let queued = SignResponse { event: Some(Event::Queued(Queued { reason: reason.into() })) };
        let (events, stream) = mpsc::channel(2);
        tokio::spawn(async move {
            // A caller that hung up needs no events.
            let _ = events.send(Ok(queued)).await;
            let _ = events.send(outcome(&mut follow).await.map(signed)).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn unlock_token(
        &self,
        request: Request<UnlockTokenRequest>,
    ) -> Result<Response<UnlockTokenResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let UnlockTokenRequest { token: name, pin } = request.into_inner();
        let pin = pin.and_then(Pin::new);
        let token = self.0.tokens.get(&name);
        let token = token.ok_or_else(|| Status::not_found(format!("no token {name:?} is configured")))?;
        let rule = allowed(&self.0.operators, &caller).map(|rule| rule.name.clone());
        let entry = UnlockEntry { identity: Arc::clone(&caller), rule, token: name.clone() };
        if entry.rule.is_none() {
            self.0.record(&entry.with("denied", "operator"), deadline).await?;
            return Err(denied(&caller, "unlock", &name, "operator"));
        }
        let (agent, token) = (Arc::clone(&self.0), Arc::clone(token));
        // A task of its own: a PIN that was offered is recorded even when the operator hangs up.
        let unlocking = tokio::spawn(async move { agent.unlock(&token, pin, entry, deadline).await });
        unlocking.await.map_err(|_| Status::internal("the request was dropped"))??;
        Ok(Response::new(UnlockTokenResponse {}))
    }
}

async fn tick(ticks: watch::Sender<u64>) {
    let mut clock = tokio::time::interval(TICK);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        ticks.send_modify(|tick| *tick += 1);
    }
}

async fn outcome(follow: &mut Follow) -> Outcome {
    match follow.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or_else(|| Err(Status::internal("no outcome"))),
        Err(_) => Err(Status::internal("the request was dropped")),
    }
}

fn signed(signed: crate::token::Signed) -> SignResponse {
    let crate::token::Signed { signature, public_key } = signed;
    SignResponse { event: Some(Event::Signed(Signed { signature, public_key })) }
}

fn identity<T>(request: &Request<T>) -> Result<Arc<Identity>, Status> {
    let known = request.extensions().get::<Arc<Identity>>().cloned();
    known.ok_or_else(|| Status::unauthenticated("the caller could not be identified"))
}

/// Tells the operator which rule is missing, and the caller only that it is.
fn denied(caller: &Identity, what: &str, name: &str, missing: &str) -> Status {
    tracing::warn!(%caller, missing_rule = missing, "denied: nobody lets this caller {what} {name}");
    Status::permission_denied(format!("you are not allowed to {what} {name}"))
}

fn status(token: &str, error: &TokenError) -> Status {
    let message = format!("token {token}: {error}");
    match error {
        TokenError::Full { .. } => Status::resource_exhausted(message),
        TokenError::Locked(_) | TokenError::Refused(_) => Status::failed_precondition(message),
        TokenError::Unavailable(_) => Status::unavailable(message),
        TokenError::Deadline => Status::deadline_exceeded(message),
    }
}

/// When the caller stops waiting (`grpc-timeout`, gRPC over HTTP/2), or ours.
fn deadline(metadata: &MetadataMap) -> Instant {
    let header = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
    let asked = header.and_then(grpc_timeout).map_or(DEADLINE, |asked| asked.min(DEADLINE));
    // A little earlier than the caller's own clock and tonic's, which would call it CANCELLED.
    Instant::now() + asked.mul_f64(0.9)
}

fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_of_the_grpc_specification() {
        assert_eq!(grpc_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(grpc_timeout("150m"), Some(Duration::from_millis(150)));
        assert_eq!(grpc_timeout("99999999u"), Some(Duration::from_micros(99_999_999)));
        for wrong in ["", "S", "1", "999999999S", "-1S", "1x", "1é"] {
            assert_eq!(grpc_timeout(wrong), None, "{wrong}");
        }
    }
}
