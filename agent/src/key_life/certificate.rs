//! Certificate requests and self-signed certificates, for code signing; encoded here, signed by a device.

use std::time::{Duration, SystemTime};

use der::asn1::{Any, BitString, Ia5String, ObjectIdentifier};
use der::pem::{LineEnding, PemLabel as _};
use der::referenced::OwnedToRef as _;
use der::{Decode as _, Encode as _, Sequence};
use serde::{Deserialize, Serialize};
use x509_cert::Certificate;
use x509_cert::attr::Attributes;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{
    BasicConstraints, ExtendedKeyUsage, KeyUsage, KeyUsages, SubjectAltName, SubjectKeyIdentifier,
};
use x509_cert::ext::{Extension, Extensions, ToExtension as _};
use x509_cert::name::Name;
use x509_cert::request::{CertReq, CertReqInfo, ExtensionReq, Version};
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};
use x509_cert::time::Validity;

use crate::algorithm::{Algorithm, Curve};
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;

/// `id-kp-codeSigning` (RFC 5280, 4.2.1.12).
const CODE_SIGNING: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.3");

/// Whose certificate it is.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
pub struct Subject {
    /// Distinguished name, such as "CN=Model Release,O=Acme" (RFC 4514)
    #[arg(id = "subject", long, value_name = "DN")]
    pub name: String,
    /// Further names: dns:NAME, uri:URI or email:ADDRESS
    #[arg(long = "san", value_name = "KIND:NAME")]
    pub alternatives: Vec<String>,
}

/// Why a certificate cannot be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The subject.
    #[error("{0:?} is not a distinguished name; write one like \"CN=Model Release,O=Acme\" (RFC 4514)")]
    Subject(String),
    /// A further name.
    #[error("{0:?} is not a subject alternative name; write dns:NAME, uri:URI or email:ADDRESS")]
    Alternative(String),
    /// No certificate in the file.
    #[error("the file does not hold PEM certificates: {0}")]
    Pem(String),
    /// A certificate for somebody else.
    #[error(
        "the certificate is for another key; give the one that was issued for this key, first in its file"
    )]
    OtherKey,
    /// Out of randomness, or a date out of range.
    #[error("the certificate cannot be made: {0}")]
    Failed(String),
    /// DER.
    #[error("the certificate cannot be encoded")]
    Der(#[from] der::Error),
}

/// A request or certificate that only lacks its signature (RFC 2986, 4.2; RFC 5280, 4.1: both have the same form).
pub(super) struct Unsigned {
    label: &'static str,
    pub(super) message: Vec<u8>,
    algorithm: AlgorithmIdentifierOwned,
}

impl Unsigned {
    pub(super) fn request(public: &PublicKey, subject: &Subject) -> Result<Self, CertificateError> {
        let name = subject.name()?;
        let mut attributes = Attributes::new();
        attributes.insert(ExtensionReq(subject.extensions(&name)?).try_into()?)?;
        let public_key = SubjectPublicKeyInfoOwned::from_der(&public.spki.0)?;
        let info = CertReqInfo { version: Version::V1, subject: name, public_key, attributes };
        let algorithm = signature_algorithm(public.algorithm)?;
        Ok(Self { label: CertReq::PEM_LABEL, message: info.to_der()?, algorithm })
    }

    /// By the key about itself.
    pub(super) fn certificate(
        public: &PublicKey,
        subject: &Subject,
        days: u32,
    ) -> Result<Self, CertificateError> {
        let failed = |error: &dyn std::fmt::Display| CertificateError::Failed(error.to_string());
        let name = subject.name()?;
        // 64 random bits and more (CA/Browser Forum Baseline Requirements, 7.1), positive.
        let mut serial = [0; 16];
        getrandom::fill(&mut serial).map_err(|error| failed(&error))?;
        if let Some(first) = serial.first_mut() {
            *first = *first & 0x7f | 0x40;
        }
        let end = SystemTime::now() + Duration::from_secs(u64::from(days) * 86_400);
        let public_key = SubjectPublicKeyInfoOwned::from_der(&public.spki.0)?;
        let mut extensions = subject.extensions(&name)?;
        extensions.push(BasicConstraints { ca: false, path_len_constraint: None }.to_extension(&name, &[])?);
        let identifier = SubjectKeyIdentifier::try_from(public_key.owned_to_ref())?;
        extensions.push(identifier.to_extension(&name, &[])?);
        let algorithm = signature_algorithm(public.algorithm)?;
        let inside = ToBeSigned {
            version: x509_cert::Version::V3,
            serial_number: SerialNumber::new(&serial)?,
            signature: algorithm.clone(),
            issuer: name.clone(),
            validity: Validity::new(SystemTime::now().try_into()?, end.try_into()?),
            subject: name,
            public_key,
            extensions,
        };
        Ok(Self { label: Certificate::PEM_LABEL, message: inside.to_der()?, algorithm })
    }

