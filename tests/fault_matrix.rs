//! What goes wrong × which device: each time what callers of the token see and how long they wait, that other tokens are
//! served all the while, that it heals, that no try of its PIN was spent, and that no process, thread, descriptor or
//! session is left. docs/faults.md says in words what is shown here.

use std::path::Path;
use std::time::Duration;

use omsign_fixtures::kryoptic::{self, Kryoptic};
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::lab::{AT_ONCE, HANG, Lab, SLOW, Sees, THREE_HANGS, nothing};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section};

/// Lets the module fail, also when it is opened anew.
fn faults(lines: &'static str, anew: bool) -> impl FnOnce(&Lab) -> anyhow::Result<()> {
    move |lab| {
        lab.proxy.as_ref().expect("a proxy").set(lines)?;
        if anew { lab.kill_host() } else { Ok(()) }
    }
}

/// Errors of a module that mean that the token, or the way to it, is lost (PKCS#11 2.40, 5.1): FUNCTION_FAILED,
/// GENERAL_ERROR, DEVICE_ERROR, DEVICE_REMOVED, KEY_HANDLE_INVALID, OBJECT_HANDLE_INVALID, SESSION_CLOSED,
/// SESSION_HANDLE_INVALID, TOKEN_NOT_PRESENT, TOKEN_NOT_RECOGNIZED, USER_NOT_LOGGED_IN, CRYPTOKI_NOT_INITIALIZED,
/// SLOT_ID_INVALID, FUNCTION_REJECTED, and what only a vendor knows.
const FATAL: [&str; 15] =
    ["6", "5", "30", "32", "60", "82", "b0", "b3", "e0", "e1", "101", "190", "3", "200", "80000001"];

/// What any PKCS#11 module may do.
fn rows_of_a_module(lab: &mut Lab) -> anyhow::Result<()> {
    let counted = lab.proxy.clone().expect("a proxy");
    let tries = || Ok(i64::try_from(counted.tries())?);
    for (row, sees, lines, anew) in [
        ("slow", (Sees::Nothing, SLOW), "C_Sign 0 300\n", false),
        ("hangs for half a second", (Sees::Nothing, SLOW), "C_Sign 0 500 once\n", false),
        ("hangs", (Sees::Unavailable, HANG), "C_Sign 0 600000\n", false),
        ("session lost", (Sees::Nothing, AT_ONCE), "C_SignInit b3 0 once\n", false),
        ("crashes (SIGSEGV)", (Sees::Unavailable, AT_ONCE), "C_Sign segv 0\n", false),
        ("crashes (abort)", (Sees::Unavailable, AT_ONCE), "C_Sign abort 0\n", false),
        ("out of sessions", (Sees::Unavailable, AT_ONCE), "C_OpenSession b1 0\n", true),
        ("no slots", (Sees::Unavailable, AT_ONCE), "C_GetSlotList none 0\n", true),
        ("token not present", (Sees::Unavailable, AT_ONCE), "C_GetTokenInfo e0 0\n", true),
        ("hangs when it is opened", (Sees::Unavailable, THREE_HANGS), "C_Initialize 0 600000\n", true),
        ("crashes when it is opened", (Sees::Unavailable, AT_ONCE), "C_FindObjectsInit abort 0\n", true),
    ] {
        let function = lines.split(' ').next().unwrap_or_default();
        let before = counted.injected(function);
        lab.trial(row, sees, &tries, faults(lines, anew), |lab| faults("", false)(lab))?;
        anyhow::ensure!(counted.injected(function) > before, "{row}: nothing failed in {function}");
    }
    for ckr in FATAL {
        for function in ["C_SignInit", "C_Sign"] {
            let lines = format!("{function} {ckr} 0\n");
            let row = format!("{function} answers {ckr}");
            let before = counted.injected(function);
            let wrong = |_: &Lab| counted.set(&lines);
            lab.trial(&row, (Sees::Unavailable, AT_ONCE), &tries, wrong, |lab| faults("", false)(lab))?;
            anyhow::ensure!(counted.injected(function) > before, "{row}: nothing failed");
        }
    }
    lab.trial("process killed", (Sees::Either, AT_ONCE), &tries, Lab::kill_host, nothing)?;
    lab.disk_full(&tries)
}

