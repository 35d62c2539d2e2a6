//! A directory with a token, keys, a CA and a configuration, and what to start in it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::ca::{Ca, write_chain, write_key};
use omsign_fixtures::fault_proxy::FaultProxy;
use omsign_fixtures::softhsm::{KeyType, Objects, SoftHsm};

use crate::agent::{Agent, eventually};

/// A directory that is removed at the end.
pub struct World {
    directory: tempfile::TempDir,
}

impl World {
    /// An empty one.
    pub fn new() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("omsign-").tempdir().context("a directory")?;
        Ok(Self { directory })
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file in it.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        std::fs::write(&path, content).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// A small model in it.
    pub fn model(&self) -> anyhow::Result<PathBuf> {
        let path = self.path("model");
        omsign_fixtures::model::create(&path, 2, 64 << 10)?;
        Ok(path)
    }

    /// A SoftHSM token named like its directory, with one key of this type and name.
    pub fn token(&self, name: &str, key: &str, key_type: KeyType) -> anyhow::Result<SoftHsm> {
        let token = SoftHsm::create(&self.path(name), name)?;
        token.generate(key, key_type, Objects::Pair)?;
        Ok(token)
    }

    /// A fault proxy, to stand before a token's module.
    pub fn proxy(&self) -> anyhow::Result<FaultProxy> {
        FaultProxy::create(&self.path("proxy"))
    }

    /// A token `a` with a P-256 key `k`, and its twin in `b`: a copy of everything it holds.
    pub fn twins(&self) -> anyhow::Result<(SoftHsm, SoftHsm)> {
        let first = self.token("a", "k", KeyType::P256)?;
        let second = self.twin_of(&first)?;
        Ok((first, second))
    }

    /// A copy `b` of everything that a token holds.
    pub fn twin_of(&self, first: &SoftHsm) -> anyhow::Result<SoftHsm> {
        let second = SoftHsm { directory: self.path("b"), label: first.label.clone() };
        ensure!(
            Command::new("cp").arg("-r").arg(&first.directory).arg(&second.directory).status()?.success()
        );
        let config = std::fs::read_to_string(second.config())?;
        let (from, to) = (first.tokens().display().to_string(), second.tokens().display().to_string());
        std::fs::write(second.config(), config.replace(&from, &to))?;
        Ok(second)
    }

    /// A TLS CA with a server and a client `ci`: `NAME-ca.pem`, `NAME-server.pem`, `NAME-client.pem` and keys.
    pub fn tls(&self, name: &str) -> anyhow::Result<()> {
        let ca = Ca::create(name)?;
        write_chain(&self.path(&format!("{name}-ca.pem")), &[&ca.certificate])?;
        for (role, (certificate, key)) in [("server", ca.server("server")?), ("client", ca.client("ci")?)] {
            write_chain(&self.path(&format!("{name}-{role}.pem")), &[&certificate])?;
            write_key(&self.path(&format!("{name}-{role}.key")), &key)?;
        }
        Ok(())
    }

    /// Runs `omsign` in it, with the agent's socket at `agent.sock`.
    pub fn omsign(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(built("omsign")?);
        command.args(arguments).current_dir(self.directory.path());
        self.without_surprises(&mut command);
        command.output().context("omsign")
    }

    /// Runs `omsign`, which must succeed; returns what it printed.
    pub fn omsign_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.omsign(arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "omsign {arguments:?}: {:?}: {errors}", output.status.code());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// What `omsign agent status` prints, whether everything is ready or not.
    pub fn status(&self) -> anyhow::Result<String> {
        let output = self.omsign(&["agent", "status"])?;
        let said = String::from_utf8(output.stdout.clone())?;
        let ready = output.status.success();
        let all = said.lines().all(|line| line.ends_with(": serving") || line.ends_with(": ready"));
        ensure!(ready == all && output.status.code() != Some(2), "{output:?}");
        Ok(said)
    }

    /// Waits until all that the agent has is ready.
    pub fn until_ready(&self) -> anyhow::Result<()> {
        eventually("readiness", || Ok(self.omsign(&["agent", "status"])?.status.success()))
    }

