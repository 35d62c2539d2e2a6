//! How a cache is written down: as text, a line an entry, and last the digest of all before it. One that was not written to
//! its end, or was touched since, is worth nothing and is made anew.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write as _};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use sha2::{Digest as _, Sha256};

use super::{CacheError, Entry};
use crate::hash::digest::{Algorithm, Digest};
use crate::hash::{Stamp, Time};
use crate::replace;

const HEADER: &str = "omsign digests 2";

/// How files begin that are being written.
pub(super) const UNFINISHED: &str = ".omsign-digests-";

/// How long others may take to write theirs. After that somebody's digests are forgotten, which costs time and nothing else.
const PATIENCE: Duration = Duration::from_secs(2);

/// Keeps others from writing as long as it lives.
pub(super) fn turn(directory: &Path) -> Option<File> {
    replace::turn(directory, PATIENCE).ok()?
}

/// Room is made at once for about as many entries as a file of its length has: to make more as they come takes twice as much
/// meanwhile. For a million at most, whatever it claims to be.
const LINE_BYTES: usize = 144;
const LIKELY_ENTRIES: usize = 1 << 20;

/// What it holds; nothing, where it is none.
pub(super) fn load(path: &Path) -> Result<HashMap<Entry, Digest>, CacheError> {
    let read = || {
        // A pipe is not waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(open(path, flags, Mode::empty())?);
        let found = file.metadata()?;
        if !found.is_file() {
            return Ok(None);
        }
        let most = usize::try_from(found.len()).unwrap_or(usize::MAX) / LINE_BYTES;
        parse(BufReader::new(file), most.min(LIKELY_ENTRIES))
    };
    match read() {
        Ok(entries) => Ok(entries.unwrap_or_default()),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        // Not text: as bad as half a file.
        Err(bad) if bad.kind() == io::ErrorKind::InvalidData => Ok(HashMap::new()),
        Err(source) => Err(CacheError::Io { path: path.to_owned(), source }),
    }
}

/// The entries of a cache that is whole. Of many files it is long, and two lines of it at a time are enough.
fn parse(mut text: impl BufRead, capacity: usize) -> io::Result<Option<HashMap<Entry, Digest>>> {
    let (mut hasher, mut entries) = (Sha256::new(), HashMap::with_capacity(capacity));
    let (mut line, mut next) = (String::new(), String::new());
    text.read_line(&mut line)?;
    if line.strip_suffix('\n') != Some(HEADER) {
        return Ok(None);
    }
    hasher.update(&line);
    line.clear();
    text.read_line(&mut line)?;
    while text.read_line(&mut next)? > 0 {
        let Some((entry, digest)) = line.strip_suffix('\n').and_then(parse_line) else { return Ok(None) };
        entries.insert(entry, digest);
        hasher.update(&line);
        std::mem::swap(&mut line, &mut next);
        next.clear();
    }
    let digest = format!("{}\n", Digest::from_sha256(hasher));
    Ok((line == digest).then_some(entries))
}

fn parse_line(line: &str) -> Option<(Entry, Digest)> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<i128>().ok();
    let mut unsigned = || u64::try_from(number()?).ok();
    let (device, inode, size) = (unsigned()?, unsigned()?, unsigned()?);
    let mut time = || Some(Time(number()?.try_into().ok()?, number()?.try_into().ok()?));
    let (modified, changed) = (time()?, time()?);
    let mut unsigned = || u64::try_from(number()?).ok();
    let (start, end) = (unsigned()?, unsigned()?);
    let algorithm = Algorithm::from_name(words.next()?)?;
    let digest = Digest::from_hex(algorithm, words.next()?)?;
    let stamp = Stamp { device, inode, size, modified, changed, open_to_others: false };
    Some((Entry { stamp, start, end, algorithm }, digest))
}

/// Puts a new one in place of it.
pub(super) fn write(path: &Path, entries: &HashMap<Entry, Digest>) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = io::BufWriter::new(tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(directory)?);
    let mut hasher = Sha256::new();
    let mut line = format!("{HEADER}\n");
    for (Entry { stamp, start, end, algorithm }, digest) in entries {
        hasher.update(&line);
        file.write_all(line.as_bytes())?;
        line.clear();
        // None of a file that is open to others is remembered.
        let Stamp { device, inode, size, modified: Time(ms, mn), changed: Time(cs, cn), .. } = *stamp;
        let _ =
            writeln!(line, "{device} {inode} {size} {ms} {mn} {cs} {cn} {start} {end} {algorithm} {digest}");
    }
    hasher.update(&line);
    let digest = Digest::from_sha256(hasher);
    writeln!(file, "{line}{digest}")?;
    file.into_inner()?.persist(path)?;
    Ok(())
}
