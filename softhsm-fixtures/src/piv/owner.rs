//! What the owner of a card does with it, mostly with Yubico's own tool.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use openssl::pkey::{PKey, Private};

use super::{PIN, PUK, VirtualPiv};
use crate::ca::{Ca, write_chain};
use crate::write_private;

impl VirtualPiv {
    /// Makes a key as an owner does, with Yubico's own tool, and leaves its public half in `SLOT.pub.pem`.
    pub fn generate(&self, slot: &str, algorithm: &str, policies: &[&str]) -> anyhow::Result<PathBuf> {
        let public = self.directory.join(format!("{slot}.pub.pem"));
        let made = self.tool(&[&["-a", "generate", "-s", slot, "-A", algorithm][..], policies].concat())?;
        std::fs::write(&public, made)?;
        Ok(public)
    }

    /// Puts a certificate for this slot's key on the card: without one, OpenSC does not see the key.
    pub fn certify(&self, slot: &str, public: &Path) -> anyhow::Result<()> {
        let key = PKey::public_key_from_pem(&std::fs::read(public)?)?;
        let path = self.directory.join(format!("{slot}.crt.pem"));
        write_chain(&path, &[&Ca::create("Card CA")?.code_signing(slot, &key)?])?;
        let path = path.display().to_string();
        self.tool(&["-a", "import-certificate", "-s", slot, "-i", &path]).map(drop)
    }

    /// The certificate of the key that signs its attestations, which stands in for Yubico's; PEM.
    pub fn attestation_root(&self) -> anyhow::Result<Vec<u8>> {
        self.tool(&["-a", "read-certificate", "-s", "f9"])
    }

    /// Puts a key there that was made elsewhere; leaves its public half in `SLOT.pub.pem`, too.
    pub fn import(&self, slot: &str, private: &PKey<Private>) -> anyhow::Result<PathBuf> {
        let (key, public) = (self.directory.join("own.pem"), self.directory.join(format!("{slot}.pub.pem")));
        write_private(&key, &private.private_key_to_pem_pkcs8()?)?;
        std::fs::write(&public, private.public_key_to_pem()?)?;
        self.tool(&["-a", "import-key", "-s", slot, "-i", &key.display().to_string()])?;
        Ok(public)
    }

    /// Changes the factory's PUK.
    pub fn change_puk(&self) -> anyhow::Result<()> {
        self.tool(&["-a", "change-puk", "-P", "12345678", "-N", PUK]).map(drop)
    }

    /// Changes the factory's PIN to [`PIN`].
    pub fn change_pin(&self) -> anyhow::Result<()> {
        self.tool(&["-a", "change-pin", "-P", "123456", "-N", PIN]).map(drop)
    }

    /// Changes the factory's management key to a random one that the card keeps behind its PIN, as `ykman piv access
    /// change-management-key --generate --protect` does.
    pub fn protect_management_key(&self) -> anyhow::Result<()> {
        self.inside.card().protect_management_key().context("OpenSSL")
    }

    /// Makes its firmware another one: before 5.7 a card makes fewer kinds of keys and deletes none.
    pub fn set_firmware(&self, version: [u8; 3]) {
        self.inside.card().version = version;
    }

    /// Somebody deletes the key in a slot.
    pub fn delete(&self, slot: u8) {
        self.inside.card().slots.remove(&slot);
    }

    /// Somebody resets its PIV application: it is as it left the factory.
    pub fn reset(&self) -> anyhow::Result<()> {
        self.inside.card().make_new().context("OpenSSL")
    }

    /// How many wrong PINs the card would still take.
    pub fn pin_tries(&self) -> anyhow::Result<u8> {
        let status = String::from_utf8(self.tool(&["-a", "status"])?)?;
        let line = status.lines().find_map(|line| line.strip_prefix("PIN tries left:"));
        line.and_then(|tries| tries.trim().parse().ok()).context("PIN tries")
    }

    /// Somebody enters wrong PINs, one right after the other.
    pub fn enter_wrong_pins(&self, count: usize) {
        let mut card = self.inside.card();
        for _ in 0..count {
            let _ = card.verify(0, 0x80, b"87654321");
        }
    }

    /// Somebody changes the PIN, and whoever else uses the card notices nothing of that.
    pub fn exchange_pin(&self, from: &str, to: &str) {
        let padded = |pin: &str| {
            let mut padded = pin.as_bytes().to_vec();
            padded.resize(8, 0xff);
            padded
        };
        let changed = self.inside.card().change(0x80, &[padded(from), padded(to)].concat());
        assert!(changed.is_ok(), "the PIN is another");
    }

    /// How many wrong PINs it was ever given.
    pub fn wrong_pins(&self) -> usize {
        self.inside.card().wrong_pins
    }

    /// Runs `yubico-piv-tool` on the card.
    pub fn tool(&self, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        let mut tool = Command::new("yubico-piv-tool");
        tool.args(["-r", self.reader]).args(arguments).env("PCSCLITE_CSOCK_NAME", self.socket());
        let output = tool.stdin(Stdio::null()).output().context("yubico-piv-tool (apt: yubico-piv-tool)")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "yubico-piv-tool {arguments:?}: {errors}");
        Ok(output.stdout)
    }
}
