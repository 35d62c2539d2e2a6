//! What operators do over a key's life: the same whether an agent does it for them, in the process that owns the
//! device, or, while no agent runs, this process starts one for it. Never over the network; each is recorded.

pub mod attestation;
mod certificate;
pub mod challenge;
mod command;
mod error;
mod yubihsm;
mod yubikey;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use der::pem::LineEnding;
use der::{Decode as _, EncodePem as _};
use tokio::sync::watch;
use tokio::time::Instant;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use self::attestation::Attestation;
pub use self::certificate::Subject;
use self::certificate::Unsigned;
pub use self::command::{Action, Command, NEXT, Named, Output, PREVIOUS, TokenKeys};
pub use self::error::KeyLifeError;
use crate::audit::{Audit, AuditError, Entry};
use crate::config::{Config, Device};
pub use crate::host::task::{Asking, Need, Template, TouchPolicy};
use crate::host::task::{Done, Task};
use crate::host::wire::KeySpec;
use crate::identity::Identity;
use crate::public_key::PublicKey;
use crate::replay::Step;
use crate::setup::{short, start};
use crate::spki::SpkiDer;
use crate::token::{Token, TokenError};

/// How long a command may take: somebody may have to touch the device, and some keys take minutes to make.
const DEADLINE: Duration = Duration::from_secs(300);

/// As much is recorded of why something failed.
const REASON_BYTES: usize = 1024;

/// Is told what a person has to do meanwhile.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// An operator, what they work on, and where it is recorded.
pub struct Operator<'a> {
    /// What names mean.
    pub config: &'a Config,
    /// Open tokens, by name.
    pub tokens: &'a BTreeMap<String, Arc<Token>>,
    /// Where it is recorded.
    pub audit: &'a Audit,
    /// Who asks.
    pub identity: &'a Identity,
    /// The rule that lets them.
    pub rule: &'a str,
}

/// A key and where it is.
struct Place<'a> {
    name: &'a str,
    token: &'a Arc<Token>,
    spec: KeySpec,
}

