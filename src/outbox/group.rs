//! Group commit: threads that store at the same time share a transaction, and so one sync of the disk.
//!
//! The first thread that comes is the leader. It stores what all have asked for by then, tells each thread its own outcome, and
//! passes the lead on to the thread that has waited longest. A thread that waits holds no lock.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Sender, bounded};

use super::store::{Entry, Limits, Store};
use crate::error::StoreError;

/// The most messages of one transaction.
const MOST: usize = 256;

/// What a thread is told that waits.
enum Told {
    /// What has become of its message.
    Outcome(Result<(), StoreError>),
    /// It is the leader now.
    Lead,
}

/// A message that a thread wants stored.
struct Request {
    entry: Entry,
    /// Has room for all that it may be told.
    tell: Sender<Told>,
}

#[derive(Default)]
struct State {
    /// In the order in which they came.
    waiting: VecDeque<Request>,
    has_leader: bool,
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Group {
    /// A leaf among locks.
    state: Mutex<State>,
}

impl Group {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a message, with those of other threads that wait by then.
    pub(super) fn append(&self, store: &dyn Store, limits: &Limits, entry: Entry) -> Result<(), StoreError> {
        let (tell, told) = bounded(2);
        let leads = {
            let mut state = self.state();
            state.waiting.push_back(Request { entry, tell });
            !std::mem::replace(&mut state.has_leader, true)
        };
        let panicked = || Err(StoreError::Other("the thread that stored for several has panicked".to_owned()));
        if !leads && let Ok(Told::Outcome(outcome)) = told.recv() {
            return outcome;
        }
        // Its own request is among the oldest, unless a panic has taken it away.
        Lead(self).store(store, limits);
        match told.try_recv() {
            Ok(Told::Outcome(outcome)) => outcome,
            _ => panicked(),
        }
    }
}

/// The lead, which is passed on when it is dropped, by a panic too.
struct Lead<'a>(&'a Group);

impl Lead<'_> {
    fn store(self, store: &dyn Store, limits: &Limits) {
        let requests: Vec<Request> = {
            let mut state = self.0.state();
            let most = state.waiting.len().min(MOST);
            state.waiting.drain(..most).collect()
        };
        store_all(store, limits, requests);
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        match state.waiting.front() {
            // It waits, and there is room.
            Some(next) => drop(next.tell.try_send(Told::Lead)),
            None => state.has_leader = false,
        }
    }
}

/// Stores what several threads want stored. What cannot be stored together is stored one by one, so that each has its own outcome.
fn store_all(store: &dyn Store, limits: &Limits, requests: Vec<Request>) {
    let (entries, tell): (Vec<Entry>, Vec<_>) =
        requests.into_iter().map(|request| (request.entry, request.tell)).unzip();
    let together = store.append(&entries, limits);
    let is_of_each = matches!(together, Err(StoreError::Full { .. } | StoreError::Other(_))) && entries.len() > 1;
    for (entry, tell) in entries.iter().zip(tell) {
        let outcome = if is_of_each { store.append(std::slice::from_ref(entry), limits) } else { together.clone() };
        // It waits, and there is room.
        let _ = tell.try_send(Told::Outcome(outcome));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::message::Message;
    use crate::outbox::store::{EntryState, Forwarding, Listed, Status};

    /// Counts what is stored; cannot store `bad`, and panics at `panic`.
    #[derive(Debug, Default)]
    struct Counting {
        transactions: AtomicUsize,
        stored: AtomicUsize,
    }

    impl Store for Counting {
        fn append(&self, entries: &[Entry], _: &Limits) -> Result<(), StoreError> {
            self.transactions.fetch_add(1, Ordering::SeqCst);
            let has = |body: &[u8]| entries.iter().any(|entry| entry.message.body() == body);
            assert!(!has(b"panic"), "as the test wants it");
            if has(b"bad") {
                return Err(StoreError::Other("it is bad".to_owned()));
            }
            thread::park_timeout(Duration::from_millis(2));
            self.stored.fetch_add(entries.len(), Ordering::SeqCst);
            Ok(())
        }

        fn forwarding(&self) -> Result<Option<Box<dyn Forwarding>>, StoreError> {
            Ok(None)
        }

        fn status(&self) -> Result<Status, StoreError> {
            Ok(Status::default())
        }

        fn list(&self, _: EntryState, _: usize) -> Result<Vec<Listed>, StoreError> {
            Ok(Vec::new())
        }

        fn retry(&self, _: Option<&[i64]>) -> Result<u64, StoreError> {
            Ok(0)
        }

        fn discard(&self, _: Option<&[i64]>) -> Result<u64, StoreError> {
            Ok(0)
        }
    }

    fn entry(body: &str) -> Entry {
        let (exchange, routing_key, ordering_key) = Default::default();
        Entry { exchange, routing_key, ordering_key, message: Message::new(body) }
    }

    #[test]
    fn threads_share_transactions_and_each_has_its_own_outcome() {
        let (group, store, limits) = (Group::default(), Counting::default(), Limits::default());
        thread::scope(|scope| {
            for number in 0..16 {
                let (group, store, limits) = (&group, &store, &limits);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let body = if number == 3 { "bad" } else { "good" };
                        assert_eq!(group.append(store, limits, entry(body)).is_err(), number == 3);
                    }
                });
            }
        });
        assert_eq!(store.stored.load(Ordering::SeqCst), 15 * 20);
        assert!(!group.state().has_leader && group.state().waiting.is_empty());
    }

    #[test]
    fn a_panic_of_the_leader_is_nobody_elses_end() {
        let (group, store, limits) = (Group::default(), Counting::default(), Limits::default());
        let outcomes: Vec<bool> = thread::scope(|scope| {
            let threads: Vec<_> = (0..12)
                .map(|number| {
                    let (group, store, limits) = (&group, &store, &limits);
                    let body = if number % 4 == 0 { "panic" } else { "good" };
                    scope.spawn(move || group.append(store, limits, entry(body)).is_ok())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(false)).collect()
        });
        assert!(outcomes.iter().step_by(4).all(|is_stored| !is_stored), "{outcomes:?}");
        assert_eq!(group.append(&store, &limits, entry("good")), Ok(()));
        assert!(!group.state().has_leader && group.state().waiting.is_empty());
    }
}
