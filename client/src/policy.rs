//! The trust policy, `trust.toml`: who may sign which models.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml_edit::DocumentMut;

use crate::bundle::Bundle;
use crate::terms::{Terms, TermsError};
use crate::trust::{Trust, TrustError, VerifiedStatement};
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
    /// Directories whose own `.omsign/trust.toml` counts, too.
    #[serde(default)]
    projects: Vec<PathBuf>,
    #[serde(default)]
    signer: BTreeMap<String, Terms>,
}

impl Policy {
    /// The policy that counts here: this file's; or the user's own and, where the user allowed it, the one in the
    /// working directory.
    pub fn find(explicit: Option<&Path>) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        if let Some(path) = explicit {
            policy.add(path)?;
            return Ok(policy);
        }
        let own = own_file()?;
        if !own.exists() {
            return Err(PolicyError::Nothing);
        }
        let projects = policy.add(&own)?;
        let here =
            std::env::current_dir().map_err(|source| PolicyError::Read { path: ".".into(), source })?;
        if projects.contains(&here) && here.join(PROJECT_FILE).exists() {
            policy.add(Path::new(PROJECT_FILE))?;
        }
        Ok(policy)
    }

    /// Adds the entries of a file, and returns the projects that it allows.
    fn add(&mut self, path: &Path) -> Result<Vec<PathBuf>, PolicyError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| PolicyError::Read { path: path.to_owned(), source })?;
        let PolicyToml { projects, signer } = parse(&text, path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        for (name, terms) in signer {
            let wrong = |source| PolicyError::Terms { path: path.to_owned(), name: name.clone(), source };
            check_name(&name)?;
            let trust = terms.trust(base).map_err(wrong)?;
            let models = terms.scope().map_err(|error: PatternError| wrong(error.into()))?;
            self.entries.push(Entry { name, file: path.to_owned(), terms, trust, models });
        }
        Ok(projects)
    }

    /// A model cannot say who may sign it: refuses a policy inside of it.
    pub fn check_outside(&self, model: &Path) -> Result<(), PolicyError> {
        let Ok(root) = model.canonicalize() else { return Ok(()) };
        let inside = |file: &PathBuf| file.canonicalize().is_ok_and(|file| file.starts_with(&root));
        match self.entries.iter().map(|entry| &entry.file).find(|file| inside(file)) {
            Some(file) => Err(PolicyError::InsideModel(file.clone())),
            None => Ok(()),
        }
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

impl Entry {
    /// Verifies a bundle on this entry's terms.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        let mut statement = self.trust.verify(bundle)?;
        let model = &statement.manifest.model_name;
        if !self.models.is_empty() && !self.models.iter().any(|models| models.is(model)) {
            return Err(TrustError::OutOfScope { model: model.clone(), models: self.terms.models.clone() });
        }
        statement.proof.accepted_by = Some(format!("{} ({})", self.name, self.file.display()));
        Ok(statement)
    }
}

/// Where a project's policy is, from its directory.
pub const PROJECT_FILE: &str = ".omsign/trust.toml";

/// Where the user's own policy is: `$XDG_CONFIG_HOME/omsign/trust.toml`.
pub fn own_file() -> Result<PathBuf, PolicyError> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    Ok(base.ok_or(PolicyError::Nowhere)?.join("omsign/trust.toml"))
}

/// Checks a policy's text, as far as that is possible without the files that it names.
pub fn check(text: &str) -> Result<(), PolicyError> {
    parse(text, Path::new("trust.toml")).map(drop)
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

/// A policy file that is changed. Comments and order stay.
pub struct Edit {
    path: PathBuf,
    document: DocumentMut,
}

impl Edit {
    /// Starts with what is there.
    pub fn open(path: &Path) -> Result<Self, PolicyError> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| PolicyError::Read { path: path.to_owned(), source })?,
        };
        parse(&text, path)?;
        let document = text.parse().expect("TOML, as it was just parsed");
        Ok(Self { path: path.to_owned(), document })
    }

    /// Adds a signer.
    pub fn add(&mut self, name: &str, terms: &Terms) -> Result<(), PolicyError> {
        check_name(name)?;
        let signers = self.document.entry("signer").or_insert(toml_edit::table());
        let Some(signers) = signers.as_table_mut() else { return Err(self.taken("signer")) };
        signers.set_implicit(true);
        if signers.contains_key(name) {
            return Err(self.taken(name));
        }
        let table = toml::to_string_pretty(terms).expect("strings and lists always serialize");
        let table: DocumentMut = table.parse().expect("TOML, as it was just written");
        signers.insert(name, toml_edit::Item::Table(table.as_table().clone()));
        Ok(())
    }

    fn taken(&self, name: &str) -> PolicyError {
        PolicyError::Taken { path: self.path.clone(), name: name.to_owned() }
    }

    /// Removes a signer.
    pub fn remove(&mut self, name: &str) -> Result<(), PolicyError> {
        let signers = self.document.get_mut("signer").and_then(toml_edit::Item::as_table_like_mut);
        match signers.and_then(|signers| signers.remove(name)) {
            Some(_) => Ok(()),
            None => Err(PolicyError::Unknown { path: self.path.clone(), name: name.to_owned() }),
        }
    }

    /// Allows the policy of a project. Returns whether it was not yet.
    pub fn allow(&mut self, project: &Path) -> bool {
        let projects = self.document.entry("projects").or_insert(toml_edit::value(toml_edit::Array::new()));
        let Some(projects) = projects.as_array_mut() else { return false };
        let name = project.display().to_string();
        if projects.iter().any(|known| known.as_str() == Some(&name)) {
            return false;
        }
        projects.push(name);
        true
    }

    /// Writes it: a temporary file beside it, then renamed. Nothing is written that could not be read again.
    pub fn save(self) -> Result<(), PolicyError> {
        let text = self.document.to_string();
        parse(&text, &self.path)?;
        let error = |source| PolicyError::Write { path: self.path.clone(), source };
        let directory =
            self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(error)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".trust-").permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let mut file = builder.tempfile_in(directory).map_err(error)?;
        file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(error)?;
        file.persist(&self.path).map_err(|failed| error(failed.error))?;
        Ok(())
    }
}
