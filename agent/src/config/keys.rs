//! `[key.NAME]`, its `allow` rules, and `[[operator]]`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use nix::unistd::{Group, User};
use x509_cert::der::{Encode as _, pem};

use super::listen::Callers;
use super::read::{Reader, Section};
use super::{Key, Previous, objects};
use crate::algorithm::Padding;
use crate::policy::{Match, Rule, written_subject};
use crate::spki::SpkiDer;

/// How many `*` a pattern may have: how long it takes to compare grows with each.
const MOST_STARS: usize = 3;

/// Name of the rule that lets the agent's own user in where no rule is written: the private agent of one
/// client, and the default operators.
pub const PRIVATE_RULE: &str = "own-user";

pub(super) fn key(
    reader: &mut Reader<'_>,
    mut section: Section<'_>,
    tokens: &BTreeMap<String, &'static str>,
    callers: Callers,
) -> Option<Key> {
    let names = on_tokens(reader, &mut section, tokens);
    let backend = names.iter().find_map(|name| tokens.get(name)).copied().unwrap_or_default();
    let object = objects::object(reader, &mut section, "object", backend);
    let next =
        if section.has("next") { objects::object(reader, &mut section, "next", backend) } else { None };
    let previous = previous(reader, &mut section);
    let certificate_chain = match section.path(reader, "certificate_chain") {
        None => Some(Vec::new()),
        Some(path) => section.checked(reader, "certificate_chain", chain(&path)),
    };
    let padding = match section.string(reader, "padding").as_deref() {
        None | Some("pkcs1") => Padding::Pkcs1,
        Some("pss") => Padding::Pss,
        Some(other) => {
            let message = format!("{other:?} is unknown; write \"pkcs1\" or \"pss\", for an RSA key");
            section.wrong(reader, "padding", message).unwrap_or_default()
        }
    };
    let pcrs = match backend {
        "tpm" => {
            section.string(reader, "pcrs").and_then(|text| section.checked(reader, "pcrs", text.parse()))
        }
        _ => None,
    };
    let allow = rules(reader, &mut section, "allow", callers);
    if allow.is_empty() && !reader.mistakes.iter().any(|m| m.key.starts_with(&section.path_of("allow"))) {
        let path = section.path_of("allow");
        let message = format!("nobody may use this key; add [[{path}]] with unix = {{ user = \"…\" }}");
        reader.mistake(section.at, &path, message);
    }
    section.finish(reader);
    Some(Key {
        tokens: names,
        object: object?,
        next,
        previous,
        padding,
        pcrs,
        certificate_chain: certificate_chain?,
        allow,
    })
}

/// `token = "…"` or `token = ["…", "…"]`: all of one backend.
fn on_tokens(
    reader: &mut Reader<'_>,
    section: &mut Section<'_>,
    tokens: &BTreeMap<String, &'static str>,
) -> Vec<String> {
    let names = match section.has_array("token") {
        true => section.strings(reader, "token"),
        false => section.required(reader, "token", "\"release\"").into_iter().collect(),
    };
    let (at, path) = (section.position("token"), section.path_of("token"));
    let known: Vec<_> = tokens.keys().map(String::as_str).collect();
    let known = match known.as_slice() {
        [] => "no [token.NAME] is configured".to_owned(),
        names => format!("configured: {}", names.join(", ")),
    };
    for (index, name) in names.iter().enumerate() {
        if !tokens.contains_key(name) {
            reader.mistake(at, &path, format!("there is no [token.{name}]; {known}"));
        } else if names.iter().take(index).any(|before| before == name) {
            reader.mistake(at, &path, format!("{name:?} is there twice; name each token once"));
        }
    }
    let backends: BTreeSet<_> = names.iter().filter_map(|name| tokens.get(name)).collect();
    if backends.len() > 1 {
        let message =
            "the tokens of one key have to be of one backend; make another [key.NAME] for the others";
        reader.mistake(at, &path, message.into());
    }
    if section.has_array("token") && names.is_empty() {
        reader.mistake(at, &path, "names no token; write token = [\"hsm-a\", \"hsm-b\"]".into());
    }
    names
}

