//! Keys that ask for the PIN before every signature (CKA_ALWAYS_AUTHENTICATE): the agent gives it each time, and what goes
//! wrong in between costs no try.

use std::process::Output;

use anyhow::ensure;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{PIN, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_tests::agent::{Agent, SOON, eventually};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::device::{Device, card_through, kryoptic_that_asks, soft_hsm_that_asks};
use omsign_tests::lab::{AT_ONCE, HANG, Lab, Sees};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section, text, token_section};
use openssl::pkey::PKey;
use openssl::x509::X509Req;

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
    let locked = (Sees::Locked, AT_ONCE);
    let login = |row,
                 sees,
                 wrong: &dyn Fn() -> anyhow::Result<()>,
                 right: &dyn Fn() -> anyhow::Result<()>,
                 lab: &mut Lab| {
        let logins = proxy.calls("C_Login");
        lab.trial(
            row,
            sees,
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
    // Nobody knows what became of a PIN that was not answered, and the next process does not find it out; nor is one
    // forgotten that was refused, whatever fails then, or what a fresh session would heal otherwise.
    for (row, sees, lines) in [
        ("hangs in the login", (Sees::Unavailable, HANG), "C_Login 0 600000\n"),
        ("crashes in the login", (Sees::Unavailable, AT_ONCE), "C_Login segv 0\n"),
        ("a vendor's answer", locked.clone(), "C_Login 80000001 0\n"),
        ("canceled", locked.clone(), "C_Login 50 0\n"),
        ("refused, and then no session", locked.clone(), "C_Login a0 0\nC_OpenSession 30 0\n"),
    ] {
        login(row, sees, &|| proxy.set(lines), &|| proxy.set(""), &mut lab)?;
    }
    let change = |from: &str, to: &str| card.tool(&["-a", "change-pin", "-P", from, "-N", to]).map(drop);
    login("the PIN is changed", locked, &|| change(PIN, "86420975"), &|| change("86420975", PIN), &mut lab)?;
    ensure!(card.wrong_pins() == 1, "{} wrong PINs", card.wrong_pins());
    Ok(())
}

/// The PIN that was accepted once is not offered again where a wrong one would be the last, until an operator says so.
#[test]
fn somebody_enters_wrong_pins_meanwhile() -> anyhow::Result<()> {
    let world = World::new()?;
    let (proxy, config) = two_keys(&world)?;
    let agent = Agent::start(&world, &(world.listen() + &config))?;
    eventually("the key", || Ok(signs(&world, "p256")?.status.success()))?;
    let logins = proxy.calls("C_Login");
    proxy.set("C_GetTokenInfo last 0\n")?;
    ensure!(signs(&world, "a")?.status.success(), "that one needs no PIN");
    for _ in 0..2 {
        let said = world.omsign_fails(2, &["sign", "agent.toml", "--key", "p256"])?;
        ensure!(said.contains("one wrong PIN more would block it"), "{said}: {}", agent.log()?);
    }
    ensure!(proxy.calls("C_Login") == logins, "{} logins", proxy.calls("C_Login") - logins);
    proxy.set("")?;
    world.omsign_ok(&["agent", "unlock", "device"])?;
    ensure!(signs(&world, "p256")?.status.success());
    Ok(())
}

/// Modules that take a digest in one call only are given the statement, and hash it themselves.
fn hashes(world: &World, device: &Device) -> anyhow::Result<()> {
    let proxy = world.proxy()?;
    world.model()?;
    let agent = Agent::start(world, &(world.listen() + &proxy.before(&device.token)? + &device.keys))?;
    let keys = || {
        let listed: serde_json::Value = serde_json::from_str(&world.omsign_ok(&["keys", "--json"])?)?;
        anyhow::Ok(listed["keys"].as_array().cloned().unwrap_or_default())
    };
    eventually("the keys", || Ok(keys()?.iter().all(|key| key["state"] == "ready")))?;
    for key in &device.expected {
        let shown = keys()?.into_iter().find(|shown| shown["name"] == key.name);
        ensure!(shown.is_some_and(|shown| shown["algorithm"] == key.algorithm), "{}", key.name);
        std::fs::write(&key.public, world.omsign_ok(&["keys", "export", key.name])?)?;
        let logins = proxy.calls("C_Login");
        let (name, signature) = (key.name, format!("{}.sig", key.name));
        let sign = ["sign", "model", "--key", name, "--signature", &signature, "--allow-nonstandard-key"];
        world.omsign_ok(&sign)?;
        ensure!(proxy.calls("C_Login") == logins + 1, "{name}: {}", proxy.calls("C_Login") - logins);
        let public = text(&key.public);
        world.omsign_ok(&["verify", "model", "--signature", &signature, "--public-key", &public])?;
        // What an operator has it sign.
        let request = X509Req::from_pem(does(world, &["csr", name, "--subject", "CN=k"])?.as_bytes())?;
        let public = PKey::public_key_from_pem(&std::fs::read(&key.public)?)?;
        ensure!(request.verify(&public)?, "{name}: its request");
    }
    // Other programs that send a digest are told what to send.
    let refused = run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        anyhow::Ok(sign(&mut client, request("rsa", 1, &[7; 32]), SOON).await)
    })?;
    ensure!(refused.is_err_and(|status| status.message().contains("send the statement")));
    ensure!(proxy.refused_pins() == 0 && agent.stop()?.success());
    device.signs_alone(world)
}

