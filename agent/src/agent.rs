//! What the agent does once a caller is known: its tokens and keys, a signature and its record.

use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use omsign_proto::v1::RETRY_PUSHBACK;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout_at};
use tonic::Status;

use crate::algorithm::Content;
use crate::audit::{self, Audit, Entry};
use crate::config::Config;
use crate::denials::Denials;
use crate::identity::Identity;
use crate::intake::Held;
use crate::operator;
use crate::policy::allowed;
use crate::replay::{Outcome, Replay, Tell};
use crate::secret::Pin;
use crate::server::denied;
use crate::setup::Setup;
use crate::token::{Token, TokenError};

/// A caller that waits for two of these ticks is told what for. One clock serves all requests: a timer for
/// each would wake the event loop once more per signature.
const TICK: Duration = Duration::from_millis(100);

/// How long after the first of them the rest of those who were turned away is recorded.
const REST: Duration = Duration::from_secs(60);

/// When whoever finds a queue full is to come again, at least and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// The longest that questions about keys wait for a token that starts.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);

/// Everything that requests share.
pub(crate) struct Agent {
    setup: RwLock<Arc<Setup>>,
    pub(crate) replay: Replay,
    pub(crate) audit: Audit,
    pub(crate) denials: Denials,
    /// Places for operators' commands.
    pub(crate) operators: Arc<Semaphore>,
    /// Somebody was turned away, and nothing was recorded.
    denied: Notify,
    ticks: watch::Sender<u64>,
    /// Starts the clock: with nobody who waits, an idle agent sleeps.
    waits: Arc<Notify>,
}

impl Agent {
    /// Starts every token.
    pub(crate) fn start(config: Config, audit: Audit) -> Self {
        let (ticks, waits) = (watch::Sender::new(0), Arc::new(Notify::new()));
        tokio::spawn(tick(ticks.clone(), Arc::clone(&waits)));
        let setup = RwLock::new(Arc::new(Setup::new(config, None)));
        let operators = Arc::new(Semaphore::new(operator::CONNECTIONS));
        let (replay, denials) = (Replay::default(), Denials::default());
        Self { setup, replay, audit, denials, operators, denied: Notify::new(), ticks, waits }
    }

