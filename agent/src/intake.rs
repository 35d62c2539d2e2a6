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
use tower::{Layer, Service};

use crate::identity::{Caller, Identity};

/// The longest message: a statement, and what goes with it.
pub(crate) const LARGEST: usize = 16 << 20;

/// Messages up to this need no room: digests, and all that goes with them.
pub(crate) const SMALL: usize = 4 << 10;

/// Of all messages that are coming in, in bytes, and of those of one caller: nobody keeps the others out.
const ROOM: usize = 16 * LARGEST;
const ROOM_OF_ONE: usize = 4 * LARGEST;

/// How many requests one caller may have, on all connections, and on one: what is kept of each is some 40 kB at most.
const REQUESTS_OF_ONE: usize = 1024;
pub(crate) const STREAMS: u32 = 128;

/// How long a request's metadata may be, in bytes, counted as HTTP/2 does (RFC 9113, 10.5.1).
pub(crate) const HEADERS: u32 = 8 << 10;

/// What is before a message (gRPC over HTTP/2, Length-Prefixed-Message): a flag, and its length.
const PREFIX: usize = 5;

/// Refuses large messages while there is no room for them. They do not wait: what is sent of them meanwhile would keep the
/// connection's other requests waiting, too (RFC 9113, 5.2).
pub(crate) fn metered()
-> MapRequestLayer<impl Fn(http::Request<Body>) -> http::Request<Body> + Clone + Send + Sync + 'static> {
    let room = Arc::new(Room { all: Arc::new(Semaphore::new(ROOM)), of_each: Shares::new(ROOM_OF_ONE) });
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

/// What each caller may have of something.
struct Shares {
    most: usize,
    of_each: Mutex<HashMap<Caller, Weak<Semaphore>>>,
}

impl Shares {
    fn new(most: usize) -> Self {
        Self { most, of_each: Mutex::default() }
    }

    fn of(&self, caller: Caller) -> Arc<Semaphore> {
        let mut of_each = self.of_each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = of_each.get(&caller).and_then(Weak::upgrade) {
            return own;
        }
        of_each.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(self.most));
        of_each.insert(caller, Arc::downgrade(&own));
        own
    }
}

struct Room {
    all: Arc<Semaphore>,
    of_each: Shares,
}

impl Room {
    /// So much of the caller's own, and of all.
    fn take(&self, caller: Caller, bytes: usize) -> Option<[OwnedSemaphorePermit; 2]> {
        let bytes = u32::try_from(bytes).ok()?;
        let own = self.of_each.of(caller).try_acquire_many_owned(bytes).ok()?;
        Some([own, Arc::clone(&self.all).try_acquire_many_owned(bytes).ok()?])
    }
}

/// Refuses requests of callers who have as many as one may: of all services, until their answers are sent, or no longer
/// wanted.
pub(crate) fn shared<S>() -> impl Layer<S, Service = Shared<S>> + Clone {
    let shares = Arc::new(Shares::new(REQUESTS_OF_ONE));
    tower::layer::layer_fn(move |inner| Shared { inner, shares: Arc::clone(&shares) })
}

#[derive(Clone)]
pub(crate) struct Shared<S> {
    inner: S,
    shares: Arc<Shares>,
}

impl<S> Service<http::Request<Body>> for Shared<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // Every connection has one.
        let identity = request.extensions().get::<Arc<Identity>>();
        let place = identity.and_then(|who| self.shares.of(who.caller()).try_acquire_owned().ok());
        let Some(place) = place else {
            let full = Status::resource_exhausted("too many of your requests are in flight");
            return Box::pin(async { Ok(full.into_http()) });
        };
        let answer = self.inner.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Answered { body, _place: place }))) })
    }
}

/// An answer that takes its request's place until it is sent.
struct Answered {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl http_body::Body for Answered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
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
