//! Bundles of the certificate method, of a model with one file, and how they are verified.

use openssl::base64::encode_block;
use serde_json::{Value, json};

use crate::forge;
use crate::pki::{Certificate, Pki};
use crate::world::World;

/// The model's files.
pub const FILES: [(&str, &str); 1] = [("weights.bin", "some weights")];

/// A world with the model in `model/`.
pub fn world() -> anyhow::Result<World> {
    world_of(&FILES)
}

/// A world with these files in `model/`.
pub fn world_of(files: &[(&str, &str)]) -> anyhow::Result<World> {
    let world = World::new()?;
    for (name, content) in files {
        world.write(&format!("model/{name}"), content)?;
    }
    Ok(world)
}

/// The same with a key `k.key`, `k.pub`, and its certificate `k.pem` of `root.pem`.
pub fn world_with_signer(files: &[(&str, &str)]) -> anyhow::Result<World> {
    let world = world_of(files)?;
    let pki = Pki::new(&world);
    pki.root("root")?;
    pki.issue("k", "root", Certificate::default())?;
    world.write("k.pub", forge::private_key(&world.path("k.key"))?.public_key_to_pem()?)?;
    Ok(world)
}

/// Writes a bundle by `NAME.key` with this chain, in `c.sig`. Returns the signature.
pub fn sign(world: &World, name: &str, chain: &[&str]) -> anyhow::Result<Vec<u8>> {
    let payload = payload()?;
    let signature = forge::sign(&forge::private_key(&world.path(&format!("{name}.key")))?, &payload)?;
    let chain = forge::chain_material(&Pki::new(world).bundle("chain.pem", chain)?)?;
    write(world, &chain, &signature, &[])?;
    Ok(signature)
}

/// The statement that is signed.
pub fn payload() -> anyhow::Result<Vec<u8>> {
    Ok(serde_json::to_vec(&forge::statement(&FILES))?)
}

/// Writes a bundle with time stamps.
pub fn write(world: &World, material: &Value, signature: &[u8], stamps: &[Vec<u8>]) -> anyhow::Result<()> {
    let mut material = material.clone();
    let stamps: Vec<_> =
        stamps.iter().map(|stamp| json!({ "signedTimestamp": encode_block(stamp) })).collect();
    if !stamps.is_empty() {
        material["timestampVerificationData"] = json!({ "rfc3161Timestamps": stamps });
    }
    world.write("c.sig", forge::bundle(&material, &payload()?, signature).to_string()).map(drop)
}

/// Verifies it, with these certificates and further flags.
pub fn verify<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["verify", "certificate", "model", "--signature", "c.sig", "--certificate-chain"], more].concat()
}
