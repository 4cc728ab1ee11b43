//! What tests have a virtual host do wrong.

use std::time::{Duration, Instant};

use super::super::queue::Pace;
use super::VHost;
use super::channel::ChannelKey;
use super::state::State;
use crate::amqp::ShortString;

impl VHost {
    /// Nacks the next `count` publishes on confirming channels; they reach no queue.
    pub(crate) fn nack_next(&self, count: usize) {
        self.change(|state| state.mischief.nacks = count);
    }

    /// Confirms every publish so much later, or `None` at once again.
    pub(crate) fn delay_confirms(&self, delay: Option<Duration>) {
        self.change(|state| state.mischief.confirm_delay = delay);
    }

    /// Confirms nothing, or, once it is over, what has waited since.
    pub(crate) fn withhold_confirms(&self, withhold: bool) {
        self.change(|state| {
            state.mischief.withhold_confirms = withhold;
            if !withhold {
                let keys: Vec<ChannelKey> = state.channels.keys().copied().collect();
                keys.into_iter().for_each(|key| state.release_confirms(key, Instant::now()));
            }
        });
    }

    /// Delivers from a queue at most once per `every`, or as fast as may be. False if there is no such queue.
    pub(crate) fn deliver_slowly(&self, queue: &str, every: Option<Duration>) -> bool {
        self.change(|state| {
            let Some(&id) = state.queue_names.get(queue.as_bytes()) else { return false };
            if let Some(queue) = state.queues.get_mut(&id) {
                queue.pace = every.map(|every| Pace { every, next: Instant::now() });
            }
            state.dispatch(id);
            true
        })
    }

    /// Cancels all consumers of a queue, as a broker does whose queue has failed. Says how many.
    pub(crate) fn cancel_consumers(&self, queue: &str) -> usize {
        self.change(|state| state.cancel_consumers(queue))
    }

    /// What a restart does to a virtual host that nobody is connected to: only durable exchanges and queues, and the
    /// persistent messages in the latter, are there afterwards.
    pub(crate) fn restart(&self) {
        self.change(State::restart);
    }
}

impl State {
    fn cancel_consumers(&mut self, queue: &str) -> usize {
        let Some(&id) = self.queue_names.get(queue.as_bytes()) else { return 0 };
        let Some(found) = self.queues.get(&id) else { return 0 };
        let consumers: Vec<_> = found.consumers.iter().collect();
        consumers.iter().for_each(|consumer| self.cancel_consumer(*consumer));
        self.end_if_done(id);
        consumers.len()
    }

    fn restart(&mut self) {
        let sessions: Vec<_> = self.sessions.keys().copied().collect();
        sessions.into_iter().for_each(|session| self.close_session(session));
        let transient: Vec<_> = self.queues.iter().filter(|(_, queue)| !queue.durable).map(|(id, _)| *id).collect();
        transient.into_iter().for_each(|queue| self.drop_queue(queue));
        let transient: Vec<ShortString> = self
            .exchanges
            .values()
            .filter(|exchange| !exchange.durable)
            .map(|exchange| exchange.name.clone())
            .collect();
        for name in transient {
            if let Some(&id) = self.exchange_names.get(&name) {
                self.drop_exchange(id);
            }
        }
        for queue in self.queues.values_mut() {
            // A quorum queue keeps what its messages say should not be kept.
            if !queue.is_quorum() {
                queue.ready.retain(|entry| entry.message.persistent);
            }
            queue.pace = None;
            queue.last_used = Instant::now();
        }
    }
}
