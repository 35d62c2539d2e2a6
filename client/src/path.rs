//! Does a certificate lead to one that is trusted (RFC 5280, 6)? OpenSSL answers; this asks, and names its reasons.

use std::path::Path;

use jiff::Timestamp;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::SslFiletype;
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509ExtendedKeyUsage, X509PurposeId, X509StoreContext, X509VerifyResult};
use openssl_sys as ffi;
use tempfile::NamedTempFile;

use crate::certificate;
use crate::crl::Crls;
use crate::key::PublicKey;

/// Why a certificate does not lead to a trusted one.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Nobody who is trusted issued it.
    #[error("{0} was not issued by a trusted certificate, and no issuer of it is at hand (RFC 5280, 6.1)")]
    NotTrusted(String),
    /// Its time is over.
    #[error("{0} expired on {1}, before {2} (RFC 5280, 4.1.2.5)")]
    Expired(String, String, Timestamp),
    /// Its time has not come.
    #[error("{0} is valid from {1} only, after {2} (RFC 5280, 4.1.2.5)")]
    NotYetValid(String, String, Timestamp),
    /// The signature in it is wrong.
    #[error("the signature in {0} is not its issuer's (RFC 5280, 6.1.3)")]
    Signature(String),
    /// An issuer that is no CA.
    #[error("{0} is not a CA, but issued a certificate (RFC 5280, 4.2.1.9)")]
    NotCa(String),
    /// More issuers below a CA than it allows.
    #[error("the path is longer than a CA of it allows, at {0} (RFC 5280, 4.2.1.9: pathLenConstraint)")]
    PathLength(String),
    /// A CA that may not sign certificates.
    #[error("the KeyUsage of {0}, which issued a certificate, has no keyCertSign (RFC 5280, 4.2.1.3)")]
    KeyCertSign(String),
    /// Issuers that ask for certificate policies.
    #[error(
        "an issuer of {0} asks for explicit certificate policies, which omsign does not compare (RFC 5280, 4.2.1.11)"
    )]
    Policy(String),
    /// A name that an issuer may not certify.
    #[error("{0} has a name that its issuers may not certify (RFC 5280, 4.2.1.10: name constraints)")]
    NameConstraints(String),
    /// An extension that has to be understood, and is not.
    #[error("{0} has a critical extension that is not understood (RFC 5280, 4.2)")]
    CriticalExtension(String),
    /// A short key or a broken hash.
    #[error("{0} has a key or a signature of less than 112 bits of security (NIST SP 800-57)")]
    Weak(String),
    /// Revoked.
    #[error("{0} was revoked by its issuer (RFC 5280, 6.3)")]
    Revoked(String),
    /// No usable list of what its issuer revoked.
    #[error("no CRL tells whether {0} was revoked (RFC 5280, 6.3): {1}")]
    NoCrl(String, &'static str),
    /// A list that is not of now.
    #[error(
        "the CRL of {issuer} is not of now: it was issued on {from}, and the next one on {until} (RFC 5280, 5.1.2)"
    )]
    OldCrl {
        /// Whose it is.
        issuer: String,
        /// `thisUpdate`.
        from: String,
        /// `nextUpdate`.
        until: String,
    },
    /// For another purpose.
    #[error("the extended key usage of {0} is for something else (RFC 5280, 4.2.1.12)")]
    Purpose(String),
    /// Any other reason of OpenSSL's.
    #[error("{0} does not lead to a trusted certificate (RFC 5280, 6.1): {1}")]
    Other(String, &'static str),
    /// A chain in another order than from the leaf to the root.
    #[error("the chain is not in order: {0} was not issued by {1}, which comes next (OMS 4.1)")]
    Order(String, String),
    /// OpenSSL cannot read the key that it certifies.
    #[error(
        "{0} certifies a kind of key that {1} does not know: it cannot be checked here (ML-DSA: from OpenSSL 3.5 on)"
    )]
    UnknownKey(String, &'static str),
    /// OpenSSL failed.
    #[error("OpenSSL could not check the certificates")]
    OpenSsl(#[from] ErrorStack),
    /// Nor could it read the CRLs back.
    #[error("the CRLs could not be handed to OpenSSL")]
    Handed(#[source] std::io::Error),
}

impl PathError {
    /// Whether the certificates were found wrong, as opposed to could not be checked.
    pub(crate) fn found_wrong(&self) -> bool {
        !matches!(
            self,
            Self::UnknownKey(..) | Self::OpenSsl(_) | Self::Handed(_) | Self::OldCrl { .. } | Self::NoCrl(..)
        )
    }
}

/// One question: does `leaf` lead to one of `anchors`, at a time?
pub(crate) struct Question<'a> {
    pub(crate) anchors: &'a [X509],
    pub(crate) leaf: &'a X509,
    pub(crate) intermediates: &'a [X509],
    pub(crate) purpose: Purpose,
}

/// What the leaf is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Signing models: what its own extensions say of it is checked by whoever asks.
    CodeSigning,
    /// RFC 3161, 2.3.
    TimeStamping,
}

