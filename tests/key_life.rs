//! `omsign-agent key`: a key's life from nothing to deletion, on every device, with an agent and without one.

use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{MODULE, PIN, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::device::{Device, card, kryoptic, soft_hsm, tpm};
use omsign_tests::operator::{answering, does, key, never_leaves, refuses};
use omsign_tests::peer::cache;
use omsign_tests::world::{World, key as key_on, key_section, text, token_section};
use openssl::pkey::PKey;

fn openssl(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("openssl").args(arguments).output()?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.success(), "openssl {arguments:?}: {said}");
    Ok(said)
}

/// SHA-256 of a public key in PEM, hexadecimal.
fn fingerprint(pem: &str) -> anyhow::Result<String> {
    let der = PKey::public_key_from_pem(pem.as_bytes())?.public_key_to_der()?;
    Ok(hex::encode(openssl::sha::sha256(&der)))
}

/// Made, requested, certified, stored, listed, signed with, and deleted.
fn whole_life(world: &World, name: &str, make: &[&str], stores: bool) -> anyhow::Result<()> {
    let public = does(world, &[&["generate", name][..], make].concat())?;
    let public_file = text(&world.write(&format!("{name}.pem"), &public)?);
    refuses(world, &["generate", name], "already; choose another")?;
    let subject = ["--subject", "CN=Model Release,O=Acme", "--san", "uri:https://acme.example/release"];
    let request = does(world, &[&["csr", name][..], &subject].concat())?;
    let shown = openssl(&[
        "req",
        "-verify",
        "-noout",
        "-text",
        "-pubkey",
        "-in",
        &text(&world.write("r.pem", &request)?),
    ])?;
    for part in
        ["verify OK", "Code Signing", "Digital Signature", "URI:https://acme.example/release", &public]
    {
        ensure!(shown.contains(part), "{name}: {part}: {shown}");
    }
    let own = does(world, &[&["self-sign", name, "--days", "7"][..], &subject].concat())?;
    let own = text(&world.write("own.pem", &own)?);
    openssl(&["verify", "-x509_strict", "-check_ss_sig", "-CAfile", &own, "-purpose", "any", &own])?;
    let ca = Ca::create("Release CA")?;
    let key_half = PKey::public_key_from_pem(public.as_bytes())?;
    let leaf = ca.code_signing(name, &key_half)?;
    let certificate = world.path("leaf.pem");
    write_chain(&certificate, &[&leaf, &ca.certificate])?;
    let import = ["import-certificate", name, "leaf.pem"];
    match stores {
        true => drop(does(world, &import)?),
        false => refuses(world, &import, "name its file in the configuration: certificate_chain")?,
    }
    let other_half = ca.certificate.public_key()?;
    let other = ca.code_signing(name, &other_half)?;
    write_chain(&certificate, &[&other])?;
    refuses(world, &import, "the certificate is for another key")?;
    let listed: serde_json::Value = serde_json::from_str(&does(world, &["list", "--json"])?)?;
    let keys = listed["tokens"][0]["keys"].as_array().context("keys")?.clone();
    let listed = keys.iter().find(|key| key["names"][0] == name).context("the key is not listed")?;
    ensure!(listed["certificate"] == stores, "{listed}");
    let der = hex::decode(listed["public_key"].as_str().context("public_key")?)?;
    ensure!(PKey::public_key_from_der(&der)?.public_key_to_pem()? == public.as_bytes(), "{listed}");
    // An agent that runs has it at once; one that starts, too.
    if world.omsign(&["agent", "status"])?.status.code() != Some(2) {
        eventually("a signature", || {
            let sign = ["sign", "model", "--allow-nonstandard-key", "--key", name, "--signature", "s.sig"];
            Ok(world.omsign(&sign)?.status.success())
        })?;
        world.omsign_ok(&["verify", "model", "--signature", "s.sig", "--public-key", &public_file])?;
    }
    let start = fingerprint(&public)?;
    let start = start.get(..8).context("a fingerprint")?;
    for wrong in ["", "no\n", &format!("{name}\n"), &format!("{name}\n00000000\n")] {
        let output = answering(world, &["delete", name], wrong)?;
        ensure!(output.status.code() == Some(2), "{wrong:?}: {output:?}");
    }
    does(world, &["csr", name, "--subject", "CN=still there"])?;
    let output = answering(world, &["delete", name], &format!("{name}\n{start}\n"))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed: serde_json::Value = serde_json::from_str(&does(world, &["list", "--json"])?)?;
    let keys = listed["tokens"][0]["keys"].as_array().context("keys")?;
    ensure!(keys.iter().all(|key| key["names"][0] != name), "{listed}");
    // Nor is it ready for anybody.
    if world.omsign(&["agent", "status"])?.status.code() != Some(2) {
        let state = || {
            let keys: serde_json::Value = serde_json::from_str(&world.omsign_ok(&["keys", "--json"])?)?;
            let keys = keys["keys"].as_array().cloned().unwrap_or_default();
            anyhow::Ok(keys.into_iter().find(|key| key["name"] == name).map(|key| key["state"].clone()))
        };
        eventually("its end", || Ok(state()?.is_some_and(|state| state == "unusable")))?;
    }
    Ok(())
}

