//! What goes wrong × which device: each time what callers of the token see and how long they wait, that other tokens are
//! served all the while, that it heals, that no try of its PIN was spent, and that no process, thread, descriptor or
//! session is left. docs/faults.md says in words what is shown here.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{self, Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, Objects};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually, freeze, signal};
use omsign_tests::lab::{AT_ONCE, HANG, Lab, Sees};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key, key_section};
use rustix::process::Signal;

/// What a slow one may cost, which answers in the end.
const SLOW: Range<Duration> = Duration::from_millis(400)..Duration::from_secs(4);

/// What one may cost that hangs when it is opened, which takes several operations.
fn three_hangs() -> Range<Duration> {
    Duration::from_secs(5)..Duration::from_secs(16)
}

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
        ("hangs when it is opened", (Sees::Unavailable, three_hangs()), "C_Initialize 0 600000\n", true),
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
    lab.trial("process killed", (Sees::Either, AT_ONCE), &tries, Lab::kill_host, nothing)
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

/// The TPM stands still for half a second, again and again with pauses until that is `over`, and once if it is already.
fn stutters(pid: u32, over: Arc<AtomicBool>) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
    freeze(pid)?;
    Ok(std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(600));
            signal(pid, Signal::CONT)?;
            if over.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
            signal(pid, Signal::STOP)?;
        }
    }))
}

/// A key that is guarded, and not ours.
const OTHERS: u32 = 0x8100_0011;

/// What a TPM may do to a key, which somebody can take away and put back.
fn rows_of_a_tpm(
    chip: SwTpm,
    lab: &mut Lab,
    take: impl Fn(&SwTpm) -> anyhow::Result<()>,
    put: impl Fn(&SwTpm) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    chip.guarded_key("others", OTHERS, AUTH)?;
    let (chip, cuts) = (RefCell::new(chip), Cell::new(0));
    // It counts a cut while a guarded key is in use as a try (TPM 2.0, part 1, 19.8.6).
    let tries = || Ok(i64::from(chip.borrow().failed_tries()?) - cuts.get());
    let forget = || {
        chip.borrow().tool("tpm2_dictionarylockout", |tool| {
            tool.arg("-c");
        })
    };
    let swtpm = || chip.borrow().swtpm();
    let (over, stuttering) = (Arc::<AtomicBool>::default(), Cell::new(None));
    let stutter = |_: &Lab| {
        stuttering.set(Some(stutters(swtpm()?, Arc::clone(&over))?));
        Ok(())
    };
    // Until it has ended, it may still wake the TPM that the next row has frozen.
    let steady = |_: &Lab| {
        over.store(true, Ordering::Relaxed);
        stuttering.take().context("it does not stutter")?.join().expect("it does not panic")
    };
    lab.trial("slow", (Sees::Nothing, SLOW), &tries, stutter, steady)?;
    lab.trial("hangs for half a second", (Sees::Nothing, SLOW), &tries, stutter, steady)?;
    let hang = |_: &Lab| freeze(swtpm()?);
    lab.trial("hangs", (Sees::Unavailable, HANG), &tries, hang, |_| signal(swtpm()?, Signal::CONT))?;
    let hang_anew = |lab: &Lab| hang(lab).and_then(|()| lab.kill_host());
    lab.trial("hangs when it is opened", (Sees::Unavailable, three_hangs()), &tries, hang_anew, |_| {
        signal(swtpm()?, Signal::CONT)
    })?;
    // Three places are all that it has, and a process that is killed leaves what it loaded.
    let fill = |lab: &Lab| {
        let primary = |tool: &mut Command| {
            tool.args(["-Q", "-C", "o", "-G", "ecc"]);
        };
        while chip.borrow().tool("tpm2_createprimary", primary).is_ok() {}
        let loaded = chip.borrow().handles("transient")?;
        anyhow::ensure!(loaded == 3, "{loaded} keys are loaded");
        lab.kill_host()
    };
    lab.trial("no room for a key", (Sees::Nothing, AT_ONCE), &tries, fill, nothing)?;
    let reset = |_: &Lab| {
        cuts.set(cuts.get() + 1);
        chip.borrow().reset()
    };
    lab.trial("reset without a start", (Sees::Either, AT_ONCE), &tries, reset, nothing)?;
    forget()?;
    lab.trial("process killed", (Sees::Either, AT_ONCE), &tries, Lab::kill_host, nothing)?;
    let value = chip.borrow().pin_file();
    let wrong = |lab: &Lab| write_private(&value, b"wrong-auth-8142\n").and_then(|()| lab.kill_host());
    lab.trial("wrong authorization value", (Sees::Locked, AT_ONCE), &tries, wrong, |lab| {
        write_private(&value, format!("{AUTH}\n").as_bytes())?;
        lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop)
    })?;
    // One was ours.
    let (digest, unread) = (lab.world.write("digest", [7; 32])?, lab.world.path("unread"));
    let others = || {
        let wrong = chip.borrow().tool("tpm2_sign", |tool| {
            tool.args(["-Q", "-c", &format!("{OTHERS:#x}"), "-p", "wrong", "-g", "sha256", "-d", "-o"]);
            tool.arg(&unread).arg(&digest);
        });
        anyhow::ensure!(wrong.is_err() && chip.borrow().failed_tries()? == 2, "a wrong value was taken");
        Ok(())
    };
    others()?;
    let unlock = |lab: &Lab| lab.world.omsign_ok(&["agent", "unlock", "device"]).map(drop);
    lab.trial("one try left", (Sees::Unavailable, AT_ONCE), &tries, Lab::kill_host, unlock)?;
    forget()?;
    let take = |lab: &Lab| take(&chip.borrow()).and_then(|()| lab.kill_host());
    lab.trial("key deleted", (Sees::Unusable, AT_ONCE), &tries, take, |_| put(&chip.borrow()))?;
    forget()?;
    let off = |_: &Lab| {
        cuts.set(cuts.get() + 1);
        chip.borrow_mut().kill()
    };
    let on = |_: &Lab| chip.borrow_mut().start().map(drop);
    lab.trial("switched off and on", (Sees::Unavailable, AT_ONCE), &tries, off, on)?;
    let left = (chip.borrow().handles("transient")?, chip.borrow().handles("loaded-session")?);
    anyhow::ensure!(left.0 <= 1 && left.1 == 0, "keys and sessions left in the TPM: {left:?}");
    Ok(())
}

