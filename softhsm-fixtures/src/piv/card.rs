//! The PIV application of a virtual YubiKey: commands in, answers out (NIST SP 800-73-4, part 2; Yubico, "PIV
//! extensions"). State is in memory only: a card that is made anew is empty.

use std::collections::BTreeMap;

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::rand::rand_bytes;
use openssl::symm::Cipher;

use super::apdu::{
    BLOCKED, FAILED, NO_REFERENCE, NOT_FOUND, NOT_SATISFIED, OK, OUT_OF_ORDER, UNKNOWN, WRONG_DATA,
    WRONG_LENGTH, halves, split, template,
};
use super::keys::{self, Slot};
use super::management;
use super::objects::{self, ADMIN, PRINTED};
use super::secret::{Secret, encrypted};
use super::tlv::{parse, tlv, value};

/// The firmware version that it claims, unless another was set. From 5.7 on cards delete keys, and make more kinds.
const VERSION: [u8; 3] = [5, 7, 1];

/// In bytes: the most data of one command, all its parts together (yubico-piv-tool, lib/internal.h, CB_BUF_MAX).
const LONGEST: usize = 3072;

const PIV: &[u8] = &[0xa0, 0, 0, 3, 8];
const FACTORY_PIN: [u8; 8] = *b"123456\xff\xff";
const FACTORY_PUK: [u8; 8] = *b"12345678";
const FACTORY_MANAGEMENT_KEY: [u8; 24] =
    [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8];

type Answer = Result<Vec<u8>, u16>;

/// The card.
pub(super) struct Card {
    serial: u32,
    pub(super) version: [u8; 3],
    pub(super) slots: BTreeMap<u8, Slot>,
    objects: BTreeMap<Vec<u8>, Vec<u8>>,
    pin: Secret,
    /// Wrong ones in all, whatever came after.
    pub(super) wrong_pins: usize,
    puk: Secret,
    management_key: [u8; 24],
    attestation: PKey<Private>,
    session: Session,
}

/// What a reset of the card ends.
#[derive(Default)]
struct Session {
    selected: bool,
    /// The management application is.
    manager: bool,
    /// The PIN was verified.
    verified: bool,
    /// And no key was used since.
    fresh: bool,
    managed: bool,
    challenge: Option<Vec<u8>>,
    chained: Vec<u8>,
    rest: Vec<u8>,
}

impl Card {
    pub(super) fn new(serial: u32) -> Result<Self, ErrorStack> {
        let attestation = keys::generate(0x11, true).ok_or_else(ErrorStack::get)?;
        let mut objects = BTreeMap::new();
        let certificate = keys::attestation_ca(&attestation)?;
        let certificate = [tlv(&[0x70], &certificate), tlv(&[0x71], &[0]), tlv(&[0xfe], &[])].concat();
        objects.insert(vec![0x5f, 0xff, 1], certificate);
        objects.insert(vec![0x5f, 0xc1, 2], objects::card_holder()?);
        Ok(Self {
            serial,
            version: VERSION,
            slots: BTreeMap::new(),
            objects,
            pin: Secret { value: FACTORY_PIN, left: 3 },
            wrong_pins: 0,
            puk: Secret { value: FACTORY_PUK, left: 3 },
            management_key: FACTORY_MANAGEMENT_KEY,
            attestation,
            session: Session::default(),
        })
    }

    /// Takes a random management key, which it keeps for whoever knows the PIN.
    pub(super) fn protect_management_key(&mut self) -> Result<(), ErrorStack> {
        rand_bytes(&mut self.management_key)?;
        self.objects.insert(PRINTED.to_vec(), objects::protected(&self.management_key));
        self.objects.insert(ADMIN.to_vec(), objects::admin());
        Ok(())
    }

    /// Power off, or a reset.
    pub(super) fn reset(&mut self) {
        self.session = Session::default();
    }

    /// The touch policy of the key that the next command uses (Yubico, "PIV extensions").
    pub(super) fn touch_policy(&self, command: &[u8]) -> u8 {
        let slot = match command {
            [_, 0x87, _, slot, ..] if *slot != 0x9b => self.slots.get(slot),
            _ => None,
        };
        slot.map_or(0, |slot| slot.touch_policy)
    }

