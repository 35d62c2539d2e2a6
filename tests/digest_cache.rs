//! Digests that are remembered: believed only when told to, and only of files that cannot have changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_tests::hashed::{KEY, VERIFY, inspect, run, shell, sign, verify, world};
use omsign_tests::world::{World, text};

/// Whoever can write to a file can exchange its content, on some file systems, without a change of its times.
#[test]
fn files_that_others_can_write_to() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test gives files to others; run it as root");
    let world = world()?;
    let remembered = "faketime -f +1h omsign digest model --digest-cache 2>&1";
    for (change, told) in [
        ("chmod g+w model/config.json", false),
        ("chgrp 54321 model/config.json", true),
        ("chmod g-w model/config.json", false),
        ("chmod o+w model/config.json", true),
        ("chmod o-w model/config.json && chown 54321 model/config.json", true),
    ] {
        shell(&world, change)?;
        let said = shell(&world, remembered)?;
        let tells = said.contains("of files that are somebody else's, or that others can write to");
        ensure!(tells == told, "{change}: {said}");
    }
    Ok(())
}

#[test]
fn the_cache_is_believed_only_when_told_to_and_only_for_old_files() -> anyhow::Result<()> {
    let world = world()?;
    let caches = || fs::read_dir(world.path(".cache/omsign/digests"));
    let remembered = || -> anyhow::Result<usize> {
        let Some(cache) = caches()?.next() else { return Ok(0) };
        let cache = cache?;
        // A line at the start and one at the end are no entries.
        Ok(fs::read_to_string(cache.path())?.lines().count() - 2)
    };
    let from_cache = |more: &str| -> anyhow::Result<serde_json::Value> {
        let verified = shell(&world, &format!("omsign verify model {} --json {more}", VERIFY.join(" ")))?;
        Ok(serde_json::from_str::<serde_json::Value>(&verified)?["digests_from_cache"].clone())
    };
    // However long it takes to get there. What was written later than now was written just now.
    shell(&world, "find model -type f -exec touch --date '30 minutes' {} +")?;
    sign(&world, &["--digest-cache"])?;
    let said = shell(&world, "omsign digest model --digest-cache 2>&1")?;
    ensure!(
        said.contains("note: not remembered: ") && said.contains(" of files that changed less than"),
        "{said}"
    );
    let digest = world.omsign_ok(&["digest", "model"])?;
    ensure!(remembered()? == 0, "files that were written just now");
    // For a program to which they were written an hour ago, they are old.
    let later = "faketime -f +1h omsign";
    ensure!(shell(&world, &format!("{later} digest model --digest-cache"))? == digest);
    let files = remembered()?;
    ensure!(files == inspect(&world)?["files"].as_object().context("files")?.len());
    ensure!(from_cache("")? == 0 && from_cache("--digest-cache")? == files);
    let said = verify(&world, &["--digest-cache"])?;
    ensure!(said.contains(&format!(", {files} digests believed from the cache")), "{said}");
    ensure!(said.contains("content of every signed file, or what the digest cache says of it"), "{said}");
    ensure!(!verify(&world, &[])?.contains("cache"), "nobody asked for it");
    let output = world.omsign(&["digest", "model", "--digest-cache"])?;
    let note = String::from_utf8(output.stderr)?;
    ensure!(note.contains(&format!("{files} digests (")) && output.stdout == digest.as_bytes(), "{note}");
    let quiet = world.omsign(&["digest", "model", "--digest-cache", "-q"])?;
    ensure!(quiet.stderr.is_empty(), "{quiet:?}");
    // They are not even opened; and what is believed is what is signed.
    for command in ["digest model".to_owned(), format!("sign model {}", KEY.join(" "))] {
        let watch = "strace --follow-forks --quiet=all --trace=open,openat --output=trace";
        shell(&world, &format!("{watch} omsign {command} --digest-cache"))?;
        let trace = fs::read_to_string(world.path("trace"))?;
        ensure!(trace.contains("model") && !trace.contains("config.json"), "{command}: {trace}");
        verify(&world, &[])?;
    }
    // Another algorithm, and shards, are other digests.
    let blake3 = world.omsign_ok(&["digest", "model", "--hash-type", "blake3"])?;
    let cached = ["digest", "model", "--hash-type", "blake3", "--digest-cache"];
    ensure!(world.omsign_ok(&cached)? == blake3 && from_cache("--digest-cache")? == files);
    // A file of the same size and with the same modification time is another file all the same.
    let config = world.path("model/config.json");
    let mut content = fs::read(&config)?;
    let modified = fs::metadata(&config)?.modified()?;
    content[0] ^= 1;
    fs::write(&config, &content)?;
    fs::File::options().write(true).open(&config)?.set_modified(modified)?;
    let arguments = [&["verify", "model", "--digest-cache"], &VERIFY[..]].concat();
    let errors = world.omsign_fails(1, &arguments)?;
    ensure!(
        errors.contains(&format!("{} digests", files - 1)) && errors.contains("changed: config.json"),
        "{errors}"
    );
    let failed = world.omsign(&[&arguments[..], &["--json"]].concat())?;
    let failed: serde_json::Value = serde_json::from_slice(&failed.stdout)?;
    ensure!(failed["digests_from_cache"] == files - 1, "{failed}");
    content[0] ^= 1;
    fs::write(&config, &content)?;
    // Half a cache is none.
    let cache = caches()?.next().context("a cache")??.path();
    let whole = fs::read(&cache)?;
    fs::write(&cache, whole.get(..whole.len() / 2).context("half")?)?;
    ensure!(from_cache("--digest-cache")? == 0);
    ensure!(world.omsign_ok(&["cache", "clear"])? == "forgot the digests of 1 model\n");
    ensure!(world.omsign_ok(&["cache", "clear"])? == "forgot the digests of 0 models\n");
    // Nothing in a cache's place is waited for, and all of it can be forgotten.
    for odd in
        ["mkfifo -m 600 $f", "mkdir -m 700 $f", "ln -s / $f", "echo omsign digests 1 >$f; chmod 600 $f"]
    {
        shell(&world, &format!("{later} digest model --digest-cache"))?;
        shell(&world, &format!("f=$(echo .cache/omsign/digests/*); rm $f; {odd}"))?;
        // Some are in the way of a new one.
        shell(&world, &format!("timeout 20 {later} digest model --digest-cache || [ $? -ne 124 ]"))?;
        ensure!(world.omsign_ok(&["cache", "clear"])? == "forgot the digests of 1 model\n", "{odd}");
        ensure!(fs::read_dir(world.path(".cache/omsign/digests"))?.next().is_none(), "{odd} is still there");
    }
    // Where caches are may be elsewhere, and what else is there stays there.
    shell(
        &world,
        "mv .cache/omsign/digests moved && ln -s ../../moved .cache/omsign/digests && touch moved/other",
    )?;
    shell(&world, &format!("{later} digest model --digest-cache"))?;
    ensure!(from_cache("--digest-cache")? == files && world.path("moved/other").is_file());
    ensure!(world.omsign_ok(&["cache", "clear"])? == "forgot the digests of 1 model\n");
    ensure!(world.path("moved/other").is_file(), "it is not ours");
    shell(&world, "rm .cache/omsign/digests && touch .cache/omsign/digests")?;
    let arguments = [&["sign", "model", "--digest-cache"], &KEY[..]].concat();
    world.omsign_refuses(2, &arguments, &["File exists", "hint: there has to be a directory"])?;
    shell(&world, "rm .cache/omsign/digests && mv moved .cache/omsign/digests")?;
    // Whoever else can write to it would decide what is signed.
    fs::set_permissions(world.path(".cache/omsign/digests"), PermissionsExt::from_mode(0o777))?;
    world.omsign_refuses(2, &arguments, &["can be written by, somebody else", "hint: "])
}

