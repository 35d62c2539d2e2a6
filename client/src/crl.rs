//! What issuers revoked (RFC 5280, 5).

use std::io::Write as _;
use std::path::Path;

use cms::cert::x509::der::asn1::{AnyRef, ObjectIdentifier};
use cms::cert::x509::der::{self, Decode as _, Reader as _, SliceReader, Tagged as _};
use cms::cert::x509::spki::AlgorithmIdentifierOwned;
use openssl::asn1::Asn1Time;
use openssl::x509::{X509, X509Crl};
use tempfile::NamedTempFile;

use crate::certificate;
use crate::key::{KeyError, read};
use crate::path::PathError;
use crate::strength::{is_strong_signature, skip_rest};

const DELTA: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.27");

/// Lists of what issuers revoked.
#[derive(Default)]
pub struct Crls(Vec<Crl>);

struct Crl {
    list: X509Crl,
    pem: Vec<u8>,
}

/// A CertificateList's signature algorithm, and which extensions it has. (x509-cert 0.2 takes version 2 only.)
fn parse(der: &[u8]) -> der::Result<(AlgorithmIdentifierOwned, Vec<ObjectIdentifier>)> {
    SliceReader::new(der)?.sequence(|list| {
        let mut extensions = Vec::new();
        list.sequence(|fields| {
            while !fields.is_finished() {
                let field = AnyRef::decode(fields)?;
                if field.tag().is_context_specific() {
                    SliceReader::new(field.value())?.sequence(|list| {
                        while !list.is_finished() {
                            extensions.push(list.sequence(|extension| {
                                let id = ObjectIdentifier::decode(extension)?;
                                skip_rest(extension)?;
                                Ok(id)
                            })?);
                        }
                        Ok(())
                    })?;
                }
            }
            Ok(())
        })?;
        let algorithm = AlgorithmIdentifierOwned::decode(list)?;
        skip_rest(list)?;
        Ok((algorithm, extensions))
    })
}

impl Crls {
    /// Adds the lists of a file, PEM or DER.
    pub fn read(&mut self, path: &Path) -> Result<(), KeyError> {
        const END: &str = "-----END X509 CRL-----";
        let bytes = read(path)?;
        let content = |what| KeyError::Content { path: path.to_owned(), what, instead: None };
        let lists = match X509Crl::from_der(&bytes) {
            // What comes after it would be passed over: a newer list, say.
            Ok(list) if list.to_der().is_ok_and(|der| der == bytes) => vec![list],
            _ => {
                let text = std::str::from_utf8(&bytes).map_err(|_| content("a CRL"))?;
                let blocks = text.split_inclusive(END).filter(|block| block.contains(END));
                let lists = blocks.map(|block| X509Crl::from_pem(block.as_bytes()));
                let lists: Vec<_> = lists.collect::<Result<_, _>>().map_err(|_| content("a CRL"))?;
                // Likewise one that is cut off, or has another label.
                let begun =
                    text.lines().filter(|line| line.starts_with("-----BEGIN") && line.contains("CRL"));
                if !lists.is_empty() && begun.count() != lists.len() {
                    return Err(content("only whole CRLs"));
                }
                lists
            }
        };
        if lists.is_empty() {
            return Err(content("a CRL"));
        }
        for list in lists {
            let parsed = list.to_der().ok().and_then(|der| parse(&der).ok());
            let (algorithm, extensions) = parsed.ok_or_else(|| content("a CRL"))?;
            // It says what changed since another one; OpenSSL would take it for all that is revoked.
            if extensions.contains(&DELTA) {
                return Err(content("a complete CRL, but a delta CRL (RFC 5280, 5.2.4),"));
            }
            if !is_strong_signature(&algorithm) {
                return Err(content("a CRL that is signed with SHA-256 or better"));
            }
            let pem = list.to_pem().map_err(|_| content("a CRL"))?;
            self.0.push(Crl { list, pem });
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of a certificate's issuer that are of now, each in a file: OpenSSL takes CRLs from files only, and of several at
    /// once it takes one. None where its issuer says nothing; an error where what it says is over, for it may miss what was
    /// revoked since.
    pub(crate) fn about(&self, certificate: &X509) -> Result<Vec<NamedTempFile>, PathError> {
        let now = Asn1Time::days_from_now(0)?;
        let (mut current, mut old) = (Vec::new(), None);
        for Crl { list, pem } in &self.0 {
            if !list.issuer_name().try_cmp(certificate.issuer_name())?.is_eq() {
                continue;
            }
            // RFC 5280, 5.1.2.5: there is always a next one.
            if list.last_update() <= &*now && list.next_update().is_some_and(|next| next >= &*now) {
                let mut file = NamedTempFile::new().map_err(PathError::Handed)?;
                file.write_all(pem).map_err(PathError::Handed)?;
                current.push(file);
            } else {
                old = Some(list);
            }
        }
        match old {
            Some(list) if current.is_empty() => {
                let until = list.next_update().map_or_else(|| "no date".to_owned(), ToString::to_string);
                let issuer = certificate::name(list.issuer_name());
                Err(PathError::OldCrl { issuer, from: list.last_update().to_string(), until })
            }
            _ => Ok(current),
        }
    }
}
