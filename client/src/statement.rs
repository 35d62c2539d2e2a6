//! The in-toto Statement v1 with the OMS predicate (OMS v1.0, 5 and 6.6): written reproducibly, read strictly.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::manifest::{Manifest, Resource};
use crate::object::{Anything, Bounded, Object, Text};
use crate::predicate::{Listed, Predicate, PredicateError, complete};

const TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";
/// The type of the predicate of release 0.2.0 of the reference.
pub const RELEASE_0_2_0: &str = "https://model_signing/Digests/v0.1";

/// What is wrong with a statement.
#[derive(Debug, thiserror::Error)]
pub enum StatementError {
    /// Not JSON, a field missing, doubled or unknown, or of the wrong type.
    #[error("the signed statement is malformed (OMS 5): {0}")]
    Malformed(String),
    /// Another `_type`.
    #[error("the signed statement is of type {0:?}, not in-toto Statement v1 (OMS 6.6)")]
    Type(String),
    /// Another `predicateType`.
    #[error("the signed predicate is of type {0:?}, not an OMS v1.0 signature (OMS 5.1)")]
    PredicateType(String),
    /// Not exactly one subject.
    #[error("the signed statement has {0} subjects instead of one (OMS 6.5)")]
    Subjects(usize),
    /// The predicate.
    #[error(transparent)]
    Predicate(#[from] PredicateError),
    /// The subject's digest is not that of the listed resources.
    #[error("the signed root digest is not that of the listed files (OMS 6.5.1)")]
    RootDigest,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Statement<S, P> {
    #[serde(rename = "_type")]
    kind: String,
    subject: S,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    predicate: Object<P>,
}

/// What a statement says that it is.
#[derive(Deserialize)]
struct Types {
    #[serde(default, rename = "_type")]
    kind: Option<String>,
    #[serde(default, rename = "predicateType")]
    predicate_type: Option<String>,
}

/// What is claimed of the root digest before anything is verified.
#[derive(Deserialize)]
struct Claim<'a> {
    #[serde(borrow)]
    subject: Bounded<Object<Subject<'a>>, 1>,
}

#[derive(Serialize, Deserialize)]
struct Subject<'a> {
    /// Releases before 1.1 left it out where the model was `.`.
    #[serde(default, borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    digest: DigestSet<'a>,
}

/// The SHA-256 digest of a subject. Others may be beside it, in lower-case hexadecimal as well (in-toto DigestSet).
#[derive(Serialize)]
struct DigestSet<'a> {
    sha256: Cow<'a, str>,
}

/// Digests of one thing, at most.
const MOST_DIGESTS: usize = 16;

impl<'de: 'a, 'a> Deserialize<'de> for DigestSet<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sha256;
        impl<'de> Visitor<'de> for Sha256 {
            type Value = DigestSet<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut names, mut sha256) = (Vec::new(), None);
                while let Some((Text(name), Text(digest))) = map.next_entry()? {
                    let lower = digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
                    if digest.is_empty() || !lower {
                        let what = format_args!("the subject's {name} digest is not hexadecimal");
                        return Err(A::Error::custom(what));
                    }
                    if names.contains(&name) || names.len() == MOST_DIGESTS {
                        return Err(A::Error::custom("duplicate field, or more digests than anybody needs"));
                    }
                    if name == "sha256" {
                        sha256 = Some(digest);
                    }
                    names.push(name);
                }
                let missing = || A::Error::custom("missing field `sha256` of the subject's digest");
                Ok(DigestSet { sha256: sha256.ok_or_else(missing)? })
            }
        }
        deserializer.deserialize_map(Sha256)
    }
}

/// The statement's bytes for a manifest: the same manifest gives the same bytes.
pub fn encode(manifest: &Manifest) -> Vec<u8> {
    let statement = Statement {
        kind: TYPE.into(),
        subject: [Object(Subject {
            name: manifest.model_name.as_str().into(),
            digest: DigestSet { sha256: manifest.root_digest().to_string().into() },
        })],
        predicate_type: PREDICATE_TYPE.into(),
        predicate: Object(Predicate::new(&manifest.resources, &manifest.serialization)),
    };
    // About what it takes, where names need no escapes: it may be tens of megabytes.
    let resource = |resource: &Resource| {
        let shard = if resource.shard.is_some() { ":18446744073709551615".len() * 2 } else { 0 };
        resource.file.len() + shard + 2 * resource.digest.as_bytes().len() + 48
    };
    let mut bytes = Vec::with_capacity(1024 + manifest.resources.iter().map(resource).sum::<usize>());
    serde_json::to_writer(&mut bytes, &statement).expect("strings and lists always serialize");
    bytes
}

