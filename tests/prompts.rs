//! PINs and passwords that somebody types at a terminal: asked for by name, never shown, offered once.

use std::process::Command;

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, MODULE, PIN, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_tests::agent::{Agent, eventually, signal};
use omsign_tests::operator::key;
use omsign_tests::terminal::Terminal;
use omsign_tests::world::{World, key_section, token_section};
use rustix::process::Signal;

const WRONG: &str = "wrong-pin-8142";
const CONTROL_C: &str = "\x03";

fn omsign(world: &World, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(built("omsign")?);
    command.args(arguments).current_dir(world.path(""));
    world.without_surprises(&mut command);
    Ok(command)
}

/// A token that nobody wrote a PIN down for, and a model.
fn asked_for(world: &World) -> anyhow::Result<(SoftHsm, String)> {
    let token = world.token("t", "k", KeyType::P256)?;
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let section = token_section("t", &token, "");
    ensure!(section.contains(&file), "{section}");
    let config = world.listen() + &section.replace(&file, "pin = \"prompt\"") + &key_section("k", "t", "k");
    world.model()?;
    Ok((token, config))
}

/// An agent at whose terminal the PIN was typed, and the token opened with it.
fn agent_opened_at(terminal: &Terminal, world: &World, config: &str) -> anyhow::Result<Agent> {
    let agent = agent_at(terminal, world, config)?;
    terminal.shows("PIN for token t: ")?;
    eventually("the opened token", || Ok(agent.log()?.contains("token is ready")))?;
    Ok(agent)
}

/// An agent whose operator sits at this terminal.
fn agent_at(terminal: &Terminal, world: &World, config: &str) -> anyhow::Result<Agent> {
    let mut seated = Ok(());
    let agent = Agent::start_with(world, config, |command| match terminal.seat(command) {
        Ok(command_there) => *command = command_there,
        Err(error) => seated = Err(error),
    });
    seated?;
    agent
}

#[test]
fn the_agent_asks_at_its_terminal() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let terminal = Terminal::new(&[("PIN for token t: ", PIN)])?;
    let agent = agent_opened_at(&terminal, &world, &config)?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    ensure!(terminal.echoes()? && agent.stop()?.success());
    let said = terminal.said();
    ensure!(!said.contains(PIN), "{said}");
    Ok(())
}

/// Whoever changes something is told when somebody has to type the PIN again for it.
#[test]
fn what_is_opened_anew_waits_for_its_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let terminal = Terminal::new(&[("PIN for token t: ", PIN)])?;
    let config = config + &key_section("new", "t", "new");
    let _agent = agent_opened_at(&terminal, &world, &config)?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let told = |arguments: &[&str], expected: &str| {
        let output = key(&world, arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && errors.contains(expected), "{arguments:?}: {errors}");
        anyhow::Ok(())
    };
    let unlock = "omsign agent unlock t --ask-pin";
    told(&["generate", "new"], &format!("it signs once the PIN was typed again: {unlock}"))?;
    world.write("agent.toml", config + &key_section("more", "t", "more"))?;
    told(&["reload"], &format!("token t is opened anew and waits for its PIN: {unlock}"))?;
    let unlocks = Terminal::new(&[("PIN for token t: ", PIN)])?;
    let unlocked = unlocks.seat(&omsign(&world, &["agent", "unlock", "t", "--ask-pin"])?)?.status()?;
    ensure!(unlocked.success());
    told(&["rotate", "k"], "k/next")?;
    told(&["rotate", "k", "--finish"], &format!("token t then waits for its PIN: {unlock}"))
}

