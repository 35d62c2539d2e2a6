//! A PKCS#11 URI of anything: in the client, which takes the PIN out, and in the agent, which parses the rest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::oneshot::split_pin;
use omsign_agent::config::uri::Pkcs11Uri;

fuzz_target!(|text: &str| {
    let (rest, pin) = split_pin(text);
    if pin.is_some() {
        assert!(!rest.contains("pin-value="));
    }
    if let Ok(parsed) = Pkcs11Uri::parse(&rest) {
        let _ = (parsed.names_more_than_an_object(), parsed.module());
    }
});
