//! What was decided: one JSON line per decision in `audit.jsonl`, durable before a signature is released.
//! When a line cannot be written there are no signatures.

mod file;

use std::io::ErrorKind;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use self::file::AuditFile;
use crate::config::{self, Durability};
use crate::identity::Identity;

/// How many lines may wait to be written.
const BACKLOG: usize = 4096;

/// A line waits for others a quarter of the time for which their device is busy, and no longer than this. Each fsync has
/// a cost on the CPU and wakes whoever waits for it, so the fewer there are, the less they are in the way of the device.
const GATHER: Duration = Duration::from_millis(4);

/// What does not wait for so long does not wait: to sleep for less takes as long.
const SHORTEST: Duration = Duration::from_micros(50);

/// The agent's file.
pub const FILE: &str = "audit.jsonl";

/// Whoever has this one locked, beside it, owns the devices: the other may be moved away at any time, by those who rotate logs.
const LOCK: &str = "audit.lock";

/// The least time that the log gets.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// One decision.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    /// When the decision was made: RFC 3339, UTC, with microseconds.
    pub time: String,
    /// What it is about: `sign`, `look` (at a key, when denied), `lock`, `unlock`, `unblock`, what `omsign-agent key`
    /// does (`generate`, `csr` and so on), or tried to (`operate`, when denied), `reload`, or the log itself: `audit`.
    pub action: &'static str,
    /// The caller's request id, hexadecimal.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub request_id: &'a str,
    /// Who asked.
    pub identity: &'a Identity,
    /// The rule that allowed it; none when it was denied.
    pub rule: Option<&'a str>,
    /// The key, or the token to lock, unlock or unblock.
    pub key: &'a str,
    /// Which of the key's tokens signed, or failed.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub token: &'a str,
    /// How the key signs.
    pub algorithm: Option<&'a str>,
    /// The key that signed: SHA-256 of its SubjectPublicKeyInfo, hexadecimal. Another one may have its name tomorrow.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub key_sha256: &'a str,
    /// What was signed, hexadecimal.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub digest: &'a str,
    /// What the caller says it is. Not verified.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub claimed_context: &'a str,
    /// `signed`, `locked`, `unlocked`, `begun`, `done`, `denied`, `failed`, or, of the log, `resumed`.
    pub outcome: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: &'a str,
    /// How many before it, of the same caller and for the same reason, came too fast to be recorded each.
    #[serde(skip_serializing_if = "is_zero")]
    pub unrecorded: u64,
    /// How long the device is busy with what others asked for: before that, more lines come. Not recorded.
    #[serde(skip)]
    pub busy: Duration,
}

impl<'a> Entry<'a> {
    /// Of what somebody did to no key.
    pub(crate) fn about(identity: &'a Identity) -> Self {
        Self {
            time: now(),
            action: "",
            request_id: "",
            identity,
            rule: None,
            key: "",
            token: "",
            algorithm: None,
            key_sha256: "",
            digest: "",
            claimed_context: "",
            outcome: "",
            reason: "",
            unrecorded: 0,
            busy: Duration::ZERO,
        }
    }
}

/// The audit log cannot be written: nothing may be released. Trying again helps once the disk has space.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the audit log cannot be written: {0}")]
pub struct AuditError(String);

struct Line {
    text: Vec<u8>,
    /// How long it may wait for others, from when it is seen on.
    may_wait: Duration,
    durable: oneshot::Sender<Result<(), AuditError>>,
}

/// The log, shared by all requests.
pub struct Audit {
    writer: Writer,
    failing: watch::Sender<bool>,
}

/// How lines get into the file.
enum Writer {
    /// By a thread that syncs: one fsync for all lines that wait.
    Thread {
        lines: mpsc::Sender<Line>,
        /// Woken for lines that do not wait.
        thread: JoinHandle<()>,
    },
    /// At once, into the page cache: a thread would cost more than the write.
    Direct(Mutex<AuditFile>),
}

impl Audit {
    /// Opens the agent's log, which belongs to one process at a time.
    pub fn open(config: &config::Audit) -> std::io::Result<Self> {
        Self::open_file(config, FILE, Some(LOCK))
    }

