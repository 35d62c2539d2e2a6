//! The OMS predicate (OMS v1.0, 5.2): which files, which digests, and how both were found. Written reproducibly,
//! read strictly.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::num::NonZeroU64;
use std::ops::Range;

use serde::{Deserialize, Serialize, Serializer};

use crate::hash::{Algorithm, Digest};
use crate::left_out::is_pattern;
use crate::manifest::{Method, Resource, Serialization};
use crate::model::above;
use crate::object::{Object, present};

/// What is wrong with a predicate.
#[derive(Debug, thiserror::Error)]
pub enum PredicateError {
    /// An empty manifest.
    #[error("the manifest lists no files (OMS 5.2.1)")]
    NoResources,
    /// A name that is not a plain path below the root.
    #[error("the manifest lists {0:?}, which is not a canonical path (OMS 6.1.2)")]
    Name(String),
    /// The same name twice.
    #[error("the manifest lists {0:?} twice (OMS 5.2.1)")]
    Duplicate(String),
    /// Not a digest of its algorithm in lower-case hexadecimal.
    #[error("the digest of {0:?} is malformed (OMS 5.2.1)")]
    Digest(String),
    /// A resource with another algorithm than the manifest's.
    #[error("{0:?} has the algorithm {1:?}, but the manifest says {2:?} (OMS 7)")]
    Algorithm(String, String, String),
    /// An ignored path that is not a plain path below the root.
    #[error("the ignore_paths contain {0:?}, which is not a canonical path (OMS 6.2.1)")]
    IgnorePath(String),
    /// Neither files nor shards.
    #[error("unknown serialization method {0:?} (OMS 6.3)")]
    Method(String),
    /// An algorithm that OMS does not name.
    #[error("unknown hash_type {0:?} (OMS 7)")]
    HashType(String),
    /// `shard_size` where files are not sharded.
    #[error("the manifest has a shard_size but is not sharded (OMS 5.2.2)")]
    ShardSize,
    /// No positive whole number of bytes.
    #[error("the manifest is sharded, and its shard_size is not a positive whole number (OMS 5.2.2)")]
    NoShardSize,
    /// A name without the range of bytes that makes it a shard.
    #[error("{0:?} is not the name of a shard: <path>:<start>:<end> (OMS 6.3.2)")]
    ShardName(String),
    /// Left out, and other verifiers leave out more.
    #[error(
        "the ignore_paths contain {0:?}, which other verifiers take for a pattern (OMS 6.2.1); rename it"
    )]
    Pattern(String),
    /// No file can have it.
    #[error("the manifest lists a path of more than {LONGEST_PATH} bytes, which begins with {0:?}")]
    Long(String),
    /// Listed, and said to be left out.
    #[error("the manifest lists {0:?}, which its ignore_paths leave out (OMS 6.2)")]
    Ignored(String),
    /// A file where another one needs a directory.
    #[error("the manifest lists {0:?}, and something below it: no model has both (OMS 6.1)")]
    Below(String),
    /// Shards that are not, one after the other, the whole of a file.
    #[error("the shards of {file:?} {what} at byte {at} (OMS 6.3.2)")]
    Shards {
        /// The file.
        file: String,
        /// What they do there.
        what: &'static str,
        /// Where, from the file's start.
        at: u64,
    },
}

/// A predicate as JSON has it: [`Written`], or [`Listed`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Predicate<R> {
    resources: R,
    serialization: Object<Parameters>,
}

/// The resources of one that is written. Each is made when it is: there may be a hundred thousand.
pub(crate) struct Written<'a>(&'a [Resource], Algorithm);

/// The resources of one that was read.
pub(crate) type Listed<'a> = Vec<Object<Descriptor<'a>>>;

