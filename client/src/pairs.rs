//! What was signed and what was found, side by side, and so how they differ: when all of it is compared, and once more after
//! that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::differences::{Changed, Differences, How, Unreadable};
use crate::hash::{HashError, Hasher, Looked, Piece, Stamp};
use crate::manifest::{Manifest, Method, Resource};
use crate::model::{File, Model};
use crate::walk::leads_nowhere;

/// What was signed, and what was found of it.
pub(crate) struct Pairs<'a> {
    signed: &'a Manifest,
    found: &'a Model,
    missing: Vec<String>,
    extra: Vec<String>,
    /// Empty files, which no signature in shards can list (OMS v1.0, 6.3.2).
    unlistable: Vec<String>,
    /// Files that were signed and are there, and that may be as they were signed.
    files: Looked<'a>,
    /// Their names, sorted.
    names: Vec<&'a str>,
    /// What was signed of which of them.
    resources: Vec<(usize, &'a Resource)>,
    /// What is known to be wrong before anything is hashed.
    wrong: BTreeMap<&'a str, Wrong>,
}

/// Looks at what was found for each file that was signed.
pub(crate) fn pair<'a>(
    signed: &'a Manifest,
    found: &'a Model,
    single_file: bool,
    hasher: &Hasher,
) -> Pairs<'a> {
    // The reference's name for the only file of a single-file model is ".".
    let name = |resource: &'a Resource| match found.files.as_slice() {
        [only] if single_file && resource.file == "." => only.name.as_str(),
        _ => resource.file.as_str(),
    };
    let mut resources: Vec<(&str, &Resource)> =
        signed.resources.iter().map(|resource| (name(resource), resource)).collect();
    // As what was found is. Stable, and quick where it is sorted, as most signers do.
    resources.sort_by_key(|(file, _)| *file);
    let mut signed_files = resources.chunk_by(|(one, _), (other, _)| one == other).peekable();

    let mut pairs = Pairs {
        signed,
        found,
        missing: Vec::new(),
        extra: Vec::new(),
        unlistable: Vec::new(),
        files: Looked::new(
            &found.root,
            Vec::with_capacity(found.files.len()),
            Vec::with_capacity(found.files.len()),
        ),
        names: Vec::with_capacity(found.files.len()),
        resources: Vec::with_capacity(resources.len()),
        wrong: BTreeMap::new(),
    };
    for (at, stamp) in looked(found, hasher) {
        let file = at.name.as_str();
        let before = |shards: &&[(&str, &Resource)]| shards.first().is_some_and(|(own, _)| *own < file);
        while let Some(missing) = signed_files.next_if(before) {
            pairs.missing.extend(missing.first().map(|(name, _)| (*name).to_owned()));
        }
        let same = |shards: &&[(&str, &Resource)]| shards.first().is_some_and(|(own, _)| *own == file);
        let Some(shards) = signed_files.next_if(same) else {
            let empty = stamp.is_ok_and(|stamp| stamp.size == 0);
            let listable = signed.serialization.method == Method::Files || !empty;
            if listable { &mut pairs.extra } else { &mut pairs.unlistable }.push(file.to_owned());
            continue;
        };
        let stamp = match stamp {
            Ok(stamp) => stamp,
            Err(error) => {
                pairs.wrong.insert(file, Wrong::from(error));
                continue;
            }
        };
        let signed_size = shards.iter().filter_map(|(_, resource)| Some(resource.shard.as_ref()?.end)).max();
        if let Some(signed) = signed_size.filter(|signed| *signed != stamp.size) {
            pairs.wrong.insert(file, Wrong::Changed(How::Size { signed, found: stamp.size }));
            continue;
        }
        let index = pairs.files.push(at.path(), stamp);
        pairs.names.push(file);
        pairs.resources.extend(shards.iter().map(|(_, resource)| (index, *resource)));
    }
    let rest = signed_files.filter_map(|shards| shards.first());
    pairs.missing.extend(rest.map(|(name, _)| (*name).to_owned()));
    pairs
}

/// A model's files, each with what came of looking at it: some for each thread at a time, for of all of them it is large.
fn looked<'a>(
    model: &'a Model,
    hasher: &Hasher,
) -> impl Iterator<Item = (&'a File, Result<Stamp, HashError>)> {
    model.files.chunks(hasher.looks()).flat_map(|files| {
        let paths: Vec<&Path> = files.iter().map(File::path).collect();
        files.iter().zip(hasher.look_each(&model.root, &paths))
    })
}

impl<'a> Pairs<'a> {
    /// How many files are as they were signed, where there are no differences.
    pub(crate) fn files(&self) -> usize {
        self.names.len()
    }