    /// Opens a log for one who owns no agent's devices: that of the day, or one beside it while another process has that.
    pub fn open_own(config: &config::Audit) -> std::io::Result<Self> {
        let day = now().chars().take_while(|character| *character != 'T').collect::<String>();
        let mut number = 1;
        loop {
            let more = if number == 1 { String::new() } else { format!("-{number}") };
            let name = format!("one-shot-{day}{more}.jsonl");
            match Self::open_file(config, &name, Some(&name)) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => number += 1,
                opened => return opened,
            }
        }
    }

    /// Opens a file, and starts its writing thread.
    fn open_file(config: &config::Audit, name: &str, lock: Option<&str>) -> std::io::Result<Self> {
        let mut file = AuditFile::open(&config.directory, name, lock, config.durability)?;
        let failing = watch::Sender::new(false);
        if config.durability == Durability::Os {
            return Ok(Self { writer: Writer::Direct(Mutex::new(file)), failing });
        }
        let (lines, mut waiting) = mpsc::channel::<Line>(BACKLOG);
        let state = failing.clone();
        let write = move || {
            let (mut batch, mut text) = (Vec::new(), Vec::new());
            // One write and one fsync for everything that waits at this moment; what comes meanwhile shares the next.
            while waiting.blocking_recv_many(&mut batch, BACKLOG) > 0 {
                gather(&mut batch, &mut waiting);
                text.clear();
                batch.iter().for_each(|line| text.extend_from_slice(&line.text));
                let written = append(&mut file, &text, &state);
                for line in batch.drain(..) {
                    // A receiver that is gone no longer waits for its signature.
                    let _ = line.durable.send(written.clone());
                }
            }
        };
        let thread = std::thread::Builder::new().name("audit".into()).spawn(write)?;
        Ok(Self { writer: Writer::Thread { lines, thread }, failing })
    }

    /// Keeps others from owning the devices for as long as the result lives. None: somebody does, or this user cannot look.
    pub fn hold(config: &config::Audit) -> Option<impl Sized + use<>> {
        AuditFile::hold(&config.directory, [LOCK, FILE])
    }

    /// Writes what waits and lets go of the file. Dropped, the log does so a little later.
    pub fn close(self) {
        if let Writer::Thread { lines, thread } = self.writer {
            drop(lines);
            // A thread that panicked has let go, too.
            let _ = thread.join();
        }
    }

    /// Writes an entry. `Ok` means that it is as durable as configured.
    pub async fn record(&self, entry: &Entry<'_>) -> Result<(), AuditError> {
        let mut text = serde_json::to_vec(entry).map_err(|error| AuditError(error.to_string()))?;
        text.push(b'\n');
        let stopped = || AuditError("its writer stopped".into());
        match &self.writer {
            Writer::Direct(file) => append(&mut *file.lock().map_err(|_| stopped())?, &text, &self.failing),
            Writer::Thread { lines, thread } => {
                let (durable, done) = oneshot::channel();
                let may_wait = (entry.busy / 4).min(GATHER);
                lines.send(Line { text, may_wait, durable }).await.map_err(|_| stopped())?;
                if may_wait < SHORTEST {
                    thread.thread().unpark();
                }
                done.await.map_err(|_| stopped())?
            }
        }
    }

    /// The same, for whoever has no deadline of their own.
    pub(crate) async fn record_soon(&self, entry: &Entry<'_>) -> Result<(), AuditError> {
        let late = |_| AuditError("it does not answer".into());
        timeout(PATIENCE, self.record(entry)).await.map_err(late)?
    }

    /// Whether the last write failed, as it changes.
    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.failing.subscribe()
    }

    /// Whether the last write failed. Tokens are then left alone until an entry gets through again.
    pub fn failing(&self) -> bool {
        *self.failing.borrow()
    }
}

/// Waits for more lines as long as all of the batch may, or until one comes that may not.
fn gather(batch: &mut Vec<Line>, waiting: &mut mpsc::Receiver<Line>) {
    let may_wait = batch.iter().map(|line| line.may_wait).min().unwrap_or_default();
    if may_wait >= SHORTEST {
        std::thread::park_timeout(may_wait);
        batch.extend(std::iter::from_fn(|| waiting.try_recv().ok()).take(BACKLOG));
    }
}

fn append(file: &mut AuditFile, text: &[u8], failing: &watch::Sender<bool>) -> Result<(), AuditError> {
    let written = file.append(text).map_err(|error| AuditError(error.to_string()));
    let changed =
        failing.send_if_modified(|failing| std::mem::replace(failing, written.is_err()) != written.is_err());
    match &written {
        Err(error) if changed => tracing::error!(%error, "nothing is signed until it can be written again"),
        Ok(()) if changed => tracing::info!("the audit log can be written again"),
        _ => {}
    }
    written
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Now, as entries give it.
pub fn now() -> String {
    humantime::format_rfc3339_micros(SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(may_wait: Duration) -> Line {
        let (durable, _) = oneshot::channel();
        Line { text: Vec::new(), may_wait, durable }
    }

    #[test]
    fn a_line_that_does_not_wait_ends_the_wait_of_others() {
        let (lines, mut waiting) = mpsc::channel(BACKLOG);
        let patient = line(Duration::from_secs(3600));
        let thread = std::thread::spawn(move || {
            let mut batch = vec![patient];
            gather(&mut batch, &mut waiting);
            batch.len()
        });
        lines.try_send(line(Duration::from_secs(3600))).expect("room");
        lines.try_send(line(Duration::ZERO)).expect("room");
        thread.thread().unpark();
        assert_eq!(thread.join().expect("no panic"), 3, "all of them in one write");
    }
}
