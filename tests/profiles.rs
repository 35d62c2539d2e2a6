//! What a profile says of a module is what the agent does: each said of SoftHSM, behind the proxy that counts.

use std::process::Command;

use anyhow::ensure;
use omsign_fixtures::built;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::softhsm::{KeyType, MODULE, SoftHsm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::operator::{does, refuses};
use omsign_tests::world::{World, key_section, text, token_section};

/// A token with a key, and another to make; its section says this profile.
fn as_if(world: &World, profile: &str, more: &str) -> anyhow::Result<(SoftHsm, FaultProxy, String)> {
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token_section("t", &token, &format!("profile = \"{profile}\"\n{more}")))?;
    let config = world.listen() + &section + &key_section("k", "t", "k") + &key_section("new", "t", "new");
    world.write("agent.toml", &config)?;
    world.model()?;
    Ok((token, proxy, config))
}

fn signs(world: &World) -> anyhow::Result<()> {
    world.omsign_ok(&["sign", "model", "--key", "k", "--signature", "model.sig"])?;
    world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", "t/k.pub.pem"]).map(drop)
}

/// What is wrong with the configuration.
fn checked(world: &World) -> anyhow::Result<String> {
    let mut check = Command::new(built("omsign-agent")?);
    world.without_surprises(check.args(["check-config", "--config"]).arg(world.path("agent.toml")));
    Ok(String::from_utf8(check.output()?.stderr)?)
}

/// It forgets a login that nobody uses for 30 s, signs in one thread, and has numbers of two bytes for its keys.
#[test]
fn yubihsm2() -> anyhow::Result<()> {
    let world = World::new()?;
    let (token, proxy, config) = as_if(&world, "yubihsm2", "sessions = 4\n")?;
    let agent = Agent::start(&world, &config)?;
    signs(&world)?;
    ensure!(proxy.sessions() == 2, "the anchor and one thread, not {}", proxy.sessions());
    refuses(
        &world,
        &["generate", "new", "--type", "ml-dsa-65"],
        "this device makes keys of type p256, p384",
    )?;
    does(&world, &["generate", "new", "--type", "p256"])?;
    let listed: serde_json::Value = serde_json::from_str(&does(&world, &["list", "--json"])?)?;
    let keys = listed["tokens"][0]["keys"].as_array().map(Vec::as_slice).unwrap_or_default();
    let new = keys.iter().find(|key| key["names"][0] == "new").and_then(|key| key["object"].as_str());
    let id = new.and_then(|object| object.split("id \"").nth(1)).unwrap_or_default();
    ensure!(id.chars().take_while(char::is_ascii_hexdigit).count() == 4, "{new:?}");
    let attested = does(&world, &["attest", "k"])?;
    ensure!(attested.contains("yubihsm-shell --action=sign-attestation-certificate"), "{attested}");
    let asked = proxy.calls("C_GenerateRandom");
    eventually("what keeps the login alive", || Ok(proxy.calls("C_GenerateRandom") > asked))?;
    drop(agent);
    // Its PIN has a form of its own.
    write_private(&token.pin_file(), b"password\n")?;
    let agent = Agent::start(&world, &config)?;
    eventually("the refusal", || Ok(agent.log()?.contains("4 hexadecimal digits, and its password")))?;
    drop(agent);
    let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
    ensure!(config.contains(&file), "{config}");
    world.write("agent.toml", config.replace(&file, "pin = \"none\""))?;
    ensure!(checked(&world)?.contains("this module shows nothing without a login"), "{}", checked(&world)?);
    Ok(())
}

/// It takes Ed25519's curve by its name. (Of this token's PIN the profile would say that it is none.)
#[test]
fn a_curve_by_its_name() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let named = "profile = \"yubihsm2\"\nenv.YUBIHSM_PKCS11_CONF = \"none\"\n";
    let section =
        token.section("t")?.replace("backend = \"pkcs11\"\n", &format!("backend = \"pkcs11\"\n{named}"));
    world.write("agent.toml", world.listen() + &section + &key_section("new", "t", "new"))?;
    does(&world, &["generate", "new", "--type", "ed25519"])?;
    ensure!(does(&world, &["list"])?.contains("ed25519"));
    Ok(())
}

/// Before release 5.5 it refused sessions that only read; and no public key may be a public object.
#[test]
fn cloudhsm() -> anyhow::Result<()> {
    let world = World::new()?;
    let strict = "env.OMSIGN_PROXY_WRITING_ONLY = \"1\"\nenv.OMSIGN_PROXY_HIDES_PUBLIC_KEYS = \"1\"\n";
    let (_, _, config) = as_if(&world, "cloudhsm", strict)?;
    let agent = Agent::start(&world, &config)?;
    signs(&world)?;
    does(&world, &["generate", "new", "--type", "p384"])?;
    drop(agent);
    // Of another module the same is a fault.
    let config = config.replace("profile = \"cloudhsm\"", "profile = \"softhsm\"");
    let agent = Agent::start(&world, &config)?;
    eventually("the refusal", || Ok(agent.log()?.contains("cannot open a session")))
}

