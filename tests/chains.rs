//! Certificates at the signer's side: of an agent's key, of a key without an agent, and what is wrong with them.

use std::process::Command;

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::softhsm::MODULE;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::world::{World, text};
use openssl::pkey::PKey;
use openssl::x509::X509;

/// A token with a key, and `chain.pem` and `root.pem` of it; its configuration.
fn certified(world: &World) -> anyhow::Result<String> {
    let mut fixtures = Command::new(built("omsign-fixtures")?);
    ensure!(fixtures.arg("softhsm").arg(world.path("")).output()?.status.success());
    world.model()?;
    Ok(std::fs::read_to_string(world.path("agent.toml"))?)
}

#[test]
fn a_keys_chain_is_exported() -> anyhow::Result<()> {
    let world = World::new()?;
    let config = certified(&world)?;
    let _agent = Agent::start(&world, &config)?;
    let exported = world.omsign_ok(&["keys", "export", "release"])?;
    let chain = X509::stack_from_pem(exported.as_bytes())?;
    let own = PKey::public_key_from_pem(world.omsign_ok(&["keys", "export", "release-plain"])?.as_bytes())?;
    ensure!(chain.len() == 2 && chain[0].public_key()?.public_eq(&own), "{exported}");
    ensure!(chain[0].verify(chain[1].public_key()?.as_ref())?, "the issuer comes next");
    // And what it signs is verified with it.
    world.write("exported.pem", &exported)?;
    world.omsign_ok(&["sign", "model", "--key", "release"])?;
    world.omsign_ok(&["verify", "model", "--certificate-chain", "root.pem"])?;
    Ok(())
}

#[test]
fn without_an_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    certified(&world)?;
    let pin = text(&world.path("user.pin"));
    let uri = format!("pkcs11:token=release;object=release?module-path={MODULE}&pin-source={pin}");
    let sign = |more: &[&str]| -> anyhow::Result<()> {
        let mut sign = Command::new(built("omsign")?);
        sign.args(["sign", "model", "--key-uri", &uri]).args(more).current_dir(world.path(""));
        world.without_surprises(&mut sign);
        let output = sign.env("SOFTHSM2_CONF", world.path("softhsm2.conf")).output()?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.success() && said.contains("(certificate method)"), "{said}");
        world.omsign_ok(&["verify", "model", "--certificate-chain", "root.pem"]).map(drop)
    };
    sign(&["--certificate-chain", "chain.pem"])?;
    // As the reference has it: the leaf, then its issuers.
    let chain = X509::stack_from_pem(&std::fs::read(world.path("chain.pem"))?)?;
    world.write("leaf.pem", chain[0].to_pem()?)?;
    world.write("issuer.pem", chain[1].to_pem()?)?;
    sign(&["--signing-certificate", "leaf.pem", "--certificate-chain", "issuer.pem"])
}

#[test]
fn a_certificate_of_another_key_is_what_doctor_finds() -> anyhow::Result<()> {
    let (world, other) = (World::new()?, World::new()?);
    let config = certified(&world)?;
    world.write("agent.toml", &config)?;
    let (status, report) = world.doctor()?;
    ensure!(status.success() && report.contains("certificate_chain of 2"), "{report}");
    certified(&other)?;
    std::fs::copy(other.path("chain.pem"), world.path("chain.pem"))?;
    let (status, report) = world.doctor()?;
    ensure!(status.code() == Some(1), "{report}");
    ensure!(report.contains("key.release: its certificate is for another key"), "{report}");
    // An agent says so before anybody asks it to sign, and has nothing signed.
    let agent = Agent::start(&world, &config)?;
    let why = "certificate_chain is for another key than the one on the token";
    eventually("the log's line", || Ok(agent.log()?.contains(why)))?;
    let keys = world.omsign_ok(&["keys"])?;
    ensure!(keys.contains("unusable") && keys.contains(why), "{keys}");
    let said = world.omsign_fails(2, &["sign", "agent.toml", "--key", "release"])?;
    ensure!(said.contains(why), "{said}");
    ensure!(agent.stop()?.success());
    // Slots without a token are named, and so is a PIN file that nobody wrote.
    ensure!(report.contains("; not initialized: slot "), "{report}");
    std::fs::remove_file(world.path("user.pin"))?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("user.pin does not exist; write the PIN into it"), "{report}");
    Ok(())
}
