//! The reference implementation of OMS, in its current and its old releases, as `tests/setup` installed it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::ensure;

use crate::world::World;

/// What `tests/setup` prepared, which has to be there.
pub fn cache(name: &str) -> anyhow::Result<PathBuf> {
    // Not canonical: a venv's python is a link, and finds its packages by the link's own place.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(".test-cache").join(name);
    ensure!(path.exists(), "{name} is not installed; run ./tests/setup");
    Ok(path)
}

/// The model of 91 MB from PyPI.
pub fn real_model() -> anyhow::Result<PathBuf> {
    cache("model/all-MiniLM-L6-v2")
}

/// The reference, release 1.1.1.
pub fn reference_command(world: &World, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(cache("reference/bin/python")?);
    command.arg(script("reference_cli.py")).args(arguments).current_dir(world.path(""));
    Ok(command)
}

/// Runs the reference.
pub fn reference(world: &World, arguments: &[&str]) -> anyhow::Result<Output> {
    Ok(reference_command(world, arguments)?.output()?)
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(name)
}

/// Runs an old release. Up to 1.0.0 it exits 0 even when it failed, so its words are checked.
pub fn historical(world: &World, release: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(cache("historical/bin/python")?);
    command.arg(script("historical_cli.py")).args(arguments);
    command.env("PYTHONPATH", cache(&format!("historical/releases/{release}"))?).current_dir(world.path(""));
    Ok(command.output()?)
}

/// Checks that a peer says that it did it.
pub fn succeeded(what: &str, output: &Output) -> anyhow::Result<()> {
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && said.contains("succeeded"), "{what}: {said}");
    Ok(())
}