    /// The size in bytes of what was signed.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.sizes().fold(0, u64::saturating_add)
    }

    /// Empty files, which no signature in shards can list (OMS v1.0, 6.3.2).
    pub(crate) fn unlistable(&self) -> &[String] {
        &self.unlistable
    }

    /// Compares each file's content with what was signed. Nothing else is read.
    pub(crate) fn compare(&self, hasher: &Hasher) -> Differences {
        let mut wrong = self.wrong.clone();
        let algorithm = self.signed.serialization.algorithm;
        let piece = |&(file, resource): &(usize, &Resource)| {
            let stamp = self.files.stamp(file).expect("a resource is of one of the files");
            Piece { file, range: resource.shard.clone().unwrap_or(0..stamp.size) }
        };
        let pieces: Vec<_> = self.resources.iter().map(piece).collect();
        let (digests, mut failures) = hasher.digests_of_each(algorithm, &self.files, &pieces);
        for (index, ((file, signed), found)) in self.resources.iter().zip(digests).enumerate() {
            let how = match failures.remove(&index) {
                Some(error) => Wrong::from(error),
                None if found == signed.digest => continue,
                None => Wrong::Changed(How::Digest { signed: signed.digest.clone(), found }),
            };
            let Some(file) = self.names.get(*file) else { continue };
            // One shard that differs is enough, whatever became of the others.
            match wrong.get(file) {
                Some(Wrong::Changed(_)) => {}
                _ => drop(wrong.insert(file, how)),
            }
        }
        self.differences(wrong)
    }

    /// Whether a model that was found once more has just these files, in the same states. Then nothing is different, and
    /// it is known without another list of all there is.
    pub(crate) fn are_all_of(&self, again: &Model, hasher: &Hasher) -> bool {
        let Model { files, odd, closed, .. } = again;
        let same = |((index, (at, now)), name): ((usize, (&File, Result<Stamp, _>)), &&str)| {
            at.name == *name && now.is_ok_and(|now| self.files.was(index, &now))
        };
        let nothing_else = files.len() == self.names.len() && odd.is_empty() && closed.is_empty();
        nothing_else
            && self.missing.is_empty()
            && self.wrong.is_empty()
            && looked(again, hasher).enumerate().zip(&self.names).all(same)
    }

    /// What is different now that all of it was compared `before`, and found right: that may have taken hours.
    pub(crate) fn since(&self, before: &Self) -> Differences {
        let mut wrong = self.wrong.clone();
        let missing: BTreeSet<&str> = self.missing.iter().map(String::as_str).collect();
        for (index, name) in before.names.iter().enumerate() {
            let same = match self.names.binary_search(name) {
                Ok(now) => self.files.stamp(now).is_some_and(|now| before.files.was(index, now)),
                // An only file may be another one, by another name. What is missing, or wrong, is told as that.
                Err(_) => missing.contains(name) || wrong.contains_key(name),
            };
            if !same {
                wrong.insert(name, Wrong::Changed(How::Meanwhile));
            }
        }
        self.differences(wrong)
    }

    fn differences(&self, wrong: BTreeMap<&str, Wrong>) -> Differences {
        let (missing, extra) = (self.missing.clone(), self.extra.clone());
        let mut differences = Differences { missing, extra, ..Differences::default() };
        for (name, wrong) in wrong {
            let name = name.to_owned();
            match wrong {
                Wrong::Changed(how) => differences.changed.push(Changed { file: name, how }),
                Wrong::Unreadable(why) => differences.unreadable.push(Unreadable { name, why }),
            }
        }
        differences.add(self.found);
        differences
    }
}

/// What is wrong with a file that was signed and is there.
#[derive(Clone)]
enum Wrong {
    Changed(How),
    Unreadable(String),
}

