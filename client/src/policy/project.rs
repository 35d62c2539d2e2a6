//! A project's own policy: it counts where the user allowed it, and only as it was then.

use std::path::{Path, PathBuf};

use super::{Edit, PolicyError, own_file, parse};
use crate::files::Files;
use crate::hash::Digest;
use crate::terms::Terms;

/// Where a project's policy is, from its directory.
pub const PROJECT_FILE: &str = ".omsign/trust.toml";

/// What a project's policy is allowed by: two SHA-256 digests, of itself and of the keys, certificates and trusted roots
/// that it names. Lists of revoked certificates may change: somebody who is trusted signed them.
pub(super) struct Fingerprint<'a> {
    path: &'a Path,
    text: &'a str,
}

impl<'a> Fingerprint<'a> {
    pub(super) fn of(path: &'a Path, text: &'a str) -> Self {
        Self { path, text }
    }

    /// Whether it is this one. What another policy names is not even opened.
    pub(super) fn is(&self, allowed: &str, files: &mut Files) -> Result<bool, PolicyError> {
        Ok(allowed.starts_with(&self.own()) && self.full(files)? == allowed)
    }

    fn own(&self) -> String {
        format!("sha256:{} ", Digest::sha256(self.text.as_bytes()))
    }

    fn full(&self, files: &mut Files) -> Result<String, PolicyError> {
        let base = self.path.parent().unwrap_or(Path::new(""));
        let mut digests = Vec::new();
        for mut terms in parse(self.text, self.path)?.signer.into_values() {
            // A pipe put in the place of one would never end.
            if let Some(odd) = terms.files(base).into_iter().find(|file| file.exists() && !file.is_file()) {
                let source = std::io::Error::other("it is no regular file");
                return Err(PolicyError::Read { path: odd, source });
            }
            terms.crls.clear();
            for file in terms.files(base) {
                let read = files.read(&file);
                let bytes = read.map_err(|source| PolicyError::Read { path: file.clone(), source })?;
                digests.extend_from_slice(Digest::sha256(bytes).as_bytes());
            }
        }
        Ok(format!("{}sha256:{}", self.own(), Digest::sha256(&digests)))
    }
}

/// Lets the policy of a project count, as it is now, when the user works in its directory.
pub fn allow(project: &Path) -> Result<(), PolicyError> {
    let (file, mut files) = (project.join(PROJECT_FILE), Files::default());
    let text = super::text(&file, &mut files)?;
    let fingerprint = Fingerprint::of(&file, &text).full(&mut files)?;
    let mut own = Edit::open(&own_file()?)?;
    own.allow(project, &fingerprint)?;
    own.save()
}

/// Adds a signer to the policy of a project that has none yet, or one that was allowed: then it still is. Nobody allows
/// what is in it already by adding to it.
pub fn add_to_project(project: &Path, name: &str, terms: &Terms) -> Result<PathBuf, PolicyError> {
    let (file, mut files) = (project.join(PROJECT_FILE), Files::default());
    // One's own is no project's.
    if file
        .canonicalize()
        .is_ok_and(|file| own_file().is_ok_and(|own| own.canonicalize().is_ok_and(|own| own == file)))
    {
        return Err(PolicyError::NotAllowed(file));
    }
    let mut edit = Edit::open(&file)?;
    let mut own = Edit::open(&own_file()?)?;
    let before = edit.text();
    if !before.is_empty() {
        let allowed = parse(&own.text(), Path::new("trust.toml"))?.projects.remove(project);
        let same = match allowed {
            Some(allowed) => Fingerprint::of(&file, &before).is(&allowed, &mut files)?,
            None => false,
        };
        if !same {
            return Err(PolicyError::NotAllowed(file));
        }
    }
    edit.add(name, terms)?;
    let after = edit.text();
    own.allow(project, &Fingerprint::of(&file, &after).full(&mut files)?)?;
    edit.save()?;
    own.save()?;
    Ok(file)
}
