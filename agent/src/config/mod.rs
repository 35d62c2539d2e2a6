//! What the operator configured: one TOML file, every value typed. Unknown keys are errors, relative paths
//! are relative to the file, and every mistake is reported at once.

mod defaults;
pub mod edit;
mod key_uri;
mod keys;
mod listen;
mod objects;
mod pcrs;
mod profile;
mod read;
mod tokens;
mod tpm;
pub mod uri;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::defaults::{default_audit_directory, default_socket, own_directory};
pub use self::key_uri::KeyUri;
pub use self::keys::PRIVATE_RULE;
pub(crate) use self::objects::PIV_SLOTS;
pub use self::pcrs::{Bank, Pcrs};
pub use self::profile::Profile;
pub use self::tpm::{DEFAULT as DEFAULT_TCTI, Tcti};
use crate::algorithm::Padding;
use crate::host::wire::KeySpec;
use crate::policy::Rule;
use crate::spki::SpkiDer;

/// Everything in the file, checked.
#[derive(Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: Listen,
    /// Where and how decisions are recorded.
    pub audit: Audit,
    /// Where keys live: one child process each.
    pub tokens: BTreeMap<String, Token>,
    /// What callers name.
    pub keys: BTreeMap<String, Key>,
    /// Who may unlock tokens and manage keys: root, and those that are named or, without any, the agent's own user.
    pub operators: Vec<Rule>,
}

/// `[listen]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listen {
    /// `unix = { path, mode, group }`
    pub unix: Option<UnixListen>,
    /// `operator = { path }`: where operators' commands over keys are taken.
    pub operator: Option<PathBuf>,
    /// `tls = { address, certificate, private_key, client_ca }`
    pub tls: Option<TlsListen>,
    /// How long requests in flight may take to finish when the agent stops.
    pub shutdown_timeout: Duration,
}

/// A Unix socket; callers are identified by the kernel's peer credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixListen {
    /// Where the socket is made.
    pub path: PathBuf,
    /// Its permission bits: who can connect at all. Default `0660`.
    pub mode: u32,
    /// Its group, by id. Default: that of the agent.
    pub group: Option<u32>,
}

/// TCP with mutual TLS; callers are identified by their certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsListen {
    /// IP address and port.
    pub address: SocketAddr,
    /// The agent's certificate chain, PEM, leaf first.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub private_key: PathBuf,
    /// The CA certificates that callers' certificates must lead to, PEM.
    pub client_ca: PathBuf,
}

/// `[audit]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Where `audit.jsonl` is kept.
    pub directory: PathBuf,
    /// When an entry counts as written.
    pub durability: Durability,
}

/// When an audit entry counts as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After `fdatasync`: survives a power cut (default).
    Fsync,
    /// After `write`: survives a crash of the agent, not of the machine.
    Os,
}

/// `[token.NAME]`: a device and how it is opened. Sent as it is to the process that owns the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Which device, and how it is reached.
    pub device: Device,
    /// Where its user PIN, or the authorization value of a TPM's keys, comes from.
    pub pin: PinSource,
    /// Where the authorization value of a TPM's owner hierarchy comes from; most have none.
    pub owner_auth: PinSource,
    /// Sessions, each with a signing thread of its own; clamped to the token's `ulMaxSessionCount`. Default 1.
    pub sessions: usize,
    /// The longest that one operation may take before the token's process is replaced. Default 10 s.
    pub timeout: Duration,
    /// How many requests may wait; one more is answered `RESOURCE_EXHAUSTED`. Default 256.
    pub queue: usize,
    /// Whether the agent does not start without it.
    pub required: bool,
    /// What the agent runs when the device waits for a touch, with the message as its last argument.
    pub touch_command: Vec<String>,
    /// Where its process runs: the directory of the configuration file, which paths in `env` are relative to.
    pub directory: PathBuf,
    /// Environment variables of the token's process, such as `SOFTHSM2_CONF`.
    pub env: BTreeMap<String, String>,
    /// Environment variables that hold the PINs of other tokens: its process does not get them.
    pub hidden_env: Vec<String>,
}

