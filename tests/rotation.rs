//! Keys that take another's place, and configurations that an agent reads anew, without a request lost.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, ensure};
use omsign_fixtures::ca::{Ca, write_chain};
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, PIN, SoftHsm};
use omsign_fixtures::swtpm::SwTpm;
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, SOON, eventually, signal};
use omsign_tests::client::{connect, request, sign};
use omsign_tests::operator::{self, does, refuses};
use omsign_tests::world::{World, key as key_on, key_section, token_section};
use openssl::pkey::PKey;
use rustix::process::Signal;

/// Refuses, and leaves the configuration as it was.
fn leaves(world: &World, arguments: &[&str], expected: &str) -> anyhow::Result<()> {
    let kept = || -> anyhow::Result<usize> {
        let names = std::fs::read_dir(world.path(""))?.map(|file| Ok(file?.file_name()));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| name.to_string_lossy().contains(".previous-")).count())
    };
    let before = (std::fs::read_to_string(world.path("agent.toml"))?, kept()?);
    refuses(world, arguments, expected)?;
    let after = (std::fs::read_to_string(world.path("agent.toml"))?, kept()?);
    ensure!(after == before, "{arguments:?} changed the file, or left another");
    Ok(())
}

fn exported(world: &World, more: &[&str]) -> anyhow::Result<String> {
    world.omsign_ok(&[&["keys", "export", "k", "--public-key"], more].concat())
}

#[test]
fn a_key_is_followed_by_the_next() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    let config = world.listen() + &token_section("t", &token, "") + "# mine\n" + &key_section("k", "t", "k");
    let agent_toml = world.write("agent.toml", &config)?;
    // Whoever may read this one may read what goes with it, whatever the operator's umask is.
    std::fs::set_permissions(&agent_toml, Permissions::from_mode(0o640))?;
    world.model()?;
    let first = does(&world, &["generate", "k", "--type", "p256"])?;
    refuses(&world, &["reload"], "no agent is running")?;
    let agent = Agent::start(&world, &config)?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "first.sig"])?;
    leaves(&world, &["rotate", "k", "--finish"], "k has no next key; begin with")?;
    leaves(&world, &["rotate", "k", "--object", "slot=9c"], "names no place for this key")?;
    leaves(&world, &["rotate", "k", "--object", "label=k"], "is the place of [key.k]; choose another")?;
    let second = does(&world, &["rotate", "k"])?;
    let p256 = |pem: &str| anyhow::Ok(PKey::public_key_from_pem(pem.as_bytes())?.bits() == 256);
    ensure!(p256(&first)? && p256(&second)?, "it is of another type");
    ensure!(second != first && exported(&world, &[])? == first);
    leaves(&world, &["rotate", "k"], "has a next key already")?;
    let listed = does(&world, &["list"])?;
    ensure!(listed.contains("k/next ") && listed.contains("label \"k-2\""), "{listed}");
    does(&world, &["csr", "k/next", "--subject", "CN=Next"])?;
    let finished = does(&world, &["rotate", "k", "--finish"])?;
    // Callers get it when the agent reads its configuration, not before.
    ensure!(finished == second && exported(&world, &[])? == first);
    signal(agent.pid(), Signal::HUP)?;
    eventually("the next key", || Ok(exported(&world, &[])? == second))?;
    ensure!(exported(&world, &["--previous"])? == first);
    let (keys, listed) = (world.omsign_ok(&["keys"])?, does(&world, &["list"])?);
    ensure!(keys.contains("; took the place of 1 key\n") && listed.contains("k/previous "), "{keys}{listed}");
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "second.sig"])?;
    for (signature, public) in [("first.sig", &first), ("second.sig", &second)] {
        world.write("public.pem", public)?;
        world.omsign_ok(&["verify", "model", "--signature", signature, "--public-key", "public.pem"])?;
    }
    let text = std::fs::read_to_string(world.path("agent.toml"))?;
    let mode = |name: &str| anyhow::Ok(world.path(name).metadata()?.permissions().mode() & 0o777);
    ensure!(mode("agent.toml")? == 0o640 && mode("k.previous-1.pem")? == 0o640);
    ensure!(text.contains("# mine") && text.contains("previous = [\"k.previous-1.pem\"]"), "{text}");
    // And once more, with certificates.
    let third = does(&world, &["rotate", "k", "--type", "p256"])?;
    ensure!(does(&world, &["list"])?.contains("label \"k-3\""));
    let ca = Ca::create("Release CA")?;
    for (name, public) in [("right.pem", &third), ("wrong.pem", &first)] {
        let half = PKey::public_key_from_pem(public.as_bytes())?;
        write_chain(&world.path(name), &[&ca.code_signing("release", &half)?, &ca.certificate])?;
    }
    leaves(&world, &["rotate", "k", "--finish", "--certificate-chain", "wrong.pem"], "are for another key")?;
    leaves(&world, &["rotate", "k", "--finish", "--certificate-chain", "none.pem"], "cannot be read")?;
    does(&world, &["rotate", "k", "--finish", "--certificate-chain", "right.pem"])?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("the third key", || Ok(exported(&world, &[])? == third))?;
    ensure!(exported(&world, &["--previous"])? == second + &first);
    // Its certificates are for this one alone.
    does(&world, &["rotate", "k"])?;
    leaves(&world, &["rotate", "k", "--finish"], "give the next key's with --certificate-chain")
}

