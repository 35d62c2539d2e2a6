//! Tokens that an operator locks: nothing is signed with them until one unlocks them, whoever starts the agent again.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::{KeyType, PIN, SO_PIN};
use omsign_tests::agent::{Agent, eventually, signal};
use omsign_tests::disk::{self, Filler};
use omsign_tests::operator::{does, key, refuses, typing, unblocking};
use omsign_tests::world::{World, key_section, token_section};
use rustix::process::Signal;

const LOCK: [&str; 3] = ["agent", "lock", "t"];
const UNLOCK: [&str; 3] = ["agent", "unlock", "t"];
const SIGN: [&str; 4] = ["sign", "model", "--key", "k"];

fn refuses_to_sign(world: &World) -> anyhow::Result<()> {
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("key k cannot sign: an operator locked it at 2"), "{errors}");
    ensure!(errors.contains("omsign agent unlock"), "{errors}");
    Ok(())
}

/// Where it is kept that it is locked.
fn kept(world: &World) -> PathBuf {
    world.path("audit/locked-t.json")
}

/// A token `t` with a key `k`, behind a proxy, and a model.
fn behind_proxy(more: &str) -> anyhow::Result<(World, FaultProxy, String)> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, more))?;
    world.model()?;
    let config = world.listen() + &section + &key_section("k", "t", "k");
    Ok((world, proxy, config))
}

#[test]
fn until_it_is_unlocked() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, calm) = (world.token("t", "k", KeyType::P256)?, world.token("calm", "calm", KeyType::P256)?);
    let tokens = token_section("t", &token, "") + &token_section("calm", &calm, "");
    let config =
        world.listen() + &tokens + &key_section("k", "t", "k") + &key_section("calm", "calm", "calm");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&SIGN)?;
    ensure!(agent.hosts()?.len() == 2);
    let said = world.omsign_ok(&LOCK)?;
    ensure!(said == "token t is locked\n", "{said}");
    ensure!(agent.host_of("t")?.is_none(), "another program finds the device free");
    refuses_to_sign(&world)?;
    ensure!(world.status()?.contains("token t: locked: an operator locked it at 2"), "{}", world.status()?);
    world.omsign_ok(&["sign", "model", "--key", "calm", "--signature", "calm.sig"])?;
    // As often as somebody says so, and by no key of it.
    world.omsign_ok(&LOCK)?;
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "an operator locked it at 2")?;
    // Neither another configuration nor another agent opens it.
    world.write("agent.toml", config.clone() + &key_section("more", "t", "k"))?;
    does(&world, &["reload"])?;
    refuses_to_sign(&world)?;
    world.write("agent.toml", config.replace("[token.t]\n", "[token.t]\nrequired = true\n"))?;
    ensure!(agent.stop()?.success());
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "an operator locked it at 2")?;
    let (status, report) = world.doctor()?;
    ensure!(status.code() == Some(1) && report.contains("an operator locked it at 2"), "{report}");
    let agent = Agent::start(&world, &std::fs::read_to_string(world.path("agent.toml"))?)?;
    refuses_to_sign(&world)?;
    let said = world.omsign_ok(&UNLOCK)?;
    ensure!(said == "token t is unlocked\n" && !kept(&world).exists(), "{said}");
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

/// Its twin signs, also while the one that is locked still is at something; once both are locked nobody does.
#[test]
fn of_two_tokens_the_other_one_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let ((first, second), proxy) = (world.twins()?, world.proxy()?);
    let both = key_section("k", "a", "k").replace("token = \"a\"", "token = [\"a\", \"b\"]");
    let tokens =
        proxy.before(&token_section("a", &first, "timeout = \"40s\""))? + &token_section("b", &second, "");
    let _agent = Agent::start(&world, &(world.listen() + &tokens + &both))?;
    world.model()?;
    world.until_ready()?;
    proxy.set("C_Sign 0 held\n")?;
    std::thread::scope(|scope| {
        let sign = |name: &str| world.omsign_ok(&["sign", "model", "--key", "k", "--signature", name]);
        // In turns: one of them is on the first.
        let signs = ["1.sig", "2.sig"].map(|name| scope.spawn(move || sign(name)));
        eventually("one that takes its time", || Ok(proxy.injected("C_Sign") > 0))?;
        let locks = scope.spawn(|| world.omsign_ok(&["agent", "lock", "a"]));
        eventually("it is locked", || Ok(world.status()?.contains("token a: locked")))?;
        let served = (3..7).try_for_each(|number| sign(&format!("{number}.sig")).map(drop));
        let waits = !locks.is_finished();
        proxy.set("")?;
        served?;
        ensure!(waits, "what had begun was not waited for");
        locks.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        signs
            .into_iter()
            .try_for_each(|signs| signs.join().map_err(|_| anyhow::anyhow!("a panic"))?.map(drop))
    })?;
    world.omsign_ok(&["agent", "lock", "b"])?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("an operator locked it"), "{errors}");
    Ok(())
}

