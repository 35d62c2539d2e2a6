//! How much of requests is held while they come in, and while they wait for a token that takes whole statements. A message is
//! whole before anybody looks at who may send it, so that what strangers send is bounded: for each of them, and for all
//! together.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use http_body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Bytes, http};
use tower::util::MapRequestLayer;

use crate::identity::{Caller, Identity};

/// The longest message: a statement, and what goes with it.
pub(crate) const LARGEST: usize = 16 << 20;

/// Messages up to this need no room: digests, and all that goes with them.
pub(crate) const SMALL: usize = 4 << 10;

/// Of all messages that are coming in, in bytes, and of those of one caller: nobody keeps the others out.
const ROOM: usize = 16 * LARGEST;
const ROOM_OF_ONE: usize = 4 * LARGEST;

/// What is before a message (gRPC over HTTP/2, Length-Prefixed-Message): a flag, and its length.
const PREFIX: usize = 5;

/// Refuses large messages while there is no room for them. They do not wait: what is sent of them meanwhile would keep the
/// connection's other requests waiting, too (RFC 9113, 5.2).
pub(crate) fn metered()
-> MapRequestLayer<impl Fn(http::Request<Body>) -> http::Request<Body> + Clone + Send + Sync + 'static> {
    let room = Arc::new(Room { all: Arc::new(Semaphore::new(ROOM)), of_each: Mutex::default() });
    MapRequestLayer::new(move |mut request: http::Request<Body>| {
        // Every connection has one.
        let Some(identity) = request.extensions().get::<Arc<Identity>>().cloned() else { return request };
        let (room, held) = (Arc::clone(&room), Held::default());
        request.extensions_mut().insert(held.clone());
        request.map(|body| Body::new(Metered { body, identity, room, left: None, held }))
    })
}

/// The room that a request takes: as long as it comes in, and on for whoever keeps this with what came.
#[derive(Clone, Default)]
pub(crate) struct Held(Arc<OnceLock<[OwnedSemaphorePermit; 2]>>);

struct Room {
    all: Arc<Semaphore>,
    of_each: Mutex<HashMap<Caller, Weak<Semaphore>>>,
}

impl Room {
    fn of(&self, caller: Caller) -> Arc<Semaphore> {
        let mut of_each = self.of_each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = of_each.get(&caller).and_then(Weak::upgrade) {
            return own;
        }
        of_each.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(ROOM_OF_ONE));
        of_each.insert(caller, Arc::downgrade(&own));
        own
    }

    /// So much of the caller's own, and of all.
    fn take(&self, caller: Caller, bytes: usize) -> Option<[OwnedSemaphorePermit; 2]> {
        let bytes = u32::try_from(bytes).ok()?;
        let own = self.of(caller).try_acquire_many_owned(bytes).ok()?;
        Some([own, Arc::clone(&self.all).try_acquire_many_owned(bytes).ok()?])
    }
}

/// A body with one message, which has room for all of it before more of it is read.
struct Metered {
    body: Body,
    identity: Arc<Identity>,
    room: Arc<Room>,
    /// Bytes of the message that are to come, once its length is known.
    left: Option<usize>,
    held: Held,
}

impl Metered {
    /// Whether so much more of it may come.
    fn comes(&mut self, data: &[u8]) -> Result<(), Status> {
        if data.is_empty() {
            return Ok(());
        }
        let announced = announced(data);
        let left = self.left.unwrap_or(announced + PREFIX).checked_sub(data.len());
        let left = left.ok_or_else(|| Status::invalid_argument("a request has one message"))?;
        // One that is too long is refused for that.
        if self.left.replace(left).is_none() && (SMALL..=LARGEST).contains(&announced) {
            let held = self.room.take(self.identity.caller(), announced);
            let full = || Status::resource_exhausted("too many large requests come in at a time");
            let _ = self.held.0.set(held.ok_or_else(full)?);
        }
        Ok(())
    }
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            let frame = frame?;
            frame.data_ref().map_or(Ok(()), |data| self.comes(data))?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// How long a message is that begins so. Where not even that came yet, as long as it may be.
fn announced(start: &[u8]) -> usize {
    match start {
        [_, a, b, c, d, ..] => usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX),
        _ => LARGEST,
    }
}
