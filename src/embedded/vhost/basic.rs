//! Consuming, getting, prefetch.

use std::time::Instant;

use super::super::consumer_arguments::ConsumerArguments;
use super::super::exchange::QueueId;
use super::super::ledger::ConsumerId;
use super::super::queue_type::QueueType;
use super::super::refusal::Refusal;
use super::super::reply_to::{PSEUDO_QUEUE, new_suffix, server_name};
use super::super::users::Right;
use super::channel::{ChannelKey, Consumer, ReplyConsumer};
use super::declare::wire_count;
use super::state::State;
use crate::amqp::ShortString;
use crate::amqp::method::{
    BasicCancel, BasicCancelOk, BasicConsume, BasicConsumeOk, BasicGet, BasicGetEmpty, BasicGetOk, BasicQos, BasicQosOk,
};

impl State {
    pub(super) fn set_prefetch(&mut self, key: ChannelKey, qos: &BasicQos) -> Result<(), Refusal> {
        if qos.prefetch_size != 0 {
            return Err(Refusal::not_implemented(format_args!("prefetch_size!=0 ({})", qos.prefetch_size)));
        }
        let channel = self.channel_mut(key)?;
        if qos.global {
            channel.ledger.set_limit(qos.prefetch_count);
        } else {
            // RabbitMQ lifts the limit of the channel along with it.
            channel.ledger.set_limit(0);
            channel.prefetch = qos.prefetch_count;
        }
        self.tell(key, BasicQosOk {});
        let queues = self.fill_channel(key, Vec::new());
        self.dispatch_all(queues);
        Ok(())
    }

