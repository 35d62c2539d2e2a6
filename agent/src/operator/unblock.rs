//! `omsign-agent unblock`: a PIN that was blocked is set anew, by whoever holds the secret that is for that. In the agent
//! while the token is locked, when no process has its device; without one, in a process of its own.

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::ZeroizeOnDrop;

use super::{Asked, OPEN, OperatorError, owner, running, tell};
use crate::audit::{Audit, Entry};
use crate::config::Config;
use crate::host::wire::Fresh;
use crate::identity::Identity;
use crate::key_life::{KeyLifeError, Output};
use crate::secret::Pin;
use crate::token::{self, Refusals, Token, TokenError};

/// A token whose PIN is set anew, and what that takes.
#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
pub struct Unblock {
    /// Its name.
    #[zeroize(skip)]
    pub token: String,
    /// The security officer's PIN, or a card's PUK.
    pub officer: String,
    /// The PIN that it gets; empty for the configured one.
    pub pin: String,
}

impl Unblock {
    fn secrets(&self) -> Fresh {
        let mut fresh = Fresh::default();
        fresh.puk.clone_from(&self.officer);
        fresh.pin.clone_from(&self.pin);
        fresh
    }

    /// For a token of this agent, which is then opened with it.
    pub(super) async fn on(
        &self,
        token: &Token,
        audit: &Audit,
        identity: &Identity,
        rule: &str,
    ) -> Result<Output, OperatorError> {
        let deadline = Instant::now() + OPEN;
        let work = async {
            token.unblock(self.secrets(), deadline).await?;
            match token.locked_by_operator() {
                // The PIN is another one now, and that is all.
                Some(_) => {
                    token.has_another_pin().await;
                    Ok(())
                }
                None => token.unlock(Pin::new(self.pin.clone()), deadline).await,
            }
        };
        self.recorded(work, audit, identity, rule).await
    }

    /// Has it recorded before and after.
    async fn recorded(
        &self,
        work: impl Future<Output = Result<(), TokenError>>,
        audit: &Audit,
        identity: &Identity,
        rule: &str,
    ) -> Result<Output, OperatorError> {
        let (action, rule, key) = ("unblock", Some(rule), self.token.as_str());
        let entry = |outcome, reason| Entry { action, rule, key, outcome, reason, ..Entry::about(identity) };
        audit.record_soon(&entry("begun", "")).await.map_err(KeyLifeError::from)?;
        let done = work.await;
        let reason = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let outcome = if reason.is_empty() { "done" } else { "failed" };
        audit.record_soon(&entry(outcome, &reason)).await.map_err(KeyLifeError::from)?;
        let failed = |_| OperatorError::Token { token: self.token.clone(), reason };
        done.map(|()| Output::Done).map_err(failed)
    }
}

/// Sets a token's PIN anew, whatever became of the old one: in the agent, if one runs, else with a process of its own.
pub async fn unblock(config: &Config, unblock: Unblock) -> Result<Output, OperatorError> {
    if let Some(stream) = running(config).await? {
        return tell(stream, Asked::Unblock(unblock), &|_| {}).await;
    }
    let (identity, rule, audit) = owner(config)?;
    let configured = config.tokens.get(&unblock.token);
    let configured = configured.ok_or_else(|| KeyLifeError::NoToken(unblock.token.clone()))?;
    let work = token::unblock(&unblock.token, configured, unblock.secrets());
    let done = unblock.recorded(work, &audit, &identity, rule).await;
    if done.is_ok() {
        // It is what the source holds, whatever that was before.
        Refusals::of(configured, &config.audit.directory).forget();
    }
    audit.close();
    done
}
