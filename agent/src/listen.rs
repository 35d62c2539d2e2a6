//! Where callers come in: a Unix socket, TCP with mutual TLS, or sockets that systemd hands over. Every
//! connection carries the [`Identity`] of its caller before the first request is read from it.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::net::unix::UCred;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;

use crate::config::{Listen, TlsListen, UnixListen};
use crate::connection::Connection;
use crate::identity::{Caller, Identity};
use crate::places::{Place, Places};
use crate::tls::{Tls, TlsError};

/// How long a caller may take to prove who it is.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long it may wait for others of the same caller.
const TURN: Duration = Duration::from_secs(60);

/// The sockets, bound and listening.
pub struct Listeners {
    unix: Vec<UnixListener>,
    tcp: Vec<(TcpListener, Arc<Tls>)>,
    files: SocketFiles,
}

/// A socket file that we made.
#[derive(Clone)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode: others may put something else in its place.
    made: (u64, u64),
}

impl SocketFile {
    /// One that was just made.
    fn at(path: &Path) -> io::Result<Self> {
        let found = std::fs::symlink_metadata(path)?;
        let ours = found.file_type().is_socket() && found.uid() == rustix::process::geteuid().as_raw();
        let made = (found.dev(), found.ino());
        if ours { Ok(Self { path: path.to_owned(), made }) } else { Err(replaced()) }
    }

    /// Says who can connect: of this file, and of none that a link leads to.
    pub(crate) fn permit(&self, mode: u32, group: Option<u32>) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, Mode::empty())?;
        let found = rustix::fs::fstat(&file)?;
        if (found.st_dev, found.st_ino) != self.made {
            return Err(replaced());
        }
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        if group.is_some() {
            std::os::unix::fs::chown(&file, None, group)?;
        }
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode))
    }

    /// Removes it, if it is still there.
    fn remove(&self) {
        if Self::at(&self.path).is_ok_and(|found| found.made == self.made) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn replaced() -> io::Error {
    io::Error::other("somebody put another file in the socket's place")
}

/// Socket files that we made, removed with this value.
#[derive(Default)]
pub(crate) struct SocketFiles(pub(crate) Vec<SocketFile>);

impl Drop for SocketFiles {
    fn drop(&mut self) {
        self.0.iter().for_each(SocketFile::remove);
    }
}

/// Why it cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("another agent is listening on {0}; stop it or choose another path")]
    InUse(PathBuf),
    /// Something that is not a socket is in the way. It is never removed.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The system said no.
    #[error("cannot listen on {at}")]
    System {
        /// Path or address.
        at: String,
        /// What it said.
        source: io::Error,
    },
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// systemd handed over a TCP socket, and there is no TLS configuration for it.
    #[error("systemd handed over a TCP socket, but [listen] has no tls; plain TCP is never served")]
    TcpWithoutTls,
}

impl Listeners {
    /// Takes over the sockets that systemd passed, and binds those of the configuration that it did not.
    pub(crate) fn bind(config: &Listen, tls: Option<&Arc<Tls>>) -> Result<Self, ListenError> {
        let mut listeners = Self { unix: Vec::new(), tcp: Vec::new(), files: SocketFiles::default() };
        let mut inherited = listenfd::ListenFd::from_env();
        for index in 0..inherited.len() {
            let at = format!("systemd socket {index}");
            let fail = |source| ListenError::System { at: at.clone(), source };
            if let Ok(Some(socket)) = inherited.take_unix_listener(index) {
                tell_of(&socket, config.unix.as_ref());
                listeners.unix.push(unix_listener(socket).map_err(fail)?);
            } else if let Some(socket) = inherited.take_tcp_listener(index).map_err(fail)? {
                let tls = tls.cloned().ok_or(ListenError::TcpWithoutTls)?;
                socket.set_nonblocking(true).map_err(fail)?;
                listeners.tcp.push((TcpListener::from_std(socket).map_err(fail)?, tls));
            }
        }
        // What systemd did not hand over is bound here.
        if let Some(unix) = config.unix.as_ref().filter(|_| listeners.unix.is_empty()) {
            let (socket, file) = bind_unix(unix)?;
            listeners.unix.push(socket);
            listeners.files.0.push(file);
        }
        if let (Some(TlsListen { address, .. }), Some(tls)) =
            (&config.tls, tls.filter(|_| listeners.tcp.is_empty()))
        {
            let fail = |source| ListenError::System { at: address.to_string(), source };
            let socket = std::net::TcpListener::bind(address).map_err(fail)?;
            socket.set_nonblocking(true).map_err(fail)?;
            let socket = TcpListener::from_std(socket).map_err(fail)?;
            if let Ok(address) = socket.local_addr() {
                tracing::info!(%address, "listening with mutual TLS");
            }
            listeners.tcp.push((socket, Arc::clone(tls)));
        }
        Ok(listeners)
    }

