//! What a card asks of people: PIN and touch policies, keys that came from elsewhere, and secrets that everybody knows.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::write_private;
use omsign_proto::v1::sign_response::Event;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::client::{connect, next_event, request};
use omsign_tests::lab::timeout;
use omsign_tests::operator::{does, refuses, unblocking};
use omsign_tests::world::{World, key};
use openssl::ec::{EcGroup, EcKey};
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::rsa::Rsa;

struct Desk {
    world: World,
    card: VirtualPiv,
    runtime: tokio::runtime::Runtime,
    next_id: u128,
}

/// An agent that began with these keys, and somebody who can reach the card.
impl Desk {
    fn new() -> anyhow::Result<Self> {
        let world = World::new()?;
        let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
        card.change_pin()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { world, card, runtime, next_id: 0 })
    }

    fn agent(&self, slots: &[&str]) -> anyhow::Result<Agent> {
        let keys = slots.iter().map(|slot| key(slot, "card", &format!("slot = \"{slot}\"")));
        let config = self.world.listen() + &self.card.section("card") + &keys.collect::<String>();
        Agent::start(&self.world, &config)
    }

    /// Has a key sign; whether somebody was asked to touch the card, and had to.
    fn sign(&mut self, key: &'static str) -> anyhow::Result<bool> {
        let late = Duration::from_millis(700);
        self.next_id += 1;
        let (socket, id, card) = (self.world.path("agent.sock"), self.next_id, &self.card);
        self.runtime.block_on(async {
            let mut client = connect(socket).await?;
            let mut events = client.sign(request(key, id, &[7; 32])).await?.into_inner();
            let event = next_event(&mut events).await?;
            if !matches!(event, Event::Touch(_)) {
                ensure!(matches!(event, Event::Signed(_)), "{event:?}");
                return Ok(false);
            }
            // Nobody is that quick; and a card for which an earlier touch counts signs without one.
            let (mut next, mut waits_since, mut touched) = (Box::pin(next_event(&mut events)), None, false);
            let event = loop {
                if let Ok(signed) = tokio::time::timeout(Duration::from_millis(20), &mut next).await {
                    break signed?;
                }
                // Once.
                if !touched
                    && card.waits_for_touch()
                    && waits_since.get_or_insert_with(Instant::now).elapsed() >= late
                {
                    card.touch();
                    touched = true;
                }
            };
            ensure!(matches!(event, Event::Signed(_)), "{event:?}");
            Ok(touched)
        })
    }

    /// Does what needs one touch.
    fn touching<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let work = scope.spawn(work);
            eventually("the card's wait", || Ok(self.card.waits_for_touch() || work.is_finished()))?;
            self.card.touch();
            work.join().map_err(|_| anyhow::anyhow!("a panic"))?
        })
    }
}

/// What operators do takes the PIN back from the card, which then would refuse after the touch.
#[test]
fn one_touch_is_enough_after_what_operators_did() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    desk.card.generate("9a", "ECCP256", &["--touch-policy=always"])?;
    desk.card.generate("9d", "ECCP256", &["--touch-policy=always", "--pin-policy=always"])?;
    let agent = desk.agent(&["9a", "9d"])?;
    for key in ["9a", "9d"] {
        ensure!(desk.sign(key)?);
        does(&desk.world, &["list"])?;
        ensure!(desk.sign(key)?, "{}", agent.log()?);
        let request = desk.touching(|| does(&desk.world, &["csr", key, "--subject", "CN=Acme Models"]))?;
        ensure!(request.contains("BEGIN CERTIFICATE REQUEST"), "{request}");
        desk.touching(|| does(&desk.world, &["self-sign", key, "--subject", "CN=Acme Models"]))?;
        ensure!(desk.sign(key)?);
    }
    // Without an agent, too.
    ensure!(agent.stop()?.success());
    desk.touching(|| does(&desk.world, &["csr", "9a", "--subject", "CN=Acme Models"]))?;
    ensure!(desk.card.pin_tries()? == 3);
    Ok(())
}

