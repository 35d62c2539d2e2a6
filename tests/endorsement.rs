//! Challenges that only the TPM with a maker's endorsement certificate answers.

use anyhow::{Context as _, ensure};
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::Agent;
use omsign_tests::operator::{does, refuses, verified};
use omsign_tests::world::{World, key as key_on, text};
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Public};
use openssl::sign::Signer;
use openssl::x509::X509;

/// A certificate by this maker for the TPM's endorsement key of one kind, where makers leave it (TCG EK Credential Profile,
/// 2.2.1.4).
fn endorsed(
    chip: &SwTpm,
    world: &World,
    (kind, index): (&str, &str),
    certify: impl FnOnce(&PKey<Public>) -> anyhow::Result<X509>,
) -> anyhow::Result<()> {
    let path = |name: &str| text(&world.path(name));
    chip.tool("tpm2_createek", |tool| {
        tool.args(["-Q", "-G", kind, "-f", "pem", "-u", &path("ek.pem"), "-c", &path("ek.ctx")]);
    })?;
    chip.tool("tpm2_flushcontext", |tool| {
        tool.args(["-Q", "-t"]);
    })?;
    let key = PKey::public_key_from_pem(&std::fs::read(world.path("ek.pem"))?)?;
    let certificate = certify(&key)?.to_der()?;
    world.write("ek.der", &certificate)?;
    chip.tool("tpm2_nvdefine", |tool| {
        let size = certificate.len().to_string();
        tool.args(["-Q", index, "-C", "o", "-s", &size, "-a", "ownerwrite|ownerread|authread"]);
    })?;
    chip.tool("tpm2_nvwrite", |tool| {
        tool.args(["-Q", index, "-C", "o", "-i", &path("ek.der")]);
    })
}

/// The kinds of endorsement keys that most TPMs have.
#[test]
fn a_tpm_answers_a_challenge_with_either_endorsement_key() -> anyhow::Result<()> {
    for (kind, index) in [("ecc", "0x1c0000a"), ("rsa", "0x1c00002")] {
        let world = World::new()?;
        let (chip, maker) = (SwTpm::create(&world.path("tpm"))?, Ca::create("TPM maker")?);
        endorsed(&chip, &world, (kind, index), |key| maker.endorsement("Stand-in TPM", key))?;
        write_chain(&world.path("maker.pem"), &[&maker.certificate])?;
        let config = world.listen() + &chip.section("tpm") + &key_on("k", "tpm", "file = \"k.pem\"");
        world.write("agent.toml", &config)?;
        does(&world, &["generate", "k", "--type", "p256"])?;
        world.model()?;
        // One context for all that follows: what is left in the TPM would fill it.
        let _agent = Agent::start(&world, &config)?;
        let first = does(&world, &["attest", "k"])?;
        world.write("first.json", &first)?;
        let challenge = does(&world, &["challenge", "first.json", "--secret", "kept.json"])?;
        world.write("challenge.json", &challenge)?;
        world.write("proof.json", does(&world, &["attest", "k", "--challenge", "challenge.json"])?)?;
        let trust = ["--roots", "maker.pem", "--challenge-secret", "kept.json"];
        let (status, said) = verified(&world, "proof.json", &trust)?;
        ensure!(status == Some(0) && said.contains("in the TPM that its maker certified"), "{kind}: {said}");
        // Its last digit, of what is encrypted and of what it is encrypted with.
        // (To an RSA ciphertext that was changed, libtpms answers that it failed itself.)
        for field in if kind == "ecc" { &["credential", "secret"][..] } else { &["credential"] } {
            let mut changed: serde_json::Value = serde_json::from_str(&challenge)?;
            let text = changed[field].as_str().context("a field")?.to_owned();
            let (rest, last) = text.split_at(text.len() - 1);
            changed[field] = format!("{rest}{}", if last == "0" { "1" } else { "0" }).into();
            world.write("challenge.json", changed.to_string())?;
            for _ in 0..3 {
                let attest = ["attest", "k", "--challenge", "challenge.json"];
                refuses(&world, &attest, "for another TPM, or was changed")?;
            }
        }
        // Its own certificate, and another's attestation key.
        let other = SwTpm::create(&world.path("other"))?;
        let beside = World::new()?;
        let section = other.section("tpm") + &key_on("k", "tpm", "file = \"k.pem\"");
        beside.write("agent.toml", beside.listen() + &section)?;
        does(&beside, &["generate", "k", "--type", "p256"])?;
        let foreign: serde_json::Value = serde_json::from_str(&does(&beside, &["attest", "k"])?)?;
        let mut mixed: serde_json::Value = serde_json::from_str(&first)?;
        mixed["evidence"]["attestation_key"] = foreign["evidence"]["attestation_key"].clone();
        world.write("mixed.json", mixed.to_string())?;
        world.write(
            "challenge.json",
            does(&world, &["challenge", "mixed.json", "--secret", "mixed-kept.json"])?,
        )?;
        refuses(
            &world,
            &["attest", "k", "--challenge", "challenge.json"],
            "for another TPM, or was changed",
        )?;
        world.omsign_ok(&["sign", "model", "--key", "k"])?;
    }
    Ok(())
}

