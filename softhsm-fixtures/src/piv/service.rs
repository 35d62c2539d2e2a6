//! The PC/SC service that a virtual card is seen through: started as systemd would, and ended.

use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::VirtualPiv;

impl VirtualPiv {
    /// Starts pcscd on our socket, as systemd would.
    pub fn start_service(&mut self) -> anyhow::Result<()> {
        self.start_service_with("readers")
    }

    /// The same with no reader: what it sees of a YubiKey that is unplugged, which is reader and card in one.
    pub fn start_service_without_readers(&mut self) -> anyhow::Result<()> {
        std::fs::create_dir_all(self.directory.join("no-readers")).context("a directory")?;
        self.start_service_with("no-readers")
    }

    fn start_service_with(&mut self, readers: &str) -> anyhow::Result<()> {
        let path = self.socket();
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).context("the service's socket")?;
        let mut shell = Command::new("setpriv");
        // What a terminal sends is for the command that uses it.
        shell.process_group(0).args(["--pdeathsig", "KILL", "sh", "-c"]);
        // Debian has it where users do not look for programs.
        shell.arg("PATH=$PATH:/usr/sbin LISTEN_PID=$$ LISTEN_FDS=1 exec pcscd -f -c \"$0\" 3<&0 0</dev/null");
        shell.arg(self.directory.join(readers));
        shell.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)));
        shell.stdout(Stdio::null()).stderr(Stdio::null());
        self.service = Some(shell.spawn().context("pcscd (apt: pcscd, vsmartcard-vpcd)")?);
        Ok(())
    }

    /// Ends the service.
    pub fn kill_service(&mut self) -> anyhow::Result<()> {
        if let Some(mut service) = self.service.take() {
            service.kill()?;
            service.wait()?;
        }
        Ok(())
    }
}
