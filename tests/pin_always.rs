//! A key that asks for the PIN before every signature (CKA_ALWAYS_AUTHENTICATE), through ykcs11: the agent gives it each time,
//! and what goes wrong in between costs no try.

use anyhow::ensure;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::SoftHsm;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::device::card_through;
use omsign_tests::lab::{AT_ONCE, HANG, Lab, Sees};
use omsign_tests::world::{World, key_section, token_section};

#[test]
fn every_signature_has_its_login() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card_through(&card, "libykcs11.so", &["9c"])?;
    let proxy = world.proxy()?;
    let mut lab = Lab::new(world, &proxy.before(&device.token)?, "id = \"02\"", 48, Some(proxy.clone()))?;
    for _ in 0..3 {
        let logins = proxy.calls("C_Login");
        ensure!(lab.sign()? == Ok(()) && proxy.calls("C_Login") == logins + 1, "{}", lab.agent.log()?);
    }
    // A login for each signature is no try.
    let counted = proxy.clone();
    let tries = || Ok(i64::try_from(counted.refused_pins())?);
    for (row, sees, lines) in [
        ("hangs with the digest", (Sees::Unavailable, HANG), "C_SignUpdate 0 600000\n"),
        ("hangs at the signature", (Sees::Unavailable, HANG), "C_SignFinal 0 600000\n"),
        ("session lost", (Sees::Nothing, AT_ONCE), "C_SignUpdate b3 0 once\n"),
        ("device removed", (Sees::Unavailable, AT_ONCE), "C_SignUpdate 32 0\n"),
        // Once in each process, of which the last row was the other's end.
        ("session lost at the signature", (Sees::Nothing, AT_ONCE), "C_SignFinal b3 0 once\n"),
        ("device error", (Sees::Unavailable, AT_ONCE), "C_SignFinal 30 0\n"),
        ("logged out", (Sees::Unavailable, AT_ONCE), "C_SignFinal 101 0\n"),
        ("crashes", (Sees::Unavailable, AT_ONCE), "C_SignFinal segv 0\n"),
    ] {
        let function = lines.split(' ').next().unwrap_or_default();
        let before = proxy.injected(function);
        lab.trial(row, sees, &tries, |_| proxy.set(lines), |_| proxy.set(""))?;
        ensure!(proxy.injected(function) > before, "{row}: nothing failed in {function}");
    }
    Ok(())
}

/// SoftHSM signs them in one call only, which says so; its other keys are served.
#[test]
fn where_it_cannot_be() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let make = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "k", "--id", "01"];
    token.tool(&[&make[..], &["--usage-sign", "--always-auth"]].concat())?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    eventually("the reason", || {
        Ok(agent.log()?.contains("use a key without CKA_ALWAYS_AUTHENTICATE there"))
    })?;
    let said = world.omsign_fails(2, &["sign", "agent.toml", "--key", "k"])?;
    ensure!(said.contains("takes what it signs in one call only"), "{said}");
    Ok(())
}
