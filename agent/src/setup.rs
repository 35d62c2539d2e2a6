//! What a configuration makes of the agent: its tokens and keys. Another configuration makes another, which takes
//! over whatever stays the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::Status;

use crate::config::{self, Config};
use crate::host::wire::KeySpec;
use crate::key::{KeyEntry, Place};
use crate::token::{Before, Token};

/// Longest name that is recorded and repeated, in bytes.
const NAME_BYTES: usize = 256;

/// As much of what somebody calls a key or token, which may be of any length, as is recorded and repeated.
pub(crate) fn short(name: &str) -> &str {
    start(name, NAME_BYTES)
}

/// So many bytes of a text.
pub(crate) fn start(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most)).unwrap_or_default()
}

/// Tokens and keys by their names, and the configuration that they come from.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) tokens: BTreeMap<String, Arc<Token>>,
    pub(crate) keys: BTreeMap<Arc<str>, Arc<KeyEntry>>,
    /// Tokens of configurations before that are still being closed, or locked, or whose PIN was refused: one that comes back is
    /// theirs.
    retired: Vec<Before>,
}

impl Setup {
    /// Starts every token that `before` has not, or has otherwise.
    pub(crate) fn new(config: Config, before: Option<&Self>) -> Self {
        // What each token has to find, and where each key then is.
        let mut objects: BTreeMap<&str, Vec<KeySpec>> = BTreeMap::new();
        let mut indices = BTreeMap::new();
        for (name, key) in &config.keys {
            for token in &key.tokens {
                let on_token = objects.entry(token).or_default();
                indices.insert((name, token), on_token.len());
                on_token.push(key.spec(name));
            }
        }
        let same = |(name, token): (&String, &config::Token)| {
            let keys = objects.get(name.as_str()).map_or(&[][..], Vec::as_slice);
            let old = before?.tokens.get(name).filter(|old| old.is_for(token, keys))?;
            Some((name.clone(), Arc::clone(old)))
        };
        let mut tokens: BTreeMap<_, _> = config.tokens.iter().filter_map(same).collect();
        for (name, token) in &config.tokens {
            if tokens.contains_key(name) {
                continue;
            }
            // Those of the same name, or, whatever they were called, of the same device: that belongs to one process.
            let ends = |Before { token: old, .. }: &Before| {
                let stays = tokens.get(&old.name).is_some_and(|stays| Arc::ptr_eq(stays, old));
                !stays && (old.name == *name || old.is_of(token))
            };
            let old = before.map_or_else(Vec::new, |before| before.ever().filter(ends).collect());
            let keys = objects.remove(name.as_str()).unwrap_or_default();
            let started = Token::start(name, token.clone(), keys, old, &config.audit.directory);
            tokens.insert(name.clone(), started);
        }
        let stays = |name: &String| {
            let old = before.and_then(|before| before.tokens.get(name));
            old.zip(tokens.get(name)).is_some_and(|(old, new)| Arc::ptr_eq(old, new))
        };
        let entry = |(name, key): (&String, &config::Key)| {
            let old = before.filter(|before| before.config.keys.get(name) == Some(key));
            if let Some((shared, old)) = old.and_then(|before| before.keys.get_key_value(name.as_str()))
                && key.tokens.iter().all(stays)
            {
                return (Arc::clone(shared), Arc::clone(old));
            }
            let place = |token: &String| {
                let index = indices.get(&(name, token)).copied()?;
                Some(Place::new(Arc::clone(tokens.get(token)?), index))
            };
            let shared: Arc<str> = name.as_str().into();
            let places = key.tokens.iter().filter_map(place).collect();
            // Whichever of its tokens is open first now: it is the key that it was.
            let ours = before.and_then(|before| {
                let old = before.config.keys.get(name)?;
                let same = old.object == key.object && old.tokens.iter().any(|at| key.tokens.contains(at));
                before.keys.get(name.as_str()).filter(|_| same)?.ours()
            });
            (Arc::clone(&shared), Arc::new(KeyEntry::new(shared, key, places, ours)))
        };
        let keys = config.keys.iter().map(entry).collect();
        let mut retired = Vec::new();
        for Before { token: old, has_heir } in before.into_iter().flat_map(Self::ever) {
            let stays = tokens.get(&old.name).is_some_and(|stays| Arc::ptr_eq(stays, &old));
            let has_heir = has_heir || tokens.values().any(|token| old.has_heir_in(token));
            if !stays
                && (!old.is_over()
                    || (old.knows_of_its_pin() && !has_heir)
                    || old.locked_by_operator().is_some())
            {
                retired.push(Before { token: old, has_heir });
            }
        }
        Self { config, tokens, keys, retired }
    }

    /// Its tokens, and those of before that are remembered.
    fn ever(&self) -> impl Iterator<Item = Before> {
        let now = self.tokens.values().map(|token| Before { token: Arc::clone(token), has_heir: false });
        now.chain(self.retired.iter().cloned())
    }

    /// Tokens of this one that `next` does not have: nothing that takes their place closes those.
    pub(crate) fn without(&self, next: &Self) -> Vec<Arc<Token>> {
        let gone = self.tokens.iter().filter(|(name, _)| !next.tokens.contains_key(*name));
        gone.map(|(_, token)| Arc::clone(token)).collect()
    }

    /// Tokens of this one that `before` does not have, or has otherwise.
    pub(crate) fn since(&self, before: &Self) -> Vec<Arc<Token>> {
        let new = self
            .tokens
            .iter()
            .filter(|(name, token)| before.tokens.get(*name).is_none_or(|old| !Arc::ptr_eq(old, token)));
        new.map(|(_, token)| Arc::clone(token)).collect()
    }

    /// A key by its name.
    pub(crate) fn key(&self, name: &str) -> Result<&Arc<KeyEntry>, Status> {
        self.keys
            .get(name)
            .ok_or_else(|| Status::not_found(format!("no key {:?} is configured", short(name))))
    }
}
