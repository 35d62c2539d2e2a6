//! Makes a key pair on a token: private, sensitive, not extractable, for signing only.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, MlDsaParameterSetType, ObjectClass};
use cryptoki::session::Session;

use super::super::{gone, refused};
use super::errors::classify;
use super::objects::{asks_always, find};
use super::ways::Ways;
use crate::algorithm::KeyType;
use crate::config::{Object, Profile};
use crate::host::task::Template;
use crate::host::wire::{Class, Failure, KeySpec};

/// Makes the key that the configuration names. One that is there already stays.
pub(super) fn generate(
    session: &Session,
    profile: &Profile,
    ways: &Ways,
    key: &KeySpec,
    template: &Template,
) -> Result<(), Failure> {
    if !profile.made_by.is_empty() {
        return Err(refused(format!("this device's users cannot make keys; use {}", profile.made_by)));
    }
    if !profile.keys.is_empty() && !profile.keys.contains(&template.key_type()) {
        let known: Vec<_> = profile.keys.iter().map(|known| known.to_string()).collect();
        return Err(refused(format!("this device makes keys of type {}", known.join(", "))));
    }
    if template.no_da || template.pin_policy.is_some() || template.touch_policy.is_some() {
        return Err(refused("a PKCS#11 token takes only --type; its own tools set the rest".into()));
    }
    let Object::Pkcs11(wanted) = &key.object else { return Err(refused("not an object of a token".into())) };
    for class in [ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
        if !find(session, class, wanted)?.is_empty() {
            return Err(refused(format!(
                "the token has a key with {wanted} already; choose another label or id"
            )));
        }
    }
    let label = wanted.label.as_ref().unwrap_or(&key.name).as_bytes().to_vec();
    let id = match &wanted.id {
        Some(id) => id.clone(),
        None => {
            let mut id = vec![0; profile.id_bytes.unwrap_or(16)];
            getrandom::fill(&mut id).map_err(|error| gone(format!("no random id: {error}")))?;
            id
        }
    };
    let named = [Attribute::Token(true), Attribute::Label(label), Attribute::Id(id)];
    let mut public = named.to_vec();
    if !profile.hides_public_keys {
        public.push(Attribute::Private(false));
    }
    public.push(Attribute::Verify(true));
    let mut private = named.to_vec();
    // Nobody who is not logged in can make a private object, or would need one (nShield's module-protected keys).
    let is_private = ways.again.is_logged_in();
    private.extend([
        Attribute::Private(is_private),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
    ]);
    private.push(Attribute::Sign(true));
    if let Some(Object::Pkcs11(present)) = &template.like {
        match asks_always(session, present) {
            Ok(true) => private.push(Attribute::AlwaysAuthenticate(true)),
            Ok(false) => {}
            // One that is gone says nothing.
            Err(failure) if failure.class == Class::Refused => {}
            Err(failure) => return Err(failure),
        }
    }
    let key_type = template.key_type();
    let curve = |params: &[u8]| Attribute::EcParams(params.to_vec());
    let set = |set: MlDsaParameterSetType| Attribute::ParameterSet(set.into());
    let bits = |bits: u64| Attribute::ModulusBits(bits.into());
    let (mechanism, what) = match key_type {
        KeyType::P256 => (Mechanism::EccKeyPairGen, curve(P256)),
        KeyType::P384 => (Mechanism::EccKeyPairGen, curve(P384)),
        KeyType::P521 => (Mechanism::EccKeyPairGen, curve(P521)),
        KeyType::Ed25519 => {
            let params = if profile.names_edwards_curve { EDWARDS_NAME } else { ED25519 };
            (ways.edwards_key_pair_gen(), curve(params))
        }
        KeyType::Rsa2048 => (ways.rsa_key_pair_gen(), bits(2048)),
        KeyType::Rsa3072 => (ways.rsa_key_pair_gen(), bits(3072)),
        KeyType::Rsa4096 => (ways.rsa_key_pair_gen(), bits(4096)),
        KeyType::MlDsa44 => (Mechanism::MlDsaKeyPairGen, set(MlDsaParameterSetType::ML_DSA_44)),
        KeyType::MlDsa65 => (Mechanism::MlDsaKeyPairGen, set(MlDsaParameterSetType::ML_DSA_65)),
        KeyType::MlDsa87 => (Mechanism::MlDsaKeyPairGen, set(MlDsaParameterSetType::ML_DSA_87)),
    };
    public.push(what);
    if key_type.is_rsa() {
        public.push(Attribute::PublicExponent(vec![1, 0, 1]));
        // Modules let RSA keys decrypt unless they are told not to.
        public.push(Attribute::Wrap(false));
        private.push(Attribute::Unwrap(false));
        if !profile.rsa_keys_decrypt {
            public.push(Attribute::Encrypt(false));
            private.push(Attribute::Decrypt(false));
        }
    }
    let made = session.generate_key_pair(&mechanism, &public, &private);
    made.map(drop).map_err(|error| classify("make the key", &error))
}

/// DER `ECParameters` that name the curve (RFC 5480, RFC 8410).
const P256: &[u8] = &[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
const P384: &[u8] = &[6, 5, 0x2b, 0x81, 4, 0, 0x22];
const P521: &[u8] = &[6, 5, 0x2b, 0x81, 4, 0, 0x23];
const ED25519: &[u8] = &[6, 3, 0x2b, 0x65, 0x70];

/// DER `PrintableString` (PKCS#11 v3.0, 2.3.10).
const EDWARDS_NAME: &[u8] = b"\x13\x0cedwards25519";
