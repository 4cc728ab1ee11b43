//! Consumers that were passed over because they could take no message, and what happens when they can again.
//!
//! A consumer that has reached its own prefetch is looked at when one of its messages is settled. One whose channel has
//! reached its limit, or whose connection is slow to take what it has been sent, waits with the others of its channel, and
//! they are asked only for as long as there is room.

use super::super::exchange::QueueId;
use super::super::ledger::ConsumerId;
use super::super::outbox::SessionId;
use super::channel::{ChannelKey, Parked};
use super::state::State;

impl State {
    /// Notes that a consumer could take no message and is out of the line.
    pub(super) fn park(&mut self, id: ConsumerId) {
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        if let Some(reading) = &consumer.reading
            && let Some(log) = self.queues.get_mut(&consumer.queue).and_then(|queue| queue.log.as_mut())
            && reading.next >= log.end()
        {
            log.wait(reading.next, id);
            consumer.parked = Some(Parked::AtEnd);
        } else if consumer.has_credit() {
            consumer.parked = Some(Parked::ByChannel);
            if let Some(channel) = self.channels.get_mut(&consumer.channel) {
                channel.parked.insert((consumer.served, id));
            }
        } else {
            self.last_turn += 1;
            consumer.parked = Some(Parked::ByItself(self.last_turn));
        }
    }

    /// Lets consumers stand in line again that had reached their own prefetch, whoever was passed over first in front. Says
    /// from which queues to dispatch: first from the one whose consumer has had nothing for the longest time.
    pub(super) fn unpark(&mut self, consumers: impl IntoIterator<Item = ConsumerId>) -> Vec<QueueId> {
        let parked = |id| match self.consumers.get(&id)?.parked? {
            Parked::ByItself(turn) => Some((turn, id)),
            Parked::ByChannel | Parked::AtEnd => None,
        };
        let mut parked: Vec<(u64, ConsumerId)> = consumers.into_iter().filter_map(parked).collect();
        parked.sort_unstable();
        let mut served: Vec<_> = parked.into_iter().filter_map(|(_, id)| self.back_in_line(id)).collect();
        served.sort_unstable();
        served.into_iter().map(|(_, queue)| queue).collect()
    }

    /// When it was last served, and its queue.
    pub(super) fn back_in_line(&mut self, id: ConsumerId) -> Option<(u64, QueueId)> {
        let consumer = self.consumers.get_mut(&id)?;
        consumer.parked.take()?;
        self.queues.get_mut(&consumer.queue)?.consumers.line_up(id, consumer.priority);
        Some((consumer.served, consumer.queue))
    }

    /// A channel that was full has room again: its consumers get a message each, first whoever has had nothing for the longest
    /// time, until it is full. `with_room` are those of whom a message was settled. Says from which queues there may be more.
    pub(super) fn fill_channel(&mut self, key: ChannelKey, with_room: Vec<ConsumerId>) -> Vec<QueueId> {
        for id in with_room {
            let Some(consumer) = self.consumers.get_mut(&id) else { continue };
            if let Some(Parked::ByItself(_)) = consumer.parked {
                self.park(id);
            }
        }
        let mut queues = Vec::new();
        while let Some(id) = self.next_parked(key) {
            let Some((_, queue)) = self.back_in_line(id) else { continue };
            self.dispatch_one(queue);
            queues.push(queue);
        }
        queues
    }

    /// Takes out the consumer to be asked next, if it can take a message.
    fn next_parked(&mut self, key: ChannelKey) -> Option<ConsumerId> {
        let channel = self.channels.get_mut(&key)?;
        let first = channel.parked.first().copied()?;
        let (_, id) = first;
        if self.consumers.get(&id).is_some_and(|consumer| !consumer.can_take(channel)) {
            return None;
        }
        channel.parked.remove(&first);
        Some(id)
    }

    /// A connection has taken enough of what it was sent: its consumers stand in line again.
    pub(super) fn room_again(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let mut parked = Vec::new();
        for key in &session.channels {
            if let Some(channel) = self.channels.get_mut(key) {
                parked.extend(std::mem::take(&mut channel.parked));
            }
        }
        parked.sort_unstable();
        let queues = parked.into_iter().filter_map(|(_, id)| self.back_in_line(id)).map(|(_, queue)| queue).collect();
        self.dispatch_all(queues);
    }
}
