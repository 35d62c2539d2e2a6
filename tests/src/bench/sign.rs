//! Signatures per second through the daemon, beside the raw token.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::softhsm::{KeyType, SoftHsm};

use super::{Limit, Row};
use crate::agent::Agent;
use crate::client::{Client, connect, request, sign};
use crate::world::{World, key_section, token_section};

/// One load, as it was seen by its clients.
pub(super) struct Load {
    pub(super) per_second: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us: f64,
}

/// Runs all rows; each measurement takes `duration`, `rounds` times, and the median round counts.
pub fn run(duration: Duration, rounds: usize) -> anyhow::Result<Vec<Row>> {
    let world = World::new()?;
    let token = world.token("bench", "bench", KeyType::P256)?;
    let (stolen, mut rows) = (Stolen::now()?, Vec::new());
    for durability in ["os", "fsync"] {
        let config = format!("{}durability = \"{durability}\"\n", world.listen());
        let config = config + &token_section("bench", &token, "") + &key_section("bench", "bench", "bench");
        let agent = Agent::start(&world, &config)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        if durability == "os" {
            // Two programs that open a token of SoftHSM at the same moment may find none.
            runtime.block_on(load(&world, &agent, ("bench", 32), 1, Duration::from_millis(100)))?;
            rows.extend(start_up(&world, &config, &token)?);
        }
        for clients in [1, 8, 64] {
            let mut seen = Vec::new();
            for _ in 0..rounds {
                let (raw, raw_p50) = raw(&token, duration)?;
                let load = runtime.block_on(load(&world, &agent, ("bench", 32), clients, duration))?;
                seen.push((load.per_second / raw, load, raw, raw_p50));
            }
            seen.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (ratio, load, raw, raw_p50) = seen.swap_remove(seen.len() / 2);
            let what = |figure: &str| format!("{figure}, {clients} clients, audit {durability}");
            rows.push(Row::plain(what("signatures"), load.per_second, "/s"));
            rows.push(Row::plain(what("raw token beside it, 1 thread"), raw, "/s"));
            let limit = (clients == 64).then_some(Limit::AtLeast(0.6));
            rows.push(Row { limit, ..Row::plain(what("signatures ÷ raw token"), ratio, "") });
            rows.push(Row::plain(what("p50"), load.p50_us, "µs"));
            rows.push(Row::plain(what("p99"), load.p99_us, "µs"));
            if clients == 1 && durability == "os" {
                let added = load.p50_us - raw_p50;
                rows.push(Row::limited(
                    what("p50 added to the raw token's"),
                    added,
                    "µs",
                    Limit::AtMost(100.0),
                ));
                // Client to agent to host and back are four wake-ups; below them nothing can go.
                let floor = 2.0 * round_trip_us()?;
                rows.push(Row::plain(
                    "of that, two bare socketpair round trips on this machine",
                    floor,
                    "µs",
                ));
            }
            let limit = Limit::AtMost(100.0);
            rows.push(Row::limited(what("CPU per signature, agent and host"), load.cpu_us, "µs", limit));
            rows.push(Row::plain(what("the same ÷ the raw token's"), load.cpu_us * raw / 1e6, ""));
        }
        let memory = agent.memory_bytes()? as f64 / 1e6;
        rows.push(Row::plain(format!("memory after the load, audit {durability}"), memory, "MB"));
    }
    rows.push(Row::plain(
        "CPU time that this machine's host gave to others meanwhile",
        stolen.percent()?,
        "%",
    ));
    Ok(rows)
}

/// The median of a byte's way to another thread and back over a socketpair, in microseconds.
fn round_trip_us() -> anyhow::Result<f64> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while theirs.read_exact(&mut byte).and_then(|()| theirs.write_all(&byte)).is_ok() {}
    });
    let (mut times, mut byte) = (Vec::new(), [0]);
    for _ in 0..5000 {
        let one = Instant::now();
        ours.write_all(&byte)?;
        ours.read_exact(&mut byte)?;
        times.push(one.elapsed());
    }
    drop(ours);
    let _ = echo.join();
    times.sort_unstable();
    Ok(times.get(times.len() / 2).context("a median")?.as_secs_f64() * 1e6)
}

