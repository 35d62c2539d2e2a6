//! Keys that no longer sign, and what devices do not do: operators are told, get on, and take nothing away from callers.

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::device::card_through;
use omsign_tests::operator::{answering, does, refuses};
use omsign_tests::world::{World, key, key_section, text, token_section};
use openssl::pkey::PKey;

/// Deletes a key whose public half this is: SubjectPublicKeyInfo, PEM.
fn delete(world: &World, name: &str, public: &str) -> anyhow::Result<String> {
    let der = PKey::public_key_from_pem(public.as_bytes())?.public_key_to_der()?;
    let start = hex::encode(openssl::sha::sha256(&der)).get(..8).context("a digest")?.to_owned();
    let output = answering(world, &["delete", name], &format!("{name}\n{start}\n"))?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

/// After an update of the firmware, as it were.
#[test]
fn a_key_whose_pcrs_have_changed() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let guarded = |name, handle: &str| {
        key(name, "device", &format!("handle = \"{handle}\"")).replace("\n[[", "\npcrs = \"sha256:23\"\n[[")
    };
    let config = world.listen()
        + &chip.section("device")
        + &guarded("k", "0x81000010")
        + &guarded("old", "0x81000020");
    world.write("agent.toml", &config)?;
    let old = does(&world, &["generate", "old", "--type", "p256"])?;
    let first = does(&world, &["generate", "k", "--type", "p256"])?;
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    chip.tool("tpm2_pcrextend", |tool| {
        tool.arg(format!("23:sha256={}", "42".repeat(32)));
    })?;
    world.omsign_refuses(2, &["sign", "model", "--key", "k"], &["PCR"])?;
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "PCR")?;
    let next = does(&world, &["rotate", "k"])?;
    ensure!(next != first && does(&world, &["rotate", "k", "--finish"])? == next);
    // Verifiers still get the one before.
    let kept = std::fs::read_to_string(world.path("k.previous-1.pem"))?;
    ensure!(kept == first, "{kept}");
    does(&world, &["reload"])?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    delete(&world, "old", &old)?;
    ensure!(!does(&world, &["list"])?.contains("0x81000020"));
    // Of what is to be the next one, the configuration says it in another place.
    let next = does(&world, &["rotate", "k"])?;
    let said = delete(&world, "k/next", &next)?;
    ensure!(said.contains("next = … in [key.k] names nothing any more"), "{said}");
    Ok(())
}

/// A TPM takes no notice of registers that it does not have, and some keys sign whatever theirs are.
#[test]
fn pcrs_that_guard_nothing() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::manufactured(&world.path("tpm"))?;
    chip.persistent_key("k", "ecc256", 0x8100_0010, AUTH)?;
    let guarded = |name, handle: &str, pcrs: &str| {
        key(name, "device", &format!("handle = \"{handle}\""))
            .replace("\n[[", &format!("\npcrs = \"{pcrs}\"\n[["))
    };
    let config = world.listen()
        + &chip.section("device")
        + &guarded("k", "0x81000010", "sha256:7")
        + &guarded("new", "0x81000020", "sha384:0,7");
    world.write("agent.toml", &config)?;
    refuses(&world, &["generate", "new"], "the TPM has no PCRs sha384:0,7: that bank is not allocated")?;
    world.model()?;
    let _agent = Agent::start(&world, &config)?;
    world.omsign_refuses(2, &["sign", "model", "--key", "k"], &["signs whatever its PCRs are"])?;
    // As after an update of the firmware that leaves the bank out.
    world.write("agent.toml", config.replace("sha384:0,7", "sha256:0,7"))?;
    does(&world, &["reload"])?;
    does(&world, &["generate", "new"])?;
    world.omsign_ok(&["sign", "model", "--key", "new"])?;
    world.write("agent.toml", config)?;
    does(&world, &["reload"])?;
    world.omsign_refuses(2, &["sign", "model", "--key", "new"], &["that bank is not allocated"])?;
    Ok(())
}

