//! How a key came to be: what devices show of it, and what of that another machine believes.

use std::path::Path;

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::SoftHsm;
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::device::card_through;
use omsign_tests::operator::{does, refuses, verified};
use omsign_tests::pki::{CA, Certificate, P256, Pki};
use omsign_tests::world::{World, key as key_on, key_section, text, token_section};
use openssl::pkey::PKey;
use openssl::x509::X509;

/// A copy of one that a device made which is not here.
fn golden(world: &World, file: &str) -> anyhow::Result<String> {
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(file), world.path(file))?;
    Ok(file.to_owned())
}

/// Every hexadecimal digit of the file that is changed makes it worthless.
fn breaks_when_changed(world: &World, file: &str, more: &[&str]) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(world.path(file))?;
    let evidence = text.find("\"evidence\"").context("evidence")?;
    let digits: Vec<_> =
        text.char_indices().filter(|(at, c)| *at > evidence + 60 && c.is_ascii_digit()).collect();
    let mut tried = 0;
    for (at, digit) in digits.iter().step_by(digits.len() / 60 + 1) {
        let mut changed = text.clone();
        changed.replace_range(*at..at + 1, if *digit == '7' { "8" } else { "7" });
        world.write("changed.json", changed)?;
        let (status, said) = verified(world, "changed.json", more)?;
        ensure!(status != Some(0) && !said.contains("panicked"), "digit at {at}: {said}");
        tried += 1;
    }
    ensure!(tried > 30, "only {tried} digits");
    Ok(())
}

#[test]
fn a_yubikey_attests_what_it_made() -> anyhow::Result<()> {
    let world = World::new()?;
    let yubikey = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    yubikey.change_pin()?;
    yubikey.generate("9c", "ECCP256", &["--pin-policy=always", "--touch-policy=cached"])?;
    world.write(
        "agent.toml",
        world.listen() + &yubikey.section("card") + &key_on("k", "card", "slot = \"9c\""),
    )?;
    world.write("proof.json", does(&world, &["attest", "k"])?)?;
    world.write("maker.pem", yubikey.attestation_root()?)?;
    let (status, said) = verified(&world, "proof.json", &["--roots", "maker.pem"])?;
    ensure!(status == Some(0), "{said}");
    for part in [
        "made inside the card",
        "serial 11223344",
        "firmware 5.7.1",
        "PIN policy always, touch policy cached",
    ] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    // Whoever asks about a TPM is not told about a card.
    let (status, said) =
        verified(&world, "proof.json", &["--roots", "maker.pem", "--attestation-key", "00"])?;
    ensure!(status == Some(1) && said.contains("not about a key of a TPM"), "{said}");
    // It is no card of Yubico's.
    let (status, said) = verified(&world, "proof.json", &[])?;
    ensure!(status == Some(1) && said.contains("do not lead to a root that is trusted"), "{said}");
    breaks_when_changed(&world, "proof.json", &["--roots", "maker.pem"])
}