#[test]
fn tpm() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.guarded_key("k", 0x8100_0010, AUTH)?;
    let mut lab = Lab::new(world, &chip.section("device"), "handle = \"0x81000010\"", 32, None)?;
    let take = |chip: &SwTpm| {
        chip.tool("tpm2_evictcontrol", |tool| {
            tool.args(["-Q", "-C", "o", "-c", "0x81000010"]);
        })
    };
    rows_of_a_tpm(chip, &mut lab, take, |chip| chip.guarded_key("k", 0x8100_0010, AUTH).map(drop))
}

/// A key that is loaded from a file, as `init tpm` makes it.
#[test]
fn tpm_key_file() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    let (section, object) = (chip.section("device"), "file = \"k.pem\"");
    world.write("agent.toml", world.listen() + &section + &key("k", "device", object))?;
    does(&world, &["generate", "k", "--type", "p256"])?;
    let (file, away) = (world.path("k.pem"), world.path("away.pem"));
    let mut lab = Lab::new(world, &section, object, 32, None)?;
    let take = |_: &SwTpm| Ok(std::fs::rename(&file, &away)?);
    rows_of_a_tpm(chip, &mut lab, take, |_| Ok(std::fs::rename(&away, &file)?))
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
    lab.trial("hangs", (Sees::Unavailable, HANG), &tries, |_| ill(&card, delay(long)), |_| well(&card))?;
    let anew = |lab: &Lab| ill(&card, delay(long)).and_then(|()| lab.kill_host());
    let opening = (Sees::Unavailable, three_hangs());
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
    lab.trial(
        "key deleted and made again",
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
