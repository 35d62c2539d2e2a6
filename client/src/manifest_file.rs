//! A manifest in a file: what `omsign digest --json` writes, of a model or of a part of one, and what
//! `omsign sign --manifest` reads, where the model need not be at hand. Lists of `sha256sum` are read, too.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::manifest::{Manifest, Part};
use crate::object::{Object, present};
use crate::parts;
use crate::predicate::{Listed, Predicate, PredicateError};
use crate::sha256sum::{self, SumsError};

/// The version of the format.
const VERSION: u32 = 1;

/// The largest file that is read: of five million resources.
const LARGEST_BYTES: u64 = 1 << 30;

/// Files that make no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestFileError {
    /// One cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// One has no end, or none that a manifest would have.
    #[error("{0} is larger than {LARGEST_BYTES} bytes, which no manifest is")]
    TooLarge(PathBuf),
    /// One is neither JSON of `omsign digest` nor a list of `sha256sum`.
    #[error("{path} is no manifest: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One says what no signature may say.
    #[error("{path}")]
    Predicate {
        /// The file, or all of them.
        path: PathBuf,
        /// What.
        source: PredicateError,
    },
    /// Files that do not belong together.
    #[error("{one} and {other} {what}")]
    Apart {
        /// One of them.
        one: PathBuf,
        /// Another.
        other: PathBuf,
        /// Why they do not.
        what: String,
    },
    /// A part of the model is in none of the files.
    #[error("part {missing} of {of} is in none of the files")]
    Gap {
        /// Its number, from 1.
        missing: usize,
        /// How many there are.
        of: usize,
    },
    /// A list has no name for the model, or a manifest has one already.
    #[error("{0}")]
    Name(&'static str),
}

/// What the parts of a model have in common, and which of them this is.
#[derive(Clone, Debug)]
pub struct PartOf {
    /// Which.
    pub part: Part,
    /// [`crate::manifest::Plan::names`] of the whole model.
    pub names: Digest,
    /// [`crate::manifest::Plan::listing`] of the whole model.
    pub listing: Digest,
}

