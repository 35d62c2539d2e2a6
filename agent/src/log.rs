//! Logs go to standard error: for people on a terminal, JSON lines otherwise. `OMSIGN_LOG` sets the level. What reads them may
//! stand still (a terminal with Ctrl-S, a container's log driver): nobody waits for it, and lines are lost.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use tracing_subscriber::EnvFilter;

/// Starts logging. Called once, first thing.
pub fn start() {
    // cryptoki logs an error for every mechanism that it does not know, tss-esapi what we say better, and
    // yubikey, at its lowest level, every byte to the card: PINs too.
    let quiet =
        ["cryptoki::mechanism=off", "tss_esapi=off", "yubikey=off", "h2=warn", "hyper=warn", "rustls=warn"];
    let mut filter = EnvFilter::try_from_env("OMSIGN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    for directive in quiet.iter().filter_map(|text| text.parse().ok()) {
        filter = filter.add_directive(directive);
    }
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Ready).with_target(false);
    if io::stderr().is_terminal() { builder.init() } else { builder.json().flatten_event(true).init() }
}

/// Standard error, as far as it takes a line without being waited for.
struct Ready;

/// Lines that it did not take since the last one that it took.
static LOST: AtomicU64 = AtomicU64::new(0);

/// As much is taken at once by a pipe that takes anything (pipe(7), PIPE_BUF).
const PIECE: usize = 4096;

impl Write for Ready {
    /// Takes all of a line, which comes in one piece. What becomes of it is nobody's error: who logs goes on.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        let mut put = |text: &[u8]| {
            text.chunks(PIECE).all(|piece| {
                let own = rustix::stdio::stderr();
                let ready = poll(&mut [PollFd::new(&own, PollFlags::OUT)], Some(&Timespec::default()));
                ready.is_ok_and(|ready| ready > 0) && stderr.write_all(piece).is_ok()
            })
        };
        let lost = LOST.load(Ordering::Relaxed);
        let told = || format!("{{\"level\":\"WARN\",\"message\":\"lines were lost\",\"lost\":{lost}}}\n");
        if lost > 0 && put(told().as_bytes()) {
            LOST.fetch_sub(lost, Ordering::Relaxed);
        }
        if !put(line) {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
