//! PKCS#11 URIs (RFC 7512), accepted wherever a token or an object is named.

use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;

use super::{ObjectSelector, PinSource, TokenSelector};

/// Directories that `module-name` is looked up in, as the reference tool does, and Debian's own.
const MODULE_DIRECTORIES: &[&str] = &[
    "/usr/lib64/pkcs11",
    "/usr/lib/pkcs11",
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib/softhsm",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
];

/// A parsed URI.
#[derive(Debug, Default)]
pub struct Pkcs11Uri {
    /// `token`, `serial`, `model`, `manufacturer`, `slot-…` and `library-…`.
    pub token: TokenSelector,
    /// `object`, `id`.
    pub object: ObjectSelector,
    /// `pin-source`.
    pub pin_source: Option<PinSource>,
    /// Whether a `pin-value` was there. It is never kept: secrets do not travel in URIs.
    pub has_pin_value: bool,
    module_path: Option<PathBuf>,
    module_name: Option<String>,
    relative_to: PathBuf,
}

/// What is wrong with a URI. It does not repeat the URI, which may hold a PIN.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Does not start with `pkcs11:`.
    #[error("not a PKCS#11 URI: it must start with \"pkcs11:\" (RFC 7512)")]
    Scheme,
    /// A component is not `name=value`.
    #[error("PKCS#11 URI: a component is not of the form name=value")]
    Component,
    /// An attribute that is not known or not supported.
    #[error("PKCS#11 URI: attribute {0:?} is unknown or not supported")]
    Attribute(String),
    /// The same attribute twice.
    #[error("PKCS#11 URI: attribute {0:?} is given twice")]
    Twice(String),
    /// A value that cannot be used.
    #[error("PKCS#11 URI: attribute {0:?} {1}")]
    Value(String, &'static str),
}

impl Pkcs11Uri {
    /// Resolves relative paths against a directory.
    pub fn relative_to(mut self, base: &Path) -> Self {
        self.relative_to = base.to_owned();
        if let Some(PinSource::File(path)) = &mut self.pin_source {
            *path = base.join(&*path);
        }
        self
    }

    /// Parses a URI.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let rest = text.strip_prefix("pkcs11:").ok_or(UriError::Scheme)?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut uri = Self::default();
        let mut seen = Vec::new();
        let path = path.split(';').map(|part| (part, true));
        let query = query.split('&').map(|part| (part, false));
        for (part, in_path) in path.chain(query).filter(|(part, _)| !part.is_empty()) {
            let (name, value) = part.split_once('=').ok_or(UriError::Component)?;
            if seen.contains(&name) {
                return Err(UriError::Twice(name.to_owned()));
            }
            seen.push(name);
            let bytes: Vec<u8> = percent_decode_str(value).collect();
            if in_path { uri.path_attribute(name, bytes)? } else { uri.query_attribute(name, bytes)? }
        }
        Ok(uri)
    }

    fn path_attribute(&mut self, name: &str, value: Vec<u8>) -> Result<(), UriError> {
        if name == "id" {
            self.object.id = Some(value);
            return Ok(());
        }
        let value = text(name, value)?;
        match name {
            "token" => self.token.label = Some(value),
            "serial" => self.token.serial = Some(value),
            "model" => self.token.model = Some(value),
            "manufacturer" => self.token.manufacturer = Some(value),
            "slot-id" => {
                let slot = value.parse().map_err(|_| UriError::Value(name.into(), "is not a number"))?;
                self.token.slot = Some(slot);
            }
            "slot-description" => self.token.slot_description = Some(value),
            "slot-manufacturer" => self.token.slot_manufacturer = Some(value),
            "library-description" => self.token.library_description = Some(value),
            "library-manufacturer" => self.token.library_manufacturer = Some(value),
            "library-version" => {
                // RFC 7512, 2.3: without a minor version, it is 0.
                let (major, minor) = value.split_once('.').unwrap_or((&value, "0"));
                let version = major.parse().and_then(|major| Ok((major, minor.parse()?)));
                let version =
                    version.map_err(|_| UriError::Value(name.into(), "is not a version such as 2.6"))?;
                self.token.library_version = Some(version);
            }
            "object" => self.object.label = Some(value),
            "type" if value == "private" => {}
            "type" => return Err(UriError::Value(name.into(), "must be \"private\" for a signing key")),
            _ => return Err(UriError::Attribute(name.to_owned())),
        }
        Ok(())
    }

    fn query_attribute(&mut self, name: &str, value: Vec<u8>) -> Result<(), UriError> {
        let value = text(name, value)?;
        match name {
            "module-path" => self.module_path = Some(PathBuf::from(value)),
            "module-name" => self.module_name = Some(value),
            "pin-value" => self.has_pin_value = true,
            "pin-source" if value.starts_with('|') => {
                return Err(UriError::Value(name.into(), "names a command; only files are supported"));
            }
            "pin-source" => {
                self.pin_source = Some(PinSource::of_uri(&value));
            }
            _ => return Err(UriError::Attribute(name.to_owned())),
        }
        Ok(())
    }

    /// Whether there is anything besides `object` and `id`.
    pub fn names_more_than_an_object(&self) -> bool {
        self.token != TokenSelector::default()
            || self.pin_source.is_some()
            || self.has_pin_value
            || self.module_path.is_some()
            || self.module_name.is_some()
    }

    /// The module: `module-path`, if it is a file; else `module-name`, looked up in that directory or in the
    /// usual ones.
    pub fn module(&self) -> Option<PathBuf> {
        let module_path = self.module_path.as_ref().map(|path| self.relative_to.join(path));
        match (&module_path, &self.module_name) {
            (Some(path), None) => Some(path.clone()),
            (Some(path), Some(_)) if path.is_file() => Some(path.clone()),
            (Some(path), Some(name)) => find_module(&[path.as_path()], name),
            (None, Some(name)) => {
                let directories: Vec<&Path> = MODULE_DIRECTORIES.iter().map(Path::new).collect();
                find_module(&directories, name)
            }
            (None, None) => None,
        }
    }
}

