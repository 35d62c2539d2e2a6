//! `omsign-agent init`: from a device to a configuration, a key and a certificate request, asking what only its owner
//! knows. What is there already stays; what was begun and failed is taken back.

mod device;
mod wish;

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use x509_cert::der::{DecodePem as _, Encode as _};
use x509_cert::request::CertReq;
use zeroize::Zeroizing;

use self::device::Chosen;
pub use self::wish::Wish;
use crate::algorithm::KeyType;
use crate::config::Config;
use crate::key_life::{Action, Command, KeyLifeError, Output, Subject, Template};
use crate::operator::{self, OperatorError};
use crate::secret::Pin;
use crate::spki::SpkiDer;
use crate::token::TokenError;

/// The name of the configuration.
const FILE: &str = "agent.toml";

/// What to make, and where.
pub struct Init {
    /// Where the configuration goes.
    pub directory: PathBuf,
    /// Whether its socket and its records go there, too, rather than where callers look for them.
    pub apart: bool,
    /// The key's name.
    pub name: String,
    /// What kind of key; none for what suits the device.
    pub key_type: Option<KeyType>,
    /// Whose certificate is requested.
    pub subject: String,
    /// The device.
    pub wish: Wish,
}

/// Asks a person for a secret, which is not shown while it is typed.
pub type Ask<'a> = &'a dyn Fn(&str) -> io::Result<Zeroizing<String>>;

/// What was made.
pub struct Made {
    /// The configuration.
    pub config: PathBuf,
    /// The certificate request.
    pub request: PathBuf,
    /// What kind of key.
    pub key_type: Option<KeyType>,
    /// What else its owner should know.
    pub notes: Vec<String>,
}

