//! tpm2-abrmd, the TPM's resource manager in user space.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::swtpm::{START, SwTpm};

/// One before a TPM, with a message bus of its own.
pub struct Abrmd {
    bus: Child,
    manager: Child,
    address: String,
}

impl Abrmd {
    /// Starts both.
    pub fn create(directory: &Path, tpm: &SwTpm) -> anyhow::Result<Self> {
        let address = format!("unix:path={}", directory.join("bus.sock").display());
        let quiet = |name: &str| {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", name]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let mut bus = quiet("dbus-daemon");
        let bus = bus.args(["--session", "--nofork", "--nopidfile", "--address", &address]).spawn();
        let bus = bus.context("dbus-daemon (apt: dbus-daemon)")?;
        let mut manager = quiet("tpm2-abrmd");
        manager.args(["--session", "--tcti", &tpm.tcti()]).env("DBUS_SESSION_BUS_ADDRESS", &address);
        if rustix::process::geteuid().is_root() {
            manager.arg("--allow-root");
        }
        let started = Instant::now();
        while !directory.join("bus.sock").exists() {
            ensure!(started.elapsed() < START, "dbus-daemon does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        let manager = manager.spawn().context("tpm2-abrmd (apt: tpm2-abrmd, libtss2-tcti-tabrmd0)")?;
        let started = Self { bus, manager, address };
        started.await_ready()?;
        Ok(started)
    }

    /// The environment of whoever uses it.
    pub fn environment(&self) -> (&'static str, &str) {
        ("DBUS_SESSION_BUS_ADDRESS", &self.address)
    }

    /// How it is reached, in tpm2-tss's words.
    pub fn tcti(&self) -> &'static str {
        "tabrmd:bus_type=session"
    }

    fn await_ready(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            let (name, value) = self.environment();
            let mut tool = Command::new("tpm2_getrandom");
            let asked = tool.arg("1").env(name, value).env("TPM2TOOLS_TCTI", self.tcti()).output()?;
            if asked.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&asked.stderr);
            ensure!(started.elapsed() < START, "tpm2-abrmd does not start: {said}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Abrmd {
    fn drop(&mut self) {
        for process in [&mut self.manager, &mut self.bus] {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
