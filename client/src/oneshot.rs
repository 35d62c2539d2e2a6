//! Signing with a token when no agent runs: a private `omsign-agent` for this one call, over a socketpair, so
//! that this process never loads a vendor's library.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread::JoinHandle;

use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use crate::agent::{Agent, AgentError};

/// The one key that a private agent has.
pub const KEY: &str = "key";

/// The one token that it is on. No section of a configuration can have this name, and what is kept of one is not its.
pub const TOKEN: &str = "key:";

/// A private agent. It ends with this value.
pub struct PrivateAgent {
    /// The line to it. Dropped first: the agent ends when it is closed.
    agent: Option<Agent>,
    child: Child,
    /// Collects what it says on standard error, so that a chatty library never blocks on a full pipe.
    said: Option<JoinHandle<String>>,
}

impl PrivateAgent {
    /// Starts an agent for the key that `uri` names, which must not hold a PIN.
    pub fn start(uri: &str) -> Result<Self, AgentError> {
        let (ours, theirs) = UnixStream::pair()?;
        let program = program();
        let mut command = Command::new(&program);
        command
            .args(["one-shot", "--uri", uri])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        if std::env::var_os("OMSIGN_LOG").is_none() {
            // Its log is for operators; what matters here arrives as an error.
            command.env("OMSIGN_LOG", "off").stderr(Stdio::piped());
        }
        let start = |error| AgentError::Start(format!("{}: {error}", program.display()));
        let mut child = command.spawn().map_err(start)?;
        let said = child.stderr.take().map(|stderr| std::thread::spawn(|| collect(stderr)));
        Ok(Self { agent: Some(Agent::over(ours)?), child, said })
    }

    /// The line to it.
    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("taken only when dropped")
    }

    /// What it said when it ended, if that explains an error better than the broken line does.
    pub fn why(mut self, error: AgentError) -> AgentError {
        drop(self.agent.take());
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        match said.lines().find_map(|line| line.strip_prefix("error: ")) {
            Some(reason) => AgentError::Private(reason.to_owned()),
            None => error,
        }
    }
}

/// An error of a private agent without the names that only it knows: its one key and token.
pub fn without_names(error: AgentError) -> AgentError {
    match error {
        AgentError::KeyNotReady { reason, .. } => AgentError::Private(reason),
        AgentError::Status(status) => {
            let message = status.message();
            AgentError::Private(message.trim_start_matches(&format!("token {TOKEN}: ")).to_owned())
        }
        error => error,
    }
}

/// Reads to the end and keeps the start.
fn collect(mut from: ChildStderr) -> String {
    let mut start = Vec::new();
    let _ = from.by_ref().take(16 << 10).read_to_end(&mut start);
    let _ = std::io::copy(&mut from, &mut std::io::sink());
    String::from_utf8_lossy(&start).into_owned()
}

impl Drop for PrivateAgent {
    fn drop(&mut self) {
        drop(self.agent.take());
        // It closes its token in bounded time and ends.
        let _ = self.child.wait();
    }
}

/// The agent beside this program, or on the PATH.
fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("omsign-agent"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from("omsign-agent"))
}

/// Takes `pin-value` out of a PKCS#11 URI (RFC 7512, 2.4): what is left may be seen by others.
pub fn split_pin(uri: &str) -> Result<(String, Option<Zeroizing<String>>), AgentError> {
    let Some((path, query)) = uri.split_once('?') else { return Ok((uri.to_owned(), None)) };
    let (mut kept, mut pin) = (Vec::new(), None);
    for attribute in query.split('&') {
        match attribute.strip_prefix("pin-value=") {
            Some(value) => {
                let text = percent_decode_str(value).decode_utf8();
                let text =
                    text.map_err(|_| AgentError::Private("PKCS#11 URI: pin-value is not UTF-8".into()))?;
                pin = Some(Zeroizing::new(text.into_owned()));
            }
            None => kept.push(attribute),
        }
    }
    let uri = if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) };
    Ok((uri, pin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_leaves_the_uri() {
        let (uri, pin) = split_pin("pkcs11:token=t?pin-value=12%2034&module-path=/m.so").expect("text");
        assert_eq!(
            (uri.as_str(), pin.as_deref().map(String::as_str)),
            ("pkcs11:token=t?module-path=/m.so", Some("12 34"))
        );
        let (uri, pin) = split_pin("pkcs11:token=t?pin-value=1").expect("text");
        assert_eq!((uri.as_str(), pin.is_some()), ("pkcs11:token=t", true));
        assert_eq!(split_pin("pkcs11:token=t").expect("no PIN").0, "pkcs11:token=t");
        assert!(split_pin("pkcs11:token=t?pin-value=%ff").is_err(), "never another PIN than was given");
    }
}
