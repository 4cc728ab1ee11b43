//! Channels and connections: opened, closed, and what is due for them.

use std::collections::{BTreeSet, VecDeque, btree_map};
use std::sync::Arc;
use std::time::Instant;

use super::super::clock::Overdue;
use super::super::exchange::QueueId;
use super::super::ledger::{ConsumerId, Unacked};
use super::super::outbox::{Outbox, SessionId};
use super::super::refusal::Refusal;
use super::super::transaction::Settlement;
use super::super::users::User;
use super::channel::{Channel, ChannelKey, Mode};
use super::rest::SLICE;
use super::state::State;
use super::timers::Due;

/// What closed channels have still to give back.
#[derive(Debug, Default)]
pub(super) struct Closing {
    consumers: Vec<ConsumerId>,
    unacked: VecDeque<btree_map::IntoValues<u64, Unacked>>,
    exclusive: BTreeSet<QueueId>,
    /// The queues that have lost a consumer or got a message back.
    left: BTreeSet<QueueId>,
}

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

    /// Closes channels together: nothing that one of them gives back goes to another. What they have is still to be given back.
    pub(super) fn begin_closing(&mut self, keys: &[ChannelKey]) -> Closing {
        let mut closing = Closing::default();
        for key in keys {
            let Some(mut channel) = self.channels.remove(key) else { continue };
            self.timers.forget_channel(*key);
            if let Some(session) = self.sessions.get_mut(&channel.outbox.id()) {
                session.channels.remove(key);
            }
            if let Some(reply) = channel.reply {
                self.repliers.remove(&reply.suffix);
            }
            closing.consumers.extend(channel.consumers.into_values());
            if let Mode::Tx(transaction) = channel.mode {
                transaction.roll_back(&mut channel.ledger);
            }
            closing.unacked.push_back(channel.ledger.into_unacked());
        }
        closing
    }

    /// The same for all channels of a connection, with its exclusive queues.
    pub(super) fn begin_closing_session(&mut self, id: SessionId) -> Closing {
        let Some(session) = self.sessions.get(&id) else { return Closing::default() };
        let channels: Vec<ChannelKey> = session.channels.iter().copied().collect();
        let mut closing = self.begin_closing(&channels);
        closing.exclusive = self.sessions.remove(&id).map(|session| session.queues).unwrap_or_default();
        closing
    }

    /// Goes on closing, for a slice. False if all is done.
    pub(super) fn close_some(&mut self, closing: &mut Closing) -> bool {
        for _ in 0..SLICE {
            if let Some(consumer) = closing.consumers.pop() {
                closing.left.extend(self.drop_consumer(consumer));
            } else if let Some(unacked) = closing.unacked.front_mut() {
                match unacked.next() {
                    Some(unacked) => self.settle_one(Settlement::Return, unacked, &mut closing.left),
                    None => drop(closing.unacked.pop_front()),
                }
            } else if let Some(queue) = closing.exclusive.pop_first() {
                self.drop_queue(queue);
            } else if let Some(queue) = closing.left.pop_first() {
                self.end_if_done(queue);
                self.dispatch(queue);
            } else {
                return false;
            }
        }
        true
    }

    pub(super) fn close_session(&mut self, id: SessionId) {
        let mut closing = self.begin_closing_session(id);
        while self.close_some(&mut closing) {}
    }

    pub(super) fn see_to(&mut self, due: Due, now: Instant, overdue: &mut Vec<Overdue>) {
        match due {
            Due::Head(queue) => {
                // The rest is due at once.
                self.expire_some(queue, now);
            }
            Due::End(queue) => self.end_if_unused(queue, now),
            Due::Delivery(queue) => self.dispatch(queue),
            Due::Confirms(channel) => self.release_confirms(channel, now),
            Due::Ack(channel) => overdue.extend(self.check_acks(channel, now)),
        }
    }

    fn check_acks(&mut self, key: ChannelKey, now: Instant) -> Option<Overdue> {
        let limit = self.limits.consumer_timeout?;
        let channel = self.channels.get(&key)?;
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
