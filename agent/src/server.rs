//! The gRPC service: who asks, may they, what goes in and what comes out.

use std::pin::Pin as Pinned;
use std::sync::Arc;
use std::time::Duration;

use omsign_proto::v1::agent_service_server::AgentService;
use omsign_proto::v1::sign_response::Event;
use omsign_proto::v1::{
    GetKeyRequest, GetKeyResponse, KeyState, ListKeysRequest, ListKeysResponse, ListTokensRequest,
    ListTokensResponse, LockTokenRequest, LockTokenResponse, Queued, SignRequest, SignResponse, Signed,
    Touch, UnlockTokenRequest, UnlockTokenResponse,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::agent::{Agent, Authorised, SETTLE};
use crate::algorithm::Content;
use crate::audit::Entry;
use crate::identity::Identity;
use crate::intake::Held;
use crate::key::{KeyEntry, token_to_proto};
use crate::policy::allowed;
use crate::replay::{Begin, Follow, Step};
use crate::secret::Pin;
use crate::sent::{digest_only, prepared};
use crate::setup::short;
use crate::token::Token;

/// A request without a deadline of its own gets this one: a person may have to touch something.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Longest `context`, in bytes.
const CONTEXT_BYTES: usize = 1024;

/// The service that tonic serves; a handle.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) Arc<Agent>);

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
        let setup = self.0.setup();
        let usable: Vec<_> =
            setup.keys.values().filter(|key| allowed(&key.allow, &caller).is_some()).collect();
        let settled = async {
            for key in &usable {
                key.settled(deadline).await;
            }
        };
        // All of them together may take no longer than one.
        let _ = timeout(SETTLE, settled).await;
        Ok(Response::new(ListKeysResponse { keys: usable.into_iter().map(|key| key.to_proto()).collect() }))
    }

    async fn get_key(&self, request: Request<GetKeyRequest>) -> Result<Response<GetKeyResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let setup = self.0.setup();
        let name = &request.get_ref().name;
        let key = match setup.key(name) {
            Ok(key) => key,
            Err(unknown) => {
                self.turned_away("look", &caller, name, "no such key", deadline).await?;
                return Err(unknown);
            }
        };
        if allowed(&key.allow, &caller).is_none() {
            let missing = format!("key.{}.allow", key.name);
            self.turned_away("look", &caller, name, &missing, deadline).await?;
            return Err(denied("look at", &key.name));
        }
        key.settled(deadline).await;
        Ok(Response::new(GetKeyResponse { key: Some(key.to_proto()) }))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<Events>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let held = request.extensions().get::<Held>().cloned();
        let request = request.into_inner();
        let setup = self.0.setup();
        let key = match setup.key(&request.key) {
            Ok(key) => key,
            Err(unknown) => {
                self.turned_away("sign", &caller, &request.key, "no such key", deadline).await?;
                return Err(unknown);
            }
        };
        let Some(rule) = allowed(&key.allow, &caller) else {
            // Nothing is computed for a stranger, and nothing they send is wrong: they are denied first.
            let missing = format!("key.{}.allow", key.name);
            let entry = Entry {
                action: "sign",
                request_id: &hex::encode(request.request_id.get(..16).unwrap_or(&request.request_id)),
                key: &key.name,
                algorithm: key.public().map(|public| public.algorithm.name()),
                digest: &digest_only(request.content).hex(),
                claimed_context: &shortened(request.context),
                outcome: "denied",
                reason: &missing,
                ..Entry::about(&caller)
            };
            self.0.turn_away(entry, deadline).await?;
            return Err(denied("sign with", &key.name));
        };
        let id: [u8; 16] = request.request_id.as_slice().try_into().map_err(|_| {
            Status::invalid_argument("request_id must be 16 bytes, chosen at random for each request")
        })?;
        if request.context.len() > CONTEXT_BYTES {
            return Err(Status::invalid_argument(format!("context is longer than {CONTEXT_BYTES} bytes")));
        }
        let (content, digest_hex) = prepared(Arc::clone(key), request.content, deadline).await?;
        let held = held.filter(|_| matches!(content, Content::Message(_)));
        let authorised = Authorised {
            identity: Arc::clone(&caller),
            rule: rule.name.clone(),
            key: Arc::clone(&key.name),
            request_id: hex::encode(id),
            digest_hex,
            content,
            context: request.context,
            _held: held,
        };
        let follow = match self.0.replay.begin(&caller, id, &key.name, &authorised.digest_hex) {
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
                    let outcome = agent.sign(&authorised, &tell, deadline).await;
                    tell.send_replace(Step::Done(outcome));
                });
                follow
            }
        };
        Ok(Response::new(self.told(follow, key).await?))
    }

    async fn list_tokens(
        &self,
        request: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let caller = identity(&request)?;
        let setup = self.0.setup();
        let operator = allowed(&setup.config.operators, &caller).is_some();
        let uses = |name: &str| {
            setup.keys.values().any(|key| key.is_on(name) && allowed(&key.allow, &caller).is_some())
        };
        let seen = setup.tokens.values().filter(|token| operator || uses(&token.name));
        Ok(Response::new(ListTokensResponse { tokens: seen.map(|token| token_to_proto(token)).collect() }))
    }

    async fn unlock_token(
        &self,
        request: Request<UnlockTokenRequest>,
    ) -> Result<Response<UnlockTokenResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let UnlockTokenRequest { token: name, pin } = request.into_inner();
        let (rule, token) = self.operated("unlock", &caller, &name, deadline).await?;
        // Whoever typed nothing does not mean the one that is configured, which may be wrong and the last try.
        let pin = match pin {
            Some(typed) if typed.is_empty() => return Err(Status::invalid_argument("the PIN is empty")),
            pin => pin.and_then(Pin::new),
        };
        let agent = Arc::clone(&self.0);
        // A task of its own: a PIN that was offered is recorded even when the operator hangs up.
        let here = Arc::new(());
        let login = (Arc::downgrade(&here), pin);
        let unlocking =
            tokio::spawn(async move { agent.unlock(&token, login, (&caller, &rule), deadline).await });
        unlocking.await.map_err(|_| Status::internal("the request was dropped"))??;
        drop(here);
        Ok(Response::new(UnlockTokenResponse {}))
    }

    async fn lock_token(
        &self,
        request: Request<LockTokenRequest>,
    ) -> Result<Response<LockTokenResponse>, Status> {
        let caller = identity(&request)?;
        let deadline = deadline(request.metadata());
        let (rule, token) = self.operated("lock", &caller, &request.into_inner().token, deadline).await?;
        let agent = Arc::clone(&self.0);
        // A task of its own: it is locked, and that is recorded, even when the operator hangs up.
        let locking = tokio::spawn(async move { agent.lock(&token, (&caller, &rule), deadline).await });
        locking.await.map_err(|_| Status::internal("the request was dropped"))??;
        Ok(Response::new(LockTokenResponse {}))
    }
}

