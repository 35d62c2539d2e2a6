//! What must never be seen: PINs, and the memory of the process that holds them.

use std::fmt;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use zeroize::Zeroizing;

/// A token's user PIN, UTF-8. Wiped when dropped, never printed, copied or serialized.
pub struct Pin(Zeroizing<String>);

impl Pin {
    /// Takes a PIN over. An empty one is no PIN.
    pub fn new(text: String) -> Option<Self> {
        let text = Zeroizing::new(text);
        (!text.is_empty()).then_some(Self(text))
    }

    /// The PIN itself, for the one call that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin(…)")
    }
}

/// Keeps this process's memory out of core dumps and from other processes of the same user.
pub fn harden_process() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "cannot disable core dumps by resource limit");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "cannot mark the process as not dumpable");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_print_the_pin() {
        let pin = Pin::new("431276".into()).expect("not empty");
        assert!(!format!("{pin:?}").contains('4'));
        assert!(Pin::new(String::new()).is_none());
    }
}
