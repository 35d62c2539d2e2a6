//! Two cards at one PC/SC service, as in a laptop with a spare one: neither waits for the other, and a key may be on both.

use std::time::{Duration, Instant};

use anyhow::ensure;
use omsign_fixtures::piv::{Faults, VirtualPiv};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::refuses;
use omsign_tests::world::{World, key};
use openssl::ec::{EcGroup, EcKey};
use openssl::nid::Nid;
use openssl::pkey::PKey;

/// The first one is asked first by whoever looks into every reader.
fn cards(world: &World) -> anyhow::Result<(VirtualPiv, VirtualPiv)> {
    let first = VirtualPiv::create(&world.path("first"), 11_223_344)?;
    let second = first.beside(&world.path("second"), 55_667_788)?;
    for card in [&first, &second] {
        card.change_pin()?;
    }
    Ok((first, second))
}

fn signs(world: &World, key: &str) -> anyhow::Result<bool> {
    let signature = format!("{key}.sig");
    let output = world.omsign(&["sign", "agent.toml", "--key", key, "--signature", &signature])?;
    Ok(output.status.success())
}

#[test]
fn one_waits_for_a_finger_and_the_other_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = cards(&world)?;
    first.generate("9a", "ECCP256", &["--touch-policy=always"])?;
    second.generate("9a", "ECCP256", &[])?;
    let tokens = first.section("first") + &second.section("second") + "timeout = \"5s\"\n";
    let keys = ["first", "second"].map(|token| key(token, token, "slot = \"9a\"")).concat();
    let agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    eventually("the second one", || signs(&world, "second"))?;
    let hosts = agent.hosts()?;
    // Until the agent let go of it.
    let rested = Instant::now();
    eventually("a pause", || Ok(rested.elapsed() > Duration::from_millis(3500)))?;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| signs(&world, "first"));
        eventually("the first one's wait", || Ok(first.waits_for_touch()))?;
        let signed = signs(&world, "second")?;
        let meanwhile = first.waits_for_touch();
        first.touch();
        ensure!(signed && meanwhile, "the second one waited: {}", agent.log()?);
        ensure!(waits.join().expect("it does not panic")?, "{}", agent.log()?);
        Ok(())
    })?;
    ensure!(agent.hosts()? == hosts, "{}", agent.log()?);
    Ok(())
}

/// With what its owner put on both.
#[test]
fn a_key_on_both() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = cards(&world)?;
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let private = PKey::from_ec_key(EcKey::generate(&group)?)?;
    let public = first.import("9a", &private)?;
    second.import("9a", &private)?;
    let tokens = first.section("first") + &second.section("second");
    let on_both = key("k", "first", "slot = \"9a\"").replace("\"first\"", "[\"first\", \"second\"]");
    let config = world.listen() + &tokens + &on_both;
    world.write("agent.toml", config.replace("\"9a\"", "\"9c\""))?;
    refuses(&world, &["generate", "k"], "a key that is made here can never be on second, too")?;
    let agent = Agent::start(&world, &config)?;
    world.until_ready()?;
    let public = public.display().to_string();
    let both_sign = || {
        let before = world.audit()?.len();
        for _ in 0..4 {
            ensure!(signs(&world, "k")?, "{}", agent.log()?);
            world.omsign_ok(&["verify", "agent.toml", "--signature", "k.sig", "--public-key", &public])?;
        }
        let audit = world.audit()?;
        let by = |token: &str| audit.iter().skip(before).filter(|line| line["token"] == token).count();
        anyhow::Ok((by("first"), by("second")))
    };
    ensure!(both_sign()? == (2, 2), "they do not take turns");
    // Out in the middle of a signature, and then for a while.
    first.set(Faults { pull: true, ..Faults::default() });
    both_sign()?;
    first.unplug();
    ensure!(both_sign()? == (0, 4));
    first.plug();
    eventually("the first one", || Ok(both_sign()?.0 > 0))?;
    ensure!(first.pin_tries()? == 3 && second.pin_tries()? == 3);
    Ok(())
}
