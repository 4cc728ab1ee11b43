//! Carries out a [`RetryPolicy`]: the queues in which failed messages wait, and the one in which they end.
//!
//! A failed message is published to where it is to wait, confirmed, and only then acked where it came from, so that it
//! is at no time in neither place. It goes by the default exchange, which changes its exchange and routing key; those it
//! had are kept in its headers and given back to it when it returns.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::connection::Connection;
use crate::connection::Received;
use crate::error::Result;
use crate::field::FieldValue;
use crate::message::Message;
use crate::outcome::RetryPolicy;
use crate::topology::{Queue, Topology};

/// How often the message has been handled, without success.
pub(crate) const ATTEMPTS: &str = "coney-attempts";
/// Why it failed the last time, in the handler's words.
pub(crate) const ERROR: &str = "coney-error";
/// When, in seconds since 1970.
pub(crate) const FAILED_AT: &str = "coney-failed-at";
/// The queue it was handled from.
pub(crate) const QUEUE: &str = "coney-queue";
/// The exchange and routing key it was published with.
pub(crate) const EXCHANGE: &str = "coney-exchange";
pub(crate) const ROUTING_KEY: &str = "coney-routing-key";
/// The user it claims to come from, which only that user's connection may claim.
const USER_ID: &str = "coney-user-id";

/// Where the broker keeps what became of a message earlier, and where a copy keeps it
/// (<https://www.rabbitmq.com/docs/dlx#effects>).
const DEATHS: &str = "x-death";
const EARLIER_DEATHS: &str = "coney-x-death";

/// Longest reason kept in a header, in bytes: a header frame has room for 128 KiB of all headers together.
const LONGEST_REASON: usize = 1024;

/// Headers by which the broker would send a copy elsewhere once more
/// (<https://www.rabbitmq.com/docs/sender-selected>).
const COPIES: [&str; 2] = ["CC", "BCC"];

fn retry_queue(queue: &str, delay_ms: u128) -> String {
    format!("{queue}.retry.{delay_ms}")
}

/// The queue in which messages of `queue` end that are given up.
pub(crate) fn dead_queue(queue: &str) -> String {
    format!("{queue}.dead")
}

/// The queues that are needed beside `queue`: that of the dead, and those of a policy to wait in.
pub(crate) fn topology(queue: &str, policy: Option<&RetryPolicy>) -> Topology {
    let mut topology = Topology::new().queue(Queue::new(dead_queue(queue)));
    let mut delays = policy.map_or_else(Vec::new, |policy| policy.delays().to_vec());
    delays.sort_unstable();
    delays.dedup();
    for delay in delays {
        let waiting = Queue::new(retry_queue(queue, delay.as_millis()))
            .message_ttl(delay)
            .dead_letter_exchange("")
            .dead_letter_routing_key(queue);
        topology = topology.queue(waiting);
    }
    topology
}

/// How often this message has failed so far.
fn failures_of(received: &Received) -> u32 {
    let attempts = received.message().headers().get(ATTEMPTS).and_then(FieldValue::as_i64).unwrap_or(0);
    u32::try_from(attempts.max(0)).unwrap_or(u32::MAX)
}

/// Undoes the detour: a message that comes back from waiting has the exchange and routing key it was published with.
pub(crate) fn welcome_back(received: Received) -> Received {
    let headers = received.message().headers();
    if !headers.contains_key(ATTEMPTS) {
        return received;
    }
    let text = |name| headers.get(name).and_then(FieldValue::as_str).map(str::to_owned);
    match (text(EXCHANGE), text(ROUTING_KEY)) {
        (Some(exchange), Some(routing_key)) => received.by_way_of(&exchange, &routing_key),
        _ => received,
    }
}

/// Where a failed message has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gone {
    ToWait,
    ToTheDead,
}

/// Puts a copy of the message where it is to wait, or to the dead; the caller acks the original.
///
/// `policy` is `None` for a message that is not to be tried again.
pub(crate) fn put_away(
    connection: &Connection,
    queue: &str,
    policy: Option<&RetryPolicy>,
    received: &Received,
    reason: &str,
) -> Result<Gone> {
    let attempts = failures_of(received).saturating_add(1);
    let delay = policy.and_then(|policy| policy.delay_after(attempts));
    let (to, gone) = match delay {
        Some(delay) => (retry_queue(queue, delay.as_millis()), Gone::ToWait),
        None => (dead_queue(queue), Gone::ToTheDead),
    };
    connection.publish_copy("", &to, copy_of(received, queue, attempts, reason))?;
    Ok(gone)
}

fn copy_of(received: &Received, queue: &str, attempts: u32, reason: &str) -> Message {
    let mut message = received.message().clone().without_expiration();
    let mut headers = message.headers().clone();
    for copies in COPIES {
        headers.remove(copies);
    }
    // The broker drops a message that expires where it has expired before, and waiting ends by expiring.
    if let Some(deaths) = headers.remove(DEATHS)
        && attempts == 1
    {
        headers.insert(EARLIER_DEATHS.to_owned(), deaths);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    headers.insert(ATTEMPTS.to_owned(), i64::from(attempts).into());
    headers.insert(ERROR.to_owned(), shortened(reason).into());
    headers.insert(FAILED_AT.to_owned(), FieldValue::Timestamp(now));
    headers.insert(QUEUE.to_owned(), queue.into());
    headers.insert(EXCHANGE.to_owned(), received.exchange().into());
    headers.insert(ROUTING_KEY.to_owned(), received.routing_key().into());
    if let Some(user) = message.take_user_id() {
        headers.insert(USER_ID.to_owned(), user.into());
    }
    message.with_headers(headers)
}

fn shortened(reason: &str) -> &str {
    let mut end = reason.len().min(LONGEST_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}
