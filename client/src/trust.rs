//! Who signed, and is that who was expected? The only place that makes a [`VerifiedStatement`].

use std::fmt::{self, Write as _};
use std::path::Path;

use jiff::Timestamp;
use openssl::error::ErrorStack;
use openssl::x509::X509;
use sigstore_verify::types::Sha256Hash;

use crate::bundle::{Bundle, KeyIdentifier, Material, said};
use crate::certificate::{self, UsageError};
use crate::crl::Crls;
use crate::dsse::Pae;
use crate::hash::Digest;
use crate::key::{KeyError, PublicKey};
use crate::keyless::{Keyless, KeylessError};
use crate::manifest::Manifest;
use crate::path::{PathError, Purpose, Question, check_revocation};
use crate::policy::Refusal;
use crate::proof::{Proof, SignedAt, Signer};
use crate::statement::{self, StatementError};
use crate::timestamp::{self, Seen, TimestampError};
use crate::with_causes;

/// Whose signatures are accepted, and how that is proven.
pub struct Trust {
    /// Whose.
    pub signers: Signers,
    /// Authorities whose time stamps (RFC 3161) count in bundles of the key and certificate methods.
    pub timestamp_roots: Vec<X509>,
    /// Whether bundles of release 0.2.0 of the reference are accepted. What they sign is not OMS v1.0, and, but for keyless ones,
    /// encoded ambiguously: a weaker promise.
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

impl fmt::Display for Signers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PublicKey(key) => write!(f, "the key sha256:{}", key.hint()),
            Self::Certified(Anchors { roots, identity, .. }) => {
                let roots: Vec<_> = roots.iter().map(|root| certificate::subject(root)).collect();
                write!(
                    f,
                    "{} below {}",
                    identity.as_deref().unwrap_or("whoever is certified"),
                    roots.join(" or ")
                )
            }
            Self::Keyless(keyless) => keyless.fmt(f),
        }
    }
}

/// Which certificates are accepted.
#[derive(Default)]
pub struct Anchors {
    /// Those that lead to one of these.
    pub roots: Vec<X509>,
    /// And, where there are any, that are not revoked. Then each issuer on the way needs one.
    pub crls: Crls,
    /// And, where it is given, that are called so: subject, alternative name or SHA-256 fingerprint.
    pub identity: Option<String>,
}

/// A statement whose signature was verified. Only this module can make one.
#[derive(Debug)]
pub struct VerifiedStatement {
    manifest: Manifest,
    proof: Proof,
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
        let _ = write!(text, "; {entry}: {}", with_causes(why));
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
            Self::OpenSsl(_) | Self::Timestamp(TimestampError::OpenSsl(_)) => false,
            Self::Path(error) | Self::Timestamp(TimestampError::Authority(error)) => error.found_wrong(),
            Self::Refused { refusals, .. } => refusals.iter().all(|refusal| refusal.why.found_wrong()),
            _ => true,
        }
    }
}

impl VerifiedStatement {
    /// What was signed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// By whom, and what else is proven.
    pub fn proof(&self) -> &Proof {
        &self.proof
    }

    /// Says which entry of a policy it was that accepted it.
    pub(crate) fn accepted_by(mut self, entry: String) -> Self {
        self.proof.accepted_by = Some(entry);
        self
    }

    /// Both.
    pub(crate) fn into_parts(self) -> (Manifest, Proof) {
        (self.manifest, self.proof)
    }
}

impl Trust {
    /// Accepts these signers without more ado.
    pub fn new(signers: Signers) -> Self {
        Self { signers, timestamp_roots: Vec::new(), accept_legacy: false }
    }

