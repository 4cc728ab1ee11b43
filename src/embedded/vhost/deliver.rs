//! Messages into queues, and out of them to consumers or to the dead.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::arguments::Overflow;
use super::super::dead_letter::Reason;
use super::super::exchange::QueueId;
use super::super::ledger::ConsumerId;
use super::super::message::Message;
use super::super::queue::Entry;
use super::super::queue_type::QueueType;
use super::super::stream;
use super::channel::ChannelKey;
use super::rest::{Dead, Rest, SLICE};
use super::state::State;
use super::timers::Due;
use crate::amqp::method::BasicDeliver;

impl State {
    /// Puts a message in a queue, or gives it straight to a consumer. False if the queue refuses it.
    pub(super) fn enqueue(&mut self, id: QueueId, message: Arc<Message>, ttl: Option<Duration>) -> bool {
        let Some(queue) = self.queues.get_mut(&id) else { return true };
        if queue.log.is_some() {
            self.append(id, message);
            return true;
        }
        if queue.refuses(&message) {
            if queue.arguments.overflow == Overflow::RejectAndDeadLetter {
                let failures = message.failures;
                self.die(id, message, failures, Reason::MaxLength);
            }
            return false;
        }
        let expires = queue.expiry(ttl);
        let is_next = queue.ready.is_empty();
        let entry = queue.ready.arrive(message, expires);
        if is_next && let Some(consumer) = self.next_consumer(id) {
            self.hand_over(consumer, entry);
            return true;
        }
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.ready.push(entry);
        }
        self.trim(id);
        if expires.is_some() {
            self.expire(id, Instant::now());
        }
        true
    }

    /// Drops what is too much from the head.
    pub(super) fn trim(&mut self, id: QueueId) {
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.note_length();
        }
        let mut has_expiring_head = false;
        while let Some(queue) = self.queues.get_mut(&id).filter(|queue| queue.overflows()) {
            let Some(entry) = queue.ready.pop() else { break };
            has_expiring_head = queue.ready.has_expiring_head();
            self.die(id, entry.message, entry.failures, Reason::MaxLength);
        }
        if has_expiring_head {
            self.expire(id, Instant::now());
        }
    }

    /// Drops what has expired from the head, and sets the timer for what will.
    pub(super) fn expire(&mut self, id: QueueId, now: Instant) {
        while self.expire_some(id, now) {}
    }

    /// Drops some of what has expired from the head, and sets the timer for the rest. True if more has expired already.
    pub(super) fn expire_some(&mut self, id: QueueId, now: Instant) -> bool {
        for _ in 0..SLICE {
            let Some(entry) = self.queues.get_mut(&id).and_then(|queue| queue.ready.pop_expired(now)) else { break };
            self.die(id, entry.message, entry.failures, Reason::Expired);
        }
        let Some(at) = self.queues.get(&id).and_then(|queue| queue.ready.next_expiry()) else { return false };
        self.timers.set_if_sooner(at, Due::Head(id));
        at <= now
    }

    /// Gives consumers what there is and they can take. If that is much, others have a turn in between.
    pub(super) fn dispatch(&mut self, id: QueueId) {
        if self.is_stream(id) {
            return self.read(id);
        }
        for _ in 0..SLICE {
            if !self.dispatch_one(id) {
                return;
            }
        }
        self.rest.push_back(Rest::Dispatch(id));
    }

    /// Gives one consumer one message. False if there is no message, or nobody to take it.
    pub(super) fn dispatch_one(&mut self, id: QueueId) -> bool {
        let Some(queue) = self.queues.get(&id) else { return false };
        if queue.log.is_some() {
            self.read(id);
            return false;
        }
        if queue.ready.has_expiring_head() {
            self.expire(id, Instant::now());
        }
        if self.queues.get(&id).is_none_or(|queue| queue.ready.is_empty()) {
            return false;
        }
        let Some(consumer) = self.next_consumer(id) else { return false };
        let Some(entry) = self.queues.get_mut(&id).and_then(|queue| queue.ready.pop()) else { return false };
        self.hand_over(consumer, entry);
        true
    }

    /// Whose turn it is to get a message from this queue, if anybody can take one.
    pub(super) fn next_consumer(&mut self, id: QueueId) -> Option<ConsumerId> {
        let queue = self.queues.get_mut(&id)?;
        if queue.consumers.is_empty() {
            return None;
        }
        if let Some(pace) = &queue.pace
            && pace.next > Instant::now()
        {
            return None;
        }
        let (consumers, channels) = (&self.consumers, &self.channels);
        // Where a stream ends.
        let end = queue.log.as_ref().map(|log| log.end());
        let mut passed_over = Vec::new();
        let can_take = |id: ConsumerId| {
            consumers.get(&id).filter(|consumer| !consumer.has_read_to(end)).is_some_and(|consumer| {
                channels.get(&consumer.channel).is_some_and(|channel| consumer.can_take(channel))
            })
        };
        let next = queue.consumers.next(can_take, |consumer| passed_over.push(consumer));
        if next.is_some()
            && let Some(pace) = &mut queue.pace
        {
            pace.next = crate::deadline::after(pace.every);
            self.timers.set(pace.next, Due::Delivery(id));
        }
        passed_over.into_iter().for_each(|consumer| self.park(consumer));
        next
    }

    pub(super) fn hand_over(&mut self, id: ConsumerId, entry: Entry) {
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        let Some(channel) = self.channels.get_mut(&consumer.channel) else { return };
        if consumer.parked.take().is_some() {
            // A single active consumer is asked although it has been passed over.
            channel.parked.remove(&(consumer.served, id));
        }
        self.last_turn += 1;
        consumer.served = self.last_turn;
        let message = entry.message.clone();
        let deliver = BasicDeliver {
            consumer_tag: consumer.tag.clone(),
            delivery_tag: channel.ledger.next_tag(),
            redelivered: entry.redelivered,
            exchange: message.exchange.clone(),
            routing_key: message.routing_key.clone(),
        };
        let Some(queue) = self.queues.get_mut(&consumer.queue) else { return };
        let properties = match consumer.kind {
            QueueType::Stream => stream::properties(&message, entry.position, self.limits.release),
            _ => message.properties_with(queue.delivery_count(&entry, false)),
        };
        channel.outbox.push_content(channel.number, deliver, &properties, &message.body);
        if consumer.no_ack {
            channel.ledger.pass();
            return;
        }
        channel.ledger.enter(consumer.queue, Some(id), consumer.kind == QueueType::Classic, entry);
        consumer.unacked += 1;
        queue.unacked += 1;
        let key = consumer.channel;
        self.watch_acks(key);
    }

    /// Sets the timer for the oldest unacked delivery of a channel, if there is a limit and none is set.
    pub(super) fn watch_acks(&mut self, key: ChannelKey) {
        let Some(limit) = self.limits.consumer_timeout else { return };
        if self.timers.is_set(Due::Ack(key)) {
            return;
        }
        let oldest = self.channels.get(&key).and_then(|channel| channel.ledger.oldest());
        if let Some(at) = oldest.and_then(|since| since.checked_add(limit)) {
            self.timers.set(at, Due::Ack(key));
        }
    }

    /// Dispatches from these queues in turn, a message from each, so that consumers of several queues that share a limit
    /// get on together.
    pub(super) fn dispatch_all(&mut self, queues: Vec<QueueId>) {
        if let [queue] = queues[..] {
            return self.dispatch(queue);
        }
        let mut seen = HashSet::with_capacity(queues.len());
        let mut queues: Vec<QueueId> = queues.into_iter().filter(|queue| seen.insert(*queue)).collect();
        while let [_, _, ..] = queues[..] {
            queues.retain(|queue| self.dispatch_one(*queue));
        }
        queues.into_iter().for_each(|queue| self.dispatch(queue));
    }

    /// A message of this queue has died. If the queue has a dead letter exchange, it goes there, in a moment.
    pub(super) fn die(&mut self, id: QueueId, message: Arc<Message>, failures: u32, reason: Reason) {
        let Some(queue) = self.queues.get(&id) else { return };
        let Some(exchange) = queue.arguments.dead_letter_exchange.clone() else { return };
        let key = queue.arguments.dead_letter_key.clone();
        let queue = queue.name.clone();
        self.rest.push_back(Rest::Bury(Dead { message, failures, reason, queue, exchange, key }));
    }
}