/// A device that holds keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// `backend = "pkcs11"`
    Pkcs11 {
        /// The module, a shared library.
        module: PathBuf,
        /// Which of the module's tokens.
        select: Box<TokenSelector>,
        /// What is known of the module.
        profile: Box<Profile>,
    },
    /// `backend = "tpm"`
    Tpm(Tcti),
    /// `backend = "piv"`
    Piv {
        /// The YubiKey's serial number, as printed on it.
        serial: u32,
    },
}

impl Device {
    /// Its kind, in the configuration's and the contract's words.
    pub fn backend(&self) -> &'static str {
        match self {
            Self::Pkcs11 { .. } => "pkcs11",
            Self::Tpm(_) => "tpm",
            Self::Piv { .. } => "piv",
        }
    }
}

/// What callers' keys are on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// An object of a PKCS#11 token.
    Pkcs11(ObjectSelector),
    /// A persistent handle of a TPM, `0x81000000` to `0x81ffffff`.
    TpmHandle(u32),
    /// A wrapped key file: `TSS2 PRIVATE KEY` in PEM.
    TpmFile(PathBuf),
    /// A PIV slot: 9a, 9c, 9d, 9e, 82 to 95.
    PivSlot(u8),
}

/// Which token of a module. Everything that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenSelector {
    /// CK_TOKEN_INFO.label, without its padding.
    pub label: Option<String>,
    /// CK_TOKEN_INFO.serialNumber.
    pub serial: Option<String>,
    /// CK_TOKEN_INFO.model.
    pub model: Option<String>,
    /// CK_TOKEN_INFO.manufacturerID.
    pub manufacturer: Option<String>,
    /// CK_SLOT_ID. Some modules renumber their slots; a label or serial is safer.
    pub slot: Option<u64>,
    /// CK_SLOT_INFO.slotDescription, without its padding. This and what follows only URIs name.
    pub slot_description: Option<String>,
    /// CK_SLOT_INFO.manufacturerID.
    pub slot_manufacturer: Option<String>,
    /// CK_INFO.libraryDescription.
    pub library_description: Option<String>,
    /// CK_INFO.manufacturerID.
    pub library_manufacturer: Option<String>,
    /// CK_INFO.libraryVersion: major and minor.
    pub library_version: Option<(u8, u8)>,
}

/// Which object of a token. Everything that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSelector {
    /// CKA_LABEL.
    pub label: Option<String>,
    /// CKA_ID.
    pub id: Option<Vec<u8>>,
}

/// Where a PIN comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PinSource {
    /// `pin = { file = "…" }`: readable by its owner only. One trailing newline is not part of the PIN.
    File(PathBuf),
    /// `pin = { credential = "…" }`: a systemd credential (`LoadCredential=`).
    Credential(String),
    /// `pin = { env = "…" }`: an environment variable of the agent.
    Env(String),
    /// `pin = { command = ["…"] }`: what a program prints, run in the process of the token, where the configuration is. One
    /// trailing newline is not part of the PIN. It has as long as any operation of the device.
    Command(Vec<String>),
    /// `pin = "prompt"`: asked at start on the agent's terminal, or given with `omsign agent unlock`.
    Prompt,
    /// `pin = "device"`: entered on the device itself, on a reader's PIN pad or a Luna's PED, once an operator unlocks it.
    Device,
    /// `pin = "none"`: the token needs no login.
    None,
}

/// `[key.NAME]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The tokens it lives on, names in [`Config::tokens`]: any of them signs.
    pub tokens: Vec<String>,
    /// Which object of each.
    pub object: Object,
    /// The key that is to take its place, on the first of its tokens.
    pub next: Option<Object>,
    /// Keys that it took the place of, the newest first.
    pub previous: Vec<Previous>,
    /// How an RSA key pads.
    pub padding: Padding,
    /// What has to be as it was when a TPM's key was made.
    pub pcrs: Option<Pcrs>,
    /// Certificates, DER, leaf first: makes it the OMS certificate method.
    pub certificate_chain: Vec<Vec<u8>>,
    /// Who may use it. Everything else is denied.
    pub allow: Vec<Rule>,
}

