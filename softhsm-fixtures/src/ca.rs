//! A test CA: what a company's PKI would do, with keys in memory or in files.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder};

use crate::write_private;

/// A certificate authority.
pub struct Ca {
    /// Its certificate.
    pub certificate: X509,
    /// Its key.
    pub key: PKey<Private>,
}

impl Ca {
    /// Makes a root.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        let key = new_key()?;
        let name = subject(name)?;
        let builder = authority(&name, &name, &key)?;
        Ok(Self { certificate: signed(builder, &key)?, key })
    }

    /// Makes a CA below this one.
    pub fn intermediate(&self, name: &str) -> anyhow::Result<Self> {
        let key = new_key()?;
        let builder = authority(subject(name)?.as_ref(), self.certificate.subject_name(), &key)?;
        Ok(Self { certificate: signed(builder, &self.key)?, key })
    }

    /// Certifies a key for signing models.
    pub fn code_signing(&self, name: &str, key: &PKeyRef<impl HasPublic>) -> anyhow::Result<X509> {
        let mut builder = self.leaf(name, key)?;
        builder.append_extension(ExtendedKeyUsage::new().code_signing().build()?)?;
        signed(builder, &self.key)
    }

    /// The same, from two days ago until then after 1970.
    pub fn code_signing_until(
        &self,
        name: &str,
        key: &PKeyRef<impl HasPublic>,
        end: Duration,
    ) -> anyhow::Result<X509> {
        let mut builder = self.leaf(name, key)?;
        builder.append_extension(ExtendedKeyUsage::new().code_signing().build()?)?;
        let (end, now) = (i64::try_from(end.as_secs())?, SystemTime::now().duration_since(UNIX_EPOCH)?);
        let begin = i64::try_from(now.as_secs())? - 2 * 24 * 60 * 60;
        builder.set_not_before(Asn1Time::from_unix(begin)?.as_ref())?;
        builder.set_not_after(Asn1Time::from_unix(end)?.as_ref())?;
        signed(builder, &self.key)
    }

    /// Certifies a key for TLS servers, not for signing.
    pub fn tls_server_for(&self, name: &str, key: &PKeyRef<impl HasPublic>) -> anyhow::Result<X509> {
        let mut builder = self.leaf(name, key)?;
        builder.append_extension(ExtendedKeyUsage::new().server_auth().build()?)?;
        signed(builder, &self.key)
    }

    /// Certifies a key for signing models until yesterday.
    pub fn expired(&self, name: &str, key: &PKeyRef<impl HasPublic>) -> anyhow::Result<X509> {
        let yesterday = SystemTime::now() - Duration::from_secs(24 * 60 * 60);
        self.code_signing_until(name, key, yesterday.duration_since(UNIX_EPOCH)?)
    }

    /// Makes and certifies a key for a TLS server at 127.0.0.1 and localhost.
    pub fn server(&self, name: &str) -> anyhow::Result<(X509, PKey<Private>)> {
        let key = new_key()?;
        let mut builder = self.leaf(name, &key)?;
        builder.append_extension(ExtendedKeyUsage::new().server_auth().build()?)?;
        let context = builder.x509v3_context(Some(&self.certificate), None);
        let names = SubjectAlternativeName::new().ip("127.0.0.1").dns("localhost").build(&context)?;
        builder.append_extension(names)?;
        Ok((signed(builder, &self.key)?, key))
    }

    /// Makes and certifies a key for a TLS client with a DNS name and a SPIFFE id.
    pub fn client(&self, name: &str) -> anyhow::Result<(X509, PKey<Private>)> {
        let key = new_key()?;
        let builder = self.leaf(name, &key)?;
        self.client_of(name, builder, key)
    }

    /// The same, for until then after 1970.
    pub fn client_until(&self, name: &str, end: Duration) -> anyhow::Result<(X509, PKey<Private>)> {
        let key = new_key()?;
        let mut builder = self.leaf(name, &key)?;
        builder.set_not_after(Asn1Time::from_unix(i64::try_from(end.as_secs())?)?.as_ref())?;
        self.client_of(name, builder, key)
    }

    fn client_of(
        &self,
        name: &str,
        mut builder: X509Builder,
        key: PKey<Private>,
    ) -> anyhow::Result<(X509, PKey<Private>)> {
        builder.append_extension(ExtendedKeyUsage::new().client_auth().build()?)?;
        let context = builder.x509v3_context(Some(&self.certificate), None);
        let (dns, uri) = (format!("{name}.example"), format!("spiffe://example/{name}"));
        let names = SubjectAlternativeName::new().dns(&dns).uri(&uri).build(&context)?;
        builder.append_extension(names)?;
        Ok((signed(builder, &self.key)?, key))
    }

    /// Certifies a TPM's endorsement key (TCG EK Credential Profile, 3.2).
    pub fn endorsement(&self, name: &str, key: &PKeyRef<impl HasPublic>) -> anyhow::Result<X509> {
        let mut builder = started(subject(name)?.as_ref(), self.certificate.subject_name(), key)?;
        builder.append_extension(BasicConstraints::new().critical().build()?)?;
        builder.append_extension(KeyUsage::new().critical().key_agreement().key_encipherment().build()?)?;
        builder.append_extension(ExtendedKeyUsage::new().other("2.23.133.8.1").build()?)?;
        signed(builder, &self.key)
    }

    fn leaf(&self, name: &str, key: &PKeyRef<impl HasPublic>) -> anyhow::Result<X509Builder> {
        let mut builder = started(subject(name)?.as_ref(), self.certificate.subject_name(), key)?;
        builder.append_extension(BasicConstraints::new().critical().build()?)?;
        builder.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
        Ok(builder)
    }
}

