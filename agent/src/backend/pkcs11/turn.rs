//! Whose turn it is to open a token that several processes at a time would not open (`opened_in_turns` in a profile).

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::config::Profile;

/// Between two looks at whether it is ours.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits for it, so long at most: then it is tried all the same, and the module says what is wrong. It is over when what is
/// returned is dropped.
pub(super) fn wait(profile: &Profile, most: Duration) -> Option<File> {
    let named = |name: &String| match name.strip_prefix('$') {
        None => Some(PathBuf::from(name)),
        Some(rest) => match rest.split_once('/') {
            None => std::env::var_os(rest).map(PathBuf::from),
            Some((variable, below)) => Some(PathBuf::from(std::env::var_os(variable)?).join(below)),
        },
    };
    // Who may read it may lock it: that is all that use the token.
    let file = profile.opened_in_turns.iter().filter_map(named).find_map(|path| File::open(path).ok())?;
    let until = Instant::now() + most;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() && Instant::now() < until {
        std::thread::sleep(PAUSE);
    }
    Some(file)
}
