//! One device of each kind, with keys, in the words of the configuration.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use omsign_fixtures::built;
use omsign_fixtures::kryoptic::Kryoptic;
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::{KeyType, MODULE, Objects, PIN, SoftHsm};
use omsign_fixtures::swtpm::{AUTH, SwTpm};

use crate::agent::eventually;
use crate::operator::does;
use crate::world::{World, key, key_section, text, token_section};

/// A key to try: its section, and its public half as the device's own tools give it.
pub struct Expected {
    /// Its name in the configuration.
    pub name: &'static str,
    /// How it signs.
    pub algorithm: &'static str,
    /// A file with it, PEM.
    pub public: PathBuf,
    /// It without an agent; empty where a URI cannot say it.
    pub uri: String,
}

/// A device with keys, in the words of the configuration.
pub struct Device {
    /// `[token.device]`
    pub token: String,
    /// `[key.…]` for each key.
    pub keys: String,
    /// What the keys are.
    pub expected: Vec<Expected>,
    /// What a process needs that uses it without an agent.
    pub environment: Vec<(&'static str, PathBuf)>,
    /// Its PIN or authorization value: never to be seen anywhere.
    pub secret: &'static str,
}

/// A SoftHSM token with a key on each curve.
pub fn soft_hsm(world: &World) -> anyhow::Result<Device> {
    let (token, mut device) = empty_soft_hsm(world)?;
    for (name, key_type, algorithm) in [
        ("p256", KeyType::P256, "ecdsa-p256-sha256"),
        ("p384", KeyType::P384, "ecdsa-p384-sha384"),
        ("p521", KeyType::P521, "ecdsa-p521-sha512"),
        ("rsa", KeyType::Rsa, "rsa-pkcs1-sha256"),
        ("ed25519", KeyType::Ed25519, "ed25519"),
    ] {
        token.generate(name, key_type, Objects::Pair)?;
        device.keys += &key_section(name, "device", name);
        let (public, uri) = (token.public_key(name), uri("soft", name, MODULE, &token.pin_file()));
        device.expected.push(Expected { name, algorithm, public, uri });
    }
    device.pads_otherwise("pss", "rsa")?;
    Ok(device)
}

/// A SoftHSM token with the larger RSA keys, made by omsign.
pub fn soft_hsm_with_rsa(world: &World) -> anyhow::Result<Device> {
    let (token, mut device) = empty_soft_hsm(world)?;
    let kinds = [("rsa3072", "rsa3072", "rsa-pkcs1-sha256"), ("rsa4096", "rsa4096", "rsa-pkcs1-sha256")];
    device.makes(world, &kinds, |name| uri("soft", name, MODULE, &token.pin_file()))?;
    device.pads_otherwise("pss3072", "rsa3072")?;
    device.pads_otherwise("pss4096", "rsa4096")?;
    Ok(device)
}

/// A SoftHSM token with a key that asks for the PIN before every signature.
pub fn soft_hsm_that_asks(world: &World) -> anyhow::Result<Device> {
    let (token, mut device) = empty_soft_hsm(world)?;
    let kinds = [("rsa", "rsa:2048", "rsa-pkcs1-sha256")];
    device.asks_always(world, &kinds, &|arguments| token.tool(arguments), |name| {
        uri("soft", name, MODULE, &token.pin_file())
    })?;
    Ok(device)
}

fn empty_soft_hsm(world: &World) -> anyhow::Result<(SoftHsm, Device)> {
    let token = SoftHsm::create(&world.path("soft"), "soft")?;
    let device = Device {
        token: token_section("device", &token, ""),
        keys: String::new(),
        expected: Vec::new(),
        environment: vec![("SOFTHSM2_CONF", token.config())],
        secret: PIN,
    };
    Ok((token, device))
}

/// A key on a PKCS#11 token (RFC 7512).
fn uri(token: &str, name: &str, module: &str, pin: &Path) -> String {
    format!("pkcs11:token={token};object={name}?module-path={module}&pin-source=file:{}", pin.display())
}

impl Device {
    /// Forgets a key that cannot be used by the way that is tried.
    pub fn loses(&mut self, name: &str) {
        self.expected.retain(|key| key.name != name);
        let sections = self.keys.split("\n[key.").filter(|section| !section.starts_with(&format!("{name}]")));
        self.keys = sections.collect::<Vec<_>>().join("\n[key.");
    }

    /// A TPM is reached by another way.
    pub fn is_reached_by(&mut self, old: &str, new: &str) {
        self.token = self.token.replace(old, new);
        self.expected.iter_mut().for_each(|key| key.uri = key.uri.replace(old, new));
        self.environment
            .iter_mut()
            .filter(|(_, value)| *value == Path::new(old))
            .for_each(|one| one.1 = new.into());
    }

