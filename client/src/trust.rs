//! Who signed, and is that who was expected? The only place that makes a [`VerifiedStatement`].

use std::fmt::Write as _;

use jiff::Timestamp;
use openssl::error::ErrorStack;
use openssl::x509::X509;
use sigstore_verify::types::Sha256Hash;

use crate::bundle::{Bundle, KeyIdentifier, Material};
use crate::certificate::{self, UsageError};
use crate::dsse::Pae;
use crate::hash::Digest;
use crate::key::{Algorithm, KeyError, PublicKey};
use crate::keyless::{Keyless, KeylessError};
use crate::manifest::Manifest;
use crate::path::{Crls, PathError, Question};
use crate::policy::Refusal;
use crate::statement::{self, StatementError};
use crate::timestamp::{self, TimestampError};

/// Whose signatures are accepted, and how that is proven.
pub struct Trust {
    /// Whose.
    pub signers: Signers,
    /// Authorities whose time stamps (RFC 3161) count in bundles of the key and certificate methods.
    pub timestamp_roots: Vec<X509>,
    /// Whether bundles of release 0.2.0 of the reference are accepted. What they sign is not OMS v1.0, and encoded
    /// ambiguously: a weaker promise.
    pub accept_legacy: bool,
}

/// Whose signatures, by signing method (OMS v1.0, 4.1).
pub enum Signers {
    /// This key's.
    PublicKey(PublicKey),
    /// Those of certificates.
    Certified(Anchors),
    /// Those of people and workflows that a Sigstore instance certified.
    Keyless(Box<Keyless>),
}

/// Which certificates are accepted.
#[derive(Default)]
pub struct Anchors {
    /// Those that lead to one of these.
    pub roots: Vec<X509>,
    /// And, where there are any, that are not revoked. Then each certificate on the way needs one.
    pub crls: Crls,
    /// And, where it is given, that are called so: subject, alternative name or SHA-256 fingerprint.
    pub identity: Option<String>,
}

/// A statement whose signature was verified. Only this module can make one.
#[derive(Debug)]
#[non_exhaustive]
pub struct VerifiedStatement {
    /// What was signed.
    pub manifest: Manifest,
    /// By whom, and what else is proven.
    pub proof: Proof,
}

/// What is proven about a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Who signed.
    pub signer: Signer,
    /// How its key signs.
    pub algorithm: Algorithm,
    /// SHA-256 of the key's PEM, as in `publicKey.hint`.
    pub key_hint: String,
    /// A time at which the signature existed. Without one, certificates were valid when it was verified.
    pub signed_at: Option<SignedAt>,
    /// Whether CRLs were looked at.
    pub revocation_checked: bool,
    /// Time stamps that nothing is known about, because no authority was given.
    pub unchecked_timestamps: usize,
    /// Whether it is of release 0.2.0, and so a weaker promise.
    pub legacy: bool,
    /// The entry of the trust policy that accepted it, where there is one.
    pub accepted_by: Option<String>,
}

/// Who signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signer {
    /// Whoever has the key.
    Key,
    /// The owner of a certificate.
    Certificate {
        /// Its subject.
        subject: String,
        /// Its subject's alternative names.
        names: Vec<String>,
        /// SHA-256 of its DER.
        fingerprint: String,
    },
    /// A person or a workflow.
    Keyless {
        /// As the provider calls it.
        identity: String,
        /// Who vouches for it.
        identity_provider: String,
    },
}

/// A time at which a signature existed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedAt {
    /// The earliest that is proven.
    pub time: Timestamp,
    /// Who says so, for people.
    pub source: &'static str,
}

