//! Others who stand still, are in the way, or hang up: nobody else waits for them, and no PIN is spent for them.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::softhsm::KeyType;
use omsign_proto::v1::{GetKeyRequest, ListTokensRequest, UnlockTokenRequest};
use omsign_tests::agent::{Agent, SOON, eventually, refused, signal};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::operator::{self, does};
use omsign_tests::world::{World, key_section, token_section};
use rustix::process::Signal;
use tonic::{Code, Status};

const SECOND: Duration = Duration::from_secs(1);

/// A name of sixteen megabytes would be ten times as long in an answer's header, of which nobody counts the room.
#[test]
fn what_somebody_calls_a_key_is_not_repeated_as_long_as_it_is() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = world.agent_and_model()?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let name = "\u{7f}".repeat(8 << 20);
        let look = GetKeyRequest { name: name.clone() };
        let unknown = client.get_key(look).await.err().context("there is one")?;
        ensure!(
            unknown.code() == Code::NotFound && unknown.message().len() < 4096,
            "{}",
            unknown.message().len()
        );
        let unknown = sign(&mut client, request(&name, 1, &[7; 32]), SECOND * 9).await;
        ensure!(unknown.is_err_and(|unknown| unknown.message().len() < 4096));
        let unlock = UnlockTokenRequest { token: name, pin: None };
        let unknown = client.unlock_token(unlock).await.err().context("there is one")?;
        ensure!(
            unknown.code() == Code::NotFound && unknown.message().len() < 4096,
            "{}",
            unknown.message().len()
        );
        anyhow::Ok(())
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// An operator who hung up needs no login; and one who waits, none with a PIN that was refused since.
#[test]
fn an_unlock_that_was_given_up() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config = world.listen() + &proxy.before(&token.section("device"))? + &key_section("k", "device", "k");
    omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-5521\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("it is refused", || Ok(world.status()?.contains("it refused the PIN")))?;
    // The first of them keeps the device for a while, and then is refused.
    proxy.set("C_Initialize 0 held\n")?;
    run(async {
        let client = connect(world.path("agent.sock")).await?;
        let unlock = || async {
            let asked = UnlockTokenRequest { token: "device".into(), pin: None };
            client.clone().unlock_token(asked).await.map(drop)
        };
        let before = proxy.calls("C_Initialize");
        let first = unlock();
        tokio::pin!(first);
        while proxy.calls("C_Initialize") == before {
            ensure!(tokio::time::timeout(Duration::from_millis(10), &mut first).await.is_err(), "it is over");
        }
        // What comes after it on the same connection is answered: the agent has it.
        let arrived = async |unlock: &mut (dyn Future<Output = Result<(), Status>> + Unpin)| {
            let mut client = client.clone();
            tokio::select! {
                biased;
                _ = unlock => anyhow::bail!("it is over"),
                listed = client.list_tokens(ListTokensRequest {}) => Ok(listed.map(drop)?),
            }
        };
        for _ in 0..3 {
            arrived(&mut Box::pin(unlock())).await?;
        }
        let mut waits = Box::pin(unlock());
        arrived(&mut waits).await?;
        proxy.set("")?;
        let (first, waits) = tokio::join!(first, waits);
        for refused in [first, waits] {
            ensure!(refused.is_err_and(|status| status.code() == Code::FailedPrecondition));
        }
        anyhow::Ok(())
    })?;
    ensure!(proxy.refused_pins() == 2, "{} tries", proxy.refused_pins());
    // Those that were given up are in the log, too.
    let given_up = |entry: &serde_json::Value| {
        entry["action"] == "unlock" && entry["reason"].to_string().contains("it was given up")
    };
    eventually("they are in the log", || {
        Ok(world.audit()?.iter().filter(|entry| given_up(entry)).count() == 3)
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// systemd starts an agent that ends once more, and the PIN of another token would be offered each time.
#[test]
fn a_required_token_that_is_not_there_beside_one_that_refuses_its_pin() -> anyhow::Result<()> {
    let world = World::new()?;
    let (there, other) = (world.token("there", "k", KeyType::P256)?, world.token("t", "k", KeyType::P256)?);
    let away = world.path("away");
    let config = world.listen()
        + &token_section("there", &there, "")
        + &token_section("gone", &other, "required = true\n")
        + &key_section("k", "there", "k")
        + &key_section("l", "gone", "k");
    std::fs::rename(other.tokens(), &away)?;
    let right = std::fs::read(there.pin_file())?;
    omsign_fixtures::write_private(&there.pin_file(), b"wrong-pin-5521\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("it says why it goes on", || {
        Ok(agent.log()?.contains("it runs all the same: the PIN of token there was refused"))
    })?;
    std::fs::rename(&away, other.tokens())?;
    let healed = || Ok(world.omsign(&["sign", "agent.toml", "--key", "l"])?.status.success());
    eventually("the token that came back signs", healed)?;
    ensure!(agent.stop()?.success());
    // With the right one, nothing keeps it from ending.
    omsign_fixtures::write_private(&there.pin_file(), &right)?;
    std::fs::rename(other.tokens(), &away)?;
    let (status, said) = refused(&world, &config)?;
    ensure!(status == Some(2) && said.contains("token gone is required"), "{status:?}: {said}");
    Ok(())
}

/// What a token was called says nothing of whose PIN was refused.
#[test]
fn tokens_that_exchange_their_names() -> anyhow::Result<()> {
    let world = World::new()?;
    let (one, other) = (world.token("one", "k", KeyType::P256)?, world.token("other", "k", KeyType::P256)?);
    let proxy = world.proxy()?;
    let keys = key_section("k", "a", "k") + &key_section("l", "b", "k");
    let sections = |first: &str, second: &str| -> anyhow::Result<String> {
        Ok(world.listen() + &proxy.before(&one.section(first))? + &other.section(second) + &keys)
    };
    omsign_fixtures::write_private(&one.pin_file(), b"wrong-pin-5521\n")?;
    let agent = Agent::start(&world, &sections("a", "b")?)?;
    eventually("it is refused", || Ok(world.status()?.contains("it refused the PIN")))?;
    world.write("agent.toml", sections("b", "a")?)?;
    does(&world, &["reload"])?;
    eventually("the other one signs", || {
        Ok(world.omsign(&["sign", "agent.toml", "--key", "k"])?.status.success())
    })?;
    let errors = world.omsign_fails(2, &["sign", "agent.toml", "--key", "l"])?;
    ensure!(errors.contains("it refused the PIN") && proxy.refused_pins() == 1, "{errors}");
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Nobody reads what it logs: a terminal with Ctrl-S, a log driver that hangs.
#[test]
fn a_log_that_nobody_reads() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let path = world.write("agent.toml", config)?;
    let mut command = Command::new(built("omsign-agent")?);
    command.arg("serve").arg("--config").arg(path).stdin(Stdio::null()).stderr(Stdio::piped());
    world.without_surprises(command.current_dir(world.path("")));
    let mut agent = Killed(command.spawn()?);
    let mut stderr = agent.0.stderr.take().context("its log")?;
    eventually("it signs", || Ok(world.omsign(&["sign", "agent.toml", "--key", "k"])?.status.success()))?;
    // More lines than a pipe has room for.
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for count in 0..150 {
            let look = GetKeyRequest { name: format!("{count}-{}", "x".repeat(4096)) };
            ensure!(client.get_key(look).await.is_err());
            does(&world, &["reload"])?;
        }
        anyhow::Ok(())
    })?;
    world.omsign_ok(&["sign", "agent.toml", "--key", "k"])?;
    // Who reads on is told.
    let (begins, begun) = std::sync::mpsc::channel();
    let reads = std::thread::spawn(move || {
        let mut text = vec![0; 4096];
        stderr.read_exact(&mut text)?;
        let _ = begins.send(());
        stderr.read_to_end(&mut text)?;
        anyhow::Ok(String::from_utf8_lossy(&text).into_owned())
    });
    begun.recv_timeout(SOON)?;
    eventually("it has read", || {
        does(&world, &["reload"])?;
        Ok(world.omsign(&["sign", "agent.toml", "--key", "k"])?.status.success())
    })?;
    signal(agent.0.id(), Signal::TERM)?;
    ensure!(agent.0.wait()?.success());
    let text = reads.join().expect("it does not panic")?;
    ensure!(text.contains("lines were lost"), "{}", text.len());
    // Nor does it end with who reads it.
    let mut agent = Killed(command.spawn()?);
    drop(agent.0.stderr.take());
    eventually("it signs", || Ok(world.omsign(&["sign", "agent.toml", "--key", "k"])?.status.success()))?;
    does(&world, &["reload"])?;
    let status = world.status()?;
    ensure!(status.contains("token t: ready"), "{status}");
    signal(agent.0.id(), Signal::TERM)?;
    ensure!(agent.0.wait()?.success());
    Ok(())
}