/// It has numbers of its own for some mechanisms, and needs them in FIPS mode.
#[test]
fn luna() -> anyhow::Result<()> {
    let world = World::new()?;
    let (_, proxy, config) = as_if(&world, "luna", "env.OMSIGN_PROXY_LUNA = \"1\"\n")?;
    let config = config + &key_section("edwards", "t", "edwards") + &key_section("more", "t", "more");
    world.write("agent.toml", &config)?;
    does(&world, &["generate", "new", "--type", "rsa2048"])?;
    does(&world, &["generate", "edwards", "--type", "ed25519"])?;
    let agent = Agent::start(&world, &config)?;
    signs(&world)?;
    for key in ["new", "edwards"] {
        let export = world.omsign_ok(&["keys", "export", key])?;
        world.write("exported.pem", &export)?;
        let sign = ["sign", "model", "--key", key, "--signature", "own.sig", "--allow-nonstandard-key"];
        world.omsign_ok(&sign)?;
        world.omsign_ok(&["verify", "model", "--signature", "own.sig", "--public-key", "exported.pem"])?;
    }
    let listed = does(&world, &["list"])?;
    ensure!(listed.contains("ed25519") && listed.contains("rsa"), "{listed}");
    let attested = does(&world, &["attest", "k"])?;
    ensure!(attested.contains("cmu getpkc"), "{attested}");
    drop(agent);
    // Of another module it is a device that makes no such keys.
    ensure!(proxy.calls("C_GenerateKeyPair") == 2, "each was made at once");
    world.write("agent.toml", config.replace("profile = \"luna\"", "profile = \"softhsm\""))?;
    refuses(&world, &["generate", "more", "--type", "rsa2048"], "CKR_MECHANISM_INVALID")
}

/// Their own tools attest keys, and doctor says what their modules need.
#[test]
fn nshield_and_utimaco() -> anyhow::Result<()> {
    let world = World::new()?;
    as_if(&world, "nshield", "")?;
    let attested = does(&world, &["attest", "k"])?;
    ensure!(attested.contains("nfkmattest bundle pkcs11 IDENT"), "{attested}");
    let world = World::new()?;
    as_if(&world, "utimaco", "")?;
    let told = "this module is told by CS_PKCS11_R3_CFG where its configuration is";
    let (_, said) = world.doctor()?;
    ensure!(said.contains(told), "{said}");
    let world = World::new()?;
    as_if(&world, "utimaco", "env.CS_PKCS11_R3_CFG = \"/etc/utimaco/cs_pkcs11_R3.cfg\"\n")?;
    let (_, said) = world.doctor()?;
    ensure!(!said.contains(told), "{said}");
    Ok(())
}

/// Users make no keys there, and the module's own configuration may hold the PIN.
#[test]
fn nethsm_and_cards() -> anyhow::Result<()> {
    for (profile, by) in [
        ("nethsm", "nitropy nethsm generate-key"),
        ("opensc", "the card's own tools: ykman"),
        ("ykcs11", "omsign-agent with backend = \"piv\""),
    ] {
        let world = World::new()?;
        let (token, _, config) = as_if(&world, profile, "")?;
        let make = ["generate", "new", "--type", "p256"];
        refuses(&world, &make, &format!("this device's users cannot make keys; use {by}"))?;
        let agent = Agent::start(&world, &config)?;
        refuses(&world, &make, by)?;
        signs(&world)?;
        drop(agent);
        let file = format!("pin = {{ file = \"{}\" }}", token.pin_file().display());
        world.write("agent.toml", config.replace(&file, "pin = \"none\""))?;
        let checked = checked(&world)?;
        ensure!(checked.is_empty(), "{checked}");
    }
    Ok(())
}

/// Scripts that sign with the same token at the same time: each login of SoftHSM writes a file that the others read.
#[test]
fn many_processes_open_a_softhsm_token() -> anyhow::Result<()> {
    let world = World::new()?;
    world.model()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let uri = format!("pkcs11:token=t;object=k?module-path={MODULE}&pin-source={}", text(&token.pin_file()));
    let sign = |name: String| {
        let mut sign = Command::new(built("omsign")?);
        sign.args(["sign", "model", "--key-uri", &uri, "--signature", &name]);
        world.without_surprises(sign.current_dir(world.path("")));
        let output = sign.env("SOFTHSM2_CONF", token.config()).output()?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    };
    std::thread::scope(|scope| {
        let sign = &sign;
        let one =
            |script| scope.spawn(move || (0..24).try_for_each(|turn| sign(format!("{script}-{turn}.sig"))));
        let scripts: Vec<_> = (0..4).map(one).collect();
        scripts.into_iter().try_for_each(|script| script.join().map_err(|_| anyhow::anyhow!("a panic"))?)
    })
}
