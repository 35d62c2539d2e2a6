//! What an error of the card, or of PC/SC, means for the one who asked: decided here, once.

use yubikey::Error;

use crate::host::wire::{Class, Failure};

/// Programs that are known to keep a card to themselves, by the name of their process.
const HOLDERS: [&str; 4] = ["scdaemon", "ykman", "yubico-authenticator", "yubikey-agent"];

/// What every card goes through, and what waits for it.
const OURS: [&str; 2] = ["pcscd", "omsign-agent"];

/// What to do then.
pub(super) const PIN_BLOCKED: &str =
    "its PIN is blocked; unblock it with the PUK: omsign-agent unblock, or ykman piv access unblock-pin";

/// Of cards without GET METADATA.
pub(super) const TELLS_NOTHING: &str = "its firmware is older than 5.3 and does not tell what its slots hold";

/// The class of a failure to do `what`.
pub(super) fn classify(what: &str, error: &Error) -> Failure {
    let (class, why) = match error {
        Error::WrongPin { tries: 0 } | Error::PinLocked => (Class::Locked, PIN_BLOCKED.to_owned()),
        Error::WrongPin { tries } => (Class::Locked, format!("it refused the PIN; {}", tries_left(*tries))),
        Error::SizeError
        | Error::ParseError
        | Error::NotSupported
        | Error::NotFound
        | Error::AlgorithmError
        | Error::KeyError => (Class::Refused, error.to_string()),
        Error::AuthenticationError => {
            (Class::Refused, "the key asks for the PIN, which it did not get".to_owned())
        }
        Error::PcscError { inner: Some(inner) } => (Class::Gone, unserved(*inner)),
        error => (Class::Gone, error.to_string()),
    };
    Failure { class, message: format!("cannot {what}: {why}") }
}

/// What PC/SC says, and what to do where it serves nobody, or not us.
fn unserved(error: pcsc::Error) -> String {
    match error {
        pcsc::Error::NoService | pcsc::Error::ServiceStopped => {
            "the PC/SC service does not run; install pcscd, then `systemctl start pcscd.socket`".into()
        }
        pcsc::Error::SecurityViolation => {
            "the PC/SC service does not serve this user; let it in with a rule of polkit, as in hsm-config/yubikey.toml".into()
        }
        error => error.to_string(),
    }
}

/// Who probably holds it: `: scdaemon (process 1234)`, or nothing. Those that are known to do so first, then all that have
/// loaded what talks to cards.
pub(crate) fn holder() -> String {
    let (mut known, mut others) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let comm = comm.trim();
        // The kernel keeps fifteen bytes of a name.
        let holder = HOLDERS.iter().find(|holder| holder.get(..15).unwrap_or(holder) == comm);
        // One that runs for something else has not loaded it. Another user's may not be looked into.
        let uses_cards =
            std::fs::read_to_string(entry.path().join("maps")).map(|maps| maps.contains("libpcsclite"));
        let process = entry.file_name();
        match (holder, uses_cards) {
            (Some(holder), Ok(true) | Err(_)) => {
                known.push(format!("{holder} (process {})", process.display()))
            }
            (None, Ok(true)) if !OURS.contains(&comm) => {
                others.push(format!("{comm} (process {})", process.display()));
            }
            _ => {}
        }
    }
    known.append(&mut others);
    if known.is_empty() { String::new() } else { format!(": {}", known.join(", ")) }
}

/// Why the PC/SC service may see no reader at all: GnuPG's daemon takes it over USB, where it is not told to leave that.
pub(super) fn hidden() -> &'static str {
    let is_scdaemon = |entry: std::fs::DirEntry| {
        std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == "scdaemon")
    };
    match std::fs::read_dir("/proc").into_iter().flatten().flatten().any(is_scdaemon) {
        true => {
            "; scdaemon (GnuPG) runs, and may have the reader to itself: `disable-ccid` in scdaemon.conf, then `gpgconf --kill scdaemon`"
        }
        false => "",
    }
}

/// `1 try is left`, `2 tries are left`.
pub(super) fn tries_left(tries: u8) -> String {
    if tries == 1 { "1 try is left".to_owned() } else { format!("{tries} tries are left") }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_program_that_uses_no_cards_holds_none() {
        let directory = std::env::temp_dir().join(format!("omsign-holder-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("a directory");
        let program = directory.join("ykman");
        std::fs::copy("/bin/sleep", &program).expect("a copy");
        let mut ykman = Command::new(&program).arg("60").spawn().expect("it starts");
        let named = holder();
        ykman.kill().and_then(|()| ykman.wait()).expect("it ends");
        std::fs::remove_dir_all(directory).expect("the directory");
        assert!(!named.contains(&format!("(process {})", ykman.id())), "{named}");
    }

    #[test]
    fn a_program_that_nobody_knows_is_named_if_it_uses_cards() {
        let uses = "import ctypes\nctypes.CDLL('libpcsclite.so.1')\nprint(flush=True)\ninput()";
        let mut program = Command::new("python3");
        program.args(["-c", uses]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = program.spawn().expect("it starts");
        let loaded = program.stdout.as_mut().expect("its output").read(&mut [0]).expect("it has loaded it");
        let named = holder();
        program.kill().and_then(|()| program.wait()).expect("it ends");
        assert!(loaded == 1 && named.contains(&format!("(process {})", program.id())), "{named}");
    }
}