impl Question<'_> {
    /// The way that it did at this time: from the leaf to an anchor.
    pub(crate) fn ask(&self, at: Timestamp) -> Result<Vec<X509>, PathError> {
        if self.leaf.public_key().is_err() && PublicKey::of_certificate(self.leaf).is_ok() {
            return Err(PathError::UnknownKey(certificate::subject(self.leaf), openssl::version::version()));
        }
        let mut parameters = parameters()?;
        parameters.set_time(at.as_second());
        if self.purpose == Purpose::TimeStamping {
            parameters.set_purpose(X509PurposeId::TIMESTAMP_SIGN)?;
        }
        let path = verify(self.anchors, self.leaf, self.intermediates, &parameters, None, at)?;
        // The anchor is one because somebody said so (RFC 5280, 6.1.1 d).
        let mut between = path.iter().skip(1).rev().skip(1);
        if let Some(issuer) = between.find(|issuer| !certificate::says_ca(issuer)) {
            return Err(PathError::NotCa(certificate::subject(issuer)));
        }
        // RFC 5280 leaves it open, but all other verifiers hold issuers to their own extended key usage.
        let usage = match self.purpose {
            Purpose::CodeSigning => X509ExtendedKeyUsage::CODE_SIGN,
            Purpose::TimeStamping => X509ExtendedKeyUsage::TIMESTAMP,
        };
        match path.iter().skip(1).find(|issuer| is_for_something_else(issuer, usage)) {
            Some(issuer) => Err(PathError::Purpose(certificate::subject(issuer))),
            None => Ok(path),
        }
    }
}

fn is_for_something_else(issuer: &X509, usage: X509ExtendedKeyUsage) -> bool {
    issuer.extended_key_usage().is_some_and(|own| !own.intersects(usage | X509ExtendedKeyUsage::ANYEKU))
}

/// Whether no certificate on a way is revoked by now, whenever it was used. Of the anchor nobody has to say so; but one that
/// is not its own issuer, and that a CRL is about, counts as much as its issuer does, which has to be among the `trusted`.
pub(crate) fn check_revocation(
    path: &[X509],
    trusted: &[X509],
    crls: &Crls,
    now: Timestamp,
) -> Result<(), PathError> {
    let mut path = path.to_vec();
    let most = path.len() + trusted.len();
    while let Some(anchor) = path.last().filter(|_| path.len() < most)
        && !is_self_issued(anchor)?
        && !crls.about(anchor)?.is_empty()
    {
        let issuer = trusted.iter().find(|issuer| issuer.issued(anchor) == X509VerifyResult::OK).cloned();
        let why = "it is trusted itself, and its issuer, who has to sign the CRL, is not";
        path.push(issuer.ok_or_else(|| PathError::NoCrl(certificate::subject(anchor), why))?);
    }
    path.windows(2).try_for_each(|pair| match pair {
        [certificate, issuer] => check_revoked(certificate, issuer, &crls.about(certificate)?, now),
        _ => Ok(()),
    })
}

