//! `omsign keys` and `omsign agent`: what an agent offers, and its tokens.

use std::io::{BufRead as _, Read as _};

use omsign::agent::{Agent, AgentError};
use omsign::certificate;
use omsign::key::PublicKey;
use omsign::oneshot::{self, without_names};
use omsign_proto::v1::{Key, KeyState, Token};
use openssl::asn1::Asn1Time;
use openssl::x509::X509;
use serde_json::json;
use zeroize::Zeroizing;

use super::private::private_agent;
use super::{Done, Failure, address};
use crate::cli;
use crate::report;

/// No PIN is as long, in bytes. What is longer may have no end.
const LONGEST_PIN: u64 = 4096;

pub(crate) fn keys(arguments: &cli::Keys) -> Done {
    if let Some(cli::KeysCommand::Export { name, key_uri, public_key, previous, connection }) =
        &arguments.command
    {
        let name = name.as_deref().unwrap_or_default();
        let key = match key_uri {
            Some(uri) => private_agent(uri)?.agent().ready_key(oneshot::KEY).map_err(without_names)?,
            None => Agent::connect(&address(connection)?)?.get_key(name)?,
        };
        if *previous {
            if key.previous.is_empty() {
                report::warning(&format!("{name} took the place of no other key"));
            }
            for old in &key.previous {
                export(&old.public_key, &old.certificate_chain, *public_key)?;
            }
            return Ok(());
        }
        if key.public_key.is_empty() && (key.certificate_chain.is_empty() || *public_key) {
            return Err(AgentError::KeyNotReady {
                key: key.name,
                token: key.tokens.join(", "),
                locked: key.state == i32::from(KeyState::Locked),
                reason: key.state_detail,
            }
            .into());
        }
        export(&key.public_key, &key.certificate_chain, *public_key)?;
        return Ok(());
    }
    let keys = Agent::connect(&address(&arguments.connection)?)?.list_keys()?;
    if arguments.json {
        let keys: Vec<_> = keys.iter().map(key_json).collect();
        report::json(&json!({ "keys": keys }))?;
        return Ok(());
    }
    if keys.is_empty() {
        report::warning("the agent has no key that you may use");
    }
    let width = keys.iter().map(|key| key.name.len()).max().unwrap_or(0);
    for key in keys {
        let (state, algorithm) = (state(key.state()), algorithm(&key));
        let method = if key.certificate_chain.is_empty() { "key" } else { "certificate" };
        let until = leaf(&key).map(|leaf| format!("; certificate {}", validity(&leaf))).unwrap_or_default();
        let previous = match key.previous.len() {
            0 => String::new(),
            count => format!("; took the place of {}", report::count(count, "key")),
        };
        let detail = match key.state_detail.as_str() {
            "" => key.device + &until + &previous,
            detail => detail.to_owned(),
        };
        report::result(format_args!(
            "{:<width$}  {state:<11}  {algorithm:<19}  {method:<11}  {detail}",
            key.name
        ))?;
    }
    Ok(())
}

/// Prints certificates, or the public key where there are none.
fn export(public_key: &[u8], chain: &[Vec<u8>], only_key: bool) -> Done {
    if chain.is_empty() || only_key {
        return report::raw(&PublicKey::from_spki(public_key)?.to_pem());
    }
    for der in chain {
        let pem = X509::from_der(der).and_then(|certificate| certificate.to_pem());
        report::raw(&pem.map_err(|_| AgentError::Answer("with a malformed certificate".into()))?)?;
    }
    Ok(())
}

fn key_json(key: &Key) -> serde_json::Value {
    json!({
        "name": key.name,
        "tokens": key.tokens,
        "device": key.device,
        "state": state(key.state()),
        "state_detail": key.state_detail,
        "algorithm": algorithm(key),
        "certificates": key.certificate_chain.len(),
        "certificate_until": leaf(key).map(|leaf| certificate::time(leaf.not_after())),
        "previous": key.previous.len(),
    })
}

/// Its certificate.
fn leaf(key: &Key) -> Option<X509> {
    key.certificate_chain.first().and_then(|der| certificate::parse(der))
}

fn has_expired(leaf: &X509) -> bool {
    Asn1Time::days_from_now(0).is_ok_and(|now| leaf.not_after() < now)
}