/// A key that signs no more: what is needed to verify what it signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous {
    /// SubjectPublicKeyInfo.
    pub public_key: SpkiDer,
    /// Certificates, DER, leaf first. May be empty.
    pub certificate_chain: Vec<Vec<u8>>,
}

/// One thing wrong in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1. 0 when it is about the file as a whole.
    pub line: usize,
    /// The full key, such as `token.release.module`.
    pub key: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl Config {
    /// Reads and checks the file. On failure every mistake in it, in the order of the file.
    pub fn load(path: &Path) -> Result<Self, Vec<Mistake>> {
        let read = || {
            let mut file = std::fs::File::open(path)?;
            let mode = file.metadata()?.permissions().mode();
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok((text, mode))
        };
        let (text, mode) = read().map_err(|error: std::io::Error| {
            let remedy = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "let the user who runs this read it, and enter its directory"
                }
                _ => "pass the right path with --config",
            };
            let message = format!("cannot be read: {error}; {remedy}");
            vec![Mistake { file: path.to_owned(), line: 0, key: String::new(), message }]
        })?;
        // It says which libraries are loaded, and who may sign.
        if mode & 0o002 != 0 {
            let message = "everybody may write it: take that from others (chmod o-w), or keep it where files have permissions";
            let (file, message) = (path.to_owned(), message.to_owned());
            return Err(vec![Mistake { file, line: 0, key: String::new(), message }]);
        }
        read::config(path, &text)
    }

    /// Where the configuration is looked for without `--config`: the user's own, then the system's.
    pub fn default_path() -> PathBuf {
        let own = own_directory().join("agent.toml");
        if own.exists() { own } else { PathBuf::from("/etc/omsign/agent.toml") }
    }
}

impl Key {
    /// What its token has to find.
    pub(crate) fn spec(&self, name: &str) -> KeySpec {
        let (object, padding, pcrs) = (self.object.clone(), self.padding, self.pcrs.clone());
        KeySpec { name: name.to_owned(), object, padding, pcrs }
    }

    /// The key that is to take its place.
    pub(crate) fn next_spec(&self, name: &str) -> Option<KeySpec> {
        Some(KeySpec { object: self.next.clone()?, ..self.spec(name) })
    }
}

impl fmt::Display for TokenSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slot = self.slot.map(|slot| slot.to_string());
        let version = self.library_version.map(|(major, minor)| format!("{major}.{minor}"));
        list(
            f,
            &[
                ("label", &self.label),
                ("serial", &self.serial),
                ("model", &self.model),
                ("manufacturer", &self.manufacturer),
                ("slot", &slot),
                ("slot description", &self.slot_description),
                ("slot manufacturer", &self.slot_manufacturer),
                ("library", &self.library_description),
                ("library manufacturer", &self.library_manufacturer),
                ("library version", &version),
            ],
        )
    }
}

impl fmt::Display for ObjectSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.id.as_ref().map(hex::encode);
        list(f, &[("label", &self.label), ("id", &id)])
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pkcs11(select) => select.fmt(f),
            Self::TpmHandle(handle) => write!(f, "handle {handle:#010x}"),
            Self::TpmFile(path) => write!(f, "file {}", path.display()),
            Self::PivSlot(slot) => write!(f, "slot {slot:02x}"),
        }
    }
}

impl Object {
    /// Whether this names the object that a device lists as `listed`.
    pub(crate) fn names(&self, listed: &Self) -> bool {
        match (self, listed) {
            (Self::Pkcs11(wanted), Self::Pkcs11(found)) => {
                (wanted.label.is_none() || wanted.label == found.label)
                    && (wanted.id.is_none() || wanted.id == found.id)
            }
            (wanted, found) => wanted == found,
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, fields: &[(&str, &Option<String>)]) -> fmt::Result {
    let set = fields.iter().filter_map(|(name, value)| value.as_ref().map(|v| format!("{name} {v:?}")));
    f.write_str(&set.collect::<Vec<_>>().join(" and "))
}
