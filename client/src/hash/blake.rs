//! BLAKE2b, four streams side by side, and BLAKE3, whose tree lets one file be hashed in parts.

use std::ops::Range;

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

use super::Piece;
use super::digest::Digest;
use super::streams::{Streams, Unit};

/// BLAKE2b (RFC 7693) with 64 bytes of output, as many streams at once as the vectors hold.
pub(super) struct Blake2b;

impl Streams for Blake2b {
    type State = blake2b_simd::State;
    const BLOCK: usize = blake2b_simd::BLOCKBYTES;

    fn lanes(&self) -> usize {
        blake2b_simd::many::degree()
    }

    fn start(&self, _: &Unit) -> Self::State {
        blake2b_simd::State::new()
    }

    fn update(&self, states: &mut [&mut Self::State], data: &[&[u8]]) {
        blake2b_simd::many::update_many(states.iter_mut().map(|state| &mut **state).zip(data));
    }

    fn finish(&self, mut state: Self::State, rest: &[u8], _: &Unit) -> Digest {
        Digest::from_bytes(state.update(rest).finalize().as_bytes())
    }
}

/// BLAKE3 of a subtree, or of all there is.
pub(super) struct Blake3;

/// Bytes in a part of a longer input, at least: a power of two times BLAKE3's chunk of 1024.
const SUBTREE_BYTES: u64 = 4 << 20;

/// Parts of all inputs together, at most, besides one for each: what is known of them must not grow with their length.
const MOST_SUBTREES: u64 = 1 << 16;

/// How long a part is, of inputs of so many bytes in all.
pub(super) fn subtree_bytes(total: u64) -> u64 {
    total.div_ceil(MOST_SUBTREES).next_power_of_two().max(SUBTREE_BYTES)
}

impl Streams for Blake3 {
    type State = blake3::Hasher;
    const BLOCK: usize = blake3::BLOCK_LEN;

    /// One stream fills the vectors by itself.
    fn lanes(&self) -> usize {
        1
    }

    fn start(&self, unit: &Unit) -> Self::State {
        let mut state = blake3::Hasher::new();
        state.set_input_offset(unit.offset);
        state
    }

    fn update(&self, states: &mut [&mut Self::State], data: &[&[u8]]) {
        for (state, data) in states.iter_mut().zip(data) {
            state.update(data);
        }
    }

    /// The digest, or the chaining value of a part.
    fn finish(&self, mut state: Self::State, rest: &[u8], unit: &Unit) -> Digest {
        state.update(rest);
        if unit.whole {
            Digest::from_bytes(state.finalize().as_bytes())
        } else {
            Digest::from_bytes(&state.finalize_non_root())
        }
    }
}

impl Blake3 {
    /// The parts of an input that are hashed by themselves, each but the last one as long as said.
    pub(super) fn units(piece: usize, range: &Range<u64>, subtree: u64) -> Vec<Unit> {
        if range.end - range.start <= subtree {
            return vec![Unit::whole(piece, range.clone())];
        }
        let mut units = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start.saturating_add(subtree));
            units.push(Unit { piece, range: start..end, offset: start - range.start, whole: false });
            start = end;
        }
        units
    }

    /// The digests of pieces from those of their units; none where one is missing.
    pub(super) fn merge(parts: &[Digest], units: &[Unit], pieces: &[Piece], subtree: u64) -> Vec<Digest> {
        let mut rest = parts;
        let counts = units.chunk_by(|one, next| one.piece == next.piece).map(<[Unit]>::len);
        let merged = counts.zip(pieces).map(|(count, piece)| {
            let (now, later) = rest.split_at(count);
            rest = later;
            if now.contains(&Digest::NONE) { Digest::NONE } else { Self::whole(now, piece.bytes(), subtree) }
        });
        merged.collect()
    }

    /// The digest of an input from those of its parts.
    fn whole(parts: &[Digest], bytes: u64, subtree: u64) -> Digest {
        match parts {
            [whole] => whole.clone(),
            parts => {
                let (left, right) = halves(parts, bytes, subtree);
                Digest::from_bytes(merge_subtrees_root(&left, &right, Mode::Hash).as_bytes())
            }
        }
    }
}

fn subtree(parts: &[Digest], bytes: u64, of: u64) -> ChainingValue {
    match parts {
        [part] => part.as_bytes().try_into().unwrap_or_default(),
        parts => {
            let (left, right) = halves(parts, bytes, of);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

/// The left subtree is the largest that is full and leaves something to the right.
fn halves(parts: &[Digest], bytes: u64, of: u64) -> (ChainingValue, ChainingValue) {
    let left_bytes = left_subtree_len(bytes);
    let count = usize::try_from(left_bytes / of).unwrap_or(usize::MAX).min(parts.len());
    let (left, right) = parts.split_at(count);
    (subtree(left, left_bytes, of), subtree(right, bytes - left_bytes, of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_digest_of_the_whole() {
        let bytes: Vec<u8> =
            (0..(SUBTREE_BYTES * 5 + 12_345)).map(|i| (i * 7 + i / 251).to_le_bytes()[0]).collect();
        for length in
            [0, 1, SUBTREE_BYTES, SUBTREE_BYTES + 1, SUBTREE_BYTES * 2, SUBTREE_BYTES * 4, bytes.len() as u64]
        {
            let data = &bytes[..usize::try_from(length).expect("it fits")];
            // A range of a file begins anywhere, its tree at nought.
            let units = Blake3::units(0, &(1000..1000 + length), SUBTREE_BYTES);
            let part = |unit: &Unit| {
                let at = usize::try_from(unit.offset).expect("it fits");
                let end = at + usize::try_from(unit.range.end - unit.range.start).expect("it fits");
                Blake3.finish(Blake3.start(unit), &data[at..end], unit)
            };
            let parts: Vec<_> = units.iter().map(part).collect();
            assert_eq!(
                Blake3::whole(&parts, length, SUBTREE_BYTES).as_bytes(),
                blake3::hash(data).as_bytes(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn the_number_of_parts_does_not_grow_with_the_input() {
        for bytes in [0, SUBTREE_BYTES + 1, 17 << 30, (1 << 44) + 1, i64::MAX.unsigned_abs()] {
            let units = Blake3::units(0, &(0..bytes), subtree_bytes(bytes));
            assert!(
                units.len() as u64 <= MOST_SUBTREES && units.last().is_some_and(|u| u.range.end == bytes)
            );
        }
        // Nor with how many there are.
        let (each, files) = (1 << 40, 40_000);
        let units = Blake3::units(0, &(0..each), subtree_bytes(each * files)).len() as u64;
        assert!(units * files <= MOST_SUBTREES + files, "{units} for each");
    }

    #[test]
    fn blake2b_is_rfc_7693() {
        let unit = Unit::whole(0, 0..3);
        // RFC 7693, appendix A.
        let expected = "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1\
                        7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923";
        assert_eq!(Blake2b.finish(Blake2b.start(&unit), b"abc", &unit).to_string(), expected);
    }
}
