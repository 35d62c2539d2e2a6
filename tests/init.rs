//! `omsign-agent init`, as somebody new would use it: from a device to a signature that verifies.

use std::process::{Command, Output};

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, PIN, SoftHsm};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::{typing, unblocking};
use omsign_tests::world::{World, key, text};
use openssl::pkey::PKey;
use openssl::x509::X509Req;

/// Runs it in the world's directory, with these lines to answer with.
fn init(
    world: &World,
    arguments: &[&str],
    environment: &[(&str, String)],
    answers: &str,
) -> anyhow::Result<Output> {
    let mut command = Command::new(built("omsign-agent")?);
    command.arg("init").args(arguments).arg("--directory").arg(world.path(""));
    world.without_surprises(command.current_dir("/"));
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    typing(&mut command, answers)
}

/// It fails with these words, and leaves nothing.
fn refuses(world: &World, arguments: &[&str], answers: &str, expected: &str) -> anyhow::Result<()> {
    refuses_with(world, arguments, &[], answers, expected)
}

fn refuses_with(
    world: &World,
    arguments: &[&str],
    environment: &[(&str, String)],
    answers: &str,
    expected: &str,
) -> anyhow::Result<()> {
    let output = init(world, arguments, environment, answers)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && errors.contains(expected), "{arguments:?}: {errors}");
    ensure!(!errors.contains("panicked"), "{errors}");
    for left in ["agent.toml", "release.csr", "release.pin", "softhsm"] {
        ensure!(!world.path(left).exists(), "{arguments:?} left {left}");
    }
    Ok(())
}

/// It works, and so does what it made: doctor, an agent, a signature, the request.
fn works(
    world: &World,
    arguments: &[&str],
    environment: &[(&str, String)],
    answers: &str,
    pin: Option<&str>,
) -> anyhow::Result<()> {
    let output = init(world, arguments, environment, answers)?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.success() && said.contains("omsign-agent serve --config"), "{said}");
    for line in answers.lines().filter(|line| !line.is_empty()) {
        ensure!(!said.contains(line), "a secret was repeated: {said}");
    }
    let request = text(&world.path("release.csr"));
    let openssl =
        Command::new("openssl").args(["req", "-verify", "-noout", "-text", "-in", &request]).output()?;
    let shown = String::from_utf8([openssl.stdout, openssl.stderr].concat())?;
    ensure!(shown.contains("verify OK") && shown.contains("CN = Acme Models"), "{shown}");
    let made = std::fs::read_to_string(world.path("agent.toml"))?;
    ensure!(pin.is_none_or(|pin| !made.contains(pin)), "{made}");
    // What the device was found with goes with it.
    for (name, value) in environment {
        ensure!(made.contains(&format!("{name} = \"{value}\"")), "{made}");
    }
    let mut config = made;
    if let Some(pin) = pin {
        // Nobody sits at the agent's terminal.
        omsign_fixtures::write_private(&world.path("typed.pin"), pin.as_bytes())?;
        config = config.replace("pin = \"prompt\"", "pin = { file = \"typed.pin\" }");
    }
    let agent = Agent::start(world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "release", "--signature", "model.sig"])?;
    world.write("public.pem", world.omsign_ok(&["keys", "export", "release"])?)?;
    world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", "public.pem"])?;
    ensure!(agent.stop()?.success());
    // A second time, nothing is overwritten.
    let output = init(world, arguments, environment, answers)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && errors.contains("exists already; choose another"), "{errors}");
    Ok(())
}

const SUBJECT: [&str; 2] = ["--subject", "CN=Acme Models"];

#[test]
fn softhsm() -> anyhow::Result<()> {
    let world = World::new()?;
    works(&world, &[&["softhsm"], &SUBJECT[..]].concat(), &[], "", None)
}

