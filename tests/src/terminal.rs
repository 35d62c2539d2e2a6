//! Somebody at a terminal: a pseudo-terminal, and a thread that reads the questions and types the answers.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::agent::{eventually, under};

/// A terminal for one command.
pub struct Terminal {
    name: std::ffi::CString,
    /// Open as long as we are, or what it is set to would go with its last user.
    side: OwnedFd,
    said: Arc<Mutex<String>>,
}

impl Terminal {
    /// Makes one at which each question is answered when it has appeared, in this order.
    pub fn new(answers: &[(&str, &str)]) -> anyhow::Result<Self> {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&person)?;
        unlockpt(&person)?;
        let name = ptsname(&person, Vec::new())?;
        let side = open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let said = Arc::new(Mutex::new(String::new()));
        let answers: Vec<_> = answers
            .iter()
            .map(|(question, answer)| ((*question).to_owned(), format!("{answer}\n")))
            .collect();
        let seen = Arc::clone(&said);
        // Ends with the last process that has the terminal open.
        std::thread::spawn(move || {
            let mut person = File::from(person);
            let (mut answers, mut from, mut buffer) = (answers.into_iter().peekable(), 0, [0; 1024]);
            while let Ok(read @ 1..) = person.read(&mut buffer) {
                let mut said = seen.lock().unwrap_or_else(PoisonError::into_inner);
                said.push_str(&String::from_utf8_lossy(buffer.get(..read).unwrap_or_default()));
                let new = said.get(from..).unwrap_or_default();
                if answers.peek().is_some_and(|(question, _)| new.contains(question))
                    && let Some((_, answer)) = answers.next()
                {
                    from = said.len();
                    drop(said);
                    // rpassword asks, then turns the echo off: faster than a person, we would be seen.
                    let unseen = || Ok(!echoes(person.as_fd())?);
                    if eventually("a terminal without echo", unseen).is_ok() {
                        let _ = person.write_all(answer.as_bytes());
                    }
                }
            }
        });
        Ok(Self { name, side, said })
    }

    /// The same command, with this as its controlling terminal and its three standard streams.
    pub fn seat(&self, command: &Command) -> anyhow::Result<Command> {
        let mut seated = under("setsid", ["--ctty"], command);
        let side = || -> anyhow::Result<Stdio> {
            Ok(open(&self.name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?.into())
        };
        seated.stdin(side()?).stdout(side()?).stderr(side()?);
        Ok(seated)
    }

    /// Everything that appeared on it so far.
    pub fn said(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until a text has appeared.
    pub fn shows(&self, text: &str) -> anyhow::Result<()> {
        eventually(text, || Ok(self.said().contains(text))).with_context(|| self.said())
    }

    /// Whether what is typed appears on it.
    pub fn echoes(&self) -> anyhow::Result<bool> {
        echoes(self.side.as_fd())
    }

    /// Runs a command at it, which must end with this status; returns everything that appeared.
    pub fn runs(&self, command: &Command, status: i32) -> anyhow::Result<String> {
        let ended = self.seat(command)?.status().context("setsid")?;
        // What it wrote last is read by the thread a little later.
        let end = "\n-- its end --";
        File::from(self.side.try_clone()?).write_all(end.as_bytes())?;
        self.shows("-- its end --")?;
        let said = self.said();
        ensure!(ended.code() == Some(status), "{ended}: {said}");
        ensure!(self.echoes()?, "the terminal is left without echo: {said}");
        Ok(said)
    }
}

fn echoes(either_side: BorrowedFd<'_>) -> anyhow::Result<bool> {
    Ok(tcgetattr(either_side)?.local_modes.contains(LocalModes::ECHO))
}
