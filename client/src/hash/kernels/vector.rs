//! SHA-256 with one stream in each 32-bit lane of a vector: eight with AVX2, eight or sixteen with AVX-512. The
//! kernels are one text; they differ in the vector and in the instructions that AVX2 has to do without: rotation,
//! and any function of three inputs in one step.

use std::arch::asm;
use std::arch::x86_64::*;
use std::array::from_fn;

use super::{BLOCK, K, State};

/// The constants, for as many rounds as there are words in a block.
const K_OF_SIXTEEN: [&[u32; 16]; 4] = {
    let (sixteens, _) = K.as_chunks();
    [&sixteens[0], &sixteens[1], &sixteens[2], &sixteens[3]]
};

/// Repeats a block with a constant from 0 to 15: what is indexed with it stays in registers.
macro_rules! sixteen_times {
    ($j:ident $block:block) => { sixteen_times!($j $block 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    ($j:ident $block:block $($value:literal)*) => { $({ const $j: usize = $value; $block })* };
}

macro_rules! kernel {
    ($(#[$documentation:meta])* $name:ident, $features:literal, $vector:ty, $lanes:literal, $instructions:ident) => {
        $(#[$documentation])*
        #[target_feature(enable = $features)]
        pub(super) fn $name(states: &mut [State; $lanes], data: [&[[u8; BLOCK]]; $lanes]) {
            use $instructions::*;

            #[inline]
            #[target_feature(enable = $features)]
            fn round([a, b, c, d, e, f, g, h]: [$vector; 8], w: $vector, k: u32) -> [$vector; 8] {
                // Each round waits for the e and a of the one before: what does not is added first. The compiler, left
                // to itself, adds some of it last: five operations that wait for each other, and not four.
                let ready = kept(add(h, add(splat(k), w)));
                let (chosen, most) = (choose(e, f, g), majority(a, b, c));
                let sum1 = xor3(rotr::<6>(e), rotr::<11>(e), rotr::<25>(e));
                let sum0 = xor3(rotr::<2>(a), rotr::<13>(a), rotr::<22>(a));
                let next_e = add(add(add(d, ready), chosen), sum1);
                let next_a = add(add(add(add(ready, chosen), sum1), most), sum0);
                [next_a, a, b, c, next_e, e, f, g]
            }

            let mut state: [$vector; 8] = from_fn(|word| load(&from_fn(|lane| states[lane][word])));
            let blocks = data.iter().map(|blocks| blocks.len()).min().unwrap_or(0);
            // So that the loop has no bounds to check.
            let data = data.map(|stream| &stream[..blocks]);
            for block in 0..blocks {
                let mut w: [$vector; 16] = words(from_fn(|lane| &data[lane][block]));
                let mut v = state;
                // The word of sixteen rounds later takes the place of each word as soon as its round is begun: what does
                // not wait for anything fills the time of what does.
                let [first, second, third, last] = K_OF_SIXTEEN;
                for k in [first, second, third] {
                    sixteen_times!(J {
                        v = round(v, w[J], k[J]);
                        let (x, y) = (w[(J + 1) % 16], w[(J + 14) % 16]);
                        let sigma0 = xor3(rotr::<7>(x), rotr::<18>(x), shr::<3>(x));
                        let sigma1 = xor3(rotr::<17>(y), rotr::<19>(y), shr::<10>(y));
                        w[J] = add(add(w[J], sigma0), add(w[(J + 9) % 16], sigma1));
                    });
                }
                sixteen_times!(J { v = round(v, w[J], last[J]); });
                state = from_fn(|word| add(state[word], v[word]));
            }
            for (word, vector) in state.into_iter().enumerate() {
                for (state, value) in states.iter_mut().zip(store(vector)) {
                    state[word] = value;
                }
            }
        }
    };
}

kernel!(
    /// Eight streams with AVX2.
    avx2, "avx2", __m256i, 8, with_avx2
);
kernel!(
    /// Eight streams in half vectors, with the instructions of AVX-512.
    avx512_half, "avx512f,avx512bw,avx512vl", __m256i, 8, with_avx512vl
);
kernel!(
    /// Sixteen streams with AVX-512.
    avx512, "avx512f,avx512bw", __m512i, 16, with_avx512
);

/// Functions of the instructions that a kernel is made of. `rotr` and `shr` are generic and stand apart.
macro_rules! instructions {
    ($features:literal $($(#[$documentation:meta])* fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty $body:block)*) => { $(
        $(#[$documentation])*
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn $name($($argument: $type),*) -> $result $body
    )* };
}

/// A value that the compiler cannot take apart, in registers of a class.
macro_rules! kept {
    ($features:literal, $registers:ident, $vector:ty) => {
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn kept(value: $vector) -> $vector {
            let kept;
            // SAFETY: there is no instruction in it.
            unsafe {
                asm!("/* {0:x} */", inlateout($registers) value => kept, options(pure, nomem, nostack, preserves_flags))
            };
            kept
        }
    };
}

mod with_avx2 {
    use super::*;

    kept!("avx2", ymm_reg, __m256i);

    instructions! { "avx2"
        fn add(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        fn splat(word: u32) -> __m256i { _mm256_set1_epi32(word.cast_signed()) }
        fn xor3(a: __m256i, b: __m256i, c: __m256i) -> __m256i { _mm256_xor_si256(_mm256_xor_si256(a, b), c) }
        fn choose(e: __m256i, f: __m256i, g: __m256i) -> __m256i {
            _mm256_xor_si256(g, _mm256_and_si256(e, _mm256_xor_si256(f, g)))
        }
        fn majority(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
            _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)))
        }
        fn load(words: &[u32; 8]) -> __m256i {
            // SAFETY: 32 bytes, from a reference; any alignment.
            unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
        }
        fn store(vector: __m256i) -> [u32; 8] {
            let mut words = [0; 8];
            // SAFETY: 32 bytes, into a local; any alignment.
            unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), vector) };
            words
        }
        /// Word `j` of every block in vector `j`.
        fn words(blocks: [&[u8; BLOCK]; 8]) -> [__m256i; 16] {
            let half = |half: usize| -> [__m256i; 8] {
                // SAFETY: 32 of a block's 64 bytes, from its start or its middle; any alignment.
                transposed(from_fn(|lane| unsafe { _mm256_loadu_si256(blocks[lane].as_ptr().add(32 * half).cast()) }))
            };
            let (first, second) = (half(0), half(1));
            from_fn(|j| if j < 8 { first[j] } else { second[j - 8] })
        }
        /// Eight rows of eight big-endian words, as eight columns.
        fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
            let order = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
            let order = _mm256_broadcastsi128_si256(order);
            let rows: [__m256i; 8] = from_fn(|row| _mm256_shuffle_epi8(rows[row], order));
            // Words of two rows in turns, then of four: pairs[2 i] and pairs[2 i + 1] are of rows 2 i and 2 i + 1.
            let pairs: [__m256i; 8] = from_fn(|i| {
                let (one, other) = (rows[i & !1], rows[i | 1]);
                if i % 2 == 0 { _mm256_unpacklo_epi32(one, other) } else { _mm256_unpackhi_epi32(one, other) }
            });
            // fours[4 q + j] has column j (in its low half) and j + 4 (in its high half) of rows 4 q to 4 q + 3.
            let fours: [__m256i; 8] = from_fn(|i| {
                let (one, other) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 { _mm256_unpacklo_epi64(one, other) } else { _mm256_unpackhi_epi64(one, other) }
            });
            from_fn(|j| {
                let (upper, lower) = (fours[j % 4], fours[4 + j % 4]);
                if j < 4 { _mm256_permute2x128_si256::<0x20>(upper, lower) } else { _mm256_permute2x128_si256::<0x31>(upper, lower) }
            })
        }
    }
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn rotr<const N: i32>(x: __m256i) -> __m256i {
        _mm256_or_si256(_mm256_srli_epi32::<N>(x), _mm256_sllv_epi32(x, _mm256_set1_epi32(32 - N)))
    }
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn shr<const N: i32>(x: __m256i) -> __m256i {
        _mm256_srli_epi32::<N>(x)
    }
}

