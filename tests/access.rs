//! Who is let in: Unix users, client certificates, and what is recorded of it.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::softhsm::KeyType;
use omsign_proto::v1::sign_request::Content;
use omsign_tests::agent::{Agent, SOON, eventually};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::hashed::shell;
use omsign_tests::world::{World, key_section, text, token_section};
use tonic::Code;
use tonic::codegen::{Bytes, http};

/// A user that is not us and owns nothing: Debian's `nobody`.
const NOBODY: u32 = 65534;

fn with_rule(rule: &str) -> String {
    format!("\n[key.k]\ntoken = \"t\"\nobject = {{ label = \"k\" }}\n[[key.k.allow]]\n{rule}\n")
}

#[test]
fn a_unix_user_without_a_rule_is_denied() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen()
        + &token_section("t", &token, "")
        + &with_rule(&format!("unix = {{ uid = {NOBODY} }}"));
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("error: the agent refused: you are not allowed to look at k"), "{errors}");
    ensure!(errors.contains("hint: ask the agent's operator") && !errors.contains("key.k.allow"), "{errors}");
    ensure!(world.omsign_ok(&["keys"])?.is_empty(), "a key that may not be used is not listed");
    // Its token is: this user may unlock it.
    let status = || world.status();
    eventually("an open token", || Ok(status()?.contains("token t: ready")))?;
    ensure!(!status()?.contains("key k"), "{}", status()?);
    let audit = world.audit()?;
    let looked = audit.last().context("an entry")?;
    ensure!(looked["action"] == "look" && looked["outcome"] == "denied" && looked["key"] == "k", "{looked}");
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "nowhere"])?;
    ensure!(errors.contains("no key \"nowhere\" is configured"), "{errors}");
    let audit = world.audit()?;
    let looked = audit.last().context("an entry")?;
    ensure!(looked["key"] == "nowhere" && looked["reason"] == "no such key", "{looked}");
    // Somebody who does not ask first gets no further, and is recorded.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let denied = runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        anyhow::Ok(sign(&mut client, request("k", 1, &[7; 32]), SOON).await)
    })?;
    ensure!(denied.is_err_and(|status| status.code() == Code::PermissionDenied));
    // Whatever else is wrong with what strangers send, they are denied, and recorded.
    let recorded = world.audit()?.len();
    let malformed = runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        let mut short_id = request("k", 2, &[7; 32]);
        short_id.request_id.pop();
        let mut long_context = request("k", 3, &[7; 32]);
        long_context.context = "x".repeat(5000);
        let mut all = Vec::new();
        for message in [short_id, long_context] {
            all.push(sign(&mut client, message, SOON).await);
        }
        anyhow::Ok(all)
    })?;
    for refused in malformed {
        ensure!(refused.as_ref().is_err_and(|status| status.code() == Code::PermissionDenied), "{refused:?}");
    }
    ensure!(world.audit()?.len() == recorded + 2);
    let audit = world.audit()?;
    let entry = audit.last().context("an entry")?;
    ensure!(entry["outcome"] == "denied" && entry["rule"].is_null() && entry["key"] == "k", "{entry}");
    ensure!(agent.log()?.contains("key.k.allow"), "the operator is told which rule is missing");
    Ok(())
}

/// Connections that never get as far as their preface are ended, and one caller does not take all places.
#[test]
fn silent_callers_keep_nobody_out() -> anyhow::Result<()> {
    let world = World::new()?;
    let _agent = world.agent_and_model()?;
    let connect = || UnixStream::connect(world.path("agent.sock"));
    let mut one_byte = connect()?;
    one_byte.write_all(b"P")?;
    // More than one caller may have.
    let silent = (0..300).map(|_| connect()).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    let closed = |stream: &mut UnixStream, within: Duration| -> anyhow::Result<bool> {
        stream.set_read_timeout(Some(within))?;
        // The server's own preface comes first.
        Ok(stream.read_to_end(&mut Vec::new()).is_ok())
    };
    silent.iter().try_for_each(|stream| stream.set_nonblocking(true))?;
    let mut open: Vec<&UnixStream> = silent.iter().collect();
    // Whichever of them: they are told apart side by side.
    eventually("the end of those more than a caller may have", || {
        open.retain(|stream| {
            let mut stream = *stream;
            !matches!(stream.read(&mut [0; 256]), Ok(0))
        });
        Ok(open.len() <= 255)
    })?;
    // Long before silence is a reason.
    ensure!(open.len() == 255 && begun.elapsed() < Duration::from_secs(8), "{} stay open", open.len());
    ensure!(closed(&mut one_byte, Duration::from_secs(20))?, "a caller who said one byte");
    eventually("places for others", || Ok(world.omsign(&["keys"])?.status.success()))
}

