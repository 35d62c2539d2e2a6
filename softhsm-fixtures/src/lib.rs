//! Stand-in hardware, for trying omsign and for its tests: real tokens behind the real PKCS#11 protocol, in
//! software. Nothing here is linked into a release binary.

pub mod abrmd;
pub mod ca;
pub mod fault_proxy;
pub mod kryoptic;
pub mod model;
pub mod piv;
pub mod raw;
pub mod softhsm;
pub mod swtpm;
pub mod tpm_device;
pub mod tpm_proxy;
pub mod with;

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, bail};

/// One of this workspace's binaries or libraries, next to the running one.
pub fn built(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program's own path")?;
    // Test binaries lie one level down, in deps/.
    let found =
        own.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("{name} is not built; run: cargo build --workspace"),
    }
}

/// Writes a file that only its owner can read.
pub fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let _ = std::fs::remove_file(path);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).context("a private file")?;
    file.write_all(content).context("a private file")
}

/// Below those that the kernel gives to connections (`ip_local_port_range`): thousands of a TPM's linger in benchmarks.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// The names of the ports that this process has.
static HELD: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port that is free, and so is the next one: swtpm's control channel and the virtual reader take that too.
pub(crate) fn free_pair() -> anyhow::Result<u16> {
    let span = usize::from(PORTS.end - PORTS.start);
    let mut random = [0; 8];
    for _ in 0..1000 {
        openssl::rand::rand_bytes(&mut random).context("a random port")?;
        let port = PORTS.start + (u16::try_from(usize::from_le_bytes(random) % span)? & !1);
        // Another stand-in may not have bound its own yet. A name is nobody else's until this process ends (unix(7)).
        let name = SocketAddr::from_abstract_name(format!("omsign-fixtures-port-{port}"))?;
        let Ok(held) = UnixListener::bind_addr(&name) else { continue };
        let free = |port| std::net::TcpListener::bind(("127.0.0.1", port));
        if free(port).is_ok() && free(port + 1).is_ok() {
            HELD.lock().unwrap_or_else(PoisonError::into_inner).push(held);
            return Ok(port);
        }
    }
    bail!("no two free ports in a row")
}
