//! The queues beside that of a listener: those in which failed messages wait, and the one in which they end.

use std::time::Duration;

use super::RETRY;
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::outcome::RetryPolicy;
use crate::topology::{Overflow, QUEUE_TYPE, Queue, QueueType};

/// How a queue passes on what expires in it (<https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>).
const STRATEGY: &str = "x-dead-letter-strategy";
const OVERFLOW: &str = "x-overflow";

pub(super) fn retry_queue(queue: &str, delay_ms: u128) -> String {
    format!("{queue}{RETRY}{delay_ms}")
}

/// The queue in which messages of `queue` end that are given up.
pub(crate) fn dead_queue(queue: &str) -> String {
    format!("{queue}.dead")
}

fn waiting(queue: &str, delay: Duration, queue_type: QueueType) -> Queue {
    let waiting = Queue::new(retry_queue(queue, delay.as_millis()))
        .message_ttl(delay)
        .dead_letter_exchange("")
        .dead_letter_routing_key(queue);
    match queue_type {
        // What expires is kept until its own queue has confirmed it. The broker asks for this overflow beside the strategy.
        QueueType::Quorum => waiting.quorum().argument(STRATEGY, "at-least-once").overflow(Overflow::RejectPublish),
        QueueType::Classic | QueueType::Stream => waiting,
    }
}

fn dead(queue: &str, queue_type: QueueType) -> Queue {
    let dead = Queue::new(dead_queue(queue));
    if queue_type == QueueType::Quorum { dead.quorum() } else { dead }
}

/// Declares the queue of the dead, and those of a policy to wait in.
///
/// One that exists as another type is used as it is: it may have messages in it.
pub(crate) fn declare(
    connection: &Connection,
    queue: &str,
    policy: Option<&RetryPolicy>,
    queue_type: QueueType,
) -> Result<()> {
    declare_or_use(connection, |queue_type| dead(queue, queue_type), queue_type)?;
    let mut delays = policy.map_or_else(Vec::new, |policy| policy.delays().to_vec());
    delays.sort_unstable();
    delays.dedup();
    delays
        .into_iter()
        .try_for_each(|delay| declare_or_use(connection, |queue_type| waiting(queue, delay, queue_type), queue_type))
}

fn declare_or_use(connection: &Connection, queue: impl Fn(QueueType) -> Queue, queue_type: QueueType) -> Result<()> {
    let wanted = queue(queue_type);
    let Err(error) = connection.queue_declare(&wanted) else { return Ok(()) };
    let name = wanted.name.as_str();
    match refused_argument(&error) {
        Some(Refused::Different(QUEUE_TYPE | STRATEGY | OVERFLOW)) => {
            connection.queue_declare_passive(name)?;
            log::warn!(
                queue = name;
                "queue {name:?} exists and is not of type {queue_type}, as the queue that it serves; it is used as it is; \
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
            connection.queue_declare(&queue(QueueType::Classic)).map(drop)
        }
        _ => Err(error),
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
