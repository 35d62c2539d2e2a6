//! The same request twice gets one signature: answers are remembered by caller and request id.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;
use tonic::Status;

use crate::identity::{Caller, Identity};
use crate::token::Signed;

/// How many answers are remembered.
const REMEMBERED: usize = 4096;

/// What became of a request.
pub(crate) type Outcome = Result<Signed, Status>;

/// How far a request is.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Waiting for its token, or with it.
    Working,
    /// The device waits for a person, who is told this.
    Touch(String),
    /// Over.
    Done(Outcome),
}

/// Tells how far a request is.
pub(crate) type Tell = watch::Sender<Step>;

/// Follows a request until it is over.
pub(crate) type Follow = watch::Receiver<Step>;

/// What a request turned out to be.
pub(crate) enum Begin {
    /// New: do the work and tell the outcome.
    New(Tell, Follow),
    /// A repetition: follow the first one.
    Again(Follow),
    /// The id was used for something else.
    Conflict,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Id {
    /// Ids of different callers never meet.
    caller: Caller,
    request: [u8; 16],
}

struct Seen {
    key: Arc<str>,
    digest: String,
    follow: Follow,
}

#[derive(Default)]
pub(crate) struct Replay {
    seen: Mutex<(HashMap<Id, Seen>, VecDeque<Id>)>,
}

impl Replay {
    /// Looks a request up, and remembers it when it is new.
    pub(crate) fn begin(
        &self,
        identity: &Identity,
        request: [u8; 16],
        key: &Arc<str>,
        digest: &str,
    ) -> Begin {
        let id = Id { caller: identity.caller(), request };
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (seen, order) = &mut *seen;
        if let Some(known) = seen.get(&id) {
            if known.key != *key || known.digest != digest {
                return Begin::Conflict;
            }
            // A failure is no answer: the next try with this id does the work anew.
            if !matches!(&*known.follow.borrow(), Step::Done(Err(_))) {
                return Begin::Again(known.follow.clone());
            }
        } else {
            order.push_back(id.clone());
        }
        let (tell, follow) = watch::channel(Step::Working);
        seen.insert(id, Seen { key: Arc::clone(key), digest: digest.to_owned(), follow: follow.clone() });
        while order.len() > REMEMBERED {
            let Some(oldest) = order.pop_front() else { break };
            let over = |seen: &Seen| matches!(&*seen.follow.borrow(), Step::Done(_));
            let in_flight = |seen: &Seen| !over(seen) && seen.follow.has_changed().is_ok();
            if seen.get(&oldest).is_some_and(in_flight) {
                // Still in flight: its repetition must find it. There are never more of these than queues hold.
                order.push_back(oldest);
                break;
            }
            seen.remove(&oldest);
        }
        Begin::New(tell, follow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(uid: u32) -> Identity {
        Identity::Unix { uid, user: None, pid: None, groups: vec![] }
    }

    #[test]
    fn one_id_one_answer() {
        let replay = Replay::default();
        let key: Arc<str> = "k".into();
        let Begin::New(tell, _) = replay.begin(&caller(1), [1; 16], &key, "d") else { panic!("new") };
        let signed = Signed { signature: vec![1], public_key: vec![2] };
        tell.send_replace(Step::Done(Ok(signed.clone())));
        let Begin::Again(follow) = replay.begin(&caller(1), [1; 16], &key, "d") else { panic!("again") };
        assert!(matches!(&*follow.borrow(), Step::Done(Ok(answer)) if *answer == signed));
        assert!(matches!(replay.begin(&caller(1), [1; 16], &key, "other"), Begin::Conflict));
        assert!(matches!(replay.begin(&caller(1), [1; 16], &"other".into(), "d"), Begin::Conflict));
        assert!(matches!(replay.begin(&caller(2), [1; 16], &key, "d"), Begin::New(..)));
    }

    #[test]
    fn a_failure_is_tried_anew_and_old_answers_are_forgotten() {
        let replay = Replay::default();
        let key: Arc<str> = "k".into();
        let Begin::New(tell, _) = replay.begin(&caller(1), [0; 16], &key, "d") else { panic!("new") };
        tell.send_replace(Step::Done(Err(Status::unavailable("gone"))));
        assert!(matches!(replay.begin(&caller(1), [0; 16], &key, "d"), Begin::New(..)));
        for n in 0..REMEMBERED {
            let mut id = [1; 16];
            id[..8].copy_from_slice(&n.to_be_bytes());
            let Begin::New(tell, _) = replay.begin(&caller(1), id, &key, "d") else { panic!("new") };
            tell.send_replace(Step::Done(Ok(Signed { signature: vec![1], public_key: vec![2] })));
        }
        assert_eq!(replay.seen.lock().expect("not poisoned").0.len(), REMEMBERED);
        assert!(matches!(replay.begin(&caller(1), [0; 16], &key, "d"), Begin::New(..)));
    }
}