fn validity(leaf: &X509) -> String {
    let until = certificate::time(leaf.not_after());
    if has_expired(leaf) { format!("expired on {until}") } else { format!("until {until}") }
}

fn state(state: KeyState) -> &'static str {
    match state {
        KeyState::Ready => "ready",
        KeyState::Starting => "starting",
        KeyState::Locked => "locked",
        KeyState::Unavailable => "unavailable",
        KeyState::Unusable => "unusable",
        KeyState::Unspecified => "unknown",
    }
}

fn algorithm(key: &Key) -> String {
    let name = key.algorithm().as_str_name();
    name.trim_start_matches("SIGNATURE_ALGORITHM_").to_ascii_lowercase().replace('_', "-")
}

pub(crate) fn agent(arguments: &cli::Agent) -> Done {
    match &arguments.command {
        cli::AgentCommand::Status { json, connection } => status(*json, connection),
        cli::AgentCommand::Unlock { token, ask_pin, pin_stdin, connection } => {
            let agent = Agent::connect(&address(connection)?)?;
            let pin = match (ask_pin, pin_stdin) {
                (true, _) => {
                    let asked = rpassword::prompt_password(format!("PIN for token {token}: "));
                    Some(Zeroizing::new(asked.map_err(|_| AgentError::NoTerminal)?))
                }
                (_, true) => {
                    let mut line = Zeroizing::new(String::new());
                    std::io::stdin()
                        .lock()
                        .take(LONGEST_PIN + 1)
                        .read_line(&mut line)
                        .map_err(AgentError::System)?;
                    // What is left of it would cost a try.
                    if line.len() as u64 > LONGEST_PIN {
                        return Err(Failure::Usage("that line is longer than any PIN"));
                    }
                    Some(Zeroizing::new(line.trim_end_matches(['\n', '\r']).to_owned()))
                }
                _ => None,
            };
            agent.unlock(token, pin)?;
            report::result(format_args!("token {token} is unlocked"))
        }
        cli::AgentCommand::Lock { token, connection } => {
            Agent::connect(&address(connection)?)?.lock(token)?;
            report::result(format_args!("token {token} is locked"))
        }
    }
}

fn status(as_json: bool, connection: &cli::Connection) -> Done {
    let address = address(connection)?;
    let agent = Agent::connect(&address)?;
    let serving = agent.health("omsign.v1.AgentService")?;
    // Keys first: the agent waits a moment for tokens that start.
    let (keys, tokens) = (agent.list_keys()?, agent.list_tokens()?);
    let expired = |key: &Key| leaf(key).filter(has_expired);
    let ready = serving
        && !(keys.is_empty() && tokens.is_empty())
        && tokens.iter().all(|token| token.state() == KeyState::Ready)
        && keys.iter().all(|key| key.state() == KeyState::Ready && expired(key).is_none());
    let all_ready = if ready { Ok(()) } else { Err(Failure::NotReady) };
    if as_json {
        let keys: Vec<_> = keys.iter().map(key_json).collect();
        let token_json = |token: &Token| {
            let (state, detail) = (state(token.state()), &token.state_detail);
            json!({ "name": token.name, "device": token.device, "state": state, "state_detail": detail })
        };
        let tokens: Vec<_> = tokens.iter().map(token_json).collect();
        report::json(
            &json!({ "address": address.to_string(), "serving": serving, "tokens": tokens, "keys": keys }),
        )?;
        return all_ready;
    }
    report::result(format_args!("agent at {address}: {}", if serving { "serving" } else { "not serving" }))?;
    let line = |state: &str, detail: &str| match detail {
        "" => state.to_owned(),
        detail => format!("{state}: {detail}"),
    };
    if keys.is_empty() && tokens.is_empty() {
        report::result(format_args!("no key or token that you may use or operate"))?;
    }
    for token in &tokens {
        let what = line(state(token.state()), &token.state_detail);
        report::result(format_args!("token {}: {what}", token.name))?;
        for key in keys.iter().filter(|key| key.tokens.contains(&token.name)) {
            // What ails the token is said once.
            let detail = if key.state() == token.state() { "" } else { &key.state_detail };
            let until = expired(key).map(|leaf| format!(", but its certificate {}", validity(&leaf)));
            report::result(format_args!(
                "  key {}: {}{}",
                key.name,
                line(state(key.state()), detail),
                until.unwrap_or_default()
            ))?;
        }
    }
    all_ready
}
