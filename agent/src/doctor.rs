//! `omsign-agent doctor`: what works, what does not, and what to do, for everything the configuration names.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use x509_cert::Certificate;
use x509_cert::der::Decode as _;

use crate::audit::Audit;
use crate::config::{self, Config, Key, UnixListen};
use crate::host::wire::{KeySpec, Survey};
use crate::pin;
use crate::policy::{Match, Rule};
use crate::spki::SpkiDer;
use crate::tls::{certificates_in, unusable};
use crate::token::{State, Token, survey};

/// How long a token may take to open.
const OPEN: Duration = Duration::from_secs(60);

/// One line of the report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Finding {
    /// Whether it works.
    pub level: Level,
    /// What was looked at, such as `token.release`.
    pub subject: String,
    /// What was found, and, when it does not work, what to do.
    pub message: String,
}

/// Whether something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It works.
    Ok,
    /// It works, but somebody should know.
    Warning,
    /// It does not work.
    Error,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "ERROR",
        };
        write!(f, "{level:<8}{}: {}", self.subject, self.message)
    }
}

#[derive(Default)]
struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, level: Level, subject: &str, message: impl Into<String>) {
        self.0.push(Finding { level, subject: subject.to_owned(), message: message.into() });
    }
}

/// Looks at everything. Each token is opened once, as the agent would, unless an agent already runs.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut report = Report::default();
    // An agent may listen elsewhere, or on TCP only. None begins meanwhile.
    let held = Audit::hold(&config.audit);
    let running = listeners(config, held.is_none(), &mut report);
    audit(config, &mut report);
    let (mut shown, mut owners) = (Shown::new(), BTreeMap::new());
    for (name, token) in &config.tokens {
        let subject = format!("token.{name}");
        let surveyed = survey(name, token).await;
        match &surveyed {
            Ok(found) => {
                report.add(Level::Ok, &subject, found.library.clone());
                tokens_present(found, &subject, &mut report);
            }
            Err(reason) => report.add(Level::Error, &subject, reason.clone()),
        }
        let found = surveyed.as_ref().ok().and_then(|found| place(token, found));
        let owner = found.map(|place| *owners.entry(place).or_insert(name));
        let other = owner.filter(|owner| *owner != name);
        if let Some(other) = other {
            let message = format!(
                "token.{other} is this device, found by another name; one section serves all its keys, with one process and one PIN"
            );
            report.add(Level::Error, &subject, message);
        }
        environment(token, &subject, &mut report);
        let source = pin::check(&token.pin);
        match &source {
            Ok(()) if token.pin.is_by_hand() => {
                let message = format!(
                    "its PIN is asked for at start, or given with `{}`: it was not logged in to here, and its keys were not tried",
                    token.pin.how_to_unlock(name)
                );
                report.add(Level::Warning, &subject, message);
            }
            Ok(()) => report.add(Level::Ok, &subject, "its PIN source can be read"),
            Err(reason) => report.add(Level::Error, &subject, reason),
        }
        if let Err(reason) = pin::check(&token.owner_auth) {
            report.add(Level::Error, &subject, format!("the owner's authorization value: {reason}"));
        }
        if running {
            let message = "an agent is running and owns it, or this user cannot tell, so it is not opened here; see `omsign agent \
                 status`";
            report.add(Level::Warning, &subject, message);
        } else if !token.pin.is_by_hand() && surveyed.is_ok() && source.is_ok() && other.is_none() {
            open(config, name, &subject, &mut report, &mut shown).await;
        }
    }
    drop(held);
    for (name, key) in &config.keys {
        certificates(name, key, &mut report);
    }
    report.0
}

/// What the module is known to need.
fn environment(token: &config::Token, subject: &str, report: &mut Report) {
    let config::Device::Pkcs11 { profile, .. } = &token.device else { return };
    for unset in profile.unset(&token.env) {
        report.add(Level::Warning, subject, format!("{unset}; add it to env"));
    }
}

