//! What tests ask of a broker and do to it: this half is about exchanges, queues and messages.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::super::control::{Control, public_table};
use super::super::message::Message as Stored;
use super::super::vhost::{QueueFacts as Facts, VHost};
use crate::amqp::properties::Properties;
use crate::error::{Error, Result, counted};
use crate::field::FieldTable;
use crate::message::Message;

/// A queue, as the broker sees it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct QueueFacts {
    /// Its name.
    pub name: String,
    /// It outlives [`Control::restart`].
    pub durable: bool,
    /// It goes with its last consumer.
    pub auto_delete: bool,
    /// It belongs to one connection and goes with that.
    pub exclusive: bool,
    /// What it was declared with.
    pub arguments: FieldTable,
    /// Messages that wait for a consumer; of a stream, those it has.
    pub ready: usize,
    /// Messages delivered and not acknowledged.
    pub unacked: usize,
    /// How many consumers there are.
    pub consumers: usize,
}

/// An exchange, as the broker sees it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ExchangeFacts {
    /// Its name.
    pub name: String,
    /// `direct`, `fanout`, `topic`, `headers` or `x-consistent-hash`.
    pub kind: String,
    /// It outlives [`Control::restart`].
    pub durable: bool,
    /// It goes with its last binding.
    pub auto_delete: bool,
    /// Clients may not publish to it.
    pub internal: bool,
    /// What it was declared with.
    pub arguments: FieldTable,
}

/// A binding, as the broker sees it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BindingFacts {
    /// The exchange it leads from.
    pub source: String,
    /// The queue or exchange it leads to.
    pub destination: String,
    /// Whether that is a queue.
    pub to_queue: bool,
    /// Its routing key.
    pub routing_key: String,
    /// Its arguments.
    pub arguments: FieldTable,
}

/// A consumer, as the broker sees it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ConsumerFacts {
    /// What it consumes from.
    pub queue: String,
    /// Its consumer tag.
    pub tag: String,
    /// The name of its connection, as in [`ConnectionFacts`](super::ConnectionFacts).
    pub connection: String,
    /// The number of its channel.
    pub channel: u16,
    /// It does not acknowledge.
    pub no_ack: bool,
    /// How many messages it may have unacknowledged; 0 is no limit.
    pub prefetch: usize,
    /// Messages delivered to it and not acknowledged.
    pub unacked: usize,
}

/// Questions and mischief concern the virtual host `/`, unless [`in_vhost`](Control::in_vhost) has named another.
impl Control {
    /// The same broker, seen from another virtual host.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the broker has no virtual host of this name.
    pub fn in_vhost(&self, name: &str) -> Result<Control> {
        if !self.broker.vhosts.contains_key(name) {
            return Err(Error::invalid(format!("virtual host {name:?}"), "the broker was not started with it"));
        }
        let mut other = self.clone();
        other.vhost = name.to_owned();
        Ok(other)
    }

    /// `None` if the broker was started without `/` and no other has been named.
    fn host(&self) -> Option<&Arc<VHost>> {
        self.broker.vhosts.get(&self.vhost)
    }

    fn of_host<T: Default>(&self, ask: impl FnOnce(&VHost) -> T) -> T {
        self.host().map(|host| ask(host)).unwrap_or_default()
    }

    /// Every queue, by name.
    pub fn queues(&self) -> Vec<QueueFacts> {
        self.of_host(|host| host.queues().into_iter().map(public_facts).collect())
    }

    /// The queue of this name, `None` if there is none.
    pub fn queue(&self, name: &str) -> Option<QueueFacts> {
        self.host()?.queue(name).map(public_facts)
    }

    /// How many messages are ready in a queue or kept in a stream, 0 if there is no such queue.
    pub fn queue_len(&self, queue: &str) -> usize {
        self.queue(queue).map_or(0, |queue| queue.ready)
    }

    /// How many messages of a queue are delivered and not acknowledged, 0 if there is no such queue.
    pub fn queue_unacked(&self, queue: &str) -> usize {
        self.queue(queue).map_or(0, |queue| queue.unacked)
    }

    /// The messages ready in a queue, the next to be delivered first, or those of a stream, the oldest first. They stay there.
    pub fn messages(&self, queue: &str) -> Vec<Message> {
        let messages = self.host().and_then(|host| host.messages(queue)).unwrap_or_default();
        messages.iter().map(|message| public_message(message)).collect()
    }

