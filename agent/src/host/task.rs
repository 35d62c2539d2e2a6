//! What operators have done on a device, beside signing: the same words for every backend. A device that cannot do
//! one of them says so.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::wire::KeySpec;
use crate::algorithm::KeyType;
use crate::config::Object;
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Name every key on the device, and those of these that it does not list itself: key files.
    List(Vec<Object>),
    /// Make this key, which must not be there yet, and check it as every key is checked.
    Generate(KeySpec, Template),
    /// Find this key, for this.
    Find(KeySpec, Need),
    /// Sign a message with this key.
    Sign(KeySpec, #[serde(with = "hex")] Vec<u8>),
    /// Keep this certificate, DER, beside this key.
    Store(KeySpec, #[serde(with = "hex")] Vec<u8>),
    /// Show how this key came to be.
    Attest(KeySpec, Asking),
    /// Delete this key and what belongs to it, if this is its public half.
    Delete(KeySpec, SpkiDer),
}

impl Task {
    /// Whether the device is as it was afterwards.
    pub(crate) fn only_looks(&self) -> bool {
        matches!(self, Self::List(_) | Self::Find(..) | Self::Attest(..))
    }

    /// How long a device may take for it that does not hang, where a single operation may take as long as `one`.
    pub(super) fn may_take(&self, one: Duration) -> Duration {
        let least = match self {
            // YubiKeys and TPMs need minutes for some RSA keys, and a TPM may make its endorsement key for a challenge.
            Self::Generate(..) | Self::Attest(..) => Duration::from_secs(300),
            // Three calls for each of ten thousand objects in another building.
            Self::List(_) => Duration::from_secs(60),
            Self::Find(..) | Self::Sign(..) | Self::Store(..) | Self::Delete(..) => Duration::ZERO,
        };
        // To find a key and check it takes some ten calls; most are quick where one is slow.
        least.max(one.saturating_mul(6))
    }
}

/// What a key is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Need {
    /// To sign: it does that before anything is said of it.
    Signs,
    /// To know whether it is there: nothing follows from that it is not.
    Looked,
    /// To be replaced, or deleted. Where its device itself holds both halves together, one that no longer signs is good enough:
    /// a TPM and a card, but no PKCS#11 token, where whoever likes puts another public half beside it.
    Shown,
}

/// How a key is made. What a device does not have is refused, not left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
pub struct Template {
    /// What kind of key: p384, or that of the key whose place it is to take, where nothing is said
    #[arg(long = "type", value_name = "TYPE")]
    pub key_type: Option<KeyType>,
    /// TPM: keep the key out of the protection against guessing, so that nobody can lock it; its authorization value
    /// has to be long
    #[arg(long)]
    pub no_da: bool,
    /// YubiKey: when it asks for its PIN
    #[arg(long, value_name = "WHEN")]
    pub pin_policy: Option<PinPolicy>,
    /// YubiKey: when it waits for a touch
    #[arg(long, value_name = "WHEN")]
    pub touch_policy: Option<TouchPolicy>,
    /// The key whose place it is to take: it is guarded like that one, where nothing else is said.
    #[arg(skip)]
    pub(crate) like: Option<Object>,
}

impl Template {
    pub(crate) fn key_type(&self) -> KeyType {
        self.key_type.unwrap_or(KeyType::P384)
    }
}

/// When a PIV key asks for its PIN (Yubico, "PIN and touch policies").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum PinPolicy {
    /// Never.
    Never,
    /// Once for each session with the card.
    Once,
    /// Before every signature.
    Always,
}

/// When a PIV key waits for a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum TouchPolicy {
    /// Never.
    Never,
    /// Before every signature.
    Always,
    /// Before a signature, unless there was a touch within 15 s.
    Cached,
}

/// What was done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Done {
    Listed(Vec<Listed>),
    Key(PublicKey),
    Signature(#[serde(with = "hex")] Vec<u8>),
    Attested(Evidence),
    Nothing,
}

/// A key on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Where it is.
    pub object: Object,
    /// Its public half: SubjectPublicKeyInfo, DER, hexadecimal. Empty when the device does not show it.
    #[serde(with = "hex")]
    pub public_key: Vec<u8>,
    /// `ecdsa-p256-sha256` and the like, or what is known of it.
    pub algorithm: String,
    /// Whether its certificate is on the device.
    pub certificate: bool,
    /// What else is worth knowing, such as policies.
    pub notes: Vec<String>,
}

/// What somebody who wants proof sent along, where the device takes such.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asking {
    /// Comes back in the proof, and so shows that it was made since.
    #[serde(with = "hex")]
    pub nonce: Vec<u8>,
    /// Something to read.
    pub challenge: Option<Challenge>,
}

/// A secret that only the TPM with a certain endorsement key can read, if it also has a certain attestation key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// TPMS_ID_OBJECT.
    #[serde(with = "hex")]
    pub credential: Vec<u8>,
    /// TPMU_ENCRYPTED_SECRET.
    #[serde(with = "hex")]
    pub secret: Vec<u8>,
}

/// How a key came to be, as its device shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Evidence {
    /// What the module says of the key. Nothing proves it.
    Pkcs11 {
        /// `CKA_…` and its value.
        attributes: Vec<(String, String)>,
        /// How the device's maker has it attest keys, which PKCS#11 does not show.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        attested_by: String,
    },
    /// A certificate by the card about the key, and the card's own (Yubico, "PIV attestation").
    Piv {
        /// Both, DER: the key's first.
        #[serde(with = "hexes")]
        certificates: Vec<Vec<u8>>,
    },
    /// A certificate by a YubiHSM 2 about the key, and its own (docs.yubico.com, "Attestation").
    Yubihsm {
        /// Both, DER: the key's first.
        #[serde(with = "hexes")]
        certificates: Vec<Vec<u8>>,
    },
    /// TPM2_Certify by an attestation key of the endorsement hierarchy.
    Tpm {
        /// The key's TPMT_PUBLIC.
        #[serde(with = "hex")]
        public: Vec<u8>,
        /// The attestation key's TPMT_PUBLIC.
        #[serde(with = "hex")]
        attestation_key: Vec<u8>,
        /// TPMS_ATTEST.
        #[serde(with = "hex")]
        certify_info: Vec<u8>,
        /// TPMT_SIGNATURE over it.
        #[serde(with = "hex")]
        signature: Vec<u8>,
        /// The endorsement key's certificate, DER; empty where the TPM has none.
        #[serde(with = "hex")]
        endorsement_certificate: Vec<u8>,
        /// What the TPM read in a [`Challenge`].
        #[serde(default, with = "hex")]
        answer: Vec<u8>,
    },
}

/// Byte strings, each as hexadecimal.
mod hexes {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(all: &[Vec<u8>], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(all.iter().map(hex::encode))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let all = Vec::<String>::deserialize(from)?;
        all.iter().map(|one| hex::decode(one).map_err(serde::de::Error::custom)).collect()
    }
}
