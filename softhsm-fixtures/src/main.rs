//! `omsign-fixtures`: makes stand-in hardware, a test CA and a model to try.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, SoftHsm, delete_key, keygen, many_keys};
use omsign_fixtures::with::{self, Kind};
use omsign_fixtures::{model, raw};
use openssl::pkey::PKey;

/// Stand-in hardware for trying and testing omsign.
#[derive(Parser)]
#[command(name = "omsign-fixtures", version)]
enum Cli {
    /// Makes a SoftHSM token with one key, a root and an intermediate CA, the key's certificate, and an agent
    /// configuration for all that
    Softhsm {
        /// Where to make it
        directory: PathBuf,
        /// Type of the key: p256, p384 or p521
        #[arg(long, default_value = "p384")]
        key_type: KeyType,
        /// Name of the token and of the key
        #[arg(long, default_value = "release")]
        name: String,
    },
    /// Makes a model directory to sign
    Model {
        /// Where to make it
        directory: PathBuf,
        /// How many safetensors shards
        #[arg(long, default_value_t = 4)]
        shards: usize,
        /// Size of each shard in MiB
        #[arg(long, default_value_t = 16)]
        shard_mib: usize,
    },
    /// Runs a command with stand-ins, each with a key and a certificate named after it: OMSIGN_FIXTURES_CONFIG names a
    /// configuration for `omsign-agent serve`, its default there, OMSIGN_AGENT its socket, OMSIGN_FIXTURES a directory with
    /// root.pem and NAME.pem, and piv-attestation.pem, which stands in for Yubico's root; a TPM keeps no certificates. The card's reader listens on all interfaces meanwhile (vpcd knows no
    /// others): with piv, not where others can reach this machine
    With {
        /// Any of softhsm, kryoptic, swtpm, piv, fault, with commas between
        #[arg(value_delimiter = ',', required = true)]
        kinds: Vec<Kind>,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Signs with a device as fast as one thread can; prints signatures per second and the median in µs
    #[command(hide = true)]
    RawSpeed {
        milliseconds: u64,
        #[command(subcommand)]
        device: RawDevice,
    },
    /// Makes many P-256 keys, each an object of either half
    #[command(hide = true)]
    ManyKeys { label: String, count: usize },
    /// Deletes a key
    #[command(hide = true)]
    DeleteKey { label: String, name: String },
    /// Makes one key on a token; a process of its own, since SoftHSM is configured by the environment
    #[command(hide = true)]
    Keygen { directory: PathBuf, label: String, name: String, key_type: KeyType, objects: Objects },
}

/// A device without us.
#[derive(clap::Subcommand)]
enum RawDevice {
    Softhsm { label: String, name: String },
    Tpm { tcti: String, handle: u32 },
    Piv { serial: u32, slot: u8 },
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse() {
        Cli::With { kinds, command } => {
            let status = with::run(&kinds, &command)?;
            // Killed by a signal: as shells say it, roughly.
            return Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255)));
        }
        Cli::Softhsm { directory, key_type, name } => softhsm(&directory, key_type, &name)?,
        Cli::Model { directory, shards, shard_mib } => model::create(&directory, shards, shard_mib << 20)?,
        Cli::RawSpeed { milliseconds, device } => {
            let duration = Duration::from_millis(milliseconds);
            let speed = match device {
                RawDevice::Softhsm { label, name } => raw::softhsm(&label, &name, duration)?,
                RawDevice::Tpm { tcti, handle } => raw::tpm(&tcti, handle, duration)?,
                RawDevice::Piv { serial, slot } => raw::card(serial, slot, duration)?,
            };
            writeln!(std::io::stdout(), "{} {}", speed.per_second, speed.p50_us)?;
        }
        Cli::ManyKeys { label, count } => many_keys(&label, count)?,
        Cli::DeleteKey { label, name } => delete_key(&label, &name)?,
        Cli::Keygen { directory, label, name, key_type, objects } => {
            keygen(&directory, &label, &name, key_type, objects)?
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn softhsm(directory: &Path, key_type: KeyType, name: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    // The configurations made here name it from wherever they are read.
    let directory = &directory.canonicalize()?;
    let token = SoftHsm::create(directory, name)?;
    token.generate(name, key_type, Objects::Pair)?;
    let root = Ca::create("Example Root CA")?;
    let issuing = root.intermediate("Example Issuing CA")?;
    let public = PKey::public_key_from_pem(&std::fs::read(token.public_key(name))?)?;
    let leaf = issuing.code_signing("Example Model Release", &public)?;
    write_chain(&directory.join("root.pem"), &[&root.certificate])?;
    write_chain(&directory.join("chain.pem"), &[&leaf, &issuing.certificate])?;
    let (uid, config) = (std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(directory)?), token.config());
    let text = format!(
        r#"# Made by omsign-fixtures; the commented version of this is hsm-config/softhsm.toml.
[listen]
unix = {{ path = "agent.sock", mode = "0600" }}

[audit]
directory = "audit"

[token.{name}]
backend = "pkcs11"
module = "{MODULE}"
token = {{ label = "{name}" }}
pin = {{ file = "user.pin" }}
env = {{ SOFTHSM2_CONF = "{}" }}

[key.{name}]
token = "{name}"
object = {{ label = "{name}" }}
certificate_chain = "chain.pem"
[[key.{name}.allow]]
unix = {{ uid = {uid} }}

# The same key without its certificate: signs with the OMS key method.
[key.{name}-plain]
token = "{name}"
object = {{ label = "{name}" }}
[[key.{name}-plain.allow]]
unix = {{ uid = {uid} }}
"#,
        config.display()
    );
    std::fs::write(directory.join("agent.toml"), text)?;
    Ok(())
}
