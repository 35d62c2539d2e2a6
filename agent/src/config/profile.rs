//! What is known of PKCS#11 modules, as data: `hsm-config/profiles/NAME.toml`, compiled in. A module that none is
//! about is taken to do what PKCS#11 says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::algorithm::KeyType;

/// Every profile: its name and its text.
const PROFILES: [(&str, &str); 12] = [
    ("softhsm", include_str!("../../../hsm-config/profiles/softhsm.toml")),
    ("kryoptic", include_str!("../../../hsm-config/profiles/kryoptic.toml")),
    ("yubihsm2", include_str!("../../../hsm-config/profiles/yubihsm2.toml")),
    ("cloudhsm", include_str!("../../../hsm-config/profiles/cloudhsm.toml")),
    ("luna", include_str!("../../../hsm-config/profiles/luna.toml")),
    ("nshield", include_str!("../../../hsm-config/profiles/nshield.toml")),
    ("utimaco", include_str!("../../../hsm-config/profiles/utimaco.toml")),
    ("nethsm", include_str!("../../../hsm-config/profiles/nethsm.toml")),
    ("opensc", include_str!("../../../hsm-config/profiles/opensc.toml")),
    ("ykcs11", include_str!("../../../hsm-config/profiles/ykcs11.toml")),
    ("tpm2-pkcs11", include_str!("../../../hsm-config/profiles/tpm2-pkcs11.toml")),
    ("p11-kit-client", include_str!("../../../hsm-config/profiles/p11-kit-client.toml")),
];

/// What is known of a module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// What it is.
    pub about: String,
    /// With which release it was tried, or `untested`.
    pub tested: String,
    /// Where this is known from.
    pub sources: Vec<String>,
    /// Where distributions and vendors put the library; the first that exists is taken.
    pub libraries: Vec<PathBuf>,
    /// Environment variables that the library needs.
    pub environment: Vec<String>,
    /// And those that it goes by where they are set.
    pub environment_if_set: Vec<String>,
    /// The most PKCS#11 sessions that are of use, or allowed. One of them is the agent's anchor, one is for operators' tasks.
    pub max_sessions: Option<usize>,
    /// How many threads may sign at once, each in its session, where more are of no use or do harm.
    pub threads: Option<usize>,
    /// After how long without a command the device, or its module, forgets the login.
    pub idle_timeout_s: Option<u64>,
    /// How often it is asked for a random byte, so that it does not.
    pub keep_alive_s: Option<u64>,
    /// It finds no public objects without a login.
    pub hides_public_before_login: bool,
    /// It answers CKR_FUNCTION_FAILED where it is asked for more than it does at a time.
    pub throttles: bool,
    /// Processes that open it at the same time disturb each other: they do it in turns, by the lock of the first of these
    /// files that there is. `$NAME` is what a variable says.
    pub opened_in_turns: Vec<String>,
    /// It refuses sessions that only read.
    pub only_writing_sessions: bool,
    /// The form of its PIN, where that is not just a PIN.
    pub pin: String,
    /// The PINs that its devices have when they are new, and how each is changed.
    pub factory_pins: BTreeMap<String, String>,
    /// Its own configuration may hold the PIN.
    pub may_hold_pin: bool,
    /// Its vendor's own numbers.
    pub instead: Instead,
    /// It makes public keys private objects, and refuses to hear otherwise.
    pub hides_public_keys: bool,
    /// It makes no RSA keys of which it is told that they do not decrypt.
    pub rsa_keys_decrypt: bool,
    /// It knows the curve of Ed25519 by its name and not by its number (PKCS#11 v3.0, 2.3.10).
    pub names_edwards_curve: bool,
    /// Length of the CKA_ID of a new key, in bytes, where it is not 16.
    pub id_bytes: Option<usize>,
    /// The kinds of keys that it makes; empty where that is not known.
    pub keys: Vec<KeyType>,
    /// What makes its keys, where its users' login cannot.
    pub made_by: String,
    /// The certificates by which the device attests its keys, where the module shows them.
    pub attestation: Option<Attestation>,
    /// How the device attests them otherwise.
    pub attested_by: String,
}

