//! What can be typed to verify, and to say whom to trust.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use omsign::terms::{self, Source};

use super::{Work, bytes};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Verify {
    #[command(subcommand)]
    pub(crate) method: Option<VerifyMethod>,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    terms: Terms,
    /// Trust policy to go by where nothing above says whose signature to accept [default: your own trust.toml, and
    /// that of the project in the working directory if you allowed it] [env: OMSIGN_POLICY]
    #[arg(long, value_name = "FILE", conflicts_with_all = TERMS)]
    pub(crate) policy: Option<PathBuf>,
}

/// [`omsign::bundle::LARGEST_BYTES`].
const LARGEST: &str = "64MiB";

/// What says whose signature to accept, and on which terms.
const TERMS: [&str; 13] = [
    "public_key",
    "certificate_chain",
    "identity",
    "identity_pattern",
    "identity_provider",
    "identity_provider_pattern",
    "certificate_identity",
    "crls",
    "trusted_root",
    "trust_config",
    "use_staging",
    "timestamp_roots",
    "allow_legacy",
];

/// The policy that the environment names. An empty name is none.
pub(crate) fn policy_from_environment() -> Option<PathBuf> {
    std::env::var_os("OMSIGN_POLICY").filter(|name| !name.is_empty()).map(PathBuf::from)
}

#[derive(Debug, Subcommand)]
pub(crate) enum VerifyMethod {
    /// Accepts the signature of a key
    #[command(mut_arg("public_key", |arg| arg.required(true)))]
    Key {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        key: KeyTerms,
        #[command(flatten)]
        common: CommonTerms,
        #[command(flatten)]
        older: OlderTerms,
    },
    /// Accepts signatures of certificates that lead to a trusted one
    #[command(mut_arg("certificate_chain", |arg| arg.required(true)))]
    Certificate {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        certificate: CertificateTerms,
        #[command(flatten)]
        common: CommonTerms,
        #[command(flatten)]
        older: OlderTerms,
        /// Prints the fingerprints of the bundle's certificates
        #[arg(long, visible_alias = "log_fingerprints")]
        log_fingerprints: bool,
    },
    /// Accepts keyless signatures of a person or a workflow, by certificates of Sigstore
    #[command(
        group = ArgGroup::new("who").required(true).args(["identity", "identity_pattern"]),
        group = ArgGroup::new("provider").required(true).args(["identity_provider", "identity_provider_pattern"]),
    )]
    Sigstore {
        #[command(flatten)]
        what: What,
        #[command(flatten)]
        keyless: KeylessTerms,
        #[command(flatten)]
        older: OlderTerms,
    },
}

/// What to verify.
#[derive(Debug, Args)]
pub(crate) struct What {
    /// The model: a directory or a file
    #[arg(value_name = "MODEL", required = true)]
    model: Option<PathBuf>,
    /// The bundle [default: model.sig in the model or in the working directory]
    #[arg(long, value_name = "FILE", alias = "bundle")]
    pub(crate) signature: Option<PathBuf>,
    /// Accepts files that were not signed
    #[arg(long, visible_alias = "ignore_unsigned_files", overrides_with = "no_ignore_unsigned_files")]
    pub(crate) ignore_unsigned_files: bool,
    /// Does not (default)
    #[arg(long, hide = true, visible_alias = "no-ignore_unsigned_files")]
    no_ignore_unsigned_files: bool,
    /// Accepts unsigned files below this path of the model (repeatable); what was signed there is checked
    #[arg(long, value_name = "PATH", visible_alias = "ignore_paths")]
    pub(crate) ignore_paths: Vec<PathBuf>,
    /// Accepts unsigned .git, .gitattributes, .github and .gitignore [default: with key, certificate and sigstore; else
    /// where the signer does not say what was left out]
    #[arg(long, overrides_with = "no_ignore_git_paths")]
    ignore_git_paths: bool,
    /// Does not, unless the signer left them out
    #[arg(long, overrides_with = "ignore_git_paths")]
    no_ignore_git_paths: bool,
    /// Has no effect: what the signer chose counts (OMS 8.4)
    #[arg(long, hide = true, visible_alias = "allow_symlinks")]
    pub(crate) allow_symlinks: bool,
    /// Verifies only these files and directories of the model
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) partial: Vec<PathBuf>,
    /// What the signer has to call the model
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Bytes that the bundle may be long
    #[arg(long, value_name = "BYTES", default_value = LARGEST, value_parser = bytes)]
    pub(crate) max_bundle_size: NonZeroU64,
    #[command(flatten)]
    pub(crate) work: Work,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Whose signature to accept.
