//! The optional arguments of queues and exchanges that RabbitMQ knows, with their units and where they are described.

use std::time::Duration;

use super::delivery_limit::DELIVERY_LIMIT;
use super::{Exchange, ExchangeKind, QUEUE_TYPE, Queue};

/// What a full queue does with the next message. See [`Queue::overflow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overflow {
    /// Drop or dead-letter the oldest message to make room: `drop-head`.
    DropHead,
    /// Refuse the new message, so that its publisher gets a nack: `reject-publish`.
    RejectPublish,
    /// Refuse the new message and dead-letter it too: `reject-publish-dlx`. Not for quorum queues.
    RejectPublishDlx,
}

impl Overflow {
    /// The value on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Overflow::DropHead => "drop-head",
            Overflow::RejectPublish => "reject-publish",
            Overflow::RejectPublishDlx => "reject-publish-dlx",
        }
    }
}

/// Where the leader of a replicated queue is placed. See [`Queue::leader_locator`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LeaderLocator {
    /// On the node that the declaring client is connected to.
    ClientLocal,
    /// Where there are the fewest, so that leaders are spread over the cluster.
    Balanced,
}

impl LeaderLocator {
    /// The value on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            LeaderLocator::ClientLocal => "client-local",
            LeaderLocator::Balanced => "balanced",
        }
    }
}

/// How a quorum queue passes dead letters on. See [`Queue::dead_letter_strategy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadLetterStrategy {
    /// A dead letter may be lost on its way.
    AtMostOnce,
    /// A dead letter stays until the queue that it goes to has confirmed it.
    AtLeastOnce,
}

impl DeadLetterStrategy {
    /// The value on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            DeadLetterStrategy::AtMostOnce => "at-most-once",
            DeadLetterStrategy::AtLeastOnce => "at-least-once",
        }
    }
}

impl Queue {
    /// Replicates the queue over the cluster (`x-queue-type = quorum`,
    /// <https://www.rabbitmq.com/docs/quorum-queues>). Defaults to a classic queue. A quorum queue must be durable
    /// and not exclusive.
    #[must_use]
    pub fn quorum(self) -> Queue {
        self.argument("x-queue-type", "quorum")
    }

    /// Makes it a stream: a log of messages that is read without being used up, by any number of consumers, each from where it likes
    /// (`x-queue-type = stream`, <https://www.rabbitmq.com/docs/streams>). Defaults to a classic queue. A stream must be durable, and
    /// neither exclusive nor deleted with its last consumer. It grows for ever unless [`max_age`](Queue::max_age) or
    /// [`max_length_bytes`](Queue::max_length_bytes) says how much of it is kept. To read it, see
    /// [`ListenerBuilder::offset`](crate::ListenerBuilder::offset).
    #[must_use]
    pub fn stream(self) -> Queue {
        self.argument(QUEUE_TYPE, "stream")
    }

    /// How old a segment of a stream may be, in whole seconds rounded down, before it is deleted (`x-max-age`,
    /// <https://www.rabbitmq.com/docs/streams#retention>). Defaults to for ever.
    #[must_use]
    pub fn max_age(self, age: Duration) -> Queue {
        self.argument("x-max-age", format!("{}s", age.as_secs()))
    }

    /// How large the files of a stream are, which are deleted as a whole (`x-stream-max-segment-size-bytes`,
    /// <https://www.rabbitmq.com/docs/streams#declaring>), up to 3 GB. Defaults to 500,000,000 bytes.
    #[must_use]
    pub fn max_segment_bytes(self, bytes: u64) -> Queue {
        self.argument("x-stream-max-segment-size-bytes", integer(bytes))
    }

    /// On which node of a cluster the leader of a quorum queue or stream is placed when it is declared
    /// (`x-queue-leader-locator`, <https://www.rabbitmq.com/docs/clustering#replica-placement>). Defaults to
    /// [`LeaderLocator::ClientLocal`].
    #[must_use]
    pub fn leader_locator(self, locator: LeaderLocator) -> Queue {
        self.argument("x-queue-leader-locator", locator.as_str())
    }

