//! One function per command: arguments in, the library called, the result printed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use omsign::agent::{Address, Agent, AgentError, TlsFiles};
use omsign::bundle::{Bundle, KeyIdentifier, Material};
use omsign::hash::Digest;
use omsign::key::{KeyError, PrivateKey, PublicKey, read_certificates};
use omsign::manifest::{Manifest, Serialization};
use omsign::oneshot::{self, PrivateAgent, split_pin};
use omsign::sign::{Request, Signer};
use omsign::trust::{Trust, name};
use omsign::{Error, model, statement};
use omsign_proto::v1::{Key, KeyState};
use openssl::x509::X509;
use serde_json::json;
use zeroize::Zeroizing;

use crate::cli;
use crate::report::{self, files, size};

/// An error and the exit status that it means.
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) exit_code: u8,
}

/// Whatever it is, it could not be done.
impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), exit_code: 2 }
    }
}

/// A check that failed because of what was checked ends with 1.
fn checked(error: Error) -> Failure {
    let exit_code = if error.found_wrong() { 1 } else { 2 };
    Failure { error, exit_code }
}

type Done = Result<(), Failure>;

pub(crate) fn sign(arguments: &cli::Sign) -> Done {
    let certificates = certificates(arguments)?;
    let request = Request {
        model: &arguments.files.model,
        signature: &arguments.signature,
        ignore_paths: &arguments.files.ignore_paths,
        ignore_git_paths: !arguments.files.no_ignore_git_paths,
        allow_symlinks: arguments.files.allow_symlinks,
        certificates,
    };
    let waiting = |reason: &str| eprintln!("waiting: {reason}");
    let signed = if let Some(key) = &arguments.key {
        let agent = Agent::connect(&address(&arguments.connection)?)?;
        omsign::sign::sign(&request, &Signer::Agent { agent: &agent, key, waiting: &waiting })?
    } else if let Some(uri) = &arguments.key_uri {
        let private = private_agent(uri)?;
        let signer = Signer::Agent { agent: private.agent(), key: oneshot::KEY, waiting: &waiting };
        omsign::sign::sign(&request, &signer)?
    } else {
        // clap asks for one of the three.
        let path = arguments.private_key.clone().unwrap_or_default();
        let given = given_password(arguments)?;
        let asked = || rpassword::prompt_password("Password of the private key: ").ok().map(Zeroizing::new);
        let key = PrivateKey::read(&path, || given.or_else(asked))?;
        omsign::sign::sign(&request, &Signer::File(&key))?
    };
    if arguments.json {
        report::result(json!({
            "signature": arguments.signature,
            "method": signed.method,
            "algorithm": signed.public_key.algorithm.name(),
            "key_hint": signed.public_key.hint(),
            "root_digest": format!("sha256:{}", signed.root_digest),
            "files": signed.files,
            "bytes": signed.bytes,
        }));
    } else {
        let (files, size) = (files(signed.files), size(signed.bytes));
        let (method, algorithm) = (signed.method, signed.public_key.algorithm.name());
        let signature = arguments.signature.display();
        report::result(format_args!(
            "signed {files}, {size}, with {algorithm} ({method} method): {signature}"
        ));
    }
    Ok(())
}

/// The chain on the command line: leaf first.
fn certificates(arguments: &cli::Sign) -> Result<Option<Vec<X509>>, KeyError> {
    let paths: Vec<PathBuf> =
        arguments.signing_certificate.iter().chain(&arguments.certificate_chain).cloned().collect();
    if paths.is_empty() {
        return Ok(None);
    }
    read_certificates(&paths).map(Some)
}

