//! The sigstore method (OMS v1.0, 4.1): a certificate of a few minutes from Fulcio, and the proof in a transparency
//! log that it was used while it was valid. The sigstore-verify crate checks certificate, SCT, log and time stamps;
//! this gives it what it needs and asks who signed.

use std::fmt;
use std::path::Path;

use jiff::Timestamp;
use openssl::x509::X509;
use serde::Deserialize;
use serde_json::value::RawValue;
use sigstore_verify::trust_root::{
    SIGSTORE_PRODUCTION_TRUSTED_ROOT, SIGSTORE_STAGING_TRUSTED_ROOT, TrustedRoot,
};
use sigstore_verify::types::bundle::{KindVersion, TransparencyLogEntry};
use sigstore_verify::types::{DerCertificate, Sha256Hash};
use sigstore_verify::{
    CertificateError, Error, TimestampError, TransparencyLogError, VerificationPolicy, Verifier,
};

use crate::bundle::Bundle;
use crate::files::Files;
use crate::key::KeyError;
use crate::wanted::Wanted;
use crate::{certificate, provider, timestamp};

/// Whose keyless signatures are accepted.
pub struct Keyless {
    verifier: Verifier,
    /// Who certifies signers.
    issuers: Vec<X509>,
    timestamp_roots: Vec<X509>,
    identity: Wanted,
    identity_provider: Wanted,
}

impl fmt::Display for Keyless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, vouched for by {}", self.identity, self.identity_provider)
    }
}

