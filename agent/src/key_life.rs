//! `omsign-agent key …`: an operator's local commands over a key's life. Never over the network, and only while no
//! agent runs: a device belongs to one process. Each is recorded in a file of its own beside the agent's audit log.

use std::time::{Duration, SystemTime};

use der::asn1::{Any, BitString, ObjectIdentifier};
use der::pem::LineEnding;
use der::{Decode as _, Encode as _, EncodePem as _};
use tokio::sync::watch;
use tokio::time::Instant;
use x509_cert::attr::Attributes;
use x509_cert::ext::ToExtension as _;
use x509_cert::ext::pkix::{ExtendedKeyUsage, KeyUsage, KeyUsages};
use x509_cert::name::Name;
use x509_cert::request::{CertReq, CertReqInfo, ExtensionReq, Version};
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

use crate::algorithm::{Algorithm, Curve, KeyType};
use crate::audit::{self, Audit, AuditError, Entry};
use crate::config::{self, Config, PinSource};
use crate::host::wire::{KeySpec, PublicKey};
use crate::identity::Identity;
use crate::policy::allowed;
use crate::replay::Step;
use crate::secret::Pin;
use crate::spki::SpkiDer;
use crate::token::{State, Token, generate as generate_on};

/// How long a signature may take: somebody may have to touch the device.
const SIGN: Duration = Duration::from_secs(60);

