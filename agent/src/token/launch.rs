//! How a token's process is started, and has its device open, looked at or prepared.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::process::{Child, Command as Spawn};
use tokio::sync::watch;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::line::Host;
use super::process::{GRACE, Process, while_logging_in};
use super::{Token, TokenError};
use crate::config::{self, PinSource};
use crate::host::wire::{self, Class, Failure, Fresh, OpenSpec, Opening, Purpose, Survey};
use crate::pin::BY_HAND;
use crate::secret::Pin;

/// Starts the process and has it open the device.
pub(super) async fn launch(
    token: &Token,
    pin: Option<Pin>,
    by_operator: bool,
) -> Result<(Host, Process), Failure> {
    let spec = OpenSpec {
        token: token.config.clone(),
        keys: token.keys.clone(),
        by_operator,
        unanswered: token.unanswered.load(Ordering::Relaxed),
        purpose: Purpose::Open,
    };
    let (logging_in, from_source) = (AtomicBool::new(false), pin.is_none() && !token.pin().is_by_hand());
    // Somebody may correct it while it is offered.
    let written = token.written().await;
    let opened = open(token, &spec, pin, &logging_in).await;
    match &opened {
        Ok(_) if from_source => token.forget_refusal().await,
        // It was offered, and not taken.
        Err(failure)
            if from_source && failure.class == Class::Locked && logging_in.load(Ordering::Relaxed) =>
        {
            token.keep_refusal(&failure.message, written).await;
        }
        _ => {}
    }
    opened
}

async fn open(
    token: &Token,
    spec: &OpenSpec,
    pin: Option<Pin>,
    logging_in: &AtomicBool,
) -> Result<(Host, Process), Failure> {
    let started = start(&token.name, spec, pin, None, logging_in, token.stopping.subscribe()).await;
    let (child, socket, opening) = started?;
    match opening {
        Opening::Opened(opened) => {
            let opened = opened.bounded(token.config.sessions);
            let (host, inbox) = Host::new(opened, &token.config);
            let is_card = token.is_card();
            let timeout = token.config.timeout;
            Ok((host, Process { child, socket, requests: inbox, timeout, is_card }))
        }
        Opening::Failed(failure) => {
            let failure = failure.bounded();
            // The device counted it, or not, and went away: the next process looks before it offers another, as far as the
            // device tells. It is the last one.
            // (A TPM's keys have values of their own, which it counts and forgives by itself.)
            let offers = !matches!(token.config.device, config::Device::Tpm(_));
            let lost = offers && logging_in.load(Ordering::Relaxed) && failure.class == Class::Gone;
            if lost && token.unanswered.swap(true, Ordering::Relaxed) {
                return Err(Failure { class: Class::Locked, message: while_logging_in(&failure.message) });
            }
            Err(failure)
        }
        Opening::Surveyed(_) | Opening::Prepared | Opening::LoggingIn | Opening::LoggedIn => {
            Err(gone("its process did what was not asked".into()))
        }
    }
}

/// Has a process of its own look at a module without logging in.
pub(crate) async fn survey(name: &str, token: &config::Token) -> Result<Survey, String> {
    match once(name, token, None, None, Purpose::Survey).await {
        Ok(Opening::Surveyed(survey)) => Ok(survey),
        Ok(_) => Err("its process did what was not asked".into()),
        Err(failure) => Err(failure.message),
    }
}

/// Has a process of its own give a device secrets of its own.
pub(crate) async fn prepare(
    name: &str,
    token: &config::Token,
    pin: Option<Pin>,
    fresh: Fresh,
) -> Result<(), String> {
    let prepared = once(name, token, pin, Some(fresh), Purpose::Prepare).await;
    prepared.and_then(done).map_err(|failure| failure.message)
}

/// Has a process of its own set a PIN anew.
pub(crate) async fn unblock(name: &str, token: &config::Token, fresh: Fresh) -> Result<(), TokenError> {
    Ok(once(name, token, None, Some(fresh), Purpose::Unblock).await.and_then(done)?)
}

fn done(opening: Opening) -> Result<(), Failure> {
    match opening {
        Opening::Prepared => Ok(()),
        _ => Err(gone("its process did what was not asked".into())),
    }
}