/// What fails on the way leaves the configuration as it was, for the agent that runs, too.
#[test]
fn a_rotation_that_fails() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "s.sig"])?;
    // Not made.
    proxy.set("C_GenerateKeyPair 30 0\n")?;
    leaves(&world, &["rotate", "k"], "CKR_DEVICE_ERROR")?;
    proxy.set("")?;
    leaves(&world, &["rotate", "k", "--finish"], "k has no next key; begin with")?;
    refuses(&world, &["csr", "k/next", "--subject", "CN=k"], "[key.k] has no `next`")?;
    // Made, and its process lost with the answer: the next process says so. Nobody asks for it a second time.
    let made = proxy.calls("C_GenerateKeyPair");
    proxy.set("C_GenerateKeyPair after 30\n")?;
    refuses(&world, &["rotate", "k"], "but label \"k-2\" is there: `omsign-agent key list`")?;
    ensure!(proxy.calls("C_GenerateKeyPair") == made + 1, "it was made twice");
    proxy.set("")?;
    does(&world, &["rotate", "k", "--finish"])?;
    // Its process is open before the next fault, which is not for that.
    does(&world, &["reload"])?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "s.sig"])?;
    // Made, and then the first look at it fails (CKR_DATA_LEN_RANGE): it is named, and can take its place.
    proxy.set("C_Sign 21 0 once\n")?;
    refuses(
        &world,
        &["rotate", "k", "--type", "p384"],
        "but label \"k-3\" is there: `omsign-agent key list`",
    )?;
    ensure!(does(&world, &["list"])?.contains("k/next "));
    does(&world, &["rotate", "k", "--finish"])?;
    // It works when the cause has ended.
    proxy.set("")?;
    let next = does(&world, &["rotate", "k", "--type", "p384"])?;
    ensure!(does(&world, &["rotate", "k", "--finish"])? == next);
    Ok(())
}

