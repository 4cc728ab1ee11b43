//! The copy of a failed message: which headers it has, and how it is made to fit into a frame.
//!
//! All headers of a message go in one frame. A copy has more of them than its original, and the broker adds some of its own
//! when a message expires. What is of least use is left out first.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::connection::Received;
use crate::field::{FieldTable, FieldValue, table_len};
use crate::message::Message;

/// How often the message has been handled, without success.
const ATTEMPTS: &str = "coney-attempts";
/// Why it failed the last time, in the handler's words.
const ERROR: &str = "coney-error";
/// When, in seconds since 1970.
const FAILED_AT: &str = "coney-failed-at";
/// The queue it was handled from.
const QUEUE: &str = "coney-queue";
/// The exchange and routing key it was published with.
const EXCHANGE: &str = "coney-exchange";
const ROUTING_KEY: &str = "coney-routing-key";
/// The user it claims to come from, which only that user's connection may claim.
const USER_ID: &str = "coney-user-id";

/// Where the broker keeps what became of a message earlier, and where a copy keeps it
/// (<https://www.rabbitmq.com/docs/dlx#effects>).
const DEATHS: &str = "x-death";
const EARLIER_DEATHS: &str = "coney-x-death";

/// What else the broker adds to a message that it dead-letters: queue, exchange and reason of the first death and of the last.
const FIRST_DEATH: [&str; 3] = ["x-first-death-queue", "x-first-death-exchange", "x-first-death-reason"];
const LAST_DEATH: [&str; 3] = ["x-last-death-queue", "x-last-death-exchange", "x-last-death-reason"];

/// Headers by which the broker would send a copy elsewhere once more
/// (<https://www.rabbitmq.com/docs/sender-selected>).
const COPIES: [&str; 2] = ["CC", "BCC"];

/// The longest reason kept in a header, in bytes, and the shortest that is worth keeping.
const LONGEST_REASON: usize = 1024;
const SHORTEST_REASON: usize = 16;

/// What the broker adds to a message that expires in a queue, in bytes without the queue's name: an entry of `x-death` and
/// the headers about the first and the last death (measured on RabbitMQ 3.10: 224 bytes, without those about the last).
const DEATH: usize = 512;
/// How often the queue's name is in it: as queue and as routing key in the entry, and as the first and the last queue.
const NAMES: usize = 4;

/// How many bytes of headers the broker adds to a message that waits in `queue`.
pub(super) fn added_by_waiting(queue: &str) -> usize {
    DEATH + NAMES * queue.len()
}

/// How often this message has failed so far, at `queue`.
///
/// The count holds for a message that comes from a waiting queue. One that comes any other way begins anew, though its
/// headers may still have the count of an earlier life.
pub(crate) fn failures_of(received: &Received, queue: &str) -> u32 {
    if !has_waited(received, queue) {
        return 0;
    }
    let attempts = received.message().headers().get(ATTEMPTS).and_then(FieldValue::as_i64).unwrap_or(0);
    u32::try_from(attempts.max(0)).unwrap_or(u32::MAX)
}

/// Whether the last thing that befell this message was that it expired in a queue where messages of `queue` wait. The broker
/// puts the latest death first.
fn has_waited(received: &Received, queue: &str) -> bool {
    let Some(FieldValue::Array(deaths)) = received.message().headers().get(DEATHS) else { return false };
    let Some(FieldValue::Table(latest)) = deaths.first() else { return false };
    let text = |name| latest.get(name).and_then(FieldValue::as_str);
    text("reason") == Some("expired") && text("queue").is_some_and(|from| super::is_waiting_queue(from, queue))
}

/// Undoes the detour: a message that comes back from waiting, or straight from the dead, has the exchange and routing key it
/// was published with.
pub(crate) fn welcome_back(received: Received, queue: &str) -> Received {
    let headers = received.message().headers();
    // A program that publishes it anew by another way means that way.
    let came_straight = received.exchange().is_empty() && received.routing_key() == queue;
    let text = |name| headers.get(name).and_then(FieldValue::as_str).map(str::to_owned);
    // A handler of another queue may have passed it on, headers and all.
    let is_ours = text(QUEUE).is_none_or(|of| of == queue);
    if !headers.contains_key(ATTEMPTS) || !came_straight || !is_ours {
        return received;
    }
    match (text(EXCHANGE), text(ROUTING_KEY)) {
        (Some(exchange), Some(routing_key)) => received.by_way_of(&exchange, &routing_key),
        _ => received,
    }
}

