//! What is left to do after a change, and may be much: done in slices, between which others have a turn.
//!
//! Whoever changes something sees to what is left of it before it goes on, unless somebody is at it already, who then does
//! this too.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use std::vec;

use super::super::dead_letter::{Death, Reason, bury, cycles};
use super::super::exchange::{Destination, ExchangeId, QueueId};
use super::super::ledger::{ConsumerId, Unacked};
use super::super::message::Message;
use super::super::transaction::Settlement;
use super::channel::ChannelKey;
use super::state::State;
use crate::amqp::ShortString;
use crate::amqp::properties::Properties;

/// So many things are done of one kind before others have a turn: some tens of microseconds.
pub(super) const SLICE: usize = 256;

/// A message that died in a queue and has not been buried yet.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) message: Arc<Message>,
    pub(super) failures: u32,
    pub(super) reason: Reason,
    pub(super) queue: ShortString,
    pub(super) exchange: ShortString,
    pub(super) key: Option<Arc<[u8]>>,
}

/// Something left to do.
#[derive(Debug)]
pub(super) enum Rest {
    Bury(Dead),
    /// A dead letter has been routed.
    Enqueue {
        message: Arc<Message>,
        queues: vec::IntoIter<QueueId>,
    },
    /// A queue or an exchange has gone: its bindings follow.
    Unbind {
        sources: vec::IntoIter<ExchangeId>,
        destination: Destination,
    },
    /// An exchange has gone: what it was bound to forgets it.
    Forget {
        source: ExchangeId,
        destinations: vec::IntoIter<Destination>,
    },
    /// A queue has gone: its consumers are told.
    Cancel(vec::IntoIter<ConsumerId>),
    /// A client has settled many messages at once.
    Settle {
        channel: ChannelKey,
        settlement: Settlement,
        taken: vec::IntoIter<Unacked>,
    },
    /// A queue has more to deliver.
    Dispatch(QueueId),
    /// A stream may have something to read.
    Read(QueueId),
}

impl State {
    /// Does a slice of what is left. False if nothing is.
    pub(super) fn do_some(&mut self) -> bool {
        let mut budget = SLICE;
        while let Some(rest) = self.rest.pop_front() {
            if budget == 0 {
                self.rest.push_front(rest);
                return true;
            }
            match self.do_slice(rest, &mut budget) {
                // Others need not wait until somebody has read a long stream.
                Some(more @ Rest::Read(_)) => self.rest.push_back(more),
                Some(more) => self.rest.push_front(more),
                None => {}
            }
        }
        false
    }

    /// Does one thing as far as the budget goes, and returns what is left of it.
    fn do_slice(&mut self, rest: Rest, budget: &mut usize) -> Option<Rest> {
        match rest {
            Rest::Bury(dead) => {
                *budget -= 1;
                self.bury(dead)
            }
            Rest::Enqueue { message, mut queues } => {
                while let Some(queue) = next(&mut queues, budget) {
                    if self.limits.release.streams_take_dead_letters() || !self.is_stream(queue) {
                        self.enqueue(queue, message.clone(), None);
                    }
                }
                (queues.len() > 0).then_some(Rest::Enqueue { message, queues })
            }
            Rest::Unbind { mut sources, destination } => {
                while let Some(&source) = sources.as_slice().first().filter(|_| *budget > 0) {
                    if self.unbind_some(source, destination, budget) {
                        sources.next();
                    }
                }
                (sources.len() > 0).then_some(Rest::Unbind { sources, destination })
            }
            Rest::Forget { source, mut destinations } => {
                while let Some(destination) = next(&mut destinations, budget) {
                    self.forget_source(destination, source);
                }
                (destinations.len() > 0).then_some(Rest::Forget { source, destinations })
            }
            Rest::Settle { channel, settlement, mut taken } => {
                let some = taken.len().min(*budget);
                *budget -= some;
                self.settle_some(channel, settlement, taken.by_ref().take(some));
                (taken.len() > 0).then_some(Rest::Settle { channel, settlement, taken })
            }
            Rest::Dispatch(queue) => {
                while *budget > 0 {
                    if !self.dispatch_one(queue) {
                        return None;
                    }
                    *budget -= 1;
                }
                Some(rest)
            }
            Rest::Read(stream) => {
                while *budget > 0 {
                    if !self.read_one(stream) {
                        return None;
                    }
                    *budget -= 1;
                }
                Some(rest)
            }
            Rest::Cancel(mut consumers) => {
                while let Some(consumer) = next(&mut consumers, budget) {
                    self.cancel_consumer(consumer);
                }
                (consumers.len() > 0).then_some(Rest::Cancel(consumers))
            }
        }
    }

    /// Publishes a dead message to its exchange. It may die again at once; one that only goes round is dropped.
    fn bury(&self, dead: Dead) -> Option<Rest> {
        if !dead.exchange.is_empty() && !self.exchange_names.contains_key(&dead.exchange) {
            return None;
        }
        let properties = Properties::decode(&dead.message.properties).ok()?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let death = Death { queue: &dead.queue, reason: dead.reason, time, failures: dead.failures };
        let (exchange, key) = (dead.exchange, dead.key.as_deref());
        let (message, properties) = bury(&dead.message, properties, &death, exchange, key, self.limits.release);
        let headers = properties.headers.as_ref();
        let cycles = if dead.reason == Reason::Rejected { HashSet::new() } else { cycles(headers) };
        let mut queues = self.route(&message, headers);
        queues.retain(|queue| self.queues.get(queue).is_some_and(|queue| !cycles.contains(queue.name.as_bytes())));
        Some(Rest::Enqueue { message: Arc::new(message), queues: queues.into_iter() })
    }

    /// Takes bindings of an exchange to one destination away. True if there are no more.
    fn unbind_some(&mut self, source: ExchangeId, destination: Destination, budget: &mut usize) -> bool {
        *budget -= 1;
        let Some(exchange) = self.exchanges.get_mut(&source) else { return true };
        if !exchange.unbind_some(destination, budget) {
            return false;
        }
        if exchange.auto_delete && exchange.is_unused() {
            self.drop_exchange(source);
        }
        true
    }
}

/// The next thing, if the budget is enough for it.
fn next<T>(things: &mut vec::IntoIter<T>, budget: &mut usize) -> Option<T> {
    *budget = budget.checked_sub(1)?;
    let next = things.next();
    if next.is_none() {
        *budget += 1;
    }
    next
}
