//! What operators ask for, on a device of any kind.

use super::task::{Done, Task};
use super::wire::{Class, Failure, KeySpec};
use crate::backend::{Device, Notify, refused};
use crate::public_key::PublicKey;
use crate::spki::SpkiDer;

/// Does it. Names may come to mean other keys: none is deleted but the one that was confirmed.
pub(super) fn operate(device: &dyn Device, task: &Task, notify: Notify<'_>) -> Result<Done, Failure> {
    match task {
        Task::Public(key) => public(device, key, notify).map(Done::Key),
        Task::Delete(key, confirmed) if public(device, key, notify)?.spki != *confirmed => {
            Err(refused("it holds another key than was confirmed".into()))
        }
        task => device.operate(task, notify),
    }
}

/// A key's public half. One that no longer signs, as with other PCRs, is what its device shows of it: it can be replaced all
/// the same, and deleted.
fn public(device: &dyn Device, key: &KeySpec, notify: Notify<'_>) -> Result<PublicKey, Failure> {
    let unusable = match device.operate(&Task::Find(key.clone()), notify) {
        Ok(Done::Key(found)) => return Ok(found),
        Ok(_) => return Err(refused("it did what was not asked".into())),
        Err(failure) if failure.class == Class::Refused => failure,
        Err(failure) => return Err(failure),
    };
    let Done::Listed(listed) = device.operate(&Task::List(vec![key.object.clone()]), notify)? else {
        return Err(unusable);
    };
    let mut named = listed.into_iter().filter(|listed| key.object.names(&listed.object));
    let (Some(only), None) = (named.next(), named.next()) else { return Err(unusable) };
    let spki = SpkiDer(only.public_key);
    match spki.algorithm(key.padding) {
        Ok(algorithm) => Ok(PublicKey { algorithm, spki, hashes: false }),
        Err(_) => Err(unusable),
    }
}
