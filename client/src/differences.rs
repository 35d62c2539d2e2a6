//! How a model differs from what was signed.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use crate::hash::Digest;
use crate::model::{Model, Odd, above};

/// How a model differs from its signature. All of it, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Signed, but not there.
    pub missing: Vec<String>,
    /// There, but not signed.
    pub extra: Vec<String>,
    /// There, with other content than was signed.
    pub changed: Vec<Changed>,
    /// There, and not what a model can have.
    pub odd: Vec<Odd>,
    /// There, and nobody knows with which content.
    pub unreadable: Vec<Unreadable>,
    /// What may be behind it.
    pub cause: Option<Cause>,
}

/// What may be behind differences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// This file was never fetched: it is what Git LFS has in its place.
    Pointer(String),
    /// No signed file is there: the model of that name is elsewhere.
    Elsewhere(String),
}

/// How a file begins that Git LFS has in another's place (git-lfs, docs/spec.md), and how long one may be, in bytes.
const POINTER: &[u8; 43] = b"version https://git-lfs.github.com/spec/v1\n";
const LONGEST_POINTER: u64 = 1024;

/// Whether it is one of Git LFS's. Whatever took its place meanwhile is not waited for, nor read to its end.
fn is_pointer(path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = open(path, flags, Mode::empty()).map(File::from) else { return false };
    let mut start = [0; POINTER.len()];
    let short = file.metadata().is_ok_and(|found| found.is_file() && found.len() < LONGEST_POINTER);
    short && (&file).read_exact(&mut start).is_ok() && start == *POINTER
}

/// A file, directory or link that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its name.
    pub name: String,
    /// Why not.
    pub why: String,
}

/// A file with other content than was signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its name.
    pub file: String,
    /// How that is known.
    pub how: How,
}

/// How it is known that a file was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// Another size in bytes than its shards have.
    Size {
        /// As signed.
        signed: u64,
        /// As found.
        found: u64,
    },
    /// Another digest, of the whole or of the first shard that differs.
    Digest {
        /// As signed.
        signed: Digest,
        /// As found.
        found: Digest,
    },
    /// It was written to, truncated or replaced while it was looked at.
    Meanwhile,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { signed, found } => {
                write!(f, "its shards end at byte {signed}, the file has {found} bytes (OMS 6.3.2)")
            }
            Self::Digest { signed, found } => write!(f, "{signed} was signed, {found} is there"),
            Self::Meanwhile => f.write_str("it changed while it was hashed"),
        }
    }
}

impl Differences {
    /// Looks for what may be behind them, in a model of so many signed files.
    pub(crate) fn explain(&mut self, model: &Path, name: &str, signed: usize) {
        let directory = model.is_dir();
        let at = |file: &str| if directory { model.join(file) } else { model.to_owned() };
        let pointer = self.changed.iter().find(|changed| is_pointer(&at(&changed.file)));
        let nothing = directory && self.missing.len() == signed;
        self.cause = match pointer {
            Some(changed) => Some(Cause::Pointer(changed.file.clone())),
            None => nothing.then(|| Cause::Elsewhere(name.to_owned())),
        };
    }

    /// Adds what is wrong with a model whatever was signed.
    pub(crate) fn add(&mut self, found: &Model) {
        self.odd.clone_from(&found.odd);
        // It is there, in another form, or may be there.
        let odd: BTreeSet<&str> = found.odd.iter().map(|odd| odd.name.as_str()).collect();
        let closed: BTreeSet<&str> = found.closed.iter().map(|closed| closed.name.as_str()).collect();
        let hidden = |file: &str| above(file).chain([file]).any(|path| closed.contains(path));
        self.missing.retain(|file| !odd.contains(file.as_str()) && !hidden(file));
        let closed = found.closed.iter();
        let closed = closed.map(|at| Unreadable { name: at.name.clone(), why: at.source.to_string() });
        self.unreadable.extend(closed);
        self.unreadable.sort_by(|one, other| one.name.cmp(&other.name));
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.none_known() && self.unreadable.is_empty()
    }

    /// Whether no more is wrong than that something cannot be read.
    pub(crate) fn none_known(&self) -> bool {
        let Self { missing, extra, changed, odd, unreadable: _, cause: _ } = self;
        missing.is_empty() && extra.is_empty() && changed.is_empty() && odd.is_empty()
    }

    /// One of them, with what is known about it.
    pub fn first(&self) -> Option<String> {
        if let Some(Changed { file, how }) = self.changed.first() {
            return Some(format!("{file:?} is not what was signed: {how}"));
        }
        let missing = self.missing.first().map(|file| format!("{file:?} was signed and is not there"));
        let odd = || self.odd.first().map(|Odd { name, what }| format!("{name:?} {what}"));
        let extra = || self.extra.first().map(|file| format!("{file:?} is there and was not signed"));
        let unreadable =
            || self.unreadable.first().map(|Unreadable { name, why }| format!("cannot read {name:?}: {why}"));
        missing.or_else(odd).or_else(extra).or_else(unreadable)
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.changed.len(), "changed"),
            (self.missing.len(), "missing"),
            (self.odd.len(), "not possible in a model"),
            (self.extra.len(), "not signed"),
            (self.unreadable.len(), "not readable"),
        ];
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        let counts: Vec<_> = counts.map(|(count, what)| format!("{count} {what}")).collect();
        let what = if self.none_known() {
            "the model cannot be compared with what was signed"
        } else {
            "the model is not what was signed (OMS 8.4)"
        };
        write!(f, "{what}: {}", counts.join(", "))
    }
}

impl std::error::Error for Differences {}