/// It is kept nowhere: when the token's process has ended, an operator types it again.
#[test]
fn a_process_that_ends_takes_its_pin_with_it() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let terminal = Terminal::new(&[("PIN for token t: ", PIN)])?;
    let agent = agent_opened_at(&terminal, &world, &config)?;
    let sign = ["sign", "model", "--key", "k"];
    world.omsign_ok(&sign)?;
    for host in agent.hosts()? {
        signal(host, Signal::KILL)?;
        eventually("its end", || Ok(!agent.hosts()?.contains(&host)))?;
    }
    eventually("its wait", || Ok(world.status()?.contains("it waits for its PIN")))?;
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("it waits for its PIN") && errors.contains("omsign agent unlock"), "{errors}");
    let unlock = omsign(&world, &["agent", "unlock", "t", "--ask-pin"])?;
    Terminal::new(&[("PIN for token t: ", PIN)])?.runs(&unlock, 0)?;
    world.omsign_ok(&sign).map(drop)
}

/// Lines for people where somebody looks, JSON where nobody does.
#[test]
fn logs_are_for_whoever_reads_them() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let config = world.write("agent.toml", config)?;
    let mut serve = Command::new(built("omsign-agent")?);
    world.without_surprises(serve.args(["serve", "--config"]).arg(config));
    let terminal = Terminal::new(&[("PIN for token t: ", PIN)])?;
    let mut agent = terminal.seat(&serve)?.spawn()?;
    let shown = terminal.shows("token is ready");
    signal(agent.id(), Signal::TERM)?;
    ensure!(agent.wait()?.success());
    shown?;
    let said = terminal.said();
    ensure!(said.contains("INFO") && !said.contains("{\"timestamp\"") && !said.contains(PIN), "{said}");
    let (_token, config) = (_token, std::fs::read_to_string(world.path("agent.toml"))?);
    let agent = Agent::start(&world, &config)?;
    for line in agent.log()?.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        ensure!(line["level"].is_string() && line["message"].is_string(), "{line}");
    }
    Ok(())
}

/// What was typed wrong at the start is put right by an operator, each time with one try.
#[test]
fn a_pin_typed_wrong() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let terminal = Terminal::new(&[("PIN for token t: ", WRONG)])?;
    let agent = agent_at(&terminal, &world, &config)?;
    eventually("the refusal", || Ok(agent.log()?.contains("it refused the PIN")))?;
    let unlock = omsign(&world, &["agent", "unlock", "t", "--ask-pin"])?;
    let said = Terminal::new(&[("PIN for token t: ", WRONG)])?.runs(&unlock, 2)?;
    ensure!(said.contains("error: ") && said.contains("it refused the PIN"), "{said}");
    let said = Terminal::new(&[("PIN for token t: ", PIN)])?.runs(&unlock, 0)?;
    ensure!(said.contains("token t is unlocked") && !said.contains(PIN), "{said}");
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    ensure!(agent.stop()?.success());
    ensure!(!terminal.said().contains(WRONG));
    Ok(())
}

/// Whoever types nothing does not mean the PIN that is configured: it was refused, and may be refused for the last time.
#[test]
fn nothing_typed_is_no_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    omsign_fixtures::write_private(&token.pin_file(), WRONG.as_bytes())?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    eventually("the refusal", || Ok(agent.log()?.contains("it refused the PIN")))?;
    let unlock = omsign(&world, &["agent", "unlock", "t", "--ask-pin"])?;
    let said = Terminal::new(&[("PIN for token t: ", "")])?.runs(&unlock, 2)?;
    ensure!(said.contains("the PIN is empty") && proxy.calls("C_Login") == 1, "{said}");
    Ok(())
}

/// It ends at once, and leaves the terminal as it was.
#[test]
fn an_agent_that_is_stopped_while_it_asks() -> anyhow::Result<()> {
    for stop in [Some(Signal::TERM), Some(Signal::INT), None] {
        let world = World::new()?;
        let (_token, config) = asked_for(&world)?;
        let typed: &[_] = if stop.is_some() { &[] } else { &[("PIN for token t: ", CONTROL_C)] };
        let terminal = Terminal::new(typed)?;
        let agent = agent_at(&terminal, &world, &config)?;
        terminal.shows("PIN for token t: ")?;
        if let Some(stop) = stop {
            eventually("a terminal without echo", || Ok(!terminal.echoes()?))?;
            signal(agent.pid(), stop)?;
        }
        ensure!(agent.wait()?.success(), "{stop:?}");
        ensure!(terminal.echoes()?, "{stop:?}: the terminal is left without echo");
    }
    Ok(())
}

