//! Entries of transparency logs as JSON has them (`sigstore_rekor.proto`): read as strictly as all else in a bundle,
//! though what they prove is for others to say. Two readings of one file would be two bundles.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

use crate::object::{Bounded, Object, present};

/// `TransparencyLogEntry`. Nothing of it is kept.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "what is right is handed on as it is written")]
pub(super) struct EntryJson {
    #[serde(default, deserialize_with = "present")]
    log_index: Option<Number>,
    log_id: Object<LogIdJson>,
    kind_version: Object<KindVersionJson>,
    #[serde(default, deserialize_with = "present")]
    integrated_time: Option<Number>,
    #[serde(default, deserialize_with = "present")]
    inclusion_promise: Option<Object<PromiseJson>>,
    #[serde(default, deserialize_with = "present")]
    inclusion_proof: Option<Object<ProofJson>>,
    canonicalized_body: Base64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "as above")]
struct LogIdJson {
    key_id: Base64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "as above")]
struct KindVersionJson {
    kind: String,
    version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "as above")]
struct PromiseJson {
    signed_entry_timestamp: Base64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "as above")]
struct ProofJson {
    #[serde(default, deserialize_with = "present")]
    log_index: Option<Number>,
    root_hash: Base64,
    tree_size: Number,
    #[serde(default)]
    hashes: Hashes,
    #[serde(default, deserialize_with = "present")]
    checkpoint: Option<Object<CheckpointJson>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "as above")]
struct CheckpointJson {
    envelope: Note,
}

/// The way to a tree's head.
#[derive(Default, Deserialize)]
#[serde(try_from = "Bounded<Base64, MOST_HASHES>")]
struct Hashes;

/// No tree is higher: its size has 64 bits.
const MOST_HASHES: usize = 64;

impl TryFrom<Bounded<Base64, MOST_HASHES>> for Hashes {
    type Error = &'static str;

    fn try_from(hashes: Bounded<Base64, MOST_HASHES>) -> Result<Self, Self::Error> {
        if hashes.count > MOST_HASHES { Err("an inclusion proof of more than 64 hashes") } else { Ok(Self) }
    }
}

/// A whole number in quotes, as the JSON form of protobuf writes 64 bits.
struct Number;

/// Base64 with padding (RFC 4648, 4).
struct Base64;

/// A signed note (C2SP signed-note): a text, an empty line, and lines of `— NAME SIGNATURE`.
struct Note;

impl Number {
    const WHAT: &str = "a whole number in quotes";

    fn is_one(text: &str) -> bool {
        text.parse::<i64>().is_ok_and(|number| number >= 0 && number.to_string() == text)
    }
}

impl Base64 {
    const WHAT: &str = "base64 (RFC 4648, 4)";

    fn is_one(text: &str) -> bool {
        STANDARD.decode(text).is_ok()
    }
}

impl Note {
    const WHAT: &str = "a signed note";

    fn is_one(text: &str) -> bool {
        let Some((_, signatures)) = text.split_once("\n\n") else { return false };
        let signature = |line: &str| {
            let parts = line.strip_prefix("\u{2014} ").and_then(|rest| rest.split_once(' '));
            parts.is_some_and(|(name, signature)| !name.is_empty() && Base64::is_one(signature))
        };
        signatures.strip_suffix('\n').is_some_and(|lines| lines.split('\n').all(signature))
    }
}

/// A string that is one of these.
struct Is(&'static str, fn(&str) -> bool);

impl Visitor<'_> for Is {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        if (self.1)(text) { Ok(()) } else { Err(E::custom(format_args!("expected {}", self.0))) }
    }
}

macro_rules! strings {
    ($($name:ident),*) => {
        $(
            impl<'de> Deserialize<'de> for $name {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    deserializer.deserialize_str(Is($name::WHAT, $name::is_one)).map(|()| Self)
                }
            }
        )*
    };
}

strings!(Number, Base64, Note);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_in_its_only_form() {
        assert!(Number::is_one("0") && Number::is_one("125"));
        for wrong in ["", "-1", "01", "1.0", "+1", " 1", "9223372036854775808"] {
            assert!(!Number::is_one(wrong), "{wrong}");
        }
        assert!(Base64::is_one("aGk=") && !Base64::is_one("aGk") && !Base64::is_one("-_8="));
        assert!(Note::is_one("log\n1\nAA==\n\n\u{2014} log aGk=\n\u{2014} witness aGk=\n"));
        for wrong in ["", "log\n1\n", "log\n\n", "log\n\n\u{2014} log aGk=", "log\n\n\u{2014} log aGk= \n"] {
            assert!(!Note::is_one(wrong), "{wrong:?}");
        }
    }
}
