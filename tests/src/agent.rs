//! A running `omsign-agent`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use omsign_fixtures::built;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::World;

/// Longest wait for anything that should happen at once. A test that needs it all has failed.
pub const SOON: Duration = Duration::from_secs(20);

/// A running agent. Killed when dropped.
pub struct Agent {
    child: Child,
    log: PathBuf,
    /// From start to READY=1.
    pub started_in: Duration,
}

impl Agent {
    /// Starts an agent with this configuration and waits until it says that it is ready.
    pub fn start(world: &World, config: &str) -> anyhow::Result<Self> {
        Self::start_with(world, config, |_| {})
    }

    /// The same, with changes to its command.
    pub fn start_with(
        world: &World,
        config: &str,
        change: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Self> {
        let config = world.write("agent.toml", config)?;
        let log = world.path("agent.log");
        // The agent tells systemd when it is ready; here we are systemd.
        let notify = world.path("notify.sock");
        let _ = std::fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify)?;
        ready.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut command = Command::new(built("omsign-agent")?);
        command.arg("serve").arg("--config").arg(config);
        world.without_surprises(&mut command);
        command.env("NOTIFY_SOCKET", &notify);
        change(&mut command);
        command.stderr(File::create(&log)?);
        let started = Instant::now();
        let child = command.spawn().context("omsign-agent")?;
        let mut agent = Self { child, log, started_in: Duration::ZERO };
        let mut message = [0; 64];
        loop {
            match ready.recv(&mut message) {
                Ok(length)
                    if message.get(..length) == Some(b"READY=1\n") || message.starts_with(b"READY=1") =>
                {
                    break;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = agent.child.try_wait()? {
                bail!("the agent ended with {status}: {}", agent.log()?);
            }
            ensure!(started.elapsed() < SOON, "the agent is not ready: {}", agent.log()?);
        }
        agent.started_in = started.elapsed();
        Ok(agent)
    }

    /// What it logged so far.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    /// Where it listens with mutual TLS: a URL, with the port that the system chose.
    pub fn tls_url(&self) -> anyhow::Result<String> {
        let log = self.log()?;
        let line = log.lines().find(|line| line.contains("listening with mutual TLS")).context("the line")?;
        let line: serde_json::Value = serde_json::from_str(line)?;
        Ok(format!("https://{}", line["address"].as_str().context("its address")?))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes of its tokens.
    pub fn hosts(&self) -> anyhow::Result<Vec<u32>> {
        children(self.pid())
    }

    /// The process of this token, if it has one.
    pub fn host_of(&self, token: &str) -> anyhow::Result<Option<u32>> {
        let name = format!("omsign-agent: token {token}\0");
        let is_its = |host: &u32| {
            std::fs::read_to_string(format!("/proc/{host}/cmdline")).is_ok_and(|line| line.starts_with(&name))
        };
        Ok(self.hosts()?.into_iter().find(is_its))
    }

    /// Kills the processes of its tokens, of which there has to be one.
    pub fn kill_hosts(&self) -> anyhow::Result<()> {
        let hosts = self.hosts()?;
        ensure!(!hosts.is_empty(), "no token has a process");
        self.kill(&hosts)
    }

    /// Kills processes of its tokens.
    pub fn kill(&self, hosts: &[u32]) -> anyhow::Result<()> {
        hosts.iter().try_for_each(|host| signal(*host, Signal::KILL))?;
        // It takes note of their end after it has told the tokens' callers.
        eventually("their end", || Ok(!self.hosts()?.iter().any(|host| hosts.contains(host))))
    }

    /// Stops it and waits for its end.
    pub fn stop(self) -> anyhow::Result<ExitStatus> {
        signal(self.pid(), Signal::TERM)?;
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Descriptors and threads that it and its tokens hold, but for the four at most that do what blocks, and end when there
    /// is none of that for ten seconds.
    pub fn held(&self) -> anyhow::Result<(usize, usize)> {
        let mut sum = (0, 0);
        for process in [vec![self.pid()], self.hosts()?].concat() {
            sum.0 += std::fs::read_dir(format!("/proc/{process}/fd"))?.count();
            for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
                // One that ends just now has no name any more.
                let name = std::fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
                sum.1 += usize::from(!name.is_empty() && !name.starts_with("tokio"));
            }
        }
        Ok(sum)
    }

    /// CPU seconds that it and its tokens have used.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let mut total = cpu_seconds(self.pid())?;
        for host in self.hosts()? {
            total += cpu_seconds(host)?;
        }
        Ok(total)
    }

    /// Memory in bytes that only it and its tokens use (proportional set size).
    pub fn memory_bytes(&self) -> anyhow::Result<u64> {
        let mut total = memory_bytes(self.pid())?;
        for host in self.hosts()? {
            total += memory_bytes(host)?;
        }
        Ok(total)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts an agent that must not come up; returns its exit status and what it printed.
pub fn refused(world: &World, config: &str) -> anyhow::Result<(Option<i32>, String)> {
    let config = world.write("agent.toml", config)?;
    let mut command = Command::new(built("omsign-agent")?);
    command.arg("serve").arg("--config").arg(config).stderr(Stdio::piped());
    world.without_surprises(&mut command);
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut errors = String::new();
    child.stderr.take().context("stderr")?.read_to_string(&mut errors)?;
    Ok((child.wait()?.code(), errors))
}

/// The same command, started by another that then becomes it, such as `setsid`.
pub fn under(
    program: &str,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    command: &Command,
) -> Command {
    let mut whole = Command::new(program);
    whole.args(arguments).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        whole.current_dir(directory);
    }
    whole
}

/// Sends a signal.
pub fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("a process id")?;
    kill_process(pid, signal).context("kill")
}

/// Stops a process, all of it: its threads stop one by one, when each is next scheduled.
pub fn freeze(pid: u32) -> anyhow::Result<()> {
    signal(pid, Signal::STOP)?;
    eventually("a standstill", || {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // One that ends just now is read no more.
            let Ok(stat) = std::fs::read_to_string(thread?.path().join("stat")) else { continue };
            // The state follows the name in parentheses (proc_pid_stat(5)). One that has ended moves no more, and nobody
            // takes note of that while its parent stands still.
            if !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 'Z', 'X'])) {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    // Its first thread starts them. Others come and go.
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let mut found: Vec<_> = text.split_whitespace().filter_map(|word| word.parse::<u32>().ok()).collect();
    found.sort_unstable();
    Ok(found)
}

fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // utime and stime are fields 14 and 15; the name in field 2 may contain spaces but ends with ')'.
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).context("stat");
    let per_second = 100.0; // USER_HZ is 100 on every Linux that Debian runs on
    Ok((ticks(11)? + ticks(12)?) / per_second)
}

fn memory_bytes(pid: u32) -> anyhow::Result<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// Waits until something holds. Polls the outside world: only for what no event tells.
pub fn eventually(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let started = Instant::now();
    while !holds()? {
        ensure!(started.elapsed() < SOON, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
