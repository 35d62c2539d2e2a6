//! `omsign`: signs and verifies models.

mod cli;
mod commands;
mod hints;
mod progress;
mod report;

use std::process::ExitCode;

use clap::Parser as _;

use self::cli::{Cli, Command};

fn main() -> ExitCode {
    keep_large_blocks();
    harden();
    may_open_many_files();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Sign(arguments) => commands::sign(&arguments),
        Command::Verify(arguments) => commands::verify(*arguments),
        Command::Trust(arguments) => commands::trust(arguments),
        Command::Digest(arguments) => commands::digest(&arguments),
        Command::Keys(arguments) => commands::keys(&arguments),
        Command::Inspect(arguments) => commands::inspect(&arguments),
        Command::Agent(arguments) => commands::agent(&arguments),
        Command::Cache(arguments) => commands::cache(&arguments),
        Command::Completions { shell } => commands::completions(shell),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(report::failure(&failure)),
    }
}

/// glibc takes large blocks from the system and gives them back at once, until one of that size was freed (mallopt(3),
/// M_MMAP_THRESHOLD). Fresh pages are dear: they were a third of what a bundle of 20,000 files costs beyond hashing. But what
/// is kept is in pieces: with 24 MiB, 100,000 files took 15 MB more, and no less time. This block is never touched, so that it
/// costs nothing itself.
fn keep_large_blocks() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(4 << 20)));
}

/// Passwords and PINs pass through this process: its memory stays out of core dumps.
fn harden() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Each core reads as many files at once as its vectors have lanes: with 64 cores that is more than the 1024
/// descriptors that a shell gives.
fn may_open_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const ENOUGH: u64 = 4096;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < ENOUGH) {
        let current = Some(maximum.unwrap_or(ENOUGH).min(ENOUGH));
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
    }
}