#[test]
fn tpm() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let chip = SwTpm::create(&place.path("tpm"))?;
    refuses(&world, &["tpm", "--tcti", "mssim:"], "", "is not supported; write")?;
    refuses(&world, &["tpm", "--tcti", "swtpm:host=127.0.0.1,port=1"], "", "cannot reach the TPM")?;
    works(&world, &[&["tpm", "--tcti", &chip.tcti()], &SUBJECT[..]].concat(), &[], "", None)
}

/// Of a TPM with an owner, what only that one knows is asked for.
#[test]
fn tpm_with_an_owner() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let chip = SwTpm::create(&place.path("tpm"))?;
    chip.tool("tpm2_changeauth", |tool| {
        tool.args(["-c", "owner", "owner-auth-8080"]);
    })?;
    let tcti = chip.tcti();
    let arguments = [&["tpm", "--tcti", &tcti], &SUBJECT[..]].concat();
    refuses(&world, &arguments, "", "no authorization value of the TPM's owner hierarchy was given")?;
    works(&world, &arguments, &[], "owner-auth-8080\n", None)
}

#[test]
fn yubikey() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
    let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
    let arguments = [&["yubikey"], &SUBJECT[..]].concat();
    // Before anything is asked, or changed.
    let subject = ["yubikey", "--subject", "Acme"];
    refuses_with(&world, &subject, &environment, "", "\"Acme\" is not a distinguished name")?;
    for key_type in ["p521", "ml-dsa-65"] {
        let typed = ["yubikey", "--type", key_type];
        refuses_with(&world, &typed, &environment, "", &format!("makes no keys of type {key_type}"))?;
    }
    let mut elsewhere = Command::new(built("omsign-agent")?);
    elsewhere.args(["init", "yubikey", "--directory", "/sys/kernel"]).envs(environment.clone());
    world.without_surprises(&mut elsewhere);
    let errors = String::from_utf8(typing(&mut elsewhere, "")?.stderr)?;
    ensure!(errors.contains("cannot write to /sys/kernel"), "{errors}");
    for (answers, expected) in [
        ("", "no new PIN was given; nothing was changed"),
        ("12\n", "a new PIN has 6 to 8 characters; nothing was changed"),
        ("97531864\n97531865\n", "the two are not the same new PIN; nothing was changed"),
        ("97531864\n97531864\nabcdefgh\nabcdefg\n", "the two are not the same new PUK; nothing was changed"),
        ("123456\n", "that is what every YubiKey has when it is new; nothing was changed"),
        (
            "97531864\n97531864\n12345678\n",
            "that is what every YubiKey has when it is new; nothing was changed",
        ),
    ] {
        refuses_with(&world, &arguments, &environment, answers, expected)?;
    }
    refuses_with(
        &world,
        &[&arguments[..], &["--serial", "1"]].concat(),
        &environment,
        "",
        "no YubiKey with serial 1",
    )?;
    // Nothing was changed: it still has everything from the factory, and all its tries.
    let answers = "97531864\n97531864\nabcdefgh\nabcdefgh\n";
    works(&world, &arguments, &environment, answers, Some("97531864"))?;
    // A slot that is taken is named before anything is asked.
    let other = World::new()?;
    refuses_with(&other, &arguments, &environment, "", "the card has a key in slot 9c already")?;
    // The next key asks for the PIN only, and is made with the management key that the card keeps.
    let arguments = [&["yubikey", "--slot", "9a"], &SUBJECT[..]].concat();
    refuses_with(&other, &arguments, &environment, "00000000\n", "it refused the PIN; 2 tries are left")?;
    works(&other, &arguments, &environment, "97531864\n", Some("97531864"))?;
    // A key that is there is taken when that is what is wanted.
    let existing = |slot| [&["yubikey", "--existing", "--slot", slot], &SUBJECT[..]].concat();
    let third = World::new()?;
    refuses_with(&third, &existing("82"), &environment, "", "the card has no key in slot 82")?;
    for tries in ["2 tries are left", "1 try is left"] {
        refuses_with(&third, &existing("9a"), &environment, "00000000\n", tries)?;
    }
    let warning = "one wrong PIN more blocks this YubiKey's PIN";
    refuses_with(&third, &existing("9a"), &environment, "", warning)?;
    works(&third, &existing("9a"), &environment, "97531864\n", Some("97531864"))?;
    let [request, before] = [&third, &other].map(|world| std::fs::read(world.path("release.csr")));
    let (request, before) = (X509Req::from_pem(&request?)?, X509Req::from_pem(&before?)?);
    ensure!(request.public_key()?.public_eq(before.public_key()?.as_ref()), "another key");
    Ok(())
}

