//! Messages into queues, and out of them to consumers or to the dead.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::super::arguments::Overflow;
use super::super::dead_letter::{Death, Reason, bury, is_cycle};
use super::super::exchange::QueueId;
use super::super::ledger::ConsumerId;
use super::super::message::Message;
use super::super::queue::Entry;
use super::channel::ChannelKey;
use super::state::{Dead, State};
use super::timers::Due;
use crate::amqp::method::BasicDeliver;
use crate::amqp::properties::Properties;

impl State {
    /// Puts a message in a queue, or gives it straight to a consumer. False if the queue refuses it.
    pub(super) fn enqueue(&mut self, id: QueueId, message: Arc<Message>, ttl: Option<Duration>) -> bool {
        let Some(queue) = self.queues.get_mut(&id) else { return true };
        if queue.refuses(&message) {
            if queue.arguments.overflow == Overflow::RejectAndDeadLetter {
                self.die(id, message, Reason::MaxLength);
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
            self.die(id, entry.message, Reason::MaxLength);
        }
        if has_expiring_head {
            self.expire(id, Instant::now());
        }
    }

    /// Drops what has expired from the head, and sets the timer for what will.
    pub(super) fn expire(&mut self, id: QueueId, now: Instant) {
        while let Some(entry) = self.queues.get_mut(&id).and_then(|queue| queue.ready.pop_expired(now)) {
            self.die(id, entry.message, Reason::Expired);
        }
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let Some(at) = queue.ready.next_expiry() else { return };
        if queue.head_timer.is_none_or(|set| at < set) {
            queue.head_timer = Some(at);
            self.timers.set(at, Due::Head(id));
        }
    }

    /// The timer of the head has gone off.
    pub(super) fn expire_head(&mut self, id: QueueId, now: Instant) {
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.head_timer = queue.head_timer.filter(|set| *set > now);
        }
        self.expire(id, now);
    }

    /// Gives consumers what there is and they can take.
    pub(super) fn dispatch(&mut self, id: QueueId) {
        while self.dispatch_one(id) {}
    }

    /// Gives one consumer one message. False if there is no message, or nobody to take it.
    fn dispatch_one(&mut self, id: QueueId) -> bool {
        let Some(queue) = self.queues.get(&id) else { return false };
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
    fn next_consumer(&mut self, id: QueueId) -> Option<ConsumerId> {
        let queue = self.queues.get_mut(&id)?;
        if queue.consumers.is_empty() {
            return None;
        }
        if let Some(pace) = &queue.pace
            && pace.next > Instant::now()
        {
            return None;
        }
        let (consumers, channels) = (&mut self.consumers, &self.channels);
        let mut passed_over = Vec::new();
        let can_take = |id: ConsumerId| {
            consumers.get(&id).is_some_and(|consumer| {
                channels.get(&consumer.channel).is_some_and(|channel| consumer.can_take(channel))
            })
        };
        let next = queue.next_consumer(can_take, |consumer| passed_over.push(consumer));
        if next.is_some()
            && let Some(pace) = &mut queue.pace
        {
            pace.next = crate::deadline::after(pace.every);
            self.timers.set(pace.next, Due::Delivery(id));
        }
        for consumer in passed_over {
            if let Some(consumer) = consumers.get_mut(&consumer) {
                self.last_turn += 1;
                consumer.parked = Some(self.last_turn);
            }
        }
        next
    }

    fn hand_over(&mut self, id: ConsumerId, entry: Entry) {
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        let Some(channel) = self.channels.get_mut(&consumer.channel) else { return };
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
        let properties = message.properties_with(queue.delivery_count(&entry, false));
        channel.outbox.push_content(channel.number, deliver, &properties, &message.body);
        if consumer.no_ack {
            channel.ledger.pass();
            return;
        }
        channel.ledger.enter(consumer.queue, Some(id), !consumer.of_quorum, entry);
        consumer.unacked += 1;
        queue.unacked += 1;
        let key = consumer.channel;
        self.watch_acks(key);
    }

    /// Sets the timer for the oldest unacked delivery of a channel, if there is a limit and none is set.
    pub(super) fn watch_acks(&mut self, key: ChannelKey) {
        let Some(limit) = self.limits.consumer_timeout else { return };
        let Some(channel) = self.channels.get_mut(&key).filter(|channel| !channel.ack_timer) else { return };
        if let Some(at) = channel.ledger.oldest().and_then(|since| since.checked_add(limit)) {
            channel.ack_timer = true;
            self.timers.set(at, Due::Ack(key));
        }
    }

    /// Lets consumers stand in line again that were passed over for want of room, whoever was so first in front. Says from
    /// which queues to dispatch: first from the one whose consumer has had nothing for the longest time.
    pub(super) fn unpark(&mut self, consumers: impl IntoIterator<Item = ConsumerId>) -> Vec<QueueId> {
        let parked = |id| self.consumers.get(&id).and_then(|consumer| Some((consumer.parked?, id)));
        let mut parked: Vec<(u64, ConsumerId)> = consumers.into_iter().filter_map(parked).collect();
        parked.sort_unstable();
        parked.dedup();
        let mut served = Vec::with_capacity(parked.len());
        for (_, id) in parked {
            let Some(consumer) = self.consumers.get_mut(&id) else { continue };
            consumer.parked = None;
            if let Some(queue) = self.queues.get_mut(&consumer.queue) {
                queue.line_up(id, consumer.priority);
                served.push((consumer.served, consumer.queue));
            }
        }
        served.sort_unstable();
        served.into_iter().map(|(_, queue)| queue).collect()
    }

    /// The same for all consumers of a channel.
    pub(super) fn unpark_all(&mut self, key: ChannelKey) -> Vec<QueueId> {
        let Some(channel) = self.channels.get(&key) else { return Vec::new() };
        let consumers: Vec<ConsumerId> = channel.consumers.values().copied().collect();
        self.unpark(consumers)
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
    pub(super) fn die(&mut self, id: QueueId, message: Arc<Message>, reason: Reason) {
        let Some(queue) = self.queues.get(&id) else { return };
        let Some(exchange) = queue.arguments.dead_letter_exchange.clone() else { return };
        let key = queue.arguments.dead_letter_key.clone();
        self.dead.push_back(Dead { message, reason, queue: queue.name.clone(), exchange, key });
    }

    /// Publishes the dead to their exchanges. Some die again at once; a message that only goes round is dropped.
    pub(super) fn bury_the_dead(&mut self) {
        while let Some(dead) = self.dead.pop_front() {
            if !dead.exchange.is_empty() && !self.exchange_names.contains_key(&dead.exchange) {
                continue;
            }
            let Ok(properties) = Properties::decode(&dead.message.properties) else { continue };
            let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let death = Death { queue: &dead.queue, reason: dead.reason, time };
            let (message, properties) = bury(&dead.message, properties, &death, dead.exchange, dead.key.as_deref());
            let headers = properties.headers.as_ref();
            let message = Arc::new(message);
            for queue in self.route(&message, headers) {
                let cycles = dead.reason != Reason::Rejected
                    && self.queues.get(&queue).is_some_and(|queue| is_cycle(headers, &queue.name));
                if !cycles {
                    self.enqueue(queue, message.clone(), None);
                }
            }
        }
    }
}
