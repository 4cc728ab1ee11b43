//! The place of a worker, for its supervisor to look at.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::growth::IdleTime;
use super::route::Route;
use crate::session::{Inbox, Waker};

/// Where a worker stands, for its supervisor to see.
pub(super) struct Post<'a> {
    pub(super) route: &'a Route,
    /// The queue's name, also where the broker has chosen it.
    pub(super) queue: &'a str,
    pub(super) prefetch: u16,
    /// When the delivery in hand came, in milliseconds since the run's epoch; 0 if there is none.
    pub(super) busy: AtomicU64,
    /// The longest that a handler has taken, in milliseconds.
    pub(super) slowest: AtomicU64,
    /// When the first delivery was settled, in milliseconds since the run's epoch; 0 if none has been.
    pub(super) settled: AtomicU64,
    /// How often something was settled, several deliveries at once counting as one.
    pub(super) settlements: AtomicU64,
    /// For how long it has had nothing to do, if anybody wants to know; in microseconds since the run's epoch.
    pub(super) idle: Option<IdleTime>,
    /// How many messages its worker had at hand when the last handler began, if anybody wants to know.
    pub(super) ahead: AtomicUsize,
    /// It is to take no more messages, and to end when it has handled those it has.
    pub(super) is_retiring: Arc<AtomicBool>,
    /// How to get at the worker, while there is one with a channel.
    reach: Mutex<Option<Reach>>,
}

struct Reach {
    waker: Arc<Waker>,
    inbox: Arc<Inbox>,
}

impl<'a> Post<'a> {
    pub(super) fn new(route: &'a Route, queue: &'a str, prefetch: u16, watches_idleness: bool) -> Post<'a> {
        Post {
            route,
            queue,
            prefetch,
            busy: AtomicU64::new(0),
            slowest: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            settlements: AtomicU64::new(0),
            idle: watches_idleness.then(IdleTime::default),
            ahead: AtomicUsize::new(0),
            is_retiring: Arc::default(),
            reach: Mutex::default(),
        }
    }

    /// The worker can be got at from now on.
    pub(super) fn occupy(&self, waker: &Arc<Waker>, inbox: &Arc<Inbox>) {
        *self.reach() = Some(Reach { waker: Arc::clone(waker), inbox: Arc::clone(inbox) });
    }

    fn reach(&self) -> MutexGuard<'_, Option<Reach>> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        if let Some(reach) = &*self.reach() {
            reach.waker.wake();
        }
    }

    /// Whether a message has come that its worker does not handle yet.
    pub(super) fn has_waiting(&self) -> bool {
        self.ahead.load(Ordering::Relaxed) > 0 || self.reach().as_ref().is_some_and(|reach| !reach.inbox.is_empty())
    }

    /// Has its worker end in its own time.
    pub(super) fn retire(&self) {
        self.is_retiring.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(super) fn is_retiring(&self) -> bool {
        self.is_retiring.load(Ordering::SeqCst)
    }

    /// Another worker may have it.
    pub(super) fn vacate(&self) {
        *self.reach() = None;
        self.route.deactivate();
        self.ahead.store(0, Ordering::Relaxed);
        self.is_retiring.store(false, Ordering::SeqCst);
    }
}
