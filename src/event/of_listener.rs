//! What happens to a listener and its messages.

use std::fmt;
use std::time::Duration;

use super::{Event, Events};
use crate::error::Error;
use crate::metrics::meter::{Level, ListenerMeter, RouteMeter};

/// Counts, logs and tells what happens to a listener.
pub(crate) struct ListenerEvents {
    listener: String,
    pool: String,
    events: Events,
    meter: ListenerMeter,
}

/// How a listener comes by its consumers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    First,
    /// It has lost its consumers before, or could not get them.
    Again,
    AfterPause,
}

/// A message that is among the dead.
#[derive(Debug)]
pub(crate) struct Dead<'a> {
    pub(crate) queue: &'a str,
    pub(crate) dead_queue: String,
    pub(crate) message_id: Option<&'a str>,
    pub(crate) reason: String,
    /// There is no room in its headers for the reason.
    pub(crate) is_bare: bool,
}

impl ListenerEvents {
    pub(crate) fn new(listener: &str, pool: &str, events: Events) -> ListenerEvents {
        let meter = ListenerMeter::new(listener);
        ListenerEvents { listener: listener.to_owned(), pool: pool.to_owned(), events, meter }
    }

    /// What the listener adds to the gauge of those that consume, for as long as it does.
    pub(crate) fn one_consuming(&self) -> Level {
        self.meter.consuming.one()
    }

    /// What the listener adds to the gauge of those that are paused, for as long as it is.
    pub(crate) fn one_paused(&self) -> Level {
        self.meter.paused.one()
    }

    /// It has its consumers.
    pub(crate) fn consuming(&self, start: Start) {
        if let Start::Again = start {
            self.meter.recoveries.one();
        }
        let (listener, pool) = self.names();
        let (again, after_pause) = (start == Start::Again, start == Start::AfterPause);
        self.events.emit(Event::ListenerConsuming { listener, pool, again, after_pause });
    }

    /// It has none, and tries again after `wait`.
    pub(crate) fn recovering(&self, error: Error, attempt: u32, wait: Duration) {
        let (listener, pool) = self.names();
        self.events.emit(Event::ListenerRecovering { listener, pool, error, attempt, wait });
    }

    /// It takes no messages for `wait`, or until somebody says so.
    pub(crate) fn paused(&self, wait: Option<Duration>, why: &dyn fmt::Display) {
        self.meter.pauses.one();
        let (listener, pool) = self.names();
        self.events.emit(Event::ListenerPaused { listener, pool, wait, why: why.to_string() });
    }

    /// It has ended; with the reason, if nobody has stopped it.
    pub(crate) fn stopped(&self, error: Option<Error>) {
        let (listener, pool) = self.names();
        self.events.emit(Event::ListenerStopped { listener, pool, error });
    }

    /// It has put a message into the queue of the dead.
    pub(crate) fn dead(&self, meter: &RouteMeter, dead: Dead<'_>) {
        meter.dead.one();
        let Dead { queue, dead_queue, message_id, reason, is_bare } = dead;
        self.events.emit(Event::MessageDead {
            listener: self.listener.clone(),
            queue: queue.to_owned(),
            dead_queue,
            message_id: message_id.map(str::to_owned),
            reason,
            is_bare,
        });
    }

    fn names(&self) -> (String, String) {
        (self.listener.clone(), self.pool.clone())
    }
}
