//! A model's files and digests as they are signed (OMS v1.0, 5.2), and how they are found.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::Error;
use crate::hash::{Algorithm, Digest, HashError, Hasher, Looked, Piece};
use crate::model::{self, Closed, Model, ModelError, Odd, Oddity, Scope};

/// Bytes in a shard, unless somebody says otherwise (OMS v1.0, 6.3.2).
pub const DEFAULT_SHARD_BYTES: NonZeroU64 = NonZeroU64::new(1_000_000_000).expect("not zero");

/// A model that took no longer need not be looked at once more at the end: what changes within so short a time may as well
/// change right after.
pub const BRIEF: Duration = Duration::from_millis(250);

/// What is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// What the signer calls the model (OMS v1.0, 6.5.1).
    pub model_name: String,
    /// Files, or shards, in the order in which they are listed.
    pub resources: Vec<Resource>,
    /// How they were found and hashed.
    pub serialization: Serialization,
}

/// One file, or shard, and its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Path of the file below the model's root.
    pub file: String,
    /// Which of its bytes, where files are sharded.
    pub shard: Option<Range<u64>>,
    /// Digest of its content.
    pub digest: Digest,
}

impl Resource {
    /// The name that is signed.
    pub fn name(&self) -> String {
        resource_name(&self.file, self.shard.as_ref())
    }
}

/// `PATH`, or `PATH:START:END` for a shard (OMS v1.0, 6.3.2).
fn resource_name(file: &str, shard: Option<&Range<u64>>) -> String {
    match shard {
        None => file.to_owned(),
        Some(Range { start, end }) => format!("{file}:{start}:{end}"),
    }
}

/// How files were found and hashed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serialization {
    /// What has a digest.
    pub method: Method,
    /// How it is hashed.
    pub algorithm: Algorithm,
    /// Whether symbolic links were followed.
    pub allow_symlinks: bool,
    /// What was left out, below the root, sorted. `None` where the signer did not say, as in bundles before 1.1.
    pub ignore_paths: Option<BTreeSet<String>>,
}

static NOTHING: BTreeSet<String> = BTreeSet::new();

impl Serialization {
    /// What was left out, as far as the signer said.
    pub fn left_out(&self) -> &BTreeSet<String> {
        self.ignore_paths.as_ref().unwrap_or(&NOTHING)
    }

    /// Finds the files that it is about.
    pub fn walk(&self, model: &Path) -> Result<Model, ModelError> {
        let (ignore_paths, allow_symlinks) = (self.left_out().clone(), self.allow_symlinks);
        let scope = Scope { ignore_paths, allow_symlinks, only: BTreeSet::new() };
        let mut found = Model::walk(model, &scope)?;
        if let Some(Closed { path, source, .. }) = found.closed.drain(..).next() {
            return Err(ModelError::Read { path, source });
        }
        if let Some(Odd { name, what }) = found.odd.first() {
            return Err(ModelError::Odd(model.join(name), *what));
        }
        match found.files.as_slice() {
            // In a directory it is odd.
            [only] if only.name.contains('\\') => Err(ModelError::Odd(model.to_owned(), Oddity::Backslash)),
            _ => Ok(found),
        }
    }
}

/// What has a digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Each file.
    #[default]
    Files,
    /// Each so many bytes of each file. Empty files have none.
    Shards(NonZeroU64),
}

/// A model as it was found, and what of it will be hashed.
pub struct Plan<'a> {
    model: &'a Model,
    files: Looked<'a>,
    serialization: Serialization,
    /// In the order of the manifest: by name, in code-point order (OMS v1.0, 6.4).
    pieces: Vec<Piece>,
}

/// One of several parts of a model, each hashed on a machine of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 1.
    pub index: NonZeroUsize,
    /// How many there are.
    pub of: NonZeroUsize,
}

