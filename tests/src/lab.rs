//! One device that fails, beside one that does not: what a fault costs its callers, and that nothing is left of it.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::KeyType;
use openssl::ecdsa::EcdsaSig;
use openssl::pkey::PKey;
use tonic::Code;

use crate::agent::{Agent, eventually};
use crate::client::{connect, request, sign};
use crate::disk::{self, Filler};
use crate::world::{World, key_section, token_section};

const SECOND: Duration = Duration::from_secs(1);

/// The token's time-out. What takes less was ended by something else; a busy machine alone takes no three quarters of it.
const TIMEOUT: Duration = Duration::from_secs(4);

/// How long others may wait: a busy machine, and nothing of the fault.
pub const OTHERS: Duration = Duration::from_secs(3);

/// At once: in less than the token's time-out, which would have had to end it otherwise.
pub const AT_ONCE: Range<Duration> = Duration::ZERO..Duration::from_millis(3500);

/// What one that hangs may cost: the token's time-out, and a busy machine.
pub const HANG: Range<Duration> = TIMEOUT..Duration::from_secs(15);

/// What a slow one may cost, which answers in the end.
pub const SLOW: Range<Duration> = Duration::from_millis(400)..Duration::from_millis(3500);

/// What one may cost that hangs when it is opened, which takes several operations.
pub const THREE_HANGS: Range<Duration> = Duration::from_secs(10)..Duration::from_secs(19);

/// The line of a token that sets it.
pub fn timeout() -> String {
    format!("timeout = \"{}s\"\n", TIMEOUT.as_secs())
}

/// It ends by itself.
pub fn nothing(_: &Lab) -> anyhow::Result<()> {
    Ok(())
}

/// What the first caller sees who comes while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sees {
    /// A signature.
    Nothing,
    /// UNAVAILABLE.
    Unavailable,
    /// One of these two.
    Either,
    /// FAILED_PRECONDITION, until somebody acts; no try of its secret was spent.
    Unusable,
    /// The same, because its secret was refused: that was one try.
    Locked,
    /// One of all these, and no try was spent.
    Anything,
}

/// How many tries of its PIN or authorization value a device counted so far: wrong ones, or logins less one for each
/// process.
pub type Tries<'a> = &'a dyn Fn() -> anyhow::Result<i64>;

/// An agent with the device under trial, as token `device` with a key `k`, and a calm one.
pub struct Lab {
    /// Its directory.
    pub world: World,
    /// It.
    pub agent: Agent,
    /// In front of the device, where it is a PKCS#11 module.
    pub proxy: Option<FaultProxy>,
    /// How long callers of the other token may wait.
    pub others: Duration,
    /// Whether they are served no more than others while it lasts.
    is_everybodys: bool,
    /// Descriptors and threads before anything went wrong.
    held: (usize, usize),
    digest: Vec<u8>,
    runtime: tokio::runtime::Runtime,
    next_id: Cell<u128>,
}