impl Service {
    /// Records somebody who asked for a key and got no further.
    async fn turned_away(
        &self,
        action: &'static str,
        caller: &Arc<Identity>,
        key: &str,
        reason: &str,
        deadline: Instant,
    ) -> Result<(), Status> {
        let entry = Entry { action, key: short(key), outcome: "denied", reason, ..Entry::about(caller) };
        self.0.turn_away(entry, deadline).await
    }

    /// What its caller is told of a request: at once where it is soon done.
    async fn told(&self, mut follow: Follow, key: &KeyEntry) -> Result<Events, Status> {
        let first = tokio::select! {
            biased;
            step = next(&mut follow) => match step {
                Step::Done(outcome) => {
                    let event = outcome.map(signed)?;
                    return Ok(Box::pin(tokio_stream::once(Ok(event))));
                }
                step => step,
            },
            () = self.0.patience() => Step::Working,
        };
        let queued = match key.state().0 {
            KeyState::Starting => "the token is being opened",
            _ => "the token is busy",
        };
        let (events, stream) = mpsc::channel(2);
        tokio::spawn(async move {
            let mut step = first;
            loop {
                let event = match step {
                    Step::Working => Event::Queued(Queued { reason: queued.into() }),
                    Step::Touch(message) => Event::Touch(Touch { message }),
                    Step::Done(outcome) => {
                        // A caller that hung up needs no answer.
                        let _ = events.send(outcome.map(signed)).await;
                        return;
                    }
                };
                if events.send(Ok(SignResponse { event: Some(event) })).await.is_err() {
                    return;
                }
                step = next(&mut follow).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(stream)))
    }

    /// A token for an operator to act on, and the rule that makes them one. All others are turned away.
    async fn operated(
        &self,
        action: &'static str,
        caller: &Arc<Identity>,
        name: &str,
        deadline: Instant,
    ) -> Result<(String, Arc<Token>), Status> {
        let setup = self.0.setup();
        let Some(rule) = allowed(&setup.config.operators, caller) else {
            self.turned_away(action, caller, name, "operator", deadline).await?;
            return Err(denied(action, short(name)));
        };
        let Some(token) = setup.tokens.get(name) else {
            let (key, rule, about) = (short(name), Some(rule.name.as_str()), Entry::about(caller));
            let (outcome, reason) = ("failed", "no such token");
            self.0.record(&Entry { action, rule, key, outcome, reason, ..about }, deadline).await?;
            return Err(Status::not_found(format!("no token {key:?} is configured")));
        };
        Ok((rule.name.clone(), Arc::clone(token)))
    }
}

/// As much of a stranger's context as anybody may give.
fn shortened(mut context: String) -> String {
    context.truncate(context.floor_char_boundary(CONTEXT_BYTES));
    context
}

/// The next step that this follower has not seen.
async fn next(follow: &mut Follow) -> Step {
    match follow.changed().await {
        Ok(()) => follow.borrow_and_update().clone(),
        Err(_) => Step::Done(Err(Status::internal("the request was dropped"))),
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

/// What the caller is told; which rule is missing, only the operator.
pub(crate) fn denied(what: &str, name: &str) -> Status {
    Status::permission_denied(format!("you are not allowed to {what} {name}"))
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
