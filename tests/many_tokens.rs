//! One key on two tokens: both sign, and one is enough.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_proto::v1::sign_request::Content;
use omsign_tests::agent::{Agent, eventually, freeze, refused, signal};
use omsign_tests::client::{connect, request, run, sign};
use omsign_tests::forge::pae;
use omsign_tests::lab::timeout;
use omsign_tests::operator::{answering, does, refuses};
use omsign_tests::world::{World, key, key_section, text, token_section};
use openssl::ecdsa::EcdsaSig;
use openssl::pkey::PKey;
use openssl::rsa::{Padding, Rsa};
use rustix::process::Signal;
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);

/// `[key.k]` on both.
fn on_both() -> String {
    key_section("k", "a", "k").replace("token = \"a\"", "token = [\"a\", \"b\"]")
}

/// The key `k` on two tokens, `a` and `b`, each behind a proxy of its own.
struct Twins {
    world: World,
    /// Where the second proxy keeps its files.
    _beside: World,
    first: SoftHsm,
    second: SoftHsm,
    left: FaultProxy,
    right: FaultProxy,
    agent: Agent,
}

/// Once both are ready.
fn twins() -> anyhow::Result<Twins> {
    let (world, beside) = (World::new()?, World::new()?);
    let (first, second) = world.twins()?;
    let (left, right) = (world.proxy()?, beside.proxy()?);
    let config = world.listen()
        + &left.before(&token_section("a", &first, &timeout()))?
        + &right.before(&token_section("b", &second, &timeout()))?
        + &on_both();
    let agent = Agent::start(&world, &config)?;
    world.until_ready()?;
    Ok(Twins { world, _beside: beside, first, second, left, right, agent })
}

/// Signs `count` digests from 16 clients and verifies every answer against its own.
async fn sign_all(world: &World, first_id: u128, count: u128) -> anyhow::Result<()> {
    let public = PKey::public_key_from_pem(&std::fs::read(world.path("a/k.pub.pem"))?)?;
    let key = public.ec_key()?;
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..16 {
        let socket = world.path("agent.sock");
        clients.spawn(async move {
            let mut connection = connect(socket).await?;
            let mut answers = Vec::new();
            for id in (first_id..first_id + count).filter(|id| id % 16 == client) {
                let digest = [id.to_be_bytes(), id.to_be_bytes()].concat();
                let signed = sign(&mut connection, request("k", id, &digest), SECOND * 20).await;
                answers.push((digest, signed.map_err(|status| anyhow::anyhow!("request {id}: {status}"))?));
            }
            anyhow::Ok(answers)
        });
    }
    let mut answered = 0;
    while let Some(answers) = clients.join_next().await {
        for (digest, signed) in answers?? {
            ensure!(EcdsaSig::from_der(&signed.signature)?.verify(&digest, &key)?, "a swapped answer");
            answered += 1;
        }
    }
    ensure!(answered == count, "{answered} of {count} answers");
    Ok(())
}

