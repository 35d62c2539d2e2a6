//! A virtual YubiKey with a PC/SC service of its own: our card program, on the vpcd protocol.

mod apdu;
mod card;
mod keys;
mod management;
mod objects;
mod owner;
mod secret;
mod service;
mod tlv;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use self::card::Card;
use crate::{free_pair, write_private};

/// The PIN that the fixtures give a card. Long enough to be searched for in logs.
pub const PIN: &str = "90417325";

/// The PUK after [`VirtualPiv::change_puk`].
pub const PUK: &str = "71828182";

/// The answer to reset of a YubiKey 5.
const ATR: &[u8] = &[
    0x3b, 0xfd, 0x13, 0, 0, 0x81, 0x31, 0xfe, 0x15, 0x80, 0x73, 0xc0, 0x21, 0xc0, 0x57, 0x59, 0x75, 0x62,
    0x69, 0x4b, 0x65, 0x79, 0x40,
];

/// How long the card waits for a finger, as the real one does.
const TOUCH: Duration = Duration::from_secs(15);

/// Touch policies (Yubico, "PIV extensions"), and how long a touch counts with the second.
const ALWAYS: u8 = 2;
const CACHED: u8 = 3;
const CACHED_FOR: Duration = Duration::from_secs(15);

/// Longest wait for the service to see the card; it looks every 400 ms.
const SEEN: Duration = Duration::from_secs(10);

/// A card in a reader of its own.
pub struct VirtualPiv {
    directory: PathBuf,
    socket: PathBuf,
    /// What its reader's name has, and no other one's before it.
    reader: &'static str,
    /// Its serial number.
    pub serial: u32,
    port: u16,
    inside: Arc<Inside>,
    service: Option<Child>,
}

/// What the card's thread and we share.
struct Inside {
    card: Mutex<Card>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    plugged: bool,
    over: bool,
    /// The connection to the reader.
    line: Option<TcpStream>,
    faults: Faults,
    /// How often that was set.
    set: usize,
    touches: usize,
    last_touch: Option<Instant>,
    /// Somebody is being waited for.
    waiting: bool,
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Every answer takes this much longer.
    pub delay: Duration,
    /// Every answer is this status word.
    pub status: Option<u16>,
    /// The card is pulled in the middle of the next command.
    pub pull: bool,
    /// It does the command first, and then takes that time, or is pulled.
    pub late: bool,
    /// All that with these commands only.
    pub only: Option<fn(&[u8]) -> bool>,
    /// All that once.
    pub once: bool,
}

/// VERIFY with a PIN in it (NIST SP 800-73-4, part 2, 3.2.1): without one it asks for the tries.
pub fn shows_pin(command: &[u8]) -> bool {
    command.get(1) == Some(&0x20) && command.get(4).is_some_and(|length| *length > 0)
}

/// GET METADATA of a slot (Yubico, "PIV extensions").
pub fn asks_metadata(command: &[u8]) -> bool {
    command.get(1) == Some(&0xf7)
}

