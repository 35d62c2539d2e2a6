//! What callers see when tokens fail, and that the agent heals.

use std::time::{Duration, Instant};

use anyhow::ensure;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_tests::agent::{Agent, eventually, freeze, signal};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::world::{World, key_section, text, token_section};
use rustix::process::Signal;
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);
const DIGEST: [u8; 32] = [7; 32];

/// Callers in a hurry give up; what they left behind still counts, and the token is not killed for it.
#[test]
fn short_deadlines_do_not_get_around_the_queue() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, "queue = 2\ntimeout = \"1s\""))?;
    // Who is turned away is told so once that is recorded, whatever the disk is at.
    let listen = world.listen() + "durability = \"os\"\n";
    let agent = Agent::start(&world, &(listen + &section + &key_section("k", "t", "k")))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        let before = agent.hosts()?;
        proxy.set("C_Sign 0 200\n")?;
        let mut full = 0;
        for id in 10..40 {
            let hasty = sign(&mut client, request("k", id, &DIGEST), Duration::from_millis(50)).await;
            full += usize::from(hasty.is_err_and(|status| status.code() == Code::ResourceExhausted));
        }
        ensure!(full > 15, "{full} were told that the queue is full");
        proxy.set("")?;
        // The last of them leave the queue now.
        let started = Instant::now();
        let mut id = 100;
        while let Err(full) = sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await {
            ensure!(full.code() == Code::ResourceExhausted && started.elapsed() < SECOND * 10, "{full}");
            id += 1;
        }
        ensure!(agent.hosts()? == before, "a healthy process was killed: {}", agent.log()?);
        Ok(())
    })
}

#[test]
fn a_removed_token_directory_comes_back_under_a_running_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        let away = world.path("away");
        std::fs::rename(token.tokens(), &away)?;
        let gone = sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await;
        ensure!(gone.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{gone:?}");
        std::fs::rename(&away, token.tokens())?;
        let started = Instant::now();
        let mut id = 10;
        while sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await.is_err() {
            ensure!(started.elapsed() < SECOND * 15, "it does not heal: {}", agent.log()?);
            tokio::time::sleep(Duration::from_millis(50)).await;
            id += 1;
        }
        Ok(())
    })
}

/// Out of memory for a moment: nobody is told who has the time to wait.
#[test]
fn a_busy_token_is_asked_again() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, ""))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        let (hosts, before) = (agent.hosts()?, proxy.calls("C_SignInit"));
        // CKR_DEVICE_MEMORY
        proxy.set("C_SignInit 31 0\n")?;
        let late = sign(&mut client, request("k", 2, &DIGEST), SECOND).await;
        ensure!(late.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{late:?}");
        ensure!(proxy.calls("C_SignInit") > before + 2, "it was not asked again");
        let freed = async {
            eventually_async("three tries", || proxy.calls("C_SignInit") >= before + 6).await?;
            proxy.set("")
        };
        let (signed, freed) = tokio::join!(sign(&mut client, request("k", 3, &DIGEST), SECOND * 10), freed);
        freed?;
        signed?;
        ensure!(agent.hosts()? == hosts, "busy is no reason for a new process");
        // CKR_HOST_MEMORY, for good: a module that has lost it all. The next process takes a second to get there.
        proxy.set("C_SignInit 2 0\nC_Initialize 0 1000\n")?;
        let replaced = async {
            eventually_async("another process", || agent.hosts().is_ok_and(|now| now != hosts)).await?;
            proxy.set("")
        };
        let (signed, replaced) =
            tokio::join!(sign(&mut client, request("k", 4, &DIGEST), SECOND * 20), replaced);
        replaced?;
        signed.map(drop).map_err(Into::into)
    })
}

/// Everything on the token is gone, and then there is a key of the same name.
#[test]
fn a_token_that_is_initialized_anew() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    let signs = |name: &str| world.omsign(&["sign", "model", "--key", "k", "--signature", name]);
    ensure!(signs("before.sig")?.status.success(), "{}", agent.log()?);
    std::fs::remove_dir_all(token.tokens())?;
    let again = SoftHsm::create(&token.directory, "t")?;
    let errors = String::from_utf8(signs("none.sig")?.stderr)?;
    ensure!(
        errors.contains("the token has no private key")
            || errors.contains("it holds another key")
            || errors.contains("vanished"),
        "{errors}"
    );
    again.generate("k", KeyType::P256, Objects::Pair)?;
    eventually("a signature", || Ok(signs("after.sig")?.status.success()))?;
    let public = text(&again.public_key("k"));
    world.omsign_ok(&["verify", "model", "--signature", "after.sig", "--public-key", &public])?;
    Ok(())
}

