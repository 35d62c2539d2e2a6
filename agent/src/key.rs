//! A key that callers can name: on which tokens it lives, what it is, and a signature from whichever token can.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use omsign_proto::v1::{self, KeyState};
use tokio::time::{Instant, timeout_at};

use crate::agent::SETTLE;
use crate::algorithm::Content;
use crate::breaker::Breaker;
use crate::identity::Caller;
use crate::policy::Rule;
use crate::public_key::PublicKey;
use crate::replay::Tell;
use crate::spki::SpkiDer;
use crate::token::{Signed, State, Token, TokenError};

/// Why a token may not sign.
const OTHER_KEY: &str = "it holds another key under this name than the other tokens";
const OTHER_CERTIFICATE: &str = "certificate_chain is for another key than the one on the token";

/// A key that callers can name.
pub(crate) struct KeyEntry {
    pub(crate) name: Arc<str>,
    pub(crate) allow: Vec<Rule>,
    /// Never empty.
    places: Vec<Place>,
    certificate_chain: Vec<Vec<u8>>,
    /// Keys that it took the place of.
    previous: Vec<v1::PreviousKey>,
    /// Where the next signature is tried first: round robin.
    turn: AtomicUsize,
    /// The public key of its certificate: SubjectPublicKeyInfo, DER.
    certified: Option<Vec<u8>>,
    /// Without one, the first that was seen, until all tokens agree on another.
    seen: Mutex<Option<Vec<u8>>>,
    /// The operator was told of a token that holds another key.
    warned: AtomicBool,
}

/// A key on one token.
pub(crate) struct Place {
    pub(crate) token: Arc<Token>,
    /// Index among the token's keys.
    pub(crate) index: usize,
    breaker: Breaker,
}

impl Place {
    pub(crate) fn new(token: Arc<Token>, index: usize) -> Self {
        Self { token, index, breaker: Breaker::default() }
    }
}

/// Why no token signed: the reason of the first that was tried.
pub(crate) struct Failed {
    pub(crate) token: String,
    pub(crate) error: TokenError,
}

impl KeyEntry {
    /// `ours` is the public key that it had before.
    pub(crate) fn new(
        name: Arc<str>,
        key: &crate::config::Key,
        places: Vec<Place>,
        ours: Option<Vec<u8>>,
    ) -> Self {
        let (allow, certificate_chain) = (key.allow.clone(), key.certificate_chain.clone());
        let leaf = certificate_chain.first();
        let certified = leaf.and_then(|leaf| SpkiDer::of_certificate(leaf)).map(|spki| spki.0);
        let (turn, seen, warned) = (AtomicUsize::new(0), Mutex::new(ours), AtomicBool::new(false));
        let previous = key.previous.iter().map(|previous| v1::PreviousKey {
            public_key: previous.public_key.0.clone(),
            certificate_chain: previous.certificate_chain.clone(),
        });
        let previous = previous.collect();
        Self { name, allow, places, certificate_chain, previous, turn, certified, seen, warned }
    }

    /// What has to be kept of this until it is signed: the digest, where none of its tokens takes more.
    pub(crate) fn needed(&self, content: Content) -> Content {
        let known = |place: &Place| place.token.key(place.index).and_then(Result::ok);
        let all: Option<Vec<PublicKey>> = self.places.iter().map(known).collect();
        let all = all.unwrap_or_default();
        match all.first() {
            // A wrong one among them does not decide.
            Some(first) if all.iter().all(|one| one.algorithm == first.algorithm && !one.needs_message()) => {
                first.fit(&content).unwrap_or(content)
            }
            _ => content,
        }
    }

