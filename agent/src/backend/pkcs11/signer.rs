//! A thread that signs with a token's keys, in a session of its own.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use cryptoki::session::Session;

use super::super::{Notify, gone, refused, usable};
use super::errors::{classify, describe, is_out_of_host_memory, is_stale, is_throttled};
use super::objects::{self, Found};
use super::{Key, OpenToken, open_session};
use crate::algorithm::Content;
use crate::backend;
use crate::host::wire::{Class, Failure};

/// One session with its keys, for one thread.
pub(super) struct Signer<'a> {
    token: &'a OpenToken,
    /// Absent while it is replaced, and while there is no memory for another.
    session: Option<Session>,
    keys: Vec<Option<Found>>,
}

/// How long others may have taken the memory. After that the module has lost it itself, which only a new process cures.
const STARVED: Duration = Duration::from_secs(5);

impl OpenToken {
    /// What it means that signing failed. A module may have lost its memory for good.
    fn starved(&self, what: &str, error: &cryptoki::error::Error) -> Failure {
        let throttled = is_throttled(&self.profile, error);
        let failure = match classify(what, error) {
            failure if throttled => Failure { class: Class::Busy, ..failure },
            failure => failure,
        };
        let mut starved = self.starved.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_out_of_host_memory(error) && !throttled {
            *starved = None;
            return failure;
        }
        let now = Instant::now();
        // What was long ago says nothing of now.
        let since =
            starved.filter(|(_, last)| now.duration_since(*last) < STARVED).map_or(now, |(since, _)| since);
        *starved = Some((since, now));
        if now.duration_since(since) > STARVED { gone(failure.message) } else { failure }
    }
}

impl<'a> Signer<'a> {
    pub(super) fn new(token: &'a OpenToken) -> Result<Self, Failure> {
        let session = open_session(&token.pkcs11, token.slot, &token.profile)
            .map_err(|error| classify("open a session", &error))?;
        let keys = token.keys.iter().map(|key| key.as_ref().map(|key| key.found.clone())).collect();
        Ok(Self { token, session: Some(session), keys })
    }

    fn reopen(&mut self, index: usize, key: &Key, notify: Notify<'_>) -> Result<(), Failure> {
        let ways = &self.token.ways;
        let session = self.renew_session().map_err(|failure| gone(failure.message))?;
        // Objects look deleted when the login or the token is lost; only a fresh process can tell.
        let handle = objects::find_private(session, &key.object)
            .map_err(|failure| gone(format!("the key {} vanished: {failure}", key.name)))?;
        // A new key may have the name, and another public half than callers were told.
        match objects::proven(session, Found { handle, ..key.found.clone() }, ways, notify) {
            Ok(Some(found)) if found.public == key.found.public => {
                if let Some(known) = self.keys.get_mut(index) {
                    *known = Some(found);
                }
                Ok(())
            }
            Ok(_) => Err(gone(format!("the key {} was replaced by another", key.name))),
            // A PIN that was refused is not for the next process to offer.
            Err(failure) if failure.class == Class::Locked => Err(failure),
            Err(failure) => Err(gone(failure.message)),
        }
    }

    /// Closes the session first: the token may be at its limit.
    fn renew_session(&mut self) -> Result<&Session, Failure> {
        drop(self.session.take());
        let opened = open_session(&self.token.pkcs11, self.token.slot, &self.token.profile);
        let waits = |error: &cryptoki::error::Error| {
            is_out_of_host_memory(error) || is_throttled(&self.token.profile, error)
        };
        let opened = opened.map_err(|error| match waits(&error) {
            true => self.token.starved("open a session", &error),
            false => gone(classify("open a session", &error).message),
        })?;
        Ok(self.session.insert(opened))
    }
}

impl backend::Signer for Signer<'_> {
    /// A stale session or handle is replaced once.
    fn sign(&mut self, index: usize, content: &Content, notify: Notify<'_>) -> Result<Vec<u8>, Failure> {
        let key = usable(&self.token.keys, index)?;
        let bytes = key.found.public.bytes(content).map_err(refused)?;
        let ways = &self.token.ways;
        let mut reopened = false;
        if self.session.is_none() {
            self.renew_session()?;
        }
        loop {
            let found = usable(&self.keys, index)?;
            let session = self.session.as_ref().ok_or_else(|| gone("no session is open".into()))?;
            let error = match objects::sign(session, found, bytes, ways, notify) {
                Ok(Ok(signature)) => {
                    *self.token.starved.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return Ok(signature);
                }
                Ok(Err(malformed)) => return Err(gone(format!("the token's answer: {malformed}"))),
                Err(error) => error,
            };
            tracing::debug!(key = %key.name, %error, "C_Sign failed");
            if !is_stale(&error) {
                // After a failed C_Sign the operation may still be active: the session is spent. Without another one, the
                // next signature says so.
                let _ = self.renew_session();
                return Err(self.token.starved("sign", &error));
            }
            if std::mem::replace(&mut reopened, true) {
                return Err(gone(format!("cannot sign: {}", describe(&error))));
            }
            self.reopen(index, key, notify)?;
        }
    }
}