/// What a YubiKey of 2017 made inside of itself may be known to others all the same (Yubico, YSA-2017-01).
#[test]
fn rsa_keys_that_can_be_factored() -> anyhow::Result<()> {
    let world = World::new()?;
    let yubikey = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    yubikey.change_pin()?;
    yubikey.generate("9c", "ECCP256", &[])?;
    let config = world.listen() + &yubikey.section("card") + &key_on("k", "card", "slot = \"9c\"");
    world.write("agent.toml", config)?;
    let mut proof: serde_json::Value = serde_json::from_str(&does(&world, &["attest", "k"])?)?;
    let pki = Pki::new(&world);
    pki.root("maker")?;
    pki.issue("card", "maker", Certificate { extensions: CA, ..Certificate::default() })?;
    const RSA: &str = "RSA -pkeyopt rsa_keygen_bits:2048";
    for (key, firmware, expected) in [(RSA, "040301", 1), (RSA, "040305", 0), (P256, "040301", 0)] {
        let extensions =
            format!("1.3.6.1.4.1.41482.3.3 = DER:{firmware}\n1.3.6.1.4.1.41482.3.7 = DER:020400ab4130\n");
        pki.issue("leaf", "card", Certificate { key, extensions: &extensions, ..Certificate::default() })?;
        let of = |name: &str| anyhow::Ok(X509::from_pem(&std::fs::read(world.path(name))?)?);
        let (leaf, by) = (of("leaf.pem")?, of("card.pem")?);
        proof["evidence"]["certificates"] =
            serde_json::json!([hex::encode(leaf.to_der()?), hex::encode(by.to_der()?)]);
        proof["public_key"] = hex::encode(leaf.public_key()?.public_key_to_der()?).into();
        world.write("proof.json", proof.to_string())?;
        let (status, said) = verified(&world, "proof.json", &["--roots", "maker.pem"])?;
        ensure!(status == Some(expected) && said.contains("proven: firmware 4.3."), "{firmware}: {said}");
        ensure!(said.contains("CVE-2017-15361") == (expected == 1), "{said}");
    }
    Ok(())
}

/// Where the module shows the device's own certificates, as the profile knows.
#[test]
fn a_yubikey_attests_through_pkcs11() -> anyhow::Result<()> {
    let world = World::new()?;
    let yubikey = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card_through(&yubikey, "libykcs11.so", &["9a", "9c"])?;
    world.write("agent.toml", world.listen() + &device.token + &device.keys)?;
    world.write("proof.json", does(&world, &["attest", "9c"])?)?;
    world.write("maker.pem", yubikey.attestation_root()?)?;
    let (status, said) = verified(&world, "proof.json", &["--roots", "maker.pem"])?;
    ensure!(status == Some(0) && said.contains("serial 11223344"), "{said}");
    let public = std::fs::read(&device.expected.last().context("a key")?.public)?;
    let public = PKey::public_key_from_pem(&public)?.public_key_to_der()?;
    ensure!(said.contains(&hex::encode(openssl::sha::sha256(&public))), "{said}");
    breaks_when_changed(&world, "proof.json", &["--roots", "maker.pem"])
}

/// Attestations of cards that Yubico made, published by go-piv/piv-go (5.4.3) and obelisk/sshcerts (5.2.4, 5.7.4): the
/// older root, certificates without basicConstraints, and the newer root with its intermediates.
#[test]
fn real_yubikeys_are_believed() -> anyhow::Result<()> {
    let world = World::new()?;
    for version in ["5.2.4", "5.4.3", "5.7.4"] {
        let file = golden(&world, &format!("attestation-yubikey-{version}.json"))?;
        let (status, said) = verified(&world, &file, &[])?;
        ensure!(status == Some(0) && said.contains(&format!("firmware {version}")), "{version}: {said}");
        breaks_when_changed(&world, &file, &[])?;
    }
    // A certificate that does not say that it is a CA's is believed of Yubico's old cards alone: anybody else's root may
    // have certified anything.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("agent/src/key_life/yubico/piv-root.pem");
    let (status, said) = verified(&world, "attestation-yubikey-5.2.4.json", &["--roots", &text(&root)])?;
    ensure!(status == Some(1) && said.contains("is not for signing certificates"), "{said}");
    // Nor is Yubico believed where somebody meant to say whom to believe.
    world.write("none.pem", "")?;
    let (status, said) = verified(&world, "attestation-yubikey-5.7.4.json", &["--roots", "none.pem"])?;
    ensure!(status == Some(2) && said.contains("there is no certificate among the roots"), "{said}");
    Ok(())
}

