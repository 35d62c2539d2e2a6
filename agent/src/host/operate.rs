//! What operators ask for, on a device of any kind.

use super::task::{Done, Need, Task};
use super::wire::Failure;
use crate::backend::{Device, Notify, refused};

/// Does it. Names may come to mean other keys: none is deleted but the one that was confirmed.
pub(super) fn operate(device: &dyn Device, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
    if let Task::Delete(key, confirmed) = task {
        match device.operate(&Task::Find(key.clone(), Need::Shown), notify)? {
            Done::Key(found) if found.spki == *confirmed => {}
            _ => return Err(refused("it holds another key than was confirmed".into())),
        }
    }
    device.operate(task, notify)
}
