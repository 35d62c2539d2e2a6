//! `[token.NAME]`: a device and how it is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::read::{Reader, Section};
use super::uri::Pkcs11Uri;
use super::{Device, ObjectSelector, PinSource, Profile, Token, TokenSelector};

/// The backends, as `backend = …` names them.
const BACKENDS: [&str; 3] = ["pkcs11", "tpm", "piv"];

/// A token's name and backend, for the keys that live on it. Mistakes are reported elsewhere.
pub(super) fn backend_of((name, value): (&str, &Spanned<DeValue<'_>>)) -> (String, &'static str) {
    let written = value.get_ref().get("backend").and_then(|backend| backend.get_ref().as_str());
    let backend = BACKENDS.into_iter().find(|backend| Some(*backend) == written);
    (name.to_owned(), backend.unwrap_or_default())
}

pub(super) fn token(reader: &mut Reader<'_>, mut section: Section<'_>) -> Option<Token> {
    let backend = section.required(reader, "backend", "\"pkcs11\", \"tpm\" or \"piv\"");
    let (device, pin) = match backend.as_deref() {
        Some("tpm") => (tpm(reader, &mut section), None),
        Some("piv") => (piv(reader, &mut section), None),
        Some("pkcs11") | None => pkcs11(reader, &mut section),
        Some(other) => {
            let message = format!("{other:?} is not supported; write \"pkcs11\", \"tpm\" or \"piv\"");
            section.wrong::<()>(reader, "backend", message);
            pkcs11(reader, &mut section)
        }
    };
    // The keys of a TPM need not have an authorization value; other devices ask for a PIN.
    let pin = match pin {
        Some(pin) => Some(pin),
        None if backend.as_deref() == Some("tpm") && section.take("pin").is_none() => Some(PinSource::None),
        None => self::pin(reader, &mut section),
    };
    let owner_auth = match backend.as_deref() {
        Some("tpm") if section.has("owner_auth") => {
            secret(reader, &mut section, "owner_auth", "{ file = \"tpm-owner.auth\" }")
        }
        _ => Some(PinSource::None),
    };
    let sessions = match backend.as_deref() {
        // These do one thing at a time.
        Some("tpm" | "piv") => None,
        _ => section.integer(reader, "sessions", 1..=256),
    };
    let timeout = section.duration(reader, "timeout").unwrap_or(Duration::from_secs(10));
    let queue = section.integer(reader, "queue", 1..=100_000).unwrap_or(256);
    let required = section.boolean(reader, "required").unwrap_or(false);
    let touch_command = match backend.as_deref() {
        Some("piv") => section.strings(reader, "touch_command"),
        _ => Vec::new(),
    };
    if pin == Some(PinSource::Device) && backend.as_deref() != Some("pkcs11") {
        section.wrong::<()>(
            reader,
            "pin",
            "only PKCS#11 modules have it entered on the device; write \"prompt\"",
        );
    }
    let env = environment(reader, &mut section);
    if let (Some(Device::Pkcs11 { profile, .. }), Some(PinSource::None)) = (&device, &pin)
        && profile.hides_public_before_login
        && !profile.may_hold_pin
    {
        let message = "this module shows nothing without a login; write where its PIN comes from";
        section.wrong::<()>(reader, "pin", message);
    }
    section.finish(reader);
    Some(Token {
        device: device?,
        pin: pin?,
        owner_auth: owner_auth?,
        sessions: usize::try_from(sessions.unwrap_or(1)).ok()?,
        timeout,
        queue: usize::try_from(queue).ok()?,
        required,
        touch_command,
        directory: reader.base.to_owned(),
        env,
        hidden_env: Vec::new(),
    })
}

/// `module`, `token`, and the PIN source of a URI.
fn pkcs11(reader: &mut Reader<'_>, section: &mut Section<'_>) -> (Option<Device>, Option<PinSource>) {
    let (select, uri) = selector(reader, section);
    let named = section.string(reader, "profile");
    let named = named.and_then(|name| section.checked(reader, "profile", Profile::named(&name)));
    let module = match (uri.as_ref().and_then(Pkcs11Uri::module), &named) {
        (Some(module), _) => Some(module),
        (None, Some(profile)) if !section.has("module") => {
            section.take("module");
            let library = profile.library();
            if library.is_none() {
                let known: Vec<_> = profile.libraries.iter().map(|path| path.display().to_string()).collect();
                let message = format!(
                    "none of the profile's libraries is installed ({}); install the driver, or write module = …",
                    known.join(", ")
                );
                section.wrong::<()>(reader, "profile", message);
            }
            library
        }
        (None, _) => {
            let text = section.required(reader, "module", "\"/usr/lib/softhsm/libsofthsm2.so\"");
            text.map(|text| reader.resolve(&text))
        }
    };
    if let Some(module) = module.as_ref().filter(|module| !module.is_file()) {
        let message = format!(
            "{} is not a file; write the path of the device's PKCS#11 module (a .so file of its driver package)",
            module.display()
        );
        section.wrong::<()>(reader, "module", message);
    }
    let device = module.zip(select).map(|(module, select)| {
        let profile = Box::new(named.unwrap_or_else(|| Profile::of_module(&module)));
        Device::Pkcs11 { module, select: Box::new(select), profile }
    });
    (device, uri.and_then(|uri| uri.pin_source))
}

/// `tcti`
fn tpm(reader: &mut Reader<'_>, section: &mut Section<'_>) -> Option<Device> {
    let text = section.string(reader, "tcti").unwrap_or_else(|| super::tpm::DEFAULT.to_owned());
    section.checked(reader, "tcti", text.parse().map(Device::Tpm))
}

/// `serial`
fn piv(reader: &mut Reader<'_>, section: &mut Section<'_>) -> Option<Device> {
    if !section.has("serial") {
        let message = "missing; write serial = 9876543, as printed on the YubiKey and by `ykman list`";
        section.wrong::<()>(reader, "serial", message);
    }
    let serial = section.integer(reader, "serial", 1..=u64::from(u32::MAX))?;
    Some(Device::Piv { serial: u32::try_from(serial).ok()? })
}

/// A vendor's library sees the PIN of its own token, and of no other.
pub(super) fn hide_pins(tokens: &mut BTreeMap<String, Token>) {
    let own = |token: &Token| {
        let name = |pin: &PinSource| if let PinSource::Env(name) = pin { Some(name.clone()) } else { None };
        [&token.pin, &token.owner_auth].into_iter().filter_map(name).collect::<BTreeSet<_>>()
    };
    let variables: BTreeSet<String> = tokens.values().flat_map(own).collect();
    for token in tokens.values_mut() {
        token.hidden_env = variables.difference(&own(token)).cloned().collect();
    }
}

/// Sections for a device with one PIN that another section before it is for: each would offer it. (A TPM's keys have values
/// of their own.)
pub(super) fn doubled(tokens: &BTreeMap<String, Token>) -> Vec<(String, String)> {
    let same = |one: &Token, other: &Token| match (&one.device, &other.device) {
        (Device::Pkcs11 { module, select, .. }, Device::Pkcs11 { module: others, select: and, .. }) => {
            (module, select, &one.env, &one.directory) == (others, and, &other.env, &other.directory)
        }
        (Device::Piv { serial }, Device::Piv { serial: other }) => serial == other,
        _ => false,
    };
    let before = |(name, token): (&String, &Token)| {
        let mut before = tokens.iter().take_while(|(other, _)| *other != name);
        let (other, _) = before.find(|(_, other)| same(token, other))?;
        Some((name.clone(), other.clone()))
    };
    tokens.iter().filter_map(before).collect()
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
            slot: table.integer(reader, "slot", 0..=i64::MAX.unsigned_abs()),
            ..TokenSelector::default()
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
    let uri = section.checked(reader, "token", Pkcs11Uri::parse(&text)).and_then(|uri| {
        let message = if uri.has_pin_value {
            "a PIN does not belong into a configuration file; use pin = { file = \"…\" }"
        } else if uri.object != ObjectSelector::default() {
            "the URI names an object; objects are named by [key.NAME] object = …"
        } else if uri.token == TokenSelector::default() {
            "the URI names no token; add token=…, serial=… or slot-id=…"
        } else {
            return Some(uri.relative_to(reader.base));
        };
        section.wrong(reader, "token", message)
    });
    (uri.as_ref().map(|uri| uri.token.clone()), uri)
}

fn pin(reader: &mut Reader<'_>, section: &mut Section<'_>) -> Option<PinSource> {
    const EXAMPLES: &str = "{ file = \"release.pin\" }, { credential = \"release\" }, { env = \"RELEASE_PIN\" }, \
                            { command = [\"…\"] }, \"prompt\", \"device\" or \"none\"";
    if section.has_table("pin") {
        return secret(reader, section, "pin", EXAMPLES);
    }
    match section.required(reader, "pin", EXAMPLES)?.as_str() {
        "prompt" => Some(PinSource::Prompt),
        "device" => Some(PinSource::Device),
        "none" => Some(PinSource::None),
        // The text may be somebody's PIN: it is not repeated.
        _ => section.wrong(reader, "pin", format!("a PIN is never written here; write pin = {EXAMPLES}")),
    }
}

/// `{ file }`, `{ credential }`, `{ env }` or `{ command }`: where a secret is kept.
fn secret(
    reader: &mut Reader<'_>,
    section: &mut Section<'_>,
    name: &'static str,
    examples: &str,
) -> Option<PinSource> {
    let Some(mut table) = section.table(name) else {
        // The text may be somebody's secret: it is not repeated.
        let message = format!("a secret is never written here; write {name} = {examples}");
        return section.wrong(reader, name, message);
    };
    let file = table.path(reader, "file").map(PinSource::File);
    let credential = table.string(reader, "credential").map(PinSource::Credential);
    let env = table.string(reader, "env").map(PinSource::Env);
    let command = Some(table.strings(reader, "command")).filter(|words| !words.is_empty());
    table.finish(reader);
    let mut given = [file, credential, env, command.map(PinSource::Command)].into_iter().flatten();
    match (given.next(), given.next()) {
        (Some(one), None) => Some(one),
        _ => section.wrong(reader, name, format!("give exactly one source: {name} = {examples}")),
    }
}

fn environment(reader: &mut Reader<'_>, section: &mut Section<'_>) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    let Some(table) = section.only_table(reader, "env") else { return variables };
    for (name, value) in table.entries() {
        let text = value.get_ref().as_str().ok_or("expected a string in quotes");
        if let Some(text) = table.checked(reader, name, text) {
            variables.insert(name.to_owned(), text.to_owned());
        }
    }
    variables
}
