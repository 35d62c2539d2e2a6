//! A bundle on disk.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use super::{Bundle, BundleError};
use crate::replace::replace;

impl Bundle {
    /// Reads a bundle file of at most so many bytes: see [`super::LARGEST_BYTES`].
    pub fn read(path: &Path, largest: u64) -> Result<Self, BundleError> {
        let io = |source| BundleError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length > largest {
            return Err(BundleError::TooLarge(largest));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
        // It may be a pipe, or grow.
        file.take(largest.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > largest) {
            return Err(BundleError::TooLarge(largest));
        }
        Self::parse(&bytes)
    }

    /// Whether a bundle may be written here: there is nothing yet, or an older bundle. A model, a key or a device
    /// must not be replaced because of a typing mistake.
    pub fn may_replace(path: &Path) -> Result<(), BundleError> {
        let io = |source| BundleError::Read { path: path.to_owned(), source };
        let occupied = || BundleError::Occupied(path.to_owned());
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io(error)),
            Ok(found) if !found.is_file() => return Err(occupied()),
            Ok(_) => {}
        }
        // Every writer puts the media type near the start; the whole may be large.
        let mut start = Vec::new();
        let file = File::open(path).map_err(io)?;
        file.take(4096).read_to_end(&mut start).map_err(io)?;
        let start = String::from_utf8_lossy(&start);
        if start.starts_with('{') && start.contains("application/vnd.dev.sigstore.bundle") {
            return Ok(());
        }
        Err(occupied())
    }

    /// Writes the bundle as a whole, or not at all.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        let io = |source| BundleError::Write { path: path.to_owned(), source };
        replace(path, 0o644, |file| self.write_json(file)).map_err(io)
    }
}
