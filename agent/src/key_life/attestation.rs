//! How a key came to be: what a device says of it, as a file, and what of that another machine can prove.

use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::{X509, X509StoreContext, X509VerifyResult};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

use super::challenge::{self, ChallengeFile, Kept, is_endorsement};
use super::{yubihsm, yubikey};
use crate::backend::tpm_attestation;
use crate::host::task::Evidence;
use crate::public_key::PublicKey;

/// Yubico's roots, older and newer, and what the newer one certifies cards with
/// (developers.yubico.com/PKI, SHA-256 63ece914…07b546 and 62760c6a…586cd5a8).
const YUBICO: [&str; 2] =
    [include_str!("yubico/piv-root.pem"), include_str!("yubico/attestation-root-1.pem")];
const YUBICO_INTERMEDIATES: &str = include_str!("yubico/intermediates.pem");

/// The root of its YubiHSMs, and what that certifies them with
/// (developers.yubico.com/YubiHSM2/Concepts/Attestation.html, SHA-256 094a3ac4…9a392fb7 and d7c6d8f4…dbaf4ae9).
const YUBIHSM: &str = include_str!("yubico/yubihsm-root.pem");
const YUBIHSM_INTERMEDIATE: &str = include_str!("yubico/yubihsm-sub-ca.pem");

/// The only form so far.
const FORM: &str = "omsign-attestation-1";

/// A file about one key.
#[derive(Debug, Serialize, Deserialize)]
pub struct Attestation {
    /// `omsign-attestation-1`
    form: String,
    /// The key's name where it was made.
    key: String,
    /// How it signs.
    algorithm: String,
    /// SubjectPublicKeyInfo, DER.
    #[serde(with = "hex")]
    public_key: Vec<u8>,
    /// What the device says.
    evidence: Evidence,
}

/// What somebody knows who wants proof.
#[derive(Debug, Default)]
pub struct Trust {
    /// Roots instead of Yubico's, and those of TPM makers; PEM.
    pub roots: Option<Vec<u8>>,
    /// The nonce that was asked for.
    pub nonce: Option<Vec<u8>>,
    /// SHA-256 of the TPM's attestation key (TPMT_PUBLIC), from whoever set the machine up.
    pub attestation_key: Option<String>,
    /// The challenge that the TPM was to answer.
    pub challenge: Option<Kept>,
}

/// What is known of a key now.
#[derive(Debug, Default, Serialize)]
pub struct Findings {
    /// SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
    pub public_key_sha256: String,
    /// What is proven.
    pub proven: Vec<String>,
    /// What is said, and not proven. With anything here, the key's origin is not proven.
    pub unproven: Vec<String>,
    /// What is there beside, and proves nothing of the key.
    pub noted: Vec<String>,
}

/// Why a file proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum AttestationError {
    /// It is not one of ours.
    #[error("the file is not an attestation that `omsign-agent key attest` wrote: {0}")]
    Form(String),
    /// Roots that cannot be read.
    #[error("the roots are not PEM certificates: {0}")]
    Roots(openssl::error::ErrorStack),
    /// Not one root, where somebody meant to give some.
    #[error("there is no certificate among the roots")]
    NoRoots,
    /// A proof that does not hold: the file was changed, or the key is another.
    #[error("the attestation does not hold: {0}")]
    Wrong(String),
}

impl Attestation {
    pub(super) fn new(key: &str, public: &PublicKey, evidence: Evidence) -> Self {
        Self {
            form: FORM.to_owned(),
            key: key.to_owned(),
            algorithm: public.algorithm.name().to_owned(),
            public_key: public.spki.0.clone(),
            evidence,
        }
    }

    /// Reads a file.
    pub fn parse(text: &str) -> Result<Self, AttestationError> {
        let parsed: Self =
            serde_json::from_str(text).map_err(|error| AttestationError::Form(error.to_string()))?;
        if parsed.form != FORM {
            return Err(AttestationError::Form(format!("its form is {:?}", parsed.form)));
        }
        Ok(parsed)
    }

