//! What every kind of device has to do, the same for all of them, through the real binaries.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_tests::agent::Agent;
use omsign_tests::world::{World, key, key_section, text, token_section};

/// A key to try: its section, and its public half as the device's own tools give it.
struct Expected {
    name: &'static str,
    algorithm: &'static str,
    public: PathBuf,
}

/// A device with keys, in the words of the configuration.
struct Device {
    token: String,
    keys: String,
    expected: Vec<Expected>,
    /// Further lines of the token's section for a PIN that is wrong.
    secret: &'static str,
}

fn soft_hsm(world: &World) -> anyhow::Result<Device> {
    let token = world.token("soft", "p256", KeyType::P256)?;
    let mut expected =
        vec![Expected { name: "p256", algorithm: "ecdsa-p256-sha256", public: token.public_key("p256") }];
    for (name, key_type, algorithm) in
        [("p384", KeyType::P384, "ecdsa-p384-sha384"), ("p521", KeyType::P521, "ecdsa-p521-sha512")]
    {
        token.generate(name, key_type, omsign_fixtures::softhsm::Objects::Pair)?;
        expected.push(Expected { name, algorithm, public: token.public_key(name) });
    }
    Ok(Device {
        token: token_section("device", &token, ""),
        keys: expected.iter().map(|key| key_section(key.name, "device", key.name)).collect(),
        expected,
        secret: omsign_fixtures::softhsm::PIN,
    })
}

fn tpm(tpm: &SwTpm) -> anyhow::Result<Device> {
    let persistent = tpm.persistent_key("p256", "ecc256", 0x8100_0010, Some(AUTH))?;
    let (file, public) = tpm.key_file("p384", "P-384")?;
    let (pin, tcti) = (tpm.pin_file(), tpm.tcti());
    Ok(Device {
        token: format!(
            "\n[token.device]\nbackend = \"tpm\"\ntcti = \"{tcti}\"\npin = {{ file = \"{}\" }}\n",
            pin.display()
        ),
        keys: key("p256", "device", "handle = \"0x81000010\"")
            + &key("p384", "device", &format!("file = \"{}\"", file.display())),
        expected: vec![
            Expected { name: "p256", algorithm: "ecdsa-p256-sha256", public: persistent },
            Expected { name: "p384", algorithm: "ecdsa-p384-sha384", public },
        ],
        secret: AUTH,
    })
}

fn card(card: &VirtualPiv) -> anyhow::Result<Device> {
    card.change_pin()?;
    // 9c asks for the PIN before every signature.
    let expected = vec![
        Expected {
            name: "p256",
            algorithm: "ecdsa-p256-sha256",
            public: card.generate("9c", "ECCP256", &[])?,
        },
        Expected {
            name: "p384",
            algorithm: "ecdsa-p384-sha384",
            public: card.generate("82", "ECCP384", &[])?,
        },
    ];
    let (serial, pin, socket) = (card.serial, card.pin_file(), card.socket());
    Ok(Device {
        token: format!(
            "\n[token.device]\nbackend = \"piv\"\nserial = {serial}\npin = {{ file = \"{}\" }}\n\
             env.PCSCLITE_CSOCK_NAME = \"{}\"\n",
            pin.display(),
            socket.display()
        ),
        keys: key("p256", "device", "slot = \"9c\"") + &key("p384", "device", "slot = \"82\""),
        expected,
        secret: piv::PIN,
    })
}

/// Lists, signs and verifies with every key; says what the device is; keeps its secret to itself.
fn holds(world: &World, device: &Device) -> anyhow::Result<()> {
    let agent = Agent::start(world, &(world.listen() + &device.token + &device.keys))?;
    world.model()?;
    let listed: serde_json::Value = serde_json::from_str(&world.omsign_ok(&["keys", "--json"])?)?;
    let listed = listed["keys"].as_array().context("keys")?;
    ensure!(listed.len() == device.expected.len(), "{listed:?}");
    for key in &device.expected {
        let shown = listed.iter().find(|shown| shown["name"] == key.name).context(key.name)?;
        ensure!(shown["state"] == "ready" && shown["algorithm"] == key.algorithm, "{shown}");
        ensure!(shown["device"].as_str().is_some_and(|device| !device.is_empty()), "{shown}");
        let exported = world.omsign_ok(&["keys", "export", key.name])?;
        let expected = std::fs::read_to_string(&key.public)?;
        ensure!(exported == expected, "{}: {exported}\n{expected}", key.name);
        let signature = format!("{}.sig", key.name);
        world.omsign_ok(&["sign", "model", "--key", key.name, "--signature", &signature])?;
        let public = text(&key.public);
        world.omsign_ok(&["verify", "model", "--signature", &signature, "--public-key", &public])?;
    }
    let log = agent.log()?;
    ensure!(!log.contains(device.secret), "{log}");
    let audit = std::fs::read_to_string(world.path("audit/audit.jsonl"))?;
    ensure!(!audit.contains(device.secret));
    ensure!(agent.stop()?.success());

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
fn swtpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    let device = tpm(&stand_in)?;
    holds(&world, &device)
}

#[test]
fn virtual_piv() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    holds(&world, &device)
}
