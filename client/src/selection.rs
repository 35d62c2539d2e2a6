//! Which files of a model are meant, as a user says it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::hash::Algorithm;
use crate::left_out;
use crate::manifest::{Method, Serialization};
use crate::model::{GIT_PATHS, ModelError};

/// Which files of a model, and how they are hashed, as a user says it.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// The model: a directory or a file.
    pub model: &'a Path,
    /// Its bundle: left out where it lies inside the model.
    pub signature: &'a Path,
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

impl Selection<'_> {
    /// What the manifest says of it: everything that is left out is recorded.
    pub fn serialization(&self) -> Result<Serialization, ModelError> {
        let mut ignore_paths = BTreeSet::new();
        for path in self.ignore_paths {
            ignore_paths.insert(left_out::ignored(self.model, path)?);
        }
        if self.ignore_git_paths {
            ignore_paths.extend(GIT_PATHS.map(str::to_owned));
        }
        ignore_paths.extend(left_out::recorded_bundle(self.model, self.signature)?);
        let Self { method, algorithm, allow_symlinks, .. } = *self;
        Ok(Serialization { method, algorithm, allow_symlinks, ignore_paths: Some(ignore_paths) })
    }
}