    /// Signs with each key that a URI can name, without an agent.
    pub fn signs_alone(&self, world: &World) -> anyhow::Result<()> {
        for key in self.expected.iter().filter(|key| !key.uri.is_empty()) {
            let mut command = Command::new(built("omsign")?);
            command.args(["sign", "model", "--signature", "alone.sig", "--key-uri", &key.uri]);
            command.arg("--allow-nonstandard-key");
            world.without_surprises(command.current_dir(world.path("")));
            let output = command.envs(self.environment.iter().cloned()).output()?;
            ensure!(output.status.success(), "{}: {}", key.uri, String::from_utf8_lossy(&output.stderr));
            let public = text(&key.public);
            world.omsign_ok(&["verify", "model", "--signature", "alone.sig", "--public-key", &public])?;
            std::fs::remove_file(world.path("alone.sig"))?;
        }
        Ok(())
    }

    /// Has omsign make a key of each kind: name, `--type` and algorithm.
    fn makes(
        &mut self,
        world: &World,
        kinds: &[(&'static str, &str, &'static str)],
        uri: impl Fn(&str) -> String,
    ) -> anyhow::Result<()> {
        self.keys.extend(kinds.iter().map(|(name, ..)| key_section(name, "device", name)));
        world.write("agent.toml", world.listen() + &self.token + &self.keys)?;
        for (name, kind, algorithm) in kinds {
            let made = does(world, &["generate", name, "--type", kind])?;
            let public = world.write(&format!("{name}.pub.pem"), made)?;
            self.expected.push(Expected { name, algorithm, public, uri: uri(name) });
        }
        Ok(())
    }

    /// Has `pkcs11-tool` make keys that ask for the PIN before every signature: name, kind as it calls it, and algorithm;
    /// and the RSA key pads otherwise, too.
    fn asks_always(
        &mut self,
        world: &World,
        kinds: &[(&'static str, &str, &'static str)],
        tool: &dyn Fn(&[&str]) -> anyhow::Result<()>,
        uri: impl Fn(&str) -> String,
    ) -> anyhow::Result<()> {
        for (name, kind, algorithm) in kinds {
            let make = ["--keypairgen", "--key-type", kind, "--usage-sign", "--always-auth"];
            tool(&[&make[..], &["--label", name, "--id", &hex::encode(name)]].concat())?;
            // OpenSC's tool cannot write all of them; a signature tells whose they are.
            let public = world.path(&format!("{name}.pub.pem"));
            self.keys += &key_section(name, "device", name);
            self.expected.push(Expected { name, algorithm, public, uri: uri(name) });
        }
        self.pads_otherwise("pss", "rsa")
    }