/// Unknown fields are ignored, as OMS v1.0, 5.2.1 asks. Borrowed: there may be a hundred thousand.
#[derive(Serialize, Deserialize)]
pub(crate) struct Descriptor<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    digest: Cow<'a, str>,
    #[serde(borrow)]
    algorithm: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    method: String,
    hash_type: String,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    shard_size: Option<serde_json::Number>,
    allow_symlinks: bool,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    ignore_paths: Option<BTreeSet<String>>,
}

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(resources, algorithm) = self;
        serializer.collect_seq(resources.iter().map(|resource| Descriptor {
            name: if resource.shard.is_none() {
                resource.file.as_str().into()
            } else {
                resource.name().into()
            },
            digest: resource.digest.to_string().into(),
            algorithm: algorithm.name().into(),
        }))
    }
}

impl From<&Serialization> for Parameters {
    fn from(serialization: &Serialization) -> Self {
        let (method, shard_size) = match serialization.method {
            Method::Files => ("files", None),
            Method::Shards(size) => ("shards", Some(size.get().into())),
        };
        Self {
            method: method.into(),
            hash_type: serialization.algorithm.name().into(),
            shard_size,
            allow_symlinks: serialization.allow_symlinks,
            ignore_paths: serialization.ignore_paths.clone(),
        }
    }
}

impl<'a> Predicate<Written<'a>> {
    /// What is written for a manifest's resources: the same ones give the same bytes.
    pub(crate) fn new(resources: &'a [Resource], serialization: &Serialization) -> Self {
        let resources = Written(resources, serialization.algorithm);
        Self { resources, serialization: Object(serialization.into()) }
    }
}

impl<'a> Predicate<Listed<'a>> {
    /// What release 0.2.0 said in another form: names and SHA-256 digests of files.
    pub(crate) fn of_files(files: Vec<(Cow<'a, str>, Cow<'a, str>)>) -> Self {
        let algorithm = Algorithm::Sha256.name();
        let descriptor = |(name, digest)| Descriptor { name, digest, algorithm: algorithm.into() };
        Self {
            resources: files.into_iter().map(descriptor).map(Object).collect(),
            serialization: Object((&Serialization::default()).into()),
        }
    }

    /// The same without ignored paths that lead outside, or are absolute: they hide nothing. The Go tool records paths as
    /// they were typed, with `./` and a slash at the end, and until June 2026 the bundle's: from the signer's working
    /// directory, or absolute, wherever the model was. And without those with a backslash, as the reference writes them on
    /// Windows: here nothing is called so.
    pub(crate) fn without_outside_paths(mut self) -> Self {
        let Object(Parameters { ignore_paths, .. }) = &mut self.serialization;
        let below = |path: String| {
            let parts = path.split('/').filter(|part| !matches!(*part, "" | "."));
            let plain = parts.collect::<Vec<_>>().join("/");
            let outside =
                path.starts_with('/') || plain.split('/').next() == Some("..") || path.contains('\\');
            // An empty one is none in the format.
            let nothing = plain.is_empty() && !path.is_empty();
            (!outside && !nothing).then_some(plain)
        };
        *ignore_paths = ignore_paths.take().map(|paths| paths.into_iter().filter_map(below).collect());
        self
    }

