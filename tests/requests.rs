//! What becomes of a request: refused where it is malformed, answered once, with an answer of its own.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_proto::v1::sign_request::Content;
use omsign_proto::v1::sign_response::Event;
use omsign_proto::v1::{RETRY_PUSHBACK, SignRequest};
use omsign_tests::agent::{Agent, SOON, freeze, signal};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::world::{World, key_section, token_section};
use rustix::process::Signal;
use tonic::Code;

#[test]
fn malformed_requests_are_refused_before_the_token_sees_them() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let good = request("k", 1, &[7; 32]);
        sign(&mut client, good.clone(), SOON).await?;
        let mut cases = Vec::new();
        for length in [0, 8, 31, 33, 48, 64, 65] {
            cases.push((
                Code::InvalidArgument,
                omsign_proto::v1::SignRequest {
                    content: Some(Content::Digest(vec![7; length])),
                    request_id: vec![u8::try_from(length)?; 16],
                    ..good.clone()
                },
            ));
        }
        cases.push((Code::InvalidArgument, omsign_proto::v1::SignRequest { content: None, ..good.clone() }));
        cases.push((
            Code::InvalidArgument,
            omsign_proto::v1::SignRequest { request_id: vec![1; 15], ..good.clone() },
        ));
        cases.push((
            Code::InvalidArgument,
            omsign_proto::v1::SignRequest { context: "x".repeat(2000), ..good.clone() },
        ));
        cases.push((Code::NotFound, omsign_proto::v1::SignRequest { key: "nothing".into(), ..good.clone() }));
        cases.push((Code::AlreadyExists, request("k", 1, &[8; 32])));
        for (expected, case) in cases {
            let answer = sign(&mut client, case.clone(), SOON).await;
            ensure!(answer.as_ref().is_err_and(|status| status.code() == expected), "{case:?}: {answer:?}");
        }
        Ok(())
    })
}

#[test]
fn the_same_request_gets_the_same_answer() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let first = sign(&mut client, request("k", 5, &[7; 32]), SOON).await?;
        // ECDSA is randomised: an equal signature is the recorded one.
        let mut again = connect(world.path("agent.sock")).await?;
        ensure!(sign(&mut again, request("k", 5, &[7; 32]), SOON).await? == first);
        ensure!(sign(&mut again, request("k", 6, &[7; 32]), SOON).await? != first);
        ensure!(world.audit()?.len() == 2, "one entry for each signature, none for the repetition");
        Ok(())
    })
}

/// Answers are given together while more requests are there, unless the next one hangs.
#[test]
fn an_answer_does_not_wait_for_one_that_hangs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, "timeout = \"20s\""))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        // So that it is known to be quick, and is given several at once.
        for id in 0..40 {
            sign(&mut client, request("k", id, &[7; 32]), SOON).await?;
        }
        proxy.set("C_Sign 0 600000 later\n")?;
        let hosts = agent.hosts()?;
        let host = hosts.first().context("a process")?;
        freeze(*host)?;
        let mut waiting = tokio::task::JoinSet::new();
        for id in 100..108 {
            // It begins with an event that says that the token is busy.
            let mut events = client.sign(request("k", id, &[7; 32])).await?.into_inner();
            waiting.spawn(async move {
                while let Ok(Some(event)) = events.message().await {
                    if matches!(event.event, Some(Event::Signed(_))) {
                        return true;
                    }
                }
                false
            });
        }
        signal(*host, Signal::CONT)?;
        let first = tokio::time::timeout(Duration::from_secs(5), waiting.join_next()).await;
        ensure!(first?.context("one of eight")??, "the first one was not signed");
        Ok(())
    })
}

/// 10,000 requests from 64 clients: every answer is for its own request.
#[test]
fn no_answer_is_lost_doubled_or_swapped() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen()
        + "durability = \"os\"\n"
        + &token_section("t", &token, "")
        + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    let key = openssl::pkey::PKey::public_key_from_pem(&std::fs::read(token.public_key("k"))?)?.ec_key()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answers = runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..64_u128 {
            let mut client = connect(world.path("agent.sock")).await?;
            clients.spawn(async move {
                let mut answers = Vec::new();
                for round in 0..157_u128 {
                    let id = number << 32 | round;
                    let digest: Vec<u8> = id.to_be_bytes().repeat(2);
                    let signed =
                        sign(&mut client, request("k", id, &digest), Duration::from_secs(60)).await?;
                    answers.push((digest, signed.signature));
                }
                Ok::<_, tonic::Status>(answers)
            });
        }
        let mut answers = Vec::new();
        while let Some(client) = clients.join_next().await {
            answers.extend(client??);
        }
        anyhow::Ok(answers)
    })?;
    ensure!(answers.len() == 64 * 157);
    let mut signatures = std::collections::BTreeSet::new();
    for (digest, signature) in &answers {
        let parsed = openssl::ecdsa::EcdsaSig::from_der(signature)?;
        ensure!(parsed.verify(digest, &key)?, "an answer to another request");
        ensure!(signatures.insert(signature), "an answer given twice");
    }
    ensure!(world.audit()?.len() == answers.len(), "each signature is recorded once");
    Ok(())
}