/// A process that ends under an operator's command: the next one looks, but does not do anything a second time.
#[test]
fn only_looks_are_taken_again() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let config =
        world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "s.sig"])?;
    let ends_under = |command: &[&str], function: &str| {
        let before = proxy.injected(function);
        proxy.set(&format!("{function} 0 5000\n"))?;
        std::thread::scope(|scope| {
            let output = scope.spawn(|| operator::key(&world, command));
            eventually("a call", || Ok(proxy.injected(function) > before))?;
            proxy.set("")?;
            agent.kill_hosts()?;
            output.join().map_err(|_| anyhow::anyhow!("a panic"))?
        })
    };
    let listed = ends_under(&["list"], "C_OpenSession")?;
    ensure!(listed.status.success() && String::from_utf8(listed.stdout)?.contains("label \"k\""));
    // Not before: a key that is missing is looked for.
    world.write("agent.toml", config + &key_section("l", "t", "l"))?;
    does(&world, &["reload"])?;
    let made = ends_under(&["generate", "l", "--type", "p256"], "C_GenerateKeyPair")?;
    let errors = String::from_utf8(made.stderr)?;
    ensure!(made.status.code() == Some(2) && errors.contains("its process ended"), "{errors}");
    ensure!(proxy.calls("C_GenerateKeyPair") == 1, "it was asked for twice");
    Ok(())
}

#[test]
fn of_tpms_yubikeys_and_kryoptic() -> anyhow::Result<()> {
    let world = World::new()?;
    let (chip, yubikey) =
        (SwTpm::create(&world.path("tpm"))?, VirtualPiv::create(&world.path("card"), 11_223_344)?);
    yubikey.change_pin()?;
    yubikey.protect_management_key()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let config = world.listen()
        + &chip.section("tpm")
        + &yubikey.section("card")
        + &token.section("kry")?
        + &key_section("label", "kry", "label")
        + &key_on("handle", "tpm", "handle = \"0x81000020\"")
        + &key_on("file", "tpm", "file = \"made.pem\"")
        + &key_on("slot", "card", "slot = \"9c\"");
    world.model()?;
    let agent = Agent::start(&world, &config)?;
    for (name, next, place) in [
        ("handle", None, "handle 0x81000021"),
        ("file", None, "made-2.pem"),
        ("slot", Some("slot=82"), "slot 82"),
        ("label", None, "label \"label-2\""),
    ] {
        does(&world, &["generate", name, "--type", "p256"])?;
        if name == "slot" {
            leaves(&world, &["rotate", name], "--object slot=82")?;
        }
        let object: Vec<_> = next.map(|next| ["--object", next]).into_iter().flatten().collect();
        let made = does(&world, &[&["rotate", name, "--type", "p256"][..], &object].concat())?;
        ensure!(does(&world, &["list"])?.contains(place), "{name}");
        // The one before signs until the next one takes its name, without a restart.
        let before = world.omsign_ok(&["keys", "export", name])?;
        signs_with(&world, name, &before)?;
        ensure!(made != before && does(&world, &["rotate", name, "--finish"])? == made, "{name}");
        signal(agent.pid(), Signal::HUP)?;
        eventually("the next key", || Ok(world.omsign_ok(&["keys", "export", name])? == made))?;
        signs_with(&world, name, &made)?;
        let keys: serde_json::Value = serde_json::from_str(&world.omsign_ok(&["keys", "--json"])?)?;
        let listed = keys["keys"].as_array().context("keys")?.iter().find(|key| key["name"] == name);
        ensure!(listed.context("the key")?["previous"] == 1, "{name}: {keys}");
    }
    ensure!(agent.stop()?.success());
    Ok(())
}

fn signs_with(world: &World, key: &str, public: &str) -> anyhow::Result<()> {
    world.write("public.pem", public)?;
    world.omsign_ok(&["sign", "model", "--key", key, "--signature", "model.sig"])?;
    let verify = ["verify", "model", "--signature", "model.sig", "--public-key", "public.pem"];
    world.omsign_ok(&verify).map(drop)
}

