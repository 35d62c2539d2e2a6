//! What is left out of a model, by name: paths that somebody gives, and the bundle.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::model::{Model, ModelError, read_error};

/// What `--ignore-paths` means: a path below the model's root, given as such, or from the working directory,
/// or absolute. One that is not there is an error: a typing mistake would sign what was to be left out.
pub(crate) fn ignored(root: &Path, given: &Path) -> Result<String, ModelError> {
    let error = |reason| ModelError::Ignore { path: given.to_owned(), reason };
    let real_root = root.canonicalize().map_err(|source| read_error(root, source))?;
    let mut there = readings(root, &real_root, given);
    there.retain(|name| {
        !name.is_empty() && !name.contains('\\') && std::fs::symlink_metadata(real_root.join(name)).is_ok()
    });
    match (there.pop(), there.pop()) {
        (Some(_), Some(_)) => return Err(error(AMBIGUOUS)),
        (Some(name), None) => return Ok(name),
        (None, _) => {}
    }
    let from_root = Some(real_root.join(given)).filter(|_| !is_from_here(&real_root, given));
    for candidate in from_root.into_iter().chain([given.to_owned()]) {
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

/// Whether other verifiers would take a path for a pattern (OMS v1.0, 6.2.1).
pub(crate) fn is_pattern(path: &str) -> bool {
    path.contains(['*', '?', '['])
}

/// What is wrong with a path that may mean two.
pub(crate) const AMBIGUOUS: &str =
    "it is one path from the model's root and another from here; begin it with ./, or write it from / on";

/// The names below a model's root that a path may mean, as it is written: what a link on its way leads to is something
/// else. From the root, and from here; one that begins with `./` or `../` is from here, where that is in the model.
pub(crate) fn readings(root: &Path, real_root: &Path, given: &Path) -> Vec<String> {
    let plain = |path: &Path| {
        let parts = path.components().filter(|part| *part != Component::CurDir);
        let plain = parts.clone().all(|part| matches!(part, Component::Normal(_)));
        plain.then(|| parts.collect::<PathBuf>())
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let here = absolute(given);
    let below = |root: &Path| plain(here.strip_prefix(root).ok()?);
    let upwards = || {
        let upwards = given.components().any(|part| part == Component::ParentDir);
        name_below(real_root, given).filter(|_| upwards)
    };
    let from_here = below(&absolute(root)).or_else(|| below(real_root)).or_else(upwards);
    let from_root = plain(given).filter(|_| !is_from_here(real_root, given));
    let mut names: Vec<String> = [from_root, from_here]
        .into_iter()
        .flatten()
        .filter_map(|path| path.to_str().map(str::to_owned))
        .collect();
    names.dedup();
    names
}

/// Whether a path says that it is from here, and here is in the model.
fn is_from_here(real_root: &Path, given: &Path) -> bool {
    let says_so = matches!(given.components().next(), Some(Component::CurDir | Component::ParentDir));
    says_so && Path::new(".").canonicalize().is_ok_and(|here| here.starts_with(real_root))
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
        // From here, where that is in the model, and no longer from there.
        let own = std::env::current_dir().expect("here");
        let own = own.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let from_here = |root: &Path, given: &str| super::readings(root, root, Path::new(given));
        let parent = std::path::absolute("..").expect("a path").canonicalize().expect("there");
        assert_eq!(from_here(&parent, "x"), ["x".to_owned(), format!("{own}/x")]);
        assert_eq!(from_here(&parent, "./x"), [format!("{own}/x")]);
        assert_eq!(from_here(&parent, "../x"), ["x"]);
        assert_eq!(from_here(&parent, "."), [own]);
        assert_eq!(from_here(root.path(), "./x"), ["x"]);
        assert!(ignored(root.path(), Path::new("sbu")).is_err());
        assert!(ignored(root.path(), Path::new("/etc/passwd")).is_err());
        assert!(
            ignored(root.path(), Path::new("*.bin")).expect_err("a pattern").to_string().contains("patterns")
        );
    }
}