impl VirtualPiv {
    /// Makes an empty card with the factory's PIN and starts its service.
    pub fn create(directory: &Path, serial: u32) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory.join("readers")).context("the card's directory")?;
        let port = free_pair()?;
        let reader = format!(
            "FRIENDLYNAME \"Yubico YubiKey CCID virtual\"\nDEVICENAME /dev/null:{port:#06x}\n\
             LIBPATH /usr/lib/pcsc/drivers/serial/libifdvpcd.so\nCHANNELID {port:#06x}\n"
        );
        std::fs::write(directory.join("readers/vpcd"), reader).context("the reader's configuration")?;
        let mut piv = Self::unplugged(directory, serial, directory.join("pcscd.sock"), port, "Yubico")?;
        piv.start_service()?;
        piv.begin()?;
        Ok(piv)
    }

    /// Makes another one, in the second reader of the same service.
    pub fn beside(&self, directory: &Path, serial: u32) -> anyhow::Result<Self> {
        let piv = Self::unplugged(directory, serial, self.socket.clone(), self.port + 1, "virtual 00 01")?;
        piv.begin()?;
        Ok(piv)
    }

    fn unplugged(
        directory: &Path,
        serial: u32,
        socket: PathBuf,
        port: u16,
        reader: &'static str,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory).context("the card's directory")?;
        write_private(&directory.join("user.pin"), format!("{PIN}\n").as_bytes())?;
        let inside = Arc::new(Inside {
            card: Mutex::new(Card::new(serial).context("OpenSSL")?),
            state: Mutex::new(State { plugged: true, ..State::default() }),
            changed: Condvar::new(),
        });
        Ok(Self { directory: directory.to_owned(), socket, reader, serial, port, inside, service: None })
    }

    /// Puts it in.
    fn begin(&self) -> anyhow::Result<()> {
        let (inside, port) = (Arc::clone(&self.inside), self.port);
        std::thread::spawn(move || inside.run(port));
        self.await_seen()
    }

    /// Where its service listens: `PCSCLITE_CSOCK_NAME`.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// `[token.NAME]` of an agent's configuration.
    pub fn section(&self, name: &str) -> String {
        let (serial, pin, socket) = (self.serial, self.pin_file(), self.socket());
        format!(
            "\n[token.{name}]\nbackend = \"piv\"\nserial = {serial}\npin = {{ file = \"{}\" }}\n\
             env.PCSCLITE_CSOCK_NAME = \"{}\"\n",
            pin.display(),
            socket.display()
        )
    }

    /// A file with [`PIN`].
    pub fn pin_file(&self) -> PathBuf {
        self.directory.join("user.pin")
    }

    /// Pulls the card.
    pub fn unplug(&self) {
        let mut state = self.inside.state();
        state.plugged = false;
        if let Some(line) = state.line.take() {
            let _ = line.shutdown(Shutdown::Both);
        }
    }

    /// Puts the card back.
    pub fn plug(&self) {
        self.inside.state().plugged = true;
        self.inside.changed.notify_all();
    }

    /// Sets what goes wrong from now on.
    pub fn set(&self, faults: Faults) {
        let mut state = self.inside.state();
        state.faults = faults;
        state.set += 1;
        drop(state);
        self.inside.changed.notify_all();
    }

    /// A finger on the contact, for whoever waits for one.
    pub fn touch(&self) {
        self.inside.state().touches += 1;
        self.inside.changed.notify_all();
    }

    /// Whether the card waits for a finger.
    pub fn waits_for_touch(&self) -> bool {
        self.inside.state().waiting
    }

    /// Waits until the service sees the card.
    fn await_seen(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.tool(&["-a", "version"]).is_err() {
            ensure!(started.elapsed() < SEEN, "pcscd does not see the card at port {}", self.port);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for VirtualPiv {
    fn drop(&mut self) {
        self.inside.state().over = true;
        self.unplug();
        self.inside.changed.notify_all();
        let _ = self.kill_service();
    }
}

impl Inside {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn card(&self) -> MutexGuard<'_, Card> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The card's thread: connects to the reader whenever it is plugged in.
    fn run(&self, port: u16) {
        loop {
            {
                let mut state = self.state();
                while !state.plugged && !state.over {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.over {
                    return;
                }
            }
            // Without a service there is no reader yet; it looks for cards every 400 ms itself.
            let Ok(line) = TcpStream::connect(("127.0.0.1", port)) else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            self.state().line = line.try_clone().ok();
            self.card().reset();
            let _ = self.serve(line);
        }
    }

    /// The vpcd protocol: lengths of 16 bits; one byte is a control code, more are a command.
    fn serve(&self, mut line: TcpStream) -> std::io::Result<()> {
        line.set_nodelay(true)?;
        loop {
            let mut length = [0; 2];
            quick(&line);
            line.read_exact(&mut length)?;
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            quick(&line);
            line.read_exact(&mut message)?;
            let answer = match message.as_slice() {
                // Power off, power on, reset.
                [0..=2] => {
                    self.card().reset();
                    continue;
                }
                [4] => ATR.to_vec(),
                [_] => continue,
                command => match self.command(command) {
                    Some(answer) => answer,
                    None => return Ok(()),
                },
            };
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX).to_be_bytes();
            line.write_all(&[&length[..], &answer].concat())?;
        }
    }

    /// Runs a command with whatever goes wrong. `None`: the card was pulled.
    fn command(&self, command: &[u8]) -> Option<Vec<u8>> {
        let faults = {
            let mut state = self.state();
            match &mut state.faults {
                Faults { only: Some(only), .. } if !only(command) => Faults::default(),
                faults if faults.once => std::mem::take(faults),
                faults => {
                    let now = faults.clone();
                    faults.pull = false;
                    now
                }
            }
        };
        let done = faults.late.then(|| self.card().command(command));
        self.delayed(faults.delay);
        if faults.pull {
            return None;
        }
        if done.is_some() {
            return done;
        }
        if let Some(status) = faults.status {
            return Some(status.to_be_bytes().to_vec());
        }
        let last = self.state().last_touch;
        let wants_touch = match self.card().touch_policy(command) {
            ALWAYS => true,
            CACHED => last.is_none_or(|last| last.elapsed() > CACHED_FOR),
            _ => false,
        };
        if wants_touch && !self.touched() {
            return Some(vec![0x69, 0x82]);
        }
        Some(self.card().command(command))
    }

    /// Waits for so long, or until that is set anew.
    fn delayed(&self, delay: Duration) {
        let until = Instant::now() + delay;
        let mut state = self.state();
        let set = state.set;
        while state.set == set && !state.over {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a finger that comes after now.
    fn touched(&self) -> bool {
        let deadline = Instant::now() + TOUCH;
        let mut state = self.state();
        let before = state.touches;
        state.waiting = true;
        while state.touches == before && state.plugged && !state.over {
            let left = deadline.saturating_duration_since(Instant::now());
            let (now, timeout) =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = now;
            if timeout.timed_out() {
                break;
            }
        }
        state.waiting = false;
        if state.touches > before {
            state.last_touch = Some(Instant::now());
        }
        state.touches > before
    }
}

/// Nagle's algorithm on the reader's side and delayed acknowledgements on ours make 44 ms of every command.
fn quick(line: &TcpStream) {
    let _ = rustix::net::sockopt::set_tcp_quickack(line, true);
}
