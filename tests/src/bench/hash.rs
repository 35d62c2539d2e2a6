//! Hashing through the real binary, beside one stream of OpenSSL, `b3sum`, `dd` and the reference in the same run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use omsign_fixtures::built;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};

use super::sign::Stolen;
use super::{Limit, Row};
use crate::peer::{cache, reference_command};
use crate::world::{World, text};

/// What a command took.
#[derive(Clone, Copy)]
pub(super) struct Took {
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    rss_mb: f64,
}

/// Runs a command and prints what it took: in a process of its own, since the system tells a process only about all its
/// children together.
pub fn measure(command: &[String]) -> anyhow::Result<Value> {
    let (program, arguments) = command.split_first().context("a command")?;
    let start = Instant::now();
    let status = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(status.success(), "{command:?}: {status}");
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let cpu = [used.user_time(), used.system_time()];
    let cpu: f64 = cpu.iter().map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6).sum();
    Ok(json!({ "seconds": seconds, "cpu_seconds": cpu, "rss_mb": used.max_rss() as f64 * 1024.0 / 1e6 }))
}

pub(super) fn took(program: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<Took> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("measure").arg(program).args(arguments).envs(environment.iter().copied());
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{}", program.display());
    let value: Value = serde_json::from_slice(&output.stdout)?;
    let figure = |name: &str| value[name].as_f64().context(name.to_owned());
    Ok(Took { seconds: figure("seconds")?, cpu_seconds: figure("cpu_seconds")?, rss_mb: figure("rss_mb")? })
}

/// One stream of OpenSSL's SHA-256 from memory, in bytes per second.
fn one_stream(block_bytes: usize) -> anyhow::Result<f64> {
    let mut openssl = Command::new("openssl");
    openssl.args(["speed", "-mr", "-evp", "sha256", "-seconds", "1", "-bytes", &block_bytes.to_string()]);
    let output = openssl.stderr(Stdio::null()).output().context("openssl")?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find(|line| line.starts_with("+F:")).context("openssl speed -mr")?;
    Ok(line.rsplit(':').next().context("a figure")?.parse()?)
}

/// Runs what comes, and what it starts, on the first two of the cores that there are: the limits are for so many.
fn on_two_cores() -> anyhow::Result<()> {
    let (ours, mut two) = (sched_getaffinity(None)?, CpuSet::new());
    (0..CpuSet::MAX_CPU).filter(|core| ours.is_set(*core)).take(2).for_each(|core| two.set(core));
    Ok(sched_setaffinity(None, &two)?)
}

/// Of several rounds the median of each figure.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Bench {
    world: World,
    omsign: PathBuf,
    rounds: usize,
    cores: f64,
    rows: Vec<Row>,
    most_rss_mb: f64,
}

/// Of each round: what somebody else made of it, and what we did.
type Rounds = Vec<(f64, Took)>;

/// Runs all rows. Quick ones have models that are 64 times smaller.
pub fn run(rounds: usize, quick: bool) -> anyhow::Result<Vec<Row>> {
    on_two_cores()?;
    let mut bench = Bench {
        world: World::new()?,
        omsign: built("omsign")?,
        rounds,
        cores: std::thread::available_parallelism()?.get() as f64,
        rows: Vec::new(),
        most_rss_mb: 0.0,
    };
    let stolen = Stolen::now()?;
    let with_avx512 = |limit| if avx512() { limit } else { 1.2 };
    let shrink = if quick { 64 } else { 1 };
    let mib = |mib: u64| (mib << 20) / shrink;
    for (count, each, limit) in [(32, 128, with_avx512(1.8)), (16, 256, 1.4), (8, 512, 1.2), (4, 512, 1.2)] {
        bench.files(count, mib(each))?;
        let what = format!("{count} files of {each} MiB, sha256");
        bench.beside_one_stream(&what, &[], None, Some(limit))?;
        if count == 32 && has("sha_ni") {
            bench.beside_one_stream(&format!("{what}, SHA-NI forced"), &[], Some("sha-ni"), Some(1.2))?;
        }
        if count == 16 {
            bench.beside_reference("16 files", 2.0)?;
        }
    }
    bench.files(1, mib(2048))?;
    bench.beside_one_core("one file of 2 GiB, sha256")?;
    bench.beside_b3sum("one file of 2 GiB, blake3")?;
    bench.beside_one_stream("the same, blake2b", &["--hash-type", "blake2b"], None, None)?;
    bench.files(1, mib(4096))?;
    let shards = ["--shard-size", &mib(128).to_string()];
    bench.beside_one_stream("one file of 4 GiB, shards of 128 MiB", &shards, None, Some(with_avx512(1.8)))?;
    bench.files(20_000 / usize::try_from(shrink)?, 10 << 10)?;
    bench.small_files()?;
    bench.beside_reference("20,000 small files", 10.0)?;
    bench.cold("the same, cold cache", "cat * > /dev/null", "cat, one after the other", None)?;
    bench.start_up()?;
    bench.files(8, mib(1024))?;
    // One after the other does not use all that a disk has.
    let dd = "for file in *; do dd if=$file of=/dev/null bs=1M 2>/dev/null & done; wait";
    bench.cold("8 files of 1 GiB, cold cache", dd, "dd of all at the same time", Some(0.9))?;
    let most = bench.most_rss_mb;
    bench.rows.push(Row::limited("memory, the most of all rows (64 MiB)", most, "MB", Limit::AtMost(67.1)));
    bench.rows.push(Row::plain(
        "CPU time that this machine's host gave to others meanwhile",
        stolen.percent()?,
        "%",
    ));
    Ok(bench.rows)
}

