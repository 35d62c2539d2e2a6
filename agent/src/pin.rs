//! Where a PIN comes from: read in the process that owns the token, and nowhere else but in `doctor`.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use zeroize::Zeroizing;

use crate::config::PinSource;
use crate::host::wire::{Class, Failure};
use crate::secret::Pin;

/// As long as a person may take to enter a PIN on a device. Most devices wait for half a minute or less.
pub(crate) const BY_HAND: Duration = Duration::from_secs(90);

/// No PIN is as long, in bytes, and so much is read at a time.
const LONGEST: usize = 4096;
const CHUNK: usize = 512;

/// How long a command may take to end that is told to, and how often it is looked at.
const GRACE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

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

    /// What it is that it could not be read: for an operator to mend or, where a command has to reach somebody else, what
    /// may be well again by itself. No PIN was offered.
    pub(crate) fn unread(&self, message: String) -> Failure {
        let class = if matches!(self, Self::Command(_)) { Class::Gone } else { Class::Locked };
        Failure { class, message }
    }
}

/// Reads a PIN from its source, which has this long. The error says what to do and never holds any part of the PIN.
pub(crate) fn read_pin(source: &PinSource, limit: Duration) -> Result<Pin, String> {
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
        PinSource::Command(words) => {
            let program = words.first().map(String::as_str).unwrap_or_default();
            let wrong =
                |what| format!("the PIN's command {program} {what}; run it as the agent's user to see why");
            Pin::new(printed(words, limit).map_err(wrong)?).ok_or_else(|| wrong("prints nothing".into()))
        }
        PinSource::Prompt => Err("it waits for its PIN: omsign agent unlock, with --ask-pin".into()),
        PinSource::Device => {
            Err("its PIN is entered on the device itself: omsign agent unlock, then enter it there".into())
        }
        PinSource::None => Err("it asks for a login, but pin = \"none\" is configured".into()),
    }
}

/// Whether a PIN source can be read, for `doctor`. A command is run once, when the token is opened.
pub(crate) fn check(source: &PinSource) -> Result<(), String> {
    match source {
        PinSource::Prompt | PinSource::Device | PinSource::None | PinSource::Command(_) => Ok(()),
        source => read_pin(source, Duration::ZERO).map(drop),
    }
}

/// What a command prints, without one trailing newline. What it says on standard error may hold the PIN, too, and is not
/// kept.
fn printed(words: &[String], limit: Duration) -> Result<String, String> {
    let failed = |error: io::Error| format!("cannot be run: {error}");
    let mut command = Command::new("/proc/self/exe");
    // Not of our group: what ends that at a terminal would end it before it ends the command.
    command.arg0("omsign-agent: a PIN's command").arg("pin-command").arg("--").args(words).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    // It lasts no longer than this end of a pipe, which goes with us.
    let lasts = child.stdin.take();
    let mut text = Zeroizing::new(Vec::with_capacity(LONGEST + CHUNK));
    let ended = ended(&mut child, limit, &mut text);
    drop(lasts);
    // What does not end even so is killed.
    if !matches!(wait_within(&mut child, GRACE), Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = ended.map_err(failed)?;
    if text.len() > LONGEST {
        return Err(format!("prints more than {LONGEST} bytes"));
    }
    let status = status.ok_or_else(|| format!("took longer than {} s", limit.as_secs_f64()))?;
    if !status.success() {
        return Err(format!("ended with {status}"));
    }
    let text = str::from_utf8(&text).map_err(|_| "prints what is not UTF-8")?;
    Ok(without_newline(text).to_owned())
}

/// How it ended, if it did within that time and has not printed too much.
fn ended(child: &mut Child, limit: Duration, text: &mut Vec<u8>) -> io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    let mut stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    // What it leaves behind may keep its end open.
    fcntl_setfl(&stdout, OFlags::NONBLOCK)?;
    let mut chunk = Zeroizing::new([0; CHUNK]);
    loop {
        // What it printed before it ended is there then.
        let ended = child.try_wait()?;
        while text.len() <= LONGEST {
            match stdout.read(&mut *chunk) {
                Ok(0) => break,
                Ok(length) => text.extend_from_slice(chunk.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if ended.is_some() || text.len() > LONGEST || begun.elapsed() >= limit {
            return Ok(ended);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits for its end, for so long.
fn wait_within(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        match child.try_wait()? {
            None if begun.elapsed() < limit => std::thread::sleep(PAUSE),
            ended => return Ok(ended),
        }
    }
}

/// Runs a command that prints a PIN, in a group of its own, which ends with it, or with whoever has the other end of our
/// standard input. Returns its exit status, as a shell has it.
pub fn run_command(words: &[OsString]) -> io::Result<u8> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    let mut child = command.args(arguments).process_group(0).stdin(Stdio::null()).spawn()?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let end = move || {
        let _ = kill_process_group(group, Signal::KILL);
        // It may have left its group.
        let _ = kill_process(group, Signal::KILL);
    };
    std::thread::spawn(move || {
        // Nobody writes there.
        let _ = io::stdin().read(&mut [0]);
        end();
    });
    // Until it is waited for, its number is nobody else's.
    waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
    end();
    let status = child.wait()?;
    Ok(u8::try_from(status.code().unwrap_or(128 + status.signal().unwrap_or_default())).unwrap_or(u8::MAX))
}

fn without_newline(text: &str) -> &str {
    text.strip_suffix("\r\n").or_else(|| text.strip_suffix('\n')).unwrap_or(text)
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
    let not_waiting = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = options.read(true).custom_flags(not_waiting).open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(format!("the PIN file {shown} is not a regular file"));
    }
    check(path, &metadata)?;
    let mut text = Zeroizing::new(String::new());
    file.read_to_string(&mut text).map_err(fail)?;
    Ok(Pin::new(without_newline(&text).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn read(path: &Path) -> Result<Pin, String> {
        read_pin(&PinSource::File(path.to_owned()), Duration::ZERO)
    }

    #[test]
    fn a_trailing_newline_is_not_part_of_the_pin() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        for text in ["1234", "1234\n", "1234\r\n"] {
            std::fs::write(&path, text).expect("written");
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("set");
            assert_eq!(read(&path).expect(text).expose(), "1234");
        }
        std::fs::write(&path, " 12\n34 \n\n").expect("written");
        assert_eq!(read(&path).expect("read").expose(), " 12\n34 \n");
        std::fs::write(&path, "\n").expect("written");
        assert!(read(&path).expect_err("empty").contains("is empty"));
    }

    #[test]
    fn a_pin_file_is_a_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).expect("a pipe");
        let error = read(&path).expect_err("refused, at once");
        assert!(error.contains("is not a regular file"), "{error}");
    }

    #[test]
    fn a_pin_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        std::fs::write(&path, "431276").expect("written");
        for mode in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("set");
            let error = read(&path).expect_err("refused");
            assert!(error.contains("chmod 600") && !error.contains("431276"), "{error}");
        }
    }
}