/// Reads and checks a statement. `"."` as the name of a single file stays as it is listed.
pub fn decode(bytes: &[u8]) -> Result<Manifest, StatementError> {
    let (mut subjects, predicate) =
        parse::<Bounded<Object<Subject<'_>>, 1>, Predicate<Listed<'_>>>(bytes, PREDICATE_TYPE)?;
    let (Some(Object(subject)), 1) = (subjects.kept.pop(), subjects.count) else {
        return Err(StatementError::Subjects(subjects.count));
    };
    let (resources, serialization) = predicate.without_outside_paths().check()?;
    complete(&resources, serialization.method)?;
    let manifest = Manifest { model_name: subject.name.into_owned(), resources, serialization };
    if manifest.root_digest().to_string() != subject.digest.sha256 {
        return Err(StatementError::RootDigest);
    }
    Ok(manifest)
}

/// Reads the statement of release 0.2.0 of the reference: one subject for each file, and nothing about how they were
/// found. What it signed is no OMS v1.0 statement, so only a caller who says so gets it.
pub fn decode_release_0_2_0(bytes: &[u8]) -> Result<Manifest, StatementError> {
    let (files, Anything {}) = parse::<Vec<Object<Subject<'_>>>, _>(bytes, RELEASE_0_2_0)?;
    let files = files.into_iter().map(|Object(file)| (file.name, file.digest.sha256)).collect();
    let (resources, serialization) = Predicate::of_files(files).check()?;
    complete(&resources, serialization.method)?;
    Ok(Manifest { model_name: String::new(), resources, serialization })
}

/// Whether a statement says that it is one of release 0.2.0 of the reference.
pub(crate) fn is_of_release_0_2_0(bytes: &[u8]) -> bool {
    let types: Option<Types> = serde_json::from_slice(bytes).ok();
    types.and_then(|types| types.predicate_type).is_some_and(|kind| kind == RELEASE_0_2_0)
}

/// What a statement says that its model is called. Nothing about it is proven.
pub fn claimed_model_name(bytes: &[u8]) -> Option<String> {
    let claim: Claim<'_> = serde_json::from_slice(bytes).ok()?;
    claim.subject.kept.first().map(|Object(subject)| subject.name.clone().into_owned())
}

/// What a statement says is its root digest. Nothing about it is proven, nor whether it is one.
pub(crate) fn claimed_root_digest(bytes: &[u8]) -> Result<String, StatementError> {
    let claim: Option<Claim<'_>> = serde_json::from_slice(bytes).ok();
    match claim.and_then(|mut claim| claim.subject.kept.pop()) {
        Some(Object(subject)) => Ok(subject.digest.sha256.into_owned()),
        // There is none, so that it is wrong whoever signed it.
        None => Err(decode(bytes).err().unwrap_or(StatementError::RootDigest)),
    }
}

/// The subjects and the predicate of a statement with this type of predicate.
fn parse<'a, S: Deserialize<'a>, P: Deserialize<'a>>(
    bytes: &'a [u8],
    predicate_type: &str,
) -> Result<(S, P), StatementError> {
    // Once for all of it, and not for each string in it.
    let text = std::str::from_utf8(bytes).map_err(|error| StatementError::Malformed(error.to_string()))?;
    let statement: Object<Statement<S, P>> = match serde_json::from_str(text) {
        Ok(statement) => statement,
        // A statement of another type is called that, and not malformed.
        Err(error) => return Err(other_type(bytes, predicate_type).unwrap_or_else(|| malformed(error))),
    };
    let Statement { kind, subject, predicate_type: own, predicate: Object(predicate) } = statement.0;
    check_types(kind, own, predicate_type)?;
    Ok((subject, predicate))
}

/// Whether it is of another type, as far as it says so.
fn other_type(bytes: &[u8], predicate_type: &str) -> Option<StatementError> {
    let Types { kind, predicate_type: own } = serde_json::from_slice(bytes).ok()?;
    check_types(kind.unwrap_or(TYPE.into()), own.unwrap_or(predicate_type.into()), predicate_type).err()
}

