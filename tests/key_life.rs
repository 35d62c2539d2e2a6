//! `omsign-agent key`: keys made on the token, and certificate requests signed by it.

use std::process::{Command, Output};

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{PIN, SoftHsm};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::Agent;
use omsign_tests::device::{Device, card, soft_hsm, tpm};
use omsign_tests::world::{World, key_section, text, token_section};

/// Runs `omsign-agent key …` with the world's configuration.
fn key(world: &World, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(built("omsign-agent")?);
    command.arg("key").args(arguments).arg("--config").arg(world.path("agent.toml"));
    world.without_surprises(&mut command);
    Ok(command.output()?)
}

fn refuses(world: &World, arguments: &[&str], expected: &str) -> anyhow::Result<()> {
    let output = key(world, arguments)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    ensure!(errors.contains(expected) && !errors.contains("panicked"), "{arguments:?}: {errors}");
    Ok(())
}

#[test]
fn a_key_from_nothing() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let names = [("k", "p384"), ("rsa", "rsa2048"), ("ed", "ed25519")];
    let mut config = world.listen() + &token_section("t", &token, "");
    for (name, _) in names {
        config += &key_section(name, "t", name);
    }
    world.write("agent.toml", &config)?;
    for (name, key_type) in names {
        let output = key(&world, &["generate", name, "--type", key_type])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        world.write(&format!("{name}.pem"), &output.stdout)?;
    }
    refuses(&world, &["generate", "k"], "the token has a key with label \"k\" already")?;
    refuses(&world, &["generate", "nobody"], "there is no [key.nobody] in the configuration")?;
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    for (name, _) in names {
        let (signature, public) = (format!("{name}.sig"), format!("{name}.pem"));
        let sign = ["sign", "model", "--allow-nonstandard-key", "--key", name, "--signature", &signature];
        world.omsign_ok(&sign)?;
        world.omsign_ok(&["verify", "model", "--signature", &signature, "--public-key", &public])?;
    }
    refuses(&world, &["generate", "k"], "an agent is running and owns the device; stop it first")?;
    drop(agent);
    // Recorded, each in a file of its own.
    let mut recorded = Vec::new();
    for entry in std::fs::read_dir(world.path("audit"))? {
        let path = entry?.path();
        if path.to_string_lossy().contains("operator-") {
            recorded.push(std::fs::read_to_string(path)?);
        }
    }
    let recorded = recorded.concat();
    ensure!(recorded.matches(r#""action":"generate""#).count() == 4, "{recorded}");
    ensure!(recorded.contains(r#""outcome":"failed""#) && !recorded.contains(PIN), "{recorded}");
    Ok(())
}

#[test]
fn certificate_requests_of_every_device() -> anyhow::Result<()> {
    let (stand_in_world, world) = (World::new()?, World::new()?);
    let (chip, yubikey) = (
        SwTpm::create(&stand_in_world.path("tpm"))?,
        VirtualPiv::create(&stand_in_world.path("card"), 11_223_344)?,
    );
    for device in [soft_hsm(&stand_in_world)?, tpm(&chip)?, card(&yubikey)?] {
        let Device { token, keys, expected, .. } = device;
        world.write("agent.toml", world.listen() + &token + &keys)?;
        for one in expected {
            let subject = ["csr", one.name, "--subject", "CN=Model Release,O=Acme"];
            if one.name == "pss" {
                refuses(&world, &subject, "certificate requests for RSA-PSS keys are not supported")?;
                continue;
            }
            let output = key(&world, &subject)?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let request = text(&world.write("request.pem", &output.stdout)?);
            let mut openssl = Command::new("openssl");
            let shown =
                openssl.args(["req", "-verify", "-noout", "-text", "-pubkey", "-in", &request]).output()?;
            let shown = [shown.stdout, shown.stderr].concat();
            let shown = String::from_utf8_lossy(&shown);
            ensure!(shown.contains("verify OK"), "{}: {shown}", one.name);
            ensure!(shown.contains("Code Signing") && shown.contains("Digital Signature"), "{shown}");
            ensure!(
                shown.contains("O = Acme, CN = Model Release") || shown.contains("CN = Model Release"),
                "{shown}"
            );
            let public = std::fs::read_to_string(&one.public)?;
            ensure!(shown.contains(&public), "{}: {shown}", one.name);
        }
    }
    refuses(&world, &["csr", "p256", "--subject", "Model Release"], "is not a distinguished name")?;
    refuses(&world, &["generate", "p256"], "omsign makes keys on PKCS#11 tokens only so far")
}