/// What a card says of a slot is of the key in it, also where the configuration has a way to sign that it does not.
#[test]
fn a_key_that_a_card_does_not_sign_with() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    let public = std::fs::read_to_string(card.generate("9c", "RSA2048", &[])?)?;
    card.protect_management_key()?;
    card.set_firmware([5, 7, 1]);
    let section = key("k", "card", "slot = \"9c\"").replace("\n[[", "\npadding = \"pss\"\n[[");
    world.write("agent.toml", world.listen() + &card.section("card") + &section)?;
    refuses(&world, &["csr", "k", "--subject", "CN=k"], "pkcs1")?;
    delete(&world, "k", &public)?;
    ensure!(does(&world, &["list"])?.contains("no keys"));
    Ok(())
}

/// Its issuer said much.
#[test]
fn a_certificate_that_is_too_long_for_a_card() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9a", "ECCP256", &[])?;
    card.protect_management_key()?;
    let config = world.listen() + &card.section("card") + &key("k", "card", "slot = \"9a\"");
    world.write("agent.toml", config)?;
    let names = (0..150).map(|number| ["--san".to_owned(), format!("dns:host-{number:04}.example.com")]);
    let names: Vec<String> = names.flatten().collect();
    let names = names.iter().map(String::as_str);
    let sign: Vec<&str> = ["self-sign", "k", "--subject", "CN=k"].into_iter().chain(names).collect();
    world.write("long.pem", does(&world, &sign)?)?;
    let words = "more than a card takes; name its file as the key's certificate_chain";
    refuses(&world, &["import-certificate", "k", "long.pem"], words)
}

/// Beside a key on a PKCS#11 token whoever likes puts another public half, without a PIN: it is taken for nobody's.
#[test]
fn a_public_half_that_somebody_exchanged() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    token.generate("k", KeyType::P256, Objects::Pair)?;
    world.write(
        "agent.toml",
        world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k"),
    )?;
    does(&world, &["rotate", "k"])?;
    let config = std::fs::read_to_string(world.path("agent.toml"))?;
    let listed: serde_json::Value = serde_json::from_str(&does(&world, &["list", "--json"])?)?;
    let id = |name: &str| {
        let keys = listed["tokens"][0]["keys"].as_array().into_iter().flatten();
        let object = keys.filter(|key| key["names"][0] == name).find_map(|key| key["object"].as_str());
        let id = object.and_then(|object| object.split("id \"").nth(1)).unwrap_or_default();
        id.chars().take_while(char::is_ascii_hexdigit).collect::<String>()
    };
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let other = PKey::public_key_from_pem(&std::fs::read(token.public_key("other"))?)?;
    world.write("other.der", other.public_key_to_der()?)?;
    let other = text(&world.path("other.der"));
    // Of the present key, and then of the next as well.
    for (name, label) in [("k", "k"), ("k/next", "k-2")] {
        let (label, id) = (["--label", label], ["--id", &id(name)]);
        ensure!(!id[1].is_empty(), "{listed}");
        token.tool(&[&["--delete-object", "--type", "pubkey"], &id[..]].concat())?;
        token.tool(&[&["--write-object", &other, "--type", "pubkey"], &label[..], &id[..]].concat())?;
        let words = "does not belong to it";
        refuses(&world, &["rotate", "k", "--finish"], words)?;
        refuses(&world, &["delete", name], words)?;
        ensure!(std::fs::read_to_string(world.path("agent.toml"))? == config);
    }
    Ok(())
}

