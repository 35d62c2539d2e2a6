//! The key that takes another's place is guarded as that one was, where nobody says otherwise.

use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::Agent;
use omsign_tests::operator::{self, does, refuses};
use omsign_tests::world::{World, key, key_section, token_section};

/// What is listed of a key.
fn listed(world: &World, name: &str) -> anyhow::Result<String> {
    let listed = does(world, &["list"])?;
    let line = listed.lines().find(|line| line.trim_start().starts_with(&format!("{name} ")));
    Ok(line.unwrap_or_default().to_owned())
}

#[test]
fn of_a_yubikey() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.protect_management_key()?;
    world.write("agent.toml", world.listen() + &card.section("card") + &key("k", "card", "slot = \"9c\""))?;
    does(&world, &["generate", "k", "--type", "p256", "--pin-policy", "once", "--touch-policy", "always"])?;
    does(&world, &["rotate", "k", "--object", "slot=82"])?;
    let next = listed(&world, "k/next")?;
    ensure!(next.contains("PIN policy once, touch policy always") && next.contains("p256"), "{next}");
    // What is said counts, and the rest is as it was.
    world.write("agent.toml", world.listen() + &card.section("card") + &key("k", "card", "slot = \"82\""))?;
    does(&world, &["rotate", "k", "--object", "slot=83", "--touch-policy", "cached"])?;
    let next = listed(&world, "k/next")?;
    ensure!(next.contains("PIN policy once, touch policy cached"), "{next}");
    // Of a key that is gone, nobody knows.
    let config = key("k", "card", "slot = \"84\"").replace("\n[[", "\nnext = { slot = \"85\" }\n[[");
    world.write("agent.toml", world.listen() + &card.section("card") + &config)?;
    refuses(&world, &["generate", "k/next", "--type", "p256"], "say --pin-policy and --touch-policy")?;
    let said = ["--pin-policy", "once", "--touch-policy", "never"];
    does(&world, &[&["generate", "k/next", "--type", "p256"][..], &said].concat()).map(drop)
}

#[test]
fn of_a_tpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let keys =
        key("file", "tpm", "file = \"file.tpm.pem\"") + &key("handle", "tpm", "handle = \"0x81000020\"");
    world.write("agent.toml", world.listen() + &chip.section("tpm") + &keys)?;
    // What somebody has exported stays.
    world.write("file.pem", "a public key")?;
    for (name, no_da) in [("file", true), ("handle", false)] {
        let more: &[&str] = if no_da { &["--no-da"] } else { &[] };
        does(&world, &[&["generate", name, "--type", "p256"][..], more].concat())?;
        does(&world, &["rotate", name])?;
        let next = listed(&world, &format!("{name}/next"))?;
        ensure!(next.contains("outside the protection against guessing") == no_da, "{name}: {next}");
    }
    // Beside the present one, by the name that a configuration has that may be moved.
    let text = std::fs::read_to_string(world.path("agent.toml"))?;
    ensure!(text.contains("next = { file = \"file.tpm-2.pem\" }"), "{text}");
    ensure!(world.path("file.tpm-2.pem").exists());
    // One that is gone says nothing of the next one.
    let config = key("k", "tpm", "handle = \"0x81000030\"")
        .replace("\n[[", "\nnext = { handle = \"0x81000031\" }\n[[");
    world.write("agent.toml", world.listen() + &chip.section("tpm") + &config)?;
    does(&world, &["generate", "k/next", "--type", "p256"]).map(drop)
}

#[test]
fn of_a_pkcs11_token() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    for (label, more) in [("always", &["--always-auth"][..]), ("once", &[])] {
        let make = ["--keypairgen", "--key-type", "rsa:2048", "--usage-sign", "--label", label, "--id"];
        token.tool(&[&make[..], &[&hex::encode(label)], more].concat())?;
    }
    let keys = key_section("always", "t", "always") + &key_section("once", "t", "once");
    world.write("agent.toml", world.listen() + &token_section("t", &token, "") + &keys)?;
    for name in ["always", "once"] {
        let output = operator::key(&world, &["rotate", name])?;
        let said = String::from_utf8(output.stderr)?;
        let printed: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("  omsign-agent ")).collect();
        ensure!(output.status.success() && printed.len() == 2, "{said}");
        let (csr, _) = printed[0].split_once("    ").context("what it is for")?;
        types(&world, &csr.replace('…', "CN=Next"))?;
        let next = listed(&world, &format!("{name}/next"))?;
        let asks = next.contains("asks for the PIN before every signature");
        ensure!(next.contains("rsa") && asks == (name == "always"), "{name}: {next}");
        let (finish, _) = printed[1].split_once("    ").context("what it is for")?;
        types(&world, finish)?;
    }
    // As `rotate` says to, where it was named and not made: of the present one's kind.
    token.generate("p521", KeyType::P521, Objects::Pair)?;
    let named = key_section("k", "t", "p521").replace("\n[[", "\nnext = { label = \"p521-2\" }\n[[");
    world.write("agent.toml", world.listen() + &token_section("t", &token, "") + &named)?;
    refuses(&world, &["rotate", "k"], "`omsign-agent key generate k/next` makes it")?;
    does(&world, &["generate", "k/next"])?;
    let next = listed(&world, "k/next")?;
    ensure!(next.contains("p521"), "{next}");
    let config = key_section("k", "t", "gone").replace("\n[[", "\nnext = { label = \"new\" }\n[[");
    world.write("agent.toml", world.listen() + &token_section("t", &token, "") + &config)?;
    does(&world, &["generate", "k/next", "--type", "p256"]).map(drop)
}

/// Each changes the one file of all three, and none what another wrote.
#[test]
fn rotations_at_the_same_time() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k1", KeyType::P256)?;
    for label in ["k2", "k3"] {
        token.generate(label, KeyType::P256, Objects::Pair)?;
    }
    let keys: String = ["k1", "k2", "k3"].iter().map(|name| key_section(name, "t", name)).collect();
    let agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &keys))?;
    let all = |arguments: &[&str]| {
        std::thread::scope(|scope| {
            let rotate = |name| {
                let world = &world;
                scope.spawn(move || does(world, &[&["rotate", name], arguments].concat()).map(drop))
            };
            let at_work = ["k1", "k2", "k3"].map(rotate);
            at_work.into_iter().try_for_each(|rotated| rotated.join().expect("no panic"))
        })
    };
    for round in 2..5 {
        all(&[])?;
        all(&["--finish"])?;
        let text = std::fs::read_to_string(world.path("agent.toml"))?;
        for name in ["k1", "k2", "k3"] {
            let object = format!("object = {{ label = \"{name}-{round}\" }}");
            ensure!(text.contains(&object) && !text.contains("next ="), "round {round}, {name}: {text}");
        }
    }
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Types what was printed.
fn types(world: &World, line: &str) -> anyhow::Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("\"$0\" {line}")]).arg(built("omsign-agent")?);
    world.without_surprises(shell.current_dir("/"));
    let output = shell.output()?;
    ensure!(output.status.success(), "{line}: {output:?}");
    Ok(())
}
