//! The PKCS#11 module in between: counts calls and injects faults.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::built;

/// A fault proxy in front of a module.
#[derive(Clone, Debug)]
pub struct FaultProxy {
    log: PathBuf,
    faults: PathBuf,
    module: PathBuf,
}

impl FaultProxy {
    /// One that keeps its log and its faults in this directory.
    pub fn create(directory: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory).context("the proxy's directory")?;
        let module = built("libomsign_fault_proxy.so")?;
        Ok(Self { log: directory.join("calls.log"), faults: directory.join("faults"), module })
    }

    /// `[token.NAME]` of an agent's configuration, with the proxy before its module.
    pub fn before(&self, section: &str) -> anyhow::Result<String> {
        let module = section.lines().find_map(|line| line.strip_prefix("module = "));
        let module = module.context("a section without a module")?;
        let own = format!("{:?}", self.module.display().to_string());
        let mut section = section.replace(module, &own);
        for (name, value) in self.environment(Path::new(module.trim_matches('"'))) {
            section += &format!("env.{name} = \"{}\"\n", value.display());
        }
        Ok(section)
    }

    /// What whoever loads it needs, with the module behind it.
    pub fn environment(&self, behind: &Path) -> [(&'static str, PathBuf); 3] {
        [
            ("OMSIGN_PROXY_MODULE", behind.to_owned()),
            ("OMSIGN_PROXY_LOG", self.log.clone()),
            ("OMSIGN_PROXY_FAULTS", self.faults.clone()),
        ]
    }

    /// How often a function was called.
    pub fn calls(&self, function: &str) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| *line == function).count()
    }

    /// How often something was injected into a call.
    pub fn injected(&self, function: &str) -> usize {
        self.calls(&format!("{function} injected"))
    }

    /// Tries of its PIN that the token may have counted: logins that it refused for the PIN's sake (CKR_PIN_…), and those
    /// of a process beyond its first.
    pub fn tries(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let processes = log.split("C_Initialize\n");
        let again =
            processes.map(|life| life.lines().filter(|line| *line == "C_Login").count().saturating_sub(1));
        again.sum::<usize>() + self.refused_pins()
    }

    /// Logins that it refused for the PIN's sake.
    pub fn refused_pins(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.starts_with("C_Login failed a")).count()
    }

    /// Sessions that were opened and not closed since a process last loaded the module.
    pub fn sessions(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let since = log.rsplit("C_Initialize\n").next().unwrap_or_default();
        let count = |function| since.lines().filter(|line| *line == function).count();
        count("C_OpenSession").saturating_sub(count("C_CloseSession"))
    }

    /// Sets the faults: lines of function, CKR in hexadecimal, delay in milliseconds or `held`, which lasts as long as
    /// its line is among them (see the module's own source).
    pub fn set(&self, faults: &str) -> anyhow::Result<()> {
        // Renamed into place: the module may read at any moment.
        let new = self.faults.with_extension("new");
        std::fs::write(&new, faults)?;
        Ok(std::fs::rename(new, &self.faults)?)
    }
}