/// Taken from the TPM while an agent has it open.
#[test]
fn a_key_that_is_gone_from_a_tpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let section = chip.section("device") + &key("k", "device", "handle = \"0x81000010\"");
    let _agent = Agent::start(&world, &(world.listen() + &section))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let ready = || Ok(world.omsign_ok(&["keys", "--json"])?.contains("\"ready\""));
    ensure!(ready()?);
    chip.tool("tpm2_evictcontrol", |tool| {
        tool.args(["-Q", "-C", "o", "-c", "0x81000010"]);
    })?;
    ensure!(!world.omsign(&["sign", "model", "--key", "k"])?.status.success());
    eventually("what is said of it", || Ok(!ready()?))?;
    // An agent that looks for it lets a TPM without a resource manager forget what others have loaded.
    eventually("its key", || Ok(chip.put_back("k", 0x8100_0010).is_ok()))?;
    eventually("the key that is there again", ready)?;
    world.omsign_ok(&["sign", "model", "--key", "k"]).map(drop)
}

/// Their users may not write there: it is said, and the token serves on.
#[test]
fn modules_that_store_and_delete_nothing() -> anyhow::Result<()> {
    for module in ["libykcs11.so", "opensc-pkcs11.so"] {
        let world = World::new()?;
        let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
        let device = card_through(&card, module, &["9c"])?;
        let agent = Agent::start(&world, &(world.listen() + &device.token + &device.keys))?;
        world.model()?;
        world.omsign_ok(&["sign", "model", "--key", "9c"])?;
        let hosts = agent.hosts()?;
        let own = world.write("own.pem", does(&world, &["self-sign", "9c", "--subject", "CN=k"])?)?;
        let words = "the module does not let its users do that; use the device's own tools";
        refuses(&world, &["import-certificate", "9c", &text(&own)], words)?;
        world.omsign_ok(&["sign", "model", "--key", "9c"])?;
        ensure!(agent.hosts()? == hosts, "{module}: another process owns the token");
    }
    Ok(())
}

/// Of a key that came from elsewhere not everything is known, and the rest is what tells.
#[test]
fn attributes_of_an_imported_key() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let (own, der) = (world.path("own.pem"), world.path("own.der"));
    let made = std::process::Command::new("openssl")
        .args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"])
        .arg(&own)
        .output()?;
    ensure!(made.status.success());
    let private = PKey::private_key_from_pem(&std::fs::read(&own)?)?;
    write_private(&der, &private.private_key_to_der()?)?;
    token.tool(&["--write-object", &text(&der), "--type", "privkey", "--label", "k", "--id", "07"])?;
    world.write("k.der", private.public_key_to_der()?)?;
    let public = text(&world.path("k.der"));
    token.tool(&["--write-object", &public, "--type", "pubkey", "--label", "k", "--id", "07"])?;
    world.write(
        "agent.toml",
        world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k"),
    )?;
    let attested = does(&world, &["attest", "k"])?;
    let attested: serde_json::Value = serde_json::from_str(&attested)?;
    ensure!(attested.to_string().contains(r#"["CKA_LOCAL","false"]"#), "{attested}");
    Ok(())
}

/// Each kind of key that a TPM cannot have is refused in words.
#[test]
fn keys_that_a_tpm_does_not_have() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let config = world.listen() + &chip.section("device") + &key("k", "device", "file = \"k.pem\"");
    world.write("agent.toml", &config)?;
    for (kind, words) in [
        ("ed25519", "TPMs have neither Ed25519 nor ML-DSA; use p256"),
        ("ml-dsa-65", "TPMs have neither Ed25519 nor ML-DSA; use p256"),
        ("rsa4096", "this TPM makes no keys of type rsa4096"),
    ] {
        refuses(&world, &["generate", "k", "--type", kind], words)?;
    }
    Ok(())
}

/// Whoever looks after the agent sees it before somebody wants to sign. (kryoptic goes on with what its process knows.)
#[test]
fn a_key_that_is_deleted_while_nobody_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let keys = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let _agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &keys))?;
    world.until_ready()?;
    token.delete("k")?;
    eventually("its end", || Ok(world.status()?.contains("key k: unusable: the token has no private key")))?;
    ensure!(world.status()?.contains("key other: ready"));
    Ok(())
}
