//! Each device beside itself without us, and what an agent costs that has little to do.

use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::SoftHsm;
use omsign_fixtures::swtpm::{AUTH, SwTpm};

use super::sign::{Stolen, load, raw_speed};
use super::{Limit, Row};
use crate::agent::Agent;
use crate::client::{connect, request, sign};
use crate::operator::does;
use crate::world::{World, key as key_on, key_section, token_section};

/// What can be measured.
pub const NAMES: [&str; 7] =
    ["softhsm-p384", "softhsm-rsa3072", "swtpm", "piv", "two-tokens", "house", "stand-ins"];

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// ECDSA on P-384, which takes a core most of a millisecond.
    SoftHsmP384,
    /// RSA of 3072 bits.
    SoftHsmRsa3072,
    /// A software TPM.
    SwTpm,
    /// The virtual card.
    Piv,
    /// Two tokens with the same key, beside one of them.
    TwoTokens,
    /// A token of many objects, an idle agent, a day's worth of requests.
    House,
    /// How long each stand-in takes to start.
    StandIns,
}

impl FromStr for Backend {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let all = [
            Self::SoftHsmP384,
            Self::SoftHsmRsa3072,
            Self::SwTpm,
            Self::Piv,
            Self::TwoTokens,
            Self::House,
            Self::StandIns,
        ];
        let found = NAMES.iter().position(|name| *name == text).and_then(|at| all.get(at).copied());
        found.with_context(|| format!("expected one of {}", NAMES.join(", ")))
    }
}

/// Runs all rows of one; each measurement takes `duration`, `rounds` times. Beside a device they are three times as many
/// and half as long: what a machine does for others changes within a second, and with it its speed.
pub fn run(backend: Backend, duration: Duration, rounds: usize, quick: bool) -> anyhow::Result<Vec<Row>> {
    let (world, stolen) = (World::new()?, Stolen::now()?);
    let (duration, rounds) = match backend {
        Backend::SoftHsmP384 | Backend::SoftHsmRsa3072 | Backend::SwTpm | Backend::Piv => {
            (duration / 2, rounds * 3)
        }
        Backend::TwoTokens | Backend::House | Backend::StandIns => (duration, rounds),
    };
    let milliseconds = duration.as_millis().to_string();
    let raw = |arguments: &[&str], environment: (&str, &std::path::Path)| {
        let mut command = Command::new(built("omsign-fixtures")?);
        command.args(["raw-speed", &milliseconds]).args(arguments);
        raw_speed(command.env(environment.0, environment.1)).map(|(per_second, _)| per_second)
    };
    let mut rows = match backend {
        Backend::SoftHsmP384 | Backend::SoftHsmRsa3072 => {
            let (kind, width) = if backend == Backend::SoftHsmP384 { ("p384", 48) } else { ("rsa3072", 32) };
            let token = SoftHsm::create(&world.path("t"), "t")?;
            let config = token_section("t", &token, "") + &key_section("bench", "t", "bench");
            world.write("agent.toml", world.listen() + &config)?;
            does(&world, &["generate", "bench", "--type", kind])?;
            let environment = ("SOFTHSM2_CONF", token.config());
            let alone = || raw(&["softhsm", "t", "bench"], (environment.0, &environment.1));
            beside(&world, &config, width, duration, rounds, alone)?
        }
        Backend::SwTpm => {
            let chip = SwTpm::create(&world.path("tpm"))?;
            chip.persistent_key("bench", "ecc256", 0x8100_0010, AUTH)?;
            let config = chip.section("t") + &key_on("bench", "t", "handle = \"0x81000010\"");
            let (tcti, handle) = (chip.tcti(), 0x8100_0010_u32.to_string());
            let alone = || raw(&["tpm", &tcti, &handle], ("TSS2_LOG", "all+NONE".as_ref()));
            beside(&world, &config, 32, duration, rounds, alone)?
        }
        Backend::Piv => {
            let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
            card.change_pin()?;
            card.generate("9a", "ECCP256", &[])?;
            let config = card.section("t") + &key_on("bench", "t", "slot = \"9a\"");
            let socket = card.socket();
            let alone = || raw(&["piv", "11223344", "154"], ("PCSCLITE_CSOCK_NAME", &socket));
            beside(&world, &config, 32, duration, rounds, alone)?
        }
        Backend::TwoTokens => {
            let alone = |token: &SoftHsm| {
                raw(&["softhsm", &token.label, "bench"], ("SOFTHSM2_CONF", &token.config()))
            };
            two_tokens(&world, duration, rounds, alone)?
        }
        Backend::House => house(&world, quick)?,
        Backend::StandIns => stand_ins(rounds)?,
    };
    rows.push(Row::plain(
        "CPU time that this machine's host gave to others meanwhile",
        stolen.percent()?,
        "%",
    ));
    Ok(rows)
}

