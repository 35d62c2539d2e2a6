//! How a token wants to be asked: in how many sessions, with the PIN before each signature, with numbers of its vendor's.

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::dsa::{HedgeType, SignAdditionalContext};
use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsPssParams};
use cryptoki::mechanism::vendor_defined::VendorDefinedMechanism;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::KeyType;
use cryptoki::slot::{Limit, Slot};

use super::login::Again;
use crate::algorithm::{Algorithm, Curve};
use crate::config::Profile;
use crate::public_key::PublicKey;

pub(super) struct Ways {
    pkcs11: Pkcs11,
    slot: Slot,
    /// For keys that ask for the PIN before each signature.
    pub(super) again: Again,
    /// The vendor's own mechanisms, each where the token does not know PKCS#11's.
    rsa_key_pair_gen: Option<MechanismType>,
    edwards_key_pair_gen: Option<MechanismType>,
    eddsa: Option<MechanismType>,
    /// And its own kind of keys on Edwards curves.
    edwards: Option<KeyType>,
}

impl Ways {
    pub(super) fn new(pkcs11: &Pkcs11, slot: Slot, profile: &Profile, again: Again) -> Self {
        let own = |usual: MechanismType, own: Option<u64>| {
            let own = own.and_then(|number| MechanismType::new_vendor_defined(number).ok())?;
            pkcs11.get_mechanism_info(slot, usual).is_err().then_some(own)
        };
        let instead = &profile.instead;
        Self {
            pkcs11: pkcs11.clone(),
            slot,
            again,
            rsa_key_pair_gen: own(MechanismType::RSA_PKCS_KEY_PAIR_GEN, instead.rsa_key_pair_gen),
            edwards_key_pair_gen: own(MechanismType::ECC_EDWARDS_KEY_PAIR_GEN, instead.edwards_key_pair_gen),
            eddsa: own(MechanismType::EDDSA, instead.eddsa),
            edwards: instead.edwards.and_then(|number| KeyType::new_vendor_defined(number).ok()),
        }
    }

    pub(super) fn rsa_key_pair_gen(&self) -> Mechanism<'static> {
        self.rsa_key_pair_gen.map_or(Mechanism::RsaPkcsKeyPairGen, vendor)
    }

    pub(super) fn edwards_key_pair_gen(&self) -> Mechanism<'static> {
        self.edwards_key_pair_gen.map_or(Mechanism::EccEdwardsKeyPairGen, vendor)
    }

    /// What a key signs with.
    pub(super) fn mechanism(&self, key: &PublicKey) -> Mechanism<'static> {
        let pss = PkcsPssParams {
            hash_alg: MechanismType::SHA256,
            mgf: PkcsMgfType::MGF1_SHA256,
            s_len: 32.into(),
        };
        match (key.algorithm, key.hashes) {
            (Algorithm::Ecdsa(_), false) => Mechanism::Ecdsa,
            (Algorithm::Ecdsa(Curve::P256), true) => Mechanism::EcdsaSha256,
            (Algorithm::Ecdsa(Curve::P384), true) => Mechanism::EcdsaSha384,
            (Algorithm::Ecdsa(Curve::P521), true) => Mechanism::EcdsaSha512,
            (Algorithm::RsaPkcs1, false) => Mechanism::RsaPkcs,
            (Algorithm::RsaPkcs1, true) => Mechanism::Sha256RsaPkcs,
            (Algorithm::RsaPss, false) => Mechanism::RsaPkcsPss(pss),
            (Algorithm::RsaPss, true) => Mechanism::Sha256RsaPkcsPss(pss),
            (Algorithm::MlDsa(_), _) => {
                Mechanism::MlDsa(SignAdditionalContext::new(HedgeType::Preferred, None))
            }
            (Algorithm::Ed25519, _) => self.eddsa(),
        }
    }

    /// Whether the token has that.
    pub(super) fn can_sign(&self, key: &PublicKey) -> Result<bool, Error> {
        let mechanism = self.mechanism(key).mechanism_type();
        match self.pkcs11.get_mechanism_info(self.slot, mechanism) {
            Ok(info) => Ok(info.sign()),
            Err(Error::Pkcs11(RvError::MechanismInvalid, _)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn eddsa(&self) -> Mechanism<'static> {
        self.eddsa.map_or(Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Pure)), vendor)
    }

    pub(super) fn is_edwards(&self, key_type: KeyType) -> bool {
        key_type == KeyType::EC_EDWARDS || self.edwards == Some(key_type)
    }
}

/// In how many sessions to sign, of those that the configuration wants; none where the token has too few. One more is
/// the anchor's, and one for operators' tasks, where the token has that many.
pub(super) fn sessions(wanted: usize, of_token: Limit, profile: &Profile) -> Option<usize> {
    let most = match most_sessions(of_token, profile) {
        few @ 0..=2 => few.saturating_sub(1),
        many => many - 2,
    };
    (most > 0).then(|| wanted.min(most).min(profile.threads.unwrap_or(usize::MAX)))
}

/// Whether operators' tasks have a thread of their own: where a module is known to take several, and has a session for it.
pub(super) fn operates_beside(of_token: Limit, profile: &Profile) -> bool {
    let is_known = !profile.about.is_empty();
    is_known && profile.threads != Some(1) && most_sessions(of_token, profile) > 2
}

/// How many sessions the token has for us.
fn most_sessions(of_token: Limit, profile: &Profile) -> usize {
    let of_token = match of_token {
        Limit::Max(limit) => usize::try_from(limit).unwrap_or(usize::MAX),
        Limit::Infinite | Limit::Unavailable => usize::MAX,
    };
    profile.max_sessions.map_or(of_token, |most| most.min(of_token))
}

fn vendor(number: MechanismType) -> Mechanism<'static> {
    Mechanism::VendorDefined(VendorDefinedMechanism::new::<()>(number, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_sessions_than_the_token_and_its_profile_allow() {
        let profile = |max_sessions, threads| Profile { max_sessions, threads, ..Profile::default() };
        let any = profile(None, None);
        assert_eq!(sessions(8, Limit::Infinite, &any), Some(8));
        assert_eq!(sessions(8, Limit::Max(6), &any), Some(4), "the anchor's and the operators'");
        assert_eq!(sessions(8, Limit::Max(2), &any), Some(1), "operators wait");
        assert_eq!(sessions(8, Limit::Max(1), &any), None);
        let few = profile(Some(5), None);
        assert_eq!(sessions(8, Limit::Unavailable, &few), Some(3), "the module does not say it");
        assert_eq!(sessions(8, Limit::Max(4), &few), Some(2), "the token says less");
        assert_eq!(sessions(2, Limit::Infinite, &few), Some(2));
        assert_eq!(sessions(8, Limit::Infinite, &profile(Some(5), Some(1))), Some(1), "more do harm");
        let known = |threads| Profile { about: "known".into(), ..profile(None, threads) };
        assert!(
            operates_beside(Limit::Infinite, &known(None)) && operates_beside(Limit::Max(3), &known(None))
        );
        assert!(!operates_beside(Limit::Max(2), &known(None)) && !operates_beside(Limit::Infinite, &any));
        assert!(!operates_beside(Limit::Infinite, &known(Some(1))), "more do harm");
    }
}
