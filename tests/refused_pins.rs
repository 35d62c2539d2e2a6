//! A PIN that was refused is not offered again, whoever starts what would offer it: a service that is restarted whenever it
//! fails, a machine that boots, an operator's command, a script.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, MODULE, PIN, SoftHsm};
use omsign_fixtures::{built, write_private};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::{key, typing, unblocking};
use omsign_tests::world::{World, key as key_on, key_section, text, token_section};

const WRONG: &str = "wrong-pin-8142";
const REFUSED: &str = "it refused the PIN";

struct Desk {
    world: World,
    token: SoftHsm,
    proxy: FaultProxy,
    config: String,
}

/// A token whose PIN file holds another one.
fn desk() -> anyhow::Result<Desk> {
    let world = World::new()?;
    world.model()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    write_private(&token.pin_file(), WRONG.as_bytes())?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    Ok(Desk { world, token, proxy, config })
}

impl Desk {
    /// An agent that knows that the PIN was refused.
    fn knows(&self, environment: &[(&str, &str)]) -> anyhow::Result<Agent> {
        let agent = Agent::start_with(&self.world, &self.config, |command| {
            command.envs(environment.iter().copied());
        })?;
        eventually("the refusal", || Ok(self.world.status()?.contains(REFUSED)))?;
        Ok(agent)
    }
}

const SIGN: [&str; 4] = ["sign", "model", "--key", "k"];

#[test]
fn an_agent_that_is_started_again() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, token, proxy, .. } = &desk;
    for killed in [true, true, false, false] {
        let agent = desk.knows(&[])?;
        ensure!(world.omsign_fails(2, &SIGN)?.contains("omsign agent unlock t"));
        match killed {
            true => drop(agent),
            false => ensure!(agent.stop()?.success()),
        }
        ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    }
    // What else would open it: operators' commands and doctor, which say why they do not.
    let listed = key(world, &["list"])?;
    ensure!(String::from_utf8_lossy(&[listed.stdout, listed.stderr].concat()).contains(REFUSED));
    let (_, report) = world.doctor()?;
    ensure!(report.contains(REFUSED) && proxy.calls("C_Login") == 1, "{report}");
    // A file that was written since holds another PIN: wrong once more, and then the right one.
    write_private(&token.pin_file(), b"wrong-pin-8143")?;
    drop(desk.knows(&[])?);
    drop(desk.knows(&[])?);
    ensure!(proxy.calls("C_Login") == 2, "{} logins", proxy.calls("C_Login"));
    write_private(&token.pin_file(), PIN.as_bytes())?;
    for logins in [3, 4] {
        let _agent = Agent::start(world, &desk.config)?;
        world.omsign_ok(&[&SIGN[..], &["--signature", &format!("{logins}.sig")]].concat())?;
        ensure!(proxy.calls("C_Login") == logins, "{} logins", proxy.calls("C_Login"));
    }
    ensure!(!String::from_utf8(std::fs::read(world.path("agent.log"))?)?.contains(WRONG));
    Ok(())
}

/// Of a PIN that is nowhere in a file nobody can tell whether it is another one.
#[test]
fn a_pin_that_is_in_no_file() -> anyhow::Result<()> {
    let mut desk = desk()?;
    let file = format!("pin = {{ file = \"{}\" }}", desk.token.pin_file().display());
    desk.config = desk.config.replace(&file, "pin = { env = \"OMSIGN_TEST_PIN\" }");
    let Desk { world, proxy, .. } = &desk;
    drop(desk.knows(&[("OMSIGN_TEST_PIN", WRONG)])?);
    let agent = desk.knows(&[("OMSIGN_TEST_PIN", PIN)])?;
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    // One that is typed says nothing of the configured one.
    let mut unlock = Command::new(built("omsign")?);
    unlock.args(["agent", "unlock", "t", "--pin-stdin"]);
    world.without_surprises(&mut unlock);
    ensure!(typing(&mut unlock, &format!("{PIN}\n"))?.status.success());
    world.omsign_ok(&SIGN)?;
    drop(agent);
    let agent = desk.knows(&[("OMSIGN_TEST_PIN", PIN)])?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    world.omsign_ok(&[&SIGN[..], &["--signature", "2.sig"]].concat())?;
    drop(agent);
    let _agent = Agent::start_with(world, &desk.config, |command| {
        command.env("OMSIGN_TEST_PIN", PIN);
    })?;
    world.omsign_ok(&[&SIGN[..], &["--signature", "3.sig"]].concat())?;
    ensure!(proxy.refused_pins() == 1, "{} refused", proxy.refused_pins());
    Ok(())
}

