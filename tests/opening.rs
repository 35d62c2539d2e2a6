//! What a token shows when it is opened: halves that do not belong together, and a module that keeps dying.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, Objects, PIN, SoftHsm};
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::device::card_through;
use omsign_tests::operator::does;
use omsign_tests::world::{World, key, key_section, text, token_section};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// A signature that no announced key verifies would be found by its readers only: each key signs a challenge first.
#[test]
fn a_public_half_of_another_key_is_no_public_half() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    token.generate("other", KeyType::P256, Objects::Pair)?;
    let other = text(&world.path("other.der"));
    token.tool(&["--read-object", "--type", "pubkey", "--label", "other", "--output-file", &other])?;
    token.tool(&["--delete-object", "--type", "pubkey", "--label", "k"])?;
    let as_k = ["--write-object", &other, "--type", "pubkey", "--label", "k", "--id", &hex::encode("k")];
    token.tool(&as_k)?;
    let keys = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let _agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &keys))?;
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("a public half on the token does not belong to it"), "{errors}");
    world.omsign_ok(&["sign", "model", "--key", "other"]).map(drop)
}

/// Tools forget CKA_ID; the label leads to the public half as well.
#[test]
fn a_public_half_with_the_label_only() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let half = text(&world.path("k.der"));
    token.tool(&["--read-object", "--type", "pubkey", "--label", "k", "--output-file", &half])?;
    token.tool(&["--delete-object", "--type", "pubkey", "--label", "k"])?;
    token.tool(&["--write-object", &half, "--type", "pubkey", "--label", "k", "--id", "77"])?;
    let config = world.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "k"]).map(drop)
}

/// Yubico's module shows the point on the private object, too; here it is all that the token shows.
#[test]
fn a_public_half_on_the_private_object() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 7_000_008)?;
    let device = card_through(&card, "libykcs11.so", &["9c"])?;
    let section = world.proxy()?.before(&device.token)? + "env.OMSIGN_PROXY_PRIVATE_ONLY = \"1\"\n";
    let _agent = Agent::start(&world, &(world.listen() + &section + &device.keys))?;
    world.model()?;
    world.omsign_ok(&["sign", "model", "--key", "9c"])?;
    let public = text(&device.expected.first().context("a key")?.public);
    world.omsign_ok(&["verify", "model", "--public-key", &public]).map(drop)
}

/// What is found once is kept: signing looks for nothing and logs in no more. A session or a handle that went stale is
/// replaced within the request, in the same process; the login is the anchor session's and lasts.
#[test]
fn stale_sessions_and_handles_cost_a_request_nothing() -> anyhow::Result<()> {
    for stale in ["b3", "82"] {
        let world = World::new()?;
        let token = world.token("t", "k", KeyType::P256)?;
        let proxy = world.proxy()?;
        let config =
            world.listen() + &proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
        let agent = Agent::start(&world, &config)?;
        world.model()?;
        let sign = ["sign", "model", "--key", "k"];
        world.omsign_ok(&sign)?;
        let (hosts, looked) = (agent.hosts()?, proxy.calls("C_FindObjectsInit"));
        for _ in 0..5 {
            world.omsign_ok(&sign)?;
        }
        ensure!(proxy.calls("C_FindObjectsInit") == looked, "a key is looked for once");
        proxy.set(&format!("C_SignInit {stale} 0 once\n"))?;
        world.omsign_ok(&sign).with_context(|| stale)?;
        ensure!(proxy.calls("C_FindObjectsInit") > looked, "{stale} was not met");
        ensure!(agent.hosts()? == hosts && proxy.calls("C_Login") == 1, "{stale}: {}", agent.log()?);
    }
    Ok(())
}

