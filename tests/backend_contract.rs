//! What every kind of device has to do, the same for all of them, through the real binaries.

use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::abrmd::Abrmd;
use omsign_fixtures::built;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::swtpm::SwTpm;
use omsign_fixtures::tpm_device::TpmDevice;
use omsign_tests::agent::Agent;
use omsign_tests::device::{
    Device, Expected, RemoteToken, card, card_through, kryoptic, soft_hsm, soft_hsm_with_rsa, tpm,
    tpm_through_pkcs11,
};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key, text};

/// Lists, signs and verifies with every key; says what the device is; keeps its secret to itself.
fn holds(world: &World, device: &Device) -> anyhow::Result<()> {
    let agent = Agent::start(world, &(world.listen() + &device.token + &device.keys))?;
    world.model()?;
    for key in &device.expected {
        // Once it is open, however long that takes.
        world.omsign_ok(&["keys", "export", key.name])?;
    }
    let listed: serde_json::Value = serde_json::from_str(&world.omsign_ok(&["keys", "--json"])?)?;
    let listed = listed["keys"].as_array().context("keys")?;
    ensure!(listed.len() == device.expected.len(), "{listed:?}");
    for key in &device.expected {
        let shown = listed.iter().find(|shown| shown["name"] == key.name).context(key.name)?;
        ensure!(shown["state"] == "ready" && shown["algorithm"] == key.algorithm, "{shown}");
        let shows = |device: &str| !device.is_empty() && !device.contains(char::is_control);
        ensure!(shown["device"].as_str().is_some_and(shows), "{shown}");
        let exported = world.omsign_ok(&["keys", "export", key.name])?;
        let expected = std::fs::read_to_string(&key.public)?;
        ensure!(exported == expected, "{}: {exported}\n{expected}", key.name);
        let signature = format!("{}.sig", key.name);
        let sign = ["sign", "model", "--key", key.name, "--signature", &signature];
        if key.algorithm.starts_with("ecdsa") {
            world.omsign_ok(&sign)?;
        } else {
            let refused = ["is not an algorithm of OMS", "hint: --allow-nonstandard-key"];
            world.omsign_refuses(2, &sign, &refused)?;
            world.omsign_ok(&[&sign[..], &["--allow-nonstandard-key"]].concat())?;
        }
        let public = text(&key.public);
        world.omsign_ok(&["verify", "model", "--signature", &signature, "--public-key", &public])?;
    }
    let log = agent.log()?;
    ensure!(!log.contains(device.secret), "{log}");
    let audit = std::fs::read_to_string(world.path("audit/audit.jsonl"))?;
    ensure!(!audit.contains(device.secret));
    ensure!(agent.stop()?.success());

    device.signs_alone(world)?;
    let (output, report) = world.doctor()?;
    ensure!(output.success(), "{report}");
    for key in &device.expected {
        ensure!(report.contains(&format!(": {}, signs and verifies", key.algorithm)), "{report}");
    }
    ensure!(!report.contains(device.secret), "{report}");
    Ok(())
}

#[test]
fn softhsm() -> anyhow::Result<()> {
    let world = World::new()?;
    holds(&world, &soft_hsm(&world)?)
}

#[test]
fn softhsm_with_large_rsa_keys() -> anyhow::Result<()> {
    let world = World::new()?;
    holds(&world, &soft_hsm_with_rsa(&world)?)
}

/// Through the module that injects faults, while it injects none.
#[test]
fn fault_proxy() -> anyhow::Result<()> {
    let world = World::new()?;
    let (mut device, proxy) = (soft_hsm(&world)?, world.proxy()?);
    device.token = proxy.before(&device.token)?;
    holds(&world, &device)?;
    ensure!(proxy.calls("C_Sign") > 0 && proxy.tries() == 0);
    Ok(())
}

/// A token of another process, as of another machine, through p11-kit.
#[test]
fn p11_kit() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut device = soft_hsm(&world)?;
    let _server = RemoteToken::of(&world, &mut device)?;
    holds(&world, &device)
}

#[test]
fn kryoptic_with_ml_dsa() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let device = kryoptic(&world, &stand_in)?;
    holds(&world, &device)
}

#[test]
fn swtpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    let device = tpm(&stand_in)?;
    holds(&world, &device)
}

/// The same as a character device.
#[test]
fn tpm_device() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    let mut device = tpm(&stand_in)?;
    let driver = TpmDevice::create(&world.path("tpm0"), &stand_in)?;
    device.is_reached_by(&stand_in.tcti(), &driver.tcti());
    holds(&world, &device)
}

