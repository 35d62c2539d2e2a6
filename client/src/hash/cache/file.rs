//! How a cache is written down: as text, a line an entry, and last the digest of all before it. One that was not written to
//! its end, or was touched since, is worth nothing and is made anew.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::{CacheError, Entry};
use crate::hash::Stamp;
use crate::hash::digest::{Algorithm, Digest};
use crate::replace;

const HEADER: &str = "omsign digests 2";

/// How long others may take to write theirs. After that somebody's digests are forgotten, which costs time and nothing else.
const PATIENCE: Duration = Duration::from_secs(2);

/// Keeps others from writing as long as it lives.
pub(super) fn turn(path: &Path) -> Option<File> {
    replace::turn(path.parent()?, PATIENCE).ok()?
}

/// What it holds; nothing, where it is none.
pub(super) fn load(path: &Path) -> Result<HashMap<Entry, Digest>, CacheError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(parse(&text).unwrap_or_default()),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        // Not text: as bad as half a file.
        Err(bad) if bad.kind() == io::ErrorKind::InvalidData => Ok(HashMap::new()),
        Err(source) => Err(CacheError::Io { path: path.to_owned(), source }),
    }
}

/// The entries of a cache that is whole.
fn parse(text: &str) -> Option<HashMap<Entry, Digest>> {
    let body = text.get(..text.len().checked_sub(65)?)?;
    let digest = text.get(body.len()..)?.strip_suffix('\n')?;
    if Digest::sha256(body.as_bytes()).to_string() != digest {
        return None;
    }
    let mut lines = body.lines();
    (lines.next()? == HEADER).then_some(())?;
    lines.map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<(Entry, Digest)> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<i128>().ok();
    let mut unsigned = || u64::try_from(number()?).ok();
    let (device, inode, size) = (unsigned()?, unsigned()?, unsigned()?);
    let mut signed = || i64::try_from(number()?).ok();
    let (modified, changed) = ((signed()?, signed()?), (signed()?, signed()?));
    let mut unsigned = || u64::try_from(number()?).ok();
    let (start, end) = (unsigned()?, unsigned()?);
    let algorithm = Algorithm::from_name(words.next()?)?;
    let digest = Digest::from_hex(algorithm, words.next()?)?;
    let stamp = Stamp { device, inode, size, modified, changed };
    Some((Entry { stamp, start, end, algorithm: algorithm.name() }, digest))
}

/// Puts a new one in place of it.
pub(super) fn write(path: &Path, entries: &HashMap<Entry, Digest>) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = io::BufWriter::new(tempfile::NamedTempFile::new_in(directory)?);
    let mut hasher = Sha256::new();
    let mut line = format!("{HEADER}\n");
    for (Entry { stamp, start, end, algorithm }, digest) in entries {
        hasher.update(&line);
        file.write_all(line.as_bytes())?;
        line.clear();
        let Stamp { device, inode, size, modified, changed } = stamp;
        let ((ms, mn), (cs, cn)) = (modified, changed);
        let _ =
            writeln!(line, "{device} {inode} {size} {ms} {mn} {cs} {cn} {start} {end} {algorithm} {digest}");
    }
    hasher.update(&line);
    let digest = Digest::from_sha256(hasher);
    writeln!(file, "{line}{digest}")?;
    file.into_inner()?.persist(path)?;
    Ok(())
}
