//! Does a certificate lead to one that is trusted (RFC 5280, 6)? OpenSSL answers; this asks, and names its reasons.

use std::io::Write as _;
use std::path::Path;

use jiff::Timestamp;
use openssl::error::ErrorStack;
use openssl::ssl::SslFiletype;
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509Crl, X509PurposeId, X509StoreContext};
use openssl_sys as ffi;

use crate::certificate;
use crate::key::{KeyError, read};

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
    #[error("{0} is not for this purpose (RFC 5280, 4.2.1.12)")]
    Purpose(String),
    /// Any other reason of OpenSSL's.
    #[error("{0} does not lead to a trusted certificate (RFC 5280, 6.1): {1}")]
    Other(String, &'static str),
    /// A chain in another order than from the leaf to the root.
    #[error("the chain is not in order: {0} was not issued by {1}, which comes next (OMS 4.1)")]
    Order(String, String),
    /// OpenSSL failed.
    #[error("OpenSSL could not check the certificates")]
    OpenSsl(#[from] ErrorStack),
    /// Nor could it read the CRLs back.
    #[error("the CRLs could not be handed to OpenSSL")]
    Handed(#[source] std::io::Error),
}

/// What issuers revoked.
#[derive(Default)]
pub struct Crls(Vec<(X509Crl, Vec<u8>)>);

impl Crls {
    /// Adds the lists of a file, PEM or DER.
    pub fn read(&mut self, path: &Path) -> Result<(), KeyError> {
        const END: &str = "-----END X509 CRL-----";
        let bytes = read(path)?;
        let content = || KeyError::Content { path: path.to_owned(), what: "a CRL" };
        if let Ok(crl) = X509Crl::from_der(&bytes) {
            let pem = crl.to_pem().map_err(|_| content())?;
            self.0.push((crl, pem));
            return Ok(());
        }
        let text = String::from_utf8(bytes).map_err(|_| content())?;
        let blocks: Vec<&str> = text.split_inclusive(END).filter(|block| block.contains(END)).collect();
        if blocks.is_empty() {
            return Err(content());
        }
        for block in blocks {
            let crl = X509Crl::from_pem(block.as_bytes()).map_err(|_| content())?;
            let pem = crl.to_pem().map_err(|_| content())?;
            self.0.push((crl, pem));
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A list that is over may miss what was revoked since.
    fn check_current(&self) -> Result<(), PathError> {
        let now = openssl::asn1::Asn1Time::days_from_now(0)?;
        for (crl, _) in &self.0 {
            let next = crl.next_update();
            if crl.last_update() > &*now || next.is_some_and(|next| next < &*now) {
                let until = next.map_or_else(|| "no date".to_owned(), ToString::to_string);
                let (issuer, from) = (certificate::name(crl.issuer_name()), crl.last_update().to_string());
                return Err(PathError::OldCrl { issuer, from, until });
            }
        }
        Ok(())
    }
}

/// One question: does `leaf` lead to one of `anchors`, at a time?
pub(crate) struct Question<'a> {
    pub(crate) anchors: &'a [X509],
    pub(crate) leaf: &'a X509,
    pub(crate) intermediates: &'a [X509],
    pub(crate) purpose: Option<X509PurposeId>,
}

impl Question<'_> {
    /// Whether it did at this time.
    pub(crate) fn ask(&self, at: Timestamp) -> Result<(), PathError> {
        let mut parameters = parameters()?;
        parameters.set_time(at.as_second());
        if let Some(purpose) = self.purpose {
            parameters.set_purpose(purpose)?;
        }
        self.verify(&parameters, None, at)
    }

    /// Whether no certificate on the way is revoked by now, whenever it was used.
    pub(crate) fn ask_revoked(&self, crls: &Crls, now: Timestamp) -> Result<(), PathError> {
        crls.check_current()?;
        let mut parameters = parameters()?;
        let flags =
            X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL | X509VerifyFlags::NO_CHECK_TIME;
        parameters.set_flags(flags)?;
        // OpenSSL takes CRLs from files only.
        let mut file = tempfile::NamedTempFile::new().map_err(PathError::Handed)?;
        crls.0.iter().try_for_each(|(_, pem)| file.write_all(pem)).map_err(PathError::Handed)?;
        self.verify(&parameters, Some(file.path()), now)
    }

    fn verify(
        &self,
        parameters: &X509VerifyParam,
        crls: Option<&Path>,
        at: Timestamp,
    ) -> Result<(), PathError> {
        let mut store = X509StoreBuilder::new()?;
        for anchor in self.anchors {
            store.add_cert(anchor.clone())?;
        }
        store.set_param(parameters)?;
        if let Some(path) = crls {
            store.add_lookup(X509Lookup::file())?.load_crl_file(path, SslFiletype::PEM)?;
        }
        let store = store.build();
        let mut intermediates = Stack::new()?;
        for certificate in self.intermediates {
            intermediates.push(certificate.clone())?;
        }
        let mut context = X509StoreContext::new()?;
        context
            .init(&store, self.leaf, &intermediates, |context| {
                if context.verify_cert()? {
                    return Ok(Ok(()));
                }
                let concerned = context.current_cert().unwrap_or(self.leaf);
                Ok(Err(reason(context.error(), concerned, at)))
            })
            .map_err(PathError::OpenSsl)?
    }
}

fn parameters() -> Result<X509VerifyParam, ErrorStack> {
    let mut parameters = X509VerifyParam::new()?;
    // Level 2: 112 bits of security, so no SHA-1 and no RSA below 2048 bits in any link.
    parameters.set_auth_level(2);
    // An anchor need not be self-signed.
    parameters.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    Ok(parameters)
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
        ffi::X509_V_ERR_CERT_HAS_EXPIRED => PathError::Expired(name, certificate.not_after().to_string(), at),
        ffi::X509_V_ERR_CERT_NOT_YET_VALID => {
            PathError::NotYetValid(name, certificate.not_before().to_string(), at)
        }
        ffi::X509_V_ERR_CERT_SIGNATURE_FAILURE => PathError::Signature(name),
        ffi::X509_V_ERR_INVALID_CA => PathError::NotCa(name),
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
    Question { anchors: std::slice::from_ref(anchor), leaf, intermediates, purpose: None }.ask(now)
}
