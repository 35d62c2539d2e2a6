//! The file behind the log: whole lines or nothing.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::config::Durability;

pub(super) struct AuditFile {
    file: File,
    durability: Durability,
    /// Set by a failed fsync: the kernel may have dropped the pages, so what the file holds is unknown.
    lost: Option<String>,
    /// Part of a line could not be taken back.
    torn: bool,
}

impl AuditFile {
    /// Opens `directory/name`, which belongs to one process at a time.
    pub(super) fn open(directory: &Path, name: &str, durability: Durability) -> io::Result<Self> {
        let with_path = |error: io::Error, path: &Path| {
            io::Error::new(error.kind(), format!("audit log {}: {error}", path.display()))
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| with_path(error, directory))?;
        let path = directory.join(name);
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| with_path(error, &path))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => with_path(
                io::Error::other("an agent, or an operator's command, is running and owns the devices"),
                &path,
            ),
            TryLockError::Error(error) => with_path(error, &path),
        })?;
        // The directory entry has to survive a power cut as well as the lines do.
        File::open(directory)?.sync_all()?;
        let mut file = Self { file, durability, lost: None, torn: false };
        file.finish_torn_line()?;
        Ok(file)
    }

    /// Whether a process holds `directory/name`, or whether that cannot be told.
    pub(super) fn is_held(directory: &Path, name: &str) -> bool {
        match File::open(directory.join(name)) {
            Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// A crash can leave half a line. Its signature was never released; the line is kept, ended.
    fn finish_torn_line(&mut self) -> io::Result<()> {
        if self.file.metadata()?.len() == 0 {
            return Ok(());
        }
        let mut last = [0];
        self.file.seek(SeekFrom::End(-1))?;
        self.file.read_exact(&mut last)?;
        if last != *b"\n" {
            tracing::warn!("the audit log ended in the middle of a line, as after a crash; the line is kept");
            self.append(b"\n")?;
        }
        Ok(())
    }

    /// Appends whole lines. On failure none of them are in the file, unless it cannot be cut: then some are that were not
    /// released, the last of them perhaps in part, which is ended before the next.
    pub(super) fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if let Some(reason) = &self.lost {
            return Err(io::Error::other(format!("fsync failed before ({reason}); restart the agent")));
        }
        let ended = if self.torn { [b"\n", text].concat() } else { Vec::new() };
        let text = if self.torn { &ended[..] } else { text };
        let mut rest = text;
        while !rest.is_empty() {
            let failed = match self.file.write(rest) {
                Ok(written) if written > 0 => {
                    rest = rest.get(written..).unwrap_or_default();
                    continue;
                }
                Ok(_) => io::ErrorKind::WriteZero.into(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            let written = u64::try_from(text.len() - rest.len()).unwrap_or(0);
            let cut =
                self.file.metadata().and_then(|file| self.file.set_len(file.len().saturating_sub(written)));
            self.torn |= written > 0 && cut.is_err();
            return Err(failed);
        }
        self.torn = false;
        if self.durability == Durability::Fsync
            && let Err(error) = self.file.sync_data()
        {
            self.lost = Some(error.to_string());
            return Err(error);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_kept_and_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("audit.jsonl");
        std::fs::write(&path, b"{\"whole\":1}\n{\"torn").expect("written");
        let mut file = AuditFile::open(directory.path(), "audit.jsonl", Durability::Fsync).expect("opened");
        file.append(b"{\"next\":1}\n").expect("appended");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "{\"whole\":1}\n{\"torn\n{\"next\":1}\n");
    }

    /// As where the log may only be appended to (chattr +a).
    #[test]
    fn a_line_that_cannot_be_taken_back_is_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("audit.jsonl");
        let mut file = AuditFile::open(directory.path(), "audit.jsonl", Durability::Os).expect("opened");
        std::fs::write(&path, b"{\"torn").expect("written");
        file.torn = true;
        file.append(b"{\"next\":1}\n").expect("appended");
        file.append(b"{\"last\":1}\n").expect("appended");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "{\"torn\n{\"next\":1}\n{\"last\":1}\n");
    }

    #[test]
    fn after_a_failed_fsync_nothing_is_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut file = AuditFile::open(directory.path(), "audit.jsonl", Durability::Fsync).expect("opened");
        file.lost = Some("input/output error".into());
        let error = file.append(b"{}\n").expect_err("refused");
        assert!(error.to_string().contains("restart the agent"));
        assert_eq!(std::fs::read(directory.path().join("audit.jsonl")).expect("read"), b"");
    }
}
