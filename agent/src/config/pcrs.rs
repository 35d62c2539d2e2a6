//! `pcrs = "sha256:0,7"`: the Platform Configuration Registers that have to be as they were when a TPM's key was made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Registers of one bank (TPM 2.0 Part 1, 17).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pcrs {
    /// The bank's hash.
    pub bank: Bank,
    /// Their numbers, in order, none twice. Never empty.
    pub registers: Vec<u8>,
}

/// A bank of registers, by its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bank {
    /// `sha256`
    Sha256,
    /// `sha384`
    Sha384,
}

/// Why a text does not name registers.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no PCRs; write a bank, sha256 or sha384, and registers from 0 to 23, like \"sha256:0,7\""
)]
pub struct PcrsError(String);

impl FromStr for Pcrs {
    type Err = PcrsError;

    fn from_str(text: &str) -> Result<Self, PcrsError> {
        let wrong = || PcrsError(text.to_owned());
        let (bank, registers) = text.split_once(':').ok_or_else(wrong)?;
        let bank = match bank {
            "sha256" => Bank::Sha256,
            "sha384" => Bank::Sha384,
            _ => return Err(wrong()),
        };
        let registers = registers.split(',').map(|number| number.trim().parse().ok().filter(|n| *n <= 23));
        let mut registers: Vec<u8> = registers.collect::<Option<_>>().ok_or_else(wrong)?;
        let given = registers.len();
        registers.sort_unstable();
        registers.dedup();
        if registers.len() == given { Ok(Self { bank, registers }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Pcrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.registers.iter().map(u8::to_string).collect();
        let bank = match self.bank {
            Bank::Sha256 => "sha256",
            Bank::Sha384 => "sha384",
        };
        write!(f, "{bank}:{}", numbers.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tpm2_tools_write_is_understood() {
        assert_eq!("sha256:7,0, 23".parse::<Pcrs>().expect("right").to_string(), "sha256:0,7,23");
        for wrong in
            ["", "sha256", "sha256:", "sha1:0", "sha256:24", "sha256:0,0", "sha256:-1", "sha256:0+sha384:1"]
        {
            assert!(wrong.parse::<Pcrs>().is_err(), "{wrong}");
        }
    }
}