/// The password from a file, without one trailing newline, or from the environment.
fn given_password(arguments: &cli::Sign) -> Result<Option<Zeroizing<String>>, KeyError> {
    if let Some(path) = &arguments.password_file {
        let read = std::fs::read_to_string(path);
        let mut text = Zeroizing::new(read.map_err(|source| KeyError::Read { path: path.clone(), source })?);
        let length = text.strip_suffix('\n').map_or(text.len(), |line| line.trim_end_matches('\r').len());
        text.truncate(length);
        return Ok(Some(text));
    }
    let Some(name) = &arguments.password_env else { return Ok(None) };
    let value = std::env::var(name).map_err(|_| KeyError::Variable(name.clone()))?;
    Ok(Some(Zeroizing::new(value)))
}

/// Starts a private agent and sees to its PIN: from the URI, or from the person at the terminal.
fn private_agent(uri: &str) -> Result<PrivateAgent, AgentError> {
    let (uri, pin) = split_pin(uri);
    if pin.is_some() && uri.contains("pin-source=") {
        // RFC 7512, 2.4; and one call must not offer two PINs.
        return Err(AgentError::Private("PKCS#11 URI: give pin-source or pin-value, not both".into()));
    }
    if pin.is_some() {
        report::warning(
            "pin-value in a URI is seen by everybody who sees the command line; use pin-source=/path/to/file",
        );
    }
    let private = PrivateAgent::start(&uri)?;
    let agent = private.agent();
    let key = match agent.get_key(oneshot::KEY) {
        Ok(key) => key,
        Err(error) => return Err(private.why(error)),
    };
    if key.state() == KeyState::Locked {
        let pin = match pin {
            Some(pin) => pin,
            // It was read from there, and refused: asking for another would spend another try.
            None if uri.contains("pin-source=") => return Err(AgentError::Private(key.state_detail)),
            None => Zeroizing::new(rpassword::prompt_password("PIN: ").map_err(|_| AgentError::NoPin)?),
        };
        agent.unlock(&key.token, Some(pin)).map_err(|error| match error {
            AgentError::Status(status) => {
                AgentError::Private(status.message().replace("token key: ", "the token: "))
            }
            error => error,
        })?;
    }
    Ok(private)
}

pub(crate) fn verify(arguments: &cli::Verify) -> Done {
    let trust = match &arguments.public_key {
        Some(path) => Trust::PublicKey(PublicKey::read(path)?),
        None => Trust::Anchors(read_certificates(&arguments.certificate_chain)?),
    };
    let ignore = arguments.ignore_unsigned_files;
    let verified = omsign::verify::verify(&arguments.model, &arguments.signature, &trust, ignore);
    if arguments.json {
        report::result(match &verified {
            Ok(verified) => json!({
                "verified": true,
                "method": if verified.signer.certificate_subject.is_some() { "certificate" } else { "key" },
                "algorithm": verified.signer.algorithm.name(),
                "certificate_subject": verified.signer.certificate_subject,
                "key_hint": verified.signer.key_hint,
                "root_digest": format!("sha256:{}", verified.root_digest),
                "files": verified.files,
                "bytes": verified.bytes,
                "ignored": verified.ignored,
            }),
            Err(Error::Differs(found)) => json!({
                "verified": false,
                "error": found.to_string(),
                "changed": found.changed,
                "missing": found.missing,
                "not_signed": found.extra,
            }),
            Err(error) => json!({ "verified": false, "error": report::with_causes(error) }),
        });
    }
    let verified = verified.map_err(checked)?;
    if !arguments.json {
        let (files, size) = (files(verified.files), size(verified.bytes));
        let signer = match &verified.signer.certificate_subject {
            Some(subject) => format!("the certificate {subject}"),
            None => format!("the key sha256:{}", verified.signer.key_hint),
        };
        report::result(format_args!("verified {files}, {size}, signed by {signer}"));
        if !verified.ignored.is_empty() {
            report::warning(&format!(
                "{} not signed and ignored",
                crate::report::files(verified.ignored.len())
            ));
        }
    }
    Ok(())
}