    /// Every exchange, by name, but the nameless one.
    pub fn exchanges(&self) -> Vec<ExchangeFacts> {
        let public = |facts: super::super::vhost::ExchangeFacts| ExchangeFacts {
            name: facts.name,
            kind: facts.kind.to_owned(),
            durable: facts.durable,
            auto_delete: facts.auto_delete,
            internal: facts.internal,
            arguments: public_table(&facts.arguments),
        };
        self.of_host(|host| host.exchanges().into_iter().map(public).collect())
    }

    /// Every binding, by source and destination, but those of the nameless exchange.
    pub fn bindings(&self) -> Vec<BindingFacts> {
        let public = |facts: super::super::vhost::BindingFacts| BindingFacts {
            source: facts.source,
            destination: facts.destination,
            to_queue: facts.to_queue,
            routing_key: facts.routing_key,
            arguments: public_table(&facts.arguments),
        };
        self.of_host(|host| host.bindings().into_iter().map(public).collect())
    }

    /// Every consumer, in the order in which they came.
    pub fn consumers(&self) -> Vec<ConsumerFacts> {
        let sessions = self.broker.sessions();
        let public = |facts: super::super::vhost::ConsumerFacts| ConsumerFacts {
            connection: sessions
                .iter()
                .find(|session| session.id == facts.session)
                .map(|session| session.name.clone())
                .unwrap_or_default(),
            queue: facts.queue,
            tag: facts.tag,
            channel: facts.channel,
            no_ack: facts.no_ack,
            prefetch: facts.prefetch,
            unacked: facts.unacked,
        };
        self.of_host(|host| host.consumers().into_iter().map(public).collect())
    }

    /// How many channels are open.
    pub fn channel_count(&self) -> usize {
        self.of_host(VHost::channel_count)
    }

    /// Nacks the next `count` messages published on confirming channels. They reach no queue.
    pub fn nack_next(&self, count: usize) {
        self.of_host(|host| host.nack_next(count));
    }

    /// Sends every confirm so much later than it could, or with `None` at once again. Messages are in their queues even
    /// so. Confirms of messages published before are not affected.
    pub fn delay_confirms(&self, delay: Option<Duration>) {
        self.of_host(|host| host.delay_confirms(delay));
    }

    /// Sends no confirms; with `false` sends those that have been withheld, and all others, again.
    pub fn withhold_confirms(&self, withhold: bool) {
        self.of_host(|host| host.withhold_confirms(withhold));
    }

    /// Delivers from a queue at most one message per `every`, or with `None` as fast as consumers take them. Returns
    /// whether there is such a queue.
    pub fn deliver_slowly(&self, queue: &str, every: Option<Duration>) -> bool {
        self.of_host(|host| host.deliver_slowly(queue, every))
    }

    /// Cancels the consumers of a queue and tells their clients (`basic.cancel`), as RabbitMQ does when a queue fails.
    /// Returns how many there were.
    pub fn cancel_consumers(&self, queue: &str) -> usize {
        self.of_host(|host| host.cancel_consumers(queue))
    }

    /// Does to every virtual host what a restart does: connections are broken off; of queues and exchanges the durable
    /// ones are there afterwards, with the persistent messages in the former.
    pub fn restart(&self) {
        self.drop_connections();
        self.broker.vhosts.values().for_each(|host| host.restart());
        // Whoever has got in between has lost its channels without having been told.
        self.drop_connections();
    }

    /// Waits until exactly `len` messages are ready in a queue.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] with what there was instead.
    pub fn wait_for_queue_len(&self, queue: &str, len: usize, timeout: Duration) -> Result<()> {
        self.wait_until(
            timeout,
            |control| control.queue(queue).is_some_and(|queue| queue.ready == len),
            |control| match control.queue(queue) {
                Some(found) => format!(
                    "wait for {} in queue {queue:?} (there are {} ready, {} unacknowledged, {})",
                    counted(len, "message"),
                    found.ready,
                    found.unacked,
                    counted(found.consumers, "consumer")
                ),
                None => format!("wait for {} in queue {queue:?} (there is no such queue)", counted(len, "message")),
            },
        )
    }