    /// Runs `omsign`, which must end with this status; returns its errors.
    pub fn omsign_fails(&self, status: i32, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.omsign(arguments)?;
        let errors = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(status), "omsign {arguments:?}: {:?}: {errors}", output.status);
        ensure!(!errors.contains("panicked"), "{errors}");
        Ok(errors)
    }

    /// Runs `omsign`, which has to fail with this status and these words, and to leave nothing behind.
    pub fn omsign_refuses(&self, status: i32, arguments: &[&str], expected: &[&str]) -> anyhow::Result<()> {
        let before = listing(&self.path(""))?;
        let errors = self.omsign_fails(status, arguments)?;
        for part in expected {
            ensure!(errors.contains(part), "{arguments:?}: {errors:?} does not contain {part:?}");
        }
        ensure!(errors.starts_with("error: "), "{errors}");
        if status == 1 && arguments.first() == Some(&"verify") {
            ensure!(cites(&errors), "{arguments:?}: {errors:?} does not say what it goes by");
        }
        let after = listing(&self.path(""))?;
        // What the agent keeps is not what a failing client leaves.
        let agents = self.path("audit");
        let left: Vec<_> = after.difference(&before).filter(|path| !path.starts_with(&agents)).collect();
        ensure!(left.is_empty(), "{arguments:?} left {left:?}");
        Ok(())
    }

    /// Starts an agent with a P-256 key `k` on the token `t`, and makes a model.
    pub fn agent_and_model(&self) -> anyhow::Result<Agent> {
        let token = self.token("t", "k", KeyType::P256)?;
        let config = self.listen() + &token_section("t", &token, "") + &key_section("k", "t", "k");
        self.model()?;
        Agent::start(self, &config)
    }

    /// Runs `omsign-agent doctor` on the configuration of the last agent; returns what it printed.
    pub fn doctor(&self) -> anyhow::Result<(ExitStatus, String)> {
        let mut doctor = Command::new(built("omsign-agent")?);
        self.without_surprises(&mut doctor);
        let output = doctor.args(["doctor", "--config"]).arg(self.path("agent.toml")).output()?;
        Ok((output.status, String::from_utf8(output.stdout)?))
    }

    /// Environment of everything started here: this directory's sockets and state, nobody else's.
    pub fn without_surprises(&self, command: &mut Command) {
        command.env("OMSIGN_AGENT", self.path("agent.sock"));
        command.env("XDG_STATE_HOME", self.path("state")).env("HOME", self.directory.path());
        command.env_remove("XDG_CACHE_HOME").env_remove("XDG_CONFIG_HOME").env_remove("OMSIGN_HASH_KERNEL");
        command.env_remove("OMSIGN_POLICY");
        // What fails is to be seen at once.
        command.env("OMSIGN_WAIT", "0");
        command.env_remove("OMSIGN_LOG").env_remove("RUST_BACKTRACE");
        command.stdin(std::process::Stdio::null());
    }

    /// The start of every configuration.
    pub fn listen(&self) -> String {
        "[listen]\nunix = { path = \"agent.sock\", mode = \"0600\" }\n\n[audit]\ndirectory = \"audit\"\n"
            .into()
    }

    /// The lines of the audit log.
    pub fn audit(&self) -> anyhow::Result<Vec<serde_json::Value>> {
        let text = std::fs::read_to_string(self.path("audit/audit.jsonl"))?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }
}

/// Every path below a directory.
fn listing(root: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
            found.insert(entry.path());
        }
    }
    Ok(found)
}

/// `[token.NAME]` for a SoftHSM token. `more` are further lines.
pub fn token_section(name: &str, token: &SoftHsm, more: &str) -> String {
    token.section(name) + more + "\n"
}

/// `[key.NAME]` for an object with this label.
pub fn key_section(name: &str, token: &str, object: &str) -> String {
    key(name, token, &format!("label = \"{object}\""))
}

/// `[key.NAME]` that this user may use.
pub fn key(name: &str, token: &str, object: &str) -> String {
    let uid = rustix::process::geteuid().as_raw();
    format!(
        "\n[key.{name}]\ntoken = \"{token}\"\nobject = {{ {object} }}\n\
         [[key.{name}.allow]]\nunix = {{ uid = {uid} }}\n"
    )
}

/// A file's path as text for a command line.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Whether a refusal says which section of which standard it goes by, or that it is our own limit or the user's policy.
fn cites(errors: &str) -> bool {
    let reason = errors.lines().next().unwrap_or_default();
    let standards = [
        "(OMS ",
        "(OMS, ",
        "(RFC ",
        "(NIST SP ",
        "(a limit of omsign)",
        "the trust policy",
        "the signer may sign",
    ];
    standards.iter().any(|standard| reason.contains(standard))
}
