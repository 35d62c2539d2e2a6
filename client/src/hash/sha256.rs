//! SHA-256 of many streams: which kernel advances how many of them, and where a stream ends.

use std::time::Instant;

use super::digest::Digest;
use super::kernels::{BLOCK, Kernel, MOST_LANES, PORTABLE, State, usable};
use super::source::Buffer;
use super::streams::{Streams, Unit};

/// FIPS 180-4, 5.3.3.
const START: State =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// Bytes of each stream, and rounds, in the measurement that chooses a kernel: half a millisecond in all.
const PROBE_BYTES: usize = 4096;
const PROBES: usize = 5;

/// What more lanes have to bring for a core to take as many streams: more than one measurement differs from the next. With
/// fewer it is less often short of streams.
const FASTER: f64 = 1.02;

/// SHA-256 on this CPU.
pub(super) struct Sha256 {
    /// The kernel that advances `n` streams fastest, at `n`; at 0, the one that is fastest with all its lanes in use.
    best: [Kernel; MOST_LANES + 1],
}

/// Where a stream is.
pub(super) struct Stream {
    state: State,
    bytes: u64,
}

impl Sha256 {
    /// Measures the kernels that may be the fastest on this CPU, or those of one name. `Err` has the names there are.
    pub(super) fn new(forced: Option<&str>) -> Result<Self, Vec<&'static str>> {
        let mut kernels = usable();
        let mut names: Vec<_> = kernels.iter().map(|kernel| kernel.name).collect();
        kernels.retain(|kernel| forced.map_or(kernel.name != PORTABLE, |name| name == kernel.name));
        let best = choose(&measure(kernels)).ok_or_else(|| {
            names.dedup();
            names
        })?;
        Ok(Self { best })
    }
}

/// The best of the kernels that took so long in all their lanes.
fn choose(measured: &[(f64, Kernel)]) -> Option<[Kernel; MOST_LANES + 1]> {
    // A kernel takes as long for few streams as for all that it has lanes for.
    let rate = |seconds: f64, kernel: Kernel, streams: usize| {
        kernel.lanes.min(streams) as f64 / seconds.max(f64::MIN_POSITIVE)
    };
    // Of those that are nearly as fast as the fastest, the one with the fewest lanes; of several with as many, the fastest.
    let best = |streams: usize, nearly: f64| {
        let rated = || measured.iter().map(|&(seconds, kernel)| (rate(seconds, kernel, streams), kernel));
        let enough = rated().map(|(rate, _)| rate).fold(0.0, f64::max) / nearly;
        let order = |one: &(f64, Kernel), next: &(f64, Kernel)| {
            one.1.lanes.cmp(&next.1.lanes).then(next.0.total_cmp(&one.0))
        };
        rated().filter(|(rate, _)| *rate >= enough).min_by(order).map(|(_, kernel)| kernel)
    };
    let fastest = best(MOST_LANES, FASTER)?;
    let for_streams = |streams| if streams == 0 { Some(fastest) } else { best(streams, 1.0) };
    Some(std::array::from_fn(|streams| for_streams(streams).unwrap_or(fastest)))
}

/// With each kernel the shortest time that it took, in all its lanes together. They are measured in turns: a core that
/// just woke up gets faster.
fn measure(kernels: Vec<Kernel>) -> Vec<(f64, Kernel)> {
    // Where files' bytes are, too: from elsewhere each vector is read in two pieces.
    let data = Buffer::new(MOST_LANES * PROBE_BYTES);
    let data: Vec<&[u8]> = data.get(0..MOST_LANES * PROBE_BYTES).chunks(PROBE_BYTES).collect();
    let mut measured: Vec<_> = kernels.into_iter().map(|kernel| (f64::MAX, kernel)).collect();
    for _ in 0..PROBES {
        for (shortest, kernel) in &mut measured {
            let mut states = [START; MOST_LANES];
            let mut states: Vec<&mut State> = states.iter_mut().take(kernel.lanes).collect();
            let start = Instant::now();
            kernel.run(&mut states, data.get(..kernel.lanes).unwrap_or_default());
            *shortest = shortest.min(start.elapsed().as_secs_f64());
        }
    }
    measured
}

