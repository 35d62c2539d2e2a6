//! A TPM as programs find one on a machine: a character device. The kernel's driver is a terminal here, in raw mode.

use std::fs::File;
use std::io::Write as _;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::swtpm::SwTpm;
use crate::tpm_proxy::message;

/// How often the driver looks whether it is to end.
const TURN: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A device. It is gone when it is dropped, also for those who have it open.
pub struct TpmDevice {
    path: PathBuf,
    over: Arc<AtomicBool>,
    driver: Option<JoinHandle<std::io::Result<()>>>,
}

impl TpmDevice {
    /// Puts one at this path.
    pub fn create(path: &Path, tpm: &SwTpm) -> anyhow::Result<Self> {
        let driver = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&driver)?;
        unlockpt(&driver)?;
        let name = std::ffi::OsString::from_vec(ptsname(&driver, Vec::new())?.into_bytes());
        let device = OwnedFd::from(File::options().read(true).write(true).open(&name).context("a terminal")?);
        let mut raw = tcgetattr(&device)?;
        raw.make_raw();
        tcsetattr(&device, OptionalActions::Now, &raw)?;
        std::os::unix::fs::symlink(name, path).context("the device")?;
        let (mut driver, port, over) = (File::from(driver), tpm.port(), Arc::<AtomicBool>::default());
        let ends = Arc::clone(&over);
        let serve = move || {
            // Until nobody else has it open, its other end would be gone.
            let _device = device;
            while !ends.load(Ordering::Relaxed) {
                if poll(&mut [PollFd::new(&driver, PollFlags::IN)], Some(&TURN))? == 0 {
                    continue;
                }
                let command = message(&mut driver)?;
                let mut tpm = TcpStream::connect(("127.0.0.1", port))?;
                tpm.write_all(&command)?;
                driver.write_all(&message(&mut tpm)?)?;
            }
            Ok(())
        };
        Ok(Self { path: path.to_owned(), over, driver: Some(std::thread::spawn(serve)) })
    }

    /// How it is reached, in tpm2-tss's words.
    pub fn tcti(&self) -> String {
        format!("device:{}", self.path.display())
    }
}

impl Drop for TpmDevice {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        self.over.store(true, Ordering::Relaxed);
        if let Some(driver) = self.driver.take() {
            let _ = driver.join();
        }
    }
}