/// A program that has a file mapped changes its times once, and writes on.
#[test]
fn the_cache_and_files_that_are_mapped() -> anyhow::Result<()> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let world = World::new()?;
    let writes = "import mmap, sys\nwith open(sys.argv[1], 'r+b') as f:\n  m = mmap.mmap(f.fileno(), 0)\n  \
                  for line in sys.stdin:\n    m[0] = ord(line[0])\n    print('written', flush=True)\n";
    // On a disk, and where the times of a mapped file never change.
    for (model, remembers) in [(world.path("model"), true), (tempfile::tempdir_in("/dev/shm")?.keep(), false)]
    {
        fs::create_dir_all(&model)?;
        fs::write(model.join("weights"), "0123456789")?;
        let mut writer = Command::new("python3");
        writer.args(["-c", writes]).arg(model.join("weights"));
        let mut writer =
            writer.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn()?;
        let mut said = BufReader::new(writer.stdout.take().context("its output")?).lines();
        let mut write = |what: &str| -> anyhow::Result<()> {
            writeln!(writer.stdin.as_mut().context("its input")?, "{what}")?;
            ensure!(said.next().context("an answer")?? == "written");
            Ok(())
        };
        let digest =
            |flag: &str| run(&world, &format!("faketime -f +1h omsign digest '{}' {flag}", text(&model)));
        write("a")?;
        let first = digest("--digest-cache")?;
        ensure!(first.status.success());
        let warned = String::from_utf8_lossy(&first.stderr)
            .contains("is on a file system that does not say when a mapped file is written to");
        ensure!(warned != remembers, "{first:?}");
        let again = digest("--digest-cache")?;
        let note = String::from_utf8_lossy(&again.stderr);
        ensure!(note.contains("1 digest (10 bytes) came from the digest cache") == remembers, "{note}");
        write("b")?;
        let second = digest("--digest-cache")?.stdout;
        ensure!(second == digest("")?.stdout && second != first.stdout, "{model:?}");
        write("c")?;
        ensure!(digest("--digest-cache")?.stdout != second, "{model:?}");
        drop(writer.stdin.take());
        writer.wait()?;
        if !remembers {
            fs::remove_dir_all(&model)?;
        }
    }
    Ok(())
}