/// Of several lists it takes one that says that it is revoked, and one that says that it is not.
fn check_revoked(
    certificate: &X509,
    issuer: &X509,
    lists: &[NamedTempFile],
    now: Timestamp,
) -> Result<(), PathError> {
    let mut known = Err(PathError::NoCrl(certificate::subject(certificate), "there is none of its issuer"));
    for list in lists {
        let mut parameters = parameters()?;
        parameters.set_flags(X509VerifyFlags::CRL_CHECK | X509VerifyFlags::NO_CHECK_TIME)?;
        let issuer = std::slice::from_ref(issuer);
        match verify(issuer, certificate, &[], &parameters, Some(list.path()), now) {
            Ok(_) => known = Ok(()),
            Err(revoked @ PathError::Revoked(_)) => return Err(revoked),
            Err(error) if known.is_err() => known = Err(error),
            Err(_) => {}
        }
    }
    known
}

fn verify(
    anchors: &[X509],
    leaf: &X509,
    intermediates: &[X509],
    parameters: &X509VerifyParam,
    crls: Option<&Path>,
    at: Timestamp,
) -> Result<Vec<X509>, PathError> {
    let mut store = X509StoreBuilder::new()?;
    for anchor in anchors {
        store.add_cert(anchor.clone())?;
    }
    store.set_param(parameters)?;
    if let Some(path) = crls {
        store.add_lookup(X509Lookup::file())?.load_crl_file(path, SslFiletype::PEM)?;
    }
    let store = store.build();
    let mut stack = Stack::new()?;
    for certificate in intermediates {
        stack.push(certificate.clone())?;
    }
    let mut context = X509StoreContext::new()?;
    context
        .init(&store, leaf, &stack, |context| {
            if context.verify_cert()? {
                let path = context.chain().map(|chain| chain.iter().map(ToOwned::to_owned).collect());
                return Ok(Ok(path.unwrap_or_default()));
            }
            let concerned = context.current_cert().unwrap_or(leaf);
            Ok(Err(reason(context.error(), concerned, at)))
        })
        .map_err(PathError::OpenSsl)?
}

fn parameters() -> Result<X509VerifyParam, ErrorStack> {
    let mut parameters = X509VerifyParam::new()?;
    // Level 2: 112 bits of security, so no SHA-1 and no RSA below 2048 bits in any link.
    parameters.set_auth_level(2);
    // An anchor need not be self-signed. Without the other flag, OpenSSL takes policyConstraints for understood, and does
    // not go by them; with it, and without policies of ours, which the openssl crate cannot hand over, no path is good
    // that has to have some.
    parameters.set_flags(X509VerifyFlags::PARTIAL_CHAIN | X509VerifyFlags::POLICY_CHECK)?;
    Ok(parameters)
}

