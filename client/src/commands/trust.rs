//! `omsign trust`: whose signatures `omsign verify MODEL` accepts.

use std::path::{Path, PathBuf};

use omsign::Error;
use omsign::bundle::Bundle;
use omsign::files::Files;
use omsign::policy::{self, Edit, Entry, PROJECT_FILE, Policy, PolicyError, own_file};
use omsign::terms::Terms;
use serde_json::json;

use super::{Done, Failure, checked};
use crate::cli::{self, TrustCommand, TrustFile};
use crate::report;

pub(crate) fn trust(arguments: cli::Trust) -> Done {
    match arguments.command {
        TrustCommand::Add { name, models, terms, file } => {
            add(&name, Terms { models, ..terms.typed() }, &file)
        }
        TrustCommand::List { file, json } => list(&file, json),
        TrustCommand::Remove { name, file } => {
            let path = path(&file)?;
            let mut edit = Edit::open(&path)?;
            edit.remove(&name)?;
            edit.save()?;
            report::result(format_args!("removed {name} from {}", path.display()))
        }
        TrustCommand::Test { bundle, max_bundle_size, file, json } => {
            test(&bundle, max_bundle_size.get(), &file, json)
        }
        TrustCommand::Allow { project } => {
            let directory = project.canonicalize();
            let directory =
                directory.map_err(|source| PolicyError::Read { path: project.clone(), source })?;
            policy::allow(&directory)?;
            report::result(format_args!("{} counts in {}", PROJECT_FILE, directory.display()))
        }
    }
}

fn path(file: &TrustFile) -> Result<PathBuf, PolicyError> {
    match file.policy.clone().or_else(|| cli::policy_from_environment().filter(|_| !file.project)) {
        Some(path) => Ok(path),
        None if file.project => Ok(PROJECT_FILE.into()),
        None => own_file(),
    }
}

fn add(name: &str, mut terms: Terms, file: &TrustFile) -> Done {
    // Files are read once: they may be pipes. What could not be used is not written.
    terms.make_self_contained(Path::new(""))?;
    terms.trust(Path::new(""), &mut Files::default())?;
    let path = path(file)?;
    if file.project {
        let here = std::env::current_dir();
        let here = here.map_err(|source| PolicyError::Read { path: ".".into(), source })?;
        policy::add_to_project(&here, name, &terms)?;
    } else {
        let mut edit = Edit::open(&path)?;
        edit.add(name, &terms)?;
        edit.save()?;
    }
    report::result(format_args!("added {name} to {}", path.display()))
}

/// The policy that a command is about: that of a file, or all that counts here.
fn policy(file: &TrustFile) -> Result<Policy, PolicyError> {
    let project = file.project.then(|| PathBuf::from(PROJECT_FILE));
    let named = file.policy.clone().or(project).or_else(cli::policy_from_environment);
    match Policy::find(named.as_deref()) {
        Err(PolicyError::Nothing) => Ok(Policy::default()),
        policy => policy,
    }
}

fn list(file: &TrustFile, as_json: bool) -> Done {
    let policy = policy(file)?;
    if as_json {
        let entry = |entry: &Entry| json!({ "name": entry.name, "file": entry.file.display().to_string(), "terms": entry.terms });
        let signers: Vec<_> = policy.entries.iter().map(entry).collect();
        return report::json(&json!({ "signers": signers }));
    }
    if policy.entries.is_empty() {
        report::warning("nobody is trusted; `omsign trust add` changes that");
    }
    let width = policy.entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    for entry in &policy.entries {
        let (name, method, file) = (&entry.name, entry.terms.method().unwrap_or(""), entry.file.display());
        let models = &entry.terms.models;
        let models = if models.is_empty() { "any model".to_owned() } else { models.join(" ") };
        report::result(format_args!(
            "{name:<width$}  {method:<11}  {models}  {}  ({file})",
            entry.signers()
        ))?;
    }
    Ok(())
}

/// Exit status 0 where somebody is trusted with it, 1 where nobody is.
fn test(bundle: &Path, largest: u64, file: &TrustFile, as_json: bool) -> Done {
    let policy = policy(file)?;
    if policy.entries.is_empty() {
        return Err(PolicyError::Nothing.into());
    }
    let bundle = Bundle::read(bundle, largest).map_err(|error| checked(error.into()))?;
    let mut lines = Vec::new();
    let mut accepted = false;
    for entry in &policy.entries {
        let verdict = entry.verify(&bundle);
        accepted |= verdict.is_ok();
        let why = verdict.err().map(|error| omsign::with_causes(&error));
        if as_json {
            lines.push(
                json!({ "name": entry.name, "file": entry.file.display().to_string(), "accepts": why.is_none(), "why_not": why }),
            );
        } else {
            let verdict = why.map_or_else(|| "accepts it".to_owned(), |why| format!("does not: {why}"));
            report::result(format_args!("{}: {verdict}", entry.name))?;
        }
    }
    if as_json {
        report::json(&json!({ "accepted": accepted, "signers": lines }))?;
    }
    if accepted {
        return Ok(());
    }
    // The same words as those of verify.
    Err(match policy.verify(&bundle) {
        Err(error) => checked(Error::from(error)),
        Ok(_) => Failure::Usage("the policy changed while it was tested"),
    })
}
