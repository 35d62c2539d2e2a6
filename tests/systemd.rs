//! The systemd units: what they start is there, and what they forbid it does not need.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_tests::agent::{Agent, eventually, under};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key, key_section, token_section};

fn unit(name: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hsm-config/systemd").join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn systemd_analyze(arguments: &[&str], directory: &Path) -> anyhow::Result<String> {
    let said = Command::new("systemd-analyze").args(arguments).current_dir(directory).output()?;
    let errors = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success() && errors.is_empty(), "systemd-analyze {arguments:?}: {errors}");
    Ok(String::from_utf8(said.stdout)?)
}

#[test]
fn units_are_read_and_start_what_there_is() -> anyhow::Result<()> {
    let world = World::new()?;
    let (service, socket) = (unit("omsign-agent.service")?, unit("omsign-agent.socket")?);
    let installed = "/usr/bin/omsign-agent ";
    let here = format!("{} ", built("omsign-agent")?.display());
    world.write("omsign-agent.service", service.replace(installed, &here))?;
    world.write("omsign-agent.socket", &socket)?;
    let verify = ["verify", "--man=no", "--recursive-errors=no"];
    let both = ["./omsign-agent.service", "./omsign-agent.socket"];
    systemd_analyze(&[&verify[..], &both].concat(), &world.path(""))?;
    let starts: Vec<_> = service.lines().filter(|line| line.starts_with("Exec")).collect();
    ensure!(starts.len() == 2, "{starts:?}");
    for start in starts {
        let command = start.split_once(installed).context("another program")?.1;
        let [commands @ .., "--config", _] = &command.split_whitespace().collect::<Vec<_>>()[..] else {
            anyhow::bail!("{start}");
        };
        let help = Command::new(built("omsign-agent")?).args(commands).arg("--help").output()?;
        ensure!(help.status.success() && String::from_utf8(help.stdout)?.contains("--config"), "{start}");
    }
    // The socket's path is in a directory that would go with the service.
    ensure!(socket.contains("ListenStream=/run/omsign/"));
    ensure!(service.lines().any(|line| line == "RuntimeDirectoryPreserve=yes"));
    Ok(())
}

/// The system calls that a set of systemd's stands for.
fn calls_of(set: &str, calls: &mut BTreeSet<String>) -> anyhow::Result<()> {
    for line in systemd_analyze(&["syscall-filter", set], Path::new("/"))?.lines().skip(1) {
        match line.trim() {
            comment if comment.starts_with('#') => {}
            inner if inner.starts_with('@') => calls_of(inner, calls)?,
            call => drop(calls.insert(call.to_owned())),
        }
    }
    Ok(())
}

/// Tokens of all three kinds, opened, signed with, listed and closed.
#[test]
fn the_system_calls_that_it_needs_are_allowed() -> anyhow::Result<()> {
    let service = unit("omsign-agent.service")?;
    let filters: Vec<_> = service.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")).collect();
    ensure!(filters.len() == 1, "{filters:?}");
    let mut allowed = BTreeSet::new();
    for set in filters[0].split_whitespace() {
        calls_of(set, &mut allowed)?;
    }
    let world = World::new()?;
    let (token, chip) = (world.token("hsm", "k", KeyType::P256)?, SwTpm::create(&world.path("chip"))?);
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9a", "ECCP256", &[])?;
    let file = format!("{{ file = \"{}\" }}", token.pin_file().display());
    let printed = format!("{{ command = [\"cat\", \"{}\"] }}", token.pin_file().display());
    let section = token_section("hsm", &token, "").replace(&file, &printed);
    ensure!(section.contains("cat"), "{section}");
    let tokens = section + &chip.section("tpm") + &card.section("card");
    let keys = key_section("hsm", "hsm", "k")
        + &key("tpm", "tpm", "handle = \"0x81000010\"")
        + &key("card", "card", "slot = \"9a\"");
    let strace = ["--follow-forks", "--quiet=all", "--output=trace"];
    let watched = |command: &mut Command| {
        *command = under("strace", strace, command.current_dir(world.path("")));
    };
    let agent = Agent::start_with(&world, &(world.listen() + &tokens + &keys), watched)?;
    world.model()?;
    for key in ["hsm", "tpm", "card"] {
        world.omsign_ok(&["sign", "model", "--key", key])?;
    }
    does(&world, &["list"])?;
    does(&world, &["reload"])?;
    // We started strace, and it the agent.
    let traced = agent.hosts()?;
    ensure!(traced.len() == 1, "{traced:?}");
    omsign_tests::agent::signal(traced[0], rustix::process::Signal::TERM)?;
    eventually("its end", || Ok(agent.log()?.contains("stopping: no new requests")))?;
    agent.wait()?;
    let trace = std::fs::read_to_string(world.path("trace"))?;
    let call = |line: &str| {
        let line = line.split_once(' ')?.1.trim_start();
        let name = line.strip_prefix("<... ").unwrap_or(line);
        let name = name.split(|end: char| !end.is_ascii_alphanumeric() && end != '_').next()?;
        Some(name.to_owned()).filter(|name| !name.is_empty())
    };
    let needed: BTreeSet<String> = trace.lines().filter_map(call).collect();
    ensure!(needed.len() > 50 && needed.contains("fdatasync"), "{needed:?}");
    let forbidden: Vec<_> = needed.difference(&allowed).collect();
    ensure!(forbidden.is_empty(), "{forbidden:?}");
    Ok(())
}
