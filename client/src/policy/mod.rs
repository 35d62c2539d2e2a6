//! The trust policy, `trust.toml`: who may sign which models.

mod edit;
mod project;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

pub use self::edit::Edit;
use self::project::Fingerprint;
pub use self::project::{PROJECT_FILE, add_to_project, allow};
use crate::bundle::Bundle;
use crate::files::Files;
use crate::terms::{Terms, TermsError};
use crate::trust::{Signers, Trust, TrustError, VerifiedStatement};
use crate::user_directory;
use crate::wanted::{PatternError, Wanted};

/// Who may sign which models.
#[derive(Default)]
pub struct Policy {
    /// Asked in this order.
    pub entries: Vec<Entry>,
}

/// One signer.
pub struct Entry {
    /// `[signer.NAME]`.
    pub name: String,
    /// The file that it is in.
    pub file: PathBuf,
    /// As written.
    pub terms: Terms,
    trust: Trust,
    models: Vec<Wanted>,
}

/// Why an entry did not accept a signature.
#[derive(Debug)]
pub struct Refusal {
    /// Its name.
    pub entry: String,
    /// Why.
    pub why: TrustError,
}

/// What is wrong with a policy file.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be written. What was there before is untouched.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or with a key that it must not have.
    #[error("{path}:{line}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A path that a text file cannot hold.
    #[error("signer {0} names a file whose path is not UTF-8; move it to a path that is")]
    NotUtf8(String),
    /// Terms that cannot be.
    #[error("{path}: signer.{name}")]
    Terms {
        /// The file.
        path: PathBuf,
        /// The entry.
        name: String,
        /// Why.
        source: TermsError,
    },
    /// A model cannot say who may sign it.
    #[error("{0} lies inside the model that it is to judge")]
    InsideModel(PathBuf),
    /// The policy of a project that was allowed is another one now.
    #[error("{0} is not what it was when you allowed it")]
    Changed(PathBuf),
    /// The policy of a project that was not allowed.
    #[error("{0} is there, and you did not allow it")]
    NotAllowed(PathBuf),
    /// Somebody else changes it, and does not come to an end.
    #[error("{0} is being changed by another omsign; try again when that is done")]
    Busy(PathBuf),
    /// There is no policy.
    #[error("there is no trust policy, and nothing else says whose signature to accept")]
    Nothing,
    /// Neither `XDG_CONFIG_HOME` nor `HOME` says where.
    #[error("there is no place for a trust policy: neither XDG_CONFIG_HOME nor HOME is set")]
    Nowhere,
    /// A name that is taken.
    #[error("{path} has a signer {name:?} already")]
    Taken {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A name that is not there.
    #[error("{path} has no signer {name:?}")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A name that is none.
    #[error("{0:?} is no name for a signer: names are 1 to 64 letters, digits, '-', '_' or '.'")]
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyToml {
    /// Directories whose own `.omsign/trust.toml` counts, too, as long as its fingerprint is this.
    #[serde(default)]
    projects: BTreeMap<PathBuf, String>,
    #[serde(default)]
    signer: BTreeMap<String, Terms>,
}

impl Policy {
    /// The policy that counts here: this file's; or the user's own and, where the user allowed it, the one in the
    /// working directory.
    pub fn find(explicit: Option<&Path>) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        let mut files = Files::default();
        if let Some(path) = explicit {
            let text = text(path, &mut files)?;
            policy.add(path, &text, &mut files)?;
            return Ok(policy);
        }
        let own = own_file()?;
        if !own.exists() {
            return Err(PolicyError::Nothing);
        }
        let projects = policy.add(&own, &text(&own, &mut files)?, &mut files)?;
        let here =
            std::env::current_dir().map_err(|source| PolicyError::Read { path: ".".into(), source })?;
        let file = Path::new(PROJECT_FILE);
        // One that is gone trusts nobody.
        if let Some(allowed) = projects.get(&here).filter(|_| file.symlink_metadata().is_ok()) {
            let changed = || PolicyError::Changed(here.join(file));
            // Nobody waits for a pipe in its place.
            if !file.is_file() {
                return Err(changed());
            }
            let text = text(file, &mut files)?;
            if !Fingerprint::of(file, &text).is(allowed, &mut files)? {
                return Err(changed());
            }
            policy.add(file, &text, &mut files)?;
        }
        Ok(policy)
    }

    /// Adds the entries of a file, and returns the projects that it allows.
    fn add(
        &mut self,
        path: &Path,
        text: &str,
        files: &mut Files,
    ) -> Result<BTreeMap<PathBuf, String>, PolicyError> {
        let PolicyToml { projects, signer } = parse(text, path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        for (name, terms) in signer {
            let wrong = |source| PolicyError::Terms { path: path.to_owned(), name: name.clone(), source };
            check_name(&name)?;
            let trust = terms.trust(base, files).map_err(wrong)?;
            let models = terms.scope().map_err(|error: PatternError| wrong(error.into()))?;
            self.entries.push(Entry { name, file: path.to_owned(), terms, trust, models });
        }
        Ok(projects)
    }

    /// A model cannot say who may sign it: refuses a policy inside of it, and keys and certificates from there.
    pub(crate) fn check_outside(&self, model: &Path) -> Result<(), PolicyError> {
        // As it is written, and where it really is: a link in the model may lead to a policy anywhere.
        // (Of a way up again, only where it really leads tells.)
        let plain = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
        let written = |path: &Path| std::path::absolute(path).ok().filter(|_| plain(path));
        let both = |path: &Path| [written(path), path.canonicalize().ok()];
        let roots: Vec<PathBuf> = both(model).into_iter().flatten().collect();
        let inside = |path: &Path| {
            let on_the_way = links(path);
            let mut all = both(path).into_iter().flatten().chain(on_the_way);
            all.any(|path| roots.iter().any(|root| path.starts_with(root)))
        };
        for entry in &self.entries {
            let named = entry.terms.files(entry.file.parent().unwrap_or(Path::new("")));
            if let Some(file) = std::iter::once(&entry.file).chain(&named).find(|file| inside(file)) {
                return Err(PolicyError::InsideModel(file.clone()));
            }
        }
        Ok(())
    }

    /// Verifies a bundle on the terms of the first entry that accepts it.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        let method = bundle.material.method();
        let mut refusals = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.terms.method().is_ok_and(|own| own == method)) {
            match entry.verify(bundle) {
                Ok(statement) => return Ok(statement),
                Err(why) => refusals.push(Refusal { entry: entry.name.clone(), why }),
            }
        }
        Err(TrustError::Refused { method, refusals })
    }
}