/// Before anything is hashed for hours.
#[test]
fn a_statement_that_is_too_long() -> anyhow::Result<()> {
    let world = World::new()?;
    let device = soft_hsm_that_asks(&world)?;
    let _agent = Agent::start(&world, &(world.listen() + &device.token + &device.keys))?;
    eventually("the key", || Ok(world.omsign_ok(&["keys"])?.contains("ready")))?;
    std::fs::File::create(world.path("weights"))?.set_len(1 << 40)?;
    let sign = ["sign", "weights", "--key", "rsa", "--allow-nonstandard-key", "--shard-size", "1048576"];
    let said = world.omsign_fails(2, &sign)?;
    ensure!(said.contains("signs statements, of at most 15728640 bytes") && said.contains("hint:"), "{said}");
    Ok(())
}

#[test]
fn kryoptic_hashes() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("t"), "t")?;
    hashes(&world, &kryoptic_that_asks(&world, &token)?)
}

#[test]
fn softhsm_hashes() -> anyhow::Result<()> {
    let world = World::new()?;
    hashes(&world, &soft_hsm_that_asks(&world)?)
}

/// A kryoptic token with one key that asks each time, `p256`, and one that does not; and its section, behind a proxy.
fn two_keys(world: &World) -> anyhow::Result<(FaultProxy, String)> {
    let token = Kryoptic::create(&world.path("t"), "t")?;
    let device = kryoptic_that_asks(world, &token)?;
    let login = ["--token-label", "t", "--login", "--pin", device.secret];
    let make = ["--keypairgen", "--key-type", "EC:prime256v1", "--label", "a", "--usage-sign"];
    token.tool(&[&login[..], &make].concat())?;
    let keys = ["a", "p256"].map(|name| key_section(name, "device", name)).concat();
    let proxy = world.proxy()?;
    let section = proxy.before(&(device.token + "sessions = 2\n"))?;
    Ok((proxy, section + &keys))
}

fn signs(world: &World, key: &str) -> anyhow::Result<Output> {
    let signature = format!("{key}.sig");
    world.omsign(&["sign", "agent.toml", "--key", key, "--signature", &signature])
}

/// A PIN for signatures that is not the one for logins. The next process would offer it again, to look for the key.
#[test]
fn a_pin_that_is_refused_at_the_first_signature() -> anyhow::Result<()> {
    let world = World::new()?;
    let (proxy, config) = two_keys(&world)?;
    // The first is the user's, and the second is for a digest, which kryoptic does not take.
    proxy.set("C_Login a0 0 later\n")?;
    let agent = Agent::start(&world, &(world.listen() + &config))?;
    eventually("the refusal", || Ok(world.status()?.contains("token device: locked: key p256")))?;
    for key in ["a", "p256"] {
        ensure!(signs(&world, key)?.status.code() == Some(2));
    }
    ensure!(agent.hosts()?.is_empty() && proxy.calls("C_Login") == 3, "{} logins", proxy.calls("C_Login"));
    Ok(())
}

