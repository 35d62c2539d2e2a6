//! Entries of the audit log say everything, are on disk before their signatures leave, and one fsync serves all that
//! wait. strace watches the agent's system calls, and makes them fail or take their time.

use std::path::Path;

use anyhow::{Context as _, ensure};
use omsign_fixtures::softhsm::KeyType;
use omsign_proto::v1::{GetKeyRequest, SignRequest};
use omsign_tests::agent::{Agent, SOON, eventually, refused, signal, under};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section, text, token_section};
use rustix::process::Signal;
use tonic::Code;

const REQUESTS: u8 = 64;

/// An agent whose calls of `fdatasync` are written to a file, and meet with this.
fn watched(world: &World, durability: &str, inject: &str) -> anyhow::Result<Agent> {
    let token = world.token("t", "k", KeyType::P256)?;
    let listen = format!("{}durability = \"{durability}\"\n", world.listen());
    let config = listen + &token_section("t", &token, "") + &key_section("k", "t", "k");
    Agent::start_with(world, &config, |command| {
        let inject = format!("--inject=fdatasync:{inject}");
        let output = format!("--output={}", text(&world.path("trace")));
        // With the first, the agent stays our child and strace is its grandchild.
        let watch = ["--daemonize", "--follow-forks", "--quiet=all", "--trace=fdatasync", &inject, &output];
        *command = under("strace", watch, command);
    })
}

fn syncs(world: &World) -> anyhow::Result<usize> {
    let trace = std::fs::read_to_string(world.path("trace")).context("strace's output")?;
    Ok(trace.lines().filter(|line| line.contains("fdatasync(")).count())
}

/// Has that many digests signed at once; returns how each ended.
fn signed_at_once(world: &World) -> anyhow::Result<Vec<Result<(), Code>>> {
    run(async {
        let client = connect(world.path("agent.sock")).await?;
        let mut asked = tokio::task::JoinSet::new();
        for number in 0..REQUESTS {
            let mut client = client.clone();
            asked.spawn(async move {
                let answer = sign(&mut client, request("k", number.into(), &[number; 32]), SOON).await;
                answer.map(drop).map_err(|status| status.code())
            });
        }
        Ok(asked.join_all().await)
    })
}

/// The token has signed, and nobody gets it.
#[test]
fn no_signature_without_an_entry_on_disk() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = watched(&world, "fsync", "error=EIO")?;
    let answers = signed_at_once(&world)?;
    ensure!(answers.iter().all(|answer| *answer == Err(Code::Unavailable)), "{answers:?}");
    ensure!(syncs(&world)? == 1, "after one failure nothing the file holds is known");
    // The disk may be well again; what it holds is not known before a restart.
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("the audit log cannot be written: fsync failed before"), "{errors}");
    let log = agent.log()?;
    ensure!(log.matches("nothing is signed until it can be written again").count() == 1, "{log}");
    Ok(())
}

#[test]
fn one_sync_for_all_that_wait() -> anyhow::Result<()> {
    let world = World::new()?;
    // Long enough for all others to be signed meanwhile.
    let _agent = watched(&world, "fsync", "delay_enter=500000")?;
    let answers = signed_at_once(&world)?;
    ensure!(answers.iter().all(Result::is_ok), "{answers:?}");
    ensure!(world.audit()?.len() == usize::from(REQUESTS));
    let syncs = syncs(&world)?;
    ensure!((1..=8).contains(&syncs), "{syncs} for {REQUESTS} signatures");
    Ok(())
}

#[test]
fn none_where_the_system_writes_when_it_likes() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = watched(&world, "os", "error=EIO")?;
    let answers = signed_at_once(&world)?;
    ensure!(answers.iter().all(Result::is_ok), "{answers:?}");
    ensure!(world.audit()?.len() == usize::from(REQUESTS) && syncs(&world)? == 0);
    Ok(())
}

/// Every field of an entry, of a signature that was made.
#[test]
fn what_an_entry_says() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let before = std::time::SystemTime::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let message = SignRequest { context: "a model, it says".into(), ..request("k", 0xab, &[7; 32]) };
        anyhow::Ok(sign(&mut client, message, SOON).await?)
    })?;
    let audit = world.audit()?;
    let entry = audit.last().context("an entry")?;
    let expected = [
        ("action", "sign".to_owned()),
        ("request_id", format!("{:032x}", 0xab)),
        ("rule", "key.k.allow[0]".to_owned()),
        ("key", "k".to_owned()),
        ("token", "t".to_owned()),
        ("algorithm", "ecdsa-p256-sha256".to_owned()),
        ("digest", "07".repeat(32)),
        ("claimed_context", "a model, it says".to_owned()),
        ("outcome", "signed".to_owned()),
    ];
    for (field, value) in expected {
        ensure!(entry[field] == value, "{field}: {entry}");
    }
    ensure!(entry["identity"].to_string().contains("uid"), "{entry}");
    let time = humantime::parse_rfc3339(entry["time"].as_str().context("a time")?)?;
    ensure!(time >= before - SOON && time <= std::time::SystemTime::now(), "{entry}");
    Ok(())
}

