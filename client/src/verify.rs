//! Verifying, from a bundle file to an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use crate::Error;
use crate::bundle::Bundle;
use crate::hash::{Hasher, Piece};
use crate::manifest::{Manifest, Method, Resource, Serialization};
use crate::model::{GIT_PATHS, Model, Scope, bundle_inside};
use crate::trust::{Signer, Trust};

/// What was verified.
#[derive(Debug)]
pub struct Verified {
    /// Who signed.
    pub signer: Signer,
    /// Files whose content is what was signed.
    pub files: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// The signed root digest.
    pub root_digest: String,
    /// Files that were not signed: ignored because the caller said so, or empty where files are sharded.
    pub ignored: Vec<String>,
}

/// Verifies a model against a bundle. `Ok` only if the signature, the signer and every file are right.
pub fn verify(
    model: &Path,
    signature: &Path,
    trust: &Trust,
    ignore_unsigned_files: bool,
    hasher: &Hasher,
) -> Result<Verified, Error> {
    let bundle = Bundle::read(signature)?;
    let verified = trust.verify(&bundle)?;
    let signed = verified.manifest;
    let scope = what_to_look_at(&signed, model, signature);
    let found = Model::walk(model, &scope)?;
    let (mut differences, mut ignored, bytes) = differences(&signed, &found, !model.is_dir(), hasher)?;
    if ignore_unsigned_files {
        ignored.append(&mut differences.extra);
    }
    if !differences.is_empty() {
        return Err(differences.into());
    }
    let root_digest = signed.root_digest().to_string();
    Ok(Verified { signer: verified.signer, files: signed.files(), bytes, root_digest, ignored })
}

/// The signed parameters bind, not the command line (OMS v1.0, 8.4). What was signed is looked at even below
/// a path that is ignored by default, or releases before 1.1 could not be verified.
fn what_to_look_at(signed: &Manifest, model: &Path, signature: &Path) -> Scope {
    let Serialization { ignore_paths, allow_symlinks, .. } = &signed.serialization;
    let mut ignore_paths = ignore_paths.clone();
    ignore_paths.extend(GIT_PATHS.map(str::to_owned));
    ignore_paths.retain(|path| {
        let below = |name: &str| {
            name.strip_prefix(path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        !signed.resources.iter().any(|resource| below(&resource.file))
    });
    ignore_paths.extend(bundle_inside(model, signature));
    Scope { ignore_paths, allow_symlinks: *allow_symlinks }
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

/// Compares what was signed with what was found. Only what was signed is read. Also returns the empty files that
/// no signature in shards can list (OMS v1.0, 6.3.2), and the size in bytes of what was signed.
fn differences(
    signed: &Manifest,
    found: &Model,
    single_file: bool,
    hasher: &Hasher,
) -> Result<(Differences, Vec<String>, u64), Error> {
    let mut by_file: BTreeMap<&str, Vec<&Resource>> = BTreeMap::new();
    for resource in &signed.resources {
        // The reference's name for the only file of a single-file model.
        let name = match found.files.as_slice() {
            [only] if single_file && resource.file == "." => &only.name,
            _ => &resource.file,
        };
        by_file.entry(name).or_default().push(resource);
    }
    let files = hasher.look(found.paths())?;
    let (mut differences, mut empty) = (Differences::default(), Vec::new());
    let (mut pieces, mut expected, mut changed) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (index, (file, size)) in found.files.iter().zip(files.sizes()).enumerate() {
        let Some(resources) = by_file.remove(file.name.as_str()) else {
            let unlistable = signed.serialization.method != Method::Files && size == 0;
            if unlistable { &mut empty } else { &mut differences.extra }.push(file.name.clone());
            continue;
        };
        let signed_size = resources.iter().filter_map(|resource| Some(resource.shard.as_ref()?.end)).max();
        if signed_size.is_some_and(|signed| signed != size) {
            changed.insert(file.name.as_str());
            continue;
        }
        for resource in resources {
            pieces.push(Piece { file: index, range: resource.shard.clone().unwrap_or(0..size) });
            expected.push((file.name.as_str(), resource.digest));
        }
    }
    differences.missing = by_file.into_keys().map(str::to_owned).collect();
    let digests = hasher.digests(signed.serialization.algorithm, &files, &pieces)?;
    let wrong = expected.iter().zip(digests).filter(|((_, expected), digest)| expected != digest);
    changed.extend(wrong.map(|((name, _), _)| *name));
    differences.changed = changed.into_iter().map(str::to_owned).collect();
    let bytes = Piece::total(&pieces);
    Ok((differences, empty, bytes))
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
    use crate::manifest::Plan;

    #[test]
    fn every_difference_is_listed() {
        let hasher = Hasher::new(None, None).expect("a hasher");
        let two = Method::Shards(2.try_into().expect("not zero"));
        for (method, size) in [(Method::Files, 5), (two, 5), (two, 6)] {
            let root = tempfile::tempdir().expect("a directory");
            let write = |name: &str, content: &[u8]| {
                std::fs::write(root.path().join(name), content).expect("written")
            };
            ["a", "b", "c"].iter().for_each(|name| write(name, b"12345"));
            let serialization = Serialization { method, ..Serialization::default() };
            let model = serialization.walk(root.path()).expect("a model");
            let plan = Plan::new(&model, serialization, &hasher).expect("planned");
            let (mut signed, _) = plan.hash(&hasher).expect("hashed");
            // In whatever order it is listed.
            signed.resources.reverse();
            let compare = || {
                let found = Model::walk(root.path(), &Scope::default()).expect("a model");
                differences(&signed, &found, false, &hasher).expect("compared")
            };
            assert_eq!(compare(), (Differences::default(), Vec::new(), 15));
            write("b", &b"123x567"[..size]);
            write("d", b"");
            write("e", b"more");
            std::fs::remove_file(root.path().join("c")).expect("removed");
            let (found, empty, _) = compare();
            assert_eq!(empty.len(), usize::from(method != Method::Files));
            let extra: &[&str] = if method == Method::Files { &["d", "e"] } else { &["e"] };
            assert_eq!(
                (found.missing.as_slice(), found.changed.as_slice()),
                (&["c".to_owned()][..], &["b".to_owned()][..])
            );
            assert_eq!(found.extra, extra);
            let text =
                format!("the model is not what was signed: 1 changed, 1 missing, {} not signed", extra.len());
            assert_eq!(found.to_string(), text);
        }
    }
}
