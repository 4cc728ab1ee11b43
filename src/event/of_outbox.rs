//! What happens to an outbox and its messages.

use std::time::Duration;

use super::{Event, Events};
use crate::error::Error;
use crate::metrics::meter::OutboxMeter;

/// Counts, logs and tells what happens to an outbox.
pub(crate) struct OutboxEvents {
    outbox: String,
    events: Events,
    meter: OutboxMeter,
}

impl OutboxEvents {
    pub(crate) fn new(outbox: &str, events: Events) -> OutboxEvents {
        OutboxEvents { outbox: outbox.to_owned(), events, meter: OutboxMeter::new(outbox) }
    }

    /// So many messages wait, the oldest for so long.
    pub(crate) fn counted(&self, pending: u64, oldest: Option<Duration>) {
        self.meter.counted(pending, oldest);
    }

    /// The broker has confirmed a message.
    pub(crate) fn forwarded(&self) {
        self.meter.forwarded.one();
    }

    /// The broker has refused a message, and it is put aside.
    pub(crate) fn refused(&self, message_id: &str, reason: &str) {
        self.meter.refused.one();
        let (message_id, reason) = (message_id.to_owned(), reason.to_owned());
        self.events.emit(Event::OutboxRefused { outbox: self.outbox.clone(), message_id, reason });
    }

    /// Nothing can be forwarded; the next attempt is after `wait`.
    pub(crate) fn stalled(&self, error: Error, wait: Duration) {
        self.events.emit(Event::OutboxStalled { outbox: self.outbox.clone(), error, wait });
    }

    /// Forwarding goes on.
    pub(crate) fn resumed(&self) {
        self.events.emit(Event::OutboxResumed { outbox: self.outbox.clone() });
    }
}
