//! A disk of its own under an agent's audit log, which can be full.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::agent::{Agent, under};
use crate::world::{World, text};

/// Starts an agent whose audit log is on one.
pub fn start(world: &World, config: &str) -> anyhow::Result<Agent> {
    std::fs::create_dir(world.path("disk"))?;
    let config = config.replace("\"audit\"", "\"disk/audit\"");
    Agent::start_with(world, &config, |command| {
        let script =
            format!("mount -t tmpfs -o size=128m tmpfs {} && exec \"$0\" \"$@\"", text(&world.path("disk")));
        let own = ["--map-current-user", "--keep-caps", "--mount", "sh", "-ec", &script];
        *command = under("unshare", own, command);
    })
}

/// Where we see what is on it.
fn seen(world: &World, agent: &Agent, name: &str) -> PathBuf {
    let inside = world.path("disk").join(name);
    PathBuf::from(format!("/proc/{}/root{}", agent.pid(), inside.display()))
}

/// The audit log.
pub fn audit(world: &World, agent: &Agent) -> PathBuf {
    seen(world, agent, "audit/audit.jsonl")
}

/// What fills it.
pub struct Filler {
    file: File,
    path: PathBuf,
}

impl Filler {
    /// Fills it, but for what is left of the last page of each file.
    pub fn fill(world: &World, agent: &Agent) -> anyhow::Result<Self> {
        let path = seen(world, agent, "filler");
        let mut file = File::create(&path).context("the filler")?;
        let block = vec![0; 1 << 16];
        while file.write(&block).is_ok() {}
        Ok(Self { file, path })
    }

    /// Makes room.
    pub fn remove(self) -> anyhow::Result<()> {
        // Its space is free when nobody has it open.
        drop(self.file);
        std::fs::remove_file(self.path).context("the filler")
    }
}
