//! Whose turn it is to open a token that several processes at a time would not open (`opened_in_turns` in a profile).

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::config::Profile;

/// The longest wait: each of those before us is done within some milliseconds, and somebody may keep it.
const LONGEST: Duration = Duration::from_secs(5);

/// Between two looks at whether it is ours.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits for it, for a while: then it is tried all the same, and the module says what is wrong. It is over when what is
/// returned is dropped.
pub(super) fn wait(profile: &Profile) -> Option<File> {
    let named = |name: &String| match name.strip_prefix('$') {
        None => Some(PathBuf::from(name)),
        Some(rest) => match rest.split_once('/') {
            None => std::env::var_os(rest).map(PathBuf::from),
            Some((variable, below)) => Some(PathBuf::from(std::env::var_os(variable)?).join(below)),
        },
    };
    // Who may read it may lock it: that is all that use the token.
    let file = profile.opened_in_turns.iter().filter_map(named).find_map(|path| File::open(path).ok())?;
    let until = Instant::now() + LONGEST;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < until => std::thread::sleep(PAUSE),
            // Some file systems have no locks.
            done => return done.ok().map(|()| file),
        }
    }
}
