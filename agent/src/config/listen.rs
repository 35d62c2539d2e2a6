//! `[listen]` and `[audit]`.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::defaults::service_audit_directory;
use super::keys::group_id;
use super::read::{Reader, Section};
use super::{Audit, Durability, Listen, TlsListen, UnixListen, default_socket};
use crate::tls::Tls;

/// How the operators' socket ends, beside that of callers: `agent.operator.sock`.
const OPERATOR: &str = "operator.sock";

/// Which callers can come in at all.
#[derive(Clone, Copy)]
pub(super) struct Callers {
    /// With the kernel's word for who they are.
    pub(super) unix: bool,
    /// With a certificate.
    pub(super) certificates: bool,
}

impl Callers {
    /// By what is there: a listener with a mistake in it is still one.
    pub(super) fn of(listen: Option<&Section<'_>>) -> Self {
        let has = |key| listen.is_some_and(|listen| listen.has(key));
        Self { unix: has("unix") || !has("tls"), certificates: has("tls") }
    }

    /// Operators have a socket of their own.
    pub(super) fn or_operators(self, listen: Option<&Section<'_>>) -> Self {
        let own = listen.is_some_and(|listen| listen.has("operator"));
        Self { unix: self.unix || own, ..self }
    }
}

pub(super) fn listen(reader: &mut Reader<'_>, section: Option<Section<'_>>) -> Listen {
    let default = || UnixListen { path: default_socket(), mode: 0o660, group: None };
    let shutdown_timeout = Duration::from_secs(10);
    let Some(mut section) = section else {
        let operator = Some(default_socket().with_extension(OPERATOR));
        return Listen { unix: Some(default()), operator, tls: None, shutdown_timeout };
    };
    let shutdown_timeout = section.duration(reader, "shutdown_timeout").unwrap_or(shutdown_timeout);
    let unix = section.only_table(reader, "unix").and_then(|table| unix(reader, table));
    let tls = section.only_table(reader, "tls").and_then(|table| tls(reader, table));
    let operator = section.only_table(reader, "operator").and_then(|mut table| {
        let path = table.path(reader, "path");
        if let Some(path) = &path {
            socket_path(reader, &table, path);
            if unix.as_ref().is_some_and(|unix| really(&unix.path) == really(path)) {
                let message = format!("{} is [listen] unix already; choose another path", path.display());
                table.wrong::<()>(reader, "path", message);
            }
        }
        table.finish(reader);
        path
    });
    section.finish(reader);
    let unix = if unix.is_none() && tls.is_none() { Some(default()) } else { unix };
    // Beside the callers' socket, if there is one.
    let beside = || unix.as_ref().map(|unix| unix.path.with_extension(OPERATOR));
    let operator = operator.or_else(beside);
    Listen { unix, operator, tls, shutdown_timeout }
}

fn unix(reader: &mut Reader<'_>, mut section: Section<'_>) -> Option<UnixListen> {
    let path = section.path(reader, "path").unwrap_or_else(default_socket);
    let mode = match section.string(reader, "mode") {
        None => Some(0o660),
        Some(text) => {
            let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
            let wrong = || format!("{text:?} is not an octal mode; write \"0660\" or the like");
            section.checked(reader, "mode", mode.ok_or_else(wrong))
        }
    };
    let group = section.string(reader, "group");
    let group = group.and_then(|name| section.checked(reader, "group", group_id(&name)));
    socket_path(reader, &section, &path);
    section.finish(reader);
    Some(UnixListen { path, mode: mode?, group })
}

/// Whatever links and dots lead to it: the socket itself need not be there yet.
fn really(path: &Path) -> PathBuf {
    let (parent, name) = (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or_default());
    parent.canonicalize().unwrap_or_else(|_| parent.to_owned()).join(name)
}

fn socket_path(reader: &mut Reader<'_>, section: &Section<'_>, path: &Path) {
    let shown = path.display();
    // What is bound beside it has a longer name.
    if path.as_os_str().len() > 85 {
        let message = format!("{shown} is too long for a Unix socket (107 bytes); choose a shorter path");
        section.wrong::<()>(reader, "path", message);
    }
    if path.symlink_metadata().is_ok_and(|found| !found.file_type().is_socket()) {
        let message = format!("{shown} exists and is not a socket; remove it or choose another path");
        section.wrong::<()>(reader, "path", message);
    }
}

fn tls(reader: &mut Reader<'_>, mut section: Section<'_>) -> Option<TlsListen> {
    let address = section.required(reader, "address", "\"0.0.0.0:7443\"");
    let address = address.and_then(|text| {
        let wrong =
            |_| format!("{text:?} is not an IP address and port; write \"0.0.0.0:7443\" or \"[::]:7443\"");
        section.checked(reader, "address", text.parse::<SocketAddr>().map_err(wrong))
    });
    let mut file = |key, example| {
        let text = section.required(reader, key, example)?;
        let path = reader.resolve(&text);
        let cannot = |error| format!("{} cannot be read: {error}", path.display());
        section.checked(reader, key, std::fs::File::open(&path).map_err(cannot));
        Some(path)
    };
    let certificate = file("certificate", "\"server.pem\"");
    let private_key = file("private_key", "\"server.key\"");
    let client_ca = file("client_ca", "\"clients.pem\"");
    let at = section.at;
    section.finish(reader);
    let tls = TlsListen {
        address: address?,
        certificate: certificate?,
        private_key: private_key?,
        client_ca: client_ca?,
    };
    if let Err(error) = Tls::load(&tls) {
        reader.mistake(at, "listen.tls", error.to_string());
    }
    Some(tls)
}

pub(super) fn audit(reader: &mut Reader<'_>, section: Option<Section<'_>>) -> Audit {
    let mut audit = Audit { directory: service_audit_directory(), durability: Durability::Fsync };
    let Some(mut section) = section else { return audit };
    if let Some(directory) = section.path(reader, "directory") {
        if let Some(file) = directory.ancestors().find(|path| path.exists()).filter(|path| !path.is_dir()) {
            let message = format!("{} is not a directory; choose another place", file.display());
            section.wrong::<()>(reader, "directory", message);
        }
        audit.directory = directory;
    }
    match section.string(reader, "durability").as_deref() {
        None | Some("fsync") => {}
        Some("os") => audit.durability = Durability::Os,
        Some(other) => {
            let message = format!("{other:?} is unknown; write \"fsync\" (safe) or \"os\" (fast)");
            section.wrong::<()>(reader, "durability", message);
        }
    }
    section.finish(reader);
    audit
}