/// As certificates have it.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn reason(
    result: openssl::x509::X509VerifyResult,
    certificate: &openssl::x509::X509Ref,
    at: Timestamp,
) -> PathError {
    let name = certificate::subject(certificate);
    match result.as_raw() {
        ffi::X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT
        | ffi::X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY
        | ffi::X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE
        | ffi::X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT
        | ffi::X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN => PathError::NotTrusted(name),
        ffi::X509_V_ERR_CERT_HAS_EXPIRED => {
            PathError::Expired(name, certificate::time(certificate.not_after()), whole_seconds(at))
        }
        ffi::X509_V_ERR_CERT_NOT_YET_VALID => {
            PathError::NotYetValid(name, certificate::time(certificate.not_before()), whole_seconds(at))
        }
        ffi::X509_V_ERR_CERT_SIGNATURE_FAILURE => PathError::Signature(name),
        // Which of the two is missing.
        ffi::X509_V_ERR_INVALID_CA if certificate::says_ca(certificate) => PathError::KeyCertSign(name),
        ffi::X509_V_ERR_INVALID_CA => PathError::NotCa(name),
        ffi::X509_V_ERR_NO_EXPLICIT_POLICY | ffi::X509_V_ERR_INVALID_POLICY_EXTENSION => {
            PathError::Policy(name)
        }
        ffi::X509_V_ERR_PATH_LENGTH_EXCEEDED => PathError::PathLength(name),
        ffi::X509_V_ERR_KEYUSAGE_NO_CERTSIGN => PathError::KeyCertSign(name),
        ffi::X509_V_ERR_PERMITTED_VIOLATION
        | ffi::X509_V_ERR_EXCLUDED_VIOLATION
        | ffi::X509_V_ERR_SUBTREE_MINMAX
        | ffi::X509_V_ERR_UNSUPPORTED_CONSTRAINT_TYPE
        | ffi::X509_V_ERR_UNSUPPORTED_CONSTRAINT_SYNTAX
        | ffi::X509_V_ERR_UNSUPPORTED_NAME_SYNTAX => PathError::NameConstraints(name),
        ffi::X509_V_ERR_UNHANDLED_CRITICAL_EXTENSION => PathError::CriticalExtension(name),
        ffi::X509_V_ERR_EE_KEY_TOO_SMALL
        | ffi::X509_V_ERR_CA_KEY_TOO_SMALL
        | ffi::X509_V_ERR_CA_MD_TOO_WEAK => PathError::Weak(name),
        ffi::X509_V_ERR_INVALID_PURPOSE => PathError::Purpose(name),
        ffi::X509_V_ERR_CERT_REVOKED => PathError::Revoked(name),
        ffi::X509_V_ERR_UNABLE_TO_GET_CRL
        | ffi::X509_V_ERR_UNABLE_TO_GET_CRL_ISSUER
        | ffi::X509_V_ERR_CRL_SIGNATURE_FAILURE
        | ffi::X509_V_ERR_DIFFERENT_CRL_SCOPE
        | ffi::X509_V_ERR_KEYUSAGE_NO_CRL_SIGN
        | ffi::X509_V_ERR_UNHANDLED_CRITICAL_CRL_EXTENSION => PathError::NoCrl(name, result.error_string()),
        _ => PathError::Other(name, result.error_string()),
    }
}

/// Checks a chain before it is signed with: each certificate was issued by the next one, and all would be accepted
/// now by somebody who trusts the last one.
pub(crate) fn check_order(chain: &[X509], now: Timestamp) -> Result<(), PathError> {
    for pair in chain.windows(2) {
        let [certificate, issuer] = pair else { continue };
        let signed = issuer.public_key().and_then(|key| certificate.verify(&key)).unwrap_or(false);
        let named = certificate.issuer_name().try_cmp(issuer.subject_name())?.is_eq();
        if !named || !signed {
            let (name, next) = (certificate::subject(certificate), certificate::subject(issuer));
            return Err(PathError::Order(name, next));
        }
    }
    let [leaf, intermediates @ ..] = chain else { return Ok(()) };
    let anchor = intermediates.last().unwrap_or(leaf);
    let anchors = std::slice::from_ref(anchor);
    Question { anchors, leaf, intermediates, purpose: Purpose::CodeSigning }.ask(now)?;
    // Whoever trusts its issuer asks more of the last one than whoever trusts that one itself.
    match intermediates.last() {
        Some(last) if !is_self_issued(last)? => {
            if is_for_something_else(last, X509ExtendedKeyUsage::CODE_SIGN) {
                return Err(PathError::Purpose(certificate::subject(last)));
            }
            if is_signed_with_a_broken_hash(last) {
                return Err(PathError::Weak(certificate::subject(last)));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// OpenSSL asks how a certificate was signed only where it checks that signature.
fn is_signed_with_a_broken_hash(certificate: &X509) -> bool {
    let algorithms = certificate.signature_algorithm().object().nid().signature_algorithms();
    algorithms.is_some_and(|algorithms| matches!(algorithms.digest, Nid::SHA1 | Nid::MD5 | Nid::MD4))
        || certificate::is_weak_pss(certificate)
}

fn is_self_issued(certificate: &X509) -> Result<bool, ErrorStack> {
    Ok(certificate.issuer_name().try_cmp(certificate.subject_name())?.is_eq())
}
