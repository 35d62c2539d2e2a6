//! A file's bytes as they are hashed: read in order into bounded buffers, and shown not to have changed meanwhile.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::fs::{Advice, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::place::{Place, Stamp};

/// Why a file's bytes could not be had. Whoever asked for them knows which file it is.
#[derive(Debug)]
pub(super) enum SourceError {
    /// They cannot be read.
    Io(io::Error),
    /// They are not those of the file that was looked at.
    Changed,
}

/// A range of an open file.
struct Source {
    stamp: Stamp,
    inodes_last: bool,
    file: File,
    position: u64,
    end: u64,
    /// Up to where the kernel was asked to read.
    asked: u64,
    /// Whether nothing had to be waited for so far, as far as a long range goes: then nothing is asked for, which would
    /// cost a fiftieth of hashing.
    cached: bool,
}

/// What the kernel is asked to read ahead of us, in two halves. Its own read-ahead left a third of a disk's speed
/// unused (measured on a virtual disk).
const AHEAD_BYTES: u64 = 8 << 20;

/// What one read brings is not worth asking for.
pub(super) const SMALL_BYTES: u64 = 256 << 10;

impl Source {
    fn open(place: Place<'_>, stamp: Stamp, range: &Range<u64>) -> Result<Self, SourceError> {
        let file = place.open().map_err(SourceError::Io)?;
        let cached = range.end - range.start > SMALL_BYTES;
        let inodes_last = place.root.inodes_last;
        Ok(Self {
            stamp,
            inodes_last,
            file,
            position: range.start,
            end: range.end,
            asked: range.start,
            cached,
        })
    }

    /// Fills a buffer, except at the range's end. After the last byte, the file has to be as it was.
    fn fill(&mut self, buffer: &mut Buffer) -> Result<usize, SourceError> {
        let mut filled = 0;
        while self.position < self.end && filled < buffer.len() {
            let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
            let end = filled + left.min(buffer.len() - filled);
            match self.read(buffer.get_mut(filled..end)) {
                Ok(0) => {
                    self.check_same()?;
                    return Err(SourceError::Io(io::Error::other("it is shorter than it says")));
                }
                Ok(count) => (filled, self.position) = (filled + count, self.position + count as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Of a pipe, say, that was put in its place, what it is says more than that it cannot be read so.
                Err(error) => return Err(self.check_same().err().unwrap_or(SourceError::Io(error))),
            }
        }
        if self.ended() {
            self.check_same()?;
            // One of the kernel's says so, whatever it holds.
            if self.stamp.size == 0 && self.file.read_at(&mut [0], 0).map_err(SourceError::Io)? > 0 {
                return Err(SourceError::Io(io::Error::other("it says that it is empty, and is not")));
            }
        }
        Ok(filled)
    }

    /// An error if it is not in the state any more in which it was looked at.
    fn check_same(&self) -> Result<(), SourceError> {
        let same = self.stamp.is_of(&self.file, self.inodes_last).map_err(SourceError::Io)?;
        if same { Ok(()) } else { Err(SourceError::Changed) }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.cached {
            let cached = &mut [io::IoSliceMut::new(into)];
            match preadv2(&self.file, cached, self.position, ReadWriteFlags::NOWAIT) {
                Ok(count) if count > 0 => return Ok(count),
                // Not in the page cache, or a file system that does not say.
                _ => self.cached = false,
            }
        }
        self.ask_ahead();
        self.file.read_at(into, self.position)
    }

    /// Advice that a file system does not take changes nothing.
    fn ask_ahead(&mut self) {
        let wanted = self.end.min(self.position + AHEAD_BYTES);
        // What was cached was not asked for.
        let from = self.asked.max(self.position);
        let half = from < self.position + AHEAD_BYTES / 2;
        if self.end - self.position > SMALL_BYTES
            && half
            && let Some(bytes) = NonZeroU64::new(wanted.saturating_sub(from))
        {
            let _ = fadvise(&self.file, from, Some(bytes), Advice::WillNeed);
            self.asked = wanted;
        }
    }

    fn ended(&self) -> bool {
        self.position == self.end
    }
}

/// Where a file is sampled, at most, and how many bytes there.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 64;
/// As much as is read at once of those that are read whole.
const SAMPLE_BUFFER: usize = 64 << 10;

/// A few bytes of a file, evenly spread, the last ones among them; all of it where it is no longer than a page.
pub(super) fn sample(place: Place<'_>, stamp: Stamp, whole: bool) -> Result<Digest, SourceError> {
    // One for each page: more would cost no less than reading it.
    let pages = stamp.size.div_ceil(PAGE_BYTES as u64);
    let whole = whole || pages <= 1;
    let (count, bytes_each) = if whole { (1, stamp.size) } else { (pages.min(SAMPLES), SAMPLE_BYTES) };
    let mut hasher = Sha256::new();
    let (mut source, mut buffer) = (Source::open(place, stamp, &(0..0))?, Buffer::new(SAMPLE_BUFFER));
    for index in 1..=count {
        // Of so many equal parts the end of each.
        let end = stamp.size / count * index + if index == count { stamp.size % count } else { 0 };
        (source.position, source.end) = (end.saturating_sub(bytes_each), end);
        loop {
            let filled = source.fill(&mut buffer)?;
            hasher.update(buffer.get(0..filled));
            if source.ended() {
                break;
            }
        }
    }
    Ok(Digest::from_sha256(hasher))
}

/// Memory that starts at a page's border: CPUs copy several times faster from the page cache to there (measured on
/// Zen 3, whose `rep movsb` is slow where the destination is not aligned).
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

/// A buffer takes as much more, to begin where a page does.
pub(super) const PAGE_BYTES: usize = 4096;

impl Buffer {
    /// Of so many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = vec![0; bytes + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
        Self { bytes, start }
    }

