//! The process that owns one token (`omsign-agent token-host`, started by the agent). It opens the backend,
//! logs in once, keeps handles, and signs in N threads. Whatever it cannot heal within a session it leaves to
//! its replacement: it answers "gone" and exits, and the agent starts another.

pub(crate) mod task;
pub(crate) mod wire;

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};

use self::task::Task;
use self::wire::{Answer, Asked, Class, Failure, Opening, Purpose, Request};
use crate::algorithm::Content;
use crate::backend::{self, Device, Signer};
use crate::secret::{Pin, harden_process};

/// Answers are given together while more requests for the same key wait here than answers are held back, until the next
/// would come later than this: each time the agent is woken, which costs as much as a quick signature.
const TOGETHER: Duration = Duration::from_millis(2);

/// How many answers may be held back for that.
const TOGETHER_COUNT: usize = 8;

/// How many times as many may wait to be checked.
const UNCHECKED: usize = 2;

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
            socket: Mutex::new(socket),
        };
        // Others could take what one thread counts on.
        let holds = signers.len() == 1;
        std::thread::scope(|scope| {
            let checks = holds.then(|| {
                let (checks, together) = mpsc::sync_channel(UNCHECKED);
                // It ends with the thread that signs, or when the agent closes its end.
                scope.spawn(|| drop(together.into_iter().try_for_each(|made| shared.answer(made))));
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
    socket: Mutex<UnixStream>,
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
}

/// What comes next.
enum Next {
    /// A request, and how many more are here.
    Request(Request, usize),
    Idle,
}

/// What was made by the one thread that signs, and is not answered yet.
#[derive(Default)]
struct Held {
    made: Vec<Made>,
    since: Option<Instant>,
}

impl Held {
    /// Whether more may come before they are answered, with so many requests here: the next takes as long as the last.
    fn may_wait(&self, waiting: usize) -> bool {
        let last = self.made.last().map_or(Duration::ZERO, |made| made.took);
        let soon = self.since.is_some_and(|since| since.elapsed() + last < TOGETHER);
        soon && self.made.len() < waiting.min(TOGETHER_COUNT)
    }

    /// Whether another request is for the same again, and so takes as long.
    fn is_like(&self, asked: &Asked) -> bool {
        let last = self.made.last().and_then(|made| made.unchecked.as_ref()).map(|(key, _)| *key);
        matches!(asked, Asked::Sign(key, _) if Some(*key) == last)
    }

    fn push(&mut self, made: Made) {
        self.since.get_or_insert_with(Instant::now);
        self.made.push(made);
    }

    fn take(&mut self) -> Vec<Made> {
        self.since = None;
        std::mem::take(&mut self.made)
    }
}

impl Shared<'_> {
    /// One thread: takes a request, signs it, answers it. A thread that is free takes the next request itself,
    /// so no request ever waits behind a busy one. The only one has `checks`: another one then checks and answers what
    /// it signed, several at once, while more requests are here.
    fn work(&self, mut signer: Box<dyn Signer + '_>, checks: Option<SyncSender<Vec<Made>>>) {
        let mut held = Held::default();
        let hand_over = |together: Vec<Made>| match &checks {
            _ if together.is_empty() => Ok(()),
            Some(checks) => checks.send(together).map_err(io::Error::other),
            None => self.answer(together),
        };
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
            let (started, id) = (Instant::now(), request.id);
            // The agent is of the same build: anything else is no request of its.
            let Ok(asked) = request.asked() else { return };
            if !held.is_like(&asked) && hand_over(held.take()).is_err() {
                return;
            }
            let touch = |message: &str| {
                // When the agent is gone, the next read says so.
                let _ = self.say(&Answer::touch(id, message.to_owned()));
            };
            let (outcome, unchecked) = match asked {
                Asked::Sign(key, content) => (signer.sign(key, &content, &touch), Some((key, content))),
                Asked::Do(task) => {
                    // YubiKeys and TPMs need minutes for some RSA keys; nothing else takes long.
                    if matches!(task, Task::Generate(..)) {
                        let _ = self.say(&Answer::begun(id));
                    }
                    (self.device.operate(&task, &touch).map(wire::done), None)
                }
            };
            // A PIN that was refused now is offered to nobody who waits: this process ends before they can ask.
            let ends = outcome.as_ref().is_err_and(Failure::ends_process);
            held.push(Made { id, outcome, unchecked, took: started.elapsed() });
            if !ends && checks.is_some() && held.may_wait(waiting) {
                continue;
            }
            let together = held.take();
            // Alone, it need not wake another thread.
            let went_on = if waiting == 0 && !ends { self.answer(together) } else { hand_over(together) };
            if went_on.is_err() || ends {
                return;
            }
        }
    }

    /// Checks what was made, where that is asked for, and answers.
    fn answer(&self, together: Vec<Made>) -> io::Result<()> {
        let (mut frames, mut last) = (Vec::new(), None);
        for Made { id, mut outcome, unchecked, took } in together {
            if let (Ok(signature), Some((key, content))) = (&outcome, unchecked)
                && let Some(verifier) = self.device.verifier(key)
                && !verifier.verifies(&content, signature)
            {
                let message = "the device has another key there than before".to_owned();
                outcome = Err(Failure { class: Class::Gone, message });
            }
            last = last.or(outcome.as_ref().err().filter(|failure| failure.ends_process()).cloned());
            wire::put(&mut frames, &Answer::new(id, outcome).after(took));
        }
        lock(&self.socket)?.write_all(&frames)?;
        match last {
            Some(failure) => self.die(&failure),
            None => Ok(()),
        }
    }

    /// Says something at once.
    fn say(&self, answer: &Answer) -> io::Result<()> {
        let mut frame = Vec::new();
        wire::put(&mut frame, answer);
        lock(&self.socket)?.write_all(&frame)
    }

    fn next(&self) -> io::Result<Next> {
        let mut inbox = lock(&self.inbox)?;
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

    fn die(&self, failure: &Failure) -> ! {
        tracing::warn!(reason = %failure, "the token cannot go on; this process ends");
        // Other threads may be inside the module, where C_Finalize or an exit handler would crash or hang.
        let _ = kill_process(getpid(), Signal::KILL);
        std::process::abort()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> io::Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| io::Error::other("a thread panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_wait_only_for_what_is_here_and_as_quick() {
        let content = || Content::Digest(vec![7; 32]);
        let made = |id, took| Made { id, outcome: Ok(vec![1]), unchecked: Some((3, content())), took };
        let mut held = Held::default();
        assert!(!held.is_like(&Asked::Sign(3, content())) && !held.may_wait(8));
        held.push(made(0, Duration::from_micros(100)));
        assert!(held.may_wait(2), "two more are here");
        assert!(!held.may_wait(1), "the last one answers for both");
        assert!(!held.may_wait(0));
        assert!(held.is_like(&Asked::Sign(3, content())));
        assert!(!held.is_like(&Asked::Sign(4, content())), "another key may be slow");
        held.push(made(1, TOGETHER));
        assert!(!held.may_wait(8), "the next would come too late");
        assert_eq!(held.take().len(), 2);
        assert!(held.made.is_empty() && held.since.is_none());
    }
}
