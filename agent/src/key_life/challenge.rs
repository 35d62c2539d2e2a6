//! What only one TPM can read, for whoever wants to know that an attestation key is in it: two files, one to send and one
//! to keep.

use serde::{Deserialize, Serialize};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, ExtendedKeyUsage, SubjectAltName};
use zeroize::ZeroizeOnDrop;

use crate::backend::tpm_credential;
use crate::host::task::Challenge;

/// The only forms so far.
const FORM: &str = "omsign-challenge-1";
const KEPT: &str = "omsign-challenge-secret-1";

/// tcg-kp-EKCertificate, and tcg-at-tpmManufacturer (TCG EK Credential Profile, 3.2.15 and 3.2.9).
const ENDORSEMENT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.8.1");
const MANUFACTURER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.2.1");

/// A file to send.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChallengeFile {
    /// `omsign-challenge-1`
    form: String,
    #[serde(flatten)]
    challenge: Challenge,
}

/// A file to keep: what is to be read, and by which keys.
#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
pub struct Kept {
    /// `omsign-challenge-secret-1`
    form: String,
    #[serde(with = "hex")]
    secret: [u8; 32],
    /// TPMT_PUBLIC.
    #[zeroize(skip)]
    #[serde(with = "hex")]
    attestation_key: Vec<u8>,
    /// DER.
    #[zeroize(skip)]
    #[serde(with = "hex")]
    endorsement_certificate: Vec<u8>,
}

/// It is not one of ours.
#[derive(Debug, thiserror::Error)]
#[error("the file is not one that `omsign-agent key challenge` wrote: {0}")]
pub struct ChallengeError(String);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept(…)")
    }
}

/// Both, for a TPM that is said to have these keys.
pub(super) fn make(
    attestation_key: &[u8],
    endorsement_certificate: &[u8],
) -> Result<(ChallengeFile, Kept), String> {
    if endorsement_certificate.is_empty() {
        return Err("its TPM has no endorsement certificate".into());
    }
    let mut kept = Kept {
        form: KEPT.to_owned(),
        secret: [0; 32],
        attestation_key: attestation_key.to_vec(),
        endorsement_certificate: endorsement_certificate.to_vec(),
    };
    getrandom::fill(&mut kept.secret).map_err(|error| format!("there is no randomness: {error}"))?;
    let challenge = tpm_credential::make(endorsement_certificate, attestation_key, &kept.secret)?;
    Ok((ChallengeFile { form: FORM.to_owned(), challenge }, kept))
}

impl ChallengeFile {
    /// Reads a file.
    pub fn parse(text: &str) -> Result<Challenge, ChallengeError> {
        let parsed: Self = serde_json::from_str(text).map_err(|error| ChallengeError(error.to_string()))?;
        match parsed.form == FORM {
            true => Ok(parsed.challenge),
            false => Err(ChallengeError("its form is another".to_owned())),
        }
    }
}

impl Kept {
    /// Reads a file. The error says nothing of what is in it.
    pub fn parse(text: &str) -> Result<Self, ChallengeError> {
        match serde_json::from_str::<Self>(text) {
            Ok(parsed) if parsed.form == KEPT => Ok(parsed),
            _ => Err(ChallengeError("it is not what was kept with --secret".to_owned())),
        }
    }

    /// Whether it was read, by the keys that it was made for.
    pub(super) fn answered(
        &self,
        attestation_key: &[u8],
        certificate: &[u8],
        answer: &[u8],
    ) -> Result<(), String> {
        if self.attestation_key != attestation_key || self.endorsement_certificate != certificate {
            return Err("the challenge was made for other keys than these".into());
        }
        if answer.is_empty() {
            return Err(
                "it answers no challenge; ask for `omsign-agent key attest NAME --challenge FILE`".into()
            );
        }
        if self.secret != answer {
            return Err("the answer to the challenge is wrong".into());
        }
        Ok(())
    }
}

/// Whether a certificate, DER, says that its key is a TPM's for endorsement: one that only reads what names a key of that
/// TPM. Any other key's owner could read a challenge.
pub(super) fn is_endorsement(certificate: &[u8]) -> bool {
    let Ok(certificate) = Certificate::from_der(certificate) else { return false };
    let tbs = certificate.tbs_certificate();
    if !matches!(
        tbs.get_extension::<BasicConstraints>(),
        Ok(None | Some((_, BasicConstraints { ca: false, .. })))
    ) {
        return false;
    }
    match tbs.get_extension::<ExtendedKeyUsage>() {
        Ok(Some((_, usage))) => usage.0.contains(&ENDORSEMENT),
        // Older ones only name the TPM's maker.
        Ok(None) => {
            let Ok(Some((_, names))) = tbs.get_extension::<SubjectAltName>() else { return false };
            let made = |name: &GeneralName| match name {
                GeneralName::DirectoryName(name) => name.iter().any(|part| part.oid == MANUFACTURER),
                _ => false,
            };
            names.0.iter().any(made)
        }
        Err(_) => false,
    }
}