    fn len(&self) -> usize {
        self.bytes.len() - PAGE_BYTES
    }

    pub(super) fn get(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(self.start + range.start..self.start + range.end).unwrap_or_default()
    }

    fn get_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.bytes.get_mut(self.start + range.start..self.start + range.end).unwrap_or_default()
    }
}

/// A buffer and what of it is still to be taken.
struct Buffered {
    buffer: Buffer,
    at: usize,
    filled: usize,
    /// Whether nothing comes after it.
    last: bool,
}

impl Buffered {
    fn next_of(source: &mut Source, mut buffer: Buffer) -> Result<Self, SourceError> {
        let filled = source.fill(&mut buffer)?;
        Ok(Self { buffer, at: 0, filled, last: source.ended() })
    }
}

/// The bytes of a range, a buffer at a time: a whole one each time but the last.
pub(super) struct Feed {
    now: Buffered,
    next: Next,
}

/// Where the next buffer comes from.
enum Next {
    /// It is read when it is asked for.
    Here(Source),
    /// A thread has read it ahead, and gets the emptied one back.
    Ahead { full: Receiver<Result<Buffered, SourceError>>, emptied: SyncSender<Buffer> },
}

/// Ranges from this size on are worth a thread that reads ahead where a core is idle.
const LONG_BYTES: u64 = 4 << 20;

/// Buffers of a range that is read ahead: one is hashed, the others are under way.
pub(super) const AHEAD_BUFFERS: usize = 3;

impl Feed {
    /// Opens a file and fills `buffer` from the start of a range of it.
    pub(super) fn open(
        place: Place<'_>,
        stamp: Stamp,
        range: &Range<u64>,
        buffer: Buffer,
        ahead: bool,
    ) -> Result<Self, SourceError> {
        let mut source = Source::open(place, stamp, range)?;
        let long = range.end - range.start >= LONG_BYTES;
        let capacity = buffer.len();
        let now = Buffered::next_of(&mut source, buffer)?;
        let next = if ahead && long { read_ahead(source, capacity) } else { Next::Here(source) };
        Ok(Self { now, next })
    }

    /// The bytes that can be taken.
    pub(super) fn available(&self) -> &[u8] {
        self.now.buffer.get(self.now.at..self.now.filled)
    }

    /// Takes the first of them.
    pub(super) fn take(&mut self, count: usize) {
        self.now.at += count;
    }

    /// Whether [`Feed::available`] is all that is left.
    pub(super) fn ended(&self) -> bool {
        self.now.last
    }

    /// Gets the next buffer, when all of this one was taken and it was not the last.
    pub(super) fn refill(&mut self) -> Result<(), SourceError> {
        let buffer = std::mem::replace(&mut self.now.buffer, Buffer { bytes: Vec::new(), start: 0 });
        match &mut self.next {
            Next::Here(source) => self.now = Buffered::next_of(source, buffer)?,
            Next::Ahead { full, emptied } => {
                // The thread may have read all there is, and be gone.
                let _ = emptied.send(buffer);
                self.now = full.recv().expect("the thread sends the last buffer before it ends")?;
            }
        }
        Ok(())
    }

    /// Its buffer, for another file.
    pub(super) fn into_buffer(self) -> Buffer {
        self.now.buffer
    }
}

