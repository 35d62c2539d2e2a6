//! A PKCS#11 URI of anything: in the client, which takes the PIN out, and in the agent, which parses the rest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::oneshot::split_pin;
use omsign_agent::config::uri::Pkcs11Uri;

fuzz_target!(|text: &str| {
    let Ok((rest, pin)) = split_pin(text) else { return };
    if pin.is_some() {
        let query = rest.split_once('?').map_or("", |(_, query)| query);
        assert!(!query.split('&').any(|attribute| attribute.starts_with("pin-value=")));
    }
    if let Ok(parsed) = Pkcs11Uri::parse(&rest) {
        let _ = (parsed.names_more_than_an_object(), parsed.module());
    }
});
