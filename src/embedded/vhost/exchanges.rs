//! Exchanges and bindings: made, unmade, and gone of themselves.

use std::collections::BTreeSet;

use super::super::arguments::{exchange_name, same_argument, same_field};
use super::super::exchange::{Destination, Exchange, ExchangeId, Kind};
use super::super::hashed::HashOn;
use super::super::refusal::Refusal;
use super::super::users::Right;
use super::channel::ChannelKey;
use super::rest::Rest;
use super::state::{Named, State, check_name, without_line_ends};
use crate::amqp::ShortString;
use crate::amqp::method::{
    ExchangeBind, ExchangeBindOk, ExchangeDeclare, ExchangeDeclareOk, ExchangeDelete, ExchangeDeleteOk, ExchangeUnbind,
    ExchangeUnbindOk, QueueBind, QueueBindOk, QueueUnbind, QueueUnbindOk,
};
use crate::amqp::value::Table;

/// A binding as a client asks for it.
struct Asked<'a> {
    source: ShortString,
    to: &'static str,
    destination: ShortString,
    key: &'a ShortString,
    arguments: &'a Table,
}

impl State {
    pub(super) fn declare_exchange(&mut self, key: ChannelKey, declare: &ExchangeDeclare) -> Result<(), Refusal> {
        let name = without_line_ends(&declare.exchange);
        if declare.passive {
            not_default(&name)?;
            self.find_exchange(&name)?;
        } else {
            let kind = Kind::of_name(&declare.kind).ok_or_else(|| self.no_such_kind(&declare.kind))?;
            not_default(&name)?;
            self.permit(key, Right::Configure, &self.exchange_named(&name))?;
            match self.exchange_names.get(&name).and_then(|id| self.exchanges.get(id)) {
                Some(exchange) => self.same_exchange(exchange, kind, declare)?,
                None => self.create_exchange(key, name, kind, declare)?,
            }
        }
        self.answer(key, declare.no_wait, ExchangeDeclareOk {});
        Ok(())
    }

    /// RabbitMQ calls invalid what its Erlang has met as a word, and unknown what it has not. The empty one it knows.
    fn no_such_kind(&self, kind: &ShortString) -> Refusal {
        let what = if kind.is_empty() { "invalid" } else { "unknown" };
        self.limits.release.no_exchange_type(format_args!("{what} exchange type '{kind}'"))
    }

    fn same_exchange(&self, exchange: &Exchange, kind: Kind, declare: &ExchangeDeclare) -> Result<(), Refusal> {
        let owner = self.exchange_named(&exchange.name).to_string();
        same_field(exchange.kind, kind, "type", &owner)?;
        same_field(exchange.durable, declare.durable, "durable", &owner)?;
        same_field(exchange.auto_delete, declare.auto_delete, "auto_delete", &owner)?;
        same_field(exchange.internal, declare.internal, "internal", &owner)?;
        same_argument(&exchange.arguments, &declare.arguments, "alternate-exchange", &owner)
    }

    fn create_exchange(
        &mut self,
        key: ChannelKey,
        name: ShortString,
        kind: Kind,
        declare: &ExchangeDeclare,
    ) -> Result<(), Refusal> {
        check_name("exchange", &name)?;
        let named = self.exchange_named(&name);
        if let Some(alternate) = exchange_name(&declare.arguments, "alternate-exchange", &named.to_string())? {
            self.permit(key, Right::Read, &named)?;
            self.permit(key, Right::Write, &self.exchange_named(&alternate))?;
        }
        let hash_on = match kind {
            Kind::Hashed => Some(HashOn::read(&declare.arguments, &named.to_string())?),
            _ => None,
        };
        let mut exchange = Exchange::new(name, kind);
        if let Some(on) = hash_on {
            exchange.hash_on(on);
        }
        exchange.durable = declare.durable;
        exchange.auto_delete = declare.auto_delete;
        exchange.internal = declare.internal;
        exchange.arguments = declare.arguments.clone();
        self.add_exchange(exchange);
        Ok(())
    }

