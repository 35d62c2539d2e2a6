//! A key that asks for the PIN before every signature (CKA_ALWAYS_AUTHENTICATE), through ykcs11: the agent gives it each time,
//! and what goes wrong in between costs no try.

use anyhow::ensure;
use omsign_fixtures::piv::{PIN, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
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
    // After a login that was answered, but nobody knows how, and when the PIN is another, nothing is offered any more.
    let login = |row,
                 wrong: &dyn Fn() -> anyhow::Result<()>,
                 right: &dyn Fn() -> anyhow::Result<()>,
                 lab: &mut Lab| {
        let logins = proxy.calls("C_Login");
        lab.trial(
            row,
            (Sees::Locked, AT_ONCE),
            &tries,
            |_| wrong(),
            |lab| {
                for _ in 0..3 {
                    lab.world.omsign_fails(2, &["sign", "agent.toml", "--key", "k"])?;
                }
                // That of the look before the row, and one.
                ensure!(
                    proxy.calls("C_Login") == logins + 2,
                    "{row}: {} logins",
                    proxy.calls("C_Login") - logins
                );
                right()?;
                lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
            },
        )
    };
    login("a vendor's answer", &|| proxy.set("C_Login 80000001 0\n"), &|| proxy.set(""), &mut lab)?;
    let change = |from: &str, to: &str| card.tool(&["-a", "change-pin", "-P", from, "-N", to]).map(drop);
    login("the PIN is changed", &|| change(PIN, "86420975"), &|| change("86420975", PIN), &mut lab)?;
    ensure!(card.wrong_pins() == 1, "{} wrong PINs", card.wrong_pins());
    Ok(())
}

/// SoftHSM signs them in one call only, which says so; its other key is served.
#[test]
fn where_it_cannot_be() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let make = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "k", "--id", "01"];
    token.tool(&[&make[..], &["--usage-sign", "--always-auth"]].concat())?;
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let keys = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let config = world.listen() + &token_section("t", &token, "") + &keys;
    let agent = Agent::start(&world, &config)?;
    eventually("the reason", || {
        Ok(agent.log()?.contains("use a key without CKA_ALWAYS_AUTHENTICATE there"))
    })?;
    let said = world.omsign_fails(2, &["sign", "agent.toml", "--key", "k"])?;
    ensure!(said.contains("takes what it signs in one call only"), "{said}");
    world.omsign_ok(&["sign", "agent.toml", "--key", "other"]).map(drop)
}