    /// What the configuration makes of it now.
    pub(crate) fn setup(&self) -> Arc<Setup> {
        Arc::clone(&self.setup.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over another configuration; returns the tokens that it does not have any more, to be closed, and those
    /// that are new.
    /// Requests that have begun end as they would have.
    pub(crate) fn reload(&self, config: Config) -> (Vec<Arc<Token>>, Vec<Arc<Token>>) {
        let before = self.setup();
        let next = Arc::new(Setup::new(config, Some(&before)));
        let (closed, new) = (before.without(&next), next.since(&before));
        *self.setup.write().unwrap_or_else(PoisonError::into_inner) = next;
        (closed, new)
    }

    /// Ends between one and two ticks from now.
    pub(crate) async fn patience(&self) {
        let mut ticks = self.ticks.subscribe();
        self.waits.notify_one();
        let now = *ticks.borrow();
        if ticks.wait_for(|tick| *tick >= now + 2).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Signs after the caller was let in: the token, then the audit log, then the answer. `tell` learns of touches.
    pub(crate) async fn sign(&self, authorised: &Authorised, tell: &Tell, deadline: Instant) -> Outcome {
        if self.audit.failing() {
            // The log may work again: this line says so, if it gets through. Until it does, no token is touched.
            let reason = "entries before this one could not be written, and nothing was signed";
            self.record(&Entry { action: "audit", ..authorised.entry("resumed", reason, None) }, deadline)
                .await?;
        }
        let setup = self.setup();
        let key = setup.key(&authorised.key)?;
        // A configuration that was read meanwhile may let them no more, or mean another key by this name.
        let Some(rule) = allowed(&key.allow, &authorised.identity) else {
            let missing = format!("key.{}.allow", key.name);
            let entry = Entry { rule: None, ..authorised.entry("denied", &missing, None) };
            self.turn_away(entry, deadline).await?;
            return Err(denied("sign with", &key.name));
        };
        let caller = authorised.identity.caller();
        let signed = key.sign((&authorised.content, &caller), tell, deadline).await;
        let (outcome, reason, token, busy) = match &signed {
            Ok((_, place)) => ("signed", String::new(), &place.token.name, place.token.busy()),
            Err(failed) => ("failed", failed.error.to_string(), &failed.token, Duration::ZERO),
        };
        let public = key.public();
        let algorithm = public.as_ref().map(|public| public.algorithm.name());
        let digest = public.map(|public| public.digest_hex(&authorised.content));
        let digest = digest.as_deref().unwrap_or(&authorised.digest_hex);
        // The token's answer may have taken all of the caller's time; the record gets some of its own.
        let deadline = deadline.max(Instant::now() + audit::PATIENCE);
        let rule = Some(rule.name.as_str());
        let signer = signed.as_ref().map(|(signed, _)| hex::encode(Sha256::digest(&signed.public_key)));
        let key_sha256 = signer.as_deref().unwrap_or_default();
        let entry = authorised.entry(outcome, &reason, algorithm);
        let entry = Entry { rule, token, busy, digest, key_sha256, ..entry };
        let written = self.record(&entry, deadline).await;
        let (signed, _) = signed.map_err(|failed| status(&failed.token, &failed.error))?;
        written?;
        Ok(signed)
    }

    /// Records that somebody was turned away, and tells the operator why; of very many times only some, with their number.
    pub(crate) async fn turn_away(&self, entry: Entry<'_>, deadline: Instant) -> Result<(), Status> {
        let (caller, missing, action, key) = (entry.identity, entry.reason, entry.action, entry.key);
        let Some(unrecorded) = self.denials.admit(caller.caller(), action, missing) else {
            self.record_later(caller, action, missing, 0);
            return Ok(());
        };
        tracing::warn!(%caller, missing, unrecorded, action, key, "denied");
        let recorded = self.record(&Entry { unrecorded, ..entry }, deadline).await;
        if recorded.is_err() {
            self.record_later(caller, action, missing, unrecorded + 1);
        }
        recorded
    }

    fn record_later(&self, caller: &Identity, action: &'static str, why: &str, count: u64) {
        self.denials.unrecorded(caller, action, why, count);
        self.denied.notify_one();
    }

    /// Records, from time to time, of how many nothing was.
    pub(crate) async fn record_denials_later(&self) {
        loop {
            self.denied.notified().await;
            tokio::time::sleep(REST).await;
            self.record_denials().await;
        }
    }

    /// Records the rest of those who were turned away, and do not come again.
    pub(crate) async fn record_denials(&self) {
        for (identity, action, why, count) in self.denials.rest() {
            let unrecorded = count.saturating_sub(1);
            let entry =
                Entry { action, outcome: "denied", reason: &why, unrecorded, ..Entry::about(&identity) };
            if self.audit.record_soon(&entry).await.is_err() {
                self.record_later(&identity, action, &why, count);
            }
        }
    }

    /// Records a decision. Without the record nothing is released.
    pub(crate) async fn record(&self, entry: &Entry<'_>, deadline: Instant) -> Result<(), Status> {
        match timeout_at(deadline, self.audit.record(entry)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Status::unavailable(error.to_string())),
            Err(_) => Err(Status::unavailable("the audit log does not answer")),
        }
    }

    /// Has a token logged in for an operator who `waits`, and records it.
    pub(crate) async fn unlock(
        &self,
        token: &Token,
        (waits, pin): (Weak<()>, Option<Pin>),
        (identity, rule): (&Identity, &str),
        deadline: Instant,
    ) -> Result<(), Status> {
        let unlocked = token.unlock_for(waits, pin, deadline).await;
        let reason = unlocked.as_ref().err().map(TokenError::to_string).unwrap_or_default();
        let outcome = if unlocked.is_ok() { "unlocked" } else { "failed" };
        self.operator_did(("unlock", outcome), token, &reason, (identity, rule), deadline).await?;
        unlocked.map_err(|error| status(&token.name, &error))
    }

    /// Has a token locked for an operator, and records it.
    pub(crate) async fn lock(
        &self,
        token: &Token,
        by: (&Identity, &str),
        deadline: Instant,
    ) -> Result<(), Status> {
        let locked = token.lock().await;
        let reason = locked.as_ref().err().map(TokenError::to_string).unwrap_or_default();
        // It is in force, whatever comes of it.
        let recorded = self.operator_did(("lock", "locked"), token, &reason, by, deadline).await;
        let shut = token.shut(deadline).await.and(locked).map_err(|error| status(&token.name, &error));
        shut.and(recorded)
    }

    /// Records what an operator did to a token.
    async fn operator_did(
        &self,
        (action, outcome): (&'static str, &'static str),
        token: &Token,
        reason: &str,
        (identity, rule): (&Identity, &str),
        deadline: Instant,
    ) -> Result<(), Status> {
        let (key, rule, about) = (&token.name, Some(rule), Entry::about(identity));
        let entry = Entry { action, rule, key, outcome, reason, ..about };
        self.record(&entry, deadline.max(Instant::now() + audit::PATIENCE)).await
    }
}

/// A request whose caller was let in.
pub(crate) struct Authorised {
    pub(crate) identity: Arc<Identity>,
    pub(crate) rule: String,
    pub(crate) key: Arc<str>,
    pub(crate) request_id: String,
    pub(crate) content: Content,
    pub(crate) digest_hex: String,
    pub(crate) context: String,
    /// The room that a statement takes until it is signed.
    pub(crate) _held: Option<Held>,
}

impl Authorised {
    /// What is recorded of it.
    pub(crate) fn entry<'a>(
        &'a self,
        outcome: &'static str,
        reason: &'a str,
        algorithm: Option<&'a str>,
    ) -> Entry<'a> {
        Entry {
            action: "sign",
            request_id: &self.request_id,
            rule: Some(&self.rule),
            key: &self.key,
            algorithm,
            digest: &self.digest_hex,
            claimed_context: &self.context,
            outcome,
            reason,
            ..Entry::about(&self.identity)
        }
    }
}

async fn tick(ticks: watch::Sender<u64>, waits: Arc<Notify>) {
    let mut clock = tokio::time::interval(TICK);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while ticks.receiver_count() == 0 {
            waits.notified().await;
        }
        clock.tick().await;
        ticks.send_modify(|tick| *tick += 1);
    }
}

fn status(token: &str, error: &TokenError) -> Status {
    let message = format!("token {token}: {error}");
    match error {
        TokenError::Full { soon, .. } => {
            let mut status = Status::resource_exhausted(message);
            let soon = u64::try_from(soon.clamp(&AGAIN.0, &AGAIN.1).as_millis()).unwrap_or(u64::MAX);
            status.metadata_mut().insert(RETRY_PUSHBACK, soon.into());
            status
        }
        TokenError::Locked(_) | TokenError::Refused(_) => Status::failed_precondition(message),
        TokenError::Unavailable(_) => Status::unavailable(message),
        TokenError::Deadline => Status::deadline_exceeded(message),
    }
}