/// Writes certificates as one PEM file, in the order given.
pub fn write_chain(path: &Path, chain: &[&X509]) -> anyhow::Result<()> {
    let mut pem = Vec::new();
    for certificate in chain {
        pem.extend(certificate.to_pem()?);
    }
    std::fs::write(path, pem).with_context(|| path.display().to_string())
}

/// Writes a private key as PEM that only its owner can read.
pub fn write_key(path: &Path, key: &PKey<Private>) -> anyhow::Result<()> {
    write_private(path, &key.private_key_to_pem_pkcs8()?)
}

fn new_key() -> anyhow::Result<PKey<Private>> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    Ok(PKey::from_ec_key(EcKey::generate(&group)?)?)
}

fn subject(name: &str) -> anyhow::Result<X509Name> {
    let mut builder = X509NameBuilder::new()?;
    builder.append_entry_by_text("CN", name)?;
    Ok(builder.build())
}

fn started(
    subject: &openssl::x509::X509NameRef,
    issuer: &openssl::x509::X509NameRef,
    key: &PKeyRef<impl HasPublic>,
) -> anyhow::Result<X509Builder> {
    let mut builder = X509Builder::new()?;
    let mut serial = BigNum::new()?;
    serial.rand(127, MsbOption::MAYBE_ZERO, false)?;
    builder.set_version(2)?;
    builder.set_serial_number(serial.to_asn1_integer()?.as_ref())?;
    builder.set_subject_name(subject)?;
    builder.set_issuer_name(issuer)?;
    builder.set_pubkey(key)?;
    builder.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
    builder.set_not_after(Asn1Time::days_from_now(30)?.as_ref())?;
    Ok(builder)
}

fn authority(
    subject: &openssl::x509::X509NameRef,
    issuer: &openssl::x509::X509NameRef,
    key: &PKeyRef<impl HasPublic>,
) -> anyhow::Result<X509Builder> {
    let mut builder = started(subject, issuer, key)?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    Ok(builder)
}

fn signed(mut builder: X509Builder, key: &PKey<Private>) -> anyhow::Result<X509> {
    builder.sign(key, MessageDigest::sha256())?;
    Ok(builder.build())
}
