//! A bundle on disk.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::de::IgnoredAny;

use super::{Bundle, BundleError};
use crate::replace::{check_replace, replace};

/// What a file is that is no bundle, if that can be told: mostly another one of those that lie beside it.
fn kind(bytes: &[u8]) -> Option<String> {
    let start = bytes.trim_ascii_start();
    let label = || {
        let start = str::from_utf8(start.get(..64).unwrap_or(start)).ok()?;
        let (label, _) = start.strip_prefix("-----BEGIN ")?.split_once("-----")?;
        label.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b' ').then_some(label)
    };
    if start.is_empty() {
        return Some("it is empty".to_owned());
    }
    if let Some(label) = label() {
        return Some(format!("it holds {label} in PEM"));
    }
    if !start.starts_with(b"{") {
        return Some("it is no JSON object".to_owned());
    }
    if String::from_utf8_lossy(start.get(..64).unwrap_or(start)).contains("\"omsign_manifest\"") {
        return Some("it is a manifest; `omsign sign --manifest` signs it".to_owned());
    }
    let ends = serde_json::from_slice::<IgnoredAny>(bytes).is_err_and(|error| error.is_eof());
    ends.then(|| format!("it ends in the middle, after {} bytes", bytes.len()))
}

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
        Self::parse(&bytes).map_err(|error| match kind(&bytes) {
            Some(what) => BundleError::NoBundle { path: path.to_owned(), what },
            None => error,
        })
    }

    /// Whether a bundle may be written here: there is nothing yet, or an older bundle. A model, a key or a device
    /// must not be replaced because of a typing mistake.
    pub fn may_replace(path: &Path) -> Result<(), BundleError> {
        // Asked before anything is hashed: it may take hours, and somebody's touch.
        check_replace(path).map_err(|source| BundleError::Write { path: path.to_owned(), source })?;
        let io = |source| BundleError::Read { path: path.to_owned(), source };
        let occupied = || BundleError::Occupied(path.to_owned());
        // What it leads to would stay as it is; and hours later it may lead elsewhere.
        if path.is_symlink() {
            return Err(BundleError::Link(path.to_owned()));
        }
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io(error)),
            Ok(found) if !found.is_file() => return Err(occupied()),
            Ok(_) => {}
        }
        if Self::seems_one(path).map_err(io)? { Ok(()) } else { Err(occupied()) }
    }

    /// Whether a file begins as bundles do. Every writer puts the media type near the start; the whole may be large.
    pub(crate) fn seems_one(path: &Path) -> io::Result<bool> {
        let mut start = Vec::new();
        File::open(path)?.take(4096).read_to_end(&mut start)?;
        let start = String::from_utf8_lossy(&start);
        Ok(start.starts_with('{') && start.contains("application/vnd.dev.sigstore.bundle"))
    }

    /// Writes the bundle as a whole, or not at all.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        let io = |source| BundleError::Write { path: path.to_owned(), source };
        replace(path, 0o644, |file| self.write_json(file)).map_err(io)
    }
}
