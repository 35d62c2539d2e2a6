//! A key that callers can name: on which tokens it lives, what it is, and a signature from whichever token can.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use omsign_proto::v1::{self, KeyState};
use tokio::time::{Instant, timeout_at};

use crate::agent::SETTLE;
use crate::algorithm::Content;
use crate::host::wire::PublicKey;
use crate::policy::Rule;
use crate::replay::Tell;
use crate::token::{Signed, State, Token, TokenError};

/// A key that callers can name.
pub(crate) struct KeyEntry {
    pub(crate) name: Arc<str>,
    pub(crate) allow: Vec<Rule>,
    /// Never empty.
    places: Vec<Place>,
    certificate_chain: Vec<Vec<u8>>,
    /// Where the next signature is tried first: round robin.
    turn: AtomicUsize,
    /// The operator was told of a token that holds another key.
    warned: AtomicBool,
}

/// A key on one token.
pub(crate) struct Place {
    pub(crate) token: Arc<Token>,
    /// Index among the token's keys.
    pub(crate) index: usize,
}

/// Why no token signed: the last one's reason.
pub(crate) struct Failed {
    pub(crate) token: String,
    pub(crate) error: TokenError,
}

impl KeyEntry {
    pub(crate) fn new(name: Arc<str>, key: &crate::config::Key, places: Vec<Place>) -> Self {
        let (allow, certificate_chain) = (key.allow.clone(), key.certificate_chain.clone());
        Self {
            name,
            allow,
            places,
            certificate_chain,
            turn: AtomicUsize::new(0),
            warned: AtomicBool::new(false),
        }
    }

    /// Signs with the first token that can, those that are ready first. A token that fails or takes more than its
    /// share of the time costs no answer while another is left: what it may still sign is never released.
    pub(crate) async fn sign(
        &self,
        content: &Content,
        tell: &Tell,
        deadline: Instant,
    ) -> Result<Signed, Failed> {
        let mut last = None;
        let order = self.order();
        for (tried, place) in order.iter().enumerate() {
            let left = u32::try_from(order.len() - tried).unwrap_or(u32::MAX);
            let now = Instant::now();
            let share = now + deadline.saturating_duration_since(now) / left;
            if let Some(reason) = self.differs(place) {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::error!(key = %self.name, token = %place.token.name, %reason, "this token never signs with it");
                }
                last = Some(Failed { token: place.token.name.clone(), error: TokenError::Refused(reason) });
                continue;
            }
            match place.token.sign(place.index, content, tell, share).await {
                Ok(signed) => return Ok(signed),
                Err(error) => {
                    if left > 1 {
                        tracing::warn!(key = %self.name, token = %place.token.name, %error, "trying the next token");
                    }
                    last = Some(Failed { token: place.token.name.clone(), error });
                }
            }
        }
        Err(last.expect("a key has at least one token"))
    }

    /// Every place once: round robin among the tokens that are ready, then the others.
    fn order(&self) -> Vec<&Place> {
        let [only] = self.places.as_slice() else {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let mut order: Vec<_> = self.places.iter().collect();
            order.rotate_left(turn % self.places.len());
            order.sort_by_key(|place| match place.token.state() {
                State::Ready => 0,
                State::Starting => 1,
                State::Locked(_) | State::Down(_) => 2,
            });
            return order;
        };
        vec![only]
    }

    /// A token with another key than the first that was open may not sign: verifiers would notice too late.
    fn differs(&self, place: &Place) -> Option<String> {
        if self.places.len() == 1 {
            return None;
        }
        let known = |place: &Place| place.token.key(place.index).and_then(Result::ok);
        let (own, first) = (known(place)?, self.places.iter().find_map(known)?);
        (own != first).then(|| "it holds another key under this name than the other tokens".to_owned())
    }

    /// A caller that comes while the tokens start wants the key, not the news that they start.
    pub(crate) async fn settled(&self, deadline: Instant) {
        let deadline = deadline.min(Instant::now() + SETTLE);
        for place in &self.places {
            let change = place.token.watch();
            if matches!(self.state().0, KeyState::Starting) && matches!(place.token.state(), State::Starting)
            {
                let _ = timeout_at(deadline, change).await;
            }
        }
    }

    /// Its public half, once one of its tokens was open.
    pub(crate) fn public(&self) -> Option<PublicKey> {
        self.places.iter().find_map(|place| place.token.key(place.index).and_then(Result::ok))
    }

    /// Whether it lives on this token.
    pub(crate) fn is_on(&self, token: &str) -> bool {
        self.places.iter().any(|place| place.token.name == token)
    }

    /// The best of its tokens' states: ready when one of them can sign.
    pub(crate) fn state(&self) -> (KeyState, String) {
        let states = self.places.iter().map(|place| match place.token.state() {
            State::Ready => match (self.differs(place), place.token.key(place.index)) {
                (Some(reason), _) | (None, Some(Err(reason))) => (KeyState::Unusable, reason),
                (None, _) => (KeyState::Ready, String::new()),
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
        }
    }
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
        State::Ready => (KeyState::Ready, String::new()),
        State::Starting => (KeyState::Starting, String::new()),
        State::Locked(reason) => (KeyState::Locked, reason),
        State::Down(reason) => (KeyState::Unavailable, reason),
    }
}
