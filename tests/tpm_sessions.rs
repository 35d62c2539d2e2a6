//! Sessions of a TPM, of which a key with PCRs begins one for each signature: others have all that there are, or end ours.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::swtpm::SwTpm;
use omsign_tests::agent::Agent;
use omsign_tests::lab::{AT_ONCE, Lab, Sees};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key};

/// What comes after it in its line is left out.
const KEY: &str = "file = \"k.pem\" }\npcrs = \"sha256:16\" #";

/// How long others keep them, and what a signature may cost that waits for that, or is begun anew.
const KEPT: Duration = Duration::from_millis(500);
const WAITS: Range<Duration> = Duration::ZERO..Duration::from_secs(4);

/// How often other programs measure something, and how many registers then: there is time between for a signature, however busy
/// the machine is.
const MEASURED: Duration = Duration::from_millis(15);
const AT_A_TIME: usize = 3;

/// How many of ours others end, one after the other.
const ENDED: usize = 4;

/// All sessions of the TPM are taken.
fn take_all(chip: &SwTpm) -> anyhow::Result<()> {
    let taken = chip.fill_sessions()?;
    ensure!(taken == 3, "it has room for {taken} sessions");
    Ok(())
}

#[test]
fn others_have_or_end_them() -> anyhow::Result<()> {
    let world = World::new()?;
    let chip = Arc::new(SwTpm::create(&world.path("tpm"))?);
    let section = chip.section("device");
    world.write("agent.toml", world.listen() + &section + &key("k", "device", KEY))?;
    does(&world, &["generate", "k", "--type", "p256"])?;
    // Nor does it take an agent.
    let pin = chip.pin_file();
    let uri = format!("tpm:file=k.pem?tcti={}&pcrs=sha256:16&pin-source={}", chip.tcti(), pin.display());
    world.omsign_ok(&["sign", "agent.toml", "--signature", "alone.sig", "--key-uri", &uri])?;
    let other = uri.replace("sha256:16", "sha256:17");
    world.omsign_refuses(
        2,
        &["sign", "agent.toml", "--signature", "other.sig", "--key-uri", &other],
        &["PCR"],
    )?;
    let mut lab = Lab::new(world, &section, KEY, 32, None)?;
    let tries = || Ok(i64::from(chip.failed_tries()?));
    let ends = |thread: Option<JoinHandle<anyhow::Result<()>>>| {
        thread.context("it began")?.join().expect("it does not panic")
    };

    let mut given_back = None;
    let taken = |_: &Lab| {
        take_all(&chip)?;
        let chip = Arc::clone(&chip);
        given_back = Some(std::thread::spawn(move || {
            std::thread::sleep(KEPT);
            let ended = chip.end_sessions()?;
            ensure!(ended == 3, "{ended} sessions were there");
            Ok(())
        }));
        Ok(())
    };
    lab.trial("others have all for a while", (Sees::Nothing, WAITS), &tries, taken, |_| Ok(()))?;
    ends(given_back)?;

    // As processes leave them that are killed while they sign.
    let left = |lab: &Lab| take_all(&chip).and_then(|()| lab.kill_host());
    lab.trial("all are left by the dead", (Sees::Nothing, AT_ONCE), &tries, left, |_| Ok(()))?;

    // Wherever in its short life ours is.
    for _ in 0..5 {
        let over = Arc::<AtomicBool>::default();
        let mut ended = None;
        let lost = |_: &Lab| {
            let (chip, over) = (Arc::clone(&chip), Arc::clone(&over));
            ended = Some(std::thread::spawn(move || {
                let mut ended = 0;
                while ended < ENDED {
                    ended += chip.end_sessions()?;
                    ensure!(!over.load(Ordering::Relaxed), "only {ended} of ours were ended");
                }
                Ok(())
            }));
            Ok(())
        };
        lab.trial("others end ours", (Sees::Nothing, WAITS), &tries, lost, |_| Ok(()))?;
        let ended = ended.context("it began")?;
        let begun = Instant::now();
        while !ended.is_finished() && begun.elapsed() < WAITS.end {
            let answer = lab.sign()?;
            ensure!(answer == Ok(()), "{answer:?}");
        }
        over.store(true, Ordering::Relaxed);
        ends(Some(ended))?;
    }
    // Whatever is measured into other registers makes a session worthless that began before.
    let over = Arc::<AtomicBool>::default();
    let measures = {
        let (chip, over) = (Arc::clone(&chip), Arc::clone(&over));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                (0..AT_A_TIME).try_for_each(|_| chip.extend(23))?;
                std::thread::sleep(MEASURED);
            }
            Ok(())
        })
    };
    for _ in 0..100 {
        let answer = lab.sign()?;
        ensure!(answer == Ok(()), "{answer:?}");
    }
    over.store(true, Ordering::Relaxed);
    ends(Some(measures))?;
    // Nor does an operator who looks at something have to come again.
    let over = Arc::<AtomicBool>::default();
    let ended = {
        let (chip, over) = (Arc::clone(&chip), Arc::clone(&over));
        std::thread::spawn(move || {
            while chip.end_sessions()? == 0 {
                ensure!(!over.load(Ordering::Relaxed), "none of ours was ended");
            }
            Ok(())
        })
    };
    let begun = Instant::now();
    while !ended.is_finished() && begun.elapsed() < WAITS.end {
        does(&lab.world, &["attest", "k"])?;
    }
    over.store(true, Ordering::Relaxed);
    ends(Some(ended))?;
    let left = chip.handles("loaded-session")?;
    ensure!(left == 0, "{left} sessions are left in the TPM");
    Ok(())
}

/// A TPM has room for three keys that are loaded, and loading takes two places.
#[test]
fn more_key_files_than_a_tpm_has_room_for() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    let (mut keys, mut names) = (String::new(), Vec::new());
    for number in 0..5 {
        let name = format!("file-{number}");
        let (file, _) = stand_in.key_file(&name, "EC", "group:P-256")?;
        keys += &key(&name, "device", &format!("file = \"{}\"", file.display()));
        names.push(name);
    }
    let section = stand_in.section("device");
    let agent = Agent::start(&world, &(world.listen() + &section + &keys))?;
    world.model()?;
    for _ in 0..3 {
        for name in &names {
            world.omsign_ok(&["sign", "model", "--key", name, "--signature", "model.sig"])?;
            let public = world.path(&format!("tpm/{name}.pub.pem")).display().to_string();
            world.omsign_ok(&["verify", "model", "--signature", "model.sig", "--public-key", &public])?;
            world.omsign_ok(&["sign", "model", "--key", name, "--signature", "model.sig"])?;
        }
        // Operators' tasks take places, too.
        omsign_tests::operator::does(&world, &["attest", "file-2"])?;
    }
    ensure!(!agent.log()?.contains("replaced"), "{}", agent.log()?);
    Ok(())
}