impl Bench {
    fn model(&self) -> String {
        text(&self.world.path("model"))
    }

    /// Makes the model: files of so many bytes that are in the page cache.
    fn files(&self, count: usize, bytes: u64) -> anyhow::Result<()> {
        let model = self.world.path("model");
        if model.exists() {
            std::fs::remove_dir_all(&model)?;
        }
        std::fs::create_dir(&model)?;
        // Random, and long enough that nothing gains by its coming again.
        let length = usize::try_from(bytes.min(16 << 20))?;
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let block: Vec<u8> = std::iter::repeat_with(|| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random.to_le_bytes()
        })
        .take(length.div_ceil(8))
        .flatten()
        .collect();
        for number in 0..count {
            let mut file = std::fs::File::create(model.join(number.to_string()))?;
            let mut left = bytes;
            while left > 0 {
                let now = block.get(..usize::try_from(left)?.min(length)).context("bytes")?;
                std::io::Write::write_all(&mut file, now)?;
                left -= now.len() as u64;
            }
        }
        // The first reading after the writing is slower than all others.
        self.digest(&[], None).map(drop)
    }

    fn bytes(&self) -> anyhow::Result<f64> {
        let mut bytes = 0;
        for file in std::fs::read_dir(self.world.path("model"))? {
            bytes += file?.metadata()?.len();
        }
        Ok(bytes as f64)
    }

    fn digest(&self, more: &[&str], kernel: Option<&str>) -> anyhow::Result<Took> {
        let model = self.model();
        let environment: Vec<_> = kernel.map(|kernel| ("OMSIGN_HASH_KERNEL", kernel)).into_iter().collect();
        took(&self.omsign, &[&["digest", &model], more].concat(), &environment)
    }

    /// Measures in turns, so that both see the same machine.
    fn in_turns(
        &mut self,
        other: impl Fn() -> anyhow::Result<f64>,
        ours: impl Fn(&Self) -> anyhow::Result<Took>,
    ) -> anyhow::Result<Rounds> {
        let rounds =
            (0..self.rounds).map(|_| Ok((other()?, ours(self)?))).collect::<anyhow::Result<Rounds>>()?;
        self.most_rss_mb = rounds.iter().map(|(_, took)| took.rss_mb).fold(self.most_rss_mb, f64::max);
        Ok(rounds)
    }

    fn rate(&mut self, what: &str, rounds: &Rounds) -> anyhow::Result<()> {
        let bytes = self.bytes()?;
        let rate = median(rounds.iter().map(|(_, took)| bytes / took.seconds / 1e9).collect());
        self.rows.push(Row::plain(what, rate, "GB/s"));
        Ok(())
    }

    fn ratio(&mut self, what: &str, rounds: &Rounds, ratio: impl Fn(f64, Took) -> f64, limit: Option<Limit>) {
        let ratio = median(rounds.iter().map(|&(other, ours)| ratio(other, ours)).collect());
        self.rows.push(Row { limit, ..Row::plain(what, ratio, "") });
    }

    /// All cores together, beside one stream of OpenSSL on each of them.
    fn beside_one_stream(
        &mut self,
        what: &str,
        more: &[&str],
        kernel: Option<&str>,
        limit: Option<f64>,
    ) -> anyhow::Result<()> {
        let (bytes, cores) = (self.bytes()?, self.cores);
        let rounds = self.in_turns(|| one_stream(64 << 10), |bench| bench.digest(more, kernel))?;
        self.rate(what, &rounds)?;
        let ratio = |one: f64, took: Took| bytes / took.seconds / (one * cores);
        self.ratio("  ÷ (OpenSSL's one stream × cores)", &rounds, ratio, limit.map(Limit::AtLeast));
        Ok(())
    }

    fn beside_one_core(&mut self, what: &str) -> anyhow::Result<()> {
        let bytes = self.bytes()?;
        let rounds = self.in_turns(|| one_stream(64 << 10), |bench| bench.digest(&[], None))?;
        self.rate(what, &rounds)?;
        let ratio = |one: f64, took: Took| bytes / took.seconds / one;
        self.ratio("  ÷ OpenSSL's one stream", &rounds, ratio, Some(Limit::AtLeast(0.95)));
        Ok(())
    }

    fn beside_b3sum(&mut self, what: &str) -> anyhow::Result<()> {
        let file = text(&self.world.path("model/0"));
        let theirs = || Ok(took(Path::new("b3sum"), &[&file], &[])?.seconds);
        let rounds = self.in_turns(theirs, |bench| bench.digest(&["--hash-type", "blake3"], None))?;
        self.rate(what, &rounds)?;
        self.ratio("  ÷ b3sum", &rounds, |theirs, ours| theirs / ours.seconds, Some(Limit::AtLeast(0.9)));
        Ok(())
    }

    fn small_files(&mut self) -> anyhow::Result<()> {
        let bytes = self.bytes()?;
        let rounds = self.in_turns(|| one_stream(10 << 10), |bench| bench.digest(&[], None))?;
        self.ratio(
            "20,000 files of 10 KiB, sha256: CPU time in ms",
            &rounds,
            |_, ours| ours.cpu_seconds * 1e3,
            None,
        );
        let ratio = |one: f64, took: Took| took.cpu_seconds / (bytes / one);
        self.ratio(
            "  ÷ that of hashing the same bytes from memory",
            &rounds,
            ratio,
            Some(Limit::AtMost(2.0)),
        );
        Ok(())
    }

    /// Signing the model with a key in a file, by both.
    fn beside_reference(&mut self, what: &str, limit: f64) -> anyhow::Result<()> {
        let key = self.world.path("k.pem");
        let mut openssl = Command::new("openssl");
        openssl.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]).arg(&key);
        ensure!(openssl.status()?.success());
        let (model, key, bundle) = (self.model(), text(&key), text(&self.world.path("model.sig")));
        let reference = ["sign", "key", "--private_key", &key, "--signature", &bundle, &model];
        let reference = reference_command(&self.world, &reference)?;
        let arguments: Vec<_> = reference.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let theirs = || Ok(took(Path::new(reference.get_program()), &arguments, &[])?.seconds);
        let ours = ["sign", &model, "--private-key", &key, "--signature", &bundle];
        let rounds = self.in_turns(theirs, |bench| took(&bench.omsign, &ours, &[]))?;
        let what = format!("the reference's time to sign {what} ÷ ours");
        self.ratio(&what, &rounds, |theirs, ours| theirs / ours.seconds, Some(Limit::AtLeast(limit)));
        Ok(())
    }

    fn start_up(&mut self) -> anyhow::Result<()> {
        self.files(1, 1)?;
        let python = cache("reference/bin/python")?;
        let theirs = || Ok(took(&python, &["-m", "model_signing", "--help"], &[])?.seconds * 1e3);
        let rounds = self.in_turns(theirs, |bench| bench.digest(&[], None))?;
        let limit = Some(Limit::AtMost(10.0));
        self.ratio(
            "start-up in ms: digest of a model of one byte",
            &rounds,
            |_, ours| ours.seconds * 1e3,
            limit,
        );
        self.ratio("  beside it, the reference's --help", &rounds, |theirs, _| theirs, None);
        Ok(())
    }

    /// Files that are not in the page cache, beside a shell's command that reads one after the other.
    fn cold(&mut self, what: &str, script: &str, beside: &str, limit: Option<f64>) -> anyhow::Result<()> {
        let model = self.world.path("model");
        let forget = || -> anyhow::Result<()> {
            for file in std::fs::read_dir(&model)? {
                let file = std::fs::File::open(file?.path())?;
                file.sync_data()?;
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
            }
            Ok(())
        };
        let script = format!("cd {}; {script}", self.model());
        let theirs = || {
            forget()?;
            Ok(took(Path::new("sh"), &["-euc", &script], &[])?.seconds)
        };
        let ours = |bench: &Self| {
            forget()?;
            bench.digest(&[], None)
        };
        let rounds = self.in_turns(theirs, ours)?;
        self.rate(what, &rounds)?;
        let limit = limit.map(Limit::AtLeast);
        self.ratio(
            &format!("  ÷ {beside}, from the same disk"),
            &rounds,
            |theirs, ours| theirs / ours.seconds,
            limit,
        );
        Ok(())
    }
}

fn avx512() -> bool {
    has("avx512bw") && has("avx512vl")
}

/// Whether this CPU has a feature, by Linux's name for it.
fn has(feature: &str) -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    flags.split_whitespace().any(|word| word == feature)
}