/// The resource manager in user space before a TPM.
fn manages(world: &World, stand_in: &SwTpm, device: &mut Device) -> anyhow::Result<Abrmd> {
    let manager = Abrmd::create(&world.path("tpm"), stand_in)?;
    let (name, address) = manager.environment();
    device.is_reached_by(&stand_in.tcti(), manager.tcti());
    device.token += &format!("env.{name} = \"{address}\"\n");
    device.environment.push((name, address.into()));
    Ok(manager)
}

#[test]
fn tpm2_abrmd() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    let mut device = tpm(&stand_in)?;
    let _manager = manages(&world, &stand_in, &mut device)?;
    holds(&world, &device)
}

#[test]
fn virtual_piv() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    holds(&world, &device)
}

/// Kinds of keys, and slots, that not every firmware has, made by omsign.
#[test]
fn virtual_piv_with_every_kind() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let kinds = [
        ("management", "9d", "p384", "ecdsa-p384-sha384"),
        ("authentication", "9e", "p256", "ecdsa-p256-sha256"),
        ("rsa3072", "84", "rsa3072", "rsa-pkcs1-sha256"),
        ("rsa4096", "95", "rsa4096", "rsa-pkcs1-sha256"),
        ("ed25519", "90", "ed25519", "ed25519"),
    ];
    let mut device = card(&stand_in)?;
    stand_in.protect_management_key()?;
    device.keys =
        kinds.iter().map(|(name, slot, ..)| key(name, "device", &format!("slot = \"{slot}\""))).collect();
    device.expected.clear();
    world.write("agent.toml", world.listen() + &device.token + &device.keys)?;
    for (name, slot, kind, algorithm) in kinds {
        let public = does(&world, &["generate", name, "--type", kind])?;
        let public = world.write(&format!("{name}.pub.pem"), public)?;
        let uri = format!("piv:serial=11223344;slot={slot}?pin-source={}", stand_in.pin_file().display());
        device.expected.push(Expected { name, algorithm, public, uri });
    }
    holds(&world, &device)?;
    // An Ed25519 key is given the whole statement, which grows with the model: up to what fits into the card.
    let uri = &device.expected.last().context("a key")?.uri;
    let public = text(&world.path("ed25519.pub.pem"));
    for (files, fits) in [(1, true), (2, true), (16, true), (17, true), (18, true), (25, false)] {
        let model = format!("model-{files}");
        for number in 0..files {
            world.write(&format!("{model}/weights-{number:02}"), "")?;
        }
        let mut sign = Command::new(built("omsign")?);
        sign.args(["sign", &model, "--allow-nonstandard-key", "--signature", "ed.sig", "--key-uri", uri]);
        world.without_surprises(sign.current_dir(world.path("")));
        let signed = sign.env("PCSCLITE_CSOCK_NAME", stand_in.socket()).output()?;
        if fits {
            ensure!(signed.status.success(), "{files}: {signed:?}");
            world.omsign_ok(&["verify", &model, "--signature", "ed.sig", "--public-key", &public])?;
        } else {
            let errors = String::from_utf8(signed.stderr)?;
            ensure!(
                errors.contains("more than the card takes for an Ed25519 key; use a P-256 key"),
                "{errors}"
            );
        }
    }
    Ok(())
}

/// With a key that asks for the PIN before every signature.
#[test]
fn ykcs11() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    holds(&world, &card_through(&stand_in, "libykcs11.so", &["9a", "9c", "9e"])?)
}

#[test]
fn opensc() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    holds(&world, &card_through(&stand_in, "opensc-pkcs11.so", &["9a", "9c", "9e"])?)
}

/// With keys that omsign made: one, since without a resource manager the module has no room for more, and with one several.
#[test]
fn tpm2_pkcs11() -> anyhow::Result<()> {
    for managed in [false, true] {
        let world = World::new()?;
        let stand_in = SwTpm::create(&world.path("tpm"))?;
        let mut device = tpm_through_pkcs11(&world, &stand_in)?;
        let _manager = if managed { Some(manages(&world, &stand_in, &mut device)?) } else { None };
        if !managed {
            device.loses("p384");
            device.loses("rsa2048");
        }
        world.write("agent.toml", world.listen() + &device.token + &device.keys)?;
        for key in &device.expected {
            std::fs::write(&key.public, does(&world, &["generate", key.name, "--type", key.name])?)?;
        }
        holds(&world, &device)?;
    }
    Ok(())
}
