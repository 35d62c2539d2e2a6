//! Trust policies while others change them: what was checked of one is what counts, and no change is lost.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_tests::hashed::shell;
use omsign_tests::world::World;

fn key(world: &World, name: &str) -> anyhow::Result<()> {
    shell(world, &format!("openssl ecparam -name prime256v1 -genkey -noout -out {name}.key"))?;
    shell(world, &format!("openssl ec -in {name}.key -pubout -out {name}.pub 2>&1")).map(drop)
}

fn start(world: &World, directory: &str, arguments: &[&str]) -> anyhow::Result<Child> {
    let mut command = Command::new(built("omsign")?);
    command.args(arguments).current_dir(world.path(directory)).stderr(Stdio::piped()).stdout(Stdio::piped());
    world.without_surprises(&mut command);
    Ok(command.spawn()?)
}

/// Signers are added and removed at once: nobody's change is lost, and who is removed is not trusted.
#[test]
fn changes_at_the_same_moment() -> anyhow::Result<()> {
    let world = World::new()?;
    key(&world, "k")?;
    world.omsign_ok(&["trust", "add", "gone", "--public-key", "k.pub"])?;
    let names: Vec<String> = (0..6).map(|index| format!("signer-{index}")).collect();
    let mut running = vec![start(&world, "", &["trust", "remove", "gone"])?];
    for name in &names {
        running.push(start(&world, "", &["trust", "add", name, "--public-key", "k.pub"])?);
    }
    for child in running {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
    }
    let listed = world.omsign_ok(&["trust", "list"])?;
    let mut found: Vec<_> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    found.sort_unstable();
    let mut expected: Vec<_> = names.iter().map(String::as_str).collect();
    expected.sort_unstable();
    ensure!(found == expected, "{listed}");
    Ok(())
}

/// Whoever may write to a project's directory puts another policy in the place of the one that was allowed, right when
/// it is looked at.
#[test]
fn another_policy_after_the_look_at_it() -> anyhow::Result<()> {
    let world = World::new()?;
    for name in ["release", "evil"] {
        key(&world, name)?;
        world.write(
            &format!("project/{name}.toml"),
            format!("[signer.{name}]\npublic_key = '../../{name}.pub'\n"),
        )?;
    }
    world.write("project/model/w", "weights")?;
    world.omsign_ok(&[
        "sign",
        "project/model",
        "--private-key",
        "evil.key",
        "--signature",
        "project/model/model.sig",
    ])?;
    let policy = world.path("project/.omsign/trust.toml");
    fs::create_dir(world.path("project/.omsign"))?;
    fs::copy(world.path("project/release.toml"), &policy)?;
    world.omsign_ok(&["trust", "allow", "project"])?;
    let verify = || -> anyhow::Result<_> {
        let output = start(&world, "project", &["verify", "model"])?.wait_with_output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    ensure!(verify()?.0 == Some(1));
    // By renaming, as fast as one can, for as long as fifty are verified.
    let aside = world.path("project/aside.toml");
    let both = ["evil", "release"].map(|name| fs::read(world.path(&format!("project/{name}.toml"))));
    let [evil, release] = both.map(|policy| policy.expect("written above"));
    let stop = AtomicBool::new(false);
    let accepted = thread::scope(|scope| -> anyhow::Result<usize> {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for text in [&evil, &release] {
                    let swapped = fs::write(&aside, text).and_then(|()| fs::rename(&aside, &policy));
                    assert!(swapped.is_ok(), "{swapped:?}");
                }
            }
        });
        let accepted = (0..50).map(|_| Ok(verify()?.0 == Some(0))).collect::<anyhow::Result<Vec<bool>>>();
        stop.store(true, Ordering::Relaxed);
        Ok(accepted?.into_iter().filter(|accepted| *accepted).count())
    })?;
    ensure!(accepted == 0, "{accepted} of 50");
    // Of another policy nothing is opened that it names, and nobody waits for a pipe in its place.
    let begun = Instant::now();
    fs::write(&policy, "[signer.endless]\npublic_key = '/dev/zero'\n")?;
    let changed = |(code, errors): (Option<i32>, String)| {
        code == Some(2) && errors.contains("is not what it was when you allowed it")
    };
    ensure!(changed(verify()?));
    fs::remove_file(&policy)?;
    shell(&world, "mkfifo project/.omsign/trust.toml")?;
    ensure!(changed(verify()?));
    // Nor for one in the place of what it names.
    fs::remove_file(&policy)?;
    fs::rename(world.path("release.pub"), world.path("project/.omsign/release.pub"))?;
    fs::write(&policy, "[signer.release]\npublic_key = 'release.pub'\n")?;
    world.omsign_ok(&["trust", "allow", "project"])?;
    shell(&world, "cd project/.omsign && rm release.pub && mkfifo release.pub")?;
    let (code, errors) = verify()?;
    ensure!(code == Some(2) && errors.contains("release.pub: it is no regular file"), "{errors}");
    ensure!(begun.elapsed() < Duration::from_secs(60), "it waited, or read all there is");
    // A key has an end, too.
    world.omsign_refuses(
        2,
        &["verify", "project/model", "--public-key", "/dev/zero"],
        &["cannot read /dev/zero: file too large"],
    )
}