/// Needs root: it gives the socket to a group and becomes a member of it.
#[test]
fn a_socket_for_a_group() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let runtime = tempfile::Builder::new().prefix("omsign-run-").tempdir()?;
    std::fs::set_permissions(runtime.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let socket = runtime.path().join("agent.sock");
    let omsign = runtime.path().join("omsign");
    std::fs::copy(built("omsign")?, &omsign)?;
    let unix = |more: &str| {
        let listen = format!("unix = {{ path = \"{}\", mode = \"0660\"{more} }}", text(&socket));
        let config = world.listen().replace("unix = { path = \"agent.sock\", mode = \"0600\" }", &listen);
        config + &token_section("t", &token, "") + &with_rule("unix = { group = \"nogroup\" }")
    };
    let keys = |address: &str| {
        let mut command = Command::new(&omsign);
        command.arg("keys").uid(NOBODY).gid(65534).env("OMSIGN_AGENT", address).current_dir("/").output()
    };
    let agent = Agent::start(&world, &unix(", group = \"nogroup\""))?;
    let output = keys(&text(&socket))?;
    ensure!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    drop(agent);
    let agent = Agent::start(&world, &unix(""))?;
    let errors = String::from_utf8(keys(&text(&socket))?.stderr)?;
    ensure!(errors.contains("error: no permission to connect to "), "{errors}");
    ensure!(errors.contains("hint: ask the agent's operator to let your group connect"), "{errors}");
    let errors = String::from_utf8(keys("signer.example:7443")?.stderr)?;
    ensure!(errors.contains("expected a socket path or https://HOST:PORT"), "{errors}");
    drop(agent);
    // A directory that is relative is none: a socket that was unpacked where somebody works gets no PIN.
    let work = runtime.path().join("work");
    std::fs::create_dir_all(work.join("omsign"))?;
    std::fs::write(work.join("omsign/agent.sock"), "")?;
    for relative in ["", "."] {
        let mut keys = Command::new(&omsign);
        keys.arg("keys").uid(NOBODY).gid(65534).env_remove("OMSIGN_AGENT").current_dir(&work);
        let errors = String::from_utf8(keys.env("XDG_RUNTIME_DIR", relative).output()?.stderr)?;
        ensure!(errors.contains("/run/omsign/agent.sock"), "{relative:?}: {errors}");
    }
    let mut doctor = Command::new(built("omsign-agent")?);
    world.without_surprises(&mut doctor);
    let report = doctor.args(["doctor", "--config"]).arg(world.path("agent.toml")).output()?;
    let report = String::from_utf8_lossy(&report.stdout);
    let expected = "listen.unix: key.k.allow[0] lets a group in that cannot open";
    ensure!(report.contains(expected), "{report}");
    Ok(())
}

/// Needs root, as CI and the quickstart's container are: only root can become somebody else.
#[test]
fn users_and_groups_are_told_apart() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let runtime = tempfile::Builder::new().prefix("omsign-run-").tempdir()?;
    std::fs::set_permissions(runtime.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let socket = runtime.path().join("agent.sock");
    // The test's binaries may lie where nobody else can read: a copy beside the socket.
    let omsign = runtime.path().join("omsign");
    std::fs::copy(built("omsign")?, &omsign)?;
    let listen = world.listen().replace("agent.sock", &text(&socket)).replace("0600", "0666");
    for (rule, users, groups) in [
        (format!("unix = {{ uid = {NOBODY} }}"), true, false),
        ("unix = { user = \"nobody\" }".to_owned(), true, false),
        ("unix = { group = \"nogroup\" }".to_owned(), true, true),
        ("unix = { group = \"daemon\" }".to_owned(), false, true),
    ] {
        let agent =
            Agent::start(&world, &(listen.clone() + &token_section("t", &token, "") + &with_rule(&rule)))?;
        for (uid, gid, expected) in [(NOBODY, 65534, users), (1, 65534, groups)] {
            let mut command = Command::new(&omsign);
            command
                .args(["keys", "export", "k"])
                .uid(uid)
                .gid(gid)
                .env("OMSIGN_AGENT", &socket)
                .current_dir("/");
            let output = command.output()?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success() == expected, "{rule} for uid {uid}: {errors}");
        }
        drop(agent);
    }
    Ok(())
}

