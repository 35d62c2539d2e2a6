//! What the agent asks of its token's process, as it comes.

use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::wire::{self, Request};

/// After a lone request that came within this time of the answer before it, the next one is looked for as long
/// before this process sleeps: a caller who sends one request after the other waits for fewer wake-ups of sleeping
/// CPUs then, which cost as much as a quick signature. Who signs now and then costs nothing more.
const SOON: Duration = Duration::from_micros(150);

/// Our end of the line to the agent.
pub(super) struct Inbox {
    pub(super) reader: BufReader<UnixStream>,
    /// The last request was alone, and came soon after the answer before it.
    pub(super) soon: bool,
}

impl Inbox {
    /// Waits until something is there, or the socket's time-out.
    pub(super) fn wait(&mut self) -> io::Result<&[u8]> {
        if !self.reader.buffer().is_empty() {
            return Ok(self.reader.buffer());
        }
        let since = Instant::now();
        while self.soon && since.elapsed() < SOON && !self.is_more_here() {
            std::thread::yield_now();
        }
        let here = self.reader.fill_buf();
        self.soon = since.elapsed() < SOON;
        here
    }

    fn is_more_here(&self) -> bool {
        recv(self.reader.get_ref(), &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
    }

    /// Takes the request that is here, and says how many more are.
    pub(super) fn take(&mut self) -> io::Result<(Request, usize)> {
        let request: Request = wire::decode(&wire::read(&mut Whole(&mut self.reader))?)?;
        self.soon &= request.alone;
        Ok((request, self.waiting()?))
    }

    /// How many requests are here; never waits.
    fn waiting(&mut self) -> io::Result<usize> {
        if self.reader.buffer().is_empty() && self.is_more_here() {
            self.reader.fill_buf()?;
        }
        Ok(wire::frames(self.reader.buffer()))
    }
}

/// Waits for the rest of a frame for as long as it takes: an agent that stands still is no reason to begin in its middle.
struct Whole<'a>(&'a mut BufReader<UnixStream>);

impl Read for Whole<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(into) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                read => return read,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::wire::Asked;
    use super::*;
    use crate::algorithm::Content;

    /// The time-out is for the device, which rests. In the middle of a frame it is no reason to take what comes for another.
    #[test]
    fn a_frame_that_comes_in_pieces() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        ours.set_read_timeout(Some(Duration::from_millis(10))).expect("set");
        let mut inbox = Inbox { reader: BufReader::new(ours), soon: false };
        let mut frame = Vec::new();
        wire::put(&mut frame, &Request::new(7, Asked::Sign(0, Content::Digest(vec![1; 32])), true));
        let (begin, rest) = (frame[..2].to_vec(), frame[2..].to_vec());
        theirs.write_all(&begin).expect("written");
        let writes = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            theirs.write_all(&rest).expect("written");
            theirs
        });
        assert!(!inbox.wait().expect("it began").is_empty());
        let (request, waiting) = inbox.take().expect("all of it");
        assert_eq!((request.id, waiting), (7, 0));
        let _open = writes.join().expect("no panic");
        assert_eq!(inbox.wait().expect_err("nothing more").kind(), io::ErrorKind::WouldBlock);
    }
}
