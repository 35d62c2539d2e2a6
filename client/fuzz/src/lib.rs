//! What fuzz targets have in common: a key that signs, and its certificate.

use std::io::Write as _;
use std::sync::LazyLock;

use omsign::dsse::Pae;
use omsign::key::{PrivateKey, PublicKey};
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509Name};

static KEY: LazyLock<(PrivateKey, X509)> = LazyLock::new(|| {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("a curve");
    let key = PKey::from_ec_key(EcKey::generate(&group).expect("a key")).expect("a key");
    let certificate = certify(&key).expect("a certificate");
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
    file.write_all(&key.private_key_to_pem_pkcs8().expect("PEM")).expect("written");
    (PrivateKey::read(file.path(), || None).ok().expect("a key"), certificate)
});

fn certify(key: &PKey<openssl::pkey::Private>) -> Result<X509, openssl::error::ErrorStack> {
    let mut name = X509Name::builder()?;
    name.append_entry_by_text("CN", "nobody")?;
    let name = name.build();
    let mut builder = X509::builder()?;
    builder.set_version(2)?;
    builder.set_subject_name(&name)?;
    builder.set_issuer_name(&name)?;
    builder.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
    builder.set_not_after(Asn1Time::days_from_now(30)?.as_ref())?;
    builder.set_pubkey(key)?;
    builder.sign(key, MessageDigest::sha256())?;
    Ok(builder.build())
}

/// A certificate that nobody trusts.
pub fn certificate() -> X509 {
    KEY.1.clone()
}

/// Its key.
pub fn public_key() -> PublicKey {
    KEY.0.public.clone()
}

/// What the key makes of a payload.
pub fn signature(payload: &[u8]) -> Vec<u8> {
    KEY.0.sign(&Pae::of(payload)).expect("a signature")
}
