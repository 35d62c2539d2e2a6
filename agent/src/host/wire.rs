//! What the agent and a token's process say to each other over their socketpair: frames of a 32-bit
//! big-endian length and a prost message. Both ends are the same binary, so the format may change freely.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::time::Duration;

use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::task::{Done, Task};
use crate::algorithm::{Content, Padding};
use crate::config;
use crate::public_key::PublicKey;

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
    /// What a device gets, to be [`Purpose::Prepare`]d or [`Purpose::Unblock`]ed.
    #[prost(message, optional, tag = "3")]
    pub(crate) fresh: Option<Fresh>,
}

/// Secrets that a device is given in place of the factory's, each where it is to be changed; or a PIN in place of a
/// blocked one, and what lets us.
#[derive(Clone, PartialEq, prost::Message, zeroize::ZeroizeOnDrop)]
#[prost(skip_debug)]
pub(crate) struct Fresh {
    #[prost(string, tag = "1")]
    pub(crate) label: String,
    #[prost(string, tag = "2")]
    pub(crate) pin: String,
    /// A YubiKey's PUK, or the security officer's PIN.
    #[prost(string, tag = "3")]
    pub(crate) puk: String,
    #[prost(bool, tag = "4")]
    pub(crate) management_key: bool,
}

/// What a process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// To sign.
    Open,
    /// Only to look: no login, no keys.
    Survey,
    /// To give the device secrets of its own.
    Prepare,
    /// To set its PIN anew.
    Unblock,
}

/// A secret that is still the factory's, and so everybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Factory {
    Pin,
    Puk,
    ManagementKey,
}

/// What to open.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OpenSpec {
    pub(crate) token: config::Token,
    /// [`Request::key`] is an index into it.
    pub(crate) keys: Vec<KeySpec>,
    /// An operator asked for this login: it may spend the token's last PIN try.
    pub(crate) by_operator: bool,
    /// The process before ended with a PIN that the device did not answer.
    pub(crate) unanswered: bool,
    pub(crate) purpose: Purpose,
}

/// A key to find.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeySpec {
    pub(crate) name: String,
    pub(crate) object: config::Object,
    pub(crate) padding: Padding,
    /// What a TPM's key asks for beside its authorization value.
    pub(crate) pcrs: Option<config::Pcrs>,
}

/// What the host says on [`Open`], each as JSON in a frame of its own. The last four end the conversation.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Opening {
    /// The PIN is offered now. Whatever happens before `LoggedIn` may have cost a try.
    LoggingIn,
    /// The PIN was right, or did not get as far as the device.
    LoggedIn,
    Opened(Opened),
    Surveyed(Survey),
    Prepared,
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
    /// Keys whose every signature wants a touch, by index, and what whoever waits is told.
    pub(crate) touch: BTreeMap<usize, String>,
}

impl Opened {
    /// Within bounds: a module's code runs in the process that says it, and others are told.
    pub(crate) fn bounded(mut self, sessions: usize) -> Self {
        self.sessions = self.sessions.clamp(1, sessions.max(1));
        cut(&mut self.device);
        let keys = self.keys.len();
        self.touch.retain(|key, _| *key < keys);
        self.touch.values_mut().for_each(cut);
        for key in &mut self.keys {
            match key {
                Ok(public) if public.spki.0.len() > SAID_BYTES => {
                    *key = Err("its public key is longer than any".to_owned());
                }
                Ok(_) => {}
                Err(reason) => cut(reason),
            }
        }
        self
    }
}

/// As much is taken of what a token's process says of something.
const SAID_BYTES: usize = 8 << 10;

fn cut(text: &mut String) {
    text.truncate(text.floor_char_boundary(SAID_BYTES));
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
    pub(crate) factory: Vec<Factory>,
    /// Whether it says that nobody signs who has not logged in; some say nothing, and keys ask for it all the same.
    pub(crate) wants_login: bool,
    /// Whether its PIN can be entered on the device.
    pub(crate) has_pad: bool,
    /// How often its PIN may still be wrong, where that can be seen.
    pub(crate) tries: Option<u8>,
    /// Whether the owner hierarchy of a TPM has an authorization value.
    pub(crate) has_owner_auth: bool,
    /// Places that hold keys, where that can be seen without a login.
    pub(crate) objects: Vec<config::Object>,
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

impl Failure {
    /// Within bounds, as [`Opened::bounded`].
    pub(crate) fn bounded(mut self) -> Self {
        cut(&mut self.message);
        self
    }

    /// Whether the process cannot go on after it.
    pub(crate) fn ends_process(&self) -> bool {
        matches!(self.class, Class::Gone | Class::Locked)
    }
}

/// The four classes of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Class {
    /// The device or its state went away: drop everything and open it again.
    Gone,
    /// A PIN is missing, wrong, low or blocked: an operator must act; never retried by itself.
    Locked,
    /// The request cannot be done with this key.
    Refused,
    /// Not now: out of sessions or memory.
    Busy,
}