impl Streams for Sha256 {
    type State = Stream;
    const BLOCK: usize = BLOCK;

    fn lanes(&self) -> usize {
        self.best.first().map_or(1, |fastest| fastest.lanes)
    }

    fn start(&self, _: &Unit) -> Stream {
        Stream { state: START, bytes: 0 }
    }

    fn update(&self, streams: &mut [&mut Stream], data: &[&[u8]]) {
        for (stream, data) in streams.iter_mut().zip(data) {
            stream.bytes += data.len() as u64;
        }
        let mut states: Vec<&mut State> = streams.iter_mut().map(|stream| &mut stream.state).collect();
        let (mut states, mut data) = (states.as_mut_slice(), data);
        while !states.is_empty() {
            let kernel = self.best.get(states.len()).unwrap_or(&self.best[0]);
            let count = kernel.lanes.min(states.len());
            let (now, later) = states.split_at_mut(count);
            let (data_now, data_later) = data.split_at(count);
            kernel.run(now, data_now);
            (states, data) = (later, data_later);
        }
    }

    /// The padding (FIPS 180-4, 5.1.1): a one bit, zeros, and the length in bits.
    fn finish(&self, mut stream: Stream, rest: &[u8], _: &Unit) -> Digest {
        let bits = (stream.bytes + rest.len() as u64) * 8;
        let mut padded = [0; 2 * BLOCK];
        padded.iter_mut().zip(rest.iter().chain(&[0x80])).for_each(|(to, from)| *to = *from);
        let length = if rest.len() < BLOCK - 8 { BLOCK } else { 2 * BLOCK };
        padded.iter_mut().take(length).rev().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from);
        self.update(&mut [&mut stream], &[padded.get(..length).unwrap_or_default()]);
        let bytes: Vec<u8> = stream.state.iter().flat_map(|word| word.to_be_bytes()).collect();
        Digest::from_bytes(&bytes)
    }
}

