//! PINs whose answer is lost on its way: a device counts before it answers.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, PIN};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually, refused};
use omsign_tests::world::{World, key, key_section, token_section};

const LOCKED: &str = "locked: it may have counted a PIN that it did not answer";

fn says(world: &World, what: &str) -> anyhow::Result<bool> {
    Ok(world.status()?.contains(what))
}

/// A card service that ends right when the card has looked at the PIN.
#[test]
fn of_a_card() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9a", "ECCP256", &[])?;
    let other = "86420975";
    card.exchange_pin(piv::PIN, other);
    let hour = Duration::from_secs(3600);
    card.set(Faults { delay: hour, late: true, only: Some(piv::shows_pin), ..Faults::default() });
    let config =
        world.listen() + &card.section("card") + "timeout = \"60s\"\n" + &key("9a", "card", "slot = \"9a\"");
    let agent = Agent::start(&world, &config)?;
    eventually("a wrong PIN", || Ok(card.wrong_pins() == 1))?;
    card.kill_service()?;
    card.set(Faults::default());
    card.start_service()?;
    eventually("its tries", || says(&world, LOCKED)).with_context(|| agent.log().unwrap_or_default())?;
    card.exchange_pin(other, piv::PIN);
    world.omsign_ok(&["agent", "unlock", "card"])?;
    ensure!(says(&world, "key 9a: ready")? && card.wrong_pins() == 1, "{} wrong PINs", card.wrong_pins());
    Ok(())
}

/// A reader that is gone right when its card has looked at the PIN.
#[test]
fn of_a_module() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, ""))?;
    let config = world.listen() + &section + &key_section("k", "t", "k");
    // CKR_DEVICE_REMOVED
    proxy.set("C_Login after 32\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("the last login", || says(&world, "locked: while logging in: "))?;
    ensure!(proxy.calls("C_Login") == 2 && proxy.refused_pins() == 0);
    proxy.set("")?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    ensure!(says(&world, "key k: ready")?);
    drop(agent);
    // A wrong one is seen in what the token says of itself.
    write_private(&token.pin_file(), b"00000000")?;
    proxy.set("C_Login after 32\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("its flag", || says(&world, LOCKED))?;
    ensure!(proxy.refused_pins() == 1, "{} refused PINs", proxy.refused_pins());
    proxy.set("")?;
    write_private(&token.pin_file(), PIN.as_bytes())?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    ensure!(says(&world, "key k: ready")? && proxy.refused_pins() == 1);
    // The same file for what is the same token in other words is no other PIN.
    write_private(&token.pin_file(), b"00000000")?;
    drop(agent);
    let agent = Agent::start(&world, &config)?;
    eventually("a refusal", || says(&world, "locked: it refused the PIN"))?;
    let words = config.replace("label = \"t\"", "label = \"t\", manufacturer = \"SoftHSM project\"");
    ensure!(words != config);
    fs::write(world.path("agent.toml"), &words)?;
    omsign_tests::operator::does(&world, &["reload"])?;
    eventually("the same refusal", || says(&world, "locked: it refused the PIN"))?;
    ensure!(proxy.refused_pins() == 2, "{} refused PINs", proxy.refused_pins());
    drop(agent);
    // Two sections for it would each offer it.
    let twice = config + &section.replace("[token.t]", "[token.u]");
    let (status, said) = refused(&world, &twice)?;
    ensure!(
        status == Some(2) && said.contains("token.u: token.t is this device; one section serves all"),
        "{said}"
    );
    Ok(())
}
