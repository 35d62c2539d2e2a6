//! Verifying, from a bundle file to an answer.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use omsign::hash::Hasher;
//! use omsign::key::PublicKey;
//! use omsign::trust::{Signers, Trust};
//! use omsign::verify::{Judge, Request, verify};
//!
//! # fn main() -> Result<(), omsign::Error> {
//! let trust = Trust::new(Signers::PublicKey(PublicKey::read(Path::new("release.pem"))?));
//! let request = Request::new(Path::new("my-model"), Path::new("model.sig"));
//! let verified = verify(&request, &Judge::Trust(trust), &Hasher::new(None, None)?)?;
//! println!("{} files, signed by the key {}", verified.files, verified.proof.key_hint);
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::Error;
use crate::bundle::{Bundle, LARGEST_BYTES};
use crate::differences::Differences;
use crate::hash::Hasher;
use crate::left_out::{AMBIGUOUS, bundle_inside, ignored, readings};
use crate::listing::beside;
use crate::manifest::{BRIEF, Manifest, Serialization};
use crate::model::{GIT_PATHS, Model, ModelError, Scope, at_or_below};
use crate::pairs::pair;
use crate::policy::Policy;
use crate::proof::Proof;
use crate::trust::{Trust, TrustError, VerifiedStatement};

/// Who decides whose signature counts.
pub enum Judge {
    /// These terms.
    Trust(Trust),
    /// A policy.
    Policy(Policy),
}

impl Judge {
    fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        match self {
            Self::Trust(trust) => trust.verify(bundle),
            Self::Policy(policy) => policy.verify(bundle),
        }
    }
}

/// What to verify. Nothing in it makes the check of a signed file weaker: it says which files are looked at.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The model: a directory or a file.
    pub model: &'a Path,
    /// Its bundle: left out where it lies inside the model.
    pub signature: &'a Path,
    /// Accepts files that were not signed (OMS v1.0, 8.5).
    pub ignore_unsigned_files: bool,
    /// Unsigned files and directories that are no part of the model. What was signed is looked at all the same.
    pub ignore_paths: &'a [PathBuf],
    /// Whether git's own files are left out, where they were not signed. `None`: if the signer did not say what is.
    pub ignore_git_paths: Option<bool>,
    /// Where it is not empty, only these files and directories are looked at.
    pub partial: &'a [PathBuf],
    /// What the signer has to call the model.
    pub model_name: Option<&'a str>,
    /// How long the bundle may be, in bytes.
    pub largest_bundle: u64,
    /// Is shown the bundle before it is judged.
    pub shown: fn(&Bundle),
}

impl<'a> Request<'a> {
    /// The whole of a model.
    pub fn new(model: &'a Path, signature: &'a Path) -> Self {
        Self {
            model,
            signature,
            ignore_unsigned_files: false,
            ignore_paths: &[],
            ignore_git_paths: None,
            partial: &[],
            model_name: None,
            largest_bundle: LARGEST_BYTES,
            shown: |_| {},
        }
    }

    /// Those of `ignore_paths` that left nothing out, and why: a typing mistake, or something that is not there this time.
    pub fn idle_ignore_paths(&self) -> impl Iterator<Item = ModelError> {
        self.ignore_paths.iter().filter_map(|path| ignored(self.model, path).err())
    }
}

/// What was verified.
#[derive(Debug)]
pub struct Verified {
    /// Who signed, and what else is proven.
    pub proof: Proof,
    /// What the signer calls the model.
    pub model_name: String,
    /// The signed root digest.
    pub root_digest: String,
    /// Files whose content is what was signed.
    pub files: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// Files that were signed and not looked at, because only some were asked for.
    pub not_looked_at: usize,
    /// Files that were not signed: ignored because the caller said so, or empty where files are sharded. Sorted.
    pub ignored: Vec<String>,
    /// What is there and was not looked at, the bundle aside: paths that the signer or the caller left out, sorted.
    pub left_out: Vec<String>,
    /// Whether only some files were asked for.
    pub partial: bool,
}

/// Why a verified statement is not about what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SubjectError {
    /// Another model.
    #[error("the signature is of a model called {found:?}, not {wanted:?} (OMS 6.5.1)")]
    ModelName {
        /// What was expected.
        wanted: String,
        /// The subject's name.
        found: String,
    },
    /// Nothing of this name.
    #[error("nothing at or below {0} was signed (OMS 5.2.1)")]
    NotSigned(PathBuf),
    /// It may be one of two.
    #[error("--partial {0}: {AMBIGUOUS}")]
    Ambiguous(PathBuf),
}