/// Checks a kernel of this CPU against the `sha2` crate: messages side by side, fed so many blocks at once at most, in
/// turns, as long as all that are left have some. Panics where they differ.
#[cfg(any(test, fuzzing))]
pub fn agree_with_sha2(kernel: usize, blocks_at_once: &[usize], messages: &[Vec<u8>]) {
    let kernels = usable();
    let kernel = kernels.get(kernel % kernels.len()).expect("one is usable");
    let sha256 = Sha256 { best: [*kernel; MOST_LANES + 1] };
    let unit = Unit::whole(0, 0..0);
    let mut streams: Vec<_> =
        messages.iter().map(|message| (sha256.start(&unit), message.as_slice())).collect();
    for blocks_at_once in blocks_at_once.iter().cycle() {
        let mut ready: Vec<_> = streams.iter_mut().filter(|(_, rest)| rest.len() >= BLOCK).collect();
        let shortest = ready.iter().map(|(_, rest)| rest.len() / BLOCK).min().unwrap_or(0);
        let (mut states, mut data) = (Vec::new(), Vec::new());
        for (state, rest) in &mut ready {
            let (now, later) = rest.split_at(shortest.min(*blocks_at_once) * BLOCK);
            states.push(state);
            data.push(now);
            *rest = later;
        }
        if states.is_empty() {
            break;
        }
        sha256.update(&mut states, &data);
    }
    for (n, ((stream, rest), message)) in streams.into_iter().zip(messages).enumerate() {
        let (digest, expected) = (sha256.finish(stream, rest, &unit), Digest::sha256(message));
        let Kernel { name, lanes, .. } = kernel;
        assert_eq!(
            digest,
            expected,
            "{name} x {lanes}, message {n} of {}, {} bytes",
            messages.len(),
            message.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher as _, RandomState};

    use super::*;

    /// Each length around the borders of a block and of the padding, each number of streams, each kernel.
    #[test]
    fn every_kernel_agrees_with_sha2() {
        let names: Vec<_> =
            usable().iter().map(|kernel| format!("{} x {}", kernel.name, kernel.lanes)).collect();
        // Which they are depends on the machine: tests/avx512 looks for those that few have.
        eprintln!("kernels of this CPU: {}", names.join(", "));
        for kernel in 0..names.len() {
            for streams in 1..=MOST_LANES + 3 {
                for length in (0..2).chain(54..=65).chain(118..=130).chain([3 * BLOCK - 9, 40 * BLOCK + 55]) {
                    let byte = |n: usize, i: usize| (i * 31 + n * 17 + i / 251).to_le_bytes()[0];
                    let message = |n: usize| (0..length + n * 7 % 5).map(|i| byte(n, i)).collect();
                    let messages: Vec<Vec<u8>> = (0..streams).map(message).collect();
                    // Cut here and there, other than the next one.
                    let cuts = [1 + length % 3, 7, 1 + length * streams % 5, 19];
                    agree_with_sha2(kernel, &cuts, &messages);
                }
            }
        }
    }

    /// Messages of many lengths, cut at any block, other ones in each run: `OMSIGN_SEED` chooses the same again.
    #[test]
    fn random_splits_agree_with_sha2() {
        let chosen = std::env::var("OMSIGN_SEED").ok().map(|seed| seed.parse().expect("a number"));
        let mut state: u64 = chosen.unwrap_or_else(|| RandomState::new().hash_one("a seed"));
        eprintln!("OMSIGN_SEED={state}");
        let mut random = || {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        let mut below = |bound: usize| usize::try_from(random() % bound as u64).expect("below a usize");
        for kernel in 0..usable().len() {
            for _ in 0..100 {
                let (longest, cuts) = (1 + below(4000), 1 + below(12));
                let cuts: Vec<_> = (0..cuts).map(|_| 1 + below(20)).collect();
                let mut message = |_| (0..below(longest)).map(|_| below(256).to_le_bytes()[0]).collect();
                let messages: Vec<Vec<u8>> = (0..=MOST_LANES).map(&mut message).collect();
                agree_with_sha2(kernel, &cuts, &messages[..=below(MOST_LANES)]);
            }
        }
    }

    #[test]
    fn the_fastest_is_chosen_for_each_number_of_streams() {
        let kernel = |name, lanes| {
            let mut kernel = usable()[0];
            (kernel.name, kernel.lanes) = (name, lanes);
            kernel
        };
        let chosen = |times: &[(f64, &'static str, usize)]| {
            let measured: Vec<_> =
                times.iter().map(|&(time, name, lanes)| (time, kernel(name, lanes))).collect();
            choose(&measured).expect("one of them").map(|kernel| (kernel.name, kernel.lanes))
        };
        // Alone, two, three or four together, and from nine on the wide one.
        let best = chosen(&[(1.0, "soft", 1), (0.6, "four", 1), (1.0, "four", 4), (2.1, "wide", 16)]);
        assert_eq!(best[1..=3], [("four", 1), ("four", 4), ("four", 4)]);
        assert_eq!(
            (best[8], best[9], best[16], best[0]),
            (("four", 4), ("wide", 16), ("wide", 16), ("wide", 16))
        );
        // Twice as many lanes that bring little are not worth it where a core chooses how many streams it takes.
        let best = chosen(&[(1.0, "four", 4), (1.97, "eight", 8)]);
        assert_eq!((best[0], best[4], best[8]), (("four", 4), ("four", 4), ("eight", 8)));
        let best = chosen(&[(1.0, "four", 4), (1.85, "eight", 8)]);
        assert_eq!((best[0], best[4], best[8]), (("eight", 8), ("four", 4), ("eight", 8)));
        // It is the fastest that another has to come near to.
        let best = chosen(&[(1.0, "two", 2), (1.97, "four", 4), (3.88, "eight", 8)]);
        assert_eq!(best[0], ("four", 4));
        // The order says nothing.
        assert_eq!(chosen(&[(1.0, "quick", 1), (3.0, "slow", 1)])[1].0, "quick");
        assert_eq!(chosen(&[(3.0, "slow", 1), (1.0, "quick", 1)])[1].0, "quick");
    }

    #[test]
    fn an_unknown_kernel_is_answered_with_the_known() {
        let known = Sha256::new(Some("abacus")).err().expect("unknown");
        assert!(known.contains(&"portable"), "{known:?}");
        for name in known {
            assert!(Sha256::new(Some(name)).is_ok(), "{name}");
        }
    }
}
