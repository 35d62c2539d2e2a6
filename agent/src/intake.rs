//! How much of requests is held while they come in. A message is whole before anybody looks at who may send it, so that what
//! strangers send is bounded for all of them together.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Bytes, http};
use tower::util::MapRequestLayer;

/// Of all requests that are coming in, in bytes: eight of the longest statements.
const ROOM: usize = 128 << 20;

/// What each may have beside that: a digest, and all that goes with it. Somebody who takes all the room stops nobody's
/// signatures.
const SMALL: usize = 4 << 10;

/// Meters the bodies of requests.
pub(crate) fn metered()
-> MapRequestLayer<impl Fn(http::Request<Body>) -> http::Request<Body> + Clone + Send + Sync + 'static> {
    let room = Arc::new(Semaphore::new(ROOM));
    MapRequestLayer::new(move |request: http::Request<Body>| {
        request.map(|body| Body::new(Metered { body, room: Arc::clone(&room), small: SMALL, held: None }))
    })
}

/// A body that takes room for what came of it, until the message is whole and this is dropped.
struct Metered {
    body: Body,
    room: Arc<Semaphore>,
    /// How much is left of [`SMALL`].
    small: usize,
    held: Option<OwnedSemaphorePermit>,
}

impl Metered {
    fn hold(&mut self, bytes: usize) -> Result<(), Status> {
        let small = bytes.min(self.small);
        self.small -= small;
        let Some(more) = u32::try_from(bytes - small).ok().filter(|more| *more > 0) else { return Ok(()) };
        let taken = Arc::clone(&self.room).try_acquire_many_owned(more);
        let taken =
            taken.map_err(|_| Status::resource_exhausted("too many large requests come in at a time"))?;
        match &mut self.held {
            Some(held) => held.merge(taken),
            None => self.held = Some(taken),
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
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(full) = self.hold(data.len())
        {
            return Poll::Ready(Some(Err(full)));
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
