//! What goes wrong × which device: each time what callers of the token see and how long they wait, that other tokens are
//! served all the while, that it heals, that no try of its PIN was spent, and that no process, thread, descriptor or
//! session is left. docs/faults.md says in words what is shown here.

use std::path::Path;
use std::time::Duration;

use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually, freeze, signal};
use omsign_tests::lab::{Lab, Sees};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section};
use rustix::process::Signal;

/// What one that hangs may cost: the token's time-out of 2 s, and a busy machine.
const HANG: Duration = Duration::from_secs(8);
/// What anything else may.
const SOON: Duration = Duration::from_secs(4);

fn nothing(_: &Lab) -> anyhow::Result<()> {
    Ok(())
}

/// Lets the module fail, also when it is opened anew.
fn faults(lines: &'static str, anew: bool) -> impl FnOnce(&Lab) -> anyhow::Result<()> {
    move |lab| {
        lab.proxy.as_ref().expect("a proxy").set(lines)?;
        if anew { lab.kill_host() } else { Ok(()) }
    }
}

/// Errors of a module that mean that the token, or the way to it, is lost (PKCS#11 2.40, 5.1): FUNCTION_FAILED,
/// GENERAL_ERROR, DEVICE_ERROR, DEVICE_REMOVED, KEY_HANDLE_INVALID, OBJECT_HANDLE_INVALID, SESSION_CLOSED,
/// SESSION_HANDLE_INVALID, TOKEN_NOT_PRESENT, TOKEN_NOT_RECOGNIZED, USER_NOT_LOGGED_IN, CRYPTOKI_NOT_INITIALIZED.
const FATAL: [&str; 12] = ["6", "5", "30", "32", "60", "82", "b0", "b3", "e0", "e1", "101", "190"];

/// What any PKCS#11 module may do.
fn rows_of_a_module(lab: &mut Lab) -> anyhow::Result<()> {
    let calls = |lab: &Lab, name: &str| lab.proxy.as_ref().map_or(0, |proxy| proxy.calls(name));
    // A login for each process that loads the module, and none beyond.
    let counted = lab.proxy.clone().expect("a proxy");
    let tries =
        || Ok(i64::try_from(counted.calls("C_Login"))? - i64::try_from(counted.calls("C_Initialize"))?);
    for (row, sees, lines, anew) in [
        ("slow", (Sees::Nothing, SOON), "C_Sign 0 300\n", false),
        ("hangs for half a second", (Sees::Nothing, SOON), "C_Sign 0 500 once\n", false),
        ("hangs", (Sees::Unavailable, HANG), "C_Sign 0 600000\n", false),
        ("session lost", (Sees::Nothing, SOON), "C_SignInit b3 0 once\n", false),
        ("crashes (SIGSEGV)", (Sees::Unavailable, SOON), "C_Sign segv 0\n", false),
        ("crashes (abort)", (Sees::Unavailable, SOON), "C_Sign abort 0\n", false),
        ("out of sessions", (Sees::Unavailable, SOON), "C_OpenSession b1 0\n", true),
        ("no slots", (Sees::Unavailable, SOON), "C_GetSlotList none 0\n", true),
        ("token not present", (Sees::Unavailable, SOON), "C_GetTokenInfo e0 0\n", true),
        ("hangs when it is opened", (Sees::Unavailable, HANG * 2), "C_Initialize 0 600000\n", true),
        ("crashes when it is opened", (Sees::Unavailable, HANG), "C_FindObjectsInit abort 0\n", true),
    ] {
        let function = lines.split(' ').next().unwrap_or_default();
        let before = calls(lab, function);
        lab.trial(row, sees, &tries, faults(lines, anew), |lab| faults("", false)(lab))?;
        anyhow::ensure!(
            calls(lab, function) > before,
            "{row}: {function} was not called, so that nothing failed"
        );
    }
    for ckr in FATAL {
        for function in ["C_SignInit", "C_Sign"] {
            let lines = format!("{function} {ckr} 0\n");
            let row = format!("{function} answers {ckr}");
            let wrong = |lab: &Lab| lab.proxy.as_ref().expect("a proxy").set(&lines);
            lab.trial(&row, (Sees::Unavailable, SOON), &tries, wrong, |lab| faults("", false)(lab))?;
        }
    }
    lab.trial("process killed", (Sees::Either, SOON), &tries, Lab::kill_host, nothing)
}