/// Nobody waits for a device that does not answer: its process is ended as any other that hangs.
#[test]
fn while_its_device_hangs() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("timeout = \"4s\"")?;
    let agent = Agent::start(&world, &config)?;
    world.omsign_ok(&SIGN)?;
    proxy.set("C_Sign 0 held\n")?;
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

/// From the moment on at which somebody says so, whatever becomes of the agent then.
#[test]
fn while_it_is_opened() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("")?;
    proxy.set("C_Initialize 0 held\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("it opens", || Ok(proxy.injected("C_Initialize") > 0))?;
    std::thread::scope(|scope| {
        let locks = scope.spawn(|| world.omsign(&LOCK));
        eventually("it is kept", || Ok(kept(&world).exists()))?;
        signal(agent.pid(), Signal::KILL)?;
        locks.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    drop(agent);
    proxy.set("")?;
    let agent = Agent::start(&world, &config)?;
    refuses_to_sign(&world)?;
    // And where it is let be: what was opened meanwhile is closed.
    proxy.set("C_Initialize 0 held\n")?;
    let opened = proxy.calls("C_Initialize");
    std::thread::scope(|scope| {
        let unlocks = scope.spawn(|| world.omsign_fails(2, &UNLOCK));
        eventually("it opens", || Ok(proxy.calls("C_Initialize") > opened))?;
        let before = std::fs::read(kept(&world))?;
        let locks = scope.spawn(|| world.omsign_ok(&LOCK));
        let other = || Ok(std::fs::read(kept(&world))? != before);
        let locked = eventually("it is locked once more", other);
        proxy.set("")?;
        locked?;
        let errors = unlocks.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(errors.contains("an operator locked it at 2"), "{errors}");
        locks.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    ensure!(agent.hosts()?.is_empty());
    refuses_to_sign(&world)
}

/// One that fails ends nothing: whoever has the device may have it.
#[test]
fn an_unlock_that_fails() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("")?;
    let agent = Agent::start(&world, &config)?;
    world.omsign_ok(&SIGN)?;
    world.omsign_ok(&LOCK)?;
    proxy.set("C_GetTokenInfo e0 0\n")?;
    let errors = world.omsign_fails(2, &UNLOCK)?;
    ensure!(errors.contains("token t: "), "{errors}");
    proxy.set("")?;
    refuses_to_sign(&world)?;
    let mut wrong = Command::new(built("omsign")?);
    world.without_surprises(wrong.args(UNLOCK).arg("--pin-stdin"));
    ensure!(!typing(&mut wrong, "wrong-pin-8142\n")?.status.success() && proxy.refused_pins() == 1);
    refuses_to_sign(&world)?;
    ensure!(agent.stop()?.success());
    let _agent = Agent::start(&world, &config)?;
    refuses_to_sign(&world)?;
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN).map(drop)
}

/// Whoever ends a lock is told first that the PIN was refused before; and no unlock that fails ends it.
#[test]
fn a_pin_that_was_refused_before() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("")?;
    let pin = world.path("t/user.pin");
    omsign_fixtures::write_private(&pin, b"wrong-pin-8142\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("it is refused", || Ok(world.status()?.contains("it refused the PIN")))?;
    world.omsign_ok(&LOCK)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(
        errors.contains("an operator locked it at 2") && errors.contains("it refused the PIN"),
        "{errors}"
    );
    let errors = world.omsign_fails(2, &UNLOCK)?;
    ensure!(errors.contains("before it was locked, it refused the PIN"), "{errors}");
    ensure!(errors.contains("unlock it once more") && proxy.refused_pins() == 1, "{errors}");
    world.omsign_fails(2, &UNLOCK)?;
    ensure!(proxy.refused_pins() == 2);
    ensure!(agent.stop()?.success());
    omsign_fixtures::write_private(&pin, PIN.as_bytes())?;
    let _agent = Agent::start(&world, &config)?;
    refuses_to_sign(&world)?;
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN).map(drop)
}

/// Whoever sets a PIN anew does that, and opens nothing.
#[test]
fn a_pin_that_is_set_anew() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("")?;
    let pin = world.path("t/user.pin");
    omsign_fixtures::write_private(&pin, b"other-pin-8142\n")?;
    let _agent = Agent::start(&world, &config)?;
    eventually("it is refused", || Ok(world.status()?.contains("it refused the PIN")))?;
    world.omsign_ok(&LOCK)?;
    let set = unblocking(&world, "t", &format!("{SO_PIN}\n"))?;
    ensure!(set.status.success(), "{set:?}");
    refuses_to_sign(&world)?;
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN)?;
    ensure!(proxy.refused_pins() == 1);
    Ok(())
}