mod with_avx512vl {
    use super::*;

    pub(super) use super::with_avx2::{add, load, shr, splat, store, words};

    kept!("avx512f,avx512vl", zmm_reg, __m256i);

    instructions! { "avx512f,avx512vl"
        fn xor3(a: __m256i, b: __m256i, c: __m256i) -> __m256i { _mm256_ternarylogic_epi32::<0x96>(a, b, c) }
        fn choose(e: __m256i, f: __m256i, g: __m256i) -> __m256i { _mm256_ternarylogic_epi32::<0xca>(e, f, g) }
        fn majority(a: __m256i, b: __m256i, c: __m256i) -> __m256i { _mm256_ternarylogic_epi32::<0xe8>(a, b, c) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn rotr<const N: i32>(x: __m256i) -> __m256i {
        _mm256_ror_epi32::<N>(x)
    }
}

mod with_avx512 {
    use super::*;

    kept!("avx512f", zmm_reg, __m512i);

    instructions! { "avx512f,avx512bw"
        fn add(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn splat(word: u32) -> __m512i { _mm512_set1_epi32(word.cast_signed()) }
        fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i { _mm512_ternarylogic_epi32::<0x96>(a, b, c) }
        fn choose(e: __m512i, f: __m512i, g: __m512i) -> __m512i { _mm512_ternarylogic_epi32::<0xca>(e, f, g) }
        fn majority(a: __m512i, b: __m512i, c: __m512i) -> __m512i { _mm512_ternarylogic_epi32::<0xe8>(a, b, c) }
        fn load(words: &[u32; 16]) -> __m512i {
            // SAFETY: 64 bytes, from a reference; any alignment.
            unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
        }
        fn store(vector: __m512i) -> [u32; 16] {
            let mut words = [0; 16];
            // SAFETY: 64 bytes, into a local; any alignment.
            unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), vector) };
            words
        }
        /// Word `j` of every block in vector `j`: sixteen rows of big-endian words, as sixteen columns.
        fn words(blocks: [&[u8; BLOCK]; 16]) -> [__m512i; 16] {
            let order = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
            let order = _mm512_broadcast_i32x4(order);
            let rows: [__m512i; 16] = from_fn(|lane| {
                // SAFETY: a block's 64 bytes, from a reference; any alignment.
                let row = unsafe { _mm512_loadu_si512(blocks[lane].as_ptr().cast()) };
                _mm512_shuffle_epi8(row, order)
            });
            // Words of two rows in turns, then of four: pairs[2 i] and pairs[2 i + 1] are of rows 2 i and 2 i + 1.
            let pairs: [__m512i; 16] = from_fn(|i| {
                let (one, other) = (rows[i & !1], rows[i | 1]);
                if i % 2 == 0 { _mm512_unpacklo_epi32(one, other) } else { _mm512_unpackhi_epi32(one, other) }
            });
            // fours[4 q + j] has columns j, j + 4, j + 8, j + 12 (a quarter each) of rows 4 q to 4 q + 3.
            let fours: [__m512i; 16] = from_fn(|i| {
                let (one, other) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 { _mm512_unpacklo_epi64(one, other) } else { _mm512_unpackhi_epi64(one, other) }
            });
            // Of two groups of four rows: columns j and j + 4, or j + 8 and j + 12.
            let halves: [__m512i; 16] = from_fn(|i| {
                let (one, other) = (fours[i / 8 * 8 + i % 4], fours[i / 8 * 8 + i % 4 + 4]);
                if i % 8 < 4 { _mm512_shuffle_i32x4::<0x44>(one, other) } else { _mm512_shuffle_i32x4::<0xee>(one, other) }
            });
            from_fn(|j| {
                let (upper, lower) = (halves[j / 8 * 4 + j % 4], halves[8 + j / 8 * 4 + j % 4]);
                if j % 8 < 4 { _mm512_shuffle_i32x4::<0x88>(upper, lower) } else { _mm512_shuffle_i32x4::<0xdd>(upper, lower) }
            })
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn rotr<const N: i32>(x: __m512i) -> __m512i {
        _mm512_ror_epi32::<N>(x)
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn shr<const N: u32>(x: __m512i) -> __m512i {
        _mm512_srli_epi32::<N>(x)
    }
}