/// Needs root, as above.
#[test]
fn only_operators_manage_keys() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let runtime = tempfile::Builder::new().prefix("omsign-run-").tempdir()?;
    std::fs::set_permissions(runtime.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let (program, file) = (runtime.path().join("omsign-agent"), runtime.path().join("agent.toml"));
    std::fs::copy(built("omsign-agent")?, &program)?;
    let listen = world.listen().replace("agent.sock", &text(&runtime.path().join("agent.sock")));
    let listen = listen.replace("\"audit\"", &format!("\"{}\"", text(&world.path("audit"))));
    let rest = token_section("t", &token, "") + &key_section("k", "t", "k");
    let named = format!("\n[[operator]]\nname = \"night shift\"\nunix = {{ uid = {NOBODY} }}\n");
    for (operators, uid, expected) in [
        (named.as_str(), NOBODY, Ok("label \"k\"")),
        (&named, 1, Err("no [[operator]] rule lets you do this")),
        (&named, 0, Ok("label \"k\"")),
        ("", NOBODY, Err("you may not use its operators' socket")),
        ("", 0, Ok("label \"k\"")),
    ] {
        let config = listen.clone() + &rest + operators;
        std::fs::write(&file, &config)?;
        let agent = Agent::start(&world, &config)?;
        // Its token was another agent's a moment ago.
        let address = text(&runtime.path().join("agent.sock"));
        eventually("its token", || {
            let output = world.omsign(&["agent", "status", "--agent", &address])?;
            Ok(String::from_utf8(output.stdout)?.contains("token t: ready"))
        })?;
        let mut command = Command::new(&program);
        command.args(["key", "list", "--config"]).arg(&file).uid(uid).gid(65534).current_dir("/");
        let output = command.output()?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        let (Ok(part) | Err(part)) = expected;
        ensure!(
            output.status.success() == expected.is_ok() && said.contains(part),
            "{operators} {uid}: {said}"
        );
        drop(agent);
    }
    let denied = world.audit()?.into_iter().filter(|entry| entry["outcome"] == "denied").count();
    ensure!(denied == 1, "{denied} denials recorded");
    Ok(())
}

#[test]
fn client_certificates() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    world.tls("ours")?;
    world.tls("other")?;
    let model = world.model()?;
    let listen = "[listen]\nunix = { path = \"agent.sock\", mode = \"0600\" }\ntls = { address = \"127.0.0.1:0\", \
         certificate = \"ours-server.pem\", private_key = \"ours-server.key\", client_ca = \"ours-ca.pem\" }\n\
         [audit]\ndirectory = \"audit\"\n";
    let fingerprint = fingerprint(&world, "ours-client.pem")?;
    let signs = |url: &str, client: &str, ca: &str| {
        let (ca, pem, key) =
            (format!("{ca}-ca.pem"), format!("{client}-client.pem"), format!("{client}-client.key"));
        let tls = ["--agent", url, "--agent-ca", &ca, "--agent-certificate", &pem, "--agent-key", &key];
        world.omsign(&[&["sign", &text(&model), "--key", "k", "--signature", "tls.sig"], &tls[..]].concat())
    };
    for (rule, allowed) in [
        ("certificate = { subject = \"CN=ci\" }".to_owned(), true),
        ("certificate = { dns = \"ci.example\" }".to_owned(), true),
        ("certificate = { uri = \"spiffe://example/ci\" }".to_owned(), true),
        (format!("certificate = {{ fingerprint = \"{fingerprint}\" }}"), true),
        ("certificate = { subject = \"CN=cd\" }".to_owned(), false),
        ("unix = { uid = 0 }".to_owned(), false),
    ] {
        let config = listen.to_owned() + &token_section("t", &token, "") + &with_rule(&rule);
        let agent = Agent::start(&world, &config)?;
        let url = agent.tls_url()?;
        let output = signs(&url, "ours", "ours")?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() == allowed, "{rule}: {errors}");
        if !allowed {
            ensure!(errors.contains("you are not allowed"), "{errors}");
            continue;
        }
        world.omsign_ok(&[
            "verify",
            "model",
            "--signature",
            "tls.sig",
            "--public-key",
            &text(&token.public_key("k")),
        ])?;
        let entry = world.audit()?.pop().context("an entry")?;
        ensure!(entry["identity"]["certificate"]["subject"] == "CN=ci", "{entry}");
        ensure!(entry["identity"]["certificate"]["fingerprint"] == fingerprint.as_str(), "{entry}");
        // Who was let in once is asked for a certificate each time: none of them is resumed later.
        let address = url.trim_start_matches("https://");
        let said = shell(
            &world,
            &format!(
                "sleep 1 | openssl s_client -connect {address} -alpn h2 -CAfile ours-ca.pem -cert ours-client.pem -key ours-client.key 2>&1 | tr -cd '[:print:]\\n'"
            ),
        )?;
        ensure!(said.contains("Verify return code: 0") && !said.contains("New Session Ticket"), "{said}");
        // A certificate of another CA does not get as far as a rule.
        let stranger = signs(&url, "other", "ours")?;
        ensure!(stranger.status.code() == Some(2), "{stranger:?}");
        eventually("the log's line", || Ok(agent.log()?.contains("TLS handshake refused")))?;
        // And we do not talk to an agent that we cannot recognise.
        ensure!(signs(&url, "ours", "other")?.status.code() == Some(2));
    }
    Ok(())
}

