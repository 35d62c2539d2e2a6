//! `omsign digest`.

use omsign::manifest::Plan;
use omsign::manifest_file::{self, PartOf};

use super::hasher::Hashing;
use super::{Done, Failure};
use crate::cli;
use crate::report;

pub(crate) fn digest(arguments: &cli::Digest) -> Done {
    let cli::Digest { model, files, work, .. } = arguments;
    let selection = files.selection(model).map_err(Failure::Usage)?;
    let hashing = Hashing::start(work, model)?;
    let serialization = selection.serialization()?;
    let model = serialization.walk(model)?;
    let plan = Plan::new(&model, serialization, &hashing.hasher)?;
    let part = match arguments.part {
        Some(part) => {
            let (resources, listing) = (plan.resources(), plan.listing(&hashing.hasher)?);
            Some(PartOf { part, resources, listing })
        }
        None => None,
    };
    let plan = if let Some(PartOf { part, .. }) = part { plan.part(part) } else { plan };
    let (manifest, bytes) = plan.hash(&hashing.hasher)?;
    hashing.end();
    if arguments.json {
        report::json(&manifest_file::to_json(&manifest, bytes, part))
    } else {
        report::result(format_args!("sha256:{}", manifest.root_digest()))
    }
}
