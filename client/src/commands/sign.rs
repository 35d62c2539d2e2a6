//! `omsign sign`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use omsign::Error;
use omsign::agent::Agent;
use omsign::bundle::LARGEST_BYTES;
use omsign::key::{KeyError, PrivateKey, read_certificates};
use omsign::manifest_file::{self, Unsaid};
use omsign::model::{GIT_PATHS, at_or_below};
use omsign::oneshot::{self, without_names};
use omsign::sign::{Request, Signed, Signer, Subject};
use openssl::x509::X509;
use serde_json::json;
use zeroize::Zeroizing;

use super::hasher::Hashing;
use super::private::private_agent;
use super::{Done, Failure, address, note_published, undone};
use crate::cli;
use crate::report::{self, count, size};

pub(crate) fn sign(arguments: &cli::Sign) -> Done {
    let done = signed_and_told(arguments);
    if let (Err(failure), true) = (&done, arguments.json) {
        undone::print(failure)?;
    }
    done
}

fn signed_and_told(arguments: &cli::Sign) -> Done {
    let model = arguments.model.as_deref();
    let bundle = arguments.files.bundle();
    if bundle == Path::new("-") {
        return Err(Failure::Usage(
            "a bundle replaces the one before it as a whole: name a file with --signature",
        ));
    }
    let hashing = Hashing::start(&arguments.work, model.unwrap_or(Path::new("")))?;
    let subject = match model {
        Some(model) => {
            let selection = arguments.files.selection(model, Some(bundle)).map_err(Failure::Usage)?;
            note_published(&selection, arguments.work.quiet);
            Subject::Model(selection, &hashing.hasher)
        }
        None => from_manifests(arguments)?,
    };
    let request = Request {
        subject,
        bundle,
        certificates: certificates(arguments)?,
        allow_nonstandard_key: arguments.allow_nonstandard_key,
    };
    let signed = signed(arguments, &request)?;
    hashing.end();
    if let Some(other) = signed.replaced.filter(|other| *other != signed.model_name) {
        report::warning(&format!("this replaced the bundle of a model called {other:?}"));
    }
    report::unsigned_files(signed.unsigned_files);
    if bundle.metadata().is_ok_and(|bundle| bundle.len() > LARGEST_BYTES) {
        report::warning(&format!(
            "omsign verify takes a bundle of more than {} only with --max-bundle-size: larger shards, or none, make it \
             smaller",
            size(LARGEST_BYTES)
        ));
    }
    if arguments.json {
        report::json(&json!({
            "signed": true,
            "signature": bundle.display().to_string(),
            "method": signed.method,
            "algorithm": signed.public_key.algorithm.name(),
            "key_hint": signed.public_key.hint(),
            "root_digest": format!("sha256:{}", signed.root_digest),
            "files": signed.files,
            "bytes": signed.bytes,
        }))?;
    } else {
        let files = count(signed.files, "file");
        let size = signed.bytes.map_or_else(String::new, |bytes| format!(", {}", size(bytes)));
        let (method, algorithm) = (signed.method, signed.public_key.algorithm.name());
        report::result(format_args!(
            "signed {files}{size}, with {algorithm} ({method} method): {}",
            bundle.display()
        ))?;
    }
    Ok(())
}

/// What `--manifest` names.
fn from_manifests(arguments: &cli::Sign) -> Result<Subject<'static>, Failure> {
    let files = &arguments.files;
    let is_list = files.model_name.is_some();
    if !is_list && (!files.ignore_paths.is_empty() || files.no_ignore_git_paths || files.allow_symlinks) {
        return Err(Failure::Usage(
            "what is left out, and whether links are followed, was said when the manifest was made: leave \
             --ignore-paths, --no-ignore-git-paths and --allow-symlinks out",
        ));
    }
    let mut ignore_paths = BTreeSet::new();
    for path in &files.ignore_paths {
        let text = path.to_str().ok_or(Failure::Usage("a path of --ignore-paths is not valid UTF-8"))?;
        ignore_paths.insert(text.to_owned());
    }
    if !files.no_ignore_git_paths {
        ignore_paths.extend(GIT_PATHS.map(str::to_owned));
    }
    let unsaid =
        Unsaid { model_name: files.model_name.clone(), ignore_paths, allow_symlinks: files.allow_symlinks };
    let (manifest, bytes) = manifest_file::read(&arguments.manifest, &unsaid)?;
    if is_list && manifest.resources.iter().all(|resource| at_or_below(&resource.file, &manifest.model_name))
    {
        report::warning(&format!(
            "every path begins with {0}/: a verifier looks for them below the model; make the list in the model's directory",
            manifest.model_name
        ));
    }
    let bundle = std::path::absolute(files.bundle()).unwrap_or_default();
    if let Some(listed) = manifest.resources.iter().find(|resource| bundle.ends_with(&resource.file)) {
        report::warning(&format!(
            "the list has {}, which may be the bundle that is written now: then it verifies nowhere; leave it out of the list",
            listed.file
        ));
    }
    Ok(Subject::Manifest(manifest, bytes))
}

/// Signs with whichever key is named.
fn signed(arguments: &cli::Sign, request: &Request<'_>) -> Result<Signed, Failure> {
    let waiting = &|reason: &str| report::say(format_args!("waiting: {}", report::printable(reason)));
    let patience = Duration::from_secs(arguments.wait);
    if let Some(key) = &arguments.key {
        if ["pkcs11:", "tpm:", "piv:"].iter().any(|scheme| key.starts_with(scheme)) {
            return Err(Failure::Usage("--key takes the name of an agent's key; a URI goes with --key-uri"));
        }
        if key.contains('/') && Path::new(key).is_file() {
            return Err(Failure::Usage(
                "--key takes the name of an agent's key; a file goes with --private-key",
            ));
        }
        let agent = Agent::connect(&address(&arguments.connection)?)?;
        let signer = Signer::Agent { agent: &agent, key, waiting, patience };
        return Ok(omsign::sign::sign(request, &signer)?);
    }
    if let Some(uri) = &arguments.key_uri {
        let private = private_agent(uri)?;
        let signer = Signer::Agent { agent: private.agent(), key: oneshot::KEY, waiting, patience };
        return omsign::sign::sign(request, &signer).map_err(|error| match error {
            Error::Agent(error) => Failure::from(without_names(error)),
            error => Failure::from(error),
        });
    }
    // clap asks for one of the three.
    let path = arguments.private_key.clone().unwrap_or_default();
    let given = given_password(arguments)?;
    let asked = || rpassword::prompt_password("Password of the private key: ").ok().map(Zeroizing::new);
    let key = PrivateKey::read(&path, || given.or_else(asked))?;
    Ok(omsign::sign::sign(request, &Signer::File(&key))?)
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
