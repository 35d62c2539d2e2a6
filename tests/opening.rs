//! What a token shows when it is opened: halves that do not belong together, and a module that keeps dying.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, PIN, SoftHsm};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::proxy::Proxy;
use omsign_tests::world::{World, key_section, text, token_section};

fn pkcs11_tool(token: &SoftHsm, arguments: &[&str]) -> anyhow::Result<()> {
    let mut tool = Command::new("pkcs11-tool");
    tool.args(["--module", MODULE, "--token-label", &token.label, "--login", "--pin", PIN]).args(arguments);
    let output = tool.env("SOFTHSM2_CONF", token.config()).output().context("pkcs11-tool (apt: opensc)")?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A signature that no announced key verifies would be found by its readers only: each key signs a challenge first.
#[test]
fn a_public_half_of_another_key_is_no_public_half() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let other = text(&world.path("other.der"));
    pkcs11_tool(&token, &["--read-object", "--type", "pubkey", "--label", "other", "--output-file", &other])?;
    pkcs11_tool(&token, &["--delete-object", "--type", "pubkey", "--label", "k"])?;
    let as_k = ["--write-object", &other, "--type", "pubkey", "--label", "k", "--id", &hex::encode("k")];
    pkcs11_tool(&token, &as_k)?;
    let keys = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let _agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &keys))?;
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("a public half on the token does not belong to it"), "{errors}");
    world.omsign_ok(&["sign", "model", "--key", "other"]).map(drop)
}

/// Tools forget CKA_ID; the label leads to the public half as well.
#[test]
fn a_public_half_with_the_label_only() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let half = text(&world.path("k.der"));
    pkcs11_tool(&token, &["--read-object", "--type", "pubkey", "--label", "k", "--output-file", &half])?;
    pkcs11_tool(&token, &["--delete-object", "--type", "pubkey", "--label", "k"])?;
    pkcs11_tool(&token, &["--write-object", &half, "--type", "pubkey", "--label", "k", "--id", "77"])?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"]).map(drop)
}

/// A process that ends whenever it opens its device is started again with growing pauses, and costs the others nothing.
#[test]
fn a_module_that_keeps_dying_is_not_a_busy_loop() -> anyhow::Result<()> {
    let world = World::new()?;
    let (dying, calm) = (world.token("t", "k", KeyType::P256)?, world.token("u", "k", KeyType::P256)?);
    let proxy = Proxy::new(&world)?;
    proxy.set("C_OpenSession abort 0\n")?;
    let tokens = proxy.token_section("t", &dying, "") + &token_section("u", &calm, "");
    let config = world.listen() + &tokens + &key_section("k", "t", "k") + &key_section("calm", "u", "k");
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    let starts = || proxy.calls("C_OpenSession");
    eventually("three starts", || Ok(starts() >= 3))?;
    let (from, before) = (Instant::now(), starts());
    while from.elapsed() < Duration::from_secs(2) {
        world.omsign_ok(&["sign", "model", "--key", "calm"])?;
    }
    // After pauses of 100, 200 and 400 ms come 0.8, 1.6 and 3.2 s; without them there would be hundreds.
    let more = starts() - before;
    ensure!(more <= 6, "{more} starts in two seconds");
    proxy.set("")?;
    eventually("a token that is well again", || {
        Ok(world.omsign(&["sign", "model", "--key", "k"])?.status.success())
    })
}

/// A second owner is what tokens do not take, wherever the first one listens.
#[test]
fn doctor_leaves_the_tokens_of_a_running_agent_alone() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = Proxy::new(&world)?;
    let sections = proxy.token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &(world.listen() + &sections))?;
    world.omsign_ok(&["keys", "export", "k"])?;
    world.write("agent.toml", (world.listen() + &sections).replace("agent.sock", "other.sock"))?;
    let (_, said) = world.doctor()?;
    ensure!(said.contains("token.t: an agent is running and owns it"), "{said}");
    ensure!(proxy.calls("C_Login") == 1, "doctor logged in");
    ensure!(agent.stop()?.success());
    // Now it is nobody's; but on this address there is somebody.
    world.tls("a")?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let tls = format!(
        "[listen]\ntls = {{ address = \"{}\", certificate = \"a-server.pem\", private_key = \"a-server.key\", client_ca = \"a-ca.pem\" }}\n[audit]\ndirectory = \"audit\"\n",
        taken.local_addr()?
    );
    world.write("agent.toml", tls + &sections)?;
    let (status, said) = world.doctor()?;
    ensure!(status.success() && said.contains("warning listen.tls") && said.contains("in use"), "{said}");
    ensure!(said.contains("nobody could unlock a token"), "{said}");
    ensure!(proxy.calls("C_Login") == 2 && said.contains("signs and verifies"), "{said}");
    Ok(())
}
