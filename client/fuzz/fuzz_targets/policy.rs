//! A trust policy of anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = omsign::policy::check(text);
});
