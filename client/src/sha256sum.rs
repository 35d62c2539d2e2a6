//! Lists of `sha256sum` (GNU coreutils), in both of its forms, and the manifest that they make.

use std::collections::BTreeMap;
use std::path::Path;

use crate::hash::{Algorithm, Digest};
use crate::manifest::{Manifest, Method, Resource, Serialization};
use crate::manifest_file::{ManifestFileError, Unsaid};
use crate::predicate::{PredicateError, canonical, complete, possible};

/// A list that cannot be read as one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SumsError {
    /// A line, counted from 1.
    #[error("line {0} is not of sha256sum: <64 hexadecimal digits>  <path>")]
    Line(usize),
    /// A digest of what came from a pipe.
    #[error("line {0} is of sha256sum's standard input, and not of a file")]
    Input(usize),
    /// A name that is not a plain path below the model's root.
    #[error(transparent)]
    Name(PredicateError),
}

/// The files of a list and their digests.
pub(crate) fn parse(text: &str) -> Result<Vec<Resource>, SumsError> {
    // With `--zero` names are as they are.
    let zero = text.contains('\0');
    let says_nothing = |line: &str| line.trim().is_empty() || (!zero && line.starts_with('#'));
    let lines =
        || text.split(if zero { '\0' } else { '\n' }).enumerate().filter(|(_, line)| !says_nothing(line));
    // Programs of Windows end lines with two characters, but for the last one, maybe. In a list where one line does, it is
    // the end of a name.
    let ends = text.matches('\n').count();
    let windows = !zero && lines().filter(|(index, _)| *index < ends).all(|(_, line)| line.ends_with('\r'));
    let resource = |(index, line): (usize, &str)| {
        let malformed = || SumsError::Line(index + 1);
        let line = line.strip_suffix('\r').filter(|_| windows).unwrap_or(line);
        // Before a line whose name is escaped.
        let plain = line.strip_prefix('\\').filter(|_| !zero);
        let (escaped, line) = plain.map_or((false, line), |line| (true, line));
        // `sha256sum --tag` writes it so; without, there are two spaces, or a space and `*` for binary files.
        let tagged = line.strip_prefix("SHA256 (").and_then(|rest| rest.rsplit_once(") = "));
        let plain = || {
            let (digest, name) = line.split_at_checked(2 * Algorithm::Sha256.digest_bytes())?;
            Some((digest, name.strip_prefix("  ").or_else(|| name.strip_prefix(" *"))?))
        };
        let (digest, name) = match tagged {
            Some((name, digest)) => (digest, name),
            None => plain().ok_or_else(malformed)?,
        };
        let digest =
            Digest::from_hex(Algorithm::Sha256, &digest.to_ascii_lowercase()).ok_or_else(malformed)?;
        if name == "-" {
            return Err(SumsError::Input(index + 1));
        }
        let name = if escaped { unescaped(name).ok_or_else(malformed)? } else { name.to_owned() };
        // `find .` puts it before every name.
        let file = name.strip_prefix("./").unwrap_or(&name).to_owned();
        if canonical(&file) {
            Ok(Resource { file, shard: None, digest })
        } else {
            Err(SumsError::Name(PredicateError::Name(file)))
        }
    };
    lines().map(resource).collect()
}

/// A name with `\n`, `\r` and `\\` as what they stand for.
fn unescaped(name: &str) -> Option<String> {
    let mut characters = name.chars();
    let mut plain = String::with_capacity(name.len());
    while let Some(character) = characters.next() {
        plain.push(match character {
            '\\' => match characters.next()? {
                'n' => '\n',
                'r' => '\r',
                '\\' => '\\',
                _ => return None,
            },
            other => other,
        });
    }
    Some(plain)
}

/// Puts the lists of one model together.
pub(crate) fn together(
    lists: &[(&Path, Vec<Resource>)],
    unsaid: &Unsaid,
) -> Result<Manifest, ManifestFileError> {
    let Some(model_name) = unsaid.model_name.clone().filter(|name| !name.is_empty()) else {
        return Err(ManifestFileError::Name(
            "a list of sha256sum does not say the model's name: give --model-name",
        ));
    };
    let mut resources = BTreeMap::new();
    for (path, list) in lists {
        for resource in list {
            if resources.insert(resource.file.clone(), resource.clone()).is_some() {
                let source = PredicateError::Duplicate(resource.file.clone());
                return Err(ManifestFileError::Predicate { path: (*path).to_owned(), source });
            }
        }
    }
    let path = lists.first().map(|(path, _)| (*path).to_owned()).unwrap_or_default();
    let resources: Vec<_> = resources.into_values().collect();
    let Unsaid { ignore_paths, allow_symlinks, .. } = unsaid.clone();
    let serialization =
        Serialization { ignore_paths: Some(ignore_paths), allow_symlinks, ..Serialization::default() };
    let wrong = |source| ManifestFileError::Predicate { path: path.clone(), source };
    complete(&resources, Method::Files).map_err(wrong)?;
    possible(&resources, &unsaid.ignore_paths).map_err(wrong)?;
    if let Some(bad) = unsaid.ignore_paths.iter().find(|path| !canonical(path)) {
        return Err(wrong(PredicateError::IgnorePath(bad.clone())));
    }
    Ok(Manifest { model_name, resources, serialization })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_and_nothing_else() {
        let digest = Digest::sha256(b"a");
        let resource = |file: &str| Resource { file: file.into(), shard: None, digest: digest.clone() };
        let list = format!("{digest}  ./c  d\n{digest} *a  b\nSHA256 (b) = {digest}\n");
        assert_eq!(parse(&list).expect("a list"), [resource("c  d"), resource("a  b"), resource("b")]);
        let escaped = format!("\\{digest}  ./a\\nb\n\\SHA256 (a\\rb) = {digest}\n");
        assert_eq!(parse(&escaped).expect("a list"), [resource("a\nb"), resource("a\rb")]);
        let upper = digest.to_string().to_uppercase();
        for end in ["\r\n\r\n", "\r\n", "\r", ""] {
            let windows = format!("# of Windows\r\n{upper}  a\r\n{digest} *b{end}");
            assert_eq!(parse(&windows).expect("a list"), [resource("a"), resource("b")]);
        }
        let one = format!("{digest}  a\r\n{digest}  b\n");
        assert_eq!(parse(&one).expect("a list"), [resource("a\r"), resource("b")]);
        assert_eq!(parse(&format!("{digest}  a\nb\0")).expect("a list"), [resource("a\nb")]);
        for (text, expected) in [
            (format!("{digest}  ./-\n{digest}  -"), "line 2 is of sha256sum's standard input"),
            (format!("{digest} a"), "line 1 is not"),
            (format!("{digest}  a\nx  b"), "line 2 is not"),
            (format!("{digest}  a\0x  b\0"), "line 2 is not"),
            // With --zero it is no escape.
            (format!("{digest}  ./\\n\0"), "not a canonical path"),
            (format!("\\{digest}  a\\tb"), "line 1 is not"),
            (format!("\\{digest}  a\\"), "line 1 is not"),
            (format!("\\{digest}  a\\\\b"), "not a canonical path"),
            (format!("{digest}  ../a"), "not a canonical path"),
            (format!("{digest}  /a"), "not a canonical path"),
            (format!("{digest}  "), "not a canonical path"),
        ] {
            let error = parse(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