/// The PIN that it accepted once is not shown to a card that takes one wrong one more, whenever a key asks for it.
#[test]
fn somebody_enters_wrong_pins_meanwhile() -> anyhow::Result<()> {
    for policy in ["once", "always"] {
        let mut desk = Desk::new()?;
        desk.card.generate("9a", "ECCP256", &[&format!("--pin-policy={policy}")])?;
        let agent = desk.agent(&["9a"])?;
        desk.sign("9a")?;
        desk.card.exchange_pin(piv::PIN, "86420975");
        desk.card.enter_wrong_pins(2);
        let refusal = desk.sign("9a").err().context("a refusal")?.to_string();
        ensure!(refusal.contains("one wrong PIN more would block it"), "{policy}: {refusal}");
        ensure!(desk.card.wrong_pins() == 2, "{policy}: {}", agent.log()?);
        desk.card.exchange_pin("86420975", piv::PIN);
        desk.world.omsign_ok(&["agent", "unlock", "card"])?;
        desk.sign("9a")?;
    }
    Ok(())
}

#[test]
fn a_cached_touch_counts_for_a_while() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    desk.card.generate("9a", "ECCP256", &["--touch-policy=cached"])?;
    let agent = desk.agent(&["9a"])?;
    ensure!(desk.sign("9a")?, "the first one");
    // It counts for 15 s from when the finger came. All the while the card is used, but for once, when it is let go of;
    // and whenever it waits, somebody is told: it gives up after 15 s, and would sign nothing.
    let (mut touched, mut again) = (Instant::now(), 0);
    for round in 0..28 {
        let pause = Duration::from_millis(if round == 4 { 3500 } else { 1000 });
        let rested = Instant::now();
        eventually("a pause", || Ok(rested.elapsed() > pause))?;
        if desk.sign("9a").with_context(|| agent.log().unwrap_or_default())? {
            let counted = touched.elapsed();
            ensure!(counted > Duration::from_secs(14), "it counted for {counted:?}");
            (touched, again) = (Instant::now(), again + 1);
        }
    }
    ensure!(again >= 1 && agent.hosts()?.len() == 1);
    Ok(())
}

#[test]
fn a_key_that_asks_for_no_pin() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    desk.card.generate("9a", "ECCP256", &["--pin-policy=never"])?;
    desk.card.generate("9e", "ECCP256", &[])?;
    let agent = desk.agent(&["9a", "9e"])?;
    for key in ["9a", "9e", "9a"] {
        ensure!(!desk.sign(key)?);
        // Other programs reset the card.
        desk.card.tool(&["-a", "status"])?;
    }
    let listed = does(&desk.world, &["list"])?;
    ensure!(listed.matches("PIN policy never, touch policy never").count() == 2, "{listed}");
    ensure!(agent.stop()?.success());
    // Nor does anybody have to know it.
    let pin = format!("pin = {{ file = \"{}\" }}", desk.card.pin_file().display());
    let section = desk.card.section("card").replace(&pin, "pin = \"none\"");
    let config = desk.world.listen() + &section + &key("9e", "card", "slot = \"9e\"");
    ensure!(config.contains("pin = \"none\""), "{config}");
    let agent = Agent::start(&desk.world, &config)?;
    eventually("the key", || Ok(!desk.sign("9e")?))?;
    ensure!(agent.stop()?.success());
    let mut alone = Command::new(built("omsign")?);
    let uri = format!("piv:serial={};slot=9e?pin-source=none", desk.card.serial);
    alone.args(["sign", "agent.toml", "--signature", "alone.sig", "--key-uri", &uri]);
    desk.world.without_surprises(alone.current_dir(desk.world.path("")));
    let signed = alone.env("PCSCLITE_CSOCK_NAME", desk.card.socket()).output()?;
    ensure!(signed.status.success(), "{signed:?}");
    ensure!(desk.card.wrong_pins() == 0);
    Ok(())
}

