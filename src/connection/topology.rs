//! Declaring a whole topology, and what is done about what the broker refuses.

use super::Connection;
use super::declare::{QueueInfo, binding_text};
use crate::error::{Error, Result};
use crate::topology::{Binding, Destination, Exchange, OnConflict, Queue, Topology};

/// AMQP 0-9-1, `precondition-failed`: it is there with other properties.
const INEQUIVALENT: u16 = 406;

impl Connection {
    /// Declares all of a topology: exchanges, the bindings between them, queues, and their bindings.
    ///
    /// What exists already with the same properties is left as it is; for what exists with others see
    /// [`Topology::on_conflict`]. Returns the queues in the order of the topology, with the names that the broker gave to those
    /// without one; a binding whose queue name is empty is made to the last of these. A queue that was left out
    /// ([`Topology::skip_failed`]) is among them with counts of 0.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] if the topology does not fit together, before anything is declared; otherwise the first thing the
    /// broker refused, by name, unless such things are left out. What was declared before it stays.
    pub fn declare(&self, topology: &Topology) -> Result<Vec<QueueInfo>> {
        topology.check()?;
        for exchange in &topology.exchanges {
            let what = format!("exchange {:?}", exchange.name);
            self.unless_skipped(topology, &what, || self.declare_exchange(exchange, topology, &what))?;
        }
        let (between_exchanges, to_queues): (Vec<&Binding>, Vec<&Binding>) =
            topology.bindings.iter().partition(|binding| matches!(binding.destination, Destination::Exchange(_)));
        for binding in between_exchanges {
            self.unless_skipped(topology, &binding_text("binding", binding), || self.bind(binding))?;
        }
        let mut queues = Vec::new();
        let mut named_by_broker = None;
        for queue in &topology.queues {
            let what = format!("queue {:?}", queue.name);
            let declared = self.unless_skipped(topology, &what, || self.declare_queue(queue, topology, &what))?;
            if queue.name.is_empty() {
                named_by_broker = declared.as_ref().map(|info| info.name.clone()).or(named_by_broker);
            }
            queues.push(declared.unwrap_or_else(|| QueueInfo::of_nothing(&queue.name)));
        }
        for binding in to_queues {
            let binding = match (&binding.destination, &named_by_broker) {
                (Destination::Queue(name), Some(given)) if name.is_empty() => {
                    &Binding { destination: Destination::Queue(given.clone()), ..binding.clone() }
                }
                _ => binding,
            };
            self.unless_skipped(topology, &binding_text("binding", binding), || self.bind(binding))?;
        }
        Ok(queues)
    }

    fn declare_exchange(&self, exchange: &Exchange, topology: &Topology, what: &str) -> Result<()> {
        let name = exchange.name.as_str();
        let on_conflict = exchange.on_conflict.or(topology.on_conflict).unwrap_or_default();
        self.declared(on_conflict, what, || self.exchange_declare(exchange), || self.exchange_declare_passive(name))
    }

    fn declare_queue(&self, queue: &Queue, topology: &Topology, what: &str) -> Result<QueueInfo> {
        let name = queue.name.as_str();
        // One that the broker names is always a new one.
        let on_conflict = queue.on_conflict.or(topology.on_conflict).filter(|_| !name.is_empty()).unwrap_or_default();
        self.declared(on_conflict, what, || self.queue_declare(queue), || self.queue_declare_passive(name))
    }

    fn declared<T>(
        &self,
        on_conflict: OnConflict,
        what: &str,
        declare: impl FnOnce() -> Result<T>,
        find: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        match on_conflict {
            OnConflict::Fail => declare(),
            OnConflict::Passive => find(),
            OnConflict::Warn => match declare() {
                Err(error @ Error::ChannelClosed { code: INEQUIVALENT, .. }) => {
                    let found = find()?;
                    self.context.events.conflicts(what, error);
                    Ok(found)
                }
                other => other,
            },
        }
    }

    /// Carries out a step of a declaration. Its refusal by the broker is told and left, if that is wanted.
    fn unless_skipped<T>(
        &self,
        topology: &Topology,
        what: &str,
        step: impl FnOnce() -> Result<T>,
    ) -> Result<Option<T>> {
        match step() {
            Ok(done) => {
                self.context.events.declared(what);
                Ok(Some(done))
            }
            Err(error @ Error::ChannelClosed { .. }) if topology.skip_failed == Some(true) => {
                self.context.events.not_declared(what, error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