    /// How often a message may come back to a quorum queue, from 0; after that it is dropped, or dead-lettered where the queue has a
    /// dead letter exchange (`x-delivery-limit`, <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>).
    ///
    /// A message comes back when it is requeued, and when the connection that had it ends. Defaults to no limit on RabbitMQ 3, and
    /// to 20 on RabbitMQ 4; there [`without_delivery_limit`](Queue::without_delivery_limit) lifts it.
    #[must_use]
    pub fn delivery_limit(self, limit: u32) -> Queue {
        self.argument(DELIVERY_LIMIT, i64::from(limit))
    }

    /// Lets a message come back to a quorum queue any number of times, also on RabbitMQ 4 (`x-delivery-limit = -1`). On RabbitMQ 3,
    /// where there is no limit unless one is set, -1 is one: the first time is once too often.
    #[must_use]
    pub fn without_delivery_limit(self) -> Queue {
        self.argument(DELIVERY_LIMIT, -1)
    }

    /// How long a message may wait, in whole milliseconds rounded down, before it is dropped or dead-lettered
    /// (`x-message-ttl`, <https://www.rabbitmq.com/docs/ttl>). Defaults to for ever.
    #[must_use]
    pub fn message_ttl(self, ttl: Duration) -> Queue {
        self.argument("x-message-ttl", milliseconds(ttl))
    }

    /// How long the queue may go unused, in whole milliseconds rounded down and at least one, before the broker
    /// deletes it (`x-expires`, <https://www.rabbitmq.com/docs/ttl>). Defaults to for ever.
    #[must_use]
    pub fn expires(self, unused_for: Duration) -> Queue {
        self.argument("x-expires", milliseconds(unused_for))
    }

    /// How many ready messages the queue holds (`x-max-length`, <https://www.rabbitmq.com/docs/maxlength>).
    /// Defaults to no limit.
    #[must_use]
    pub fn max_length(self, messages: u64) -> Queue {
        self.argument("x-max-length", integer(messages))
    }

    /// How many bytes of ready message bodies the queue holds (`x-max-length-bytes`,
    /// <https://www.rabbitmq.com/docs/maxlength>). Defaults to no limit.
    #[must_use]
    pub fn max_length_bytes(self, bytes: u64) -> Queue {
        self.argument("x-max-length-bytes", integer(bytes))
    }

    /// What a full queue does with the next message (`x-overflow`, <https://www.rabbitmq.com/docs/maxlength>).
    /// Defaults to [`Overflow::DropHead`], which is the broker's default.
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Queue {
        self.argument("x-overflow", overflow.as_str())
    }

    /// The exchange that gets messages which are rejected, expire or overflow (`x-dead-letter-exchange`,
    /// <https://www.rabbitmq.com/docs/dlx>). Empty is the default exchange. Defaults to none: such messages are
    /// dropped.
    #[must_use]
    pub fn dead_letter_exchange(self, exchange: impl Into<String>) -> Queue {
        self.argument("x-dead-letter-exchange", exchange.into())
    }

    /// The routing key of dead-lettered messages (`x-dead-letter-routing-key`,
    /// <https://www.rabbitmq.com/docs/dlx>). Defaults to the one they came with.
    #[must_use]
    pub fn dead_letter_routing_key(self, routing_key: impl Into<String>) -> Queue {
        self.argument("x-dead-letter-routing-key", routing_key.into())
    }

    /// The highest message priority the queue tells apart, 0 to 255; RabbitMQ advises at most 10
    /// (`x-max-priority`, <https://www.rabbitmq.com/docs/priority>). Defaults to none: priorities are ignored.
    #[must_use]
    pub fn max_priority(self, priority: u8) -> Queue {
        self.argument("x-max-priority", i64::from(priority))
    }

    /// Delivers to one consumer at a time, the others standing by (`x-single-active-consumer`,
    /// <https://www.rabbitmq.com/docs/consumers#single-active-consumer>). Defaults to off.
    #[must_use]
    pub fn single_active_consumer(self) -> Queue {
        self.argument("x-single-active-consumer", true)
    }

