//! Mutual TLS: the certificates by which callers on the network and the agent prove to each other who they are.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

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
    acceptor: RwLock<TlsAcceptor>,
}

impl Tls {
    pub(crate) fn load(config: &TlsListen) -> Result<Self, TlsError> {
        Ok(Self { acceptor: RwLock::new(acceptor(config)?), config: config.clone() })
    }

    /// Whether these are its files.
    pub(crate) fn is_for(&self, config: Option<&TlsListen>) -> bool {
        config == Some(&self.config)
    }

    /// Reads the files anew, for the connections that come from now on.
    pub(crate) fn renew(&self) -> Result<(), TlsError> {
        let acceptor = acceptor(&self.config)?;
        *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = acceptor;
        Ok(())
    }

    /// Who it is at the other end.
    pub(crate) async fn handshake(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Identity)> {
        // Nagle and delayed ACK together cost 40 ms a signature.
        stream.set_nodelay(true)?;
        let acceptor = self.acceptor.read().unwrap_or_else(PoisonError::into_inner).clone();
        let stream = acceptor.accept(stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let identity = certificate.and_then(|der| Identity::from_certificate(der));
        let identity = identity.ok_or_else(|| io::Error::other("the client certificate cannot be read"))?;
        Ok((stream, identity))
    }
}

fn acceptor(config: &TlsListen) -> Result<TlsAcceptor, TlsError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |reason: String| TlsError { path, reason }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&config.client_ca)? {
        roots.add(certificate).map_err(|error| at(&config.client_ca)(error.to_string()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| at(&config.client_ca)(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&config.private_key)
        .map_err(|error| at(&config.private_key)(format!("no private key in PEM: {error}")))?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| at(&config.certificate)(error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&config.certificate)?, key)
        .map_err(|error| at(&config.certificate)(format!("cannot be used with the private key: {error}")))?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed has the certificate that was checked at its start, and nobody would ask whether it still is
    // valid.
    server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason| TlsError { path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> = match CertificateDer::pem_file_iter(path) {
        Ok(found) => found.collect(),
        Err(error) => return Err(fail(format!("no certificates in PEM: {error}"))),
    };
    let found = found.map_err(|error| fail(format!("no certificates in PEM: {error}")))?;
    if found.is_empty() {
        return Err(fail("no certificates in PEM".into()));
    }
    Ok(found)
}
