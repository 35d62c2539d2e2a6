//! A trust policy of anything.
#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use omsign::policy::Edit;

fuzz_target!(|text: &str| {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
    file.write_all(text.as_bytes()).expect("written");
    // Read as every command does, and by the other parser, which edits it. What it names is not read.
    let _ = Edit::open(file.path());
});
