//! The in-toto Statement v1 with the OMS predicate (OMS v1.0, 5 and 6.6): written reproducibly, read strictly.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::manifest::{Manifest, Resource, Serialization};

const TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";

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
    /// An empty manifest.
    #[error("the signed manifest lists no files (OMS 5.2.1)")]
    NoResources,
    /// A name that is not a plain path below the root.
    #[error("the signed manifest lists {0:?}, which is not a canonical path (OMS 6.1.2)")]
    Name(String),
    /// The same name twice.
    #[error("the signed manifest lists {0:?} twice (OMS 5.2.1)")]
    Duplicate(String),
    /// Not a digest of its algorithm in lower-case hexadecimal.
    #[error("the signed digest of {0:?} is malformed (OMS 5.2.1)")]
    Digest(String),
    /// A resource with another algorithm than the manifest's.
    #[error("{0:?} is signed with the algorithm {1:?}, but the manifest says {2:?} (OMS 7)")]
    Algorithm(String, String, String),
    /// An ignored path that is not a plain path below the root.
    #[error("the signed ignore_paths contain {0:?}, which is not a canonical path (OMS 6.2.1)")]
    IgnorePath(String),
    /// `shard_size` where files are not sharded.
    #[error("the signed manifest has a shard_size but is not sharded (OMS 5.2.2)")]
    ShardSize,
    /// The subject's digest is not that of the listed resources.
    #[error("the signed root digest is not that of the listed files (OMS 6.5.1)")]
    RootDigest,
    /// A part of OMS that this version does not implement.
    #[error("this version does not verify {0} (OMS 6.3)")]
    Unsupported(String),
}

