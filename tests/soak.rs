//! Every fault at random, on four devices at once, under 64 clients. `OMSIGN_SOAK_SECONDS` (default 120) and
//! `OMSIGN_SOAK_SEED` (default: printed) choose how long and which.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::kryoptic::{self, Kryoptic};
use omsign_fixtures::piv::VirtualPiv;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_proto::v1::sign_request::Content;
use omsign_tests::agent::eventually;
use omsign_tests::client::{connect, request, sign};
use omsign_tests::disk;
use omsign_tests::forge::pae;
use omsign_tests::mishaps::Mishaps;
use omsign_tests::random::Random;
use omsign_tests::world::{World, key as key_on, key_section, text, token_section};
use openssl::ec::{EcGroup, EcKey};
use openssl::ecdsa::EcdsaSig;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Public};
use tonic::Code;

/// The keys: one that nothing happens to, one that is on a token that fails and on one that does not, and one on each
/// device that fails, and one more on `kry` that asks for the PIN each time.
const KEYS: [&str; 7] = ["calm", "pair", "hsm", "kry", "each", "tpm", "card"];

/// So many of them never fail, but for a full disk.
const CALM: usize = 2;
const CLIENTS: u64 = 64;

/// What the clients saw of each key.
#[derive(Default)]
struct Seen {
    signed: [AtomicU64; KEYS.len()],
    failed: [AtomicU64; KEYS.len()],
    /// It waits for an operator: its process ended while a PIN was with the device, or the PIN was wrong.
    locked: [AtomicBool; KEYS.len()],
    /// Odd while the audit log's disk is full, when nothing is signed.
    full: Arc<AtomicU64>,
    over: AtomicBool,
}

/// One client: signs, and checks every signature against its own digest, until it is over. Which requests were answered.
async fn client(
    socket: PathBuf,
    number: u64,
    keys: Arc<Vec<PKey<Public>>>,
    seen: Arc<Seen>,
) -> anyhow::Result<Vec<u128>> {
    let mut channel = connect(socket).await?;
    let which = usize::try_from(number)? % KEYS.len();
    let (name, key) = KEYS.iter().zip(keys.iter()).nth(which).context("a key")?;
    let key = key.ec_key()?;
    let (mut round, mut signed_ids) = (0_u64, Vec::new());
    while !seen.over.load(Ordering::Relaxed) {
        round += 1;
        let id = u128::from(number) << 64 | u128::from(round);
        let statement = id.to_be_bytes().to_vec();
        let pae = pae(&statement);
        let digest = match key.group().degree() {
            384 => openssl::sha::sha384(&pae).to_vec(),
            _ => openssl::sha::sha256(&pae).to_vec(),
        };
        let mut request = request(name, id, &digest);
        if *name == "each" {
            request.content = Some(Content::Statement(statement));
        }
        let full = seen.full.load(Ordering::SeqCst);
        let answer = sign(&mut channel, request, Duration::from_secs(4)).await;
        let count = match &answer {
            Ok(signed) => {
                let right = EcdsaSig::from_der(&signed.signature)?.verify(&digest, &key)?;
                ensure!(right, "{name}: the signature is over something else");
                signed_ids.push(id);
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
                if which < CALM && was_full && status.code() == Code::Unavailable {
                    continue;
                }
                ensure!(expected && which >= CALM, "{name}: {status:?}");
                if status.message().contains("it is locked") {
                    seen.locked.get(which).context("a flag")?.store(true, Ordering::Relaxed);
                }
                &seen.failed
            }
        };
        count.get(which).context("a count")?.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(signed_ids)
}

/// What operators do at 3 a.m.
fn unlock(world: &World, seen: &Seen) -> anyhow::Result<usize> {
    let mut unlocked = 0;
    for (key, locked) in KEYS.iter().zip(&seen.locked) {
        if locked.swap(false, Ordering::Relaxed) {
            // But for this one, they are named as their tokens.
            world.omsign(&["agent", "unlock", if *key == "each" { "kry" } else { *key }])?;
            unlocked += 1;
        }
    }
    Ok(unlocked)
}

fn signs(world: &World, key: &str) -> anyhow::Result<bool> {
    let name = format!("{key}.sig");
    Ok(world.omsign(&["sign", "agent.toml", "--key", key, "--signature", &name])?.status.success())
}

/// Makes the key `each`; returns a file with its public half.
fn asks_each_time(kry: &Kryoptic) -> anyhow::Result<PathBuf> {
    let login = ["--token-label", kry.label(), "--login", "--pin", kryoptic::PIN];
    let key = ["--label", "each", "--id", "05"];
    let make = ["--keypairgen", "--key-type", "EC:prime256v1", "--usage-sign", "--always-auth"];
    kry.tool(&[&login[..], &make, &key].concat())?;
    let (der, pem) = (kry.config().with_extension("der"), kry.public_key("each"));
    kry.tool(
        &[&["--read-object", "--type", "pubkey", "--output-file", &text(&der)][..], &login, &key].concat(),
    )?;
    std::fs::write(&pem, PKey::public_key_from_der(&std::fs::read(der)?)?.public_key_to_pem()?)?;
    Ok(pem)
}

/// Another seed at each run, also where processes are numbered alike.
fn clock() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros().try_into()?)
}

