//! `omsign-agent key rotate`: the next key beside the present one, then in its place.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use omsign_agent::config::{Config, Device, Key, Object, ObjectSelector, edit};
use omsign_agent::key_life::{Action, Command, NEXT, Need, Output, Template};
use omsign_agent::operator::OperatorError;
use omsign_agent::spki::SpkiDer;

use crate::commands::{ask, say};

/// How long another rotation may take to write the file.
const PATIENCE: Duration = Duration::from_secs(5);

/// A configuration as it was read.
struct Opened {
    text: String,
    _lock: File,
}

/// A key that is rotated, and the file that names it.
pub(crate) struct Rotation<'a> {
    pub(crate) path: &'a Path,
    pub(crate) config: &'a Config,
    pub(crate) name: &'a str,
}

impl Rotation<'_> {
    /// Names the next key in the configuration and makes it; returns its public half, PEM.
    pub(crate) fn begin(&self, template: Template, object: Option<&str>) -> anyhow::Result<String> {
        let key = self.key()?;
        ensure!(
            key.next.is_none(),
            "{0} has a next key already: --finish puts it in its place; was it not made, `omsign-agent key generate \
             {0}{NEXT}` makes it",
            self.name
        );
        ensure!(
            key.tokens.len() == 1,
            "{} lives on several tokens: make the next key on each with the vendor's tools, name it in the configuration \
             as `next`, then run this with --finish",
            self.name
        );
        let next = match object {
            Some(text) => self.given(key, text)?,
            None => following(self.name, &key.object)?,
        };
        self.is_free(key, &next)?;
        // Making a key takes minutes on some devices, and others may change the file meanwhile.
        let (before, begun) = {
            let opened = self.opened()?;
            let begun = edit::begin(&opened.text, self.name, &self.written(&next))?;
            self.write(&opened, &begun)?;
            (opened.text, begun)
        };
        let public = match self.make(template) {
            Ok(public) => public,
            Err(error) => {
                // It may be there all the same; else the file is as it was, also for an agent that runs.
                let changed = match self.reloaded() {
                    Ok(changed) => changed,
                    Err(_) => {
                        // A configuration with mistakes changes nothing in an agent that runs.
                        self.take_back(&begun, &before).with_context(|| format!("{error:#}"))?;
                        return Err(error);
                    }
                };
                let there =
                    ask(&changed, Command::Key(format!("{}{NEXT}", self.name), Action::Public(Need::Shown)));
                ensure!(there.is_err(), "{error:#}; but {next} is there: `omsign-agent key list` shows it");
                self.take_back(&begun, &before).with_context(|| format!("{error:#}"))?;
                reload(self.config)?;
                return Err(error);
            }
        };
        say(format_args!("the next key is {next}, named {}{NEXT} until it takes its place:", self.name));
        // Those that it has are for the present key.
        let chain = if key.certificate_chain.is_empty() { "" } else { " --certificate-chain FILE" };
        let name = self.name;
        say(format_args!("  {} csr {name}{NEXT} --subject …    asks for its certificate", self.typed()));
        say(format_args!("  {} rotate {name} --finish{chain}    puts it in its place", self.typed()));
        Ok(public)
    }

    /// As before it had begun, but for what others changed.
    fn take_back(&self, begun: &str, before: &str) -> anyhow::Result<()> {
        let now = self.opened()?;
        let taken_back = match now.text == *begun {
            true => before.to_owned(),
            false => edit::take_back(&now.text, self.name)?,
        };
        self.write(&now, &taken_back)
    }

    fn make(&self, template: Template) -> anyhow::Result<String> {
        let changed = self.reloaded()?;
        reload(&changed)?;
        match ask(&changed, Command::Key(format!("{}{NEXT}", self.name), Action::Generate(template)))? {
            Output::Pem(public) => Ok(public),
            _ => bail!("the device did not answer"),
        }
    }

    /// Whether no other key of the configuration is in that place.
    fn is_free(&self, key: &Key, next: &Object) -> anyhow::Result<()> {
        for (name, other) in &self.config.keys {
            let shares = other.tokens.iter().any(|token| key.tokens.contains(token));
            let there = other.object == *next || other.next.as_ref() == Some(next);
            ensure!(!(shares && there), "{next} is the place of [key.{name}]; choose another: --object");
        }
        Ok(())
    }

    /// Writes the next key into the place of the present one.
    pub(crate) fn finish(&self, chain: Option<&Path>) -> anyhow::Result<String> {
        let key = self.key()?;
        ensure!(
            key.next.is_some(),
            "{0} has no next key; begin with `omsign-agent key rotate {0}`",
            self.name
        );
        ensure!(
            chain.is_some() || key.certificate_chain.is_empty(),
            "{} signs with certificates, and those are for its present key; give the next key's with --certificate-chain",
            self.name
        );
        // What was written by hand, the agent has not read.
        reload(self.config)?;
        let next = self.public(&format!("{}{NEXT}", self.name), Need::Signs)?;
        let present = self.public(self.name, Need::Shown)?;
        let before = self.opened()?;
        let written = self.written_chain(&before.text)?;
        let old = match &written {
            // The file that it has is all that verifiers need.
            Some(file) => file.clone(),
            None => self.keep(&present)?,
        };
        let chain = chain.map(std::path::absolute).transpose()?.map(|path| path.display().to_string());
        let finished = edit::finish(&before.text, self.name, chain.as_deref(), &old)?;
        let put = self.write(&before, &finished).and_then(|()| {
            // Certificates for another key, or none at all: as it was.
            let fits = self.reloaded().and_then(|changed| fits(&changed, self.name, &next, &present));
            fits.or_else(|error| {
                self.write(&Opened { text: finished, ..before }, &before.text)?;
                Err(error)
            })
        });
        if let Err(error) = put {
            if written.is_none() {
                std::fs::remove_file(self.directory().join(&old))?;
            }
            return Err(error);
        }
        say(format_args!(
            "{} is the next key once the agent reads its configuration: {} reload",
            self.name,
            self.typed()
        ));
        let tokens = key.tokens.iter().filter_map(|name| Some((name, &self.config.tokens.get(name)?.pin)));
        for (token, pin) in tokens.filter(|(_, pin)| pin.is_by_hand()) {
            say(format_args!("token {token} then waits for its PIN: {}", pin.how_to_unlock(token)));
        }
        Ok(next)
    }

    fn public(&self, name: &str, need: Need) -> anyhow::Result<String> {
        match ask(self.config, Command::Key(name.to_owned(), Action::Public(need)))? {
            Output::Pem(public) => Ok(public),
            _ => bail!("the device did not answer"),
        }
    }

    /// Leaves a public key beside the configuration.
    fn keep(&self, public: &str) -> anyhow::Result<String> {
        for number in 1..1000 {
            let file = format!("{}.previous-{number}.pem", self.name);
            let path = self.directory().join(&file);
            match edit::write_beside(self.path, &path, public) {
                Ok(()) => return Ok(file),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => bail!("{} cannot be written: {error}", path.display()),
            }
        }
        bail!("too many previous keys in {}", self.directory().display())
    }

    /// `certificate_chain`, as the file has it.
    fn written_chain(&self, text: &str) -> anyhow::Result<Option<String>> {
        let table: toml::Table = text.parse()?;
        let found = table.get("key").and_then(|keys| keys.get(self.name));
        let chain = found.and_then(|key| key.get("certificate_chain")).and_then(|chain| chain.as_str());
        Ok(chain.map(str::to_owned))
    }

    fn key(&self) -> anyhow::Result<&Key> {
        let key = self.config.keys.get(self.name);
        key.with_context(|| format!("there is no [key.{}] in the configuration", self.name))
    }

    /// `label=…` and the like, for the backend of the key.
    fn given(&self, key: &Key, text: &str) -> anyhow::Result<Object> {
        let wrong = || {
            format!("{text:?} names no place for this key; write label=…, id=…, handle=…, file=… or slot=…")
        };
        let (kind, value) = text.split_once('=').with_context(wrong)?;
        let token = key.tokens.first().and_then(|token| self.config.tokens.get(token));
        let device = token.map(|token| &token.device);
        Ok(match (device, kind) {
            (Some(Device::Pkcs11 { .. }), "label") => {
                Object::Pkcs11(ObjectSelector { label: Some(value.to_owned()), id: None })
            }
            (Some(Device::Pkcs11 { .. }), "id") => {
                let id = hex::decode(value).ok().with_context(wrong)?;
                Object::Pkcs11(ObjectSelector { label: None, id: Some(id) })
            }
            (Some(Device::Tpm(_)), "handle") => Object::tpm_handle(value).with_context(wrong)?,
            (Some(Device::Tpm(_)), "file") => Object::TpmFile(self.directory().join(value)),
            (Some(Device::Piv { .. }), "slot") => Object::piv_slot(value).with_context(wrong)?,
            _ => bail!(wrong()),
        })
    }

    /// How the next command begins, as a shell takes it.
    fn typed(&self) -> String {
        match self.path == Config::default_path() {
            true => "omsign-agent key".to_owned(),
            false => {
                let path = self.path.display().to_string().replace('\'', r"'\''");
                format!("omsign-agent key --config '{path}'")
            }
        }
    }

    /// As the configuration is to have it: files beside it by their names, wherever it is moved to.
    fn written(&self, object: &Object) -> Object {
        match object {
            Object::TpmFile(path) => {
                Object::TpmFile(path.strip_prefix(self.directory()).unwrap_or(path).to_owned())
            }
            object => object.clone(),
        }
    }

    fn directory(&self) -> PathBuf {
        let path = std::path::absolute(self.path).unwrap_or_else(|_| self.path.to_owned());
        path.parent().unwrap_or(Path::new("/")).to_owned()
    }

    fn text(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(self.path).with_context(|| format!("{} cannot be read", self.path.display()))
    }

    /// The file, which no other rotation changes meanwhile.
    fn opened(&self) -> anyhow::Result<Opened> {
        let shown = self.path.display();
        let path = std::fs::canonicalize(self.path).with_context(|| format!("{shown} cannot be read"))?;
        // A file of its own: what everybody can read, everybody can lock.
        let lock = path.with_file_name(format!(".{}.lock", path.file_name().unwrap_or_default().display()));
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        let lock = options
            .open(&lock)
            .and_then(|file| {
                // Whoever owns the configuration can lock it tomorrow, also where root did today.
                if rustix::process::geteuid().is_root() {
                    let owner = std::fs::metadata(&path)?;
                    std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
                }
                locked(&file).map(|()| file)
            })
            .with_context(|| format!("{} cannot be locked", lock.display()))?;
        Ok(Opened { text: self.text()?, _lock: lock })
    }

    /// Changes the file, unless somebody else did.
    fn write(&self, before: &Opened, text: &str) -> anyhow::Result<()> {
        let path = self.path.display();
        ensure!(self.text()? == before.text, "{path} was changed meanwhile, and stays as it is: try again");
        edit::write(self.path, text).with_context(|| format!("{path} cannot be changed"))
    }

    /// The configuration as it is now.
    fn reloaded(&self) -> anyhow::Result<Config> {
        Config::load(self.path).map_err(|mistakes| {
            let mistakes: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
            anyhow::anyhow!("{}", mistakes.join("; "))
        })
    }
}