/// In a process that does this one thing, and that nobody stops.
async fn once(
    name: &str,
    token: &config::Token,
    pin: Option<Pin>,
    fresh: Option<Fresh>,
    purpose: Purpose,
) -> Result<Opening, Failure> {
    let (token, never) = (token.clone(), watch::channel(false).1);
    let spec = OpenSpec { token, keys: Vec::new(), by_operator: true, unanswered: false, purpose };
    match start(name, &spec, pin, fresh, &AtomicBool::default(), never).await? {
        (_, _, Opening::Failed(failure)) => Err(failure),
        (_, _, done) => Ok(done),
    }
}

/// `logging_in` says afterwards whether a PIN was on its way. Told to stop, it waits for no more than what became of one.
async fn start(
    name: &str,
    spec: &OpenSpec,
    pin: Option<Pin>,
    fresh: Option<Fresh>,
    logging_in: &AtomicBool,
    mut stopping: watch::Receiver<bool>,
) -> Result<(Child, UnixStream, Opening), Failure> {
    // Opening takes several operations, and so does every key; most are quick where one is slow.
    let more_keys = u32::try_from(spec.keys.len().saturating_sub(1)).unwrap_or(u32::MAX);
    let by_hand = pin.is_none() && spec.by_operator && spec.token.pin == PinSource::Device;
    let by_hand = if by_hand { BY_HAND } else { Duration::ZERO };
    let limit = spec.token.timeout.saturating_mul(more_keys.saturating_add(3)).saturating_add(by_hand);
    let (mut socket, mut child) =
        spawn(name, &spec.token).map_err(|error| gone(format!("its process cannot be started: {error}")))?;
    let opening = async {
        let spec = serde_json::to_string(spec).map_err(io::Error::other)?;
        let open = wire::Open { spec, pin: pin.map(|pin| pin.expose().to_owned()), fresh };
        let message = Zeroizing::new(open.encode_to_vec());
        drop(Zeroizing::new(open.pin.unwrap_or_default()));
        let mut frame = Zeroizing::new(Vec::with_capacity(message.len() + 4));
        wire::put_bytes(&mut frame, &message);
        socket.write_all(&frame).await?;
        loop {
            let answer = wire::read_async(&mut socket).await?;
            match serde_json::from_slice(&answer).map_err(io::Error::other)? {
                Opening::LoggingIn => logging_in.store(true, Ordering::Relaxed),
                Opening::LoggedIn => logging_in.store(false, Ordering::Relaxed),
                opening => return io::Result::Ok(opening),
            }
        }
    };
    let stopped = async {
        // Where its sender is gone nobody stops it.
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            std::future::pending::<()>().await;
        }
        while logging_in.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let why = tokio::select! {
        biased;
        opened = timeout(limit, opening) => match opened {
            Ok(Ok(opening)) => return Ok((child, socket, opening)),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                "its process ended while opening the device; the module may have crashed".to_owned()
            }
            Ok(Err(error)) => format!("its process cannot be started: {error}"),
            Err(_) => format!("the device did not open within {} s", limit.as_secs_f64()),
        },
        () = stopped => "it was closed".to_owned(),
    };
    // The next one finds the device free.
    let _ = timeout(GRACE, child.kill()).await;
    Err(match logging_in.load(Ordering::Relaxed) {
        true => Failure { class: Class::Locked, message: while_logging_in(&why) },
        false => gone(why),
    })
}

fn spawn(name: &str, config: &config::Token) -> io::Result<(UnixStream, Child)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    // The running binary itself, even when the file was replaced by an upgrade since.
    let mut command = Spawn::new("/proc/self/exe");
    for name in &config.hidden_env {
        command.env_remove(name);
    }
    let child = command
        .arg0(format!("omsign-agent: token {name}"))
        .arg("token-host")
        // tpm2-tss writes to standard error what its errors say anyway.
        .env("TSS2_LOG", "all+NONE")
        .envs(&config.env)
        .current_dir(&config.directory)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    Ok((UnixStream::from_std(ours)?, child))
}

fn gone(message: String) -> Failure {
    Failure { class: Class::Gone, message }
}