/// A module that has no such login, as some do: nobody judged the PIN, and the token's other keys are served.
#[test]
fn a_login_that_is_none() -> anyhow::Result<()> {
    let world = World::new()?;
    let (proxy, config) = two_keys(&world)?;
    proxy.set("C_Login 103 0 later\n")?; // CKR_USER_TYPE_INVALID
    let agent = Agent::start(&world, &(world.listen() + &config))?;
    eventually("the other key", || Ok(signs(&world, "a")?.status.success()))?;
    let said = world.omsign_fails(2, &["sign", "agent.toml", "--key", "p256"])?;
    ensure!(said.contains("CKR_USER_TYPE_INVALID"), "{said}: {}", agent.log()?);
    Ok(())
}

#[test]
fn a_process_that_is_replaced_in_a_login() -> anyhow::Result<()> {
    is_replaced_in("C_Login 0 600000\n")
}

/// When the next one is about to be started.
#[test]
fn a_process_whose_pin_is_refused_when_it_is_replaced() -> anyhow::Result<()> {
    is_replaced_in("C_Login a0 3000\n")
}

/// Keys are looked for again, in another process, while the token does not answer a PIN.
fn is_replaced_in(login: &str) -> anyhow::Result<()> {
    let world = World::new()?;
    let (proxy, config) = two_keys(&world)?;
    let missing = key_section("missing", "device", "missing");
    let _agent = Agent::start(&world, &(world.listen() + &config + &missing))?;
    eventually("the key", || Ok(signs(&world, "a")?.status.success()))?;
    let logins = proxy.calls("C_Login");
    std::thread::scope(|scope| {
        // Nobody looks for keys while others are served.
        proxy.set("C_Sign 0 held\n")?;
        let served = scope.spawn(|| signs(&world, "a"));
        eventually("another key's signature", || Ok(proxy.injected("C_Sign") > 0))?;
        proxy.set(&format!("{login}C_Sign 0 held\n"))?;
        let asks = scope.spawn(|| signs(&world, "p256"));
        eventually("the login", || Ok(proxy.calls("C_Login") > logins))?;
        proxy.set(login)?;
        ensure!(served.join().expect("it does not panic")?.status.success());
        does(&world, &["generate", "missing", "--type", "p256"])?;
        eventually("its end", || Ok(world.status()?.contains("token device: locked")))?;
        asks.join().expect("it does not panic").map(drop)
    })?;
    ensure!(proxy.calls("C_Login") == logins + 1, "{} logins", proxy.calls("C_Login") - logins);
    proxy.set("")?;
    world.omsign_ok(&["agent", "unlock", "device"])?;
    ensure!(signs(&world, "missing")?.status.success() && signs(&world, "p256")?.status.success());
    Ok(())
}

/// A process that cannot go on lets a login end that is under way: otherwise nobody would know what became of it, and an
/// operator had to come.
#[test]
fn another_key_fails_meanwhile() -> anyhow::Result<()> {
    let world = World::new()?;
    let (proxy, config) = two_keys(&world)?;
    let agent = Agent::start(&world, &(world.listen() + &config))?;
    eventually("the key", || Ok(signs(&world, "a")?.status.success()))?;
    let logins = proxy.calls("C_Login");
    proxy.set("C_Login 0 held\nC_Sign 32 0\n")?;
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| signs(&world, "p256"));
        eventually("the login", || Ok(proxy.calls("C_Login") > logins))?;
        let fails = scope.spawn(|| signs(&world, "a"));
        eventually("the failure", || Ok(proxy.injected("C_Sign") > 0))?;
        ensure!(!asks.is_finished(), "they did not overlap");
        proxy.set("")?;
        fails.join().expect("it does not panic")?;
        asks.join().expect("it does not panic").map(drop)
    })?;
    eventually("both again", || {
        Ok(signs(&world, "a")?.status.success() && signs(&world, "p256")?.status.success())
    })?;
    let log = agent.log()?;
    ensure!(log.contains("the token cannot go on") && !log.contains("while logging in"), "{log}");
    Ok(())
}

/// SoftHSM 2.6 does not hash for ECDSA, which the agent says; its other key is served.
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