/// A module without slots, as when a reader is unplugged or a network HSM's client starts before the network.
#[test]
fn a_module_without_slots() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, calm) = (world.token("t", "k", KeyType::P256)?, world.token("u", "calm", KeyType::P256)?);
    let proxy = world.proxy()?;
    proxy.set("C_GetSlotList none 0\n")?;
    let tokens = proxy.before(&token_section("t", &token, ""))? + &token_section("u", &calm, "");
    let keys = key_section("k", "t", "k") + &key_section("calm", "u", "calm");
    let agent = Agent::start(&world, &(world.listen() + &tokens + &keys))?;
    world.model()?;
    let sign = ["sign", "model", "--key", "k"];
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("no token with label \"t\" is present; tokens present: none"), "{errors}");
    world.omsign_ok(&["sign", "model", "--key", "calm"])?;
    ensure!(proxy.calls("C_Login") == 0);
    proxy.set("")?;
    eventually("the token", || Ok(world.omsign(&sign)?.status.success()))?;
    // And while it runs: what is open stays open, what has to be opened waits.
    proxy.set("C_GetSlotList none 0\n")?;
    world.omsign_ok(&sign)?;
    agent.kill_hosts()?;
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("tokens present: none"), "{errors}");
    eventually("the other", || Ok(world.omsign(&["sign", "model", "--key", "calm"])?.status.success()))?;
    proxy.set("")?;
    eventually("the token again", || Ok(world.omsign(&sign)?.status.success()))?;
    ensure!(proxy.calls("C_Login") == 2, "{}", proxy.calls("C_Login"));
    Ok(())
}

/// Where a certificate is all that tells of the public half, another one in its place makes the key unusable, not wrong.
#[test]
fn a_certificate_that_is_swapped_on_the_token() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = SoftHsm::create(&world.path("t"), "t")?;
    token.generate("k", KeyType::P256, Objects::Certified)?;
    token.generate("other", KeyType::P256, Objects::Certified)?;
    let keys = key_section("k", "t", "k") + &key_section("other", "t", "other");
    let agent = Agent::start(&world, &(world.listen() + &token_section("t", &token, "") + &keys))?;
    world.model()?;
    let sign = ["sign", "model", "--key", "k"];
    world.omsign_ok(&sign)?;
    let file = |name: &str| text(&world.path(&format!("{name}.der")));
    let read = |name: &str| {
        token.tool(&["--read-object", "--type", "cert", "--label", name, "--output-file", &file(name)])
    };
    read("k")?;
    read("other")?;
    let becomes = |name: &str| {
        token.tool(&["--delete-object", "--type", "cert", "--label", "k"])?;
        let id = hex::encode("k");
        token.tool(&["--write-object", &file(name), "--type", "cert", "--label", "k", "--id", &id])
    };
    becomes("other")?;
    agent.kill_hosts()?;
    eventually("a refusal", || Ok(!world.omsign(&sign)?.status.success()))?;
    let errors = world.omsign_fails(2, &sign)?;
    ensure!(errors.contains("a public half on the token does not belong to it"), "{errors}");
    world.omsign_ok(&["sign", "model", "--key", "other"])?;
    becomes("k")?;
    eventually("the key again", || Ok(world.omsign(&sign)?.status.success()))
}

/// Two tokens of one label in one module: whatever else tells them apart, in TOML and in URIs (RFC 7512).
#[test]
fn tokens_of_the_same_name() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let util = |arguments: &[&str]| -> anyhow::Result<String> {
        let mut util = Command::new("softhsm2-util");
        let output = util.args(arguments).env("SOFTHSM2_CONF", token.config()).output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let slots = util(&["--show-slots"])?;
    let first = |name: &str| {
        let value = slots.lines().find_map(|line| line.trim().strip_prefix(name)).context(name.to_owned());
        value.map(|value| value.trim().to_owned())
    };
    let (slot, serial, description) = (first("Slot ")?, first("Serial number:")?, first("Description:")?);
    util(&["--init-token", "--free", "--label", "t", "--so-pin", "87654321", "--pin", PIN])?;
    world.model()?;
    let named = |name: &str| {
        let section = token_section("t", &token, "").replace("{ label = \"t\" }", name);
        world.listen() + &section + &key_section("k", "t", "k")
    };
    let description = description.replace(' ', "%20");
    for name in [
        format!("{{ serial = \"{serial}\" }}"),
        format!("{{ slot = {slot} }}"),
        format!("\"pkcs11:token=t;serial={serial}\""),
        format!("\"pkcs11:slot-id={slot};model=SoftHSM%20v2;manufacturer=SoftHSM%20project\""),
        format!("\"pkcs11:slot-description={description};slot-manufacturer=SoftHSM%20project\""),
        format!("\"pkcs11:serial={serial};library-manufacturer=SoftHSM;library-version=2.6\""),
        format!("\"pkcs11:serial={serial};library-description=Implementation%20of%20PKCS11\""),
    ] {
        let _agent = Agent::start(&world, &named(&name))?;
        world.omsign_ok(&["sign", "model", "--key", "k"]).with_context(|| name)?;
    }
    for (name, expected) in [
        ("{ label = \"t\" }".to_owned(), "two tokens match label \"t\"; tell them apart"),
        (
            format!("\"pkcs11:serial={serial};slot-description=other\""),
            "slot description \"other\" is present",
        ),
        (
            format!("\"pkcs11:serial={serial};library-version=2.7\""),
            "the module is Implementation of PKCS11 by",
        ),
    ] {
        let _agent = Agent::start(&world, &named(&name))?;
        let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
        ensure!(errors.contains(expected), "{name}: {errors}");
    }
    Ok(())
}

