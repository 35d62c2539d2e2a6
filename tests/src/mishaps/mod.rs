//! What goes wrong in the soak: everything that may happen to a token, a TPM, a card, the disk and the machine.

mod chips;
mod tokens;

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{Faults, VirtualPiv};
use omsign_fixtures::softhsm::SoftHsm;
use omsign_fixtures::swtpm::SwTpm;
use omsign_fixtures::write_private;
use openssl::pkey::{PKey, Private};
use rustix::process::Signal;

use crate::agent::{Agent, eventually, freeze, signal};
use crate::disk::{self, Filler};
use crate::random::Random;
use crate::world::World;

/// What PKCS#11 modules answer and do (PKCS#11 v3.1, 5.1), by the function that it happens in.
const MODULE: [&str; 31] = [
    "C_Sign 32 0",         // CKR_DEVICE_REMOVED
    "C_Sign 30 0",         // CKR_DEVICE_ERROR
    "C_Sign 31 0",         // CKR_DEVICE_MEMORY
    "C_Sign 2 0",          // CKR_HOST_MEMORY
    "C_Sign 5 0",          // CKR_GENERAL_ERROR
    "C_Sign 6 0",          // CKR_FUNCTION_FAILED
    "C_Sign b3 0",         // CKR_SESSION_HANDLE_INVALID
    "C_Sign 82 0",         // CKR_OBJECT_HANDLE_INVALID
    "C_Sign b0 0",         // CKR_SESSION_CLOSED
    "C_Sign e1 0",         // CKR_TOKEN_NOT_RECOGNIZED
    "C_Sign 190 0",        // CKR_CRYPTOKI_NOT_INITIALIZED
    "C_Sign 200 0",        // CKR_FUNCTION_REJECTED
    "C_Sign 80000001 0",   // what only a vendor knows
    "C_SignInit 3 0",      // CKR_SLOT_ID_INVALID
    "C_SignInit 60 0",     // CKR_KEY_HANDLE_INVALID
    "C_SignInit 90 0",     // CKR_OPERATION_ACTIVE
    "C_SignInit 101 0",    // CKR_USER_NOT_LOGGED_IN
    "C_OpenSession b1 0",  // CKR_SESSION_COUNT
    "C_GetTokenInfo e0 0", // CKR_TOKEN_NOT_PRESENT
    "C_GetSlotList none 0",
    "C_Sign 0 500",   // slow
    "C_Sign 0 60000", // hangs
    "C_Sign segv 0",
    "C_FindObjectsInit abort 0",
    "C_Initialize 0 60000", // hangs when it is opened
    "C_Login 0 60000",      // in the login, when it may have counted a try
    "C_Login 5 0",          // the same
    // Keys that ask for the PIN each time.
    "C_SignUpdate b3 0", // CKR_SESSION_HANDLE_INVALID
    "C_SignFinal 30 0",  // CKR_DEVICE_ERROR
    "C_SignFinal 0 60000",
    "C_SignFinal segv 0",
];

/// Longer than any token's time-out in the soak.
const HANG: Duration = Duration::from_millis(1500);

type Mishap = fn(&mut Mishaps, Duration) -> anyhow::Result<()>;

