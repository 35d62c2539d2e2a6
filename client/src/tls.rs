//! The network's half of the way to an agent: certificates that both ends show, and what is said when one is not taken.

use std::error::Error;
use std::io;
use std::path::Path;

use rustls::CertificateError;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use zeroize::Zeroizing;

use crate::address::TlsFiles;
use crate::agent::AgentError;

/// What the files say, each checked to be what it is named as.
pub(crate) fn config(files: &TlsFiles) -> Result<ClientTlsConfig, AgentError> {
    let read = |path: &Path, what: &str, label: &str| {
        let unusable = |reason: String| AgentError::Tls { path: path.to_owned(), reason };
        let pem = Zeroizing::new(std::fs::read(path).map_err(|error| unusable(error.to_string()))?);
        let holds = pem.windows(label.len()).any(|window| window == label.as_bytes());
        if holds { Ok(pem) } else { Err(unusable(format!("it holds no {what} in PEM"))) }
    };
    let certificate = read(&files.certificate, "certificate", "-----BEGIN CERTIFICATE-----")?;
    let private_key = read(&files.private_key, "private key", "PRIVATE KEY-----")?;
    let ca = read(&files.ca, "certificate", "-----BEGIN CERTIFICATE-----")?;
    let identity = Identity::from_pem(certificate, private_key);
    Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).identity(identity))
}

/// Why the agent's certificate is not taken, if it is for that that there is no connection.
pub(crate) fn untrusted(error: &(dyn Error + 'static), files: &TlsFiles) -> Option<String> {
    let rustls::Error::InvalidCertificate(why) = of_tls(error)? else { return None };
    Some(match why {
        CertificateError::UnknownIssuer => {
            format!("it was not issued by a CA of {}", files.ca.display())
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".into(),
        why => why.to_string(),
    })
}

/// What TLS says, wherever in an error it is.
fn of_tls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // An error of the system's kind shows the cause of its cause only.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
