//! What can be typed.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};
use omsign::manifest::Selection;

/// Signs and verifies machine-learning models, and any other directory of files, in the OpenSSF Model Signing
/// (OMS) format. Exit status: 0 done, 1 checked and found wrong, 2 could not do it.
#[derive(Debug, Parser)]
#[command(name = "omsign", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Signs a model and writes a bundle
    Sign(Sign),
    /// Verifies a model against a bundle
    Verify(Verify),
    /// Prints a model's root digest
    Digest(Digest),
    /// Lists the keys that the agent lets you use
    Keys(Keys),
    /// Shows what a bundle says, without trusting it
    Inspect(Inspect),
    /// Asks about the agent and its tokens
    Agent(Agent),
}

#[derive(Debug, Args)]
pub(crate) struct Connection {
    /// The agent: a socket path or https://HOST:PORT [default: your own agent's socket, then /run/omsign/agent.sock]
    #[arg(long, value_name = "ADDRESS", env = "OMSIGN_AGENT")]
    pub(crate) agent: Option<String>,
    /// CA of the agent's certificate, PEM (https only)
    #[arg(long, value_name = "FILE", env = "OMSIGN_AGENT_CA")]
    pub(crate) agent_ca: Option<PathBuf>,
    /// Your certificate, PEM (https only)
    #[arg(long, value_name = "FILE", env = "OMSIGN_AGENT_CERTIFICATE")]
    pub(crate) agent_certificate: Option<PathBuf>,
    /// Your private key, PEM (https only)
    #[arg(long, value_name = "FILE", env = "OMSIGN_AGENT_KEY")]
    pub(crate) agent_key: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Files {
    /// The model: a directory or a file
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// Leaves a file or directory of the model out (repeatable)
    #[arg(long, value_name = "PATH")]
    pub(crate) ignore_paths: Vec<PathBuf>,
    /// Leaves .git, .gitattributes, .github and .gitignore out (default)
    #[arg(long, overrides_with = "no_ignore_git_paths")]
    pub(crate) ignore_git_paths: bool,
    /// Does not leave git's files out
    #[arg(long)]
    pub(crate) no_ignore_git_paths: bool,
    /// Follows symbolic links inside the model; without it, one is an error
    #[arg(long, visible_alias = "allow_symlinks")]
    pub(crate) allow_symlinks: bool,
    /// The bundle: written by sign, and left out where it lies inside the model
    #[arg(long, value_name = "FILE", default_value = "model.sig")]
    pub(crate) signature: PathBuf,
}

impl Files {
    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            model: &self.model,
            signature: &self.signature,
            ignore_paths: &self.ignore_paths,
            ignore_git_paths: !self.no_ignore_git_paths,
            allow_symlinks: self.allow_symlinks,
        }
    }
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("signer").required(true).args(["key", "key_uri", "private_key"]))]
pub(crate) struct Sign {
    #[command(flatten)]
    pub(crate) files: Files,
    /// Name of a key of the agent
    #[arg(long, value_name = "NAME")]
    pub(crate) key: Option<String>,
    /// A key of a device, used without a running agent: pkcs11:… (RFC 7512), tpm:handle=… or piv:serial=…;slot=9c
    #[arg(long, value_name = "URI", visible_aliases = ["pkcs11-uri", "pkcs11_uri"])]
    pub(crate) key_uri: Option<String>,
    /// Private key in PEM
    #[arg(long, value_name = "FILE", visible_alias = "private_key")]
    pub(crate) private_key: Option<PathBuf>,
    /// File with the password of --private-key; without it, you are asked
    #[arg(long, value_name = "FILE", requires = "private_key")]
    pub(crate) password_file: Option<PathBuf>,
    /// Environment variable with the password of --private-key
    #[arg(long, value_name = "NAME", requires = "private_key", conflicts_with = "password_file")]
    pub(crate) password_env: Option<String>,
    /// Signs with RSA, Ed25519 or ML-DSA, which OMS does not name: omsign verifies it, other tools may refuse it
    #[arg(long)]
    pub(crate) allow_nonstandard_key: bool,
    /// Certificate of the signing key, PEM: makes a bundle of the certificate method
    #[arg(long, value_name = "FILE", visible_alias = "signing_certificate")]
    pub(crate) signing_certificate: Option<PathBuf>,
    /// Its issuers, PEM (repeatable); with the leaf first where --signing-certificate is not given
    #[arg(long, value_name = "FILE", visible_alias = "certificate_chain")]
    pub(crate) certificate_chain: Vec<PathBuf>,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("trust").required(true).args(["public_key", "certificate_chain"]))]
pub(crate) struct Verify {
    /// The model: a directory or a file
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// The bundle
    #[arg(long, value_name = "FILE")]
    pub(crate) signature: PathBuf,
    /// The signer's public key, PEM
    #[arg(long, value_name = "FILE", visible_alias = "public_key")]
    pub(crate) public_key: Option<PathBuf>,
    /// Certificates to trust, PEM (repeatable): the bundle's certificate must lead to one of them
    #[arg(long, value_name = "FILE", visible_alias = "certificate_chain")]
    pub(crate) certificate_chain: Vec<PathBuf>,
    /// Accepts files that were not signed
    #[arg(long, visible_alias = "ignore_unsigned_files")]
    pub(crate) ignore_unsigned_files: bool,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Digest {
    #[command(flatten)]
    pub(crate) files: Files,
    /// Prints one JSON object with the digest of every file
    #[arg(long)]
    pub(crate) json: bool,
}

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
        name: String,
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
pub(crate) struct Inspect {
    /// The bundle
    #[arg(value_name = "BUNDLE")]
    pub(crate) bundle: PathBuf,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Agent {
    #[command(subcommand)]
    pub(crate) command: AgentCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Shows whether the agent and its tokens are ready
    Status {
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
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
        #[command(flatten)]
        connection: Connection,
    },
}
