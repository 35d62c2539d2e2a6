//! What is hashed side by side, and how an algorithm does that.

use std::ops::Range;

use super::digest::Digest;

/// A hash algorithm, as streams that are advanced side by side.
pub(super) trait Streams: Sync {
    /// Where a stream is.
    type State: Send;
    /// Bytes that streams are advanced by, or a multiple.
    const BLOCK: usize;
    /// How many streams at once are fastest.
    fn lanes(&self) -> usize;
    /// A stream at its start.
    fn start(&self, unit: &Unit) -> Self::State;
    /// Advances each stream by its data: whole blocks, as many for each.
    fn update(&self, states: &mut [&mut Self::State], data: &[&[u8]]);
    /// A stream's end: less than a block is left.
    fn finish(&self, state: Self::State, rest: &[u8], unit: &Unit) -> Digest;
}

/// What is hashed by itself: a file, or a shard of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which of the files.
    pub file: usize,
    /// Which of its bytes.
    pub range: Range<u64>,
}

impl Piece {
    /// How many bytes they are.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// How many bytes all of them are. Sparse files can claim more than there can be.
    pub fn total(pieces: &[Self]) -> u64 {
        pieces.iter().fold(0, |sum, piece| sum.saturating_add(piece.bytes()))
    }
}

/// Bytes that are hashed one after the other, on one core.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    /// The piece that asked for it.
    pub(super) piece: usize,
    /// Where its bytes are in the file.
    pub(super) range: Range<u64>,
    /// Where they are in the piece.
    pub(super) offset: u64,
    /// Whether they are the whole piece.
    pub(super) whole: bool,
}

impl Unit {
    /// A piece that is hashed in one go.
    pub(super) fn whole(piece: usize, range: Range<u64>) -> Self {
        Self { piece, range, offset: 0, whole: true }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}
