//! The process that owns one token (`omsign-agent token-host`, started by the agent). It opens the backend,
//! logs in once, keeps handles, and signs in N threads. Whatever it cannot heal within a session it leaves to
//! its replacement: it answers "gone" and exits, and the agent starts another.

pub(crate) mod task;
pub(crate) mod wire;

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};

use self::task::Task;
use self::wire::{Answer, Asked, Class, Failure, Opening, Purpose, Request};
use crate::backend::{self, Device, Signer};
use crate::secret::{Pin, harden_process};

/// Answers to operations quicker than this are written together while more requests wait.
const QUICK: Duration = Duration::from_micros(100);

/// How many answers may be held back for that.
const TOGETHER: usize = 8;

/// After a lone request that came within this time of the answer before it, the next one is looked for as long
/// before this process sleeps: a caller who sends one request after the other waits for fewer wake-ups of sleeping
/// CPUs then, which cost as much as a quick signature. Who signs now and then costs nothing more.
const SOON: Duration = Duration::from_micros(150);

/// Runs the host on the socketpair that is its standard input, until the agent closes it.
pub fn run() -> io::Result<()> {
    // A vendor library that hangs must not outlive the agent.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    harden_process();
    let socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
    let mut reader = BufReader::new(socket.try_clone()?);
    let frame = zeroize::Zeroizing::new(wire::read(&mut reader)?);
    let mut open: wire::Open = wire::decode(&frame)?;
    drop(frame);
    let spec: wire::OpenSpec = serde_json::from_str(&open.spec)?;
    let pin = open.pin.take().and_then(Pin::new);
    let opening = match spec.purpose {
        Purpose::Survey => (backend::survey(&spec.token).map(Opening::Surveyed), None),
        Purpose::Prepare => {
            let fresh = open.fresh.take().unwrap_or_default();
            (backend::prepare(&spec.token, pin, &fresh).map(|()| Opening::Prepared), None)
        }
        Purpose::Open => {
            let say = |opening| wire::say(&mut &socket, &opening);
            match backend::open(&spec, pin, &say) {
                Ok((device, opened)) => (Ok(Opening::Opened(opened)), Some(device)),
                Err(failure) => (Err(failure), None),
            }
        }
    };
    let (answer, device) = opening;
    wire::say(&mut &socket, &answer.unwrap_or_else(Opening::Failed))?;
    let Some(device) = device else { return Ok(()) };
    socket.set_read_timeout(Some(device.rests()))?;
    {
        let signers = device.signers().map_err(io::Error::other)?;
        let shared = Shared {
            device: device.as_ref(),
            inbox: Mutex::new(Inbox { reader, soon: false }),
            writer: Mutex::new((socket, Vec::new(), 0)),
        };
        std::thread::scope(|scope| {
            for signer in signers {
                scope.spawn(|| shared.work(signer));
            }
        });
    }
    // No thread is inside the device any more, which C_Finalize asks for. A thread that hangs there keeps us
    // from getting here; the agent then kills this process.
    device.close();
    Ok(())
}

struct Shared<'a> {
    device: &'a dyn Device,
    inbox: Mutex<Inbox>,
    /// The socket, answers not yet written, and how many.
    writer: Mutex<(UnixStream, Vec<u8>, usize)>,
}

/// Our end of the line to the agent.
struct Inbox {
    reader: BufReader<UnixStream>,
    /// The last request was alone, and came soon after the answer before it.
    soon: bool,
}

impl Inbox {
    /// Waits until something is there, or the socket's time-out.
    fn wait(&mut self) -> io::Result<&[u8]> {
        if !self.reader.buffer().is_empty() {
            return Ok(self.reader.buffer());
        }
        let since = Instant::now();
        let here = || recv(self.reader.get_ref(), &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok();
        while self.soon && since.elapsed() < SOON && !here() {
            std::thread::yield_now();
        }
        let here = self.reader.fill_buf();
        self.soon = since.elapsed() < SOON;
        here
    }
}

/// What comes next.
enum Next {
    Request(Request, bool),
    Idle,
}

impl Shared<'_> {
    /// One thread: takes a request, signs it, answers it. A thread that is free takes the next request itself,
    /// so no request ever waits behind a busy one.
    fn work(&self, mut signer: Box<dyn Signer + '_>) {
        loop {
            let (request, more) = match self.next() {
                Ok(Next::Request(request, more)) => (request, more),
                Ok(Next::Idle) => match self.device.probe() {
                    Ok(()) => continue,
                    Err(failure) => self.die(&failure),
                },
                // The agent closed its end: nothing waits for us any more.
                Err(_) => return,
            };
            let started = Instant::now();
            let id = request.id;
            let touch = |message: &str| {
                // When the agent is gone, the next read says so.
                let _ = self.answer(&Answer::touch(id, message.to_owned()), false);
            };
            let (mut answer, failure) = match request.asked() {
                Ok(Asked::Sign(index, content)) => {
                    let outcome = signer.sign(index, &content, &touch);
                    let failure = outcome.as_ref().err().cloned();
                    (Answer::new(id, outcome), failure)
                }
                Ok(Asked::Do(task)) => {
                    // YubiKeys and TPMs need minutes for some RSA keys; nothing else takes long.
                    if matches!(task, Task::Generate(..)) {
                        let _ = self.answer(&Answer::begun(id), false);
                    }
                    let outcome = self.device.operate(&task, &touch);
                    let failure = outcome.as_ref().err().cloned();
                    (Answer::done(id, outcome), failure)
                }
                // The agent is of the same build: this is no request of its.
                Err(_) => return,
            };
            // A PIN that was refused now is offered to nobody who waits: this process ends before they can ask.
            let last = failure.filter(|failure| matches!(failure.class, Class::Gone | Class::Locked));
            let took = started.elapsed();
            answer.took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            let hold = more && last.is_none() && took < QUICK;
            if self.answer(&answer, hold).is_err() {
                return;
            }
            if let Some(failure) = last {
                self.die(&failure);
            }
        }
    }

    /// The next request, and whether another is already here.
    fn next(&self) -> io::Result<Next> {
        let mut inbox = self.inbox.lock().map_err(|_| io::Error::other("a thread panicked"))?;
        match inbox.wait() {
            Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(Next::Idle);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Next::Idle),
            Err(error) => return Err(error),
        }
        let request: Request = wire::decode(&wire::read(&mut inbox.reader)?)?;
        inbox.soon &= request.alone;
        Ok(Next::Request(request, !inbox.reader.buffer().is_empty()))
    }

    fn answer(&self, answer: &Answer, hold: bool) -> io::Result<()> {
        let mut writer = self.writer.lock().map_err(|_| io::Error::other("a thread panicked"))?;
        let (socket, buffer, held) = &mut *writer;
        wire::put(buffer, answer);
        *held += 1;
        if hold && *held < TOGETHER {
            return Ok(());
        }
        socket.write_all(buffer)?;
        buffer.clear();
        *held = 0;
        Ok(())
    }

    fn die(&self, failure: &Failure) -> ! {
        tracing::warn!(reason = %failure, "the token cannot go on; this process ends");
        // Other threads may be inside the module, where C_Finalize or an exit handler would crash or hang.
        let _ = kill_process(getpid(), Signal::KILL);
        std::process::abort()
    }
}