fn find_module(directories: &[&Path], name: &str) -> Option<PathBuf> {
    // A name is not a path: "../x" must not lead anywhere.
    if name.contains('/') {
        return None;
    }
    let names = [format!("{name}.so"), format!("lib{name}.so"), name.to_owned()];
    directories.iter().flat_map(|d| names.iter().map(|n| d.join(n))).find(|path| path.is_file())
}

fn text(name: &str, value: Vec<u8>) -> Result<String, UriError> {
    String::from_utf8(value).map_err(|_| UriError::Value(name.to_owned(), "is not UTF-8"))
}

impl PinSource {
    /// What a URI's `pin-source` says: a path or the URI of a file, or `none`, or `device`.
    pub(super) fn of_uri(text: &str) -> Self {
        match text {
            "none" => return Self::None,
            "device" => return Self::Device,
            _ => {}
        }
        let path = text.strip_prefix("file:").unwrap_or(text);
        Self::File(PathBuf::from(path.strip_prefix("//").unwrap_or(path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attributes_of_rfc_7512() {
        let uri = Pkcs11Uri::parse(
            "pkcs11:token=My%20token%3b;serial=ab;slot-id=7;object=k;id=%01%ab;type=private?pin-source=file:/x%20y&module-path=/m.so",
        )
        .expect("valid");
        assert_eq!(uri.token.label.as_deref(), Some("My token;"));
        assert_eq!((uri.token.serial.as_deref(), uri.token.slot), (Some("ab"), Some(7)));
        assert_eq!(
            (uri.object.label.as_deref(), uri.object.id.as_deref()),
            (Some("k"), Some(&[1, 0xab][..]))
        );
        assert_eq!(uri.pin_source, Some(PinSource::File("/x y".into())));
        assert_eq!(uri.module(), Some("/m.so".into()));
        let uri = Pkcs11Uri::parse(
            "pkcs11:slot-description=Slot%201;slot-manufacturer=A;library-description=L;library-manufacturer=M;library-version=3",
        );
        let token = uri.expect("valid").token;
        assert_eq!(
            token.to_string(),
            r#"slot description "Slot 1" and slot manufacturer "A" and library "L" and library manufacturer "M" and library version "3.0""#
        );
    }

    #[test]
    fn refusals_never_repeat_a_pin() {
        let version = || UriError::Value("library-version".into(), "is not a version such as 2.6");
        for (text, error) in [
            ("token=x", UriError::Scheme),
            ("pkcs11:token", UriError::Component),
            ("pkcs11:token=a;token=b", UriError::Twice("token".into())),
            ("pkcs11:color=red", UriError::Attribute("color".into())),
            ("pkcs11:type=cert", UriError::Value("type".into(), "must be \"private\" for a signing key")),
            ("pkcs11:slot-id=x", UriError::Value("slot-id".into(), "is not a number")),
            ("pkcs11:library-version=2.x", version()),
            ("pkcs11:library-version=256", version()),
            ("pkcs11:token=%ff", UriError::Value("token".into(), "is not UTF-8")),
        ] {
            assert_eq!(Pkcs11Uri::parse(text).expect_err(text), error);
        }
        let error = Pkcs11Uri::parse("pkcs11:?pin-value=431276&pin-source=|cat").expect_err("a command");
        assert!(!error.to_string().contains("431276"));
        let uri = Pkcs11Uri::parse("pkcs11:object=k?pin-value=431276").expect("valid");
        assert!(uri.has_pin_value && !format!("{uri:?}").contains("431276"));
    }
}
