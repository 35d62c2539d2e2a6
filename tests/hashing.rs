//! How models are hashed: every algorithm and serialization beside other tools, on any kernel, and how it is shown.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use omsign_fixtures::built;
use omsign_tests::hashed::{KEY, VERIFY, inspect, run, shell, sign, verify, while_it_hashes, world};
use omsign_tests::peer::{reference, succeeded};
use omsign_tests::world::World;
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

#[test]
fn every_algorithm_and_serialization_beside_other_tools() -> anyhow::Result<()> {
    let world = world()?;
    for (algorithm, tool) in [("sha256", "sha256sum"), ("blake2b", "b2sum"), ("blake3", "b3sum")] {
        for (shard_size, more) in [(None, &[][..]), (Some(1 << 20), &["--shard-size", "1MiB"])] {
            sign(&world, &[&["--hash-type", algorithm], more].concat())?;
            let signed = inspect(&world)?;
            ensure!(
                signed["hash_type"] == algorithm && signed["shard_size"] == serde_json::json!(shard_size)
            );
            for (name, digest) in signed["files"].as_object().context("files")? {
                let bytes = match shard_size {
                    None => format!("cat 'model/{name}'"),
                    Some(_) => {
                        let (rest, end) = name.rsplit_once(':').context("an end")?;
                        let (file, start) = rest.rsplit_once(':').context("a start")?;
                        let count = end.parse::<u64>()? - start.parse::<u64>()?;
                        format!("tail -c +$(({start} + 1)) 'model/{file}' | head -c {count}")
                    }
                };
                let theirs = shell(&world, &format!("{bytes} | {tool}"))?;
                let theirs = theirs.split_whitespace().next();
                ensure!(theirs == digest.as_str(), "{algorithm}, {name}: {theirs:?}, {digest}");
            }
            // The empty file has no shards, and whoever signs is told.
            let digest = world.omsign(&[&["digest", "model"], more].concat())?;
            let said = String::from_utf8(digest.stderr)?.contains("not signed: 1 empty file, of which");
            ensure!(said == shard_size.is_some(), "{more:?}");
            let names: Vec<_> = signed["files"].as_object().context("files")?.keys().collect();
            ensure!(
                names.iter().any(|name| name.starts_with("sub/empty")) == shard_size.is_none(),
                "{names:?}"
            );
            let big = names.iter().filter(|name| name.starts_with("big.bin")).count();
            ensure!(big == if shard_size.is_some() { 5 } else { 1 }, "{names:?}");
            verify(&world, &[])?;
            // One byte changed, one more, and back.
            let big = world.path("model/big.bin");
            let content = fs::read(&big)?;
            let changes: [fn(&mut Vec<u8>); 3] =
                [|bytes| bytes[3 << 20] ^= 1, |bytes| bytes.push(0), |bytes| bytes.truncate(5)];
            for change in changes {
                let mut changed = content.clone();
                change(&mut changed);
                fs::write(&big, changed)?;
                let arguments = [&["verify", "model"], &VERIFY[..]].concat();
                world.omsign_refuses(1, &arguments, &["(OMS 8.4): 1 changed\n  changed: big.bin ("])?;
            }
            fs::write(&big, content)?;
        }
    }
    Ok(())
}

/// Its command line verifies whole files with SHA-256 only; a model of these both tools agree on.
#[test]
fn the_reference_takes_what_is_hashed_by_default() -> anyhow::Result<()> {
    let world = world()?;
    sign(&world, &["--jobs", "3"])?;
    let arguments = ["verify", "key", "--signature", "model.sig", "--public_key", "k.pub", "model"];
    succeeded("reference", &reference(&world, &arguments)?)
}

#[test]
fn every_kernel_and_number_of_jobs_finds_the_same() -> anyhow::Result<()> {
    let world = world()?;
    let expected = world.omsign_ok(&["digest", "model"])?;
    let unknown = run(&world, "OMSIGN_HASH_KERNEL=abacus omsign digest model")?;
    let errors = String::from_utf8(unknown.stderr)?;
    let known = errors
        .lines()
        .next()
        .unwrap_or_default()
        .split_once("there are ")
        .context("the kernels of this CPU")?
        .1;
    ensure!(unknown.status.code() == Some(2) && known.contains("portable"), "{errors}");
    for kernel in known.split(", ") {
        for jobs in [1, 2, 7] {
            let found =
                shell(&world, &format!("OMSIGN_HASH_KERNEL={kernel} omsign digest model --jobs {jobs}"))?;
            ensure!(found == expected, "{kernel}, {jobs} jobs");
        }
    }
    Ok(())
}