/// What else happens, and what it is called.
const OTHERS: [(&str, Mishap); 39] = [
    ("a process is killed", |all, _| all.one_process_gets(Signal::KILL)),
    ("a process is stopped", |all, _| all.one_process_gets(Signal::STOP)),
    ("the TPM is switched off and on", Mishaps::tpm_off),
    ("the TPM is reset", Mishaps::tpm_reset),
    ("the TPM stands still", Mishaps::tpm_still),
    ("the TPM hangs", |all, _| all.tpm_still(HANG)),
    ("the TPM hangs when it is opened", |all, _| all.kill("tpm").and_then(|()| all.tpm_still(HANG))),
    ("the TPM is switched off in the middle of a command", Mishaps::tpm_cut),
    ("the TPM is cleared", Mishaps::tpm_cleared),
    ("the TPM loses its key", Mishaps::tpm_key_deleted),
    ("the TPM is in lockout", Mishaps::tpm_lockout),
    ("the card is pulled", Mishaps::card_pulled),
    ("the card is pulled in the middle of a command", |all, pause| {
        all.card_does(pause, Faults { pull: true, ..Faults::default() })
    }),
    ("the card answers nonsense", |all, pause| {
        all.card_does(pause, Faults { status: Some(0x6f00), ..Faults::default() })
    }),
    ("the card is slow", |all, pause| {
        all.card_does(pause, Faults { delay: Duration::from_millis(300), ..Faults::default() })
    }),
    ("the card hangs", |all, _| all.card_does(HANG, Faults { delay: HANG, ..Faults::default() })),
    ("the card hangs when it is opened", |all, _| {
        all.kill("card").and_then(|()| all.card_does(HANG, Faults { delay: HANG, ..Faults::default() }))
    }),
    ("the card loses its key", Mishaps::card_key_deleted),
    ("the card is reset", Mishaps::card_reset),
    ("the card is pulled with its reader", Mishaps::card_and_reader_pulled),
    // The card is not there at once when pcscd has come back, which may be what happened before.
    ("another program uses the card", |all, _| {
        eventually("its turn", || Ok(all.card.tool(&["-a", "status"]).is_ok()))
    }),
    ("one try of the card's PIN is left", |all, pause| all.card_pin(pause, 2)),
    ("the card's PIN is blocked", |all, pause| all.card_pin(pause, 3)),
    ("pcscd ends and comes back", Mishaps::pcscd_ends),
    ("a key is deleted", Mishaps::key_deleted),
    ("a token is removed", Mishaps::token_removed),
    ("a token is initialised anew", Mishaps::token_anew),
    ("a certificate is swapped", Mishaps::certificate_swapped),
    ("a PIN is wrong", Mishaps::hsm_told_wrong),
    ("kryoptic's PIN is wrong", Mishaps::kry_told_wrong),
    ("one try of kryoptic's PIN is left", |all, pause| all.kry_pin(pause, 9)),
    ("kryoptic's PIN is blocked", |all, pause| all.kry_pin(pause, 12)),
    ("kryoptic is removed", Mishaps::kry_removed),
    ("kryoptic is initialised anew", Mishaps::kry_anew),
    ("the TPM has no room", Mishaps::tpm_full),
    ("the TPM's authorization value is wrong", Mishaps::tpm_value_wrong),
    ("the card's PIN is wrong", Mishaps::card_told_wrong),
    ("the audit log's disk is full", Mishaps::disk_full),
    ("the machine sleeps", Mishaps::machine_sleeps),
];

/// Four devices and the agent that uses them.
pub struct Mishaps {
    /// Its directory.
    pub world: World,
    /// It, with the tokens `hsm`, `kry`, `tpm` and `card`, and its audit log in the file system `disk`.
    pub agent: Agent,
    /// The token `hsm`. A certificate is all that tells of the public half of its key `hsm`.
    pub soft: SoftHsm,
    /// The token `kry`, of which one key asks for the PIN each time.
    pub kry: Kryoptic,
    /// In front of these two.
    pub proxies: [FaultProxy; 2],
    /// The token `tpm`.
    pub chip: SwTpm,
    /// The token `card`.
    pub card: VirtualPiv,
    /// Chooses.
    pub random: Random,
    /// What has not happened since all of it had.
    pub left: Vec<usize>,
    /// Odd while the disk is full.
    pub full: Arc<AtomicU64>,
    /// Wrong PINs that the card was given: by others, and by the agent when it was told a wrong one.
    pub wrong_pins: usize,
    /// Wrong PINs that the tokens `hsm` and `kry` were given by the agent, which was told them.
    pub refused: [usize; 2],
    /// Where the certificates are that the token has and is given.
    pub certificates: [PathBuf; 2],
    /// The key of the card, which whoever has it can put back.
    pub card_key: PKey<Private>,
    /// What the audit log says of signatures, so far: their requests.
    pub audited: HashSet<u128>,
}

impl Mishaps {
    /// How many there are.
    pub fn kinds() -> usize {
        MODULE.len() + OTHERS.len()
    }

