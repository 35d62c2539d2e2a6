//! What stands between a program and a TPM: it answers some commands itself.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;

use crate::free_pair;
use crate::swtpm::SwTpm;

/// A proxy before a TPM. It ends when it is dropped.
pub struct TpmProxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// TPM_CC and the TPM_RC that is answered to it.
    fault: Mutex<Option<(u32, u32)>>,
    injected: AtomicUsize,
    over: AtomicBool,
}

/// Of a command and of an answer alike (TPM 2.0 Part 1, 18.2 and 18.3): tag, size, TPM_CC or TPM_RC.
const HEADER: usize = 10;

impl TpmProxy {
    /// Starts one.
    pub fn before(tpm: &SwTpm) -> anyhow::Result<Self> {
        let port = free_pair()?;
        let shared = Arc::<Shared>::default();
        // The second port is swtpm's control channel.
        for (own, theirs) in [(port, tpm.port()), (port + 1, tpm.port() + 1)] {
            let listener = TcpListener::bind(("127.0.0.1", own)).context("the proxy's port")?;
            let (shared, is_data) = (Arc::clone(&shared), own == port);
            std::thread::spawn(move || {
                for line in listener.incoming() {
                    if shared.over.load(Ordering::Relaxed) {
                        return;
                    }
                    let (Ok(line), shared) = (line, Arc::clone(&shared)) else { continue };
                    std::thread::spawn(move || {
                        // Whoever hangs up has had enough.
                        let _ = if is_data { pass(line, theirs, &shared) } else { copy(line, theirs) };
                    });
                }
            });
        }
        Ok(Self { port, shared })
    }

    /// How it is reached, in tpm2-tss's words.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// From now on this TPM_RC is all that is answered to this TPM_CC, or nothing is.
    pub fn set(&self, fault: Option<(u32, u32)>) {
        *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// How often it answered itself.
    pub fn injected(&self) -> usize {
        self.shared.injected.load(Ordering::Relaxed)
    }
}

impl Drop for TpmProxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for port in [self.port, self.port + 1] {
            let _ = TcpStream::connect(("127.0.0.1", port));
        }
    }
}

/// Commands, one after the other, and their answers.
fn pass(mut line: TcpStream, theirs: u16, shared: &Shared) -> std::io::Result<()> {
    let mut tpm = TcpStream::connect(("127.0.0.1", theirs))?;
    loop {
        let command = message(&mut line)?;
        let code = command.get(6..HEADER);
        let fault = *shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match fault.filter(|(of, _)| Some(&of.to_be_bytes()[..]) == code) {
            Some((_, answer)) => {
                shared.injected.fetch_add(1, Ordering::Relaxed);
                // TPM_ST_NO_SESSIONS, and nothing but the code: as the TPM answers errors.
                [&[0x80, 1, 0, 0, 0, 10][..], &answer.to_be_bytes()].concat()
            }
            None => {
                tpm.write_all(&command)?;
                message(&mut tpm)?
            }
        };
        line.write_all(&answer)?;
    }
}

/// A command, or an answer.
pub(crate) fn message(from: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER];
    from.read_exact(&mut message)?;
    let [_, _, a, b, c, d, ..] = message[..] else { return Err(std::io::ErrorKind::InvalidData.into()) };
    let bytes = u64::from(u32::from_be_bytes([a, b, c, d]));
    from.take(bytes.saturating_sub(message.len() as u64)).read_to_end(&mut message)?;
    Ok(message)
}

/// All that either of them sends.
fn copy(line: TcpStream, theirs: u16) -> std::io::Result<()> {
    let tpm = TcpStream::connect(("127.0.0.1", theirs))?;
    let (mut from_line, mut to_tpm) = (line.try_clone()?, tpm.try_clone()?);
    let there = std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_line, &mut to_tpm);
        to_tpm.shutdown(Shutdown::Both)
    });
    let _ = std::io::copy(&mut &tpm, &mut &line);
    line.shutdown(Shutdown::Both)?;
    there.join().expect("it does not panic")
}