    /// Runs one command APDU; the answer ends with its status word.
    pub(super) fn command(&mut self, apdu: &[u8]) -> Vec<u8> {
        let (mut answer, status) = match self.transport(apdu) {
            Ok((answer, status)) => (answer, status),
            Err(status) => {
                self.session.rest.clear();
                (Vec::new(), status)
            }
        };
        answer.extend(status.to_be_bytes());
        answer
    }

    /// Command chaining and answers in parts (ISO 7816-4, 5.3.3 and 5.3.4).
    fn transport(&mut self, apdu: &[u8]) -> Result<(Vec<u8>, u16), u16> {
        let [class, instruction, p1, p2, body @ ..] = apdu else { return Err(WRONG_LENGTH) };
        let (data, most) = split(body).ok_or(WRONG_LENGTH)?;
        let mut whole = std::mem::take(&mut self.session.chained);
        whole.extend_from_slice(data);
        if whole.len() > LONGEST {
            return Err(WRONG_LENGTH);
        }
        if class & 0x10 != 0 {
            self.session.chained = whole;
            return Ok((Vec::new(), OK));
        }
        if *instruction != 0xc0 {
            self.session.rest = self.execute(*instruction, *p1, *p2, &whole)?;
        }
        let now = self.session.rest.len().min(most);
        let answer: Vec<u8> = self.session.rest.drain(..now).collect();
        match u8::try_from(self.session.rest.len()) {
            Ok(0) => Ok((answer, OK)),
            left => Ok((answer, 0x6100 | u16::from(left.unwrap_or(0xff)))),
        }
    }

    fn execute(&mut self, instruction: u8, p1: u8, p2: u8, data: &[u8]) -> Answer {
        if instruction == 0xa4 {
            return self.select(data);
        }
        if !self.session.selected {
            let asked = self.session.manager && instruction == 0x1d;
            return asked.then(|| management::configuration(self.serial, self.version)).ok_or(UNKNOWN);
        }
        match instruction {
            0xfd => Ok(self.version.to_vec()),
            0xf8 => Ok(self.serial.to_be_bytes().to_vec()),
            0x20 => self.verify(p1, p2, data),
            0x24 => self.change(p2, data),
            0x2c => self.unblock(data),
            0xcb => self.get_object(data),
            0xdb => self.put_object(data),
            0x47 => self.generate(p2, data),
            0xfe => self.import(p1, p2, data),
            0x87 if p2 == 0x9b => self.authenticate_management(p1, data),
            0x87 => self.sign(p1, p2, data),
            0xf7 if self.version >= [5, 3, 0] => self.metadata(p2),
            0xf9 => {
                let slot = self.slots.get(&p1).filter(|slot| !slot.imported).ok_or(NO_REFERENCE)?;
                keys::attest(p1, slot, self.serial, self.version, &self.attestation).map_err(|_| FAILED)
            }
            0xf6 if self.is_new() => self.move_key(p1, p2),
            0xff => self.set_management_key(data),
            0xfa => self.set_tries(p1, p2),
            0xfb => self.factory_reset(),
            _ => Err(UNKNOWN),
        }
    }

    fn select(&mut self, application: &[u8]) -> Answer {
        self.session = Session { selected: application.starts_with(PIV), ..Session::default() };
        if self.session.selected {
            let fields = [tlv(&[0x4f], &[0, 0, 0x10, 0, 1, 0]), tlv(&[0x79], &tlv(&[0x4f], PIV))].concat();
            return Ok(tlv(&[0x61], &fields));
        }
        self.session.manager = application == management::APPLICATION;
        if self.session.manager { Ok(management::banner(self.version)) } else { Err(NOT_FOUND) }
    }

    pub(super) fn verify(&mut self, p1: u8, p2: u8, data: &[u8]) -> Answer {
        if p1 == 0xff {
            self.session.verified = false;
            return Ok(Vec::new());
        }
        if p2 != 0x80 {
            return Err(NO_REFERENCE);
        }
        if data.is_empty() {
            return if self.session.verified { Ok(Vec::new()) } else { Err(self.pin.status()) };
        }
        let checked = self.pin.check(data);
        self.wrong_pins += usize::from(checked.is_err());
        self.session.verified = checked.is_ok();
        self.session.fresh = checked.is_ok();
        checked.map(|()| Vec::new())
    }

