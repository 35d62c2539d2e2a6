//! How models are hashed: every algorithm and serialization beside other tools, with the cache, in parts, on any kernel.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use omsign_fixtures::built;
use omsign_tests::peer::{reference, succeeded};
use omsign_tests::world::{World, text};

const KEY: [&str; 2] = ["--private-key", "k.pem"];
const VERIFY: [&str; 4] = ["--public-key", "k.pub", "--signature", "model.sig"];

/// A PEM key `k.pem`, `k.pub`, and a model of files of many sizes, one of them with colons in its name.
fn world() -> anyhow::Result<World> {
    let world = World::new()?;
    world.model()?;
    for (name, bytes) in [("big.bin", 5 << 20), ("weights:0:5", 77), ("sub/empty", 0), ("sub/one", 1)] {
        let content: Vec<u8> = (0..bytes).map(|i: usize| (i * 7 + i / 251).to_le_bytes()[0]).collect();
        world.write(&format!("model/{name}"), content)?;
    }
    shell(
        &world,
        "openssl ecparam -name prime256v1 -genkey -noout -out k.pem && openssl ec -in k.pem -pubout -out k.pub",
    )?;
    Ok(world)
}

/// Runs a script with `omsign` on the PATH; it has to succeed.
fn shell(world: &World, script: &str) -> anyhow::Result<String> {
    let output = run(world, script)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {errors}");
    Ok(String::from_utf8(output.stdout)?)
}

fn run(world: &World, script: &str) -> anyhow::Result<Output> {
    let mut command = Command::new("sh");
    world.without_surprises(&mut command);
    let binaries = built("omsign")?;
    let binaries = binaries.parent().context("a directory")?;
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH")?);
    Ok(command.args(["-euc", script]).env("PATH", path).current_dir(world.path("")).output()?)
}

fn sign(world: &World, more: &[&str]) -> anyhow::Result<()> {
    world.omsign_ok(&[&["sign", "model"], &KEY[..], more].concat()).map(drop)
}

fn verify(world: &World, more: &[&str]) -> anyhow::Result<String> {
    world.omsign_ok(&[&["verify", "model"], &VERIFY[..], more].concat())
}

/// The predicate of `model.sig`.
fn inspect(world: &World) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_str(&world.omsign_ok(&["inspect", "model.sig", "--json"])?)?)
}