impl Operator<'_> {
    /// Does it, and records it before anything is released. `say` is told what a person has to do meanwhile.
    pub async fn run(&self, command: &Command, say: Say<'_>) -> Result<Output, KeyLifeError> {
        let (key, action) = match command {
            Command::List(token) => return self.list(token.as_deref(), say).await.map(Output::Listed),
            Command::Reload => return Ok(Output::Done),
            Command::Key(key, action) => (key, action),
        };
        let recorded = action.recorded();
        if let Some(name) = recorded.filter(|_| action.changes()) {
            self.record(name, key, "begun", "").await?;
        }
        let done = self.carry_out(key, action, say).await;
        if let Some(name) = recorded {
            let reason = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let outcome = if reason.is_empty() { "done" } else { "failed" };
            self.record(name, key, outcome, &reason).await?;
        }
        done
    }

    async fn carry_out(&self, key: &str, action: &Action, say: Say<'_>) -> Result<Output, KeyLifeError> {
        let place = self.place(key)?;
        match action {
            // What it is to be like is not the operator's to say: it would be read.
            Action::Generate(template) => {
                self.generate(&place, Template { like: None, ..template.clone() }, say).await
            }
            Action::Public(need) => {
                let (_, public) = self.everywhere(key, *need, say).await?;
                Ok(Output::Pem(pem(&public.spki)?))
            }
            Action::Csr(subject) => {
                place.signed(Unsigned::request(&place.found(say).await?, subject)?, say).await
            }
            Action::SelfSign(subject, days) => {
                place.signed(Unsigned::certificate(&place.found(say).await?, subject, *days)?, say).await
            }
            Action::ImportCertificate(certificate) => {
                let (places, public) = self.everywhere(key, Need::Signs, say).await?;
                let certificate = certificate::of(&public.spki, certificate)?;
                for place in &places {
                    place.ask(Task::Store(place.spec.clone(), certificate.clone()), say).await?;
                }
                Ok(Output::Done)
            }
            Action::Attest(asking) => {
                let is_tpm = matches!(self.device(&place), Some(Device::Tpm(_)));
                if asking.challenge.is_some() && !is_tpm {
                    return Err(place.failed(TokenError::Refused("only a TPM answers a challenge".into())));
                }
                if !asking.nonce.is_empty() && !is_tpm {
                    return Err(place.failed(TokenError::Refused("only a TPM attests with a nonce".into())));
                }
                let public = place.found(say).await?;
                match place.ask(Task::Attest(place.spec.clone(), asking.clone()), say).await? {
                    Done::Attested(evidence) => {
                        Ok(Output::Attested(Box::new(Attestation::new(key, &public, evidence))))
                    }
                    _ => Err(place.failed(surprise())),
                }
            }
            Action::Delete(public) => {
                let (places, found) = self.everywhere(key, Need::Shown, say).await?;
                if pem(&found.spki)? != *public {
                    let why = "it holds another key than was confirmed";
                    return Err(place.failed(TokenError::Refused(why.into())));
                }
                let mut gone: Vec<&str> = Vec::new();
                for place in &places {
                    let delete = Task::Delete(place.spec.clone(), found.spki.clone());
                    match ask(place.token, delete, say).await {
                        Err(error) if !gone.is_empty() => {
                            let (key, token) = (key.to_owned(), place.token.name.clone());
                            let gone = gone.join(" and ");
                            return Err(KeyLifeError::Undeleted { key, token, error, gone });
                        }
                        done => done.map_err(|error| place.failed(error))?,
                    };
                    // Nobody is to be told that it is ready.
                    place.token.look_again(true).await;
                    gone.push(&place.token.name);
                }
                Ok(Output::Done)
            }
        }
    }

    async fn generate(
        &self,
        place: &Place<'_>,
        mut template: Template,
        say: Say<'_>,
    ) -> Result<Output, KeyLifeError> {
        let (key, token) = (place.name, &place.token.name);
        let others = self.tokens_of(key).get(1..).unwrap_or_default().join(" and ");
        if !others.is_empty() && !matches!(self.device(place), Some(Device::Pkcs11 { .. })) {
            let why = format!("a key that is made here can never be on {others}, too");
            return Err(place.failed(TokenError::Refused(why)));
        }
        if let Some(present) = key.strip_suffix(NEXT) {
            let present = self.place(present)?;
            if template.key_type.is_none() {
                let find = Task::Find(present.spec.clone(), Need::Shown);
                template.key_type = present.public(find, say).await?.spki.key_type();
            }
            template.like = Some(present.spec.object);
        }
        let made = place.public(Task::Generate(place.spec.clone(), template), say).await?;
        if !others.is_empty() {
            say(&format!(
                "it is on {token} alone: bring it to {others} with the vendor's tools, or they never sign with it"
            ));
        }
        // Whoever waits for this key need not wait for the next look. One that is to take another's place has its own
        // time.
        if !key.ends_with(NEXT) && !place.token.look_again(false).await {
            say(&format!("it signs once the PIN was typed again: {}", place.token.how_to_unlock()));
        }
        Ok(Output::Pem(pem(&made.spki)?))
    }

    fn device(&self, place: &Place<'_>) -> Option<&Device> {
        self.config.tokens.get(&place.token.name).map(|token| &token.device)
    }

    fn tokens_of(&self, key: &str) -> &[String] {
        let found = self.config.keys.get(key.strip_suffix(NEXT).unwrap_or(key));
        found.map(|key| key.tokens.as_slice()).unwrap_or_default()
    }

    async fn list(&self, only: Option<&str>, say: Say<'_>) -> Result<Vec<TokenKeys>, KeyLifeError> {
        if let Some(name) = only.filter(|name| !self.tokens.contains_key(*name)) {
            return Err(KeyLifeError::NoToken(name.to_owned()));
        }
        let mut all = Vec::new();
        for (name, token) in self.tokens.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            let configured = || {
                let on_it = self.config.keys.iter().filter(|(_, key)| key.tokens.contains(name));
                on_it.flat_map(|(name, key)| {
                    let next = key.next.iter().map(move |next| (format!("{name}{NEXT}"), next));
                    std::iter::once((name.clone(), &key.object)).chain(next)
                })
            };
            let objects = configured().map(|(_, object)| object.clone()).collect();
            let keys = match ask(token, Task::List(objects), say).await {
                Ok(Done::Listed(listed)) => Ok(listed
                    .into_iter()
                    .map(|listed| {
                        let names = configured().filter(|(_, object)| object.names(&listed.object));
                        let mut names: Vec<_> = names.map(|(name, _)| name).collect();
                        let previous = self.config.keys.iter().filter(|(_, key)| {
                            key.previous.iter().any(|previous| previous.public_key.0 == listed.public_key)
                        });
                        names.extend(previous.map(|(name, _)| format!("{name}{PREVIOUS}")));
                        Named { names, listed }
                    })
                    .collect()),
                Ok(_) => Err(surprise().to_string()),
                Err(error) => Err(error.to_string()),
            };
            all.push(TokenKeys { token: name.clone(), keys });
        }
        Ok(all)
    }

    fn known_keys(&self) -> String {
        const SHOWN: usize = 8;
        let names: Vec<_> = self.config.keys.keys().take(SHOWN).map(String::as_str).collect();
        let more = if self.config.keys.len() > SHOWN { " and more" } else { "" };
        format!("{}{more}", names.join(", "))
    }

    /// A key that is configured, on the first of its tokens.
    fn place<'b>(&'b self, name: &'b str) -> Result<Place<'b>, KeyLifeError> {
        self.place_on(name, None)
    }

    fn place_on<'b>(&'b self, name: &'b str, token: Option<&str>) -> Result<Place<'b>, KeyLifeError> {
        let (plain, next) = name.strip_suffix(NEXT).map_or((name, false), |plain| (plain, true));
        let missing = || KeyLifeError::NoKey { name: plain.to_owned(), known: self.known_keys() };
        let key = self.config.keys.get(plain).ok_or_else(missing)?;
        let token = token.or_else(|| key.tokens.first().map(String::as_str));
        let token = token.and_then(|token| self.tokens.get(token)).ok_or_else(missing)?;
        let spec = match next {
            true => key.next_spec(name).ok_or_else(|| KeyLifeError::NoNext(plain.to_owned()))?,
            false => key.spec(name),
        };
        Ok(Place { name, token, spec })
    }

    /// A key on each of its tokens: all of them are there, with the same key, before anything is done to one.
    async fn everywhere<'b>(
        &'b self,
        key: &'b str,
        need: Need,
        say: Say<'_>,
    ) -> Result<(Vec<Place<'b>>, PublicKey), KeyLifeError> {
        let find = |place: &Place<'_>| Task::Find(place.spec.clone(), need);
        let first = self.place(key)?;
        let public = first.public(find(&first), say).await?;
        let mut places = vec![first];
        for token in self.tokens_of(key).iter().skip(1) {
            let other = self.place_on(key, Some(token))?;
            if other.public(find(&other), say).await?.spki != public.spki {
                let why = "it holds another key than the others";
                return Err(other.failed(TokenError::Refused(why.into())));
            }
            places.push(other);
        }
        Ok((places, public))
    }

    async fn record(
        &self,
        action: &'static str,
        key: &str,
        outcome: &'static str,
        reason: &str,
    ) -> Result<(), AuditError> {
        let token = self.place(key).map(|place| place.token.name.clone()).unwrap_or_default();
        let rule = Some(self.rule);
        // What operators call a key may be of any length, and errors repeat it.
        let (key, reason) = (short(key), start(reason, REASON_BYTES));
        let entry =
            Entry { action, rule, key, token: &token, outcome, reason, ..Entry::about(self.identity) };
        self.audit.record_soon(&entry).await
    }
}

