//! Lists of `sha256sum` (GNU coreutils), in both of its forms.

use crate::hash::{Algorithm, Digest};
use crate::manifest::Resource;
use crate::predicate::{PredicateError, canonical};

/// A list that cannot be read as one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SumsError {
    /// A line, counted from 1. A name with a backslash or a line end, which OMS does not know, is escaped.
    #[error("line {0} is not of sha256sum: <64 hexadecimal digits>  <path>")]
    Line(usize),
    /// A name that is not a plain path below the model's root.
    #[error(transparent)]
    Name(PredicateError),
}

/// The files of a list and their digests.
pub(crate) fn parse(text: &str) -> Result<Vec<Resource>, SumsError> {
    let resource = |(index, line): (usize, &str)| {
        let malformed = || SumsError::Line(index + 1);
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
        let digest = Digest::from_hex(Algorithm::Sha256, digest).ok_or_else(malformed)?;
        // `find .` puts it before every name.
        let name = name.strip_prefix("./").unwrap_or(name);
        if !canonical(name) {
            return Err(SumsError::Name(PredicateError::Name(name.to_owned())));
        }
        Ok(Resource { file: name.to_owned(), shard: None, digest })
    };
    text.lines().enumerate().map(resource).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_and_nothing_else() {
        let digest = Digest::sha256(b"a");
        let resource = |file: &str| Resource { file: file.into(), shard: None, digest };
        let list = format!("{digest}  ./c  d\n{digest} *a  b\nSHA256 (b) = {digest}\n");
        assert_eq!(parse(&list).expect("a list"), [resource("c  d"), resource("a  b"), resource("b")]);
        for (text, expected) in [
            (format!("{digest} a"), "line 1 is not"),
            (format!("{digest}  a\nx  b"), "line 2 is not"),
            (format!("{}  a", digest.to_string().to_uppercase()), "line 1 is not"),
            (format!("\\{digest}  a\\\\b"), "line 1 is not"),
            (format!("{digest}  ../a"), "not a canonical path"),
            (format!("{digest}  /a"), "not a canonical path"),
            (format!("{digest}  "), "not a canonical path"),
        ] {
            let error = parse(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
    }
}