    /// Verifies a bundle's signature and signer, and reads its statement.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        let now = Timestamp::now();
        match (&self.signers, &bundle.material) {
            (Signers::PublicKey(key), Material::PublicKey(identifier)) => {
                same_key(key, identifier)?;
                let legacy = self.legacy(bundle, key)?;
                let stamps = self.stamps(bundle, now)?;
                let proof = proof(Signer::Key, key, bundle, &stamps, legacy);
                read(bundle, proof)
            }
            (Signers::Certified(anchors), Material::CertificateChain(chain)) => {
                let certificates = parse(chain)?;
                let (leaf, intermediates) = certificates.split_first().ok_or(TrustError::Certificate(0))?;
                let key = PublicKey::of_certificate(leaf).map_err(TrustError::LeafKey)?;
                // First what is quick, and what nobody else can make.
                let legacy = self.legacy(bundle, &key)?;
                let stamps = self.stamps(bundle, now)?;
                let revocation_checked = anchors.check(leaf, intermediates, &stamps, now)?;
                let mut proof = proof(certified(leaf)?, &key, bundle, &stamps, legacy);
                proof.revocation_checked = revocation_checked;
                proof.authority_revocation_checked =
                    anchors.check_authorities(&stamps, &self.timestamp_roots, now)?;
                read(bundle, proof)
            }
            (Signers::Keyless(keyless), Material::Keyless { certificate, .. }) => {
                verify_keyless(keyless, bundle, certificate, self.accept_legacy)
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

    /// Whether this key signed the payload as release 0.2.0 did, and not as DSSE has it.
    fn legacy(&self, bundle: &Bundle, key: &PublicKey) -> Result<bool, TrustError> {
        if key.verifies(&Pae::of(&bundle.payload), &bundle.signature) {
            return Ok(false);
        }
        match key.verifies_as_release_0_2_0(&bundle.payload, &bundle.signature) {
            true if self.accept_legacy => Ok(true),
            true => Err(TrustError::Legacy),
            false => Err(TrustError::Signature),
        }
    }

    /// When authorities saw the signature. Each has to be right.
    fn stamps(&self, bundle: &Bundle, now: Timestamp) -> Result<Vec<Seen>, TimestampError> {
        if self.timestamp_roots.is_empty() {
            return Ok(Vec::new());
        }
        let seen = |stamp: &Vec<u8>| timestamp::verify(stamp, &bundle.signature, &self.timestamp_roots, now);
        bundle.timestamps.iter().map(seen).collect()
    }
}

/// Reads the statement of a bundle whose signature is proven. Nothing of the payload is looked at before.
fn read(bundle: &Bundle, proof: Proof) -> Result<VerifiedStatement, TrustError> {
    let manifest = match proof.legacy {
        true => statement::decode_release_0_2_0(&bundle.payload)?,
        false => statement::decode(&bundle.payload)?,
    };
    Ok(VerifiedStatement { manifest, proof })
}

fn proof(signer: Signer, key: &PublicKey, bundle: &Bundle, stamps: &[Seen], legacy: bool) -> Proof {
    let earliest = stamps.iter().map(|seen| seen.latest).min();
    Proof {
        signer,
        algorithm: key.algorithm,
        key_hint: key.hint(),
        signed_at: earliest.map(|time| SignedAt { time, source: "RFC 3161 time stamp" }),
        revocation_checked: false,
        authority_revocation_checked: false,
        unchecked_timestamps: bundle.timestamps.len() - stamps.len(),
        unchecked_log_entries: bundle.idle_log_entries,
        legacy,
        accepted_by: None,
    }
}

fn same_key(key: &PublicKey, identifier: &KeyIdentifier) -> Result<(), TrustError> {
    match identifier {
        KeyIdentifier::Hint(hint) if *hint == key.hint() => Ok(()),
        KeyIdentifier::Hint(hint) => Err(TrustError::OtherKey(said(hint.clone()))),
        KeyIdentifier::Pem(pem)
            if PublicKey::from_pem(pem, Path::new("")).is_ok_and(|own| own.same_as(key)) =>
        {
            Ok(())
        }
        KeyIdentifier::Pem(pem) => Err(TrustError::OtherKey(Digest::sha256(pem).to_string())),
    }
}

fn parse(chain: &[Vec<u8>]) -> Result<Vec<X509>, TrustError> {
    let parse =
        |(index, der): (usize, &Vec<u8>)| certificate::parse(der).ok_or(TrustError::Certificate(index));
    chain.iter().enumerate().map(parse).collect()
}

impl Anchors {
    /// Checks that a leaf leads to an anchor, was valid whenever it was seen (or is now), and may sign.
    fn check(
        &self,
        leaf: &X509,
        intermediates: &[X509],
        stamps: &[Seen],
        now: Timestamp,
    ) -> Result<bool, TrustError> {
        let question = Question { anchors: &self.roots, leaf, intermediates, purpose: Purpose::CodeSigning };
        let mut times: Vec<Timestamp> = stamps.iter().flat_map(|seen| [seen.earliest, seen.latest]).collect();
        if times.is_empty() {
            times.push(now);
        }
        let mut path = Vec::new();
        for time in times {
            path = question.ask(time)?;
        }
        if !self.crls.is_empty() {
            check_revocation(&path, &self.roots, &self.crls, now)?;
        }
        certificate::check_usage(leaf)?;
        match &self.identity {
            Some(wanted) if !certificate::is_called(leaf, wanted) => {
                let (subject, fingerprint) = (certificate::subject(leaf), certificate::fingerprint(leaf)?);
                Err(TrustError::Identity {
                    wanted: wanted.clone(),
                    found: format!("{subject} ({fingerprint})"),
                })
            }
            // Nobody was asked about a leaf that is the anchor.
            _ => Ok(!self.crls.is_empty() && path.len() > 1),
        }
    }

    /// Whether the time-stamp authorities' certificates are known not to be revoked. Their issuers' CRLs may be others'
    /// business, so that it is no error where there are none.
    fn check_authorities(&self, stamps: &[Seen], roots: &[X509], now: Timestamp) -> Result<bool, TrustError> {
        let mut known = !self.crls.is_empty();
        for seen in stamps {
            match check_revocation(&seen.path, roots, &self.crls, now) {
                Ok(()) => {}
                Err(PathError::NoCrl(..)) => known = false,
                Err(error) => return Err(TimestampError::Authority(error).into()),
            }
        }
        Ok(known)
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
    accept_legacy: bool,
) -> Result<VerifiedStatement, TrustError> {
    let leaf = certificate::parse(certificate).ok_or(TrustError::Certificate(0))?;
    let key = PublicKey::of_certificate(&leaf).map_err(TrustError::LeafKey)?;
    // The one thing that is read before it is verified: sigstore-verify wants to know what the signature is of.
    let root_digest = statement::claimed_root_digest(&bundle.payload)?;
    let root_digest = Sha256Hash::from_hex(&root_digest).map_err(|_| StatementError::RootDigest)?;
    // Their parser takes many times a statement's length. It reads what the signer that is asked for did sign.
    if !key.verifies(&Pae::of(&bundle.payload), &bundle.signature) {
        return Err(KeylessError::Signature.into());
    }
    keyless.check_issued(certificate, &leaf)?;
    let proven = keyless.verify(bundle, root_digest).map_err(|error| {
        // What their parser does not take is said in our words: it is wrong whoever signed it.
        let unreadable = matches!(error, KeylessError::Bundle(_));
        let statement = unreadable.then(|| statement::decode(&bundle.payload).err()).flatten();
        statement.map_or(TrustError::Keyless(error), TrustError::Statement)
    })?;
    certificate::check_usage(&leaf)?;
    let source = if proven.logged { "transparency log" } else { "RFC 3161 time stamp" };
    let signer = Signer::Keyless { identity: proven.identity, identity_provider: proven.identity_provider };
    // What release 0.2.0 signed so is DSSE, around a statement of its own.
    let legacy = accept_legacy && statement::is_of_release_0_2_0(&bundle.payload);
    let mut proof = proof(signer, &key, bundle, &[], legacy);
    proof.signed_at = Some(SignedAt { time: proven.at, source });
    proof.unchecked_timestamps = 0;
    read(bundle, proof)
}