/// Why a keyless signature is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum KeylessError {
    /// Somebody else signed.
    #[error("signed by {found}, not by {wanted} (OMS 8.2: identity)")]
    Identity {
        /// Who was expected.
        wanted: String,
        /// The certificate's subject alternative name.
        found: String,
    },
    /// Somebody else says who signed.
    #[error("the signer's identity provider is {found}, not {wanted} (OMS 8.2: identity provider)")]
    IdentityProvider {
        /// Who was expected.
        wanted: String,
        /// The certificate's issuer extension.
        found: String,
    },
    /// The certificate does not say who signed, or who vouches for that.
    #[error("the Fulcio certificate has no {0} (OMS 8.2: identity)")]
    Nameless(&'static str),
    /// The certificate is not Fulcio's, or was not valid.
    #[error("the Fulcio certificate is not accepted (OMS 8.2)")]
    Certificate(#[source] CertificateError),
    /// The certificate is in no certificate transparency log.
    #[error("the Fulcio certificate has no valid signed certificate timestamp (RFC 6962, 3.2)")]
    Sct(#[source] CertificateError),
    /// The signature is not proven to be in the log.
    #[error("the transparency log does not prove the signature (OMS 8.2: Rekor)")]
    Log(#[source] TransparencyLogError),
    /// The proof is of another tree than the log signed.
    #[error(
        "the inclusion proof is of a log of {claimed} entries, and the log signed one of {signed} (RFC 6962, 2.1.1)"
    )]
    Tree {
        /// Entries, by the checkpoint.
        signed: u64,
        /// Entries, by the proof.
        claimed: u64,
    },
    /// No proof of when it was made.
    #[error("no trusted time stamp proves when the signature was made (OMS 8.2)")]
    Time(#[source] TimestampError),
    /// A time stamp that proves nothing.
    #[error(transparent)]
    Timestamp(#[from] timestamp::TimestampError),
    /// The signature is wrong.
    #[error("the signature is not valid for this payload and certificate (OMS 8.2)")]
    Signature,
    /// The bundle contradicts itself or uses what this version does not know.
    #[error("the keyless bundle is not accepted (OMS 4.1): {0}")]
    Bundle(Box<Error>),
}

/// Which Sigstore instance is trusted.
pub enum Instance<'a> {
    /// The public one, as its keys were when this version was made.
    PublicGood,
    /// Its staging area, for tests.
    Staging,
    /// What a TrustedRoot file describes.
    TrustedRoot(&'a Path),
    /// What the trusted root in a ClientTrustConfig file describes.
    TrustConfig(&'a Path),
}

/// `sigstore.trustroot.v1.ClientTrustConfig`, as far as a verifier needs it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientTrustConfig<'a> {
    #[serde(borrow)]
    trusted_root: &'a RawValue,
}

/// A keyless signature that was verified.
pub(crate) struct Proven {
    pub(crate) identity: String,
    pub(crate) identity_provider: String,
    pub(crate) at: Timestamp,
    /// Whether the log says when, and not a time-stamp authority.
    pub(crate) logged: bool,
}

impl Keyless {
    /// Accepts this identity of this provider, as an instance certifies it.
    pub fn new(
        instance: &Instance<'_>,
        identity: Wanted,
        identity_provider: Wanted,
        files: &mut Files,
    ) -> Result<Self, KeyError> {
        provider::install();
        let (root, path) = match instance {
            Instance::PublicGood => {
                (SIGSTORE_PRODUCTION_TRUSTED_ROOT.to_owned(), Path::new("the public-good root"))
            }
            Instance::Staging => (SIGSTORE_STAGING_TRUSTED_ROOT.to_owned(), Path::new("the staging root")),
            Instance::TrustedRoot(path) => (text(path, "a Sigstore trusted root", files)?, *path),
            Instance::TrustConfig(path) => {
                const WHAT: &str = "a Sigstore client trust configuration";
                let text = text(path, WHAT, files)?;
                let config: ClientTrustConfig<'_> = serde_json::from_str(&text)
                    .map_err(|_| KeyError::Json { path: path.to_path_buf(), what: WHAT })?;
                (config.trusted_root.get().to_owned(), *path)
            }
        };
        let unusable =
            |source: Error| KeyError::TrustedRoot { path: path.to_path_buf(), source: Box::new(source) };
        let root = TrustedRoot::from_json(&root).map_err(|error| unusable(error.into()))?;
        // All else in it may be missing, so that any JSON object would do.
        if !root.media_type.starts_with("application/vnd.dev.sigstore.trustedroot") {
            return Err(KeyError::Json { path: path.to_path_buf(), what: "a Sigstore trusted root" });
        }
        let verifier = Verifier::new(&root).map_err(unusable)?;
        let parsed = |der: &DerCertificate| certificate::parse(der.as_bytes());
        let issuers = root.certificate_authorities.iter().flat_map(|one| &one.cert_chain.certificates);
        let authorities = root.timestamp_authorities.iter().flat_map(|one| &one.cert_chain.certificates);
        let issuers = issuers.filter_map(|certificate| parsed(&certificate.raw_bytes)).collect();
        let timestamp_roots = authorities.filter_map(|certificate| parsed(&certificate.raw_bytes)).collect();
        Ok(Self { verifier, issuers, timestamp_roots, identity, identity_provider })
    }

    /// Whether an authority of this instance issued a certificate, and to the one that is asked for; whether it was valid, and
    /// logged, is another question.
    pub(crate) fn check_issued(&self, der: &[u8], leaf: &X509) -> Result<(), KeylessError> {
        let issued = |issuer: &X509| issuer.public_key().and_then(|key| leaf.verify(&key)).unwrap_or(false);
        if !self.issuers.iter().any(issued) {
            let why = "no Fulcio authority of the trusted root issued it".to_owned();
            return Err(KeylessError::Certificate(CertificateError::ChainInvalid(why)));
        }
        let malformed = |why: String| KeylessError::Certificate(CertificateError::Malformed(why));
        let info = sigstore_verify::crypto::parse_certificate_info(&DerCertificate::from_bytes(der));
        let info = info.map_err(|error| malformed(error.to_string()))?;
        let identity = info.identity.ok_or(KeylessError::Nameless("subject alternative name"))?;
        let identity_provider = info.issuer.ok_or(KeylessError::Nameless("identity provider"))?;
        self.check_names(identity.as_str().to_owned(), identity_provider).map(drop)
    }

    fn check_names(
        &self,
        identity: String,
        identity_provider: String,
    ) -> Result<(String, String), KeylessError> {
        if !self.identity.is(&identity) {
            return Err(KeylessError::Identity { wanted: self.identity.to_string(), found: identity });
        }
        if !self.identity_provider.is(&identity_provider) {
            let wanted = self.identity_provider.to_string();
            return Err(KeylessError::IdentityProvider { wanted, found: identity_provider });
        }
        Ok((identity, identity_provider))
    }

    /// Verifies all of a keyless bundle but its statement.
    pub(crate) fn verify(&self, bundle: &Bundle, root_digest: Sha256Hash) -> Result<Proven, KeylessError> {
        // Their parser sees what ours made of the file, so that there are no two readings of it.
        let json = String::from_utf8(bundle.to_json()).unwrap_or_default();
        let theirs =
            sigstore_verify::types::Bundle::from_json(&json).map_err(|error| explain(error.into()))?;
        let result = self
            .verifier
            .verify(root_digest, &theirs, &VerificationPolicy::any_identity())
            .map_err(explain)?;
        // Beyond what they check: that a proof is about the tree whose head the log signed, and that a token's own
        // certificate is the one that its authority signed with.
        for entry in &theirs.verification_material.tlog_entries {
            same_tree(entry)?;
        }
        for stamp in &bundle.timestamps {
            timestamp::verify(stamp, &bundle.signature, &self.timestamp_roots, Timestamp::now())?;
        }
        let missing = |what| KeylessError::Nameless(what);
        let identity = result.identity().ok_or(missing("subject alternative name"))?.as_str().to_owned();
        let identity_provider = result.issuer().ok_or(missing("identity provider"))?.to_owned();
        let (identity, identity_provider) = self.check_names(identity, identity_provider)?;
        let no_time = || KeylessError::Time(TimestampError::NoVerifiedTimestamp("none".into()));
        let at = *result.verified_timestamps().iter().min().ok_or_else(no_time)?;
        Ok(Proven { identity, identity_provider, at, logged: result.integrated_time() == Some(at) })
    }
}

/// Rekor v1 says twice how many entries its log has. (What v2 says beside the checkpoint is no part of the proof.)
fn same_tree(entry: &TransparencyLogEntry) -> Result<(), KeylessError> {
    let v1 = entry.kind_version != KindVersion::HashedRekordV002;
    let Some(proof) = entry.inclusion_proof.as_ref().filter(|_| v1) else {
        return Ok(());
    };
    let signed = proof.checkpoint.checkpoint().map(|checkpoint| checkpoint.tree_size());
    match signed {
        Some(signed) if signed != proof.tree_size => {
            Err(KeylessError::Tree { signed, claimed: proof.tree_size })
        }
        // They ask for a checkpoint themselves.
        _ => Ok(()),
    }
}

/// Whom a Fulcio certificate names, and who vouches for that. Nothing about it is proven.
pub fn claimed_identity(certificate: &[u8]) -> Option<(String, String)> {
    let info =
        sigstore_verify::crypto::parse_certificate_info(&DerCertificate::from_bytes(certificate)).ok()?;
    Some((info.identity?.as_str().to_owned(), info.issuer?))
}

fn text(path: &Path, what: &'static str, files: &mut Files) -> Result<String, KeyError> {
    let read = files.read(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
    String::from_utf8(read.to_vec()).map_err(|_| KeyError::Json { path: path.to_owned(), what })
}

fn explain(error: Error) -> KeylessError {
    match error {
        Error::Certificate(error @ CertificateError::Sct(_)) => KeylessError::Sct(error),
        Error::Certificate(error) => KeylessError::Certificate(error),
        Error::TransparencyLog(error) => KeylessError::Log(error),
        Error::Timestamp(error) => KeylessError::Time(error),
        Error::SignatureInvalid(_) => KeylessError::Signature,
        other => KeylessError::Bundle(Box::new(other)),
    }
}
