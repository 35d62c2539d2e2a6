//! A manifest, or a list of `sha256sum`, of anything; and of two files that are put together.
#![no_main]

use std::io::Write as _;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use omsign::manifest_file::{Unsaid, document, read};

fn file(bytes: &[u8]) -> (tempfile::NamedTempFile, PathBuf) {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
    file.write_all(bytes).expect("written");
    let path = file.path().to_owned();
    (file, path)
}

// Two files, with a zero byte between them, or one.
fuzz_target!(|bytes: &[u8]| {
    let files: Vec<_> = bytes.splitn(2, |byte| *byte == 0).map(file).collect();
    let paths: Vec<PathBuf> = files.iter().map(|(_, path)| path.clone()).collect();
    let unsaid = Unsaid { model_name: Some("model".into()), ..Unsaid::default() };
    for unsaid in [unsaid, Unsaid::default()] {
        let Ok((manifest, bytes)) = read(&paths, &unsaid) else { continue };
        // What was put together is a whole model, and written so that it is read the same.
        let text = serde_json::to_vec(&document(&manifest, bytes.unwrap_or(0), None)).expect("JSON");
        let (_file, path) = file(&text);
        assert_eq!(read(&[path], &Unsaid::default()).expect("a manifest").0, manifest);
    }
});
