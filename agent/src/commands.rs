//! `omsign-agent key …`: from what was typed to what is printed.

use std::fs::OpenOptions;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use omsign_agent::config::{Config, Device, PinSource};
use omsign_agent::init::Init;
use omsign_agent::key_life::attestation::{Attestation, Findings, Trust};
use omsign_agent::key_life::challenge::{ChallengeFile, Kept};
use omsign_agent::key_life::{Action, Asking, Command, NEXT, Need, Output, TokenKeys};
use omsign_agent::operator::{self, Unblock};
use openssl::x509::X509;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::cli::KeyCommand;
use crate::rotate::Rotation;
use crate::runtime;

/// Runs a command over keys.
pub(crate) fn key(
    command: KeyCommand,
    path: &Path,
    load: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    if let KeyCommand::VerifyAttestation { file, roots, nonce, attestation_key, challenge_secret, json } =
        command
    {
        let roots = roots.map(|path| read(&path).map(String::into_bytes)).transpose()?;
        let nonce = nonce.map(|text| nonce_of(&text)).transpose()?;
        let challenge = challenge_secret
            .map(|path| anyhow::Ok(Kept::parse(&Zeroizing::new(read(&path)?))?))
            .transpose()?;
        let trust = Trust { roots, nonce, attestation_key, challenge };
        return findings_of(Attestation::parse(&read(&file)?)?.verify(&trust), json);
    }
    if let KeyCommand::Challenge { file, secret } = command {
        let (challenge, kept) = Attestation::parse(&read(&file)?)?.challenge()?;
        let kept = Zeroizing::new(serde_json::to_string(&kept)?);
        let mut options = OpenOptions::new();
        let cannot = || format!("cannot write {}", secret.display());
        let mut file = options.write(true).create_new(true).mode(0o600).open(&secret).with_context(cannot)?;
        let written = file.write_all(kept.as_bytes()).and_then(|()| file.sync_all()).with_context(cannot);
        let text = serde_json::to_string_pretty(&challenge)?;
        let said = written.and_then(|()| Ok(writeln!(std::io::stdout(), "{text}")?));
        if said.is_err() {
            // Half of the two is of no use.
            let _ = std::fs::remove_file(&secret);
        }
        return said.map(|()| ExitCode::SUCCESS);
    }
    let config = load()?;
    if let KeyCommand::Rotate { name, template, object, finish, certificate_chain } = command {
        let rotation = Rotation { path, config: &config, name: &name };
        let said = match finish {
            true => rotation.finish(certificate_chain.as_deref())?,
            false => rotation.begin(template, object.as_deref())?,
        };
        write!(std::io::stdout(), "{said}")?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut json, mut made) = (false, Vec::new());
    let command = match command {
        KeyCommand::List { token, json: wanted } => {
            json = wanted;
            Command::List(token)
        }
        KeyCommand::Generate { name, template } => Command::Key(name, Action::Generate(template)),
        KeyCommand::Csr { name, subject } => Command::Key(name, Action::Csr(subject)),
        KeyCommand::SelfSign { name, subject, days } => Command::Key(name, Action::SelfSign(subject, days)),
        KeyCommand::ImportCertificate { name, certificate } => {
            Command::Key(name, Action::ImportCertificate(read(&certificate)?))
        }
        KeyCommand::Attest { name, nonce, challenge, certificates } => {
            for path in certificates {
                made.extend(certificates_in(&path)?);
            }
            let challenge =
                challenge.map(|path| anyhow::Ok(ChallengeFile::parse(&read(&path)?)?)).transpose()?;
            Command::Key(name, Action::Attest(Asking { nonce: nonce_of(&nonce)?, challenge }))
        }
        KeyCommand::Delete { name } => {
            let public = Command::Key(name.clone(), Action::Public(Need::Shown));
            let Output::Pem(public) = ask(&config, public)? else { bail!("the device did not answer") };
            confirmed(&config, &name, &public)?;
            Command::Key(name, Action::Delete(public))
        }
        KeyCommand::Reload => Command::Reload,
        KeyCommand::VerifyAttestation { .. } | KeyCommand::Challenge { .. } | KeyCommand::Rotate { .. } => {
            bail!("that was done before");
        }
    };
    let next = next_step(&config, &command);
    let mut out = std::io::stdout().lock();
    match ask(&config, command)? {
        Output::Pem(text) => write!(out, "{text}")?,
        Output::Listed(tokens) => {
            match json {
                true => writeln!(out, "{}", as_json(&tokens))?,
                false => tokens.iter().try_for_each(|token| list(&mut out, token))?,
            }
            if tokens.iter().any(|token| token.keys.is_err()) {
                return Ok(ExitCode::from(2));
            }
        }
        Output::Attested(attestation) => {
            let attestation = if made.is_empty() { *attestation } else { attestation.with(&made)? };
            writeln!(out, "{}", serde_json::to_string_pretty(&attestation)?)?;
        }
        Output::Done => say(format_args!("done")),
    }
    if let Some(next) = next {
        say(format_args!("note: {next}, and an agent that runs reads it with `omsign-agent key reload`"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is left to do in the configuration.
fn next_step(config: &Config, command: &Command) -> Option<String> {
    let Command::Key(key, action) = command else { return None };
    match action {
        Action::ImportCertificate(_) if config.keys.get(key)?.certificate_chain.is_empty() => Some(format!(
            "it signs with it when certificate_chain in [key.{key}] names the file of its chain"
        )),
        Action::Delete(_) => Some(match key.strip_suffix(NEXT) {
            Some(plain) => {
                format!("next = … in [key.{plain}] names nothing any more: take it out of the configuration")
            }
            None => format!("[key.{key}] names nothing any more: take it out of the configuration"),
        }),
        _ => None,
    }
}

/// Runs the guided way from a device to a key, and says what comes next.
pub(crate) fn init(init: &Init) -> anyhow::Result<()> {
    let made = runtime()?.block_on(init.run(&answered, &|said| say(format_args!("{said}"))))?;
    let (config, name) = (made.config.display(), &init.name);
    let mut out = std::io::stdout().lock();
    writeln!(out, "configuration        {config}")?;
    writeln!(out, "certificate request  {}", made.request.display())?;
    for note in &made.notes {
        say(format_args!("note: {note}"));
    }
    say(format_args!("next, start the agent, and sign from another terminal:"));
    say(format_args!("  omsign-agent serve --config {config}"));
    let socket = init.directory.join("agent.sock");
    let agent = if init.apart { format!(" --agent {}", socket.display()) } else { String::new() };
    let allow = match made.key_type {
        Some(key_type) if !key_type.is_of_oms() => " --allow-nonstandard-key",
        _ => "",
    };
    say(format_args!("  omsign sign MODEL --key {name}{agent}{allow}"));
    say(format_args!(
        "and, to sign with a certificate, have the request certified for code signing, then write"
    ));
    say(format_args!("certificate_chain into [key.{name}]"));
    Ok(())
}

/// Asks for what it takes to set a token's PIN anew, and has it done.
pub(crate) fn unblock(config: &Config, token: String) -> anyhow::Result<()> {
    let configured = config.tokens.get(&token);
    let configured =
        configured.with_context(|| format!("there is no [token.{token}] in the configuration"))?;
    let on_device = configured.pin == PinSource::Device;
    ensure!(
        !on_device,
        "the PIN of {token} is entered on the device, and set anew there, with the vendor's tool"
    );
    let (mut officer, mut pin) = (Zeroizing::new(String::new()), Zeroizing::new(String::new()));
    match &configured.device {
        Device::Pkcs11 { .. } => {
            officer = answered(&format!("security officer's PIN of token {token}"))?;
        }
        Device::Piv { .. } => officer = answered(&format!("PUK of token {token}"))?,
        // It has none, and the agent says what to do.
        Device::Tpm(_) => {}
    }
    if configured.pin == PinSource::Prompt {
        pin = answered("new PIN")?;
        ensure!(!pin.is_empty(), "that is no PIN");
        ensure!(answered("the same once more")? == pin, "those are not the same PIN");
    }
    let unblock = Unblock { token, officer: officer.to_string(), pin: pin.to_string() };
    runtime()?.block_on(operator::unblock(config, unblock))?;
    say(format_args!("done"));
    Ok(())
}

/// Asks on the terminal, where it is not shown, or reads a line where there is none.
fn answered(question: &str) -> std::io::Result<Zeroizing<String>> {
    if std::io::stdin().is_terminal() {
        return rpassword::prompt_password(format!("{question}: ")).map(Zeroizing::new);
    }
    begin_line(question);
    let mut line = Zeroizing::new(String::new());
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(Zeroizing::new(line.trim_end_matches(['\n', '\r']).to_owned()))
}

/// Has it done by the agent, or by this process.
pub(crate) fn ask(config: &Config, command: Command) -> anyhow::Result<Output> {
    Ok(runtime()?.block_on(operator::run(config, command, &|said| say(format_args!("{said}"))))?)
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))
}

/// Those of a file, DER, which they may be there, or PEM.
fn certificates_in(path: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let what = || format!("{} has no certificates", path.display());
    let bytes = std::fs::read(path).with_context(what)?;
    let found = match bytes.starts_with(b"\x30") {
        true => vec![X509::from_der(&bytes).with_context(what)?],
        false => X509::stack_from_pem(&bytes).with_context(what)?,
    };
    ensure!(!found.is_empty(), what());
    Ok(found.iter().map(|one| one.to_der()).collect::<Result<_, _>>()?)
}

fn nonce_of(text: &str) -> anyhow::Result<Vec<u8>> {
    hex::decode(text).context("the nonce is not hexadecimal")
}

/// Prints a line beside the result. That nobody may be there to read it changes nothing.
pub(crate) fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Asks a question on standard error.
fn begin_line(question: &str) {
    let _ = write!(std::io::stderr().lock(), "{question}: ");
}

/// Asks twice, for two things: a habit answers one question, not two.
fn confirmed(config: &Config, name: &str, public: &str) -> anyhow::Result<()> {
    let fingerprint = fingerprint(public)?;
    let Some(start) = fingerprint.get(..8) else { bail!("the key has no fingerprint") };
    let key = config.keys.get(name.strip_suffix(NEXT).unwrap_or(name));
    let tokens = key.map(|key| key.tokens.join(" and ")).unwrap_or_default();
    say(format_args!("The key {name} on {tokens} will be gone for ever. Its public half:"));
    say(format_args!("  SHA-256 {fingerprint}"));
    let mut lines = std::io::stdin().lock().lines();
    let mut answer = |question: &str| -> anyhow::Result<String> {
        begin_line(question);
        Ok(lines.next().transpose()?.unwrap_or_default().trim().to_owned())
    };
    ensure!(answer("Type the key's name")? == name, "that is not its name; nothing was deleted");
    let typed = answer("Type the first 8 digits of its fingerprint")?;
    ensure!(typed.eq_ignore_ascii_case(start), "that is not its fingerprint; nothing was deleted");
    Ok(())
}

/// SHA-256 of a SubjectPublicKeyInfo in PEM, hexadecimal.
fn fingerprint(pem: &str) -> anyhow::Result<String> {
    let (_, der) = der::pem::decode_vec(pem.as_bytes()).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(hex::encode(Sha256::digest(der)))
}

fn list(out: &mut impl std::io::Write, token: &TokenKeys) -> std::io::Result<()> {
    let keys = match &token.keys {
        Ok(keys) => keys,
        Err(reason) => return writeln!(out, "{}: {reason}", token.token),
    };
    if keys.is_empty() {
        return writeln!(out, "{}: no keys", token.token);
    }
    writeln!(out, "{}:", token.token)?;
    for key in keys {
        let names = if key.names.is_empty() { "-".to_owned() } else { key.names.join(", ") };
        let mut notes = key.listed.notes.clone();
        notes.extend(key.listed.certificate.then(|| "with its certificate".to_owned()));
        let notes = if notes.is_empty() { String::new() } else { format!("  ({})", notes.join("; ")) };
        writeln!(out, "  {names:<20} {:<20} {}{notes}", key.listed.algorithm, key.listed.object)?;
    }
    Ok(())
}

fn as_json(tokens: &[TokenKeys]) -> serde_json::Value {
    let token = |token: &TokenKeys| {
        let key = |key: &omsign_agent::key_life::Named| {
            serde_json::json!({
                "names": key.names,
                "object": key.listed.object.to_string(),
                "algorithm": key.listed.algorithm,
                "public_key": hex::encode(&key.listed.public_key),
                "certificate": key.listed.certificate,
                "notes": key.listed.notes,
            })
        };
        match &token.keys {
            Ok(keys) => {
                serde_json::json!({ "token": token.token, "keys": keys.iter().map(key).collect::<Vec<_>>() })
            }
            Err(reason) => serde_json::json!({ "token": token.token, "error": reason }),
        }
    };
    serde_json::json!({ "tokens": tokens.iter().map(token).collect::<Vec<_>>() })
}

/// Without escape sequences and line ends: the text is a file's.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn findings_of(
    findings: Result<Findings, omsign_agent::key_life::attestation::AttestationError>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    use omsign_agent::key_life::attestation::AttestationError;
    let findings = match findings {
        Ok(findings) => findings,
        Err(error @ AttestationError::Wrong(_)) => {
            say(format_args!("error: {}", printable(&error.to_string())));
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    };
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string(&findings)?)?;
    } else {
        writeln!(out, "public key (SHA-256): {}", findings.public_key_sha256)?;
        for line in &findings.proven {
            writeln!(out, "proven: {}", printable(line))?;
        }
        for line in &findings.unproven {
            // The file may hold escape sequences, and lines that look like ours.
            writeln!(out, "NOT proven: {}", printable(line))?;
        }
        for line in &findings.noted {
            writeln!(out, "note: {}", printable(line))?;
        }
    }
    Ok(if findings.unproven.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