    /// Signs with the first token that can. A token that fails or takes more than its share of the time costs no
    /// answer while another is left: what it may still sign is never released.
    pub(crate) async fn sign(
        &self,
        (content, caller): (&Content, &Caller),
        tell: &Tell,
        deadline: Instant,
    ) -> Result<(Signed, &Place), Failed> {
        let order = self.order(content);
        let mut first: Option<Failed> = None;
        for (tried, place) in order.iter().enumerate() {
            let rest = order.get(tried + 1..).unwrap_or_default();
            // One that is down answers at once: it needs no share.
            let up = rest.iter().filter(|place| is_up(place)).count();
            let left = u32::try_from(up + 1).unwrap_or(u32::MAX);
            let now = Instant::now();
            let share = now + deadline.saturating_duration_since(now) / left;
            let was_ready = matches!(place.token.state(), State::Ready(_));
            let signed = match self.differs(place) {
                false => place.token.sign(place.index, (content, caller), tell, share, up == 0).await,
                true => Err(TokenError::Refused(self.other().to_owned())),
            };
            let error = match signed {
                Ok(signed) if self.is_ours(&signed.public_key) => {
                    place.breaker.worked();
                    return Ok((signed, place));
                }
                Ok(_) => TokenError::Refused(self.other().to_owned()),
                Err(error) => error,
            };
            match error {
                // It answered.
                TokenError::Refused(_) => place.breaker.worked(),
                // A caller in a hurry says nothing about the token; one that is down says so by itself.
                TokenError::Unavailable(_) if was_ready => place.breaker.failed(now, Instant::now()),
                TokenError::Deadline if was_ready && share - now >= place.token.timeout() / 2 => {
                    place.breaker.failed(now, Instant::now());
                }
                _ => {}
            }
            if !rest.is_empty() {
                tracing::warn!(key = %self.name, token = %place.token.name, %error, "trying the next token");
            }
            // The first was the most promising one: why it failed says most.
            first = first.or(Some(Failed { token: place.token.name.clone(), error }));
        }
        Err(first.expect("a key has at least one token"))
    }

    /// Round robin among the tokens that are ready; then those that start, then those that are down or failed before. Those
    /// that cannot sign this are left out.
    fn order(&self, content: &Content) -> Vec<&Place> {
        if let [only] = self.places.as_slice() {
            return vec![only];
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let takes = |place: &&Place| {
            let known = place.token.key(place.index).and_then(Result::ok);
            known.is_none_or(|public| public.takes(content).is_ok())
        };
        let mut order: Vec<_> =
            self.places.iter().filter(|place| !self.differs(place)).filter(takes).collect();
        if order.is_empty() {
            order = self.places.iter().collect();
        }
        let count = order.len();
        order.rotate_left(turn % count);
        // At most one is tried whose pause is over: a caller has time for one that fails.
        let (now, mut tries) = (Instant::now(), false);
        order.sort_by_cached_key(|place| match place.token.state() {
            State::Ready(_) if !place.breaker.is_open() => 1,
            State::Ready(_) if !tries && place.breaker.try_it(now) => {
                tries = true;
                0
            }
            State::Ready(_) => 3,
            State::Starting => 2,
            State::Locked(_) | State::Down(_) => 4,
        });
        order
    }

    /// Whether a public key is this key's: that of its certificate, or the first that was seen, where it is on several tokens.
    /// A token with another one never signs: verifiers would notice too late.
    fn is_ours(&self, spki: &[u8]) -> bool {
        match &self.certified {
            Some(certified) => certified == spki,
            None if self.places.len() == 1 => true,
            None => self.seen().get_or_insert_with(|| spki.to_vec()) == spki,
        }
    }

    /// Why it may not sign with one that is not.
    fn other(&self) -> &'static str {
        if self.places.len() == 1 { OTHER_CERTIFICATE } else { OTHER_KEY }
    }

    /// The public key that it goes by, as far as it is known; where it is on one token, the one there.
    pub(crate) fn ours(&self) -> Option<Vec<u8>> {
        let seen = self.seen().clone();
        let shown = || self.public().map(|public| public.spki.0);
        if self.places.len() == 1 { shown().or(seen) } else { seen.or_else(shown) }
    }

