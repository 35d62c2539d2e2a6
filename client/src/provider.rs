//! OpenSSL as the cryptography of the sigstore crates, so that there is one such library in the client.

use openssl::ec::{EcGroup, EcKey, EcPoint};
use openssl::error::ErrorStack;
use openssl::hash::{Hasher, MessageDigest, hash};
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Verifier};
use sigstore_verify::crypto::{
    CryptoProvider, Error, HashContext, KeyAlgorithm, Result, SigningScheme, install_default_provider,
};
use sigstore_verify::types::HashAlgorithm;

/// Makes it the provider of this process. Once is enough.
pub(crate) fn install() {
    // Only a provider that is already there is refused: the program that uses this library chose another.
    let _ = install_default_provider(&OpenSsl);
}

#[derive(Debug)]
struct OpenSsl;

struct Digest(Hasher);

impl HashContext for Digest {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data).expect("hashing memory does not fail");
    }

    fn finalize(mut self: Box<Self>) -> Vec<u8> {
        self.0.finish().expect("hashing memory does not fail").to_vec()
    }
}

fn message_digest(algorithm: HashAlgorithm) -> Result<MessageDigest> {
    Ok(match algorithm {
        HashAlgorithm::Sha2256 => MessageDigest::sha256(),
        HashAlgorithm::Sha2384 => MessageDigest::sha384(),
        HashAlgorithm::Sha2512 => MessageDigest::sha512(),
        other => return Err(Error::UnsupportedAlgorithm(other.to_string())),
    })
}

impl CryptoProvider for OpenSsl {
    fn hash(&self, algorithm: HashAlgorithm) -> Result<Box<dyn HashContext>> {
        let hasher = Hasher::new(message_digest(algorithm)?);
        Ok(Box::new(Digest(hasher.map_err(|error| Error::UnsupportedAlgorithm(error.to_string()))?)))
    }

    fn verify_raw(&self, scheme: SigningScheme, key: &[u8], data: &[u8], signature: &[u8]) -> Result<()> {
        let invalid = || Error::Verification(format!("{} signature invalid", scheme.name()));
        let Some(algorithm) = scheme.hash_algorithm() else {
            if scheme != SigningScheme::Ed25519 {
                return Err(Error::UnsupportedAlgorithm(scheme.name().to_owned()));
            }
            let verified = PKey::public_key_from_raw_bytes(key, Id::ED25519)
                .and_then(|key| Verifier::new_without_digest(&key)?.verify_oneshot(signature, data));
            return if verified.unwrap_or(false) { Ok(()) } else { Err(invalid()) };
        };
        let digest = hash(message_digest(algorithm)?, data).map_err(|_| invalid())?;
        self.verify_prehashed(scheme, key, &digest, signature)
    }

    fn verify_prehashed(
        &self,
        scheme: SigningScheme,
        key: &[u8],
        digest: &[u8],
        signature: &[u8],
    ) -> Result<()> {
        let Some(algorithm) = scheme.hash_algorithm() else {
            return Err(Error::UnsupportedAlgorithm(scheme.name().to_owned()));
        };
        let algorithm = message_digest(algorithm)?;
        match verifies(scheme, algorithm, key, digest, signature) {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::Verification(format!("{} signature invalid", scheme.name()))),
        }
    }
}

fn verifies(
    scheme: SigningScheme,
    algorithm: MessageDigest,
    key: &[u8],
    digest: &[u8],
    signature: &[u8],
) -> std::result::Result<bool, ErrorStack> {
    let key = match scheme.key_algorithm() {
        KeyAlgorithm::EcdsaP256 => on_curve(Nid::X9_62_PRIME256V1, key)?,
        KeyAlgorithm::EcdsaP384 => on_curve(Nid::SECP384R1, key)?,
        KeyAlgorithm::Rsa => PKey::from_rsa(Rsa::public_key_from_der_pkcs1(key)?)?,
        _ => return Ok(false),
    };
    let mut context = PkeyCtx::new(&key)?;
    context.verify_init()?;
    if scheme.key_algorithm() == KeyAlgorithm::Rsa {
        let pss = matches!(
            scheme,
            SigningScheme::RsaPssSha256 | SigningScheme::RsaPssSha384 | SigningScheme::RsaPssSha512
        );
        context.set_rsa_padding(if pss { Padding::PKCS1_PSS } else { Padding::PKCS1 })?;
        if pss {
            context.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)?;
        }
    }
    let md = openssl::md::Md::from_nid(algorithm.type_());
    if let Some(md) = md {
        context.set_signature_md(md)?;
    }
    context.verify(digest, signature)
}

fn on_curve(curve: Nid, point: &[u8]) -> std::result::Result<PKey<Public>, ErrorStack> {
    let group = EcGroup::from_curve_name(curve)?;
    let mut context = openssl::bn::BigNumContext::new()?;
    let point = EcPoint::from_bytes(&group, point, &mut context)?;
    PKey::from_ec_key(EcKey::from_public_key(&group, &point)?)
}