/// `previous = ["…"]`: files with a public key, or with its certificates.
fn previous(reader: &mut Reader<'_>, section: &mut Section<'_>) -> Vec<Previous> {
    let mut found = Vec::new();
    for name in section.strings(reader, "previous") {
        let read = public_key(&reader.resolve(&name));
        found.extend(section.checked(reader, "previous", read));
    }
    found
}

fn public_key(path: &Path) -> Result<Previous, String> {
    let shown = path.display();
    let text = std::fs::read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    if let Ok(("PUBLIC KEY", der)) = pem::decode_vec(&text) {
        return Ok(Previous { public_key: SpkiDer(der), certificate_chain: Vec::new() });
    }
    let certificate_chain = chain(path).map_err(|_| {
        format!("{shown} holds neither a public key nor certificates, PEM; `omsign keys export` writes both")
    })?;
    let public_key = certificate_chain.first().and_then(|leaf| SpkiDer::of_certificate(leaf));
    let public_key = public_key.ok_or_else(|| format!("{shown} holds no public key"))?;
    Ok(Previous { public_key, certificate_chain })
}

/// Reads a PEM file of certificates as DER, in order.
fn chain(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let shown = path.display();
    let pem = std::fs::read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    let chain = x509_cert::Certificate::load_pem_chain(&pem).map_err(|error| {
        format!("{shown} does not hold PEM certificates ({error}); write the leaf first, then its issuers")
    })?;
    if chain.is_empty() {
        return Err(format!("{shown} holds no certificate; write the leaf first, then its issuers"));
    }
    let encoded: Result<Vec<_>, _> = chain.iter().map(x509_cert::Certificate::to_der).collect();
    encoded.map_err(|error| format!("{shown}: {error}"))
}

pub(super) fn operators(reader: &mut Reader<'_>, section: &mut Section<'_>, callers: Callers) -> Vec<Rule> {
    let mut named = rules(reader, section, "operator", callers);
    let rule = |name: &str, uid| Rule { name: name.to_owned(), matches: Match::Uid(uid) };
    if named.is_empty() {
        named.push(rule(PRIVATE_RULE, rustix::process::geteuid().as_raw()));
    }
    // Whoever may do anything on the machine is shut out by no rule.
    named.push(rule("root", 0));
    named
}

fn rules(
    reader: &mut Reader<'_>,
    section: &mut Section<'_>,
    key: &'static str,
    callers: Callers,
) -> Vec<Rule> {
    const NO_UNIX: &str = "nobody can come in by this rule: [listen] has tls only; add unix = {} to it";
    const NO_TLS: &str = "nobody can come in by this rule: [listen] has no tls; add tls = { address, certificate, \
                          private_key, client_ca } to it";
    let mut rules = Vec::new();
    for mut table in section.tables(reader, key) {
        let name = table.string(reader, "name").unwrap_or_else(|| table.path.clone());
        let found = match (table.only_table(reader, "unix"), table.only_table(reader, "certificate")) {
            (Some(unix_table), None) => {
                if !callers.unix {
                    reader.mistake(unix_table.at, &unix_table.path, NO_UNIX.into());
                }
                unix(reader, unix_table)
            }
            (None, Some(certificate_table)) => {
                if !callers.certificates {
                    reader.mistake(certificate_table.at, &certificate_table.path, NO_TLS.into());
                }
                certificate(reader, certificate_table)
            }
            _ => {
                let message = "give exactly one of unix = { user | uid | group } and certificate = { subject | dns | \
                               dns_pattern | uri | uri_pattern | fingerprint }";
                reader.mistake(table.at, &table.path.clone(), message.into());
                None
            }
        };
        if let Some(matches) = found {
            rules.push(Rule { name, matches });
        }
        table.finish(reader);
    }
    rules
}

fn unix(reader: &mut Reader<'_>, mut table: Section<'_>) -> Option<Match> {
    let user = table.string(reader, "user");
    let uid = table.integer(reader, "uid", 0..=u64::from(u32::MAX - 1));
    let group = table.string(reader, "group");
    let (at, path) = (table.at, table.path.clone());
    table.finish(reader);
    let one = match (user, uid, group) {
        (Some(user), None, None) => user_id(&user).map(Match::Uid),
        (None, Some(uid), None) => u32::try_from(uid).map(Match::Uid).map_err(|error| error.to_string()),
        (None, None, Some(group)) => group_id(&group).map(Match::Gid),
        _ => Err("give exactly one of user = \"…\", uid = 1000 and group = \"…\"".into()),
    };
    one.map_err(|message| reader.mistake(at, &path, message)).ok()
}

