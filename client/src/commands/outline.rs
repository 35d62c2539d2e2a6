//! What can be told of a bundle, or of a statement in one, that is not as it should be. Nothing in it is checked.

use std::io::Read as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// Values take several times as much memory as their text.
const LARGEST_BYTES: u64 = 16 << 20;

/// The outline of a file; None where it is no JSON object, or a long one.
pub(super) fn of_bundle(path: &Path) -> Option<Map<String, Value>> {
    let mut text = Vec::new();
    std::fs::File::open(path).ok()?.take(LARGEST_BYTES + 1).read_to_end(&mut text).ok()?;
    if text.len() as u64 > LARGEST_BYTES {
        return None;
    }
    let bundle: Value = serde_json::from_slice(&text).ok()?;
    bundle.as_object()?;
    let names = |value: &Value| value.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>());
    let envelope = &bundle["dsseEnvelope"];
    let mut outline = Map::new();
    outline.insert("fields".into(), json!(names(&bundle)));
    outline.insert("media_type".into(), bundle["mediaType"].clone());
    outline.insert("material".into(), json!(names(&bundle["verificationMaterial"])));
    outline.insert("payload_type".into(), envelope["payloadType"].clone());
    outline.insert("signatures".into(), json!(envelope["signatures"].as_array().map(Vec::len)));
    if let Some(payload) = envelope["payload"].as_str().and_then(|payload| STANDARD.decode(payload).ok()) {
        outline.extend(of_statement(&payload));
    }
    Some(outline)
}

/// The outline of a statement, as far as it is one.
pub(super) fn of_statement(payload: &[u8]) -> Map<String, Value> {
    let mut outline = Map::new();
    if payload.len() as u64 > LARGEST_BYTES {
        return outline;
    }
    let Ok(statement) = serde_json::from_slice::<Value>(payload) else { return outline };
    let subjects = statement["subject"].as_array();
    let names: Vec<_> =
        subjects.into_iter().flatten().take(16).filter_map(|subject| subject["name"].as_str()).collect();
    outline.insert("statement_type".into(), statement["_type"].clone());
    outline.insert("predicate_type".into(), statement["predicateType"].clone());
    outline.insert("subjects".into(), json!(subjects.map(Vec::len)));
    outline.insert("first_subjects".into(), json!(names));
    let resources = statement["predicate"]["resources"].as_array();
    outline.insert("resources".into(), json!(resources.map(Vec::len)));
    outline.insert("serialization".into(), statement["predicate"]["serialization"].clone());
    outline
}
