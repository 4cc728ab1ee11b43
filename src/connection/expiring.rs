//! Queues in which messages wait until they expire and are passed on, declared as the broker can have them.

use super::Connection;
use crate::error::{Error, Result};
use crate::topology::{DeadLetterStrategy, Overflow, QUEUE_TYPE, Queue, QueueType};

/// How a queue passes on what expires in it (<https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>).
const STRATEGY: &str = "x-dead-letter-strategy";
const OVERFLOW: &str = "x-overflow";

/// A queue of this type. One of type quorum keeps what expires until the next queue has confirmed it.
pub(crate) fn expiring(queue: Queue, queue_type: QueueType) -> Queue {
    match queue_type {
        // The broker asks for this overflow beside the strategy.
        QueueType::Quorum => {
            queue.quorum().dead_letter_strategy(DeadLetterStrategy::AtLeastOnce).overflow(Overflow::RejectPublish)
        }
        QueueType::Classic | QueueType::Stream => queue,
    }
}

impl Connection {
    /// Declares a queue of a type. One that exists as another type is used as it is: it may have messages in it. One that the
    /// broker cannot have as a quorum queue is declared as a classic queue.
    pub(crate) fn declare_or_use(&self, queue: impl Fn(QueueType) -> Queue, queue_type: QueueType) -> Result<()> {
        let wanted = queue(queue_type);
        let Err(error) = self.queue_declare(&wanted) else { return Ok(()) };
        let name = wanted.name.as_str();
        match refused_argument(&error) {
            Some(Refused::Different(QUEUE_TYPE | STRATEGY | OVERFLOW)) => {
                self.queue_declare_passive(name)?;
                log::warn!(
                    queue = name;
                    "queue {name:?} exists and is not of type {queue_type}; it is used as it is; \
                     delete it once it is empty, and it is declared anew: {error}"
                );
                Ok(())
            }
            // Quorum queues have time-to-live since RabbitMQ 3.10.
            Some(Refused::Invalid) if queue_type == QueueType::Quorum => {
                log::warn!(
                    queue = name;
                    "queue {name:?} is declared as a classic queue, for the broker refuses a quorum queue like it: {error}"
                );
                self.queue_declare(&queue(QueueType::Classic)).map(drop)
            }
            _ => Err(error),
        }
    }
}

/// What is wrong with a declaration.
enum Refused<'e> {
    /// The queue exists, with another value of this argument.
    Different(&'e str),
    /// The broker does not know an argument, or not for queues of this type.
    Invalid,
}

fn refused_argument(error: &Error) -> Option<Refused<'_>> {
    let Error::ChannelClosed { code: 406, text, .. } = error else { return None };
    if text.contains("invalid arg '") {
        return Some(Refused::Invalid);
    }
    let (_, rest) = text.split_once("inequivalent arg '")?;
    rest.split('\'').next().map(Refused::Different)
}
