//! `touch_command`: the operator's own way to be told that a device waits for a finger.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::config;

/// How long it may run.
const LIMIT: Duration = Duration::from_secs(30);

/// What a desktop notification needs to know. The rest of our environment is not passed on: it may hold PINs.
const ENVIRONMENT: [&str; 8] = [
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
];

/// A command to run, with the message as its last argument.
pub(super) struct TouchCommand {
    directory: PathBuf,
    words: Vec<String>,
}

impl TouchCommand {
    pub(super) fn of(token: &config::Token) -> Self {
        Self { directory: token.directory.clone(), words: token.touch_command.clone() }
    }

    /// Runs it. What becomes of it is its own affair.
    pub(super) fn run(&self, message: String) {
        let Some((program, arguments)) = self.words.split_first() else { return };
        let mut command = Command::new(program);
        command.args(arguments).arg(message).current_dir(&self.directory).env_clear();
        command.envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let program = program.clone();
        tokio::spawn(async move {
            match command.spawn() {
                Ok(mut child) => drop(timeout(LIMIT, child.wait()).await),
                Err(error) => tracing::warn!(%program, %error, "touch_command cannot be run"),
            }
        });
    }
}