    fn seen(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a token shows another key than ours; said to the operator once.
    fn differs(&self, place: &Place) -> bool {
        if self.places.len() == 1 && self.certified.is_none() {
            return false;
        }
        let known = place.token.key(place.index).and_then(Result::ok);
        let differs = known.is_some_and(|public| !self.is_ours(&public.spki.0));
        if differs && !self.warned.swap(true, Ordering::Relaxed) {
            tracing::error!(key = %self.name, token = %place.token.name, reason = self.other(), "this token never signs");
        }
        differs
    }

    /// Compares its tokens when all were opened: that one holds another key is said then, and not when somebody asks. When
    /// all have the same other one than before, somebody made it anew.
    pub(crate) fn check(&self) {
        let shown: Vec<_> = self.places.iter().filter_map(|place| place.token.key(place.index)).collect();
        if shown.len() < self.places.len() {
            return;
        }
        let keys: Option<Vec<_>> =
            shown.into_iter().map(|key| key.ok().map(|public| public.spki.0)).collect();
        if self.places.len() > 1
            && let Some([first, others @ ..]) = keys.as_deref()
            && others.iter().all(|other| other == first)
            && self.seen().replace(first.clone()).is_some_and(|before| before != *first)
        {
            self.warned.store(false, Ordering::Relaxed);
            tracing::warn!(key = %self.name, "its tokens hold another key than before, all the same one");
        }
        // Which is where it is said.
        let _ = self.places.iter().any(|place| self.differs(place));
    }

    /// A caller that comes while the tokens start wants the key, not the news that they start.
    pub(crate) async fn settled(&self, deadline: Instant) {
        let deadline = deadline.min(Instant::now() + SETTLE);
        for place in &self.places {
            if matches!(self.state().0, KeyState::Starting) {
                let _ = timeout_at(deadline, place.token.settled()).await;
            }
        }
    }

    /// Its public half, once one of its tokens was open. Where one of them hashes, all are given what that one takes.
    pub(crate) fn public(&self) -> Option<PublicKey> {
        self.known().reduce(|first, other| PublicKey { hashes: first.hashes || other.hashes, ..first })
    }

    /// As its tokens showed it when they were open, but for those that hold another.
    fn known(&self) -> impl Iterator<Item = PublicKey> {
        let known = |place: &Place| place.token.key(place.index).and_then(Result::ok);
        self.places.iter().filter_map(known).filter(|public| self.is_ours(&public.spki.0))
    }

    /// Whether one of its tokens signs this, of those that were open once: callers may have asked what it takes before the
    /// others were.
    pub(crate) fn takes(&self, content: &Content) -> Result<(), String> {
        let mut answers = self.known().map(|public| public.takes(content));
        let first = answers.next().unwrap_or(Ok(()));
        if first.is_ok() || answers.any(|answer| answer.is_ok()) { Ok(()) } else { first }
    }

    /// Whether it lives on this token.
    pub(crate) fn is_on(&self, token: &str) -> bool {
        self.places.iter().any(|place| place.token.name == token)
    }

    /// The best of its tokens' states: ready when one of them can sign.
    pub(crate) fn state(&self) -> (KeyState, String) {
        let states = self.places.iter().map(|place| match place.token.state() {
            State::Ready(_) => match place.token.key(place.index) {
                Some(Err(reason)) => (KeyState::Unusable, reason),
                _ if self.differs(place) => (KeyState::Unusable, self.other().to_owned()),
                _ => (KeyState::Ready, String::new()),
            },
            state => token_state(state),
        });
        let rank = |state: &KeyState| match state {
            KeyState::Ready => 0,
            KeyState::Starting => 1,
            KeyState::Locked => 2,
            _ => 3,
        };
        states.min_by_key(|(state, _)| rank(state)).expect("a key has at least one token")
    }

    /// As its callers see it.
    pub(crate) fn to_proto(&self) -> v1::Key {
        let (state, state_detail) = self.state();
        let public = self.public();
        let algorithm = public.as_ref().map(|public| public.algorithm.to_proto()).unwrap_or_default();
        let needs_statement = public.as_ref().is_some_and(PublicKey::needs_message);
        let devices: Vec<_> = self.places.iter().map(|place| place.token.device()).collect();
        v1::Key {
            name: self.name.to_string(),
            tokens: self.places.iter().map(|place| place.token.name.clone()).collect(),
            backend: self.places.first().map(|place| place.token.backend()).unwrap_or_default().into(),
            device: devices
                .iter()
                .filter(|device| !device.is_empty())
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
            state: state.into(),
            state_detail,
            algorithm: algorithm.into(),
            public_key: public.map(|public| public.spki.0).unwrap_or_default(),
            certificate_chain: self.certificate_chain.clone(),
            previous: self.previous.clone(),
            needs_statement,
        }
    }
}

/// Whether a token may answer later than at once.
fn is_up(place: &Place) -> bool {
    matches!(place.token.state(), State::Ready(_) | State::Starting)
}

/// A token as callers see it.
pub(crate) fn token_to_proto(token: &Token) -> v1::Token {
    let (state, state_detail) = token_state(token.state());
    v1::Token {
        name: token.name.clone(),
        backend: token.backend().into(),
        device: token.device(),
        state: state.into(),
        state_detail,
    }
}

fn token_state(state: State) -> (KeyState, String) {
    match state {
        State::Ready(_) => (KeyState::Ready, String::new()),
        State::Starting => (KeyState::Starting, String::new()),
        State::Locked(reason) => (KeyState::Locked, reason),
        State::Down(reason) => (KeyState::Unavailable, reason),
    }
}
