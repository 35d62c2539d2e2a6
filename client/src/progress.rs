//! How far hashing is, for people: a bar on a terminal, or a line every few seconds. Never on standard output.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use omsign::hash::Progress;
use rustix::stdio::stderr;
use rustix::termios::tcgetwinsize;

use crate::cli::ShowProgress;
use crate::report::{self, size};

/// What a bar and its numbers take.
const WIDE: u16 = 80;
const BAR_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows progress until it is dropped.
pub(crate) struct Shown(Option<(Sender<()>, JoinHandle<()>)>);

impl Shown {
    pub(crate) fn start(progress: Arc<Progress>, how: Option<ShowProgress>, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let show: fn(&Progress, &dyn Fn(Duration) -> bool) = match how {
            Some(ShowProgress::Plain) => lines,
            Some(ShowProgress::Bar) => bar,
            None if terminal && !quiet => bar,
            Some(ShowProgress::None) | None => return Self(None),
        };
        let (stop, stopped) = channel();
        let wait = move |time| stopped.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        let thread =
            std::thread::Builder::new().name("progress".into()).spawn(move || show(&progress, &wait));
        // Without it, nothing is lost but the sight.
        Self(thread.ok().map(|thread| (stop, thread)))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// `wait` is true until the end.
fn bar(progress: &Progress, wait: &dyn Fn(Duration) -> bool) {
    let columns = tcgetwinsize(stderr()).map_or(0, |size| size.ws_col);
    let style = match columns {
        // What takes two lines is not taken away again.
        1..WIDE => "{percent}% {eta} left",
        _ => "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
    };
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style);
    while wait(BAR_EVERY) {
        let (hashed, total) = (progress.hashed(), progress.total());
        if total > 0 {
            bar.set_length(total);
            bar.set_position(hashed);
        }
        // What comes next, a touch perhaps, has the terminal for itself.
        if total > 0 && hashed == total {
            break;
        }
    }
    bar.finish_and_clear();
}

/// A line every few seconds, and one when all that there is is hashed.
fn lines(progress: &Progress, wait: &dyn Fn(Duration) -> bool) {
    let mut start = None;
    let mut last = Instant::now();
    loop {
        let goes_on = wait(BAR_EVERY);
        let (hashed, total) = (progress.hashed(), progress.total());
        if total == 0 {
            if last.elapsed() >= LINE_EVERY {
                last = Instant::now();
                report::say(format_args!("looking at the files"));
            }
            if goes_on {
                continue;
            }
            return;
        }
        let seconds = start.get_or_insert_with(Instant::now).elapsed().as_secs();
        if hashed == total || !goes_on {
            return report::say(format_args!("hashed {} of {} in {seconds} s", size(hashed), size(total)));
        }
        if last.elapsed() >= LINE_EVERY {
            last = Instant::now();
            let rate = (hashed / seconds.max(1)).max(1);
            let left = total.saturating_sub(hashed) / rate;
            report::say(format_args!(
                "hashed {} of {}, {}/s, {left} s left",
                size(hashed),
                size(total),
                size(rate)
            ));
        }
    }
}
