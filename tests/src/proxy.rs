//! The PKCS#11 module in between: counts calls and injects faults.

use std::path::PathBuf;

use omsign_fixtures::built;
use omsign_fixtures::softhsm::{MODULE, SoftHsm};

use crate::world::World;

/// A fault proxy in front of a module.
#[derive(Clone)]
pub struct Proxy {
    log: PathBuf,
    faults: PathBuf,
    module: PathBuf,
}

impl Proxy {
    /// Makes one.
    pub fn new(world: &World) -> anyhow::Result<Self> {
        let module = built("libomsign_fault_proxy.so")?;
        Ok(Self { log: world.path("calls.log"), faults: world.path("faults"), module })
    }

    /// `[token.NAME]` for a SoftHSM token behind the proxy.
    pub fn token_section(&self, name: &str, token: &SoftHsm, more: &str) -> String {
        self.before(MODULE, &crate::world::token_section(name, token, more))
    }

    /// A token's section, with the proxy before its module.
    pub fn before(&self, module: &str, section: &str) -> String {
        let section = section.replace(module, &self.module.display().to_string());
        format!(
            "{section}env.OMSIGN_PROXY_MODULE = \"{module}\"\nenv.OMSIGN_PROXY_LOG = \"{}\"\nenv.OMSIGN_PROXY_FAULTS = \"{}\"\n",
            self.log.display(),
            self.faults.display()
        )
    }

    /// How often a function was called.
    pub fn calls(&self, function: &str) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| *line == function).count()
    }

    /// Sessions that were opened and not closed since a process last loaded the module.
    pub fn sessions(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let since = log.rsplit("C_Initialize\n").next().unwrap_or_default();
        let count = |function| since.lines().filter(|line| *line == function).count();
        count("C_OpenSession").saturating_sub(count("C_CloseSession"))
    }

    /// Sets the faults: lines of function, CKR in hexadecimal, delay in milliseconds.
    pub fn set(&self, faults: &str) -> anyhow::Result<()> {
        // Renamed into place: the module may read at any moment.
        let new = self.faults.with_extension("new");
        std::fs::write(&new, faults)?;
        Ok(std::fs::rename(new, &self.faults)?)
    }
}
