//! Who has to be looked at again, and who waits for room.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::watch::Key;

/// Who has to be looked at again; a set, so it cannot grow beyond the number of ModelDeployments.
#[derive(Debug, Default)]
pub(crate) struct Wakes {
    woken: Mutex<BTreeSet<Key>>,
    pub(crate) hungry: Mutex<BTreeSet<Key>>,
    pub(crate) notify: Notify,
}

impl Wakes {
    pub(crate) fn add(&self, keys: impl IntoIterator<Item = Key>) {
        let mut woken = lock(&self.woken);
        let before = woken.len();
        woken.extend(keys);
        if woken.len() > before {
            self.notify.notify_one();
        }
    }

    /// Wakes whoever waits for room.
    pub(crate) fn room_appeared(&self) {
        let hungry = lock(&self.hungry).clone();
        if !hungry.is_empty() {
            self.add(hungry);
        }
    }

    pub(crate) fn take(&self) -> BTreeSet<Key> {
        std::mem::take(&mut *lock(&self.woken))
    }
}

/// Data behind these locks is replaced whole, so a panic elsewhere leaves it usable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
