//! Stand-ins for the time of one command: each with a key and its certificate, and one configuration for all.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::str::FromStr;

use anyhow::{Context as _, ensure};
use openssl::pkey::PKey;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use crate::built;
use crate::ca::{Ca, write_chain};
use crate::fault_proxy::FaultProxy;
use crate::kryoptic::Kryoptic;
use crate::piv::VirtualPiv;
use crate::softhsm::{KeyType, MODULE, Objects, SoftHsm};
use crate::swtpm::{AUTH, SwTpm};

/// How the directories are named that belong to one command each.
const PREFIX: &str = "omsign-fixtures-";

/// A kind of stand-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A SoftHSM token.
    SoftHsm,
    /// A kryoptic token.
    Kryoptic,
    /// A software TPM.
    SwTpm,
    /// A virtual YubiKey.
    Piv,
    /// A SoftHSM token behind the fault proxy: `OMSIGN_PROXY_FAULTS` names the file with its faults. Where there is another
    /// SoftHSM token, `SOFTHSM2_CONF` is of that one.
    Fault,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::SoftHsm => "softhsm",
            Self::Kryoptic => "kryoptic",
            Self::SwTpm => "swtpm",
            Self::Piv => "piv",
            Self::Fault => "fault",
        }
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let all = [Self::SoftHsm, Self::Kryoptic, Self::SwTpm, Self::Piv, Self::Fault];
        all.into_iter()
            .find(|kind| kind.name() == text)
            .context("expected softhsm, kryoptic, swtpm, piv or fault")
    }
}

/// A device that runs, and what a command needs to know of it.
struct Running {
    /// `[token.NAME]`, and the key's object on it.
    token: String,
    object: String,
    public: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
    /// Ends when dropped.
    device: Device,
}

enum Device {
    SwTpm(#[expect(dead_code, reason = "held, not read")] SwTpm),
    Piv(VirtualPiv),
    Files,
}

/// Starts the stand-ins, runs the command, and cleans up.
pub fn run(kinds: &[Kind], command: &[String]) -> anyhow::Result<ExitStatus> {
    let (program, arguments) = command.split_first().context("no command")?;
    let twice =
        kinds.iter().enumerate().find(|(index, kind)| kinds.iter().take(*index).any(|one| one == *kind));
    ensure!(twice.is_none(), "each stand-in is started once: name it once");
    sweep()?;
    let directory = tempfile::Builder::new().prefix(PREFIX).tempdir().context("a directory")?;
    let place = directory.path();
    // Whoever holds this lock still needs the directory.
    let (made, name) = (place.join("made"), place.join("lock"));
    let lock = File::create(&made).context("a lock")?;
    lock.lock().context("a lock")?;
    // Locked from the moment that it has its name: nobody sweeps what is just being made.
    std::fs::rename(&made, &name).context("a lock")?;
    let (root, mut running) = (Ca::create("Stand-in Root CA")?, Vec::new());
    write_chain(&place.join("root.pem"), &[&root.certificate])?;
    let uid = rustix::process::geteuid().as_raw();
    let mut config = String::from(
        "[listen]\nunix = { path = \"agent.sock\", mode = \"0600\" }\n\n[audit]\ndirectory = \"audit\"\n",
    );
    for kind in kinds {
        let name = kind.name();
        let device = start(*kind, &place.join(name)).with_context(|| name.to_owned())?;
        let public = PKey::public_key_from_pem(&std::fs::read(&device.public)?)?;
        write_chain(&place.join(format!("{name}.pem")), &[&root.code_signing(name, &public)?])?;
        if let Device::Piv(card) = &device.device {
            let own = place.join(format!("{name}.pem")).display().to_string();
            card.tool(&["-a", "import-certificate", "-s", "9c", "-i", &own])?;
            card.protect_management_key()?;
            std::fs::write(place.join("piv-attestation.pem"), card.attestation_root()?)?;
        }
        config += &device.token;
        config += &format!(
            "\n[key.{name}]\ntoken = \"{name}\"\nobject = {{ {} }}\ncertificate_chain = \"{name}.pem\"\n\
             [[key.{name}.allow]]\nunix = {{ uid = {uid} }}\n",
            device.object
        );
        running.push(device);
    }
    let file = place.join("agent.toml");
    std::fs::write(&file, config).context("agent.toml")?;
    for kind in kinds.iter().filter(|kind| matches!(kind, Kind::SoftHsm | Kind::Kryoptic | Kind::Fault)) {
        let name = kind.name();
        let mut agent = Command::new(built("omsign-agent")?);
        agent.args(["key", "import-certificate", name]).arg(place.join(format!("{name}.pem")));
        let kept = agent.arg("--config").arg(&file).output()?;
        ensure!(kept.status.success(), "{name}: {}", String::from_utf8_lossy(&kept.stderr));
    }
    // Where we are killed, it would go on without its devices.
    let mut child = Command::new("setpriv");
    child.args(["--pdeathsig", "TERM", "--", program]).args(arguments);
    child.env("OMSIGN_FIXTURES", place).env("OMSIGN_AGENT", place.join("agent.sock"));
    child.env("OMSIGN_FIXTURES_CONFIG", &file).env("OMSIGN_AGENT_CONFIG", &file);
    for (kind, device) in kinds.iter().zip(&running) {
        let other = *kind == Kind::Fault && kinds.contains(&Kind::SoftHsm);
        let own = device.environment.iter().filter(|(name, _)| !other || *name != "SOFTHSM2_CONF");
        child.envs(own.cloned());
    }
    let status = attend(child).context("setpriv (apt: util-linux)")?;
    drop(running);
    directory.close().context("cleaning up")?;
    Ok(status)
}

/// Runs the command to its end, whoever ends it: what it was given is cleaned up after it.
fn attend(command: Command) -> std::io::Result<ExitStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupted = signal(SignalKind::interrupt())?;
        let (mut ended, mut hung_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
        let mut child = tokio::process::Command::from(command).spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        loop {
            tokio::select! {
                status = child.wait() => return status,
                // A terminal sends it to the command as well, which may have better to do than to end.
                _ = interrupted.recv() => continue,
                _ = ended.recv() => {}
                _ = hung_up.recv() => {}
            }
            if let Some(pid) = pid {
                kill_process(pid, Signal::TERM)?;
            }
        }
    })
}

