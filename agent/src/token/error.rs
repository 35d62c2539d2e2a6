//! Failures as whoever asked a token is told of them.

use std::time::Duration;

use crate::host::wire::{Class, Failure};

/// Why a token did not do what it was asked, by what the caller can do.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenError {
    /// Too many requests wait. Try again after a moment.
    #[error("{waiting} requests{whose} already wait for it")]
    Full {
        /// How many wait.
        waiting: usize,
        /// Whose they are, if not everybody's.
        whose: &'static str,
        /// When half of them are answered, as fast as the device is.
        soon: Duration,
    },
    /// An operator has to act.
    #[error("it is locked: {0}")]
    Locked(String),
    /// Absent, failing or just replaced. Trying again helps once the cause ends.
    #[error("{0}")]
    Unavailable(String),
    /// It cannot do this with this key. Trying again does not help.
    #[error("{0}")]
    Refused(String),
    /// The deadline passed first.
    #[error("no answer within the deadline")]
    Deadline,
}

impl From<Failure> for TokenError {
    fn from(failure: Failure) -> Self {
        match failure.class {
            Class::Gone | Class::Busy => Self::Unavailable(failure.message),
            Class::Locked => Self::Locked(failure.message),
            Class::Refused => Self::Refused(failure.message),
        }
    }
}
