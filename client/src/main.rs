//! `omsign`: signs and verifies models.

mod cli;
mod commands;
mod hints;
mod report;

use std::process::ExitCode;

use clap::Parser as _;

use self::cli::{Cli, Command};

fn main() -> ExitCode {
    harden();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Sign(arguments) => commands::sign(&arguments),
        Command::Verify(arguments) => commands::verify(&arguments),
        Command::Digest(arguments) => commands::digest(&arguments),
        Command::Keys(arguments) => commands::keys(&arguments),
        Command::Inspect(arguments) => commands::inspect(&arguments),
        Command::Agent(arguments) => commands::agent(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(report::failure(&failure)),
    }
}

/// Passwords and PINs pass through this process: its memory stays out of core dumps.
fn harden() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}