impl<'a> Plan<'a> {
    /// Looks at the files of a model.
    pub fn new(model: &'a Model, serialization: Serialization, hasher: &Hasher) -> Result<Self, Error> {
        let files = hasher.look(&model.root, model.paths())?;
        let whole = |(file, size)| Piece { file, range: 0..size };
        let mut plan = Self { model, files, serialization, pieces: Vec::new() };
        let sizes = plan.files.sizes().enumerate();
        match plan.serialization.method {
            Method::Files => plan.pieces = sizes.map(whole).collect(),
            Method::Shards(bytes) => {
                let count = plan.files.sizes().map(|size| size.div_ceil(bytes.get()));
                if count.fold(0, u64::saturating_add) > model::MOST_SHARDS {
                    return Err(ModelError::Shards(model.name.clone().into()).into());
                }
                let sharded = |(file, size)| shards(size, bytes).map(move |range| Piece { file, range });
                let mut pieces: Vec<_> = sizes.flat_map(sharded).collect();
                pieces.sort_by_cached_key(|piece| plan.name(piece));
                plan.pieces = pieces;
            }
        }
        if plan.pieces.is_empty() {
            return Err(ModelError::Empty(model.name.clone().into()).into());
        }
        Ok(plan)
    }

    fn name(&self, piece: &Piece) -> String {
        let sharded = self.serialization.method != Method::Files;
        resource_name(self.model.file_name(piece.file), sharded.then_some(&piece.range))
    }

    /// SHA-256 over the names of all resources: what its parts have to have together.
    pub fn names(&self) -> Digest {
        names_digest(self.pieces.iter().map(|piece| self.name(piece)))
    }

    /// How long its statement is, at least: beside its name a resource has a digest, and what these are called.
    pub(crate) fn statement_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| self.model.file_name(piece.file).len() + 100).sum()
    }

    /// How many of its files have no digest: of an empty one there are no shards (OMS v1.0, 6.3.2).
    pub fn unsigned_files(&self) -> usize {
        match self.serialization.method {
            Method::Files => 0,
            Method::Shards(_) => self.files.sizes().filter(|size| *size == 0).count(),
        }
    }

    /// Whether one of its files is this one, by device and inode.
    pub fn has(&self, device: u64, inode: u64) -> bool {
        self.files.has(device, inode)
    }

    /// SHA-256 over the names and sizes of all resources, and a sample of the largest ones' content: whoever plans the same model and
    /// options has the same.
    pub fn listing(&self, hasher: &Hasher) -> Result<Digest, HashError> {
        let mut text = format!("{}\n", hasher.sample(&self.files)?);
        for piece in &self.pieces {
            let _ = writeln!(text, "{} {}", piece.bytes(), self.name(piece));
        }
        Ok(Digest::sha256(text.as_bytes()))
    }

    /// Keeps one part. Parts have about as many bytes each: the largest resource left always goes to the part that has
    /// least, so that every machine comes to the same division by itself.
    #[must_use]
    pub fn part(mut self, part: Part) -> Self {
        let mut largest_first: Vec<usize> = (0..self.pieces.len()).collect();
        largest_first.sort_by_key(|&index| std::cmp::Reverse(self.pieces.get(index).map(Piece::bytes)));
        // Files cost something even where they are empty. Of more parts than resources, the last ones are empty.
        let mut loads: BTreeSet<(u64, usize)> =
            (0..part.of.get().min(self.pieces.len())).map(|part| (0, part)).collect();
        let mut mine = BTreeSet::new();
        for index in largest_first {
            let Some((load, to)) = loads.pop_first() else { break };
            loads.insert((
                load.saturating_add(self.pieces.get(index).map_or(0, Piece::bytes)).saturating_add(1),
                to,
            ));
            if to + 1 == part.index.get() {
                mine.insert(index);
            }
        }
        let mut index = 0..;
        self.pieces.retain(|_| index.next().is_some_and(|index| mine.contains(&index)));
        self
    }

    /// The size in bytes of what is left of it.
    pub fn bytes(&self) -> u64 {
        Piece::total(&self.pieces)
    }

    /// Hashes what is left of it.
    pub fn hash(&self, hasher: &Hasher) -> Result<Vec<Digest>, Error> {
        let digests = hasher.digests(self.serialization.algorithm, &self.files, &self.pieces)?;
        self.model.root.check_in_place()?;
        Ok(digests)
    }

    /// What is signed, with these digests.
    pub fn manifest(&self, digests: Vec<Digest>) -> Manifest {
        let Self { model, serialization, pieces, .. } = self;
        let sharded = serialization.method != Method::Files;
        let resource = |(piece, digest): (&Piece, Digest)| Resource {
            file: model.file_name(piece.file).to_owned(),
            shard: sharded.then(|| piece.range.clone()),
            digest,
        };
        let resources = pieces.iter().zip(digests).map(resource).collect();
        Manifest { model_name: model.name.clone(), resources, serialization: serialization.clone() }
    }

    /// Whether the model, found once more, has the same files in the same states: hashing may have taken hours.
    pub fn check_unchanged(&self, again: &Model, hasher: &Hasher) -> Result<(), HashError> {
        let (before, after) = (&self.model.files, &again.files);
        let differs = before.iter().zip(after).find(|(one, other)| one.name != other.name);
        // Of a file that came, or went, one of the two lists has one more.
        let first = differs.map(|(one, other)| if one.name < other.name { one } else { other });
        let longer = if before.len() > after.len() { before } else { after };
        if let Some(changed) = first.or(longer.get(before.len().min(after.len()))) {
            return Err(HashError::Changed(self.model.root.path_of(changed.path())));
        }
        self.files.check_same(&hasher.look(&again.root, again.paths())?)
    }
}