/// A PIN that is wrong is offered once, whoever asks, and however often.
fn wrong_pin(lab: &mut Lab, pin_file: &Path) -> anyhow::Result<()> {
    let right = std::fs::read(pin_file)?;
    let logins = |lab: &Lab| lab.proxy.as_ref().map_or(0, |proxy| proxy.calls("C_Login"));
    let before = logins(lab);
    let wrong = |lab: &Lab| write_private(pin_file, b"wrong-pin-8142\n").and_then(|()| lab.kill_host());
    let counted = lab.proxy.clone().expect("a proxy");
    lab.trial("wrong PIN", (Sees::Locked, AT_ONCE), &|| Ok(i64::try_from(counted.tries())?), wrong, |lab| {
        for _ in 0..3 {
            let errors = lab.world.omsign_fails(2, &["sign", "agent.toml", "--key", "k"])?;
            anyhow::ensure!(errors.contains("it refused the PIN"), "{errors}");
        }
        anyhow::ensure!(logins(lab) == before + 1, "{} logins", logins(lab) - before);
        write_private(pin_file, &right)?;
        lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
    })
}

#[test]
fn softhsm() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = world.token("t", "k", KeyType::P256)?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token.section("device"))?;
    let counted = proxy.clone();
    let tries = || Ok(i64::try_from(counted.tries())?);
    let mut lab = Lab::new(world, &section, "label = \"k\"", 32, Some(proxy))?;
    rows_of_a_module(&mut lab)?;
    let away = lab.world.path("away");
    lab.trial(
        "removed",
        (Sees::Unavailable, AT_ONCE),
        &tries,
        |_| Ok(std::fs::rename(token.tokens(), &away)?),
        |_| Ok(std::fs::rename(&away, token.tokens())?),
    )?;
    lab.trial(
        "key deleted",
        (Sees::Unusable, AT_ONCE),
        &tries,
        |lab| token.delete("k").and_then(|()| lab.kill_host()),
        |_| token.generate("k", KeyType::P256, Objects::Pair),
    )?;
    let well = |lab: &Lab| {
        faults("", false)(lab)?;
        lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
    };
    // It counts none itself.
    for (row, lines) in [
        ("one wrong PIN more would block it", "C_GetTokenInfo last 0\n"),
        ("PIN blocked", "C_GetTokenInfo blocked 0\n"),
    ] {
        lab.trial(row, (Sees::Unusable, AT_ONCE), &tries, faults(lines, true), well)?;
    }
    wrong_pin(&mut lab, &token.pin_file())
}

#[test]
fn kryoptic() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    token.generate("k")?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token.section("device")?)?;
    let counted = proxy.clone();
    let tries = || Ok(i64::try_from(counted.tries())?);
    let mut lab = Lab::new(world, &section, "label = \"k\"", 48, Some(proxy))?;
    rows_of_a_module(&mut lab)?;
    let delete = |lab: &Lab| {
        for class in ["privkey", "pubkey"] {
            let login = ["--token-label", "k", "--login", "--pin", kryoptic::PIN];
            token.tool(&[&login[..], &["--delete-object", "--type", class, "--label", "k"]].concat())?;
        }
        lab.kill_host()
    };
    lab.trial("key deleted", (Sees::Unusable, AT_ONCE), &tries, delete, |_| token.generate("k").map(drop))?;
    wrong_pin(&mut lab, &token.pin_file())
}

/// A key of PKCS#11 3.2: the proxy passes that interface on.
#[test]
fn ml_dsa() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    let proxy = world.proxy()?;
    let config = proxy.before(&token.section("t")?)? + &key_section("k", "t", "k");
    world.write("agent.toml", world.listen() + &config)?;
    let public = does(&world, &["generate", "k", "--type", "ml-dsa-65"])?;
    world.write("k.pem", public)?;
    let _agent = Agent::start(&world, &(world.listen() + &config))?;
    world.model()?;
    let sign = ["sign", "model", "--key", "k", "--allow-nonstandard-key"];
    for faults in ["", "C_SignInit b3 0 once\n"] {
        proxy.set(faults)?;
        world.omsign_ok(&sign)?;
        world.omsign_ok(&["verify", "model", "--public-key", "k.pem"])?;
    }
    proxy.set("C_Sign 30 0\n")?;
    let errors = world.omsign_fails(2, &[&sign[..], &["--signature", "none.sig"]].concat())?;
    anyhow::ensure!(errors.contains("CKR_DEVICE_ERROR"), "{errors}");
    proxy.set("")?;
    eventually("it heals", || Ok(world.omsign(&sign)?.status.success()))
}

