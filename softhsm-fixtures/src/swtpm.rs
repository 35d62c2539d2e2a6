//! A software TPM 2.0 in a directory and a process of its own.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use crate::{free_pair, write_private};

/// The authorization value of keys that have one. Long enough to be searched for in logs.
pub const AUTH: &str = "tpm-auth-3352";

/// TPM_RC_SESSION_MEMORY: there is no room for a session.
const SESSION_MEMORY: u32 = 0x903;

/// Longest wait for a TPM to start. It takes some 10 ms.
pub(crate) const START: Duration = Duration::from_secs(10);

/// A TPM. Ends when dropped; its state stays in its directory.
pub struct SwTpm {
    directory: PathBuf,
    port: u16,
    process: Option<Child>,
}

impl SwTpm {
    /// Starts one.
    pub fn create(directory: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory).context("the TPM's directory")?;
        write_private(&directory.join("user.pin"), format!("{AUTH}\n").as_bytes())?;
        // Another program may take a port between our look and swtpm's: then the next pair.
        for _ in 0..20 {
            let mut tpm = Self { directory: directory.to_owned(), port: free_pair()?, process: None };
            if tpm.start()? {
                return Ok(tpm);
            }
        }
        bail!("swtpm finds no free port")
    }

    /// Starts one that left a factory: with endorsement certificates by a maker of its own.
    pub fn manufactured(directory: &Path) -> anyhow::Result<Self> {
        let maker = directory.join("maker");
        std::fs::create_dir_all(&maker).context("the maker's directory")?;
        let path = |name: &str| maker.join(name).display().to_string();
        let authority = format!(
            "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
            maker.display(),
            path("signkey.pem"),
            path("issuercert.pem"),
            path("certserial")
        );
        std::fs::write(maker.join("localca.conf"), authority)?;
        let platform = "--platform-manufacturer Stand-in\n--platform-version 1\n--platform-model Stand-in\n";
        std::fs::write(maker.join("localca.options"), platform)?;
        let setup = format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\n\
             create_certs_tool_options = {}\nactive_pcr_banks = sha256\n",
            path("localca.conf"),
            path("localca.options")
        );
        std::fs::write(maker.join("setup.conf"), setup)?;
        let mut tool = Command::new("swtpm_setup");
        tool.args(["--tpm2", "--create-ek-cert", "--config", &path("setup.conf"), "--tpm-state"]);
        tool.arg(format!("dir://{}", directory.display())).args(["--logfile", &path("setup.log")]);
        let made = tool.output().context("swtpm_setup (apt: swtpm-tools)")?;
        ensure!(made.status.success(), "swtpm_setup: {}", String::from_utf8_lossy(&made.stdout));
        Self::create(directory)
    }

    /// The certificates of the maker of a TPM that was [`SwTpm::manufactured`], PEM.
    pub fn maker(&self) -> anyhow::Result<PathBuf> {
        let maker = self.directory.join("maker");
        let mut chain = Vec::new();
        for name in ["issuercert.pem", "swtpm-localca-rootca-cert.pem"] {
            chain.extend(std::fs::read(maker.join(name)).context(name)?);
        }
        let path = maker.join("chain.pem");
        std::fs::write(&path, chain).context("chain.pem")?;
        Ok(path)
    }

    /// Switches it on. `false`: its port is taken.
    pub fn start(&mut self) -> anyhow::Result<bool> {
        let (port, control) = (self.port, self.port + 1);
        // It must not outlive us, however we end.
        let mut command = Command::new("setpriv");
        // What a terminal sends is for the command that uses it.
        command.process_group(0).args(["--pdeathsig", "KILL", "swtpm", "socket", "--tpm2"]);
        command.arg("--tpmstate").arg(format!("dir={}", self.directory.display()));
        command.args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")]);
        command.args(["--ctrl", &format!("type=tcp,port={control},bindaddr=127.0.0.1")]);
        command.args(["--flags", "not-need-init,startup-clear"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().context("swtpm (apt: swtpm)")?;
        let started = Instant::now();
        loop {
            if process.try_wait()?.is_some() {
                return Ok(false);
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                break;
            }
            ensure!(started.elapsed() < START, "swtpm does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.process = Some(process);
        Ok(true)
    }

    /// Cuts its power. `start` switches it on again.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// What it keeps while it is off.
    pub fn state(&self) -> anyhow::Result<Vec<u8>> {
        std::fs::read(self.state_file()).context("the TPM's state")
    }

    /// Makes it what it was, while it is off.
    pub fn set_state(&self, state: &[u8]) -> anyhow::Result<()> {
        std::fs::write(self.state_file(), state).context("the TPM's state")
    }

    fn state_file(&self) -> PathBuf {
        self.directory.join("tpm2-00.permall")
    }

    /// Its process: the one that setpriv became.
    pub fn swtpm(&self) -> anyhow::Result<u32> {
        Ok(self.process.as_ref().context("the TPM is off")?.id())
    }

    /// Resets it without the start that firmware would do.
    pub fn reset(&self) -> anyhow::Result<()> {
        let control = format!("127.0.0.1:{}", self.port + 1);
        self.tool("swtpm_ioctl", |tool| {
            tool.args(["-i", "--tcp", &control]);
        })
    }

    /// How often a wrong authorization value was given since the counter was cleared.
    pub fn failed_tries(&self) -> anyhow::Result<u32> {
        let mut tool = Command::new("tpm2_getcap");
        let output = tool.arg("properties-variable").env("TPM2TOOLS_TCTI", self.tcti()).output()?;
        let text = String::from_utf8(output.stdout)?;
        let line = text.lines().find_map(|line| line.strip_prefix("TPM2_PT_LOCKOUT_COUNTER: 0x"));
        Ok(u32::from_str_radix(line.context("the lockout counter")?, 16)?)
    }

    /// How many handles it has of a kind: `transient`, `loaded-session`.
    pub fn handles(&self, kind: &str) -> anyhow::Result<usize> {
        let mut tool = Command::new("tpm2_getcap");
        let output = tool.arg(format!("handles-{kind}")).env("TPM2TOOLS_TCTI", self.tcti()).output()?;
        ensure!(output.status.success(), "tpm2_getcap: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.matches("0x").count())
    }

    /// How many keys and sessions somebody left in it.
    pub fn left(&self) -> anyhow::Result<usize> {
        Ok(self.handles("transient")? + self.handles("loaded-session")?)
    }

    /// Begins sessions, and leaves them there, until it has room for no more. How many it took.
    pub fn fill_sessions(&self) -> anyhow::Result<usize> {
        // TPM2_StartAuthSession (TPM 2.0 Part 3, 11.1): neither key nor object, a nonce, no salt, a policy session.
        let nothing = 0x4000_0007_u32.to_be_bytes();
        let mut begin = [nothing, nothing].concat();
        begin.extend([&[0, 16][..], &[7; 16], &[0, 0, 1, 0, 0x10, 0, 0x0b]].concat());
        for begun in 0..64 {
            match self.command(0x176, &begin)? {
                0 => {}
                SESSION_MEMORY => return Ok(begun),
                other => bail!("TPM2_StartAuthSession: {other:#x}"),
            }
        }
        bail!("it has room for any number of sessions")
    }

    /// Ends all sessions that there are, whoever uses them. How many there were.
    pub fn end_sessions(&self) -> anyhow::Result<usize> {
        let handles = [0x0200_0000_u32, 0x0300_0000].into_iter().flat_map(|first| first..first + 3);
        // TPM2_FlushContext (TPM 2.0 Part 3, 28.4).
        let ended = handles.map(|handle| Ok(self.command(0x165, &handle.to_be_bytes())? == 0));
        ended.collect::<anyhow::Result<Vec<_>>>().map(|ended| ended.iter().filter(|ended| **ended).count())
    }

    /// Extends a PCR of the SHA-256 bank, as any program may that measures something.
    pub fn extend(&self, register: u32) -> anyhow::Result<()> {
        // TPM2_PCR_Extend (TPM 2.0 Part 3, 22.2), with the empty value, and one digest.
        let password = [&9_u32.to_be_bytes()[..], &0x4000_0009_u32.to_be_bytes(), &[0; 5]].concat();
        let digest = [&1_u32.to_be_bytes()[..], &[0, 0x0b], &[7; 32]].concat();
        match self.send(0x8002, 0x182, &[&register.to_be_bytes()[..], &password, &digest].concat())? {
            0 => Ok(()),
            other => bail!("TPM2_PCR_Extend: {other:#x}"),
        }
    }

    /// What it answers to a command without sessions: TPM_RC.
    fn command(&self, code: u32, arguments: &[u8]) -> anyhow::Result<u32> {
        self.send(0x8001, code, arguments)
    }

    fn send(&self, tag: u16, code: u32, arguments: &[u8]) -> anyhow::Result<u32> {
        let mut line = TcpStream::connect(("127.0.0.1", self.port))?;
        let length = u32::try_from(10 + arguments.len())?;
        let command = [&tag.to_be_bytes()[..], &length.to_be_bytes(), &code.to_be_bytes(), arguments];
        line.write_all(&command.concat())?;
        let mut answer = [0; 10];
        line.read_exact(&mut answer)?;
        let [.., a, b, c, d] = answer;
        Ok(u32::from_be_bytes([a, b, c, d]))
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// How it is reached, in tpm2-tss's words.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// `[token.NAME]` of an agent's configuration.
    pub fn section(&self, name: &str) -> String {
        let (tcti, pin) = (self.tcti(), self.pin_file());
        let pin = pin.display();
        format!("\n[token.{name}]\nbackend = \"tpm\"\ntcti = \"{tcti}\"\npin = {{ file = \"{pin}\" }}\n")
    }

    /// A file with [`AUTH`].
    pub fn pin_file(&self) -> PathBuf {
        self.directory.join("user.pin")
    }

    /// Makes a persistent key on a curve (`ecc256`, `ecc384`), with an authorization value that may be guessed
    /// as often as one likes. Its public half is left in `NAME.pub.pem`.
    pub fn persistent_key(
        &self,
        name: &str,
        curve: &str,
        handle: u32,
        auth: &str,
    ) -> anyhow::Result<PathBuf> {
        self.make(name, curve, handle, auth, "|noda")
    }

    /// Makes a persistent P-256 key that the TPM guards against guessing.
    pub fn guarded_key(&self, name: &str, handle: u32, auth: &str) -> anyhow::Result<PathBuf> {
        self.make(name, "ecc256", handle, auth, "")
    }

    fn make(&self, name: &str, curve: &str, handle: u32, auth: &str, more: &str) -> anyhow::Result<PathBuf> {
        let file = |extension: &str| self.directory.join(format!("{name}.{extension}"));
        let public = file("pub.pem");
        let attributes = format!("fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign{more}");
        self.step("tpm2_createprimary", |tool| {
            tool.args(["-C", "o", "-G", "ecc", "-c"]).arg(file("primary"));
        })?;
        self.step("tpm2_create", |tool| {
            tool.args(["-G", curve, "-a", &attributes, "-p", auth, "-C"]).arg(file("primary"));
            tool.arg("-u").arg(file("public")).arg("-r").arg(file("private"));
        })?;
        self.keep(name, handle)?;
        self.step("tpm2_readpublic", |tool| {
            tool.arg("-c").arg(file("context")).args(["-f", "pem", "-o"]).arg(&public);
        })?;
        Ok(public)
    }

    /// Loads a key that was made before, below the primary key that is always the same, and keeps it.
    fn keep(&self, name: &str, handle: u32) -> anyhow::Result<()> {
        let file = |extension: &str| self.directory.join(format!("{name}.{extension}"));
        self.step("tpm2_load", |tool| {
            tool.arg("-C").arg(file("primary")).arg("-u").arg(file("public"));
            tool.arg("-r").arg(file("private")).arg("-c").arg(file("context"));
        })?;
        self.step("tpm2_evictcontrol", |tool| {
            tool.args(["-Q", "-C", "o", "-c"]).arg(file("context")).arg(format!("{handle:#x}"));
        })
    }

    /// Puts a key back that was made here, and that the TPM lost.
    pub fn put_back(&self, name: &str, handle: u32) -> anyhow::Result<()> {
        self.step("tpm2_createprimary", |tool| {
            tool.args(["-Q", "-C", "o", "-G", "ecc", "-c"])
                .arg(self.directory.join(format!("{name}.primary")));
        })?;
        self.keep(name, handle)
    }

    /// Makes a wrapped key file, as users do: with OpenSSL's tpm2 provider. The algorithm and its option are in
    /// OpenSSL's words: `EC group:P-384`, `RSA bits:2048`.
    pub fn key_file(&self, name: &str, algorithm: &str, option: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let (key, public) =
            (self.directory.join(format!("{name}.pem")), self.directory.join(format!("{name}.pub.pem")));
        let provider = ["-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2"];
        self.tool("openssl", |tool| {
            tool.arg("genpkey").args(provider).args(["-algorithm", algorithm, "-pkeyopt", option, "-out"]);
            tool.arg(&key);
        })?;
        self.tool("openssl", |tool| {
            tool.arg("pkey").args(provider).arg("-in").arg(&key).args(["-pubout", "-out"]).arg(&public);
        })?;
        Ok((key, public))
    }

    /// Runs a tool, and then clears the TPM's three places for keys: without a resource manager the tools leave
    /// theirs there.
    fn step(&self, name: &str, arguments: impl FnOnce(&mut Command)) -> anyhow::Result<()> {
        self.tool(name, arguments)?;
        self.tool("tpm2_flushcontext", |tool| {
            tool.arg("-t");
        })
    }

    /// Runs a tool with this TPM.
    pub fn tool(&self, name: &str, arguments: impl FnOnce(&mut Command)) -> anyhow::Result<()> {
        let mut tool = Command::new(name);
        arguments(&mut tool);
        tool.env("TPM2TOOLS_TCTI", self.tcti()).env("TPM2OPENSSL_TCTI", self.tcti());
        let output = tool.output().with_context(|| format!("{name} (apt: tpm2-tools, tpm2-openssl)"))?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for SwTpm {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
