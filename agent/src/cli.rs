//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use omsign_agent::algorithm::KeyType;
use omsign_agent::init::Wish;
use omsign_agent::key_life::{Subject, Template};

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
    /// From a device to a configuration, a key and a certificate request, asking what only its owner knows
    ///
    /// Answers are read from standard input where that is no terminal.
    Init {
        #[command(subcommand)]
        device: Wish,
        /// Where all of it goes: configuration, socket and records [default: the configuration into /etc/omsign for root,
        /// ~/.config/omsign for others, the rest where omsign looks for it]
        #[arg(long, global = true)]
        directory: Option<PathBuf>,
        /// The key's name
        #[arg(long, global = true, default_value = "release", value_parser = name)]
        name: String,
        /// What kind of key [default: p384, or p256 on TPMs and YubiKeys]
        #[arg(long = "type", value_name = "TYPE", global = true)]
        key_type: Option<KeyType>,
        /// Whose certificate is requested, such as "CN=Model Release,O=Acme" (RFC 4514)
        #[arg(long, value_name = "DN", global = true, default_value = "CN=Model Release")]
        subject: String,
    },
    /// Checks a configuration file and reports every mistake in it
    CheckConfig(ConfigFile),
    /// Runs a command that prints a PIN: for the processes of tokens
    #[command(name = "pin-command", hide = true, disable_help_flag = true)]
    PrintsPin {
        #[arg(last = true)]
        words: Vec<std::ffi::OsString>,
    },
    /// What a client does, and is looked for here
    #[command(hide = true, disable_help_flag = true)]
    Unlock {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The same
    #[command(hide = true, disable_help_flag = true)]
    Lock {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The same
    #[command(hide = true, disable_help_flag = true)]
    Status {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
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
    /// Keys: listed, made, certified, attested, deleted; for operators, whether an agent runs or not
    Key {
        #[command(subcommand)]
        command: KeyCommand,
        #[command(flatten)]
        file: ConfigFile,
    },
    /// Sets a PIN anew that was blocked, with the security officer's PIN or a card's PUK, and opens the token
    ///
    /// It becomes what the configuration says (pin = …), or what is typed. Secrets are asked for on the terminal, or
    /// read from standard input, a line each.
    Unblock {
        /// The token's name in the configuration
        token: String,
        #[command(flatten)]
        file: ConfigFile,
    },
    /// Prints what a shell reads to complete commands and options
    Completions {
        /// The shell
        shell: clap_complete::Shell,
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
    /// Names every key on every token, and what the configuration calls it; without an agent, each is offered its PIN
    List {
        /// Only this token
        #[arg(long)]
        token: Option<String>,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Makes a configured key on its token; prints its public half, PEM
    Generate {
        /// The key's name in the configuration
        name: String,
        #[command(flatten)]
        template: Template,
    },
    /// Prints a certificate request for code signing, PEM
    Csr {
        /// The key's name in the configuration
        name: String,
        #[command(flatten)]
        subject: Subject,
    },
    /// Prints a certificate by the key about itself, PEM; for trials: nobody but you has a reason to trust it
    SelfSign {
        /// The key's name in the configuration
        name: String,
        #[command(flatten)]
        subject: Subject,
        /// Days that it is valid
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Keeps the key's certificate beside it on the device
    ImportCertificate {
        /// The key's name in the configuration
        name: String,
        /// The certificate, PEM; of a chain, the first
        certificate: PathBuf,
    },
    /// Prints how the key came to be, as the device shows it, for verify-attestation elsewhere
    Attest {
        /// The key's name in the configuration
        name: String,
        /// Hexadecimal; from whoever wants to know, so that they see that it was made for them (TPM)
        #[arg(long, default_value = "")]
        nonce: String,
        /// What `key challenge` printed, for the TPM to answer
        #[arg(long, value_name = "FILE")]
        challenge: Option<PathBuf>,
        /// Certificates, PEM or DER, that the maker's tools had the device make: the key's and its own (YubiHSM 2)
        #[arg(long, value_name = "FILE")]
        certificates: Vec<PathBuf>,
    },
    /// Prints a challenge that only the TPM of an attestation can answer, if its attestation key and its endorsement
    /// certificate belong together; needs no device
    ///
    /// Give it to the machine (key attest NAME --challenge FILE), and what that prints to verify-attestation.
    Challenge {
        /// What `key attest` printed
        file: PathBuf,
        /// Where the answer is kept, for `verify-attestation --challenge-secret`; a new file
        #[arg(long, value_name = "FILE")]
        secret: PathBuf,
    },
    /// Says what an attestation proves; needs no device. Exit 1 when the key's origin is not proven
    VerifyAttestation {
        /// What `key attest` printed
        file: PathBuf,
        /// Certificates to trust instead of Yubico's, or those of a TPM's maker, PEM
        #[arg(long)]
        roots: Option<PathBuf>,
        /// The nonce that was asked for, hexadecimal
        #[arg(long)]
        nonce: Option<String>,
        /// SHA-256 of the TPM's attestation key, hexadecimal
        #[arg(long)]
        attestation_key: Option<String>,
        /// What `key challenge --secret` kept; the maker's certificates, issuers in between too, go into --roots
        #[arg(long, value_name = "FILE", requires = "roots")]
        challenge_secret: Option<PathBuf>,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Makes the key that is to take this one's place, and, with --finish, puts it there
    ///
    /// First the next key is made beside the present one, of the same type and guarded likewise where nothing else is said,
    /// and named in the configuration as NAME/next: ask for its certificate (key csr NAME/next), tell verifiers about it.
    /// Then --finish writes it into the configuration; callers get it when the agent reads that anew (`omsign-agent key
    /// reload`). The old key stays listed, for verification, as NAME/previous, and stays on its
    /// device until it is deleted: in a [key] section of its own, for `key delete`.
    Rotate {
        /// The key's name in the configuration
        name: String,
        #[command(flatten)]
        template: Template,
        /// Where the next key is made, as in the configuration: label=…, id=…, handle=…, file=… or slot=…
        /// [default: the present label, handle or file, counted on]
        #[arg(long, value_name = "OBJECT")]
        object: Option<String>,
        /// Puts the next key in its place
        #[arg(long)]
        finish: bool,
        /// The next key's certificates, PEM, leaf first
        #[arg(long, value_name = "FILE", requires = "finish")]
        certificate_chain: Option<PathBuf>,
    },
    /// Has a running agent read its configuration anew, as SIGHUP does, and says what is wrong with it
    Reload,
    /// Deletes a key for ever. Asks for its name, and then for its fingerprint
    Delete {
        /// The key's name in the configuration
        name: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConfigFile {
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", env = "OMSIGN_AGENT_CONFIG", default_value_os_t = omsign_agent::config::Config::default_path())]
    pub(crate) config: PathBuf,
}

/// A name that is a section of the configuration and part of file names.
fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let right = !text.is_empty() && text.len() <= 64 && text.chars().all(plain);
    right.then(|| text.to_owned()).ok_or_else(|| "names are 1 to 64 letters, digits, '-' or '_'".to_owned())
}