#[test]
fn every_fault_at_random() -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let lasts = Duration::from_secs(number("OMSIGN_SOAK_SECONDS").unwrap_or(120));
    let seed = number("OMSIGN_SOAK_SEED").map_or_else(clock, Ok)?;
    eprintln!("OMSIGN_SOAK_SEED={seed}");

    let world = World::new()?;
    let (calm, soft) =
        (world.token("calm", "calm", KeyType::P256)?, SoftHsm::create(&world.path("hsm"), "hsm")?);
    soft.generate("hsm", KeyType::P256, Objects::Certified)?;
    let spare = world.twin_of(&soft)?;
    let kry = Kryoptic::create(&world.path("kryoptic"), "kry")?;
    let proxies = [world.proxy()?, FaultProxy::create(&world.path("kry-proxy"))?];
    let [proxy, kry_proxy] = &proxies;
    let mut chip = SwTpm::create(&world.path("tpm"))?;
    let card = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    card.change_pin()?;
    let card_key = PKey::from_ec_key(EcKey::generate(&*EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?)?)?;
    let each = asks_each_time(&kry)?;
    let public = [
        calm.public_key("calm"),
        soft.public_key("hsm"),
        soft.public_key("hsm"),
        kry.generate("kry")?,
        each,
        chip.guarded_key("tpm", 0x8100_0010, AUTH)?,
        card.import("9a", &card_key)?,
    ];
    // The tools used a parent key that the TPM guards, and it counts a power cut after that as a wrong value.
    chip.kill()?;
    ensure!(chip.start()?, "the TPM's port is taken");
    chip.tool("tpm2_dictionarylockout", |tool| {
        tool.arg("-c");
    })?;
    let public = public.iter().map(|file| Ok(PKey::public_key_from_pem(&std::fs::read(file)?)?));
    let public = Arc::new(public.collect::<anyhow::Result<Vec<_>>>()?);
    let config = world.listen()
        + &token_section("calm", &calm, "")
        + &key_section("calm", "calm", "calm")
        + &proxy.before(&token_section("hsm", &soft, "timeout = \"1s\"\nsessions = 2"))?
        + &key_section("hsm", "hsm", "hsm")
        + &token_section("spare", &spare, "")
        + &key_section("pair", "hsm", "hsm").replace("token = \"hsm\"", "token = [\"hsm\", \"spare\"]")
        + &kry_proxy.before(&(kry.section("kry")? + "timeout = \"1s\"\nsessions = 2\n"))?
        + &key_section("kry", "kry", "kry")
        + &key_section("each", "kry", "each")
        + &(chip.section("tpm") + "timeout = \"1s\"\n")
        + &key_on("tpm", "tpm", "handle = \"0x81000010\"")
        + &(card.section("card") + "timeout = \"1s\"\n")
        + &key_on("card", "card", "slot = \"9a\"");
    let agent = disk::start(&world, &config)?;
    for key in KEYS {
        eventually(key, || signs(&world, key))?;
    }
    let (before, sessions) = (agent.held()?, proxies.each_ref().map(FaultProxy::sessions));

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let seen = Arc::new(Seen::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            runtime.spawn(client(world.path("agent.sock"), number, Arc::clone(&public), Arc::clone(&seen)))
        })
        .collect();
    let certificates = Mishaps::certificates(&world, &soft)?;
    let full = Arc::clone(&seen.full);
    let (random, wrong_pins, refused) = (Random(seed), 0, [0; 2]);
    let mut mishaps = Mishaps {
        world,
        agent,
        soft,
        kry,
        proxies,
        chip,
        card,
        random,
        left: Vec::new(),
        full,
        wrong_pins,
        refused,
        certificates,
        card_key,
        audited: HashSet::new(),
    };
    let (started, mut done, mut unlocked) = (Instant::now(), Vec::new(), 0);
    // Each happens once at least, however slow the machine is.
    while (started.elapsed() < lasts || done.len() < Mishaps::kinds())
        && !clients.iter().any(|client| client.is_finished())
    {
        done.push(mishaps.happen().with_context(|| format!("seed {seed}, after {done:?}"))?);
        unlocked += unlock(&mishaps.world, &seen)?;
    }
    // Everything is well again: so is everybody.
    for key in KEYS {
        let heals = || {
            unlocked += unlock(&mishaps.world, &seen)?;
            signs(&mishaps.world, key)
        };
        eventually(key, heals).with_context(|| format!("{key}, seed {seed}, after {done:?}"))?;
    }
    seen.over.store(true, Ordering::Relaxed);
    let mut ids = Vec::new();
    for client in clients {
        ids.extend(runtime.block_on(client)?.with_context(|| format!("seed {seed}, after {done:?}"))?);
    }
    let count =
        |counts: &[AtomicU64; KEYS.len()]| counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let (signed, failed) = (count(&seen.signed), count(&seen.failed));
    eprintln!("{} faults, {unlocked} unlocked; of {KEYS:?} signed {signed:?}, failed {failed:?}", done.len());
    let (calm, others) = failed.split_at(CALM);
    ensure!(
        calm.iter().all(|count| *count == 0) && signed.iter().all(|count| *count > 100),
        "{signed:?} {failed:?}"
    );
    ensure!(others.iter().all(|count| *count > 0), "nothing went wrong: {failed:?}");
    mishaps.note_audit(&disk::audit(&mishaps.world, &mishaps.agent))?;
    let missing = ids.iter().filter(|id| !mishaps.audited.contains(id)).count();
    ensure!(missing == 0, "{missing} signatures of {} are not in the audit log", ids.len());
    let left = mishaps.chip.left()?;
    ensure!(left <= 1, "{left} keys and sessions are left in the TPM");
    let Mishaps { agent, proxies, chip, card, wrong_pins, refused, .. } = mishaps;
    let (values, pins) = (chip.failed_tries()?, card.wrong_pins());
    ensure!(
        values == 0 && pins == wrong_pins,
        "{values} wrong authorization values; {pins}, not {wrong_pins}"
    );
    // Every login that was refused was one with a PIN that the agent was told, once. A key that asks for it each time logs in
    // more often than once in a process.
    let counted = proxies.each_ref().map(FaultProxy::refused_pins);
    ensure!(counted == refused, "{counted:?} PINs were refused, and {refused:?} of them were wrong");
    let [proxy, _] = &proxies;
    ensure!(proxy.tries() == counted[0], "{} tries, {} of them refused", proxy.tries(), counted[0]);
    for (proxy, before) in proxies.iter().zip(sessions) {
        eventually("as many sessions as before", || Ok(proxy.sessions() <= before))
            .with_context(|| format!("before {before}, now {}", proxy.sessions()))?;
    }
    eventually("what it held before", || {
        let now = agent.held()?;
        Ok(now.0 <= before.0 && now.1 <= before.1)
    })
    .with_context(|| format!("before {before:?}, now {:?}", agent.held()))
}