impl StatementError {
    /// Whether the statement is wrong, as opposed to beyond this version.
    pub fn found_wrong(&self) -> bool {
        !matches!(self, Self::Unsupported(_))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    predicate: Predicate,
}

#[derive(Serialize, Deserialize)]
struct Subject {
    /// Releases before 1.1 left it out where the model was `.`.
    #[serde(default)]
    name: String,
    digest: SubjectDigest,
}

#[derive(Serialize, Deserialize)]
struct SubjectDigest {
    sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Predicate {
    resources: Vec<Descriptor>,
    serialization: Parameters,
}

/// Unknown fields are ignored, as OMS v1.0, 5.2.1 asks.
#[derive(Serialize, Deserialize)]
struct Descriptor {
    name: String,
    digest: String,
    algorithm: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    method: String,
    hash_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shard_size: Option<serde_json::Number>,
    allow_symlinks: bool,
    #[serde(default)]
    ignore_paths: BTreeSet<String>,
}

/// The statement's bytes for a manifest: the same manifest gives the same bytes.
pub fn encode(manifest: &Manifest) -> Vec<u8> {
    let descriptor = |resource: &Resource| Descriptor {
        name: resource.name.clone(),
        digest: resource.digest.to_string(),
        algorithm: "sha256".into(),
    };
    let statement = Statement {
        kind: TYPE.into(),
        subject: vec![Subject {
            name: manifest.model_name.clone(),
            digest: SubjectDigest { sha256: manifest.root_digest().to_string() },
        }],
        predicate_type: PREDICATE_TYPE.into(),
        predicate: Predicate {
            resources: manifest.resources.iter().map(descriptor).collect(),
            serialization: Parameters {
                method: "files".into(),
                hash_type: "sha256".into(),
                shard_size: None,
                allow_symlinks: manifest.serialization.allow_symlinks,
                ignore_paths: manifest.serialization.ignore_paths.clone(),
            },
        },
    };
    serde_json::to_vec(&statement).expect("strings and lists always serialize")
}

/// Reads and checks a statement. `"."` as the name of a single file stays as it is listed.
pub fn decode(bytes: &[u8]) -> Result<Manifest, StatementError> {
    // The types first, so that a statement of another type is called that, and not malformed.
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(malformed)?;
    let text = |key| value.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
    if let Some(kind) = text("_type").filter(|kind| kind != TYPE) {
        return Err(StatementError::Type(kind));
    }
    if let Some(kind) = text("predicateType").filter(|kind| kind != PREDICATE_TYPE) {
        return Err(StatementError::PredicateType(kind));
    }
    drop(value);
    let Statement { mut subject, predicate, .. } = serde_json::from_slice(bytes).map_err(malformed)?;
    let subjects = subject.len();
    let (Some(subject), 1) = (subject.pop(), subjects) else {
        return Err(StatementError::Subjects(subjects));
    };
    let Predicate { resources, serialization } = predicate;
    let Parameters { method, hash_type, shard_size, allow_symlinks, ignore_paths } = serialization;
    match method.as_str() {
        "files" if shard_size.is_some() => return Err(StatementError::ShardSize),
        "files" => {}
        "shards" => return Err(StatementError::Unsupported("shards".into())),
        other => return Err(StatementError::Malformed(format!("unknown serialization method {other:?}"))),
    }
    match hash_type.as_str() {
        "sha256" => {}
        "blake2b" | "blake2" | "blake3" => return Err(StatementError::Unsupported(hash_type)),
        other => return Err(StatementError::Malformed(format!("unknown hash_type {other:?}"))),
    }
    if let Some(path) = ignore_paths.iter().find(|path| !canonical(path)) {
        return Err(StatementError::IgnorePath(path.clone()));
    }
    if resources.is_empty() {
        return Err(StatementError::NoResources);
    }
    let single = resources.len() == 1;
    let mut seen = BTreeSet::new();
    let mut checked = Vec::with_capacity(resources.len());
    for Descriptor { name, digest, algorithm } in resources {
        if algorithm != hash_type {
            return Err(StatementError::Algorithm(name, algorithm, hash_type));
        }
        // The reference calls the only file of a single-file model ".".
        let only_file = single && name == ".";
        if !canonical(&name) && !only_file {
            return Err(StatementError::Name(name));
        }
        let Some(digest) = Digest::from_hex(&digest) else { return Err(StatementError::Digest(name)) };
        if !seen.insert(name.clone()) {
            return Err(StatementError::Duplicate(name));
        }
        checked.push(Resource { name, digest });
    }
    let serialization = Serialization { allow_symlinks, ignore_paths };
    let manifest = Manifest { model_name: subject.name, resources: checked, serialization };
    if manifest.root_digest().to_string() != subject.digest.sha256 {
        return Err(StatementError::RootDigest);
    }
    Ok(manifest)
}

fn malformed(error: serde_json::Error) -> StatementError {
    StatementError::Malformed(error.to_string())
}

/// Relative, with `/`, no empty, `.` or `..` components (OMS v1.0, 6.1.2).
fn canonical(name: &str) -> bool {
    !name.contains(['\\', '\0']) && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let resource = |name: &str| Resource { name: name.into(), digest: Digest::of(name.as_bytes()) };
        let ignore_paths = [".git".to_owned(), "a b".to_owned()].into();
        Manifest {
            model_name: "m".into(),
            resources: vec![resource("a"), resource("b/c"), resource("ü:1:2")],
            serialization: Serialization { allow_symlinks: false, ignore_paths },
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
            (|s| s["predicate"]["serialization"]["hash_type"] = "blake3".into(), "does not verify blake3"),
            (|s| s["predicate"]["serialization"]["method"] = "shards".into(), "does not verify shards"),
            (|s| s["predicate"]["serialization"]["method"] = "zip".into(), "unknown serialization method"),
            (|s| s["predicate"]["serialization"]["shard_size"] = 5.into(), "(OMS 5.2.2)"),
            (|s| s["predicate"]["serialization"]["allow_symlinks"] = "no".into(), "malformed"),
            (
                |s| s["predicate"]["serialization"]["ignore_paths"] = serde_json::json!(["../x"]),
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
    }
}
