//! Every fault at random, on three devices at once, under 64 clients. `OMSIGN_SOAK_SECONDS` (default 45) and
//! `OMSIGN_SOAK_SEED` (default: printed) choose how long and which.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::{Faults, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, PIN, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::write_private;
use omsign_tests::agent::{Agent, eventually, signal, under};
use omsign_tests::client::{connect, request, sign};
use omsign_tests::random::Random;
use omsign_tests::world::{World, key as key_on, key_section, text, token_section};
use openssl::ecdsa::EcdsaSig;
use openssl::pkey::{PKey, Public};
use rustix::process::Signal;
use tonic::Code;

/// The keys: one that nothing happens to, and one on each device that fails.
const KEYS: [&str; 4] = ["calm", "hsm", "tpm", "card"];
const CLIENTS: u64 = 64;

/// What PKCS#11 modules answer and do (PKCS#11 v3.1, 5.1), by the function that it happens in.
const MODULE_FAULTS: [&str; 16] = [
    "C_Sign 32 0",         // CKR_DEVICE_REMOVED
    "C_Sign 30 0",         // CKR_DEVICE_ERROR
    "C_Sign 31 0",         // CKR_DEVICE_MEMORY
    "C_Sign 2 0",          // CKR_HOST_MEMORY
    "C_Sign 5 0",          // CKR_GENERAL_ERROR
    "C_Sign 6 0",          // CKR_FUNCTION_FAILED
    "C_Sign b3 0",         // CKR_SESSION_HANDLE_INVALID
    "C_SignInit 60 0",     // CKR_KEY_HANDLE_INVALID
    "C_SignInit 90 0",     // CKR_OPERATION_ACTIVE
    "C_SignInit 101 0",    // CKR_USER_NOT_LOGGED_IN
    "C_OpenSession b1 0",  // CKR_SESSION_COUNT
    "C_GetTokenInfo e0 0", // CKR_TOKEN_NOT_PRESENT
    "C_Sign 0 500",        // slow
    "C_Sign 0 60000",      // hangs
    "C_Sign segv 0",
    "C_FindObjectsInit abort 0",
];

/// What the clients saw of each key.
#[derive(Default)]
struct Seen {
    signed: [AtomicU64; KEYS.len()],
    failed: [AtomicU64; KEYS.len()],
    /// It waits for an operator: its process ended while a PIN was with the device, or the PIN was wrong.
    locked: [AtomicBool; KEYS.len()],
    /// Odd while the audit log's disk is full, when nothing is signed.
    full: AtomicU64,
    over: AtomicBool,
}