    /// Accepts until the returned receiver is dropped, then removes the socket files.
    pub fn accept(self) -> mpsc::Receiver<io::Result<Connection>> {
        let (accepted, connections) = mpsc::channel(16);
        // Each has places of its own: strangers on the network do not keep local callers out.
        let mut tasks = tokio::task::JoinSet::new();
        for socket in self.unix {
            tasks.spawn(accept_unix(socket, Places::new(), accepted.clone()));
        }
        for (socket, tls) in self.tcp {
            tasks.spawn(accept_tls(socket, tls, Places::new(), accepted.clone()));
        }
        let files = self.files;
        tokio::spawn(async move {
            accepted.closed().await;
            drop(tasks);
            drop(files);
        });
        connections
    }
}

async fn accept_unix(
    socket: UnixListener,
    places: Arc<Places>,
    accepted: mpsc::Sender<io::Result<Connection>>,
) {
    loop {
        let Ok(place) = Arc::clone(&places.all).acquire_owned().await else { return };
        let stream = match socket.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let (accepted, places) = (accepted.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            if let Some((identity, place)) = met(&stream, place, &places).await {
                let connection = Connection::new(Box::new(stream), identity, place);
                let _ = accepted.send(Ok(connection)).await;
            }
        });
    }
}

/// Who is at the other end, if this caller has a place left. The user database may be a slow directory server: it is asked
/// not on the event loop, not for ever, and not for one caller alone.
pub(crate) async fn met(
    stream: &UnixStream,
    one: OwnedSemaphorePermit,
    places: &Arc<Places>,
) -> Option<(Identity, Place)> {
    let credentials = stream.peer_cred().ok()?;
    let place = Place::of(Caller::Uid(credentials.uid()), one, places)?;
    let turn = timeout(TURN, place.turn().lock_owned()).await.ok()?;
    let look_up = move || {
        let _turn = turn;
        identity_of(credentials)
    };
    let identity = timeout(HANDSHAKE, tokio::task::spawn_blocking(look_up)).await.ok()?.ok()?;
    Some((identity, place))
}

async fn accept_tls(
    socket: TcpListener,
    tls: Arc<Tls>,
    places: Arc<Places>,
    accepted: mpsc::Sender<io::Result<Connection>>,
) {
    loop {
        let Ok(place) = Arc::clone(&places.all).acquire_owned().await else { return };
        let (stream, address) = match socket.accept().await {
            Ok(connected) => connected,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let (tls, accepted, places) = (Arc::clone(&tls), accepted.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            match timeout(HANDSHAKE, tls.handshake(stream)).await {
                Ok(Ok((stream, identity, proof))) => {
                    let Some(place) = Place::of(identity.caller(), place, &places) else { return };
                    let mut connection = Connection::new(Box::new(stream), identity, place);
                    connection.proof = Some(proof);
                    let _ = accepted.send(Ok(connection)).await;
                }
                Ok(Err(error)) => places.refused_handshake(address, &error.to_string()),
                Err(_) => places.refused_handshake(address, "it took too long"),
            }
        });
    }
}

/// Out of descriptors, mostly: accepting again at once would spin.
async fn pause_after(error: &io::Error) {
    tracing::error!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

pub(crate) fn identity_of(credentials: UCred) -> Identity {
    Identity::from_unix(credentials.uid(), credentials.gid(), credentials.pid())
}

/// A socket of systemd's is as its unit says, whatever our configuration does.
fn tell_of(socket: &std::os::unix::net::UnixListener, config: Option<&UnixListen>) {
    let path = socket.local_addr().ok().and_then(|address| address.as_pathname().map(PathBuf::from));
    let path = path.unwrap_or_default();
    let mode = std::fs::metadata(&path).map_or(0, |file| file.permissions().mode() & 0o777);
    tracing::info!(path = %path.display(), mode = format_args!("{mode:04o}"), "listening on a socket of systemd's");
    if config.is_some_and(|config| config.path != path || config.mode != mode) {
        tracing::warn!(
            "what [listen] unix says of path, mode and group does not count: the .socket unit does"
        );
    }
}

fn unix_listener(socket: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket)
}

/// Binds under a temporary name, sets group and mode, and renames: nobody can connect before they are right.
pub(crate) fn bind_unix(config: &UnixListen) -> Result<(UnixListener, SocketFile), ListenError> {
    let path = &config.path;
    let fail = |source| ListenError::System { at: path.display().to_string(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(path.clone())),
        // That nobody listens is all that says that it has ended.
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(ListenError::InUse(path.clone())),
            Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => return Err(fail(error)),
            Err(_) => {
                tracing::info!(path = %path.display(), "taking over the socket of an agent that has ended")
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(if config.mode & 0o077 == 0 { 0o700 } else { 0o755 });
        builder.create(directory).map_err(fail)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let bound = (|| {
        let socket = std::os::unix::net::UnixListener::bind(&temporary)?;
        let made = SocketFile::at(&temporary)?;
        made.permit(config.mode, config.group)?;
        std::fs::rename(&temporary, path)?;
        Ok((unix_listener(socket)?, SocketFile { path: path.clone(), ..made }))
    })();
    let bound = bound.inspect_err(|_| drop(std::fs::remove_file(&temporary))).map_err(fail)?;
    tracing::info!(path = %path.display(), mode = format_args!("{:04o}", config.mode), "listening");
    Ok(bound)
}
