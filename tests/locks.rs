//! Tokens that an operator locks: nothing is signed with them until one unlocks them, whoever starts the agent again.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::{KeyType, PIN};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::{does, refuses, typing};
use omsign_tests::world::{World, key_section, token_section};

const LOCK: [&str; 3] = ["agent", "lock", "t"];
const UNLOCK: [&str; 3] = ["agent", "unlock", "t"];
const SIGN: [&str; 4] = ["sign", "model", "--key", "k"];

fn refuses_to_sign(world: &World) -> anyhow::Result<()> {
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("key k cannot sign: an operator locked it at 2"), "{errors}");
    ensure!(errors.contains("omsign agent unlock t"), "{errors}");
    Ok(())
}

#[test]
fn until_it_is_unlocked() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, calm) = (world.token("t", "k", KeyType::P256)?, world.token("calm", "calm", KeyType::P256)?);
    let section = token_section("t", &token, "");
    let tokens = section.clone() + &token_section("calm", &calm, "");
    let config =
        world.listen() + &tokens + &key_section("k", "t", "k") + &key_section("calm", "calm", "calm");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&SIGN)?;
    ensure!(agent.hosts()?.len() == 2);
    let said = world.omsign_ok(&LOCK)?;
    ensure!(said == "token t is locked\n", "{said}");
    ensure!(agent.hosts()?.len() == 1, "another program finds the device free");
    refuses_to_sign(&world)?;
    ensure!(world.status()?.contains("token t: locked: an operator locked it at 2"), "{}", world.status()?);
    world.omsign_ok(&["sign", "model", "--key", "calm", "--signature", "calm.sig"])?;
    // As often as somebody says so, and by no key of it.
    world.omsign_ok(&LOCK)?;
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "an operator locked it at 2")?;
    // Neither another configuration nor another agent opens it.
    world.write("agent.toml", config.clone() + &key_section("more", "t", "k"))?;
    does(&world, &["reload"])?;
    eventually("the new token", || Ok(world.status()?.contains("token t: locked: an operator locked it")))?;
    world.write("agent.toml", config.replace("[token.t]\n", "[token.t]\nrequired = true\n"))?;
    ensure!(agent.stop()?.success());
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "an operator locked it at 2")?;
    let (status, report) = world.doctor()?;
    ensure!(status.code() == Some(1) && report.contains("an operator locked it at 2"), "{report}");
    let agent = Agent::start(&world, &std::fs::read_to_string(world.path("agent.toml"))?)?;
    refuses_to_sign(&world)?;
    let said = world.omsign_ok(&UNLOCK)?;
    ensure!(said == "token t is unlocked\n", "{said}");
    world.omsign_ok(&SIGN)?;
    ensure!(agent.stop()?.success());
    let _agent = Agent::start(&world, &config)?;
    world.omsign_ok(&SIGN)?;
    let audit = world.audit()?;
    let of = |action: &str, outcome: &str| {
        let is = |entry: &&serde_json::Value| entry["action"] == action && entry["outcome"] == outcome;
        audit.iter().filter(is).filter(|entry| entry["key"] == "t" && entry["rule"].is_string()).count()
    };
    ensure!(of("lock", "locked") == 2 && of("unlock", "unlocked") == 1, "{audit:?}");
    Ok(())
}

/// Its twin signs; once both are locked nobody does.
#[test]
fn of_two_tokens_the_other_one_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = world.twins()?;
    let both = key_section("k", "a", "k").replace("token = \"a\"", "token = [\"a\", \"b\"]");
    let config = world.listen() + &token_section("a", &first, "") + &token_section("b", &second, "") + &both;
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["agent", "lock", "a"])?;
    for _ in 0..3 {
        world.omsign_ok(&SIGN)?;
    }
    let audit = world.audit()?;
    let signed = audit.iter().filter(|entry| entry["outcome"] == "signed" && entry["token"] == "b").count();
    ensure!(signed == 3, "{audit:?}");
    world.omsign_ok(&["agent", "lock", "b"])?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("an operator locked it"), "{errors}");
    Ok(())
}

/// What has begun is finished first; what comes later is refused.
#[test]
fn while_it_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, ""))?;
    let _agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    world.omsign_ok(&SIGN)?;
    proxy.set("C_Sign 0 700\n")?;
    std::thread::scope(|scope| {
        let signs = scope.spawn(|| world.omsign_ok(&SIGN));
        eventually("a signature that takes its time", || Ok(proxy.injected("C_Sign") > 0))?;
        world.omsign_ok(&LOCK)?;
        signs.join().map_err(|_| anyhow::anyhow!("a panic"))?.context("the one that had begun")
    })?;
    refuses_to_sign(&world)
}