/// Attestations by YubiHSMs that Yubico made, published by blechschmidt/secsy-pki (2.4.0) and niklasgillstrom/hsm (2.2.0).
/// The second one's key may sign certificates of others, too.
#[test]
fn real_yubihsms_are_believed() -> anyhow::Result<()> {
    let world = World::new()?;
    for (version, object, capabilities) in [
        ("2.4.0", "0x7e57", "0x0000000000000080 (sign-ecdsa)"),
        ("2.2.0", "0x0024", "0x0000000400000660 (sign-pkcs, sign-pss, sign-attestation-certificate)"),
    ] {
        let file = golden(&world, &format!("attestation-yubihsm2-{version}.json"))?;
        let (status, said) = verified(&world, &file, &[])?;
        ensure!(status == Some(0), "{version}: {said}");
        for part in [format!("firmware {version}"), format!("made inside the YubiHSM 2: object {object}\n")] {
            ensure!(said.contains(&format!("proven: {part}")), "{part}: {said}");
        }
        ensure!(said.contains(capabilities), "{said}");
        let (status, said) = verified(&world, &file, &["--nonce", "00"])?;
        ensure!(status == Some(1) && said.contains("these devices take no nonce"), "{said}");
        breaks_when_changed(&world, &file, &[])?;
    }
    // What is said of a card's key is not said of this one.
    let text = std::fs::read_to_string(world.path("attestation-yubihsm2-2.4.0.json"))?;
    world.write("as-card.json", text.replace("\"yubihsm\"", "\"piv\""))?;
    let (status, said) = verified(&world, "as-card.json", &[])?;
    ensure!(status == Some(1) && said.contains("do not lead to a root that is trusted"), "{said}");
    Ok(())
}

/// Extensions of a YubiHSM's certificate about a key: what differs from one that was made there and stays there.
fn about_key(changes: &[(&str, &str)]) -> String {
    const USUAL: [(&str, &str); 7] = [
        ("1", "0403020400"),
        ("2", "020400bc614e"),
        ("3", "03020001"),
        ("4", "0303000001"),
        ("5", "0309000000000000000080"),
        ("6", "02021234"),
        ("9", "0c0172"),
    ];
    let value =
        |(name, usual)| changes.iter().find(|(other, _)| *other == name).map_or(usual, |(_, new)| *new);
    let all = USUAL.map(|one| (one.0, value(one)));
    let all = all.iter().filter(|(_, value)| !value.is_empty());
    all.map(|(name, value)| format!("1.3.6.1.4.1.41482.4.{name} = DER:{value}\n")).collect()
}