    pub(super) fn change(&mut self, which: u8, data: &[u8]) -> Answer {
        let (old, new) = halves(data)?;
        let secret = if which == 0x80 { &mut self.pin } else { &mut self.puk };
        secret.check(&old)?;
        secret.value = new;
        Ok(Vec::new())
    }

    fn unblock(&mut self, data: &[u8]) -> Answer {
        let (puk, pin) = halves(data)?;
        self.puk.check(&puk)?;
        self.pin = Secret { value: pin, left: 3 };
        Ok(Vec::new())
    }

    fn get_object(&self, data: &[u8]) -> Answer {
        let name =
            parse(data).and_then(|fields| value(&fields, 0x5c).map(<[u8]>::to_vec)).ok_or(WRONG_DATA)?;
        if name == [0x7e] {
            // Discovery object: PIV application, PIN usage policy.
            let policy = [0x5f, 0x2f, 2, 0x40, 0];
            return Ok(tlv(
                &[0x7e],
                &[&tlv(&[0x4f], &[PIV, &[0, 0, 0x10, 0, 1, 0]].concat())[..], &policy].concat(),
            ));
        }
        if name == PRINTED && !self.session.verified {
            return Err(NOT_SATISFIED);
        }
        self.objects.get(&name).map(|object| tlv(&[0x53], object)).ok_or(NOT_FOUND)
    }

    fn put_object(&mut self, data: &[u8]) -> Answer {
        self.managed()?;
        let fields = parse(data).ok_or(WRONG_DATA)?;
        let [(_, name), (_, content), ..] = fields.as_slice() else { return Err(WRONG_DATA) };
        match content.is_empty() {
            true => drop(self.objects.remove(*name)),
            false => drop(self.objects.insert(name.to_vec(), content.to_vec())),
        }
        Ok(Vec::new())
    }

    fn generate(&mut self, number: u8, data: &[u8]) -> Answer {
        self.managed()?;
        let outer = parse(data).ok_or(WRONG_DATA)?;
        let fields = outer.first().and_then(|(_, fields)| parse(fields)).ok_or(WRONG_DATA)?;
        let algorithm = value(&fields, 0x80).and_then(|field| field.first()).ok_or(WRONG_DATA)?;
        let key = keys::generate(*algorithm, self.is_new()).ok_or(WRONG_DATA)?;
        let public = keys::public(&key).map_err(|_| FAILED)?;
        self.slots.insert(number, Slot::new(number, key, &fields, false));
        Ok(tlv(&[0x7f, 0x49], &public))
    }

    fn import(&mut self, algorithm: u8, number: u8, data: &[u8]) -> Answer {
        self.managed()?;
        let fields = parse(data).ok_or(WRONG_DATA)?;
        let key = keys::import(algorithm, &fields).ok_or(WRONG_DATA)?;
        self.slots.insert(number, Slot::new(number, key, &fields, true));
        Ok(Vec::new())
    }

    fn sign(&mut self, algorithm: u8, number: u8, data: &[u8]) -> Answer {
        let slot = self.slots.get(&number).ok_or(NO_REFERENCE)?;
        if keys::algorithm(&slot.key) != algorithm {
            return Err(WRONG_DATA);
        }
        let allowed = match slot.pin_policy {
            1 => true,
            3 => self.session.verified && self.session.fresh,
            _ => self.session.verified,
        };
        if !allowed {
            return Err(NOT_SATISFIED);
        }
        self.session.fresh = false;
        let fields = template(data)?;
        let input = value(&fields, 0x81).ok_or(WRONG_DATA)?;
        let signature = keys::sign(&slot.key, input).map_err(|_| WRONG_DATA)?;
        Ok(tlv(&[0x7c], &tlv(&[0x82], &signature)))
    }