#[test]
fn of_a_softhsm_key() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let config = world.listen()
        + &token_section("t", &token, "")
        + &key_section("k", "t", "k")
        + &key_section("other", "t", "other");
    world.write("agent.toml", &config)?;
    world.model()?;
    does(&world, &["generate", "other", "--type", "rsa2048"])?;
    never_leaves(&world, "other")?;
    // Modules let RSA keys decrypt, too, unless they are told not to.
    let mut shown = Command::new("pkcs11-tool");
    shown.args(["--module", MODULE, "--login", "--pin", PIN, "--list-objects", "--type", "privkey"]);
    let shown = String::from_utf8(shown.env("SOFTHSM2_CONF", token.config()).output()?.stdout)?;
    ensure!(shown.lines().any(|line| line.split_whitespace().eq(["Usage:", "sign"])), "{shown}");
    whole_life(&world, "k", &["--type", "p256"], true)?;
    refuses(&world, &["generate", "k", "--no-da"], "takes only --type")?;
    refuses(&world, &["generate", "nobody"], "there is no [key.nobody] in the configuration")?;
    let _agent = Agent::start(&world, &config)?;
    whole_life(&world, "k", &["--type", "p384"], true)?;
    // Everything was recorded, with an agent and without one; what changes the device before it was done, too.
    let recorded = std::fs::read_to_string(world.path("audit/audit.jsonl"))?;
    for (action, times) in [("generate", 14), ("delete", 4), ("import-certificate", 8), ("self-sign", 2)] {
        let found = recorded.matches(&format!(r#""action":"{action}""#)).count();
        ensure!(found == times, "{action}: {found}: {recorded}");
    }
    ensure!(recorded.contains(r#""outcome":"failed""#) && !recorded.contains(PIN), "{recorded}");
    Ok(())
}

/// With a module of PKCS#11 3.2, and a kind of key that only it makes.
#[test]
fn of_kryoptics_keys() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let config = world.listen() + &token.section("kry")? + &key_section("k", "kry", "k");
    world.write("agent.toml", &config)?;
    world.model()?;
    whole_life(&world, "k", &["--type", "p256"], true)?;
    let _agent = Agent::start(&world, &config)?;
    whole_life(&world, "k", &["--type", "p384"], true)?;
    does(&world, &["generate", "k", "--type", "ml-dsa-44"])?;
    never_leaves(&world, "k")?;
    Ok(())
}

#[test]
fn of_tpm_keys() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let config = world.listen()
        + &chip.section("tpm")
        + &key_on("handle", "tpm", "handle = \"0x81000020\"")
        + &key_on("file", "tpm", "file = \"made.pem\"");
    world.write("agent.toml", &config)?;
    world.model()?;
    whole_life(&world, "file", &["--type", "p384"], false)?;
    whole_life(&world, "handle", &["--type", "p256", "--no-da"], false)?;
    refuses(&world, &["generate", "file", "--touch-policy", "always"], "are for a YubiKey's keys")?;
    let _agent = Agent::start(&world, &config)?;
    whole_life(&world, "handle", &["--type", "rsa2048"], false)?;
    // A file that tpm2-openssl reads, once the agent has opened it: where no resource manager stands between the
    // two, whoever opens a TPM clears it of what others loaded.
    does(&world, &["generate", "file", "--type", "p256"])?;
    world.omsign_ok(&["sign", "model", "--key", "file", "--signature", "s.sig"])?;
    let made = text(&world.path("made.pem"));
    chip.tool("openssl", |tool| {
        tool.args(["pkey", "-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2"]);
        tool.args(["-in", &made, "-pubout", "-passin"]).arg(format!("file:{}", chip.pin_file().display()));
    })?;
    // And signs with: it believes the file about the authorization value.
    let message = text(&world.write("message", "text")?);
    chip.tool("openssl", |tool| {
        tool.args([
            "dgst",
            "-sha256",
            "-provider",
            "tpm2",
            "-provider",
            "default",
            "-propquery",
            "?provider=tpm2",
        ]);
        tool.args(["-sign", &made, "-passin"]).arg(format!("file:{}", chip.pin_file().display()));
        tool.args(["-out", &text(&world.path("message.sig")), &message]);
    })
}

#[test]
fn of_a_yubikey_key() -> anyhow::Result<()> {
    let world = World::new()?;
    let yubikey = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    yubikey.change_pin()?;
    let config = world.listen()
        + &yubikey.section("card")
        + &key_on("k", "card", "slot = \"9c\"")
        + &key_on("ed", "card", "slot = \"9d\"");
    world.write("agent.toml", &config)?;
    world.model()?;
    // The factory's management key is refused, not used.
    refuses(&world, &["generate", "k"], "its management key is the one from the factory")?;
    yubikey.protect_management_key()?;
    refuses(&world, &["generate", "k", "--type", "p521"], "a YubiKey has no such keys; use p256 or p384")?;
    whole_life(&world, "k", &["--type", "p256", "--pin-policy", "once"], true)?;
    // Its slot is free again.
    let public = does(&world, &["generate", "k", "--type", "p256", "--pin-policy", "once"])?;
    world.write("own.pem", does(&world, &["self-sign", "k", "--subject", "CN=k"])?)?;
    does(&world, &["import-certificate", "k", "own.pem"])?;
    let listed = does(&world, &["list"])?;
    // Older firmware says plainly what it does not do.
    yubikey.set_firmware([5, 4, 3]);
    let key = fingerprint(&public)?;
    let answers = format!("k\n{}\n", key.get(..8).context("a fingerprint")?);
    let delete = answering(&world, &["delete", "k"], &answers)?;
    let errors = String::from_utf8_lossy(&delete.stderr).into_owned();
    ensure!(errors.contains("its firmware 5.4.3 cannot delete keys, 5.7 can"), "{errors}");
    refuses(&world, &["generate", "ed", "--type", "ed25519"], "the card's firmware has no such keys")?;
    yubikey.set_firmware([5, 7, 1]);
    // Other programs use the card in between, and nobody notices.
    let agent = Agent::start(&world, &config)?;
    // Made and deleted on a card that an agent has open.
    whole_life(&world, "ed", &["--type", "p384"], true)?;
    for command in [&["list"][..], &["csr", "k", "--subject", "CN=a"], &["attest", "k"]] {
        world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "s.sig"])?;
        yubikey.tool(&["-a", "status"])?;
        does(&world, command)?;
    }
    ensure!(agent.stop()?.success() && yubikey.pin_tries()? == 3);
    ensure!(
        listed.contains("PIN policy once, touch policy never") && listed.contains("with its certificate"),
        "{listed}"
    );
    Ok(())
}

