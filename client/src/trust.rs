//! Who signed, and is that who was expected? The only place that makes a [`VerifiedStatement`].

use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509ExtendedKeyUsage, X509KeyUsage, X509StoreContext, X509VerifyResult};

use crate::bundle::{Bundle, KeyIdentifier, Material};
use crate::dsse::Pae;
use crate::key::{Algorithm, KeyError, PublicKey};
use crate::manifest::Manifest;
use crate::statement::{self, StatementError};

/// What the verifier trusts.
pub enum Trust {
    /// This key.
    PublicKey(PublicKey),
    /// Certificates that lead to one of these.
    Anchors(Vec<X509>),
}

/// A statement whose signature was verified. Only this module can make one.
#[derive(Debug)]
pub struct VerifiedStatement {
    /// What was signed.
    pub manifest: Manifest,
    /// By whom.
    pub signer: Signer,
}

/// Who signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// How its key signs.
    pub algorithm: Algorithm,
    /// The certificate's subject; none with the key method.
    pub certificate_subject: Option<String>,
    /// SHA-256 of the key's PEM, as in `publicKey.hint`.
    pub key_hint: String,
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
    /// A method that this version does not verify.
    #[error("this version does not verify bundles of the sigstore method")]
    Sigstore,
    /// The bundle names another key.
    #[error("the bundle was signed with another key than the one given: its key hint is {0:?} (OMS 4.1)")]
    OtherKey(String),
    /// The signature is wrong.
    #[error("the signature is not valid for this payload and key (OMS 8.2)")]
    Signature,
    /// A certificate is not DER.
    #[error("certificate {0} of the bundle's chain is malformed (RFC 5280, 4.1)")]
    Certificate(usize),
    /// The leaf's key cannot have signed an OMS bundle.
    #[error("the signing certificate: {0}")]
    LeafKey(#[source] KeyError),
    /// The path to an anchor is broken.
    #[error("the signing certificate does not lead to a trusted one (RFC 5280, 6.1): {0}")]
    Path(String),
    /// The leaf is for something else.
    #[error("the signing certificate may not sign: {0} (OMS 8.2)")]
    Usage(&'static str),
    /// OpenSSL failed.
    #[error("OpenSSL could not check the certificates")]
    OpenSsl(#[from] openssl::error::ErrorStack),
    /// The signature is right, the statement is not.
    #[error(transparent)]
    Statement(#[from] StatementError),
}

impl TrustError {
    /// Whether the bundle was found wrong, as opposed to could not be checked.
    pub fn found_wrong(&self) -> bool {
        !matches!(self, Self::Sigstore | Self::OpenSsl(_))
    }
}

impl Trust {
    /// Verifies a bundle's signature and signer, then reads its statement.
    pub fn verify(&self, bundle: &Bundle) -> Result<VerifiedStatement, TrustError> {
        let pae = Pae::of(&bundle.payload);
        let (key, certificate_subject) = match (self, &bundle.material) {
            (Self::PublicKey(key), Material::PublicKey(identifier)) => {
                same_key(key, identifier)?;
                (key.clone(), None)
            }
            (Self::Anchors(anchors), Material::CertificateChain(chain)) => {
                let leaf = verified_leaf(anchors, chain)?;
                let key = PublicKey::of_certificate(&leaf).map_err(TrustError::LeafKey)?;
                (key, Some(name(leaf.subject_name())))
            }
            (_, Material::Sigstore) => return Err(TrustError::Sigstore),
            (Self::PublicKey(_), Material::CertificateChain(_)) => {
                return Err(TrustError::Method { found: "certificate", wanted: "a public key" });
            }
            (Self::Anchors(_), Material::PublicKey(_)) => {
                return Err(TrustError::Method { found: "key", wanted: "a certificate chain" });
            }
        };
        if !key.verifies(&pae, &bundle.signature) {
            return Err(TrustError::Signature);
        }
        // Nothing of the payload is looked at before this line.
        let manifest = statement::decode(&bundle.payload)?;
        let signer = Signer { algorithm: key.algorithm, certificate_subject, key_hint: key.hint() };
        Ok(VerifiedStatement { manifest, signer })
    }
}

fn same_key(key: &PublicKey, identifier: &KeyIdentifier) -> Result<(), TrustError> {
    match identifier {
        KeyIdentifier::Hint(hint) if *hint == key.hint() => Ok(()),
        KeyIdentifier::Hint(hint) => Err(TrustError::OtherKey(hint.clone())),
        KeyIdentifier::Pem(pem) if *pem == key.to_pem() => Ok(()),
        KeyIdentifier::Pem(pem) => Err(TrustError::OtherKey(crate::hash::Digest::sha256(pem).to_string())),
    }
}

/// The leaf of a chain that leads to an anchor, is valid now, and may sign.
fn verified_leaf(anchors: &[X509], chain: &[Vec<u8>]) -> Result<X509, TrustError> {
    let mut certificates = Vec::with_capacity(chain.len());
    for (index, der) in chain.iter().enumerate() {
        let certificate = X509::from_der(der).map_err(|_| TrustError::Certificate(index))?;
        // d2i accepts bytes after the end, and BER.
        if certificate.to_der()? != *der {
            return Err(TrustError::Certificate(index));
        }
        certificates.push(certificate);
    }
    let mut rest = certificates.into_iter();
    let leaf = rest.next().ok_or(TrustError::Certificate(0))?;
    let mut store = X509StoreBuilder::new()?;
    for anchor in anchors {
        store.add_cert(anchor.clone())?;
    }
    let mut intermediates = Stack::new()?;
    for certificate in rest {
        intermediates.push(certificate)?;
    }
    let mut parameters = X509VerifyParam::new()?;
    // Level 2: 112 bits of security, so no SHA-1 and no RSA below 2048 bits in any link.
    parameters.set_auth_level(2);
    // An anchor need not be self-signed.
    parameters.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    store.set_param(&parameters)?;
    let store = store.build();
    let mut context = X509StoreContext::new()?;
    let result = context.init(&store, &leaf, &intermediates, |context| {
        context.verify_cert()?;
        Ok(context.error())
    })?;
    if result != X509VerifyResult::OK {
        return Err(TrustError::Path(result.error_string().to_owned()));
    }
    check_usage(&leaf)?;
    Ok(leaf)
}

/// KeyUsage must allow digital signatures; an extended key usage, if there is one, code signing.
pub fn check_usage(leaf: &X509) -> Result<(), TrustError> {
    if let Some(usage) = leaf.key_usage()
        && !usage.contains(X509KeyUsage::DIGITAL_SIGNATURE)
    {
        return Err(TrustError::Usage("its KeyUsage has no digitalSignature"));
    }
    if let Some(usage) = leaf.extended_key_usage()
        && !usage.intersects(X509ExtendedKeyUsage::CODE_SIGN | X509ExtendedKeyUsage::ANYEKU)
    {
        return Err(TrustError::Usage("its ExtendedKeyUsage has no codeSigning"));
    }
    Ok(())
}

/// A distinguished name, for people: `CN=…, O=…`.
pub fn name(name: &openssl::x509::X509NameRef) -> String {
    let part = |entry: &openssl::x509::X509NameEntryRef| {
        let value = entry.data().to_string().unwrap_or_default();
        format!("{}={}", entry.object().nid().short_name().unwrap_or("?"), value.escape_debug())
    };
    name.entries().map(part).collect::<Vec<_>>().join(", ")
}