/// A vendor's own numbers for mechanisms, each used where a token does not know PKCS#11's, and for kinds of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Instead {
    /// To make RSA keys.
    #[serde(rename = "CKM_RSA_PKCS_KEY_PAIR_GEN")]
    pub rsa_key_pair_gen: Option<u64>,
    /// To make keys on Edwards curves.
    #[serde(rename = "CKM_EC_EDWARDS_KEY_PAIR_GEN")]
    pub edwards_key_pair_gen: Option<u64>,
    /// To sign with them.
    #[serde(rename = "CKM_EDDSA")]
    pub eddsa: Option<u64>,
    /// What they are.
    #[serde(rename = "CKK_EC_EDWARDS")]
    pub edwards: Option<u64>,
}

/// Certificates by their labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attestation {
    /// How the label begins of the one about a key, which has the key's CKA_ID.
    pub key: String,
    /// The whole label of the one that the device signs those with.
    pub device: String,
}

impl Profile {
    /// The profile of this name, or what is wrong with the name.
    pub fn named(name: &str) -> Result<Self, String> {
        let found = PROFILES.iter().find(|(known, _)| *known == name);
        match found {
            Some((_, text)) => Ok(parse(text)),
            None => {
                let known: Vec<_> = PROFILES.iter().map(|(name, _)| *name).collect();
                Err(format!("{name:?} is unknown; write one of {}, or leave it out", known.join(", ")))
            }
        }
    }

    /// The profile that is about a module of this file name, whose users may not know that there are profiles.
    pub fn of_module(module: &Path) -> Self {
        let about = |profile: &Profile| {
            profile.libraries.iter().any(|library| library.file_name() == module.file_name())
        };
        PROFILES.iter().map(|(_, text)| parse(text)).find(about).unwrap_or_default()
    }

    /// What is to be said of each variable that the library needs, and that is set neither here nor in the environment.
    pub fn unset(&self, env: &BTreeMap<String, String>) -> Vec<String> {
        let unset = |name: &&String| !env.contains_key(*name) && std::env::var_os(name).is_none();
        let told = |name: &String| {
            format!("this module is told by {name} where its configuration is, which is not set")
        };
        self.environment.iter().filter(unset).map(told).collect()
    }

    /// The library, if it is installed.
    pub fn library(&self) -> Option<PathBuf> {
        self.libraries.iter().find(|path| path.is_file()).cloned()
    }
}

fn parse(text: &str) -> Profile {
    toml::from_str(text).expect("profiles are parsed by a test")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_says_where_it_comes_from() {
        let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../hsm-config/profiles"));
        let files = std::fs::read_dir(directory).expect("the profiles").count();
        assert_eq!(files, PROFILES.len());
        for (name, _) in PROFILES {
            let profile = Profile::named(name).expect("known");
            assert!(
                !profile.about.is_empty() && !profile.tested.is_empty() && !profile.sources.is_empty(),
                "{name}"
            );
            let early = |idle| profile.keep_alive_s.is_some_and(|asked| asked <= idle / 2);
            assert!(profile.idle_timeout_s.is_none_or(early), "{name}: it forgets the login");
            let first = profile.libraries.first().expect("a library");
            assert_eq!(Profile::of_module(first), profile, "{name}");
            let text = serde_json::to_string(&profile).expect("encodes");
            assert_eq!(serde_json::from_str::<Profile>(&text).expect("decodes"), profile);
        }
        assert!(Profile::named("softhsm3").expect_err("unknown").contains("softhsm, kryoptic"));
        assert_eq!(Profile::of_module(Path::new("/lib/other.so")), Profile::default());
    }
}
