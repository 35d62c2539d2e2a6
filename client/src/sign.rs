//! Signing, from a model's path to a bundle file.

use std::borrow::Cow;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use omsign_proto::v1::LARGEST_STATEMENT_BYTES;
use openssl::x509::X509;

use crate::Error;
use crate::agent::{Agent, AgentError, Content};
use crate::bundle::{Bundle, KeyIdentifier, Material};
use crate::dsse::Pae;
use crate::hash::Hasher;
use crate::key::{KeyError, PrivateKey, PublicKey};
use crate::manifest::{Manifest, Plan};
use crate::model::ModelError;
use crate::selection::{Selection, check_outputs};
use crate::trust::TrustError;
use crate::{certificate, left_out, path, statement};

/// What to sign and how.
pub struct Request<'a> {
    /// What the signature is of.
    pub subject: Subject<'a>,
    /// The bundle to write.
    pub bundle: &'a Path,
    /// Leaf first. Without one, the key's own chain; without that too, the key method.
    pub certificates: Option<Vec<X509>>,
    /// Whether a key may sign that OMS does not name, so that few verifiers take the bundle.
    pub allow_nonstandard_key: bool,
}

/// What a signature is of.
pub enum Subject<'a> {
    /// A model, which is hashed.
    Model(Selection<'a>, &'a Hasher),
    /// A model that was hashed before, and its size in bytes, where that is known.
    Manifest(Manifest, Option<u64>),
}

/// What signs.
pub enum Signer<'a> {
    /// A key of an agent.
    Agent {
        /// The line to it.
        agent: &'a Agent,
        /// The key's name.
        key: &'a str,
        /// Told what is waited for.
        waiting: &'a dyn Fn(&str),
        /// How long to ask again while it, or its token, is away.
        patience: Duration,
    },
    /// A private key from a file.
    File(&'a PrivateKey),
}

/// What was signed.
#[derive(Debug)]
pub struct Signed {
    /// Files in the manifest.
    pub files: usize,
    /// Their size in bytes, where it is known.
    pub bytes: Option<u64>,
    /// What the model is called.
    pub model_name: String,
    /// The manifest's root digest.
    pub root_digest: String,
    /// The key.
    pub public_key: PublicKey,
    /// "key" or "certificate".
    pub method: &'static str,
    /// Files that are not: empty ones, of which there are no shards.
    pub unsigned_files: usize,
    /// What the model was called whose bundle was there before.
    pub replaced: Option<String>,
}

/// A longer bundle is not read to say whose it was.
const LARGEST_REPLACED_BYTES: u64 = 4 << 20;

/// Signs a model and writes the bundle. On failure nothing is written.
pub fn sign(request: &Request<'_>, signer: &Signer<'_>) -> Result<Signed, Error> {
    // What can fail without reading a single model byte fails first.
    Bundle::may_replace(request.bundle)?;
    if let Subject::Model(Selection { model, .. }, _) = request.subject
        && is_same_file(model, request.bundle)
    {
        let (path, reason) = (request.bundle.to_owned(), "is the model's own");
        return Err(ModelError::Bundle { path, reason }.into());
    }
    let before = Bundle::read(request.bundle, LARGEST_REPLACED_BYTES).ok();
    let replaced = before.and_then(|before| statement::claimed_model_name(&before.payload));
    let (public_key, needs_statement, own_chain) = match signer {
        Signer::Agent { agent, key, .. } => {
            let key = agent.ready_key(key)?;
            let chain: Result<Vec<_>, _> =
                key.certificate_chain.iter().map(|der| X509::from_der(der)).collect();
            let chain = chain.map_err(|_| AgentError::Answer("with a malformed certificate".into()))?;
            (PublicKey::from_spki(&key.public_key)?, key.needs_statement, chain)
        }
        Signer::File(key) => (key.public.clone(), false, Vec::new()),
    };
    if !public_key.algorithm.is_standard() && !request.allow_nonstandard_key {
        return Err(KeyError::Nonstandard(public_key.algorithm.name()).into());
    }
    let mut chain = request.certificates.clone().unwrap_or(own_chain);
    // A self-signed certificate is often given as its own issuer.
    chain.dedup_by(|next, certificate| next.to_der().ok() == certificate.to_der().ok());
    check_chain(&chain, &public_key)?;

    // Of many files, what is known of the model is as large as the manifest, and that as its statement: each goes when
    // the next one is made.
    let (manifest, bytes, unsigned_files) = match &request.subject {
        Subject::Model(selection, hasher) => {
            let serialization = selection.serialization()?;
            let model = selection.walk(&serialization)?;
            if selection.allow_symlinks {
                left_out::check_one_name(&model, selection.model, request.bundle)?;
            }
            let plan = Plan::new(&model, serialization.clone(), hasher)?;
            check_outputs(&plan)?;
            // Hashing may take hours.
            if needs_statement && plan.statement_bytes() > LARGEST_STATEMENT_BYTES {
                return Err(AgentError::Statement.into());
            }
            let digests = plan.hash(hasher)?;
            plan.check_unchanged(&serialization.walk(selection.model)?, hasher)?;
            (Cow::Owned(plan.manifest(digests)), Some(plan.bytes()), plan.unsigned_files())
        }
        Subject::Manifest(manifest, bytes) => (Cow::Borrowed(manifest), *bytes, 0),
    };
    let (payload, files) = (statement::encode(&manifest), manifest.files());
    let (root_digest, model_name) = (manifest.root_digest().to_string(), manifest.model_name.clone());
    drop(manifest);
    let pae = Pae::of(&payload);
    let signature = match signer {
        Signer::Agent { agent, key, waiting, patience } => {
            let content = match public_key.algorithm.digest(&pae) {
                Some(digest) if !needs_statement => Content::Digest(digest),
                _ if payload.len() > LARGEST_STATEMENT_BYTES => return Err(AgentError::Statement.into()),
                _ => Content::Statement(payload.clone()),
            };
            agent.sign(key, content, &format!("{model_name}: {files} files"), *patience, waiting)?
        }
        Signer::File(key) => key.sign(&pae)?,
    };
    // Nothing is written that we could not verify ourselves.
    if !public_key.verifies(&pae, &signature) {
        return Err(TrustError::Signature.into());
    }
    let (material, method) = if chain.is_empty() {
        (Material::PublicKey(KeyIdentifier::Hint(public_key.hint())), "key")
    } else {
        let der: Result<Vec<_>, _> = chain.iter().map(|certificate| certificate.to_der()).collect();
        (Material::CertificateChain(der.map_err(TrustError::OpenSsl)?), "certificate")
    };
    let bundle = Bundle { material, timestamps: Vec::new(), idle_log_entries: false, payload, signature };
    bundle.write(request.bundle)?;
    Ok(Signed { files, bytes, root_digest, model_name, public_key, method, unsigned_files, replaced })
}

/// Whether both are one file that is there.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
    identity(one).is_some_and(|found| identity(other) == Some(found))
}

/// A chain that no verifier would accept is refused before anything is signed with it.
fn check_chain(chain: &[X509], key: &PublicKey) -> Result<(), Error> {
    let Some(leaf) = chain.first() else { return Ok(()) };
    let certified = PublicKey::of_certificate(leaf).map_err(TrustError::LeafKey)?;
    if !certified.same_as(key) {
        return Err(KeyError::Certificate.into());
    }
    certificate::check_usage(leaf).map_err(TrustError::Usage)?;
    Ok(path::check_order(chain, Timestamp::now()).map_err(KeyError::Chain)?)
}
