//! What is left to do, said where somebody looks: certificates that end, keys without sections, PINs that people have.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_tests::agent::Agent;
use omsign_tests::operator::{answering, does, key, refuses};
use omsign_tests::world::{World, key_section, token_section};
use openssl::pkey::PKey;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[test]
fn certificates_that_end() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let public = PKey::public_key_from_pem(&std::fs::read(token.public_key("k"))?)?;
    let (ca, now) = (Ca::create("ca")?, SystemTime::now().duration_since(UNIX_EPOCH)?);
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let config = config.replace("[key.k]\n", "[key.k]\ncertificate_chain = \"chain.pem\"\n");
    world.write("agent.toml", &config)?;
    let ends = [
        (now + DAY * 100, "ok      key.k: certificate_chain of 1", "valid until "),
        (now + DAY * 20, "warning key.k: certificate_chain of 1", "it expires on "),
        (now - DAY, "ERROR   key.k: certificate_chain of 1", "it expired on "),
    ];
    for (end, level, said) in ends {
        write_chain(&world.path("chain.pem"), &[&ca.code_signing_until("Release", &public, end)?])?;
        let (status, report) = world.doctor()?;
        let line = report.lines().find(|line| line.starts_with(level));
        ensure!(line.is_some_and(|line| line.contains(said)), "{report}");
        ensure!(status.success() == (end > now), "{report}");
    }
    // Whoever signs sees it before it is over, and is told when it is.
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    let listed = world.omsign_ok(&["keys"])?;
    let over = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs((now - DAY).as_secs()))
        .to_string();
    ensure!(listed.contains(&format!("; certificate expired on {over}")), "{listed}");
    let expected = format!("CN=Release expired on {over}, before ");
    world.omsign_refuses(2, &["sign", "model", "--key", "k"], &[&expected])
}

#[test]
fn what_the_configuration_has_to_say_next() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    let told = |arguments: &[&str], answers: &str, expected: &str| -> anyhow::Result<()> {
        let output = answering(&world, arguments, answers)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() && said.contains(expected), "{arguments:?}: {output:?}");
        Ok(())
    };
    // One that the running agent has not read.
    world.write("agent.toml", config.clone() + &key_section("l", "t", "l"))?;
    let missing = "there is no [key.l] in the configuration that counts, but k: correct the name, or add it, and have an agent";
    refuses(&world, &["generate", "l"], missing)?;
    does(&world, &["reload"])?;
    does(&world, &["generate", "l", "--type", "p256"])?;
    world.write("l.pem", does(&world, &["self-sign", "l", "--subject", "CN=l"])?)?;
    told(
        &["import-certificate", "l", "l.pem"],
        "",
        "note: it signs with it when certificate_chain in [key.l] names the file",
    )?;
    refuses(&world, &["attest", "l", "--nonce", "00"], "only a TPM attests with a nonce")?;
    let asked = String::from_utf8(key(&world, &["delete", "l"])?.stderr)?;
    let fingerprint = asked.split_whitespace().find(|word| word.len() == 64).unwrap_or_default();
    let answers = format!("l\n{}\n", fingerprint.get(..8).unwrap_or_default());
    told(&["delete", "l"], &answers, "note: [key.l] names nothing any more: take it out of the configuration")
}

#[test]
fn a_pin_that_only_a_person_has() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    token.generate("l", KeyType::P256, Objects::Pair)?;
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    let section = token_section("t", &token, "").replace(&file, "pin = \"prompt\"");
    let config = world.listen() + &section + &key_section("k", "t", "k");
    world.write("agent.toml", &config)?;
    let (_, report) = world.doctor()?;
    ensure!(
        report.contains("warning token.t: its PIN is asked for at start")
            && report.contains("were not tried"),
        "{report}"
    );
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    let how = "it waits for its PIN: omsign agent unlock, with --ask-pin";
    world.omsign_refuses(2, &["sign", "model", "--key", "k"], &[how])?;
    world.omsign_refuses(2, &["agent", "unlock", "t"], &[how])?;
    let path = world.path("agent.toml");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    refuses(&world, &["list"], "agent.toml: everybody may write it: take that from others (chmod o-w)")?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o664))?;
    does(&world, &["reload"]).map(drop)
}