/// Starts a thread that reads until the end, an error, or the day that nobody takes its buffers. Where no more threads can
/// be had, nothing is read ahead.
fn read_ahead(source: Source, capacity: usize) -> Next {
    let (hand_over, handed_over) = sync_channel::<Source>(1);
    let (to_hasher, full) = sync_channel(AHEAD_BUFFERS);
    let (emptied, to_reader) = sync_channel::<Buffer>(AHEAD_BUFFERS);
    let reader = std::thread::Builder::new().name("read ahead".into()).spawn(move || {
        let Ok(mut source) = handed_over.recv() else { return };
        for buffer in to_reader {
            let next = Buffered::next_of(&mut source, buffer);
            let done = next.as_ref().map_or(true, |next| next.last);
            if to_hasher.send(next).is_err() || done {
                break;
            }
        }
    });
    if reader.is_err() {
        return Next::Here(source);
    }
    for _ in 1..AHEAD_BUFFERS {
        let _ = emptied.send(Buffer::new(capacity));
    }
    // It waits for it.
    let _ = hand_over.send(source);
    Next::Ahead { full, emptied }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    use super::super::place::Root;
    use super::*;

    const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

    type Change = fn(&Path) -> io::Result<()>;

    fn open(path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).open(path)
    }

    /// Read by whoever hashes, or ahead by a thread; changed when the first buffer was taken.
    #[test]
    fn a_file_that_changes_while_it_is_read() {
        let changes: [Change; 6] = [
            // Written to, with the time of before.
            |path| {
                let modified = std::fs::metadata(path)?.modified()?;
                open(path)?.write_all_at(b"other", 0)?;
                let changed = || std::fs::metadata(path).map(|found| (found.ctime(), found.ctime_nsec()));
                let before = changed()?;
                // Some kernels' clocks take milliseconds to move.
                while changed()? == before {
                    open(path)?.set_modified(modified)?;
                }
                Ok(())
            },
            |path| open(path)?.set_len(1),
            |path| open(path)?.set_len(LONG_BYTES * 2 - 1),
            |path| open(path)?.write_all_at(b"other", 0),
            |path| open(path)?.set_modified(std::time::UNIX_EPOCH),
            |path| std::fs::rename(path.with_extension("new"), path),
        ];
        for (change, ahead) in changes.into_iter().flat_map(|change| [(change, false), (change, true)]) {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("file");
            for path in [&path, &path.with_extension("new")] {
                let file = File::create(path).expect("made");
                file.set_len(LONG_BYTES * 2)
                    .and_then(|()| file.set_modified(std::time::SystemTime::UNIX_EPOCH + DAY))
                    .expect("written");
            }
            let root = Root::open(directory.path()).expect("a directory");
            let place = Place { root: &root, path: "file".as_ref() };
            let stamp = place.look().expect("looked at");
            let read = |change: Option<Change>| -> Result<u64, SourceError> {
                let mut feed = Feed::open(place, stamp, &(0..stamp.size), Buffer::new(PAGE_BYTES), ahead)?;
                change.map_or(Ok(()), |change| change(&path)).expect("changed");
                let mut bytes = 0;
                loop {
                    let here = feed.available().len();
                    bytes += here as u64;
                    feed.take(here);
                    if feed.ended() {
                        return Ok(bytes);
                    }
                    feed.refill()?;
                }
            };
            assert!(matches!(read(None), Ok(bytes) if bytes == stamp.size));
            assert!(matches!(read(Some(change)), Err(SourceError::Changed)), "ahead: {ahead}");
        }
    }

    #[test]
    fn a_small_file_is_sampled_whole_and_a_large_one_up_to_its_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::open(directory.path()).expect("a directory");
        let place = Place { root: &root, path: "file".as_ref() };
        let sampled = |bytes: &[u8]| {
            std::fs::write(directory.path().join("file"), bytes).expect("written");
            [false, true].map(|all| sample(place, place.look().expect("looked at"), all).expect("sampled"))
        };
        let small: Vec<u8> = (0..PAGE_BYTES).map(|i| i.to_le_bytes()[0]).collect();
        assert_eq!(sampled(&small), [Digest::sha256(&small), Digest::sha256(&small)]);
        assert_eq!(sampled(b""), [Digest::sha256(b""), Digest::sha256(b"")]);
        let mut large = vec![0; 100 * PAGE_BYTES + 1];
        let before = sampled(&large);
        assert_eq!(before[1], Digest::sha256(&large));
        large[5000] = 7;
        let elsewhere = sampled(&large);
        assert!(before[0] == elsewhere[0] && before[1] != elsewhere[1]);
        *large.last_mut().expect("a byte") = 7;
        assert!(sampled(&large)[0] != before[0]);
    }
}
