//! The process that owns one token (`omsign-agent token-host`, started by the agent). It opens the backend,
//! logs in once, keeps handles, and signs in N threads. Whatever it cannot heal within a session it leaves to
//! its replacement: it answers "gone" and exits, and the agent starts another.

pub(crate) mod task;
pub(crate) mod wire;

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{self, SyncSender};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};

use self::task::Task;
use self::wire::{Answer, Asked, Failure, Opening, Purpose, Request};
use crate::algorithm::Content;
use crate::backend::{self, Device, Signer};
use crate::secret::{Pin, harden_process};

/// Answers are written together while more requests wait here than answers are held back, but no later than this:
/// each write wakes the agent, which costs as much as a quick signature.
const TOGETHER: Duration = Duration::from_millis(2);

/// How many answers may be held back for that.
const TOGETHER_COUNT: usize = 8;

/// How many signatures may wait to be checked.
const UNCHECKED: usize = 8;

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
            writer: Mutex::new(Writer { socket, buffer: Vec::new(), held: 0, since: Instant::now() }),
        };
        std::thread::scope(|scope| {
            let checks = device.checker().is_some().then(|| {
                let (checks, made) = mpsc::sync_channel(UNCHECKED);
                // It ends with the threads that sign, or when the agent closes its end.
                scope.spawn(|| drop(made.into_iter().try_for_each(|made| shared.finish(made))));
                checks
            });
            for signer in signers {
                let checks = checks.clone();
                scope.spawn(|| shared.work(signer, checks));
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
    writer: Mutex<Writer>,
}

/// The other direction.
struct Writer {
    socket: UnixStream,
    /// Answers not yet written, how many, and since when.
    buffer: Vec<u8>,
    held: usize,
    since: Instant,
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
        while self.soon && since.elapsed() < SOON && !self.is_more_here() {
            std::thread::yield_now();
        }
        let here = self.reader.fill_buf();
        self.soon = since.elapsed() < SOON;
        here
    }

    fn is_more_here(&self) -> bool {
        recv(self.reader.get_ref(), &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
    }

    /// How many requests are here; never waits.
    fn waiting(&mut self) -> io::Result<usize> {
        if self.reader.buffer().is_empty() && self.is_more_here() {
            self.reader.fill_buf()?;
        }
        Ok(wire::frames(self.reader.buffer()))
    }
}

/// What came of a request, before it is answered.
struct Made {
    id: u64,
    outcome: Result<Vec<u8>, Failure>,
    /// A signature's key and what it was made of.
    unchecked: Option<(usize, Content)>,
    took: Duration,
    /// How many requests were here when it was begun.
    waiting: usize,
}

/// What comes next.
enum Next {
    /// A request, and how many more are here.
    Request(Request, usize),
    Idle,
}

impl Shared<'_> {
    /// One thread: takes a request, signs it, answers it. A thread that is free takes the next request itself,
    /// so no request ever waits behind a busy one.
    fn work(&self, mut signer: Box<dyn Signer + '_>, checks: Option<SyncSender<Made>>) {
        loop {
            let (request, waiting) = match self.next() {
                Ok(Next::Request(request, waiting)) => (request, waiting),
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
                let _ = self.answer(&Answer::touch(id, message.to_owned()), 0);
            };
            let (outcome, unchecked) = match request.asked() {
                Ok(Asked::Sign(key, content)) => (signer.sign(key, &content, &touch), Some((key, content))),
                Ok(Asked::Do(task)) => {
                    // YubiKeys and TPMs need minutes for some RSA keys; nothing else takes long.
                    if matches!(task, Task::Generate(..)) {
                        let _ = self.answer(&Answer::begun(id), 0);
                    }
                    (self.device.operate(&task, &touch).map(wire::done), None)
                }
                // The agent is of the same build: this is no request of its.
                Err(_) => return,
            };
            // A PIN that was refused now is offered to nobody who waits: this process ends before they can ask.
            let ends = outcome.as_ref().is_err_and(Failure::ends_process);
            let made = Made { id, outcome, unchecked, took: started.elapsed(), waiting };
            let went_on = match &checks {
                // The device does not wait for it. Whatever came before is answered first.
                Some(checks) if waiting > 0 || ends => checks.send(made).map_err(io::Error::other),
                _ => self.finish(made),
            };
            if went_on.is_err() || ends {
                return;
            }
        }
    }

    /// Checks what was made, where that is asked for, and answers.
    fn finish(&self, made: Made) -> io::Result<()> {
        let Made { id, outcome, unchecked, took, waiting } = made;
        let outcome = match (outcome, unchecked, self.device.checker()) {
            (Ok(signature), Some((key, content)), Some(checker)) => {
                checker.check(key, &content, &signature).map(|()| signature)
            }
            (outcome, ..) => outcome,
        };
        let last = outcome.as_ref().err().filter(|failure| failure.ends_process()).cloned();
        let answer = Answer::new(id, outcome).after(took);
        self.answer(&answer, if last.is_none() { waiting } else { 0 })?;
        match last {
            Some(failure) => self.die(&failure),
            None => Ok(()),
        }
    }

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
        Ok(Next::Request(request, inbox.waiting()?))
    }

    /// Says it, or holds it back for a moment while so many requests wait here.
    fn answer(&self, answer: &Answer, waiting: usize) -> io::Result<()> {
        let mut writer = self.writer.lock().map_err(|_| io::Error::other("a thread panicked"))?;
        let Writer { socket, buffer, held, since } = &mut *writer;
        if *held == 0 {
            *since = Instant::now();
        }
        wire::put(buffer, answer);
        *held += 1;
        // The next answer comes as long after this one as this one took.
        let next = since.elapsed() + Duration::from_micros(answer.took_us);
        if *held < waiting.min(TOGETHER_COUNT) && next < TOGETHER {
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
