//! What can be typed.

mod agent;
mod examples;
mod verify;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use omsign::hash::{Algorithm, MOST_JOBS};
use omsign::manifest::{DEFAULT_SHARD_BYTES, Method, Part};
use omsign::selection::{PUBLISHED, Selection};

pub(crate) use self::agent::{Agent, AgentCommand, Keys, KeysCommand};
pub(crate) use self::verify::{
    Inspect, Trust, TrustCommand, TrustFile, Verify, VerifyMethod, What, policy_from_environment,
};

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
    #[command(after_help = examples::SIGN)]
    Sign(Box<Sign>),
    /// Verifies a model against a bundle: who signed it, and is it what they signed?
    #[command(after_help = examples::VERIFY)]
    Verify(Box<Verify>),
    /// Says whose signatures `omsign verify MODEL` accepts
    #[command(after_help = examples::TRUST)]
    Trust(Trust),
    /// Prints a model's root digest
    #[command(after_help = examples::DIGEST)]
    Digest(Digest),
    /// Lists the keys that the agent lets you use
    Keys(Keys),
    /// Shows what a bundle says, without trusting it
    Inspect(Inspect),
    /// Asks about the agent and its tokens
    Agent(Agent),
    /// Sees to the digests that --digest-cache remembers
    Cache(Cache),
    /// Prints what a shell reads to complete commands and options
    #[command(after_help = examples::COMPLETIONS)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Agent")]
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

/// Which files of a model, and how they are hashed: all of it is signed.
#[derive(Debug, Args)]
#[command(next_help_heading = "What is signed")]
pub(crate) struct Files {
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
    /// What the model is called: trust policies go by it [default: the name of its directory, or of its only file]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) model_name: Option<String>,
    /// The bundle: written by sign, and left out where it lies inside the model [default for sign: model.sig]
    #[arg(long, value_name = "FILE")]
    pub(crate) signature: Option<PathBuf>,
    /// How files are hashed: every verifier knows sha256 [default: sha256]
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) hash_type: Option<HashType>,
    /// What has a digest: files, or shards of them, so that many cores or machines share one file [default: files]
    #[arg(long, value_name = "METHOD")]
    pub(crate) serialization: Option<Serialization>,
    /// Bytes in a shard, as 1000000, 1MB or 1MiB; makes shards [default: 1GB]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) shard_size: Option<NonZeroU64>,
}

/// A number of bytes, or of as many as a unit has (IEC 80000-13).
fn bytes(text: &str) -> Result<NonZeroU64, &'static str> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1000 * 1000,
        "GB" => 1000 * 1000 * 1000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TB" => 1000 * 1000 * 1000 * 1000,
        "TiB" => 1 << 40,
        _ => 0,
    };
    let bytes = number.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    bytes
        .and_then(NonZeroU64::new)
        .ok_or("write a whole number, alone or with kB, MB, GB, TB, KiB, MiB, GiB or TiB, as 128MiB")
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum HashType {
    Sha256,
    Blake2b,
    Blake3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Serialization {
    Files,
    Shards,
}

impl Files {
    /// Where `sign` writes the bundle.
    pub(crate) fn bundle(&self) -> &Path {
        self.signature.as_deref().unwrap_or(Path::new(PUBLISHED))
    }

    /// Or what contradicts itself.
    pub(crate) fn selection<'a>(
        &'a self,
        model: &'a Path,
        signature: Option<&'a Path>,
    ) -> Result<Selection<'a>, &'static str> {
        let method = match (self.serialization, self.shard_size) {
            (Some(Serialization::Files), Some(_)) => {
                return Err("--shard-size is for shards: leave it or --serialization files out");
            }
            (None | Some(Serialization::Files), None) => Method::Files,
            (_, size) => Method::Shards(size.unwrap_or(DEFAULT_SHARD_BYTES)),
        };
        let algorithm = match self.hash_type {
            None | Some(HashType::Sha256) => Algorithm::Sha256,
            Some(HashType::Blake2b) => Algorithm::Blake2b,
            Some(HashType::Blake3) => Algorithm::Blake3,
        };
        Ok(Selection {
            model,
            model_name: self.model_name.as_deref(),
            signature,
            ignore_paths: &self.ignore_paths,
            ignore_git_paths: !self.no_ignore_git_paths,
            allow_symlinks: self.allow_symlinks,
            method,
            algorithm,
        })
    }
}

/// More of them would have no buffers.
fn jobs(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse().ok().filter(|number: &NonZeroUsize| number.get() <= MOST_JOBS);
    number.ok_or_else(|| format!("expected a number from 1 to {MOST_JOBS}"))
}

