//! Which device, and what only its owner knows of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

use super::{Ask, Init, InitError, Left, Wish};
use crate::algorithm::KeyType;
use crate::config::{Device, Object, PinSource, Profile, Tcti, Token, TokenSelector};
use crate::host::task::TouchPolicy;
use crate::host::wire::{Factory, Fresh, Survey};
use crate::secret::Pin;
use crate::token::{prepare, survey};

/// What every YubiKey has when it is new: its PIN and its PUK.
const FACTORY: [&str; 2] = ["123456", "12345678"];

/// A device, in the words of the configuration.
pub(super) struct Chosen {
    /// What goes into `[token.NAME]`.
    pub(super) token: String,
    /// `object = …`
    pub(super) object: String,
    /// What suits it.
    pub(super) key_type: KeyType,
    /// The PIN, where the configuration does not say where it is.
    pub(super) pin: Option<Zeroizing<String>>,
    /// Whether its key is there already.
    pub(super) exists: bool,
    /// What makes its keys, where its users' login cannot.
    pub(super) made_by: String,
    pub(super) notes: Vec<String>,
}

impl Chosen {
    /// Says what a key without a touch means.
    fn touched(mut self, policy: Option<TouchPolicy>) -> Self {
        if !self.exists && policy.is_none_or(|policy| policy == TouchPolicy::Never) {
            let note =
                "it signs without a touch; --touch-policy always makes one that waits for it each time";
            self.notes.push(note.into());
        }
        self
    }
}

impl Init {
    /// Finds the device, and changes what everybody knows of it.
    pub(super) async fn choose(
        &self,
        ask: Ask<'_>,
        say: &(dyn Fn(&str) + Sync),
        left: &mut Left<'_>,
    ) -> Result<Chosen, InitError> {
        match &self.wish {
            Wish::Softhsm => self.softhsm(left).await,
            Wish::Tpm { tcti } => self.tpm(tcti.as_deref(), ask, left).await,
            Wish::Yubikey { serial, slot, touch_policy, .. } => {
                let chosen = self.yubikey(*serial, slot, ask, say).await?;
                Ok(chosen.touched(*touch_policy))
            }
            Wish::Pkcs11 { profile, module, label, key_label, key_id, .. } => {
                let object = match key_id {
                    Some(id) => format!("{{ id = {} }}", quoted(id)),
                    None => format!("{{ label = {} }}", quoted(key_label.as_ref().unwrap_or(&self.name))),
                };
                self.pkcs11(profile.as_deref(), module.clone(), label.as_deref(), object, ask).await
            }
        }
    }

    async fn softhsm(&self, left: &mut Left<'_>) -> Result<Chosen, InitError> {
        let profile = Profile::named("softhsm").map_err(InitError::Wrong)?;
        let absent = || InitError::Wrong("SoftHSM is not installed: apt-get install softhsm2".into());
        let module = profile.library().ok_or_else(absent)?;
        let directory = self.directory.join("softhsm");
        std::fs::create_dir(&directory).map_err(super::system("make", &directory))?;
        left.files.push(directory.clone());
        let config = directory.join("softhsm2.conf");
        left.write(&config, &format!("directories.tokendir = {}\nlog.level = ERROR\n", directory.display()))?;
        let (pin, puk) = (random()?, random()?);
        let mut token = bare(Device::Pkcs11 { module, select: Box::default(), profile: Box::new(profile) });
        token.env.insert("SOFTHSM2_CONF".into(), config.display().to_string());
        let fresh = Fresh {
            label: self.name.clone(),
            pin: pin.to_string(),
            puk: puk.to_string(),
            management_key: false,
        };
        prepare(&self.name, &token, None, fresh).await.map_err(InitError::Wrong)?;
        self.keep("pin", &pin, left)?;
        self.keep("so-pin", &puk, left)?;
        Ok(Chosen {
            token: format!(
                "backend = \"pkcs11\"\nprofile = \"softhsm\"\ntoken = {{ label = {0} }}\npin = {{ file = \"{1}.pin\" }}\n\
                 env = {{ SOFTHSM2_CONF = {2} }}\n",
                quoted(&self.name),
                self.name,
                quoted(&config.display().to_string())
            ),
            object: format!("{{ label = {} }}", quoted(&self.name)),
            key_type: KeyType::P384,
            pin: None,
            exists: false,
            made_by: String::new(),
            notes: vec!["SoftHSM keeps keys in files: for trials, not for releases".into()],
        })
    }

