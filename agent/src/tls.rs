//! Mutual TLS: the certificates by which callers on the network and the agent prove to each other who they are.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_cert::Certificate;
use x509_cert::certificate::Version;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};

use crate::config::TlsListen;
use crate::identity::Identity;

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct TlsError {
    /// The file.
    path: PathBuf,
    /// What is wrong with it.
    reason: String,
}

/// What the files of `[listen] tls` say. They are renewed while the agent runs.
pub(crate) struct Tls {
    config: TlsListen,
    files: watch::Sender<Files>,
}

/// What they said when they were read.
pub(crate) struct Files {
    acceptor: TlsAcceptor,
    verifier: Arc<dyn ClientCertVerifier>,
}

/// What a caller proved when the connection began. It may not hold for ever.
pub(crate) struct Proof {
    /// Changed when they are renewed.
    files: watch::Receiver<Files>,
    certificates: Vec<CertificateDer<'static>>,
    until: SystemTime,
}

impl Proof {
    /// Whether the caller's certificate has not expired, and still is of those that the agent trusts.
    pub(crate) fn holds(&mut self) -> bool {
        if self.files.has_changed().unwrap_or(false) {
            let verifier = Arc::clone(&self.files.borrow_and_update().verifier);
            let trusted = self.certificates.split_first().is_some_and(|(own, issuers)| {
                verifier.verify_client_cert(own, issuers, UnixTime::now()).is_ok()
            });
            if !trusted {
                self.until = SystemTime::UNIX_EPOCH;
            }
        }
        SystemTime::now() < self.until
    }
}

impl Tls {
    pub(crate) fn load(config: &TlsListen) -> Result<Self, TlsError> {
        Ok(Self { files: watch::Sender::new(files(config)?), config: config.clone() })
    }

    /// Whether these are its files.
    pub(crate) fn is_for(&self, config: Option<&TlsListen>) -> bool {
        config == Some(&self.config)
    }

    /// Reads the files anew.
    pub(crate) fn read(&self) -> Result<Files, TlsError> {
        files(&self.config)
    }

    /// Says in the log what is wrong with our own certificate, if anything is.
    pub(crate) fn warn(&self) {
        let own = certificates_in(&self.config.certificate).unwrap_or_default();
        if let Some(reason) = own.first().and_then(|leaf| unusable(leaf)) {
            tracing::warn!(certificate = %self.config.certificate.display(), "{reason}");
        }
    }

    /// Connections that come from now on go by these, and those that are open end where they would not begin any more.
    pub(crate) fn renew(&self, files: Files) {
        self.files.send_replace(files);
    }

    /// Who it is at the other end.
    pub(crate) async fn handshake(
        self: Arc<Self>,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Identity, Proof)> {
        // Nagle and delayed ACK together cost 40 ms a signature.
        stream.set_nodelay(true)?;
        // If they are renewed from here on, it is looked at once more.
        let mut files = self.files.subscribe();
        let acceptor = files.borrow_and_update().acceptor.clone();
        let stream = acceptor.accept(stream).await?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        let read =
            certificates.first().and_then(|der| Some((Identity::from_certificate(der)?, expiry(der)?)));
        let (identity, until) =
            read.ok_or_else(|| io::Error::other("the client certificate cannot be read"))?;
        Ok((stream, identity, Proof { files, certificates, until }))
    }
}

fn expiry(der: &[u8]) -> Option<SystemTime> {
    Some(Certificate::from_der(der).ok()?.tbs_certificate().validity().not_after.to_system_time())
}

fn files(config: &TlsListen) -> Result<Files, TlsError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |reason: String| TlsError { path, reason }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in certificates_in(&config.client_ca)? {
        roots.add(certificate).map_err(|error| at(&config.client_ca)(error.to_string()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| at(&config.client_ca)(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&config.private_key)
        .map_err(|error| at(&config.private_key)(format!("no private key in PEM: {error}")))?;
    let own = certificates_in(&config.certificate)?;
    let unusable = own.first().and_then(|leaf| unusable(leaf));
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| at(&config.certificate)(error.to_string()))?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(own, key)
        .map_err(|error| {
            let why = || format!("cannot be used with the private key: {error}");
            at(&config.certificate)(unusable.map_or_else(why, str::to_owned))
        })?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed has the certificate that was checked at its start, and nobody would ask whether it still is
    // valid.
    server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(Files { acceptor: TlsAcceptor::from(Arc::new(server)), verifier })
}

/// The certificates in a file, at least one.
pub(crate) fn certificates_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason| TlsError { path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found = found.map_err(|error| fail(format!("no certificates in PEM: {error}")))?;
    if found.is_empty() {
        return Err(fail("no certificates in PEM".into()));
    }
    Ok(found)
}

/// Why omsign does not take an agent's certificate, whoever issued it; other clients may.
pub(crate) fn unusable(leaf: &[u8]) -> Option<&'static str> {
    let leaf = Certificate::from_der(leaf).ok()?;
    let tbs = leaf.tbs_certificate();
    if tbs.version() != Version::V3 {
        return Some("it is of X.509 version 1, which omsign does not take; have one issued with extensions");
    }
    if tbs.get_extension::<BasicConstraints>().ok()?.is_some_and(|(_, constraints)| constraints.ca) {
        return Some(
            "it is a CA's own (CA:TRUE), which omsign does not take; have one issued for this agent",
        );
    }
    if tbs.get_extension::<SubjectAltName>().ok()?.is_none() {
        return Some(
            "it has no subjectAltName, in which clients look for the name or address they connect to",
        );
    }
    None
}