#[test]
fn a_key_deleted_and_made_again_signs_again() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let sections = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let config = world.listen() + &token_section("t", &token, "") + &sections;
    let _agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let errors = world.omsign_fails(2, &["agent", "unlock", "t"])?;
        ensure!(errors.contains("it is not locked"), "{errors}");
        let before = sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        token.delete("k")?;
        let gone = sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await;
        ensure!(gone.is_err());
        sign(&mut client, request("other", 3, &DIGEST), SECOND * 10).await?;
        // Others are served without a pause, and more of them than sign at a time.
        let mut load = tokio::task::JoinSet::new();
        for caller in 1..5 {
            let mut client = client.clone();
            load.spawn(async move {
                for id in 0.. {
                    sign(&mut client, request("other", (caller << 64) + id, &DIGEST), SECOND * 10).await?;
                }
                Ok::<_, tonic::Status>(())
            });
        }
        token.generate("k", KeyType::P256, Objects::Pair)?;
        // It is looked for again, without an operator.
        let started = Instant::now();
        let after = loop {
            let id = 10 + started.elapsed().as_micros();
            match sign(&mut client, request("k", id, &DIGEST), SECOND * 10).await {
                Ok(signed) => break signed,
                Err(status) => ensure!(started.elapsed() < SECOND * 20, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        ensure!(before.public_key != after.public_key, "a new key");
        ensure!(load.try_join_next().is_none(), "others were not served");
        Ok(())
    })
}

/// Nobody asks in between: the first to notice is a request. No signature of the new key is ever called one of the old.
#[test]
fn a_key_that_is_replaced_by_another_of_its_name() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    token.delete("k")?;
    token.generate("k", KeyType::P256, Objects::Pair)?;
    let sign = ["sign", "model", "--key", "k", "--signature", "new.sig"];
    eventually("a signature of the new key", || {
        let output = world.omsign(&sign)?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(!errors.contains("is not valid for this payload"), "{errors}");
        Ok(output.status.success())
    })?;
    let public = text(&token.public_key("k"));
    world.omsign_ok(&["verify", "model", "--signature", "new.sig", "--public-key", &public])?;
    ensure!(agent.log()?.contains("was replaced by another"), "{}", agent.log()?);
    Ok(())
}

#[test]
fn a_killed_process_costs_its_requests_and_nothing_else() -> anyhow::Result<()> {
    let world = World::new()?;
    let (slow, fast) = (world.token("slow", "k", KeyType::P256)?, world.token("fast", "k", KeyType::P256)?);
    let proxy = world.proxy()?;
    let tokens =
        proxy.before(&token_section("slow", &slow, "timeout = \"30s\""))? + &token_section("fast", &fast, "");
    let keys = key_section("slow", "slow", "k") + &key_section("fast", "fast", "k");
    let agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("slow", 1, &DIGEST), SECOND * 10).await?;
        sign(&mut client, request("fast", 2, &DIGEST), SECOND * 10).await?;
        let before = agent.hosts()?;
        ensure!(before.len() == 2, "two tokens, two processes: {before:?}");
        proxy.set("C_Sign 0 20000\n")?;
        let mut waiting = tokio::task::JoinSet::new();
        for id in 10..20 {
            let mut client = client.clone();
            waiting.spawn(async move { sign(&mut client, request("slow", id, &DIGEST), SECOND * 15).await });
        }
        eventually_async("the operation", || proxy.injected("C_Sign") > 0).await?;
        // The other token is served all the while.
        for id in 30..40 {
            sign(&mut client, request("fast", id, &DIGEST), SECOND).await?;
        }
        proxy.set("")?;
        let victim = hanging(&before)?;
        signal(victim, Signal::KILL)?;
        let mut codes = Vec::new();
        while let Some(result) = waiting.join_next().await {
            codes.push(result?.err().map(|status| status.code()));
        }
        // Those that the process had are told; those that still queued in the agent may be served by its
        // replacement.
        ensure!(codes.contains(&Some(Code::Unavailable)), "{codes:?}");
        ensure!(codes.iter().all(|code| matches!(code, None | Some(Code::Unavailable))), "{codes:?}");
        sign(&mut client, request("slow", 50, &DIGEST), SECOND * 10).await?;
        let after = agent.hosts()?;
        ensure!(after.len() == 2 && before.iter().filter(|pid| after.contains(pid)).count() == 1);
        Ok(())
    })
}