#[test]
fn both_sign_and_one_is_enough() -> anyhow::Result<()> {
    let Twins { world, _beside, first, second, left, right, agent } = twins()?;
    run(async {
        let before = (left.calls("C_Sign"), right.calls("C_Sign"));
        sign_all(&world, 1, 200).await?;
        let (a, b) = (left.calls("C_Sign") - before.0, right.calls("C_Sign") - before.1);
        ensure!(a.abs_diff(b) <= 20, "not in turns: {a} and {b}");
        // A signature takes two calls, and is made once and recorded once.
        ensure!(a + b == 400, "{} calls for 200 signatures", a + b);
        let signed = world.audit()?.iter().filter(|entry| entry["outcome"] == "signed").count();
        ensure!(signed == 200, "{signed} signatures are recorded");
        // One fails every signature.
        left.set("C_Sign 30 0\n")?;
        sign_all(&world, 1000, 200).await?;
        left.set("")?;
        world.until_ready()?;
        // One hangs: its process is stopped.
        let (before, started) = (right.calls("C_Sign"), Instant::now());
        freeze(agent.host_of("b")?.context("its process")?)?;
        sign_all(&world, 2000, 64).await?;
        ensure!(started.elapsed() < SECOND * 20, "{:?}", started.elapsed());
        eventually("it is opened anew", || Ok(right.calls("C_Sign") > before))?;
        // One is gone for good.
        std::fs::rename(first.tokens(), world.path("away"))?;
        sign_all(&world, 3000, 64).await?;
        // Whatever failed on the way, each was recorded once.
        let audit = world.audit()?;
        let signed = audit.iter().filter(|entry| entry["outcome"] == "signed");
        let signed: Vec<_> = signed.filter_map(|entry| entry["request_id"].as_str()).collect();
        let each: std::collections::BTreeSet<_> = signed.iter().collect();
        ensure!((signed.len(), each.len()) == (528, 528), "{} signatures of {}", signed.len(), each.len());
        // Both are.
        std::fs::rename(second.tokens(), world.path("away too"))?;
        let mut client = connect(world.path("agent.sock")).await?;
        let failed = sign(&mut client, request("k", 4000, &[7; 32]), SECOND * 10).await;
        ensure!(failed.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{failed:?}");
        // One comes back.
        std::fs::rename(world.path("away too"), second.tokens())?;
        let started = Instant::now();
        let mut id = 5000;
        while sign(&mut client, request("k", id, &[7; 32]), SECOND * 10).await.is_err() {
            id += 1;
            ensure!(started.elapsed() < SECOND * 15, "it does not heal: {}", agent.log()?);
        }
        Ok(())
    })
}

/// A token that opens, and hangs whenever it is to sign: it looks well, and would cost every second caller its time.
#[test]
fn a_token_that_hangs_is_left_alone() -> anyhow::Result<()> {
    let Twins { world, _beside, left, agent, .. } = twins()?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        // Each process first signs a challenge, when the token is opened.
        left.set("C_Sign 0 60000 later\n")?;
        let before = left.calls("C_Sign");
        for id in 0..20 {
            sign(&mut client, request("k", id, &[7; 32]), SECOND * 10).await?;
        }
        // Each try costs three calls: one that hangs, and two when it is opened anew. Without a breaker, thirty.
        let calls = left.calls("C_Sign") - before;
        ensure!((1..=15).contains(&calls), "{calls} calls of a token that hangs");
        // When it is well again, it has its turns again.
        left.set("")?;
        let before = left.calls("C_Sign");
        let mut id = 100;
        let started = Instant::now();
        while left.calls("C_Sign") < before + 20 {
            sign(&mut client, request("k", id, &[7; 32]), SECOND * 10).await?;
            id += 1;
            ensure!(started.elapsed() < SECOND * 30, "it does not heal: {}", agent.log()?);
        }
        Ok(())
    })
}