/// Most cards that there are: their management key is one of Triple DES.
#[test]
fn yubikey_of_older_firmware() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
    let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
    let arguments = [&["yubikey"], &SUBJECT[..]].concat();
    card.set_firmware([5, 2, 7]);
    let expected = "its firmware is older than 5.3";
    refuses_with(&world, &arguments, &environment, "", expected)?;
    card.set_firmware([5, 4, 3]);
    let answers = "97531864\n97531864\nabcdefgh\nabcdefgh\n";
    works(&world, &arguments, &environment, answers, Some("97531864"))?;
    let other = World::new()?;
    let arguments = [&["yubikey", "--slot", "9a"], &SUBJECT[..]].concat();
    works(&other, &arguments, &environment, "97531864\n", Some("97531864"))
}

/// Cut off at any place, a management key is never nobody's.
#[test]
fn a_card_that_is_pulled_while_it_gets_a_management_key() -> anyhow::Result<()> {
    // SET MANAGEMENT KEY (Yubico, "PIV extensions"), before and after the card did it.
    for late in [false, true] {
        let (world, place) = (World::new()?, World::new()?);
        let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
        let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
        let arguments = [&["yubikey"], &SUBJECT[..]].concat();
        let sets_key: fn(&[u8]) -> bool = |command| command.get(1) == Some(&0xff);
        card.set(Faults { pull: true, late, only: Some(sets_key), once: true, ..Faults::default() });
        let answers = "97531864\n97531864\nabcdefgh\nabcdefgh\n";
        refuses_with(&world, &arguments, &environment, answers, "cannot change the management key")?;
        eventually("its return", || Ok(card.tool(&["-a", "version"]).is_ok()))?;
        works(&world, &arguments, &environment, "97531864\n", Some("97531864"))?;
    }
    Ok(())
}

/// What the card counts is not spent before what is given is known to be right, and of the PUK nothing at all by itself.
#[test]
fn a_card_whose_puk_is_blocked_or_nearly() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
    let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
    let arguments = [&["yubikey"], &SUBJECT[..]].concat();
    let wrong = || card.tool(&["-a", "change-puk", "-P", "00000000", "-N", "87654321"]);
    for _ in 0..3 {
        ensure!(wrong().is_err());
    }
    // Nobody can change it any more, and nobody is asked to.
    works(&world, &arguments, &environment, "97531864\n97531864\n", Some("97531864"))?;
    let second = VirtualPiv::create(&place.path("second"), 11_223_345)?;
    second.change_pin()?;
    second.change_puk()?;
    for _ in 0..2 {
        ensure!(second.tool(&["-a", "change-puk", "-P", "00000000", "-N", "87654321"]).is_err());
    }
    second.enter_wrong_pins(3);
    let config = world.listen() + &second.section("card") + &key("k", "card", "slot = \"9c\"");
    world.write("agent.toml", config)?;
    let output = unblocking(&world, "card", "00000000\nnew-pin1\nnew-pin1\n")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(errors.contains("one wrong PUK more would block it"), "{errors}");
    Ok(())
}