/// The id of a user of this machine.
fn user_id(name: &str) -> Result<u32, String> {
    match User::from_name(name) {
        Ok(Some(found)) => Ok(found.uid.as_raw()),
        Ok(None) => Err(format!("this machine has no user {name:?}; create it or use uid")),
        Err(error) => Err(format!("the user database does not tell of {name:?}: {error}")),
    }
}

/// The id of a group of this machine.
pub(super) fn group_id(name: &str) -> Result<u32, String> {
    match Group::from_name(name) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        Ok(None) => Err(format!("this machine has no group {name:?}; create it (groupadd)")),
        Err(error) => Err(format!("the user database does not tell of group {name:?}: {error}")),
    }
}

fn certificate(reader: &mut Reader<'_>, mut table: Section<'_>) -> Option<Match> {
    let mut given: Vec<Result<Match, String>> = Vec::new();
    given.extend(table.string(reader, "subject").map(|text| subject(&text)));
    for (key, is_pattern) in [("dns", false), ("dns_pattern", true)] {
        let name = table.string(reader, key).map(|text| text.to_ascii_lowercase());
        given.extend(name.map(|text| value(text, "dns_pattern", is_pattern, Match::Dns, Match::DnsPattern)));
    }
    for (key, is_pattern) in [("uri", false), ("uri_pattern", true)] {
        let uri = table.string(reader, key);
        given.extend(uri.map(|text| value(text, "uri_pattern", is_pattern, Match::Uri, Match::UriPattern)));
    }
    given.extend(table.string(reader, "fingerprint").map(|text| fingerprint(&text)));
    let (at, path) = (table.at, table.path.clone());
    table.finish(reader);
    let one = given.pop().filter(|_| given.is_empty()).unwrap_or_else(|| {
        Err("give exactly one of subject, dns, dns_pattern, uri, uri_pattern and fingerprint".into())
    });
    one.map_err(|message| reader.mistake(at, &path, message)).ok()
}

/// A subject from the most general part down, as OpenSSL writes it, or up, as RFC 4514 does and the agent logs it.
fn subject(text: &str) -> Result<Match, String> {
    let parts = written_subject(text);
    let is_part = |part: &String| {
        let (kind, value) = part.split_once('=').unwrap_or_default();
        let known = kind.chars().all(|character| character.is_ascii_alphanumeric() || character == '.');
        known && !kind.is_empty() && !value.is_empty() && !value.contains('*')
    };
    match parts.iter().all(is_part) {
        true => Ok(Match::Subject(parts)),
        false => Err(format!(
            "{text:?} is no distinguished name, which has no patterns: write it as the agent logs it, such as CN=ci,O=Acme"
        )),
    }
}

fn value(
    text: String,
    for_patterns: &str,
    is_pattern: bool,
    exact: fn(String) -> Match,
    pattern: fn(String) -> Match,
) -> Result<Match, String> {
    match text.matches('*').count() {
        0 if !is_pattern => Ok(exact(text)),
        1..=MOST_STARS if is_pattern => Ok(pattern(text)),
        0 => Err(format!("{text:?} has no * for a pattern; write it without _pattern")),
        _ if is_pattern => Err(format!("{text:?} has more than {MOST_STARS} *")),
        _ => Err(format!("{text:?} has a *, which only {for_patterns} goes by")),
    }
}

fn fingerprint(text: &str) -> Result<Match, String> {
    let hexadecimal = text.replace(':', "").to_ascii_lowercase();
    let bytes = hex::decode(hexadecimal).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    bytes.map(Match::Fingerprint).ok_or_else(|| {
        "fingerprint is the SHA-256 of the certificate, 64 hexadecimal digits: \
         openssl x509 -noout -fingerprint -sha256 -in client.pem"
            .into()
    })
}