    /// PEM.
    pub(super) fn signed(self, signature: &[u8]) -> Result<String, CertificateError> {
        let mut inside = self.message;
        inside.extend(self.algorithm.to_der()?);
        inside.extend(BitString::from_bytes(signature)?.to_der()?);
        let der = Any::new(der::Tag::Sequence, inside)?.to_der()?;
        Ok(der::pem::encode_string(self.label, LineEnding::LF, &der).map_err(der::Error::from)?)
    }
}

/// `TBSCertificate` (RFC 5280, 4.1), as far as it is made here.
#[derive(Sequence)]
struct ToBeSigned {
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT")]
    version: x509_cert::Version,
    serial_number: SerialNumber,
    signature: AlgorithmIdentifierOwned,
    issuer: Name,
    validity: Validity,
    subject: Name,
    public_key: SubjectPublicKeyInfoOwned,
    #[asn1(context_specific = "3", tag_mode = "EXPLICIT")]
    extensions: Extensions,
}

impl Subject {
    /// Whether it can be somebody's.
    pub fn check(&self) -> Result<(), CertificateError> {
        self.extensions(&self.name()?).map(drop)
    }

    fn name(&self) -> Result<Name, CertificateError> {
        self.name.parse().map_err(|_| CertificateError::Subject(self.name.clone()))
    }

    /// Digital signatures, of code.
    fn extensions(&self, name: &Name) -> Result<Vec<Extension>, CertificateError> {
        let mut extensions = vec![
            KeyUsage(KeyUsages::DigitalSignature.into()).to_extension(name, &[])?,
            ExtendedKeyUsage(vec![CODE_SIGNING]).to_extension(name, &[])?,
        ];
        let alternatives = self.alternatives.iter().map(|text| {
            let wrong = || CertificateError::Alternative(text.clone());
            let (kind, value) =
                text.split_once(':').filter(|(_, value)| !value.is_empty()).ok_or_else(wrong)?;
            let value = Ia5String::new(value).map_err(|_| wrong())?;
            match kind {
                "dns" => Ok(GeneralName::DnsName(value)),
                "uri" => Ok(GeneralName::UniformResourceIdentifier(value)),
                "email" => Ok(GeneralName::Rfc822Name(value)),
                _ => Err(wrong()),
            }
        });
        let alternatives: Vec<_> = alternatives.collect::<Result<_, _>>()?;
        if !alternatives.is_empty() {
            extensions.push(SubjectAltName(alternatives).to_extension(name, &[])?);
        }
        Ok(extensions)
    }
}

/// The first certificate of a PEM file, DER, if it is for this key.
pub(super) fn of(spki: &SpkiDer, pem: &str) -> Result<Vec<u8>, CertificateError> {
    let chain = Certificate::load_pem_chain(pem.as_bytes())
        .map_err(|error| CertificateError::Pem(error.to_string()))?;
    let leaf = chain.first().ok_or_else(|| CertificateError::Pem("it is empty".into()))?;
    if leaf.tbs_certificate().subject_public_key_info().to_der()? != spki.0 {
        return Err(CertificateError::OtherKey);
    }
    Ok(leaf.to_der()?)
}

/// The identifier that requests and certificates carry (RFC 5758, 4055, 8410).
fn signature_algorithm(algorithm: Algorithm) -> Result<AlgorithmIdentifierOwned, CertificateError> {
    let (oid, parameters) = match algorithm {
        Algorithm::Ecdsa(Curve::P256) => ("1.2.840.10045.4.3.2", None),
        Algorithm::Ecdsa(Curve::P384) => ("1.2.840.10045.4.3.3", None),
        Algorithm::Ecdsa(Curve::P521) => ("1.2.840.10045.4.3.4", None),
        Algorithm::RsaPkcs1 => ("1.2.840.113549.1.1.11", Some(Any::null())),
        Algorithm::Ed25519 => ("1.3.101.112", None),
        // RFC 9881, 2.
        Algorithm::MlDsa(set) => return Ok(AlgorithmIdentifierOwned { oid: set.oid(), parameters: None }),
        Algorithm::RsaPss => ("1.2.840.113549.1.1.10", Some(Any::from_der(PSS_SHA256)?)),
    };
    Ok(AlgorithmIdentifierOwned { oid: ObjectIdentifier::new_unwrap(oid), parameters })
}

/// RSASSA-PSS-params (RFC 4055, 3.1): SHA-256, MGF1 with SHA-256, a salt of 32 bytes.
const PSS_SHA256: &[u8] = &[
    0x30, 0x34, 0xa0, 0x0f, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01,
    0x05, 0x00, 0xa1, 0x1c, 0x30, 0x1a, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08,
    0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0xa2, 0x03,
    0x02, 0x01, 0x20,
];
