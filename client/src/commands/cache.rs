//! `omsign cache`.

use omsign::hash::cache::{clear, directory};

use super::Done;
use crate::cli;
use crate::report;

pub(crate) fn cache(arguments: &cli::Cache) -> Done {
    match arguments.command {
        cli::CacheCommand::Clear => {
            let models = clear(&directory()?)?;
            report::result(format_args!("forgot the digests of {}", report::count(models, "model")))
        }
    }
}