/// Neither asking at the terminal nor setting it back is for a job in the background: that would stop it for good.
#[test]
fn an_agent_in_the_background_ends() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_token, config) = asked_for(&world)?;
    let config = world.write("agent.toml", config)?;
    let script = "set -m; \"$0\" serve --config \"$1\" 2>log & \
                  while ! [ -S agent.sock ]; do kill -0 $! || exit 3; sleep 0.05; done; kill $!; wait $!";
    let mut shell = Command::new("timeout");
    shell.args(["--foreground", "20", "sh", "-c", script]).arg(built("omsign-agent")?).arg(config);
    world.without_surprises(shell.current_dir(world.path("")));
    let said = Terminal::new(&[])?.runs(&shell, 0)?;
    ensure!(!said.contains("PIN for token"), "{said}");
    Ok(())
}

#[test]
fn without_an_agent_the_client_asks() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, _) = asked_for(&world)?;
    let uri = format!("pkcs11:token=t;object=k?module-path={MODULE}");
    let mut sign = omsign(&world, &["sign", "model", "--key-uri", &uri])?;
    sign.env("SOFTHSM2_CONF", token.config());
    let said = Terminal::new(&[("PIN: ", WRONG)])?.runs(&sign, 2)?;
    ensure!(said.contains("it refused the PIN") && !said.contains(WRONG), "{said}");
    ensure!(!world.path("model.sig").exists());
    let said = Terminal::new(&[("PIN: ", PIN)])?.runs(&sign, 0)?;
    ensure!(said.contains("signed ") && !said.contains(PIN), "{said}");
    ensure!(world.path("model.sig").exists());
    Ok(())
}

/// Of any device; and it says when the card wants a finger.
#[test]
fn without_an_agent_the_client_asks_for_a_tpm_and_a_card() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let uri = format!("tpm:handle=0x81000010?tcti={}", chip.tcti());
    let sign = omsign(&world, &["sign", "model", "--key-uri", &uri])?;
    let said = Terminal::new(&[("PIN: ", AUTH)])?.runs(&sign, 0)?;
    ensure!(said.contains("signed ") && !said.contains(AUTH), "{said}");
    std::fs::remove_file(world.path("model.sig"))?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9a", "ECCP256", &["--touch-policy=always"])?;
    let mut sign = omsign(&world, &["sign", "model", "--key-uri", "piv:serial=11223344;slot=9a"])?;
    sign.env("PCSCLITE_CSOCK_NAME", card.socket());
    let terminal = Terminal::new(&[("PIN: ", piv::PIN)])?;
    let said = std::thread::scope(|scope| {
        let signing = scope.spawn(|| terminal.runs(&sign, 0));
        eventually("the card's wait", || Ok(card.waits_for_touch() || signing.is_finished()))?;
        terminal.shows("touch your YubiKey (serial 11223344)")?;
        card.touch();
        signing.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    ensure!(said.contains("signed ") && !said.contains(piv::PIN), "{said}");
    ensure!(world.path("model.sig").exists() && card.wrong_pins() == 0);
    Ok(())
}

#[test]
fn the_password_of_a_key_file() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let made = Command::new("openssl")
        .args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes256"])
        .args(["-pass", "pass:a password", "-out", "k.pem"])
        .current_dir(world.path(""))
        .status()?;
    ensure!(made.success());
    let sign = omsign(&world, &["sign", "model", "--private-key", "k.pem"])?;
    let said = Terminal::new(&[("Password of the private key: ", "another")])?.runs(&sign, 2)?;
    ensure!(said.contains("error: ") && !world.path("model.sig").exists(), "{said}");
    let said = Terminal::new(&[("Password of the private key: ", "a password")])?.runs(&sign, 0)?;
    ensure!(said.contains("signed ") && !said.contains("a password"), "{said}");
    Ok(())
}