/// Whoever tries again need not hash again what was hashed before it failed.
#[test]
fn the_cache_after_a_failure() -> anyhow::Result<()> {
    let world = world()?;
    // The longest are hashed first, one at a time with this kernel on any CPU, so that the short one fails when the long
    // one is done and the writer had its turn for sure.
    world.write("model/long", "")?;
    fs::OpenOptions::new().write(true).open(world.path("model/long"))?.set_len(1 << 30)?;
    world.write("model/odd", "x")?;
    let digest = "OMSIGN_HASH_KERNEL=openssl faketime -f +1h omsign digest model --digest-cache --jobs 1";
    let script = format!(
        "(while :; do printf x >> model/odd; done) & trap \"kill $!\" EXIT; ! {digest} 2> errors && grep -q 'odd changed' errors"
    );
    shell(&world, &script)?;
    fs::remove_file(world.path("model/odd"))?;
    let output = run(&world, digest)?;
    let note = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && note.contains(" came from the digest cache"), "{note}");
    Ok(())
}

/// Where what an overlay shows really is, nobody can tell.
#[test]
fn the_cache_and_overlays() -> anyhow::Result<()> {
    let world = world()?;
    let script = "mkdir more shown; mount -t overlay overlay -o lowerdir=$PWD/model:$PWD/more shown; \
                  \"$0\" digest shown --digest-cache 2>&1";
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "--mount", "sh", "-ec", script]).arg(built("omsign")?);
    world.without_surprises(unshare.current_dir(world.path("")));
    let output = unshare.output().context("unshare (apt: util-linux)")?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    let told = said.contains("does not say when a mapped file is written to");
    ensure!(output.status.success() && told, "{said}");
    Ok(())
}

/// Nobody writes to it, and nobody waits for that.
#[test]
fn a_pipe_is_no_model() -> anyhow::Result<()> {
    let world = world()?;
    for more in ["", "--digest-cache"] {
        let output = run(
            &world,
            &format!("mkfifo -m 600 pipe-{0} && timeout 20 omsign digest pipe-{0} {more}", more.len()),
        )?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(
            output.status.code() == Some(2) && errors.contains("neither a file nor a directory"),
            "{errors}"
        );
    }
    Ok(())
}
