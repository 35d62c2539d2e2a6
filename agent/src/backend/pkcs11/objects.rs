//! A key on a token: its private object, its public half wherever that is found, and the proof that the two
//! belong together.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

use super::super::{gone, refused};
use super::errors::classify;
use crate::algorithm::{Algorithm, SpkiDer};
use crate::config::ObjectSelector;
use crate::host::wire::{Failure, PublicKey};

/// Finds a key, its public half, and has it sign a random challenge.
pub(super) fn find_key(
    session: &Session,
    wanted: &ObjectSelector,
) -> Result<(ObjectHandle, PublicKey), Failure> {
    let private = find_private(session, wanted)?;
    let attributes = read(
        session,
        private,
        &[
            AttributeType::KeyType,
            AttributeType::Sign,
            AttributeType::AlwaysAuthenticate,
            AttributeType::Id,
            AttributeType::EcParams,
            AttributeType::EcPoint,
        ],
    )?;
    let mut details = Details::default();
    attributes.into_iter().for_each(|attribute| details.take(attribute));
    if details.key_type != Some(KeyType::EC) {
        let found = details.key_type.map_or("unknown".to_owned(), |found| found.to_string());
        let message = format!(
            "the key with {wanted} is of type {found}; OMS signs with ECDSA on P-256, P-384 or P-521: generate an EC key"
        );
        return Err(refused(message));
    }
    if details.sign == Some(false) {
        return Err(refused(format!("the key with {wanted} may not sign: its CKA_SIGN is false")));
    }
    if details.always_authenticate == Some(true) {
        let message =
            format!("the key with {wanted} asks for the PIN at every signature, which is not supported yet");
        return Err(refused(message));
    }
    let mut candidates = public_halves(session, wanted, &details)?;
    if let (Some(params), Some(point)) = (&details.ec_params, &details.ec_point) {
        candidates.push(from_point(params, point));
    }
    let mut reasons = Vec::new();
    for candidate in candidates {
        match candidate {
            Ok(public) => match signs_for(session, private, &public)? {
                true => return Ok((private, public)),
                false => reasons.push("a public half on the token does not belong to it".to_owned()),
            },
            Err(reason) => reasons.push(reason),
        }
    }
    let why = match reasons.as_slice() {
        [] => {
            "no public-key object, EC point or certificate of it is on the token; import one of them".into()
        }
        reasons => reasons.join("; "),
    };
    Err(refused(format!("the key with {wanted} cannot be used: {why}")))
}

/// The one private key that matches. Public objects are never taken for it: a public handle in C_Sign makes
/// some modules fail for good.
pub(super) fn find_private(session: &Session, wanted: &ObjectSelector) -> Result<ObjectHandle, Failure> {
    match find(session, ObjectClass::PRIVATE_KEY, wanted)?.as_slice() {
        [one] => Ok(*one),
        [] => {
            let other_half = [ObjectClass::PUBLIC_KEY, ObjectClass::CERTIFICATE]
                .into_iter()
                .find_map(|class| find(session, class, wanted).ok().filter(|found| !found.is_empty()));
            Err(refused(match other_half {
                Some(_) => format!("the token has a public half with {wanted} but no private key"),
                None => format!("the token has no private key with {wanted}"),
            }))
        }
        found => {
            let count = found.len();
            Err(refused(format!(
                "{count} private keys match {wanted}; tell them apart with object = {{ id = \"…\" }}"
            )))
        }
    }
}

fn find(
    session: &Session,
    class: ObjectClass,
    wanted: &ObjectSelector,
) -> Result<Vec<ObjectHandle>, Failure> {
    let mut template = vec![Attribute::Class(class)];
    template.extend(wanted.label.as_ref().map(|label| Attribute::Label(label.as_bytes().to_vec())));
    template.extend(wanted.id.clone().map(Attribute::Id));
    session.find_objects(&template).map_err(|error| classify("find objects", &error))
}