    pub(super) fn delete_exchange(&mut self, key: ChannelKey, delete: &ExchangeDelete) -> Result<(), Refusal> {
        let name = without_line_ends(&delete.exchange);
        not_default(&name)?;
        let named = self.exchange_named(&name);
        if name.as_bytes().starts_with(b"amq.") {
            return Err(Refusal::access_refused(format_args!("deletion of system {named} not allowed")));
        }
        self.permit(key, Right::Configure, &named)?;
        if let Some(&id) = self.exchange_names.get(&name) {
            let in_use = self.exchanges.get(&id).is_some_and(|exchange| !exchange.is_unused());
            if delete.if_unused && in_use {
                return Err(Refusal::precondition_failed(format_args!("{named} in use")));
            }
            self.drop_exchange(id);
        }
        self.answer(key, delete.no_wait, ExchangeDeleteOk {});
        Ok(())
    }

    /// Deletes an exchange with all its bindings, and what is deleted for want of bindings then.
    pub(super) fn drop_exchange(&mut self, id: ExchangeId) {
        let Some(exchange) = self.exchanges.remove(&id) else { return };
        self.exchange_names.remove(&exchange.name);
        if !exchange.is_unused() {
            let destinations: Vec<_> = exchange.destinations().collect();
            self.rest.push_back(Rest::Forget { source: id, destinations: destinations.into_iter() });
            self.discarded.push(Box::new(exchange));
        }
        let sources = self.sources.remove(&id).unwrap_or_default();
        self.unbind_from(sources, Destination::Exchange(id));
    }

    /// Takes all bindings to a destination away that is no more.
    pub(super) fn unbind_from(&mut self, sources: BTreeSet<ExchangeId>, destination: Destination) {
        if !sources.is_empty() {
            let sources: Vec<_> = sources.into_iter().collect();
            self.rest.push_back(Rest::Unbind { sources: sources.into_iter(), destination });
        }
    }

    pub(super) fn forget_source(&mut self, destination: Destination, source: ExchangeId) {
        let sources = match destination {
            Destination::Queue(id) => self.queues.get_mut(&id).map(|queue| &mut queue.sources),
            Destination::Exchange(id) => self.sources.get_mut(&id),
        };
        if let Some(sources) = sources {
            sources.remove(&source);
        }
    }

    pub(super) fn bind_queue(&mut self, key: ChannelKey, bind: &QueueBind) -> Result<(), Refusal> {
        let (queue, routing_key) = self.shortcuts(key, &bind.queue, &bind.routing_key)?;
        self.bind(key, &Asked::queue(&bind.exchange, &queue, &routing_key, &bind.arguments))?;
        self.answer(key, bind.no_wait, QueueBindOk {});
        Ok(())
    }

    pub(super) fn unbind_queue(&mut self, key: ChannelKey, unbind: &QueueUnbind) -> Result<(), Refusal> {
        let (queue, routing_key) = self.shortcuts(key, &unbind.queue, &unbind.routing_key)?;
        self.unbind(key, &Asked::queue(&unbind.exchange, &queue, &routing_key, &unbind.arguments))?;
        self.tell(key, QueueUnbindOk {});
        Ok(())
    }

    pub(super) fn bind_exchange(&mut self, key: ChannelKey, bind: &ExchangeBind) -> Result<(), Refusal> {
        self.bind(key, &Asked::exchange(&bind.source, &bind.destination, &bind.routing_key, &bind.arguments))?;
        self.answer(key, bind.no_wait, ExchangeBindOk {});
        Ok(())
    }

    pub(super) fn unbind_exchange(&mut self, key: ChannelKey, unbind: &ExchangeUnbind) -> Result<(), Refusal> {
        self.unbind(
            key,
            &Asked::exchange(&unbind.source, &unbind.destination, &unbind.routing_key, &unbind.arguments),
        )?;
        self.answer(key, unbind.no_wait, ExchangeUnbindOk {});
        Ok(())
    }