/// A YubiHSM of a maker that is trusted, with certificates by the maker's own tool about the key on a token.
#[test]
fn a_yubihsm_attests_by_its_makers_tool() -> anyhow::Result<()> {
    let world = World::new()?;
    let pki = Pki::new(&world);
    pki.root("maker")?;
    let device = format!("{CA}1.3.6.1.4.1.41482.4.2 = DER:020400bc614e\n");
    let issue = |name: &str, by: &str, extensions: &str| {
        pki.issue(name, by, Certificate { extensions, ..Certificate::default() })
    };
    issue("device", "maker", &device)?;
    issue("leaf", "device", &about_key(&[]))?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let key = PKey::private_key_from_pem(&std::fs::read(world.path("leaf.key"))?)?;
    world.write("leaf.pub", key.public_key_to_pem()?)?;
    for (file, kind) in [("leaf.key", "privkey"), ("leaf.pub", "pubkey")] {
        let file = text(&world.path(file));
        token.tool(&[
            "--write-object",
            &file,
            "--type",
            kind,
            "--label",
            "k",
            "--id",
            "01",
            "--usage-sign",
        ])?;
    }
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    world.write("agent.toml", config)?;
    let der = X509::from_pem(&std::fs::read(world.path("device.pem"))?)?.to_der()?;
    world.write("device.der", der)?;
    let attest = ["attest", "k", "--certificates", "leaf.pem"];
    refuses(&world, &attest, "the certificate of the device that issued the key's is not there")?;
    let both = [&attest[..], &["--certificates", "device.der"]].concat();
    let proof = does(&world, &both)?;
    world.write("proof.json", &proof)?;
    let trust = ["--roots", "maker.pem"];
    let (status, said) = verified(&world, "proof.json", &trust)?;
    ensure!(
        status == Some(0) && said.contains("proven: serial 12345678") && said.contains("note: its label: r"),
        "{said}"
    );
    let (status, said) = verified(&world, "proof.json", &[])?;
    ensure!(status == Some(1) && said.contains("do not lead to a root that is trusted"), "{said}");
    breaks_when_changed(&world, "proof.json", &trust)?;
    issue("other", "device", &about_key(&[]))?;
    let other = ["attest", "k", "--certificates", "other.pem", "--certificates", "device.der"];
    refuses(&world, &other, "none of the certificates is about this key")?;
    // What else a certificate by the same device may say of a key.
    let mut proof: serde_json::Value = serde_json::from_str(&proof)?;
    issue("elsewhere", "maker", &device.replace("bc614e", "bc614f"))?;
    let roots = ["maker.pem", "device.pem"].map(|file| std::fs::read(world.path(file)));
    world.write("roots.pem", roots.into_iter().collect::<Result<Vec<_>, _>>()?.concat())?;
    issue("operators", "device", &about_key(&[]))?;
    let exportable = ("5", "0309000000000000010080");
    for (by, changes, expected) in [
        (
            "device",
            &[("3", "03020002")][..],
            "NOT proven: that it was made inside the YubiHSM 2, and nowhere else: its origin is 0x02",
        ),
        ("device", &[("3", "03020011")], "its origin is 0x11, imported"),
        ("device", &[exportable], "NOT proven: that it never leaves the device"),
        ("device", &[("5", "0309000100000000000080")], "NOT proven: what it may be used for"),
        ("device", &[("3", "")], "1.3.6.1.4.1.41482.4.3 is not there once"),
        ("device", &[("5", "030a0000000000000000000080")], "1.3.6.1.4.1.41482.4.5 is malformed"),
        ("device", &[("1", "04020204")], "1.3.6.1.4.1.41482.4.1 is malformed"),
        ("elsewhere", &[], "are of different devices"),
        ("operators", &[], "is not for signing certificates"),
    ] {
        issue("leaf", by, &about_key(changes))?;
        let of = |name: &str| anyhow::Ok(X509::from_pem(&std::fs::read(world.path(name))?)?);
        let (leaf, by_whom) = (of("leaf.pem")?, of(&format!("{by}.pem"))?);
        let certificates = [leaf.to_der()?, by_whom.to_der()?].map(hex::encode);
        proof["evidence"]["certificates"] = serde_json::json!(certificates);
        proof["public_key"] = hex::encode(leaf.public_key()?.public_key_to_der()?).into();
        world.write("proof.json", proof.to_string())?;
        let (status, said) = verified(&world, "proof.json", &["--roots", "roots.pem"])?;
        ensure!(status == Some(1) && said.contains(expected), "{by} {changes:?}: {said}");
    }
    Ok(())
}

#[test]
fn a_tpm_certifies_what_it_made() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::manufactured(&world.path("tpm"))?;
    world.write(
        "agent.toml",
        world.listen() + &chip.section("tpm") + &key_on("k", "tpm", "handle = \"0x81000020\""),
    )?;
    does(&world, &["generate", "k", "--type", "p256"])?;
    world.write("proof.json", does(&world, &["attest", "k", "--nonce", "c0ffee"])?)?;
    let maker = text(&chip.maker()?);
    let (status, said) = verified(&world, "proof.json", &["--roots", &maker, "--nonce", "c0ffee"])?;
    // That the two keys are of one TPM, no file can prove.
    ensure!(status == Some(1) && said.contains("NOT proven: that attestation key "), "{said}");
    ensure!(
        said.contains("said by that key: made inside the TPM, and bound to it")
            && !said.contains("\nproven: ")
            && said.contains("the endorsement certificate is by the TPM's maker"),
        "{said}"
    );
    let by = said
        .split("that attestation key ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .context("its key")?
        .to_owned();
    let trust = ["--roots", &maker, "--nonce", "c0ffee", "--attestation-key", &by];
    let (status, said) = verified(&world, "proof.json", &trust)?;
    ensure!(status == Some(0) && said.contains("proven: made inside the TPM, and bound to it"), "{said}");
    let (status, said) = verified(&world, "proof.json", &["--roots", &maker, "--nonce", "00"])?;
    ensure!(status == Some(1) && said.contains("the nonce is another one"), "{said}");
    let (status, said) = verified(&world, "proof.json", &["--attestation-key", "00"])?;
    ensure!(status == Some(1) && said.contains("another attestation key"), "{said}");
    breaks_when_changed(&world, "proof.json", &trust)
}