pub(crate) fn digest(arguments: &cli::Digest) -> Done {
    let files = &arguments.files;
    let mut ignore_paths = BTreeSet::new();
    for path in &files.ignore_paths {
        ignore_paths.insert(model::ignored(&files.model, path)?);
    }
    if !files.no_ignore_git_paths {
        ignore_paths.extend(model::GIT_PATHS.map(str::to_owned));
    }
    let serialization = Serialization { allow_symlinks: files.allow_symlinks, ignore_paths };
    let (manifest, bytes) = Manifest::of_model(&files.model, serialization)?;
    let root = format!("sha256:{}", manifest.root_digest());
    if arguments.json {
        let digests: BTreeMap<&str, String> = manifest
            .resources
            .iter()
            .map(|resource| (resource.name.as_str(), resource.digest.to_string()))
            .collect();
        report::result(
            json!({ "root_digest": root, "bytes": bytes, "algorithm": "sha256", "files": digests }),
        );
    } else {
        report::result(root);
    }
    Ok(())
}

pub(crate) fn keys(arguments: &cli::Keys) -> Done {
    if let Some(cli::KeysCommand::Export { name, public_key, connection }) = &arguments.command {
        let key = Agent::connect(&address(connection)?)?.get_key(name)?;
        if key.certificate_chain.is_empty() || *public_key {
            if key.public_key.is_empty() {
                return Err(AgentError::KeyNotReady {
                    key: key.name,
                    token: key.token,
                    locked: key.state == i32::from(KeyState::Locked),
                    reason: key.state_detail,
                }
                .into());
            }
            report::raw(&PublicKey::from_spki(&key.public_key)?.to_pem());
        } else {
            for der in &key.certificate_chain {
                let pem = X509::from_der(der).and_then(|certificate| certificate.to_pem());
                report::raw(&pem.map_err(|_| AgentError::Answer("with a malformed certificate".into()))?);
            }
        }
        return Ok(());
    }
    let keys = Agent::connect(&address(&arguments.connection)?)?.list_keys()?;
    if arguments.json {
        let keys: Vec<_> = keys.iter().map(key_json).collect();
        report::result(json!({ "keys": keys }));
        return Ok(());
    }
    if keys.is_empty() {
        report::warning("the agent has no key that you may use");
    }
    let width = keys.iter().map(|key| key.name.len()).max().unwrap_or(0);
    for key in keys {
        let (state, algorithm) = (state(&key), algorithm(&key));
        let method = if key.certificate_chain.is_empty() { "key" } else { "certificate" };
        let detail = if key.state_detail.is_empty() { key.device } else { key.state_detail };
        report::result(format_args!(
            "{:<width$}  {state:<11}  {algorithm:<19}  {method:<11}  {detail}",
            key.name
        ));
    }
    Ok(())
}

fn key_json(key: &Key) -> serde_json::Value {
    json!({
        "name": key.name,
        "token": key.token,
        "device": key.device,
        "state": state(key),
        "state_detail": key.state_detail,
        "algorithm": algorithm(key),
        "certificates": key.certificate_chain.len(),
    })
}

