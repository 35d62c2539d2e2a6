//! The agent as a service: sockets handed over by systemd, health, a stop that loses nothing.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::KeyType;
use omsign_tests::agent::{Agent, SOON, eventually, signal, under};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::peer::cache;
use omsign_tests::world::{World, key_section, text, token_section};
use rustix::process::Signal;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// systemd passes sockets as descriptors from 3 on; here a shell does, and has the agent become itself. Callers come
/// in by both at once: with the kernel's word for who they are, and with a certificate.
#[test]
fn sockets_handed_over_by_systemd() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.tls("a")?;
    let tls = "tls = { address = \"127.0.0.1:1\", certificate = \"a-server.pem\", private_key = \"a-server.key\", \
               client_ca = \"a-ca.pem\" }\n";
    let rules = "[[key.k.allow]]\ncertificate = { subject = \"CN=ci\" }\n";
    let listen = world.listen().replace("[audit]", &format!("{tls}[audit]"));
    let config = listen + &token_section("t", &token, "") + &key_section("k", "t", "k") + rules;
    world.model()?;
    let unix = UnixListener::bind(world.path("activated.sock"))?;
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("https://localhost:{}", tcp.local_addr()?.port());
    let script = "LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" \"$@\" 3<&0 4<&1 0</dev/null 1>&2";
    let agent = Agent::start_with(&world, &config, |command| {
        *command = under("sh", ["-c", script], command);
        command.stdin(OwnedFd::from(unix)).stdout(OwnedFd::from(tcp));
    })?;
    let over_tls =
        ["--agent-ca", "a-ca.pem", "--agent-certificate", "a-client.pem", "--agent-key", "a-client.key"];
    for agent in [vec!["--agent", "activated.sock"], [&["--agent", &address], &over_tls[..]].concat()] {
        world.omsign_ok(&[&["sign", "model", "--key", "k"], &agent[..]].concat())?;
    }
    let audit = world.audit()?;
    let [by_unix, by_tls] = audit.as_slice() else { anyhow::bail!("{audit:?}") };
    ensure!(by_unix["rule"] == "key.k.allow[0]" && by_tls["rule"] == "key.k.allow[1]", "{audit:?}");
    let log = agent.log()?;
    let told = [
        "listening on a socket of systemd's",
        "what [listen] unix says of path, mode and group does not count",
    ];
    ensure!(told.iter().all(|told| log.contains(told)), "{log}");
    ensure!(agent.stop()?.success());
    // What systemd made, systemd removes; and the configured path was left alone.
    ensure!(world.path("activated.sock").exists() && !world.path("agent.sock").exists());
    Ok(())
}

/// gRPC's own Python client, which learns the contract from the agent.
#[test]
fn another_implementation_finds_its_way_by_reflection() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/grpc_client.py");
    let mut client = Command::new(cache("reference/bin/python")?);
    let output = client.arg(script).arg(world.path("agent.sock")).arg("k").output()?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.success(), "{said}");
    for line in ["grpc.health.v1.Health", "omsign.v1.AgentService", "keys: k", "signed", "INVALID_ARGUMENT"] {
        ensure!(said.lines().any(|said| said == line), "{line}: {said}");
    }
    Ok(())
}

