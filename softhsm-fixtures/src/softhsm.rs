//! A SoftHSM token in a directory of its own.
//!
//! SoftHSM reads its configuration from the environment once per process, so every step that loads the module
//! is a child process: `softhsm2-util` to make the token, `omsign-fixtures keygen` to make a key.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, bail, ensure};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, CertificateType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use openssl::bn::{BigNum, BigNumContext};
use openssl::ec::{EcGroup, EcKey, EcPoint};
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::rsa::Rsa;

use crate::ca::Ca;
use crate::{built, write_private};

/// Debian's path of the module.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// The user PIN of every token made here. Long enough to be searched for in logs.
pub const PIN: &str = "user-pin-5714";

/// The security officer's.
pub const SO_PIN: &str = "so-pin-2406";

/// What kind of key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// ECDSA on P-521.
    P521,
    /// RSA of 2048 bits, which OMS does not name.
    Rsa,
    /// Ed25519, which OMS does not name.
    Ed25519,
}

/// Which objects of a key stay on the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objects {
    /// Private and public key: as most tools leave them.
    Pair,
    /// Private key and certificate, no public key: as some vendors' tools leave them.
    Certified,
    /// Only the public key: what is left after a mistake.
    PublicOnly,
    /// Only the private key.
    PrivateOnly,
    /// Both, and whoever does not log in signs with it, too.
    Unguarded,
}

/// A token.
#[derive(Clone, Debug)]
pub struct SoftHsm {
    /// Its directory: `softhsm2.conf`, `user.pin`, `tokens/`, and `NAME.pub.pem` for each key.
    pub directory: PathBuf,
    /// Its CKA_LABEL.
    pub label: String,
}