/// Whether an agent answers on the configured socket, or is known to be `running` anyhow.
fn listeners(config: &Config, mut running: bool, report: &mut Report) -> bool {
    if let Some(unix) = &config.listen.unix {
        let shown = unix.path.display();
        let answers = std::os::unix::net::UnixStream::connect(&unix.path).is_ok();
        running |= answers;
        // The nearest that is there: the rest is made.
        let directory = unix.path.ancestors().skip(1).find(|path| path.exists()).unwrap_or(Path::new("/"));
        if answers {
            report.add(Level::Ok, "listen.unix", format!("an agent answers on {shown}"));
        } else if unix
            .path
            .symlink_metadata()
            .is_ok_and(|found| !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()))
        {
            report.add(
                Level::Error,
                "listen.unix",
                format!("{shown} is not a socket; remove it or choose another path"),
            );
        } else if rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_err() {
            let message = format!(
                "no permission to make {shown}; run the agent as a user who may, or choose another path"
            );
            report.add(Level::Error, "listen.unix", message);
        } else {
            report.add(Level::Ok, "listen.unix", format!("{shown} is free"));
        }
        for rule in shut_out(config, unix) {
            let message = format!(
                "{rule} lets a group in that cannot open {shown} (mode {:04o}); write group = \"…\" beside mode",
                unix.mode
            );
            report.add(Level::Warning, "listen.unix", message);
        }
        if unix.mode & 0o007 != 0 {
            let message =
                format!("mode {:04o} lets every user connect; the allow rules still decide", unix.mode);
            report.add(Level::Warning, "listen.unix", message);
        }
    }
    if let Some(tls) = &config.listen.tls {
        let message = format!("{} with certificate {}", tls.address, tls.certificate.display());
        let taken = std::net::TcpListener::bind(tls.address).err();
        match taken.filter(|_| !running) {
            // systemd may hold it for an agent that it starts at the first connection.
            Some(error) => report.add(Level::Warning, "listen.tls", format!("{message}: {error}")),
            None => report.add(Level::Ok, "listen.tls", message),
        }
        // What cannot be read, check-config says.
        let own = certificates_in(&tls.certificate).unwrap_or_default();
        if let Some((level, validity)) = own.first().and_then(|leaf| validity(leaf)) {
            report.add(level, "listen.tls", format!("its certificate: {validity}"));
        }
        if let Some(reason) = own.first().and_then(|leaf| unusable(leaf)) {
            report.add(Level::Warning, "listen.tls", format!("its certificate: {reason}"));
        }
        let by_certificate = |rule: &Rule| !matches!(rule.matches, Match::Uid(_) | Match::Gid(_));
        if config.listen.unix.is_none() && !config.operators.iter().any(by_certificate) {
            let message = "operators are told by their Unix ids, and there is no Unix socket: nobody could unlock a \
                           token; write [listen] unix, or an [[operator]] rule for a certificate";
            report.add(Level::Warning, "operator", message);
        }
    }
    running
}

/// Rules for Unix groups whose members cannot connect: the socket is for another group.
fn shut_out<'a>(config: &'a Config, unix: &UnixListen) -> impl Iterator<Item = &'a str> {
    let own = unix.group.unwrap_or_else(|| rustix::process::getegid().as_raw());
    let (everybody, group) = (unix.mode & 0o002 != 0, unix.mode & 0o020 != 0);
    let rules = config.keys.values().flat_map(|key| &key.allow).chain(&config.operators);
    let shut_out = move |rule: &&Rule| match rule.matches {
        Match::Gid(gid) => !(everybody || group && gid == own),
        _ => false,
    };
    rules.filter(shut_out).map(|rule| rule.name.as_str())
}

fn audit(config: &Config, report: &mut Report) {
    let shown = config.audit.directory.display();
    let existing = config.audit.directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    // A disk that is full takes a file, and nothing in it.
    let written = tempfile::tempfile_in(existing)
        .and_then(|mut file| file.write_all(&[0; 4096]).and_then(|()| file.sync_data()));
    match written {
        Ok(()) => report.add(Level::Ok, "audit", format!("{shown} can be written")),
        Err(error) => {
            let message = format!("{shown} cannot be written: {error}; nothing is signed without it");
            report.add(Level::Error, "audit", message);
        }
    }
}

/// Where the one token of a section is.
fn place<'a>(
    token: &'a config::Token,
    found: &Survey,
) -> Option<(&'a Path, &'a BTreeMap<String, String>, u64)> {
    let config::Device::Pkcs11 { module, .. } = &token.device else { return None };
    let mut selected = found.tokens.iter().filter(|token| token.selected);
    let slot = selected.next()?.slot;
    selected.next().is_none().then_some((module.as_path(), &token.env, slot))
}