/// Nobody knows what became of a PIN that was on its way when a card hung, but the card: it counts.
#[test]
fn a_card_that_hangs_with_the_pin() -> anyhow::Result<()> {
    let desk = Desk::new()?;
    let Desk { world, card, .. } = &desk;
    card.generate("9c", "ECCP256", &[])?;
    let keys = key("9c", "card", "slot = \"9c\"");
    let _agent = Agent::start(world, &(world.listen() + &card.section("card") + &timeout() + &keys))?;
    let signs = || anyhow::Ok(world.omsign(&["sign", "agent.toml", "--key", "9c"])?.status.success());
    let hangs = |from, to| {
        ensure!(signs()?);
        card.exchange_pin(from, to);
        card.set(Faults { delay: Duration::from_secs(600), only: Some(piv::shows_pin), ..Faults::default() });
        ensure!(!signs()?, "it did not hang");
        card.set(Faults::default());
        Ok(())
    };
    eventually("the key", signs)?;
    hangs(piv::PIN, piv::PIN)?;
    eventually("it heals", signs)?;
    ensure!(card.wrong_pins() == 0, "{} wrong PINs", card.wrong_pins());
    let other = "86420975";
    hangs(piv::PIN, other)?;
    eventually("its tries", || Ok(world.status()?.contains("locked: it may have counted a PIN")))?;
    ensure!(!signs()? && card.wrong_pins() == 1, "{} wrong PINs", card.wrong_pins());
    card.exchange_pin(other, piv::PIN);
    world.omsign_ok(&["agent", "unlock", "card"])?;
    ensure!(signs()? && card.wrong_pins() == 1);
    Ok(())
}

/// What others do with a card in the middle of an operator's command is no reason to start over, which may need a person's
/// PIN.
#[test]
fn others_use_the_card_meanwhile() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    desk.card.generate("9a", "ECCP256", &[])?;
    let agent = desk.agent(&["9a"])?;
    desk.sign("9a")?;
    let hosts = agent.hosts()?;
    let only = Some(piv::asks_metadata as fn(&[u8]) -> bool);
    desk.card.set(Faults { status: Some(0x6f00), only, once: true, ..Faults::default() });
    let csr = ["csr", "9a", "--subject", "CN=Acme Models"];
    refuses(&desk.world, &csr, "another program may have used the card")?;
    ensure!(does(&desk.world, &["list"])?.contains("slot 9a"));
    desk.sign("9a")?;
    ensure!(agent.hosts()? == hosts && desk.card.pin_tries()? == 3, "{}", agent.log()?);
    Ok(())
}

/// Yubico's own program, beside an agent that signs; and what our hints say to do with it.
#[test]
fn ykman_shares_the_card() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    desk.card.generate("9c", "ECCP256", &[])?;
    let agent = desk.agent(&["9c"])?;
    let socket = desk.card.socket();
    let ykman = |arguments: &[&str]| {
        let mut ykman = Command::new("ykman");
        ykman.args(["--device", "11223344", "piv"]).args(arguments).env("PCSCLITE_CSOCK_NAME", &socket);
        let output = ykman.output().context("ykman (apt: yubikey-manager)")?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.success(), "ykman piv {arguments:?}: {said}");
        Ok(said)
    };
    desk.sign("9c")?;
    let hosts = agent.hosts()?;
    for _ in 0..3 {
        desk.sign("9c")?;
        let said = ykman(&["info"])?;
        ensure!(said.contains("PIN tries remaining: 3/3"), "{said}");
        desk.sign("9c")?;
    }
    ensure!(agent.hosts()? == hosts, "its process was replaced: {}", agent.log()?);
    ykman(&["access", "change-puk", "--puk", "12345678", "--new-puk", piv::PUK])?;
    let factorys = "010203040506070801020304050607080102030405060708";
    let protect =
        ["access", "change-management-key", "--generate", "--protect", "--algorithm", "aes192", "--force"];
    ykman(&[&protect[..], &["--pin", piv::PIN, "--management-key", factorys]].concat())?;
    // What the card asks for before it stores anything is behind its PIN now.
    let own = does(&desk.world, &["self-sign", "9c", "--subject", "CN=Acme Models"])?;
    desk.world.write("own.pem", own)?;
    does(&desk.world, &["import-certificate", "9c", "own.pem"])?;
    ensure!(ykman(&["info"])?.contains("CN=Acme Models"), "{}", ykman(&["info"])?);
    desk.sign("9c")?;
    ensure!(desk.card.wrong_pins() == 0);
    Ok(())
}