/// Not even requests that came before, where they have not begun: here those of a token whose place another one takes.
#[test]
fn while_others_wait() -> anyhow::Result<()> {
    let (world, proxy, config) = behind_proxy("timeout = \"40s\"\nsessions = 1")?;
    let _agent = Agent::start(&world, &config)?;
    world.omsign_ok(&SIGN)?;
    proxy.set("C_Sign 0 held\n")?;
    std::thread::scope(|scope| {
        let sign = |number: usize| {
            world.omsign(&["sign", "model", "--key", "k", "--signature", &format!("{number}.sig")])
        };
        let signs: Vec<_> = (0..12).map(|number| scope.spawn(move || sign(number))).collect();
        eventually("one that takes its time", || Ok(proxy.injected("C_Sign") > 0))?;
        // It waits for those of before.
        world.write("agent.toml", config.replace("40s", "41s"))?;
        does(&world, &["reload"])?;
        let locks = scope.spawn(|| world.omsign(&LOCK));
        let locked = eventually("it is kept", || Ok(kept(&world).exists()));
        proxy.set("")?;
        locked?;
        let ended: Vec<_> =
            signs.into_iter().map(|signs| signs.join().map_err(|_| anyhow::anyhow!("a panic"))).collect();
        for ended in ended {
            let ended = ended??;
            let errors = String::from_utf8_lossy(&ended.stderr);
            ensure!(ended.status.success() || errors.contains("an operator locked it"), "{errors}");
        }
        let locked = locks.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(locked.status.success(), "{locked:?}");
        anyhow::Ok(())
    })?;
    // The first, and what was with the device.
    let count = world.audit()?.iter().filter(|entry| entry["outcome"] == "signed").count();
    ensure!(count < 10, "{count} were signed");
    refuses_to_sign(&world)
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
        let mut unlock = Command::new(built("omsign")?);
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
    world.write("agent.toml", config.clone() + &key_section("more", "t", "k"))?;
    let reloaded = key(&world, &["reload"])?;
    let said = String::from_utf8_lossy(&reloaded.stderr);
    ensure!(reloaded.status.success() && !said.contains("waits for its PIN"), "{said}");
    ensure!(agent.stop()?.success());
    // Nobody is asked for it.
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "an operator locked it at 2")?;
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
    let lock = kept(&world);
    let in_the_way = lock.with_extension("json.new");
    std::fs::create_dir(&in_the_way)?;
    let errors = world.omsign_fails(2, &LOCK)?;
    ensure!(errors.contains("it is locked, but an agent that is started again would open it"), "{errors}");
    refuses_to_sign(&world)?;
    // Another configuration does not.
    let config = std::fs::read_to_string(world.path("agent.toml"))?;
    world.write("agent.toml", config.clone() + &key_section("more", "t", "k"))?;
    does(&world, &["reload"])?;
    refuses_to_sign(&world)?;
    std::fs::remove_dir(&in_the_way)?;
    world.omsign_ok(&LOCK)?;
    ensure!(agent.stop()?.success());
    // Nor is it opened by an agent that cannot tell.
    use std::os::unix::fs::PermissionsExt as _;
    ensure!(std::fs::metadata(&lock)?.permissions().mode() & 0o777 == 0o600);
    let elsewhere = world.path("elsewhere");
    std::fs::rename(&lock, &elsewhere)?;
    std::os::unix::fs::symlink(&elsewhere, &lock)?;
    let _agent = Agent::start(&world, &config)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("whether an operator locked it cannot be told: "), "{errors}");
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN)?;
    ensure!(!lock.exists() && elsewhere.exists());
    Ok(())
}

/// It is in force also where that cannot be recorded, and ends as any other.
#[test]
fn where_it_cannot_be_recorded() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = disk::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&SIGN)?;
    let filler = Filler::fill(&world, &agent)?;
    // Some more records have room where the last one ends.
    while world.omsign(&SIGN)?.status.success() {}
    let errors = world.omsign_fails(2, &LOCK)?;
    ensure!(errors.contains("an agent that is started again would open it"), "{errors}");
    ensure!(agent.hosts()?.is_empty(), "its process is left");
    filler.remove()?;
    refuses_to_sign(&world)?;
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&SIGN).map(drop)
}

/// Only operators do, and only what there is.
#[test]
fn by_somebody_else() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    world.tls("lab")?;
    let tls = "\n[listen.tls]\naddress = \"127.0.0.1:0\"\ncertificate = \"lab-server.pem\"\n\
               private_key = \"lab-server.key\"\nclient_ca = \"lab-ca.pem\"\n";
    let agent = Agent::start(&world, &(config + tls))?;
    world.model()?;
    let errors = world.omsign_fails(2, &["agent", "lock", "nowhere"])?;
    ensure!(errors.contains("no token \"nowhere\" is configured"), "{errors}");
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