impl SoftHsm {
    /// Makes a token without keys.
    pub fn create(directory: &Path, label: &str) -> anyhow::Result<Self> {
        let token = Self { directory: directory.to_owned(), label: label.to_owned() };
        std::fs::create_dir_all(token.tokens()).context("the token directory")?;
        let tokens = token.tokens();
        let config = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            tokens.display()
        );
        std::fs::write(token.config(), config).context("softhsm2.conf")?;
        write_private(&token.pin_file(), format!("{PIN}\n").as_bytes())?;
        token.initialise()?;
        Ok(token)
    }

    /// Makes a token of this label, empty, where none is.
    pub fn initialise(&self) -> anyhow::Result<()> {
        let mut init = Command::new("softhsm2-util");
        init.args(["--init-token", "--free", "--label", &self.label, "--so-pin", SO_PIN, "--pin", PIN]);
        let made =
            init.env("SOFTHSM2_CONF", self.config()).output().context("softhsm2-util (apt: softhsm2)")?;
        ensure!(made.status.success(), "softhsm2-util: {}", String::from_utf8_lossy(&made.stderr));
        Ok(())
    }

    /// Makes a key. Its public half is left in [`SoftHsm::public_key`].
    pub fn generate(&self, name: &str, key_type: KeyType, objects: Objects) -> anyhow::Result<()> {
        let mut keygen = Command::new(built("omsign-fixtures")?);
        keygen.arg("keygen").arg(&self.directory).args([&self.label, name]);
        keygen.args([key_type.name(), objects.name()]);
        let made = keygen.env("SOFTHSM2_CONF", self.config()).output().context("omsign-fixtures keygen")?;
        ensure!(made.status.success(), "keygen: {}", String::from_utf8_lossy(&made.stderr));
        Ok(())
    }

    /// Deletes a key's objects, behind the back of whoever uses it.
    pub fn delete(&self, name: &str) -> anyhow::Result<()> {
        let mut delete = Command::new(built("omsign-fixtures")?);
        delete.args(["delete-key", &self.label, name]);
        let done =
            delete.env("SOFTHSM2_CONF", self.config()).output().context("omsign-fixtures delete-key")?;
        ensure!(done.status.success(), "delete-key: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    /// Runs `pkcs11-tool` on it, logged in.
    pub fn tool(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut tool = Command::new("pkcs11-tool");
        tool.args(["--module", MODULE, "--token-label", &self.label, "--login", "--pin", PIN])
            .args(arguments);
        let output =
            tool.env("SOFTHSM2_CONF", self.config()).output().context("pkcs11-tool (apt: opensc)")?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Where SoftHSM's configuration is.
    pub fn config(&self) -> PathBuf {
        self.directory.join("softhsm2.conf")
    }

    /// Where the token's objects are.
    pub fn tokens(&self) -> PathBuf {
        self.directory.join("tokens")
    }

    /// A file that holds the user PIN.
    pub fn pin_file(&self) -> PathBuf {
        self.directory.join("user.pin")
    }

    /// `[token.NAME]` of an agent's configuration.
    pub fn section(&self, name: &str) -> String {
        let (pin, config) = (self.pin_file(), self.config());
        format!(
            "\n[token.{name}]\nbackend = \"pkcs11\"\nmodule = \"{MODULE}\"\ntoken = {{ label = \"{}\" }}\n\
             pin = {{ file = \"{}\" }}\nenv.SOFTHSM2_CONF = \"{}\"\n",
            self.label,
            pin.display(),
            config.display()
        )
    }

    /// The public half of a key, PEM.
    pub fn public_key(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pub.pem"))
    }
}

/// The inside of `omsign-fixtures keygen`: one process, one key.
pub fn keygen(
    directory: &Path,
    label: &str,
    name: &str,
    key_type: KeyType,
    objects: Objects,
) -> anyhow::Result<()> {
    let pkcs11 = Pkcs11::new(MODULE)?;
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let session = pkcs11.open_rw_session(slot(&pkcs11, label)?)?;
    session.login(UserType::User, Some(&AuthPin::new(PIN.into())))?;
    let named = || vec![Attribute::Token(true), Attribute::Label(name.into()), Attribute::Id(name.into())];
    let mut public = named();
    public.push(Attribute::Verify(true));
    let mechanism = match key_type {
        KeyType::Rsa => {
            public.extend([Attribute::ModulusBits(2048.into()), Attribute::PublicExponent(vec![1, 0, 1])]);
            Mechanism::RsaPkcsKeyPairGen
        }
        KeyType::Ed25519 => {
            public.push(Attribute::EcParams(key_type.params().to_vec()));
            Mechanism::EccEdwardsKeyPairGen
        }
        KeyType::P256 | KeyType::P384 | KeyType::P521 => {
            public.push(Attribute::EcParams(key_type.params().to_vec()));
            Mechanism::EccKeyPairGen
        }
    };
    let mut private = named();
    let is_private = objects != Objects::Unguarded;
    private.extend([
        Attribute::Private(is_private),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
    ]);
    private.push(Attribute::Sign(true));
    let (public, private) = session.generate_key_pair(&mechanism, &public, &private)?;
    let key = exported(&session, public, key_type)?;
    std::fs::write(directory.join(format!("{name}.pub.pem")), key.public_key_to_pem()?)?;
    if objects == Objects::Certified {
        let ca = Ca::create("Token CA")?;
        let leaf = ca.code_signing(name, &key)?;
        let (der, subject) = (leaf.to_der()?, leaf.subject_name().to_der()?);
        let mut certificate = named();
        certificate.push(Attribute::Subject(subject));
        certificate.extend([Attribute::Class(ObjectClass::CERTIFICATE), Attribute::Value(der)]);
        certificate.push(Attribute::CertificateType(CertificateType::X_509));
        session.create_object(&certificate)?;
    }
    match objects {
        Objects::Pair | Objects::Unguarded => {}
        Objects::Certified | Objects::PrivateOnly => session.destroy_object(public)?,
        Objects::PublicOnly => session.destroy_object(private)?,
    }
    Ok(())
}

/// The inside of `omsign-fixtures many-keys`.
pub fn many_keys(label: &str, count: usize) -> anyhow::Result<()> {
    let pkcs11 = Pkcs11::new(MODULE)?;
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let session = pkcs11.open_rw_session(slot(&pkcs11, label)?)?;
    session.login(UserType::User, Some(&AuthPin::new(PIN.into())))?;
    for number in 0..count {
        let name = format!("many-{number}").into_bytes();
        let named = [Attribute::Token(true), Attribute::Label(name.clone()), Attribute::Id(name)];
        let public = [&named[..], &[Attribute::EcParams(KeyType::P256.params().to_vec())]].concat();
        let private =
            [&named[..], &[Attribute::Private(true), Attribute::Sensitive(true), Attribute::Sign(true)]]
                .concat();
        session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private)?;
    }
    Ok(())
}

/// The inside of `omsign-fixtures delete-key`.
pub fn delete_key(label: &str, name: &str) -> anyhow::Result<()> {
    let pkcs11 = Pkcs11::new(MODULE)?;
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let session = pkcs11.open_rw_session(slot(&pkcs11, label)?)?;
    session.login(UserType::User, Some(&AuthPin::new(PIN.into())))?;
    for object in session.find_objects(&[Attribute::Label(name.into())])? {
        session.destroy_object(object)?;
    }
    Ok(())
}

/// The slot of the token with this label.
pub(crate) fn slot(pkcs11: &Pkcs11, label: &str) -> anyhow::Result<Slot> {
    let matching = |slot: &Slot| pkcs11.get_token_info(*slot).is_ok_and(|token| token.label() == label);
    pkcs11.get_slots_with_token()?.into_iter().find(matching).context("no such token")
}

fn exported(session: &Session, public: ObjectHandle, key_type: KeyType) -> anyhow::Result<PKey<Public>> {
    let types = match key_type {
        KeyType::Rsa => &[AttributeType::Modulus, AttributeType::PublicExponent][..],
        _ => &[AttributeType::EcPoint],
    };
    let attributes = session.get_attributes(public, types)?;
    // SoftHSM wraps a point in a DER OCTET STRING; P-521's length takes two bytes.
    let header = if key_type == KeyType::P521 { 3 } else { 2 };
    match (key_type.curve(), attributes.as_slice()) {
        (_, [Attribute::Modulus(modulus), Attribute::PublicExponent(exponent)]) => {
            let (modulus, exponent) = (BigNum::from_slice(modulus)?, BigNum::from_slice(exponent)?);
            Ok(PKey::from_rsa(Rsa::from_public_components(modulus, exponent)?)?)
        }
        (Some(curve), [Attribute::EcPoint(point)]) => {
            let group = EcGroup::from_curve_name(curve)?;
            let bare = point.get(header..).context("a short EC point")?;
            let point = EcPoint::from_bytes(&group, bare, &mut *BigNumContext::new()?)?;
            Ok(PKey::from_ec_key(EcKey::from_public_key(&group, &point)?)?)
        }
        (None, [Attribute::EcPoint(point)]) => {
            Ok(PKey::public_key_from_raw_bytes(point.get(header..).context("a short point")?, Id::ED25519)?)
        }
        _ => bail!("the token does not show the public half"),
    }
}

impl KeyType {
    fn name(self) -> &'static str {
        match self {
            Self::P256 => "p256",
            Self::P384 => "p384",
            Self::P521 => "p521",
            Self::Rsa => "rsa",
            Self::Ed25519 => "ed25519",
        }
    }

    /// DER of the curve's name (RFC 5480, RFC 8410); empty for RSA.
    fn params(self) -> &'static [u8] {
        match self {
            Self::P256 => &[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7],
            Self::P384 => &[6, 5, 0x2b, 0x81, 4, 0, 0x22],
            Self::P521 => &[6, 5, 0x2b, 0x81, 4, 0, 0x23],
            Self::Ed25519 => &[6, 3, 0x2b, 0x65, 0x70],
            Self::Rsa => &[],
        }
    }

    /// OpenSSL's number of the NIST curve.
    fn curve(self) -> Option<Nid> {
        match self {
            Self::P256 => Some(Nid::X9_62_PRIME256V1),
            Self::P384 => Some(Nid::SECP384R1),
            Self::P521 => Some(Nid::SECP521R1),
            Self::Rsa | Self::Ed25519 => None,
        }
    }
}

impl Objects {
    fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Certified => "certified",
            Self::PublicOnly => "public-only",
            Self::PrivateOnly => "private-only",
            Self::Unguarded => "unguarded",
        }
    }
}

impl FromStr for KeyType {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let all = [Self::P256, Self::P384, Self::P521, Self::Rsa, Self::Ed25519];
        all.into_iter().find(|kind| kind.name() == text).context("expected p256, p384, p521, rsa or ed25519")
    }
}

impl FromStr for Objects {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let all = [Self::Pair, Self::Certified, Self::PublicOnly, Self::PrivateOnly, Self::Unguarded];
        all.into_iter()
            .find(|o| o.name() == text)
            .context("expected pair, certified, public-only, private-only or unguarded")
    }
}