/// SHA-256 over names, sorted, each with a zero byte at its end.
pub(crate) fn names_digest(names: impl Iterator<Item = String>) -> Digest {
    let mut hasher = Sha256::new();
    names.for_each(|name| {
        hasher.update(name);
        hasher.update([0]);
    });
    Digest::from_sha256(hasher)
}

/// SHA-256 over raw digests, in this order.
pub(crate) fn root_digest(resources: &[Resource]) -> Digest {
    let mut hasher = Sha256::new();
    resources.iter().for_each(|resource| hasher.update(resource.digest.as_bytes()));
    Digest::from_sha256(hasher)
}

/// Consecutive ranges of at most so many bytes.
fn shards(size: u64, bytes: NonZeroU64) -> impl Iterator<Item = Range<u64>> {
    let bytes = bytes.get();
    (0..size.div_ceil(bytes)).map(move |index| index * bytes..size.min((index + 1).saturating_mul(bytes)))
}

impl Manifest {
    /// SHA-256 over the raw digests in listed order (OMS v1.0, 6.5.1).
    pub fn root_digest(&self) -> Digest {
        root_digest(&self.resources)
    }

    /// How many files its resources are of.
    pub fn files(&self) -> usize {
        match self.serialization.method {
            Method::Files => self.resources.len(),
            Method::Shards(_) => {
                self.resources.iter().map(|resource| &resource.file).collect::<BTreeSet<_>>().len()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> (tempfile::TempDir, Model, Hasher) {
        let root = tempfile::tempdir().expect("a directory");
        for (name, size) in [("w", 25), ("w:1", 10), ("a", 7), ("empty", 0), ("b", 1), ("c", 9)] {
            std::fs::write(root.path().join(name), vec![b'x'; size]).expect("written");
        }
        let model = Serialization::default().walk(root.path()).expect("a model");
        (root, model, Hasher::new(None, None).expect("a hasher"))
    }

    fn hash(model: &Model, serialization: Serialization, hasher: &Hasher) -> (Manifest, u64) {
        let plan = Plan::new(model, serialization, hasher).expect("planned");
        (plan.manifest(plan.hash(hasher).expect("hashed")), plan.bytes())
    }

    fn ten() -> Serialization {
        let method = Method::Shards(NonZeroU64::new(10).expect("not zero"));
        Serialization { method, ..Serialization::default() }
    }

    #[test]
    fn the_root_digest_follows_the_listed_order() {
        let (_root, model, hasher) = model();
        let (mut manifest, bytes) = hash(&model, Serialization::default(), &hasher);
        assert_eq!((bytes, manifest.files()), (52, 6));
        let root = manifest.root_digest();
        manifest.resources.reverse();
        assert_ne!(manifest.root_digest(), root);
    }

    #[test]
    fn what_changes_after_it_was_hashed() {
        type Change = fn(&Path) -> std::io::Result<()>;
        let changes: [(&str, Change); 4] = [
            ("a", |root| std::fs::write(root.join("a"), "another")),
            ("ab", |root| std::fs::write(root.join("ab"), "")),
            ("z", |root| std::fs::write(root.join("z"), "")),
            ("w:1", |root| std::fs::remove_file(root.join("w:1"))),
        ];
        for (name, change) in changes {
            let (root, model, hasher) = model();
            let plan = Plan::new(&model, Serialization::default(), &hasher).expect("planned");
            let again = || Serialization::default().walk(root.path()).expect("a model");
            plan.check_unchanged(&again(), &hasher).expect("nothing changed");
            change(root.path()).expect("changed");
            let changed = plan.check_unchanged(&again(), &hasher);
            let changed = matches!(&changed, Err(HashError::Changed(path)) if path.ends_with(name));
            assert!(changed, "{name}");
        }
        let (root, model, hasher) = model();
        let plan = Plan::new(&model, Serialization::default(), &hasher).expect("planned");
        let elsewhere = root.path().with_file_name(format!("{}-away", model.name));
        std::fs::rename(root.path(), &elsewhere).expect("moved");
        let changed = plan.hash(&hasher).err();
        std::fs::rename(&elsewhere, root.path()).expect("moved back");
        assert!(matches!(changed, Some(Error::Hash(HashError::Changed(path))) if path == root.path()));
    }

    #[test]
    fn shards_are_named_and_sorted_as_text() {
        let (_root, model, hasher) = model();
        let (manifest, _) = hash(&model, ten(), &hasher);
        let names: Vec<_> = manifest.resources.iter().map(Resource::name).collect();
        assert_eq!(names, ["a:0:7", "b:0:1", "c:0:9", "w:0:10", "w:10:20", "w:1:0:10", "w:20:25"]);
        assert_eq!(manifest.resources[4].digest, Digest::sha256(&[b'x'; 10]));
        // The empty file has no shards (OMS v1.0, 6.3.2).
        assert_eq!(manifest.files(), 5);
    }

    #[test]
    fn parts_are_each_resource_once_and_about_as_long() {
        let (_root, model, hasher) = model();
        for (serialization, largest) in [(Serialization::default(), 25), (ten(), 10)] {
            let (whole, total) = hash(&model, serialization.clone(), &hasher);
            for of in 1..9 {
                let of = NonZeroUsize::new(of).expect("not zero");
                let (mut found, mut listings, mut most) = (Vec::new(), BTreeSet::new(), 0);
                for index in 1..=of.get() {
                    let plan = Plan::new(&model, serialization.clone(), &hasher).expect("planned");
                    listings.insert(plan.listing(&hasher).expect("sampled").to_string());
                    let part = Part { index: NonZeroUsize::new(index).expect("not zero"), of };
                    let plan = plan.part(part);
                    most = most.max(plan.bytes());
                    found.extend(plan.manifest(plan.hash(&hasher).expect("hashed")).resources);
                }
                found.sort_by_key(Resource::name);
                assert_eq!((&found, listings.len()), (&whole.resources, 1));
                // No part has more than its share and the largest file, or shard.
                let share = total / of.get() as u64;
                assert!(
                    most <= share + largest && (most < total || of.get() == 1),
                    "{most} in one of {of} parts"
                );
            }
        }
    }
}
