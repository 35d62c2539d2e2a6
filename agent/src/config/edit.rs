//! Changes that `omsign-agent key rotate` makes to a configuration file: comments, order and the rest stay as written.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tempfile::NamedTempFile;
use toml_edit::{Array, DocumentMut, Entry, InlineTable, Item, Table, Value};

use super::Object;

/// Why a file was not changed.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// It was read before, and cannot be now.
    #[error("the configuration cannot be read")]
    Syntax(#[from] toml_edit::TomlError),
    /// The section is written in a way that is not edited.
    #[error("[key.{0}] is not a section of its own; change it by hand")]
    Section(String),
    /// Somebody else was quicker.
    #[error("[key.{0}] has a `next` key already")]
    Begun(String),
    /// The file system.
    #[error("the configuration cannot be changed")]
    System(#[from] io::Error),
}

/// Has `[key.NAME]` say which key is to take its place.
pub fn begin(text: &str, name: &str, next: &Object) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    match section(&mut document, name)?.entry("next") {
        Entry::Occupied(_) => return Err(EditError::Begun(name.to_owned())),
        Entry::Vacant(absent) => drop(absent.insert(Item::Value(written(next)))),
    }
    Ok(document.to_string())
}

/// Takes back that it says so: whatever else was changed since stays.
pub fn take_back(text: &str, name: &str) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    section(&mut document, name)?.remove("next");
    Ok(document.to_string())
}

/// Puts the next key in place of the present one, whose public half, or whose certificates, are in the file `previous`.
pub fn finish(text: &str, name: &str, chain: Option<&str>, previous: &str) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    let section = section(&mut document, name)?;
    let next = section.remove("next").ok_or_else(|| EditError::Section(name.to_owned()))?;
    replace(section, "object", next);
    match chain {
        Some(chain) => replace(section, "certificate_chain", Item::Value(chain.into())),
        None => drop(section.remove("certificate_chain")),
    }
    let known = section.entry("previous").or_insert_with(|| Item::Value(Array::new().into()));
    let known = known.as_array_mut().ok_or_else(|| EditError::Section(name.to_owned()))?;
    known.insert(0, previous);
    Ok(document.to_string())
}

/// Writes the file anew, whole or not at all, with its owner and mode.
pub fn write(path: &Path, text: &str) -> Result<(), EditError> {
    // A link stays one.
    let path = fs::canonicalize(path)?;
    like(&path, &path, text)?.persist(&path).map_err(|error| error.error)?;
    Ok(())
}

/// Writes a file that is not there yet and that goes with a configuration: whoever may read that may read this.
pub fn write_beside(config: &Path, path: &Path, text: &str) -> io::Result<()> {
    like(config, path, text)?.persist_noclobber(path).map_err(|error| error.error)?;
    Ok(())
}

/// A file where `path` is, with another one's owner and mode, under a name that nobody can guess: whoever else may write here
/// must not choose what is written to.
fn like(other: &Path, path: &Path, text: &str) -> io::Result<NamedTempFile> {
    let other = fs::metadata(other)?;
    let mut file = NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
    std::os::unix::fs::fchown(&file, Some(other.uid()), Some(other.gid()))?;
    file.as_file().set_permissions(other.permissions())?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn section<'a>(document: &'a mut DocumentMut, name: &str) -> Result<&'a mut Table, EditError> {
    let section = document.get_mut("key").and_then(|keys| keys.get_mut(name)).and_then(Item::as_table_mut);
    section.ok_or_else(|| EditError::Section(name.to_owned()))
}

/// The new value with the old one's comments around it.
fn replace(section: &mut Table, key: &str, item: Item) {
    let before = section.get(key).and_then(Item::as_value).map(|value| value.decor().clone());
    let mut item = item;
    if let (Some(decor), Some(value)) = (before, item.as_value_mut()) {
        *value.decor_mut() = decor;
    }
    section.insert(key, item);
}

fn written(object: &Object) -> Value {
    let mut table = InlineTable::new();
    let mut put = |key: &str, value: String| drop(table.insert(key, value.into()));
    match object {
        Object::Pkcs11(select) => {
            select.label.iter().for_each(|label| put("label", label.clone()));
            select.id.iter().for_each(|id| put("id", hex::encode(id)));
        }
        Object::TpmHandle(handle) => put("handle", format!("{handle:#010x}")),
        Object::TpmFile(path) => put("file", path.display().to_string()),
        Object::PivSlot(slot) => put("slot", format!("{slot:02x}")),
    }
    table.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"# mine
[key.release]
token = "t"
object = { label = "release" } # the one
certificate_chain = "chain.pem"

[[key.release.allow]]
unix = { uid = 0 }
"#;

    #[test]
    fn comments_and_order_stay() {
        let next = Object::Pkcs11(super::super::ObjectSelector { label: Some("release-2".into()), id: None });
        let begun = begin(BEFORE, "release", &next).expect("edited");
        assert!(begun.contains("next = { label = \"release-2\" }\n"), "{begun}");
        let finished = finish(&begun, "release", Some("new.pem"), "chain.pem").expect("edited");
        let expected = BEFORE.replace("{ label = \"release\" }", "{ label = \"release-2\" }").replace(
            "certificate_chain = \"chain.pem\"\n",
            "certificate_chain = \"new.pem\"\nprevious = [\"chain.pem\"]\n",
        );
        assert_eq!(finished, expected);
        assert!(finish(BEFORE, "release", None, "x").is_err());
        assert!(begin(BEFORE, "other", &next).is_err());
        assert!(matches!(begin(&begun, "release", &next), Err(EditError::Begun(_))));
    }
}
