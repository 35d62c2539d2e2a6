//! A model to hash, a key to sign it with, and scripts around it.

use std::fs::File;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use rustix::fs::inotify;

use crate::agent::eventually;
use crate::world::World;

/// How it is signed.
pub const KEY: [&str; 2] = ["--private-key", "k.pem"];
/// And verified.
pub const VERIFY: [&str; 4] = ["--public-key", "k.pub", "--signature", "model.sig"];

/// A PEM key `k.pem`, `k.pub`, and a model of files of many sizes, one of them with colons in its name.
pub fn world() -> anyhow::Result<World> {
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
pub fn shell(world: &World, script: &str) -> anyhow::Result<String> {
    let output = run(world, script)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {errors}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a script with `omsign` on the PATH.
pub fn run(world: &World, script: &str) -> anyhow::Result<Output> {
    let mut command = Command::new("sh");
    world.without_surprises(&mut command);
    let binaries = built("omsign")?;
    let binaries = binaries.parent().context("a directory")?;
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH")?);
    Ok(command.args(["-euc", script]).env("PATH", path).current_dir(world.path("")).output()?)
}

/// Runs `omsign` on the model `model` with a file more that takes it long, and does something when it is at that file.
pub fn while_it_hashes(
    world: &World,
    arguments: &[&str],
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Output> {
    let long = world.path("model/long");
    // Hashing takes far longer than it takes to see that it has begun.
    File::create(&long)?.set_len(1 << 30)?;
    let opened = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&opened, &long, inotify::WatchFlags::OPEN)?;
    let mut omsign = Command::new(built("omsign")?);
    world.without_surprises(omsign.args(arguments).current_dir(world.path("")));
    let hashing = omsign.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    eventually("the hashing", || Ok(rustix::io::read(&opened, &mut [0; 256]).is_ok()))?;
    meanwhile()?;
    Ok(hashing.wait_with_output()?)
}

/// Signs it.
pub fn sign(world: &World, more: &[&str]) -> anyhow::Result<()> {
    world.omsign_ok(&[&["sign", "model"], &KEY[..], more].concat()).map(drop)
}

/// Verifies it; returns what was said.
pub fn verify(world: &World, more: &[&str]) -> anyhow::Result<String> {
    world.omsign_ok(&[&["verify", "model"], &VERIFY[..], more].concat())
}

/// The predicate of `model.sig`.
pub fn inspect(world: &World) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_str(&world.omsign_ok(&["inspect", "model.sig", "--json"])?)?)
}
