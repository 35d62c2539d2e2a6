//! What is left out of a model, by name: paths that somebody gives, and the bundle.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::model::{Model, ModelError, read_error};

/// What `--ignore-paths` means: a path below the model's root, given as such, or from the working directory,
/// or absolute. One that is not there is an error: a typing mistake would sign what was to be left out.
pub(crate) fn ignored(root: &Path, given: &Path) -> Result<String, ModelError> {
    let error = |reason| ModelError::Ignore { path: given.to_owned(), reason };
    let real_root = root.canonicalize().map_err(|source| read_error(root, source))?;
    // As it is written, from the model's root or from here: what a link on its way leads to is something else.
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let (here, roots) = (absolute(given), [absolute(root), real_root.clone()]);
    let from_here = roots.iter().filter_map(|root| here.strip_prefix(root).ok());
    for written in std::iter::once(given).chain(from_here) {
        let parts = written.components().filter(|part| *part != Component::CurDir);
        let plain = parts.clone().all(|part| matches!(part, Component::Normal(_)));
        let written: PathBuf = parts.collect();
        if plain
            && let Some(name) = written.to_str().filter(|name| !name.is_empty() && !name.contains('\\'))
            && std::fs::symlink_metadata(real_root.join(&written)).is_ok()
        {
            return Ok(name.to_owned());
        }
    }
    let candidates = [real_root.join(given), given.to_owned()];
    for candidate in candidates {
        if std::fs::symlink_metadata(&candidate).is_err() {
            continue;
        }
        if let Some(name) = name_below(&real_root, &candidate) {
            let name = name.to_str().ok_or_else(|| error("its name is not valid UTF-8; rename it"))?;
            // Verifiers refuse such a name in the manifest.
            return if name.contains('\\') {
                Err(error("its name contains a backslash; rename it"))
            } else {
                Ok(name.into())
            };
        }
    }
    if given.to_string_lossy().contains(['*', '?', '[']) {
        return Err(error("patterns are not part of OMS (6.2.1); name each file or directory"));
    }
    Err(error("there is nothing of this name in the model"))
}

/// The bundle's own name, where it lies inside the model (OMS v1.0, 6.2).
pub(crate) fn bundle_inside(model: &Path, signature: &Path) -> Option<String> {
    path_inside(model, signature)?.to_str().map(str::to_owned)
}

/// The same, as it is recorded.
pub(crate) fn recorded_bundle(model: &Path, signature: &Path) -> Result<Option<String>, ModelError> {
    let Some(inside) = path_inside(model, signature) else { return Ok(None) };
    let wrong = |reason| ModelError::Bundle { path: signature.to_owned(), reason };
    let name = inside.to_str().ok_or_else(|| wrong("is not valid UTF-8"))?;
    if name.contains('\\') { Err(wrong("contains a backslash")) } else { Ok(Some(name.to_owned())) }
}

/// Refuses a bundle that has a second name in a model, behind a link: it cannot be left out by one.
pub(crate) fn check_one_name(model: &Model, own: &Path, signature: &Path) -> Result<(), ModelError> {
    let (Some(inside), Some(name)) = (path_inside(own, signature), signature.file_name()) else {
        return Ok(());
    };
    let real = |below: &Path| model.root.path_of(below).canonicalize().ok();
    let directory = real(inside.parent().unwrap_or(Path::new("")));
    let bundle = directory.as_ref().map(|directory| directory.join(name));
    let linked =
        model.files.iter().any(|file| file.target.is_some() && file.target.as_deref() == bundle.as_deref());
    let directories: BTreeSet<&Path> =
        model.files.iter().filter_map(|file| Path::new(&file.name).parent()).collect();
    let mut elsewhere = directories.into_iter().filter(|parent| Some(*parent) != inside.parent());
    if linked || elsewhere.any(|parent| real(parent) == directory) {
        let reason = "is one of several there, through a symbolic link";
        return Err(ModelError::Bundle { path: signature.to_owned(), reason });
    }
    Ok(())
}

fn path_inside(model: &Path, signature: &Path) -> Option<PathBuf> {
    let root = model.canonicalize().ok().filter(|root| root.is_dir())?;
    name_below(&root, signature)
}

/// The name of a path below a model's root, if it lies there. The path itself need not exist, and is not
/// followed if it is a link.
pub(crate) fn name_below(real_root: &Path, path: &Path) -> Option<PathBuf> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.canonicalize().ok()?,
        _ => Path::new(".").canonicalize().ok()?,
    };
    let full = parent.join(path.file_name()?);
    let below = full.strip_prefix(real_root).ok()?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !below.as_os_str().is_empty()).then(|| below.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn an_ignored_path_has_to_be_there() {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(root.path().join("sub")).expect("made");
        std::fs::write(root.path().join("sub/x"), "").expect("written");
        assert_eq!(ignored(root.path(), Path::new("sub")).expect("there"), "sub");
        assert_eq!(ignored(root.path(), &root.path().join("sub/x")).expect("there"), "sub/x");
        assert_eq!(ignored(root.path(), Path::new("./sub/x/")).expect("there"), "sub/x");
        // Not what a link on its way leads to.
        symlink("sub", root.path().join("link")).expect("linked");
        assert_eq!(ignored(root.path(), Path::new("link/x")).expect("there"), "link/x");
        assert_eq!(ignored(root.path(), &root.path().join("link/x")).expect("there"), "link/x");
        assert!(ignored(root.path(), Path::new("sbu")).is_err());
        assert!(ignored(root.path(), Path::new("/etc/passwd")).is_err());
        assert!(
            ignored(root.path(), Path::new("*.bin")).expect_err("a pattern").to_string().contains("patterns")
        );
    }
}