/// Modules of cards name keys themselves.
#[test]
fn pkcs11_with_keys_of_a_card() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let card = VirtualPiv::create(&place.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    let environment = [("PCSCLITE_CSOCK_NAME", text(&card.socket()))];
    let pin = format!("{}\n", piv::PIN);
    let arguments = [&["pkcs11", "--profile", "ykcs11"], &SUBJECT[..]].concat();
    refuses_with(&world, &arguments, &environment, &pin, "--key-label is the label of the one to sign with")?;
    let named = [&arguments[..], &["--key-label", "Private key for Digital Signature"]].concat();
    works(&world, &named, &environment, &pin, Some(piv::PIN))
}

#[test]
fn pkcs11() -> anyhow::Result<()> {
    let (world, place) = (World::new()?, World::new()?);
    let token = SoftHsm::create(&place.path("t"), "acme")?;
    let environment = [("SOFTHSM2_CONF", text(&token.config()))];
    let arguments = [&["pkcs11", "--module", MODULE], &SUBJECT[..]].concat();
    refuses(&world, &["pkcs11", "--profile", "nothing"], "", "\"nothing\" is unknown; write one of softhsm")?;
    refuses(&world, &["pkcs11", "--profile", "luna"], "", "the profile's library is not installed")?;
    refuses(&world, &["pkcs11", "--profile", "tpm2-pkcs11"], "", "told by TPM2_PKCS11_STORE")?;
    let wrong = [&arguments[..], &["--label", "other"]].concat();
    refuses_with(&world, &wrong, &environment, "", "choose one token: --label \"acme\"")?;
    refuses_with(&world, &arguments, &environment, "wrong-pin-5714\n", "it refused the PIN")?;
    works(&world, &arguments, &environment, &format!("{PIN}\n"), Some(PIN))?;
    // What was made, or anything that is there, is taken once more when that is wanted.
    let third = World::new()?;
    refuses_with(
        &third,
        &arguments,
        &environment,
        &format!("{PIN}\n"),
        "if the key is there already, --existing uses it",
    )?;
    let existing = [&arguments[..], &["--existing"]].concat();
    let absent = [&existing[..], &["--key-label", "absent"]].concat();
    refuses_with(
        &third,
        &absent,
        &environment,
        &format!("{PIN}\n"),
        "has no private key with label \"absent\"",
    )?;
    works(&third, &existing, &environment, &format!("{PIN}\n"), Some(PIN))?;
    // By its id, as where it has no label.
    let (by_id, id) = (World::new()?, hex::encode("other"));
    token.generate("other", KeyType::P384, Objects::Pair)?;
    let existing = [&existing[..], &["--key-id", &id]].concat();
    works(&by_id, &existing, &environment, &format!("{PIN}\n"), Some(PIN))?;
    // Where users make no keys, one is there already.
    let (other, token) = (World::new()?, SoftHsm::create(&place.path("u"), "nethsm")?);
    let environment = [("SOFTHSM2_CONF", text(&token.config()))];
    let arguments = [&arguments[..], &["--profile", "nethsm"]].concat();
    let (pin, how) = (format!("{PIN}\n"), "made with nitropy nethsm generate-key");
    refuses_with(&other, &arguments, &environment, &pin, how)?;
    token.generate("release", KeyType::P384, Objects::Pair)?;
    let output = init(&other, &arguments, &environment, &pin)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let request = X509Req::from_pem(&std::fs::read(other.path("release.csr"))?)?;
    let public = std::fs::read(token.public_key("release"))?;
    ensure!(
        request.public_key()?.public_eq(PKey::public_key_from_pem(&public)?.as_ref()),
        "a request for another key"
    );
    // The module may have the PIN itself.
    let (without, place) = (World::new()?, World::new()?);
    let token = SoftHsm::create(&place.path("t"), "nethsm")?;
    token.generate("release", KeyType::P384, Objects::Unguarded)?;
    let environment = [("SOFTHSM2_CONF", text(&token.config()))];
    let output = init(&without, &arguments, &environment, "\n")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(without.path("release.csr").exists(), "no request was signed");
    let made = std::fs::read_to_string(without.path("agent.toml"))?;
    ensure!(made.contains("pin = \"none\"\n"), "{made}");
    Ok(())
}