fn check_types(kind: String, predicate_type: String, wanted: &str) -> Result<(), StatementError> {
    if kind != TYPE {
        return Err(StatementError::Type(kind));
    }
    if predicate_type == wanted { Ok(()) } else { Err(StatementError::PredicateType(predicate_type)) }
}

fn malformed(error: serde_json::Error) -> StatementError {
    StatementError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Digest;
    use crate::manifest::Serialization;

    fn manifest() -> Manifest {
        let resource =
            |name: &str| Resource { file: name.into(), shard: None, digest: Digest::sha256(name.as_bytes()) };
        let ignore_paths = Some([".git".to_owned(), "a b".to_owned()].into());
        Manifest {
            model_name: "m".into(),
            resources: vec![resource("a"), resource("b/c"), resource("ü:1:2")],
            serialization: Serialization { ignore_paths, ..Serialization::default() },
        }
    }

    #[test]
    fn a_statement_survives_the_round_trip_and_is_reproducible() {
        let bytes = encode(&manifest());
        assert_eq!(bytes, encode(&manifest()));
        assert_eq!(decode(&bytes).expect("valid"), manifest());
    }

    /// One wrong thing at a time, in a statement that is otherwise right.
    #[test]
    fn each_wrong_statement_has_its_own_error() {
        type Change = fn(&mut serde_json::Value);
        let cases: &[(Change, &str)] = &[
            (|s| s["_type"] = "https://in-toto.io/Statement/v0.1".into(), "(OMS 6.6)"),
            (|s| s["predicateType"] = "https://slsa.dev/provenance/v1".into(), "(OMS 5.1)"),
            (|s| drop(s.as_object_mut().expect("an object").remove("subject")), "missing field `subject`"),
            (
                |s| drop(s.as_object_mut().expect("an object").remove("predicate")),
                "missing field `predicate`",
            ),
            (|s| s["more"] = 1.into(), "unknown field `more`"),
            (|s| s["subject"] = serde_json::json!([]), "0 subjects"),
            (|s| s["subject"] = serde_json::json!([s["subject"][0], s["subject"][0]]), "2 subjects"),
            (|s| s["subject"][0]["digest"]["sha256"] = "00".into(), "(OMS 6.5.1)"),
            (|s| s["predicate"]["resources"] = serde_json::json!([]), "no files"),
            (|s| s["predicate"]["resources"][0]["name"] = "b/c".into(), "twice"),
            (|s| s["predicate"]["resources"][0]["name"] = "../a".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = "/a".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = "a/".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = "a//b".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = "./a".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = ".".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["name"] = "a\\b".into(), "(OMS 6.1.2)"),
            (|s| s["predicate"]["resources"][0]["digest"] = "ABCD".into(), "digest of \"a\""),
            (|s| s["predicate"]["resources"][0]["algorithm"] = "blake3".into(), "(OMS 7)"),
            (|s| s["predicate"]["serialization"]["hash_type"] = "md5".into(), "unknown hash_type"),
            (
                |s| s["predicate"]["serialization"]["hash_type"] = "blake3".into(),
                "\"sha256\", but the manifest says",
            ),
            (|s| s["predicate"]["serialization"]["method"] = "shards".into(), "not a positive whole number"),
            (|s| s["predicate"]["serialization"]["method"] = "zip".into(), "unknown serialization method"),
            (|s| s["predicate"]["serialization"]["shard_size"] = 5.into(), "(OMS 5.2.2)"),
            (|s| s["predicate"]["serialization"]["allow_symlinks"] = "no".into(), "malformed"),
            (
                |s| s["predicate"]["serialization"]["ignore_paths"] = serde_json::json!(["a/../x"]),
                "(OMS 6.2.1)",
            ),
        ];
        for (change, expected) in cases {
            let mut statement = serde_json::from_slice(&encode(&manifest())).expect("JSON");
            change(&mut statement);
            let error = decode(statement.to_string().as_bytes()).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        }
        let doubled =
            String::from_utf8(encode(&manifest())).expect("text").replacen('{', r#"{"subject":[],"#, 1);
        assert!(decode(doubled.as_bytes()).expect_err("doubled").to_string().contains("duplicate field"));
        let text = String::from_utf8(encode(&manifest())).expect("text");
        let doubled = text.replacen(r#""digest":{"#, r#""digest":{"sha256":"00","#, 1);
        assert!(decode(doubled.as_bytes()).expect_err("doubled").to_string().contains("duplicate field"));
    }
}
