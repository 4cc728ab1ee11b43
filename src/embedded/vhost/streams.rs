//! Streams: what is added to one, and who reads it.
//!
//! All reading is done with the rest, in slices: a stream may be long, and its consumer may want few of its messages.

use std::sync::Arc;
use std::time::SystemTime;

use super::super::consumer_arguments::ConsumerArguments;
use super::super::exchange::QueueId;
use super::super::ledger::{ConsumerId, Unacked};
use super::super::message::Message;
use super::super::queue::Entry;
use super::super::refusal::Refusal;
use super::super::stream::{Reading, millis};
use super::channel::ChannelKey;
use super::rest::Rest;
use super::state::{Discarded, State};
use crate::amqp::ShortString;

impl State {
    pub(super) fn is_stream(&self, id: QueueId) -> bool {
        self.queues.get(&id).is_some_and(|queue| queue.log.is_some())
    }

    /// The first stream that one of these deliveries is from.
    pub(super) fn stream_of(&self, taken: &[Unacked]) -> Option<ShortString> {
        let mut queues = taken.iter().filter_map(|unacked| self.queues.get(&unacked.queue));
        queues.find(|queue| queue.log.is_some()).map(|queue| queue.name.clone())
    }

    /// Where a consumer begins in a stream, or why it may not. `None` if the queue is no stream.
    pub(super) fn begin_reading(
        &self,
        key: ChannelKey,
        id: QueueId,
        no_ack: bool,
        named: &str,
        arguments: ConsumerArguments,
    ) -> Result<Option<Box<Reading>>, Refusal> {
        let Some(log) = self.queues.get(&id).and_then(|queue| queue.log.as_ref()) else { return Ok(None) };
        if self.channel(key)?.prefetch == 0 {
            return Err(self.limits.release.no_stream_prefetch(named));
        }
        if no_ack {
            return Err(self.limits.release.no_stream_without_acks(named));
        }
        Ok(Some(Box::new(Reading { next: log.offset_of(arguments.start), filter: arguments.filter })))
    }

    /// Adds a message to a stream.
    pub(super) fn append(&mut self, id: QueueId, message: Arc<Message>) {
        let Some(log) = self.queues.get_mut(&id).and_then(|queue| queue.log.as_mut()) else { return };
        let dropped = log.append(message, millis(SystemTime::now()));
        if !dropped.is_empty() {
            self.discarded.push(Box::new(dropped) as Discarded);
        }
        self.read(id);
    }

    /// Has the consumers of a stream given what there is to read, in a moment.
    pub(super) fn read(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let Some(log) = queue.log.as_mut().filter(|_| !queue.consumers.is_empty()) else { return };
        if !std::mem::replace(&mut log.is_due, true) {
            self.rest.push_back(Rest::Read(id));
        }
    }

    /// Takes one step of that: gives one consumer one message, or finds out that it does not want it. False if nobody has
    /// anything to read and room for it.
    pub(super) fn read_one(&mut self, id: QueueId) -> bool {
        let Some(log) = self.queues.get_mut(&id).and_then(|queue| queue.log.as_mut()) else { return false };
        let woken = log.wake();
        if let Some(consumer) = woken {
            self.back_in_line(consumer);
        }
        if let Some(consumer) = self.next_consumer(id) {
            self.hand_over_next(id, consumer);
            return true;
        }
        if woken.is_none()
            && let Some(log) = self.queues.get_mut(&id).and_then(|queue| queue.log.as_mut())
        {
            log.is_due = false;
        }
        woken.is_some()
    }

    fn hand_over_next(&mut self, id: QueueId, consumer: ConsumerId) {
        let Some(log) = self.queues.get(&id).and_then(|queue| queue.log.as_ref()) else { return };
        let Some(reading) = self.consumers.get_mut(&consumer).and_then(|consumer| consumer.reading.as_mut()) else {
            return;
        };
        let Some((offset, message)) = log.get(reading.next) else { return };
        reading.next = offset + 1;
        if reading.filter.as_ref().is_some_and(|filter| !filter.wants(message)) {
            return;
        }
        let message = message.clone();
        let entry = Entry { message, expires: None, position: offset, redelivered: false, returns: 0, failures: 0 };
        self.hand_over(consumer, entry);
    }
}