/// Whether a request and a self-signed certificate are of a key, and signed by it.
const CHECK: &str = "
import sys
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
request = x509.load_pem_x509_csr(open(sys.argv[1], 'rb').read())
own = x509.load_pem_x509_certificate(open(sys.argv[2], 'rb').read())
assert request.is_signature_valid
own.public_key().verify(own.signature, own.tbs_certificate_bytes)
for it in request, own:
    pem = it.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert pem == open(sys.argv[3], 'rb').read()
";

#[test]
fn certificate_requests_of_every_device() -> anyhow::Result<()> {
    let (stand_in_world, world) = (World::new()?, World::new()?);
    let (chip, yubikey) = (
        SwTpm::create(&stand_in_world.path("tpm"))?,
        VirtualPiv::create(&stand_in_world.path("card"), 11_223_344)?,
    );
    let other = World::new()?;
    let kry = Kryoptic::create(&other.path("kryoptic"), "kry")?;
    for device in [soft_hsm(&stand_in_world)?, tpm(&chip)?, card(&yubikey)?, kryoptic(&other, &kry)?] {
        let Device { token, keys, expected, .. } = device;
        world.write("agent.toml", world.listen() + &token + &keys)?;
        for one in expected {
            let subject = ["csr", one.name, "--subject", "CN=Model Release,O=Acme"];
            let request = text(&world.write("request.pem", does(&world, &subject)?)?);
            if one.algorithm.starts_with("ml-dsa") {
                // Debian's OpenSSL does not know them, the reference's does.
                let own = ["self-sign", one.name, "--days", "7", "--subject", "CN=Model Release,O=Acme"];
                let own = text(&world.write("own.pem", does(&world, &own)?)?);
                let mut python = Command::new(cache("reference/bin/python")?);
                let checked =
                    python.args(["-c", CHECK]).args([&request, &own, &text(&one.public)]).output()?;
                ensure!(checked.status.success(), "{}: {checked:?}", one.name);
                continue;
            }
            let shown = openssl(&["req", "-verify", "-noout", "-text", "-pubkey", "-in", &request])?;
            let public = std::fs::read_to_string(&one.public)?;
            ensure!(shown.contains("verify OK") && shown.contains(&public), "{}: {shown}", one.name);
        }
    }
    refuses(&world, &["csr", "p256", "--subject", "Model Release"], "is not a distinguished name")?;
    refuses(&world, &["csr", "p256", "--subject", "CN=a", "--san", "x"], "is not a subject alternative name")
}

