//! Replaces a file as a whole, or not at all, and one after the other.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

/// Writes a temporary file beside it, syncs it and renames it. On failure nothing is left, and what was there before is
/// untouched. `mode` is that of a new file.
pub(crate) fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> io::Result<()> {
    let directory = directory_of(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".omsign-").permissions(PermissionsExt::from_mode(mode));
    let mut file = builder.tempfile_in(directory).map_err(unnamed)?;
    let mut buffered = io::BufWriter::new(&mut file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    file.as_file().sync_all()?;
    // A directory that takes files need not let itself be read.
    let opened = File::open(directory);
    file.persist(path).map_err(|error| error.error)?;
    // It is in place, whatever comes of this.
    let _ = opened.and_then(|directory| directory.sync_all());
    Ok(())
}

/// Whether it could be written now: a directory may be missing, or read-only. Nobody sees the file that this makes.
pub(crate) fn check_replace(path: &Path) -> io::Result<()> {
    let directory = directory_of(path);
    tempfile::tempfile_in(directory).map(drop).map_err(unnamed)?;
    // Of a sticky one, users rename and remove only what is theirs (path_resolution(7)).
    let (Ok(found), within) = (path.symlink_metadata(), directory.metadata()?) else { return Ok(()) };
    let own = rustix::process::geteuid().as_raw();
    let theirs = own != 0 && found.uid() != own && within.uid() != own;
    if theirs && within.mode() & 0o1000 != 0 { Err(Errno::PERM.into()) } else { Ok(()) }
}

/// Without the name of a file that nobody asked for.
fn unnamed(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => Errno::NOENT.into(),
        io::ErrorKind::PermissionDenied => Errno::ACCESS.into(),
        kind => io::Error::from(kind),
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// As long as it lives, nobody else has one for files in this directory. None where that took too long.
pub(crate) fn turn(directory: &Path, patience: Duration) -> io::Result<Option<File>> {
    let directory = File::open(directory)?;
    let since = Instant::now();
    // Some file systems have no locks.
    while let Err(std::fs::TryLockError::WouldBlock) = directory.try_lock() {
        if since.elapsed() > patience {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Some(directory))
}