    /// A challenge to the TPM whose endorsement certificate the file has: only if it also has the file's attestation key
    /// can it be answered.
    pub fn challenge(&self) -> Result<(ChallengeFile, Kept), AttestationError> {
        match &self.evidence {
            Evidence::Tpm { attestation_key, endorsement_certificate, .. } => {
                challenge::make(attestation_key, endorsement_certificate).map_err(AttestationError::Wrong)
            }
            _ => Err(AttestationError::Wrong(
                "it is not about a key of a TPM, and only those are challenged".into(),
            )),
        }
    }

    /// What of it holds.
    pub fn verify(&self, trust: &Trust) -> Result<Findings, AttestationError> {
        // Whoever knows a TPM's key asks about a TPM: the file does not choose what is checked.
        let about_tpm = trust.attestation_key.is_some() || trust.challenge.is_some();
        if about_tpm && !matches!(self.evidence, Evidence::Tpm { .. }) {
            return Err(AttestationError::Wrong("it is not about a key of a TPM".into()));
        }
        let mut findings = match &self.evidence {
            Evidence::Pkcs11 { attributes, attested_by } => {
                let mut unproven: Vec<_> =
                    attributes.iter().map(|(name, value)| format!("{name} is {value}")).collect();
                unproven.push("PKCS#11 has no proof: the module says so, and this file".to_owned());
                unproven.extend(
                    (!attested_by.is_empty())
                        .then(|| format!("the device itself attests it by {attested_by}")),
                );
                Findings { unproven, ..Findings::default() }
            }
            Evidence::Piv { certificates } => self.piv(certificates, trust)?,
            Evidence::Yubihsm { certificates } => self.yubihsm(certificates, trust)?,
            Evidence::Tpm { .. } => self.tpm(trust)?,
        };
        findings.public_key_sha256 = hex::encode(Sha256::digest(&self.public_key));
        Ok(findings)
    }

    /// The same with certificates that the maker's tools had the device make: the key's, and the device's own.
    pub fn with(mut self, certificates: &[Vec<u8>]) -> Result<Self, AttestationError> {
        let wrong = |what: &str| AttestationError::Wrong(what.to_owned());
        if !matches!(self.evidence, Evidence::Pkcs11 { .. }) {
            return Err(wrong("the device shows its certificates itself; leave --certificates out"));
        }
        let parse = |der: &Vec<u8>| X509::from_der(der).map_err(|_| wrong("a certificate is malformed"));
        let parsed = certificates.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let is_about_key = |one: &&X509| {
            one.public_key().and_then(|key| key.public_key_to_der()).is_ok_and(|key| key == self.public_key)
        };
        let of_key = parsed.iter().find(is_about_key);
        let of_key = of_key.ok_or_else(|| wrong("none of the certificates is about this key"))?;
        let by = parsed.iter().find(|one| one.issued(of_key) == X509VerifyResult::OK);
        let by =
            by.ok_or_else(|| wrong("the certificate of the device that issued the key's is not there"))?;
        let der = |one: &X509| one.to_der().map_err(|error| wrong(&error.to_string()));
        self.evidence = Evidence::Yubihsm { certificates: vec![der(of_key)?, der(by)?] };
        Ok(self)
    }

