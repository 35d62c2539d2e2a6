//! The matrix's other rows: what is on a device changes under the agent, or a person locks it, or the machine sleeps.
//! Each time what callers see, that others are served, that it heals, and that no try of a PIN is spent beyond one.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use omsign_fixtures::ca::Ca;
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::kryoptic::{self, Kryoptic};
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_tests::agent::{freeze, signal};
use omsign_tests::lab::{AT_ONCE, Lab, Sees, Tries};
use omsign_tests::operator::unblocking;
use omsign_tests::world::{World, text};
use openssl::pkey::PKey;
use rustix::process::Signal;

/// How `pkcs11-tool` gets to what is on kryoptic's token.
const LOGIN: [&str; 5] = ["--token-label", "k", "--login", "--pin", kryoptic::PIN];

fn spent_of(proxy: &FaultProxy) -> anyhow::Result<i64> {
    Ok(i64::try_from(proxy.tries())?)
}

fn unlock(lab: &Lab) -> anyhow::Result<()> {
    lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
}

/// The machine sleeps: our processes stand still for longer than the token's time-out, and a request comes meanwhile.
fn sleeps(
    lab: &mut Lab,
    sees: Sees,
    tries: Tries<'_>,
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let all = |lab: &Lab| anyhow::Ok([vec![lab.agent.pid()], lab.agent.hosts()?].concat());
    let sleep = |lab: &Lab| {
        let processes = all(lab)?;
        processes.iter().try_for_each(|pid| freeze(*pid))?;
        meanwhile()?;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(5));
            processes.iter().try_for_each(|pid| signal(*pid, Signal::CONT))
        });
        Ok(())
    };
    // Nobody is served meanwhile.
    let others = std::mem::replace(&mut lab.others, Duration::from_secs(10));
    lab.trial(
        "the machine sleeps",
        (sees, Duration::from_secs(4)..Duration::from_secs(18)),
        tries,
        sleep,
        |_| Ok(()),
    )?;
    lab.others = others;
    Ok(())
}

/// A certificate is all that tells of the key's public half, and is swapped for another's.
fn certificate_swapped(
    lab: &mut Lab,
    public: &Path,
    id: &str,
    tool: &dyn Fn(&[&str]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (ca, key) = (Ca::create("Token CA")?, PKey::public_key_from_pem(&std::fs::read(public)?)?);
    let own = text(&lab.world.write("own.der", ca.code_signing("k", &key)?.to_der()?)?);
    let others = text(&lab.world.write("others.der", ca.certificate.to_der()?)?);
    let holds = |file: &str| tool(&["--write-object", file, "--type", "cert", "--label", "k", "--id", id]);
    let loses = |class: &str| tool(&["--delete-object", "--type", class, "--label", "k"]);
    holds(&own)?;
    loses("pubkey")?;
    lab.kill_host()?;
    let spent = lab.proxy.clone();
    let spent = || spent.as_ref().map_or(Ok(0), spent_of);
    let swap = |lab: &Lab| loses("cert").and_then(|()| holds(&others)).and_then(|()| lab.kill_host());
    lab.trial("certificate swapped", (Sees::Unusable, AT_ONCE), &spent, swap, |_| {
        loses("cert").and_then(|()| holds(&own))
    })
}

#[test]
fn softhsm() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token.section("device"))?;
    let counted = proxy.clone();
    let mut lab = Lab::new(world, &section, "label = \"k\"", 32, Some(proxy))?;
    sleeps(&mut lab, Sees::Nothing, &|| spent_of(&counted), || Ok(()))?;
    let away = lab.world.path("away");
    let anew = |lab: &Lab| {
        std::fs::rename(token.tokens(), &away)?;
        std::fs::create_dir(token.tokens())?;
        token.initialise().and_then(|()| lab.kill_host())
    };
    let make = |_: &Lab| token.generate("k", KeyType::P256, Objects::Pair);
    lab.trial("token initialised anew", (Sees::Unusable, AT_ONCE), &|| spent_of(&counted), anew, make)?;
    certificate_swapped(&mut lab, &token.public_key("k"), &hex::encode("k"), &|arguments| {
        token.tool(arguments)
    })
}