/// One client: signs, and checks every signature against its own digest, until it is over.
async fn client(
    socket: PathBuf,
    number: u64,
    keys: Arc<Vec<PKey<Public>>>,
    seen: Arc<Seen>,
) -> anyhow::Result<()> {
    let mut channel = connect(socket).await?;
    let which = usize::try_from(number)? % KEYS.len();
    let (name, key) = KEYS.iter().zip(keys.iter()).nth(which).context("a key")?;
    let key = key.ec_key()?;
    let mut round = 0_u64;
    while !seen.over.load(Ordering::Relaxed) {
        round += 1;
        let id = u128::from(number) << 64 | u128::from(round);
        let digest = openssl::sha::sha256(&id.to_be_bytes());
        let full = seen.full.load(Ordering::SeqCst);
        let answer = sign(&mut channel, request(name, id, &digest), Duration::from_secs(4)).await;
        let count = match &answer {
            Ok(signed) => {
                let right = EcdsaSig::from_der(&signed.signature)?.verify(&digest, &key)?;
                ensure!(right, "{name}: the signature is over something else");
                &seen.signed
            }
            Err(status) => {
                let expected = matches!(
                    status.code(),
                    Code::Unavailable
                        | Code::DeadlineExceeded
                        | Code::ResourceExhausted
                        | Code::FailedPrecondition
                );
                let was_full = full % 2 == 1 || full != seen.full.load(Ordering::SeqCst);
                if which == 0 && was_full && status.code() == Code::Unavailable {
                    continue;
                }
                ensure!(expected && which != 0, "{name}: {status:?}");
                if status.message().contains("it is locked") {
                    seen.locked.get(which).context("a flag")?.store(true, Ordering::Relaxed);
                }
                &seen.failed
            }
        };
        count.get(which).context("a count")?.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// What operators do at 3 a.m.
fn unlock(world: &World, seen: &Seen) -> anyhow::Result<usize> {
    let mut unlocked = 0;
    for (key, locked) in KEYS.iter().zip(&seen.locked) {
        if locked.swap(false, Ordering::Relaxed) {
            // Both are named alike.
            world.omsign(&["agent", "unlock", key])?;
            unlocked += 1;
        }
    }
    Ok(unlocked)
}

/// The token processes that something may happen to.
fn victims(agent: &Agent) -> anyhow::Result<Vec<u32>> {
    let mut hosts = agent.hosts()?;
    hosts.retain(|host| {
        let name = std::fs::read_to_string(format!("/proc/{host}/cmdline")).unwrap_or_default();
        name.contains("token ") && !name.contains("token calm")
    });
    Ok(hosts)
}

/// Starts the agent with a file system of its own for the audit log, which can be filled.
fn with_a_small_disk(world: &World, config: &str) -> anyhow::Result<Agent> {
    std::fs::create_dir(world.path("disk"))?;
    let config = config.replace("\"audit\"", "\"disk/audit\"");
    Agent::start_with(world, &config, |command| {
        let script =
            format!("mount -t tmpfs -o size=128m tmpfs {} && exec \"$0\" \"$@\"", text(&world.path("disk")));
        let own = ["--map-current-user", "--keep-caps", "--mount", "sh", "-ec", &script];
        *command = under("unshare", own, command);
    })
}

/// Fills the audit log's disk for a moment.
fn fill_the_disk(world: &World, agent: &Agent, pause: Duration) -> anyhow::Result<()> {
    // As the agent sees it.
    let disk = format!("/proc/{}/root{}", agent.pid(), text(&world.path("disk")));
    // Or hours of it would fill the disk for good.
    std::fs::OpenOptions::new().write(true).open(format!("{disk}/audit/audit.jsonl"))?.set_len(0)?;
    let filler = format!("{disk}/filler");
    let mut file = std::fs::File::create(&filler)?;
    let block = vec![0; 1 << 16];
    while file.write(&block).is_ok() {}
    std::thread::sleep(pause);
    Ok(std::fs::remove_file(filler)?)
}

/// Takes the objects of a token away for a moment: for whoever looks, its keys are deleted.
fn delete_keys(agent: &Agent, token: &SoftHsm, pause: Duration) -> anyhow::Result<()> {
    let mut objects = Vec::new();
    for directory in std::fs::read_dir(token.tokens())? {
        for file in std::fs::read_dir(directory?.path())? {
            let file = file?.path();
            // The token itself has its PINs in one.
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".object") && name != "token.object" {
                objects.push(file);
            }
        }
    }
    ensure!(!objects.is_empty(), "no key to delete");
    let away = |file: &Path| file.with_extension("away");
    objects.iter().try_for_each(|file| std::fs::rename(file, away(file)))?;
    kill_hsm(agent)?;
    std::thread::sleep(pause);
    Ok(objects.iter().try_for_each(|file| std::fs::rename(away(file), file))?)
}

/// Ends the process of the PKCS#11 token.
fn kill_hsm(agent: &Agent) -> anyhow::Result<()> {
    for host in victims(agent)? {
        if std::fs::read_to_string(format!("/proc/{host}/cmdline")).unwrap_or_default().contains("token hsm")
        {
            // It may have ended by itself.
            let _ = signal(host, Signal::KILL);
        }
    }
    Ok(())
}

#[test]
fn every_fault_at_random() -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let lasts = Duration::from_secs(number("OMSIGN_SOAK_SECONDS").unwrap_or(45));
    let seed = number("OMSIGN_SOAK_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("OMSIGN_SOAK_SEED={seed}");
    let mut random = Random(seed);

    let world = World::new()?;
    let (calm, soft) =
        (world.token("calm", "calm", KeyType::P256)?, world.token("hsm", "hsm", KeyType::P256)?);
    let proxy = world.proxy()?;
    let mut chip = SwTpm::create(&world.path("tpm"))?;
    let mut card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    let public = [
        calm.public_key("calm"),
        soft.public_key("hsm"),
        chip.persistent_key("tpm", "ecc256", 0x8100_0010, AUTH)?,
        card.generate("9a", "ECCP256", &[])?,
    ];
    // The tools used a parent key that the TPM guards, and it counts a power cut after that as a wrong value.
    chip.kill()?;
    ensure!(chip.start()?, "the TPM's port is taken");
    let counted = chip.failed_tries()?;
    let public = public.iter().map(|file| Ok(PKey::public_key_from_pem(&std::fs::read(file)?)?));
    let public = Arc::new(public.collect::<anyhow::Result<Vec<_>>>()?);
    let config = world.listen()
        + &token_section("calm", &calm, "")
        + &key_section("calm", "calm", "calm")
        + &proxy.before(&token_section("hsm", &soft, "timeout = \"1s\"\nsessions = 2"))?
        + &key_section("hsm", "hsm", "hsm")
        + &(chip.section("tpm") + "timeout = \"1s\"\n")
        + &key_on("tpm", "tpm", "handle = \"0x81000010\"")
        + &(card.section("card") + "timeout = \"1s\"\n")
        + &key_on("card", "card", "slot = \"9a\"");
    let agent = with_a_small_disk(&world, &config)?;
    let signs = |key: &str| -> anyhow::Result<bool> {
        let name = format!("{key}.sig");
        Ok(world.omsign(&["sign", "agent.toml", "--key", key, "--signature", &name])?.status.success())
    };
    for key in KEYS {
        eventually(key, || signs(key))?;
    }
    let before = agent.held()?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let seen = Arc::new(Seen::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            runtime.spawn(client(world.path("agent.sock"), number, Arc::clone(&public), Arc::clone(&seen)))
        })
        .collect();
    let (started, mut done, mut unlocked) = (Instant::now(), Vec::new(), 0);
    while started.elapsed() < lasts && !clients.iter().any(|client| client.is_finished()) {
        let pause = Duration::from_millis(100 + random.below(700) as u64);
        let fault = random.below(MODULE_FAULTS.len() + 15);
        let hosts = victims(&agent)?;
        let victim = hosts.get(random.below(hosts.len().max(1)));
        let name = match fault.checked_sub(MODULE_FAULTS.len()) {
            None => {
                let line = MODULE_FAULTS.get(fault).context("a fault")?;
                proxy.set(line)?;
                // What fails when a token is opened fails when its process has to be replaced.
                if !line.starts_with("C_Sign") {
                    kill_hsm(&agent)?;
                    let function = line.split(' ').next().unwrap_or_default();
                    let called = proxy.calls(function);
                    eventually("the call that fails", || Ok(proxy.calls(function) > called))?;
                }
                std::thread::sleep(pause);
                proxy.set("")?;
                *line
            }
            Some(0) => {
                // It may have ended by itself.
                victim.map(|host| signal(*host, Signal::KILL).ok());
                "a process is killed"
            }
            Some(1) => {
                victim.map(|host| signal(*host, Signal::STOP).ok());
                "a process is stopped"
            }
            Some(2 | 3) => {
                chip.kill()?;
                std::thread::sleep(pause);
                ensure!(chip.start()?, "the TPM's port is taken");
                "the TPM is switched off and on"
            }
            Some(4) => {
                chip.reset()?;
                "the TPM is reset"
            }
            Some(5) => {
                signal(chip.swtpm()?, Signal::STOP)?;
                std::thread::sleep(pause);
                signal(chip.swtpm()?, Signal::CONT)?;
                "the TPM stands still"
            }
            Some(6 | 7) => {
                card.unplug();
                std::thread::sleep(pause);
                card.plug();
                "the card is pulled"
            }
            Some(8) => {
                card.set(Faults { pull: true, ..Faults::default() });
                std::thread::sleep(pause);
                card.set(Faults::default());
                "the card is pulled in the middle of a command"
            }
            Some(9) => {
                card.set(Faults { status: Some(0x6f00), ..Faults::default() });
                std::thread::sleep(pause);
                card.set(Faults::default());
                "the card answers nonsense"
            }
            Some(10) => {
                card.set(Faults { delay: Duration::from_millis(300), ..Faults::default() });
                std::thread::sleep(pause);
                card.set(Faults::default());
                "the card is slow"
            }
            Some(11) => {
                seen.full.fetch_add(1, Ordering::SeqCst);
                fill_the_disk(&world, &agent, pause)?;
                seen.full.fetch_add(1, Ordering::SeqCst);
                "the audit log's disk is full"
            }
            Some(12) => {
                delete_keys(&agent, &soft, pause)?;
                "a key is deleted"
            }
            Some(13) => {
                // A token that is locked already is offered none.
                eventually("a token that is open", || {
                    unlocked += unlock(&world, &seen)?;
                    signs("hsm")
                })?;
                let logins = proxy.calls("C_Login");
                write_private(&soft.pin_file(), b"wrong-pin-5714\n")?;
                kill_hsm(&agent)?;
                eventually("the PIN's refusal", || Ok(proxy.calls("C_Login") > logins))?;
                write_private(&soft.pin_file(), format!("{PIN}\n").as_bytes())?;
                "the PIN is wrong"
            }
            Some(_) => {
                card.kill_service()?;
                std::thread::sleep(pause);
                card.start_service()?;
                "pcscd ends and comes back"
            }
        };
        done.push(name);
        unlocked += unlock(&world, &seen)?;
        std::thread::sleep(pause);
    }
    // Everything is well again: so is everybody.
    for key in KEYS {
        let heals = || {
            unlocked += unlock(&world, &seen)?;
            signs(key)
        };
        eventually(key, heals).with_context(|| format!("{key}, seed {seed}, after {done:?}"))?;
    }
    seen.over.store(true, Ordering::Relaxed);
    for client in clients {
        runtime.block_on(client)?.with_context(|| format!("seed {seed}, after {done:?}"))?;
    }
    let count =
        |counts: &[AtomicU64; KEYS.len()]| counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let (signed, failed) = (count(&seen.signed), count(&seen.failed));
    eprintln!("{} faults, {unlocked} unlocked; of {KEYS:?} signed {signed:?}, failed {failed:?}", done.len());
    let [calm_failed, ..] = failed;
    ensure!(calm_failed == 0 && signed.iter().all(|count| *count > 100), "{signed:?} {failed:?}");
    ensure!(failed.iter().skip(1).all(|count| *count > 0), "nothing went wrong: {failed:?}");
    let (tries, wrong) = (chip.failed_tries()? - counted, card.wrong_pins());
    ensure!(tries == 0 && wrong == 0, "{tries} wrong authorization values; {wrong} wrong PINs");
    let (logins, starts) = (proxy.calls("C_Login"), proxy.calls("C_Initialize"));
    ensure!(logins <= starts, "{logins} logins of {starts} processes");
    eventually("what it held before", || {
        let now = agent.held()?;
        Ok(now.0 <= before.0 + 8 && now.1 <= before.1 + 2)
    })
    .with_context(|| format!("before {before:?}, now {:?}", agent.held()))
}
