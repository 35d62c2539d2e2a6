//! What hashes for `sign`, `verify` and `digest`, and how far it is.

use std::path::Path;

use omsign::Error;
use omsign::hash::Hasher;
use omsign::hash::cache::{Cache, directory};

use crate::cli::Work;
use crate::progress::Shown;
use crate::report;

/// A hasher, and its progress, which is shown as long as this lives.
pub(crate) struct Hashing {
    pub(crate) hasher: Hasher,
    shown: Shown,
    quiet: bool,
}

impl Hashing {
    pub(crate) fn start(work: &Work, model: &Path) -> Result<Self, Error> {
        let mut hasher = Hasher::new(work.jobs, work.hash_kernel.as_deref().filter(|name| !name.is_empty()))?;
        // A model that is not there is better said by those who look for its files.
        if work.digest_cache && model.exists() {
            hasher = hasher.with_cache(Cache::open(&directory()?, model)?);
        }
        let shown = Shown::start(hasher.progress(), work.progress, work.quiet);
        Ok(Self { hasher, shown, quiet: work.quiet })
    }

    /// Ends it. Says what was not read because a cache knew it; returns how many digests that were.
    pub(crate) fn end(self) -> usize {
        drop(self.shown);
        let Some(used) = self.hasher.into_cache_use() else { return 0 };
        if let Some(problem) = used.problem {
            report::warning(&format!("digests are not remembered: {}", omsign::with_causes(&problem)));
        }
        if used.young > 0 && !self.quiet {
            let digests = report::count(used.young, "digest");
            report::say(format_args!(
                "note: not remembered: {digests} of files that changed less than two seconds ago, or will by their times"
            ));
        }
        if used.digests > 0 && !self.quiet {
            let (digests, size) = (report::count(used.digests, "digest"), report::size(used.bytes));
            report::say(format_args!(
                "note: {digests} ({size}) came from the digest cache; these files were not read"
            ));
        }
        used.digests
    }
}