    async fn tpm(&self, tcti: Option<&str>, ask: Ask<'_>, left: &mut Left<'_>) -> Result<Chosen, InitError> {
        let text = tcti.unwrap_or(crate::config::DEFAULT_TCTI);
        let parsed: Tcti = text.parse().map_err(|error| InitError::Wrong(format!("{error}")))?;
        let found = survey(&self.name, &bare(Device::Tpm(parsed))).await.map_err(InitError::Wrong)?;
        let mut owner_auth = String::new();
        if found.tokens.iter().any(|chip| chip.has_owner_auth) {
            let value = answer("authorization value of the TPM's owner hierarchy", ask)?;
            self.keep("owner", &value, left)?;
            owner_auth = format!("owner_auth = {{ file = \"{}.owner\" }}\n", self.name);
        }
        self.keep("pin", &random()?, left)?;
        let notes = found.tokens.into_iter().flat_map(|token| token.notes).collect();
        Ok(Chosen {
            token: format!(
                "backend = \"tpm\"\ntcti = {}\npin = {{ file = \"{}.pin\" }}\n{owner_auth}timeout = \"30s\"\n",
                quoted(text),
                self.name
            ),
            object: format!("{{ file = \"{}.tpm.pem\" }}", self.name),
            key_type: KeyType::P256,
            pin: None,
            exists: false,
            made_by: String::new(),
            notes,
        })
    }

    async fn yubikey(
        &self,
        serial: Option<u32>,
        slot: &str,
        ask: Ask<'_>,
        say: &(dyn Fn(&str) + Sync),
    ) -> Result<Chosen, InitError> {
        let found = survey(&self.name, &bare(Device::Piv { serial: serial.unwrap_or(0) })).await;
        let found = found.map_err(InitError::Wrong)?;
        let card = match found.tokens.as_slice() {
            [one] => one,
            [] => return Err(InitError::Wrong("no YubiKey is connected; plug it in".into())),
            several => {
                let serials: Vec<_> = several.iter().map(|card| card.label.as_str()).collect();
                let message =
                    format!("several YubiKeys are connected; choose one: --serial {}", serials.join(" or "));
                return Err(InitError::Wrong(message));
            }
        };
        let (is, label) = (|which| card.factory.contains(&which), &card.label);
        let serial = label.parse().map_err(|_| InitError::Wrong("the card has no serial number".into()))?;
        let slot_number = Object::piv_slot(slot);
        let wanted =
            slot_number.ok_or_else(|| InitError::Wrong(format!("there is no slot {slot:?} for keys")))?;
        match (card.objects.contains(&wanted), self.wish.exists()) {
            (true, true) | (false, false) => {}
            (true, false) => {
                return Err(InitError::Wrong(format!(
                    "the card has a key in {wanted} already; --existing uses it, or choose another: --slot 9a, 82 to 95"
                )));
            }
            (false, true) => {
                return Err(InitError::Wrong(format!(
                    "the card has no key in {wanted}: leave --existing out"
                )));
            }
        }
        match card.tries {
            Some(0) => {
                let message = "its PIN is blocked; unblock it with the PUK: ykman piv access unblock-pin";
                return Err(InitError::Wrong(message.into()));
            }
            Some(1) => say("one wrong PIN more blocks this YubiKey's PIN"),
            _ => {}
        }
        let mut fresh = Fresh::default();
        fresh.management_key = is(Factory::ManagementKey);
        if is(Factory::Pin) {
            say(
                "this YubiKey has the PIN that all of them have when they are new; choose another, of 6 to 8 characters",
            );
            fresh.pin = chosen("new PIN", ask)?.to_string();
        }
        if is(Factory::Puk) {
            say(
                "its PUK, which unblocks the PIN, is the one from the factory, too; choose another, of 6 to 8 characters",
            );
            fresh.puk = chosen("new PUK", ask)?.to_string();
        }
        let pin = match fresh.pin.as_str() {
            "" => answer("PIN", ask)?,
            pin => Zeroizing::new(pin.to_owned()),
        };
        if !card.factory.is_empty() {
            if fresh.management_key {
                say(
                    "its management key, the one from the factory, is replaced by a random one that it keeps behind its PIN",
                );
            }
            let given = Pin::new(pin.to_string());
            let done = prepare(&self.name, &bare(Device::Piv { serial }), given, fresh).await;
            done.map_err(InitError::Wrong)?;
            say("changed; from here on they are what you typed");
        }
        Ok(Chosen {
            token: format!(
                "backend = \"piv\"\nserial = {serial}\npin = \"prompt\"\n{}",
                env(["PCSCLITE_CSOCK_NAME".to_owned()].iter())
            ),
            object: format!("{{ slot = {} }}", quoted(slot)),
            key_type: KeyType::P256,
            pin: Some(pin),
            exists: self.wish.exists(),
            made_by: String::new(),
            notes: vec![
                "keep the PUK where the PIN is not: it unblocks the PIN after three wrong ones".into(),
            ],
        })
    }