/// Statements that wait take no more memory than there is room for: where the key takes a digest, none to speak of.
#[test]
fn long_statements_that_wait() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P384)?, world.proxy()?);
    token.generate("e", KeyType::Ed25519, Objects::Pair)?;
    let section = proxy.before(&token_section("t", &token, "timeout = \"60s\""))?;
    let keys = key_section("k", "t", "k") + &key_section("e", "t", "e");
    let agent = Agent::start(&world, &(world.listen() + &section + &keys))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 48]), SOON).await?;
        let before = agent.memory_bytes()?;
        proxy.set("C_Sign 0 600000\n")?;
        let long = |key, id| {
            let statement = Some(Content::Statement(vec![b' '; 15 << 20]));
            SignRequest { content: statement, ..request(key, id, &[]) }
        };
        let mut waiting = Vec::new();
        for id in 10..30 {
            // It begins with an event that says that it waits.
            waiting.push(client.sign(long("k", id)).await?.into_inner());
        }
        let taken = agent.memory_bytes()?.saturating_sub(before);
        ensure!(taken < 200 << 20, "{taken} bytes for 20 statements of 15 MiB");
        // A key that signs messages needs all of it, so that there is room for four.
        let mut waits = 0;
        for id in 30..36 {
            match client.sign(long("e", id)).await {
                Ok(events) => {
                    waiting.push(events.into_inner());
                    waits += 1;
                }
                Err(full) => ensure!(full.code() == Code::ResourceExhausted, "{full}"),
            }
        }
        ensure!(waits == 4, "{waits} wait");
        sign(&mut connect(world.path("agent.sock")).await?, request("k", 1, &[7; 48]), SOON).await?;
        Ok(())
    })
}

/// A device that has too much to do says so, did nothing, and counted no PIN: whoever asks waits, and nothing is opened anew.
#[test]
fn a_device_that_is_asked_for_too_much() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, "profile = \"cloudhsm\""))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await?;
        let hosts = agent.hosts()?;
        let before = proxy.calls("C_Sign");
        // CKR_FUNCTION_FAILED
        proxy.set("C_Sign 6 0\n")?;
        let mut other = client.clone();
        let waits = tokio::spawn(async move { sign(&mut other, request("k", 2, &[7; 32]), SOON).await });
        while proxy.calls("C_Sign") < before + 4 {
            ensure!(!waits.is_finished(), "it is not asked again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        proxy.set("")?;
        waits.await??;
        ensure!(agent.hosts()? == hosts, "{}", agent.log()?);
        proxy.set("C_Login 6 0\n")?;
        agent.kill_hosts()?;
        let refused =
            sign(&mut client, request("k", 3, &[7; 32]), SOON).await.map(drop).map_err(|s| s.code());
        ensure!(refused == Err(Code::Unavailable), "{refused:?}: {}", agent.log()?);
        proxy.set("")?;
        let mut id = 10;
        while let Err(status) = sign(&mut client, request("k", id, &[7; 32]), SOON).await {
            ensure!(status.code() == Code::Unavailable && id < 1000, "{status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
            id += 1;
        }
        Ok(())
    })
}

/// A token that hangs has no time-out in this caller's time: its share of that is over before.
#[test]
fn another_token_within_one_deadline() -> anyhow::Result<()> {
    let world = World::new()?;
    let ((first, second), proxy) = (world.twins()?, world.proxy()?);
    let keys = key_section("k", "a", "k").replace("token = \"a\"", "token = [\"a\", \"b\"]");
    let sections = proxy.before(&token_section("a", &first, ""))? + &token_section("b", &second, "");
    let _agent = Agent::start(&world, &(world.listen() + &sections + &keys))?;
    world.until_ready()?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        proxy.set("C_Sign 0 60000 later\n")?;
        for id in 0..4 {
            sign(&mut client, request("k", id, &[7; 32]), Duration::from_secs(8)).await?;
        }
        Ok(())
    })
}

/// Callers are told at once, and others are served.
#[test]
fn a_full_queue() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, calm) = (world.token("t", "k", KeyType::P256)?, world.token("calm", "calm", KeyType::P256)?);
    let proxy = world.proxy()?;
    let tokens = proxy.before(&token_section("t", &token, "queue = 8"))? + &token_section("calm", &calm, "");
    let keys = key_section("k", "t", "k") + &key_section("calm", "calm", "calm");
    // Others wait for nothing of the disk either.
    let listen = world.listen() + "durability = \"os\"\n";
    let _agent = Agent::start(&world, &(listen + &tokens + &keys))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for (key, id) in [("k", 1), ("calm", 2)] {
            sign(&mut client, request(key, id, &[7; 32]), SOON).await?;
        }
        proxy.set("C_Sign 0 1200\n")?;
        let mut waiting = tokio::task::JoinSet::new();
        for id in 10..20 {
            let mut client = client.clone();
            waiting.spawn(async move { sign(&mut client, request("k", id, &[7; 32]), SOON).await });
        }
        let mut codes = Vec::new();
        while let Some(result) = waiting.join_next().await {
            let refused = result?.err();
            if let Some(full) = refused.as_ref().filter(|status| status.code() == Code::ResourceExhausted) {
                let soon = full.metadata().get(RETRY_PUSHBACK).context("when to come again")?;
                let soon = soon.to_str()?.parse::<u64>()?;
                ensure!((50..=10_000).contains(&soon), "{soon} ms");
            }
            codes.push(refused.map(|status| status.code()));
            // While the slow one has what it took.
            let id = 100 + codes.len() as u128;
            sign(&mut client, request("calm", id, &[7; 32]), Duration::from_secs(2)).await?;
        }
        let full = codes.iter().filter(|code| **code == Some(Code::ResourceExhausted)).count();
        let served = codes.iter().filter(|code| code.is_none()).count();
        // The other half is for others.
        ensure!((full, served) == (6, 4), "{codes:?}");
        Ok(())
    })
}
