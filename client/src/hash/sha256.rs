//! SHA-256 of many streams: which kernel advances how many of them, and where a stream ends.

use std::time::{Duration, Instant};

use super::digest::Digest;
use super::kernels::{BLOCK, Kernel, MOST_LANES, State, usable};
use super::schedule::{Streams, Unit};

/// FIPS 180-4, 5.3.3.
const START: State =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// Bytes of each stream, and rounds, in the measurement that chooses a kernel: 0.2 ms in all.
const PROBE_BYTES: usize = 2048;
const PROBES: usize = 5;

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
    /// Measures the kernels that this CPU can run, or those of one name. `Err` has the names there are.
    pub(super) fn new(forced: Option<&str>) -> Result<Self, Vec<&'static str>> {
        let mut kernels = usable();
        let mut names: Vec<_> = kernels.iter().map(|kernel| kernel.name).collect();
        kernels.retain(|kernel| forced.is_none_or(|name| name == kernel.name));
        let measured: Vec<_> =
            kernels.into_iter().map(|kernel| (seconds_per_block(&kernel), kernel)).collect();
        // A kernel takes as long for few streams as for all that it has lanes for.
        let best = |streams: usize| {
            let rate = |&(seconds, kernel): &(f64, Kernel)| kernel.lanes.min(streams) as f64 / seconds;
            measured.iter().max_by(|a, b| rate(a).total_cmp(&rate(b))).map(|&(_, kernel)| kernel)
        };
        let Some(fastest) = best(MOST_LANES) else {
            names.dedup();
            return Err(names);
        };
        let choose = |streams| if streams == 0 { Some(fastest) } else { best(streams) };
        Ok(Self { best: std::array::from_fn(|streams| choose(streams).unwrap_or(fastest)) })
    }
}

/// The shortest time that a block takes, in all lanes together.
fn seconds_per_block(kernel: &Kernel) -> f64 {
    let data = [0; PROBE_BYTES];
    let mut states = vec![START; kernel.lanes];
    let mut states: Vec<&mut State> = states.iter_mut().collect();
    let data = vec![data.as_slice(); kernel.lanes];
    let mut shortest = Duration::MAX;
    for _ in 0..PROBES {
        let start = Instant::now();
        kernel.run(&mut states, &data);
        shortest = shortest.min(start.elapsed());
    }
    shortest.as_secs_f64().max(f64::MIN_POSITIVE)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Hashes messages side by side, fed in pieces of whole blocks as long as all have some.
    fn side_by_side(sha256: &Sha256, messages: &[Vec<u8>], piece: usize) -> Vec<Digest> {
        let unit = Unit::whole(0, 0..0);
        let mut streams: Vec<(Stream, &[u8])> =
            messages.iter().map(|message| (sha256.start(&unit), message.as_slice())).collect();
        loop {
            let (mut states, mut data) = (Vec::new(), Vec::new());
            let ready = streams.iter_mut().filter(|(_, rest)| rest.len() >= BLOCK);
            let ready: Vec<_> = ready.collect();
            let shortest = ready.iter().map(|(_, rest)| rest.len() / BLOCK * BLOCK).min().unwrap_or(0);
            for (state, rest) in ready {
                let (now, later) = rest.split_at(shortest.min(piece));
                states.push(state);
                data.push(now);
                *rest = later;
            }
            if states.is_empty() {
                break;
            }
            sha256.update(&mut states, &data);
        }
        streams.into_iter().map(|(state, rest)| sha256.finish(state, rest, &unit)).collect()
    }

    /// Every kernel of this CPU, against the `sha2` crate: each length around the borders of a block and of the
    /// padding, each number of streams.
    #[test]
    fn every_kernel_agrees_with_sha2() {
        let mut names: Vec<_> = usable().iter().map(|kernel| kernel.name).collect();
        names.dedup();
        // Which they are depends on the machine; a log of the tests should say it.
        eprintln!("kernels of this CPU: {names:?}");
        for name in names {
            let sha256 = Sha256::new(Some(name)).unwrap_or_else(|_| panic!("{name} is usable"));
            for streams in 1..=MOST_LANES + 3 {
                for length in (0..=2 * BLOCK + 1).chain([3 * BLOCK - 9, 10 * BLOCK, 10 * BLOCK + 55]) {
                    let message = |n: usize| {
                        (0..length + n * 7 % 5).map(move |i| (i * 31 + n * 17 + i / 251).to_le_bytes()[0])
                    };
                    let messages: Vec<Vec<u8>> = (0..streams).map(|n| message(n).collect()).collect();
                    let digests = side_by_side(&sha256, &messages, (1 + length % 3) * BLOCK);
                    for (message, digest) in messages.iter().zip(digests) {
                        assert_eq!(digest, Digest::sha256(message), "{name}, {streams} of {length} bytes");
                    }
                }
            }
        }
    }

    #[test]
    fn an_unknown_kernel_is_answered_with_the_known() {
        let known = Sha256::new(Some("abacus")).err().expect("unknown");
        assert!(known.contains(&"portable"), "{known:?}");
    }
}