    async fn pkcs11(
        &self,
        profile: Option<&str>,
        module: Option<PathBuf>,
        label: Option<&str>,
        object: String,
        ask: Ask<'_>,
    ) -> Result<Chosen, InitError> {
        let named = profile.map(Profile::named).transpose().map_err(InitError::Wrong)?;
        let known = module.or_else(|| named.as_ref().and_then(Profile::library));
        let absent =
            || InitError::Wrong("the profile's library is not installed; give its path with --module".into());
        let module = std::path::absolute(known.ok_or_else(absent)?)
            .map_err(|source| InitError::System { what: "cannot find the module".into(), source })?;
        let known = named.unwrap_or_else(|| Profile::of_module(&module));
        let select = TokenSelector { label: label.map(str::to_owned), ..TokenSelector::default() };
        let select = Box::new(select);
        let token = bare(Device::Pkcs11 { module: module.clone(), select, profile: Box::new(known.clone()) });
        let told = |message: String| {
            InitError::Wrong([vec![message], known.unset(&BTreeMap::new())].concat().join("; "))
        };
        let Survey { tokens, .. } = survey(&self.name, &token).await.map_err(told)?;
        let labels: Vec<_> = tokens.iter().map(|token| format!("{:?}", token.label)).collect();
        let selected: Vec<_> = tokens.iter().filter(|token| token.selected).collect();
        let [token] = selected.as_slice() else {
            return Err(match labels.as_slice() {
                [] => told(
                    "the module shows no initialized token; initialize one with the vendor's tool".into(),
                ),
                labels => InitError::Wrong(format!("choose one token: --label {}", labels.join(" or "))),
            });
        };
        if !known.made_by.is_empty() && self.key_type.is_some() {
            let message = format!("this device's keys are made with {}; leave --type out", known.made_by);
            return Err(InitError::Wrong(message));
        }
        let form = match known.pin.as_str() {
            _ if token.has_pad && token.wants_login => " (nothing, to enter it on the device)".to_owned(),
            _ if known.may_hold_pin => " (nothing, where the module's own configuration has it)".to_owned(),
            _ if !token.wants_login => " (nothing, where its keys need none)".to_owned(),
            "" => String::new(),
            form => format!(" ({form})"),
        };
        let question = format!("PIN of the token {:?}{form}", token.label);
        let pin = match !token.wants_login || known.may_hold_pin || token.has_pad {
            true => Some(asked(&question, ask)?).filter(|pin| !pin.is_empty()),
            false => Some(answer(&question, ask)?),
        };
        let source = match &pin {
            Some(_) => "# Or a file that only the agent can read: pin = { file = \"…\" }\npin = \"prompt\"\n",
            None if token.has_pad && token.wants_login => "pin = \"device\"\n",
            None => "pin = \"none\"\n",
        };
        let profile = profile.map(|name| format!("profile = {}\n", quoted(name))).unwrap_or_default();
        let env = env(known.environment.iter().chain(&known.environment_if_set));
        Ok(Chosen {
            token: format!(
                "backend = \"pkcs11\"\n{profile}module = {}\ntoken = {{ label = {} }}\n{source}{env}",
                quoted(&module.display().to_string()),
                quoted(&token.label)
            ),
            object,
            key_type: KeyType::P384,
            pin,
            exists: self.wish.exists() || !known.made_by.is_empty(),
            made_by: known.made_by.clone(),
            notes: token.notes.clone(),
        })
    }

