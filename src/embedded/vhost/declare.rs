//! Queues: declared, purged, deleted, and gone of themselves.

use std::time::Instant;

use super::super::arguments::{QueueArguments, exchange_name, same_field, same_queue_arguments};
use super::super::exchange::{Destination, QueueId};
use super::super::outbox::SessionId;
use super::super::queue::{Queue, Ready};
use super::super::queue_type::QueueType;
use super::super::refusal::Refusal;
use super::super::reply_to::{PSEUDO_QUEUE, is_reply_name, server_name, suffix};
use super::super::users::Right;
use super::channel::ChannelKey;
use super::rest::Rest;
use super::state::{Discarded, State, check_name, without_line_ends};
use super::timers::Due;
use crate::amqp::ShortString;
use crate::amqp::method::{QueueDeclare, QueueDeclareOk, QueueDelete, QueueDeleteOk, QueuePurge, QueuePurgeOk};
use crate::amqp::value::Table;

/// A count as the wire has it.
pub(super) fn wire_count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl State {
    /// The name, or for an empty one the queue last declared on the channel.
    pub(super) fn last_queue_for(&self, key: ChannelKey, name: &ShortString) -> Result<ShortString, Refusal> {
        if !name.is_empty() {
            return Ok(name.clone());
        }
        let last = self.channel(key)?.last_queue.clone();
        last.ok_or_else(|| Refusal::not_found("no previously declared queue"))
    }

    pub(super) fn declare_queue(&mut self, key: ChannelKey, declare: QueueDeclare) -> Result<(), Refusal> {
        let name = without_line_ends(&declare.queue);
        let no_wait = declare.no_wait;
        let (name, messages, consumers) = if is_reply_name(&declare.queue) {
            self.find_replier(&name)?;
            (name, 0, 1)
        } else {
            let (name, id) = self.declared_queue(key, name, declare)?;
            self.expire(id, Instant::now());
            let queue = self.queues.get_mut(&id).ok_or_else(|| Refusal::internal_error("queue lost"))?;
            queue.last_used = Instant::now();
            (name, queue.len(), queue.counted_consumers())
        };
        self.channel_mut(key)?.last_queue = Some(name.clone());
        let counts = (wire_count(messages), wire_count(consumers));
        self.answer(key, no_wait, QueueDeclareOk { queue: name, message_count: counts.0, consumer_count: counts.1 });
        Ok(())
    }

    /// Whether somebody waits for answers at this address. The pseudo queue itself is always there.
    fn find_replier(&self, name: &ShortString) -> Result<(), Refusal> {
        if name == PSEUDO_QUEUE || suffix(name.as_bytes()).is_some_and(|suffix| self.repliers.contains_key(suffix)) {
            return Ok(());
        }
        Err(Refusal::not_found(format_args!("no {}", self.queue_named(name))))
    }

    fn declared_queue(
        &mut self,
        key: ChannelKey,
        name: ShortString,
        declare: QueueDeclare,
    ) -> Result<(ShortString, QueueId), Refusal> {
        if declare.passive {
            let id = self.find_open_queue(key, &name)?;
            return Ok((name, id));
        }
        let name = if name.is_empty() {
            self.check_nameless(&declare.arguments)?;
            server_name("amq.gen")
        } else {
            check_name("queue", &name)?;
            name
        };
        self.permit(key, Right::Configure, &self.queue_named(&name))?;
        let owner = declare.exclusive.then_some(self.channel(key)?.outbox.id());
        let id = match self.queue_names.get(&name).copied() {
            Some(id) => {
                self.same_queue(id, owner, &declare)?;
                id
            }
            None => self.create_queue(key, &name, owner, declare)?,
        };
        Ok((name, id))
    }

    fn same_queue(&self, id: QueueId, owner: Option<SessionId>, declare: &QueueDeclare) -> Result<(), Refusal> {
        let Some(queue) = self.queues.get(&id) else { return Ok(()) };
        if queue.owner != owner {
            return Err(self.locked(id));
        }
        let named = self.queue_named(&queue.name).to_string();
        same_field(queue.durable, declare.durable && !declare.exclusive, "durable", &named)?;
        same_field(queue.auto_delete, declare.auto_delete, "auto_delete", &named)?;
        same_queue_arguments(&queue.table, &declare.arguments, &named, self.limits.release)
    }

    /// What queues may be.
    fn types(&self) -> &'static [&'static str] {
        if self.limits.quorum_queues { &["classic", "stream", "quorum"] } else { &["classic", "stream"] }
    }

    /// Refuses a queue without a name that has to have one.
    fn check_nameless(&self, arguments: &Table) -> Result<(), Refusal> {
        match QueueType::of(arguments) {
            QueueType::Classic => Ok(()),
            QueueType::Quorum if !self.limits.quorum_queues => Ok(()),
            kind => Err(Refusal::precondition_failed(format_args!(
                "Cannot declare a server-named queue for type {}",
                kind.module()
            ))),
        }
    }

    fn create_queue(
        &mut self,
        key: ChannelKey,
        name: &ShortString,
        owner: Option<SessionId>,
        declare: QueueDeclare,
    ) -> Result<QueueId, Refusal> {
        let named = self.queue_named(name);
        if let Some(exchange) = exchange_name(&declare.arguments, "x-dead-letter-exchange", &named.to_string())? {
            self.permit(key, Right::Read, &named)?;
            self.permit(key, Right::Write, &self.exchange_named(&exchange))?;
        }
        let release = self.limits.release;
        let arguments = QueueArguments::read(&declare.arguments, &named.to_string(), self.types(), release)?;
        if arguments.kind != QueueType::Classic {
            for (property, given) in [
                ("auto-delete", declare.auto_delete),
                ("exclusive-owner", declare.exclusive),
                ("non-durable", !declare.durable),
            ] {
                if given {
                    let text = format_args!("invalid property '{property}' for {named}");
                    return Err(Refusal::precondition_failed(text));
                }
            }
        }
        if arguments.kind == QueueType::Stream {
            QueueArguments::check_stream(&declare.arguments, release)?;
        }
        let id = QueueId(self.new_id());
        let mut queue = Queue::new(name.clone(), declare.arguments, arguments, release);
        // An exclusive queue goes with its connection, so it would not outlive a restart anyhow.
        queue.durable = declare.durable && !declare.exclusive;
        queue.auto_delete = declare.auto_delete;
        queue.owner = owner;
        self.queue_names.insert(name.clone(), id);
        self.queues.insert(id, queue);
        if let Some(session) = owner {
            self.sessions.entry(session).or_default().queues.insert(id);
        }
        self.watch_end(id);
        Ok(id)
    }

    pub(super) fn purge_queue(&mut self, key: ChannelKey, purge: &QueuePurge) -> Result<(), Refusal> {
        let name = self.last_queue_for(key, &purge.queue)?;
        self.permit(key, Right::Read, &self.queue_named(&name))?;
        let id = self.find_open_queue(key, &name)?;
        if self.is_stream(id) {
            let named = self.queue_named(&name);
            return Err(Refusal::not_implemented(format_args!("queue.purge not supported by stream queues {named}")));
        }
        self.expire(id, Instant::now());
        let purged = self.queues.get_mut(&id).map(|queue| queue.ready.take());
        let count = purged.as_ref().map_or(0, Ready::len);
        self.discarded.extend(purged.map(|messages| Box::new(messages) as Discarded));
        self.answer(key, purge.no_wait, QueuePurgeOk { message_count: wire_count(count) });
        Ok(())
    }

    pub(super) fn delete_queue(&mut self, key: ChannelKey, delete: &QueueDelete) -> Result<(), Refusal> {
        let name = without_line_ends(&self.last_queue_for(key, &delete.queue)?);
        if let Some(&id) = self.queue_names.get(&name) {
            self.expire(id, Instant::now());
        }
        let named = self.queue_named(&name);
        self.permit(key, Right::Configure, &named)?;
        let Some(&id) = self.queue_names.get(&name) else {
            self.answer(key, delete.no_wait, QueueDeleteOk { message_count: 0 });
            return Ok(());
        };
        self.check_owner(key, id)?;
        let Some(queue) = self.queues.get(&id) else { return Ok(()) };
        if queue.is_quorum() {
            for (flag, given) in [("if-unused", delete.if_unused), ("if-empty", delete.if_empty)] {
                if given {
                    return Err(Refusal::not_implemented(format_args!(
                        "cannot delete {named}. queue.delete operations with {flag} flag set are not supported by quorum \
                         queues"
                    )));
                }
            }
        }
        // A stream goes, whatever is asked.
        let is_stream = queue.log.is_some();
        if delete.if_empty && !is_stream && !queue.ready.is_empty() {
            return Err(Refusal::precondition_failed(format_args!("{named} not empty")));
        }
        if delete.if_unused && !is_stream && !queue.consumers.is_empty() {
            return Err(Refusal::precondition_failed(format_args!("{named} in use")));
        }
        let message_count = wire_count(queue.ready.len());
        self.answer(key, delete.no_wait, QueueDeleteOk { message_count });
        self.drop_queue(id);
        Ok(())
    }

    /// Deletes a queue. Its consumers are told; what was delivered from it and not acked is of no concern any more.
    pub(super) fn drop_queue(&mut self, id: QueueId) {
        let Some(queue) = self.queues.remove(&id) else { return };
        self.queue_names.remove(&queue.name);
        if let Some(session) = queue.owner.and_then(|owner| self.sessions.get_mut(&owner)) {
            session.queues.remove(&id);
        }
        self.timers.forget_queue(id);
        if !queue.ready.is_empty() {
            self.discarded.push(Box::new(queue.ready));
        }
        if let Some(log) = queue.log {
            self.discarded.push(log);
        }
        if !queue.consumers.is_empty() {
            let consumers: Vec<_> = queue.consumers.iter().collect();
            self.rest.push_back(Rest::Cancel(consumers.into_iter()));
        }
        self.unbind_from(queue.sources, Destination::Queue(id));
    }

    /// Sets the timer for a queue that expires, if none is set.
    pub(super) fn watch_end(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get(&id) else { return };
        let Some(after) = queue.arguments.expires else { return };
        if self.timers.is_set(Due::End(id)) || !queue.consumers.is_empty() {
            return;
        }
        // A time too far off to be named does not come.
        if let Some(at) = queue.last_used.checked_add(after) {
            self.timers.set(at, Due::End(id));
        }
    }

    /// The timer has gone off: deletes the queue if nobody has used it since it was set.
    pub(super) fn end_if_unused(&mut self, id: QueueId, now: Instant) {
        let Some(queue) = self.queues.get(&id) else { return };
        let Some(after) = queue.arguments.expires else { return };
        if queue.consumers.is_empty() && now.saturating_duration_since(queue.last_used) >= after {
            self.drop_queue(id);
        } else {
            self.watch_end(id);
        }
    }
}