    /// How a quorum queue passes dead letters on (`x-dead-letter-strategy`, RabbitMQ 3.10 and later,
    /// <https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>). Defaults to [`DeadLetterStrategy::AtMostOnce`].
    /// [`DeadLetterStrategy::AtLeastOnce`] needs [`Overflow::RejectPublish`].
    #[must_use]
    pub fn dead_letter_strategy(self, strategy: DeadLetterStrategy) -> Queue {
        self.argument("x-dead-letter-strategy", strategy.as_str())
    }

    /// On how many nodes a quorum queue is when it is declared (`x-quorum-initial-group-size`,
    /// <https://www.rabbitmq.com/docs/quorum-queues#replication-factor>). Defaults to 3, or to all nodes of a smaller cluster.
    #[must_use]
    pub fn quorum_initial_group_size(self, nodes: u32) -> Queue {
        self.argument("x-quorum-initial-group-size", i64::from(nodes))
    }

    /// On how many nodes the broker keeps a quorum queue by itself (`x-quorum-target-group-size`, RabbitMQ 3.13 and later,
    /// <https://www.rabbitmq.com/docs/quorum-queues#replica-reconciliation>). Defaults to the setting of the broker.
    #[must_use]
    pub fn quorum_target_group_size(self, nodes: u32) -> Queue {
        self.argument("x-quorum-target-group-size", i64::from(nodes))
    }

    /// How many messages of a quorum queue are kept in memory (`x-max-in-memory-length`), on RabbitMQ 3.9 and earlier; later ones
    /// take it and do nothing (<https://www.rabbitmq.com/docs/quorum-queues#memory-limit>). Defaults to no limit.
    #[must_use]
    pub fn max_in_memory_length(self, messages: u64) -> Queue {
        self.argument("x-max-in-memory-length", integer(messages))
    }

    /// The same in bytes of bodies (`x-max-in-memory-bytes`). Defaults to no limit.
    #[must_use]
    pub fn max_in_memory_bytes(self, bytes: u64) -> Queue {
        self.argument("x-max-in-memory-bytes", integer(bytes))
    }

    /// On how many nodes a stream is when it is declared (`x-initial-cluster-size`,
    /// <https://www.rabbitmq.com/docs/streams#replication-factor>). Defaults to all nodes of the cluster.
    #[must_use]
    pub fn initial_cluster_size(self, nodes: u32) -> Queue {
        self.argument("x-initial-cluster-size", i64::from(nodes))
    }

    /// How large the filter of each chunk of a stream is, 16 to 255 bytes (`x-stream-filter-size-bytes`, RabbitMQ 3.13 and later,
    /// <https://www.rabbitmq.com/docs/streams#filtering>). Defaults to 16.
    #[must_use]
    pub fn stream_filter_bytes(self, bytes: u8) -> Queue {
        self.argument("x-stream-filter-size-bytes", i64::from(bytes))
    }

    /// Keeps the messages of a classic queue on disk (`x-queue-mode = lazy`), on RabbitMQ 3.11 and earlier; later ones do so anyhow
    /// (<https://www.rabbitmq.com/docs/lazy-queues>). Defaults to off.
    #[must_use]
    pub fn lazy(self) -> Queue {
        self.argument("x-queue-mode", "lazy")
    }

    /// How a classic queue is stored, 1 or 2 (`x-queue-version`, RabbitMQ 3.10 and later,
    /// <https://www.rabbitmq.com/docs/persistence-conf#queue-version>). Defaults to 1 on RabbitMQ 3, and to 2 on RabbitMQ 4, which has
    /// no other.
    #[must_use]
    pub fn queue_version(self, version: u8) -> Queue {
        self.argument("x-queue-version", i64::from(version))
    }
}