#[test]
fn on_two_tokens() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = world.twins()?;
    let both = key_section("k", "a", "k").replace("token = \"a\"", "token = [\"a\", \"b\"]");
    let config = world.listen() + &token_section("a", &first, "") + &token_section("b", &second, "") + &both;
    world.write("agent.toml", &config)?;
    // A token that does not open does not hide the others.
    let wrong = config.replace(&text(&second.pin_file()), &text(&world.write("none.pin", "")?));
    world.write("agent.toml", &wrong)?;
    let output = key(&world, &["list"])?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(2) && said.contains("label \"k\""), "{said}");
    ensure!(said.contains("b: it is locked: the PIN file"), "{said}");
    world.write("agent.toml", &config)?;
    // A certificate goes to both.
    world.write("own.pem", does(&world, &["self-sign", "k", "--subject", "CN=k"])?)?;
    does(&world, &["import-certificate", "k", "own.pem"])?;
    let listed = does(&world, &["list"])?;
    ensure!(listed.matches("with its certificate").count() == 2, "{listed}");
    let start = fingerprint(&std::fs::read_to_string(first.public_key("k"))?)?;
    let start = start.get(..8).context("a fingerprint")?;
    let output = answering(&world, &["delete", "k"], &format!("k\n{start}\n"))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(does(&world, &["list"])? == "a: no keys\nb: no keys\n");
    Ok(())
}