/// What comes of a challenge to a TPM whose endorsement key this maker certified.
fn challenged(world: &World, chip: &SwTpm, maker: &Ca) -> anyhow::Result<(Option<i32>, String)> {
    write_chain(&world.path("maker.pem"), &[&maker.certificate])?;
    let config = world.listen() + &chip.section("tpm") + &key_on("k", "tpm", "file = \"k.pem\"");
    world.write("agent.toml", config)?;
    does(world, &["generate", "k", "--type", "p256"])?;
    world.write("first.json", does(world, &["attest", "k"])?)?;
    world.write("challenge.json", does(world, &["challenge", "first.json", "--secret", "kept.json"])?)?;
    world.write("proof.json", does(world, &["attest", "k", "--challenge", "challenge.json"])?)?;
    verified(world, "proof.json", &["--roots", "maker.pem", "--challenge-secret", "kept.json"])
}

/// How long the head of a DER element is, and its content.
fn content(element: &[u8]) -> (usize, usize) {
    match element[1] {
        short @ ..=0x7f => (2, short.into()),
        0x81 => (3, element[2].into()),
        _ => (4, u16::from_be_bytes([element[2], element[3]]).into()),
    }
}

/// A DER element.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes();
    let head = match length {
        [0, 0, 0, low @ ..=0x7f] => vec![tag, low],
        [0, 0, 0, low] => vec![tag, 0x81, low],
        [.., high, low] => vec![tag, 0x82, high, low],
    };
    [&head, content].concat()
}

/// The same element with a FALSE written out that DER leaves out: whether its last extension, how the key is used, is critical.
fn written_out(whole: &[u8]) -> Vec<u8> {
    let (head, length) = content(whole);
    let inner = &whole[head..head + length];
    let (usage, value) = inner.split_at(inner.len().min(5));
    if usage == [6, 3, 0x55, 0x1d, 0x25] {
        return element(whole[0], &[usage, &[1, 1, 0], value].concat());
    }
    let (mut before, mut last) = (0, inner);
    while let (head, length) = content(last)
        && head + length < last.len()
    {
        before += head + length;
        last = &inner[before..];
    }
    element(whole[0], &[&inner[..before], &written_out(last)].concat())
}

/// What a maker signed need not be as DER has it, and is left as it is.
#[test]
fn a_certificate_that_is_not_quite_der() -> anyhow::Result<()> {
    let world = World::new()?;
    let (chip, maker) = (SwTpm::create(&world.path("tpm"))?, Ca::create("TPM maker")?);
    endorsed(&chip, &world, ("ecc", "0x1c0000a"), |key| {
        let strict = maker.endorsement("Stand-in TPM", key)?.to_der()?;
        let (head, length) = content(&strict);
        let signed = &strict[head..head + length];
        let (head, length) = content(signed);
        let (signed, algorithm) = signed.split_at(head + length);
        let (head, length) = content(algorithm);
        let signed = written_out(signed);
        let signature = Signer::new(MessageDigest::sha256(), &maker.key)?.sign_oneshot_to_vec(&signed)?;
        let signature = element(3, &[&[0], &signature[..]].concat());
        let loose = element(0x30, &[&signed, &algorithm[..head + length], &signature].concat());
        let kept = X509::from_der(&loose)?;
        ensure!(loose.len() > strict.len() && kept.to_der()? == loose);
        Ok(kept)
    })?;
    let (status, said) = challenged(&world, &chip, &maker)?;
    ensure!(status == Some(0) && said.contains("in the TPM that its maker certified"), "{said}");
    ensure!(said.contains("signs with its authorization value alone"), "{said}");
    Ok(())
}

/// A key of another purpose that the same authority certified reads a challenge as well: it proves nothing.
#[test]
fn only_endorsement_certificates_endorse() -> anyhow::Result<()> {
    let world = World::new()?;
    let (chip, maker) = (SwTpm::create(&world.path("tpm"))?, Ca::create("TPM maker")?);
    endorsed(&chip, &world, ("ecc", "0x1c0000a"), |key| maker.code_signing("Release", key))?;
    let (status, said) = challenged(&world, &chip, &maker)?;
    ensure!(status == Some(1) && said.contains("is one of another purpose"), "{said}");
    Ok(())
}
