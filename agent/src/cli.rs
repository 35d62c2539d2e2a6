//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use omsign_agent::algorithm::KeyType;

/// Signs digests with keys that live in HSMs, TPMs and smartcards.
#[derive(Debug, Parser)]
#[command(name = "omsign-agent", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the agent until SIGTERM or SIGINT
    Serve(ConfigFile),
    /// Checks a configuration file and reports every mistake in it
    CheckConfig(ConfigFile),
    /// Tries every module, token, PIN source, key and certificate, and says what to do
    ///
    /// Each token is opened once, as the agent would do it: a wrong PIN costs one try.
    Doctor {
        #[command(flatten)]
        config: ConfigFile,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Makes keys and certificate requests; for operators, while no agent runs
    Key {
        #[command(subcommand)]
        command: KeyCommand,
        #[command(flatten)]
        file: ConfigFile,
    },
    /// The process that owns one token; started by the agent
    #[command(hide = true)]
    TokenHost,
    /// A private agent for one client, on the socketpair that is standard input; started by omsign
    #[command(hide = true)]
    OneShot {
        /// URI of the key, without a PIN
        #[arg(long)]
        uri: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Makes a configured key on its token; prints its public half, PEM
    Generate {
        /// The key's name in the configuration
        name: String,
        /// What kind of key
        #[arg(long = "type", value_name = "TYPE", default_value = "p384")]
        key_type: KeyType,
    },
    /// Prints a certificate request for code signing, PEM
    Csr {
        /// The key's name in the configuration
        name: String,
        /// Subject of the certificate, such as "CN=Model Release,O=Acme"
        #[arg(long)]
        subject: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConfigFile {
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", env = "OMSIGN_AGENT_CONFIG", default_value_os_t = omsign_agent::config::Config::default_path())]
    pub(crate) config: PathBuf,
}