    /// The RSA key that is there, with the other padding.
    fn pads_otherwise(&mut self, name: &'static str, key: &str) -> anyhow::Result<()> {
        let same = self.expected.iter().find(|other| other.name == key).context("the key")?;
        let (public, uri) = (same.public.clone(), String::new());
        self.keys += &key_section(name, "device", key).replace("[[key", "padding = \"pss\"\n[[key");
        self.expected.push(Expected { name, algorithm: "rsa-pss-sha256", public, uri });
        Ok(())
    }
}

/// A kryoptic token with a key of each kind that omsign makes on it, ML-DSA among them.
pub fn kryoptic(world: &World, token: &Kryoptic) -> anyhow::Result<Device> {
    let kinds = [
        ("p256", "p256", "ecdsa-p256-sha256"),
        ("p384", "p384", "ecdsa-p384-sha384"),
        ("p521", "p521", "ecdsa-p521-sha512"),
        ("rsa", "rsa2048", "rsa-pkcs1-sha256"),
        ("ed25519", "ed25519", "ed25519"),
        ("mldsa44", "ml-dsa-44", "ml-dsa-44"),
        ("mldsa65", "ml-dsa-65", "ml-dsa-65"),
        ("mldsa87", "ml-dsa-87", "ml-dsa-87"),
    ];
    let mut device = empty_kryoptic(token)?;
    let module = text(&Kryoptic::module()?);
    device.makes(world, &kinds, |name| uri(token.label(), name, &module, &token.pin_file()))?;
    device.pads_otherwise("pss", "rsa")?;
    Ok(device)
}

/// The same with keys that ask for the PIN before every signature.
pub fn kryoptic_that_asks(world: &World, token: &Kryoptic) -> anyhow::Result<Device> {
    let kinds = [
        ("p256", "EC:prime256v1", "ecdsa-p256-sha256"),
        ("p384", "EC:secp384r1", "ecdsa-p384-sha384"),
        ("p521", "EC:secp521r1", "ecdsa-p521-sha512"),
        ("rsa", "rsa:2048", "rsa-pkcs1-sha256"),
        ("ed25519", "EC:edwards25519", "ed25519"),
    ];
    let mut device = empty_kryoptic(token)?;
    let (login, module) =
        (["--token-label", token.label(), "--login", "--pin", device.secret], Kryoptic::module()?);
    let tool = |arguments: &[&str]| token.tool(&[&login[..], arguments].concat()).map(drop);
    device.asks_always(world, &kinds, &tool, |name| {
        uri(token.label(), name, &text(&module), &token.pin_file())
    })?;
    Ok(device)
}

fn empty_kryoptic(token: &Kryoptic) -> anyhow::Result<Device> {
    Ok(Device {
        token: token.section("device")?,
        keys: String::new(),
        expected: Vec::new(),
        environment: vec![("KRYOPTIC_CONF", token.config())],
        secret: omsign_fixtures::kryoptic::PIN,
    })
}

/// A software TPM with a persistent key and a key file.
pub fn tpm(tpm: &SwTpm) -> anyhow::Result<Device> {
    let (pin, tcti) = (tpm.pin_file(), tpm.tcti());
    let persistent = tpm.persistent_key("p256", "ecc256", 0x8100_0010, AUTH)?;
    let (file, public) = tpm.key_file("p384", "EC", "group:P-384")?;
    let (rsa_file, rsa_public) = tpm.key_file("rsa", "RSA", "bits:2048")?;
    let uri = |key: String| format!("tpm:{key}?tcti={tcti}&pin-source={}", pin.display());
    Ok(Device {
        token: tpm.section("device"),
        keys: key("p256", "device", "handle = \"0x81000010\"")
            + &key("p384", "device", &format!("file = \"{}\"", file.display()))
            + &key("rsa", "device", &format!("file = \"{}\"", rsa_file.display())),
        expected: vec![
            Expected {
                name: "p256",
                algorithm: "ecdsa-p256-sha256",
                public: persistent,
                uri: uri("handle=0x81000010".into()),
            },
            Expected {
                name: "p384",
                algorithm: "ecdsa-p384-sha384",
                public,
                uri: uri(format!("file={}", file.display())),
            },
            Expected {
                name: "rsa",
                algorithm: "rsa-pkcs1-sha256",
                public: rsa_public,
                uri: uri(format!("file={}", rsa_file.display())),
            },
        ],
        environment: Vec::new(),
        secret: AUTH,
    })
}

/// A virtual card with a key that asks for the PIN each time, and one that asks once.
pub fn card(card: &VirtualPiv) -> anyhow::Result<Device> {
    card.change_pin()?;
    let (serial, pin, socket) = (card.serial, card.pin_file(), card.socket());
    let mut expected = Vec::new();
    for (name, slot, algorithm, generated) in [
        ("p256", "9c", "ecdsa-p256-sha256", "ECCP256"),
        ("p384", "82", "ecdsa-p384-sha384", "ECCP384"),
        ("rsa", "83", "rsa-pkcs1-sha256", "RSA2048"),
    ] {
        let public = card.generate(slot, generated, &[])?;
        let uri = format!("piv:serial={serial};slot={slot}?pin-source={}", pin.display());
        expected.push(Expected { name, algorithm, public, uri });
    }
    Ok(Device {
        token: card.section("device"),
        keys: key("p256", "device", "slot = \"9c\"")
            + &key("p384", "device", "slot = \"82\"")
            + &key("rsa", "device", "slot = \"83\""),
        expected,
        environment: vec![("PCSCLITE_CSOCK_NAME", socket)],
        secret: piv::PIN,
    })
}

/// The same card through a PKCS#11 module: Yubico's or OpenSC's.
pub fn card_through(card: &VirtualPiv, module: &str, slots: &[&'static str]) -> anyhow::Result<Device> {
    card.change_pin()?;
    let (pin, socket, module) = (card.pin_file(), card.socket(), debian_module(module));
    let (mut expected, mut keys) = (Vec::new(), String::new());
    for slot in slots {
        // CKA_ID as both modules number the slots.
        let (id, generated, algorithm) = match *slot {
            "9a" => ("01", "ECCP256", "ecdsa-p256-sha256"),
            "9c" => ("02", "ECCP384", "ecdsa-p384-sha384"),
            _ => ("04", "RSA2048", "rsa-pkcs1-sha256"),
        };
        let public = card.generate(slot, generated, &[])?;
        card.certify(slot, &public)?;
        keys += &key(slot, "device", &format!("id = \"{id}\""));
        let uri = format!("pkcs11:slot-id=0;id=%{id}?module-path={module}&pin-source=file:{}", pin.display());
        expected.push(Expected { name: slot, algorithm, public, uri });
    }
    Ok(Device {
        token: format!(
            "\n[token.device]\nbackend = \"pkcs11\"\nmodule = \"{module}\"\ntoken = {{ slot = 0 }}\n\
             pin = {{ file = \"{}\" }}\nenv.PCSCLITE_CSOCK_NAME = \"{}\"\n",
            pin.display(),
            socket.display()
        ),
        keys,
        expected,
        environment: vec![("PCSCLITE_CSOCK_NAME", socket)],
        secret: piv::PIN,
    })
}

/// The same TPM through tpm2-pkcs11, with a token and no key yet.
pub fn tpm_through_pkcs11(world: &World, tpm: &SwTpm) -> anyhow::Result<Device> {
    let (store, module) = (world.path("store"), debian_module("libtpm2_pkcs11.so.1"));
    std::fs::create_dir_all(&store)?;
    let init = |arguments: &[&str]| {
        let mut tool = Command::new("pkcs11-tool");
        tool.args(["--module", &module, "--so-pin", "so-pin-2406"]).args(arguments);
        tool.env("TPM2_PKCS11_STORE", &store).env("TPM2_PKCS11_TCTI", tpm.tcti());
        let output = tool.output().context("pkcs11-tool (apt: opensc)")?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    };
    init(&["--init-token", "--slot-index", "0", "--label", "chip"])?;
    init(&["--init-pin", "--login", "--login-type", "so", "--token-label", "chip", "--pin", AUTH])?;
    let (pin, tcti) = (tpm.pin_file(), tpm.tcti());
    let kinds =
        [("p256", "ecdsa-p256-sha256"), ("p384", "ecdsa-p384-sha384"), ("rsa2048", "rsa-pkcs1-sha256")];
    let expected = |(name, algorithm): &(&'static str, &'static str)| Expected {
        name,
        algorithm,
        public: world.path(&format!("{name}.pub.pem")),
        uri: format!(
            "pkcs11:token=chip;object={name}?module-path={module}&pin-source=file:{}",
            pin.display()
        ),
    };
    Ok(Device {
        token: format!(
            "\n[token.device]\nbackend = \"pkcs11\"\nmodule = \"{module}\"\ntoken = {{ label = \"chip\" }}\n\
             pin = {{ file = \"{}\" }}\nenv.TPM2_PKCS11_STORE = \"{}\"\nenv.TPM2_PKCS11_TCTI = \"{tcti}\"\n",
            pin.display(),
            store.display()
        ),
        keys: kinds.iter().map(|(name, _)| key_section(name, "device", name)).collect(),
        expected: kinds.iter().map(expected).collect(),
        environment: vec![("TPM2_PKCS11_STORE", store), ("TPM2_PKCS11_TCTI", tcti.into())],
        secret: AUTH,
    })
}

/// Where Debian keeps a PKCS#11 module.
pub fn debian_module(name: &str) -> String {
    format!("/usr/lib/{}-linux-gnu/{name}", std::env::consts::ARCH)
}

/// `p11-kit server` with a token of ours. It ends with us.
pub struct RemoteToken(Child);

impl RemoteToken {
    /// Puts the server and p11-kit's client module before the module of a SoftHSM device.
    pub fn of(world: &World, device: &mut Device) -> anyhow::Result<Self> {
        let config = device.environment.first().context("a configuration")?.1.clone();
        let (socket, client) = (world.path("p11-kit.sock"), debian_module("pkcs11/p11-kit-client.so"));
        let mut server = Command::new("setpriv");
        server.args(["--pdeathsig", "KILL", "p11-kit", "server", "--foreground", "--name"]).arg(&socket);
        server.args(["--provider", MODULE, "pkcs11:"]).env("SOFTHSM2_CONF", config);
        server.stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(server.spawn().context("p11-kit (apt: p11-kit, p11-kit-modules)")?);
        eventually("p11-kit's socket", || Ok(socket.exists()))?;
        let address = format!("unix:path={}", socket.display());
        // Its protocol does not know CKM_EDDSA, as the profile says.
        device.loses("ed25519");
        device.token = device.token.replace(MODULE, &client);
        writeln!(device.token, "env.P11_KIT_SERVER_ADDRESS = \"{address}\"")?;
        for key in &mut device.expected {
            key.uri = key.uri.replace(MODULE, &client);
        }
        device.environment.push(("P11_KIT_SERVER_ADDRESS", address.into()));
        Ok(server)
    }
}

impl Drop for RemoteToken {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
