//! Which files a model is made of (OMS v1.0, 6.1 and 6.2).

use std::collections::BTreeSet;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use crate::hash::Root;
use crate::listing::Listing;
use crate::walk::{MOST_LINKED, MOST_LINKED_FILES, Walked, walk};

/// What is left out at the model's root by default (OMS v1.0, 6.2).
pub const GIT_PATHS: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];

/// A model: its name and its files.
#[derive(Debug)]
pub struct Model {
    /// Last component of its path.
    pub name: String,
    /// Where it is; the directory of a single file.
    pub root: Root,
    /// Its files, sorted by name in code-point order.
    pub files: Vec<File>,
    /// What is there and was left out, sorted: files, and directories with all that is below them.
    pub left_out: Vec<String>,
    /// What is there and cannot be part of a model, sorted.
    pub odd: Vec<Odd>,
    /// Directories and links that are there and cannot be followed, sorted.
    pub closed: Vec<Closed>,
}

/// Something of which nobody knows what is below or behind it.
#[derive(Debug)]
pub struct Closed {
    /// Path below the model's root.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Something that cannot be part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Odd {
    /// Path below the model's root, as far as it is UTF-8.
    pub name: String,
    /// Why not.
    pub what: Oddity,
}

/// Why something cannot be part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Oddity {
    /// A symbolic link where they are not allowed.
    #[error("is a symbolic link, and symbolic links are not allowed here (OMS 6.1.1)")]
    Symlink,
    /// A symbolic link that leads out of the model.
    #[error("is a symbolic link that leads out of the model (OMS 6.1.1)")]
    Outside,
    /// A symbolic link to nothing, or to itself.
    #[error("is a symbolic link that leads nowhere (OMS 6.1.1)")]
    Nowhere,
    /// A symbolic link to a directory that contains it.
    #[error("is a symbolic link to a directory that contains it (OMS 6.1.1)")]
    Cycle,
    /// A name that JSON cannot carry.
    #[error("has a name that is not valid UTF-8 (OMS 6.1.2)")]
    NotUtf8,
    /// A name with a backslash.
    #[error("has a name with a backslash, which verifiers on other systems take for a separator (OMS 6.1.2)")]
    Backslash,
    /// A socket, pipe or device.
    #[error("is neither a file nor a directory (OMS 6.1)")]
    Special,
}

/// One regular file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Path below the model's root, with `/`; the file's own name where the model is a single file.
    pub name: String,
    /// What it is a symbolic link to, as an absolute path.
    pub(crate) target: Option<Box<Path>>,
}

impl File {
    /// Where its content is: below the model's root, or an absolute path.
    pub fn path(&self) -> &Path {
        self.target.as_deref().unwrap_or(Path::new(&self.name))
    }
}

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Paths below the model's root that are left out, with everything below them.
    pub ignore_paths: BTreeSet<String>,
    /// Whether symbolic links are followed. Otherwise they are errors.
    pub allow_symlinks: bool,
    /// Where it is not empty, only these paths below the model's root are looked at, with everything below them.
    pub only: BTreeSet<String>,
}

impl Scope {
    /// Whether a path is looked at, or leads to one that is.
    pub(crate) fn concerns(&self, name: &str) -> bool {
        let below = (Bound::Included(format!("{name}/")), Bound::Unbounded);
        self.includes(name) || self.only.range(below).next().is_some_and(|only| at_or_below(only, name))
    }

    /// Whether a path is looked at.
    pub(crate) fn includes(&self, name: &str) -> bool {
        self.only.is_empty() || above(name).chain([name]).any(|path| self.only.contains(path))
    }
}

/// The directories above a path of a model, from the root down.
pub(crate) fn above(path: &str) -> impl Iterator<Item = &str> + Clone {
    path.match_indices('/').filter_map(|(at, _)| path.get(..at))
}