#[test]
fn a_twin_with_another_key_never_signs() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = (world.token("a", "k", KeyType::P256)?, SoftHsm::create(&world.path("b"), "b")?);
    second.generate("k", KeyType::P256, Objects::Pair)?;
    let config =
        world.listen() + &token_section("a", &first, "") + &token_section("b", &second, "") + &on_both();
    world.write("agent.toml", &config)?;
    let (status, said) = world.doctor()?;
    let told = "token b holds another key under this name than token a: only one of them signs";
    ensure!(status.code() == Some(1) && said.contains(told), "{said}");
    let agent = Agent::start(&world, &config)?;
    // Before anybody asks for the key.
    eventually("the warning", || {
        Ok(agent.log()?.contains("it holds another key under this name than the other tokens"))
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(sign_all(&world, 1, 64))?;
    // The other one's key is not this one because the first one is opened anew, and waits for its PIN.
    let pin = format!("pin = {{ file = \"{}\" }}", text(&first.pin_file()));
    world.write("agent.toml", config.replace(&pin, "pin = \"prompt\""))?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("the first one's wait", || Ok(world.status()?.contains("locked")))?;
    let digest = openssl::sha::sha256(b"");
    let refusal = runtime.block_on(async {
        let mut client = connect(world.path("agent.sock")).await?;
        Ok::<_, anyhow::Error>(sign(&mut client, request("k", 100, &digest), SECOND * 10).await.err())
    })?;
    ensure!(refusal.as_ref().map(tonic::Status::code) == Some(Code::FailedPrecondition), "{refusal:?}");
    world.write("agent.toml", config)?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("the first one", || Ok(world.omsign_ok(&["keys"])?.contains("ready")))?;
    runtime.block_on(sign_all(&world, 200, 64))
}

/// Without a certificate, the key is the one that both hold.
#[test]
fn both_are_made_anew() -> anyhow::Result<()> {
    let Twins { world, first, second, agent, .. } = &mut twins()?;
    // The same files in both, with another key in them.
    for token in [&*first, &*second] {
        std::fs::rename(token.tokens(), token.directory.join("before"))?;
    }
    std::fs::create_dir(first.tokens())?;
    first.initialise()?;
    first.generate("k", KeyType::P256, Objects::Pair)?;
    let copied = Command::new("cp").arg("-r").arg(first.tokens()).arg(second.tokens()).status()?;
    ensure!(copied.success());
    for host in agent.hosts()? {
        // It may have ended by itself.
        let _ = signal(host, Signal::KILL);
    }
    eventually("the new one", || {
        Ok(agent.log()?.contains("hold another key than before, all the same one"))
    })?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(sign_all(world, 1, 64))
}

/// One token takes digests, and the other hashes: its key asks for the PIN each time. Each is given what it takes.
#[test]
fn one_of_them_hashes() -> anyhow::Result<()> {
    let world = World::new()?;
    let key = Rsa::generate(2048)?;
    let pem = text(&world.write("key.pem", key.private_key_to_pem()?)?);
    let mut tokens = String::new();
    for (name, more) in [("a", None), ("b", Some("--always-auth"))] {
        let token = SoftHsm::create(&world.path(name), name)?;
        let write =
            ["--write-object", &pem, "--type", "privkey", "--label", "k", "--id", "01", "--usage-sign"];
        token.tool(&write.into_iter().chain(more).collect::<Vec<_>>())?;
        tokens += &token_section(name, &token, "");
    }
    let agent = Agent::start(&world, &(world.listen() + &tokens + &on_both()))?;
    world.until_ready()?;
    let statement = b"{}".to_vec();
    let digest = openssl::sha::sha256(&pae(&statement));
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for id in 0..8 {
            let mut request = request("k", id, &digest);
            if id % 4 < 2 {
                request.content = Some(Content::Statement(statement.clone()));
            }
            let signed = sign(&mut client, request, SECOND * 10).await?;
            let mut padded = vec![0; 256];
            key.public_decrypt(&signed.signature, &mut padded, Padding::PKCS1)?;
            ensure!(padded.windows(32).any(|window| window == digest), "{id}: another digest");
        }
        Ok(())
    })?;
    let audit = world.audit()?;
    let log = agent.log()?;
    ensure!(!log.contains("trying the next token"), "one was asked for what it cannot sign: {log}");
    ensure!(audit.iter().all(|line| line["digest"] == hex::encode(digest)), "{audit:?}");
    for token in ["a", "b"] {
        ensure!(audit.iter().any(|line| line["token"] == token), "{token} signed nothing: {audit:?}");
    }
    Ok(())
}

/// The next key is made on each by hand; then it is named, and takes its place.
#[test]
fn both_get_the_next_key() -> anyhow::Result<()> {
    let Twins { world, first, second, agent, .. } = &twins()?;
    refuses(world, &["rotate", "k"], "k lives on several tokens: make the next key on each")?;
    first.generate("k-2", KeyType::P256, Objects::Pair)?;
    let copy = format!("cp -r {}/. {}", text(&first.tokens()), text(&second.tokens()));
    ensure!(Command::new("sh").args(["-c", &copy]).status()?.success());
    let before = std::fs::read_to_string(world.path("agent.toml"))?;
    let object = "object = { label = \"k\" }\n";
    ensure!(before.matches(object).count() == 1, "{before}");
    let named = before.replace(object, &format!("{object}next = {{ label = \"k-2\" }}\n"));
    world.write("agent.toml", &named)?;
    let next = does(world, &["rotate", "k", "--finish"])?;
    ensure!(next.as_bytes() == std::fs::read(first.public_key("k-2"))?, "{next}");
    signal(agent.pid(), Signal::HUP)?;
    eventually("the next key", || Ok(world.omsign_ok(&["keys", "export", "k", "--public-key"])? == next))?;
    world.until_ready()?;
    // By each of them.
    for number in 0..4 {
        let signature = format!("{number}.sig");
        world.omsign_ok(&["sign", "agent.toml", "--key", "k", "--signature", &signature])?;
        let public = text(&first.public_key("k-2"));
        world.omsign_ok(&["verify", "agent.toml", "--signature", &signature, "--public-key", &public])?;
    }
    let signed = world.audit()?.into_iter().filter(|entry| entry["outcome"] == "signed");
    let by: std::collections::BTreeSet<_> = signed.map(|entry| entry["token"].to_string()).collect();
    ensure!(by.len() == 2, "{by:?}");
    Ok(())
}