#[derive(Debug, Default, Args)]
pub(crate) struct Terms {
    #[command(flatten)]
    key: KeyTerms,
    #[command(flatten)]
    certificate: CertificateTerms,
    #[command(flatten)]
    keyless: KeylessTerms,
    #[command(flatten)]
    common: CommonTerms,
    #[command(flatten)]
    older: OlderTerms,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Signed with a key")]
pub(crate) struct KeyTerms {
    /// The signer's public key, PEM
    #[arg(long, value_name = "FILE", visible_alias = "public_key")]
    public_key: Option<String>,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Signed with a certificate")]
pub(crate) struct CertificateTerms {
    /// Certificates to trust, PEM (repeatable): the signer's must lead to one of them
    #[arg(long, value_name = "FILE", visible_alias = "certificate_chain")]
    certificate_chain: Vec<String>,
    /// And how the signer's must be called: subject, alternative name or SHA-256 fingerprint
    #[arg(long, value_name = "NAME")]
    certificate_identity: Option<String>,
    /// Lists of revoked certificates, PEM or DER (repeatable): each certificate on the way then needs one
    #[arg(long = "crl", value_name = "FILE")]
    crls: Vec<PathBuf>,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Signed without a key, by Sigstore")]
pub(crate) struct KeylessTerms {
    /// Who has to have signed without a key of their own: an e-mail address or a workflow
    #[arg(long, value_name = "IDENTITY", conflicts_with = "identity_pattern")]
    identity: Option<String>,
    /// Or a pattern of it: * is anything but /, ** any directories
    #[arg(long, value_name = "PATTERN")]
    identity_pattern: Option<String>,
    /// Who has to vouch for the identity
    #[arg(
        long,
        value_name = "URL",
        visible_alias = "identity_provider",
        conflicts_with = "identity_provider_pattern"
    )]
    identity_provider: Option<String>,
    /// Or a pattern of it
    #[arg(long, value_name = "PATTERN")]
    identity_provider_pattern: Option<String>,
    /// TrustedRoot of a private Sigstore instance, JSON
    #[arg(long, value_name = "FILE")]
    trusted_root: Option<PathBuf>,
    /// Or a ClientTrustConfig that holds one
    #[arg(long, value_name = "FILE", visible_alias = "trust_config", conflicts_with = "trusted_root")]
    trust_config: Option<PathBuf>,
    /// Or Sigstore's staging area
    #[arg(long, visible_alias = "use_staging", conflicts_with_all = ["trusted_root", "trust_config"])]
    use_staging: bool,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Time stamps and older bundles")]
pub(crate) struct CommonTerms {
    /// Certificates that RFC 3161 time stamps must lead to, PEM (repeatable): what they prove to have been signed in
    /// time stays good when the signer's certificate has expired
    #[arg(long = "timestamp-root", value_name = "FILE")]
    timestamp_roots: Vec<String>,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Time stamps and older bundles")]
pub(crate) struct OlderTerms {
    /// Accepts bundles of release 0.2.0 of model-signing: a weaker promise
    #[arg(long)]
    allow_legacy: bool,
}

impl Verify {
    /// What to verify, and on which terms; no terms where the policy decides.
    pub(crate) fn parts(self) -> (What, Option<terms::Terms>) {
        let none = Terms::default();
        let (mut what, terms) = match self.method {
            Some(VerifyMethod::Key { what, key, common, older }) => {
                (what, Terms { key, common, older, ..none })
            }
            Some(VerifyMethod::Certificate { what, certificate, common, older, .. }) => {
                (what, Terms { certificate, common, older, ..none })
            }
            Some(VerifyMethod::Sigstore { what, keyless, older }) => (what, Terms { keyless, older, ..none }),
            None => {
                let terms = self.terms.typed();
                return (self.what, (terms != terms::Terms::default()).then_some(terms));
            }
        };
        // The reference's default, where its command is typed.
        what.ignore_git_paths |= !what.no_ignore_git_paths;
        (what, Some(terms.typed()))
    }
}

impl What {
    /// The model.
    pub(crate) fn model(&self) -> &Path {
        // There always is one, but clap cannot say so where a subcommand takes its place.
        self.model.as_deref().unwrap_or(Path::new(""))
    }