impl Lab {
    /// Starts it. `digest_bytes` are those of the key's hash.
    pub fn new(
        world: World,
        device: &str,
        object: &str,
        digest_bytes: usize,
        proxy: Option<FaultProxy>,
    ) -> anyhow::Result<Self> {
        let calm = world.token("calm", "calm", KeyType::P256)?;
        let tokens = device.to_owned() + &timeout() + &token_section("calm", &calm, "");
        let keys = crate::world::key("k", "device", object) + &key_section("calm", "calm", "calm");
        let agent = disk::start(&world, &(world.listen() + &tokens + &keys))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let digest = vec![7; digest_bytes];
        let (others, is_everybodys, held) = (OTHERS, false, (usize::MAX, usize::MAX));
        let next_id = Cell::new(0);
        let mut lab = Self { world, agent, proxy, others, is_everybodys, held, digest, runtime, next_id };
        ensure!(lab.sign()? == Ok(()), "{}", lab.agent.log()?);
        lab.world.omsign_ok(&["sign", "agent.toml", "--key", "calm", "--signature", "calm.sig"])?;
        // Our connection ends a moment later.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(10));
            let held = lab.agent.held()?;
            lab.held = (lab.held.0.min(held.0), lab.held.1.min(held.1));
        }
        Ok(lab)
    }

    /// One signature; the error is its code.
    pub fn sign(&self) -> anyhow::Result<Result<(), Code>> {
        let (socket, id) = (self.world.path("agent.sock"), self.next_id.get() + 1);
        self.next_id.set(id);
        self.runtime.block_on(async {
            let mut client = connect(socket).await?;
            match sign(&mut client, request("k", id, &self.digest), SECOND * 25).await {
                Ok(signed) => {
                    let key = PKey::public_key_from_der(&signed.public_key)?.ec_key()?;
                    let signature = EcdsaSig::from_der(&signed.signature)?;
                    ensure!(signature.verify(&self.digest, &key)?, "a signature that does not verify");
                    Ok(Ok(()))
                }
                Err(status) => Ok(Err(status.code())),
            }
        })
    }

    /// Kills the device's process, so that it has to be opened anew.
    pub fn kill_host(&self) -> anyhow::Result<()> {
        self.agent.kill(self.agent.host_of("device")?.as_slice())
    }

    /// Has something go wrong, looks at what it costs, and ends it. `within` is how long the first caller waits, at least
    /// and at most.
    pub fn trial(
        &mut self,
        row: &str,
        (sees, within): (Sees, Range<Duration>),
        tries: Tries<'_>,
        wrong: impl FnOnce(&Self) -> anyhow::Result<()>,
        right: impl FnOnce(&Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.seen(row, (sees, within), tries, wrong, right).with_context(|| format!("{row}: {}", self.log()))
    }

    /// The audit log's disk is full: nobody is served.
    pub fn disk_full(&mut self, tries: Tries<'_>) -> anyhow::Result<()> {
        let filler = Cell::new(None);
        let fill = |lab: &Self| {
            filler.set(Some(Filler::fill(&lab.world, &lab.agent)?));
            // Some more records have room where the last one ends.
            while lab.sign()? == Ok(()) {}
            Ok(())
        };
        let remove = |_: &Self| filler.take().context("the filler")?.remove();
        self.is_everybodys = true;
        self.trial("disk full", (Sees::Unavailable, AT_ONCE), tries, fill, remove)?;
        self.is_everybodys = false;
        Ok(())
    }

    fn log(&self) -> String {
        let log = self.agent.log().unwrap_or_default();
        log.lines().rev().take(12).collect::<Vec<_>>().join("\n")
    }

    fn seen(
        &mut self,
        row: &str,
        (sees, within): (Sees, Range<Duration>),
        tries: Tries<'_>,
        wrong: impl FnOnce(&Self) -> anyhow::Result<()>,
        right: impl FnOnce(&Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        ensure!(self.sign()? == Ok(()), "it was not well before");
        let tried = tries()?;
        let sessions = self.proxy.as_ref().map(FaultProxy::sessions);
        wrong(self)?;
        let calm = Calm::start(self);
        let started = Instant::now();
        let answer = self.sign()?;
        let waited = started.elapsed();
        let expected = match sees {
            Sees::Nothing => answer == Ok(()),
            Sees::Unavailable => answer == Err(Code::Unavailable),
            Sees::Either => matches!(answer, Ok(()) | Err(Code::Unavailable)),
            Sees::Anything => true,
            Sees::Unusable | Sees::Locked => answer == Err(Code::FailedPrecondition),
        };
        ensure!(expected, "callers see {answer:?}, and not {sees:?}");
        ensure!(within.contains(&waited), "the caller waited for {waited:?}, not {within:?}");
        right(self)?;
        let started = Instant::now();
        while let Err(code) = self.sign()? {
            ensure!(started.elapsed() < SECOND * 20, "it does not heal: {code:?}");
        }
        let healed = started.elapsed();
        let served = calm.end(self)?;
        let spent = tries()? - tried;
        let allowed = 0..=i64::from(sees == Sees::Locked);
        ensure!(allowed.contains(&spent), "{spent} tries of its secret were spent");
        eventually("what it held before", || {
            let now = self.agent.held()?;
            Ok(now.0 <= self.held.0 && now.1 <= self.held.1)
        })
        .with_context(|| format!("it held {:?}, and now {:?}", self.held, self.agent.held()))?;
        if let (Some(before), Some(proxy)) = (sessions, &self.proxy) {
            eventually("as many sessions as before", || Ok(proxy.sessions() <= before))
                .with_context(|| format!("{before} sessions were open, and now {}", proxy.sessions()))?;
        }
        eprintln!("{row}: {answer:?} after {waited:.1?}, well after {healed:.1?}, {served} others served");
        Ok(())
    }
}

/// A caller of the calm token, all the while.
struct Calm {
    over: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Calm {
    fn start(lab: &Lab) -> Self {
        let (over, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (ended, count, socket) = (Arc::clone(&over), Arc::clone(&served), lab.world.path("agent.sock"));
        let (first, others, is_everybodys) = (lab.next_id.get() << 64, lab.others, lab.is_everybodys);
        let task = lab.runtime.spawn(async move {
            let mut client = connect(socket).await?;
            for id in first.. {
                match sign(&mut client, request("calm", id, &[7; 32]), others).await {
                    Ok(_) => {
                        count.fetch_add(1, Ordering::Relaxed);
                        if ended.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                    }
                    Err(status) if is_everybodys && status.code() == Code::Unavailable => {}
                    Err(status) => return Err(status.into()),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        });
        Self { over, served, task }
    }

    fn end(self, lab: &Lab) -> anyhow::Result<usize> {
        self.over.store(true, Ordering::Relaxed);
        lab.runtime.block_on(self.task)?.context("a caller of another token")?;
        let served = self.served.load(Ordering::Relaxed);
        ensure!(served > 0, "no other caller came");
        Ok(served)
    }
}
