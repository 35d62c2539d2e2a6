//! The process that owns one token (`omsign-agent token-host`, started by the agent). It opens the backend,
//! logs in once, keeps handles, and signs in N threads. Whatever it cannot heal within a session it leaves to
//! its replacement: it answers "gone" and exits, and the agent starts another.

mod held;
mod inbox;
mod operate;
pub(crate) mod task;
pub(crate) mod wire;

use std::cell::Cell;
use std::io::{self, BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};

use self::held::{Held, TOGETHER};
use self::inbox::Inbox;
use self::operate::operate;
use self::task::Task;
use self::wire::{Answer, Asked, Class, Failure, Opening, Purpose, Request, Said};
use crate::algorithm::Content;
use crate::backend::{self, Device, Doing, Signer};
use crate::secret::{Pin, harden_process};

/// From here on a device is slow enough for the thread that checks to look for signatures by itself. Woken when one is
/// made, just before the device begins the next, it is in the way of a device that is a program and needs a CPU itself
/// (measured on two cores: swtpm takes 380 to 600 µs); quick ones want their answers to go out (a virtual card, 180 to 250).
const SLOW: Duration = Duration::from_micros(350);

/// How many signatures may wait to be checked.
const UNCHECKED: usize = 8;

/// How many of operators' tasks may wait for the thread that does them.
const TASKS: usize = 16;

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
    let fresh = open.fresh.take().unwrap_or_default();
    let mut device = None;
    let opening = match spec.purpose {
        Purpose::Survey => backend::survey(&spec.token).map(Opening::Surveyed),
        Purpose::Prepare => backend::prepare(&spec.token, pin, &fresh).map(|()| Opening::Prepared),
        Purpose::Unblock => backend::unblock(&spec.token, &fresh).map(|()| Opening::Prepared),
        Purpose::Open => {
            let notify = |doing: Doing<'_>| {
                let said = match doing {
                    Doing::LogsIn => wire::say(&mut &socket, &Opening::LoggingIn),
                    Doing::LoggedIn => wire::say(&mut &socket, &Opening::LoggedIn),
                    Doing::AwaitsTouch(_) => Ok(()),
                };
                // No PIN is offered that the agent does not know of: it is gone, and we go, too.
                said.unwrap_or_else(|_| std::process::abort());
            };
            backend::open(&spec, pin, &notify).map(|(open, opened)| {
                device = Some(open);
                Opening::Opened(opened)
            })
        }
    };
    drop(fresh);
    wire::say(&mut &socket, &opening.unwrap_or_else(Opening::Failed))?;
    let Some(device) = device else { return Ok(()) };
    socket.set_read_timeout(Some(device.rests()))?;
    {
        let signers = device.signers().map_err(io::Error::other)?;
        let shared = Shared {
            device: device.as_ref(),
            inbox: Mutex::new(Inbox { reader, soon: false }),
            writer: Mutex::new(Writer { socket, held: Vec::new() }),
            // Others could take the requests that one thread counts on.
            holds: signers.len() == 1,
            timeout: spec.token.timeout,
            login: Mutex::new(()),
            over: AtomicBool::new(false),
        };
        std::thread::scope(|scope| {
            let checks = shared.holds.then(|| {
                let (checks, inbox) = mpsc::sync_channel(UNCHECKED);
                // It ends with the thread that signs, or when the agent closes its end.
                scope.spawn(|| drop(shared.attend(inbox)));
                checks
            });
            let tasks = device.operates_beside().then(|| {
                let (tasks, inbox) = mpsc::sync_channel(TASKS);
                scope.spawn(|| drop(shared.operators(inbox)));
                tasks
            });
            for signer in signers {
                let (checks, tasks) = (checks.clone(), tasks.clone());
                scope.spawn(|| shared.work(signer, checks, tasks));
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
    /// Whether answers may be held back.
    holds: bool,
    /// How long a single operation may take.
    timeout: Duration,
    /// Held while the device is offered a PIN.
    login: Mutex<()>,
    /// The process ends, or a key is another than before: nothing more is begun.
    over: AtomicBool,
}

/// Our other end of it.
struct Writer {
    socket: UnixStream,
    /// Answers that were held back.
    held: Vec<u8>,
}

/// For the thread that checks what another signs, and sees to it that nothing is held back for long.
enum Check {
    /// Something to check and to answer, and whether more is to come before that is written.
    Made(Made, bool),
    /// It may be long until more comes.
    NoMore,
    /// Something was held back.
    Held,
}

/// What came of a request, before it is answered.
struct Made {
    id: u64,
    outcome: Result<Vec<u8>, Failure>,
    /// A signature's key and what it was made of.
    unchecked: Option<(usize, Content)>,
    took: Duration,
}

impl Shared<'_> {
    /// One thread: takes a request, signs it, answers it. A thread that is free takes the next request itself,
    /// so no request ever waits behind a busy one. With `checks`, another one checks and answers what it signed while more
    /// requests are here.
    fn work(
        &self,
        mut signer: Box<dyn Signer + '_>,
        checks: Option<SyncSender<Check>>,
        tasks: Option<SyncSender<(u64, Task)>>,
    ) {
        let mut held = Held::default();
        let no_more = || match &checks {
            Some(checks) => checks.send(Check::NoMore).map_err(io::Error::other),
            None => self.check(Check::NoMore),
        };
        loop {
            let (request, waiting) = match self.next() {
                Ok(Some(next)) => next,
                Ok(None) => match self.device.probe() {
                    Ok(()) => continue,
                    Err(failure) => self.die(&failure),
                },
                // The agent closed its end: nothing waits for us any more.
                Err(_) => return,
            };
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            let (started, id) = (Instant::now(), request.id);
            // The agent is of the same build: anything else is no request of its.
            let Ok(asked) = request.asked() else { return };
            let key = if let Asked::Sign(key, _) = asked { Some(key) } else { None };
            // Another key may be slow.
            if held.count > 0 && held.key != key {
                held = Held::default();
                if no_more().is_err() {
                    return;
                }
            }
            let login = Cell::new(None);
            let (outcome, content) = match (asked, &tasks) {
                (Asked::Sign(key, content), _) => {
                    let notify = |doing: Doing<'_>| self.tell(id, &login, &no_more, doing);
                    (signer.sign(key, &content, &notify), Some(content))
                }
                // Signatures go on meanwhile.
                (Asked::Do(task), Some(tasks)) => match tasks.send((id, task)) {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                (Asked::Do(task), None) => (self.operate(id, &task, &login, &no_more), None),
            };
            login.set(None);
            let took = started.elapsed();
            // A PIN that was refused now is offered to nobody who waits: this process ends before they can ask.
            let ends = outcome.as_ref().is_err_and(Failure::ends_process);
            let first = held.count == 0;
            let more = self.holds && !ends && held.may_wait(key, took, waiting, Instant::now());
            let is_checked = key.is_some_and(|key| self.device.verifier(key).is_some());
            let made = Made { id, outcome, unchecked: key.zip(content), took };
            let went_on = match &checks {
                // The device does not wait for it. Whatever came before is answered first.
                Some(checks) if ends || waiting > 0 && is_checked => {
                    checks.send(Check::Made(made, more)).map_err(io::Error::other)
                }
                Some(checks) if more && first => self
                    .check(Check::Made(made, more))
                    .and_then(|()| checks.send(Check::Held).map_err(io::Error::other)),
                _ => self.check(Check::Made(made, more)),
            };
            if went_on.is_err() || ends {
                return;
            }
        }
    }

    /// The thread that does what operators ask for, where signatures go on meanwhile.
    fn operators(&self, inbox: Receiver<(u64, Task)>) -> io::Result<()> {
        for (id, task) in inbox {
            if self.over.load(Ordering::SeqCst) {
                break;
            }
            let (started, login) = (Instant::now(), Cell::new(None));
            let outcome = self.operate(id, &task, &login, &|| self.check(Check::NoMore));
            drop(login);
            let made = Made { id, outcome, unchecked: None, took: started.elapsed() };
            self.check(Check::Made(made, false))?;
        }
        Ok(())
    }

    fn operate<'s>(
        &'s self,
        id: u64,
        task: &Task,
        login: &Cell<Option<MutexGuard<'s, ()>>>,
        no_more: &dyn Fn() -> io::Result<()>,
    ) -> Result<Vec<u8>, Failure> {
        let may_take_s = u32::try_from(task.may_take(self.timeout).as_secs() + 1).unwrap_or(u32::MAX);
        let _ = self.say(id, Said::Begun(may_take_s));
        operate(self.device, task, &|doing| self.tell(id, login, no_more, doing)).map(wire::done)
    }

    /// Tells the agent what the device is about with a request. Where it is gone, the next read says so.
    fn tell<'s>(
        &'s self,
        id: u64,
        login: &Cell<Option<MutexGuard<'s, ()>>>,
        no_more: &dyn Fn() -> io::Result<()>,
        doing: Doing<'_>,
    ) {
        let _ = match doing {
            Doing::AwaitsTouch(message) => {
                no_more().and_then(|()| self.say(id, Said::Touch(message.to_owned())))
            }
            Doing::LogsIn => {
                // It may be this request's own, of a card that another program had.
                login.set(None);
                login.set(self.login.lock().ok());
                self.say(id, Said::LogsIn(true))
            }
            Doing::LoggedIn => {
                let said = self.say(id, Said::LogsIn(false));
                login.set(None);
                said
            }
        };
    }

    /// The other thread. After each look it sleeps for as long as a slow device took.
    fn attend(&self, inbox: Receiver<Check>) -> io::Result<()> {
        let (mut holds, mut slept, mut quickest) = (false, Duration::ZERO, Duration::MAX);
        loop {
            let check = match holds {
                // The first of them may have waited for us to wake up, too.
                true => inbox.recv_timeout(TOGETHER.saturating_sub(2 * slept)),
                false => inbox.recv().map_err(RecvTimeoutError::from),
            };
            let mut next = match check {
                Ok(check) => Some(check),
                // The next takes longer than the last: it may never end.
                Err(RecvTimeoutError::Timeout) => Some(Check::NoMore),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            slept = Duration::ZERO;
            while let Some(check) = next {
                holds = matches!(check, Check::Made(_, true) | Check::Held);
                if let Check::Made(Made { outcome: Ok(_), took, .. }, _) = &check {
                    // On a busy machine a quick one is slow now and then.
                    quickest = quickest.min(*took);
                    slept = if quickest < SLOW { Duration::ZERO } else { quickest.min(TOGETHER / 2) };
                }
                self.check(check)?;
                next = inbox.try_recv().ok();
            }
            std::thread::sleep(slept);
        }
    }

    /// Checks what was made, where that is asked for, and answers it.
    fn check(&self, check: Check) -> io::Result<()> {
        let (made, more) = match check {
            Check::Made(made, more) => (made, more),
            Check::NoMore => return self.write(|_| {}, false),
            Check::Held => return Ok(()),
        };
        let Made { id, outcome, unchecked, took } = made;
        if let (Ok(signature), Some((key, content))) = (&outcome, unchecked)
            && let Some(verifier) = self.device.verifier(key)
            && !verifier.verifies(&content, signature)
        {
            let message = "the device has another key there than before".to_owned();
            tracing::warn!(reason = %message, "the token cannot go on; this process ends");
            let answer = Answer::of(id, Err(Failure { class: Class::Gone, message }), took);
            // The device may be in the middle of the next one, or of what an operator asked for: that is let end.
            self.over.store(true, Ordering::SeqCst);
            self.write(|held| wire::put(held, &answer), false)?;
            return lock(&self.writer)?.socket.shutdown(Shutdown::Read);
        }
        let last = outcome.as_ref().err().filter(|failure| failure.ends_process()).cloned();
        let answer = Answer::of(id, outcome, took);
        self.write(|held| wire::put(held, &answer), more && last.is_none())?;
        match last {
            Some(failure) => self.die(&failure),
            None => Ok(()),
        }
    }

    /// Says something at once.
    fn say(&self, id: u64, said: Said) -> io::Result<()> {
        self.write(|held| wire::put(held, &Answer::new(id, said)), false)
    }

    /// Writes what was held back and what is put behind it, unless more is to come.
    fn write(&self, put: impl FnOnce(&mut Vec<u8>), more: bool) -> io::Result<()> {
        let mut writer = lock(&self.writer)?;
        let Writer { socket, held } = &mut *writer;
        put(held);
        if !more && !held.is_empty() {
            socket.write_all(held)?;
            held.clear();
        }
        Ok(())
    }

    /// The next request, and how many more are here. None: nobody asks for anything.
    fn next(&self) -> io::Result<Option<(Request, usize)>> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        let mut inbox = lock(&self.inbox)?;
        match inbox.wait() {
            Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => return Ok(None),
            Err(error) => return Err(error),
        }
        let taken = inbox.take();
        // Where the next frame begins, nobody knows then: no other thread may read on.
        self.over.fetch_or(taken.is_err(), Ordering::SeqCst);
        taken.map(Some)
    }

    fn die(&self, failure: &Failure) -> ! {
        tracing::warn!(reason = %failure, "the token cannot go on; this process ends");
        self.over.store(true, Ordering::SeqCst);
        // A PIN that is on its way is answered first: what became of it, nobody would know.
        let _login = self.login.lock();
        // Other threads may be inside the module, where C_Finalize or an exit handler would crash or hang.
        let _ = kill_process(getpid(), Signal::KILL);
        std::process::abort()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> io::Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| io::Error::other("a thread panicked"))
}
