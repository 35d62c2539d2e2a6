//! Where things are that the configuration does not say.

use std::path::PathBuf;

use nix::unistd::{Uid, User};

/// Where configurations go that nobody gave a place: `/etc/omsign` for root, `$XDG_CONFIG_HOME/omsign` for others.
pub fn own_directory() -> PathBuf {
    user_directory("XDG_CONFIG_HOME", ".config")
        .map_or_else(|| PathBuf::from("/etc/omsign"), |base| base.join("omsign"))
}

/// `/run/omsign/agent.sock` for root, `$XDG_RUNTIME_DIR/omsign/agent.sock` for others.
pub fn default_socket() -> PathBuf {
    let own = directory_in("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
    own.unwrap_or_else(|| PathBuf::from("/run")).join("omsign/agent.sock")
}

/// `/var/lib/omsign/audit` for root, `$XDG_STATE_HOME/omsign/audit` (or `~/.local/state/…`) for others.
pub fn default_audit_directory() -> PathBuf {
    let own = user_directory("XDG_STATE_HOME", ".local/state");
    own.unwrap_or_else(|| PathBuf::from("/var/lib")).join("omsign/audit")
}

/// A directory of a user who is not root: what a variable says, or below their home.
fn user_directory(variable: &str, below_home: &str) -> Option<PathBuf> {
    let user = rustix::process::geteuid();
    if user.is_root() {
        return None;
    }
    directory_in(variable).or_else(|| {
        let home = directory_in("HOME");
        let known = || User::from_uid(Uid::from_raw(user.as_raw())).ok().flatten().map(|user| user.dir);
        home.or_else(known).map(|home| home.join(below_home))
    })
}

/// What a variable says, unless that is relative, and so nothing (XDG Base Directory Specification).
fn directory_in(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|directory| directory.is_absolute())
}

/// Where systemd has a service keep its state (systemd.exec(5), STATE_DIRECTORY: several are separated by colons), or as
/// elsewhere.
pub(super) fn service_audit_directory() -> PathBuf {
    let given = std::env::var_os("STATE_DIRECTORY").and_then(|given| given.into_string().ok());
    let first = given.as_deref().and_then(|given| given.split(':').next()).filter(|first| !first.is_empty());
    first.map_or_else(default_audit_directory, |first| PathBuf::from(first).join("audit"))
}