/// A PIN that is wrong is offered once, whoever asks, and however often.
fn wrong_pin(lab: &mut Lab, pin_file: &Path) -> anyhow::Result<()> {
    let right = std::fs::read(pin_file)?;
    let logins = |lab: &Lab| lab.proxy.as_ref().map_or(0, |proxy| proxy.calls("C_Login"));
    let before = logins(lab);
    let wrong = |lab: &Lab| write_private(pin_file, b"wrong-pin-8142\n").and_then(|()| lab.kill_host());
    lab.trial("wrong PIN", (Sees::Locked, SOON), &|| Ok(0), wrong, |lab| {
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
    let mut lab = Lab::new(world, &section, "label = \"k\"", 32, Some(proxy))?;
    rows_of_a_module(&mut lab)?;
    let away = lab.world.path("away");
    lab.trial(
        "removed",
        (Sees::Unavailable, SOON),
        &|| Ok(0),
        |_| Ok(std::fs::rename(token.tokens(), &away)?),
        |_| Ok(std::fs::rename(&away, token.tokens())?),
    )?;
    lab.trial(
        "key deleted",
        (Sees::Locked, SOON),
        &|| Ok(0),
        |lab| token.delete("k").and_then(|()| lab.kill_host()),
        |_| token.generate("k", KeyType::P256, Objects::Pair),
    )?;
    wrong_pin(&mut lab, &token.pin_file())
}

#[test]
fn kryoptic() -> anyhow::Result<()> {
    let world = World::new()?;
    let token = Kryoptic::create(&world.path("kryoptic"), "k")?;
    token.generate("k")?;
    let proxy = world.proxy()?;
    let section = proxy.before(&token.section("device")?)?;
    let mut lab = Lab::new(world, &section, "label = \"k\"", 48, Some(proxy))?;
    rows_of_a_module(&mut lab)?;
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
fn tpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut chip = SwTpm::create(&world.path("tpm"))?;
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let section = chip.section("device");
    let mut lab = Lab::new(world, &section, "handle = \"0x81000010\"", 32, None)?;
    let tries = |chip: &SwTpm| Ok(i64::from(chip.failed_tries()?));
    let pause = |chip: &SwTpm| {
        freeze(chip.swtpm()?)?;
        let pid = chip.swtpm()?;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            signal(pid, Signal::CONT)
        });
        Ok(())
    };
    lab.trial("hangs for half a second", (Sees::Nothing, SOON), &|| tries(&chip), |_| pause(&chip), nothing)?;
    lab.trial(
        "hangs",
        (Sees::Unavailable, HANG),
        &|| Ok(0),
        |_| freeze(chip.swtpm()?),
        |_| signal(chip.swtpm()?, Signal::CONT),
    )?;
    // That it lost power while a guarded key was in use counts as a try, for the TPM (TPM 2.0, part 1, 19.8.6).
    lab.trial("reset without a start", (Sees::Either, SOON), &|| Ok(0), |_| chip.reset(), nothing)?;
    lab.trial("process killed", (Sees::Either, SOON), &|| tries(&chip), Lab::kill_host, nothing)?;
    let wrong_value =
        |lab: &Lab| write_private(&chip.pin_file(), b"wrong-auth-8142\n").and_then(|()| lab.kill_host());
    lab.trial("wrong authorization value", (Sees::Locked, SOON), &|| tries(&chip), wrong_value, |lab| {
        write_private(&chip.pin_file(), format!("{AUTH}\n").as_bytes())?;
        lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
    })?;
    lab.trial(
        "key deleted",
        (Sees::Locked, SOON),
        &|| Ok(0),
        |lab| {
            chip.tool("tpm2_evictcontrol", |tool| {
                tool.args(["-Q", "-C", "o", "-c", "0x81000010"]);
            })?;
            lab.kill_host()
        },
        |_| chip.guarded_key("k", 0x8100_0010, AUTH).map(drop),
    )?;
    // Power off and on. (What it counted until then, it would be in lockout for.)
    chip.tool("tpm2_dictionarylockout", |tool| {
        tool.arg("-c");
    })?;
    let chip = std::cell::RefCell::new(&mut chip);
    lab.trial(
        "switched off and on",
        (Sees::Unavailable, SOON),
        &|| Ok(0),
        |_| chip.borrow_mut().kill(),
        |_| chip.borrow_mut().start().map(drop),
    )
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
    let (tenth, long) = (Duration::from_millis(100), Duration::from_secs(3));
    let tries = || Ok(i64::try_from(card.wrong_pins())?);
    lab.trial("slow", (Sees::Nothing, SOON), &tries, |_| ill(&card, delay(tenth)), |_| well(&card))?;
    lab.trial("hangs", (Sees::Unavailable, HANG), &tries, |_| ill(&card, delay(long)), |_| well(&card))?;
    let nonsense = Faults { status: Some(0x6f00), ..Faults::default() };
    lab.trial(
        "answers nonsense",
        (Sees::Unavailable, SOON),
        &tries,
        |_| ill(&card, nonsense),
        |_| well(&card),
    )?;
    let pull = Faults { pull: true, ..Faults::default() };
    lab.trial(
        "pulled in the middle of a command",
        (Sees::Unavailable, HANG),
        &tries,
        |_| ill(&card, pull),
        |_| well(&card),
    )?;
    lab.trial(
        "pulled",
        (Sees::Unavailable, SOON),
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
        (Sees::Nothing, SOON),
        &tries,
        |_| card.tool(&["-a", "status"]).map(drop),
        nothing,
    )?;
    lab.trial("process killed", (Sees::Either, SOON), &tries, Lab::kill_host, nothing)?;
    lab.trial(
        "key deleted and made again",
        (Sees::Either, SOON),
        &tries,
        |_| card.generate("9c", "ECCP256", &[]).map(drop),
        nothing,
    )?;
    lab.trial(
        "wrong PIN",
        (Sees::Locked, SOON),
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
        (Sees::Unavailable, SOON),
        &|| Ok(i64::try_from(card.borrow().wrong_pins())?),
        |_| card.borrow_mut().kill_service(),
        |_| card.borrow_mut().start_service(),
    )
}