/// What goes wrong for one key of a TPM without an authorization value is no matter of the others.
#[test]
fn on_a_tpm_without_a_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let section = chip.section("tpm");
    let section: String = section.split_inclusive('\n').filter(|line| !line.starts_with("pin")).collect();
    let config = world.listen()
        + &section
        + &key_on("k", "tpm", "handle = \"0x81000020\"")
        + &key_on("l", "tpm", "handle = \"0x81000021\"")
        + &key_on("m", "tpm", "handle = \"0x81000022\"");
    world.write("agent.toml", &config)?;
    world.model()?;
    does(&world, &["generate", "k", "--type", "p256", "--no-da"])?;
    chip.guarded_key("m", 0x8100_0022, AUTH)?;
    let agent = Agent::start(&world, &config)?;
    refuses(&world, &["generate", "l", "--type", "p256"], "or say --no-da")?;
    refuses(
        &world,
        &["csr", "m", "--subject", "CN=m"],
        "may ask for an authorization value, and the token has none",
    )?;
    // The owner's value is somebody else's.
    chip.tool("tpm2_changeauth", |tool| {
        tool.args(["-c", "owner", "owner-auth-8080"]);
    })?;
    let public = world.omsign_ok(&["keys", "export", "k"])?;
    let start = fingerprint(&public)?;
    let output = answering(&world, &["delete", "k"], &format!("k\n{}\n", start.get(..8).context("eight")?))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && errors.contains("of the owner hierarchy; owner_auth"),
        "{errors}"
    );
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "k.sig"])?;
    ensure!(agent.stop()?.success());
    // Told it, the agent can use the hierarchy: key files, which are loaded below it, and changes.
    write_private(&world.path("owner.auth"), b"owner-auth-8080\n")?;
    let owned =
        section.replace("backend = \"tpm\"\n", "backend = \"tpm\"\nowner_auth = { file = \"owner.auth\" }\n");
    let config = world.listen()
        + &owned
        + &key_on("k", "tpm", "handle = \"0x81000020\"")
        + &key_on("file", "tpm", "file = \"file.pem\"");
    world.write("agent.toml", &config)?;
    does(&world, &["generate", "file", "--type", "p256", "--no-da"])?;
    let agent = Agent::start(&world, &config)?;
    for key in ["k", "file"] {
        world.omsign_ok(&["sign", "model", "--key", key, "--signature", "k.sig"])?;
    }
    let output = answering(&world, &["delete", "k"], &format!("k\n{}\n", start.get(..8).context("eight")?))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(agent.stop()?.success());
    let uri = format!(
        "tpm:file={}?tcti={}&owner-auth-source={}",
        text(&world.path("file.pem")),
        chip.tcti(),
        text(&world.path("owner.auth"))
    );
    world.omsign_ok(&["sign", "model", "--key-uri", &uri, "--signature", "k.sig"])?;
    // One that is wrong locks no key that needs none.
    write_private(&world.path("owner.auth"), b"wrong-owner-8142\n")?;
    does(&world, &["list"])?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("of the owner hierarchy") && !report.contains("8142"), "{report}");
    // Nor does one that is not there.
    std::fs::remove_file(world.path("owner.auth"))?;
    refuses(&world, &["generate", "k", "--type", "p256", "--no-da"], "of the owner hierarchy")?;
    chip.tool("tpm2_changeauth", |tool| {
        tool.args(["-c", "owner", "-p", "owner-auth-8080"]);
    })?;
    does(&world, &["generate", "k", "--type", "p256", "--no-da"])?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("the owner's authorization value: the PIN file"), "{report}");
    Ok(())
}