#[test]
fn a_stopped_process_is_replaced_within_its_timeout() -> anyhow::Result<()> {
    let world = World::new()?;
    let (stuck, fast) = (world.token("stuck", "k", KeyType::P256)?, world.token("fast", "k", KeyType::P256)?);
    let tokens = token_section("stuck", &stuck, "timeout = \"4s\"") + &token_section("fast", &fast, "");
    let keys = key_section("stuck", "stuck", "k") + &key_section("fast", "fast", "k");
    let agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("stuck", 1, &DIGEST), SECOND * 10).await?;
        sign(&mut client, request("fast", 2, &DIGEST), SECOND * 10).await?;
        let before = agent.hosts()?;
        // Which process is whose shows in what it has open.
        let victim = owner(&before, &stuck)?;
        freeze(victim)?;
        let started = Instant::now();
        let (mut a, mut b) = (client.clone(), client.clone());
        let (patient, hasty) = tokio::join!(
            sign(&mut a, request("stuck", 10, &DIGEST), SECOND * 10),
            sign(&mut b, request("stuck", 11, &DIGEST), Duration::from_millis(1500)),
        );
        let code = patient.as_ref().err().map(tonic::Status::code);
        ensure!(code == Some(Code::Unavailable), "{patient:?}");
        let code = hasty.as_ref().err().map(tonic::Status::code);
        ensure!(code == Some(Code::DeadlineExceeded), "{hasty:?}");
        ensure!(started.elapsed() < SECOND * 15, "{:?}", started.elapsed());
        sign(&mut client, request("fast", 20, &DIGEST), SECOND * 10).await?;
        sign(&mut client, request("stuck", 21, &DIGEST), SECOND * 10).await?;
        ensure!(!agent.hosts()?.contains(&victim), "the stopped process was left behind");
        Ok(())
    })
}

/// CKR_DATA_LEN_RANGE is nobody's fault but the request's: no process is replaced for it.
#[test]
fn an_error_that_is_not_the_tokens() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, "timeout = \"2s\""))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &DIGEST), SECOND * 10).await?;
        let before = agent.hosts()?;
        proxy.set("C_SignInit 21 0\n")?;
        let refused = sign(&mut client, request("k", 2, &DIGEST), SECOND * 10).await;
        ensure!(refused.as_ref().is_err_and(|s| s.code() == Code::FailedPrecondition), "{refused:?}");
        ensure!(agent.hosts()? == before);
        Ok(())
    })
}

#[test]
fn two_softhsm_configurations_in_one_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    // Same label, same key name, different stores: only separate processes keep them apart.
    let (a, b) = (SoftHsm::create(&world.path("a"), "same")?, SoftHsm::create(&world.path("b"), "same")?);
    a.generate("k", KeyType::P256, Objects::Pair)?;
    b.generate("k", KeyType::P384, Objects::Pair)?;
    let tokens = token_section("a", &a, "") + &token_section("b", &b, "");
    let keys = key_section("a", "a", "k") + &key_section("b", "b", "k");
    let _agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    let keys = world.omsign_ok(&["keys"])?;
    ensure!(keys.contains("ecdsa-p256-sha256") && keys.contains("ecdsa-p384-sha384"), "{keys}");
    for (name, token) in [("a", &a), ("b", &b)] {
        let exported = world.omsign_ok(&["keys", "export", name])?;
        ensure!(exported == std::fs::read_to_string(token.public_key("k"))?);
    }
    Ok(())
}

#[test]
fn a_token_that_is_down_does_not_keep_the_agent_from_starting() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let absent = token_section("absent", &token, "").replace("label = \"t\"", "label = \"nowhere\"");
    let keys = key_section("k", "t", "k") + &key_section("a", "absent", "k");
    let agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &absent + &keys))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    // SoftHSM shows no token at all while another process opens it; the agent looks again.
    let present = "no token with label \"nowhere\" is present; tokens present: \"t\"";
    eventually("what is there", || {
        Ok(world.omsign_fails(2, &["sign", "model", "--key", "a"])?.contains(present))
    })?;
    // For a moment, each time it is looked for, it is starting.
    eventually("both states", || {
        let status = world.status()?;
        Ok(status.contains("token t: ready") && status.contains("token absent: unavailable: "))
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

async fn eventually_async(what: &str, holds: impl Fn() -> bool) -> anyhow::Result<()> {
    let started = Instant::now();
    while !holds() {
        ensure!(started.elapsed() < SECOND * 15, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// The process that has the fault proxy loaded.
fn hanging(pids: &[u32]) -> anyhow::Result<u32> {
    find(pids, "libomsign_fault_proxy.so", "maps")
}

/// The process that was started with this token's SoftHSM configuration.
fn owner(pids: &[u32], token: &SoftHsm) -> anyhow::Result<u32> {
    find(pids, &token.config().display().to_string(), "environ")
}

fn find(pids: &[u32], needle: &str, file: &str) -> anyhow::Result<u32> {
    for pid in pids {
        let bytes = std::fs::read(format!("/proc/{pid}/{file}"))?;
        if String::from_utf8_lossy(&bytes).contains(needle) {
            return Ok(*pid);
        }
    }
    anyhow::bail!("no process has {needle} in {file}")
}
