//! What can be told of a bundle, or of a statement in one, that is not as it should be. Nothing in it is checked, and no
//! more of it is shown than fits a screen.

use std::io::Read as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// Values take many times as much memory as their text.
const LARGEST_BYTES: usize = 1 << 20;

/// Of names and texts, so many, and so many characters of each.
const SHOWN: usize = 16;
const CHARACTERS: usize = 256;

/// The outline of a file; None where it is no JSON object, a long one, or something else than a file.
pub(super) fn of_bundle(path: &Path) -> Option<Map<String, Value>> {
    // A pipe has been read already.
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    let most = u64::try_from(LARGEST_BYTES).ok()? + 1;
    std::fs::File::open(path).ok()?.take(most).read_to_end(&mut text).ok()?;
    let bundle = object(&text)?;
    let envelope = &bundle["dsseEnvelope"];
    let mut outline = Map::new();
    outline.insert("fields".into(), names(&bundle));
    outline.insert("media_type".into(), shown(&bundle["mediaType"]));
    outline.insert("material".into(), names(&bundle["verificationMaterial"]));
    outline.insert("payload_type".into(), shown(&envelope["payloadType"]));
    outline.insert("signatures".into(), count(&envelope["signatures"]));
    if let Some(payload) = envelope["payload"].as_str().and_then(|payload| STANDARD.decode(payload).ok()) {
        outline.extend(of_statement(&payload));
    }
    Some(outline)
}

/// The outline of a statement, as far as it is one.
pub(super) fn of_statement(payload: &[u8]) -> Map<String, Value> {
    let mut outline = Map::new();
    let Some(statement) = object(payload) else { return outline };
    let subjects = statement["subject"].as_array().into_iter().flatten();
    let first: Vec<_> = subjects.take(SHOWN).map(|subject| shown(&subject["name"])).collect();
    let predicate = &statement["predicate"];
    outline.insert("statement_type".into(), shown(&statement["_type"]));
    outline.insert("predicate_type".into(), shown(&statement["predicateType"]));
    outline.insert("subjects".into(), count(&statement["subject"]));
    outline.insert("first_subjects".into(), json!(first));
    outline.insert("resources".into(), count(&predicate["resources"]));
    outline.insert("serialization".into(), shown(&predicate["serialization"]["method"]));
    outline.insert("hash_type".into(), shown(&predicate["serialization"]["hash_type"]));
    outline
}

fn object(text: &[u8]) -> Option<Value> {
    if text.len() > LARGEST_BYTES {
        return None;
    }
    serde_json::from_slice(text).ok().filter(Value::is_object)
}

fn shortened(text: &str) -> String {
    text.chars().take(CHARACTERS).collect()
}

/// A text; null for anything else.
fn shown(value: &Value) -> Value {
    json!(value.as_str().map(shortened))
}

fn count(value: &Value) -> Value {
    json!(value.as_array().map(Vec::len))
}

fn names(value: &Value) -> Value {
    json!(value.as_object().map(|map| map.keys().take(SHOWN).map(|name| shortened(name)).collect::<Vec<_>>()))
}