/// A script that signs in a loop.
#[test]
fn without_an_agent() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, token, proxy, .. } = &desk;
    // A name that begins as what says that it is entered on the device.
    let file = world.path("device.pin");
    write_private(&file, WRONG.as_bytes())?;
    let sign = || {
        let (module, pin) = (text(&built("libomsign_fault_proxy.so")?), "device.pin");
        let uri = format!("pkcs11:token=t;object=k?module-path={module}&pin-source={pin}");
        let mut sign = Command::new(built("omsign")?);
        sign.args(["sign", "model", "--key-uri", &uri]).current_dir(world.path(""));
        world.without_surprises(&mut sign);
        sign.env("SOFTHSM2_CONF", token.config()).envs(proxy.environment(MODULE.as_ref()));
        anyhow::Ok(sign.output()?)
    };
    for _ in 0..3 {
        let output = sign()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && errors.contains(REFUSED), "{errors}");
        ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    }
    write_private(&file, PIN.as_bytes())?;
    ensure!(sign()?.status.success() && proxy.calls("C_Login") == 2);
    Ok(())
}

/// What is kept is the service's, also where root's doctor found it, and it is in the log's directory or nowhere; what
/// cannot be read is no permission.
#[test]
fn who_keeps_it() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, proxy, .. } = &desk;
    world.write("agent.toml", &desk.config)?;
    std::fs::create_dir(world.path("audit"))?;
    std::os::unix::fs::chown(world.path("audit"), Some(65534), Some(65534))?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains(REFUSED) && proxy.calls("C_Login") == 1, "{report}");
    let kept = refusal(world)?;
    ensure!(std::fs::metadata(&kept)?.uid() == 65534, "it is root's");
    for unreadable in [&b"{"[..], b""] {
        std::fs::write(&kept, unreadable)?;
        let (_, report) = world.doctor()?;
        ensure!(report.contains("whether it refused the PIN cannot be told"), "{report}");
    }
    std::fs::remove_file(&kept)?;
    std::os::unix::fs::symlink(world.path("elsewhere"), &kept)?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("cannot be told") && !world.path("elsewhere").exists(), "{report}");
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    Ok(())
}

/// A security officer sets the PIN to what the source holds: that is the right one then.
#[test]
fn a_pin_that_is_set_anew() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, proxy, .. } = &desk;
    drop(desk.knows(&[])?);
    let set = unblocking(world, "t", "so-pin-2406\n")?;
    ensure!(set.status.success(), "{set:?}");
    let _agent = Agent::start(world, &desk.config)?;
    world.omsign_ok(&SIGN)?;
    ensure!(proxy.refused_pins() == 1, "{} refused", proxy.refused_pins());
    Ok(())
}

/// That it has no PIN yet is no refusal.
#[test]
fn a_token_without_a_pin() -> anyhow::Result<()> {
    let desk = desk()?;
    let Desk { world, token, proxy, .. } = &desk;
    write_private(&token.pin_file(), PIN.as_bytes())?;
    proxy.set("C_Login 102 0\n")?;
    let agent = Agent::start(world, &desk.config)?;
    eventually("its state", || Ok(world.status()?.contains("its user PIN was never set")))?;
    drop(agent);
    proxy.set("")?;
    let _agent = Agent::start(world, &desk.config)?;
    world.omsign_ok(&SIGN).map(drop)
}

/// Where it is kept.
fn refusal(world: &World) -> anyhow::Result<PathBuf> {
    let found = std::fs::read_dir(world.path("audit"))?.collect::<Result<Vec<_>, _>>()?;
    let mut kept = found.iter().filter(|file| file.file_name().to_string_lossy().starts_with("refused-pin-"));
    let first = kept.next().context("a file")?;
    ensure!(kept.next().is_none(), "more than one");
    Ok(first.path())
}

/// A card has three tries, and two that are the same are no two.
#[test]
fn a_card_keeps_its_tries() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 7_000_031)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    write_private(&card.pin_file(), b"81428142\n")?;
    let config = world.listen() + &card.section("card") + &key_on("k", "card", "slot = \"9c\"");
    for _ in 0..3 {
        let _agent = Agent::start(&world, &config)?;
        eventually("the refusal", || Ok(world.status()?.contains(REFUSED)))?;
    }
    ensure!(card.pin_tries()? == 2, "{} tries", card.pin_tries()?);
    let kept = std::fs::read_to_string(refusal(&world)?)?;
    ensure!(kept.contains(REFUSED) && !kept.contains("81428142"), "{kept}");
    Ok(())
}
