//! `omsign-agent unblock`: a PIN that was blocked is set anew, by whoever holds the secret that is for that.

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::ZeroizeOnDrop;

use super::{Asked, OPEN, OperatorError, about, owner, running, settled, tell};
use crate::audit::{Audit, Entry};
use crate::config::Config;
use crate::host::wire::Fresh;
use crate::identity::Identity;
use crate::key_life::{KeyLifeError, Output};
use crate::secret::Pin;
use crate::token::{Login, Token};

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

/// Has a token's PIN set anew and the token opened with it; recorded before and after.
pub(super) async fn set_pin(
    token: &Token,
    unblock: &Unblock,
    audit: &Audit,
    identity: &Identity,
    rule: &str,
) -> Result<Output, OperatorError> {
    let failed = |reason: String| OperatorError::Token { token: token.name.clone(), reason };
    let entry = |outcome, reason| Entry {
        action: "unblock",
        rule: Some(rule),
        token: &token.name,
        outcome,
        reason,
        ..about(identity)
    };
    audit.record(&entry("begun", "")).await.map_err(KeyLifeError::from)?;
    let mut officer = Fresh::default();
    officer.puk.clone_from(&unblock.officer);
    let login = Login { pin: Pin::new(unblock.pin.clone()), officer: Some(officer) };
    let done = token.log_in(login, Instant::now() + OPEN).await;
    let reason = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let outcome = if reason.is_empty() { "done" } else { "failed" };
    audit.record(&entry(outcome, &reason)).await.map_err(KeyLifeError::from)?;
    done.map(|()| Output::Done).map_err(|error| failed(error.to_string()))
}

/// Sets a token's PIN anew, whatever became of the old one: in the agent, if one runs, else with a process of its own.
pub async fn unblock(config: &Config, unblock: Unblock) -> Result<Output, OperatorError> {
    if let Some(stream) = running(config).await? {
        return tell(stream, Asked::Unblock(unblock), &|_| {}).await;
    }
    let (identity, rule, audit) = owner(config)?;
    let configured = config.tokens.get(&unblock.token).cloned();
    let configured = configured.ok_or_else(|| KeyLifeError::NoToken(unblock.token.clone()))?;
    let token = Token::start(&unblock.token, configured, Vec::new(), None);
    settled(&token).await?;
    let done = set_pin(&token, &unblock, &audit, &identity, rule).await;
    token.stop().await;
    audit.close();
    done
}
