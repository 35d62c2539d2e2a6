//! What somebody who is let in at a socket, as a caller or an operator, cannot do to others.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::SwTpm;
use omsign_fixtures::write_private;
use omsign_proto::v1::ListTokensRequest;
use omsign_tests::agent::{Agent, SOON, eventually, signal};
use omsign_tests::client::{Client, channel, connect, request, run, sign};
use omsign_tests::world::{World, key, key_section, token_section};
use rustix::process::Signal;
use serde_json::{Value, json};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// What the operators' socket answers last to a command, sent as no program of ours would.
fn told(world: &World, command: &Value) -> anyhow::Result<Value> {
    let mut socket = UnixStream::connect(world.path("agent.operator.sock"))?;
    socket.set_read_timeout(Some(SOON))?;
    let ask = json!({ "version": env!("CARGO_PKG_VERSION"), "asked": { "Command": command } }).to_string();
    socket.write_all(&[&u32::try_from(ask.len())?.to_be_bytes(), ask.as_bytes()].concat())?;
    loop {
        let mut length = [0; 4];
        socket.read_exact(&mut length)?;
        let mut answer = vec![0; u32::from_be_bytes(length).try_into()?];
        socket.read_exact(&mut answer)?;
        let answer: Value = serde_json::from_slice(&answer)?;
        if let Some(done) = answer.get("Done") {
            return Ok(done.clone());
        }
    }
}

/// Whoever may write the directory puts something else in the socket's place, and has the configuration read anew.
#[test]
fn a_link_in_the_place_of_the_operators_socket() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let operator = "[[operator]]\nunix = { uid = 65534 }\n";
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k") + operator;
    let agent = Agent::start(&world, &config)?;
    let (socket, secret) = (world.path("agent.operator.sock"), world.path("secret"));
    ensure!(socket.metadata()?.permissions().mode() & 0o777 == 0o666);
    write_private(&secret, b"of somebody else")?;
    std::fs::rename(&socket, world.path("moved.sock"))?;
    symlink(&secret, &socket)?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("its word", || Ok(agent.log()?.contains("somebody put another file in the socket's place")))?;
    ensure!(secret.metadata()?.permissions().mode() & 0o777 == 0o600);
    ensure!(agent.stop()?.success() && secret.exists() && socket.is_symlink());
    Ok(())
}

/// Streams that are never read take no more than a share, which the same caller has back when they end.
#[test]
fn more_requests_than_one_caller_may_have() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    run(async {
        let mut watched = Vec::new();
        let mut refused = None;
        // As many as a connection has, on each of as many as it takes.
        'full: for _ in 0..16 {
            let mut health = HealthClient::new(channel(world.path("agent.sock")).await?);
            for _ in 0..100 {
                match health.watch(HealthCheckRequest { service: String::new() }).await {
                    Ok(stream) => watched.push((health.clone(), stream.into_inner())),
                    Err(status) => {
                        refused = Some(status);
                        break 'full;
                    }
                }
            }
        }
        let refused = refused.context("there is no end to it")?;
        ensure!(refused.code() == Code::ResourceExhausted && watched.len() == 1024, "{refused}");
        let mut client: Client = connect(world.path("agent.sock")).await?;
        let listed = client.list_tokens(ListTokensRequest {}).await;
        ensure!(listed.is_err_and(|status| status.code() == Code::ResourceExhausted));
        drop(watched);
        // The agent learns of it connection by connection. Then there is room for nearly as many again.
        let (mut again, mut tried) = (Vec::new(), 0);
        while again.len() < 1000 {
            let mut health = HealthClient::new(channel(world.path("agent.sock")).await?);
            for _ in 0..100 {
                match health.watch(HealthCheckRequest { service: String::new() }).await {
                    Ok(stream) => again.push((health.clone(), stream.into_inner())),
                    Err(status) => {
                        tried += 1;
                        ensure!(status.code() == Code::ResourceExhausted && tried < 10_000, "{status}");
                        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                    }
                }
                // What is left of all places is for the one that follows.
                if again.len() == 1000 {
                    break;
                }
            }
        }
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await.map(drop).map_err(Into::into)
    })
}

/// A command names what the configuration names, and nothing else of what the agent's user can read.
#[test]
fn an_operator_who_names_a_file() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let config = world.listen() + &chip.section("tpm") + &key("k", "tpm", "file = \"k.pem\"");
    let _agent = Agent::start(&world, &config)?;
    // Nobody writes to it: whoever opened it would wait.
    let pipe = world.path("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from_raw_mode(0o600))?;
    let template = json!({
        "key_type": "p256", "no_da": false, "pin_policy": null, "touch_policy": null, "like": { "TpmFile": pipe }
    });
    let done = told(&world, &json!({ "Key": ["k", { "Generate": template }] }))?;
    ensure!(done["Ok"]["Pem"].as_str().is_some_and(|pem| pem.contains("PUBLIC KEY")), "{done}");
    Ok(())
}

/// What an operator calls a key is recorded as far as names go.
#[test]
fn an_operator_who_talks_much() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let before = std::fs::metadata(world.path("audit/audit.jsonl"))?.len();
    let done = told(&world, &json!({ "Key": ["k".repeat(200_000), { "Delete": "" }] }))?;
    ensure!(done["Err"].as_str().is_some_and(|error| error.contains("there is no [key.")), "{done}");
    let grown = std::fs::metadata(world.path("audit/audit.jsonl"))?.len() - before;
    ensure!((1..8192).contains(&grown), "{grown} bytes");
    ensure!(told(&world, &json!({ "Key": ["k".repeat(300_000), { "Delete": "" }] })).is_err());
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    Ok(())
}
