//! The queues beside that of a listener: those in which failed messages wait, and the one in which they end.

use std::time::Duration;

use super::RETRY;
use crate::connection::{Connection, expiring};
use crate::error::Result;
use crate::outcome::RetryPolicy;
use crate::topology::{Queue, QueueType};

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
    expiring(waiting, queue_type)
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
    connection.declare_or_use(|queue_type| dead(queue, queue_type), queue_type)?;
    let mut delays = policy.map_or_else(Vec::new, |policy| policy.delays().to_vec());
    delays.sort_unstable();
    delays.dedup();
    delays
        .into_iter()
        .try_for_each(|delay| connection.declare_or_use(|queue_type| waiting(queue, delay, queue_type), queue_type))
}