/// As many sessions as the token allows, whatever is asked for: one stays open, one is kept for operators' tasks.
#[test]
fn sessions_as_many_as_the_token_allows() -> anyhow::Result<()> {
    for (most, opened) in [("4", 3), ("2", 2)] {
        let world = World::new()?;
        let token = world.token("t", "k", KeyType::P256)?;
        let proxy = world.proxy()?;
        let more = format!("sessions = 16\nenv.OMSIGN_PROXY_SESSIONS = \"{most}\"\n");
        let config =
            world.listen() + &proxy.before(&token_section("t", &token, &more))? + &key_section("k", "t", "k");
        let _agent = Agent::start(&world, &config)?;
        world.model()?;
        world.omsign_ok(&["sign", "model", "--key", "k"])?;
        ensure!(proxy.sessions() == opened, "{most}: {}", proxy.sessions());
    }
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let section =
        world.proxy()?.before(&token_section("t", &token, "env.OMSIGN_PROXY_SESSIONS = \"1\"\n"))?;
    let _agent = Agent::start(&world, &(world.listen() + &section + &key_section("k", "t", "k")))?;
    world.model()?;
    let errors = world.omsign_fails(2, &["sign", "model", "--key", "k"])?;
    ensure!(errors.contains("the token allows one session at a time; two are needed"), "{errors}");
    Ok(())
}

/// A process that ends whenever it opens its device is started again with growing pauses, and costs the others nothing.
#[test]
fn a_module_that_keeps_dying_is_not_a_busy_loop() -> anyhow::Result<()> {
    let world = World::new()?;
    let (dying, calm) = (world.token("t", "k", KeyType::P256)?, world.token("u", "k", KeyType::P256)?);
    let proxy = world.proxy()?;
    proxy.set("C_OpenSession abort 0\n")?;
    let tokens = proxy.before(&token_section("t", &dying, ""))? + &token_section("u", &calm, "");
    let config = world.listen() + &tokens + &key_section("k", "t", "k") + &key_section("calm", "u", "k");
    let _agent = Agent::start(&world, &config)?;
    world.model()?;
    let starts = || proxy.calls("C_OpenSession");
    eventually("three starts", || Ok(starts() >= 3))?;
    let (from, before) = (Instant::now(), starts());
    while from.elapsed() < Duration::from_secs(2) {
        world.omsign_ok(&["sign", "model", "--key", "calm"])?;
    }
    // After pauses of 100, 200 and 400 ms come 0.8, 1.6 and 3.2 s; without them there would be hundreds.
    let more = starts() - before;
    ensure!(more <= 6, "{more} starts in two seconds");
    proxy.set("")?;
    eventually("a token that is well again", || {
        Ok(world.omsign(&["sign", "model", "--key", "k"])?.status.success())
    })
}

/// Keys are looked for three times, each longer than any one operation may take for a signature.
#[test]
fn a_slow_token_is_listed() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let sections =
        proxy.before(&token_section("t", &token, "timeout = \"1s\""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &(world.listen() + &sections))?;
    world.omsign_ok(&["keys", "export", "k"])?;
    let hosts = agent.hosts()?;
    proxy.set("C_FindObjectsInit 0 900\n")?;
    let listed = does(&world, &["list"])?;
    ensure!(listed.contains("label \"k\"") && agent.hosts()? == hosts, "{listed}: {}", agent.log()?);
    Ok(())
}

