//! Keyless bundles of a model with two files, how they are verified, and what sigstore-python says of them.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use crate::forge;
use crate::peer::cache;
use crate::random::Random;
use crate::sigstore::Sigstore;
use crate::world::World;

/// Who signs.
pub const IDENTITY: &str = "https://github.com/acme/models/.github/workflows/release.yml@refs/tags/v1";
/// And who vouches for it.
pub const PROVIDER: &str = "https://token.actions.githubusercontent.com";
/// The model's files.
pub const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("weights.bin", "some weights")];

/// A world with a model, its statement, and an instance whose trusted root is in `root.json`.
pub fn instance(world: &World) -> anyhow::Result<(Sigstore<'_>, Vec<u8>)> {
    for (name, content) in FILES {
        world.write(&format!("model/{name}"), content)?;
    }
    let sigstore = Sigstore::new(world)?;
    world.write("root.json", serde_json::to_vec(&sigstore.trusted_root()?)?)?;
    Ok((sigstore, serde_json::to_vec(&forge::statement(&FILES))?))
}

/// How a bundle `k.sig` is verified.
pub const VERIFY: [&str; 11] = [
    "verify",
    "sigstore",
    "model",
    "--signature",
    "k.sig",
    "--identity",
    IDENTITY,
    "--identity-provider",
    PROVIDER,
    "--trusted-root",
    "root.json",
];

/// What sigstore-python says of each bundle.
pub fn sigstore_python(world: &World, bundles: &[String]) -> anyhow::Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/sigstore_verify.py");
    let mut command = Command::new(cache("reference/bin/python")?);
    command.arg(script).args(["root.json", IDENTITY, PROVIDER]).args(bundles).current_dir(world.path(""));
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    ensure!(lines.len() == bundles.len(), "{lines:?}");
    Ok(lines)
}

/// One bit of what base64 stands for, or one character where it is not base64.
pub fn flipped(text: &str, random: &mut Random) -> String {
    match openssl::base64::decode_block(text) {
        Ok(mut bytes) if text.len() > 20 && !text.contains('\n') => {
            let position = random.below(bytes.len());
            bytes[position] ^= 1 << random.below(8);
            openssl::base64::encode_block(&bytes)
        }
        _ => {
            let mut characters: Vec<char> = text.chars().collect();
            let position = random.below(characters.len());
            characters[position] = if characters[position] == '7' { '8' } else { '7' };
            characters.into_iter().collect()
        }
    }
}