/// Takes a lock that others hold for moments only; whoever holds it for long is not waited for.
fn locked(file: &File) -> std::io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(std::io::Error::other("somebody else holds its lock; `fuser` says who"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
            Ok(()) => return Ok(()),
        }
    }
}

/// Has the agent read its configuration, if one runs.
fn reload(config: &Config) -> anyhow::Result<()> {
    match ask(config, Command::Reload) {
        Err(error) if matches!(error.downcast_ref(), Some(OperatorError::NoAgent)) => Ok(()),
        done => done.map(drop),
    }
}

/// Whether the files of a key say what they should: certificates are for the next one, and what is left of the
/// present one is there.
fn fits(config: &Config, name: &str, next: &str, present: &str) -> anyhow::Result<()> {
    let key = config.keys.get(name).context("the key is gone from the configuration")?;
    let spki = |public: &str| der::pem::decode_vec(public.as_bytes()).map(|(_, der)| der);
    let (next, present) =
        spki(next).and_then(|next| Ok((next, spki(present)?))).map_err(|error| anyhow::anyhow!("{error}"))?;
    ensure!(
        key.previous.first().is_some_and(|previous| previous.public_key.0 == present),
        "the file of certificate_chain no longer holds the present key's certificates, which verifiers need: put the \
         next key's into another file"
    );
    let Some(leaf) = key.certificate_chain.first() else { return Ok(()) };
    let certified = SpkiDer::of_certificate(leaf);
    ensure!(
        certified.is_some_and(|found| found.0 == next),
        "the certificates are for another key, not for the next one"
    );
    Ok(())
}

/// The place after this one: `release`, `release-2`, `release-3`; the next handle; `key.pem`, `key-2.pem`.
fn following(name: &str, object: &Object) -> anyhow::Result<Object> {
    Ok(match object {
        Object::Pkcs11(select) => {
            let label = select.label.as_deref().unwrap_or(name);
            Object::Pkcs11(ObjectSelector { label: Some(counted_on(label)), id: None })
        }
        Object::TpmHandle(handle) => Object::TpmHandle(handle + 1),
        Object::TpmFile(path) => {
            let mut next =
                std::ffi::OsString::from(counted_on(&path.file_stem().unwrap_or_default().to_string_lossy()));
            if let Some(extension) = path.extension() {
                next.push(".");
                next.push(extension);
            }
            Object::TpmFile(path.with_file_name(next))
        }
        Object::PivSlot(_) => bail!("say which slot the next key goes into: --object slot=82"),
    })
}

fn counted_on(name: &str) -> String {
    let counted = name.rsplit_once('-').and_then(|(stem, number)| Some((stem, number.parse::<u32>().ok()?)));
    match counted {
        Some((stem, number)) => format!("{stem}-{}", number.saturating_add(1)),
        None => format!("{name}-2"),
    }
}
