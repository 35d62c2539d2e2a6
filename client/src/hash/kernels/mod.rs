//! SHA-256's compression function over several streams at once, for the CPU at hand: what [`super::sha256`] runs on.
//!
//! The tape-sha256 crate (0.2) has such kernels, too. Side by side it takes whole messages from memory only; files need
//! states that can be kept between two pieces of each.
//!
//! The only `unsafe` of the workspace outside the fixtures. Three promises are all there is to it: a kernel runs only
//! where its CPU features were detected, since [`usable`] alone makes one; reads and writes of vectors go through
//! arrays whose length the type states; and OpenSSL reads whole blocks of a slice.
#![allow(
    unsafe_code,
    reason = "vector instructions, and OpenSSL's block function; see the module's documentation"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "a block and a stream are indices into several arrays at once"
)]

use openssl_sys::{SHA_LBLOCK, SHA256_CTX, SHA256_Update};

mod portable;
#[cfg(target_arch = "x86_64")]
mod sha_ni;
#[cfg(target_arch = "x86_64")]
mod vector;

/// The eight working words (FIPS 180-4, 6.2).
pub(super) type State = [u32; 8];

/// Bytes in a block.
pub(super) const BLOCK: usize = 64;

/// The most streams that any kernel takes at once.
pub(super) const MOST_LANES: usize = 16;

/// The one that is never the fastest.
pub(super) const PORTABLE: &str = "portable";

/// A compression function for up to `lanes` streams.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// What `OMSIGN_HASH_KERNEL` calls it.
    pub(super) name: &'static str,
    /// Streams that it advances in the time of one.
    pub(super) lanes: usize,
    run: fn(&mut [&mut State], &[&[u8]]),
}

impl Kernel {
    /// Advances each stream by its data: `lanes` of them at most, whole blocks, the same number for each.
    pub(super) fn run(&self, states: &mut [&mut State], data: &[&[u8]]) {
        let equal = data.windows(2).all(|pair| pair.first().map(|d| d.len()) == pair.last().map(|d| d.len()));
        assert!(equal && states.len() == data.len() && states.len() <= self.lanes, "streams side by side");
        if !states.is_empty() {
            (self.run)(states, data);
        }
    }
}

/// The kernels that this CPU can run.
pub(super) fn usable() -> Vec<Kernel> {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "there these are the only ones"))]
    let mut kernels = vec![
        Kernel { name: PORTABLE, lanes: 1, run: portable },
        Kernel { name: "sha2", lanes: 1, run: sha2 },
        Kernel { name: "openssl", lanes: 1, run: openssl },
    ];
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! kernel {
            ($name:literal, $lanes:literal, $compress:path) => {
                kernels.push(Kernel {
                    name: $name,
                    lanes: $lanes,
                    run: |states, data| {
                        // SAFETY: what this kernel is compiled for was detected before it was pushed.
                        side_by_side::<$lanes>(states, data, |states, data| unsafe {
                            $compress(states, data)
                        })
                    },
                })
            };
        }
        if is_x86_feature_detected!("sha") && is_x86_feature_detected!("avx") {
            kernel!("sha-ni", 1, sha_ni::compress);
            kernel!("sha-ni", 2, sha_ni::compress);
            kernel!("sha-ni", 4, sha_ni::compress);
        }
        if is_x86_feature_detected!("avx2") {
            kernel!("avx2", 8, vector::avx2);
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            kernel!("avx512", 8, vector::avx512_half);
            kernel!("avx512", 16, vector::avx512);
        }
    }
    kernels
}

/// One stream, as any CPU does it: for tests, and for one whose own instructions are not to be believed.
fn portable(states: &mut [&mut State], data: &[&[u8]]) {
    for (state, data) in states.iter_mut().zip(data) {
        portable::compress(state, data.as_chunks::<BLOCK>().0);
    }
}

/// One stream, as the `sha2` crate does it: with the CPU's own instructions, on ARMv8, too.
fn sha2(states: &mut [&mut State], data: &[&[u8]]) {
    for (state, data) in states.iter_mut().zip(data) {
        ::sha2::block_api::compress256(state, data.as_chunks::<BLOCK>().0);
    }
}

/// One stream, as OpenSSL does it: 1.7 times as fast as the `sha2` crate where a CPU has no SHA instructions (Zen 3, without
/// them). Its newer interface keeps a stream's state to itself, and streams go from one kernel to another.
fn openssl(states: &mut [&mut State], data: &[&[u8]]) {
    for (state, data) in states.iter_mut().zip(data) {
        let mut context =
            SHA256_CTX { h: **state, Nl: 0, Nh: 0, data: [0; SHA_LBLOCK as usize], num: 0, md_len: 0 };
        // SAFETY: `data` is as long as that says. Of whole blocks nothing is left in the context but the state, and it has
        // no state that could be wrong (SHA256_Init(3)).
        unsafe { SHA256_Update(&raw mut context, data.as_ptr().cast(), data.len()) };
        **state = context.h;
    }
}

/// Runs a kernel of exactly `N` streams on as many or fewer; the others repeat the first one's work, for nothing.
#[cfg(target_arch = "x86_64")]
fn side_by_side<const N: usize>(
    states: &mut [&mut State],
    data: &[&[u8]],
    compress: impl Fn(&mut [State; N], [&[[u8; BLOCK]]; N]),
) {
    let lane = |n: usize| if n < data.len() { n } else { 0 };
    let mut advanced: [State; N] = std::array::from_fn(|n| *states[lane(n)]);
    compress(&mut advanced, std::array::from_fn(|n| data[lane(n)].as_chunks().0));
    for (state, advanced) in states.iter_mut().zip(advanced) {
        **state = advanced;
    }
}

/// The constants of the rounds (FIPS 180-4, 4.2.2).
const K: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];