/// A copy with a header frame of at most `room` bytes: the headers it came with, how often it has failed, and as much of the
/// rest as fits. `None` if not even the count does.
pub(super) fn of(received: &Received, queue: &str, attempts: u32, reason: &str, room: usize) -> Option<Message> {
    let (message, user) = publishable(received);
    let mut headers = message.headers().clone();
    COPIES.iter().for_each(|name| drop(headers.remove(*name)));
    [ERROR, FAILED_AT, QUEUE].iter().for_each(|name| drop(headers.remove(*name)));
    // The broker drops a message that expires where it has expired before, and waiting ends by expiring.
    let deaths = headers.remove(DEATHS).filter(|_| attempts == 1);
    // Waiting is no death that anybody has to know of.
    for death in [FIRST_DEATH, LAST_DEATH] {
        if headers.get(death[0]).and_then(FieldValue::as_str).is_some_and(|from| super::is_waiting_queue(from, queue)) {
            death.iter().for_each(|name| drop(headers.remove(*name)));
        }
    }
    headers.insert(ATTEMPTS.to_owned(), i64::from(attempts).into());
    headers.insert(EXCHANGE.to_owned(), received.exchange().into());
    headers.insert(ROUTING_KEY.to_owned(), received.routing_key().into());
    if let Some(user) = user {
        headers.insert(USER_ID.to_owned(), user.into());
    }

    let mut left = room.checked_sub(message.header_len_without_headers() + table_len(&headers))?;
    let mut add_if_it_fits = |name: &str, value: FieldValue| {
        let len = entry_len(name, &value);
        if len <= left {
            left -= len;
            headers.insert(name.to_owned(), value);
        }
        left
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    add_if_it_fits(FAILED_AT, FieldValue::Timestamp(now));
    let left_for_reason = add_if_it_fits(QUEUE, queue.into()).saturating_sub(entry_len(ERROR, &"".into()));
    if left_for_reason >= SHORTEST_REASON.min(reason.len()) {
        add_if_it_fits(ERROR, shortened(reason, left_for_reason.min(LONGEST_REASON)).into());
    }
    if let Some(deaths) = deaths {
        // An older history gives way to this one.
        if let Some(older) = headers.remove(EARLIER_DEATHS) {
            left += entry_len(EARLIER_DEATHS, &older);
        }
        if entry_len(EARLIER_DEATHS, &deaths) <= left {
            headers.insert(EARLIER_DEATHS.to_owned(), deaths);
        }
    }
    let copy = message.with_headers(headers);
    // Another program may have sent what RabbitMQ does not let through.
    copy.check(room).is_ok().then_some(copy)
}

/// A copy that says nothing of its failure, for a message whose own headers fill the frame of `room` bytes. Of those it loses
/// what the broker has added, and if that is not enough all of them: the body is worth more.
pub(super) fn bare(received: &Received, room: usize) -> Message {
    let (message, _) = publishable(received);
    let mut headers = message.headers().clone();
    COPIES.iter().for_each(|name| drop(headers.remove(*name)));
    let whole = message.clone().with_headers(headers.clone());
    if whole.check(room).is_ok() {
        return whole;
    }
    let of_broker = [DEATHS].into_iter().chain(FIRST_DEATH).chain(LAST_DEATH);
    of_broker.for_each(|name| drop(headers.remove(name)));
    let own = message.clone().with_headers(headers);
    if own.check(room).is_ok() { own } else { message.with_headers(FieldTable::new()) }
}

/// The message without what would have it expire or be refused, and the user it claims to come from.
fn publishable(received: &Received) -> (Message, Option<String>) {
    let mut message = received.message().clone().without_expiration();
    let user = message.take_user_id();
    (message, user)
}

/// How many bytes a header takes.
fn entry_len(name: &str, value: &FieldValue) -> usize {
    let table: FieldTable = [(name.to_owned(), value.clone())].into();
    table_len(&table) - table_len(&FieldTable::new())
}

/// As much of the reason as fits into so many bytes.
fn shortened(reason: &str, bytes: usize) -> &str {
    &reason[..reason.floor_char_boundary(bytes)]
}