    fn bind(&mut self, key: ChannelKey, asked: &Asked<'_>) -> Result<(), Refusal> {
        self.check_binding(key, asked)?;
        let source = self.find_exchange(&asked.source)?;
        let destination = self.find_destination(asked)?;
        if let Some(exchange) = self.exchanges.get(&source) {
            exchange.check_binding(asked.key, asked.arguments)?;
        }
        if let Destination::Queue(queue) = destination {
            self.check_owner(key, queue)?;
        }
        if let Some(exchange) = self.exchanges.get_mut(&source) {
            exchange.bind(destination, asked.key, asked.arguments);
        }
        match destination {
            Destination::Queue(id) => {
                if let Some(queue) = self.queues.get_mut(&id) {
                    queue.sources.insert(source);
                }
            }
            Destination::Exchange(id) => {
                self.sources.entry(id).or_default().insert(source);
            }
        }
        Ok(())
    }

    /// What is not bound, or not there at all, is as good as unbound.
    fn unbind(&mut self, key: ChannelKey, asked: &Asked<'_>) -> Result<(), Refusal> {
        self.check_binding(key, asked)?;
        let (Ok(source), Ok(destination)) = (self.find_exchange(&asked.source), self.find_destination(asked)) else {
            return Ok(());
        };
        let Some(exchange) = self.exchanges.get(&source) else { return Ok(()) };
        if exchange.has_binding(destination, asked.key, asked.arguments)
            && let Destination::Queue(queue) = destination
        {
            self.check_owner(key, queue)?;
        }
        let Some(exchange) = self.exchanges.get_mut(&source) else { return Ok(()) };
        if !exchange.unbind(destination, asked.key, asked.arguments) {
            return Ok(());
        }
        let is_done = exchange.auto_delete && exchange.is_unused();
        if !exchange.is_bound_to(destination) {
            self.forget_source(destination, source);
        }
        if is_done {
            self.drop_exchange(source);
        }
        Ok(())
    }

    fn check_binding(&self, key: ChannelKey, asked: &Asked<'_>) -> Result<(), Refusal> {
        let destination = Named { kind: asked.to, name: &asked.destination, vhost: &self.name };
        self.permit(key, Right::Write, &destination)?;
        if asked.to == "exchange" {
            not_default(&asked.destination)?;
        }
        not_default(&asked.source)?;
        self.permit(key, Right::Read, &self.exchange_named(&asked.source))
    }

    fn find_destination(&self, asked: &Asked<'_>) -> Result<Destination, Refusal> {
        match asked.to {
            "queue" => self.find_queue(&asked.destination).map(Destination::Queue),
            _ => self.find_exchange(&asked.destination).map(Destination::Exchange),
        }
    }

    /// The last declared queue stands in for an empty name, and for an empty key beside it.
    fn shortcuts(
        &self,
        key: ChannelKey,
        queue: &ShortString,
        routing_key: &ShortString,
    ) -> Result<(ShortString, ShortString), Refusal> {
        let name = self.last_queue_for(key, queue)?;
        let routing_key = if queue.is_empty() && routing_key.is_empty() { name.clone() } else { routing_key.clone() };
        Ok((name, routing_key))
    }
}

impl<'a> Asked<'a> {
    fn new(
        to: &'static str,
        source: &ShortString,
        destination: &ShortString,
        key: &'a ShortString,
        arguments: &'a Table,
    ) -> Asked<'a> {
        Asked { source: without_line_ends(source), to, destination: without_line_ends(destination), key, arguments }
    }

    fn queue(source: &ShortString, queue: &ShortString, key: &'a ShortString, arguments: &'a Table) -> Asked<'a> {
        Asked::new("queue", source, queue, key, arguments)
    }

    fn exchange(source: &ShortString, to: &ShortString, key: &'a ShortString, arguments: &'a Table) -> Asked<'a> {
        Asked::new("exchange", source, to, key, arguments)
    }
}

fn not_default(name: &ShortString) -> Result<(), Refusal> {
    if name.is_empty() {
        return Err(Refusal::access_refused("operation not permitted on the default exchange"));
    }
    Ok(())
}
