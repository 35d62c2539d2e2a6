//! `tcti = "…"`: how a TPM is reached. Checked here, character for character: tpm2-tss takes what it does not
//! understand for its defaults, silently.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The kernel's resource manager: the TPM can be shared with other programs.
pub const DEFAULT: &str = "device:/dev/tpmrm0";

/// The name and configuration of a TPM Command Transmission Interface, in tpm2-tss's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcti(String);

/// Why a text is not one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TctiError {
    /// None of those that are supported.
    #[error(
        "{0:?} is not supported; write \"device:/dev/tpmrm0\", \"swtpm:host=127.0.0.1,port=2321\" or \
         \"tabrmd:bus_type=system\""
    )]
    Unknown(String),
    /// The raw device.
    #[error(
        "/dev/tpm{0} has no resource manager: whoever opens it locks all others out; write \"device:/dev/tpmrm{0}\""
    )]
    Raw(u8),
    /// No path of a device.
    #[error("{0:?} is no device; write \"device:/dev/tpmrm0\"")]
    NoDevice(String),
    /// A parameter that is not known there.
    #[error("{0:?} is not a parameter of this kind; {1}")]
    Parameter(String, &'static str),
}

impl FromStr for Tcti {
    type Err = TctiError;

    fn from_str(text: &str) -> Result<Self, TctiError> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let known = match kind {
            "device" => device(rest).map(|()| true)?,
            "swtpm" => parameters(rest, "write host=… and port=…", |name, value| match name {
                "host" => !value.is_empty(),
                "port" => value.parse::<u16>().is_ok_and(|port| port > 0),
                _ => false,
            })?,
            "tabrmd" => {
                parameters(rest, "write bus_type=system or session, and bus_name=…", |name, value| {
                    match name {
                        "bus_type" => matches!(value, "system" | "session"),
                        "bus_name" => !value.is_empty(),
                        _ => false,
                    }
                })?
            }
            _ => false,
        };
        if known { Ok(Self(text.to_owned())) } else { Err(TctiError::Unknown(text.to_owned())) }
    }
}

impl Tcti {
    /// The device file, where it is one.
    pub fn device(&self) -> Option<&Path> {
        self.0.strip_prefix("device:").map(Path::new)
    }

    /// Whether this is a simulator, which only trials and tests have, reached without a resource manager.
    pub fn is_simulator(&self) -> bool {
        self.0.starts_with("swtpm:")
    }
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn device(path: &str) -> Result<(), TctiError> {
    let name = path.strip_prefix("/dev/").unwrap_or_default();
    if let Some(Ok(number)) = name.strip_prefix("tpm").map(str::parse) {
        return Err(TctiError::Raw(number));
    }
    // Whether it is there now is the token's affair: a device may come later.
    if Path::new(path).is_absolute() { Ok(()) } else { Err(TctiError::NoDevice(path.to_owned())) }
}

fn parameters(text: &str, hint: &'static str, known: impl Fn(&str, &str) -> bool) -> Result<bool, TctiError> {
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if !known(name, value) {
            return Err(TctiError::Parameter(part.to_owned(), hint));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_tpm2_tss_understands_as_written() {
        for right in
            ["swtpm:host=127.0.0.1,port=2321", "tabrmd:bus_type=session", "tabrmd:", "device:/dev/null"]
        {
            assert!(right.parse::<Tcti>().is_ok(), "{right}");
        }
        // The last of these is what tss-esapi takes for localhost:2321.
        for wrong in [
            "",
            "device:",
            "device:tpmrm0",
            "device:/dev/tpm0",
            "mssim:",
            "swtpm:port=0",
            "swtpm:path=/x.sock",
        ] {
            assert!(wrong.parse::<Tcti>().is_err(), "{wrong}");
        }
    }
}