    /// Leaves a secret in a file for its owner alone.
    fn keep(&self, extension: &str, secret: &str, left: &mut Left<'_>) -> Result<(), InitError> {
        let line = Zeroizing::new(format!("{secret}\n"));
        left.write(&self.directory.join(format!("{}.{extension}", self.name)), &line)
    }
}

/// A device without anything else.
fn bare(device: Device) -> Token {
    Token {
        device,
        pin: PinSource::None,
        owner_auth: PinSource::None,
        sessions: 1,
        timeout: Duration::from_secs(20),
        queue: 1,
        required: false,
        touch_command: Vec::new(),
        directory: PathBuf::from("/"),
        env: BTreeMap::new(),
        hidden_env: Vec::new(),
    }
}

/// What the device was found with is set here, and has to be there when the agent runs.
fn env<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let set = names.filter_map(|name| Some((name, std::env::var(name).ok()?)));
    let set: Vec<_> = set.map(|(name, value)| format!("{name} = {}", quoted(&value))).collect();
    if set.is_empty() { String::new() } else { format!("env = {{ {} }}\n", set.join(", ")) }
}

/// 128 random bits, hexadecimal.
fn random() -> Result<Zeroizing<String>, InitError> {
    let mut bytes = Zeroizing::new([0; 16]);
    getrandom::fill(&mut *bytes).map_err(|error| InitError::Wrong(format!("no randomness: {error}")))?;
    Ok(Zeroizing::new(hex::encode(*bytes)))
}

fn asked(question: &str, ask: Ask<'_>) -> Result<Zeroizing<String>, InitError> {
    ask(question)
        .map_err(|source| InitError::System { what: format!("cannot ask for the {question}"), source })
}

fn answer(question: &str, ask: Ask<'_>) -> Result<Zeroizing<String>, InitError> {
    let answer = asked(question, ask)?;
    if answer.is_empty() {
        return Err(InitError::Wrong(format!("no {question} was given; nothing was changed")));
    }
    Ok(answer)
}

/// A new PIN or PUK, typed twice. A card takes 6 to 8 bytes.
fn chosen(what: &str, ask: Ask<'_>) -> Result<Zeroizing<String>, InitError> {
    let first = answer(what, ask)?;
    if FACTORY.contains(&first.as_str()) {
        return Err(InitError::Wrong(
            "that is what every YubiKey has when it is new; nothing was changed".into(),
        ));
    }
    if !(6..=8).contains(&first.len()) {
        return Err(InitError::Wrong(format!("a {what} has 6 to 8 characters; nothing was changed")));
    }
    if *answer(&format!("{what}, again"), ask)? != *first {
        return Err(InitError::Wrong(format!("the two are not the same {what}; nothing was changed")));
    }
    Ok(first)
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
