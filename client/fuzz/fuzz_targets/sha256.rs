//! Every SHA-256 kernel of this CPU against the `sha2` crate: any messages, cut anywhere, side by side.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omsign::hash::fuzzing::agree_with_sha2;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    kernel: u8,
    blocks_at_once: Vec<u8>,
    messages: Vec<Vec<u8>>,
}

fuzz_target!(|input: Input| {
    let Input { kernel, blocks_at_once, mut messages } = input;
    messages.truncate(40);
    let mut cuts: Vec<_> = blocks_at_once.into_iter().map(|blocks| usize::from(blocks % 16) + 1).collect();
    cuts.push(1);
    agree_with_sha2(kernel.into(), &cuts, &messages);
});