/// A thread for each job, while it hashes what takes hours.
#[test]
fn as_many_threads_as_jobs() -> anyhow::Result<()> {
    let world = World::new()?;
    for file in ["model/a", "model/b", "model/c"] {
        world.write(file, "")?;
        fs::OpenOptions::new().write(true).open(world.path(file))?.set_len(1 << 40)?;
    }
    let mut threads = Vec::new();
    for jobs in ["1", "3"] {
        let mut long = Command::new(built("omsign")?);
        long.args(["digest", "model", "--progress", "plain", "--jobs", jobs]).current_dir(world.path(""));
        world.without_surprises(&mut long);
        let mut running = long.stderr(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stderr = running.stderr.take().context("stderr")?;
        let said = BufReader::new(stderr).read_line(&mut line);
        let tasks = fs::read_dir(format!("/proc/{}/task", running.id())).map(Iterator::count);
        running.kill()?;
        running.wait()?;
        threads.push(tasks?);
        ensure!(said.is_ok() && line.contains("hashed "), "{line}");
    }
    ensure!(threads[1] == threads[0] + 2, "{threads:?}");
    Ok(())
}

/// Each thread has a file open.
#[test]
fn more_jobs_than_files_may_be_open() -> anyhow::Result<()> {
    let world = World::new()?;
    shell(&world, "mkdir model; for i in $(seq 100); do truncate -s 4M model/$i; done")?;
    let digest = |with: &str| shell(&world, &format!("{with} omsign digest model"));
    ensure!(digest("ulimit -Sn 70; ulimit -Hn 70;")? == digest("")?);
    let jobs = shell(&world, "ulimit -Sn 70; ulimit -Hn 70; omsign digest model --jobs 512")?;
    ensure!(jobs == digest("")?, "{jobs}");
    Ok(())
}

#[test]
fn shards_are_of_a_billion_bytes_unless_told() -> anyhow::Result<()> {
    let world = World::new()?;
    world.write("model/w", "")?;
    fs::OpenOptions::new().write(true).open(world.path("model/w"))?.set_len(1_000_000_001)?;
    let manifest = world.omsign_ok(&["digest", "model", "--serialization", "shards", "--json"])?;
    for name in ["\"w:0:1000000000\"", "\"w:1000000000:1000000001\""] {
        ensure!(manifest.contains(name), "{manifest}");
    }
    Ok(())
}

#[test]
fn memory_stays_small_whatever_the_model() -> anyhow::Result<()> {
    let world = World::new()?;
    let write = |name: String, bytes| -> anyhow::Result<()> {
        world.write(&name, "")?;
        Ok(fs::OpenOptions::new().write(true).open(world.path(&name))?.set_len(bytes)?)
    };
    (0..80).try_for_each(|file| write(format!("model/{file}"), 16 << 20))?;
    for more in
        [&["--jobs", "64"][..], &["--jobs", "1"], &["--hash-type", "blake3"], &["--shard-size", "1MB"]]
    {
        world.omsign_ok(&[&["digest", "model"], more].concat())?;
    }
    // As many cores as there can be, and enough files for all their lanes.
    (0..9000).try_for_each(|file| write(format!("many/{}/{file}", file % 10), 9000))?;
    for algorithm in ["sha256", "blake2b", "blake3"] {
        world.omsign_ok(&["digest", "many", "--jobs", "512", "--hash-type", algorithm])?;
    }
    shell(&world, "openssl ecparam -name prime256v1 -genkey -noout -out k.pem")?;
    shell(&world, "openssl ec -in k.pem -pubout -out k.pub 2>&1")?;
    world.omsign_ok(&["sign", "many", "--private-key", "k.pem", "--digest-cache"])?;
    world.omsign_ok(&["verify", "many", "--public-key", "k.pub"])?;
    fs::write(world.path("many.json"), world.omsign_ok(&["digest", "many", "--json"])?)?;
    world.omsign_ok(&[
        "sign",
        "--manifest",
        "many.json",
        "--private-key",
        "k.pem",
        "--signature",
        "m.sig",
    ])?;
    // One file is read ahead, by threads with buffers of their own.
    write("one/file".into(), 200 << 20)?;
    for more in [&["--jobs", "64"][..], &["--jobs", "64", "--hash-type", "blake2b"]] {
        world.omsign_ok(&[&["digest", "one"], more].concat())?;
    }
    // This process has no other children.
    let kib = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    ensure!(kib <= 64 << 10, "{kib} KiB");
    Ok(())
}

#[test]
fn memory_stays_small_of_many_files() -> anyhow::Result<()> {
    let world = World::new()?;
    for directory in 0..100 {
        world.write(&format!("model/{directory:02}/config"), "")?;
        let path = world.path(&format!("model/{directory:02}"));
        (0..1000).try_for_each(|file| fs::write(path.join(format!("tensor-{file:03}.bin")), "small"))?;
    }
    shell(&world, "openssl ecparam -name prime256v1 -genkey -noout -out k.pem")?;
    shell(&world, "openssl ec -in k.pem -pubout -out k.pub 2>&1")?;
    world.omsign_ok(&["sign", "model", "--private-key", "k.pem"])?;
    let verified = world.omsign_ok(&["verify", "model", "--public-key", "k.pub"])?;
    ensure!(verified.contains("100100 files"), "{verified}");
    // This process has no other children.
    let kib = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    ensure!(kib <= 64 << 10, "{kib} KiB");
    Ok(())
}

#[test]
fn progress_is_shown_to_people_only() -> anyhow::Result<()> {
    let world = World::new()?;
    world.write("model/w", "")?;
    fs::OpenOptions::new().write(true).open(world.path("model/w"))?.set_len(1 << 30)?;
    let digest = world.omsign_ok(&["digest", "model"])?;
    // On a terminal, a bar with bytes, rate and time, which is taken away again; nothing of it on standard output.
    for how in ["", "--progress bar"] {
        let terminal = shell(&world, &format!("script -qec 'omsign digest model {how} > digest' /dev/null"))?;
        for part in ["1.00 GiB", "iB/s", "left"] {
            ensure!(terminal.contains(part), "{terminal}");
        }
        ensure!(fs::read_to_string(world.path("digest"))? == digest && !terminal.contains(digest.trim()));
    }
    let narrow = shell(&world, "script -qec 'stty columns 40; omsign digest model > digest' /dev/null")?;
    ensure!(narrow.contains("% ") && narrow.contains(" left") && !narrow.contains("iB"), "{narrow}");
    let quiet = shell(&world, "script -qec 'omsign digest model --quiet' /dev/null")?;
    ensure!(quiet.trim_end() == digest.trim_end(), "{quiet}");
    // Elsewhere nothing, or lines on standard error when asked for.
    for (how, expected) in
        [("", false), ("--progress plain", true), ("--quiet", false), ("--progress none", false)]
    {
        let output = run(&world, &format!("omsign digest model {how}"))?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(
            String::from_utf8(output.stdout)? == digest && errors.contains("hashed 1.0 GB") == expected,
            "{how}: {errors}"
        );
    }
    // Of what takes longer, a line every few seconds.
    fs::OpenOptions::new().write(true).open(world.path("model/w"))?.set_len(1 << 40)?;
    let mut long = Command::new(built("omsign")?);
    world
        .without_surprises(long.args(["digest", "model", "--progress", "plain"]).current_dir(world.path("")));
    let mut running = long.stderr(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(running.stderr.take().context("stderr")?).read_line(&mut line)?;
    running.kill()?;
    running.wait()?;
    ensure!(line.contains("of 1.0 TB, ") && line.contains("/s, ") && line.ends_with(" s left\n"), "{line}");
    let errors = world.omsign_fails(2, &["digest", "model", "--jobs", "513"])?;
    ensure!(errors.contains("expected a number from 1 to 512"), "{errors}");
    Ok(())
}

/// A link that leads to the next release when the last one was looked at: nothing is said of what is there then.
#[test]
fn another_model_in_its_place() -> anyhow::Result<()> {
    let world = world()?;
    fs::File::create(world.path("model/long"))?.set_len(1 << 30)?;
    sign(&world, &[])?;
    fs::create_dir(world.path("next"))?;
    let current = world.path("current");
    for (command, status) in
        [(&[&["verify", "current"], &VERIFY[..]].concat()[..], 1), (&["digest", "current"], 2)]
    {
        symlink("model", &current)?;
        let output = while_it_hashes(&world, command, || {
            fs::remove_file(&current)?;
            Ok(symlink("next", &current)?)
        })?;
        fs::remove_file(&current)?;
        let errors = String::from_utf8(output.stderr)?;
        let expected = "current changed while it was hashed";
        ensure!(output.status.code() == Some(status) && errors.contains(expected), "{command:?}: {errors}");
    }
    Ok(())
}

/// What comes into a model, or is put in its place, when everything else of it was compared already.
#[test]
fn a_model_that_is_not_as_it_was_when_verify_ends() -> anyhow::Result<()> {
    let world = world()?;
    fs::File::create(world.path("model/long"))?.set_len(1 << 30)?;
    sign(&world, &[])?;
    let (more, at_model) = (world.path("model/more.py"), [&["verify", "model"], &VERIFY[..]].concat());
    let come = || Ok(fs::write(&more, "import os")?);
    let output = while_it_hashes(&world, &at_model, come)?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && errors.contains("more.py"), "{errors}");
    fs::remove_file(&more)?;
    // Where others may be, this one may come; and what nobody looks at is said to be there.
    let ignoring = [&at_model[..], &["--ignore-unsigned-files", "--json"]].concat();
    let output = while_it_hashes(&world, &ignoring, || {
        fs::create_dir(world.path("model/.github"))?;
        come()
    })?;
    ensure!(output.status.success(), "{}", String::from_utf8(output.stderr)?);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(said["ignored"][0] == "more.py" && said["left_out"][0] == ".github", "{said}");
    // A single file, by a link to it.
    let current = world.path("current");
    symlink("model/long", &current)?;
    world.omsign_ok(&[&["sign", "current"], &KEY[..]].concat())?;
    world.omsign_ok(&[&["verify", "current"], &VERIFY[..]].concat())?;
    // It is called what the link is.
    fs::create_dir(world.path("downloads"))?;
    fs::copy(world.path("model/long"), world.path("downloads/current"))?;
    world.omsign_ok(&[&["verify", "downloads/current"], &VERIFY[..]].concat())?;
    let output = while_it_hashes(&world, &[&["verify", "current"], &VERIFY[..]].concat(), || {
        fs::remove_file(&current)?;
        Ok(symlink("model/big.bin", &current)?)
    })?;
    ensure!(output.status.code() == Some(1), "{}", String::from_utf8(output.stderr)?);
    Ok(())
}

/// As a file server's clients do it: whoever opens the file waits until they give it back.
#[test]
fn a_file_with_a_lease_on_it() -> anyhow::Result<()> {
    let world = world()?;
    let script = r#"
import fcntl, os, signal, sys
file = os.open("model/big.bin", os.O_RDWR)
signal.signal(signal.SIGIO, lambda *_: sys.exit(fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)))
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
signal.pause()
"#;
    let mut holder = Command::new("timeout");
    holder.args(["60", "python3", "-c", script]).current_dir(world.path("")).stdout(Stdio::piped());
    let mut holder = holder.spawn()?;
    let mut said = String::new();
    BufReader::new(holder.stdout.take().context("a pipe")?).read_line(&mut said)?;
    ensure!(said == "leased\n", "{said:?}");
    shell(&world, "omsign digest model")?;
    ensure!(holder.wait()?.success(), "it was asked to give it back");
    Ok(())
}

