//! From TOML to typed values, collecting every mistake with its line instead of stopping at the first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use strsim::levenshtein;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::listen::Callers;
use super::{Config, Mistake, keys, listen, tokens};

/// Reads the whole file.
pub(super) fn config(path: &Path, text: &str) -> Result<Config, Vec<Mistake>> {
    let (root, syntax) = DeTable::parse_recoverable(text);
    // Tokens' processes run elsewhere than we do.
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let base = whole.parent().unwrap_or(Path::new("/"));
    let mut reader = Reader { file: path, base, text, mistakes: Vec::new() };
    for error in syntax {
        let at = error.span().map_or(0, |span| span.start);
        // All else in the line may be a PIN: what is before its `=` alone is repeated.
        let line = text.get(..at).and_then(|before| before.rsplit('\n').next()).unwrap_or_default();
        let key = line.split_once('=').map_or("", |(key, _)| key.trim());
        let plain = key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        const REMEDY: &str = "each key once, text in quotes, lists in [ ], tables in { } (toml.io)";
        reader.mistake(at, if plain { key } else { "" }, format!("{}; write {REMEDY}", error.message()));
    }
    if !reader.mistakes.is_empty() {
        // What follows a syntax error is guesswork: complaints about it would mislead.
        return Err(reader.mistakes);
    }
    let mut section = Section::new("", 0, root.get_ref());
    let listen = section.only_table(&mut reader, "listen");
    let callers = Callers::of(listen.as_ref());
    let operators = callers.or_operators(listen.as_ref());
    let listen = listen::listen(&mut reader, listen);
    let audit = section.only_table(&mut reader, "audit");
    let audit = listen::audit(&mut reader, audit);
    let tokens = section.only_table(&mut reader, "token");
    // A token with a mistake in it is still there to be named.
    let names = tokens.iter().flat_map(|tokens| tokens.entries().map(tokens::backend_of)).collect();
    let mut tokens = named(&mut reader, tokens, tokens::token);
    tokens::hide_pins(&mut tokens);
    for (name, other) in tokens::doubled(&tokens) {
        let at = text.find(&format!("[token.{name}]")).unwrap_or(0);
        let path = format!("token.{name}");
        let message = format!(
            "token.{other} is this device; one section serves all its keys, with one process and one PIN"
        );
        reader.mistake(at, &path, message);
    }
    let keys = section.only_table(&mut reader, "key");
    let keys = named(&mut reader, keys, |reader, section| keys::key(reader, section, &names, callers));
    let operators = keys::operators(&mut reader, &mut section, operators);
    if keys.is_empty() && reader.mistakes.is_empty() {
        reader.mistake(0, "key", "no key is configured; add a section [key.NAME]".into());
    }
    section.finish(&mut reader);
    if reader.mistakes.is_empty() {
        return Ok(Config { listen, audit, tokens, keys, operators });
    }
    reader.mistakes.sort_by_key(|mistake| mistake.line);
    Err(reader.mistakes)
}

/// Reads `[kind.NAME]` sections.
fn named<T>(
    reader: &mut Reader<'_>,
    section: Option<Section<'_>>,
    read: impl Fn(&mut Reader<'_>, Section<'_>) -> Option<T>,
) -> BTreeMap<String, T> {
    let mut found = BTreeMap::new();
    let Some(section) = section else { return found };
    for (name, value) in section.entries {
        let (at, name) = (name.span().start, name.get_ref().as_ref());
        let path = section.path_of(name);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            let message = "names are 1 to 64 letters, digits, '-', '_' or '.'; choose another".into();
            reader.mistake(at, &path, message);
        } else if let Some(table) = value.get_ref().as_table() {
            if let Some(item) = read(reader, Section::new(&path, at, table)) {
                found.insert(name.to_owned(), item);
            }
        } else {
            reader.mistake(at, &path, format!("expected a section [{path}]"));
        }
    }
    found
}

/// Where mistakes are collected.
pub(super) struct Reader<'a> {
    file: &'a Path,
    /// The directory that relative paths are relative to.
    pub(super) base: &'a Path,
    text: &'a str,
    pub(super) mistakes: Vec<Mistake>,
}

impl Reader<'_> {
    /// Records a mistake at a byte offset of the text.
    pub(super) fn mistake(&mut self, at: usize, key: &str, message: String) {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.mistakes.push(Mistake { file: self.file.to_owned(), line, key: key.to_owned(), message });
    }

    /// Resolves a path of the configuration.
    pub(super) fn resolve(&self, path: &str) -> PathBuf {
        self.base.join(path)
    }
}

/// One table of the file. Keys are taken out of it; what is left at the end is unknown.
pub(super) struct Section<'a> {
    /// Its full name, such as `token.release`.
    pub(super) path: String,
    /// Where it starts, as a byte offset.
    pub(super) at: usize,
    entries: &'a DeTable<'a>,
    taken: Vec<&'static str>,
}

type Value<'a> = &'a Spanned<DeValue<'a>>;

impl<'a> Section<'a> {
    pub(super) fn new(path: &str, at: usize, entries: &'a DeTable<'a>) -> Self {
        Self { path: path.to_owned(), at, entries, taken: Vec::new() }
    }