/// Why it was not made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Nothing is overwritten.
    #[error(
        "{0} exists already; choose another --directory, or add the key to it by hand and run `omsign-agent key generate`"
    )]
    Exists(PathBuf),
    /// The device, or an answer that is none.
    #[error("{0}")]
    Wrong(String),
    /// The file system, or the terminal.
    #[error("{what}")]
    System {
        /// What could not be done.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The key.
    #[error(transparent)]
    Operator(#[from] OperatorError),
}

impl Init {
    /// Makes it.
    pub async fn run(&self, ask: Ask<'_>, say: &(dyn Fn(&str) + Sync)) -> Result<Made, InitError> {
        let (config, request) =
            (self.directory.join(FILE), self.directory.join(format!("{}.csr", self.name)));
        if let Some(there) = [&config, &request].into_iter().find(|path| path.exists()) {
            return Err(InitError::Exists(there.clone()));
        }
        let subject = Subject { name: self.subject.clone(), alternatives: Vec::new() };
        // Before anything of the device is changed.
        subject.check().map_err(|error| InitError::Wrong(error.to_string()))?;
        if let Some(key_type) = self.key_type.filter(|key_type| self.wish.cannot_make(*key_type)) {
            return Err(InitError::Wrong(format!(
                "such a device makes no keys of type {key_type}; use p256"
            )));
        }
        if self.wish.exists() && self.key_type.is_some() {
            return Err(InitError::Wrong("the key is there already; leave --type out".into()));
        }
        let fresh = !self.directory.exists();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(system("make", &self.directory))?;
        tempfile::tempfile_in(&self.directory).map_err(system("write to", &self.directory))?;
        let mut left = Left { files: Vec::new(), directory: fresh.then_some(&self.directory) };
        let Chosen { token, object, key_type, pin, exists, made_by, notes } =
            self.choose(ask, say, &mut left).await?;
        let uid = rustix::process::geteuid().as_raw();
        let apart = "[listen]\nunix = { path = \"agent.sock\", mode = \"0600\" }\n\n[audit]\ndirectory = \"audit\"\n\n";
        let places = if self.apart { apart } else { "" };
        let text = format!(
            "# Made by `omsign-agent init`. What every option means: hsm-config/ in omsign's repository.\n\n{places}\
             [token.{name}]\n{token}\n[key.{name}]\ntoken = \"{name}\"\nobject = {object}\n\
             # certificate_chain = \"{name}-chain.pem\"\n[[key.{name}.allow]]\nunix = {{ uid = {uid} }}\n",
            name = self.name,
        );
        left.write(&config, &text)?;
        let loaded = Config::load(&config).map_err(|mistakes| {
            InitError::Wrong(mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        let (shown, name) = (config.display(), &self.name);
        let typed = |_: &str| Pin::new(pin.as_ref()?.as_str().to_owned());
        let key_type = Some(self.key_type.unwrap_or(key_type));
        // An authorization value that init makes is too long to guess, and keys that nobody can lock stay usable.
        let no_da = matches!(self.wish, Wish::Tpm { .. });
        let touch_policy = match self.wish {
            Wish::Yubikey { touch_policy, .. } => touch_policy,
            _ => None,
        };
        let template = Template { key_type, no_da, pin_policy: None, touch_policy, like: None };
        let generate = Command::Key(self.name.clone(), Action::Generate(template));
        // Of one that is there already nothing stays unless it is what is meant.
        let made = if exists {
            Ok(())
        } else {
            say("making the key");
            operator::alone(&loaded, &generate, say, &typed).await.map(|_| left.files.clear())
        };
        match made {
            Ok(()) => {}
            // The device did not open, or was not asked: nothing was made.
            Err(error @ (OperatorError::Token { .. } | OperatorError::Log(_))) => return Err(error.into()),
            // None was made where the device says no; the PIN is not one of ours.
            Err(OperatorError::KeyLife(KeyLifeError::Device {
                error: error @ TokenError::Refused(_),
                ..
            })) if pin.is_some() => {
                let how = "if the key is there already, --existing uses it";
                return Err(InitError::Wrong(format!("{error}; {how}")));
            }
            // Whether a key was made only the device knows, and what opens it is here.
            Err(error) => {
                left.files.clear();
                return Err(InitError::Wrong(format!(
                    "{error}; {shown} stays, since the device may have made the key: mend it, then run `omsign-agent key \
                     generate {name} --config {shown}`"
                )));
            }
        }
        let csr = Command::Key(self.name.clone(), Action::Csr(subject));
        let requested = operator::alone(&loaded, &csr, say, &typed).await.map_err(|error| match error {
            OperatorError::Token { .. } | OperatorError::Log(_) => InitError::Operator(error),
            error if exists && made_by.is_empty() => InitError::Operator(error),
            error if made_by.is_empty() => InitError::Wrong(format!(
                "{error}; the key is made, and {shown} names it: `omsign-agent key csr {name} --subject … --config {shown}` \
                 asks for its certificate"
            )),
            error => InitError::Wrong(format!(
                "{error}; this device's keys are made with {made_by}, and --key-label is the label of the one to sign with"
            )),
        });
        let mut key_type = None;
        if let Output::Pem(text) = requested? {
            key_type = certified(&text);
            left.write(&request, &text)?;
            left.files.clear();
        }
        Ok(Made { config, request, key_type, notes })
    }
}

/// What kind of key a request is for.
fn certified(request: &str) -> Option<KeyType> {
    let request = CertReq::from_pem(request).ok()?;
    SpkiDer(request.info.public_key.to_der().ok()?).key_type()
}

/// What goes when making it fails.
struct Left<'a> {
    files: Vec<PathBuf>,
    /// Where they are, if that was made for them; unless there is something else by then.
    directory: Option<&'a Path>,
}

impl Left<'_> {
    /// Writes a file that was not there, for its owner alone.
    fn write(&mut self, path: &Path, text: &str) -> Result<(), InitError> {
        let mut options = fs::OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(path).map_err(system("make", path))?;
        self.files.push(path.to_owned());
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(system("write", path))
    }
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        for path in &self.files {
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        if let Some(directory) = self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InitError {
    let what = format!("cannot {what} {}", path.display());
    move |source| InitError::System { what, source }
}
