//! Hashing now and signing later: manifests, of a model and of its parts, and lists of `sha256sum`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context as _, ensure};
use omsign_tests::hashed::{KEY, inspect, run, shell, sign, verify, world};
use omsign_tests::world::text;

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
    // What the reference calls the only file.
    shell(
        &world,
        "omsign digest model/config.json --json | sed 's/\"name\": *\"config.json\"/\"name\":\".\"/' > dot.json",
    )?;
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
    // One byte in the middle of a file, as of a configuration that somebody edited.
    shell(
        &world,
        &format!(
            "cp first/big.bin model/big.bin; printf x | dd of=model/big.bin bs=1 seek=1000001 conv=notrunc 2>dd.txt;
             omsign digest model --part 2/3 --json {more} > edited-2.json; rm -r model; mv first model"
        ),
    )?;
    for other in ["retrained-2.json", "edited-2.json"] {
        refuse(
            &["part-1.json", other, "part-3.json"],
            "are of different models: their files have other names, sizes or content",
        )?;
    }
    // What it says of its size is what its shards have.
    shell(
        &world,
        "sed 's/\"bytes\":[0-9]*/\"bytes\":17/' part-2.json > sized-2.json; ! cmp -s part-2.json sized-2.json",
    )?;
    refuse(&["part-1.json", "sized-2.json", "part-3.json"], "and not 17 as it says")?;
    refuse(&["dot.json"], "it calls a file \".\": give its name")?;
    refuse(&["part-1.json", "part-3.json"], "part 2 of 3 is in none of the files")?;
    refuse(&["part-1.json", "part-2.json", "part-2.json", "part-3.json"], "are the same part of the model")?;
    shell(&world, "omsign digest model --part 3/3 --json > other.json")?;
    refuse(&["part-1.json", "part-2.json", "other.json"], "were made with different options")?;
    shell(&world, &format!("omsign digest model --part 3/3 --json {more} --model-name m2 > other.json"))?;
    refuse(
        &["part-1.json", "part-2.json", "other.json"],
        "are of a model called \"model\" and of one called \"m2\"",
    )?;
    refuse(
        &["part-1.json", "part-2.json", "other.json"],
        "--model-name where their directory has another name",
    )?;
    shell(&world, &format!("omsign digest model --part 4/4 --json {more} > other.json"))?;
    refuse(&["part-1.json", "part-2.json", "other.json"], "are one of 3 parts and one of 4")?;
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
             until ls -l /proc/$!/fd | grep -q model/long; do kill -0 $! || exit 3; done; {change}; wait $! || {{ cat errors >&2; exit 2; }}"
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

/// Made over the bundle of last time, too.
#[test]
fn a_list_that_has_the_bundle() -> anyhow::Result<()> {
    let world = world()?;
    shell(&world, "omsign sign model --private-key k.pem --signature model/model.sig")?;
    shell(&world, "cd model && find . -type f -print0 | xargs -0 sha256sum > ../sums")?;
    let signed = "omsign sign --manifest sums --model-name model --private-key k.pem --signature";
    for (bundle, warned) in [("model/model.sig", true), ("elsewhere.sig", false)] {
        let output = run(&world, &format!("{signed} {bundle}"))?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{said}");
        ensure!(
            said.contains("the list has model.sig, which may be the bundle") == warned,
            "{bundle}: {said}"
        );
    }
    Ok(())
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
    fs::remove_file(world.path("model.sig"))?;
    // With options for it, and a path from here; ":" is this machine, without ssh.
    shell(&world, "sh -eu parallel.sh ./model 3 --sshlogin : --jobs 2")?;
    ensure!(inspect(&world)? == expected, "GNU parallel, with its options");
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
    fs::remove_file(world.path("model.sig"))?;
    shell(&world, "omsign sign --manifest parts/part-*.json --private-key k.pem")?;
    // Where it is mounted says nothing of what it is called.
    let signed = inspect(&world)?;
    ensure!(signed["model"] == "my-model" && signed["files"] == expected["files"], "{signed}");
    Ok(())
}
