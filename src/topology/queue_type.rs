//! What kind of queue the broker makes of a declaration.

use std::fmt;
use std::str::FromStr;

use super::Queue;
use crate::error::Error;
use crate::field::FieldValue;

/// The argument that chooses it.
pub(crate) const QUEUE_TYPE: &str = "x-queue-type";

/// The kind of a queue (`x-queue-type`, <https://www.rabbitmq.com/docs/queues#optional-arguments>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QueueType {
    /// On one node. What a queue is where nothing else is said.
    Classic,
    /// Replicated over the nodes of a cluster (<https://www.rabbitmq.com/docs/quorum-queues>).
    Quorum,
    /// A log that is read without being used up (<https://www.rabbitmq.com/docs/streams>).
    Stream,
}

impl QueueType {
    /// The value on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            QueueType::Classic => "classic",
            QueueType::Quorum => "quorum",
            QueueType::Stream => "stream",
        }
    }
}

impl fmt::Display for QueueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for QueueType {
    type Err = Error;

    fn from_str(text: &str) -> Result<QueueType, Error> {
        let all = [QueueType::Classic, QueueType::Quorum, QueueType::Stream];
        let known = all.into_iter().find(|queue_type| queue_type.as_str() == text);
        known.ok_or_else(|| Error::invalid("queue type", "expected \"classic\", \"quorum\" or \"stream\""))
    }
}

impl Queue {
    /// The type that it is declared with; `None` where the broker decides.
    pub(crate) fn declared_type(&self) -> Option<QueueType> {
        self.arguments.get(QUEUE_TYPE).and_then(FieldValue::as_str)?.parse().ok()
    }
}