/// Without `[listen]`, an agent and its clients agree where: in root's case below a /run of its own, for the test's time.
#[test]
fn the_default_socket() -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "this test mounts and becomes another user; run it as root"
    );
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.model()?;
    let config = |uid| {
        let key = key_section("k", "t", "k").replace("uid = 0", &format!("uid = {uid}"));
        "[audit]\ndirectory = \"audit\"\n".to_owned() + &token_section("t", &token, "") + &key
    };
    for (uid, socket) in [(65534, "run/omsign/agent.sock"), (0, "/run/omsign/agent.sock")] {
        world.write("agent.toml", config(uid))?;
        std::fs::create_dir_all(world.path("run"))?;
        ensure!(Command::new("chown").args(["-R", &uid.to_string()]).arg(world.path("")).status()?.success());
        // The binaries may lie where nobody else can go.
        let script = "mount -t tmpfs none /run && mount --bind \"$1\" /mnt && PATH=/mnt:$PATH && cd \"$2\" && \
                      exec setpriv --reuid \"$3\" --clear-groups sh -c \"$4\"";
        // The agent says when its socket is there; the client is told nothing.
        let inner = "omsign-agent serve --config agent.toml 2>log & trap 'kill $!' EXIT; \
                     while ! [ -S \"$socket\" ]; do kill -0 $! || { cat log; exit 3; }; sleep 0.01; done; \
                     omsign sign model --key k --signature \"$signature\" && omsign agent status";
        let binaries = built("omsign")?.parent().context("a directory")?.to_owned();
        let mut there = Command::new("unshare");
        there
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(binaries)
            .arg(world.path(""))
            .arg(uid.to_string());
        world.without_surprises(there.arg(inner));
        let socket = if uid == 0 { socket.into() } else { world.path(socket) };
        there.env("socket", &socket).env("signature", format!("{uid}.sig"));
        there.env_remove("OMSIGN_AGENT").env("XDG_RUNTIME_DIR", world.path("run"));
        let output = there.output()?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.success() && world.path(&format!("{uid}.sig")).exists(), "{said}");
        ensure!(said.contains(&format!("agent at {}: serving", text(&socket))), "{said}");
    }
    Ok(())
}

/// Where systemd says, of several the first.
#[test]
fn the_log_of_a_service() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let listen = "[listen]\nunix = { path = \"agent.sock\", mode = \"0600\" }\n";
    let config = listen.to_owned() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let state = format!("{}:/nowhere", text(&world.path("service")));
    let agent = Agent::start_with(&world, &config, |agent| {
        agent.env("STATE_DIRECTORY", state);
    })?;
    ensure!(world.path("service/audit/audit.jsonl").exists(), "{}", agent.log()?);
    Ok(())
}

#[test]
fn paths_in_env_are_relative_to_the_file() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let relative = token.config().strip_prefix(world.path(""))?.display().to_string();
    let section = token_section("t", &token, "").replace(&token.config().display().to_string(), &relative);
    let _agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    Ok(())
}

#[test]
fn a_stop_finishes_what_is_in_flight() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await?;
        proxy.set("C_Sign 0 held\n")?;
        let before = proxy.calls("C_Sign");
        let mut waiting = client.clone();
        let waiting = tokio::spawn(async move { sign(&mut waiting, request("k", 2, &[7; 32]), SOON).await });
        while proxy.calls("C_Sign") == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        signal(agent.pid(), Signal::TERM)?;
        eventually("the stop", || Ok(agent.log()?.contains("stopping: no new requests")))?;
        // Nobody new is let in, while the one that is in waits for the token.
        let mut refused = false;
        while !refused && !waiting.is_finished() {
            refused = match connect(world.path("agent.sock")).await {
                Ok(mut late) => sign(&mut late, request("k", 3, &[7; 32]), SOON).await.is_err(),
                Err(_) => true,
            };
        }
        ensure!(refused && !waiting.is_finished(), "somebody was let in after the stop");
        proxy.set("")?;
        ensure!(waiting.await?.is_ok(), "the request in flight was answered");
        Ok(())
    })?;
    ensure!(agent.stop()?.success());
    Ok(())
}

#[test]
fn a_stop_is_bounded() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let listen = world.listen().replace("[listen]\n", "[listen]\nshutdown_timeout = \"300ms\"\n");
    let config = listen
        + &proxy.before(&token_section("t", &token, "timeout = \"10min\""))?
        + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    let hosts = run_hanging(&world, &proxy, &agent)?;
    let started = std::time::Instant::now();
    ensure!(agent.stop()?.success());
    ensure!(started.elapsed() < SOON, "{:?}", started.elapsed());
    eventually("the end of the token's process", || {
        Ok(hosts.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()))
    })
}