    /// What was typed about git's own files.
    pub(crate) fn ignore_git_paths(&self) -> Option<bool> {
        (self.ignore_git_paths || self.no_ignore_git_paths).then_some(self.ignore_git_paths)
    }
}

impl Terms {
    /// What was typed.
    pub(crate) fn typed(self) -> terms::Terms {
        let Self { key, certificate, keyless, common, older } = self;
        let sources = |given: Vec<String>| given.into_iter().map(Source).collect();
        terms::Terms {
            models: Vec::new(),
            public_key: key.public_key.map(Source),
            roots: sources(certificate.certificate_chain),
            certificate_identity: certificate.certificate_identity,
            crls: certificate.crls,
            timestamp_roots: sources(common.timestamp_roots),
            accept_legacy: older.allow_legacy,
            identity: keyless.identity,
            identity_pattern: keyless.identity_pattern,
            identity_provider: keyless.identity_provider,
            identity_provider_pattern: keyless.identity_provider_pattern,
            trusted_root: keyless.trusted_root,
            trust_config: keyless.trust_config,
            use_staging: keyless.use_staging,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The bundle
    #[arg(value_name = "BUNDLE")]
    pub(crate) bundle: PathBuf,
    /// Bytes that it may be long
    #[arg(long, value_name = "BYTES", default_value = LARGEST, value_parser = bytes)]
    pub(crate) max_bundle_size: NonZeroU64,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Trust {
    #[command(subcommand)]
    pub(crate) command: TrustCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrustCommand {
    /// Accepts a signer from now on
    Add {
        /// A name for the signer
        name: String,
        /// Which models: patterns of what the signer calls them [default: any]
        #[arg(long, value_name = "PATTERN", num_args = 1..)]
        models: Vec<String>,
        #[command(flatten)]
        terms: Box<Terms>,
        #[command(flatten)]
        file: TrustFile,
    },
    /// Lists the signers
    List {
        #[command(flatten)]
        file: TrustFile,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Accepts a signer no longer
    Remove {
        /// The signer's name
        name: String,
        #[command(flatten)]
        file: TrustFile,
    },
    /// Says of each signer whether a bundle is theirs, and why not; the model is not looked at
    Test {
        /// The bundle
        bundle: PathBuf,
        /// Bytes that it may be long
        #[arg(long, value_name = "BYTES", default_value = LARGEST, value_parser = bytes)]
        max_bundle_size: NonZeroU64,
        #[command(flatten)]
        file: TrustFile,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Lets the .omsign/trust.toml of a project count when you work in its directory
    Allow {
        /// The project's directory
        #[arg(value_name = "DIRECTORY", default_value = ".")]
        project: PathBuf,
    },
}

/// Which trust policy.
#[derive(Debug, Args)]
pub(crate) struct TrustFile {
    /// The policy [default: your own] [env: OMSIGN_POLICY]
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// The policy of the project in the working directory: .omsign/trust.toml
    #[arg(long, conflicts_with = "policy")]
    pub(crate) project: bool,
}
