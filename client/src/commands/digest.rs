//! `omsign digest`.

use std::time::Instant;

use omsign::manifest::{BRIEF, Plan};
use omsign::manifest_file::{self, PartOf};
use omsign::selection::{bundle_here, check_outputs};

use super::hasher::Hashing;
use super::{Done, Failure, note_published};
use crate::cli;
use crate::report;

pub(crate) fn digest(arguments: &cli::Digest) -> Done {
    let cli::Digest { model, files, work, .. } = arguments;
    let begun = Instant::now();
    let signature = match &files.signature {
        Some(signature) => Some(signature.as_path()),
        None => bundle_here(),
    };
    let selection = files.selection(model, signature).map_err(Failure::Usage)?;
    note_published(&selection, work.quiet);
    let hashing = Hashing::start(work, model)?;
    let serialization = selection.serialization()?;
    let found = selection.walk(&serialization)?;
    let plan = Plan::new(&found, serialization.clone(), &hashing.hasher)?;
    check_outputs(&plan)?;
    let part = match arguments.part {
        Some(part) => {
            let (names, listing) = (plan.names(), plan.listing(&hashing.hasher)?);
            Some(PartOf { part, names, listing })
        }
        None => None,
    };
    let plan = if let Some(PartOf { part, .. }) = part { plan.part(part) } else { plan };
    let digests = plan.hash(&hashing.hasher)?;
    // A manifest may be signed where nobody can look at the model any more.
    if arguments.json || begun.elapsed() > BRIEF {
        plan.check_unchanged(&serialization.walk(model)?, &hashing.hasher)?;
    }
    hashing.end();
    report::unsigned_files(plan.unsigned_files());
    let manifest = plan.manifest(digests);
    if arguments.json {
        report::json(&manifest_file::document(&manifest, plan.bytes(), part))
    } else {
        report::result(format_args!("sha256:{}", manifest.root_digest()))
    }
}
