//! `object = …` of a `[key.NAME]`: what the key is on its device.

use super::read::{Reader, Section};
use super::uri::Pkcs11Uri;
use super::{Object, ObjectSelector};

/// Slots that hold signing keys: authentication, signature, key management, card authentication, retired.
pub(crate) const PIV_SLOTS: [std::ops::RangeInclusive<u8>; 3] = [0x9a..=0x9a, 0x9c..=0x9e, 0x82..=0x95];

/// The handles that an owner may make persistent (TPM 2.0 Part 2, 7.5).
const TPM_HANDLES: std::ops::RangeInclusive<u32> = 0x8100_0000..=0x81ff_ffff;

/// `key` is `object`, or `next`.
pub(super) fn object(
    reader: &mut Reader<'_>,
    section: &mut Section<'_>,
    key: &'static str,
    backend: &str,
) -> Option<Object> {
    match backend {
        "tpm" => tpm(reader, section, key),
        "piv" => piv(reader, section, key),
        _ => pkcs11(reader, section, key).map(Object::Pkcs11),
    }
}

/// `object = { handle | file }`
fn tpm(reader: &mut Reader<'_>, section: &mut Section<'_>, key: &'static str) -> Option<Object> {
    const EXAMPLES: &str = "{ handle = \"0x81000010\" } or { file = \"release-key.pem\" }";
    let Some(mut table) = section.table(key) else {
        let what = "a key of a TPM is a persistent handle or a key file";
        return section.wrong(reader, key, format!("{what}; write object = {EXAMPLES}"));
    };
    let (handle, file) = (table.string(reader, "handle"), table.path(reader, "file"));
    table.finish(reader);
    match (handle, file) {
        (Some(text), None) => {
            let wrong = || format!("{text:?} is not a persistent handle; write one like \"0x81000010\"");
            section.checked(reader, key, Object::tpm_handle(&text).ok_or_else(wrong))
        }
        (None, Some(file)) => Some(Object::TpmFile(file)),
        _ => section.wrong(reader, key, format!("give exactly one: object = {EXAMPLES}")),
    }
}

/// `object = { slot }`
fn piv(reader: &mut Reader<'_>, section: &mut Section<'_>, key: &'static str) -> Option<Object> {
    let slot = section.table(key).and_then(|mut table| {
        let slot = table.string(reader, "slot");
        table.finish(reader);
        slot
    });
    slot.and_then(|text| Object::piv_slot(&text)).or_else(|| {
        let message = "a PIV key is a slot: 9a, 9c, 9d, 9e or 82 to 95; write object = { slot = \"9c\" }";
        section.wrong(reader, key, message)
    })
}

impl Object {
    /// A persistent handle of a TPM, hexadecimal.
    pub fn tpm_handle(text: &str) -> Option<Self> {
        let handle = u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()?;
        TPM_HANDLES.contains(&handle).then_some(Self::TpmHandle(handle))
    }

    /// A PIV slot, hexadecimal.
    pub fn piv_slot(text: &str) -> Option<Self> {
        let slot = u8::from_str_radix(text, 16).ok()?;
        PIV_SLOTS.iter().any(|slots| slots.contains(&slot)).then_some(Self::PivSlot(slot))
    }
}

/// `object = { label | id }` or `object = "pkcs11:…"`.
fn pkcs11(reader: &mut Reader<'_>, section: &mut Section<'_>, key: &'static str) -> Option<ObjectSelector> {
    let select = if let Some(mut table) = section.table(key) {
        let label = table.string(reader, "label");
        let id = match table.string(reader, "id") {
            None => None,
            Some(text) => {
                let wrong = |_| format!("{text:?} is not hexadecimal; write CKA_ID as \"01ab\"");
                Some(table.checked(reader, "id", hex::decode(text.replace(':', "")).map_err(wrong))?)
            }
        };
        table.finish(reader);
        ObjectSelector { label, id }
    } else {
        let text = section.required(reader, key, "{ label = \"model-release\" }")?;
        let uri = section.checked(reader, key, Pkcs11Uri::parse(&text))?;
        if uri.names_more_than_an_object() {
            let message = "only object=… and id=… belong here; the rest is for [token.NAME]";
            return section.wrong(reader, key, message);
        }
        uri.object
    };
    if select == ObjectSelector::default() {
        let message = "names no object; write object = { label = \"…\" } or { id = \"01ab\" }";
        return section.wrong(reader, key, message);
    }
    Some(select)
}
