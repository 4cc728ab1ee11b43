//! What a consumer of a bus is registered with: where its messages come from, and how they get to the bus.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::de::DeserializeOwned;

use super::{Bus, Callback, Consumer, Event};
use crate::connection::Received;
use crate::error::Result;
use crate::outcome::Outcome;
use crate::topology::{Binding, Exchange, Queue, Topology};

/// What a consumer is registered with. See [`Bus::consumer`].
#[must_use = "a consumer does nothing until it is registered"]
pub struct ConsumerBuilder<'a> {
    bus: &'a mut Bus,
    exchange: Exchange,
    routing_keys: Vec<String>,
    queue: Option<String>,
    acknowledged: bool,
}

impl fmt::Debug for ConsumerBuilder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerBuilder").field("exchange", &self.exchange.name).finish_non_exhaustive()
    }
}

impl<'a> ConsumerBuilder<'a> {
    pub(super) fn new(bus: &'a mut Bus, exchange: Exchange) -> ConsumerBuilder<'a> {
        ConsumerBuilder { bus, exchange, routing_keys: Vec::new(), queue: None, acknowledged: false }
    }
}

impl ConsumerBuilder<'_> {
    /// The routing keys, or topic patterns, of the messages it is to get. Defaults to none, which stands for the empty
    /// key; a fanout exchange takes no notice of it.
    pub fn routing_keys<K>(mut self, routing_keys: K) -> Self
    where
        K: IntoIterator,
        K::Item: Into<String>,
    {
        self.routing_keys = routing_keys.into_iter().map(Into::into).collect();
        self
    }

    /// A durable queue of that name, which others may share: each message goes to one of them. Defaults to a queue of the
    /// consumer's own, which the broker names and deletes with the connection.
    pub fn queue(mut self, name: impl Into<String>) -> Self {
        self.queue = Some(name.into());
        self
    }

    /// Whether a message is acked only once its callback has returned, and according to the [`Outcome`]: an error puts it
    /// back into its queue the first time and rejects it the second; what is not JSON is rejected. Defaults to false.
    pub fn acknowledged(mut self, acknowledged: bool) -> Self {
        self.acknowledged = acknowledged;
        self
    }

    /// Registers the consumer.
    ///
    /// # Errors
    ///
    /// Those of [`Bus::register_consumer`].
    pub fn register<T, O, F>(self, mut callback: F) -> Result<()>
    where
        T: DeserializeOwned,
        O: Into<Outcome>,
        F: FnMut(T, &Received) -> O + Send + 'static,
    {
        let ConsumerBuilder { bus, exchange, mut routing_keys, queue, acknowledged } = self;
        let name = queue.unwrap_or_default();
        let declared = if name.is_empty() { Queue::server_named() } else { Queue::new(&name) };
        let mut topology = Topology::new().queue(declared);
        if !exchange.name.is_empty() {
            if routing_keys.is_empty() {
                routing_keys.push(String::new());
            }
            for key in routing_keys {
                topology = topology.bind(Binding::queue(&name).to(&exchange.name).routing_key(key));
            }
            topology = topology.exchange(exchange);
        }
        let (consumer, events, closing) = (bus.consumers.len(), bus.events.clone(), Arc::clone(&bus.closing));
        let listener = bus.app.listener(name).topology(topology).spawn_manual(move |_, unsettled| {
            // Neither fails in a way that matters: the receiver outlives this listener, and what is stale is requeued.
            if closing.load(Ordering::SeqCst) {
                let _ = unsettled.requeue();
            } else {
                let _ = events.send(Event { consumer, unsettled });
            }
        })?;
        let callback: Callback = Box::new(move |received| match received.message().decode_json::<T>() {
            Ok(value) => callback(value, received).into(),
            Err(problem) => Outcome::Undecodable(problem.to_string()),
        });
        bus.consumers.push(Consumer { listener, callback, acknowledged });
        Ok(())
    }
}
