//! PINs that are entered on the device itself: on a reader's PIN pad, a Luna's PED.

use std::path::PathBuf;
use std::process::Command;

use anyhow::ensure;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::{KeyType, MODULE, PIN, SoftHsm};
use omsign_fixtures::{built, write_private};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::lab::timeout;
use omsign_tests::operator::{key, typing, unblocking};
use omsign_tests::terminal::Terminal;
use omsign_tests::world::{World, key_section, text, token_section};

const WAITS: &str = "its PIN is entered on the device itself";

struct Desk {
    world: World,
    token: SoftHsm,
    proxy: FaultProxy,
    config: String,
}

/// A token whose PIN nobody types, and a model.
fn desk() -> anyhow::Result<Desk> {
    let world = World::new()?;
    world.model()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let section = proxy.before(&token_section("t", &token, &timeout()))?;
    ensure!(section.contains(&file), "{section}");
    let section = section.replace(&file, "pin = \"device\"");
    let config = world.listen() + &section + "env.OMSIGN_PROXY_PAD = \"pad\"\n" + &key_section("k", "t", "k");
    // Where the agent's processes find it is where its configuration is.
    world.write("agent.toml", &config)?;
    Ok(Desk { world, token, proxy, config })
}

impl Desk {
    /// What somebody enters whenever the device asks for it.
    fn enters(&self, pin: &str) -> anyhow::Result<()> {
        write_private(&self.pad(), pin.as_bytes())
    }

    fn pad(&self) -> PathBuf {
        self.world.path("pad")
    }

    /// The environment in which its module is loaded without a configuration.
    fn set_for(&self, command: &mut Command) {
        command.env("SOFTHSM2_CONF", self.token.config()).env("OMSIGN_PROXY_PAD", self.pad());
        command.envs(self.proxy.environment(MODULE.as_ref()));
    }
}

const SIGN: [&str; 4] = ["sign", "model", "--key", "k"];
const UNLOCK: [&str; 3] = ["agent", "unlock", "t"];

#[test]
fn nobody_is_asked_until_an_operator_is_there() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, proxy, .. } = &desk;
    let agent = Agent::start(world, &desk.config)?;
    let waits = || Ok(world.status()?.contains(WAITS));
    eventually("its wait", waits)?;
    let errors = world.omsign_fails(2, &SIGN)?;
    ensure!(errors.contains(WAITS) && proxy.calls("C_Login on the device") == 0, "{errors}");
    ensure!(world.omsign_fails(2, &UNLOCK)?.contains("no PIN was entered on the device"));
    desk.enters("wrong-pin-3355")?;
    ensure!(world.omsign_fails(2, &UNLOCK)?.contains("it refused the PIN"));
    ensure!(proxy.calls("C_Login on the device") == 2 && proxy.refused_pins() == 1);
    // People take longer than any operation of the device may.
    desk.enters(PIN)?;
    proxy.set("C_Login 0 6000")?;
    world.omsign_ok(&UNLOCK)?;
    proxy.set("")?;
    world.omsign_ok(&SIGN)?;
    let unlock = "omsign agent unlock t, then enter it on the device";
    world.write("agent.toml", desk.config.clone() + &key_section("new", "t", "new"))?;
    let reloaded = key(world, &["reload"])?;
    let said = String::from_utf8_lossy(&reloaded.stderr);
    ensure!(reloaded.status.success() && said.contains(unlock), "{said}");
    eventually("its wait", waits)?;
    world.omsign_ok(&UNLOCK)?;
    let made = key(world, &["generate", "new"])?;
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success() && said.contains(unlock), "{said}");
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&["sign", "model", "--key", "new", "--signature", "new.sig"])?;
    // One that is gone takes nothing away from the others: nobody is there to log in for them.
    desk.token.delete("new")?;
    let looked = proxy.calls("C_GetTokenInfo");
    eventually("a look at the token", || Ok(proxy.calls("C_GetTokenInfo") > looked))?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "other.sig"])?;
    let logins = proxy.calls("C_Login on the device");
    agent.kill_hosts()?;
    eventually("its wait", waits)?;
    ensure!(proxy.calls("C_Login on the device") == logins, "somebody was asked who is not there");
    world.omsign_ok(&UNLOCK)?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "k.sig"])?;
    ensure!(proxy.refused_pins() == 1);
    Ok(())
}