impl Place<'_> {
    async fn ask(&self, task: Task, say: Say<'_>) -> Result<Done, KeyLifeError> {
        ask(self.token, task, say).await.map_err(|error| self.failed(error))
    }

    async fn public(&self, task: Task, say: Say<'_>) -> Result<PublicKey, KeyLifeError> {
        match self.ask(task, say).await? {
            Done::Key(public) => Ok(public),
            _ => Err(self.failed(surprise())),
        }
    }

    /// As it signs.
    async fn found(&self, say: Say<'_>) -> Result<PublicKey, KeyLifeError> {
        self.public(Task::Find(self.spec.clone(), Need::Signs), say).await
    }

    async fn signed(&self, unsigned: Unsigned, say: Say<'_>) -> Result<Output, KeyLifeError> {
        match self.ask(Task::Sign(self.spec.clone(), unsigned.message.clone()), say).await? {
            Done::Signature(signature) => Ok(Output::Pem(unsigned.signed(&signature)?)),
            _ => Err(self.failed(surprise())),
        }
    }

    fn failed(&self, error: TokenError) -> KeyLifeError {
        tracing::debug!(key = self.name, %error, "an operator's task failed");
        KeyLifeError::Device { token: self.token.name.clone(), error }
    }
}

/// Has a token do something, and says what it waits for.
async fn ask(token: &Token, task: Task, say: Say<'_>) -> Result<Done, TokenError> {
    let (tell, mut steps) = watch::channel(Step::Working);
    let touch = async {
        while steps.changed().await.is_ok() {
            if let Step::Touch(message) = &*steps.borrow_and_update() {
                say(message);
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        done = token.operate(task, &tell, Instant::now() + DEADLINE) => done,
        () = touch => Err(surprise()),
    }
}

fn surprise() -> TokenError {
    TokenError::Unavailable("its process did what was not asked".into())
}

fn pem(spki: &SpkiDer) -> Result<String, der::Error> {
    SubjectPublicKeyInfoOwned::from_der(&spki.0)?.to_pem(LineEnding::LF)
}
