//! What is in a directory and below it, before anybody says what of it is a model's. Links are not followed.

use std::ffi::OsString;
use std::fs::FileType;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::model::GIT_PATHS;

/// What is below a directory, whatever is at its path by now.
pub(crate) struct Listing {
    found: Vec<Found>,
    directory: Directory,
}

/// A directory, by device and inode.
type Directory = (u64, u64);

impl Listing {
    /// What is in it, if it is of this directory.
    pub(crate) fn of(self, directory: Directory) -> Option<Vec<Found>> {
        (self.directory == directory).then_some(self.found)
    }
}

fn directory_at(path: &Path) -> Option<Directory> {
    let found = path.metadata().ok()?;
    Some((found.dev(), found.ino()))
}

/// Something in it.
pub(crate) struct Found {
    /// Its path below the root, as far as it is UTF-8.
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// What it is.
pub(crate) enum Kind {
    File,
    /// What is below it comes right after it.
    Directory,
    /// What is below it was not asked for.
    Unlisted,
    /// A directory that cannot be read.
    Unreadable(io::Error),
    Symlink,
    /// A socket, pipe or device.
    Special,
    /// Anything whose name is not UTF-8.
    NotUtf8,
}

/// Lists a directory, whose contents' names begin with a prefix, without what is below directories to be skipped.
pub(crate) fn list(path: &Path, prefix: &str, skip: &dyn Fn(&str) -> bool) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    // Directories that are being listed, each below the one before it.
    let mut open = vec![(path.to_owned(), prefix.to_owned(), entries(path)?)];
    while let Some((path, prefix, rest)) = open.last_mut() {
        let Some((own_name, kind)) = rest.next() else {
            open.pop();
            continue;
        };
        let Some(own_name) = own_name.to_str() else {
            found.push(Found { name: format!("{prefix}{}", own_name.display()), kind: Kind::NotUtf8 });
            continue;
        };
        let name = format!("{prefix}{own_name}");
        let kind = match kind {
            kind if kind.is_file() => Kind::File,
            kind if kind.is_symlink() => Kind::Symlink,
            kind if !kind.is_dir() => Kind::Special,
            _ if skip(&name) => Kind::Unlisted,
            _ => Kind::Directory,
        };
        let below = matches!(kind, Kind::Directory).then(|| (path.join(own_name), format!("{name}/")));
        found.push(Found { name, kind });
        if let Some((path, prefix)) = below {
            match entries(&path) {
                Ok(entries) => open.push((path, prefix, entries)),
                Err(error) => found.last_mut().expect("pushed above").kind = Kind::Unreadable(error),
            }
        }
    }
    Ok(found)
}

/// What is in a directory, which is closed before what is below it is opened: a tree may be deeper than there are descriptors.
fn entries(path: &Path) -> io::Result<std::vec::IntoIter<(OsString, FileType)>> {
    let entries =
        std::fs::read_dir(path)?.map(|entry| entry.and_then(|e| Ok((e.file_name(), e.file_type()?))));
    Ok(entries.collect::<io::Result<Vec<_>>>()?.into_iter())
}

/// Lists a directory while something else is done that does not need it. None where there is no directory, another one
/// at the end than at the start, or no thread. If the other thing fails, nobody waits for more than the directory it is in.
pub(crate) fn beside<T, E>(
    directory: &Path,
    other: impl FnOnce() -> Result<T, E>,
) -> Result<(T, Option<Listing>), E> {
    let unwanted = AtomicBool::new(false);
    // Git's own are mostly many, and left out.
    let skip = |name: &str| unwanted.load(Ordering::Relaxed) || GIT_PATHS.contains(&name);
    thread::scope(|scope| {
        let list = || {
            let listed = directory_at(directory)?;
            let found = list(directory, "", &skip).ok()?;
            (directory_at(directory) == Some(listed)).then_some(Listing { found, directory: listed })
        };
        let listing = thread::Builder::new().name("listing".into()).spawn_scoped(scope, list);
        let done = other().inspect_err(|_| unwanted.store(true, Ordering::Relaxed))?;
        Ok((done, listing.ok().and_then(|listing| listing.join().ok().flatten())))
    })
}
