//! Which files of a model are meant, as a user says it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::fs::fstat;
use rustix::stdio::{stderr, stdout};

use crate::bundle::Bundle;
use crate::hash::Algorithm;
use crate::left_out;
use crate::manifest::{Method, Plan, Serialization};
use crate::model::{GIT_PATHS, Model, ModelError, Oddity};

/// Which files of a model, and how they are hashed, as a user says it.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// The model: a directory or a file.
    pub model: &'a Path,
    /// What it is called; none, as its directory or its only file is.
    pub model_name: Option<&'a str>,
    /// Its bundle, where it is known: left out where it lies inside the model.
    pub signature: Option<&'a Path>,
    /// What to leave out, as the user wrote it.
    pub ignore_paths: &'a [PathBuf],
    /// Whether to leave git's own files out.
    pub ignore_git_paths: bool,
    /// Whether to follow symbolic links.
    pub allow_symlinks: bool,
    /// Files or shards.
    pub method: Method,
    /// The hash algorithm.
    pub algorithm: Algorithm,
}

/// Where publishers put a model's bundle, and where `omsign verify` looks for it.
pub const PUBLISHED: &str = "model.sig";

/// The bundle that `omsign sign` wrote here, if there is one.
pub fn bundle_here() -> Option<&'static Path> {
    Some(Path::new(PUBLISHED)).filter(|path| is_bundle(path))
}

fn is_bundle(path: &Path) -> bool {
    path.is_file() && Bundle::seems_one(path).unwrap_or(false)
}

impl Selection<'_> {
    /// Whether there is a bundle where publishers put it: it is no part of the model, whichever bundle is written.
    pub fn published_bundle(&self) -> bool {
        is_bundle(&self.model.join(PUBLISHED))
    }

    /// Finds its files.
    pub fn walk(&self, serialization: &Serialization) -> Result<Model, ModelError> {
        let mut found = serialization.walk(self.model)?;
        let real = self.model.canonicalize().unwrap_or_default();
        match self.model_name {
            Some(name) => name.clone_into(&mut found.name),
            // It is signed, and JSON has to carry it.
            None if real.file_name().is_some_and(|name| name.to_str().is_none()) => {
                return Err(ModelError::Odd(self.model.to_owned(), Oddity::NotUtf8));
            }
            None => {}
        }
        Ok(found)
    }

    /// What the manifest says of it: everything that is left out is recorded.
    pub fn serialization(&self) -> Result<Serialization, ModelError> {
        let mut ignore_paths = BTreeSet::new();
        for path in self.ignore_paths {
            ignore_paths.insert(left_out::ignored(self.model, path)?);
        }
        if self.published_bundle() {
            ignore_paths.insert(PUBLISHED.to_owned());
        }
        if self.ignore_git_paths {
            ignore_paths.extend(GIT_PATHS.map(str::to_owned));
        }
        if let Some(signature) = self.signature {
            ignore_paths.extend(left_out::recorded_bundle(self.model, signature)?);
        }
        if let Some(path) = ignore_paths.iter().find(|path| left_out::is_pattern(path)) {
            let reason =
                "other verifiers take *, ? and [ in it for a pattern (6.2.1); rename it, or what it is in";
            return Err(ModelError::Ignore { path: path.into(), reason });
        }
        let Self { method, algorithm, allow_symlinks, .. } = *self;
        Ok(Serialization { method, algorithm, allow_symlinks, ignore_paths: Some(ignore_paths) })
    }
}

/// Refuses a model that has a file among its own that this process writes to while it hashes it.
pub fn check_outputs(plan: &Plan<'_>) -> Result<(), ModelError> {
    for (output, name) in [(stdout(), "standard output"), (stderr(), "standard error")] {
        // One that is closed is no file.
        if fstat(output).is_ok_and(|output| plan.has(output.st_dev, output.st_ino)) {
            return Err(ModelError::Output(name));
        }
    }
    Ok(())
}