impl From<HashError> for Wrong {
    fn from(error: HashError) -> Self {
        match error {
            HashError::Changed(_) => Self::Changed(How::Meanwhile),
            // It was there a moment ago, and no link.
            HashError::Read { source, .. } if leads_nowhere(&source) => Self::Changed(How::Meanwhile),
            HashError::Read { source, .. } => Self::Unreadable(source.to_string()),
            error => Self::Unreadable(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::manifest::{Plan, Serialization};
    use crate::model::Scope;

    #[test]
    fn what_changes_after_it_was_compared() {
        type Change = fn(&Path) -> std::io::Result<()>;
        let changes: [(Change, &str); 5] = [
            (|_| Ok(()), ""),
            (
                |root| File::options().write(true).open(root.join("a"))?.set_modified(std::time::UNIX_EPOCH),
                "\"a\" is not what was signed: it changed while",
            ),
            (|root| std::fs::rename(root.join("b"), root.join("c")), "\"b\" was signed and is not there"),
            (|root| std::fs::write(root.join("d"), ""), "\"d\" is there and was not signed"),
            (|root| std::os::unix::fs::symlink("a", root.join("e")), "\"e\" is a symbolic link"),
        ];
        let hasher = Hasher::new(None, None).expect("a hasher");
        for (change, expected) in changes {
            let root = tempfile::tempdir().expect("a directory");
            for name in ["a", "b"] {
                std::fs::write(root.path().join(name), "12345").expect("written");
            }
            let walk = || Model::walk(root.path(), &Scope::default()).expect("a model");
            let found = walk();
            let plan = Plan::new(&found, Serialization::default(), &hasher).expect("planned");
            let signed = plan.manifest(plan.hash(&hasher).expect("hashed"));
            let pairs = pair(&signed, &found, false, &hasher);
            assert_eq!(pairs.compare(&hasher), Differences::default());
            change(root.path()).expect("changed");
            let again = walk();
            assert_eq!(pairs.are_all_of(&again, &hasher), expected.is_empty());
            let since = pair(&signed, &again, false, &hasher).since(&pairs).first().unwrap_or_default();
            assert!(since.starts_with(expected) && since.is_empty() == expected.is_empty(), "{since}");
        }
    }

    /// What is there beside, or is not, or was wrong, is told by a list of all there is, and not by a look at what is right.
    #[test]
    fn more_than_what_was_signed() {
        let hasher = Hasher::new(None, None).expect("a hasher");
        let root = tempfile::tempdir().expect("a directory");
        let write = |name: &str| std::fs::write(root.path().join(name), "12345").expect("written");
        ["a", "b"].into_iter().for_each(write);
        let walk = || Model::walk(root.path(), &Scope::default()).expect("a model");
        let found = walk();
        let plan = Plan::new(&found, Serialization::default(), &hasher).expect("planned");
        let signed = plan.manifest(plan.hash(&hasher).expect("hashed"));
        let is_all = || {
            let found = walk();
            pair(&signed, &found, false, &hasher).are_all_of(&walk(), &hasher)
        };
        assert!(is_all());
        write("c");
        assert!(!is_all(), "an unsigned file");
        std::fs::remove_file(root.path().join("c")).expect("removed");
        std::os::unix::fs::symlink("a", root.path().join("c")).expect("linked");
        assert!(!is_all(), "a link");
        std::fs::remove_file(root.path().join("c")).expect("removed");
        std::fs::remove_file(root.path().join("b")).expect("removed");
        assert!(!is_all(), "a missing file");
    }

    /// By the name that the reference gives it, and a link to it.
    #[test]
    fn another_only_file_after_it_was_compared() {
        let hasher = Hasher::new(None, None).expect("a hasher");
        let root = tempfile::tempdir().expect("a directory");
        let current = root.path().join("current");
        let walk = |name: &str| {
            let _ = std::fs::remove_file(&current);
            std::fs::write(root.path().join(name), "12345").expect("written");
            std::os::unix::fs::symlink(name, &current).expect("linked");
            Model::walk(&current, &Scope::default()).expect("a model")
        };
        let found = walk("one");
        let plan = Plan::new(&found, Serialization::default(), &hasher).expect("planned");
        let mut signed = plan.manifest(plan.hash(&hasher).expect("hashed"));
        signed.resources[0].file = ".".into();
        let pairs = pair(&signed, &found, true, &hasher);
        assert!(pairs.compare(&hasher).is_empty());
        let again = walk("two");
        let changed = pair(&signed, &again, true, &hasher).since(&pairs).changed;
        assert!(matches!(changed.as_slice(), [Changed { file, how: How::Meanwhile }] if file == "current"));
    }

    #[test]
    fn every_difference_is_listed() {
        let hasher = Hasher::new(None, None).expect("a hasher");
        let two = Method::Shards(2.try_into().expect("not zero"));
        for (method, size) in [(Method::Files, 5), (two, 5), (two, 6)] {
            let root = tempfile::tempdir().expect("a directory");
            let write = |name: &str, content: &[u8]| {
                std::fs::write(root.path().join(name), content).expect("written")
            };
            ["a", "b", "c"].iter().for_each(|name| write(name, b"12345"));
            let serialization = Serialization { method, ..Serialization::default() };
            let model = serialization.walk(root.path()).expect("a model");
            let plan = Plan::new(&model, serialization, &hasher).expect("planned");
            let mut signed = plan.manifest(plan.hash(&hasher).expect("hashed"));
            // In whatever order it is listed.
            signed.resources.reverse();
            let compared = || {
                let found = Model::walk(root.path(), &Scope::default()).expect("a model");
                let pairs = pair(&signed, &found, false, &hasher);
                (pairs.compare(&hasher), pairs.unlistable().len(), pairs.files(), pairs.bytes())
            };
            assert_eq!(compared(), (Differences::default(), 0, 3, 15));
            write("b", &b"123x567"[..size]);
            write("d", b"");
            write("e", b"more");
            std::fs::remove_file(root.path().join("c")).expect("removed");
            let (found, unlistable, ..) = compared();
            assert_eq!(unlistable, usize::from(method != Method::Files));
            let extra: &[&str] = if method == Method::Files { &["d", "e"] } else { &["e"] };
            assert_eq!((found.missing.as_slice(), found.changed.len()), (&["c".to_owned()][..], 1));
            let first = found.first().expect("a difference");
            let how = if method == two && size == 6 {
                "its shards end at byte 5, the file has 6 bytes (OMS 6.3.2)"
            } else {
                " was signed, "
            };
            assert!(first.starts_with("\"b\" is not what was signed: ") && first.contains(how), "{first}");
            assert_eq!(found.extra, extra);
            let text = format!(
                "the model is not what was signed (OMS 8.4): 1 changed, 1 missing, {} not signed",
                extra.len()
            );
            assert_eq!(found.to_string(), text);
        }
    }
}
