//! `--key-uri`: one key of one device, without a configuration file. `pkcs11:` as in RFC 7512; `tpm:` and `piv:`
//! are ours, in the same style: `tpm:handle=0x81000010?tcti=device:/dev/tpmrm0`, `piv:serial=123;slot=9c`.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::uri::{Pkcs11Uri, UriError};
use super::{Device, Object, ObjectSelector, Pcrs, PinSource, Profile, TokenSelector, tpm};

/// What a URI names.
#[derive(Debug, PartialEq, Eq)]
pub struct KeyUri {
    /// The device.
    pub device: Device,
    /// The key on it.
    pub object: Object,
    /// What a TPM's key asks for: `pcrs=sha256:0,7`.
    pub pcrs: Option<Pcrs>,
    /// Where its PIN comes from: `pin-source`; otherwise somebody is asked, except for keys of a TPM.
    pub pin: PinSource,
    /// Where the value of a TPM's owner hierarchy comes from: `owner-auth-source`.
    pub owner_auth: PinSource,
}

/// What is wrong with one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyUriError {
    /// A PKCS#11 URI.
    #[error(transparent)]
    Pkcs11(#[from] UriError),
    /// It does not say everything.
    #[error("{0} URI: {1}")]
    Missing(&'static str, &'static str),
    /// An attribute with a value that cannot be used, or that is not known.
    #[error("{0} URI: attribute {1:?} is unknown, given twice, or has a value that cannot be used")]
    Attribute(&'static str, String),
    /// The TPM.
    #[error("TPM URI: tcti: {0}")]
    Tcti(#[from] tpm::TctiError),
    /// None of the three.
    #[error("a key URI starts with pkcs11:, tpm: or piv:")]
    Scheme,
}

impl KeyUri {
    /// Parses a URI.
    pub fn parse(text: &str) -> Result<Self, KeyUriError> {
        match text.split_once(':') {
            Some(("pkcs11", _)) => pkcs11(text),
            Some(("tpm", rest)) => tpm(rest),
            Some(("piv", rest)) => piv(rest),
            _ => Err(KeyUriError::Scheme),
        }
    }
}

fn pkcs11(text: &str) -> Result<KeyUri, KeyUriError> {
    let uri = Pkcs11Uri::parse(text)?;
    let missing = |what| KeyUriError::Missing("PKCS#11", what);
    let module = uri.module().ok_or(missing("no module; add ?module-path=/usr/lib/….so"))?;
    if uri.token == TokenSelector::default() {
        return Err(missing("names no token; add token=…, serial=… or slot-id=…"));
    }
    if uri.object == ObjectSelector::default() {
        return Err(missing("names no key; add object=… or id=%01…"));
    }
    Ok(KeyUri {
        device: Device::Pkcs11 {
            profile: Box::new(Profile::of_module(&module)),
            module,
            select: Box::new(uri.token),
        },
        object: Object::Pkcs11(uri.object),
        pcrs: None,
        pin: uri.pin_source.unwrap_or(PinSource::Prompt),
        owner_auth: PinSource::None,
    })
}

fn tpm(rest: &str) -> Result<KeyUri, KeyUriError> {
    let mut attributes = Attributes::parse("TPM", rest)?;
    let tcti = attributes.take("tcti").unwrap_or_else(|| tpm::DEFAULT.to_owned()).parse()?;
    let object = match (attributes.take("handle"), attributes.take("file")) {
        (Some(handle), None) => attributes.usable("handle", Object::tpm_handle(&handle))?,
        (None, Some(file)) => Object::TpmFile(PathBuf::from(file)),
        _ => return Err(KeyUriError::Missing("TPM", "names no key; add handle=0x81000010 or file=key.pem")),
    };
    let pcrs = attributes.take("pcrs");
    let pcrs = pcrs.map(|text| attributes.usable("pcrs", text.parse().ok())).transpose()?;
    // Most keys of a TPM have no authorization value, and most owners.
    let pin = attributes.file("pin-source")?.unwrap_or(PinSource::None);
    let owner_auth = attributes.file("owner-auth-source")?.unwrap_or(PinSource::None);
    attributes.finish()?;
    Ok(KeyUri { device: Device::Tpm(tcti), object, pcrs, pin, owner_auth })
}

fn piv(rest: &str) -> Result<KeyUri, KeyUriError> {
    let mut attributes = Attributes::parse("PIV", rest)?;
    let serial =
        attributes.take("serial").ok_or(KeyUriError::Missing("PIV", "names no card; add serial=…"))?;
    let serial = attributes.usable("serial", serial.parse().ok())?;
    let slot = attributes.take("slot").ok_or(KeyUriError::Missing(
        "PIV",
        "names no key; add slot=9c (and quote the URI: a shell ends it at `;`)",
    ))?;
    let object = attributes.usable("slot", Object::piv_slot(&slot))?;
    let pin = attributes.file("pin-source")?.unwrap_or(PinSource::Prompt);
    attributes.finish()?;
    Ok(KeyUri { device: Device::Piv { serial }, object, pcrs: None, pin, owner_auth: PinSource::None })
}

/// `name=value` between `;`, `?` and `&`, as RFC 7512 has them.
struct Attributes {
    kind: &'static str,
    left: Vec<(String, String)>,
}

impl Attributes {
    fn parse(kind: &'static str, text: &str) -> Result<Self, KeyUriError> {
        let mut left: Vec<(String, String)> = Vec::new();
        for part in text.split([';', '?', '&']).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let wrong = || KeyUriError::Attribute(kind, name.to_owned());
            let value = percent_decode_str(value).decode_utf8().map_err(|_| wrong())?;
            if value.is_empty() || left.iter().any(|(known, _)| known == name) {
                return Err(wrong());
            }
            left.push((name.to_owned(), value.into_owned()));
        }
        Ok(Self { kind, left })
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.left.iter().position(|(known, _)| known == name)?;
        Some(self.left.swap_remove(at).1)
    }

    /// A file with a secret, or that there is none. None of these devices has it entered there.
    fn file(&mut self, name: &str) -> Result<Option<PinSource>, KeyUriError> {
        let source = self.take(name).map(|value| PinSource::of_uri(&value));
        self.usable(name, (source != Some(PinSource::Device)).then_some(source))
    }

    fn usable<T>(&self, name: &str, value: Option<T>) -> Result<T, KeyUriError> {
        value.ok_or_else(|| KeyUriError::Attribute(self.kind, name.to_owned()))
    }

    /// What nobody took is unknown.
    fn finish(self) -> Result<(), KeyUriError> {
        match self.left.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(KeyUriError::Attribute(self.kind, name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of docs/key-uris.md, each alone and with what may come after it.
    #[test]
    fn documented_uris() {
        let text = include_str!("../../../docs/key-uris.md");
        let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).collect();
        let is_uri = |text: &&&str| {
            ["pkcs11:token", "tpm:h", "tpm:f", "piv:s"].iter().any(|start| text.starts_with(start))
        };
        let uris: Vec<&&str> = quoted.iter().filter(is_uri).collect();
        assert_eq!(uris.len(), 4, "{uris:?}");
        for uri in uris {
            KeyUri::parse(uri).unwrap_or_else(|error| panic!("{uri}: {error}"));
            let named = |names: &[&str], text: &str| names.iter().any(|name| text.starts_with(name));
            let (of_tpms, of_modules) = (uri.starts_with("tpm:"), uri.starts_with("pkcs11:"));
            let fits = |text: &&&str| {
                named(&["pin-source="], text) && (of_modules || !text.ends_with("device"))
                    || of_tpms && named(&["tcti=", "pcrs=", "owner-auth-source="], text)
            };
            let more: Vec<&&str> = quoted.iter().filter(fits).collect();
            assert_eq!(more.len(), if of_tpms { 5 } else { 2 + usize::from(of_modules) });
            for attribute in more {
                let mark = if uri.contains('?') { '&' } else { '?' };
                let whole = format!("{uri}{mark}{attribute}");
                KeyUri::parse(&whole).unwrap_or_else(|error| panic!("{whole}: {error}"));
            }
        }
    }

    #[test]
    fn each_device_has_its_own() {
        let uri = KeyUri::parse("piv:serial=123;slot=9c?pin-source=/p").expect("complete");
        assert_eq!(uri.device, Device::Piv { serial: 123 });
        assert_eq!((uri.object, uri.pin), (Object::PivSlot(0x9c), PinSource::File("/p".into())));
        let none = KeyUri::parse("piv:serial=123;slot=9e?pin-source=none").expect("complete");
        assert_eq!(none.pin, PinSource::None);
        let uri =
            KeyUri::parse("tpm:handle=0x81000010?tcti=swtpm:host=127.0.0.1,port=2321").expect("complete");
        assert_eq!((uri.object, uri.pin), (Object::TpmHandle(0x8100_0010), PinSource::None));
        let uri = KeyUri::parse("tpm:file=a%20key.pem?tcti=tabrmd:").expect("complete");
        assert_eq!(uri.object, Object::TpmFile("a key.pem".into()));
        for wrong in [
            "",
            "ssh:x",
            "piv:slot=9c",
            "piv:serial=1;slot=9b",
            "piv:serial=x;slot=9c",
            "piv:serial=1;slot=9c?pin-source=device",
            "piv:serial=1;serial=1;slot=9c",
            "tpm:?tcti=tabrmd:",
            "tpm:handle=0x1?tcti=tabrmd:",
            "tpm:handle=0x81000010;file=x?tcti=tabrmd:",
            "tpm:handle=0x81000010?tcti=mssim:",
            "tpm:handle=0x81000010;colour=red?tcti=tabrmd:",
            "pkcs11:object=x",
        ] {
            assert!(KeyUri::parse(wrong).is_err(), "{wrong}");
        }
    }
}
