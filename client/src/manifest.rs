//! A model's files and digests as they are signed (OMS v1.0, 5.2), and how two of them differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::hash::{self, Digest};
use crate::model::{self, GIT_PATHS, Model, ModelError, Scope};

/// What is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Name of the model: for people, never checked (OMS v1.0, 6.5.1).
    pub model_name: String,
    /// Files, in the order in which they are listed.
    pub resources: Vec<Resource>,
    /// How they were found and hashed.
    pub serialization: Serialization,
}

/// One file and its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Path below the model's root.
    pub name: String,
    /// SHA-256 of its content.
    pub digest: Digest,
}

/// How files were found and hashed: whole files, SHA-256.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serialization {
    /// Whether symbolic links were followed.
    pub allow_symlinks: bool,
    /// What was left out, below the root, sorted. Absent from bundles before 1.1.
    pub ignore_paths: BTreeSet<String>,
}

/// Which files of a model, as a user says it.
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
}

impl Selection<'_> {
    /// What the manifest says of it: everything that is left out is recorded.
    pub fn serialization(&self) -> Result<Serialization, ModelError> {
        let mut ignore_paths = BTreeSet::new();
        for path in self.ignore_paths {
            ignore_paths.insert(model::ignored(self.model, path)?);
        }
        if self.ignore_git_paths {
            ignore_paths.extend(GIT_PATHS.map(str::to_owned));
        }
        ignore_paths.extend(model::bundle_inside(self.model, self.signature));
        Ok(Serialization { allow_symlinks: self.allow_symlinks, ignore_paths })
    }
}

impl Manifest {
    /// Walks and hashes a model. Also returns its size in bytes.
    pub fn of_model(root: &Path, serialization: Serialization) -> Result<(Self, u64), Error> {
        let Serialization { allow_symlinks, ignore_paths } = &serialization;
        let scope = Scope { ignore_paths: ignore_paths.clone(), allow_symlinks: *allow_symlinks };
        let model = Model::walk(root, &scope)?;
        let hashed = hash::files(&model.files)?;
        let bytes = hashed.iter().map(|hashed| hashed.size).sum();
        let resource = |(file, hashed): (crate::model::File, hash::Hashed)| Resource {
            name: file.name,
            digest: hashed.digest,
        };
        let resources = model.files.into_iter().zip(hashed).map(resource).collect();
        Ok((Self { model_name: model.name, resources, serialization }, bytes))
    }

    /// SHA-256 over the raw digests in listed order (OMS v1.0, 6.5.1).
    pub fn root_digest(&self) -> Digest {
        let digests: Vec<u8> = self.resources.iter().flat_map(|resource| resource.digest.0).collect();
        Digest::of(&digests)
    }

    /// Compares what was signed with what is there.
    pub fn compare(&self, actual: &Self) -> Result<(), Differences> {
        let signed: BTreeMap<&str, Digest> =
            self.resources.iter().map(|r| (r.name.as_str(), r.digest)).collect();
        let mut differences = Differences::default();
        let mut seen = BTreeSet::new();
        for resource in &actual.resources {
            seen.insert(resource.name.as_str());
            match signed.get(resource.name.as_str()) {
                None => differences.extra.push(resource.name.clone()),
                Some(digest) if *digest != resource.digest => differences.changed.push(resource.name.clone()),
                Some(_) => {}
            }
        }
        let missing = signed.keys().filter(|name| !seen.contains(*name));
        differences.missing = missing.map(|name| (*name).to_owned()).collect();
        if differences.is_empty() { Ok(()) } else { Err(differences) }
    }
}

/// How a model differs from its signature. All of it, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Signed, but not there.
    pub missing: Vec<String>,
    /// There, but not signed.
    pub extra: Vec<String>,
    /// There, with other content than was signed.
    pub changed: Vec<String>,
}

impl Differences {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.changed.is_empty()
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [(&self.changed, "changed"), (&self.missing, "missing"), (&self.extra, "not signed")];
        let counts = counts.iter().filter(|(names, _)| !names.is_empty());
        let counts: Vec<_> = counts.map(|(names, what)| format!("{} {what}", names.len())).collect();
        write!(f, "the model is not what was signed: {}", counts.join(", "))
    }
}

impl std::error::Error for Differences {}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: &[(&str, &[u8])]) -> Manifest {
        let resource = |(name, content): &(&str, &[u8])| Resource {
            name: (*name).to_owned(),
            digest: Digest::of(content),
        };
        let resources = files.iter().map(resource).collect();
        Manifest { model_name: "m".into(), resources, serialization: Serialization::default() }
    }

    #[test]
    fn every_difference_is_listed() {
        let signed = manifest(&[("a", b"1"), ("b", b"2"), ("c", b"3")]);
        let actual = manifest(&[("a", b"1"), ("b", b"x"), ("d", b"4")]);
        let differences = signed.compare(&actual).expect_err("they differ");
        assert_eq!(differences.missing, ["c"]);
        assert_eq!(differences.extra, ["d"]);
        assert_eq!(differences.changed, ["b"]);
        assert_eq!(
            differences.to_string(),
            "the model is not what was signed: 1 changed, 1 missing, 1 not signed"
        );
        let reordered = manifest(&[("c", b"3"), ("a", b"1"), ("b", b"2")]);
        signed.compare(&reordered).expect("order does not matter");
    }

    #[test]
    fn the_root_digest_follows_the_listed_order() {
        let (a, b) = (manifest(&[("a", b"1"), ("b", b"2")]), manifest(&[("b", b"2"), ("a", b"1")]));
        assert_ne!(a.root_digest(), b.root_digest());
        // printf 1 | sha256sum and printf 2 | sha256sum, concatenated, through xxd -r -p | sha256sum.
        let one = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b";
        assert_eq!(manifest(&[("a", b"1")]).resources[0].digest.to_string(), one);
    }
}