fn state(key: &Key) -> &'static str {
    match key.state() {
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

pub(crate) fn inspect(arguments: &cli::Inspect) -> Done {
    let bundle = Bundle::read(&arguments.bundle).map_err(|error| checked(error.into()))?;
    let manifest = statement::decode(&bundle.payload).map_err(|error| checked(error.into()))?;
    let (method, signer) = match &bundle.material {
        Material::PublicKey(KeyIdentifier::Hint(hint)) => {
            ("key", format!("key sha256:{}", hint.escape_debug()))
        }
        Material::PublicKey(KeyIdentifier::Pem(pem)) => ("key", format!("key sha256:{}", Digest::of(pem))),
        Material::CertificateChain(chain) => {
            let subject = |der: &Vec<u8>| match X509::from_der(der) {
                Ok(certificate) => name(certificate.subject_name()),
                Err(_) => "a malformed certificate".to_owned(),
            };
            ("certificate", chain.iter().map(subject).collect::<Vec<_>>().join(" <- "))
        }
        Material::Sigstore => ("sigstore", "a Fulcio certificate".into()),
    };
    let root = format!("sha256:{}", manifest.root_digest());
    if arguments.json {
        let digests: BTreeMap<&str, String> = manifest
            .resources
            .iter()
            .map(|resource| (resource.name.as_str(), resource.digest.to_string()))
            .collect();
        report::result(json!({
            "verified": false,
            "method": method,
            "claimed_signer": signer,
            "model": manifest.model_name,
            "root_digest": root,
            "allow_symlinks": manifest.serialization.allow_symlinks,
            "ignore_paths": manifest.serialization.ignore_paths,
            "files": digests,
        }));
        return Ok(());
    }
    let ignored: Vec<_> = manifest.serialization.ignore_paths.iter().map(String::as_str).collect();
    report::result("NOT VERIFIED: this is what the bundle says of itself");
    report::result(format_args!("method          {method}"));
    report::result(format_args!("claimed signer  {signer}"));
    report::result(format_args!("model           {}", manifest.model_name.escape_debug()));
    report::result(format_args!("root digest     {root}"));
    report::result(format_args!("left out        {}", ignored.join(" ").escape_debug()));
    report::result(format_args!("files           {}", manifest.resources.len()));
    for resource in &manifest.resources {
        report::result(format_args!("  {}  {}", resource.digest, resource.name.escape_debug()));
    }
    Ok(())
}

pub(crate) fn agent(arguments: &cli::Agent) -> Done {
    match &arguments.command {
        cli::AgentCommand::Status { json, connection } => status(*json, connection),
        cli::AgentCommand::Unlock { token, ask_pin, connection } => {
            let agent = Agent::connect(&address(connection)?)?;
            let pin = if *ask_pin {
                let asked = rpassword::prompt_password(format!("PIN for token {token}: "));
                Some(Zeroizing::new(asked.map_err(AgentError::System)?))
            } else {
                None
            };
            agent.unlock(token, pin)?;
            report::result(format_args!("token {token} is unlocked"));
            Ok(())
        }
    }
}

fn status(as_json: bool, connection: &cli::Connection) -> Done {
    let address = address(connection)?;
    let agent = Agent::connect(&address)?;
    let serving = agent.health("omsign.v1.AgentService")?;
    let keys = agent.list_keys()?;
    let names: BTreeSet<&str> = keys.iter().map(|key| key.token.as_str()).collect();
    let mut tokens = BTreeMap::new();
    for name in names {
        tokens.insert(name, agent.health(&format!("token.{name}"))?);
    }
    if as_json {
        let keys: Vec<_> = keys.iter().map(key_json).collect();
        let state =
            json!({ "address": address.to_string(), "serving": serving, "tokens": tokens, "keys": keys });
        report::result(state);
        return Ok(());
    }
    let word = |serving| if serving { "serving" } else { "not serving" };
    report::result(format_args!("agent at {address}: {}", word(serving)));
    for (name, serving) in &tokens {
        report::result(format_args!("token {name}: {}", word(*serving)));
        for key in keys.iter().filter(|key| key.token == *name) {
            let detail =
                if key.state_detail.is_empty() { String::new() } else { format!(": {}", key.state_detail) };
            report::result(format_args!("  key {}: {}{detail}", key.name, state(key)));
        }
    }
    Ok(())
}

fn address(connection: &cli::Connection) -> Result<Address, AgentError> {
    let credentials = TlsFiles {
        ca: connection.agent_ca.clone().unwrap_or_default(),
        certificate: connection.agent_certificate.clone().unwrap_or_default(),
        private_key: connection.agent_key.clone().unwrap_or_default(),
    };
    Address::parse(connection.agent.as_deref(), credentials)
}
