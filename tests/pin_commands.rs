//! PINs that a program prints, from a vault, say: run when the token is opened, and again when it could not be reached.

use anyhow::ensure;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::{KeyType, PIN};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section, token_section};

const SIGN: [&str; 4] = ["sign", "model", "--key", "k"];

/// A token whose PIN the script `vault` beside the configuration prints, and a model.
fn desk(script: &str) -> anyhow::Result<(World, FaultProxy, String)> {
    let world = World::new()?;
    world.model()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let section = proxy.before(&token_section("t", &token, "timeout = \"4s\""))?;
    ensure!(section.contains(&file), "{section}");
    let section = section.replace(&file, "pin = { command = [\"sh\", \"./vault\", \"release\"] }");
    world.write("vault", script)?;
    let config = world.listen() + &section + &key_section("k", "t", "k");
    Ok((world, proxy, config))
}

#[test]
fn it_is_run_when_the_token_is_opened() -> anyhow::Result<()> {
    let (world, proxy, config) = desk(&format!("[ $1 = release ] && echo run >>runs && echo {PIN}\n"))?;
    let runs = || anyhow::Ok(std::fs::read_to_string(world.path("runs"))?.lines().count());
    let agent = Agent::start(&world, &config)?;
    world.omsign_ok(&SIGN)?;
    world.omsign_ok(&SIGN)?;
    ensure!(runs()? == 1);
    agent.kill_hosts()?;
    world.omsign_ok(&SIGN)?;
    ensure!(runs()? == 2);
    ensure!(agent.stop()?.success());
    // Without an agent, and by whoever looks at everything: once each.
    does(&world, &["list"])?;
    let (status, report) = world.doctor()?;
    ensure!(status.success() && runs()? == 4, "{report}");
    ensure!(proxy.refused_pins() == 0);
    Ok(())
}

/// A vault that cannot be reached when a machine starts can be reached a little later: nobody has to come.
#[test]
fn what_it_cannot_reach_is_tried_again() -> anyhow::Result<()> {
    let fails = format!("echo {PIN}; echo {PIN} >&2; exit 7\n");
    let (world, proxy, config) = desk(&fails)?;
    let agent = Agent::start(&world, &config)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("the PIN's command sh ended with exit status: 7"), "{errors}");
    let hangs = "echo $$ >running; exec sleep 1000\n";
    world.write("vault", hangs)?;
    eventually("a command that hangs", || {
        Ok(agent.log()?.contains("the PIN's command sh took longer than 4 s"))
    })?;
    let left = std::fs::read_to_string(world.path("running"))?;
    world.write("vault", format!("echo {PIN}\n"))?;
    eventually("its end", || Ok(!std::path::Path::new(&format!("/proc/{}", left.trim())).exists()))?;
    eventually("its way back", || Ok(world.omsign(&SIGN)?.status.success()))?;
    ensure!(proxy.refused_pins() == 0 && !agent.log()?.contains(PIN));
    Ok(())
}

/// What it prints is offered once.
#[test]
fn what_it_prints_is_refused() -> anyhow::Result<()> {
    let (world, proxy, config) = desk("echo wrong-pin-8142\n")?;
    let agent = Agent::start(&world, &config)?;
    for _ in 0..3 {
        let errors = world.omsign_fails(2, &SIGN)?;
        ensure!(errors.contains("it refused the PIN") && !errors.contains("8142"), "{errors}");
    }
    ensure!(agent.stop()?.success());
    world.write("vault", format!("echo {PIN}\n"))?;
    // Another agent does not know that it prints another one now.
    let agent = Agent::start(&world, &config)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("it is not offered again: have the right one there"), "{errors}");
    ensure!(proxy.calls("C_Login") == 1);
    world.omsign_ok(&["agent", "unlock", "t"])?;
    world.omsign_ok(&SIGN)?;
    ensure!(!agent.log()?.contains("8142"));
    Ok(())
}

/// Whatever is wrong with it is said, and nothing that it printed.
#[test]
fn what_can_be_wrong_with_it() -> anyhow::Result<()> {
    for (script, expected) in [
        ("true", "prints nothing; run it as the agent's user to see why"),
        ("echo; exit 3", "ended with exit status: 3"),
        ("echo 431276; echo 431276 >&2; kill -9 $$", "ended with exit status: 137"),
        ("printf '\\377'", "prints what is not UTF-8"),
        ("head -c 5000 /dev/zero", "prints more than 4096 bytes"),
        ("head -c 500000 /dev/zero", "prints more than 4096 bytes"),
    ] {
        let (world, proxy, config) = desk(script)?;
        let agent = Agent::start(&world, &config)?;
        let errors = world.omsign_fails(2, &SIGN)?;
        let log = agent.log()?;
        ensure!(errors.contains("the PIN's command sh ") && errors.contains(expected), "{script}: {errors}");
        ensure!(
            !errors.contains("431276") && !log.contains("431276") && proxy.calls("C_Login") == 0,
            "{log}"
        );
    }
    let (world, _, config) = desk("")?;
    let _agent = Agent::start(&world, &config.replace("\"sh\", \"./vault\"", "\"/nowhere/pin\""))?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains("the PIN's command /nowhere/pin ended with exit status: 2"), "{errors}");
    Ok(())
}

/// What it starts ends with it, and all of it with the token's process, whatever ends that.
#[test]
fn what_it_leaves_behind() -> anyhow::Result<()> {
    let lasts = format!("sleep 1000 & echo $! >left; echo {PIN}\n");
    let (world, _, config) = desk(&lasts)?;
    let left = || {
        let text = std::fs::read_to_string(world.path("left")).unwrap_or_default();
        text.split_once('\n').map(|(pid, _)| pid.to_owned())
    };
    // One that has ended may wait for whoever started it (proc_pid_stat(5)).
    let runs = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z')))
    };
    let agent = Agent::start(&world, &config.replace("\"4s\"", "\"40s\""))?;
    world.omsign_ok(&SIGN)?;
    eventually("the end of what it left", || Ok(left().is_some_and(|pid| !runs(&pid))))?;
    std::fs::remove_file(world.path("left"))?;
    world.write("vault", "sleep 1000 & echo $! >left; wait\n")?;
    agent.kill_hosts()?;
    eventually("it runs", || Ok(left().is_some_and(|pid| runs(&pid))))?;
    let first = left();
    agent.kill_hosts()?;
    eventually("its end", || Ok(first.as_ref().is_some_and(|pid| !runs(pid))))?;
    eventually("the next one runs", || Ok(left() != first && left().is_some_and(|pid| runs(&pid))))?;
    ensure!(agent.stop()?.success());
    eventually("the end of all", || Ok(left().is_some_and(|pid| !runs(&pid))))
}