/// How the hashing is done: the result is the same.
#[derive(Debug, Args)]
#[command(next_help_heading = "Hashing")]
pub(crate) struct Work {
    /// Threads that hash, 512 at most: more of them than cores help where files are far away, as on a network [default: one for
    /// each core, and more while they wait for small files]
    #[arg(long, short, value_name = "N", value_parser = jobs)]
    pub(crate) jobs: Option<NonZeroUsize>,
    /// Remembers digests, and believes those of files whose size, times and inode are as they were; on ext4, XFS, Btrfs and
    /// F2FS, which are written to the disk first
    #[arg(long)]
    pub(crate) digest_cache: bool,
    /// Shows how far it is: a bar, or a line every few seconds [default: a bar on a terminal]
    #[arg(long, value_name = "HOW", conflicts_with = "quiet")]
    pub(crate) progress: Option<ShowProgress>,
    /// Shows no progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// For tests: the kernel that computes SHA-256 (portable: without any instructions for it; sha2: that crate, with whatever it finds); empty, the fastest
    #[arg(long, value_name = "NAME", env = "OMSIGN_HASH_KERNEL", hide = true)]
    pub(crate) hash_kernel: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ShowProgress {
    Bar,
    Plain,
    None,
}

/// The heading of what names a key.
const KEY: &str = "Key";

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("signer").required(true).args(["key", "key_uri", "private_key"]))]
pub(crate) struct Sign {
    /// The model: a directory or a file
    #[arg(value_name = "MODEL", required_unless_present = "manifest")]
    pub(crate) model: Option<PathBuf>,
    /// Signs what `omsign digest --json` found, in all its parts (several files), or a list of sha256sum; `-` is standard
    /// input; the model need not be at hand
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with_all = ["model", "hash_type", "serialization", "shard_size", "digest_cache"]
    )]
    pub(crate) manifest: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) files: Files,
    #[command(flatten)]
    pub(crate) work: Work,
    /// Name of a key of the agent
    #[arg(long, value_name = "NAME", help_heading = KEY)]
    pub(crate) key: Option<String>,
    /// A key of a device, used without a running agent: pkcs11:… (RFC 7512), tpm:handle=… or piv:serial=…;slot=9c
    #[arg(long, value_name = "URI", visible_aliases = ["pkcs11-uri", "pkcs11_uri"], help_heading = KEY)]
    pub(crate) key_uri: Option<String>,
    /// Private key in PEM
    #[arg(long, value_name = "FILE", visible_alias = "private_key", help_heading = KEY)]
    pub(crate) private_key: Option<PathBuf>,
    /// File with the password of --private-key; without it, you are asked
    #[arg(long, value_name = "FILE", requires = "private_key", help_heading = KEY)]
    pub(crate) password_file: Option<PathBuf>,
    /// Environment variable with the password of --private-key
    #[arg(long, value_name = "NAME", requires = "private_key", conflicts_with = "password_file", help_heading = KEY)]
    pub(crate) password_env: Option<String>,
    /// Signs with RSA, Ed25519 or ML-DSA, which OMS does not name: omsign verifies it, other tools may refuse it
    #[arg(long, help_heading = KEY)]
    pub(crate) allow_nonstandard_key: bool,
    /// Certificate of the signing key, PEM: makes a bundle of the certificate method
    #[arg(long, value_name = "FILE", visible_alias = "signing_certificate", help_heading = KEY)]
    pub(crate) signing_certificate: Option<PathBuf>,
    /// Its issuers, PEM (repeatable); with the leaf first where --signing-certificate is not given
    #[arg(long, value_name = "FILE", visible_alias = "certificate_chain", help_heading = KEY)]
    pub(crate) certificate_chain: Vec<PathBuf>,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// How long to ask again for the signature, once the model is hashed, while the agent or its device is away, or too busy
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 20,
        value_parser = clap::value_parser!(u64).range(..=3600),
        env = "OMSIGN_WAIT",
        help_heading = "Agent"
    )]
    pub(crate) wait: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Digest {
    /// The model: a directory or a file
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) files: Files,
    #[command(flatten)]
    pub(crate) work: Work,
    /// Prints the whole manifest as one JSON object, for `omsign sign --manifest`
    #[arg(long)]
    pub(crate) json: bool,
    /// Hashes the I-th of N parts of the model; `omsign sign --manifest` puts all of them together
    #[arg(long, value_name = "I/N", value_parser = parse_part, requires = "json")]
    pub(crate) part: Option<Part>,
}

/// `I/N`, from 1/N to N/N.
fn parse_part(text: &str) -> Result<Part, String> {
    let numbers = text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
    match numbers {
        Some((index, of)) if index <= of => Ok(Part { index, of }),
        _ => Err("parts are 1/N to N/N, as in 2/8".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Cache {
    #[command(subcommand)]
    pub(crate) command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Forgets all digests
    Clear,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        let all = ["7", "7B", "7kB", "7KB", "7MB", "7GB", "7KiB", "7MiB", "7GiB"];
        let bytes = all.map(|text| bytes(text).map(|bytes| bytes.get() / 7));
        assert_eq!(bytes, [1, 1, 1000, 1000, 1_000_000, 1_000_000_000, 1 << 10, 1 << 20, 1 << 30].map(Ok));
    }
}
