//! Digests of a model's files, in parallel, with one bounded buffer per thread.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use rayon::prelude::*;
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use crate::model::File;

/// Bytes read at a time by each thread.
const BUFFER_BYTES: usize = 512 << 10;

/// A SHA-256 digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

/// A file's digest and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// SHA-256 of its content.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Why a file has no digest.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was written to, truncated or replaced meanwhile: its digest would be of no state it ever had.
    #[error("{0} changed while it was hashed")]
    Changed(PathBuf),
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

/// Hashes files, in their order.
pub fn files(files: &[File]) -> Result<Vec<Hashed>, HashError> {
    files.par_iter().with_max_len(1).map(|file| BUFFER.with_borrow_mut(|buffer| one(file, buffer))).collect()
}

fn one(file: &File, buffer: &mut [u8]) -> Result<Hashed, HashError> {
    let read_error = |source| HashError::Read { path: file.path.clone(), source };
    // The walk has seen what it is; a link or a pipe put in its place since must not be followed or waited for.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let mut open = OpenOptions::new().read(true).custom_flags(flags).open(&file.path).map_err(read_error)?;
    let before = open.metadata().map_err(read_error)?;
    if !before.is_file() {
        return Err(HashError::Changed(file.path.clone()));
    }
    let (mut hasher, mut size) = (Sha256::new(), 0_u64);
    loop {
        let count = match open.read(buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read_error(error)),
        };
        hasher.update(buffer.get(..count).unwrap_or_default());
        size += u64::try_from(count).unwrap_or_default();
        if size > before.len() {
            break;
        }
    }
    let after = open.metadata().map_err(read_error)?;
    let stamp = |m: &std::fs::Metadata| (m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    if size != before.len() || stamp(&before) != stamp(&after) {
        return Err(HashError::Changed(file.path.clone()));
    }
    Ok(Hashed { digest: Digest(hasher.finalize().into()), size })
}

impl Digest {
    /// The digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Parses lower-case hexadecimal, which alone is canonical.
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return None;
        }
        hex::decode(text).ok()?.try_into().ok().map(Self)
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn named(path: &std::path::Path) -> File {
        File { name: "x".into(), path: path.to_owned() }
    }

    #[test]
    fn digests_of_known_content() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"abc").expect("written");
        let hashed = files(&[named(file.path())]).expect("hashed");
        // FIPS 180-4, example "abc".
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((hashed[0].digest.to_string().as_str(), hashed[0].size), (expected, 3));
        assert_eq!(Digest::from_hex(expected), Some(Digest::of(b"abc")));
        assert_eq!(Digest::from_hex(&expected.to_uppercase()), None);
    }

    #[test]
    fn a_file_that_grows_is_an_error_that_names_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(64 << 20).expect("grown");
        let path = file.path().to_owned();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut writer = std::fs::OpenOptions::new().append(true).open(&path).expect("opened");
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    writer.write_all(b"x").expect("appended");
                }
            });
            let result = files(&[named(&path)]);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            result
        });
        assert!(matches!(result, Err(HashError::Changed(changed)) if changed == path));
    }
}
