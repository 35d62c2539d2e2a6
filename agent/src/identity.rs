//! Who is calling: established once per connection, by the kernel or by TLS, never by the caller's word.

use std::fmt;
use std::net::IpAddr;

use nix::unistd::{Gid, Uid, User, getgrouplist};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::der::oid::AssociatedOid as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// Who is calling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// Over the Unix socket: the kernel's peer credentials.
    Unix {
        /// Effective user id.
        uid: u32,
        /// The user's name, if the machine knows one.
        user: Option<String>,
        /// Process id at the time of the connection.
        pid: Option<i32>,
        /// Primary and supplementary groups of the user.
        #[serde(skip)]
        groups: Vec<u32>,
    },
    /// Over mutual TLS: the verified client certificate.
    Certificate {
        /// The subject, as RFC 4514 writes it.
        subject: String,
        /// DNS names of the subjectAltName, lower case.
        dns: Vec<String>,
        /// URIs of the subjectAltName, such as a SPIFFE id.
        uris: Vec<String>,
        /// SHA-256 of the certificate.
        #[serde(serialize_with = "hex::serialize")]
        fingerprint: [u8; 32],
        /// SHA-256 of all names in it: whoever gets a new certificate every hour is the same caller.
        #[serde(skip)]
        names: [u8; 32],
    },
}

/// What tells one caller from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Caller {
    Uid(u32),
    Certificate([u8; 32]),
    /// One who did not get as far as to say who it is.
    Address(IpAddr),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid {uid}"),
            Self::Certificate(names) => write!(f, "certificates with names of sha256 {}", hex::encode(names)),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl Identity {
    /// What tells this caller from others.
    pub(crate) fn caller(&self) -> Caller {
        match self {
            Self::Unix { uid, .. } => Caller::Uid(*uid),
            Self::Certificate { names, .. } => Caller::Certificate(*names),
        }
    }

    /// The identity behind peer credentials. Asks the user database, which may block.
    pub fn from_unix(uid: u32, gid: u32, pid: Option<i32>) -> Self {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let mut groups = vec![gid];
        if let Some(user) = &user
            && let Ok(name) = std::ffi::CString::new(user.name.clone())
            && let Ok(found) = getgrouplist(&name, user.gid)
        {
            groups.extend(found.into_iter().map(Gid::as_raw));
        }
        Self::Unix { uid, user: user.map(|user| user.name), pid, groups }
    }

    /// The identity in a client certificate that TLS has verified. `None` when it cannot be parsed.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let certificate = Certificate::from_der(der).ok()?;
        let tbs = certificate.tbs_certificate();
        let (mut dns, mut uris) = (Vec::new(), Vec::new());
        if let Ok(Some((_, names))) = tbs.get_extension::<SubjectAltName>() {
            for name in names.0 {
                match name {
                    GeneralName::DnsName(name) => dns.push(name.as_str().to_ascii_lowercase()),
                    GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.as_str().to_owned()),
                    _ => {}
                }
            }
        }
        let subject = tbs.subject().to_string();
        let others = tbs.extensions().into_iter().flatten().find(|it| it.extn_id == SubjectAltName::OID);
        let mut names = Sha256::new_with_prefix(&subject);
        if let Some(others) = others {
            // No text has this byte.
            names.update([0xff]);
            names.update(others.extn_value.as_bytes());
        }
        let (fingerprint, names) = (Sha256::digest(der).into(), names.finalize().into());
        Some(Self::Certificate { subject, dns, uris, fingerprint, names })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { uid, user: Some(user), .. } => write!(f, "unix user {user} (uid {uid})"),
            Self::Unix { uid, user: None, .. } => write!(f, "unix uid {uid}"),
            Self::Certificate { subject, fingerprint, .. } => {
                write!(f, "certificate {subject} (sha256 {})", hex::encode(fingerprint))
            }
        }
    }
}
