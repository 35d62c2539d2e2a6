//! What somebody says that they have.

use std::path::PathBuf;

use crate::algorithm::KeyType;
use crate::host::task::TouchPolicy;

/// What kind of device somebody has.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Wish {
    /// A token in software, for trials: made in the directory
    Softhsm,
    /// A TPM 2.0: the key is a file that no other TPM can use
    Tpm {
        /// How it is reached [default: device:/dev/tpmrm0]
        #[arg(long)]
        tcti: Option<String>,
    },
    /// A YubiKey 5: PIN, PUK and management key from the factory are changed first
    Yubikey {
        /// Its serial number, where there are several
        #[arg(long)]
        serial: Option<u32>,
        /// Where the key goes
        #[arg(long, default_value = "9c")]
        slot: String,
        /// When it waits for a touch [default: never]
        #[arg(long, value_name = "WHEN", conflicts_with = "existing")]
        touch_policy: Option<TouchPolicy>,
        /// The key is there already: none is made
        #[arg(long)]
        existing: bool,
    },
    /// Any device with a PKCS#11 module, whose token is initialized
    Pkcs11 {
        /// What is known of the module: softhsm, yubihsm2, luna and others of hsm-config/profiles
        #[arg(long, required_unless_present = "module")]
        profile: Option<String>,
        /// The module [default: that of the profile]
        #[arg(long)]
        module: Option<PathBuf>,
        /// The token's label, where there are several
        #[arg(long)]
        label: Option<String>,
        /// The key's label on the token, as `pkcs11-tool --list-objects` shows it [default: the key's name]
        #[arg(long)]
        key_label: Option<String>,
        /// Its CKA_ID, in hexadecimal, where it has no label
        #[arg(long, value_name = "HEX", conflicts_with = "key_label")]
        key_id: Option<String>,
        /// The key is there already: none is made
        #[arg(long)]
        existing: bool,
    },
}

impl Wish {
    /// Whether its key is there already.
    pub(super) fn exists(&self) -> bool {
        matches!(self, Self::Yubikey { existing: true, .. } | Self::Pkcs11 { existing: true, .. })
    }

    /// Whether it is known of all such devices that they have no keys of this type.
    pub(super) fn cannot_make(&self, key_type: KeyType) -> bool {
        match self {
            Self::Softhsm => key_type.is_ml_dsa(),
            Self::Tpm { .. } => key_type.is_ml_dsa() || key_type == KeyType::Ed25519,
            Self::Yubikey { .. } => key_type.is_ml_dsa() || key_type == KeyType::P521,
            Self::Pkcs11 { .. } => false,
        }
    }
}