/// What is read next is asked for before it is needed, unless it was in the page cache all the time.
#[test]
fn reads_ahead() -> anyhow::Result<()> {
    let world = World::new()?;
    fs::create_dir(world.path("model"))?;
    let content: Vec<u8> = (0..40_usize << 20).map(|i| (i * 7 + i / 4093).to_le_bytes()[0]).collect();
    fs::write(world.path("model/weights"), &content)?;
    let mut digests = BTreeSet::new();
    for forgotten_mib in [40, 25, 0] {
        let weights = fs::File::open(world.path("model/weights"))?;
        weights.sync_all()?;
        if let Some(bytes) = NonZeroU64::new(forgotten_mib << 20) {
            fadvise(&weights, (40 << 20) - bytes.get(), Some(bytes), Advice::DontNeed)?;
        }
        // There are file systems that forget nothing, and some that do not say.
        let mut last = [0];
        let last = &mut [IoSliceMut::new(&mut last)];
        let cached = preadv2(&weights, last, (40 << 20) - 1, ReadWriteFlags::NOWAIT);
        let trace = "strace --follow-forks --quiet=all --trace=fadvise64 --output=trace";
        digests.insert(shell(&world, &format!("{trace} omsign digest model"))?);
        let trace = fs::read_to_string(world.path("trace"))?;
        let asked = trace.lines().filter(|line| line.contains("POSIX_FADV_WILLNEED"));
        let from = asked.map(|line| line.split(", ").nth(1).context("an offset")?.parse().context("bytes"));
        let from: Vec<u64> = from.collect::<anyhow::Result<_>>()?;
        let right = match cached {
            Ok(_) => from.is_empty(),
            // Of 25 MiB at least, 8 at most at a time, and nothing of what was cached.
            Err(Errno::AGAIN) => {
                from.len() >= 4 && from.iter().all(|from| *from >= (40 - forgotten_mib) << 20)
            }
            Err(_) => from.len() >= 5,
        };
        ensure!(right, "{forgotten_mib} MiB not in the page cache, {cached:?}: {trace}");
    }
    // From the cache, from the disk, and when it went from one to the other.
    let openssl = "openssl dgst -sha256 -binary model/weights | openssl dgst -sha256 -r | cut -c1-64";
    ensure!(digests == [format!("sha256:{}", shell(&world, openssl)?)].into(), "{digests:?}");
    Ok(())
}
