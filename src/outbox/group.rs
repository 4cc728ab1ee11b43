//! Group commit: threads that store at the same time share a transaction, and so one sync of the disk.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::store::{Entry, Limits, Store};
use crate::error::StoreError;

/// The most messages of one transaction.
const MOST: usize = 256;

/// A message that a thread wants stored.
#[derive(Debug)]
struct Request {
    entry: Entry,
    outcome: Arc<OnceLock<Result<(), StoreError>>>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Group {
    /// In the order in which they came. A leaf among locks.
    waiting: Mutex<Vec<Request>>,
    /// Held by the thread that stores, the leader; before the lock of the store.
    leader: Mutex<()>,
}

impl Group {
    fn waiting(&self) -> MutexGuard<'_, Vec<Request>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a message, with those of other threads that wait by then.
    pub(super) fn append(&self, store: &dyn Store, limits: &Limits, entry: Entry) -> Result<(), StoreError> {
        let outcome = Arc::new(OnceLock::new());
        self.waiting().push(Request { entry, outcome: Arc::clone(&outcome) });
        loop {
            let _leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
            // Another leader may have taken it along.
            if let Some(outcome) = outcome.get() {
                return outcome.clone();
            }
            let requests: Vec<Request> = {
                let mut waiting = self.waiting();
                let most = waiting.len().min(MOST);
                waiting.drain(..most).collect()
            };
            store_all(store, limits, requests);
        }
    }
}

/// Stores what several threads want stored. What cannot be stored together is stored one by one, so that each has its own outcome.
fn store_all(store: &dyn Store, limits: &Limits, requests: Vec<Request>) {
    let (entries, outcomes): (Vec<Entry>, Vec<_>) =
        requests.into_iter().map(|request| (request.entry, request.outcome)).unzip();
    let together = store.append(&entries, limits);
    let is_of_each = matches!(together, Err(StoreError::Full { .. } | StoreError::Other(_))) && entries.len() > 1;
    for (entry, outcome) in entries.iter().zip(&outcomes) {
        let result = if is_of_each { store.append(std::slice::from_ref(entry), limits) } else { together.clone() };
        // Nobody else sets it.
        let _ = outcome.set(result);
    }
}
