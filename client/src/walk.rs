//! What of a listing is a model's, by the signer's parameters: names that count, links, what no model can have.

use std::io;
use std::path::{Path, PathBuf};

use crate::listing::{Found, Kind, list};
use crate::model::{Closed, File, ModelError, Odd, Oddity, Scope, at_or_below, read_error};

/// Directories that a model may have behind symbolic links.
pub(crate) const MOST_LINKED: usize = 10_000;

/// And files.
pub(crate) const MOST_LINKED_FILES: usize = 1_000_000;

/// What was found, in no order.
#[derive(Default)]
pub(crate) struct Walked {
    pub(crate) files: Vec<File>,
    pub(crate) left_out: Vec<String>,
    pub(crate) odd: Vec<Odd>,
    pub(crate) closed: Vec<Closed>,
}

/// Walks over a directory, which is really `real`, or over what was listed of it before.
pub(crate) fn walk(
    root: &Path,
    real: &Path,
    scope: &Scope,
    listing: Option<Vec<Found>>,
) -> Result<Walked, ModelError> {
    let walked = Walked::default();
    let mut walk =
        Walk { root, real_root: real, scope, walked, links: Vec::new(), linked: 0, linked_files: 0 };
    let listing = match listing {
        Some(listing) => listing,
        None => walk.list("").map_err(|source| read_error(root, source))?,
    };
    walk.take(listing, "", real)?;
    Ok(walk.walked)
}

struct Walk<'a> {
    root: &'a Path,
    real_root: &'a Path,
    scope: &'a Scope,
    walked: Walked,
    /// The real directories of the links that the walk is behind, and how many directories it saw there.
    links: Vec<PathBuf>,
    linked: usize,
    linked_files: usize,
}

impl Walk<'_> {
    fn leaves_out(&self, name: &str) -> bool {
        self.scope.ignore_paths.contains(name) || !self.scope.concerns(name)
    }

    /// Lists a directory, whose contents' names begin with a prefix.
    fn list(&self, prefix: &str) -> io::Result<Vec<Found>> {
        list(&self.root.join(prefix), prefix, &|name| self.leaves_out(name))
    }

    fn closed(&mut self, name: String, source: io::Error) {
        self.walked.closed.push(Closed { path: self.root.join(&name), name, source });
    }

    /// Takes what counts of a listing. Its names begin with `prefix`, and it is really of the directory `real`.
    fn take(&mut self, listing: Vec<Found>, prefix: &str, real: &Path) -> Result<(), ModelError> {
        let mut skipped: Option<String> = None;
        for Found { name, kind } in listing {
            // The directory itself comes once; what has its name again is another one, whose own is not UTF-8.
            let below = |skipped: &String| name != *skipped && at_or_below(&name, skipped);
            if skipped.as_ref().is_some_and(below) {
                continue;
            }
            skipped = None;
            let (parent, own_name) = name.rsplit_once('/').unwrap_or(("", &name));
            let odd = match kind {
                Kind::NotUtf8 if self.scope.concerns(&name) => Some(Oddity::NotUtf8),
                Kind::NotUtf8 => None,
                _ if self.leaves_out(&name) => None,
                _ if own_name.contains('\\') => Some(Oddity::Backslash),
                Kind::Special => Some(Oddity::Special),
                Kind::Symlink if !self.scope.allow_symlinks => Some(Oddity::Symlink),
                Kind::File => {
                    self.walked.files.push(File { name, target: None });
                    continue;
                }
                Kind::Directory => continue,
                Kind::Unlisted => {
                    let real = real.join(name.get(prefix.len()..).unwrap_or_default());
                    let prefix = format!("{name}/");
                    match self.list(&prefix) {
                        Ok(below) => self.take(below, &prefix, &real)?,
                        Err(source) => self.closed(name, source),
                    }
                    continue;
                }
                Kind::Unreadable(source) => {
                    self.closed(name, source);
                    continue;
                }
                Kind::Symlink => {
                    let parent = real.join(parent.get(prefix.len()..).unwrap_or_default());
                    self.symlink(name, parent)?;
                    continue;
                }
            };
            if matches!(kind, Kind::Directory) {
                skipped = Some(name.clone());
            }
            match odd {
                Some(what) => self.walked.odd.push(Odd { name, what }),
                None => self.walked.left_out.push(name),
            }
        }
        Ok(())
    }

    /// Follows a link in a directory, which is really `parent`.
    fn symlink(&mut self, name: String, parent: PathBuf) -> Result<(), ModelError> {
        let path = self.root.join(&name);
        let found = path.canonicalize().and_then(|target| Ok((std::fs::metadata(&target)?, target)));
        let (kind, target) = match found {
            Ok(found) => found,
            Err(error) if leads_nowhere(&error) => {
                self.walked.odd.push(Odd { name, what: Oddity::Nowhere });
                return Ok(());
            }
            Err(source) => {
                self.closed(name, source);
                return Ok(());
            }
        };
        let odd = if !target.starts_with(self.real_root) {
            Oddity::Outside
        } else if kind.is_file() {
            // The link's own name, the target's content (OMS v1.0, 6.1.1).
            self.walked.files.push(File { name, target: Some(target.into()) });
            return Ok(());
        } else if !kind.is_dir() {
            Oddity::Special
        } else if parent.starts_with(&target) || self.links.iter().any(|link| link.starts_with(&target)) {
            Oddity::Cycle
        } else {
            let prefix = format!("{name}/");
            let below = match self.list(&prefix) {
                Ok(below) => below,
                Err(source) => {
                    self.closed(name, source);
                    return Ok(());
                }
            };
            let directories = below.iter().filter(|found| matches!(found.kind, Kind::Directory)).count();
            self.linked += 1 + directories;
            self.linked_files += below.len() - directories;
            if self.linked > MOST_LINKED || self.linked_files > MOST_LINKED_FILES {
                return Err(ModelError::Linked(path));
            }
            self.links.push(parent);
            self.take(below, &prefix, &target)?;
            self.links.pop();
            return Ok(());
        };
        self.walked.odd.push(Odd { name, what: odd });
        Ok(())
    }
}

/// Whether it is the link that is wrong, and not who follows it.
pub(crate) fn leads_nowhere(error: &io::Error) -> bool {
    // ErrorKind::FilesystemLoop is not stable yet.
    let loops = error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    loops || matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
