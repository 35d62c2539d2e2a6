//! Where an agent is found: the address, what TLS takes, and where one is that nobody named.

use std::path::{Path, PathBuf};

use crate::agent::AgentError;

/// Where an agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// `https://host:port`, mutual TLS.
    Tls {
        /// The URL.
        url: String,
        /// Our certificate, our key, and the CA of the agent's certificate, PEM.
        credentials: TlsFiles,
    },
}

/// Files for mutual TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// CA of the agent's certificate.
    pub ca: PathBuf,
    /// Our certificate, leaf first.
    pub certificate: PathBuf,
    /// Our private key.
    pub private_key: PathBuf,
}

impl Address {
    /// From `--agent`, `OMSIGN_AGENT`, or the default.
    pub fn parse(text: Option<&str>, credentials: TlsFiles) -> Result<Self, AgentError> {
        match text {
            None => Ok(Self::Unix(default_socket())),
            Some(url) if url.starts_with("https://") => {
                let TlsFiles { ca, certificate, private_key } = &credentials;
                if [ca, certificate, private_key].iter().any(|path| path.as_os_str().is_empty()) {
                    return Err(AgentError::Credentials);
                }
                Ok(Self::Tls { url: url.to_owned(), credentials })
            }
            Some(path) => match path.strip_prefix("unix:").unwrap_or(path) {
                path if path.contains("://") || path.is_empty() || is_host_and_port(path) => {
                    Err(AgentError::Address(path.to_owned()))
                }
                path => Ok(Self::Unix(PathBuf::from(path))),
            },
        }
    }
}

/// `host:7443`: an https address that lacks its start. A path with a colon in it has a slash too, or is there.
fn is_host_and_port(text: &str) -> bool {
    let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>().is_ok());
    port == Some(true) && !text.contains('/') && !Path::new(text).exists()
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tls { url, .. } => f.write_str(url),
        }
    }
}

/// The socket of an agent of the same user, or of the system: the same rule as the agent's.
fn default_socket() -> PathBuf {
    let directory = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // One that is relative, or empty, is none (XDG Base Directory Specification).
    let own = directory.filter(|path| path.is_absolute()).map(|path| path.join("omsign/agent.sock"));
    let system = PathBuf::from("/run/omsign/agent.sock");
    // A user's own agent comes first; without one, the machine's may let them in.
    own.filter(|path| !rustix::process::geteuid().is_root() && (path.exists() || !system.exists()))
        .unwrap_or(system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let file = || PathBuf::from("x.pem");
        let files = || TlsFiles { ca: file(), certificate: file(), private_key: file() };
        let parse = |text| Address::parse(Some(text), files());
        assert_eq!(parse("/run/x.sock").expect("a path"), Address::Unix("/run/x.sock".into()));
        assert_eq!(parse("unix:/run/x.sock").expect("a path"), Address::Unix("/run/x.sock".into()));
        assert!(matches!(parse("https://h:1"), Ok(Address::Tls { .. })));
        assert!(matches!(parse("http://h:1"), Err(AgentError::Address(_))));
        assert!(matches!(parse("signer.example:7443"), Err(AgentError::Address(_))));
        let without = Address::parse(Some("https://h:1"), TlsFiles { ca: PathBuf::new(), ..files() });
        assert!(matches!(without, Err(AgentError::Credentials)));
    }
}