/// To the host: sign this, or do a task.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    /// Index into [`OpenSpec::keys`].
    #[prost(uint32, tag = "2")]
    key: u32,
    #[prost(bytes = "vec", tag = "3")]
    bytes: Vec<u8>,
    /// Whether they are a message rather than a digest.
    #[prost(bool, tag = "4")]
    message: bool,
    /// A [`Task`] as JSON; the rest is empty then.
    #[prost(string, tag = "5")]
    task: String,
    #[prost(bool, tag = "6")]
    pub(crate) alone: bool,
}

/// What a token is asked for.
pub(crate) enum Asked {
    /// A signature by the key of this index.
    Sign(usize, Content),
    /// Something else, by an operator.
    Do(Task),
}

impl Request {
    /// The request `id`; `alone` when no other is with the host.
    pub(crate) fn new(id: u64, asked: Asked, alone: bool) -> Self {
        match asked {
            Asked::Sign(key, content) => {
                let key = u32::try_from(key).unwrap_or(u32::MAX);
                let (bytes, message) = match content {
                    Content::Digest(bytes) => (bytes, false),
                    Content::Message(bytes) => (bytes, true),
                };
                Self { id, key, bytes, message, alone, ..Self::default() }
            }
            Asked::Do(task) => {
                let task = serde_json::to_string(&task).expect("tasks are plain data");
                Self { id, task, alone, ..Self::default() }
            }
        }
    }

    /// What is asked for.
    pub(crate) fn asked(self) -> io::Result<Asked> {
        if !self.task.is_empty() {
            return Ok(Asked::Do(serde_json::from_str(&self.task)?));
        }
        let content = if self.message { Content::Message(self.bytes) } else { Content::Digest(self.bytes) };
        Ok(Asked::Sign(usize::try_from(self.key).unwrap_or(usize::MAX), content))
    }
}

/// From the host: what it says of the [`Request`] of the same id.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Answer {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    #[prost(oneof = "Said", tags = "2, 3, 4, 5, 6")]
    pub(crate) said: Option<Said>,
    /// How long the device took, in microseconds.
    #[prost(uint64, tag = "7")]
    pub(crate) took_us: u64,
}

/// The first two end the request.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Said {
    /// The signature, or a [`Done`] as JSON.
    #[prost(bytes, tag = "2")]
    Done(Vec<u8>),
    /// A [`Failure`] as JSON.
    #[prost(string, tag = "3")]
    Failed(String),
    /// The device waits for a touch, and this says which.
    #[prost(string, tag = "4")]
    Touch(String),
    /// A task has begun that may take so many seconds.
    #[prost(uint32, tag = "5")]
    Begun(u32),
    /// The PIN is offered now; or it was taken, or never got as far as the device.
    #[prost(bool, tag = "6")]
    LogsIn(bool),
}

impl Answer {
    pub(crate) fn new(id: u64, said: Said) -> Self {
        Self { id, said: Some(said), took_us: 0 }
    }

    /// The answer to the request `id`, for which the device took this long.
    pub(crate) fn of(id: u64, outcome: Result<Vec<u8>, Failure>, took: Duration) -> Self {
        let failed = |failure| serde_json::to_string(&failure).expect("failures are plain data");
        let said = outcome.map_or_else(|failure| Said::Failed(failed(failure)), Said::Done);
        Self { took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX), ..Self::new(id, said) }
    }
}

/// What an operator asked for, as an [`Answer`] carries it.
pub(crate) fn done(done: Done) -> Vec<u8> {
    serde_json::to_vec(&done).expect("answers are plain data")
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

/// How many frames a buffer holds, the last one perhaps in part.
pub(crate) fn frames(mut buffer: &[u8]) -> usize {
    let mut count = 0;
    while let Some((length, rest)) = buffer.split_first_chunk() {
        count += 1;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        buffer = rest.get(length..).unwrap_or_default();
    }
    count
}

/// Reads one frame.
pub(crate) fn read(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut frame = vec![0; checked(u32::from_be_bytes(length), LARGEST_BYTES)?];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

/// Reads one frame.
pub(crate) async fn read_async(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    read_up_to(LARGEST_BYTES, from).await
}

/// The same, of no more than so many bytes.
pub(crate) async fn read_up_to(most: u32, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; checked(from.read_u32().await?, most)?];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

fn checked(length: u32, most: u32) -> io::Result<usize> {
    match usize::try_from(length) {
        Ok(size) if length <= most => Ok(size),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes"))),
    }
}

/// Decodes a frame.
pub(crate) fn decode<M: Message + Default>(frame: &[u8]) -> io::Result<M> {
    M::decode(frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