/// What somebody sends is bounded, whoever it is, and keeps nobody's digests waiting.
#[test]
fn large_requests_that_never_end() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    run(async {
        let before = agent.memory_bytes()?;
        let socket = tokio::net::UnixStream::connect(world.path("agent.sock")).await?;
        let (mut http, connection) = h2::client::handshake(socket).await?;
        let connection = tokio::spawn(connection);
        // A message of 15 MiB without its last byte.
        let mut message = vec![0; 4 + (15 << 20)];
        message[1..5].copy_from_slice(&(15_u32 << 20).to_be_bytes());
        let message = Bytes::from(message);
        let (mut open, mut answers) = (Vec::new(), tokio::task::JoinSet::new());
        for _ in 0..24 {
            let request = http::Request::post("http://agent/omsign.v1.AgentService/GetKey");
            let request = request.header("content-type", "application/grpc").header("te", "trailers");
            http = http.ready().await?;
            let (answer, mut body) = http.send_request(request.body(())?, false)?;
            body.send_data(message.clone(), false)?;
            open.push(body);
            answers.spawn(answer);
        }
        // Four of them have room.
        for _ in 0..20 {
            let answer = tokio::time::timeout(SOON, answers.join_next()).await?.context("an answer")???;
            // RESOURCE_EXHAUSTED
            ensure!(answer.headers().get("grpc-status").is_some_and(|status| status == "8"), "{answer:?}");
        }
        ensure!(agent.memory_bytes()? < before + (130 << 20), "{} bytes", agent.memory_bytes()?);
        let mut client = connect(world.path("agent.sock")).await?;
        sign(&mut client, request("k", 1, &[7; 32]), SOON).await?;
        // A large one of theirs has room when those are gone.
        let large = |id| {
            let mut large = request("k", id, &[]);
            large.content = Some(Content::Statement(vec![b' '; 10 << 20]));
            large
        };
        let full = sign(&mut client, large(2), SOON).await.err().context("there was room")?;
        ensure!(full.code() == Code::ResourceExhausted, "{full:?}");
        drop((open, http, answers));
        connection.abort();
        let started = Instant::now();
        for id in 3.. {
            match sign(&mut client, large(id), SOON).await {
                Err(full) if full.code() == Code::ResourceExhausted && started.elapsed() < SOON => {}
                signed => {
                    signed?;
                    break;
                }
            };
        }
        Ok(())
    })
}

/// Somebody who takes connections and says nothing.
#[test]
fn an_agent_that_does_not_answer() -> anyhow::Result<()> {
    let world = World::new()?;
    world.tls("a")?;
    world.model()?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("https://localhost:{}", silent.local_addr()?.port());
    let credentials = ["--agent-ca", "a-ca.pem", "--agent-certificate", "a-client.pem", "--agent-key"];
    let sign = [&["sign", "model", "--key", "k", "--agent", &address], &credentials[..], &["a-client.key"]];
    world.omsign_refuses(2, &sign.concat(), &["no agent answers at", "does not answer within 10 s"])
}

fn fingerprint(world: &World, name: &str) -> anyhow::Result<String> {
    let mut openssl = Command::new("openssl");
    openssl.args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(world.path(name));
    let output = String::from_utf8(openssl.output().context("openssl")?.stdout)?;
    Ok(output.trim().rsplit('=').next().context("a fingerprint")?.replace(':', "").to_lowercase())
}
