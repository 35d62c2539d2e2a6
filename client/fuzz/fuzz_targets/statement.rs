//! A signed statement of anything. What is accepted is written so that it is read the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::statement::{decode, decode_release_0_2_0, encode};

fuzz_target!(|bytes: &[u8]| {
    let _ = decode_release_0_2_0(bytes);
    if let Ok(manifest) = decode(bytes) {
        assert_eq!(decode(&encode(&manifest)).ok(), Some(manifest));
    }
});