    /// Mutual authentication, or a challenge of ours. Debian 12's yubico-piv-tool knows only the Triple DES of older cards,
    /// which newer ones take here, too, for the same key.
    fn authenticate_management(&mut self, algorithm: u8, data: &[u8]) -> Answer {
        let cipher = match algorithm {
            0x03 => Cipher::des_ede3(),
            0x0a if self.is_new() => Cipher::aes_192_ecb(),
            _ => return Err(WRONG_DATA),
        };
        let (fields, key) = (template(data)?, self.management_key);
        let encrypt = |block: &[u8]| encrypted(cipher, &key, block);
        for (tag, hidden) in [(0x80, true), (0x81, false)] {
            if value(&fields, tag).is_some_and(<[u8]>::is_empty) {
                let mut challenge = vec![0; cipher.block_size()];
                rand_bytes(&mut challenge).map_err(|_| FAILED)?;
                let shown = if hidden { encrypt(&challenge)? } else { challenge.clone() };
                self.session.challenge = Some(challenge);
                return Ok(tlv(&[0x7c], &tlv(&[tag], &shown)));
            }
        }
        let challenge = self.session.challenge.take().ok_or(OUT_OF_ORDER)?;
        if let (Some(witness), Some(theirs)) = (value(&fields, 0x80), value(&fields, 0x81)) {
            self.session.managed = witness == challenge;
            self.managed()?;
            return Ok(tlv(&[0x7c], &tlv(&[0x82], &encrypt(theirs)?)));
        }
        self.session.managed = value(&fields, 0x82) == Some(&encrypt(&challenge)?);
        self.managed().map(|()| Vec::new())
    }

    fn metadata(&self, number: u8) -> Answer {
        let secret = |secret: &Secret, factory: [u8; 8]| {
            vec![1, 1, 0xff, 5, 1, u8::from(secret.value == factory), 6, 2, 3, secret.left]
        };
        match number {
            0x80 => Ok(secret(&self.pin, FACTORY_PIN)),
            0x81 => Ok(secret(&self.puk, FACTORY_PUK)),
            0x9b => {
                let factory = u8::from(self.management_key == FACTORY_MANAGEMENT_KEY);
                Ok(vec![1, 1, self.management_algorithm(), 2, 2, 0, 1, 5, 1, factory])
            }
            number => {
                let slot = self.slots.get(&number).ok_or(NO_REFERENCE)?;
                let origin = if slot.imported { 2 } else { 1 };
                let algorithm = keys::algorithm(&slot.key);
                let mut fields =
                    vec![1, 1, algorithm, 2, 2, slot.pin_policy, slot.touch_policy, 3, 1, origin];
                fields.extend(tlv(&[4], &keys::public(&slot.key).map_err(|_| FAILED)?));
                Ok(fields)
            }
        }
    }

    fn set_management_key(&mut self, data: &[u8]) -> Answer {
        self.managed()?;
        let [algorithm, 0x9b, 24, key @ ..] = data else { return Err(WRONG_DATA) };
        if *algorithm != self.management_algorithm() {
            return Err(WRONG_DATA);
        }
        self.management_key = key.try_into().map_err(|_| WRONG_DATA)?;
        Ok(Vec::new())
    }

    /// To 0xff: deletes it (Yubico, "PIV extensions", MOVE KEY, firmware 5.7).
    fn move_key(&mut self, to: u8, from: u8) -> Answer {
        self.managed()?;
        let slot = self.slots.remove(&from).ok_or(NO_REFERENCE)?;
        if to != 0xff {
            self.slots.insert(to, slot);
        }
        Ok(Vec::new())
    }

    fn set_tries(&mut self, pin: u8, puk: u8) -> Answer {
        self.managed()?;
        if !self.session.verified {
            return Err(NOT_SATISFIED);
        }
        (self.pin, self.puk) =
            (Secret { value: FACTORY_PIN, left: pin }, Secret { value: FACTORY_PUK, left: puk });
        Ok(Vec::new())
    }

    fn factory_reset(&mut self) -> Answer {
        if self.pin.left > 0 || self.puk.left > 0 {
            return Err(BLOCKED);
        }
        self.make_new().map_err(|_| FAILED)?;
        Ok(Vec::new())
    }

    /// As it left the factory.
    pub(super) fn make_new(&mut self) -> Result<(), ErrorStack> {
        *self = Self::new(self.serial)?;
        self.session.selected = true;
        Ok(())
    }

    fn is_new(&self) -> bool {
        self.version >= VERSION
    }

    /// AES-192, or Triple DES.
    fn management_algorithm(&self) -> u8 {
        if self.is_new() { 0x0a } else { 0x03 }
    }

    fn managed(&self) -> Result<(), u16> {
        if self.session.managed { Ok(()) } else { Err(NOT_SATISFIED) }
    }
}