    pub(super) fn consume(&mut self, key: ChannelKey, consume: &BasicConsume) -> Result<(), Refusal> {
        let name = self.last_queue_for(key, &consume.queue)?;
        if self.channel(key)?.consumers.contains_key(&consume.consumer_tag) {
            return Err(reused(&consume.consumer_tag));
        }
        if name == PSEUDO_QUEUE {
            return self.consume_replies(key, consume);
        }
        self.permit(key, Right::Read, &self.queue_named(&name))?;
        let id = self.find_open_queue(key, &name)?;
        let kind = self.queues.get(&id).map(|queue| queue.arguments.kind).unwrap_or_default();
        let named = self.queue_named(&name).to_string();
        let arguments = ConsumerArguments::read(&consume.arguments, &named, kind, self.limits.release)?;
        let priority = arguments.priority;
        if kind != QueueType::Classic && self.channel(key)?.ledger.has_limit() {
            return Err(Refusal::not_implemented(format_args!("{named} does not support global qos")));
        }
        let reading = self.begin_reading(key, id, consume.no_ack, &named, arguments)?;
        // To other queues every consumer is one among others.
        let exclusive = consume.exclusive && kind == QueueType::Classic;
        self.check_exclusive_use(id, exclusive)?;
        let tag = or_made_by_server(&consume.consumer_tag);
        let consumer = ConsumerId(self.new_id());
        let channel = self.channel_mut(key)?;
        let prefetch = channel.prefetch.into();
        channel.consumers.insert(tag.clone(), consumer);
        self.consumers.insert(
            consumer,
            Consumer {
                channel: key,
                tag: tag.clone(),
                queue: id,
                kind,
                reading,
                no_ack: consume.no_ack,
                priority,
                prefetch,
                unacked: 0,
                parked: None,
                served: 0,
            },
        );
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.add_consumer(consumer, priority);
            if exclusive {
                queue.consumers.set_exclusive(consumer);
            }
        }
        self.change_places(id);
        self.answer(key, consume.no_wait, BasicConsumeOk { consumer_tag: tag });
        self.dispatch(id);
        Ok(())
    }

    /// The single active consumer of a queue may have to make way, see `Consumers::change_places`.
    pub(super) fn change_places(&mut self, id: QueueId) -> bool {
        let consumers = &self.consumers;
        let unsettled = |id: ConsumerId| consumers.get(&id).map_or(0, |consumer| consumer.unacked);
        self.queues.get_mut(&id).is_some_and(|queue| queue.consumers.change_places(unsettled))
    }

    fn check_exclusive_use(&self, id: QueueId, exclusive: bool) -> Result<(), Refusal> {
        let Some(queue) = self.queues.get(&id) else { return Ok(()) };
        let taken = match queue.consumers.is_single() {
            true => exclusive,
            false => queue.consumers.has_active() || (exclusive && !queue.consumers.is_empty()),
        };
        if !taken {
            return Ok(());
        }
        Err(Refusal::access_refused(format_args!("{} in exclusive use", self.queue_named(&queue.name))))
    }

    fn consume_replies(&mut self, key: ChannelKey, consume: &BasicConsume) -> Result<(), Refusal> {
        if !consume.no_ack {
            return Err(Refusal::precondition_failed("reply consumer cannot acknowledge"));
        }
        let channel = self.channel_mut(key)?;
        if channel.reply.is_some() {
            return Err(Refusal::precondition_failed("reply consumer already set"));
        }
        let tag = or_made_by_server(&consume.consumer_tag);
        let suffix = new_suffix();
        channel.reply = Some(ReplyConsumer { tag: tag.clone(), suffix: suffix.clone() });
        self.repliers.insert(suffix, key);
        self.answer(key, consume.no_wait, BasicConsumeOk { consumer_tag: tag });
        Ok(())
    }

    pub(super) fn cancel(&mut self, key: ChannelKey, cancel: &BasicCancel) -> Result<(), Refusal> {
        let channel = self.channel_mut(key)?;
        let reply = channel.reply.take_if(|reply| reply.tag == cancel.consumer_tag);
        let consumer = if reply.is_none() { channel.consumers.remove(&cancel.consumer_tag) } else { None };
        if let Some(reply) = reply {
            self.repliers.remove(&reply.suffix);
        }
        self.answer(key, cancel.no_wait, BasicCancelOk { consumer_tag: cancel.consumer_tag.clone() });
        if let Some(queue) = consumer.and_then(|consumer| self.drop_consumer(consumer)) {
            self.end_if_done(queue);
            self.dispatch(queue);
        }
        Ok(())
    }

    /// Takes a consumer out of its queue; its unacked messages stay with the channel. Says which queue.
    pub(super) fn drop_consumer(&mut self, id: ConsumerId) -> Option<QueueId> {
        let consumer = self.consumers.remove(&id)?;
        if let Some(channel) = self.channels.get_mut(&consumer.channel) {
            channel.parked.remove(&(consumer.served, id));
        }
        let queue = self.queues.get_mut(&consumer.queue)?;
        queue.remove_consumer(id, consumer.priority);
        if let (Some(log), Some(reading)) = (&mut queue.log, &consumer.reading) {
            log.forget(reading.next, id);
        }
        self.watch_end(consumer.queue);
        Some(consumer.queue)
    }

    /// Takes a consumer away that its client has not cancelled, and tells the client. The queue may have gone already.
    pub(super) fn cancel_consumer(&mut self, id: ConsumerId) {
        let Some(consumer) = self.consumers.get(&id) else { return };
        let (key, consumer_tag) = (consumer.channel, consumer.tag.clone());
        self.drop_consumer(id);
        let Some(channel) = self.channels.get_mut(&key) else { return };
        channel.consumers.remove(&consumer_tag);
        if channel.wants_cancel {
            channel.outbox.push(channel.number, BasicCancel { consumer_tag, no_wait: true });
        }
    }

    /// Deletes a queue that goes with its last consumer, if that has gone.
    pub(super) fn end_if_done(&mut self, id: QueueId) {
        if self.queues.get(&id).is_some_and(|queue| queue.is_done()) {
            self.drop_queue(id);
        }
    }

    pub(super) fn get(&mut self, key: ChannelKey, get: &BasicGet) -> Result<(), Refusal> {
        let name = self.last_queue_for(key, &get.queue)?;
        self.permit(key, Right::Read, &self.queue_named(&name))?;
        let id = self.find_open_queue(key, &name)?;
        if self.queues.get(&id).is_some_and(|queue| queue.is_quorum() && queue.consumers.is_single()) {
            return Err(Refusal::resource_locked(format_args!(
                "cannot obtain access to locked {}. basic.get operations are not supported by quorum queues with single \
                 active consumer",
                self.queue_named(&name)
            )));
        }
        if self.is_stream(id) {
            let named = self.queue_named(&name);
            return Err(Refusal::not_implemented(format_args!("basic.get not supported by stream queues {named}")));
        }
        self.expire(id, Instant::now());
        let Some(queue) = self.queues.get_mut(&id) else { return Ok(()) };
        queue.last_used = Instant::now();
        let Some(entry) = queue.ready.pop() else {
            self.tell(key, BasicGetEmpty::default());
            return Ok(());
        };
        // What expired behind this message is not counted any more.
        if queue.ready.has_expiring_head() {
            self.expire(id, Instant::now());
        }
        let Some(queue) = self.queues.get_mut(&id) else { return Ok(()) };
        let message_count = wire_count(queue.ready.len());
        let delivery_count = queue.delivery_count(&entry, true);
        if !get.no_ack {
            queue.unacked += 1;
        }
        self.tell_confirms(key);
        let channel = self.channel_mut(key)?;
        let message = entry.message.clone();
        let found = BasicGetOk {
            delivery_tag: channel.ledger.next_tag(),
            redelivered: entry.redelivered,
            exchange: message.exchange.clone(),
            routing_key: message.routing_key.clone(),
            message_count,
        };
        let properties = message.properties_with(delivery_count);
        channel.outbox.push_content(channel.number, found, &properties, &message.body);
        if get.no_ack {
            channel.ledger.pass();
        } else {
            channel.ledger.enter(id, None, false, entry);
            self.watch_acks(key);
        }
        Ok(())
    }
}

fn or_made_by_server(tag: &ShortString) -> ShortString {
    if tag.is_empty() { server_name("amq.ctag") } else { tag.clone() }
}

fn reused(tag: &ShortString) -> Refusal {
    Refusal::not_allowed(format_args!("attempt to reuse consumer tag '{tag}'"))
}