/// The links on the way to where a path leads, each where it really is.
fn links(path: &Path) -> Vec<PathBuf> {
    // As many as Linux follows (path_resolution(7)).
    const MOST: usize = 40;
    let (mut at, mut found) = (PathBuf::new(), Vec::new());
    let mut rest = std::path::absolute(path).unwrap_or_default();
    while let Some(part) = rest.components().next().map(|part| part.as_os_str().to_owned()) {
        rest = rest.components().skip(1).collect();
        match Path::new(&part).components().next() {
            Some(Component::ParentDir) => drop(at.pop()),
            _ => at.push(&part),
        }
        if let Ok(target) = std::fs::read_link(&at)
            && found.len() < MOST
        {
            found.push(at.clone());
            at.pop();
            // An absolute one begins anew.
            rest = target.join(rest);
        }
    }
    found
}

impl Entry {
    /// Whose signatures it accepts.
    pub fn signers(&self) -> &Signers {
        &self.trust.signers
    }

    /// Verifies a bundle on this entry's terms.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        let statement = self.trust.verify(bundle)?;
        let model = &statement.manifest().model_name;
        if !self.models.is_empty() && !self.models.iter().any(|models| models.is(model)) {
            return Err(TrustError::OutOfScope { model: model.clone(), models: self.terms.models.clone() });
        }
        Ok(statement.accepted_by(format!("{} ({})", self.name, self.file.display())))
    }
}

/// Where the user's own policy is: `$XDG_CONFIG_HOME/omsign/trust.toml`.
pub fn own_file() -> Result<PathBuf, PolicyError> {
    Ok(user_directory("XDG_CONFIG_HOME", ".config").ok_or(PolicyError::Nowhere)?.join("omsign/trust.toml"))
}

/// The text of a policy.
fn text(path: &Path, files: &mut Files) -> Result<String, PolicyError> {
    let read = |source| PolicyError::Read { path: path.to_owned(), source };
    let bytes = files.read(path).map_err(read)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| read(std::io::ErrorKind::InvalidData.into()))
}

fn parse(text: &str, path: &Path) -> Result<PolicyToml, PolicyError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        PolicyError::Malformed { path: path.to_owned(), line, message: error.message().replace('\n', " ") }
    })
}

fn check_name(name: &str) -> Result<(), PolicyError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        Ok(())
    } else {
        Err(PolicyError::Name(name.to_owned()))
    }
}
