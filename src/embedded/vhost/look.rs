//! What tests want to see of a virtual host.

use std::sync::Arc;

use super::super::exchange::Destination;
use super::super::message::Message;
use super::super::outbox::SessionId;
use super::super::queue::Queue;
use super::VHost;
use crate::amqp::value::Table;

/// A queue, seen from outside.
#[derive(Debug, Clone)]
pub(crate) struct QueueFacts {
    pub(crate) name: String,
    pub(crate) durable: bool,
    pub(crate) auto_delete: bool,
    pub(crate) exclusive: bool,
    pub(crate) arguments: Table,
    /// Ready to be delivered; of a stream, those it has.
    pub(crate) ready: usize,
    /// Delivered and not acked.
    pub(crate) unacked: usize,
    pub(crate) consumers: usize,
}

/// An exchange, seen from outside.
#[derive(Debug, Clone)]
pub(crate) struct ExchangeFacts {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) durable: bool,
    pub(crate) auto_delete: bool,
    pub(crate) internal: bool,
    pub(crate) arguments: Table,
}

/// A binding, seen from outside.
#[derive(Debug, Clone)]
pub(crate) struct BindingFacts {
    pub(crate) source: String,
    pub(crate) destination: String,
    pub(crate) to_queue: bool,
    pub(crate) routing_key: String,
    pub(crate) arguments: Table,
}

/// A consumer, seen from outside.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerFacts {
    pub(crate) queue: String,
    pub(crate) tag: String,
    pub(crate) session: SessionId,
    pub(crate) channel: u16,
    pub(crate) no_ack: bool,
    pub(crate) prefetch: usize,
    pub(crate) unacked: usize,
}

impl VHost {
    /// All queues, by name.
    pub(crate) fn queues(&self) -> Vec<QueueFacts> {
        let mut facts: Vec<QueueFacts> = self.state().queues.values().map(queue_facts).collect();
        facts.sort_by(|one, other| one.name.cmp(&other.name));
        facts
    }

    /// The queue of this name.
    pub(crate) fn queue(&self, name: &str) -> Option<QueueFacts> {
        let state = self.state();
        state.queue_names.get(name.as_bytes()).and_then(|id| state.queues.get(id)).map(queue_facts)
    }

    /// The messages ready in a queue, the next first.
    pub(crate) fn messages(&self, queue: &str) -> Option<Vec<Arc<Message>>> {
        let state = self.state();
        let queue = state.queue_names.get(queue.as_bytes()).and_then(|id| state.queues.get(id))?;
        Some(queue.messages().cloned().collect())
    }

    /// All exchanges, by name, but the nameless one.
    pub(crate) fn exchanges(&self) -> Vec<ExchangeFacts> {
        let state = self.state();
        let facts = state.exchanges.values().map(|exchange| ExchangeFacts {
            name: exchange.name.text().into_owned(),
            kind: exchange.kind.name(),
            durable: exchange.durable,
            auto_delete: exchange.auto_delete,
            internal: exchange.internal,
            arguments: exchange.arguments.clone(),
        });
        let mut facts: Vec<ExchangeFacts> = facts.collect();
        drop(state);
        facts.sort_by(|one, other| one.name.cmp(&other.name));
        facts
    }

    /// All bindings but those every queue has to the nameless exchange.
    pub(crate) fn bindings(&self) -> Vec<BindingFacts> {
        let state = self.state();
        let name_of = |destination| match destination {
            Destination::Queue(id) => state.queues.get(&id).map(|queue| &queue.name),
            Destination::Exchange(id) => state.exchanges.get(&id).map(|exchange| &exchange.name),
        };
        let mut facts = Vec::new();
        for exchange in state.exchanges.values() {
            for (destination, key, arguments) in exchange.bindings() {
                // A queue or exchange may have gone, and its bindings not yet.
                let Some(name) = name_of(destination) else { continue };
                facts.push(BindingFacts {
                    source: exchange.name.text().into_owned(),
                    destination: name.text().into_owned(),
                    to_queue: matches!(destination, Destination::Queue(_)),
                    routing_key: key.text().into_owned(),
                    arguments: arguments.clone(),
                });
            }
        }
        drop(state);
        facts.sort_by(|one, other| {
            let order =
                |facts: &BindingFacts| (facts.source.clone(), facts.destination.clone(), facts.routing_key.clone());
            order(one).cmp(&order(other))
        });
        facts
    }

    /// All consumers, in the order in which they came.
    pub(crate) fn consumers(&self) -> Vec<ConsumerFacts> {
        let state = self.state();
        let facts = state.consumers.values().filter_map(|consumer| {
            let channel = state.channels.get(&consumer.channel)?;
            let queue = state.queues.get(&consumer.queue)?;
            Some(ConsumerFacts {
                queue: queue.name.text().into_owned(),
                tag: consumer.tag.text().into_owned(),
                session: channel.outbox.id(),
                channel: channel.number,
                no_ack: consumer.no_ack,
                prefetch: consumer.prefetch,
                unacked: consumer.unacked,
            })
        });
        facts.collect()
    }

    /// How many channels are open.
    pub(crate) fn channel_count(&self) -> usize {
        self.state().channels.len()
    }
}

fn queue_facts(queue: &Queue) -> QueueFacts {
    QueueFacts {
        name: queue.name.text().into_owned(),
        durable: queue.durable,
        auto_delete: queue.auto_delete,
        exclusive: queue.owner.is_some(),
        arguments: queue.table.clone(),
        ready: queue.len(),
        unacked: queue.unacked,
        consumers: queue.consumers.len(),
    }
}
