//! On which terms a signature is accepted, as people write them: on the command line and in a trust policy.

use std::path::{Path, PathBuf};

use openssl::x509::X509;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::crl::Crls;
use crate::files::Files;
use crate::key::{KeyError, PublicKey, certificates_from_pem};
use crate::keyless::{Instance, Keyless};
use crate::trust::{Anchors, Signers, Trust};
use crate::wanted::{PatternError, Wanted};

/// Terms. Exactly one of `public_key`, `roots` and an identity says whose signatures are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Terms {
    /// Patterns of what the signer may call a model. None: anything.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "some")]
    pub models: Vec<String>,
    /// Method "key": the signer's public key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<Source>,
    /// Method "certificate": what certificates have to lead to.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "some")]
    pub roots: Vec<Source>,
    /// And how the signer's is called: subject, alternative name or SHA-256 fingerprint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_identity: Option<String>,
    /// Files with lists of revoked certificates.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "some")]
    pub crls: Vec<PathBuf>,
    /// What certificates of RFC 3161 authorities have to lead to.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "some")]
    pub timestamp_roots: Vec<Source>,
    /// Whether bundles of release 0.2.0 of the reference are accepted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub accept_legacy: bool,
    /// Method "sigstore": who signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Or a pattern of who signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_pattern: Option<String>,
    /// And who vouches for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_provider: Option<String>,
    /// Or a pattern of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_provider_pattern: Option<String>,
    /// TrustedRoot of a private Sigstore instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trusted_root: Option<PathBuf>,
    /// Or a ClientTrustConfig that holds one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_config: Option<PathBuf>,
    /// Whether Sigstore's staging area is meant.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_staging: bool,
}

/// A list that is there has something in it: one that a template left empty would mean that nothing is asked for.
fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let list = Vec::deserialize(deserializer)?;
    if list.is_empty() { Err(D::Error::custom("an empty list; leave it out, or fill it")) } else { Ok(list) }
}

/// PEM: itself, or the name of a file that holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Source(pub String);

/// Terms that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum TermsError {
    /// Nobody is meant, or more than one.
    #[error(
        "give exactly one of a public key, roots of certificates, and an identity with its identity provider"
    )]
    Signer,
    /// A name of nobody.
    #[error("the certificate identity is empty")]
    Nameless,
    /// One without the other.
    #[error("a keyless signer needs an identity and an identity provider, each by name or by pattern")]
    Identity,
    /// Terms of another method.
    #[error("{0} says nothing about signers of the {1} method")]
    OtherMethod(&'static str, &'static str),
    /// Two instances.
    #[error("give one of a trusted root, a trust configuration and the staging area")]
    Instance,
    /// No pattern.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A file.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl Source {
    fn is_pem(&self) -> bool {
        self.0.trim_start().starts_with("-----BEGIN ")
    }

    fn pem(&self, base: &Path, files: &mut Files) -> Result<(Vec<u8>, PathBuf), KeyError> {
        if self.is_pem() {
            return Ok((self.0.clone().into_bytes(), "the PEM in the policy".into()));
        }
        let path = base.join(&self.0);
        match files.read(&path) {
            Ok(bytes) => Ok((bytes.to_vec(), path)),
            Err(source) => Err(KeyError::Read { path, source }),
        }
    }
}