fn read(session: &Session, object: ObjectHandle, types: &[AttributeType]) -> Result<Vec<Attribute>, Failure> {
    session.get_attributes(object, types).map_err(|error| classify("read attributes", &error))
}

/// What is known of a private key.
#[derive(Default)]
struct Details {
    key_type: Option<KeyType>,
    sign: Option<bool>,
    always_authenticate: Option<bool>,
    id: Option<Vec<u8>>,
    ec_params: Option<Vec<u8>>,
    ec_point: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
}

impl Details {
    fn take(&mut self, attribute: Attribute) {
        match attribute {
            Attribute::KeyType(value) => self.key_type = Some(value),
            Attribute::Sign(value) => self.sign = Some(value),
            Attribute::AlwaysAuthenticate(value) => self.always_authenticate = Some(value),
            Attribute::Id(value) if !value.is_empty() => self.id = Some(value),
            Attribute::EcParams(value) if !value.is_empty() => self.ec_params = Some(value),
            Attribute::EcPoint(value) if !value.is_empty() => self.ec_point = Some(value),
            Attribute::Value(value) if !value.is_empty() => self.value = Some(value),
            _ => {}
        }
    }
}

/// Public halves among the token's public keys and certificates: those with the private key's CKA_ID, or, if
/// it has none, those that match the selector.
fn public_halves(
    session: &Session,
    wanted: &ObjectSelector,
    private: &Details,
) -> Result<Vec<Result<PublicKey, String>>, Failure> {
    let by_id = private.id.clone().map(|id| ObjectSelector { label: None, id: Some(id) });
    let wanted = by_id.as_ref().unwrap_or(wanted);
    let mut found = Vec::new();
    for public in find(session, ObjectClass::PUBLIC_KEY, wanted)? {
        let mut details = Details::default();
        let types = [AttributeType::EcParams, AttributeType::EcPoint];
        read(session, public, &types)?.into_iter().for_each(|attribute| details.take(attribute));
        if let (Some(params), Some(point)) = (details.ec_params, details.ec_point) {
            found.push(from_point(&params, &point));
        }
    }
    for certificate in find(session, ObjectClass::CERTIFICATE, wanted)? {
        let mut details = Details::default();
        read(session, certificate, &[AttributeType::Value])?.into_iter().for_each(|a| details.take(a));
        if let Some(der) = details.value {
            found.push(from_certificate(&der));
        }
    }
    Ok(found)
}

fn from_point(params: &[u8], point: &[u8]) -> Result<PublicKey, String> {
    let algorithm = Algorithm::from_ec_params(params).map_err(|error| error.to_string())?;
    let spki = algorithm.spki_from_point(point).map_err(|error| error.to_string())?;
    Ok(PublicKey { algorithm, spki })
}

fn from_certificate(der: &[u8]) -> Result<PublicKey, String> {
    let certificate =
        Certificate::from_der(der).map_err(|error| format!("its certificate is malformed: {error}"))?;
    let info = certificate.tbs_certificate().subject_public_key_info();
    let spki = SpkiDer(info.to_der().map_err(|error| error.to_string())?);
    let algorithm = Algorithm::from_spki(&spki).map_err(|error| error.to_string())?;
    Ok(PublicKey { algorithm, spki })
}

/// Whether this private object makes signatures that this public key verifies.
fn signs_for(session: &Session, private: ObjectHandle, public: &PublicKey) -> Result<bool, Failure> {
    let mut challenge = vec![0; public.algorithm.digest_len()];
    getrandom::fill(&mut challenge).map_err(|error| gone(format!("no random challenge: {error}")))?;
    let raw = session
        .sign(&Mechanism::Ecdsa, private, &challenge)
        .map_err(|error| classify("sign a challenge", &error))?;
    // A signature of another curve's width is as wrong as one that does not verify.
    let Ok(der) = public.algorithm.der_from_raw(&raw) else { return Ok(false) };
    Ok(public.algorithm.verifies(&public.spki, &challenge, &der).unwrap_or(false))
}
