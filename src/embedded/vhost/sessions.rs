//! Channels and connections: opened, closed, given room, and what is due for them.

use std::sync::Arc;
use std::time::Instant;

use super::super::clock::Overdue;
use super::super::outbox::{Outbox, SessionId};
use super::super::refusal::Refusal;
use super::super::transaction::Transaction;
use super::super::users::User;
use super::channel::{Channel, ChannelKey, Mode};
use super::state::State;
use super::timers::Due;

impl State {
    pub(super) fn open_channel(
        &mut self,
        outbox: &Arc<Outbox>,
        user: &Arc<User>,
        number: u16,
        wants_cancel: bool,
    ) -> ChannelKey {
        let key = ChannelKey(self.new_id());
        self.channels.insert(key, Channel::new(outbox.clone(), user.clone(), number, wants_cancel));
        self.sessions.entry(outbox.id()).or_default().channels.insert(key);
        key
    }

    /// Closes channels together: nothing that one of them gives back goes to another.
    pub(super) fn close_channels(&mut self, keys: &[ChannelKey]) {
        let mut unacked = Vec::new();
        let mut left = Vec::new();
        for key in keys {
            let Some(mut channel) = self.channels.remove(key) else { continue };
            if let Some(session) = self.sessions.get_mut(&channel.outbox.id()) {
                session.channels.remove(key);
            }
            if let Some(reply) = channel.reply {
                self.repliers.remove(&reply.suffix);
            }
            for consumer in channel.consumers.into_values() {
                left.extend(self.drop_consumer(consumer));
            }
            unacked.extend(channel.ledger.take_all());
            if let Mode::Tx(Transaction { settlements, .. }) = channel.mode {
                unacked.extend(settlements.into_iter().flat_map(|(_, taken)| taken));
            }
        }
        left.iter().for_each(|queue| self.end_if_done(*queue));
        left.extend(self.return_all(unacked));
        // They came from a map.
        left.sort_unstable();
        self.dispatch_all(left);
    }

    pub(super) fn close_session(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let channels: Vec<ChannelKey> = session.channels.iter().copied().collect();
        self.close_channels(&channels);
        let Some(session) = self.sessions.remove(&id) else { return };
        session.queues.into_iter().for_each(|queue| self.drop_queue(queue));
    }

    pub(super) fn room_again(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let channels: Vec<ChannelKey> = session.channels.iter().copied().collect();
        let queues = channels.into_iter().flat_map(|key| self.unpark_all(key)).collect();
        self.dispatch_all(queues);
    }

    pub(super) fn see_to(&mut self, due: Due, now: Instant, overdue: &mut Vec<Overdue>) {
        match due {
            Due::Head(queue) => self.expire_head(queue, now),
            Due::End(queue) => self.end_if_unused(queue, now),
            Due::Delivery(queue) => self.dispatch(queue),
            Due::Confirms(channel) => self.release_confirms(channel, now),
            Due::Ack(channel) => overdue.extend(self.check_acks(channel, now)),
        }
    }

    fn check_acks(&mut self, key: ChannelKey, now: Instant) -> Option<Overdue> {
        let limit = self.limits.consumer_timeout?;
        let channel = self.channels.get_mut(&key)?;
        channel.ack_timer = false;
        let since = channel.ledger.oldest()?;
        if now.saturating_duration_since(since) < limit {
            self.watch_acks(key);
            return None;
        }
        let refusal = Refusal::precondition_failed(format_args!(
            "delivery acknowledgement on channel {} timed out. Timeout value used: {} ms. This timeout value can be \
             configured, see consumers doc guide to learn more",
            channel.number,
            limit.as_millis()
        ));
        Some(Overdue { session: channel.outbox.id(), channel: channel.number, refusal })
    }
}
