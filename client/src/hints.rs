//! What to do about an error, where the tool knows. Only here: the library says what is wrong.

use std::io::ErrorKind;

use omsign::Error;
use omsign::agent::AgentError;
use omsign::bundle::BundleError;
use omsign::differences::{Cause, Differences};
use omsign::hash::HashError;
use omsign::hash::cache::CacheError;
use omsign::key::{KeyError, NO_PASSWORD, PRIVATE_KEYS, PUBLIC_KEY};
use omsign::manifest_file::ManifestFileError;
use omsign::model::{GIT_PATHS, ModelError, Oddity, at_or_below};
use omsign::path::PathError;
use omsign::policy::{PolicyError, Refusal};
use omsign::predicate::PredicateError;
use omsign::statement::{RELEASE_0_2_0, StatementError};
use omsign::terms::TermsError;
use omsign::timestamp::TimestampError;
use omsign::trust::TrustError;
use tonic::Code;

/// A sentence for the person at the terminal.
pub(crate) fn hint(error: &Error) -> Option<String> {
    Some(match error {
        Error::Agent(AgentError::NotRunning { .. }) => {
            "start it with `omsign-agent serve`, name another with --agent or OMSIGN_AGENT, or sign without one: \
             --key-uri 'pkcs11:…'"
                .into()
        }
        Error::Agent(AgentError::Untrusted { .. }) => {
            "--agent-ca is the certificate of the CA that issued the agent's own, for the host in --agent; `omsign-agent doctor` \
             on its machine shows that one"
                .into()
        }
        Error::Agent(AgentError::Broken(_)) => {
            "the agent's log says why; over https it may not take the client certificate, which is for clients \
             (extendedKeyUsage clientAuth), and by a CA of its client_ca"
                .into()
        }
        Error::Agent(AgentError::NoPermission(_)) => {
            "ask the agent's operator to let your group connect (group = \"…\" in [listen] unix); a new group counts \
             from the next login"
                .into()
        }
        Error::Agent(AgentError::NoTerminal) => {
            "run it at a terminal, or with --pin-stdin; with neither, the agent reads its configured PIN source".into()
        }
        Error::Agent(AgentError::KeyNotReady { token, locked: true, .. }) => {
            format!(
                "when its cause is mended, an operator can run `omsign agent unlock {token}`, with --ask-pin where its PIN \
                 is asked for"
            )
        }
        Error::Agent(AgentError::KeyNotReady { token, .. }) => {
            format!(
                "`omsign agent status` shows the agent's tokens; `omsign-agent doctor` on its machine says what to do; when that is \
                 done, `omsign agent unlock {token}` has an operator's agent look at once"
            )
        }
        Error::Agent(AgentError::Status(status)) => return status_hint(status.code(), status.message()),
        Error::Agent(AgentError::Statement) => {
            "sign with a key that takes digests (ECDSA or RSA, without a PIN for each signature), or fewer and larger shards"
                .into()
        }
        Error::Agent(AgentError::NoPin) => {
            "add pin-source=/path/to/file to the URI's query, or pin-source=none for a key that asks for none".into()
        }
        Error::Agent(AgentError::Start(_)) => "omsign-agent has to be beside omsign or on the PATH".into(),
        Error::Model(ModelError::Odd(_, Oddity::Symlink)) => {
            "`sign --allow-symlinks` signs what links inside the model point to; `cp -rL` makes a copy without links".into()
        }
        Error::Model(ModelError::Odd(_, Oddity::Outside)) => "make a copy with `cp -rL` and sign that".into(),
        Error::Model(ModelError::Odd(_, Oddity::NotUtf8 | Oddity::Backslash)) => {
            "rename it, or leave the directory that it is in out with --ignore-paths; where it is the model's own name, \
             --model-name gives another"
                .into()
        }
        Error::Bundle(BundleError::Read { source, .. }) if source.kind() == ErrorKind::IsADirectory => {
            "name the bundle itself: `omsign sign` writes model.sig".into()
        }
        Error::Bundle(BundleError::Occupied(_)) => "choose another --signature, or remove it first".into(),
        Error::Model(ModelError::Odd(_, Oddity::Special | Oddity::Cycle)) => "leave it out with --ignore-paths".into(),
        Error::Hash(HashError::Changed(_)) => {
            "try again when nothing writes to the model, links to its files or changes their owners".into()
        }
        Error::Hash(HashError::Threads(..)) => "ask for fewer with --jobs; one for each core is enough".into(),
        Error::Hash(HashError::Kernel(..)) => "leave OMSIGN_HASH_KERNEL out: the fastest is found by itself".into(),
        Error::Cache(CacheError::Others(path)) => {
            format!("`chmod go-w {}` if it is yours, or set XDG_CACHE_HOME", path.display())
        }
        Error::Cache(CacheError::Io { source, .. })
            if matches!(source.kind(), ErrorKind::AlreadyExists | ErrorKind::NotADirectory) =>
        {
            "there has to be a directory, or nothing: remove what is there, or set XDG_CACHE_HOME".into()
        }
        Error::Cache(CacheError::Io { .. }) => "`omsign cache clear` starts anew, and so does leaving --digest-cache out".into(),
        Error::ManifestFile(ManifestFileError::Gap { .. }) => {
            "give all parts at once: omsign sign --manifest part-*.json".into()
        }
        Error::ManifestFile(ManifestFileError::Predicate { source: PredicateError::Ignored(file), .. })
            if GIT_PATHS.iter().any(|path| at_or_below(file, path)) =>
        {
            "git's own files are left out; make the list without it, or give --no-ignore-git-paths".into()
        }
        Error::ManifestFile(ManifestFileError::Malformed { .. }) => {
            "`omsign digest MODEL --json > FILE` writes one; sha256sum writes another".into()
        }
        Error::ManifestFile(ManifestFileError::Apart { .. }) => {
            "parts are made of the same files with the same options, and --model-name where their directory has another name"
                .into()
        }
        Error::Model(ModelError::Empty(_)) => "it needs a file; in shards, one that is not empty".into(),
        Error::Differs(differences) if differences.cause.is_some() => match differences.cause.as_ref()? {
            Cause::Pointer(file) => {
                format!("{file} is a Git LFS pointer, not the file itself: `git lfs pull` fetches what it stands for")
            }
            Cause::Elsewhere(name) => {
                format!("no signed file is here, of a model called {name:?}: give that one's directory")
            }
        },
        Error::Differs(differences) if only_git_paths(differences) => {
            "--ignore-git-paths accepts unsigned files of git's".into()
        }
        Error::Differs(differences)
            if !differences.extra.is_empty() && differences.missing.is_empty() && differences.changed.is_empty() =>
        {
            match hidden_directory(&differences.extra) {
                Some(tools) => format!("--ignore-paths {tools} accepts what is below {tools} alone"),
                None => "--ignore-unsigned-files accepts files that were added after signing".into(),
            }
        }
        Error::Differs(differences) if only_links(differences) => {
            "the signer followed no links; a copy without them can be verified: `cp -rL`, or for a download \
             `hf download --local-dir`"
                .into()
        }
        Error::Trust(TrustError::Identity { wanted, found })
            if !wanted.contains(['=', '@', ':']) && found.contains(&format!("={wanted}")) =>
        {
            format!("a subject is written with its attributes: --certificate-identity 'CN={wanted}'")
        }
        Error::Trust(TrustError::Method { found: "certificate", .. }) => {
            "`omsign verify MODEL --certificate-chain FILE` takes the certificate of the signer's CA".into()
        }
        Error::Trust(TrustError::Method { found: "sigstore", .. }) => {
            "`omsign verify MODEL --identity … --identity-provider …` says who is to have signed".into()
        }
        Error::Trust(TrustError::Statement(StatementError::PredicateType(kind))) if kind == RELEASE_0_2_0 => {
            "release 0.2.0 of model-signing wrote it; signed by the sigstore method, --allow-legacy accepts it".into()
        }
        Error::Trust(TrustError::Legacy) => "--allow-legacy accepts it all the same".into(),
        Error::Trust(TrustError::Path(PathError::Expired(..))) => {
            "a time stamp in the bundle proves that it was signed in time, with --timestamp-root".into()
        }
        Error::Key(KeyError::Chain(PathError::UnknownKey(..))) => {
            "sign with the key method: leave certificates out, here and for the key in the agent's configuration, and have \
             verifiers use --public-key"
                .into()
        }
        Error::Trust(TrustError::Path(PathError::Policy(_))) => {
            "if its policies are what you want, trust an issuer below the one that asks for them".into()
        }
        Error::Trust(
            TrustError::Path(PathError::OldCrl { .. })
            | TrustError::Timestamp(TimestampError::Authority(PathError::OldCrl { .. })),
        ) => "fetch the CRL anew".into(),
        Error::Trust(TrustError::Refused { refusals, .. }) if let Some(entry) = revoked(refusals) => {
            format!("ask {entry} for a signature by a certificate that was not revoked; this one proves nothing any more")
        }
        Error::Trust(TrustError::Refused { .. }) => {
            "`omsign inspect` shows who claims to have signed; `omsign trust add` accepts a signer from then on".into()
        }
        Error::Policy(PolicyError::Changed(_) | PolicyError::NotAllowed(_)) => {
            "read it, and run `omsign trust allow` in the project's directory if you agree with it".into()
        }
        Error::Policy(PolicyError::Nothing) => {
            "say whose: --public-key, --certificate-chain, or --identity and --identity-provider; or once for all: \
             `omsign trust add`"
                .into()
        }
        Error::Bundle(BundleError::TooLarge(_)) => {
            "--max-bundle-size allows more; one of a million files takes about 300000000".into()
        }
        Error::Trust(TrustError::Method { .. }) => {
            "`omsign verify MODEL --public-key FILE` takes the signer's public key".into()
        }
        Error::Key(KeyError::Nonstandard(_)) => {
            "--allow-nonstandard-key signs all the same; omsign verifies it, the reference implementation does not"
                .into()
        }
        Error::Terms(TermsError::Key(KeyError::Content { what: PUBLIC_KEY, instead: Some(label), path })) => {
            match *label {
                "CERTIFICATE" => "give the certificate of the signer's CA with --certificate-chain".into(),
                label if PRIVATE_KEYS.contains(&label) => {
                    format!("`openssl pkey -in {} -pubout` prints its public half", path.display())
                }
                _ => return None,
            }
        }
        Error::Terms(TermsError::Signer) => {
            "that is --public-key, --certificate-chain, or --identity with --identity-provider; --certificate-identity, --crl and \
             --timestamp-root go with the first two"
                .into()
        }
        Error::Key(KeyError::Password { reason: NO_PASSWORD, .. }) => {
            "give the password with --password-file or --password-env, or at a terminal".into()
        }
        _ => return None,
    })
}