/// More than an agent gives a device at once, so that the device never waits.
const CLIENTS: usize = 16;

/// Signatures per second through an agent, beside the device alone.
fn beside(
    world: &World,
    keys: &str,
    width: usize,
    duration: Duration,
    rounds: usize,
    alone: impl Fn() -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for durability in ["os", "fsync"] {
        let config = format!("{}durability = \"{durability}\"\n{keys}", world.listen());
        let (mut through, mut raw) = (0.0, 0.0);
        for _ in 0..rounds {
            // In turns: some belong to one process at a time, and a TPM's connections, one for each command, linger and
            // slow the next ones down.
            through += through_agent(world, &config, width, duration)?;
            raw += alone()?;
        }
        let (per_second, raw) = (through / rounds as f64, raw / rounds as f64);
        let what = |figure: &str| format!("{figure}, audit {durability}");
        rows.push(Row::plain(what(&format!("signatures, {CLIENTS} clients")), per_second, "/s"));
        rows.push(Row::plain(what("raw device beside it, 1 thread"), raw, "/s"));
        rows.push(Row::limited(what("signatures ÷ raw device"), per_second / raw, "", Limit::AtLeast(0.9)));
    }
    Ok(rows)
}

fn through_agent(world: &World, config: &str, width: usize, duration: Duration) -> anyhow::Result<f64> {
    let agent = Agent::start(world, config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Warm: the device is open.
    runtime.block_on(load(world, &agent, ("bench", width), 1, duration / 10))?;
    Ok(runtime.block_on(load(world, &agent, ("bench", width), CLIENTS, duration))?.per_second)
}

fn two_tokens(
    world: &World,
    duration: Duration,
    rounds: usize,
    alone: impl Fn(&SoftHsm) -> anyhow::Result<f64> + Sync,
) -> anyhow::Result<Vec<Row>> {
    // Where the token is the limit: RSA-3072 takes many times as long as all that is around it.
    let first = SoftHsm::create(&world.path("a"), "a")?;
    let key = key_section("bench", "a", "bench");
    world.write("agent.toml", world.listen() + &token_section("a", &first, "") + &key)?;
    does(world, &["generate", "bench", "--type", "rsa3072"])?;
    let second = world.twin_of(&first)?;
    let sections = [token_section("a", &first, ""), token_section("b", &second, "")];
    let mut away = Vec::new();
    for (section, name) in sections.iter().zip(["proxy-a", "proxy-b"]) {
        let proxy = FaultProxy::create(&world.path(name))?;
        // For the length and for the signature itself: 20 ms on top of what it takes here.
        proxy.set("C_Sign 0 10\n")?;
        away.push(proxy.before(section)?);
    }
    let cores = std::thread::available_parallelism()?.get();
    let mut rows = Vec::new();
    for (what, tokens, limited) in [
        ("tokens of 20 ms, as in another machine", away.concat(), true),
        // A core for each of them, and one for everybody else.
        ("tokens in software, on the same cores", sections.concat(), cores >= 3),
    ] {
        let one = world.listen() + &tokens + &key;
        let two = world.listen() + &tokens + &key.replace("token = \"a\"", "token = [\"a\", \"b\"]");
        let mut seen = Vec::new();
        for _ in 0..rounds {
            let one = through_agent(world, &one, 32, duration)?;
            let two = through_agent(world, &two, 32, duration)?;
            seen.push((two / one, one, two));
        }
        seen.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, one, two) = seen.swap_remove(seen.len() / 2);
        let limit = limited.then_some(Limit::AtLeast(1.8));
        rows.push(Row::plain(format!("signatures of one, {CLIENTS} clients, {what}"), one, "/s"));
        rows.push(Row::plain(format!("of two, {what}"), two, "/s"));
        rows.push(Row { limit, ..Row::plain(format!("two ÷ one, {what}"), ratio, "") });
    }
    let single = alone(&first)?;
    let both: f64 = std::thread::scope(|scope| {
        let other = scope.spawn(|| alone(&second));
        let both = [alone(&first), other.join().map_err(|_| anyhow::anyhow!("raw-speed"))?];
        both.into_iter().sum::<anyhow::Result<f64>>()
    })?;
    rows.push(Row::plain(format!("the same without us, on {cores} cores"), both / single, ""));
    Ok(rows)
}