/// The certificate says whose key it is, whichever token comes first.
#[test]
fn a_certificate_names_the_key() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = (world.token("a", "k", KeyType::P256)?, SoftHsm::create(&world.path("b"), "b")?);
    second.generate("k", KeyType::P256, Objects::Pair)?;
    let public = PKey::public_key_from_pem(&std::fs::read(first.public_key("k"))?)?;
    write_chain(&world.path("chain.pem"), &[&Ca::create("Root")?.code_signing("k", &public)?])?;
    let absent = token_section("a", &first, "").replace("label = \"a\"", "label = \"nowhere\"");
    let keys = on_both().replace("[[key", "certificate_chain = \"chain.pem\"\n[[key");
    let config = world.listen() + &absent + &token_section("b", &second, "") + &keys;
    let agent = Agent::start(&world, &config)?;
    run(async {
        let mut client = connect(world.path("agent.sock")).await?;
        for id in 0..4 {
            let signed = sign(&mut client, request("k", id, &[7; 32]), SECOND * 10).await;
            ensure!(signed.is_err(), "signed with another key: {}", agent.log()?);
        }
        Ok(())
    })
}

/// An agent that ended would offer the PIN again each time that something restarts it.
#[test]
fn a_required_token_whose_pin_is_refused_waits_for_an_operator() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let right = std::fs::read(token.pin_file())?;
    omsign_fixtures::write_private(&token.pin_file(), b"wrong-pin-8142\n")?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, "required = true"))?;
    let agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("it refused the PIN"), "{errors}");
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    omsign_fixtures::write_private(&token.pin_file(), &right)?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    ensure!(agent.stop()?.success());
    Ok(())
}

/// A TPM that is switched off, or whose driver comes late, is a token that is down, and no mistake of the configuration.
#[test]
fn a_tpm_that_is_not_there_yet() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let chip = "\n[token.chip]\nbackend = \"tpm\"\ntcti = \"device:/dev/tpmrm-of-nobody\"\n";
    let keys = key_section("k", "t", "k") + &key("c", "chip", "handle = \"0x81000010\"");
    let _agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + chip + &keys))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"])?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "c"])?;
    ensure!(
        errors.contains(
            "cannot open /dev/tpmrm-of-nobody: No such file or directory (os error 2); is the TPM switched on"
        ),
        "{errors}"
    );
    Ok(())
}

#[test]
fn a_required_token_has_to_be_there() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let section = token_section("t", &token, "required = true");
    let config = world.listen() + &section + &key_section("k", "t", "k");
    drop(Agent::start(&world, &config)?);
    let (code, errors) = refused(&world, &config.replace("label = \"t\"", "label = \"nowhere\""))?;
    ensure!(code == Some(2) && errors.contains("token t is required, and cannot be opened"), "{errors}");
    ensure!(!world.path("agent.sock").exists());
    Ok(())
}

/// Who could delete a key on some of its tokens only hears how the others are reached.
#[test]
fn what_is_left_of_a_key_is_deleted() -> anyhow::Result<()> {
    let Twins { world, _beside, right, agent: _agent, .. } = twins()?;
    let asked = answering(&world, &["delete", "k"], "")?;
    let asked = String::from_utf8(asked.stderr)?;
    let fingerprint = asked.lines().find_map(|line| line.trim().strip_prefix("SHA-256 "));
    let answers = format!("k\n{}\n", fingerprint.and_then(|all| all.get(..8)).context("a fingerprint")?);
    right.set("C_DestroyObject 30 0\n")?;
    let failed = answering(&world, &["delete", "k"], &answers)?;
    let said = String::from_utf8(failed.stderr)?;
    ensure!(failed.status.code() == Some(2) && said.contains("token b"), "{said}");
    ensure!(said.contains("the key is gone from a") && said.contains("name only those"), "{said}");
    right.set("")?;
    let listed = does(&world, &["list"])?;
    ensure!(listed.contains("a: no keys") && listed.contains("label \"k\""), "{listed}");
    // Where it is missing may be a token that lost its login: nothing is taken for deleted.
    let again = answering(&world, &["delete", "k"], &answers)?;
    let said = String::from_utf8(again.stderr)?;
    ensure!(
        again.status.code() == Some(2) && said.contains("token a: the token has no private key"),
        "{said}"
    );
    let config = std::fs::read_to_string(world.path("agent.toml"))?;
    world.write("agent.toml", config.replace("[\"a\", \"b\"]", "[\"b\"]"))?;
    does(&world, &["reload"])?;
    let finished = answering(&world, &["delete", "k"], &answers)?;
    ensure!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    ensure!(does(&world, &["list"])? == "a: no keys\nb: no keys\n");
    Ok(())
}
