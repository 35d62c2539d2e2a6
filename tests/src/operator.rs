//! What operators type: `omsign-agent key …`, and answers to what they are asked.

use std::io::{ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;

use crate::world::World;

/// Runs `omsign-agent key …` with the world's configuration, and these lines to answer with.
pub fn answering(world: &World, arguments: &[&str], answers: &str) -> anyhow::Result<Output> {
    let mut command = Command::new(built("omsign-agent")?);
    command.arg("key").args(arguments).arg("--config").arg(world.path("agent.toml"));
    world.without_surprises(command.current_dir(world.path("")));
    typing(&mut command, answers)
}

/// Runs a command with these lines to read. It may end without reading them.
pub fn typing(command: &mut Command, answers: &str) -> anyhow::Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Its end of file comes before we wait.
    let typed = child.stdin.take().context("stdin")?.write_all(answers.as_bytes());
    match typed {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(child.wait_with_output()?),
    }
}

/// The same without answers.
pub fn key(world: &World, arguments: &[&str]) -> anyhow::Result<Output> {
    answering(world, arguments, "")
}

/// Runs `omsign-agent unblock` for a token, and types these lines.
pub fn unblocking(world: &World, token: &str, answers: &str) -> anyhow::Result<Output> {
    let mut command = Command::new(built("omsign-agent")?);
    command.args(["unblock", token, "--config"]).arg(world.path("agent.toml"));
    world.without_surprises(command.current_dir(world.path("")));
    typing(&mut command, answers)
}

/// It does it; returns what it printed.
pub fn does(world: &World, arguments: &[&str]) -> anyhow::Result<String> {
    let output = key(world, arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// It refuses with these words, and prints nothing.
pub fn refuses(world: &World, arguments: &[&str], expected: &str) -> anyhow::Result<()> {
    let output = key(world, arguments)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    ensure!(errors.contains(expected) && !errors.contains("panicked"), "{arguments:?}: {errors}");
    Ok(())
}

/// The token says of a private key that it was made there, and never leaves it.
pub fn never_leaves(world: &World, key: &str) -> anyhow::Result<()> {
    let attested: serde_json::Value = serde_json::from_str(&does(world, &["attest", key])?)?;
    let attested = attested.to_string();
    for (attribute, value) in [
        ("CKA_LOCAL", true),
        ("CKA_SENSITIVE", true),
        ("CKA_ALWAYS_SENSITIVE", true),
        ("CKA_EXTRACTABLE", false),
        ("CKA_NEVER_EXTRACTABLE", true),
    ] {
        ensure!(attested.contains(&format!(r#"["{attribute}","{value}"]"#)), "{attribute}: {attested}");
    }
    Ok(())
}

/// `key verify-attestation` of a file: its exit status and what it said.
pub fn verified(world: &World, file: &str, more: &[&str]) -> anyhow::Result<(Option<i32>, String)> {
    let mut command = Command::new(built("omsign-agent")?);
    command.args(["key", "verify-attestation", file]).args(more);
    world.without_surprises(command.current_dir(world.path("")));
    let output = command.output()?;
    Ok((output.status.code(), String::from_utf8([output.stdout, output.stderr].concat())?))
}
