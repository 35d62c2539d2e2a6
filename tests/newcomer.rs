//! `omsign-agent init` and what it prints next, exactly as printed, by a user who is not root and says nothing of where
//! anything goes.

use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{MODULE, PIN, SoftHsm};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::{signal, under};
use omsign_tests::terminal::Terminal;
use omsign_tests::world::{World, text};
use rustix::process::Signal;

/// A shell of user 1000, whose home is `home`.
fn shell(world: &World, environment: &[(&str, String)], line: &str) -> anyhow::Result<Command> {
    let binaries = built("omsign")?.parent().context("a directory")?.to_owned();
    let mut shell = Command::new("sh");
    shell.args(["-c", line]);
    world.without_surprises(shell.current_dir(world.path("")));
    shell.env_remove("OMSIGN_AGENT").env_remove("XDG_STATE_HOME").env("HOME", world.path("home"));
    shell.env("XDG_RUNTIME_DIR", world.path("run"));
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", binaries.display()));
    shell.envs(environment.iter().map(|(name, value)| (name, value)));
    Ok(match rustix::process::geteuid().is_root() {
        true => under("unshare", ["--map-user=1000", "--map-group=1000"], &shell),
        false => shell,
    })
}

/// An agent that somebody started at a terminal; it ends with us.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = signal(self.0.id(), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// From the device to a signature that verifies: what is asked is answered, and what is printed is typed.
fn follows(
    device: &str,
    environment: &[(&str, String)],
    at_first: &[(&str, &str)],
    at_start: &[(&str, &str)],
) -> anyhow::Result<()> {
    let world = World::new()?;
    for directory in ["home", "run"] {
        std::fs::create_dir(world.path(directory))?;
    }
    world.model()?;
    let terminal = Terminal::new(at_first)?;
    let init = format!("omsign-agent init {device} --subject 'CN=Acme Models'");
    let said = terminal.runs(&shell(&world, environment, &init)?, 0)?;
    ensure!(at_first.iter().chain(at_start).all(|(_, secret)| !said.contains(secret)), "{said}");
    for made in ["agent.toml", "release.csr"] {
        ensure!(world.path("home/.config/omsign").join(made).exists(), "{made}: {said}");
    }
    let printed: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("  omsign")).collect();
    let [serve, sign] = printed.as_slice() else { anyhow::bail!("{said}") };
    let terminal = Terminal::new(at_start)?;
    let mut serve = terminal.seat(&shell(&world, environment, &format!("exec omsign{serve}"))?)?;
    let served = Served(serve.spawn().context("setsid")?);
    terminal.shows("token is ready").with_context(|| terminal.said())?;
    let sign = format!("omsign{}", sign.replace("MODEL", "model"));
    let signed = shell(&world, environment, &sign)?.output()?;
    let errors = String::from_utf8_lossy(&signed.stderr);
    ensure!(signed.status.success(), "{sign}: {errors}{}", terminal.said());
    let export = "omsign keys export release > public.pem && omsign verify model --public-key public.pem";
    let verified = shell(&world, environment, export)?.output()?;
    ensure!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    drop(served);
    ensure!(is_private(&world.path("home/.config/omsign"))?, "others can read what it made");
    Ok(())
}

fn is_private(directory: &Path) -> anyhow::Result<bool> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::metadata(directory)?.permissions().mode() & 0o077 == 0)
}

#[test]
fn with_softhsm() -> anyhow::Result<()> {
    follows("softhsm", &[], &[], &[])
}

/// Whose verifiers take keys that OMS does not name.
#[test]
fn with_a_key_of_rsa() -> anyhow::Result<()> {
    follows("softhsm --type rsa2048", &[], &[], &[])
}

#[test]
fn with_a_tpm() -> anyhow::Result<()> {
    let place = World::new()?;
    let chip = SwTpm::create(&place.path("tpm"))?;
    follows(&format!("tpm --tcti {}", chip.tcti()), &[], &[], &[])
}

/// Whose YubiKey is as it left the factory.
#[test]
fn with_a_yubikey() -> anyhow::Result<()> {
    let place = World::new()?;
    let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
    let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
    let (pin, puk) = ("97531864", "abcdefgh");
    let asked =
        [("new PIN: ", pin), ("new PIN, again: ", pin), ("new PUK: ", puk), ("new PUK, again: ", puk)];
    follows("yubikey", &environment, &asked, &[("PIN for token release: ", pin)])
}

#[test]
fn with_a_token_of_any_module() -> anyhow::Result<()> {
    let place = World::new()?;
    let token = SoftHsm::create(&place.path("t"), "acme")?;
    let environment = [("SOFTHSM2_CONF", text(&token.config()))];
    let asked = [("PIN of the token \"acme\": ", PIN)];
    follows(&format!("pkcs11 --module {MODULE}"), &environment, &asked, &[("PIN for token release: ", PIN)])
}