impl Terms {
    /// The signing method that they are about (OMS v1.0, 4.1).
    pub fn method(&self) -> Result<&'static str, TermsError> {
        let names = [
            &self.identity,
            &self.identity_pattern,
            &self.identity_provider,
            &self.identity_provider_pattern,
        ];
        let keyless = names.iter().any(|name| name.is_some());
        let method = match (&self.public_key, self.roots.is_empty(), keyless) {
            (Some(_), true, false) => "key",
            (None, false, false) => "certificate",
            (None, true, true) => "sigstore",
            _ => return Err(TermsError::Signer),
        };
        let instance = self.trusted_root.is_some() || self.trust_config.is_some() || self.use_staging;
        let foreign = [
            (self.certificate_identity.is_some(), "a certificate identity", method == "certificate"),
            (!self.crls.is_empty(), "a CRL", method == "certificate"),
            (!self.timestamp_roots.is_empty(), "a root of time stamps", method != "sigstore"),
            (instance, "a Sigstore instance", method == "sigstore"),
        ];
        match foreign.iter().find(|(given, _, fits)| *given && !fits) {
            Some((_, what, _)) => Err(TermsError::OtherMethod(what, method)),
            None => Ok(method),
        }
    }

    /// Reads what they name. Relative paths are relative to `base`.
    pub fn trust(&self, base: &Path, files: &mut Files) -> Result<Trust, TermsError> {
        self.scope()?;
        if self.certificate_identity.as_deref() == Some("") {
            return Err(TermsError::Nameless);
        }
        let signers = match (self.method()?, &self.public_key) {
            ("key", Some(key)) => {
                let (pem, path) = key.pem(base, files)?;
                Signers::PublicKey(PublicKey::from_pem(&pem, &path)?)
            }
            ("certificate", _) => {
                let mut crls = Crls::default();
                self.crls.iter().try_for_each(|path| crls.read(&base.join(path)))?;
                let roots = certificates(&self.roots, base, files)?;
                Signers::Certified(Anchors { roots, crls, identity: self.certificate_identity.clone() })
            }
            _ => Signers::Keyless(Box::new(self.keyless(base, files)?)),
        };
        let timestamp_roots = certificates(&self.timestamp_roots, base, files)?;
        Ok(Trust { signers, timestamp_roots, accept_legacy: self.accept_legacy })
    }

    fn keyless(&self, base: &Path, files: &mut Files) -> Result<Keyless, TermsError> {
        let identity = wanted(self.identity.as_ref(), self.identity_pattern.as_ref())?;
        let provider = wanted(self.identity_provider.as_ref(), self.identity_provider_pattern.as_ref())?;
        let path = |path: &PathBuf| base.join(path);
        let (root, config) = (self.trusted_root.as_ref().map(path), self.trust_config.as_ref().map(path));
        let instance = match (&root, &config, self.use_staging) {
            (None, None, false) => Instance::PublicGood,
            (None, None, true) => Instance::Staging,
            (Some(path), None, false) => Instance::TrustedRoot(path),
            (None, Some(path), false) => Instance::TrustConfig(path),
            _ => return Err(TermsError::Instance),
        };
        Ok(Keyless::new(&instance, identity, provider, files)?)
    }

    /// The patterns of models.
    pub(crate) fn scope(&self) -> Result<Vec<Wanted>, PatternError> {
        self.models.iter().map(|pattern| Wanted::pattern(pattern)).collect()
    }

    /// Takes keys and certificates in, so that the terms stay what they are when files change; names other files
    /// from the root. Nothing else that is in those files comes along.
    pub fn make_self_contained(&mut self, base: &Path) -> Result<(), TermsError> {
        let files = &mut Files::default();
        let text = |pem: Vec<u8>| Source(String::from_utf8(pem).unwrap_or_default());
        if let Some(key) = &mut self.public_key {
            let (pem, path) = key.pem(base, files)?;
            *key = text(PublicKey::from_pem(&pem, &path)?.to_pem());
        }
        for roots in [&mut self.roots, &mut self.timestamp_roots] {
            let pem =
                |certificate: &X509| certificate.to_pem().expect("a parsed certificate always serializes");
            *roots = certificates(roots, base, files)?.iter().map(pem).map(text).collect();
        }
        for path in self.crls.iter_mut().chain(&mut self.trusted_root).chain(&mut self.trust_config) {
            let absolute = base.join(&path).canonicalize();
            *path = absolute.map_err(|source| KeyError::Read { path: path.clone(), source })?;
        }
        Ok(())
    }

    /// The files that they name.
    pub(crate) fn files(&self, base: &Path) -> Vec<PathBuf> {
        let sources = self.public_key.iter().chain(&self.roots).chain(&self.timestamp_roots);
        let sources = sources.filter(|source| !source.is_pem()).map(|source| base.join(&source.0));
        let paths = self.crls.iter().chain(&self.trusted_root).chain(&self.trust_config);
        sources.chain(paths.map(|path| base.join(path))).collect()
    }
}

fn wanted(name: Option<&String>, pattern: Option<&String>) -> Result<Wanted, TermsError> {
    match (name, pattern) {
        (Some(name), None) => Ok(Wanted::Exactly(name.clone())),
        (None, Some(pattern)) => Ok(Wanted::pattern(pattern)?),
        _ => Err(TermsError::Identity),
    }
}

fn certificates(sources: &[Source], base: &Path, files: &mut Files) -> Result<Vec<X509>, KeyError> {
    let mut all = Vec::new();
    for source in sources {
        let (pem, path) = source.pem(base, files)?;
        all.extend(certificates_from_pem(&pem, &path)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_name_one_signer_and_what_concerns_him() {
        let method = |toml: &str| {
            let terms: Terms = toml::from_str(toml).expect("TOML");
            terms.method().map_err(|error| error.to_string())
        };
        assert_eq!(method("public_key = 'a'"), Ok("key"));
        assert_eq!(method("roots = ['a']\ncrls = ['b']"), Ok("certificate"));
        assert_eq!(method("identity = 'a'\nuse_staging = true"), Ok("sigstore"));
        for (toml, expected) in [
            ("", "exactly one of"),
            ("models = ['x']", "exactly one of"),
            ("public_key = 'a'\nroots = ['b']", "exactly one of"),
            ("public_key = 'a'\nidentity_provider = 'b'", "exactly one of"),
            ("public_key = 'a'\ncrls = ['b']", "a CRL says nothing about signers of the key method"),
            ("identity = 'a'\ntimestamp_roots = ['b']", "a root of time stamps says nothing"),
            ("roots = ['a']\ntrusted_root = 'b'", "a Sigstore instance says nothing"),
        ] {
            assert!(method(toml).expect_err(toml).contains(expected), "{toml}");
        }
        let both: Terms =
            toml::from_str("identity = 'a'\nidentity_pattern = 'b'\nidentity_provider = 'c'").expect("TOML");
        assert!(matches!(both.trust(Path::new("."), &mut Files::default()), Err(TermsError::Identity)));
    }
}
