//! What operators run into over the years: configurations that change back, devices that hang while they open, stops that
//! somebody watches, certificates that no client takes, users without a home.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::softhsm::{KeyType, MODULE, PIN};
use omsign_tests::agent::{Agent, SOON, eventually, refused};
use omsign_tests::client::{channel, connect, request, run, sign};
use omsign_tests::operator::{does, key as asks};
use omsign_tests::world::{World, key_section, text, token_section};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// Its stream ends, and is no request that is still in flight.
#[test]
fn whoever_watches_does_not_hold_a_stop_up() -> anyhow::Result<()> {
    let world = World::new()?;
    let agent = world.agent_and_model()?;
    run(async {
        let mut health = HealthClient::new(channel(world.path("agent.sock")).await?);
        let mut watched = health.watch(HealthCheckRequest::default()).await?.into_inner();
        let serving = |now: Option<HealthCheckResponse>| now.map(|now| now.status());
        ensure!(serving(watched.message().await?) == Some(ServingStatus::Serving));
        omsign_tests::agent::signal(agent.pid(), rustix::process::Signal::TERM)?;
        ensure!(serving(watched.message().await?) == Some(ServingStatus::NotServing));
        ensure!(watched.message().await?.is_none(), "the stream goes on");
        Ok(())
    })?;
    let log = world.path("agent.log");
    ensure!(agent.wait()?.success());
    let log = std::fs::read_to_string(log)?;
    ensure!(!log.contains("still in flight"), "{log}");
    Ok(())
}

/// Commented out and in again, as while somebody looks for what is wrong: nobody had the PIN read anew.
#[test]
fn a_token_that_comes_back_remembers_that_its_pin_was_refused() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let (proxy, other) = (world.proxy()?, world.token("other", "o", KeyType::P256)?);
    let always = world.listen() + &token_section("other", &other, "") + &key_section("o", "other", "o");
    let sometimes = proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-7301\n")?;
    let agent = Agent::start(&world, &(always.clone() + &sometimes))?;
    eventually("its refusal", || Ok(world.status()?.contains("token t: locked: it refused the PIN")))?;
    for _ in 0..3 {
        world.write("agent.toml", &always)?;
        does(&world, &["reload"])?;
        world.write("agent.toml", always.clone() + &sometimes)?;
        does(&world, &["reload"])?;
        eventually("what is known of it", || Ok(world.status()?.contains("token t: locked: it refused")))?;
    }
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    // Once somebody had it read anew, nothing of before counts.
    omsign_fixtures::write_private(&token.pin_file(), format!("{PIN}\n").as_bytes())?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    for queue in [11, 12] {
        let other = sometimes.replace("[token.t]\n", &format!("[token.t]\nqueue = {queue}\n"));
        world.write("agent.toml", always.clone() + &other)?;
        does(&world, &["reload"])?;
        eventually("its return", || Ok(world.status()?.contains("token t: ready")))?;
    }
    ensure!(agent.stop()?.success());
    Ok(())
}

/// What became of its PIN is waited for, and it is the right one.
#[test]
fn reloads_while_it_logs_in() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, ""))?;
    let with = |queue: usize| {
        let section = section.replace("[token.t]\n", &format!("[token.t]\nqueue = {queue}\n"));
        world.listen() + &section + &key_section("k", "t", "k")
    };
    let agent = Agent::start(&world, &with(10))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    proxy.set("C_Login 0 1500\n")?;
    for queue in [11, 12] {
        let before = proxy.calls("C_Login");
        world.write("agent.toml", with(queue))?;
        does(&world, &["reload"])?;
        eventually("its login", || Ok(proxy.calls("C_Login") > before))?;
    }
    eventually("its return", || Ok(world.status()?.contains("token t: ready")))?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Its time for opening is long, and nobody has to wait for it: not a mended configuration, and not a stop.
#[test]
fn a_device_that_hangs_while_it_opens() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    proxy.set("C_Initialize 0 600000\n")?;
    let keys = key_section("k", "t", "k") + &key_section("mine", "t", "k").replace("uid = 0", "uid = 54321");
    let mended = world.listen() + &token_section("t", &token, "timeout = \"10min\"") + &keys;
    let hangs = world.listen() + &proxy.before(&token_section("t", &token, "timeout = \"10min\""))? + &keys;
    let agent = Agent::start(&world, &hangs)?;
    world.model()?;
    eventually("its hang", || Ok(proxy.calls("C_Initialize") == 1))?;
    world.write("agent.toml", &mended)?;
    does(&world, &["reload"])?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    world.write("agent.toml", &hangs)?;
    does(&world, &["reload"])?;
    eventually("another hang", || Ok(proxy.calls("C_Initialize") == 2))?;
    // More than are recorded each.
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for id in 0..130 {
            ensure!(sign(&mut client, request("mine", id, &[7; 32]), SOON).await.is_err());
        }
        Ok(())
    })?;
    ensure!(agent.stop()?.success());
    let audit = world.audit()?;
    let denied = audit.iter().filter(|entry| entry["outcome"] == "denied");
    let counted: u64 = denied.map(|entry| 1 + entry["unrecorded"].as_u64().unwrap_or(0)).sum();
    ensure!(counted == 130, "{counted} refusals are accounted for");
    Ok(())
}

