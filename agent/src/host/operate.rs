//! What operators ask for, on a device of any kind.

use super::task::{Done, Need, Task};
use super::wire::{Class, Failure};
use crate::backend::{Device, Notify, refused};

/// Does it. Names may come to mean other keys: none is deleted but the one that was confirmed.
pub(super) fn operate(device: &dyn Device, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
    if let Task::Delete(key, confirmed) = task {
        match device.operate(&Task::Find(key.clone(), Need::Shown), notify)? {
            Done::Key(found) if found.spki == *confirmed => {}
            _ => return Err(refused("it holds another key than was confirmed".into())),
        }
    }
    let done = device.operate(task, notify);
    match task {
        // One key that does not answer is that one's own affair, as when the device is opened.
        Task::Find(_, Need::Looked) => done.map_err(|failure| match failure.class {
            Class::Gone => refused(failure.message),
            _ => failure,
        }),
        _ => done,
    }
}