/// Leaves a request inside the module; returns the token's process.
fn run_hanging(world: &World, proxy: &FaultProxy, agent: &Agent) -> anyhow::Result<Vec<u32>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await?;
        proxy.set("C_Sign 0 600000\n")?;
        let before = proxy.calls("C_Sign");
        let hanging =
            tokio::spawn(async move { sign(&mut client, request("k", 2, &[7; 32]), SOON * 10).await });
        while proxy.calls("C_Sign") == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        hanging.abort();
        agent.hosts()
    })
}

#[test]
fn no_process_outlives_a_killed_agent() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let config = world.listen()
        + &proxy.before(&token_section("t", &token, "timeout = \"10min\""))?
        + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    let hosts = run_hanging(&world, &proxy, &agent)?;
    ensure!(hosts.len() == 1);
    // Killed, with a thread of the token's process inside the module.
    drop(agent);
    eventually("the end of the token's process", || {
        let gone = |pid: &u32| match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        Ok(hosts.iter().all(gone))
    })
}

#[test]
fn health_says_which_token_is_down() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let absent = token_section("absent", &token, "").replace("label = \"t\"", "label = \"nowhere\"");
    let keys = key_section("k", "t", "k") + &key_section("a", "absent", "k");
    let _agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &absent + &keys))?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await?;
        let channel = omsign_tests::client::channel(world.path("agent.sock")).await?;
        let mut health = HealthClient::new(channel);
        for (service, expected) in [
            ("", ServingStatus::Serving),
            ("omsign.v1.AgentService", ServingStatus::Serving),
            ("token.t", ServingStatus::Serving),
            ("token.absent", ServingStatus::NotServing),
        ] {
            let answer = health.check(HealthCheckRequest { service: service.into() }).await?.into_inner();
            ensure!(answer.status() == expected, "{service}: {answer:?}");
        }
        let unknown = health.check(HealthCheckRequest { service: "token.nobody".into() }).await;
        ensure!(unknown.is_err_and(|status| status.code() == tonic::Code::NotFound));
        // And while it goes and comes back: whoever watches is told.
        let watched = HealthCheckRequest { service: "token.t".into() };
        let mut changes = health.watch(watched).await?.into_inner();
        ensure!(changes.message().await?.is_some_and(|now| now.status() == ServingStatus::Serving));
        let away = world.path("away");
        std::fs::rename(token.tokens(), &away)?;
        let gone = sign(&mut client, request("k", 2, &[7; 32]), SOON).await;
        ensure!(gone.is_err(), "{gone:?}");
        ensure!(changes.message().await?.is_some_and(|now| now.status() == ServingStatus::NotServing));
        std::fs::rename(&away, token.tokens())?;
        let back = async {
            while let Some(now) = changes.message().await? {
                if now.status() == ServingStatus::Serving {
                    return Ok(());
                }
            }
            anyhow::bail!("the watch ended")
        };
        tokio::time::timeout(SOON, back).await?
    })
}

/// No core dumps and no reading of its memory: whoever runs as the same user learns no PIN.
#[test]
fn the_processes_cannot_be_dumped() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let agent = Agent::start(
        &world,
        &(world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k")),
    )?;
    world.omsign_ok(&["keys"])?;
    for pid in agent.hosts()?.into_iter().chain([agent.pid()]) {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("the limit")?;
        ensure!(core.split_whitespace().nth(4) == Some("0"), "{core}");
        let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        ensure!(!arguments.contains(omsign_fixtures::softhsm::PIN), "{arguments}");
    }
    Ok(())
}

#[test]
fn an_idle_agent_is_idle() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let agent = Agent::start(
        &world,
        &(world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k")),
    )?;
    world.omsign_ok(&["keys"])?;
    let descriptors = |pid: u32| anyhow::Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    let before = descriptors(agent.pid())?;
    for _ in 0..50 {
        world.omsign_ok(&["keys"])?;
    }
    eventually("the end of old connections", || Ok(descriptors(agent.pid())? <= before + 1))
}