    /// The certificate about the key, and the device's own, which has to lead to a root and to have signed it.
    fn certified(
        &self,
        certificates: &[Vec<u8>],
        trust: &Trust,
        roots: &str,
        between: &str,
        by_old_card: bool,
    ) -> Result<[Certificate; 2], AttestationError> {
        let wrong = |what: &str| AttestationError::Wrong(what.to_owned());
        let [own, by] = certificates else { return Err(wrong("there have to be two certificates")) };
        let between = X509::stack_from_pem(between.as_bytes()).map_err(AttestationError::Roots)?;
        let device = X509::from_der(by).map_err(|_| wrong("the device's certificate is malformed"))?;
        let leaf = X509::from_der(own).map_err(|_| wrong("the key's certificate is malformed"))?;
        // Older cards' certificates do not say that they are a CA's, so the last step is not the path's.
        path(&device, between, &self.roots(trust, roots)?)?;
        let signed = device.public_key().and_then(|key| leaf.verify(&key));
        if device.issued(&leaf) != X509VerifyResult::OK || !signed.is_ok_and(|signed| signed) {
            return Err(wrong("the device did not sign the key's certificate"));
        }
        if !may_certify(&device, by_old_card) {
            return Err(wrong("the device's certificate is not for signing certificates"));
        }
        let parsed = |der| Certificate::from_der(der).map_err(|_| wrong("a certificate is malformed"));
        let (own, by) = (parsed(own)?, parsed(by)?);
        let certified = own.tbs_certificate().subject_public_key_info().to_der();
        if certified.map_err(|error| wrong(&error.to_string()))? != self.public_key {
            return Err(wrong("the device attests another key"));
        }
        Ok([own, by])
    }

    /// The device certifies its own keys with one that its maker certified. An operator can make others for that, whose
    /// certificates are no CA's.
    fn yubihsm(&self, certificates: &[Vec<u8>], trust: &Trust) -> Result<Findings, AttestationError> {
        let [own, by] = self.certified(certificates, trust, YUBIHSM, YUBIHSM_INTERMEDIATE, false)?;
        let mut findings = yubihsm::findings(&own, &by).map_err(AttestationError::Wrong)?;
        findings.takes_no_nonce(trust);
        Ok(findings)
    }

    /// The card certifies its own keys with the one in slot f9, which its maker certified.
    fn piv(&self, certificates: &[Vec<u8>], trust: &Trust) -> Result<Findings, AttestationError> {
        let [certificate, _] = self.certified(
            certificates,
            trust,
            &YUBICO.concat(),
            YUBICO_INTERMEDIATES,
            trust.roots.is_none(),
        )?;
        let mut findings = yubikey::findings(&certificate).map_err(AttestationError::Wrong)?;
        findings.takes_no_nonce(trust);
        Ok(findings)
    }

