//! Verifying, from a bundle file to an answer.

use std::path::Path;

use crate::Error;
use crate::bundle::Bundle;
use crate::manifest::{Manifest, Serialization};
use crate::model::{GIT_PATHS, bundle_inside};
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
    /// Files that were not signed, and were ignored because the caller said so.
    pub ignored: Vec<String>,
}

/// Verifies a model against a bundle. `Ok` only if the signature, the signer and every file are right.
pub fn verify(
    model: &Path,
    signature: &Path,
    trust: &Trust,
    ignore_unsigned_files: bool,
) -> Result<Verified, Error> {
    let bundle = Bundle::read(signature)?;
    let verified = trust.verify(&bundle)?;
    let mut signed = verified.manifest;
    let serialization = what_to_look_at(&signed, model, signature);
    let (actual, bytes) = Manifest::of_model(model, serialization)?;
    if let ([only], [file]) = (signed.resources.as_mut_slice(), actual.resources.as_slice())
        && only.name == "."
        && !model.is_dir()
    {
        // The reference's name for the only file of a single-file model.
        only.name.clone_from(&file.name);
    }
    let mut ignored = Vec::new();
    if let Err(mut differences) = signed.compare(&actual) {
        if ignore_unsigned_files {
            ignored = std::mem::take(&mut differences.extra);
        }
        if !differences.is_empty() {
            return Err(differences.into());
        }
    }
    let root_digest = signed.root_digest().to_string();
    Ok(Verified { signer: verified.signer, files: signed.resources.len(), bytes, root_digest, ignored })
}

/// The signed parameters bind, not the command line (OMS v1.0, 8.4). What was signed is looked at even below
/// a path that is ignored by default, or releases before 1.1 could not be verified.
fn what_to_look_at(signed: &Manifest, model: &Path, signature: &Path) -> Serialization {
    let mut ignore_paths = signed.serialization.ignore_paths.clone();
    ignore_paths.extend(GIT_PATHS.map(str::to_owned));
    ignore_paths.retain(|path| {
        let below = |name: &str| {
            name.strip_prefix(path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        !signed.resources.iter().any(|resource| below(&resource.name))
    });
    ignore_paths.extend(bundle_inside(model, signature));
    Serialization { allow_symlinks: signed.serialization.allow_symlinks, ignore_paths }
}