    /// Waits until a queue has exactly `count` consumers.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] with what there was instead.
    pub fn wait_for_consumers(&self, queue: &str, count: usize, timeout: Duration) -> Result<()> {
        self.wait_until(
            timeout,
            |control| control.queue(queue).is_some_and(|queue| queue.consumers == count),
            |control| match control.queue(queue) {
                Some(found) => {
                    format!(
                        "wait for {} of queue {queue:?} (there are {})",
                        counted(count, "consumer"),
                        found.consumers
                    )
                }
                None => format!("wait for {} of queue {queue:?} (there is no such queue)", counted(count, "consumer")),
            },
        )
    }
}

fn public_facts(facts: Facts) -> QueueFacts {
    QueueFacts {
        name: facts.name,
        durable: facts.durable,
        auto_delete: facts.auto_delete,
        exclusive: facts.exclusive,
        arguments: public_table(&facts.arguments),
        ready: facts.ready,
        unacked: facts.unacked,
        consumers: facts.consumers,
    }
}

/// A stored message as the rest of the crate has it.
fn public_message(stored: &Stored) -> Message {
    let properties = Properties::decode(&stored.properties).unwrap_or_default();
    let mut message = Message::new(stored.body.to_vec());
    if !stored.persistent {
        message = message.transient();
    }
    macro_rules! texts {
        ($($field:ident => $with:ident),*) => {$(
            if let Some(value) = properties.$field {
                message = message.$with(value.to_string());
            }
        )*};
    }
    texts!(content_type => with_content_type, content_encoding => with_content_encoding,
        correlation_id => with_correlation_id, reply_to => with_reply_to, message_id => with_message_id,
        kind => with_kind, user_id => with_user_id, app_id => with_app_id, cluster_id => with_cluster_id);
    if let Some(headers) = properties.headers {
        message = message.with_headers(public_table(&headers));
    }
    if let Some(priority) = properties.priority {
        message = message.with_priority(priority);
    }
    // Published messages have an expiration that is a number; the engine refuses others.
    if let Some(millis) = properties.expiration.and_then(|text| text.text().parse().ok()) {
        message = message.with_expiration(Duration::from_millis(millis));
    }
    if let Some(at) = properties.timestamp.and_then(|at| UNIX_EPOCH.checked_add(Duration::from_secs(at))) {
        message = message.with_timestamp(at);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::EmbeddedBroker;
    use crate::{App, Queue, Settings};

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn what_a_test_can_see_and_wait_for() -> Result<()> {
        let broker = EmbeddedBroker::start()?;
        let control = broker.control();
        let app = App::from_settings(Settings::from_url(&broker.url())?)?;
        let connection = app.publish_pool().connection()?;
        connection.queue_declare(&Queue::new("orders"))?;
        let sent = Message::new("one").with_header("attempt", 1).with_priority(2).with_correlation_id("7");
        connection.publish("", "orders", sent.clone())?;
        connection.publish("", "orders", Message::new("two").transient())?;
        control.wait_for_queue_len("orders", 2, SOON)?;
        assert_eq!(control.messages("orders"), [sent, Message::new("two").transient()]);
        assert_eq!(control.queue_len("orders"), 2);
        assert_eq!(control.queues()[0].name, "orders");
        let error = control.wait_for_consumers("orders", 1, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("1 consumer of queue \"orders\" (there are 0)"), "{error}");
        let error = control.wait_for_queue_len("other", 1, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("no such queue"), "{error}");

        control.nack_next(1);
        assert!(matches!(connection.publish("", "orders", "three"), Err(Error::Nacked { .. })));
        control.restart();
        assert_eq!(control.messages("orders").len(), 1, "the transient message is gone");
        Ok(())
    }

    #[test]
    fn another_virtual_host_is_another_world() -> Result<()> {
        let broker = EmbeddedBroker::builder().vhost("other").start()?;
        let app = App::from_settings(Settings::from_url(&broker.url_for("other"))?)?;
        app.publish_pool().connection()?.queue_declare(&Queue::new("q"))?;
        assert!(broker.control().queues().is_empty());
        assert_eq!(broker.control().in_vhost("other")?.queues().len(), 1);
        assert!(broker.control().in_vhost("nowhere").is_err());
        Ok(())
    }
}