    /// Checks all but that a model is complete: [`complete`]. `"."` as the name of an only file stays as it is.
    pub(crate) fn check(self) -> Result<(Vec<Resource>, Serialization), PredicateError> {
        let Self {
            resources,
            serialization: Object(Parameters { method, hash_type, shard_size, allow_symlinks, ignore_paths }),
        } = self;
        let method = match method.as_str() {
            "files" if shard_size.is_some() => return Err(PredicateError::ShardSize),
            "files" => Method::Files,
            "shards" => {
                let size = shard_size.as_ref().and_then(whole_number).and_then(NonZeroU64::new);
                Method::Shards(size.ok_or(PredicateError::NoShardSize)?)
            }
            _ => return Err(PredicateError::Method(method)),
        };
        let Some(algorithm) = Algorithm::from_name(&hash_type) else {
            return Err(PredicateError::HashType(hash_type));
        };
        if let Some(path) = ignore_paths.iter().flatten().find(|path| !canonical(path)) {
            return Err(PredicateError::IgnorePath(path.clone()));
        }
        // The reference gives every shard's algorithm a name of its own.
        let sharded_name = match method {
            Method::Files => None,
            Method::Shards(size) => Some(format!("{algorithm}-sharded-{size}")),
        };
        let single = resources.len() == 1;
        if let Some(name) = first_duplicate(&resources) {
            return Err(PredicateError::Duplicate(name.to_owned()));
        }
        let mut checked = Vec::with_capacity(resources.len());
        for Object(Descriptor { name, digest, algorithm: own }) in resources {
            if own != algorithm.name()
                && Algorithm::from_name(&own) != Some(algorithm)
                && sharded_name.as_deref() != Some(&own)
            {
                return Err(PredicateError::Algorithm(name.into_owned(), own.into_owned(), hash_type));
            }
            let (file, shard) = match method {
                Method::Files => (&*name, None),
                Method::Shards(_) => match shard_name(&name) {
                    Some((file, range)) => (file, Some(range)),
                    None => return Err(PredicateError::ShardName(name.into_owned())),
                },
            };
            // The reference calls the only file of a single-file model ".".
            let only_file = file == "." && (single || shard.is_some());
            if !canonical(file) && !only_file {
                return Err(PredicateError::Name(name.into_owned()));
            }
            let Some(digest) = Digest::from_hex(algorithm, &digest) else {
                return Err(PredicateError::Digest(name.into_owned()));
            };
            let file = if shard.is_some() { file.to_owned() } else { name.into_owned() };
            checked.push(Resource { file, shard, digest });
        }
        Ok((checked, Serialization { method, algorithm, allow_symlinks, ignore_paths }))
    }
}