#[test]
fn every_algorithm_and_serialization_beside_other_tools() -> anyhow::Result<()> {
    let world = world()?;
    for (algorithm, tool) in [("sha256", "sha256sum"), ("blake2b", "b2sum"), ("blake3", "b3sum")] {
        for (shard_size, more) in [(None, &[][..]), (Some(1 << 20), &["--shard-size", "1048576"])] {
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
            // The empty file has no shards.
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

#[test]
fn memory_stays_small_whatever_the_model() -> anyhow::Result<()> {
    let world = World::new()?;
    let write = |name: String, bytes| -> anyhow::Result<()> {
        world.write(&name, "")?;
        Ok(fs::OpenOptions::new().write(true).open(world.path(&name))?.set_len(bytes)?)
    };
    (0..80).try_for_each(|file| write(format!("model/{file}"), 16 << 20))?;
    for more in
        [&["--jobs", "64"][..], &["--jobs", "1"], &["--hash-type", "blake3"], &["--shard-size", "1000000"]]
    {
        world.omsign_ok(&[&["digest", "model"], more].concat())?;
    }
    // As many cores as there can be, and enough files for all their lanes.
    (0..9000).try_for_each(|file| write(format!("many/{}/{file}", file % 10), 9000))?;
    for algorithm in ["sha256", "blake2b", "blake3"] {
        world.omsign_ok(&["digest", "many", "--jobs", "512", "--hash-type", algorithm])?;
    }
    shell(&world, "openssl ecparam -name prime256v1 -genkey -noout -out k.pem")?;
    world.omsign_ok(&["sign", "many", "--private-key", "k.pem", "--digest-cache"])?;
    world.omsign_ok(&["digest", "many", "--json"])?;
    // This process has no other children.
    let kib = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    ensure!(kib <= 64 << 10, "{kib} KiB");
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
    sign(&world, &["--digest-cache"])?;
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
    // Whoever else can write to it would decide what is signed.
    fs::set_permissions(world.path(".cache/omsign/digests"), PermissionsExt::from_mode(0o777))?;
    let arguments = [&["sign", "model", "--digest-cache"], &KEY[..]].concat();
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
    // The longest are hashed first, so that this one fails last.
    world.write("model/odd", "x")?;
    let digest = "faketime -f +1h omsign digest model --digest-cache --jobs 1";
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

#[test]
fn parts_are_signed_together_and_alone_refused() -> anyhow::Result<()> {
    let world = world()?;
    for more in ["", "--shard-size 100000 --hash-type blake3 --ignore-paths sub/one"] {
        shell(
            &world,
            &format!("for i in 1 2 3; do omsign digest model --part $i/3 --json {more} > part-$i.json; done"),
        )?;
        shell(&world, "omsign sign --manifest part-3.json part-1.json part-2.json --private-key k.pem")?;
        let parts = inspect(&world)?;
        verify(&world, &[])?;
        shell(&world, &format!("omsign sign model --private-key k.pem {more}"))?;
        ensure!(inspect(&world)? == parts, "{more}");
        let whole = shell(&world, &format!("omsign digest model --json {more}"))?;
        world.write("whole.json", whole)?;
        shell(&world, "omsign sign --manifest whole.json --private-key k.pem")?;
        ensure!(inspect(&world)? == parts, "{more}");
    }
    let refuse = |manifests: &[&str], expected: &str| {
        world.omsign_refuses(2, &[&["sign", "--manifest"], manifests, &KEY[..]].concat(), &[expected])
    };
    // The same names and sizes, and another content.
    shell(
        &world,
        "cp -r model retrained && head -c 5242880 /dev/urandom > retrained/big.bin && mv model first && mv retrained model",
    )?;
    let more = "--shard-size 100000 --hash-type blake3 --ignore-paths sub/one";
    shell(
        &world,
        &format!(
            "truncate -s $(stat -c %s first/big.bin) model/big.bin; omsign digest model --part 2/3 --json {more} > retrained-2.json"
        ),
    )?;
    shell(&world, "rm -r model && mv first model")?;
    refuse(
        &["part-1.json", "retrained-2.json", "part-3.json"],
        "different models, or were made with different options",
    )?;
    refuse(&["part-1.json", "part-3.json"], "part 2 of 3 is in none of the files")?;
    refuse(&["part-1.json", "part-2.json", "part-2.json", "part-3.json"], "are the same part of the model")?;
    shell(&world, "omsign digest model --part 3/3 --json > other.json")?;
    refuse(
        &["part-1.json", "part-2.json", "other.json"],
        "different models, or were made with different options",
    )?;
    // The model changed between the machines.
    world.write("model/more", "x")?;
    shell(
        &world,
        "omsign digest model --part 2/3 --json --shard-size 100000 --hash-type blake3 --ignore-paths sub/one > p2.json",
    )?;
    refuse(&["part-1.json", "p2.json", "part-3.json"], "different models")?;
    refuse(&["k.pub"], "k.pub is no manifest: line 1 is not of sha256sum")?;
    refuse(&["nowhere.json"], "cannot read nowhere.json")?;
    refuse(&["part-1.json", "--ignore-paths", "sub"], "leave --ignore-paths")?;
    refuse(&["whole.json", "--model-name", "m"], "--model-name is for lists of sha256sum")?;
    let usage = |arguments: &[&str], expected: &str| -> anyhow::Result<()> {
        let errors = world.omsign_fails(2, arguments)?;
        ensure!(errors.contains(expected), "{arguments:?}: {errors}");
        Ok(())
    };
    usage(&["digest", "model", "--part", "3/2", "--json"], "parts are 1/N to N/N")?;
    usage(&["digest", "model", "--part", "1/2"], "--json")?;
    usage(&["sign", "model", "--manifest", "part-1.json", "--key", "k"], "cannot be used with")?;
    usage(
        &["sign", "model", "--serialization", "files", "--shard-size", "5", "--key", "k"],
        "--shard-size is for shards",
    )
}

/// What is signed later has to be there, and to have been there all the time that it was hashed.
#[test]
fn a_manifest_of_a_model_that_changes() -> anyhow::Result<()> {
    let world = world()?;
    let refuses = |script: &str, expected: &str| -> anyhow::Result<()> {
        let output = run(&world, script)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && errors.contains(expected), "{script}: {errors}");
        Ok(())
    };
    let inside = "standard output is a file of the model";
    refuses("omsign digest model --json > model/manifest.json", inside)?;
    refuses("omsign digest model --part 1/2 --json > model/manifest.json", inside)?;
    let (ignored, manifest) = ("--ignore-paths manifest.json", "model/manifest.json");
    shell(&world, &format!("omsign digest model --json {ignored} > {manifest}"))?;
    shell(&world, "omsign sign --manifest - --private-key k.pem < model/manifest.json")?;
    verify(&world, &[])?;
    // One that comes, and one that was hashed already: the longest is read last by one core, and for a while.
    fs::File::create(world.path("model/long"))?.set_len(3 << 30)?;
    for change in ["touch model/comes", "printf x >> model/tokenizer.json"] {
        let script = format!(
            "omsign digest model --part 1/1 --json {ignored} 2> errors > part.json & \
             until ls -l /proc/$!/fd | grep -q model/long; do :; done; {change}; wait $! || {{ cat errors >&2; exit 2; }}"
        );
        refuses(&script, "changed while it was hashed")?;
        ensure!(fs::read(world.path("part.json"))?.is_empty());
    }
    Ok(())
}

#[test]
fn lists_of_sha256sum_are_signed() -> anyhow::Result<()> {
    let world = world()?;
    let list = "cd model && find . -type f -print0 | xargs -0 sha256sum";
    shell(&world, &format!("({list}) > sums; ({list} --tag) > tags"))?;
    for list in ["sums", "tags"] {
        shell(&world, &format!("omsign sign --manifest {list} --model-name model --private-key k.pem"))?;
        ensure!(verify(&world, &[])?.starts_with("verified "));
        let listed = inspect(&world)?;
        sign(&world, &[])?;
        ensure!(inspect(&world)? == listed);
    }
    // It follows links, and escapes what would break its lines.
    std::os::unix::fs::symlink("config.json", world.path("model/link"))?;
    world.write("model/two\nlines", "x")?;
    let list = "cd model && find -L . -type f -print0 | xargs -0 sha256sum";
    shell(
        &world,
        &format!(
            "({list}) | omsign sign --manifest - --model-name model --allow-symlinks --private-key k.pem"
        ),
    )?;
    ensure!(verify(&world, &[])?.starts_with("verified "));
    let arguments = [&["sign", "--manifest", "sums"], &KEY[..]].concat();
    world.omsign_refuses(2, &arguments, &["does not say the model's name: give --model-name"])
}

/// The recipes of docs/many-machines.md, with what starts them where it can be had here, and by hand where not.
#[test]
fn the_recipes_for_many_machines() -> anyhow::Result<()> {
    let world = world()?;
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("many-machines.md");
    let document = fs::read_to_string(document)?;
    let block = |start: &str| {
        let from = document.find(start).context(start.to_owned())?;
        let block = document.get(from + start.len()..).and_then(|rest| rest.split("```").next());
        block.map(str::to_owned).context("a block")
    };
    sign(&world, &[])?;
    let expected = inspect(&world)?;
    fs::remove_file(world.path("model.sig"))?;
    fs::copy(world.path("k.pem"), world.path("key.pem"))?;

    world.write("parallel.sh", block("```sh\nset -eu\n")?)?;
    shell(&world, "sh -eu parallel.sh model 5")?;
    ensure!(inspect(&world)? == expected, "GNU parallel");
    // Whatever the model is called.
    let odd = "it's; $(touch executed) \"x\"";
    fs::rename(world.path("model"), world.path(odd))?;
    world.write("odd.sh", "exec sh -eu parallel.sh \"$(cat name)\" 2")?;
    world.write("name", odd)?;
    shell(&world, "sh -eu odd.sh")?;
    ensure!(!world.path("executed").exists() && inspect(&world)?["files"] == expected["files"], "{odd}");
    fs::rename(world.path(odd), world.path("model"))?;
    // A part that fails leaves nothing signed.
    fs::remove_file(world.path("model.sig"))?;
    ensure!(
        !run(&world, "sh -eu parallel.sh nowhere 3")?.status.success() && !world.path("model.sig").exists()
    );

    world.write("digest.sh", block("```sh\n#!/bin/sh\n")?)?;
    // The lines that start it, by a stand-in for sbatch that knows what they use of it.
    let lines =
        document.rsplit("```").next().context("the end")?.lines().filter(|line| line.starts_with("    "));
    let lines: Vec<_> = lines.map(|line| line.trim().replace("/scratch/model", "model")).collect();
    world.write(
        "bin/sbatch",
        "#!/bin/sh\nset -eu\nwhile :; do case $1 in --array=*) array=${1#*=} ;; --wrap) exec sh -euc \"$2\" ;; \
         --*) ;; *) break ;; esac; shift; done\nfor i in $(seq ${array%-*} ${array#*-}); do \
         SLURM_ARRAY_TASK_ID=$i SLURM_CPUS_PER_TASK=2 sh \"$@\"; done\necho 42\n",
    )?;
    fs::set_permissions(world.path("bin/sbatch"), PermissionsExt::from_mode(0o755))?;
    ensure!(lines.len() == 2, "{lines:?}");
    let lines = lines.join("\n").replace("--key release", "--private-key k.pem");
    shell(&world, &format!("PATH=$PWD/bin:$PATH\n{lines}"))?;
    ensure!(inspect(&world)? == expected, "Slurm");
    // One part once more.
    shell(&world, "PATH=$PWD/bin:$PATH; rm part-3.json model.sig; sbatch --array=3 digest.sh model 8")?;
    shell(&world, "omsign sign --manifest part-*.json --private-key k.pem")?;
    ensure!(inspect(&world)? == expected, "Slurm, a part once more");

    world.write("job.yaml", block("```yaml\n")?)?;
    // Debian's own Python, which has the package.
    let job = shell(
        &world,
        "/usr/bin/python3 -c 'import json, yaml; print(json.dumps(yaml.safe_load(open(\"job.yaml\"))))'",
    )?;
    let job: serde_json::Value = serde_json::from_str(&job)?;
    let (spec, pod) = (&job["spec"], &job["spec"]["template"]["spec"]["containers"][0]);
    let pods = spec["completions"].as_u64().context("completions")?;
    ensure!(
        job["kind"] == "Job" && spec["completionMode"] == "Indexed" && spec["parallelism"] == pods,
        "{job}"
    );
    let (model, parts) = (text(&world.path("model")), text(&world.path("parts")));
    fs::create_dir(world.path("parts"))?;
    for index in 0..pods {
        let words =
            ["command", "args"].map(|part| pod[part].as_array().cloned().unwrap_or_default()).concat();
        let words = words.iter().filter_map(serde_json::Value::as_str);
        let words =
            words.map(|word| word.replace("/model", &model).replace("/parts", &parts).replace('\'', "'\\''"));
        let words = words.map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
        shell(&world, &format!("JOB_COMPLETION_INDEX={index} {words}"))?;
    }
    shell(&world, "omsign sign --manifest parts/part-*.json --private-key k.pem")?;
    ensure!(inspect(&world)? == expected, "Kubernetes");
    Ok(())
}

#[test]
fn progress_is_shown_to_people_only() -> anyhow::Result<()> {
    let world = World::new()?;
    world.write("model/w", "")?;
    fs::OpenOptions::new().write(true).open(world.path("model/w"))?.set_len(1 << 30)?;
    let digest = world.omsign_ok(&["digest", "model"])?;
    // On a terminal, a bar, which is taken away again.
    let terminal = shell(&world, "script -qec 'omsign digest model' /dev/null")?;
    ensure!(
        terminal.contains("1.00 GiB") && terminal.contains("left") && terminal.contains(digest.trim()),
        "{terminal}"
    );
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
    Ok(())
}
