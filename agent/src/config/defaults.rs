//! Where things are that the configuration does not say.

use std::path::PathBuf;

/// Where configurations go that nobody gave a place: `/etc/omsign` for root, `$XDG_CONFIG_HOME/omsign` for others.
pub fn own_directory() -> PathBuf {
    let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    match base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config"))) {
        Some(base) if !rustix::process::geteuid().is_root() => base.join("omsign"),
        _ => PathBuf::from("/etc/omsign"),
    }
}

/// `/run/omsign/agent.sock` for root, `$XDG_RUNTIME_DIR/omsign/agent.sock` for others.
pub fn default_socket() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if !rustix::process::geteuid().is_root() => {
            PathBuf::from(directory).join("omsign/agent.sock")
        }
        _ => PathBuf::from("/run/omsign/agent.sock"),
    }
}

/// `/var/lib/omsign/audit` for root, `$XDG_STATE_HOME/omsign/audit` (or `~/.local/state/…`) for others.
pub fn default_audit_directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/omsign/audit");
    }
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".local/state"))
    });
    state.unwrap_or_else(|| PathBuf::from(".")).join("omsign/audit")
}

/// Where systemd has a service keep its state (systemd.exec(5), STATE_DIRECTORY: several are separated by colons), or as
/// elsewhere.
pub(super) fn service_audit_directory() -> PathBuf {
    let given = std::env::var_os("STATE_DIRECTORY").and_then(|given| given.into_string().ok());
    let first = given.as_deref().and_then(|given| given.split(':').next()).filter(|first| !first.is_empty());
    first.map_or_else(default_audit_directory, |first| PathBuf::from(first).join("audit"))
}