/// Why a signature is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The bundle was signed by another method than the one asked for.
    #[error("the bundle was signed with the {found} method, but {wanted} was given to verify it (OMS 4.1)")]
    Method {
        /// In the bundle.
        found: &'static str,
        /// What was given.
        wanted: &'static str,
    },
    /// The bundle names another key.
    #[error("the bundle was signed with another key than the one given: its key hint is {0:?} (OMS 4.1)")]
    OtherKey(String),
    /// The signature is wrong.
    #[error("the signature is not valid for this payload and key (OMS 8.2)")]
    Signature,
    /// The signature is right, but made as release 0.2.0 of the reference did.
    #[error("the bundle is of release 0.2.0 of model-signing, which signed an ambiguous encoding (OMS 11)")]
    Legacy,
    /// A certificate is not DER.
    #[error("certificate {0} of the bundle's chain is malformed (RFC 5280, 4.1)")]
    Certificate(usize),
    /// The leaf's key cannot have signed an OMS bundle.
    #[error("the signing certificate")]
    LeafKey(#[source] KeyError),
    /// The path to an anchor is broken.
    #[error("the signing certificate is not trusted")]
    Path(#[from] PathError),
    /// The leaf is for something else.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// Another certificate of the same issuers.
    #[error("signed by {found}, not by {wanted} (OMS 8.2: certificate identity)")]
    Identity {
        /// The pinned name.
        wanted: String,
        /// The certificate's subject and fingerprint.
        found: String,
    },
    /// A time stamp proves nothing.
    #[error(transparent)]
    Timestamp(#[from] TimestampError),
    /// The keyless signature.
    #[error(transparent)]
    Keyless(#[from] KeylessError),
    /// A signer whom the trust policy trusts with other models only.
    #[error("the signer may sign models called {}, not {model:?}", .models.join(" or "))]
    OutOfScope {
        /// What the signer calls this one.
        model: String,
        /// Patterns of those that are trusted.
        models: Vec<String>,
    },
    /// No entry of the trust policy accepts it.
    #[error("no signer of the trust policy is who signed, by the {method} method{}", reasons(.refusals))]
    Refused {
        /// The bundle's method.
        method: &'static str,
        /// Each entry of this method, and why it is not that.
        refusals: Vec<Refusal>,
    },
    /// OpenSSL failed.
    #[error("OpenSSL could not check the certificates")]
    OpenSsl(#[from] ErrorStack),
    /// The signature is right, the statement is not.
    #[error(transparent)]
    Statement(#[from] StatementError),
}

/// Of the first entries, why each is not who signed.
fn reasons(refusals: &[Refusal]) -> String {
    const SHOWN: usize = 8;
    let mut text = String::new();
    for Refusal { entry, why } in refusals.iter().take(SHOWN) {
        let _ = write!(text, "; {entry}: {why}");
        let mut source = std::error::Error::source(why);
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
    }
    if refusals.len() > SHOWN {
        let _ = write!(text, "; and {} more", refusals.len() - SHOWN);
    }
    text
}

impl TrustError {
    /// Whether the bundle was found wrong, as opposed to could not be checked.
    pub fn found_wrong(&self) -> bool {
        match self {
            Self::OpenSsl(_)
            | Self::Path(PathError::OpenSsl(_) | PathError::Handed(_) | PathError::OldCrl { .. })
            | Self::Timestamp(TimestampError::OpenSsl(_)) => false,
            Self::Refused { refusals, .. } => refusals.iter().all(|refusal| refusal.why.found_wrong()),
            _ => true,
        }
    }
}

impl Trust {
    /// Accepts these signers without more ado.
    pub fn new(signers: Signers) -> Self {
        Self { signers, timestamp_roots: Vec::new(), accept_legacy: false }
    }

    /// Verifies a bundle's signature and signer, and reads its statement.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        match (&self.signers, &bundle.material) {
            (Signers::PublicKey(key), Material::PublicKey(identifier)) => {
                same_key(key, identifier)?;
                let times = self.times(bundle, Timestamp::now())?;
                self.signed(bundle, key, Signer::Key, times, false)
            }
            (Signers::Certified(anchors), Material::CertificateChain(chain)) => {
                let now = Timestamp::now();
                let times = self.times(bundle, now)?;
                let leaf = anchors.leaf(chain, &times, now)?;
                let key = PublicKey::of_certificate(&leaf).map_err(TrustError::LeafKey)?;
                self.signed(bundle, &key, certified(&leaf)?, times, !anchors.crls.is_empty())
            }
            (Signers::Keyless(keyless), Material::Keyless { certificate, .. }) => {
                verify_keyless(keyless, bundle, certificate)
            }
            (signers, material) => {
                let wanted = match signers {
                    Signers::PublicKey(_) => "a public key",
                    Signers::Certified(_) => "a certificate chain",
                    Signers::Keyless(_) => "an identity of the sigstore method",
                };
                Err(TrustError::Method { found: material.method(), wanted })
            }
        }
    }

    /// When the signature existed: all that authorities say. Each has to be right.
    fn times(&self, bundle: &Bundle, now: Timestamp) -> Result<Vec<Timestamp>, TimestampError> {
        if self.timestamp_roots.is_empty() {
            return Ok(Vec::new());
        }
        let time = |stamp: &Vec<u8>| timestamp::verify(stamp, &bundle.signature, &self.timestamp_roots, now);
        bundle.timestamps.iter().map(time).collect()
    }

    /// The statement, if this key signed it.
    fn signed(
        &self,
        bundle: &Bundle,
        key: &PublicKey,
        signer: Signer,
        times: Vec<Timestamp>,
        revocation_checked: bool,
    ) -> Result<VerifiedStatement, TrustError> {
        let legacy = if key.verifies(&Pae::of(&bundle.payload), &bundle.signature) {
            false
        } else if key.verifies_as_release_0_2_0(&bundle.payload, &bundle.signature) {
            true
        } else {
            return Err(TrustError::Signature);
        };
        if legacy && !self.accept_legacy {
            return Err(TrustError::Legacy);
        }
        // Nothing of the payload is looked at before this line.
        let manifest = if legacy {
            statement::decode_release_0_2_0(&bundle.payload)?
        } else {
            statement::decode(&bundle.payload)?
        };
        let signed_at = times.iter().min();
        let proof = Proof {
            signer,
            algorithm: key.algorithm,
            key_hint: key.hint(),
            signed_at: signed_at.map(|&time| SignedAt { time, source: "RFC 3161 time stamp" }),
            revocation_checked,
            unchecked_timestamps: bundle.timestamps.len() - times.len(),
            legacy,
            accepted_by: None,
        };
        Ok(VerifiedStatement { manifest, proof })
    }
}

fn same_key(key: &PublicKey, identifier: &KeyIdentifier) -> Result<(), TrustError> {
    match identifier {
        KeyIdentifier::Hint(hint) if *hint == key.hint() => Ok(()),
        KeyIdentifier::Hint(hint) => Err(TrustError::OtherKey(hint.clone())),
        KeyIdentifier::Pem(pem) if *pem == key.to_pem() => Ok(()),
        KeyIdentifier::Pem(pem) => Err(TrustError::OtherKey(Digest::sha256(pem).to_string())),
    }
}

impl Anchors {
    /// The leaf of a chain that leads to an anchor, was valid at all of the times (or is now), and may sign.
    fn leaf(&self, chain: &[Vec<u8>], times: &[Timestamp], now: Timestamp) -> Result<X509, TrustError> {
        let parse =
            |(index, der): (usize, &Vec<u8>)| certificate::parse(der).ok_or(TrustError::Certificate(index));
        let mut certificates =
            chain.iter().enumerate().map(parse).collect::<Result<Vec<_>, _>>()?.into_iter();
        let leaf = certificates.next().ok_or(TrustError::Certificate(0))?;
        let intermediates: Vec<X509> = certificates.collect();
        let question =
            Question { anchors: &self.roots, leaf: &leaf, intermediates: &intermediates, purpose: None };
        let times = if times.is_empty() { std::slice::from_ref(&now) } else { times };
        times.iter().try_for_each(|&time| question.ask(time))?;
        if !self.crls.is_empty() {
            question.ask_revoked(&self.crls, now)?;
        }
        certificate::check_usage(&leaf)?;
        match &self.identity {
            Some(wanted) if !certificate::is_called(&leaf, wanted) => {
                let (subject, fingerprint) = (certificate::subject(&leaf), certificate::fingerprint(&leaf)?);
                Err(TrustError::Identity {
                    wanted: wanted.clone(),
                    found: format!("{subject} ({fingerprint})"),
                })
            }
            _ => Ok(leaf),
        }
    }
}

fn certified(leaf: &X509) -> Result<Signer, TrustError> {
    let (subject, names) = (certificate::subject(leaf), certificate::names(leaf));
    Ok(Signer::Certificate { subject, names, fingerprint: certificate::fingerprint(leaf)? })
}

fn verify_keyless(
    keyless: &Keyless,
    bundle: &Bundle,
    certificate: &[u8],
) -> Result<VerifiedStatement, TrustError> {
    let leaf = certificate::parse(certificate).ok_or(TrustError::Certificate(0))?;
    let key = PublicKey::of_certificate(&leaf).map_err(TrustError::LeafKey)?;
    // Read before it is verified, for sigstore-verify wants to know what the signature is of; not used unless it is.
    let manifest = statement::decode(&bundle.payload)?;
    let root_digest =
        Sha256Hash::from_hex(&manifest.root_digest().to_string()).map_err(|_| TrustError::Signature)?;
    let proven = keyless.verify(bundle, root_digest)?;
    certificate::check_usage(&leaf)?;
    let source = if proven.logged { "transparency log" } else { "RFC 3161 time stamp" };
    let proof = Proof {
        signer: Signer::Keyless { identity: proven.identity, identity_provider: proven.identity_provider },
        algorithm: key.algorithm,
        key_hint: key.hint(),
        signed_at: Some(SignedAt { time: proven.at, source }),
        revocation_checked: false,
        unchecked_timestamps: 0,
        legacy: false,
        accepted_by: None,
    };
    Ok(VerifiedStatement { manifest, proof })
}