#[test]
fn whoever_sits_at_the_terminal_is_told() -> anyhow::Result<()> {
    let desk = desk()?;
    desk.enters(PIN)?;
    let terminal = Terminal::new(&[])?;
    let mut seated = Ok(());
    let agent = Agent::start_with(&desk.world, &desk.config, |command| match terminal.seat(command) {
        Ok(there) => *command = there,
        Err(error) => seated = Err(error),
    })?;
    seated?;
    eventually("the opened token", || Ok(agent.log()?.contains("token is ready")))?;
    desk.world.omsign_ok(&SIGN)?;
    ensure!(agent.log()?.contains("enter its PIN on the device"));
    ensure!(desk.proxy.calls("C_Login on the device") == 1);
    Ok(())
}

#[test]
fn without_an_agent() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, proxy, .. } = &desk;
    desk.enters(PIN)?;
    let made = key(world, &["csr", "k", "--subject", "CN=Acme Models"])?;
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success() && said.contains("enter the PIN of token t on the device"), "{said}");
    let module = text(&built("libomsign_fault_proxy.so")?);
    let uri = format!("pkcs11:token=t;object=k?module-path={module}&pin-source=device");
    let mut sign = Command::new(built("omsign")?);
    sign.args(["sign", "model", "--key-uri", &uri]).current_dir(world.path(""));
    world.without_surprises(&mut sign);
    desk.set_for(&mut sign);
    let output = sign.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains("enter the PIN on the device"), "{said}");
    ensure!(world.path("model.sig").exists() && proxy.calls("C_Login on the device") == 2);
    Ok(())
}

#[test]
fn it_is_set_up_and_checked() -> anyhow::Result<()> {
    let desk = desk()?;
    desk.enters(PIN)?;
    let doctor = |world: &World| {
        let mut doctor = Command::new(built("omsign-agent")?);
        doctor.args(["doctor", "--config"]).arg(world.path("agent.toml"));
        world.without_surprises(doctor.current_dir(world.path("")));
        anyhow::Ok(String::from_utf8(doctor.output()?.stdout)?)
    };
    let report = doctor(&desk.world)?;
    ensure!(report.contains("its PIN can be entered on the device (pin = \"device\")"), "{report}");
    ensure!(report.contains("omsign agent unlock t, then enter it on the device"), "{report}");
    let unblocked = unblocking(&desk.world, "t", "x\n")?;
    let said = String::from_utf8_lossy(&unblocked.stderr);
    ensure!(
        unblocked.status.code() == Some(2) && said.contains("is entered on the device, and set anew there"),
        "{said}"
    );
    let new = World::new()?;
    let mut init = Command::new(built("omsign-agent")?);
    let module = text(&built("libomsign_fault_proxy.so")?);
    init.args(["init", "pkcs11", "--profile", "softhsm", "--module", &module, "--subject", "CN=Acme"]);
    init.arg("--directory").arg(new.path(""));
    new.without_surprises(&mut init);
    desk.set_for(&mut init);
    let output = typing(&mut init, "\n")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains("(nothing, to enter it on the device)"), "{said}");
    let made = std::fs::read_to_string(new.path("agent.toml"))?;
    ensure!(made.contains("pin = \"device\"\n") && new.path("release.csr").exists(), "{made}");
    Ok(())
}

/// What says of itself that it has no such thing is asked for nothing.
#[test]
fn a_token_that_has_none() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, proxy, .. } = &desk;
    let config = desk.config.replace("env.OMSIGN_PROXY_PAD = \"pad\"\n", "");
    let _agent = Agent::start(world, &config)?;
    let errors = world.omsign_fails(2, &UNLOCK)?;
    ensure!(
        errors.contains("CKF_PROTECTED_AUTHENTICATION_PATH") && errors.contains("pin = \"prompt\""),
        "{errors}"
    );
    ensure!(proxy.calls("C_Login") == 0);
    Ok(())
}