impl Exchange {
    /// An exchange that spreads messages over its queues by the hash of their routing key, so that those of one key go to one queue
    /// (`x-consistent-hash`, <https://github.com/rabbitmq/rabbitmq-server/tree/main/deps/rabbitmq_consistent_hash_exchange>). The
    /// routing key of each binding is its weight, `"1"` for instance. The broker needs the plugin
    /// `rabbitmq_consistent_hash_exchange`.
    pub fn consistent_hash(name: impl Into<String>) -> Exchange {
        Exchange::new(name, ExchangeKind::Custom("x-consistent-hash".to_owned()))
    }

    /// Has a [consistent hash](Exchange::consistent_hash) exchange take this header in place of the routing key (`hash-header`).
    /// Defaults to the routing key.
    #[must_use]
    pub fn hash_header(self, header: impl Into<String>) -> Exchange {
        self.argument("hash-header", header.into())
    }

    /// Has a [consistent hash](Exchange::consistent_hash) exchange take this property in place of the routing key
    /// (`hash-property`): `message_id`, `correlation_id` or `timestamp`. Defaults to the routing key.
    #[must_use]
    pub fn hash_property(self, property: impl Into<String>) -> Exchange {
        self.argument("hash-property", property.into())
    }
}

/// The same integer type as a settings file gives, so that a queue declared from code and one declared from TOML
/// are the same to a broker that compares argument types.
fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::FieldValue;

    #[test]
    fn each_helper_sets_its_argument() {
        let (second, queue) = (Duration::from_secs(1), || Queue::new("q"));
        for (queue, name, value) in [
            (queue().quorum(), "x-queue-type", FieldValue::from("quorum")),
            (queue().stream(), "x-queue-type", "stream".into()),
            (queue().delivery_limit(3), "x-delivery-limit", 3_i64.into()),
            (queue().message_ttl(second), "x-message-ttl", 1000_i64.into()),
            (queue().expires(second), "x-expires", 1000_i64.into()),
            (queue().max_length(5), "x-max-length", 5_i64.into()),
            (queue().max_length_bytes(5), "x-max-length-bytes", 5_i64.into()),
            (queue().overflow(Overflow::RejectPublish), "x-overflow", "reject-publish".into()),
            (queue().dead_letter_exchange("x"), "x-dead-letter-exchange", "x".into()),
            (queue().dead_letter_routing_key("k"), "x-dead-letter-routing-key", "k".into()),
            (
                queue().dead_letter_strategy(DeadLetterStrategy::AtLeastOnce),
                "x-dead-letter-strategy",
                "at-least-once".into(),
            ),
            (queue().max_priority(9), "x-max-priority", 9_i64.into()),
            (queue().single_active_consumer(), "x-single-active-consumer", true.into()),
            (queue().leader_locator(LeaderLocator::Balanced), "x-queue-leader-locator", "balanced".into()),
            (queue().quorum_initial_group_size(3), "x-quorum-initial-group-size", 3_i64.into()),
            (queue().quorum_target_group_size(5), "x-quorum-target-group-size", 5_i64.into()),
            (queue().max_in_memory_length(5), "x-max-in-memory-length", 5_i64.into()),
            (queue().max_in_memory_bytes(5), "x-max-in-memory-bytes", 5_i64.into()),
            (queue().max_age(90 * second), "x-max-age", "90s".into()),
            (queue().max_segment_bytes(5), "x-stream-max-segment-size-bytes", 5_i64.into()),
            (queue().initial_cluster_size(3), "x-initial-cluster-size", 3_i64.into()),
            (queue().stream_filter_bytes(32), "x-stream-filter-size-bytes", 32_i64.into()),
            (queue().lazy(), "x-queue-mode", "lazy".into()),
            (queue().queue_version(2), "x-queue-version", 2_i64.into()),
        ] {
            assert_eq!(queue.arguments.into_iter().collect::<Vec<_>>(), [(name.to_owned(), value)]);
        }
        let exchange = Exchange::consistent_hash("x").hash_header("key");
        assert_eq!(exchange.kind.as_str(), "x-consistent-hash");
        assert_eq!(exchange.arguments["hash-header"], "key".into());
        assert_eq!(
            Exchange::consistent_hash("x").hash_property("message_id").arguments["hash-property"],
            "message_id".into()
        );
    }
}