/// A process that does not outlive a test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `doctor` opens the tokens itself: no agent begins meanwhile, and offers their PINs once more.
#[test]
fn an_agent_that_is_started_while_doctor_looks() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config = world.listen() + &proxy.before(&token.section("device"))? + &key_section("k", "device", "k");
    // There is a log.
    ensure!(Agent::start(&world, &config)?.stop()?.success());
    proxy.set("C_Login 0 held\n")?;
    let logins = proxy.calls("C_Login");
    let doctor = std::thread::scope(|scope| {
        let doctor = scope.spawn(|| world.doctor());
        eventually("it logs in", || Ok(proxy.calls("C_Login") > logins))?;
        let started = refused(&world, &config);
        proxy.set("")?;
        let (status, said) = started?;
        ensure!(status == Some(2) && said.contains("is running and owns the devices"), "{said}");
        doctor.join().expect("it does not panic")
    });
    let (status, said) = doctor?;
    ensure!(status.success(), "{said}");
    Ok(())
}

/// Making a key takes minutes on some devices, and the file is others', too.
#[test]
fn a_configuration_that_is_changed_while_a_key_is_made() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config = world.listen() + &proxy.before(&token.section("device"))? + &key_section("k", "device", "k");
    world.write("agent.toml", &config)?;
    proxy.set("C_GenerateKeyPair 30 held\n")?;
    let failed = std::thread::scope(|scope| {
        let rotation = scope.spawn(|| operator::key(&world, &["rotate", "k"]));
        eventually("it makes the key", || Ok(proxy.injected("C_GenerateKeyPair") > 0))?;
        let begun = std::fs::read_to_string(world.path("agent.toml"))?;
        ensure!(begun.contains("next ="), "{begun}");
        world.write("agent.toml", begun + "\n# somebody else's\n")?;
        proxy.set("")?;
        rotation.join().expect("it does not panic")
    })?;
    ensure!(!failed.status.success(), "{failed:?}");
    let after = std::fs::read_to_string(world.path("agent.toml"))?;
    ensure!(after == config + "\n# somebody else's\n", "{after}");
    Ok(())
}