/// The hidden directory at the root that all of these are in, as tools make them.
fn hidden_directory(files: &[String]) -> Option<&str> {
    let directory = |file: &'_ String| file.split_once('/').map(|(directory, _)| directory.len());
    let first = files.first()?;
    let plain = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
    let name =
        first.get(..directory(first)?).filter(|name| name.starts_with('.') && name.chars().all(plain))?;
    files.iter().all(|file| at_or_below(file, name)).then_some(name)
}

/// The entry of a policy whose signer's certificate, or an issuer's, was revoked.
fn revoked(refusals: &[Refusal]) -> Option<&str> {
    let of_it = |why: &TrustError| matches!(why, TrustError::Path(PathError::Revoked(_)));
    refusals.iter().find(|refusal| of_it(&refusal.why)).map(|refusal| refusal.entry.as_str())
}

/// Whether nothing is wrong but that there are links.
fn only_links(differences: &Differences) -> bool {
    let Differences { missing, extra, changed, odd, unreadable, cause: _ } = differences;
    let others = [missing.len(), extra.len(), changed.len(), unreadable.len()];
    others.iter().all(|count| *count == 0) && odd.iter().all(|odd| odd.what == Oddity::Symlink)
}

/// Whether nothing is wrong but that git's own files are there.
fn only_git_paths(differences: &Differences) -> bool {
    let Differences { missing, extra, changed, odd, unreadable, cause: _ } = differences;
    let is_gits = |file: &String| GIT_PATHS.iter().any(|path| at_or_below(file, path));
    missing.is_empty()
        && changed.is_empty()
        && odd.is_empty()
        && unreadable.is_empty()
        && extra.iter().all(is_gits)
}

fn status_hint(code: Code, message: &str) -> Option<String> {
    Some(match code {
        Code::PermissionDenied
            if ["lock", "unlock"].iter().any(|what| message.starts_with(&format!("you are not allowed to {what} "))) =>
        {
            "ask whoever runs the agent for an [[operator]] rule in its configuration".into()
        }
        Code::PermissionDenied => {
            "ask the agent's operator for an allow rule; the agent's log names the missing one".into()
        }
        Code::NotFound => {
            "`omsign keys` and `omsign agent status` list the keys and tokens that you may use".into()
        }
        Code::ResourceExhausted => "try again in a moment".into(),
        Code::Unavailable if message.starts_with("the audit log") => {
            "nothing is signed without its record: make room where the agent's [audit] directory is, or see its log; then it \
             goes on by itself"
                .into()
        }
        Code::Unavailable => "try again when the token is back; `omsign agent status` shows it".into(),
        _ => return None,
    })
}