#[test]
fn piv() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    card.generate("9c", "ECCP256", &[])?;
    let section = card.section("device");
    let mut lab = Lab::new(world, &section, "slot = \"9c\"", 32, None)?;
    let well = |card: &VirtualPiv| {
        card.set(Faults::default());
        Ok(())
    };
    let ill = |card: &VirtualPiv, faults: Faults| {
        card.set(faults);
        Ok(())
    };
    let delay = |delay| Faults { delay, ..Faults::default() };
    // A signature takes it two commands.
    let (slow, long) = (Duration::from_millis(250), Duration::from_secs(600));
    let tries = || Ok(i64::try_from(card.wrong_pins())?);
    lab.trial("slow", (Sees::Nothing, SLOW), &tries, |_| ill(&card, delay(slow)), |_| well(&card))?;
    let half = Faults { once: true, ..delay(Duration::from_millis(500)) };
    let hang = |_: &Lab| ill(&card, half.clone());
    lab.trial("hangs for half a second", (Sees::Nothing, SLOW), &tries, hang, |_| well(&card))?;
    lab.trial("hangs", (Sees::Unavailable, HANG), &tries, |_| ill(&card, delay(long)), |_| well(&card))?;
    let anew = |lab: &Lab| ill(&card, delay(long)).and_then(|()| lab.kill_host());
    let opening = (Sees::Unavailable, THREE_HANGS);
    lab.trial("hangs when it is opened", opening, &tries, anew, |_| well(&card))?;
    let nonsense = Faults { status: Some(0x6f00), ..Faults::default() };
    lab.trial(
        "answers nonsense",
        (Sees::Unavailable, AT_ONCE),
        &tries,
        |_| ill(&card, nonsense),
        |_| well(&card),
    )?;
    let pull = Faults { pull: true, ..Faults::default() };
    lab.trial(
        // It is back at once, which may be before anybody saw that it was away.
        "pulled in the middle of a command",
        (Sees::Either, AT_ONCE),
        &tries,
        |_| ill(&card, pull),
        |_| well(&card),
    )?;
    lab.trial(
        "pulled",
        (Sees::Unavailable, AT_ONCE),
        &tries,
        |_| {
            card.unplug();
            Ok(())
        },
        |_| {
            card.plug();
            Ok(())
        },
    )?;
    lab.trial(
        "another application selected",
        (Sees::Nothing, AT_ONCE),
        &tries,
        |_| card.tool(&["-a", "status"]).map(drop),
        nothing,
    )?;
    lab.trial("process killed", (Sees::Either, AT_ONCE), &tries, Lab::kill_host, nothing)?;
    lab.disk_full(&tries)?;
    let delete = |lab: &Lab| {
        card.delete(0x9c);
        lab.kill_host()
    };
    let make = |_: &Lab| card.generate("9c", "ECCP256", &[]).map(drop);
    lab.trial("key deleted", (Sees::Unusable, AT_ONCE), &tries, delete, make)?;
    lab.trial(
        "key made again",
        (Sees::Either, AT_ONCE),
        &tries,
        |_| card.generate("9c", "ECCP256", &[]).map(drop),
        nothing,
    )?;
    lab.trial(
        "wrong PIN",
        (Sees::Locked, AT_ONCE),
        &tries,
        |lab| write_private(&card.pin_file(), b"81428142\n").and_then(|()| lab.kill_host()),
        |lab| {
            write_private(&card.pin_file(), format!("{}\n", piv::PIN).as_bytes())?;
            lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
        },
    )?;
    let card = std::cell::RefCell::new(&mut card);
    lab.trial(
        "pcscd ends and comes back",
        (Sees::Unavailable, AT_ONCE),
        &|| Ok(i64::try_from(card.borrow().wrong_pins())?),
        |_| card.borrow_mut().kill_service(),
        |_| card.borrow_mut().start_service(),
    )
}
