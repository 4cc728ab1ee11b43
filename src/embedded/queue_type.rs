//! Classic queues, quorum queues and streams: which arguments each of them has.

use super::release::Release;
use crate::amqp::value::{Table, Value};

/// What counts when a classic queue is declared again. Other arguments may differ.
const COMPARED_OF_CLASSIC: [&str; 13] = [
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-queue-version",
    "x-single-active-consumer",
    "x-queue-type",
    "x-queue-master-locator",
];

/// The same of a quorum queue.
const COMPARED_OF_QUORUM: [&str; 14] = [
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-overflow",
    "x-single-active-consumer",
    "x-queue-type",
    "x-quorum-initial-group-size",
    "x-delivery-limit",
];

/// The same of a stream.
const COMPARED_OF_STREAM: [&str; 5] =
    ["x-max-length-bytes", "x-max-age", "x-stream-max-segment-size-bytes", "x-initial-cluster-size", "x-queue-type"];

/// Of quorum queues and streams; of classic ones in some releases.
const LEADER_LOCATOR: &str = "x-queue-leader-locator";

/// Arguments of quorum queues and streams, which a classic queue refuses.
const REFUSED_BY_CLASSIC: [&str; 8] = [
    "x-delivery-limit",
    "x-dead-letter-strategy",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-quorum-initial-group-size",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-initial-cluster-size",
];

/// Arguments of classic queues and streams, which a quorum queue refuses.
const REFUSED_BY_QUORUM: [&str; 7] = [
    "x-max-priority",
    "x-queue-mode",
    "x-queue-version",
    "x-queue-master-locator",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-initial-cluster-size",
];

/// Arguments of classic and quorum queues, which a stream refuses.
const REFUSED_BY_STREAM: [&str; 16] = [
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-max-length",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-queue-version",
    "x-queue-master-locator",
    "x-single-active-consumer",
    "x-quorum-initial-group-size",
    "x-delivery-limit",
];

/// What a queue is, as `x-queue-type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum QueueType {
    #[default]
    Classic,
    Quorum,
    Stream,
}

impl QueueType {
    /// Of a queue with these arguments, if it may be so.
    pub(super) fn of(table: &Table) -> QueueType {
        match table.get("x-queue-type") {
            Some(Value::LongString(name)) if name == b"quorum" => QueueType::Quorum,
            Some(Value::LongString(name)) if name == b"stream" => QueueType::Stream,
            _ => QueueType::Classic,
        }
    }

    /// As refusals name it.
    pub(super) fn module(self) -> &'static str {
        match self {
            QueueType::Classic => "rabbit_classic_queue",
            QueueType::Quorum => "rabbit_quorum_queue",
            QueueType::Stream => "rabbit_stream_queue",
        }
    }

    /// The arguments that count when it is declared again.
    pub(super) fn compared(self, release: Release) -> impl Iterator<Item = &'static str> {
        let (names, with_locator): (&[&str], bool) = match self {
            QueueType::Classic => (&COMPARED_OF_CLASSIC, release.classic_has_leader_locator()),
            QueueType::Quorum => (&COMPARED_OF_QUORUM, true),
            QueueType::Stream => (&COMPARED_OF_STREAM, true),
        };
        names.iter().copied().chain(with_locator.then_some(LEADER_LOCATOR))
    }

    /// Whether this is an argument of other types, which it refuses.
    pub(super) fn refuses(self, name: &str, release: Release) -> bool {
        match self {
            QueueType::Classic => {
                REFUSED_BY_CLASSIC.contains(&name) || name == LEADER_LOCATOR && !release.classic_has_leader_locator()
            }
            QueueType::Quorum => REFUSED_BY_QUORUM.contains(&name),
            QueueType::Stream => REFUSED_BY_STREAM.contains(&name),
        }
    }
}
