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

impl Write for Ready {
    /// Takes all of a line, which comes in one piece.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let own = rustix::stdio::stderr();
        let takes = poll(&mut [PollFd::new(&own, PollFlags::OUT)], Some(&Timespec::default()));
        if takes.is_ok_and(|ready| ready == 0) {
            LOST.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        let mut stderr = io::stderr().lock();
        match LOST.swap(0, Ordering::Relaxed) {
            0 => {}
            lost => {
                writeln!(stderr, "{{\"level\":\"WARN\",\"message\":\"lines were lost\",\"lost\":{lost}}}")?
            }
        }
        stderr.write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