#[test]
fn kryoptic() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    token.generate("k")?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token.section("device")?)?;
    let counted = proxy.clone();
    let mut lab = Lab::new(world, &section, "label = \"k\"", 48, Some(proxy))?;
    let spent = || spent_of(&counted);
    sleeps(&mut lab, Sees::Nothing, &spent, || Ok(()))?;
    let away = lab.world.path("away");
    let remove = |lab: &Lab| {
        std::fs::rename(token.store(), &away)?;
        lab.kill_host()
    };
    let put_back = |_: &Lab| Ok(std::fs::rename(&away, token.store())?);
    lab.trial("removed", (Sees::Unavailable, AT_ONCE), &spent, remove, put_back)?;

    let anew = |lab: &Lab| token.initialise().and_then(|()| lab.kill_host());
    let make = |_: &Lab| token.generate("k").map(drop);
    lab.trial("token initialised anew", (Sees::Unusable, AT_ONCE), &spent, anew, make)?;

    let another = |lab: &Lab| {
        token.initialise()?;
        token.generate("k")?;
        lab.kill_host()
    };
    lab.trial("key made again", (Sees::Either, AT_ONCE), &spent, another, |_| Ok(()))?;
    let tool = |arguments: &[&str]| token.tool(&[&LOGIN[..], arguments].concat());
    let shown = tool(&["--list-objects", "--type", "pubkey"])?;
    let id = shown.lines().find_map(|line| line.trim().strip_prefix("ID:")).context("an id")?.trim();
    certificate_swapped(&mut lab, &token.public_key("k"), id, &|arguments| tool(arguments).map(drop))?;

    // Somebody else's wrong PINs: ours is not spent on top of them. It takes ten.
    let wrong_pins = |count: usize| {
        for _ in 0..count {
            let wrong = ["--login", "--pin", "not-the-pin-6", "--token-label", "k", "--list-objects"];
            anyhow::ensure!(token.tool(&wrong).is_err(), "a wrong PIN was taken");
        }
        Ok(())
    };
    let low = |lab: &Lab| wrong_pins(9).and_then(|()| lab.kill_host());
    lab.trial("one try of the PIN left", (Sees::Unusable, AT_ONCE), &spent, low, unlock)?;
    let lock = |lab: &Lab| wrong_pins(12).and_then(|()| lab.kill_host());
    let before = counted.calls("C_Login");
    lab.trial("PIN locked", (Sees::Unusable, AT_ONCE), &spent, lock, |lab| {
        anyhow::ensure!(counted.calls("C_Login") == before, "a locked PIN was offered");
        let set = unblocking(&lab.world, "device", &format!("{}\n", kryoptic::SO_PIN))?;
        anyhow::ensure!(set.status.success(), "{set:?}");
        Ok(())
    })
}