    fn tpm(&self, trust: &Trust) -> Result<Findings, AttestationError> {
        let Evidence::Tpm {
            public,
            attestation_key,
            certify_info,
            signature,
            endorsement_certificate,
            answer,
        } = &self.evidence
        else {
            return Ok(Findings::default());
        };
        let proof = tpm_attestation::verify(public, attestation_key, certify_info, signature)
            .map_err(AttestationError::Wrong)?;
        if proof.key.0 != self.public_key {
            return Err(AttestationError::Wrong("the TPM certified another key".into()));
        }
        if trust.nonce.as_ref().is_some_and(|nonce| *nonce != proof.nonce) {
            return Err(AttestationError::Wrong(
                "the nonce is another one: it was made for another request".into(),
            ));
        }
        let mut findings = Findings::default();
        let by = hex::encode(Sha256::digest(attestation_key));
        let wanted =
            trust.attestation_key.as_ref().map(|wanted| wanted.to_ascii_lowercase().replace(':', ""));
        if wanted.as_ref().is_some_and(|wanted| *wanted != by) {
            return Err(AttestationError::Wrong(format!(
                "it was certified by another attestation key: {by}"
            )));
        }
        if let Some(kept) = &trust.challenge {
            kept.answered(attestation_key, endorsement_certificate, answer)
                .map_err(AttestationError::Wrong)?;
        }
        let made = !endorsement_certificate.is_empty() && trust.roots.is_some();
        if made {
            let malformed = |_| AttestationError::Wrong("the endorsement certificate is malformed".into());
            let certificate = X509::from_der(endorsement_certificate).map_err(malformed)?;
            path(&certificate, Vec::new(), &self.roots(trust, "")?)?;
            if !is_endorsement(endorsement_certificate) {
                // What another key reads, anybody may have.
                let message = "its endorsement certificate is one of another purpose, and may be anybody's";
                return Err(AttestationError::Wrong(message.into()));
            }
        }
        // Whoever has a key can say that of another.
        match trust.challenge.is_some() && made || wanted.is_some() {
            true => findings.proven = proof.notes,
            false => {
                findings.noted.extend(proof.notes.iter().map(|note| format!("said by that key: {note}")))
            }
        }
        match (trust.challenge.is_some(), wanted) {
            (true, _) if !made => findings
                .unproven
                .push("whose TPM answered the challenge: give its maker's certificates with --roots".to_owned()),
            (true, _) => findings
                .proven
                .push(format!("certified by attestation key {by}, which is in the TPM that its maker certified")),
            (false, Some(_)) => findings.proven.push(format!("certified by attestation key {by}")),
            (false, None) => findings.unproven.push(format!(
                "that attestation key {by} is a TPM's: challenge it (key challenge), or compare it with the one that the \
                 machine itself shows, then give it with --attestation-key"
            )),
        }
        findings.noted.push(match (endorsement_certificate.is_empty(), made) {
            (true, _) => "there is no endorsement certificate".to_owned(),
            (false, false) => "whose endorsement certificate it is was not checked: --roots".to_owned(),
            (false, true) => "the endorsement certificate is by the TPM's maker".to_owned(),
        });
        Ok(findings)
    }

    fn roots(&self, trust: &Trust, known: &str) -> Result<Vec<X509>, AttestationError> {
        let pem = trust.roots.as_deref().unwrap_or(known.as_bytes());
        let roots = X509::stack_from_pem(pem).map_err(AttestationError::Roots)?;
        if roots.is_empty() { Err(AttestationError::NoRoots) } else { Ok(roots) }
    }
}

impl Findings {
    fn takes_no_nonce(&mut self, trust: &Trust) {
        let asked =
            trust.nonce.as_ref().map(|_| "when this was made: these devices take no nonce".to_owned());
        self.unproven.extend(asked);
    }
}

/// Whether a certificate leads to a root (RFC 5280, 6).
fn path(leaf: &X509, between: Vec<X509>, roots: &[X509]) -> Result<(), AttestationError> {
    let check = || {
        let mut store = X509StoreBuilder::new()?;
        for root in roots {
            store.add_cert(root.clone())?;
        }
        let mut chain = Stack::new()?;
        for certificate in between {
            chain.push(certificate)?;
        }
        let store = store.build();
        X509StoreContext::new()?.init(&store, leaf, &chain, |context| {
            Ok(context.verify_cert()?.then_some(()).ok_or_else(|| context.error().error_string()))
        })
    };
    let outcome: Result<Result<(), &str>, openssl::error::ErrorStack> = check();
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(reason)) => Err(AttestationError::Wrong(format!(
            "its certificates do not lead to a root that is trusted: {reason}; roots are given with --roots"
        ))),
        Err(error) => Err(AttestationError::Wrong(error.to_string())),
    }
}

/// Whether a certificate says that it is a CA's. Those of Yubico's older cards say nothing (firmware 5.2 and before).
fn may_certify(certificate: &X509, by_yubico: bool) -> bool {
    use x509_cert::ext::pkix::BasicConstraints;
    let parsed = certificate.to_der().ok().and_then(|der| Certificate::from_der(&der).ok());
    let constraints = parsed.map(|parsed| parsed.tbs_certificate().get_extension::<BasicConstraints>());
    match constraints {
        Some(Ok(Some((_, constraints)))) => constraints.ca,
        Some(Ok(None)) => by_yubico,
        Some(Err(_)) | None => false,
    }
}
