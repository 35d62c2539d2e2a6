//! What a token is doing.

use std::sync::Arc;

use super::line::Host;

/// What a token is doing.
#[derive(Clone)]
pub enum State {
    /// Its process is being started and the device opened.
    Starting,
    /// Signing, by this process.
    Ready(Arc<Host>),
    /// Waits for an operator: no PIN is offered by itself.
    Locked(String),
    /// Absent or failing; it is tried again with growing pauses.
    Down(String),
}
