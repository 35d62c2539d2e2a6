//! Whatever is flipped, verification fails with exit status 1, and never with a panic.

use std::path::Path;

use anyhow::ensure;
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::softhsm::KeyType;
use omsign_tests::agent::Agent;
use omsign_tests::random::Random;
use omsign_tests::world::{World, key_section, text, token_section};
use openssl::pkey::PKey;

/// Positions tried in each file, besides its first and last bytes.
const SAMPLES: u64 = 400;

/// Flips one bit at a time in `file` and verifies each time.
fn flip(world: &World, file: &Path, verify: &[&str], samples: u64) -> anyhow::Result<()> {
    let original = std::fs::read(file)?;
    let mut random = Random(2026);
    let mut positions: Vec<usize> = (0..samples).map(|_| random.below(original.len())).collect();
    positions.extend([0, 1, original.len() / 2, original.len() - 1]);
    for position in positions {
        let mut flipped = original.clone();
        let bit = random.below(8);
        flipped[position] ^= 1 << bit;
        std::fs::write(file, &flipped)?;
        let output = world.omsign(verify)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let what = format!("bit {bit} of byte {position} of {}", file.display());
        ensure!(output.status.code() == Some(1), "{what}: {:?}: {errors}", output.status);
        ensure!(errors.starts_with("error: ") && !errors.contains("panicked"), "{what}: {errors}");
    }
    std::fs::write(file, original)?;
    world.omsign_ok(verify)?;
    Ok(())
}

#[test]
fn any_bit_of_a_bundle_or_a_model_file() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P384)?;
    let root = Ca::create("Root")?;
    let issuing = root.intermediate("Issuing")?;
    let public = PKey::public_key_from_pem(&std::fs::read(token.public_key("k"))?)?;
    write_chain(&world.path("root.pem"), &[&root.certificate])?;
    write_chain(&world.path("chain.pem"), &[&issuing.code_signing("k", &public)?, &issuing.certificate])?;
    let agent = Agent::start(
        &world,
        &(world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k")),
    )?;
    let model = world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "key.sig"])?;
    world.omsign_ok(&[
        "sign",
        "model",
        "--key",
        "k",
        "--signature",
        "cert.sig",
        "--certificate-chain",
        "chain.pem",
    ])?;
    drop(agent);
    let public = text(&token.public_key("k"));
    let by_key = ["verify", "model", "--signature", "key.sig", "--public-key", &public];
    let by_certificate = ["verify", "model", "--signature", "cert.sig", "--certificate-chain", "root.pem"];
    flip(&world, &world.path("key.sig"), &by_key, SAMPLES)?;
    flip(&world, &world.path("cert.sig"), &by_certificate, SAMPLES)?;
    for entry in std::fs::read_dir(&model)? {
        let path = entry?.path();
        if path.is_file() {
            flip(&world, &path, &by_key, 8)?;
        }
    }
    // Cut short at any length, a bundle is no bundle.
    let whole = std::fs::read(world.path("key.sig"))?;
    for length in (0..whole.len() - 1).step_by(97) {
        std::fs::write(world.path("key.sig"), &whole[..length])?;
        world.omsign_fails(1, &by_key)?;
    }
    Ok(())
}
