//! A gRPC client of the tests' own: to send what `omsign` never would, and many at once.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use omsign_proto::v1::agent_service_client::AgentServiceClient;
use omsign_proto::v1::sign_request::Content;
use omsign_proto::v1::sign_response::Event;
use omsign_proto::v1::{SignRequest, SignResponse, Signed};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status, Streaming};
use tower::service_fn;

/// The generated client.
pub type Client = AgentServiceClient<Channel>;

/// Runs a test of one thread.
pub fn run<T>(test: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test)
}

/// Connects to a Unix socket.
pub async fn connect(path: PathBuf) -> anyhow::Result<Client> {
    Ok(Client::new(channel(path).await?))
}

/// The connection alone, for other services.
pub async fn channel(path: PathBuf) -> anyhow::Result<Channel> {
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://agent.localhost").connect_with_connector(connector).await?)
}

/// A request with a given id.
pub fn request(key: &str, id: u128, digest: &[u8]) -> SignRequest {
    SignRequest {
        key: key.to_owned(),
        request_id: id.to_be_bytes().to_vec(),
        content: Some(Content::Digest(digest.to_vec())),
        context: String::new(),
    }
}

/// Has something signed within a time.
pub async fn sign(client: &mut Client, message: SignRequest, within: Duration) -> Result<Signed, Status> {
    let mut request = Request::new(message);
    request.set_timeout(within);
    let mut events = client.sign(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(Event::Signed(signed)) = event.event {
            return Ok(signed);
        }
    }
    Err(Status::internal("the stream ended without an answer"))
}

/// What whoever waits is told next, but for that they wait: on a busy machine they hear that, too.
pub async fn next_event(events: &mut Streaming<SignResponse>) -> anyhow::Result<Event> {
    loop {
        match events.message().await?.and_then(|event| event.event) {
            Some(Event::Queued(_)) => {}
            event => return event.context("an event"),
        }
    }
}