/// A name that is there twice. Most signers sort them, which makes it quick.
fn first_duplicate<'a>(resources: &'a [Object<Descriptor<'_>>]) -> Option<&'a str> {
    if resources.is_sorted_by(|one, next| one.0.name < next.0.name) {
        return None;
    }
    let mut seen = HashSet::with_capacity(resources.len());
    resources.iter().map(|resource| &*resource.0.name).find(|name| !seen.insert(*name))
}

/// Checks that resources are a whole model: at least one, and of each file every byte once.
pub(crate) fn complete(resources: &[Resource], method: Method) -> Result<(), PredicateError> {
    if resources.is_empty() {
        return Err(PredicateError::NoResources);
    }
    let Method::Shards(size) = method else {
        let wrong = resources.len() > 1 && resources.iter().any(|resource| resource.file == ".");
        return if wrong { Err(PredicateError::Name(".".into())) } else { Ok(()) };
    };
    let mut files: BTreeMap<&str, Vec<&Range<u64>>> = BTreeMap::new();
    for resource in resources {
        files.entry(&resource.file).or_default().extend(&resource.shard);
    }
    if files.contains_key(".") && files.len() > 1 {
        return Err(PredicateError::Name(".".into()));
    }
    for (file, mut shards) in files {
        shards.sort_by_key(|shard| shard.start);
        let wrong = |what, at| Err(PredicateError::Shards { file: file.to_owned(), what, at });
        let mut end = 0;
        for (index, shard) in shards.iter().enumerate() {
            let last = index + 1 == shards.len();
            match shard.start {
                start if start < end => return wrong("overlap", start),
                start if start > end => return wrong("have a gap", end),
                _ => {}
            }
            let bytes = shard.end - shard.start;
            if bytes > size.get() || (bytes < size.get() && !last) {
                return wrong("are not of the manifest's shard_size", shard.start);
            }
            end = shard.end;
        }
    }
    Ok(())
}

/// Longest path of a file that the kernel opens (PATH_MAX, which counts its end).
const LONGEST_PATH: usize = 4095;

/// Checks what no walk over a model that is signed finds: a file that is left out, or one that is a directory, too; paths
/// that are too long; and paths left out that others take for patterns.
pub(crate) fn possible(
    resources: &[Resource],
    ignore_paths: &BTreeSet<String>,
) -> Result<(), PredicateError> {
    if let Some(pattern) = ignore_paths.iter().find(|path| is_pattern(path)) {
        return Err(PredicateError::Pattern(pattern.clone()));
    }
    if let Some(long) = resources.iter().find(|resource| resource.file.len() > LONGEST_PATH) {
        let start = long.file.get(..long.file.floor_char_boundary(64)).unwrap_or_default();
        return Err(PredicateError::Long(start.to_owned()));
    }
    let files: BTreeSet<&str> = resources.iter().map(|resource| resource.file.as_str()).collect();
    for file in &files {
        if let Some(parent) = above(file).find(|parent| files.contains(parent)) {
            return Err(PredicateError::Below(parent.to_owned()));
        }
        if above(file).chain([*file]).any(|path| ignore_paths.contains(path)) {
            return Err(PredicateError::Ignored((*file).to_owned()));
        }
    }
    Ok(())
}

/// `5` and, as the reference writes it, `5.0`.
fn whole_number(number: &serde_json::Number) -> Option<u64> {
    if let Some(whole) = number.as_u64() {
        return Some(whole);
    }
    // Every whole number below 2^53 is exact in JSON's floating point.
    let text =
        number.as_f64().filter(|float| float.fract() == 0.0 && (0.0..9e15).contains(float))?.to_string();
    text.parse().ok()
}

/// A shard's file and its bytes. Colons may be in the file's name, too.
fn shard_name(name: &str) -> Option<(&str, Range<u64>)> {
    let (rest, end) = name.rsplit_once(':')?;
    let (file, start) = rest.rsplit_once(':')?;
    let number = |text: &str| text.parse().ok().filter(|number: &u64| number.to_string() == text);
    let (start, end) = (number(start)?, number(end)?);
    (start < end).then_some((file, start..end))
}

/// Relative, with `/`, no empty, `.` or `..` components (OMS v1.0, 6.1.2).
pub(crate) fn canonical(name: &str) -> bool {
    let bytes = name.as_bytes();
    !bytes.iter().any(|byte| matches!(byte, b'\\' | b'\0'))
        && bytes.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(ranges: &[Range<u64>]) -> Vec<Resource> {
        let shard = |range: &Range<u64>| Resource {
            file: "w:1".into(),
            shard: Some(range.clone()),
            digest: Digest::sha256(b""),
        };
        ranges.iter().map(shard).collect()
    }

    #[test]
    fn shards_are_the_whole_of_a_file() {
        let ten = Method::Shards(NonZeroU64::new(10).expect("not zero"));
        let check = |ranges: &[Range<u64>]| complete(&shards(ranges), ten).map_err(|error| error.to_string());
        check(&[0..10, 10..20, 20..21]).expect("complete");
        check(&[20..21, 0..10, 10..20]).expect("in any order");
        let gap_at_start = 10..20;
        let too_long = 0..11;
        for (ranges, expected) in [
            (&[0..10, 20..30][..], "\"w:1\" have a gap at byte 10"),
            (std::slice::from_ref(&gap_at_start), "have a gap at byte 0"),
            (&[0..10, 5..15], "overlap at byte 5"),
            (&[0..10, 10..15, 15..20], "are not of the manifest's shard_size at byte 10"),
            (std::slice::from_ref(&too_long), "are not of the manifest's shard_size at byte 0"),
        ] {
            let error = check(ranges).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_shard_is_named_by_its_last_two_numbers() {
        assert_eq!(shard_name("a:1:2:0:10"), Some(("a:1:2", 0..10)));
        for wrong in
            ["a", "a:0", "a:0:x", "a:-1:5", "a:00:5", "a:5:5", "a:6:5", "a:+0:5", "a:0:18446744073709551616"]
        {
            assert_eq!(shard_name(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn whole_numbers_only() {
        let parse = |text: &str| whole_number(&serde_json::from_str(text).expect("a number"));
        assert_eq!(
            (parse("1000000000"), parse("1000000000.0"), parse("1e9")),
            (Some(1_000_000_000), Some(1_000_000_000), Some(1_000_000_000))
        );
        assert_eq!((parse("-1"), parse("0.5"), parse("1e300")), (None, None, None));
    }
}