#[test]
fn a_configuration_is_read_anew() -> anyhow::Result<()> {
    let world = World::new()?;
    let (first, second) = (world.token("a", "k", KeyType::P256)?, world.token("b", "k", KeyType::P256)?);
    let one = world.listen() + &token_section("a", &first, "") + &key_section("k", "a", "k");
    let agent = Agent::start(&world, &one)?;
    eventually("its process", || Ok(agent.hosts()?.len() == 1))?;
    let (host, status) = (agent.hosts()?, || world.status());
    let two = one.clone() + &token_section("b", &second, "") + &key_section("l", "b", "k");
    // Mistakes change nothing.
    world.write("agent.toml", two.replace("label = \"b\"", "labl = \"b\""))?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("a mistake", || Ok(agent.log()?.contains("token.b.token.labl: unknown key")))?;
    ensure!(!status()?.contains("b "), "{}", status()?);
    world.write("agent.toml", &two)?;
    signal(agent.pid(), Signal::HUP)?;
    world.model()?;
    eventually("the new key", || {
        Ok(world.omsign(&["sign", "model", "--key", "l", "--signature", "l.sig"])?.status.success())
    })?;
    // What did not change was not opened anew.
    let now = agent.hosts()?;
    ensure!(now.len() == 2 && host.iter().all(|old| now.contains(old)), "{host:?} {now:?}");
    world.write("agent.toml", &one)?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("one process", || Ok(agent.hosts()? == host))?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "l", "--signature", "m.sig"])?;
    ensure!(errors.contains("no key \"l\" is configured"), "{errors}");
    Ok(())
}

/// A refused PIN is not offered again because something else in the file changed.
#[test]
fn a_refused_pin_stays_refused() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    write_private(&token.pin_file(), b"wrong-pin-5714\n")?;
    let config = |timeout: &str| {
        let more = format!("timeout = \"{timeout}\"");
        let section = proxy.before(&token_section("t", &token, &more))?;
        anyhow::Ok(world.listen() + &section + &key_section("k", "t", "k"))
    };
    let agent = Agent::start(&world, &config("9s")?)?;
    eventually("a refusal", || Ok(world.status()?.contains("it refused the PIN")))?;
    world.write("agent.toml", config("10s")?)?;
    signal(agent.pid(), Signal::HUP)?;
    eventually("a reload", || Ok(agent.log()?.contains("the configuration is reloaded")))?;
    eventually("the same state", || Ok(world.status()?.contains("it refused the PIN")))?;
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    write_private(&token.pin_file(), format!("{PIN}\n").as_bytes())?;
    world.omsign_ok(&["agent", "unlock", "t"])?;
    ensure!(proxy.calls("C_Login") == 2, "{} logins", proxy.calls("C_Login"));
    Ok(())
}

/// Every request is answered with a signature, by the old process of the token or by the new one.
#[test]
fn no_request_is_lost_when_a_token_is_opened_anew() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = |timeout: &str| {
        world.listen()
            + &token_section("t", &token, &format!("timeout = \"{timeout}\""))
            + &key_section("k", "t", "k")
    };
    let agent = Agent::start(&world, &config("9s"))?;
    let socket = world.path("agent.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let first = agent.hosts()?;
    runtime.block_on(async {
        let work = (0..8_u128).map(|client| {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut channel = connect(socket).await?;
                for number in 0..150_u128 {
                    let digest = [u8::try_from(number)?; 32];
                    let asked = request("k", client << 32 | number, &digest);
                    sign(&mut channel, asked, SOON).await?;
                }
                anyhow::Ok(())
            })
        });
        let work: Vec<_> = work.collect();
        for round in 0..4 {
            world.write("agent.toml", config(&format!("{}s", 10 + round)))?;
            signal(agent.pid(), Signal::HUP)?;
            let before = agent.hosts()?;
            while agent.hosts()? == before && !work.iter().all(|work| work.is_finished()) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        for work in work {
            work.await.context("a task")??;
        }
        anyhow::Ok(())
    })?;
    eventually("another process", || Ok(agent.hosts()? != first && agent.hosts()?.len() == 1))
}