#[test]
fn tpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let mut lab = Lab::new(world, &chip.section("device"), "handle = \"0x81000010\"", 32, None)?;
    let counted = || anyhow::Ok(i64::from(chip.failed_tries()?));
    let others = Cell::new(0);
    let spent = || Ok(counted()? - others.get());
    let clear = |_: &Lab| {
        chip.tool("tpm2_clear", |tool| {
            tool.args(["-Q", "-c", "p"]);
        })
    };
    let make = |_: &Lab| chip.guarded_key("k", 0x8100_0010, AUTH).map(drop);
    lab.trial("TPM cleared", (Sees::Unusable, AT_ONCE), &spent, clear, make)?;

    let (digest, unread) = (lab.world.write("digest", [7; 32])?, lab.world.path("unread"));
    let lock = |lab: &Lab| {
        // Somebody else's wrong values, until it takes none: three.
        for _ in 0..4 {
            let wrong = chip.tool("tpm2_sign", |tool| {
                tool.args(["-Q", "-c", "0x81000010", "-p", "wrong", "-g", "sha256", "-d", "-o"]);
                tool.arg(&unread).arg(&digest);
            });
            anyhow::ensure!(wrong.is_err(), "a wrong value was taken");
        }
        others.set(counted()?);
        lab.kill_host()
    };
    lab.trial("TPM in lockout", (Sees::Unusable, AT_ONCE), &spent, lock, |lab| {
        chip.tool("tpm2_dictionarylockout", |tool| {
            tool.arg("-c");
        })?;
        others.set(0);
        unlock(lab)
    })?;
    sleeps(&mut lab, Sees::Nothing, &spent, || Ok(()))?;
    let left = chip.left()?;
    anyhow::ensure!(left <= 1, "{left} keys and sessions left in the TPM");
    Ok(())
}

#[test]
fn piv() -> anyhow::Result<()> {
    let world = World::new()?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.change_puk()?;
    card.generate("9c", "ECCP256", &[])?;
    let mut lab = Lab::new(world, &card.section("device"), "slot = \"9c\"", 32, None)?;
    let others = Cell::new(0);
    let spent = || Ok(i64::try_from(card.wrong_pins())? - others.get());
    let wrong_pins = |count: i64| {
        for _ in 0..count {
            anyhow::ensure!(
                card.tool(&["-a", "verify-pin", "-P", "87654321"]).is_err(),
                "a wrong PIN was taken"
            );
        }
        others.set(others.get() + count);
        Ok(())
    };
    // One more would block it: only an operator may have it offered.
    let low = |lab: &Lab| wrong_pins(2).and_then(|()| lab.kill_host());
    lab.trial("one try of the PIN left", (Sees::Unusable, AT_ONCE), &spent, low, unlock)?;
    let blocked = |lab: &Lab| wrong_pins(3).and_then(|()| lab.kill_host());
    lab.trial("PIN blocked", (Sees::Unusable, AT_ONCE), &spent, blocked, |lab| {
        let set = unblocking(&lab.world, "device", &format!("{}\n", piv::PUK))?;
        anyhow::ensure!(set.status.success(), "{set:?}");
        Ok(())
    })?;
    lab.trial(
        "key made again by others",
        (Sees::Either, AT_ONCE),
        &spent,
        |lab| card.generate("9c", "ECCP256", &[]).and_then(|_| lab.kill_host()),
        |_| Ok(()),
    )?;
    // Its key is what counts, whatever its certificate says.
    let other = PKey::ec_gen("prime256v1")?;
    let public = lab.world.write("other.pub.pem", other.public_key_to_pem()?)?;
    let swap = |_: &Lab| card.certify("9c", &public);
    lab.trial("certificate swapped", (Sees::Nothing, AT_ONCE), &spent, swap, Lab::kill_host)?;
    // It loses power, and what it knew of our PIN.
    sleeps(&mut lab, Sees::Either, &spent, || {
        card.unplug();
        card.plug();
        Ok(())
    })?;
    // A card that was reset has the factory's PIN and no key.
    let reset = |lab: &Lab| {
        wrong_pins(3)?;
        for _ in 0..3 {
            let wrong = ["-a", "unblock-pin", "-P", "87654321", "-N", "11111111"];
            anyhow::ensure!(card.tool(&wrong).is_err(), "a wrong PUK was taken");
        }
        card.tool(&["-a", "reset"])?;
        // It counts from nothing again.
        others.set(0);
        lab.kill_host()
    };
    lab.trial("card reset", (Sees::Locked, AT_ONCE), &spent, reset, |lab| {
        card.change_pin()?;
        card.change_puk()?;
        card.generate("9c", "ECCP256", &[])?;
        unlock(lab)
    })
}
