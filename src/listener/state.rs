//! What a listener is doing, and what it has done so far.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::pause::{Pause, PauseReason};
use crate::error::Error;
use crate::metrics::meter::Level;

/// What a listener is doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ListenerState {
    /// It has not been accepted by the broker yet.
    Starting,
    /// Every one of its threads has a consumer on the queue.
    Consuming,
    /// It has lost its consumers and is trying to get new ones.
    Recovering {
        /// What happened last.
        error: Error,
        /// How often it has tried since it last consumed.
        attempt: u32,
    },
    /// It rests: nothing is consumed, and what comes waits in the queue.
    Paused {
        /// Since when.
        since: Instant,
        /// When it tries one message. It stays paused until that one has come and has been handled. `None` if it waits for
        /// [`Listener::resume`](super::Listener::resume).
        until: Option<Instant>,
        /// Why.
        why: PauseReason,
    },
    /// It has ended.
    Stopped,
}

impl From<&Pause> for ListenerState {
    fn from(pause: &Pause) -> ListenerState {
        let Pause { since, until, why } = pause.clone();
        ListenerState::Paused { since, until, why }
    }
}

/// How a listener stands.
pub(super) struct Standing {
    pub(super) state: ListenerState,
    /// When it entered that state.
    pub(super) since: Instant,
    /// Why it has last lost its consumers, or could not get them.
    pub(super) last_error: Option<Error>,
    pub(super) _level: Option<Level>,
}

impl Standing {
    pub(super) fn new() -> Standing {
        Standing { state: ListenerState::Starting, since: Instant::now(), last_error: None, _level: None }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) delivered: AtomicU64,
    pub(super) acked: AtomicU64,
    pub(super) rejected: AtomicU64,
    pub(super) requeued: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) dead: AtomicU64,
    pub(super) panicked: AtomicU64,
    pub(super) recoveries: AtomicU64,
    pub(super) pauses: AtomicU64,
    /// Those that have a consumer.
    pub(super) workers: AtomicUsize,
    pub(super) last_delivery: Mutex<Option<Instant>>,
}

impl Counters {
    pub(super) fn stats(&self) -> ListenerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let last = *self.last_delivery.lock().unwrap_or_else(PoisonError::into_inner);
        ListenerStats {
            delivered: read(&self.delivered),
            acked: read(&self.acked),
            rejected: read(&self.rejected),
            requeued: read(&self.requeued),
            retried: read(&self.retried),
            dead: read(&self.dead),
            panicked: read(&self.panicked),
            recoveries: read(&self.recoveries),
            pauses: read(&self.pauses),
            workers: self.workers.load(Ordering::Relaxed),
            last_delivery_age: last.map(|last| last.elapsed()),
        }
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What a listener has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerStats {
    /// Deliveries handed to the handler.
    pub delivered: u64,
    /// Deliveries dealt with, whose ack has been sent.
    pub acked: u64,
    /// Deliveries given up by the broker's means.
    pub rejected: u64,
    /// Deliveries put back into their queue.
    pub requeued: u64,
    /// Deliveries put away to be tried again later, or tried again in place in a partition.
    pub retried: u64,
    /// Deliveries put into the queue `NAME.dead`.
    pub dead: u64,
    /// Deliveries whose handler panicked; they count under what became of them too.
    pub panicked: u64,
    /// How often the listener came back after it had lost its consumers.
    pub recoveries: u64,
    /// How often it has paused, by hand or because most messages failed.
    pub pauses: u64,
    /// How many threads have a consumer at present.
    pub workers: usize,
    /// How long ago the last delivery came.
    pub last_delivery_age: Option<Duration>,
}
