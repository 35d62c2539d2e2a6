//! The fault matrix of a TPM, with a persistent key and with a key file. docs/faults.md says in words what is shown here.

use std::cell::{Cell, RefCell};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::tpm_device::TpmDevice;
use omsign_fixtures::write_private;
use omsign_tests::agent::{eventually, freeze, signal};
use omsign_tests::lab::{AT_ONCE, HANG, Lab, SLOW, Sees, THREE_HANGS, nothing};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key};
use rustix::process::Signal;

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
    lab.trial("hangs when it is opened", (Sees::Unavailable, THREE_HANGS), &tries, hang_anew, |_| {
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
    forget()?;
    let cut = |_: &Lab| {
        cuts.set(cuts.get() + 1);
        let pid = swtpm()?;
        freeze(pid)?;
        // When the command is with it.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            signal(pid, Signal::KILL)
        });
        Ok(())
    };
    let cut_within = Duration::from_millis(250)..AT_ONCE.end;
    lab.trial(
        "switched off in the middle of a command",
        (Sees::Unavailable, cut_within),
        &tries,
        cut,
        |_| {
            chip.borrow_mut().kill()?;
            chip.borrow_mut().start().map(drop)
        },
    )?;
    forget()?;
    lab.disk_full(&tries)?;
    let left = chip.borrow().left()?;
    anyhow::ensure!(left <= 1, "{left} keys and sessions left in the TPM");
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
    rows_of_a_tpm(chip, &mut lab, take, |chip| {
        eventually("its key", || Ok(chip.put_back("k", 0x8100_0010).is_ok()))
    })
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

/// As a character device, which goes away and comes back: with its driver, or with the machine that has it.
#[test]
fn tpm_device() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = SwTpm::create(&world.path("tpm"))?;
    chip.persistent_key("k", "ecc256", 0x8100_0010, AUTH)?;
    let path = world.path("tpm0");
    let driver = RefCell::new(Some(TpmDevice::create(&path, &chip)?));
    let section = chip.section("device").replace(&chip.tcti(), &format!("device:{}", path.display()));
    let mut lab = Lab::new(world, &section, "handle = \"0x81000010\"", 32, None)?;
    let tries = || Ok(i64::from(chip.failed_tries()?));
    let goes = |_: &Lab| {
        driver.take();
        Ok(())
    };
    let comes_back = |_: &Lab| {
        driver.replace(Some(TpmDevice::create(&path, &chip)?));
        Ok(())
    };
    lab.trial("device removed", (Sees::Unavailable, AT_ONCE), &tries, goes, comes_back)?;
    lab.trial("process killed", (Sees::Either, AT_ONCE), &tries, Lab::kill_host, nothing)
}