fn start(kind: Kind, directory: &Path) -> anyhow::Result<Running> {
    let name = kind.name();
    Ok(match kind {
        Kind::SoftHsm | Kind::Fault => {
            let token = SoftHsm::create(directory, name)?;
            token.generate(name, KeyType::P384, Objects::Pair)?;
            let mut section = token.section(name);
            let mut environment = vec![("SOFTHSM2_CONF", token.config())];
            if kind == Kind::Fault {
                let proxy = FaultProxy::create(directory)?;
                section = proxy.before(&section)?;
                environment.extend(proxy.environment(MODULE.as_ref()));
            }
            Running {
                token: section,
                object: format!("label = \"{name}\""),
                public: token.public_key(name),
                environment,
                device: Device::Files,
            }
        }
        Kind::Kryoptic => {
            let token = Kryoptic::create(directory, name)?;
            let public = token.generate(name)?;
            Running {
                token: token.section(name)?,
                object: format!("label = \"{name}\""),
                public,
                environment: vec![("KRYOPTIC_CONF", token.config())],
                device: Device::Files,
            }
        }
        Kind::SwTpm => {
            let tpm = SwTpm::create(directory)?;
            let public = tpm.persistent_key(name, "ecc256", 0x8100_0010, AUTH)?;
            Running {
                token: tpm.section(name),
                object: "handle = \"0x81000010\"".into(),
                public,
                // For tpm2-tools, tpm2-openssl and tpm2-pkcs11.
                environment: ["TPM2TOOLS_TCTI", "TPM2OPENSSL_TCTI", "TPM2_PKCS11_TCTI"]
                    .map(|name| (name, tpm.tcti().into()))
                    .into(),
                device: Device::SwTpm(tpm),
            }
        }
        Kind::Piv => {
            let card = VirtualPiv::create(directory, 11_223_344)?;
            card.change_pin()?;
            card.change_puk()?;
            let public = card.generate("9c", "ECCP256", &[])?;
            Running {
                token: card.section(name),
                object: "slot = \"9c\"".into(),
                public,
                environment: vec![("PCSCLITE_CSOCK_NAME", card.socket())],
                device: Device::Piv(card),
            }
        }
    })
}

/// Removes what a killed command left: the devices ended with it, their files did not.
fn sweep() -> anyhow::Result<()> {
    for entry in std::fs::read_dir(std::env::temp_dir())? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
            continue;
        }
        // One without a lock was made this moment; one that is locked is in use; another user's we cannot open.
        if File::open(entry.path().join("lock")).is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}