/// Nobody waits for a device that does not answer: its process is ended as any other that hangs.
#[test]
fn while_its_device_hangs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, "timeout = \"1s\""))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    world.omsign_ok(&SIGN)?;
    proxy.set("C_Sign 0 600000\n")?;
    std::thread::scope(|scope| {
        let signs = scope.spawn(|| world.omsign_fails(2, &SIGN));
        eventually("a signature that never comes", || Ok(proxy.injected("C_Sign") > 0))?;
        world.omsign_ok(&LOCK)?;
        ensure!(agent.hosts()?.is_empty(), "its process is left");
        signs.join().map_err(|_| anyhow::anyhow!("a panic"))?.map(drop)
    })?;
    refuses_to_sign(&world)?;
    proxy.set("")?;
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN).map(drop)
}

/// A typed PIN opens it for whoever unlocks it, and not for whoever wants something else of it.
#[test]
fn where_a_person_types_the_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let section = token_section("t", &token, "").replace(&file, "pin = \"prompt\"");
    ensure!(section.contains("prompt"), "{section}");
    let config = world.listen() + &section + &key_section("k", "t", "k");
    world.model()?;
    let unlock = || -> anyhow::Result<()> {
        let mut unlock = std::process::Command::new(omsign_fixtures::built("omsign")?);
        world.without_surprises(unlock.args(UNLOCK).arg("--pin-stdin"));
        let unlocked = typing(&mut unlock, &format!("{PIN}\n"))?;
        ensure!(unlocked.status.success(), "{unlocked:?}");
        Ok(())
    };
    let agent = Agent::start(&world, &config)?;
    unlock()?;
    world.omsign_ok(&SIGN)?;
    world.omsign_ok(&LOCK)?;
    refuses_to_sign(&world)?;
    ensure!(agent.stop()?.success());
    let _agent = Agent::start(&world, &config)?;
    refuses_to_sign(&world)?;
    unlock()?;
    world.omsign_ok(&SIGN).map(drop)
}

/// It is locked all the same, and whoever did it is told what is not so.
#[test]
fn where_nothing_can_be_kept() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = world.agent_and_model()?;
    world.omsign_ok(&SIGN)?;
    let in_the_way = world.path("audit/locked-t.new");
    std::fs::create_dir(&in_the_way)?;
    let errors = world.omsign_fails(2, &LOCK)?;
    ensure!(errors.contains("it is locked, but an agent that is started again would open it"), "{errors}");
    refuses_to_sign(&world)?;
    std::fs::remove_dir(&in_the_way)?;
    world.omsign_ok(&LOCK)?;
    ensure!(agent.stop()?.success());
    // Nor is it opened by an agent that cannot tell.
    let (lock, elsewhere) = (world.path("audit/locked-t"), world.path("elsewhere"));
    ensure!(std::fs::metadata(&lock)?.permissions().mode() & 0o777 == 0o600);
    std::fs::rename(&lock, &elsewhere)?;
    std::os::unix::fs::symlink(&elsewhere, &lock)?;
    let _agent = Agent::start(&world, &std::fs::read_to_string(world.path("agent.toml"))?)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("whether an operator locked it cannot be told: "), "{errors}");
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN)?;
    ensure!(!lock.exists() && elsewhere.exists());
    Ok(())
}

/// Only operators do, and only what there is.
#[test]
fn by_somebody_else() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    let errors = world.omsign_fails(2, &["agent", "lock", "nowhere"])?;
    ensure!(errors.contains("no token \"nowhere\" is configured"), "{errors}");
    ensure!(agent.stop()?.success());
    world.tls("lab")?;
    let tls = "\n[listen.tls]\naddress = \"127.0.0.1:0\"\ncertificate = \"lab-server.pem\"\n\
               private_key = \"lab-server.key\"\nclient_ca = \"lab-ca.pem\"\n";
    let agent = Agent::start(&world, &(config + tls))?;
    let url = agent.tls_url()?;
    let mut arguments = LOCK.to_vec();
    arguments.extend(["--agent", &url, "--agent-ca", "lab-ca.pem"]);
    arguments.extend(["--agent-certificate", "lab-client.pem", "--agent-key", "lab-client.key"]);
    let errors = world.omsign_fails(2, &arguments)?;
    ensure!(errors.contains("you are not allowed to lock t"), "{errors}");
    ensure!(errors.contains("hint: ask whoever runs the agent for an [[operator]] rule"), "{errors}");
    let audit = world.audit()?;
    let denied = audit.last().context("an entry")?;
    ensure!(denied["action"] == "lock" && denied["outcome"] == "denied" && denied["key"] == "t", "{denied}");
    world.omsign_ok(&SIGN).map(drop)
}