/// A secret that only the TPM with both keys can read.
#[test]
fn a_tpm_answers_a_challenge() -> anyhow::Result<()> {
    let world = World::new()?;
    let (chip, other) =
        (SwTpm::manufactured(&world.path("tpm"))?, SwTpm::manufactured(&world.path("other"))?);
    world.write(
        "agent.toml",
        world.listen()
            + &chip.section("tpm")
            + &other.section("other")
            + &key_on("k", "tpm", "file = \"k.pem\"")
            + &key_on("o", "other", "handle = \"0x81000020\""),
    )?;
    for key in ["k", "o"] {
        does(&world, &["generate", key, "--type", "p256"])?;
    }
    world.write("first.json", does(&world, &["attest", "k"])?)?;
    let challenge = ["challenge", "first.json", "--secret", "kept.json"];
    world.write("challenge.json", does(&world, &challenge)?)?;
    world.write("proof.json", does(&world, &["attest", "k", "--challenge", "challenge.json"])?)?;
    let maker = text(&chip.maker()?);
    let trust = ["--roots", &maker, "--challenge-secret", "kept.json"];
    let (status, said) = verified(&world, "proof.json", &trust)?;
    ensure!(status == Some(0) && said.contains("which is in the TPM that its maker certified"), "{said}");
    breaks_when_changed(&world, "proof.json", &trust)?;
    // No answer, another's answer, no roots, and a secret that would be lost.
    let (status, said) = verified(&world, "first.json", &trust)?;
    ensure!(status == Some(1) && said.contains("it answers no challenge"), "{said}");
    let (status, said) = verified(&world, "proof.json", &["--challenge-secret", "kept.json"])?;
    ensure!(status == Some(2) && said.contains("--roots"), "{said}");
    refuses(&world, &["attest", "o", "--challenge", "challenge.json"], "the challenge is for another TPM")?;
    refuses(&world, &challenge, "cannot write kept.json: File exists")?;
    world.write("other.json", does(&world, &["attest", "o"])?)?;
    let (status, said) = verified(&world, "other.json", &trust)?;
    ensure!(status == Some(1) && said.contains("was made for other keys than these"), "{said}");
    ensure!(std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(world.path("kept.json"))?) & 0o077 == 0);
    // Others than TPMs take none.
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    world.write("agent.toml", config)?;
    does(&world, &["generate", "k"])?;
    refuses(&world, &["attest", "k", "--challenge", "challenge.json"], "only a TPM answers a challenge")
}

#[test]
fn pkcs11_proves_nothing() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    world.write(
        "agent.toml",
        world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k"),
    )?;
    does(&world, &["generate", "k"])?;
    world.write("proof.json", does(&world, &["attest", "k"])?)?;
    let (status, said) = verified(&world, "proof.json", &[])?;
    ensure!(status == Some(1) && said.contains("NOT proven: CKA_NEVER_EXTRACTABLE is true"), "{said}");
    let (status, said) = verified(&world, "agent.toml", &[])?;
    ensure!(status == Some(2) && said.contains("is not an attestation that"), "{said}");
    Ok(())
}