/// `id-kp-codeSigning` (RFC 5280, 4.2.1.12).
const CODE_SIGNING: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.3");

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum KeyLifeError {
    /// The name is not in the configuration.
    #[error("there is no [key.{0}] in the configuration; add it first: it says where the key will be")]
    NoKey(String),
    /// Somebody else's agent.
    #[error("no [[operator]] rule lets you do this")]
    NotOperator,
    /// The device is in use.
    #[error("an agent is running and owns the device; stop it first")]
    Running,
    /// The device.
    #[error("{0}")]
    Device(String),
    /// The subject of a request.
    #[error("{0:?} is not a distinguished name; write one like \"CN=Model Release,O=Acme\" (RFC 4514)")]
    Subject(String),
    /// A key that certificate requests cannot be made for.
    #[error("certificate requests for {0} keys are not supported")]
    Algorithm(&'static str),
    /// DER.
    #[error("the certificate request cannot be encoded")]
    Der(#[from] der::Error),
    /// It was not recorded, so nothing is released.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The log cannot be opened.
    #[error("nothing is done without an audit log")]
    Log(#[source] std::io::Error),
}

/// An operator at this machine, and the record of what they do.
pub struct Operator<'a> {
    config: &'a Config,
    identity: Identity,
    rule: &'a str,
    audit: Audit,
}

impl<'a> Operator<'a> {
    /// Whoever runs this process, if the configuration makes them an operator and no agent runs.
    pub fn new(config: &'a Config) -> Result<Self, KeyLifeError> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let identity = Identity::from_unix(uid, gid, None);
        let rule = allowed(&config.operators, &identity).ok_or(KeyLifeError::NotOperator)?;
        let socket = config.listen.unix.as_ref().map(|unix| &unix.path);
        if socket.is_some_and(|path| std::os::unix::net::UnixStream::connect(path).is_ok()) {
            return Err(KeyLifeError::Running);
        }
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        let name = format!("operator-{now}-{}.jsonl", std::process::id());
        let audit = Audit::open(&config.audit, &name).map_err(KeyLifeError::Log)?;
        Ok(Self { config, identity, rule: &rule.name, audit })
    }

    /// Makes the key of this name on the first of its tokens; returns its public half, PEM.
    pub async fn generate(&self, name: &str, key_type: KeyType) -> Result<String, KeyLifeError> {
        let (token, config, spec) = self.key(name)?;
        let pin = asked(token, config)?;
        let made = generate_on(token, config, spec, key_type, pin).await;
        let reason = made.as_ref().err().cloned().unwrap_or_default();
        let algorithm = made.as_ref().ok().map(|public| public.algorithm.name());
        self.record("generate", name, algorithm, &reason).await?;
        pem(&made.map_err(KeyLifeError::Device)?.spki)
    }

    /// A certificate request for code signing (PKCS#10, RFC 2986), signed by the key; PEM.
    pub async fn csr(&self, name: &str, subject: &str) -> Result<String, KeyLifeError> {
        let subject: Name = subject.parse().map_err(|_| KeyLifeError::Subject(subject.to_owned()))?;
        let (token, config, spec) = self.key(name)?;
        let pin = asked(token, config)?;
        let opened = Token::start(token, config.clone(), vec![spec]);
        let made = request(&opened, pin, subject).await;
        opened.stop().await;
        let reason = made.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let algorithm = opened.key(0).and_then(Result::ok).map(|public| public.algorithm.name());
        self.record("csr", name, algorithm, &reason).await?;
        made
    }

    /// A key that is configured, and the first of its tokens.
    fn key(&self, name: &str) -> Result<(&'a str, &'a config::Token, KeySpec), KeyLifeError> {
        let found = self.config.keys.get(name).and_then(|key| {
            let token = key.tokens.first()?;
            Some((token.as_str(), self.config.tokens.get(token)?, key.spec(name)))
        });
        found.ok_or_else(|| KeyLifeError::NoKey(name.to_owned()))
    }

    async fn record(
        &self,
        action: &'static str,
        key: &str,
        algorithm: Option<&str>,
        reason: &str,
    ) -> Result<(), AuditError> {
        let outcome = if reason.is_empty() { "done" } else { "failed" };
        let (time, rule) = (audit::now(), Some(self.rule));
        let entry = Entry {
            time,
            action,
            request_id: "",
            identity: &self.identity,
            rule,
            key,
            token: "",
            algorithm,
            digest: "",
            claimed_context: "",
            outcome,
            reason,
        };
        self.audit.record(&entry).await
    }
}

/// Opens the token, has the key sign the request, and encodes both.
async fn request(token: &Token, pin: Option<Pin>, subject: Name) -> Result<String, KeyLifeError> {
    if let Some(pin) = pin {
        let unlocked = token.unlock(Some(pin), Instant::now() + SIGN).await;
        unlocked.map_err(|error| KeyLifeError::Device(error.to_string()))?;
    }
    while matches!(token.state(), State::Starting) {
        token.watch().await;
    }
    let public = match (token.state(), token.key(0)) {
        (State::Locked(reason) | State::Down(reason), _) | (_, Some(Err(reason))) => {
            return Err(KeyLifeError::Device(reason));
        }
        (_, Some(Ok(public))) => public,
        (_, None) => return Err(KeyLifeError::Device("the device did not say anything about it".into())),
    };
    let info = info(&public, subject)?;
    let content = public.algorithm.content(&info.to_der()?);
    let (tell, mut steps) = watch::channel(Step::Working);
    let touch = async {
        while steps.changed().await.is_ok() {
            if let Step::Touch(message) = &*steps.borrow_and_update() {
                eprintln!("{message}");
            }
        }
        std::future::pending::<()>().await;
    };
    let signed = tokio::select! {
        signed = token.sign(0, &content, &tell, Instant::now() + SIGN) => signed,
        () = touch => return Err(KeyLifeError::Device("it was dropped".into())),
    };
    let signature = signed.map_err(|error| KeyLifeError::Device(error.to_string()))?.signature;
    let algorithm = signature_algorithm(public.algorithm)?;
    let request = CertReq { info, algorithm, signature: BitString::from_bytes(&signature)? };
    Ok(request.to_pem(LineEnding::LF)?)
}

/// `pin = "prompt"`: asked here.
fn asked(token: &str, config: &config::Token) -> Result<Option<Pin>, KeyLifeError> {
    if config.pin != PinSource::Prompt {
        return Ok(None);
    }
    let asked = rpassword::prompt_password(format!("PIN for token {token}: "));
    let asked = asked.map_err(|_| KeyLifeError::Device("it needs a PIN, and there is no terminal".into()))?;
    Ok(Pin::new(asked))
}

/// What is requested: this key, for code signing.
fn info(public: &PublicKey, subject: Name) -> Result<CertReqInfo, KeyLifeError> {
    let usage = KeyUsage(KeyUsages::DigitalSignature.into()).to_extension(&subject, &[])?;
    let extended = ExtendedKeyUsage(vec![CODE_SIGNING]).to_extension(&subject, &[])?;
    let mut attributes = Attributes::new();
    attributes.insert(ExtensionReq(vec![usage, extended]).try_into()?)?;
    let public_key = SubjectPublicKeyInfoOwned::from_der(&public.spki.0)?;
    Ok(CertReqInfo { version: Version::V1, subject, public_key, attributes })
}

/// The identifier that a certificate request carries (RFC 5758, 4055, 8410).
fn signature_algorithm(algorithm: Algorithm) -> Result<AlgorithmIdentifierOwned, KeyLifeError> {
    let (oid, parameters) = match algorithm {
        Algorithm::Ecdsa(Curve::P256) => ("1.2.840.10045.4.3.2", None),
        Algorithm::Ecdsa(Curve::P384) => ("1.2.840.10045.4.3.3", None),
        Algorithm::Ecdsa(Curve::P521) => ("1.2.840.10045.4.3.4", None),
        Algorithm::RsaPkcs1 => ("1.2.840.113549.1.1.11", Some(Any::null())),
        Algorithm::Ed25519 => ("1.3.101.112", None),
        Algorithm::RsaPss => return Err(KeyLifeError::Algorithm("RSA-PSS")),
    };
    Ok(AlgorithmIdentifierOwned { oid: ObjectIdentifier::new_unwrap(oid), parameters })
}

fn pem(spki: &SpkiDer) -> Result<String, KeyLifeError> {
    Ok(SubjectPublicKeyInfoOwned::from_der(&spki.0)?.to_pem(LineEnding::LF)?)
}