/// RSA keys take minutes on some devices, and another configuration does not end that.
#[test]
fn a_reload_while_a_key_is_made() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, ""))?;
    let keys = key_section("k", "t", "k") + &key_section("slow", "t", "slow");
    let agent = Agent::start(&world, &(world.listen() + &section + &keys))?;
    // Longer than requests that have begun are waited for.
    proxy.set("C_GenerateKeyPair 0 22000\n")?;
    std::thread::scope(|scope| {
        let made = scope.spawn(|| asks(&world, &["generate", "slow", "--type", "p256"]));
        eventually("its begin", || Ok(proxy.calls("C_GenerateKeyPair") == 1))?;
        let more = key_section("again", "t", "k");
        world.write("agent.toml", world.listen() + &section + &keys + &more)?;
        does(&world, &["reload"])?;
        let made = made.join().expect("no panic")?;
        ensure!(made.status.success(), "{made:?}");
        anyhow::Ok(())
    })?;
    world.model()?;
    proxy.set("")?;
    eventually("the new key", || {
        let signed = world.omsign(&["sign", "model", "--key", "slow", "--signature", "s.sig"])?;
        Ok(signed.status.success())
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Nobody's signature waits for it, with one session as with two, nor for another operator's task behind it, which ends none.
#[test]
fn signatures_while_keys_are_made() -> anyhow::Result<()> {
    [1, 2].into_iter().try_for_each(signatures_with)
}

fn signatures_with(sessions: usize) -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let more = format!("profile = \"softhsm\"\nsessions = {sessions}\ntimeout = \"2s\"");
    let section = proxy.before(&token_section("t", &token, &more))?;
    let keys = key_section("k", "t", "k") + &key_section("slow", "t", "slow");
    let agent = Agent::start(&world, &(world.listen() + &section + &keys))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    proxy.set("C_GenerateKeyPair 0 held\n")?;
    std::thread::scope(|scope| {
        let made = scope.spawn(|| asks(&world, &["generate", "slow", "--type", "p256"]));
        eventually("its begin", || Ok(proxy.calls("C_GenerateKeyPair") == 1))?;
        let listed = scope.spawn(|| asks(&world, &["list"]));
        for _ in 0..3 {
            world.omsign_ok(&["sign", "model", "--key", "k"])?;
        }
        ensure!(!made.is_finished(), "the signatures waited");
        proxy.set("")?;
        let listed = listed.join().expect("no panic")?;
        ensure!(listed.status.success(), "{listed:?}");
        let made = made.join().expect("no panic")?;
        ensure!(made.status.success(), "{made:?}");
        anyhow::Ok(())
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// Whoever issues certificates by hand makes these three first; clients say only that something is wrong.
#[test]
fn server_certificates_that_omsign_does_not_take() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.tls("a")?;
    let openssl = |line: &str| {
        let arguments: Vec<_> = line.split_whitespace().collect();
        let output = Command::new("openssl").args(arguments).current_dir(world.path("")).output()?;
        ensure!(output.status.success(), "{line}: {output:?}");
        anyhow::Ok(())
    };
    let new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout";
    openssl(&format!("{new} v1.key -out v1.csr"))?;
    openssl("x509 -req -in v1.csr -signkey v1.key -out v1.pem")?;
    openssl(&format!("{new} ca.key -x509 -addext subjectAltName=DNS:localhost -out ca.pem"))?;
    openssl(&format!("{new} unnamed.key -x509 -addext basicConstraints=CA:FALSE -out unnamed.pem"))?;
    let with = |certificate: &str, key: &str| {
        let tls = format!(
            "[listen]\ntls = {{ address = \"127.0.0.1:0\", certificate = \"{certificate}\", private_key = \"{key}\", \
             client_ca = \"a-ca.pem\" }}\n"
        );
        let listen = world.listen().replacen("[listen]\n", &tls, 1);
        listen + &token_section("t", &token, "") + &key_section("k", "t", "k")
    };
    // Rustls itself does not take this one.
    let (status, errors) = refused(&world, &with("v1.pem", "v1.key"))?;
    ensure!(status == Some(2) && errors.contains("v1.pem: it is of X.509 version 1"), "{errors}");
    for (name, expected) in [("ca", "it is a CA's own (CA:TRUE)"), ("unnamed", "it has no subjectAltName")] {
        let agent = Agent::start(&world, &with(&format!("{name}.pem"), &format!("{name}.key")))?;
        ensure!(agent.log()?.contains(expected), "{name}: {}", agent.log()?);
        drop(agent);
        let (_, report) = world.doctor()?;
        ensure!(report.contains(&format!("warning listen.tls: its certificate: {expected}")), "{report}");
    }
    let short =
        "-addext basicConstraints=CA:FALSE -addext subjectAltName=DNS:localhost -days 3 -out short.pem";
    openssl(&format!("{new} short.key -x509 {short}"))?;
    world.write("agent.toml", with("short.pem", "short.key"))?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("warning listen.tls: its certificate: it expires on"), "{report}");
    Ok(())
}

/// What is recorded does not go into the directory that is signed, and what cannot be recorded is not signed.
#[test]
fn a_user_without_a_home() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let place = tempfile::Builder::new().prefix("omsign-homeless-").tempdir()?;
    // Where nobody else can go, the test's binaries may be.
    for program in ["omsign", "omsign-agent"] {
        std::fs::copy(built(program)?, place.path().join(program))?;
    }
    let model = place.path().join("model");
    std::fs::create_dir(&model)?;
    std::fs::write(model.join("weights"), "w")?;
    let everything =
        Command::new("cp").arg("-r").arg(&token.directory).arg(place.path().join("t")).status()?;
    ensure!(everything.success());
    let config = std::fs::read_to_string(token.config())?;
    let (from, to) = (text(&token.directory), text(&place.path().join("t")));
    let softhsm = place.path().join("softhsm2.conf");
    std::fs::write(&softhsm, config.replace(&from, &to))?;
    std::fs::write(place.path().join("pin"), format!("{PIN}\n"))?;
    let given = Command::new("chown").args(["-R", &NOBODY.to_string()]).arg(place.path()).status()?;
    ensure!(given.success());
    std::fs::set_permissions(place.path().join("pin"), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let uri =
        format!("pkcs11:token=t;object=k?module-path={MODULE}&pin-source={}/pin", place.path().display());
    for (home, state) in [(None, None), (Some(""), None), (None, Some("state")), (Some("home"), Some(""))] {
        let mut sign = Command::new(place.path().join("omsign"));
        sign.args(["sign", ".", "--key-uri", &uri, "--signature", "../m.sig"]).current_dir(&model);
        sign.uid(NOBODY).gid(NOBODY).env_clear().env("SOFTHSM2_CONF", &softhsm);
        sign.envs(home.map(|home| ("HOME", home))).envs(state.map(|state| ("XDG_STATE_HOME", state)));
        let output = sign.output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{home:?} {state:?}: {output:?}");
        ensure!(errors.contains("audit log /nonexistent/.local/state/omsign/audit"), "{errors}");
        ensure!(std::fs::read_dir(&model)?.count() == 1, "something was left in the model");
    }
    // Nor does anybody else of this user look into its memory.
    let mut serve = Command::new(place.path().join("omsign-agent"));
    serve.args(["serve", "--config"]).arg(place.path().join("agent.toml")).current_dir(place.path());
    let listen = "[listen]\nunix = { path = \"agent.sock\" }\n[audit]\ndirectory = \"audit\"\n";
    let section = token.section("t").replace(&text(&token.pin_file()), "pin");
    let section = section.replace(&text(&token.config()), &text(&softhsm));
    std::fs::write(
        place.path().join("agent.toml"),
        listen.to_owned() + &section + &key_section("k", "t", "k"),
    )?;
    let mut serve = serve.uid(NOBODY).gid(NOBODY).stderr(std::process::Stdio::null()).spawn()?;
    let listens = eventually("its socket", || Ok(place.path().join("agent.sock").exists()));
    let owner =
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("/proc/{}/environ", serve.id()))?);
    serve.kill().and_then(|()| serve.wait())?;
    listens?;
    ensure!(owner == 0, "its memory can be read by its user's other programs");
    // One file for all that a user signs on a day.
    let state = place.path().join("state");
    for _ in 0..2 {
        let mut sign = Command::new(place.path().join("omsign"));
        sign.args(["sign", ".", "--key-uri", &uri, "--signature", "../m.sig"]).current_dir(&model);
        sign.uid(NOBODY).gid(NOBODY).env_clear().env("SOFTHSM2_CONF", &softhsm).env("XDG_STATE_HOME", &state);
        let output = sign.output()?;
        ensure!(output.status.success(), "{output:?}");
    }
    let logs: Vec<_> = std::fs::read_dir(state.join("omsign/audit"))?.collect::<Result<_, _>>()?;
    let log = logs.first().filter(|_| logs.len() == 1).context("one file")?;
    let text = std::fs::read_to_string(log.path())?;
    ensure!(text.lines().filter(|line| line.contains("\"signed\"")).count() == 2, "{text}");
    Ok(())
}
