//! What the agent and a token's process say to each other over their socketpair: frames of a 32-bit
//! big-endian length and a prost message. Both ends are the same binary, so the format may change freely.

use std::io::{self, Read};

use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::algorithm::{Algorithm, Content, KeyType, Padding};
use crate::config;
use crate::spki::SpkiDer;

/// No frame is larger: an answer names at most a few thousand objects.
const LARGEST_BYTES: u32 = 16 << 20;

/// The first frame, to the host: what to open.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(crate) struct Open {
    /// An [`OpenSpec`] as JSON.
    #[prost(string, tag = "1")]
    pub(crate) spec: String,
    /// A PIN that an operator typed; it goes before the configured source.
    #[prost(string, optional, tag = "2")]
    pub(crate) pin: Option<String>,
}

/// What to open.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OpenSpec {
    pub(crate) token: config::Token,
    /// [`Sign::key`] is an index into it.
    pub(crate) keys: Vec<KeySpec>,
    /// An operator asked for this login: it may spend the token's last PIN try.
    pub(crate) by_operator: bool,
    /// Make the only key of `keys` before it is looked for.
    pub(crate) generate: Option<KeyType>,
    /// Only look, for `doctor`: no login, no keys.
    pub(crate) survey: bool,
}

/// A key to find.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KeySpec {
    pub(crate) name: String,
    pub(crate) object: config::Object,
    pub(crate) padding: Padding,
}

/// What the host says on [`Open`], each as JSON in a frame of its own. The last three end the conversation.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Opening {
    /// The PIN is offered now. Whatever happens before `LoggedIn` may have cost a try.
    LoggingIn,
    /// The PIN was right.
    LoggedIn,
    Opened(Opened),
    Surveyed(Survey),
    Failed(Failure),
}

/// An open token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Opened {
    /// Label, model and serial number.
    pub(crate) device: String,
    /// Threads that sign.
    pub(crate) sessions: usize,
    /// In the order of [`OpenSpec::keys`]: the key, or why it cannot be used.
    pub(crate) keys: Vec<Result<PublicKey, String>>,
}

/// A key's public half.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PublicKey {
    pub(crate) algorithm: Algorithm,
    pub(crate) spki: SpkiDer,
}

/// What a module shows without a login.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Survey {
    /// Library description, manufacturer and version.
    pub(crate) library: String,
    pub(crate) tokens: Vec<SurveyedToken>,
}

/// A token in a slot.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SurveyedToken {
    pub(crate) slot: u64,
    pub(crate) label: String,
    pub(crate) device: String,
    pub(crate) selected: bool,
    /// Things worth knowing: PIN flags, session limit.
    pub(crate) notes: Vec<String>,
}

/// Why a token did not do something, by what can be done about it. Decided once, in the backend.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) class: Class,
    pub(crate) message: String,
}

/// The four classes of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, prost::Enumeration)]
pub(crate) enum Class {
    /// The device or its state went away: drop everything and open it again.
    Gone = 0,
    /// A PIN is missing, wrong, low or blocked: an operator must act; never retried by itself.
    Locked = 1,
    /// The request cannot be done with this key.
    Refused = 2,
    /// Not now: out of sessions or memory.
    Busy = 3,
}

/// To the host: sign this.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Sign {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    /// Index into [`OpenSpec::keys`].
    #[prost(uint32, tag = "2")]
    pub(crate) key: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) bytes: Vec<u8>,
    /// Whether they are a message rather than a digest.
    #[prost(bool, tag = "4")]
    pub(crate) message: bool,
}

impl Sign {
    /// The request `id` for the key of this index.
    pub(crate) fn new(id: u64, key: usize, content: Content) -> Self {
        let key = u32::try_from(key).unwrap_or(u32::MAX);
        match content {
            Content::Digest(bytes) => Self { id, key, bytes, message: false },
            Content::Message(bytes) => Self { id, key, bytes, message: true },
        }
    }

    /// What is to be signed.
    pub(crate) fn content(self) -> Content {
        if self.message { Content::Message(self.bytes) } else { Content::Digest(self.bytes) }
    }
}

/// From the host: the answer to the [`Sign`] of the same id.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Answer {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    /// DER; empty on failure.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) signature: Vec<u8>,
    #[prost(enumeration = "Class", tag = "3")]
    pub(crate) class: i32,
    #[prost(string, tag = "4")]
    pub(crate) message: String,
    /// Not the answer yet: the device waits for a touch, and this says which.
    #[prost(string, tag = "5")]
    pub(crate) touch: String,
}

impl Answer {
    /// The answer to the request `id`.
    pub(crate) fn new(id: u64, outcome: Result<Vec<u8>, Failure>) -> Self {
        match outcome {
            Ok(signature) => Self { id, signature, ..Self::default() },
            Err(failure) => {
                Self { id, class: failure.class as i32, message: failure.message, ..Self::default() }
            }
        }
    }

    /// Whether a PIN was refused.
    pub(crate) fn locks(&self) -> bool {
        self.signature.is_empty() && self.touch.is_empty() && self.class() == Class::Locked
    }

    /// Signature or failure.
    pub(crate) fn outcome(self) -> Result<Vec<u8>, Failure> {
        if !self.signature.is_empty() {
            return Ok(self.signature);
        }
        Err(Failure { class: self.class(), message: self.message })
    }
}

/// Writes a frame with what the host says while it opens its token.
pub(crate) fn say(to: &mut impl io::Write, opening: &Opening) -> io::Result<()> {
    let mut frame = Vec::new();
    put_bytes(&mut frame, &serde_json::to_vec(opening)?);
    to.write_all(&frame)
}

/// Appends a message as a frame.
pub(crate) fn put(buffer: &mut Vec<u8>, message: &impl Message) {
    put_bytes(buffer, &message.encode_to_vec());
}

/// Appends bytes as a frame.
pub(crate) fn put_bytes(buffer: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).expect("frames are far below 4 GiB");
    buffer.extend_from_slice(&length.to_be_bytes());
    buffer.extend_from_slice(bytes);
}

/// Reads one frame.
pub(crate) fn read(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut frame = vec![0; checked(u32::from_be_bytes(length))?];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

/// Reads one frame.
pub(crate) async fn read_async(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; checked(from.read_u32().await?)?];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

fn checked(length: u32) -> io::Result<usize> {
    match usize::try_from(length) {
        Ok(size) if length <= LARGEST_BYTES => Ok(size),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes"))),
    }
}

/// Decodes a frame.
pub(crate) fn decode<M: Message + Default>(frame: &[u8]) -> io::Result<M> {
    M::decode(frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