/// Those who rotate logs move the file away: what comes next is in the new one, and the devices stay one agent's.
#[test]
fn a_log_that_is_moved_away() -> anyhow::Result<()> {
    let world = World::new()?;
    for durability in ["fsync", "os"] {
        let listen = format!("{}durability = \"{durability}\"\n", world.listen());
        let token = world.token(durability, "k", KeyType::P256)?;
        let config = listen + &token_section("t", &token, "") + &key_section("k", "t", "k");
        let agent = Agent::start(&world, &config)?;
        world.model()?;
        let log = world.path("audit/audit.jsonl");
        let signs = || world.omsign_ok(&["sign", "model", "--key", "k"]);
        let lines = |path: &Path| anyhow::Ok(std::fs::read_to_string(path)?.lines().count());
        signs()?;
        let before = lines(&log)?;
        std::fs::rename(&log, world.path("audit/audit.jsonl.1"))?;
        signs()?;
        ensure!(lines(&log)? == 1 && lines(&world.path("audit/audit.jsonl.1"))? == before);
        std::fs::remove_file(&log)?;
        let (status, said) = refused(&world, &config.replace("agent.sock", "other.sock"))?;
        ensure!(status == Some(2) && said.contains("is running and owns the devices"), "{status:?}: {said}");
        signs()?;
        ensure!(lines(&log)? == 1, "{}", agent.log()?);
        // Where none can be begun, nothing is signed, and everybody can see it.
        std::fs::remove_file(&log)?;
        std::fs::create_dir(&log)?;
        let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
        let hint = "hint: nothing is signed without its record: make room";
        ensure!(errors.contains("the audit log cannot be written: ") && errors.contains(hint), "{errors}");
        let serves = || Ok(!world.status()?.contains(": not serving"));
        eventually("the service's end", || Ok(!serves()?))?;
        std::fs::remove_dir(&log)?;
        eventually("service again", serves)?;
        signs()?;
        let entries = world.audit()?;
        let resumed = entries.iter().filter(|entry| entry["outcome"] == "resumed").count();
        ensure!(
            resumed == 1 && entries.last().is_some_and(|entry| entry["outcome"] == "signed"),
            "{entries:?}"
        );
        drop(agent);
    }
    Ok(())
}

/// Whoever is turned away on and on fills no disk: the first ones are recorded, and then one a second with their number.
#[test]
fn refusals_without_end() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = world.agent_and_model()?;
    let before = world.audit()?.len();
    let mut asked = 0_u64;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        loop {
            let refused = client.get_key(GetKeyRequest { name: "unknown".into() }).await;
            ensure!(refused.is_err_and(|status| status.code() == Code::NotFound));
            asked += 1;
            let entries = if asked >= 500 && asked.is_multiple_of(100) { world.audit()? } else { continue };
            let counts = |entry: &serde_json::Value| entry["unrecorded"].as_u64();
            let entries = entries.get(before..).unwrap_or_default();
            let counted: u64 = entries.iter().filter_map(counts).sum();
            if counted > 0 {
                let known = u64::try_from(entries.len())? + counted;
                ensure!(
                    entries.len() < 200 && known <= asked && known > 100,
                    "{known} of {asked}: {}",
                    entries.len()
                );
                return Ok(());
            }
            ensure!(asked < 1_000_000, "none was counted");
        }
    })?;
    let log = agent.log()?.matches("\"message\":\"denied\"").count();
    ensure!(log < 200, "{log} lines in the log");
    // Nobody is left out in the end.
    ensure!(agent.stop()?.success());
    let entries = world.audit()?.split_off(before);
    let counts = |entry: &serde_json::Value| entry["unrecorded"].as_u64();
    let counted: u64 = entries.iter().filter_map(counts).sum();
    let known = u64::try_from(entries.len())? + counted;
    ensure!(known == asked, "{known} of {asked}");
    Ok(())
}

/// Who may sign, and with what, is another from then on.
#[test]
fn a_configuration_that_is_read_anew() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = world.agent_and_model()?;
    let reloads = || -> anyhow::Result<Vec<_>> {
        let all = world.audit()?.into_iter().filter(|entry| entry["action"] == "reload");
        Ok(all
            .map(|entry| (entry["outcome"].clone(), entry["rule"].clone(), entry["reason"].clone()))
            .collect())
    };
    does(&world, &["reload"])?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("two entries", || Ok(reloads()?.len() == 2))?;
    let config = std::fs::read_to_string(world.path("agent.toml"))?;
    world.write("agent.toml", config + "\nmistake")?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("a third", || Ok(reloads()?.len() == 3))?;
    let entries = reloads()?;
    let [(asked, rule, _), (told, none, _), (failed, _, why)] = &entries[..] else {
        anyhow::bail!("{entries:?}");
    };
    ensure!(*asked == "done" && rule.is_string() && *told == "done" && none.is_null(), "{entries:?}");
    ensure!(*failed == "failed" && why.to_string().contains("key with no value"), "{entries:?}");
    Ok(())
}
