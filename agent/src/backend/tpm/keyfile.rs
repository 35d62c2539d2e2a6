//! Wrapped keys in files: `TSS2 PRIVATE KEY` in PEM, as tpm2-openssl and others write them. Nobody but the TPM
//! that made a key can use its file.

use std::path::Path;

use der::asn1::{Any, ObjectIdentifier, OctetString};
use der::{Decode as _, Encode as _, Sequence, Tag, Tagged as _, pem};
use tss_esapi::structures::{Private, Public};
use tss_esapi::traits::{Marshall as _, UnMarshall as _};

use super::super::refused;
use super::keys::OWNER;
use crate::host::wire::Failure;

/// `id-loadablekey`: TPM2_Load takes it below its parent.
const LOADABLE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.23.133.10.1.3");

const LABEL: &str = "TSS2 PRIVATE KEY";

/// `TPMKey` (the ASN.1 specification for TPM 2.0 key files, section 3.1).
#[derive(Sequence)]
struct TpmKey {
    kind: ObjectIdentifier,
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT", optional = "true")]
    empty_auth: Option<Any>,
    #[asn1(context_specific = "1", tag_mode = "EXPLICIT", optional = "true")]
    policy: Option<Any>,
    #[asn1(context_specific = "2", tag_mode = "EXPLICIT", optional = "true")]
    secret: Option<OctetString>,
    #[asn1(context_specific = "3", tag_mode = "EXPLICIT", optional = "true")]
    auth_policy: Option<Any>,
    #[asn1(context_specific = "4", tag_mode = "EXPLICIT", optional = "true")]
    description: Option<Any>,
    #[asn1(context_specific = "5", tag_mode = "EXPLICIT", optional = "true")]
    rsa_parent: Option<Any>,
    parent: u32,
    public: OctetString,
    private: OctetString,
}

/// A key to load.
pub(super) struct KeyFile {
    /// A hierarchy, whose primary key is the parent, or a persistent handle.
    pub(super) parent: u32,
    /// Whether it asks for an authorization value.
    pub(super) has_auth: bool,
    pub(super) public: Public,
    pub(super) private: Private,
}

impl KeyFile {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let wrong = |what: &str| refused(format!("the key file {shown} {what}"));
        let text = std::fs::read(path).map_err(|error| refused(format!("the key file {shown}: {error}")))?;
        let (label, der) = pem::decode_vec(&text).map_err(|_| wrong("is not PEM"))?;
        if label != LABEL {
            return Err(wrong(&format!("holds a {label}, not a {LABEL}")));
        }
        let key = TpmKey::from_der(&der).map_err(|error| wrong(&format!("is malformed: {error}")))?;
        if key.kind != LOADABLE || key.secret.is_some() {
            return Err(wrong("is for import or a sealed secret, not a loadable key"));
        }
        if key.policy.is_some() || key.auth_policy.is_some() {
            return Err(wrong("describes a policy of its own, which omsign does not follow"));
        }
        if key.rsa_parent.as_ref().is_some_and(is_true) {
            return Err(wrong("has an RSA parent, which is not supported yet"));
        }
        // Both are sized buffers: TPM2B_PUBLIC and TPM2B_PRIVATE (TPM 2.0 Part 2, 12.2.5 and 12.3.7).
        let public = sized(key.public.as_bytes()).and_then(|bytes| Public::unmarshall(bytes).ok());
        let private = sized(key.private.as_bytes()).and_then(|bytes| Private::try_from(bytes.to_vec()).ok());
        let (public, private) = public.zip(private).ok_or_else(|| wrong("holds no TPM 2.0 key"))?;
        Ok(Self {
            parent: key.parent,
            has_auth: !key.empty_auth.as_ref().is_some_and(is_true),
            public,
            private,
        })
    }
}

/// tpm2-openssl writes TRUE as BER may: any byte but zero.
fn is_true(boolean: &Any) -> bool {
    boolean.tag() == Tag::Boolean && boolean.value().iter().any(|byte| *byte != 0)
}

/// A new file, PEM, for a key below the owner hierarchy's storage primary.
pub(super) fn encode(public: &Public, private: &Private, has_auth: bool) -> Result<String, Failure> {
    let failed = |what: String| refused(format!("the key file cannot be encoded: {what}"));
    let public = public.marshall().map_err(|error| failed(error.to_string()))?;
    // FALSE is written, too: tpm2-openssl takes a file that does not say for one without a value.
    let boolean = |set: bool| Any::new(Tag::Boolean, [if set { 0xff } else { 0 }]);
    let buffer = |bytes: &[u8]| {
        let size = u16::try_from(bytes.len()).map_err(|error| failed(error.to_string()))?;
        let sized = [&size.to_be_bytes()[..], bytes].concat();
        OctetString::new(sized).map_err(|error| failed(error.to_string()))
    };
    let key = TpmKey {
        kind: LOADABLE,
        empty_auth: Some(boolean(!has_auth).map_err(|error| failed(error.to_string()))?),
        policy: None,
        secret: None,
        auth_policy: None,
        description: None,
        rsa_parent: None,
        parent: OWNER,
        public: buffer(&public)?,
        private: buffer(private.value())?,
    };
    let der = key.to_der().map_err(|error| failed(error.to_string()))?;
    pem::encode_string(LABEL, pem::LineEnding::LF, &der).map_err(|error| failed(error.to_string()))
}

/// What a TPM2B holds, whose size comes first, in 16 bits.
fn sized(bytes: &[u8]) -> Option<&[u8]> {
    let (size, rest) = bytes.split_first_chunk()?;
    (usize::from(u16::from_be_bytes(*size)) == rest.len()).then_some(rest)
}
