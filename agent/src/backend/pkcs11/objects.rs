//! A key on a token: its private object, its public half wherever that is found, and the proof that the two
//! belong together.

use cryptoki::object::{
    Attribute, AttributeType, KeyType, MlDsaParameterSetType, ObjectClass, ObjectHandle, ParameterSetType,
};
use cryptoki::session::Session;

use super::super::{Notify, challenge, refused};
use super::errors::{classify, is_in_one_call_only};
use super::ways::Ways;
use crate::algorithm::{Algorithm, Curve, MalformedSignature, Padding, ParameterSet, digest_info};
use crate::config::ObjectSelector;
use crate::host::wire::Failure;
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;
use crate::verifier::Verifier;

/// A key that passed its check.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) handle: ObjectHandle,
    pub(super) public: PublicKey,
    /// It asks for the PIN before every signature.
    pub(super) always: bool,
}

/// Whether a key asks for the PIN before every signature.
pub(super) fn asks_always(session: &Session, wanted: &ObjectSelector) -> Result<bool, Failure> {
    let private = find_private(session, wanted)?;
    let found = read(session, private, &[AttributeType::AlwaysAuthenticate])?;
    Ok(found.contains(&Attribute::AlwaysAuthenticate(true)))
}

/// Finds a key, its public half, and has it sign a random challenge.
pub(super) fn find_key(
    session: &Session,
    wanted: &ObjectSelector,
    padding: Padding,
    ways: &Ways,
    notify: Notify<'_>,
) -> Result<Found, Failure> {
    let private = find_private(session, wanted)?;
    use AttributeType::{AlwaysAuthenticate, Id, KeyType, Sign};
    let mut details = Details::of(session, private, &[KeyType, Sign, AlwaysAuthenticate, Id])?;
    let Some(kind) = details.key_type.and_then(|key_type| Kind::of(key_type, ways)) else {
        let found = details.key_type.map_or("unknown".to_owned(), |found| found.to_string());
        let message = format!(
            "the key with {wanted} is of type {found}; omsign signs with CKK_EC, CKK_RSA, CKK_EC_EDWARDS and CKK_ML_DSA"
        );
        return Err(refused(message));
    };
    if details.sign == Some(false) {
        return Err(refused(format!("the key with {wanted} may not sign: its CKA_SIGN is false")));
    }
    let always = details.always_authenticate == Some(true);
    if always && let Err(why) = ways.again.is_able() {
        return Err(refused(format!(
            "the key with {wanted} asks for the PIN before every signature, and {why}"
        )));
    }
    let mut candidates = public_halves(session, wanted, kind, &details)?;
    // Many tokens show the public half on the private object too.
    if !matches!(kind, Kind::MlDsa) {
        details.take(read(session, private, kind.public_attributes())?);
    }
    candidates.extend(details.spki(kind));
    let mut reasons = Vec::new();
    for candidate in candidates {
        let key = candidate.and_then(|spki| {
            let algorithm = spki.algorithm(padding).map_err(|error| error.to_string())?;
            Ok(Found { handle: private, public: PublicKey { algorithm, spki, hashes: false }, always })
        });
        match key {
            Ok(key) => match proven(session, key, ways, notify)? {
                Some(found) => return Ok(found),
                None => reasons.push("a public half on the token does not belong to it".to_owned()),
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
                Some(_) => format!(
                    "the token has a public half with {wanted} but no private key: what a deletion left that was cut off \
                     goes with the vendor's tool, such as pkcs11-tool --delete-object"
                ),
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

pub(super) fn find(
    session: &Session,
    class: ObjectClass,
    wanted: &ObjectSelector,
) -> Result<Vec<ObjectHandle>, Failure> {
    let mut template = vec![Attribute::Class(class)];
    template.extend(wanted.label.as_ref().map(|label| Attribute::Label(label.as_bytes().to_vec())));
    template.extend(wanted.id.clone().map(Attribute::Id));
    session.find_objects(&template).map_err(|error| classify("find objects", &error))
}

pub(super) fn read(
    session: &Session,
    object: ObjectHandle,
    types: &[AttributeType],
) -> Result<Vec<Attribute>, Failure> {
    session.get_attributes(object, types).map_err(|error| classify("read attributes", &error))
}

/// What is known of an object.
#[derive(Default)]
pub(super) struct Details {
    pub(super) key_type: Option<KeyType>,
    pub(super) sign: Option<bool>,
    pub(super) always_authenticate: Option<bool>,
    pub(super) id: Option<Vec<u8>>,
    pub(super) label: Option<Vec<u8>>,
    ec_params: Option<Vec<u8>>,
    ec_point: Option<Vec<u8>>,
    modulus: Option<Vec<u8>>,
    exponent: Option<Vec<u8>>,
    parameter_set: Option<ParameterSetType>,
    pub(super) value: Option<Vec<u8>>,
}

/// The kinds of keys that sign.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Ec,
    Edwards,
    Rsa,
    MlDsa,
}

impl Kind {
    pub(super) fn of(key_type: KeyType, ways: &Ways) -> Option<Self> {
        match key_type {
            KeyType::EC => Some(Self::Ec),
            edwards if ways.is_edwards(edwards) => Some(Self::Edwards),
            KeyType::RSA => Some(Self::Rsa),
            KeyType::ML_DSA => Some(Self::MlDsa),
            _ => None,
        }
    }

    /// Where a public object of this kind has the public half; some have it on the private object, too.
    pub(super) fn public_attributes(self) -> &'static [AttributeType] {
        match self {
            Self::Ec | Self::Edwards => &[AttributeType::EcParams, AttributeType::EcPoint],
            Self::Rsa => &[AttributeType::Modulus, AttributeType::PublicExponent],
            // PKCS#11 v3.2, 6.67.2. On a private object CKA_VALUE is the secret, which is not asked for.
            Self::MlDsa => &[AttributeType::ParameterSet, AttributeType::Value],
        }
    }
}

impl Details {
    /// What an object shows of this.
    pub(super) fn of(
        session: &Session,
        object: ObjectHandle,
        types: &[AttributeType],
    ) -> Result<Self, Failure> {
        let mut details = Self::default();
        details.take(read(session, object, types)?);
        Ok(details)
    }

    /// Takes over what is known of an object.
    pub(super) fn take(&mut self, attributes: Vec<Attribute>) {
        for attribute in attributes {
            match attribute {
                Attribute::KeyType(value) => self.key_type = Some(value),
                Attribute::Sign(value) => self.sign = Some(value),
                Attribute::AlwaysAuthenticate(value) => self.always_authenticate = Some(value),
                Attribute::Label(value) if !value.is_empty() => self.label = Some(value),
                Attribute::Id(value) if !value.is_empty() => self.id = Some(value),
                Attribute::EcParams(value) if !value.is_empty() => self.ec_params = Some(value),
                Attribute::EcPoint(value) if !value.is_empty() => self.ec_point = Some(value),
                Attribute::Modulus(value) if !value.is_empty() => self.modulus = Some(value),
                Attribute::PublicExponent(value) if !value.is_empty() => self.exponent = Some(value),
                Attribute::ParameterSet(value) => self.parameter_set = Some(value),
                Attribute::Value(value) if !value.is_empty() => self.value = Some(value),
                _ => {}
            }
        }
    }

    /// The public half, if the object shows one; or what is wrong with it.
    pub(super) fn spki(&self, kind: Kind) -> Option<Result<SpkiDer, String>> {
        let spki = match kind {
            Kind::Ec => {
                let point = self.ec_point.as_ref()?;
                Curve::from_params(self.ec_params.as_ref()?)
                    .and_then(|curve| SpkiDer::from_ec_point(curve, point))
            }
            Kind::Edwards => SpkiDer::from_edwards_point(self.ec_point.as_ref()?),
            Kind::Rsa => SpkiDer::from_rsa(self.modulus.as_ref()?, self.exponent.as_ref()?),
            Kind::MlDsa => {
                let set = match MlDsaParameterSetType::from(self.parameter_set?) {
                    MlDsaParameterSetType::ML_DSA_44 => ParameterSet::MlDsa44,
                    MlDsaParameterSetType::ML_DSA_65 => ParameterSet::MlDsa65,
                    MlDsaParameterSetType::ML_DSA_87 => ParameterSet::MlDsa87,
                    other => return Some(Err(format!("its parameter set is {other}"))),
                };
                SpkiDer::from_ml_dsa(set, self.value.as_ref()?)
            }
        };
        Some(spki.map_err(|error| error.to_string()))
    }
}

/// Public halves among the token's public keys and certificates: those with the private key's CKA_ID, or, where
/// there are none, those that match the selector.
fn public_halves(
    session: &Session,
    wanted: &ObjectSelector,
    kind: Kind,
    private: &Details,
) -> Result<Vec<Result<SpkiDer, String>>, Failure> {
    let by_id = private.id.clone().map(|id| ObjectSelector { label: None, id: Some(id) });
    let mut found = match by_id {
        Some(by_id) => halves_with(session, &by_id, kind)?,
        None => Vec::new(),
    };
    // Tools forget CKA_ID. Whether it belongs to the key, a challenge tells.
    if found.is_empty() && wanted.label.is_some() {
        let by_label = ObjectSelector { label: wanted.label.clone(), id: None };
        found = halves_with(session, &by_label, kind)?;
    }
    Ok(found)
}

fn halves_with(
    session: &Session,
    wanted: &ObjectSelector,
    kind: Kind,
) -> Result<Vec<Result<SpkiDer, String>>, Failure> {
    let mut found = Vec::new();
    for public in find(session, ObjectClass::PUBLIC_KEY, wanted)? {
        found.extend(Details::of(session, public, kind.public_attributes())?.spki(kind));
    }
    for certificate in find(session, ObjectClass::CERTIFICATE, wanted)? {
        if let Some(der) = Details::of(session, certificate, &[AttributeType::Value])?.value {
            found.push(SpkiDer::of_certificate(&der).ok_or_else(|| "its certificate is malformed".into()));
        }
    }
    Ok(found)
}

/// The key as it signs, if this is its public half. One that asks for the PIN each time is given what it signs in parts,
/// after the login: where its token takes a digest in one call only, it is given the message.
pub(super) fn proven(
    session: &Session,
    mut key: Found,
    ways: &Ways,
    notify: Notify<'_>,
) -> Result<Option<Found>, Failure> {
    let message = challenge()?;
    let mut answer = signed(session, &key, &message, ways, notify);
    if key.always && !key.public.needs_message() && answer.as_ref().is_err_and(is_in_one_call_only) {
        let hashing = PublicKey { hashes: true, ..key.public.clone() };
        if ways.can_sign(&hashing).map_err(|error| classify("ask for a mechanism", &error))? {
            key.public = hashing;
            answer = signed(session, &key, &message, ways, notify);
        }
    }
    let signs = answer.map_err(|error| classify("sign a challenge", &error))?;
    Ok(signs.then_some(key))
}

/// Whether the private object makes signatures that the public key verifies.
fn signed(
    session: &Session,
    key: &Found,
    message: &[u8],
    ways: &Ways,
    notify: Notify<'_>,
) -> cryptoki::error::Result<bool> {
    let content = key.public.content(message);
    let bytes = key.public.bytes(&content).unwrap_or_default();
    let signature = sign(session, key, bytes, ways, notify)?;
    let verifier = Verifier::new(&key.public.spki, key.public.algorithm);
    // A signature of another curve's width is as wrong as one that does not verify.
    Ok(signature.is_ok_and(|signature| verifier.verifies(&key.public.algorithm.content(message), &signature)))
}

/// Signs in the key's mechanism, with the PIN again where it asks for that. The outer error is the token's, the inner one
/// says that its answer is none.
pub(super) fn sign(
    session: &Session,
    key: &Found,
    bytes: &[u8],
    ways: &Ways,
    notify: Notify<'_>,
) -> cryptoki::error::Result<Result<Vec<u8>, MalformedSignature>> {
    let Found { handle, public, always } = key;
    let mechanism = ways.mechanism(public);
    let info = (public.algorithm == Algorithm::RsaPkcs1 && !public.hashes).then(|| digest_info(bytes));
    let bytes = info.as_deref().unwrap_or(bytes);
    let signature = match always {
        false => session.sign(&mechanism, *handle, bytes)?,
        true => {
            session.sign_init(&mechanism, *handle)?;
            ways.again.log_in(session, notify)?;
            session.sign_update(bytes)?;
            session.sign_final()?
        }
    };
    Ok(match public.algorithm {
        Algorithm::Ecdsa(curve) => curve.der_from_raw(&signature),
        _ => Ok(signature),
    })
}
