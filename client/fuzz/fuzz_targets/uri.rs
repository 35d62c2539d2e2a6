//! A PKCS#11 URI of anything: in the client, which takes the PIN out, and in the agent, which parses the rest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::oneshot::split_pin;

/// The agent's own file: all of the agent would take minutes to build.
#[path = "../../../agent/src/config/uri.rs"]
#[allow(dead_code)]
mod uri;

fuzz_target!(|text: &str| {
    let (rest, pin) = split_pin(text);
    if pin.is_some() {
        assert!(!rest.contains("pin-value="));
    }
    if let Ok(parsed) = uri::Pkcs11Uri::parse(&rest) {
        let _ = (parsed.names_more_than_an_object(), parsed.module());
    }
});
