//! SHA-256 with the x86 SHA extensions, `N` streams interleaved: each instruction waits for the one before it in its
//! own stream, and the other streams fill that time.

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi8,
    _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
    _mm_shuffle_epi32, _mm_storeu_si128,
};
use std::array::from_fn;

use super::{BLOCK, K, State};

/// Advances `N` streams, each by its whole blocks.
#[target_feature(enable = "sha,sse4.1,avx")]
pub(super) fn compress<const N: usize>(states: &mut [State; N], data: [&[[u8; BLOCK]]; N]) {
    // The instructions hold the state as two vectors: words A B E F, and C D G H.
    let mut abef = [_mm_setzero_si128(); N];
    let mut cdgh = abef;
    for n in 0..N {
        let [a, b, c, d, e, f, g, h] = states[n];
        let (abcd, efgh) = (_mm_shuffle_epi32::<0xb1>(load(&[a, b, c, d])), load(&[e, f, g, h]));
        let efgh = _mm_shuffle_epi32::<0x1b>(efgh);
        abef[n] = _mm_alignr_epi8::<8>(abcd, efgh);
        cdgh[n] = _mm_blend_epi16::<0xf0>(efgh, abcd);
    }
    let blocks = data.iter().map(|blocks| blocks.len()).min().unwrap_or(0);
    // So that the loop has no bounds to check.
    let data = data.map(|stream| &stream[..blocks]);
    for block in 0..blocks {
        let before = (abef, cdgh);
        // The last sixteen words of the message schedule, four to a vector.
        let mut w: [[__m128i; 4]; N] = from_fn(|n| from_fn(|i| words(&data[n][block], i)));
        // Four rounds, with the words in vector `$i` of the schedule.
        macro_rules! rounds {
            ($t:literal, $i:literal) => {
                let wk: [__m128i; N] = from_fn(|n| _mm_add_epi32(w[n][$i], constants($t)));
                for n in 0..N {
                    cdgh[n] = _mm_sha256rnds2_epu32(cdgh[n], abef[n], wk[n]);
                }
                for n in 0..N {
                    abef[n] = _mm_sha256rnds2_epu32(abef[n], cdgh[n], _mm_shuffle_epi32::<0x0e>(wk[n]));
                }
            };
        }
        // The next four words, in place of the oldest; the vectors are named from the oldest to the newest.
        macro_rules! extend_and_rounds {
            ($t:literal, $i:literal, $second:literal, $third:literal, $newest:literal) => {
                for n in 0..N {
                    let partial = _mm_sha256msg1_epu32(w[n][$i], w[n][$second]);
                    let seven_ago = _mm_alignr_epi8::<4>(w[n][$newest], w[n][$third]);
                    w[n][$i] = _mm_sha256msg2_epu32(_mm_add_epi32(partial, seven_ago), w[n][$newest]);
                }
                rounds!($t, $i);
            };
        }
        rounds!(0, 0);
        rounds!(4, 1);
        rounds!(8, 2);
        rounds!(12, 3);
        extend_and_rounds!(16, 0, 1, 2, 3);
        extend_and_rounds!(20, 1, 2, 3, 0);
        extend_and_rounds!(24, 2, 3, 0, 1);
        extend_and_rounds!(28, 3, 0, 1, 2);
        extend_and_rounds!(32, 0, 1, 2, 3);
        extend_and_rounds!(36, 1, 2, 3, 0);
        extend_and_rounds!(40, 2, 3, 0, 1);
        extend_and_rounds!(44, 3, 0, 1, 2);
        extend_and_rounds!(48, 0, 1, 2, 3);
        extend_and_rounds!(52, 1, 2, 3, 0);
        extend_and_rounds!(56, 2, 3, 0, 1);
        extend_and_rounds!(60, 3, 0, 1, 2);
        for n in 0..N {
            abef[n] = _mm_add_epi32(abef[n], before.0[n]);
            cdgh[n] = _mm_add_epi32(cdgh[n], before.1[n]);
        }
    }
    for n in 0..N {
        let (feba, dchg) = (_mm_shuffle_epi32::<0x1b>(abef[n]), _mm_shuffle_epi32::<0xb1>(cdgh[n]));
        let abcd = store(_mm_blend_epi16::<0xf0>(feba, dchg));
        let efgh = store(_mm_alignr_epi8::<8>(dchg, feba));
        states[n] = from_fn(|word| if word < 4 { abcd[word] } else { efgh[word - 4] });
    }
}

#[inline]
#[target_feature(enable = "sse2")]
fn load(words: &[u32; 4]) -> __m128i {
    // SAFETY: sixteen bytes, from a reference; any alignment.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn store(vector: __m128i) -> [u32; 4] {
    let mut words = [0; 4];
    // SAFETY: sixteen bytes, into a local; any alignment.
    unsafe { _mm_storeu_si128(words.as_mut_ptr().cast(), vector) };
    words
}

/// Words `4 i` to `4 i + 3` of a block, which holds them in big-endian order.
#[inline]
#[target_feature(enable = "ssse3")]
fn words(block: &[u8; BLOCK], i: usize) -> __m128i {
    let (quarters, _) = block.as_chunks::<16>();
    // SAFETY: sixteen bytes, from a reference; any alignment.
    let bytes = unsafe { _mm_loadu_si128(quarters[i].as_ptr().cast()) };
    _mm_shuffle_epi8(bytes, _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3))
}

/// The constants of rounds `t` to `t + 3`.
#[inline]
#[target_feature(enable = "sse2")]
fn constants(t: usize) -> __m128i {
    load(&[K[t], K[t + 1], K[t + 2], K[t + 3]])
}
