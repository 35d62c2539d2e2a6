//! `[token.NAME]`: a PKCS#11 module and which of its tokens.

use std::collections::BTreeMap;
use std::time::Duration;

use super::read::{Reader, Section};
use super::uri::Pkcs11Uri;
use super::{ObjectSelector, PinSource, Token, TokenSelector};

pub(super) fn token(reader: &mut Reader<'_>, mut section: Section<'_>) -> Option<Token> {
    let backend = section.required(reader, "backend", "\"pkcs11\"");
    if let Some(backend) = backend.filter(|backend| backend != "pkcs11") {
        let message = format!("{backend:?} is not supported by this version; write \"pkcs11\"");
        reader.mistake(section.position("backend"), &section.path_of("backend"), message);
    }
    let (select, uri) = selector(reader, &mut section);
    let module = match uri.as_ref().and_then(Pkcs11Uri::module) {
        Some(module) => Some(module),
        None => {
            let text = section.required(reader, "module", "\"/usr/lib/softhsm/libsofthsm2.so\"");
            text.map(|text| reader.resolve(&text))
        }
    };
    if let Some(module) = module.as_ref().filter(|module| !module.is_file()) {
        let message = format!(
            "{} is not a file; write the path of the device's PKCS#11 module (a .so file of its driver package)",
            module.display()
        );
        reader.mistake(section.position("module"), &section.path_of("module"), message);
    }
    let pin = match uri.as_ref().and_then(|uri| uri.pin_source.clone()) {
        Some(pin) => Some(pin),
        None => pin(reader, &mut section),
    };
    let sessions = section.integer(reader, "sessions", 1..=256).unwrap_or(1);
    let timeout = section.duration(reader, "timeout").unwrap_or(Duration::from_secs(10));
    let queue = section.integer(reader, "queue", 1..=100_000).unwrap_or(256);
    let env = environment(reader, &mut section);
    section.finish(reader);
    Some(Token {
        module: module?,
        select: select?,
        pin: pin?,
        sessions: usize::try_from(sessions).ok()?,
        timeout,
        queue: usize::try_from(queue).ok()?,
        directory: reader.base().to_owned(),
        env,
        hidden_env: Vec::new(),
    })
}

/// A vendor's library sees the PIN of its own token, and of no other.
pub(super) fn hide_pins(tokens: &mut BTreeMap<String, Token>) {
    let variables: Vec<PinSource> = tokens
        .values()
        .map(|token| token.pin.clone())
        .filter(|pin| matches!(pin, PinSource::Env(_)))
        .collect();
    for token in tokens.values_mut() {
        let others = variables.iter().filter(|pin| **pin != token.pin);
        let name = |pin: &PinSource| if let PinSource::Env(name) = pin { Some(name.clone()) } else { None };
        token.hidden_env = others.filter_map(name).collect();
    }
}

/// `token = { label | serial | model | manufacturer | slot }` or `token = "pkcs11:…"`.
fn selector(
    reader: &mut Reader<'_>,
    section: &mut Section<'_>,
) -> (Option<TokenSelector>, Option<Pkcs11Uri>) {
    if let Some(mut table) = section.table("token") {
        let select = TokenSelector {
            label: table.string(reader, "label"),
            serial: table.string(reader, "serial"),
            model: table.string(reader, "model"),
            manufacturer: table.string(reader, "manufacturer"),
            slot: table.integer(reader, "slot", 0..=u64::from(u32::MAX)),
        };
        let (at, path) = (table.at, table.path.clone());
        table.finish(reader);
        if select == TokenSelector::default() {
            reader.mistake(at, &path, "names no token; write token = { label = \"…\" }".into());
            return (None, None);
        }
        return (Some(select), None);
    }
    let Some(text) = section.required(reader, "token", "{ label = \"release\" }") else {
        return (None, None);
    };
    let (at, path) = (section.position("token"), section.path_of("token"));
    match Pkcs11Uri::parse(&text) {
        Ok(uri) if uri.has_pin_value => {
            let message = "a PIN does not belong into a configuration file; use pin = { file = \"…\" }";
            reader.mistake(at, &path, message.into());
            (None, None)
        }
        Ok(uri) if uri.object != ObjectSelector::default() => {
            let message = "the URI names an object; objects are named by [key.NAME] object = …";
            reader.mistake(at, &path, message.into());
            (None, None)
        }
        Ok(uri) if uri.token == TokenSelector::default() => {
            let message = "the URI names no token; add token=…, serial=… or slot-id=…";
            reader.mistake(at, &path, message.into());
            (None, None)
        }
        Ok(uri) => (Some(uri.token.clone()), Some(uri.relative_to(reader.base()))),
        Err(error) => {
            reader.mistake(at, &path, error.to_string());
            (None, None)
        }
    }
}

fn pin(reader: &mut Reader<'_>, section: &mut Section<'_>) -> Option<PinSource> {
    const EXAMPLES: &str = "{ file = \"release.pin\" }, { credential = \"release\" }, { env = \"RELEASE_PIN\" }, \
                            \"prompt\" or \"none\"";
    let (at, path) = (section.position("pin"), section.path_of("pin"));
    if let Some(mut table) = section.table("pin") {
        let file = table.path(reader, "file").map(PinSource::File);
        let credential = table.string(reader, "credential").map(PinSource::Credential);
        let env = table.string(reader, "env").map(PinSource::Env);
        table.finish(reader);
        let mut given = [file, credential, env].into_iter().flatten();
        let first = given.next();
        if first.is_none() || given.next().is_some() {
            reader.mistake(at, &path, format!("give exactly one source: pin = {EXAMPLES}"));
            return None;
        }
        return first;
    }
    match section.required(reader, "pin", EXAMPLES)?.as_str() {
        "prompt" => Some(PinSource::Prompt),
        "none" => Some(PinSource::None),
        // The text may be somebody's PIN: it is not repeated.
        _ => {
            reader.mistake(at, &path, format!("a PIN is never written here; write pin = {EXAMPLES}"));
            None
        }
    }
}

fn environment(reader: &mut Reader<'_>, section: &mut Section<'_>) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    let Some(table) = section.only_table(reader, "env") else { return variables };
    for (name, value) in table.entries() {
        match value.get_ref().as_str() {
            Some(text) => {
                variables.insert(name.to_owned(), text.to_owned());
            }
            None => {
                let message = "expected a string in quotes".into();
                reader.mistake(value.span().start, &table.path_of(name), message);
            }
        }
    }
    variables
}
