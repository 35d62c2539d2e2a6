//! What an agent can be asked, but for signatures.

use clap::{Args, Subcommand};

use super::Connection;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) command: Option<KeysCommand>,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Prints a key's certificate chain, or its public key where it has none, as PEM
    Export {
        /// The key's name
        #[arg(required_unless_present = "key_uri")]
        name: Option<String>,
        /// The key of this URI, with no agent running: `docs/key-uris.md` has all of them
        #[arg(long, value_name = "URI", conflicts_with_all = ["name", "previous"])]
        key_uri: Option<String>,
        /// Prints the public key also where there is a chain
        #[arg(long)]
        public_key: bool,
        /// Prints the keys that it took the place of instead, the newest first: they verify what was signed before
        #[arg(long)]
        previous: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Agent {
    #[command(subcommand)]
    pub(crate) command: AgentCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Shows whether the agent and its tokens are ready; exit status 1 where not everything is
    Status {
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Closes a token until it is unlocked, also for an agent that is started again; for operators
    ///
    /// Nothing is signed with it any more, and other programs find its device free. What has begun has 20 seconds to end.
    Lock {
        /// The token's name
        token: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Has a locked token logged in again; for operators
    Unlock {
        /// The token's name
        token: String,
        /// Asks for the PIN instead of having the agent read its configured source
        #[arg(long)]
        ask_pin: bool,
        /// Reads the PIN from standard input, one line
        #[arg(long, conflicts_with = "ask_pin")]
        pin_stdin: bool,
        #[command(flatten)]
        connection: Connection,
    },
}
