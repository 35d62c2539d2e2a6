//! A model from the manifests of its parts: each once, none missing, all of the same model and options.

use std::path::Path;

use crate::manifest::{Manifest, Resource, Serialization, names_digest, root_digest};
use crate::manifest_file::{File, FilePart, ManifestFileError, sha256};
use crate::object::Object;
use crate::predicate::{Listed, PredicateError, complete, possible};

/// Puts them together. Also returns the model's size in bytes, as the files say it. One that is of a whole model comes
/// alone.
pub(crate) fn together(
    mut files: Vec<(&Path, File<Listed<'_>>)>,
) -> Result<(Manifest, u64), ManifestFileError> {
    files.sort_by_key(|(_, file)| file.part.as_ref().map(|Object(part)| part.index));
    let mut files = files.into_iter();
    let Some((first, file)) = files.next() else { return Err(ManifestFileError::Name("no file is given")) };
    let (model, part, mut bytes) = (file.model.clone(), file.part.clone(), file.bytes);
    let (mut resources, serialization) = checked(first, file)?;
    let mut last = (first, part.as_ref().map(|Object(part)| part.index.get()));
    for (path, file) in files {
        let apart = |what: &str| {
            let (one, other, what) = (last.0.to_owned(), path.to_owned(), what.to_owned());
            Err(ManifestFileError::Apart { one, other, what })
        };
        let (Some(Object(first)), Some(Object(this))) = (&part, file.part.clone()) else {
            return apart("are not parts of one model: give one manifest, or all parts of one");
        };
        if last.1 == Some(this.index.get()) {
            return apart("are the same part of the model");
        }
        if file.model != model {
            return apart(&format!("are of a model called {model:?} and of one called {:?}", file.model));
        }
        if this.of != first.of {
            return apart(&format!("are one of {} parts and one of {}", first.of, this.of));
        }
        bytes = bytes.saturating_add(file.bytes);
        let (more, same) = checked(path, file)?;
        if same != serialization {
            return apart("were made with different options");
        }
        if (FilePart { index: first.index, ..this.clone() }) != *first {
            return apart("are of different models: their files have other names, sizes or content");
        }
        resources.extend(more);
        if let Some(gap) = last.1.filter(|last| last + 1 != this.index.get()) {
            return Err(ManifestFileError::Gap { missing: gap + 1, of: this.of.get() });
        }
        last = (path, Some(this.index.get()));
    }
    if let Some(Object(part)) = &part {
        let (first, last, of) = (part.index.get(), last.1.unwrap_or_default(), part.of.get());
        if first != 1 || last != of {
            return Err(ManifestFileError::Gap { missing: if first == 1 { last + 1 } else { 1 }, of });
        }
    }
    resources.sort_by_cached_key(Resource::name);
    let wrong = |source| ManifestFileError::Predicate { path: first.to_owned(), source };
    let doubled = resources.windows(2).find(|pair| matches!(pair, [one, next] if one.name() == next.name()));
    if let Some([one, ..]) = doubled {
        return Err(wrong(PredicateError::Duplicate(one.name())));
    }
    let names = sha256(names_digest(resources.iter().map(Resource::name)));
    if part.is_some_and(|Object(part)| part.model_names != names) {
        let reason = "it and the other parts do not have the files of the model".to_owned();
        return Err(ManifestFileError::Malformed { path: first.to_owned(), reason });
    }
    complete(&resources, serialization.method).map_err(wrong)?;
    // The reference's name for the only file. We write what it is called.
    if resources.iter().any(|resource| resource.file == ".") {
        let reason = "it calls a file \".\": give its name".to_owned();
        return Err(ManifestFileError::Malformed { path: first.to_owned(), reason });
    }
    possible(&resources, serialization.left_out()).map_err(wrong)?;
    Ok((Manifest { model_name: model, resources, serialization }, bytes))
}

/// What one file lists.
fn checked(path: &Path, file: File<Listed<'_>>) -> Result<(Vec<Resource>, Serialization), ManifestFileError> {
    let Object(predicate) = file.predicate;
    let checked = predicate.check();
    let (resources, serialization) =
        checked.map_err(|source| ManifestFileError::Predicate { path: path.to_owned(), source })?;
    // Against accidents: whoever can change the file can change this, too.
    if file.root_digest != sha256(root_digest(&resources)) {
        let reason = "its root digest is not that of its files".to_owned();
        return Err(ManifestFileError::Malformed { path: path.to_owned(), reason });
    }
    let shards = resources.iter().filter_map(|resource| resource.shard.as_ref());
    let bytes = shards.fold(0_u64, |sum, shard| sum.saturating_add(shard.end.saturating_sub(shard.start)));
    if resources.iter().any(|resource| resource.shard.is_some()) && bytes != file.bytes {
        let reason = format!("its shards have {bytes} bytes, and not {} as it says", file.bytes);
        return Err(ManifestFileError::Malformed { path: path.to_owned(), reason });
    }
    Ok((resources, serialization))
}