    /// The full name of one of its keys.
    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes a value of any type.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.taken.push(key);
        self.entries.get(key)
    }

    /// Takes a sub-table, if there is one under this key.
    pub(super) fn table(&mut self, key: &'static str) -> Option<Section<'a>> {
        self.taken.push(key);
        let value = self.entries.get(key)?;
        let table = value.get_ref().as_table()?;
        Some(Section::new(&self.path_of(key), value.span().start, table))
    }

    /// Takes a sub-table; anything else under this key is a mistake.
    pub(super) fn only_table(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<Section<'a>> {
        let table = self.table(key);
        if table.is_none() && self.has(key) {
            let path = self.path_of(key);
            self.wrong::<()>(reader, key, format!("expected a table; write [{path}] or {key} = {{ … }}"));
        }
        table
    }

    /// Takes a string.
    pub(super) fn string(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<String> {
        match self.take(key)?.get_ref().as_str() {
            Some("") => self.wrong(reader, key, "it is empty; give it a value or leave the key out"),
            Some(text) => Some(text.to_owned()),
            None => self.wrong(reader, key, "expected a string in quotes"),
        }
    }

    /// Takes a string that has to be there.
    pub(super) fn required(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        example: &str,
    ) -> Option<String> {
        if !self.has(key) {
            self.taken.push(key);
            return self.wrong(reader, key, format!("missing; write {key} = {example}"));
        }
        self.string(reader, key)
    }

    /// Takes a whole number within bounds.
    pub(super) fn integer(
        &mut self,
        reader: &mut Reader<'_>,
        key: &'static str,
        bounds: std::ops::RangeInclusive<u64>,
    ) -> Option<u64> {
        let number = self.take(key)?.get_ref().as_integer();
        let number = number.and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        number.filter(|number| bounds.contains(number)).or_else(|| {
            let message = format!("expected a whole number from {} to {}", bounds.start(), bounds.end());
            self.wrong(reader, key, message)
        })
    }

    /// Takes a duration such as `"500ms"`, `"10s"` or `"2min"`.
    pub(super) fn duration(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<Duration> {
        const EXPECTED: &str =
            "expected a duration from 1ms to 1h in quotes, such as \"500ms\", \"10s\" or \"2min\"";
        let bounds = Duration::from_millis(1)..=Duration::from_secs(3600);
        let text = self.take(key)?.get_ref().as_str();
        let duration = text.and_then(|text| humantime::parse_duration(text).ok());
        duration.filter(|duration| bounds.contains(duration)).or_else(|| self.wrong(reader, key, EXPECTED))
    }

    /// Takes an array of strings.
    pub(super) fn strings(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Vec<String> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let text = |item: Value<'_>| item.get_ref().as_str().map(str::to_owned);
        let texts: Option<_> = value.get_ref().as_array().and_then(|array| array.iter().map(text).collect());
        texts.or_else(|| self.wrong(reader, key, "expected an array of strings")).unwrap_or_default()
    }

    /// Takes an array of tables: `[[key]]`.
    pub(super) fn tables(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Vec<Section<'a>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let path = self.path_of(key);
        let Some(array) = value.get_ref().as_array() else {
            reader.mistake(value.span().start, &path, format!("expected sections [[{path}]]"));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, item) in array.iter().enumerate() {
            let at = item.span().start;
            let path = format!("{path}[{index}]");
            match item.get_ref().as_table() {
                Some(table) => sections.push(Section::new(&path, at, table)),
                None => reader.mistake(at, &path, "expected a table".into()),
            }
        }
        sections
    }

    /// Takes a path, resolved against the file's directory.
    pub(super) fn path(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<PathBuf> {
        let text = self.string(reader, key)?;
        Some(reader.resolve(&text))
    }

    /// Whether a key is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether a key is there and holds a table.
    pub(super) fn has_table(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| value.get_ref().as_table().is_some())
    }

    /// Whether a key is there and holds an array.
    pub(super) fn has_array(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| value.get_ref().as_array().is_some())
    }

    /// Takes `true` or `false`.
    pub(super) fn boolean(&mut self, reader: &mut Reader<'_>, key: &'static str) -> Option<bool> {
        let boolean = self.take(key)?.get_ref().as_bool();
        boolean.or_else(|| self.wrong(reader, key, "expected true or false"))
    }

    /// Where a key's value stands, for a mistake found later.
    pub(super) fn position(&self, key: &str) -> usize {
        self.entries.get(key).map_or(self.at, |value| value.span().start)
    }

    /// Every entry, for tables whose keys are free.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> {
        self.entries.iter().map(|(key, value)| (key.get_ref().as_ref(), value))
    }

    /// Records what is wrong with a key, or that it is missing.
    pub(super) fn wrong<T>(
        &self,
        reader: &mut Reader<'_>,
        key: &str,
        message: impl Into<String>,
    ) -> Option<T> {
        reader.mistake(self.position(key), &self.path_of(key), message.into());
        None
    }

    /// What a key's value was read as, or records why it was not.
    pub(super) fn checked<T>(
        &self,
        reader: &mut Reader<'_>,
        key: &str,
        read: Result<T, impl ToString>,
    ) -> Option<T> {
        match read {
            Ok(value) => Some(value),
            Err(error) => self.wrong(reader, key, error.to_string()),
        }
    }

    /// Reports the keys that nobody took.
    pub(super) fn finish(self, reader: &mut Reader<'_>) {
        let mut known = self.taken.clone();
        known.dedup();
        for key in self.entries.keys() {
            let (at, key) = (key.span().start, key.get_ref().as_ref());
            if known.contains(&key) {
                continue;
            }
            let nearest = known.iter().min_by_key(|known| levenshtein(known, key));
            let hint = match nearest {
                Some(known) if levenshtein(known, key) <= 3 => format!("did you mean {known:?}?"),
                _ => format!("known here: {}", known.join(", ")),
            };
            reader.mistake(at, &self.path_of(key), format!("unknown key; {hint}"));
        }
    }
}