/// What an operator asks for while the process is replaced is done by the next one.
#[test]
fn operators_wait_while_a_token_is_opened_anew() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (SoftHsm::create(&world.path("t"), "t")?, world.proxy()?);
    let config = world.listen()
        + &proxy.before(&token_section("t", &token, ""))?
        + &key_section("k", "t", "k")
        + &key_section("l", "t", "l");
    let _agent = Agent::start(&world, &config)?;
    // A new key has its token opened anew, and the process before it takes its time to end.
    proxy.set("C_CloseSession 0 200\n")?;
    does(&world, &["generate", "k", "--type", "p256"])?;
    let listed = does(&world, &["list"])?;
    ensure!(listed.lines().any(|line| line.contains("label \"k\"")), "{listed}");
    does(&world, &["generate", "l", "--type", "p256"])?;
    does(&world, &["csr", "l", "--subject", "CN=l"]).map(drop)
}

/// Whoever renews certificates has the agent read them.
#[test]
fn certificates_are_renewed_while_it_runs() -> anyhow::Result<()> {
    let world = World::new()?;
    ["a", "b"].into_iter().try_for_each(|ca| world.tls(ca))?;
    let tls = "tls = { address = \"127.0.0.1:0\", certificate = \"a-server.pem\", private_key = \"a-server.key\", \
         client_ca = \"a-ca.pem\" }";
    let listen = world.listen().replacen("[listen]\n", &format!("[listen]\n{tls}\n"), 1);
    let token = world.token("t", "k", KeyType::P256)?;
    let rule = "[[key.k.allow]]\ncertificate = { subject = \"CN=ci\" }\n";
    let config = listen + &token_section("t", &token, "") + &key_section("k", "t", "k") + rule;
    let agent = Agent::start(&world, &config)?;
    let url = agent.tls_url()?;
    // A client of one CA, which wants an agent of another.
    let served = |client: &str, wants: &str| {
        let files =
            [format!("{wants}-ca.pem"), format!("{client}-client.pem"), format!("{client}-client.key")];
        let [authority, pem, key] = &files;
        let tls = ["--agent-ca", authority, "--agent-certificate", pem, "--agent-key", key];
        Ok::<_, anyhow::Error>(
            world.omsign(&[&["keys", "--agent", &url], &tls[..]].concat())?.status.success(),
        )
    };
    world.write("was-ca.pem", std::fs::read(world.path("a-ca.pem"))?)?;
    ensure!(served("a", "was")? && !served("b", "was")?);
    // What cannot be used changes nothing.
    world.write("a-server.pem", std::fs::read(world.path("b-server.pem"))?)?;
    refuses(&world, &["reload"], "cannot be used with the private key")?;
    ensure!(served("a", "was")? && !served("b", "was")?);
    for file in ["server.key", "ca.pem"] {
        std::fs::copy(world.path(&format!("b-{file}")), world.path("renewed"))?;
        std::fs::rename(world.path("renewed"), world.path(&format!("a-{file}")))?;
    }
    does(&world, &["reload"])?;
    ensure!(served("b", "b")? && !served("b", "was")? && !served("a", "b")?);
    // Other files take a restart; everything else does not, also when those of before are gone.
    let others = config.replace("\"a-", "\"b-").replace("CN=ci", "CN=cd");
    world.write("agent.toml", others)?;
    for file in ["server.pem", "server.key", "ca.pem"] {
        std::fs::remove_file(world.path(&format!("a-{file}")))?;
    }
    let told = operator::key(&world, &["reload"])?;
    ensure!(
        told.status.success() && String::from_utf8_lossy(&told.stderr).contains("[listen] changed"),
        "{told:?}"
    );
    ensure!(agent.log()?.contains("[listen] changed, which takes a restart of the agent"));
    ensure!(served("b", "b")?);
    let sign =
        ["sign", "model", "--key", "k", "--agent", &url, "--agent-ca", "b-ca.pem", "--agent-certificate"];
    world.model()?;
    let sign = [&sign[..], &["b-client.pem", "--agent-key", "b-client.key"]].concat();
    let refused = world.omsign(&sign)?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("you are not allowed"), "{refused:?}");
    Ok(())
}
