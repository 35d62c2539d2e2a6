//! One function per command: arguments in, the library called, the result printed.

mod agent;
mod cache;
mod digest;
mod hasher;
mod inspect;
mod outline;
mod private;
mod sign;
mod trust;
mod undone;
mod verdict;
mod verify;

use clap::CommandFactory as _;
use clap_complete::Shell;
use omsign::Error;
use omsign::address::{Address, TlsFiles};
use omsign::agent::AgentError;
use omsign::selection::{PUBLISHED, Selection};

pub(crate) use self::agent::{agent, keys};
pub(crate) use self::cache::cache;
pub(crate) use self::digest::digest;
pub(crate) use self::inspect::inspect;
pub(crate) use self::sign::sign;
pub(crate) use self::trust::trust;
pub(crate) use self::verify::verify;
use crate::{cli, report};

/// Why a command did not succeed, by its exit status.
pub(crate) enum Failure {
    /// 1: it was checked and found wrong.
    Wrong(Error),
    /// 1: the agent cannot do all that it is there for.
    NotReady,
    /// 2: it could not be done.
    Undone(Error),
    /// 2: the arguments contradict each other.
    Usage(&'static str),
    /// 2: it was done, and its result is lost.
    Unprinted(std::io::Error),
}

impl Failure {
    /// In one line, for people.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Wrong(error) | Self::Undone(error) => omsign::with_causes(error),
            Self::NotReady => "not everything is ready".to_owned(),
            Self::Usage(what) => (*what).to_owned(),
            Self::Unprinted(error) => format!("the result could not be written to standard output: {error}"),
        }
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Undone(error.into())
    }
}

type Done = Result<(), Failure>;

/// A check that failed because of what was checked is not one that could not be made.
fn checked(error: Error) -> Failure {
    if error.found_wrong() { Failure::Wrong(error) } else { Failure::Undone(error) }
}

/// What is left out of a model without anybody having said so.
fn note_published(selection: &Selection<'_>, quiet: bool) {
    if selection.published_bundle() && !quiet {
        report::say(format_args!("note: {PUBLISHED} in the model is a bundle, and no part of it"));
    }
}

/// What a shell completes.
pub(crate) fn completions(shell: Shell) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::Cli::command(), "omsign", &mut script);
    report::raw(&script)
}

fn address(connection: &cli::Connection) -> Result<Address, AgentError> {
    let credentials = TlsFiles {
        ca: connection.agent_ca.clone().unwrap_or_default(),
        certificate: connection.agent_certificate.clone().unwrap_or_default(),
        private_key: connection.agent_key.clone().unwrap_or_default(),
    };
    // An empty variable is none.
    Address::parse(connection.agent.as_deref().filter(|agent| !agent.is_empty()), credentials)
}