/// A second owner is what tokens do not take, wherever the first one listens.
#[test]
fn doctor_leaves_the_tokens_of_a_running_agent_alone() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let sections = proxy.before(&token_section("t", &token, ""))? + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &(world.listen() + &sections))?;
    world.omsign_ok(&["keys", "export", "k"])?;
    world.write("agent.toml", (world.listen() + &sections).replace("agent.sock", "other.sock"))?;
    let (_, said) = world.doctor()?;
    ensure!(said.contains("token.t: an agent is running and owns it"), "{said}");
    ensure!(proxy.calls("C_Login") == 1, "doctor logged in");
    ensure!(agent.stop()?.success());
    // Now it is nobody's; but on this address there is somebody.
    world.tls("a")?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let tls = format!(
        "[listen]\ntls = {{ address = \"{}\", certificate = \"a-server.pem\", private_key = \"a-server.key\", client_ca = \"a-ca.pem\" }}\n[audit]\ndirectory = \"audit\"\n",
        taken.local_addr()?
    );
    let by_certificate = proxy.before(&token_section("t", &token, ""))?
        + "[key.k]\ntoken = \"t\"\nobject = { label = \"k\" }\n[[key.k.allow]]\ncertificate = { subject = \"CN=ci\" }\n";
    world.write("agent.toml", tls + &by_certificate)?;
    let (status, said) = world.doctor()?;
    ensure!(status.success() && said.contains("warning listen.tls") && said.contains("in use"), "{said}");
    ensure!(said.contains("nobody could unlock a token"), "{said}");
    ensure!(proxy.calls("C_Login") == 2 && said.contains("signs and verifies"), "{said}");
    Ok(())
}

/// Its device is there, for a group that the user is not in. Needs root, which alone can become somebody else.
#[test]
fn a_tpm_of_another_group() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test becomes another user; run it as root");
    let home = tempfile::Builder::new().prefix("omsign-group-").tempdir()?;
    std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY))?;
    let (device, program) = (home.path().join("tpmrm0"), home.path().join("omsign-agent"));
    omsign_fixtures::write_private(&device, b"")?;
    std::fs::copy(built("omsign-agent")?, &program)?;
    let tcti = format!("device:{}", device.display());
    let mut init = Command::new(&program);
    init.args(["init", "tpm", "--tcti", &tcti, "--directory"]).arg(home.path().join("agent"));
    let output = init.uid(NOBODY).gid(NOBODY).current_dir("/").output()?;
    let errors = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(2) && errors.contains("SupplementaryGroups=tss"), "{errors}");
    ensure!(!home.path().join("agent").exists(), "an empty directory was left");
    Ok(())
}

/// A YubiKey that is pulled takes its reader along.
#[test]
fn a_card_whose_reader_goes_with_it() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut card = VirtualPiv::create(&world.path("card"), 7_000_040)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    let token = world.token("t", "k", KeyType::P256)?;
    let config = world.listen() + &card.section("card") + &key("c", "card", "slot = \"9c\"");
    let config = config + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    world.model()?;
    for _ in 0..2 {
        world.omsign_ok(&["sign", "model", "--key", "c"])?;
        card.kill_service()?;
        card.unplug();
        card.start_service_without_readers()?;
        let errors = world.omsign_fails(2, &["sign", "model", "--key", "c"])?;
        ensure!(errors.contains("token card: "), "{errors}");
        world.omsign_ok(&["sign", "model", "--key", "k"])?;
        card.kill_service()?;
        card.start_service()?;
        card.plug();
        eventually("its return", || Ok(world.omsign(&["sign", "model", "--key", "c"])?.status.success()))?;
    }
    // Its PIN was always the right one, and is offered again only to a card that is there.
    let (_, report) = world.doctor()?;
    ensure!(report.contains("3 PIN tries left"), "{report}");
    ensure!(agent.stop()?.success());
    Ok(())
}

/// One device belongs to one section, whatever the words that find it; its PIN is tried once.
#[test]
fn doctor_tells_that_two_sections_are_one_token() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy) = (world.token("t", "k", KeyType::P256)?, world.proxy()?);
    let section = proxy.before(&token_section("t", &token, ""))?;
    let same = section
        .replace("[token.t]", "[token.u]")
        .replace("label = \"t\"", "manufacturer = \"SoftHSM project\"");
    let keys = key_section("k", "t", "k") + &key_section("l", "u", "k");
    world.write("agent.toml", world.listen() + &section + &same + &keys)?;
    let (_, report) = world.doctor()?;
    ensure!(report.contains("ERROR   token.u: token.t is this device, found by another name"), "{report}");
    ensure!(proxy.calls("C_Login") == 1, "{} logins", proxy.calls("C_Login"));
    Ok(())
}
