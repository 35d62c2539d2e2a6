//! A manifest, or a list of `sha256sum`, of anything.
#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use omsign::manifest_file::{Unsaid, read};

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
    file.write_all(bytes).expect("written");
    let unsaid = Unsaid { model_name: Some("model".into()), ..Unsaid::default() };
    let path = file.path().to_owned();
    let _ = read(&[path.clone()], &unsaid);
    let _ = read(&[path], &Unsaid::default());
});
