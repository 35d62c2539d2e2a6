//! What operators do with the keys of a token, in a session of its own that may write.

use std::collections::{BTreeMap, BTreeSet};

use cryptoki::object::{Attribute, AttributeType, CertificateType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

use super::super::{Notify, refused};
use super::errors::classify;
use super::objects::{Details, Kind, find, find_key, find_private, read, sign};
use super::ways::Ways;
use super::{OpenToken, generate};
use crate::config::{Object, ObjectSelector, Profile};
use crate::host::task::{Done, Evidence, Listed, Task};
use crate::host::wire::{Failure, KeySpec};

pub(super) fn operate(token: &OpenToken, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
    let session = token.pkcs11.open_rw_session(token.slot);
    let session = session.map_err(|error| classify("open a session to write", &error))?;
    let found = |key: &KeySpec| find_key(&session, selector(key)?, key.padding, &token.ways, notify);
    match task {
        Task::List(_) => list(&session, &token.ways).map(Done::Listed),
        Task::Generate(key, template) => {
            generate::generate(&session, &token.profile, &token.ways, key, template)?;
            found(key).map(|found| Done::Key(found.public))
        }
        Task::Find(key, _) => found(key).map(|found| Done::Key(found.public)),
        Task::Sign(key, message) => {
            let found = found(key)?;
            let content = found.public.content(message);
            let bytes = found.public.bytes(&content).map_err(refused)?;
            let signed = sign(&session, &found, bytes, &token.ways, notify);
            let signed = signed.map_err(|error| classify("sign", &error))?;
            signed.map(Done::Signature).map_err(|malformed| refused(malformed.to_string()))
        }
        Task::Store(key, certificate) => store(&session, selector(key)?, certificate),
        Task::Attest(key, _) => attest(&session, &token.profile, selector(key)?).map(Done::Attested),
        Task::Delete(key, _) => delete(&session, selector(key)?),
    }
}

pub(super) fn selector(key: &KeySpec) -> Result<&ObjectSelector, Failure> {
    match &key.object {
        Object::Pkcs11(select) => Ok(select),
        object => Err(refused(format!("{object} is not an object of a PKCS#11 token"))),
    }
}

/// Every private key, with its public half found by CKA_ID: each object is read once, however many there are.
fn list(session: &Session, ways: &Ways) -> Result<Vec<Listed>, Failure> {
    let all = ObjectSelector::default();
    let mut public = BTreeMap::new();
    for object in find(session, ObjectClass::PUBLIC_KEY, &all)? {
        let mut details = details(session, object, &PUBLIC)?;
        let kind = details.key_type.and_then(|key_type| Kind::of(key_type, ways));
        if let Some(kind @ Kind::MlDsa) = kind {
            details.take(read(session, object, kind.public_attributes())?);
        }
        if let (Some(id), Some(Some(Ok(spki)))) = (&details.id, kind.map(|kind| details.spki(kind))) {
            public.insert(id.clone(), spki);
        }
    }
    let mut certified = BTreeSet::new();
    for object in find(session, ObjectClass::CERTIFICATE, &all)? {
        certified.extend(details(session, object, &[AttributeType::Id])?.id);
    }
    let mut listed = Vec::new();
    for object in find(session, ObjectClass::PRIVATE_KEY, &all)? {
        let mut details = details(session, object, &PRIVATE)?;
        let mut spki = details.id.as_ref().and_then(|id| public.get(id).cloned());
        if let Some(kind) = details.key_type.and_then(|key_type| Kind::of(key_type, ways))
            && spki.is_none()
            && !matches!(kind, Kind::MlDsa)
        {
            // Many tokens show it on the private object, too.
            details.take(read(session, object, kind.public_attributes())?);
            spki = details.spki(kind).and_then(Result::ok);
        }
        let algorithm = spki.as_ref().and_then(|spki| spki.algorithm(Default::default()).ok());
        let algorithm = match (algorithm, details.key_type) {
            (Some(algorithm), _) => algorithm.name().to_owned(),
            (None, Some(key_type)) => key_type.to_string(),
            (None, None) => "unknown".to_owned(),
        };
        let flags = [
            (details.sign == Some(false), "may not sign"),
            (details.always_authenticate == Some(true), "asks for the PIN before every signature"),
            (spki.is_none(), "its public half is not on the token"),
        ];
        let notes = flags.into_iter().filter(|(set, _)| *set).map(|(_, note)| note.to_owned()).collect();
        let certificate = details.id.as_ref().is_some_and(|id| certified.contains(id));
        let label = details.label.as_ref().map(|label| String::from_utf8_lossy(label).into_owned());
        listed.push(Listed {
            object: Object::Pkcs11(ObjectSelector { label, id: details.id }),
            public_key: spki.map(|spki| spki.0).unwrap_or_default(),
            algorithm,
            certificate,
            notes,
        });
    }
    listed.sort_by_key(|key| key.object.to_string());
    Ok(listed)
}

/// What is listed of a private key. Each attribute costs some modules a look into a file.
const PRIVATE: [AttributeType; 5] = [
    AttributeType::KeyType,
    AttributeType::Sign,
    AttributeType::AlwaysAuthenticate,
    AttributeType::Id,
    AttributeType::Label,
];

/// What is listed of a public one.
const PUBLIC: [AttributeType; 6] = [
    AttributeType::KeyType,
    AttributeType::Id,
    AttributeType::EcParams,
    AttributeType::EcPoint,
    AttributeType::Modulus,
    AttributeType::PublicExponent,
];

/// What is known of an object, in one call; of one whose kind cryptoki does not know, what it is called.
fn details(session: &Session, object: ObjectHandle, wanted: &[AttributeType]) -> Result<Details, Failure> {
    let attributes = match session.get_attributes(object, wanted) {
        Err(cryptoki::error::Error::NotSupported) => {
            read(session, object, &[AttributeType::Id, AttributeType::Label])?
        }
        attributes => attributes.map_err(|error| classify("read attributes", &error))?,
    };
    let mut details = Details::default();
    details.take(attributes);
    Ok(details)
}

/// The selector of everything that belongs to a private key: its CKA_ID, unless other keys have that too.
fn family(
    session: &Session,
    private: ObjectHandle,
    wanted: &ObjectSelector,
) -> Result<ObjectSelector, Failure> {
    let Some(id) = details(session, private, &[AttributeType::Id])?.id else { return Ok(wanted.clone()) };
    let by_id = ObjectSelector { label: None, id: Some(id) };
    match find(session, ObjectClass::PRIVATE_KEY, &by_id)?.as_slice() {
        [_] => Ok(by_id),
        _ => Ok(ObjectSelector { label: wanted.label.clone(), ..by_id }),
    }
}

/// Puts a certificate beside its key; one that was there before goes once the new one is stored.
fn store(session: &Session, wanted: &ObjectSelector, der: &[u8]) -> Result<Done, Failure> {
    let private = find_private(session, wanted)?;
    let details = details(session, private, &[AttributeType::Id, AttributeType::Label])?;
    let family = family(session, private, wanted)?;
    let before = find(session, ObjectClass::CERTIFICATE, &family)?;
    let malformed = |error| refused(format!("the certificate is malformed: {error}"));
    let certificate = Certificate::from_der(der).map_err(malformed)?;
    let tbs = certificate.tbs_certificate();
    let mut object = vec![
        Attribute::Class(ObjectClass::CERTIFICATE),
        Attribute::CertificateType(CertificateType::X_509),
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Subject(tbs.subject().to_der().map_err(malformed)?),
        Attribute::Issuer(tbs.issuer().to_der().map_err(malformed)?),
        Attribute::SerialNumber(tbs.serial_number().to_der().map_err(malformed)?),
        Attribute::Value(der.to_vec()),
    ];
    object.extend(details.id.map(Attribute::Id));
    object.extend(details.label.map(Attribute::Label));
    session.create_object(&object).map_err(|error| classify("store the certificate", &error))?;
    for old in before {
        session.destroy_object(old).map_err(|error| classify("remove the old certificate", &error))?;
    }
    Ok(Done::Nothing)
}

/// The private key first: when that fails, nothing is lost.
fn delete(session: &Session, wanted: &ObjectSelector) -> Result<Done, Failure> {
    let private = find_private(session, wanted)?;
    let family = family(session, private, wanted)?;
    session.destroy_object(private).map_err(|error| classify("delete the key", &error))?;
    for class in [ObjectClass::PUBLIC_KEY, ObjectClass::CERTIFICATE] {
        for object in find(session, class, &family)? {
            session.destroy_object(object).map_err(|error| classify("delete its public half", &error))?;
        }
    }
    Ok(Done::Nothing)
}

/// The device's own certificate about the key, where its module shows one, or else what PKCS#11 says.
fn attest(session: &Session, profile: &Profile, wanted: &ObjectSelector) -> Result<Evidence, Failure> {
    let private = find_private(session, wanted)?;
    let Some(labels) = &profile.attestation else {
        let attributes = attributes(session, private)?;
        return Ok(Evidence::Pkcs11 { attributes, attested_by: profile.attested_by.clone() });
    };
    let unknown = || refused("the key has no CKA_ID, by which its attestation is found".into());
    let id = details(session, private, &[AttributeType::Id])?.id.ok_or_else(unknown)?;
    let of_key = find(session, ObjectClass::CERTIFICATE, &ObjectSelector { label: None, id: Some(id) })?;
    let shown = |object| Details::of(session, object, &[AttributeType::Label, AttributeType::Value]);
    let of_key = of_key.into_iter().map(shown).collect::<Result<Vec<_>, _>>()?;
    let is_about = |label: &Vec<u8>| label.starts_with(labels.key.as_bytes());
    let of_key = of_key.into_iter().find(|shown| shown.label.as_ref().is_some_and(is_about));
    let of_key = of_key.ok_or_else(|| refused("the device attests only keys that it made itself".into()))?;
    let of_device = ObjectSelector { label: Some(labels.device.clone()), id: None };
    let of_device = find(session, ObjectClass::CERTIFICATE, &of_device)?;
    let of_device =
        of_device.first().ok_or_else(|| refused("the device shows no certificate of its own".into()))?;
    let certificates = [of_key, shown(*of_device)?].map(|shown| shown.value.unwrap_or_default());
    Ok(Evidence::Piv { certificates: certificates.into() })
}

/// What PKCS#11 says about how a key came to be (v3.1, 4.9). A module may say what it likes.
fn attributes(session: &Session, private: ObjectHandle) -> Result<Vec<(String, String)>, Failure> {
    let types = [
        AttributeType::Local,
        AttributeType::Sensitive,
        AttributeType::AlwaysSensitive,
        AttributeType::Extractable,
        AttributeType::NeverExtractable,
        AttributeType::KeyGenMechanism,
    ];
    let shown = |attribute| match attribute {
        Attribute::Local(value) => Some(("CKA_LOCAL", value.to_string())),
        Attribute::Sensitive(value) => Some(("CKA_SENSITIVE", value.to_string())),
        Attribute::AlwaysSensitive(value) => Some(("CKA_ALWAYS_SENSITIVE", value.to_string())),
        Attribute::Extractable(value) => Some(("CKA_EXTRACTABLE", value.to_string())),
        Attribute::NeverExtractable(value) => Some(("CKA_NEVER_EXTRACTABLE", value.to_string())),
        Attribute::KeyGenMechanism(value) => Some(("CKA_KEY_GEN_MECHANISM", value.to_string())),
        _ => None,
    };
    let mut found = Vec::new();
    for attribute in types {
        // Of a key that was imported, say, some modules do not know by which mechanism it was made.
        match session.get_attributes(private, &[attribute]) {
            Ok(attributes) => found.extend(attributes.into_iter().filter_map(shown)),
            Err(cryptoki::error::Error::NotSupported) => {}
            Err(error) => return Err(classify("read attributes", &error)),
        }
    }
    Ok(found.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}