/// Keys that were made elsewhere sign as well, and are told apart.
#[test]
fn imported_keys() -> anyhow::Result<()> {
    let desk = Desk::new()?;
    let curve = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    for (slot, private) in
        [("9a", PKey::from_ec_key(EcKey::generate(&curve)?)?), ("9d", PKey::from_rsa(Rsa::generate(2048)?)?)]
    {
        desk.card.import(slot, &private)?;
    }
    let _agent = desk.agent(&["9a", "9d"])?;
    desk.world.model()?;
    let listed = does(&desk.world, &["list"])?;
    ensure!(listed.matches("imported").count() == 2, "{listed}");
    for slot in ["9a", "9d"] {
        let public = desk.world.path(&format!("card/{slot}.pub.pem")).display().to_string();
        let sign = ["sign", "model", "--key", slot, "--signature", "model.sig", "--allow-nonstandard-key"];
        desk.world.omsign_ok(&sign)?;
        desk.world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", &public])?;
        refuses(&desk.world, &["attest", slot], "attests only keys that it made itself")?;
    }
    Ok(())
}

/// What is too short to be a PIN, or a PUK, is not shown to the card, which would count it.
#[test]
fn what_can_be_no_pin_costs_no_try() -> anyhow::Result<()> {
    let desk = Desk::new()?;
    desk.card.change_puk()?;
    desk.card.generate("9c", "ECCP256", &[])?;
    write_private(&desk.card.pin_file(), b"1234\n")?;
    let agent = desk.agent(&["9c"])?;
    eventually("the reason", || {
        Ok(agent.log()?.contains("its PIN has 6 to 8 bytes, and the one given has not"))
    })?;
    ensure!(desk.card.pin_tries()? == 3 && desk.card.wrong_pins() == 0);
    ensure!(agent.stop()?.success());
    write_private(&desk.card.pin_file(), format!("{}\n", piv::PIN).as_bytes())?;
    desk.card.enter_wrong_pins(3);
    for _ in 0..3 {
        let refused = unblocking(&desk.world, "card", "1234\n")?;
        let errors = String::from_utf8_lossy(&refused.stderr);
        ensure!(errors.contains("a PUK has 6 to 8 bytes, and the one given has not"), "{errors}");
    }
    let set = unblocking(&desk.world, "card", &format!("{}\n", piv::PUK))?;
    ensure!(set.status.success() && desk.card.pin_tries()? == 3, "{set:?}");
    Ok(())
}

/// A PUK that everybody has sets a PIN that everybody has: it is said, and not used.
#[test]
fn what_everybody_knows_is_said_and_not_used() -> anyhow::Result<()> {
    let desk = Desk::new()?;
    desk.card.generate("9c", "ECCP256", &[])?;
    let agent = desk.agent(&["9c"])?;
    eventually("an open card", || Ok(desk.world.status()?.contains("token card: ready")))?;
    eventually("what the log says", || {
        let log = agent.log()?;
        Ok(log.contains("its PUK is the one from the factory")
            && log.contains("its management key is the one from the factory"))
    })?;
    ensure!(agent.stop()?.success());
    let (status, report) = desk.world.doctor()?;
    ensure!(status.success() && report.contains("its PUK is the one from the factory"), "{report}");
    ensure!(report.lines().any(|line| line.starts_with("warning") && line.contains("PUK")), "{report}");
    desk.card.enter_wrong_pins(3);
    let tries = desk.card.pin_tries()?;
    ensure!(tries == 0, "{tries}");
    let refused = unblocking(&desk.world, "card", "12345678\n")?;
    let errors = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && errors.contains("`ykman piv access change-puk`"), "{errors}");
    ensure!(desk.card.pin_tries()? == 0, "the PIN was set");
    desk.card.change_puk()?;
    let set = unblocking(&desk.world, "card", &format!("{}\n", piv::PUK))?;
    ensure!(set.status.success() && desk.card.pin_tries()? == 3, "{set:?}");
    Ok(())
}
