//! Replaces a file as a whole, or not at all.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Writes a temporary file beside it, syncs it and renames it. On failure nothing is left, and what was there before is
/// untouched. `mode` is that of a new file.
pub(crate) fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".omsign-").permissions(PermissionsExt::from_mode(mode));
    // Its message would name a file that nobody asked for.
    let mut file = builder.tempfile_in(directory).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => rustix::io::Errno::NOENT.into(),
        io::ErrorKind::PermissionDenied => rustix::io::Errno::ACCESS.into(),
        kind => io::Error::from(kind),
    })?;
    let mut buffered = io::BufWriter::new(&mut file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    file.as_file().sync_all()?;
    let opened = File::open(directory)?;
    file.persist(path).map_err(|error| error.error)?;
    // It is in place, whatever comes of this.
    let _ = opened.sync_all();
    Ok(())
}