/// Clock ticks from /proc/stat: all, and those that a hypervisor gave to others.
pub(super) struct Stolen {
    all: u64,
    stolen: u64,
}

impl Stolen {
    pub(super) fn now() -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let line = stat.lines().next().context("/proc/stat")?;
        let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        Ok(Self { all: ticks.iter().take(8).sum(), stolen: *ticks.get(7).context("/proc/stat")? })
    }

    pub(super) fn percent(&self) -> anyhow::Result<f64> {
        let now = Self::now()?;
        Ok((now.stolen - self.stolen) as f64 * 100.0 / (now.all - self.all).max(1) as f64)
    }
}

/// Time from start to the first signature, and memory when idle.
fn start_up(world: &World, config: &str, token: &SoftHsm) -> anyhow::Result<Vec<Row>> {
    let other = World::new()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    ensure!(token.directory.starts_with(world.path("")), "the token outlives this agent");
    let started = Instant::now();
    let agent = Agent::start(&other, config)?;
    let mut client = runtime.block_on(connect(other.path("agent.sock")))?;
    runtime.block_on(sign(&mut client, request("bench", 1, &[7; 32]), Duration::from_secs(10)))?;
    let first = started.elapsed().as_secs_f64() * 1e3;
    let memory = agent.memory_bytes()? as f64 / 1e6;
    Ok(vec![
        Row::limited("start to first signature", first, "ms", Limit::AtMost(150.0)),
        Row::limited("memory of agent and idle host (PSS)", memory, "MB", Limit::AtMost(30.0)),
    ])
}

/// The token without us, in a process of its own.
fn raw(token: &SoftHsm, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let mut command = Command::new(built("omsign-fixtures")?);
    command.args(["raw-speed", &duration.as_millis().to_string(), "softhsm", &token.label, "bench"]);
    raw_speed(command.env("SOFTHSM2_CONF", token.config()))
}

/// What `omsign-fixtures raw-speed` says: signatures per second, and their median in microseconds.
pub(super) fn raw_speed(command: &mut Command) -> anyhow::Result<(f64, f64)> {
    let output = command.output()?;
    ensure!(output.status.success(), "raw-speed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let (per_second, p50) = text.trim().split_once(' ').context("raw-speed")?;
    Ok((per_second.parse()?, p50.parse()?))
}

/// Clients with a connection each, every one sending its next request when the last was answered.
/// The key signs digests of this many bytes.
pub(super) async fn load(
    world: &World,
    agent: &Agent,
    (key, width): (&'static str, usize),
    clients: usize,
    duration: Duration,
) -> anyhow::Result<Load> {
    let mut connections: Vec<Client> = Vec::new();
    for _ in 0..clients {
        connections.push(connect(world.path("agent.sock")).await?);
    }
    // Ids are new in every load, or answers would come from the agent's memory.
    static NEXT_ID: AtomicU64 = AtomicU64::new(1);
    let next = Arc::new(&NEXT_ID);
    let (cpu, started) = (agent.cpu_seconds()?, Instant::now());
    let mut tasks = Vec::new();
    for mut client in connections {
        let next = Arc::clone(&next);
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            while started.elapsed() < duration {
                let id =
                    u128::from(next.fetch_add(1, Ordering::Relaxed)) << 64 | u128::from(std::process::id());
                let one = Instant::now();
                sign(&mut client, request(key, id, &vec![7; width]), Duration::from_secs(10)).await?;
                times.push(one.elapsed());
            }
            Ok::<_, tonic::Status>(times)
        }));
    }
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = agent.cpu_seconds()? - cpu;
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).map(|time| time.as_secs_f64() * 1e6);
    let count = times.len() as f64;
    Ok(Load {
        per_second: count / elapsed,
        p50_us: at(50).context("nothing was signed")?,
        p99_us: at(99).context("nothing was signed")?,
        cpu_us: cpu * 1e6 / count,
    })
}
