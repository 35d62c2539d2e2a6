//! ML-DSA keys and certificates: what OpenSSL 3.0 knows nothing of.

use anyhow::ensure;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_tests::agent::Agent;
use omsign_tests::device::{Device, kryoptic};
use omsign_tests::operator::does;
use omsign_tests::world::{World, text};

/// Where OpenSSL cannot check a certificate, nothing is signed with it, and it is said what can be done.
#[test]
fn certified_keys() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let Device { token, keys, expected, .. } = kryoptic(&world, &token)?;
    world.write("model/weights", "some weights")?;
    let agent = Agent::start(&world, &(world.listen() + &token + &keys))?;
    let knows = openssl::version::number() >= 0x3050_0000;
    let keys: Vec<_> = expected.iter().filter(|key| key.algorithm.starts_with("ml-dsa")).collect();
    ensure!(keys.len() == 3);
    for key in keys {
        let own = does(&world, &["self-sign", key.name, "--subject", "CN=Trial"])?;
        let own = text(&world.write("own.pem", own)?);
        let sign = ["sign", "model", "--key", key.name, "--allow-nonstandard-key", "--signature", "m.sig"];
        let certified = [&sign[..], &["--signing-certificate", &own]].concat();
        if knows {
            world.omsign_ok(&certified)?;
            world.omsign_ok(&["verify", "model", "--signature", "m.sig", "--certificate-chain", &own])?;
        } else {
            let said = ["CN=Trial certifies a kind of key that OpenSSL 3.", "hint: sign with the key method"];
            world.omsign_refuses(2, &certified, &said)?;
        }
        world.omsign_ok(&sign)?;
        let public = text(&key.public);
        world.omsign_ok(&["verify", "model", "--signature", "m.sig", "--public-key", &public])?;
        // Of another kind of signer it is told before anything else.
        let chain = ["verify", "model", "--signature", "m.sig", "--certificate-chain", &own];
        world.omsign_refuses(1, &chain, &["key"])?;
    }
    ensure!(agent.stop()?.success());
    Ok(())
}
