//! Group commit: threads that publish through a pool and find no connection free publish together.
//!
//! One of them is the *leader*: it waits for a connection. When it has one it takes the requests of all who wait (the
//! *followers*), publishes them in a pipeline, so that the wait for the broker's confirms is shared, and tells each its outcome.
//! The next request that waits is then the leader's.
//!
//! Only the leader takes requests, so its own is there until it does. Pure bookkeeping, no I/O and no threads. Lock order: the
//! lock is a leaf; under it a thread is woken at most.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::connection::confirms::Route;
use crate::connection::publisher::Attempt;
use crate::message::Message;
use crate::metrics::meter::Level;
use crate::session::Outgoing;

/// How many requests are taken at once: one that is slow to be confirmed keeps no more than that waiting.
const GROUP_MAX: usize = 64;

/// A message and where it goes.
#[derive(Clone)]
pub(super) struct Request {
    pub(super) route: Route,
    pub(super) message: Arc<Message>,
    pub(super) mandatory: bool,
    pub(super) deadline: Instant,
}

impl Request {
    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        let Request { route: Route { exchange, routing_key }, message, mandatory, .. } = self;
        Outgoing { exchange, routing_key, message, mandatory: *mandatory }
    }
}

/// What a thread that waits is told.
pub(super) enum Notice {
    /// It leads now.
    Lead,
    /// What became of its message; in a group if it was not published alone.
    Done { attempt: Attempt, in_group: bool },
}

/// A request that waits.
pub(super) struct Entry {
    number: u64,
    pub(super) request: Request,
    notices: Sender<Notice>,
    /// Behind the leader, which is counted where it waits for a connection.
    _waits: Option<Level>,
}

impl Entry {
    pub(super) fn tell(&self, attempt: Attempt, in_group: bool) {
        // A thread that has stopped waiting need not be told.
        let _ = self.notices.try_send(Notice::Done { attempt, in_group });
    }
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct GroupCommit(Mutex<State>);

#[derive(Default)]
struct State {
    entries: VecDeque<Entry>,
    /// The number of the leader's entry.
    leader: Option<u64>,
    next: u64,
}

impl State {
    fn pass_on_the_lead(&mut self) {
        self.leader = self.entries.front_mut().map(|entry| {
            entry._waits = None;
            // There is room for both notices that there are.
            let _ = entry.notices.try_send(Notice::Lead);
            entry.number
        });
    }
}

impl GroupCommit {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.state().entries.is_empty()
    }

    /// How many wait behind the leader.
    pub(super) fn followers(&self) -> usize {
        self.state().entries.len().saturating_sub(1)
    }

    /// Adds a request; `waits` lives for as long as it waits behind the leader. Returns its number, and where its notices come
    /// in: that it leads, if it does, is there already.
    pub(super) fn join(&self, request: Request, waits: Level) -> (u64, Receiver<Notice>) {
        let (notices, noticed) = bounded(2);
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.entries.push_back(Entry { number, request, notices, _waits: Some(waits) });
        if state.leader.is_none() {
            state.pass_on_the_lead();
        }
        (number, noticed)
    }

    /// Gives a request up, and with it the lead; false if the leader has taken it.
    pub(super) fn leave(&self, number: u64) -> bool {
        let mut state = self.state();
        let before = state.entries.len();
        state.entries.retain(|entry| entry.number != number);
        if state.leader == Some(number) {
            state.pass_on_the_lead();
        }
        state.entries.len() < before
    }

    /// Takes the requests that have waited longest, for the leader, which leads no longer. Those whose deadline is before
    /// `soon` stay.
    pub(super) fn take(&self, soon: Instant) -> Vec<Entry> {
        let mut state = self.state();
        let mut taken = Vec::new();
        for entry in std::mem::take(&mut state.entries) {
            if taken.len() < GROUP_MAX && entry.request.deadline >= soon {
                taken.push(Entry { _waits: None, ..entry });
            } else {
                state.entries.push_back(entry);
            }
        }
        state.pass_on_the_lead();
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::meter::PoolMeter;

    fn request() -> Request {
        let message = Arc::new(Message::new("x"));
        let deadline = Instant::now() + Duration::from_secs(60);
        Request { route: Route::new("", "k"), message, mandatory: true, deadline }
    }

    fn join(group: &GroupCommit, request: Request) -> (u64, Receiver<Notice>) {
        group.join(request, PoolMeter::new("test", 1).waiting.one())
    }

    fn is_leader(notices: &Receiver<Notice>) -> bool {
        matches!(notices.try_recv(), Ok(Notice::Lead))
    }

    #[test]
    fn the_first_takes_all_and_who_comes_after_that_is_leader() {
        let group = GroupCommit::default();
        let (_, first) = join(&group, request());
        let (_, second) = join(&group, request());
        assert!(is_leader(&first) && !is_leader(&second) && !group.is_empty());
        let taken = group.take(Instant::now());
        assert!(taken.len() == 2 && group.is_empty());
        let (number, third) = join(&group, request());
        assert!(is_leader(&third));
        assert!(group.leave(number) && group.is_empty());
        taken[1].tell(Attempt { outcome: Ok(()), written: true }, true);
        assert!(matches!(second.try_recv(), Ok(Notice::Done { in_group: true, .. })));
        drop(taken);
        // Nobody is left who could tell the other: it learns so.
        assert!(first.recv().is_err());
    }

    #[test]
    fn leaving_passes_the_lead_on_and_what_was_taken_cannot_leave() {
        let group = GroupCommit::default();
        let entries: Vec<_> = (0..3).map(|_| join(&group, request())).collect();
        assert!(is_leader(&entries[0].1));
        assert!(group.leave(entries[1].0) && !is_leader(&entries[2].1), "a follower leaves");
        assert!(group.leave(entries[0].0) && is_leader(&entries[2].1));
        let taken = group.take(Instant::now());
        assert!(taken.len() == 1 && !group.leave(entries[2].0));
    }

    #[test]
    fn many_requests_are_taken_in_parts_in_the_order_of_coming() {
        let group = GroupCommit::default();
        let entries: Vec<_> = (0..=GROUP_MAX).map(|_| join(&group, request())).collect();
        assert!(is_leader(&entries[0].1));
        let taken: Vec<u64> = group.take(Instant::now()).iter().map(|entry| entry.number).collect();
        assert_eq!(taken, (0..GROUP_MAX as u64).collect::<Vec<_>>());
        assert!(is_leader(&entries[GROUP_MAX].1), "the one that is left leads");
        assert_eq!(group.take(Instant::now()).len(), 1);
    }

    #[test]
    fn a_request_whose_time_is_over_is_left_and_keeps_no_other() {
        let group = GroupCommit::default();
        let entries = [
            join(&group, request()),
            join(&group, Request { deadline: Instant::now(), ..request() }),
            join(&group, request()),
        ];
        let taken: Vec<u64> =
            group.take(Instant::now() + Duration::from_secs(1)).iter().map(|entry| entry.number).collect();
        assert_eq!(taken, [entries[0].0, entries[2].0]);
        assert!(is_leader(&entries[1].1) && group.followers() == 0);
        assert!(group.leave(entries[1].0) && group.is_empty());
    }
}