    /// Has one happen, and ends it after a pause; another pause later it is over. Returns its name.
    pub fn happen(&mut self) -> anyhow::Result<&'static str> {
        let pause = Duration::from_millis(100 + self.random.below(700) as u64);
        if self.left.is_empty() {
            self.left = (0..Self::kinds()).collect();
        }
        let number = self.left.swap_remove(self.random.below(self.left.len()));
        let name = match (MODULE.get(number), OTHERS.get(number.saturating_sub(MODULE.len()))) {
            (None, Some((name, mishap))) => mishap(self, pause).with_context(|| *name).map(|()| *name)?,
            (fault, _) => self.module_does(fault.context("a fault")?, pause)?,
        };
        std::thread::sleep(pause);
        Ok(name)
    }

    /// The token processes that something may happen to, those of one token or all.
    fn hosts(&self, token: &str) -> anyhow::Result<Vec<u32>> {
        let mut hosts = self.agent.hosts()?;
        hosts.retain(|host| {
            let name = std::fs::read_to_string(format!("/proc/{host}/cmdline")).unwrap_or_default();
            let is_of = |token| name.contains(&format!("token {token}"));
            is_of(token) && !is_of("calm") && !is_of("spare")
        });
        Ok(hosts)
    }

    fn is(&self, token: &str, state: &str) -> anyhow::Result<bool> {
        let status = self.world.status()?;
        Ok(status.contains(&format!("token {token}: {state}")))
    }

    fn kill(&self, token: &str) -> anyhow::Result<()> {
        for host in self.hosts(token)? {
            // It may have ended by itself.
            let _ = signal(host, Signal::KILL);
        }
        Ok(())
    }

    fn one_process_gets(&mut self, what: Signal) -> anyhow::Result<()> {
        let hosts = self.hosts("")?;
        if let Some(host) = hosts.get(self.random.below(hosts.len().max(1))) {
            // It may have ended by itself.
            let _ = signal(*host, what);
        }
        Ok(())
    }

    /// Has a token that is open be opened with a wrong secret; one that is locked already is offered none. How often it
    /// refused that: never, when it was locked by something else meanwhile.
    fn told_wrong(&self, token: &str, file: &Path, wrong: &[u8]) -> anyhow::Result<usize> {
        if !self.is(token, "ready")? {
            return Ok(0);
        }
        let refused = || match token {
            "hsm" => self.proxies[0].refused_pins(),
            "kry" => self.proxies[1].refused_pins(),
            "card" => self.card.wrong_pins(),
            _ => 0,
        };
        let (right, before) = (std::fs::read(file)?, refused());
        write_private(file, wrong)?;
        eventually("its refusal", || {
            // It may just have been replaced, by one that had read the right one.
            if self.is(token, "ready")? {
                self.kill(token)?;
            }
            self.is(token, "locked")
        })?;
        write_private(file, &right)?;
        let times = refused() - before;
        ensure!(times <= 1, "it was offered {times} times");
        Ok(times)
    }

    fn module_does(&mut self, fault: &'static str, pause: Duration) -> anyhow::Result<&'static str> {
        let [hsm, kry] = &self.proxies;
        // Nothing is signed in parts but what asks for the PIN each time.
        let in_parts = fault.starts_with("C_SignUpdate") || fault.starts_with("C_SignFinal");
        let to_kry = in_parts || self.random.below(2) == 0;
        let (token, proxy) = if to_kry { ("kry", kry) } else { ("hsm", hsm) };
        // What fails when a token is opened fails when its process has to be replaced. A locked one has none.
        let opens = !fault.starts_with("C_Sign");
        if opens && !self.is(token, "ready")? {
            return Ok("nothing: the token is not open");
        }
        let function = fault.split(' ').next().unwrap_or_default();
        let injected = proxy.injected(function);
        proxy.set(fault)?;
        if opens {
            self.kill(token)?;
            // It is locked, and opened no more, when it was killed with a PIN on its way.
            eventually("the call that fails", || {
                Ok(proxy.injected(function) > injected || self.is(token, "locked")?)
            })?;
        }
        std::thread::sleep(pause);
        proxy.set("")?;
        Ok(fault)
    }

    fn disk_full(&mut self, pause: Duration) -> anyhow::Result<()> {
        self.full.fetch_add(1, Ordering::SeqCst);
        // Or hours of it would fill the disk for good. They are moved away as logs are, and read when the next is begun.
        let log = disk::audit(&self.world, &self.agent);
        let old = log.with_extension("1");
        std::fs::rename(&log, &old)?;
        eventually("the next log", || Ok(log.exists()))?;
        self.note_audit(&old)?;
        std::fs::remove_file(old)?;
        let filler = Filler::fill(&self.world, &self.agent)?;
        std::thread::sleep(pause);
        filler.remove()?;
        self.full.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Takes note of what a log says was signed: nothing twice.
    pub fn note_audit(&mut self, log: &Path) -> anyhow::Result<()> {
        for line in BufReader::new(File::open(log)?).lines() {
            let line: serde_json::Value = serde_json::from_str(&line?).context("a line of the audit log")?;
            if line["outcome"] == "signed" {
                let id = u128::from_str_radix(line["request_id"].as_str().unwrap_or_default(), 16)?;
                ensure!(self.audited.insert(id), "{line}: for the second time");
            }
        }
        Ok(())
    }

    fn machine_sleeps(&mut self, pause: Duration) -> anyhow::Result<()> {
        freeze(self.agent.pid())?;
        let hosts = self.agent.hosts()?;
        for host in &hosts {
            // It may have ended by itself.
            let _ = freeze(*host);
        }
        std::thread::sleep(pause);
        for process in hosts.iter().chain([&self.agent.pid()]) {
            let _ = signal(*process, Signal::CONT);
        }
        Ok(())
    }
}