fn tokens_present(found: &Survey, subject: &str, report: &mut Report) {
    for token in &found.tokens {
        let notes =
            if token.notes.is_empty() { String::new() } else { format!("; {}", token.notes.join("; ")) };
        let chosen = if token.selected { "chosen" } else { "not chosen" };
        let message = format!("slot {}: {} ({chosen}){notes}", token.slot, token.device);
        let is_everybodys = token.selected && !token.factory.is_empty();
        report.add(if is_everybodys { Level::Warning } else { Level::Ok }, subject, message);
    }
    match found.tokens.iter().filter(|token| token.selected).count() {
        1 => {}
        0 => {
            let labels: Vec<_> = found.tokens.iter().map(|token| format!("{:?}", token.label)).collect();
            let present = if labels.is_empty() { "none".into() } else { labels.join(", ") };
            let message = format!(
                "the token is not present; tokens present: {present}; plug it in, initialize it (`omsign-agent init`, \
                 or the vendor's tool), see that this user may open it, or correct `token`"
            );
            report.add(Level::Error, subject, message);
        }
        _ => {
            let message = "several tokens match; tell them apart with token = { serial = \"…\" }";
            report.add(Level::Error, subject, message);
        }
    }
}

/// The public half of each key, and the token that showed it.
type Shown = BTreeMap<String, (String, SpkiDer)>;

async fn open(config: &Config, name: &str, subject: &str, report: &mut Report, shown: &mut Shown) {
    let Some(token) = config.tokens.get(name) else { return };
    let on_token = config.keys.iter().filter(|(_, key)| key.tokens.iter().any(|token| token == name));
    let keys: Vec<_> = on_token.map(|(name, key)| key.spec(name)).collect();
    let opened = Token::start(name, token.clone(), keys.clone(), Vec::new(), &config.audit.directory);
    let settled = tokio::time::timeout(OPEN, opened.settled()).await;
    match settled.unwrap_or(State::Starting) {
        State::Ready(_) => {
            report.add(Level::Ok, subject, "logged in");
            for (index, KeySpec { name: key, object, .. }) in keys.iter().enumerate() {
                let subject = format!("key.{key}");
                match opened.key(index) {
                    Some(Ok(public)) => {
                        if let Some(problem) =
                            config.keys.get(key).and_then(|key| mismatch(key, &public.spki))
                        {
                            report.add(Level::Error, &subject, problem);
                        }
                        let other = || (name.to_owned(), public.spki.clone());
                        let (one, spki) = &*shown.entry(key.clone()).or_insert_with(other);
                        if *spki != public.spki {
                            let message = format!(
                                "token {name} holds another key under this name than token {one}: only one of them signs"
                            );
                            report.add(Level::Error, &subject, message);
                        }
                        let message = format!("{object}: {}, signs and verifies", public.algorithm.name());
                        report.add(Level::Ok, &subject, message);
                    }
                    Some(Err(reason)) => report.add(Level::Error, &subject, reason),
                    None => report.add(Level::Error, &subject, "the token did not say anything about it"),
                }
            }
        }
        State::Locked(reason) | State::Down(reason) => report.add(Level::Error, subject, reason),
        State::Starting => {
            report.add(Level::Error, subject, "it does not open in time; is the device reachable?")
        }
    }
    opened.stop().await;
}

/// What is wrong with a key's certificate, as seen from the key.
fn mismatch(key: &Key, spki: &SpkiDer) -> Option<String> {
    let certified = SpkiDer::of_certificate(key.certificate_chain.first()?)?;
    let what = "its certificate is for another key; write the one that was issued for it, leaf first";
    (certified != *spki).then(|| what.into())
}

/// Whether a certificate is valid, and for how long. The key's owner has to ask for the next one in time.
fn validity(leaf: &[u8]) -> Option<(Level, String)> {
    const SOON: Duration = Duration::from_secs(30 * 24 * 60 * 60);
    let validity = *Certificate::from_der(leaf).ok()?.tbs_certificate().validity();
    let (from, until) = (validity.not_before.to_system_time(), validity.not_after.to_system_time());
    let (now, shown) = (SystemTime::now(), humantime::format_rfc3339_seconds);
    Some(if now > until {
        (Level::Error, format!("it expired on {}; have it renewed", shown(until)))
    } else if now < from {
        (Level::Error, format!("it is valid from {} only; is the clock right?", shown(from)))
    } else if now + SOON > until {
        (Level::Warning, format!("it expires on {}; have it renewed", shown(until)))
    } else {
        (Level::Ok, format!("valid until {}", shown(until)))
    })
}

fn certificates(name: &str, key: &Key, report: &mut Report) {
    let subject = format!("key.{name}");
    match key.certificate_chain.first() {
        None => report.add(Level::Ok, &subject, "no certificate_chain: signs with the key method"),
        Some(leaf) => {
            let described = crate::identity::Identity::from_certificate(leaf);
            let described = described.map(|identity| identity.to_string()).unwrap_or_default();
            let (level, validity) = validity(leaf).unwrap_or((Level::Ok, String::new()));
            let message =
                format!("certificate_chain of {}: {described}; {validity}", key.certificate_chain.len());
            report.add(level, &subject, message);
        }
    }
}
