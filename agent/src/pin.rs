//! Where a PIN comes from: read in the process that owns the token, and nowhere else but in `doctor`.

use std::fs::Metadata;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use crate::config::PinSource;
use crate::secret::Pin;

/// As long as a person may take to enter a PIN on a device. Most devices wait for half a minute or less.
pub(crate) const BY_HAND: Duration = Duration::from_secs(90);

impl PinSource {
    /// Whether a person has to be there, so that nothing is opened with it again by itself.
    pub fn is_by_hand(&self) -> bool {
        matches!(self, Self::Prompt | Self::Device)
    }

    /// What an operator runs to have a token of this name opened.
    pub fn how_to_unlock(&self, token: &str) -> String {
        match self {
            Self::Prompt => format!("omsign agent unlock {token} --ask-pin"),
            Self::Device => format!("omsign agent unlock {token}, then enter it on the device"),
            _ => format!("omsign agent unlock {token}"),
        }
    }
}

/// Reads a PIN from its source. The error says what to do and never holds any part of the PIN.
pub(crate) fn read_pin(source: &PinSource) -> Result<Pin, String> {
    let empty = |what: String| format!("{what} is empty; put the PIN there");
    match source {
        PinSource::File(path) => {
            let pin = pin_file(path, only_owner_reads)?;
            pin.ok_or_else(|| empty(format!("the PIN file {}", path.display())))
        }
        PinSource::Credential(name) => {
            let directory = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
                format!(
                    "the systemd credential {name} is seen only by a service that has LoadCredential={name}:… in its unit"
                )
            })?;
            let path = Path::new(&directory).join(name);
            pin_file(&path, |_, _| Ok(()))?.ok_or_else(|| empty(format!("the systemd credential {name}")))
        }
        PinSource::Env(name) => {
            let value =
                std::env::var(name).map_err(|_| format!("the environment variable {name} is not set"))?;
            Pin::new(value).ok_or_else(|| empty(format!("the environment variable {name}")))
        }
        PinSource::Prompt => Err("it waits for its PIN: omsign agent unlock, with --ask-pin".into()),
        PinSource::Device => {
            Err("its PIN is entered on the device itself: omsign agent unlock, then enter it there".into())
        }
        PinSource::None => Err("it asks for a login, but pin = \"none\" is configured".into()),
    }
}

/// Whether a PIN source can be read, for `doctor`.
pub(crate) fn check(source: &PinSource) -> Result<(), String> {
    match source {
        PinSource::Prompt | PinSource::Device | PinSource::None => Ok(()),
        source => read_pin(source).map(drop),
    }
}

/// Refuses a PIN file that anybody but its owner, who must be us or root, can read.
fn only_owner_reads(path: &Path, metadata: &Metadata) -> Result<(), String> {
    let shown = path.display();
    let own = rustix::process::geteuid().as_raw();
    if metadata.mode() & 0o077 != 0 {
        return Err(format!("the PIN file {shown} can be read by others; run: chmod 600 {shown}"));
    }
    if metadata.uid() != own && metadata.uid() != 0 {
        return Err(format!("the PIN file {shown} belongs to another user; run: chown {own} {shown}"));
    }
    Ok(())
}

/// The PIN in a file that passes a check, without one trailing newline.
fn pin_file(path: &Path, check: fn(&Path, &Metadata) -> Result<(), String>) -> Result<Option<Pin>, String> {
    let shown = path.display();
    let fail = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::InvalidData => format!("the PIN in {shown} is not UTF-8"),
        std::io::ErrorKind::NotFound => {
            format!("the PIN file {shown} does not exist; write the PIN into it and run: chmod 600 {shown}")
        }
        _ => format!("the PIN file {shown}: {error}"),
    };
    // What is checked is what is read, whoever renames files meanwhile.
    let mut options = std::fs::OpenOptions::new();
    // A pipe would keep us waiting for somebody to write to it.
    let not_waiting = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut file = options.read(true).custom_flags(not_waiting).open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(format!("the PIN file {shown} is not a regular file"));
    }
    check(path, &metadata)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(fail)?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(Pin::new(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_trailing_newline_is_not_part_of_the_pin() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        for text in ["1234", "1234\n", "1234\r\n"] {
            std::fs::write(&path, text).expect("written");
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("set");
            assert_eq!(read_pin(&PinSource::File(path.clone())).expect(text).expose(), "1234");
        }
        std::fs::write(&path, " 12\n34 \n\n").expect("written");
        assert_eq!(read_pin(&PinSource::File(path.clone())).expect("read").expose(), " 12\n34 \n");
        std::fs::write(&path, "\n").expect("written");
        assert!(read_pin(&PinSource::File(path)).expect_err("empty").contains("is empty"));
    }

    #[test]
    fn a_pin_file_is_a_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).expect("a pipe");
        let error = read_pin(&PinSource::File(path)).expect_err("refused, at once");
        assert!(error.contains("is not a regular file"), "{error}");
    }

    #[test]
    fn a_pin_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        std::fs::write(&path, "431276").expect("written");
        for mode in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("set");
            let error = read_pin(&PinSource::File(path.clone())).expect_err("refused");
            assert!(error.contains("chmod 600") && !error.contains("431276"), "{error}");
        }
    }
}
