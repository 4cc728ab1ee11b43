//! Tells those who wait that something in the broker has changed. What, they look up themselves.
//!
//! Costs one atomic read where nobody waits, which is always but in tests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
pub(crate) struct News {
    waiting: AtomicUsize,
    changes: Mutex<u64>,
    changed: Condvar,
}

impl News {
    /// Something has changed, and whoever looks now sees it.
    pub(crate) fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            *self.changes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.changed.notify_all();
        }
    }

    /// Looks again after each change, until `look` finds something or the deadline has passed.
    pub(crate) fn wait_until<T>(&self, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let found = self.watch(deadline, &mut look);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        found
    }

    fn watch<T>(&self, deadline: Instant, look: &mut impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let seen = *self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = look() {
                return Some(found);
            }
            let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            while *changes == seen {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                changes = self.changed.wait_timeout(changes, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}
