//! A connection whose caller is known: it is ended where nobody speaks, or reads, or is believed any more.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use crate::identity::Identity;
use crate::listen::{HANDSHAKE, identity_of};
use crate::tls::Proof;

/// The client's part of the HTTP/2 connection preface, in bytes (RFC 9113, 3.4). From then on keep-alive tells
/// whether somebody is there.
const PREFACE: usize = 24;

/// After how much one connection's turn ends (its last read may bring some more): what a caller may send without end, as
/// pings, keeps others waiting for no longer than that takes.
const TURN: usize = 4 << 10;

/// How long a caller may leave unread what is sent, pings among it: then nobody is there.
const UNREAD: Duration = Duration::from_secs(60);

pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection whose caller is known.
pub struct Connection {
    io: Box<dyn Io>,
    identity: Arc<Identity>,
    /// Ends a connection that does not get as far as its preface: it would hold its place for ever.
    silence: Option<Pin<Box<Sleep>>>,
    /// Bytes read before that.
    preface: usize,
    /// Bytes read in this turn.
    read: usize,
    /// Ends one that reads nothing: keep-alive does not, for its pings wait, too.
    unread: Option<Pin<Box<Sleep>>>,
    /// Why the caller is believed to be who it was at the start; on a Unix socket that does not change.
    pub(crate) proof: Option<Proof>,
    /// Given back, or dropped, when the connection ends.
    _held: Box<dyn Send>,
}

impl Connection {
    /// One end of a socketpair whose other end is our parent: the private agent of one client. `closed` is
    /// dropped when the connection ends.
    pub fn private(socket: std::os::unix::net::UnixStream, closed: oneshot::Sender<()>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = UnixStream::from_std(socket)?;
        let identity = identity_of(socket.peer_cred()?);
        Ok(Self::new(Box::new(socket), identity, closed))
    }

    /// `held` is dropped when it ends.
    pub(crate) fn new(io: Box<dyn Io>, identity: Identity, held: impl Send + 'static) -> Self {
        let (identity, _held) = (Arc::new(identity), Box::new(held));
        let silence = Some(Box::pin(tokio::time::sleep(HANDSHAKE)));
        Self { io, identity, silence, preface: 0, read: 0, unread: None, proof: None, _held }
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Identity>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.identity)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read >= TURN {
            self.read = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        self.read = if read.is_pending() { 0 } else { self.read + came };
        if self.silence.is_some() {
            self.preface += came;
            if self.preface >= PREFACE {
                self.silence = None;
            }
        }
        if read.is_ready() && self.proof.as_mut().is_some_and(|proof| !proof.holds()) {
            tracing::warn!(caller = %self.identity, "its certificate has expired, or is no longer trusted; it is cut off");
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if read.is_pending()
            && let Some(silence) = &mut self.silence
            && silence.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl Connection {
    /// What became of writing, or an error where nothing has for long.
    fn in_time<T>(&mut self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        let unread = self.unread.get_or_insert_with(|| Box::pin(tokio::time::sleep(UNREAD)));
        unread.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.in_time(written, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.in_time(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.in_time(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A line with room for so many bytes.
    fn line(bytes: usize) -> (Connection, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(bytes);
        let identity = Identity::from_unix(rustix::process::geteuid().as_raw(), 0, None);
        (Connection::new(Box::new(ours), identity, ()), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_reads_nothing_is_cut_off() {
        let (mut connection, theirs) = line(64);
        let begun = tokio::time::Instant::now();
        let error = connection.write_all(&[7; 65]).await.expect_err("there is no room");
        assert_eq!((error.kind(), begun.elapsed() >= UNREAD), (io::ErrorKind::TimedOut, true));
        drop(theirs);
        // And one that reads, however slowly, is not.
        let (mut connection, mut theirs) = line(64);
        let reads = tokio::spawn(async move {
            let mut read = [0; 64];
            for _ in 0..3 {
                tokio::time::sleep(UNREAD - Duration::from_secs(1)).await;
                theirs.read_exact(&mut read).await.expect("read");
            }
        });
        connection.write_all(&[7; 192]).await.expect("written");
        reads.await.expect("no panic");
    }
}