/// The file's content (docs/manifest.schema.json).
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File<R> {
    omsign_manifest: u32,
    pub(crate) model: String,
    pub(crate) bytes: u64,
    /// Of the resources in this file.
    pub(crate) root_digest: String,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub(crate) part: Option<Object<FilePart>>,
    pub(crate) predicate: Object<Predicate<R>>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FilePart {
    pub(crate) index: NonZeroUsize,
    pub(crate) of: NonZeroUsize,
    pub(crate) model_names: String,
    pub(crate) model_listing: String,
}

/// A digest as the file has it.
pub(crate) fn sha256(digest: Digest) -> String {
    format!("sha256:{digest}")
}

/// What is written to a file.
pub fn document(manifest: &Manifest, bytes: u64, part: Option<PartOf>) -> impl Serialize {
    File {
        omsign_manifest: VERSION,
        model: manifest.model_name.clone(),
        bytes,
        root_digest: sha256(manifest.root_digest()),
        part: part.map(|PartOf { part, names, listing }| {
            let (model_names, model_listing) = (sha256(names), sha256(listing));
            Object(FilePart { index: part.index, of: part.of, model_names, model_listing })
        }),
        predicate: Object(Predicate::new(&manifest.resources, &manifest.serialization)),
    }
}

/// What a list of `sha256sum` does not say.
#[derive(Clone, Debug, Default)]
pub struct Unsaid {
    /// The model's name.
    pub model_name: Option<String>,
    /// What was left out of the list, below the model's root.
    pub ignore_paths: BTreeSet<String>,
    /// Whether symbolic links were followed, as `sha256sum` does.
    pub allow_symlinks: bool,
}

/// A manifest from its file, from all its parts, or from lists of `sha256sum`. Also returns the model's size in bytes,
/// where the files say it.
pub fn read(paths: &[PathBuf], unsaid: &Unsaid) -> Result<(Manifest, Option<u64>), ManifestFileError> {
    let read = |path: &PathBuf| {
        let mut bytes = Vec::new();
        let mut read = |from: &mut dyn Read| from.take(LARGEST_BYTES + 1).read_to_end(&mut bytes);
        // As everywhere.
        let read = match path.as_os_str() == "-" {
            true => read(&mut std::io::stdin().lock()),
            false => fs::File::open(path).and_then(|mut file| read(&mut file)),
        };
        match read {
            Ok(read) if read as u64 > LARGEST_BYTES => Err(ManifestFileError::TooLarge(path.clone())),
            Ok(_) => Ok(bytes),
            Err(source) => Err(ManifestFileError::Read { path: path.clone(), source }),
        }
    };
    if paths.iter().filter(|path| path.as_os_str() == "-").count() > 1 {
        return Err(ManifestFileError::Name("standard input can be read once only: give - once"));
    }
    let contents = paths.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let (mut files, mut lists) = (Vec::new(), Vec::new());
    for (path, bytes) in paths.iter().zip(&contents) {
        let malformed = |reason: String| ManifestFileError::Malformed { path: path.clone(), reason };
        // Programs of Windows begin a text with it.
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        if bytes.trim_ascii_start().starts_with(b"{") {
            let Object(file): Object<File<Listed<'_>>> =
                serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
            if file.omsign_manifest != VERSION {
                return Err(malformed(format!("it is of version {}, not {VERSION}", file.omsign_manifest)));
            }
            if file.model.is_empty() || file.part.as_ref().is_some_and(|Object(part)| part.index > part.of) {
                return Err(malformed("its model has no name, or its part is not one of 1 to N".into()));
            }
            files.push((path.as_path(), file));
        } else {
            let text = std::str::from_utf8(bytes).map_err(|_| malformed("it is not UTF-8".into()))?;
            let list = sha256sum::parse(text).map_err(|error| match error {
                SumsError::Line(_) | SumsError::Input(_) => malformed(error.to_string()),
                SumsError::Name(source) => ManifestFileError::Predicate { path: path.clone(), source },
            });
            lists.push((path.as_path(), list?));
        }
    }
    match (files.first(), lists.first()) {
        (Some((one, _)), Some((other, _))) => Err(ManifestFileError::Apart {
            one: (*one).to_owned(),
            other: (*other).to_owned(),
            what: "are of different kinds: give manifests of omsign or lists of sha256sum".into(),
        }),
        (None, _) => sha256sum::together(&lists, unsaid).map(|manifest| (manifest, None)),
        (Some(_), None) if unsaid.model_name.is_some() => Err(ManifestFileError::Name(
            "--model-name is for lists of sha256sum: the manifest has the model's name",
        )),
        (Some(_), None) => parts::together(files).map(|(manifest, bytes)| (manifest, Some(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Resource, Serialization, names_digest};

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn write(&self, name: &str, content: &str) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, content).expect("written");
            path
        }
    }

    fn resource(file: &str) -> Resource {
        Resource { file: file.into(), shard: None, digest: Digest::sha256(file.as_bytes()) }
    }

    fn model(files: &[&str]) -> Manifest {
        let resources = files.iter().map(|file| resource(file)).collect();
        Manifest { model_name: "m".into(), resources, serialization: Serialization::default() }
    }

    fn to_json(manifest: &Manifest, bytes: u64, part: Option<PartOf>) -> serde_json::Value {
        serde_json::to_value(document(manifest, bytes, part)).expect("JSON")
    }

    fn part(files: &[&str], index: usize, of: usize) -> serde_json::Value {
        let number = |number| NonZeroUsize::new(number).expect("not zero");
        let part = Part { index: number(index), of: number(of) };
        let names = names_digest(["a", "b", "c"].map(str::to_owned).into_iter());
        to_json(&model(files), 5, Some(PartOf { part, names, listing: Digest::sha256(b"abc") }))
    }

    #[test]
    fn a_whole_model_and_one_in_parts() {
        let directory = Directory(tempfile::tempdir().expect("a directory"));
        let whole = directory.write("whole", &to_json(&model(&["a", "b", "c"]), 15, None).to_string());
        assert_eq!(read(&[whole], &Unsaid::default()).expect("read"), (model(&["a", "b", "c"]), Some(15)));
        let parts = [part(&["b"], 1, 3), part(&[], 2, 3), part(&["a", "c"], 3, 3)];
        let parts = [2, 0, 1].map(|i: usize| directory.write(&i.to_string(), &parts[i].to_string()));
        assert_eq!(read(&parts, &Unsaid::default()).expect("read"), (model(&["a", "b", "c"]), Some(15)));
    }

    #[test]
    fn parts_that_are_not_all_or_not_of_one_model() {
        let directory = Directory(tempfile::tempdir().expect("a directory"));
        let (one, two) = (part(&["a"], 1, 2), part(&["b", "c"], 2, 2));
        let other = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut other = two.clone();
            change(&mut other);
            other
        };
        for (files, expected) in [
            (vec![one.clone()], "part 2 of 2 is in none"),
            (vec![two.clone()], "part 1 of 2 is in none"),
            (vec![part(&["a"], 1, 4), part(&["b"], 3, 4)], "part 2 of 4 is in none"),
            (vec![one.clone(), two.clone(), two.clone()], "2 are the same part of the model"),
            (vec![one.clone(), other(&|o| o["model"] = "n".into())], "called \"m\" and of one called \"n\""),
            (vec![one.clone(), other(&|o| o["part"]["model_listing"] = "x".into())], "different models"),
            (vec![one.clone(), other(&|o| o["part"]["of"] = 3.into())], "one of 2 parts and one of 3"),
            (
                vec![
                    one.clone(),
                    other(&|o| o["predicate"]["serialization"]["allow_symlinks"] = true.into()),
                ],
                "different options",
            ),
            (vec![one.clone(), part(&["c"], 2, 2)], "do not have the files of the model"),
            (vec![one.clone(), part(&["b", "d"], 2, 2)], "do not have the files of the model"),
            (vec![one.clone(), part(&["b", "c", "d"], 2, 2)], "do not have the files of the model"),
            (vec![part(&["b"], 1, 2), two.clone()], "lists \"b\" twice"),
            (vec![one.clone(), to_json(&model(&["a"]), 1, None)], "not parts of one model"),
            (
                vec![to_json(&model(&["a"]), 1, None), to_json(&model(&["b"]), 1, None)],
                "not parts of one model",
            ),
            (vec![to_json(&model(&[]), 1, None)], "lists no files"),
            (vec![part(&["."], 1, 2), part(&["b", "c"], 2, 2)], "do not have the files of the model"),
            (
                vec![other(&|o| o["root_digest"] = "sha256:".into())],
                "its root digest is not that of its files",
            ),
            (
                vec![other(&|o| drop(o.as_object_mut().map(|o| o.remove("root_digest"))))],
                "missing field `root_digest`",
            ),
            (vec![other(&|o| o["part"] = serde_json::json!([2, 2, "x", "y"]))], "expected an object"),
            (vec![other(&|o| o["part"] = serde_json::Value::Null)], "expected an object"),
            (vec![part(&["a"], 3, 2)], "not one of 1 to N"),
            (vec![other(&|o| o["model"] = "".into())], "has no name"),
            (vec![other(&|o| o["more"] = 1.into())], "unknown field `more`"),
            (vec![other(&|o| o["omsign_manifest"] = 2.into())], "of version 2, not 1"),
            (
                vec![other(&|o| o["predicate"]["resources"][0]["name"] = "../b".into())],
                "not a canonical path",
            ),
        ] {
            let files = files.iter().enumerate();
            let files: Vec<_> =
                files.map(|(i, file)| directory.write(&i.to_string(), &file.to_string())).collect();
            let error = said(&read(&files, &Unsaid::default()).expect_err(expected));
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let mut changed = to_json(&model(&["a", "b"]), 1, None);
        changed["predicate"]["resources"][0]["digest"] = Digest::sha256(b"b").to_string().into();
        let changed = directory.write("changed", &changed.to_string());
        assert!(said(&read(&[changed], &Unsaid::default()).expect_err("changed")).contains("root digest"));
    }

    fn said(error: &ManifestFileError) -> String {
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    }

    #[test]
    fn lists_of_sha256sum() {
        let directory = Directory(tempfile::tempdir().expect("a directory"));
        let unsaid = Unsaid {
            model_name: Some("m".into()),
            ignore_paths: [".git".to_owned()].into(),
            allow_symlinks: true,
        };
        let digest = |name: &str| resource(name).digest;
        let one = directory.write("1", &format!("{}  ./c d\n{} *a\n", digest("c d"), digest("a")));
        let two = directory.write("2", &format!("SHA256 (b) = {}\n", digest("b")));
        let (manifest, bytes) = read(&[one.clone(), two], &unsaid).expect("read");
        let mut expected = model(&["a", "b", "c d"]);
        expected.serialization.ignore_paths = Some(unsaid.ignore_paths.clone());
        expected.serialization.allow_symlinks = true;
        assert_eq!((manifest, bytes), (expected, None));
        assert!(
            said(&read(std::slice::from_ref(&one), &Unsaid::default()).expect_err("no name"))
                .contains("--model-name")
        );
        let sum = digest("a").to_string();
        for (text, expected) in [
            (format!("{sum} a"), "list is no manifest: line 1 is not of sha256sum"),
            (format!("{sum}  .git/config"), "\".git/config\", which its ignore_paths leave out"),
            (format!("{sum}  a/b\n{sum}  a"), "\"a\", and something below it"),
            (format!("{sum}  ../a"), "\"../a\", which is not a canonical path"),
            (format!("{sum}  a\n{sum}  a"), "lists \"a\" twice"),
            (format!("{sum}  c d"), "lists \"c d\" twice"),
            (String::new(), "lists no files"),
        ] {
            let list = directory.write("list", &text);
            let lists = if expected.contains("c d") { vec![one.clone(), list] } else { vec![list] };
            let error = said(&read(&lists, &unsaid).expect_err(expected));
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