/// From nothing to a device with its key and certificate, a configuration, and all of it cleaned up again.
fn stand_ins(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in ["softhsm", "kryoptic", "fault", "swtpm", "piv"] {
        let mut seen = Vec::new();
        for _ in 0..rounds.max(3) {
            let started = Instant::now();
            let status =
                Command::new(built("omsign-fixtures")?).args(["with", name, "--", "true"]).status()?;
            ensure!(status.success(), "{name}");
            seen.push(started.elapsed().as_secs_f64());
        }
        seen.sort_by(f64::total_cmp);
        let median = seen.swap_remove(seen.len() / 2);
        rows.push(Row::limited(format!("{name}: with its key, and gone"), median, "s", Limit::AtMost(0.5)));
    }
    Ok(rows)
}

fn house(world: &World, quick: bool) -> anyhow::Result<Vec<Row>> {
    let (objects, requests) = if quick { (20, 2_000) } else { (10_000, 200_000) };
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("bench", "t", "bench");
    world.write("agent.toml", &config)?;
    does(world, &["generate", "bench", "--type", "p256"])?;
    let second = Duration::from_secs(1);
    let mut few = Vec::new();
    for _ in 0..3 {
        few.push(through_agent(world, &config, 32, second)?);
    }
    let mut many = Command::new(built("omsign-fixtures")?);
    many.args(["many-keys", "t", &(objects / 2).to_string()]).env("SOFTHSM2_CONF", token.config());
    ensure!(many.status()?.success(), "many-keys");
    // What is still being written would be in the way of the audit log.
    rustix::fs::sync();
    let agent = Agent::start(world, &config)?;
    // It has to be open before it is asked.
    world.omsign_ok(&["keys", "export", "bench"])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let started = Instant::now();
    let listed = does(world, &["list", "--json"])?;
    let listing = started.elapsed().as_secs_f64();
    let longest = std::thread::scope(|scope| {
        let lists = scope.spawn(|| does(world, &["list", "--json"]));
        runtime.block_on(async {
            let (mut client, mut longest) = (connect(world.path("agent.sock")).await?, Duration::ZERO);
            for id in 0.. {
                let started = Instant::now();
                sign(&mut client, request("bench", id, &[7; 32]), second * 10).await?;
                longest = longest.max(started.elapsed());
                if lists.is_finished() {
                    break;
                }
            }
            anyhow::Ok(longest)
        })
    })?;
    let count = listed.matches("\"object\"").count();
    ensure!(count == objects / 2 + 1, "{count} keys listed");
    let load = |duration| runtime.block_on(load(world, &agent, ("bench", 32), CLIENTS, duration));
    let mut beside = Vec::new();
    for _ in 0..3 {
        beside.push(load(second)?.per_second);
    }
    few.sort_by(f64::total_cmp);
    beside.sort_by(f64::total_cmp);
    let beside_few = beside.swap_remove(1) / few.swap_remove(1);
    let idle = Duration::from_secs(if quick { 2 } else { 30 });
    let cpu = agent.cpu_seconds()?;
    std::thread::sleep(idle);
    let idle_percent = (agent.cpu_seconds()? - cpu) * 100.0 / idle.as_secs_f64();
    let descriptors = || -> anyhow::Result<usize> {
        let processes = [vec![agent.pid()], agent.hosts()?].concat();
        processes.iter().map(|pid| Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())).sum()
    };
    let many = |count: f64| -> anyhow::Result<f64> {
        let mut done = 0.0;
        while done < count {
            done += load(second)?.per_second;
        }
        Ok(done)
    };
    let open = descriptors()?;
    // What it remembers and allocates once is there after these.
    many(f64::from(requests) / 4.0)?;
    let memory = agent.memory_bytes()?;
    let done = many(f64::from(requests))?;
    // Its last connections close when it is polled again, or dropped.
    drop(runtime);
    // It hears that its clients are gone a moment later.
    let left = Instant::now();
    while descriptors()? > open && left.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let grown = (agent.memory_bytes()? as f64 - memory as f64) / 1e6;
    Ok(vec![
        Row::limited(format!("listing a token of {objects} objects"), listing, "s", Limit::AtMost(2.0)),
        Row::limited(
            "the longest of one client's signatures while they are listed",
            longest.as_secs_f64() * 1e3,
            "ms",
            Limit::AtMost(100.0),
        ),
        Row::limited("signing beside them ÷ without them", beside_few, "", Limit::AtLeast(0.9)),
        Row::limited("CPU of an idle agent", idle_percent, "%", Limit::AtMost(0.1)),
        Row::limited(format!("memory grown in {done:.0} requests"), grown, "MB", Limit::AtMost(2.0)),
        Row::limited(
            "descriptors more than before",
            descriptors()? as f64 - open as f64,
            "",
            Limit::AtMost(0.0),
        ),
    ])
}
