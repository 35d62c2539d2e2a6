//! Changing a policy file: its comments and its order stay, and nobody else's change is lost.

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml_edit::DocumentMut;

use super::{PolicyError, check_name, parse};
use crate::files::Files;
use crate::replace::{replace, turn};
use crate::terms::Terms;

/// How long another change may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A policy file that is changed. Comments and order stay.
pub struct Edit {
    path: PathBuf,
    document: DocumentMut,
    /// Keeps others from changing it.
    _turn: File,
}

impl Edit {
    /// Starts with what is there, when nobody else is changing it.
    pub fn open(path: &Path) -> Result<Self, PolicyError> {
        // Where it is a link, what it leads to is replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let write = |source| PolicyError::Write { path: path.clone(), source };
        let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(write)?;
        let turn = turn(directory, PATIENCE).map_err(write)?;
        let turn = turn.ok_or_else(|| PolicyError::Busy(path.clone()))?;
        // Nobody else waits, because this one waits for a pipe.
        if path.exists() && !path.is_file() {
            return Err(PolicyError::Read { path, source: std::io::ErrorKind::InvalidInput.into() });
        }
        let text = match super::text(&path, &mut Files::default()) {
            Err(PolicyError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                String::new()
            }
            text => text?,
        };
        parse(&text, &path)?;
        let document = text.parse().expect("TOML, as it was just parsed");
        Ok(Self { path, document, _turn: turn })
    }

    /// What it is now.
    pub(super) fn text(&self) -> String {
        self.document.to_string()
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
        let table = toml::to_string_pretty(terms).map_err(|_| PolicyError::NotUtf8(name.to_owned()))?;
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

    pub(super) fn allow(&mut self, project: &Path, fingerprint: &str) -> Result<(), PolicyError> {
        let projects = self.document.entry("projects").or_insert(toml_edit::table());
        let Some(projects) = projects.as_table_like_mut() else { return Err(self.taken("projects")) };
        let name = project.to_str().ok_or_else(|| PolicyError::Name(project.display().to_string()))?;
        projects.insert(name, toml_edit::value(fingerprint));
        Ok(())
    }

    /// Writes it as a whole, or not at all. Nothing is written that could not be read again.
    pub fn save(self) -> Result<(), PolicyError> {
        let text = self.text();
        parse(&text, &self.path)?;
        let mode = std::fs::metadata(&self.path).map_or(0o644, |file| file.permissions().mode() & 0o777);
        let written = replace(&self.path, mode, |file| file.write_all(text.as_bytes()));
        written.map_err(|source| PolicyError::Write { path: self.path.clone(), source })
    }
}
