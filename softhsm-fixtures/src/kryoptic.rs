//! A kryoptic token in a directory of its own: it locks its PIN after wrong ones, and has ML-DSA.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use rustix::fs::{FlockOperation, fcntl_lock};

use crate::{built, write_private};

/// The user PIN of every token made here. Long enough to be searched for in logs.
pub const PIN: &str = "kry-pin-77120";

/// Its security officer's PIN.
pub const SO_PIN: &str = "so-pin-31415";

/// A token.
#[derive(Clone, Debug)]
pub struct Kryoptic {
    directory: PathBuf,
    label: String,
}

impl Kryoptic {
    /// Makes a token without keys.
    pub fn create(directory: &Path, label: &str) -> anyhow::Result<Self> {
        let token = Self::configure(directory, label)?;
        token.initialise()?;
        Ok(token)
    }

    /// One that holds the same.
    pub fn copy(&self, directory: &Path) -> anyhow::Result<Self> {
        let token = Self::configure(directory, &self.label)?;
        // Nobody writes to it meanwhile: SQLite's locks are of this kind.
        let store = File::open(self.store()).context("the token's file")?;
        fcntl_lock(&store, FlockOperation::LockShared).context("the token's file")?;
        std::fs::copy(self.store(), token.store()).context("the token's file")?;
        Ok(token)
    }

    fn configure(directory: &Path, label: &str) -> anyhow::Result<Self> {
        let token = Self { directory: directory.to_owned(), label: label.to_owned() };
        std::fs::create_dir_all(directory).context("the token's directory")?;
        let store = token.store();
        let config = format!("[[slots]]\nslot = 1\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n", store.display());
        std::fs::write(token.config(), config).context("token.conf")?;
        write_private(&token.pin_file(), format!("{PIN}\n").as_bytes())?;
        Ok(token)
    }

    /// Initialises it anew: nothing that was on it is left.
    pub fn initialise(&self) -> anyhow::Result<()> {
        self.tool(&["--init-token", "--slot-index", "0", "--label", &self.label, "--so-pin", SO_PIN])?;
        self.set_pin()
    }

    /// Sets the user PIN as its security officer does, whatever became of the old one.
    pub fn set_pin(&self) -> anyhow::Result<()> {
        let officer = ["--login", "--login-type", "so", "--so-pin", SO_PIN];
        let pin = ["--init-pin", "--token-label", &self.label, "--pin", PIN];
        self.tool(&[&pin[..], &officer].concat()).map(drop)
    }

    /// The file that holds what is on it.
    pub fn store(&self) -> PathBuf {
        self.directory.join("token.sql")
    }

    /// The module, which `tests/setup` builds: its OpenSSL takes minutes.
    pub fn module() -> anyhow::Result<PathBuf> {
        let built = "../.test-cache/kryoptic/libkryoptic_pkcs11.so";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(built);
        path.canonicalize().context("kryoptic is not built; run ./tests/setup")
    }

    /// `[token.NAME]` of an agent's configuration.
    pub fn section(&self, name: &str) -> anyhow::Result<String> {
        let (module, pin, config) = (Self::module()?, self.pin_file(), self.config());
        Ok(format!(
            "\n[token.{name}]\nbackend = \"pkcs11\"\nmodule = \"{}\"\ntoken = {{ label = \"{}\" }}\n\
             pin = {{ file = \"{}\" }}\nenv.KRYOPTIC_CONF = \"{}\"\n",
            module.display(),
            self.label,
            pin.display(),
            config.display()
        ))
    }

    /// Where its configuration is: `KRYOPTIC_CONF`.
    pub fn config(&self) -> PathBuf {
        self.directory.join("token.conf")
    }

    /// A file that holds the user PIN.
    pub fn pin_file(&self) -> PathBuf {
        self.directory.join("user.pin")
    }

    /// Its label.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Makes a P-384 key, with our own agent's command; returns a file with its public half, PEM.
    pub fn generate(&self, name: &str) -> anyhow::Result<PathBuf> {
        let config = format!(
            "[audit]\ndirectory = \"audit\"\n{}\n[key.{name}]\ntoken = \"{name}\"\nobject = {{ label = \"{name}\" }}\n\
             [[key.{name}.allow]]\nunix = {{ uid = 0 }}\n",
            self.section(name)?
        );
        let file = self.directory.join("generate.toml");
        std::fs::write(&file, config)?;
        let mut agent = Command::new(built("omsign-agent")?);
        let made = agent.args(["key", "generate", name, "--type", "p384", "--config"]).arg(file).output()?;
        ensure!(made.status.success(), "key generate: {}", String::from_utf8_lossy(&made.stderr));
        let public = self.public_key(name);
        std::fs::write(&public, made.stdout)?;
        Ok(public)
    }

    /// The public half of a key, PEM.
    pub fn public_key(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pub.pem"))
    }

    /// Runs `pkcs11-tool` on it.
    pub fn tool(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut tool = Command::new("pkcs11-tool");
        tool.arg("--module").arg(Self::module()?).args(arguments).env("KRYOPTIC_CONF", self.config());
        let output = tool.output().context("pkcs11-tool (apt: opensc)")?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.success(), "pkcs11-tool {arguments:?}: {said}");
        Ok(said)
    }
}
