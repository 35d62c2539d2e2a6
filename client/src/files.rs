//! Files of keys, certificates and policies: small, and each read once, so that what was checked of one is what is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Lists of revoked certificates have tens of megabytes. What has more may have no end.
const LARGEST_BYTES: u64 = 256 << 20;

/// Contents of files, as they were when they were first asked for.
#[derive(Default)]
pub struct Files(BTreeMap<PathBuf, Vec<u8>>);

impl Files {
    pub(crate) fn read(&mut self, path: &Path) -> io::Result<&[u8]> {
        if !self.0.contains_key(path) {
            self.0.insert(path.to_owned(), read(path)?);
        }
        Ok(self.0.get(path).map_or(&[], Vec::as_slice))
    }
}

/// A file's content. It may be a pipe.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    // All at once: a private key must not be left in a buffer that became too small.
    let expected = file.metadata()?.len().min(LARGEST_BYTES);
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or_default() + 1);
    file.take(LARGEST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST_BYTES {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    Ok(bytes)
}
