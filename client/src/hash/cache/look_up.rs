//! Digests from a cache where it has them, and from the files where not.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{Cache, CacheError, Known};
use crate::hash::digest::{Algorithm, Digest};
use crate::hash::schedule::{Hashed, Kept};
use crate::hash::{Looked, Piece};

/// A cache and what came of it.
pub(crate) struct Remembered {
    cache: Cache,
    used: CacheUse,
}

/// What a digest cache saved.
#[derive(Debug, Default)]
pub struct CacheUse {
    /// Digests that were taken from it, of whole files or of shards.
    pub digests: usize,
    /// Bytes that were not read.
    pub bytes: u64,
    /// Digests that are not remembered, because their files were written to just now, or in the future.
    pub young: usize,
    /// What is not remembered, and why: the digests are right all the same.
    pub problem: Option<CacheError>,
}

impl Remembered {
    pub(crate) fn new(cache: Cache) -> Self {
        Self { cache, used: CacheUse::default() }
    }

    pub(crate) fn into_used(self) -> CacheUse {
        self.used
    }

    /// Takes what digests of pieces it has, has the others made, and remembers these, from time to time and at the end.
    pub(crate) fn look_up(
        &mut self,
        algorithm: Algorithm,
        files: &Looked<'_>,
        pieces: &[Piece],
        hash: impl FnOnce(&[Piece], Kept<'_>) -> Hashed,
    ) -> Hashed {
        let stamp = |piece: &Piece| files.stamp(piece.file).expect("a piece is of one of the files");
        let get = |piece: &Piece| self.cache.get(algorithm, stamp(piece), piece);
        let remembered: Vec<Option<Digest>> = pieces.iter().map(get).collect();
        let numbered = pieces.iter().enumerate().zip(&remembered);
        let unknown = numbered.filter(|(_, known)| known.is_none()).map(|(numbered, _)| numbered);
        let (places, unknown): (Vec<usize>, Vec<Piece>) =
            unknown.map(|(place, piece)| (place, piece.clone())).unzip();
        self.used.digests += pieces.len() - unknown.len();
        let saved = Piece::total(pieces).saturating_sub(Piece::total(&unknown));
        self.used.bytes = self.used.bytes.saturating_add(saved);
        // It is read again when it is written.
        self.cache.entries = HashMap::new();
        let cache = Mutex::new(&mut self.cache);
        let keep = |made: &[Digest]| {
            let known = || {
                let known = pieces
                    .iter()
                    .zip(all(&remembered, made))
                    .filter(|(_, (digest, _))| **digest != Digest::NONE);
                known.map(|(piece, (digest, made))| Known { stamp: stamp(piece), piece, digest, made })
            };
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.keep(algorithm, files.sizes().len(), known)
        };
        // Whoever tries again after a failure, or the end of their time, need not begin anew.
        let mut made = hash(&unknown, &|made| drop(keep(made)));
        made.failures
            .iter_mut()
            .for_each(|(index, _)| *index = places.get(*index).copied().unwrap_or(*index));
        match keep(&made.digests) {
            Ok(young) => self.used.young += young,
            Err(problem) => self.used.problem = Some(problem),
        }
        let digests = all(&remembered, &made.digests).map(|(digest, _)| digest.clone()).collect();
        Hashed { digests, failures: made.failures }
    }
}

/// Each piece's digest, where there is one by now, and whether it was made.
fn all<'a>(remembered: &'a [Option<Digest>], made: &'a [Digest]) -> impl Iterator<Item = (&'a Digest, bool)> {
    let mut made = made.iter().map(|digest| (digest, true));
    let known = remembered.iter().map(|known| known.as_ref().map(|digest| (digest, false)));
    known.map_while(move |known| known.or_else(|| made.next()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use super::super::clear;
    use super::*;
    use crate::hash::{Hasher, Root};

    /// Who is stopped, or has it all forgotten, while files are hashed.
    #[test]
    fn what_is_kept_meanwhile() {
        let directory = tempfile::tempdir().expect("a directory");
        let (model, caches) = (directory.path().join("model"), directory.path().join("caches"));
        std::fs::create_dir(&model).expect("made");
        for name in ["a", "b", "c"] {
            std::fs::write(model.join(name), name).expect("written");
        }
        let root = Root::open(&model).expect("opened");
        let hasher = Hasher::new(None, None).expect("a hasher");
        let files = hasher.look(&root, ["a", "b", "c"].map(Path::new).to_vec()).expect("looked at");
        let pieces: Vec<Piece> = (0..3).map(|file| Piece { file, range: 0..1 }).collect();
        let abc = ["a", "b", "c"].map(|text| Digest::sha256(text.as_bytes()));
        let [a, b, c] = &abc;
        let open = || {
            let device = files.get(0).1.device;
            let opened = SystemTime::now() + Duration::from_secs(60);
            let read = Cache::read(&caches, &model).expect("read");
            Remembered::new(Cache { settled: Ok(device), opened, ..read })
        };
        let look_up = |hash: &dyn Fn(&[Piece], Kept<'_>) -> Vec<Digest>| {
            let hash =
                |pieces: &[Piece], kept: Kept<'_>| Hashed { digests: hash(pieces, kept), failures: vec![] };
            let mut remembered = open();
            assert_eq!(remembered.look_up(Algorithm::Sha256, &files, &pieces, hash).digests, abc);
            remembered.into_used().digests
        };
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            look_up(&|_, kept| {
                kept(&[Digest::NONE, b.clone(), Digest::NONE]);
                panic!("it is stopped")
            })
        }));
        assert!(stopped.is_err());
        let of = |pieces: &[Piece]| pieces.iter().map(|piece| piece.file).collect::<Vec<_>>();
        let rest = |pieces: &[Piece], _: Kept<'_>| {
            assert_eq!(of(pieces), [0, 2]);
            vec![a.clone(), c.clone()]
        };
        assert_eq!(look_up(&rest), 1);
        // What it took from there is not written there again.
        std::fs::write(model.join("c"), "c").expect("written anew");
        let written = std::fs::File::options().write(true).open(model.join("c"));
        written.and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH)).expect("at another time");
        let files = hasher.look(&root, ["a", "b", "c"].map(Path::new).to_vec()).expect("looked at");
        let cleared = |_: &[Piece], _: Kept<'_>| {
            assert_eq!(clear(&caches).expect("cleared"), 1);
            Hashed { digests: vec![c.clone()], failures: vec![] }
        };
        let mut remembered = open();
        assert_eq!(remembered.look_up(Algorithm::Sha256, &files, &pieces, cleared).digests, abc);
        assert_eq!(open().cache.entries.len(), 1);
    }
}
