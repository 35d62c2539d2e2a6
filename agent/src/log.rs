//! Logs go to standard error: for people on a terminal, JSON lines otherwise. `OMSIGN_LOG` sets the level.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Starts logging. Called once, first thing.
pub fn start() {
    // cryptoki logs an error for every mechanism that it does not know, tss-esapi what we say better, and
    // yubikey, at its lowest level, every byte to the card: PINs too.
    let quiet =
        ["cryptoki::mechanism=off", "tss_esapi=off", "yubikey=off", "h2=warn", "hyper=warn", "rustls=warn"];
    let mut filter = EnvFilter::try_from_env("OMSIGN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    for directive in quiet.iter().filter_map(|text| text.parse().ok()) {
        filter = filter.add_directive(directive);
    }
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if std::io::stderr().is_terminal() { builder.init() } else { builder.json().flatten_event(true).init() }
}
