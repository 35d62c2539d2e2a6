//! What a token is doing: as its supervisor knows it, and as everybody else is told.

use std::sync::Arc;

use super::line::Host;

/// What a token is doing.
#[derive(Clone, Debug)]
pub enum State {
    /// Its process is being started and the device opened.
    Starting,
    /// Signing.
    Ready,
    /// Waits for an operator: no PIN is offered by itself.
    Locked(String),
    /// Absent or failing; it is tried again with growing pauses.
    Down(String),
}

#[derive(Clone)]
pub(super) enum Status {
    Starting,
    Ready(Arc<Host>),
    Locked(String),
    Down(String),
}

impl From<&Status> for State {
    fn from(status: &Status) -> Self {
        match status {
            Status::Starting => Self::Starting,
            Status::Ready(_) => Self::Ready,
            Status::Locked(reason) => Self::Locked(reason.clone()),
            Status::Down(reason) => Self::Down(reason.clone()),
        }
    }
}