/// Verifies a model. `Ok` only if the signature, the signer and every file are right.
pub fn verify(request: &Request<'_>, judge: &Judge, hasher: &Hasher) -> Result<Verified, Error> {
    let begun = Instant::now();
    if let Judge::Policy(policy) = judge {
        policy.check_outside(request.model)?;
    }
    let judged = || -> Result<_, Error> {
        let bundle = Bundle::read(request.signature, request.largest_bundle)?;
        (request.shown)(&bundle);
        Ok(judge.verify(&bundle)?.into_parts())
    };
    // Neither needs the other: a long bundle takes as long as a model of many files. A part is listed by itself.
    let ((mut signed, proof), listing) = match request.partial {
        [] => beside(request.model, judged)?,
        _ => (judged()?, None),
    };
    if let Some(wanted) = request.model_name.filter(|wanted| *wanted != signed.model_name) {
        return Err(SubjectError::ModelName { wanted: wanted.to_owned(), found: signed.model_name }.into());
    }
    let (root_digest, all_files) = (signed.root_digest().to_string(), signed.files());
    let only = only(request, &signed)?;
    let partial = !only.is_empty();
    let scope = what_to_look_at(&signed, request, only);
    if partial {
        signed.resources.retain(|resource| scope.includes(&resource.file));
    }
    let found = Model::listed(request.model, &scope, listing)?;
    let single_file = !request.model.is_dir();
    let pairs = pair(&signed, &found, single_file, hasher);
    let differences = pairs.compare(hasher);
    found.root.check_in_place().map_err(Error::Hash)?;
    let mut ignored = accepted(differences, request, &signed)?;
    ignored.extend_from_slice(pairs.unlistable());
    let (files, bytes, mut left_out) = (pairs.files(), pairs.bytes(), found.left_out.clone());
    if begun.elapsed() > BRIEF {
        let mut again = Model::walk(request.model, &scope)?;
        left_out = std::mem::take(&mut again.left_out);
        if !pairs.are_all_of(&again, hasher) {
            let now = pair(&signed, &again, single_file, hasher);
            ignored = accepted(now.since(&pairs), request, &signed)?;
            ignored.extend_from_slice(now.unlistable());
        }
    }
    ignored.sort();
    let own = bundle_inside(request.model, request.signature);
    left_out.retain(|path| Some(path) != own.as_ref());
    let (model_name, not_looked_at) = (signed.model_name, all_files - files);
    Ok(Verified { proof, model_name, root_digest, files, bytes, not_looked_at, ignored, left_out, partial })
}

/// What is there, was not signed, and is accepted all the same. `Err` has the other differences, if there are any.
fn accepted(
    mut differences: Differences,
    request: &Request<'_>,
    signed: &Manifest,
) -> Result<Vec<String>, Error> {
    let mut ignored = Vec::new();
    if request.ignore_unsigned_files {
        ignored.append(&mut differences.extra);
        // Where a signed file should be, it is no unsigned one.
        let files = SignedFiles::of(signed);
        let odd = differences.odd.extract_if(.., |odd| !files.has_at_or_below(&odd.name));
        ignored.extend(odd.map(|odd| odd.name));
        let unreadable = differences.unreadable.extract_if(.., |at| !files.has_at_or_below(&at.name));
        ignored.extend(unreadable.map(|at| at.name));
    }
    if differences.is_empty() {
        return Ok(ignored);
    }
    differences.explain(request.model, &signed.model_name, signed.files());
    Err(Box::new(differences).into())
}

/// Whether a name below the root is the root itself.
fn is_root(name: impl AsRef<str>) -> bool {
    matches!(name.as_ref(), "" | ".")
}

/// Names of what alone is looked at, as the manifest has them. A path is taken as it is written, from the model's root
/// or from here: to follow a link on its way would be to look at another file than the one that is named.
fn only(request: &Request<'_>, signed: &Manifest) -> Result<BTreeSet<String>, SubjectError> {
    let files = SignedFiles::of(signed);
    let real_root = request.model.canonicalize().unwrap_or_default();
    let name = |path: &PathBuf| {
        let signed = |name: &String| is_root(name) || files.has_at_or_below(name);
        let mut there = readings(request.model, &real_root, path);
        // What is not signed may be what was meant, too.
        there.retain(|name| signed(name) || real_root.join(name).symlink_metadata().is_ok());
        match (there.pop(), there.pop()) {
            // The only file, and its own path.
            (Some(_), Some(name)) if request.model.is_file() => Ok(name),
            (Some(_), Some(_)) => Err(SubjectError::Ambiguous(path.clone())),
            (Some(name), None) if signed(&name) => Ok(name),
            _ => Err(SubjectError::NotSigned(path.clone())),
        }
    };
    let only: BTreeSet<_> = request.partial.iter().map(name).collect::<Result<_, _>>()?;
    // The root is all of it.
    if only.iter().any(is_root) { Ok(BTreeSet::new()) } else { Ok(only) }
}

/// The signed parameters bind, not the command line (OMS v1.0, 8.4). What was signed is looked at even below
/// a path that is ignored by default, or releases before 1.1 could not be verified.
fn what_to_look_at(signed: &Manifest, request: &Request<'_>, only: BTreeSet<String>) -> Scope {
    let Serialization { ignore_paths, allow_symlinks, .. } = &signed.serialization;
    let unsaid = ignore_paths.is_none();
    let mut ignore_paths = ignore_paths.clone().unwrap_or_default();
    if request.ignore_git_paths.unwrap_or(unsaid) {
        ignore_paths.extend(GIT_PATHS.map(str::to_owned));
    }
    // One that is not there hides nothing.
    ignore_paths.extend(request.ignore_paths.iter().filter_map(|path| ignored(request.model, path).ok()));
    let files = SignedFiles::of(signed);
    ignore_paths.retain(|path| !files.has_at_or_below(path));
    ignore_paths.extend(bundle_inside(request.model, request.signature));
    Scope { ignore_paths, allow_symlinks: *allow_symlinks, only }
}

/// Names of all that was signed, sorted.
struct SignedFiles<'a>(Vec<&'a str>);

impl<'a> SignedFiles<'a> {
    fn of(signed: &'a Manifest) -> Self {
        let mut files: Vec<&str> = signed.resources.iter().map(|resource| resource.file.as_str()).collect();
        // Quick where they are sorted, as most signers do.
        files.sort();
        Self(files)
    }

    fn has_at_or_below(&self, path: &str) -> bool {
        let Self(files) = self;
        let from = |start: &str| files.get(files.partition_point(|file| *file < start)..)?.first();
        from(path).is_some_and(|file| *file == path)
            || from(&format!("{path}/")).is_some_and(|file| at_or_below(file, path))
    }
}
