//! A model that was hashed for hours is not hashed again because its key was away for a second.

use std::fs::File;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::KeyType;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::world::{World, key_section, token_section};

const GONE: &str = "C_Sign 32 0\n";

struct Desk {
    world: World,
    proxy: FaultProxy,
    config: String,
}

fn desk() -> anyhow::Result<Desk> {
    let world = World::new()?;
    world.model()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    Ok(Desk { world, proxy, config })
}

impl Desk {
    /// An agent whose key has signed once.
    fn agent(&self) -> anyhow::Result<Agent> {
        let agent = Agent::start(&self.world, &self.config)?;
        self.world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "first.sig"])?;
        Ok(agent)
    }

    fn signs(&self, wait: &str) -> anyhow::Result<Child> {
        let mut sign = Command::new(built("omsign")?);
        sign.args(["sign", "model", "--key", "k", "--json"]).current_dir(self.world.path(""));
        self.world.without_surprises(&mut sign);
        sign.env("OMSIGN_WAIT", wait).stdout(File::create(self.world.path("said"))?);
        Ok(sign.stderr(File::create(self.world.path("errors"))?).spawn()?)
    }

    fn said(&self, file: &str) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.world.path(file))?)
    }

    fn waits(&self) -> anyhow::Result<()> {
        eventually("its wait", || Ok(self.said("errors")?.contains("; asking again for 20 s")))
    }

    /// Signatures that were made since the first.
    fn signatures(&self) -> anyhow::Result<usize> {
        Ok(self.world.audit()?.iter().filter(|entry| entry["outcome"] == "signed").count() - 1)
    }
}

#[test]
fn a_device_that_is_away() -> anyhow::Result<()> {
    let desk = desk()?;
    let _agent = desk.agent()?;
    desk.proxy.set(GONE)?;
    let mut sign = desk.signs("20")?;
    desk.waits()?;
    eventually("more than one try", || Ok(desk.proxy.injected("C_Sign") > 2))?;
    desk.proxy.set("")?;
    ensure!(sign.wait()?.success(), "{}", desk.said("errors")?);
    ensure!(desk.said("errors")?.matches("asking again").count() == 1, "{}", desk.said("errors")?);
    ensure!(desk.signatures()? == 1 && desk.world.path("model.sig").exists());
    Ok(())
}

#[test]
fn an_agent_that_is_restarted() -> anyhow::Result<()> {
    let desk = desk()?;
    let agent = desk.agent()?;
    desk.proxy.set(GONE)?;
    let mut sign = desk.signs("20")?;
    desk.waits()?;
    drop(agent);
    desk.proxy.set("")?;
    let _agent = Agent::start(&desk.world, &desk.config)?;
    ensure!(sign.wait()?.success(), "{}", desk.said("errors")?);
    ensure!(desk.signatures()? == 1 && desk.world.path("model.sig").exists());
    Ok(())
}

/// Whoever hears nothing any more does not know what became of it.
#[test]
fn an_agent_that_dies_at_work() -> anyhow::Result<()> {
    let desk = desk()?;
    let agent = desk.agent()?;
    desk.proxy.set("C_Sign 0 60000\n")?;
    let mut sign = desk.signs("20")?;
    eventually("its request", || Ok(desk.proxy.injected("C_Sign") > 0))?;
    drop(agent);
    desk.proxy.set("")?;
    desk.waits()?;
    let _agent = Agent::start(&desk.world, &desk.config)?;
    ensure!(sign.wait()?.success(), "{}", desk.said("errors")?);
    ensure!(desk.signatures()? == 1 && desk.world.path("model.sig").exists());
    Ok(())
}

#[test]
fn what_does_not_pass_is_said_at_once() -> anyhow::Result<()> {
    let desk = desk()?;
    let _agent = desk.agent()?;
    desk.proxy.set(GONE)?;
    let mut sign = desk.signs("5")?;
    ensure!(sign.wait()?.code() == Some(2) && desk.said("said")?.contains("\"retry\":true"));
    ensure!(desk.said("errors")?.contains("asking again for 5 s"), "{}", desk.said("errors")?);
    // CKR_KEY_FUNCTION_NOT_PERMITTED
    desk.proxy.set("")?;
    eventually("its way back", || Ok(desk.world.status()?.contains("token t: ready")))?;
    desk.proxy.set("C_SignInit 68 0\n")?;
    let started = Instant::now();
    let mut sign = desk.signs("3600")?;
    ensure!(sign.wait()?.code() == Some(2) && desk.said("said")?.contains("\"retry\":false"));
    ensure!(started.elapsed() < Duration::from_secs(60) && !desk.world.path("model.sig").exists());
    Ok(())
}
