//! `omsign verify`.

use std::path::{Path, PathBuf};

use omsign::Error;
use omsign::bundle::{Bundle, Material};
use omsign::certificate;
use omsign::files::Files;
use omsign::policy::{Policy, PolicyError};
use omsign::terms::Terms;
use omsign::verify::{Judge, Request, Verified};

use super::hasher::Hashing;
use super::verdict;
use super::{Done, Failure, checked};
use crate::cli;
use crate::report;

pub(crate) fn verify(arguments: cli::Verify) -> Done {
    let fingerprints =
        matches!(&arguments.method, Some(cli::VerifyMethod::Certificate { log_fingerprints: true, .. }));
    let policy = arguments.policy.clone();
    let (what, terms) = arguments.parts();
    if what.allow_symlinks {
        report::warning("--allow-symlinks has no effect: what the signer chose counts (OMS 8.4)");
    }
    let mut from_cache = 0;
    let verified = verified(&what, terms, policy, fingerprints, &mut from_cache);
    if what.json {
        let printed = report::json(&match &verified {
            Ok(verified) => verdict::verified_json(verified, from_cache),
            Err(failure) => verdict::failed_json(failure, from_cache),
        });
        // That it is wrong matters more than that nobody could be told in JSON.
        return verified.and(printed);
    }
    verdict::print(&verified?, from_cache)
}

/// Counts the digests that were believed from the cache, whatever comes of it.
fn verified(
    what: &cli::What,
    terms: Option<Terms>,
    policy: Option<PathBuf>,
    fingerprints: bool,
    from_cache: &mut usize,
) -> Result<Verified, Failure> {
    let signature = signature(what)?;
    let judge = judge(terms, policy)?;
    let request = Request {
        model: what.model(),
        signature: &signature,
        ignore_unsigned_files: what.ignore_unsigned_files,
        ignore_paths: &what.ignore_paths,
        ignore_git_paths: what.ignore_git_paths(),
        partial: &what.partial,
        model_name: what.model_name.as_deref(),
        largest_bundle: what.max_bundle_size.get(),
        shown: if fingerprints { print_fingerprints } else { |_| {} },
    };
    let hashing = Hashing::start(&what.work, what.model())?;
    let verified = omsign::verify::verify(&request, &judge, &hashing.hasher);
    *from_cache = hashing.end();
    if let Err(Error::Differs(differences)) = &verified
        && !differences.extra.is_empty()
    {
        request.idle_ignore_paths().for_each(|idle| report::warning(&idle.to_string()));
    }
    verified.map_err(checked)
}

fn judge(terms: Option<Terms>, policy: Option<PathBuf>) -> Result<Judge, Error> {
    if let Some(terms) = terms {
        return Ok(Judge::Trust(terms.trust(Path::new(""), &mut Files::default())?));
    }
    let policy = Policy::find(policy.or_else(cli::policy_from_environment).as_deref())?;
    if policy.entries.is_empty() {
        return Err(PolicyError::Nothing.into());
    }
    Ok(Judge::Policy(policy))
}

/// The bundle, where it was not said: `model.sig` in the model, where publishers put it, or in the working directory,
/// where `omsign sign` does.
fn signature(what: &cli::What) -> Result<PathBuf, Failure> {
    if let Some(signature) = &what.signature {
        return Ok(signature.clone());
    }
    let (inside, here) = (what.model().join("model.sig"), PathBuf::from("model.sig"));
    match (inside.is_file(), here.is_file()) {
        (true, false) => Ok(inside),
        (false, true) => Ok(here),
        (true, true) if inside.canonicalize().ok() == here.canonicalize().ok() => Ok(here),
        (true, true) => Err(Failure::Usage(
            "there is a model.sig in the model and one in the working directory: say which with --signature",
        )),
        (false, false) if what.model().try_exists().is_ok_and(|there| !there) => {
            Err(Failure::Usage("there is nothing at the path of the model: correct it"))
        }
        (false, false) if what.model().extension().is_some_and(|it| it == "sig") => {
            Err(Failure::Usage("that looks like a bundle: give the model, and its bundle with --signature"))
        }
        (false, false) => Err(Failure::Usage(
            "there is no model.sig in the model or in the working directory: say where the bundle is with --signature",
        )),
    }
}

/// As the reference's flag of this name does: of the bundle's certificates, trusted or not.
fn print_fingerprints(bundle: &Bundle) {
    let Material::CertificateChain(chain) = &bundle.material else { return };
    for certificate in chain.iter().filter_map(|der| certificate::parse(der)) {
        if let Ok(fingerprint) = certificate::fingerprint(&certificate) {
            report::say(format_args!(
                "certificate {}: {fingerprint}",
                report::printable(&certificate::subject(&certificate))
            ));
        }
    }
}
