//! What people and programs see: results on standard output, everything else on standard error.

use std::borrow::Cow;
use std::io::{self, Write as _};

use omsign::Error;
use omsign::differences::Differences;
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

use crate::commands::Failure;
use crate::hints::hint;

/// Names printed of each kind of difference; `--json` has more.
const SHOWN: usize = 50;

/// Prints a result in one line, whatever names in it hold.
pub(crate) fn result(text: impl std::fmt::Display) -> Result<(), Failure> {
    raw(format!("{}\n", printable(&text.to_string().replace('\n', "\\n"))).as_bytes())
}

/// Prints a result for programs: one JSON object in a line.
pub(crate) fn json(object: &impl Serialize) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = object.serialize(&mut Serializer::with_formatter(&mut out, Controls));
    printed(written.map_err(io::Error::from).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()))
}

/// Escapes all control characters as JSON does it: serde_json leaves DEL and those from U+0080 on.
struct Controls;

impl Formatter for Controls {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        let mut rest = text;
        while let Some((at, control)) = rest.char_indices().find(|(_, character)| character.is_control()) {
            let (before, after) = rest.split_at(at);
            write!(out, "{before}\\u{:04x}", u32::from(control))?;
            rest = after.get(control.len_utf8()..).unwrap_or_default();
        }
        out.write_all(rest.as_bytes())
    }
}

/// Names and values of others may hold escape sequences for the terminal, and what turns the order of characters round.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let turns = |character| matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let harmful = |character: char| (character.is_control() && character != '\n') || turns(character);
    if !text.contains(harmful) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if harmful(character) { escaped.extend(character.escape_debug()) } else { escaped.push(character) }
    }
    escaped.into()
}

/// Prints bytes as they are.
pub(crate) fn raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    printed(out.write_all(bytes).and_then(|()| out.flush()))
}

fn printed(written: io::Result<()>) -> Result<(), Failure> {
    match written {
        // `omsign … | head` has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Failure::Unprinted),
    }
}

/// Prints a line beside the result. That nobody may be there to read it changes nothing.
pub(crate) fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints why a command did not succeed, and returns its exit status.
pub(crate) fn failure(failure: &Failure) -> u8 {
    // In one line, whatever names in it hold.
    say(format_args!("error: {}", printable(&failure.text().replace('\n', "\\n"))));
    if let Failure::Wrong(error) | Failure::Undone(error) = failure {
        if let Error::Differs(differences) = error {
            show(differences);
        }
        if let Some(hint) = hint(error) {
            say(format_args!("hint: {}", printable(&hint)));
        }
    }
    if matches!(failure, Failure::Wrong(_) | Failure::NotReady) { 1 } else { 2 }
}

/// Prints something worth knowing that is not an error.
pub(crate) fn warning(text: &str) {
    say(format_args!("warning: {}", printable(text)));
}

/// What is not signed where files are sharded.
pub(crate) fn unsigned_files(empty: usize) {
    if empty > 0 {
        let files = count(empty, "empty file");
        warning(&format!(
            "not signed: {files}, of which there are no shards (OMS 6.3.2); --serialization files signs them"
        ));
    }
}

fn show(differences: &Differences) {
    let changed = differences.changed.iter().map(|changed| (&changed.file, changed.how.to_string()));
    // Of digests that differ, one is enough to start with.
    let changed = changed.enumerate().map(|(index, (name, how))| (name, Some(how).filter(|_| index == 0)));
    list("changed", differences.changed.len(), changed);
    list("missing", differences.missing.len(), differences.missing.iter().map(|name| (name, None)));
    let odd = differences.odd.iter().map(|odd| (&odd.name, Some(odd.what.to_string())));
    list("not possible in a model", differences.odd.len(), odd);
    list("not signed", differences.extra.len(), differences.extra.iter().map(|name| (name, None)));
    let unreadable = differences.unreadable.iter().map(|at| (&at.name, Some(at.why.clone())));
    list("not readable", differences.unreadable.len(), unreadable);
}

fn list<'a>(kind: &str, count: usize, files: impl Iterator<Item = (&'a String, Option<String>)>) {
    for (name, how) in files.take(SHOWN) {
        let how = how.map(|how| format!(" ({how})")).unwrap_or_default();
        // A name may hold escape sequences for the terminal.
        say(format_args!("  {kind}: {}{how}", name.escape_debug()));
    }
    if count > SHOWN {
        say(format_args!("  {kind}: {} more", count - SHOWN));
    }
}

/// `12.3 MB`, in powers of ten as disks are sold.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    let (mut whole, mut rest, mut unit) = (bytes, 0, "bytes");
    for next in units {
        if whole < 1000 {
            break;
        }
        (rest, whole, unit) = (whole % 1000 / 100, whole / 1000, next);
    }
    if unit == "bytes" { format!("{whole} bytes") } else { format!("{whole}.{rest} {unit}") }
}

/// `1 file`, `2 files`.
pub(crate) fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_json() {
        let object = serde_json::json!({ "name": "a\u{7f}b\u{9b}c\nd" });
        let mut text = Vec::new();
        object.serialize(&mut Serializer::with_formatter(&mut text, Controls)).expect("written");
        let text = String::from_utf8(text).expect("text");
        assert_eq!(text, r#"{"name":"a\u007fb\u009bc\nd"}"#);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), object);
    }

    #[test]
    fn sizes() {
        assert_eq!(size(999), "999 bytes");
        assert_eq!(size(1_999), "1.9 kB");
        assert_eq!(size(83_506_384), "83.5 MB");
        assert_eq!(size(u64::MAX), "18.4 EB");
    }
}