/// Whether a path is another one, or below it.
pub fn at_or_below(path: &str, other: &str) -> bool {
    path.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The most shards that a model may have: what is known of them is held in memory.
pub const MOST_SHARDS: u64 = 1 << 24;

/// Why a model cannot be read as one.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The path does not exist or cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing to sign.
    #[error("{0} has no files to sign (OMS 6.1)")]
    Empty(PathBuf),
    /// Shards so small that there would be too many of them.
    #[error("{0} would have more than {MOST_SHARDS} shards; make them larger: --shard-size")]
    Shards(PathBuf),
    /// Something that cannot be part of a model.
    #[error("{0} {1}")]
    Odd(PathBuf, Oddity),
    /// Links to directories with links to directories: of few of them, any number of files can be made.
    #[error(
        "more than {MOST_LINKED} directories or {MOST_LINKED_FILES} files are reached through symbolic links, the last one at {0} (a limit of omsign)"
    )]
    Linked(PathBuf),
    /// A bundle with a name that cannot be recorded as left out.
    #[error("the bundle {path} would be in the model, and its name {reason}; write it elsewhere")]
    Bundle {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// What is written while it is hashed would be another thing than what was.
    #[error("{0} is a file of the model: write it elsewhere, or leave it out with --ignore-paths")]
    Output(&'static str),
    /// A path to ignore that is not there, or not in the model.
    #[error("--ignore-paths {path}: {reason}")]
    Ignore {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl ModelError {
    /// Whether the model itself is wrong.
    pub fn found_wrong(&self) -> bool {
        !matches!(
            self,
            Self::Read { .. }
                | Self::Ignore { .. }
                | Self::Bundle { .. }
                | Self::Output(_)
                | Self::Shards(_)
                | Self::Linked(_)
        )
    }
}

impl Model {
    /// Finds the files of a model, which is a directory or a single file. There may be none.
    pub fn walk(root: &Path, scope: &Scope) -> Result<Self, ModelError> {
        Self::listed(root, scope, None)
    }

    /// The same, with what was listed before.
    pub(crate) fn listed(root: &Path, scope: &Scope, listing: Option<Listing>) -> Result<Self, ModelError> {
        let real = root.canonicalize().map_err(|source| read_error(root, source))?;
        let name = match real.file_name() {
            Some(name) => name.to_string_lossy().into_owned(),
            None => "/".to_owned(),
        };
        let kind = std::fs::symlink_metadata(&real).map_err(|source| read_error(root, source))?;
        if kind.is_file() {
            // The link's own name, the target's content: what it is called elsewhere, such as in a cache, nobody else sees.
            let own = root.file_name().or(real.file_name()).and_then(|name| name.to_str());
            let name = own.ok_or_else(|| ModelError::Odd(root.to_owned(), Oddity::NotUtf8))?.to_owned();
            let directory = real.parent().expect("a file is in a directory");
            let target = (real.file_name() != root.file_name()).then(|| real.as_path().into());
            let only = File { name: name.clone(), target };
            return Ok(Self {
                name,
                root: Root::open(directory).map_err(|source| read_error(root, source))?,
                files: vec![only],
                left_out: Vec::new(),
                odd: Vec::new(),
                closed: Vec::new(),
            });
        }
        if !kind.is_dir() {
            return Err(ModelError::Odd(root.to_owned(), Oddity::Special));
        }
        let opened = Root::open_really(root, &real).map_err(|source| read_error(root, source))?;
        let listing = listing.zip(opened.identity()).and_then(|(listing, root)| listing.of(root));
        let Walked { mut files, mut left_out, mut odd, mut closed } = walk(root, &real, scope, listing)?;
        // UTF-8 sorts by code point, as the manifest has to (OMS v1.0, 5.2.1).
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files.shrink_to_fit();
        left_out.sort();
        odd.sort_by(|a, b| a.name.cmp(&b.name));
        closed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { name, root: opened, files, left_out, odd, closed })
    }

    /// The name of one of its files.
    pub(crate) fn file_name(&self, index: usize) -> &str {
        self.files.get(index).map(|file| file.name.as_str()).unwrap_or_default()
    }

    /// Where its files are, below its root, in their order.
    pub fn paths(&self) -> Vec<&Path> {
        self.files.iter().map(File::path).collect()
    }
}

pub(crate) fn read_error(path: &Path, source: io::Error) -> ModelError {
    ModelError::Read { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listing::beside;
    use std::fs;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    fn model() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for name in ["sub-1/x", "sub/x", "b", "A", ".git/HEAD", "sub/.git/HEAD"] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, name).expect("written");
        }
        root
    }

    fn names(root: &Path, scope: &Scope) -> Result<Vec<String>, ModelError> {
        Ok(Model::walk(root, scope)?.files.into_iter().map(|file| file.name).collect())
    }

    fn odd(root: &Path, scope: &Scope) -> Vec<(String, Oddity)> {
        let model = Model::walk(root, scope).expect("a model");
        model.odd.into_iter().map(|odd| (odd.name, odd.what)).collect()
    }

    #[test]
    fn sorted_by_code_point_and_ignored_at_the_root_only() {
        let root = model();
        let scope = Scope { ignore_paths: [".git".to_owned()].into(), ..Scope::default() };
        let found = names(root.path(), &scope).expect("a model");
        assert_eq!(found, ["A", "b", "sub-1/x", "sub/.git/HEAD", "sub/x"]);
    }

    #[test]
    fn only_some_paths() {
        let root = model();
        symlink("nowhere", root.path().join("link")).expect("linked");
        let only = |paths: &[&str]| {
            let only = paths.iter().map(|path| (*path).to_owned()).collect();
            names(root.path(), &Scope { only, ..Scope::default() }).expect("a model")
        };
        assert_eq!(only(&["sub/x", "A"]), ["A", "sub/x"]);
        assert_eq!(only(&["sub"]), ["sub/.git/HEAD", "sub/x"]);
    }

    /// What is listed before is what is found, the directories that were left for later too.
    #[test]
    fn listed_before_and_then() {
        let root = model();
        let listed = |scope: &Scope| {
            let ((), listing) = beside(root.path(), || Ok::<_, ()>(())).expect("nothing fails");
            assert!(listing.is_some());
            let model = Model::listed(root.path(), scope, listing).expect("a model");
            let found = model.files.into_iter().map(|file| file.name).collect::<Vec<_>>();
            assert_eq!(found, names(root.path(), scope).expect("a model"));
            found.len()
        };
        assert_eq!(listed(&Scope::default()), 6);
        assert_eq!(listed(&Scope { ignore_paths: ["sub".to_owned()].into(), ..Scope::default() }), 4);
        // But not what was listed of another directory.
        let (here, other) = (root.path().join("here"), tempfile::tempdir().expect("a directory"));
        symlink("sub", &here).expect("linked");
        let ((), listing) = beside(&here, || Ok::<_, ()>(())).expect("nothing fails");
        fs::remove_file(&here).expect("removed");
        symlink(other.path(), &here).expect("linked");
        assert!(Model::listed(&here, &Scope::default(), listing).expect("a model").files.is_empty());
        let failed = beside(root.path(), || Err::<(), _>("refused"));
        assert!(failed.is_err_and(|error| error == "refused"));
    }

    #[test]
    fn links_are_refused_or_followed_inside_the_model() {
        let root = model();
        let outside = tempfile::NamedTempFile::new().expect("a file");
        let link = root.path().join("link");
        let follow = Scope { allow_symlinks: true, ..Scope::default() };
        symlink("sub", &link).expect("linked");
        assert_eq!(odd(root.path(), &Scope::default()), [("link".into(), Oddity::Symlink)]);
        assert!(names(root.path(), &follow).expect("followed").contains(&"link/x".to_owned()));
        fs::remove_file(&link).expect("removed");
        symlink(outside.path(), &link).expect("linked");
        assert_eq!(odd(root.path(), &follow), [("link".into(), Oddity::Outside)]);
        fs::remove_file(&link).expect("removed");
        symlink(".", &link).expect("linked");
        assert_eq!(odd(root.path(), &follow), [("link".into(), Oddity::Cycle)]);
    }

    #[test]
    fn names_that_json_cannot_carry_are_odd() {
        let root = model();
        fs::write(root.path().join(std::ffi::OsStr::from_bytes(b"\xff")), "x").expect("written");
        fs::write(root.path().join("a\\b"), "x").expect("written");
        let both = [("a\\b".into(), Oddity::Backslash), ("\u{fffd}".into(), Oddity::NotUtf8)];
        assert_eq!(odd(root.path(), &Scope::default()), both);
    }
}
