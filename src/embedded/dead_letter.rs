//! What becomes of a message that dies in a queue: its history in `x-death`, and when it has been round once too often.
//! Pure; who asks for it publishes the outcome.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;

use super::arguments::{hash_value, same, whole_number};
use super::message::{Body, Message, set, sort};
use super::release::Release;
use crate::amqp::ShortString;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

/// Why a message left its queue unconsumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Rejected,
    Expired,
    MaxLength,
    /// It has come back to a quorum queue too often.
    DeliveryLimit,
}

impl Reason {
    pub(super) fn name(self) -> &'static str {
        match self {
            Reason::Rejected => "rejected",
            Reason::Expired => "expired",
            Reason::MaxLength => "maxlen",
            Reason::DeliveryLimit => "delivery_limit",
        }
    }
}

/// A death: where, when and why.
#[derive(Debug)]
pub(super) struct Death<'a> {
    pub(super) queue: &'a ShortString,
    pub(super) reason: Reason,
    /// Seconds since 1970.
    pub(super) time: u64,
    /// See [`Entry::failures`](super::queue::Entry::failures).
    pub(super) failures: u32,
}

/// The message as it goes on to `exchange`, by `key` or else by its own keys, with the death in its headers.
pub(super) fn bury(
    message: &Arc<Message>,
    mut properties: Properties,
    death: &Death<'_>,
    exchange: ShortString,
    key: Option<&[u8]>,
    release: Release,
) -> (Message, Properties) {
    let mut headers = properties.headers.take().unwrap_or_default();
    let record = record(message, &headers, properties.expiration.take(), death, release);
    note(&mut headers, record, death, message, release);
    let (routing_key, keys) = match key {
        Some(key) => {
            if release.dead_letter_key_removes_cc() {
                headers.0.retain(|(name, _)| name != "CC");
            }
            let is_long = key.len() > ShortString::MAX;
            (ShortString::new(key), is_long.then(|| Box::from([Box::from(key)])))
        }
        None => (message.routing_key.clone(), message.keys.clone()),
    };
    properties.headers = Some(headers);
    let buried = Message {
        exchange,
        routing_key,
        properties: properties.encode().into(),
        body: Body::of(message),
        keys,
        priority: message.priority,
        persistent: message.persistent,
        has_died: true,
        failures: death.failures,
    };
    (buried, properties)
}

/// One entry of `x-death`, as it stands the first time.
fn record(
    message: &Message,
    headers: &Table,
    expiration: Option<ShortString>,
    death: &Death<'_>,
    release: Release,
) -> Table {
    let mut keys = message.routing_keys();
    let own = Value::LongString(keys.next().unwrap_or_default().to_vec());
    // A dead letter may have the header still, and a key of its own.
    let copies = keys.next().map(|_| copied_to(headers)).into_iter().flatten();
    let keys = std::iter::once(own).chain(copies).collect();
    let expiration = expiration.map(|expiration| ("original-expiration".into(), long_string(&expiration)));
    let mut record = Table::default()
        .with("count", Value::I64(1))
        .with("reason", Value::text(death.reason.name()))
        .with("queue", long_string(death.queue))
        .with("time", Value::Timestamp(death.time))
        .with("exchange", long_string(&message.exchange))
        .with("routing-keys", Value::Array(keys));
    let at = if release.expiration_comes_first() { 0 } else { record.0.len() };
    record.0.splice(at..at, expiration);
    record
}

/// The keys in the header `CC`; those in `BCC` are known to nobody any more.
fn copied_to(headers: &Table) -> impl Iterator<Item = Value> {
    let keys = match headers.get("CC") {
        Some(Value::Array(keys)) => keys.as_slice(),
        _ => &[],
    };
    keys.iter().filter(|key| matches!(key, Value::LongString(_))).cloned()
}

/// Puts a death in front of those before it, or counts it there if queue and reason are known.
fn note(headers: &mut Table, record: Table, death: &Death<'_>, message: &Message, release: Release) {
    let is_own = message.has_died || release.takes_deaths_from_clients();
    let deaths = match headers.get("x-death").filter(|_| is_own) {
        None => {
            note_as("first", headers, death, &message.exchange);
            vec![Value::Table(record)]
        }
        Some(Value::Array(before)) => {
            let in_order = release.leaves_deaths_in_order();
            let before = if in_order { before.clone() } else { merged(before) };
            let (same, others): (Vec<Value>, Vec<Value>) = before.into_iter().partition(|other| is_death(other, death));
            let mut latest = match same.first() {
                Some(Value::Table(table)) => counted(table),
                _ => record,
            };
            if !in_order {
                sort(&mut latest);
            }
            std::iter::once(Value::Table(latest)).chain(others).collect()
        }
        Some(_) => vec![Value::Table(record)],
    };
    if release.notes_last_death() {
        note_as("last", headers, death, &message.exchange);
    }
    set(headers, "x-death", Value::Array(deaths));
}

/// The headers that name one death of all, which is the `first` or the `last`.
fn note_as(which: &str, headers: &mut Table, death: &Death<'_>, exchange: &ShortString) {
    set(headers, &format!("x-{which}-death-reason"), Value::text(death.reason.name()));
    set(headers, &format!("x-{which}-death-queue"), long_string(death.queue));
    set(headers, &format!("x-{which}-death-exchange"), long_string(exchange));
}

/// Earlier deaths with one entry for each queue and reason: the first of them, with a count if it had none; and turned
/// round.
fn merged(before: &[Value]) -> Vec<Value> {
    if before.len() < 2 {
        return before.to_vec();
    }
    let hashes = RandomState::new();
    let mut merged: Vec<(Value, i64)> = Vec::with_capacity(before.len());
    // Those with the same hash are compared, for they may differ all the same.
    let mut by_hash: HashMap<u64, Vec<usize>> = HashMap::with_capacity(before.len());
    for death in before {
        let alike = by_hash.entry(hash_of(&hashes, death)).or_default();
        match alike.iter().find(|&&at| is_same_death(&merged[at].0, death)) {
            Some(&at) => merged[at].1 += 1,
            None => {
                alike.push(merged.len());
                merged.push((death.clone(), 1));
            }
        }
    }
    let with_count = |(mut death, times)| {
        if let Value::Table(table) = &mut death
            && table.get("count").is_none()
        {
            table.0.insert(0, ("count".into(), Value::I64(times)));
        }
        death
    };
    merged.into_iter().rev().map(with_count).collect()
}

/// What tells deaths from each other.
const IDENTITY: [&str; 2] = ["queue", "reason"];

/// Equal for deaths that are the same.
fn hash_of(hashes: &RandomState, death: &Value) -> u64 {
    let mut hasher = hashes.build_hasher();
    if let Value::Table(table) = death {
        for name in IDENTITY {
            hash_value(table.get(name).unwrap_or(&Value::Void), &mut hasher);
        }
    }
    hasher.finish()
}

fn is_same_death(one: &Value, other: &Value) -> bool {
    let (Value::Table(one), Value::Table(other)) = (one, other) else { return false };
    IDENTITY.iter().all(|name| match (one.get(name), other.get(name)) {
        (Some(one), Some(other)) => same(one, other),
        (one, other) => one == other,
    })
}

/// A client may have written the table anew, with types of its own.
fn is_death(value: &Value, death: &Death<'_>) -> bool {
    let Value::Table(table) = value else { return false };
    let is = |name, wanted: &Value| table.get(name).is_some_and(|value| same(value, wanted));
    is("queue", &long_string(death.queue)) && is("reason", &Value::text(death.reason.name()))
}

fn counted(record: &Table) -> Table {
    let mut record = record.clone();
    match record.0.iter_mut().find(|(name, _)| name == "count") {
        Some((_, count)) => *count = Value::I64(whole_number(count).map_or(1, |count| count.saturating_add(1))),
        None => record.0.insert(0, ("count".into(), Value::I64(1))),
    }
    record
}

/// The queues that a message with these headers comes back to on its own: without a rejection since it was there last.
pub(super) fn cycles(headers: Option<&Table>) -> HashSet<&[u8]> {
    let Some(Value::Array(deaths)) = headers.and_then(|headers| headers.get("x-death")) else { return HashSet::new() };
    let rejected = Value::text(Reason::Rejected.name());
    let on_its_own = deaths.iter().map_while(|death| match death {
        Value::Table(death) if death.get("reason") != Some(&rejected) => Some(death),
        _ => None,
    });
    let queues = on_its_own.filter_map(|death| match death.get("queue") {
        Some(Value::LongString(queue)) => Some(queue.as_slice()),
        _ => None,
    });
    queues.collect()
}

fn long_string(text: &ShortString) -> Value {
    Value::LongString(text.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Release; 2] = [Release::V3_10, Release::V4_0];

    fn die(
        message: &Arc<Message>,
        queue: &str,
        reason: Reason,
        key: Option<&str>,
        release: Release,
    ) -> (Arc<Message>, Properties) {
        let properties = Properties::decode(&message.properties).unwrap();
        let death = Death { queue: &queue.into(), reason, time: 7, failures: 0 };
        let (buried, properties) = bury(message, properties, &death, "dlx".into(), key.map(str::as_bytes), release);
        (Arc::new(buried), properties)
    }

    fn deaths(properties: &Properties) -> Vec<(String, i64)> {
        let Some(Value::Array(deaths)) = properties.headers.as_ref().and_then(|headers| headers.get("x-death")) else {
            panic!("no x-death in {properties:?}");
        };
        let read = |death: &Value| {
            let Value::Table(table) = death else { panic!("{death:?}") };
            let (Some(Value::LongString(queue)), Some(&Value::I64(count))) = (table.get("queue"), table.get("count"))
            else {
                panic!("{table:?}")
            };
            (String::from_utf8_lossy(queue).into_owned(), count)
        };
        deaths.iter().map(read).collect()
    }

    fn message(properties: &Properties) -> Arc<Message> {
        Arc::new(message_with(properties))
    }

    fn message_with(properties: &Properties) -> Message {
        Message {
            exchange: "x".into(),
            routing_key: "k".into(),
            properties: properties.encode().into(),
            ..Message::for_test()
        }
    }

    fn published(cc: &str) -> Arc<Message> {
        let headers = Table::default().with("CC", Value::Array(vec![Value::text(cc)])).with("z", Value::Void);
        let living = Properties { headers: Some(headers), expiration: Some("50".into()), ..Properties::default() };
        let keys = [b"k"[..].into(), cc.as_bytes().into()];
        Arc::new(Message { keys: Some(keys.into()), ..message_with(&living) })
    }

    /// The fields of the first death of [`published`], but for the expiration.
    fn first_death() -> Table {
        Table::default()
            .with("count", Value::I64(1))
            .with("reason", Value::text("expired"))
            .with("queue", Value::text("q"))
            .with("time", Value::Timestamp(7))
            .with("exchange", Value::text("x"))
            .with("routing-keys", Value::Array(vec![Value::text("k"), Value::text("c")]))
    }

    #[test]
    fn the_first_death_has_headers_of_its_own() {
        let (buried, properties) = die(&published("c"), "q", Reason::Expired, Some("new"), Release::V3_10);
        assert_eq!((&buried.exchange, &buried.routing_key), (&"dlx".into(), &"new".into()));
        assert_eq!(properties.expiration, None);
        let record = first_death().with("original-expiration", Value::text("50"));
        let wanted = Table::default()
            .with("x-death", Value::Array(vec![Value::Table(record)]))
            .with("x-first-death-exchange", Value::text("x"))
            .with("x-first-death-queue", Value::text("q"))
            .with("x-first-death-reason", Value::text("expired"))
            .with("z", Value::Void);
        assert_eq!(properties.headers, Some(wanted));
    }

    #[test]
    fn newer_releases_name_the_last_death_and_leave_the_copies() {
        let (buried, properties) = die(&published("c"), "q", Reason::Expired, Some("new"), Release::V4_0);
        let mut record = Table::default().with("original-expiration", Value::text("50"));
        record.0.extend(first_death().0);
        let wanted = |deaths: Vec<Table>, last: &str, queue: &str, reason: &str| {
            Table::default()
                .with("CC", Value::Array(vec![Value::text("c")]))
                .with("x-death", Value::Array(deaths.into_iter().map(Value::Table).collect()))
                .with("x-first-death-exchange", Value::text("x"))
                .with("x-first-death-queue", Value::text("q"))
                .with("x-first-death-reason", Value::text("expired"))
                .with("x-last-death-exchange", Value::text(last))
                .with("x-last-death-queue", Value::text(queue))
                .with("x-last-death-reason", Value::text(reason))
                .with("z", Value::Void)
        };
        assert_eq!(properties.headers, Some(wanted(vec![record.clone()], "x", "q", "expired")));
        let (_, properties) = die(&buried, "other", Reason::Rejected, None, Release::V4_0);
        let second = Table::default()
            .with("count", Value::I64(1))
            .with("reason", Value::text("rejected"))
            .with("queue", Value::text("other"))
            .with("time", Value::Timestamp(7))
            .with("exchange", Value::text("dlx"))
            // It was not routed by the copies any more.
            .with("routing-keys", Value::Array(vec![Value::text("new")]));
        assert_eq!(properties.headers, Some(wanted(vec![second, record], "dlx", "other", "rejected")));
    }

    #[test]
    fn the_latest_death_comes_first_and_known_ones_are_counted() {
        for release in BOTH {
            let (one, _) = die(&message(&Properties::default()), "a", Reason::Expired, None, release);
            let (two, properties) = die(&one, "b", Reason::Rejected, None, release);
            assert_eq!(deaths(&properties), [("b".to_string(), 1), ("a".to_string(), 1)]);
            let (_, properties) = die(&two, "a", Reason::Expired, None, release);
            assert_eq!(deaths(&properties), [("a".to_string(), 2), ("b".to_string(), 1)]);
        }
    }

    #[test]
    fn deaths_that_a_client_has_made_up_count_in_older_releases_only() {
        let made_up = Table::default().with("queue", Value::text("q")).with("reason", Value::text("rejected"));
        let made_up = Value::Array(vec![Value::Table(made_up.with("count", Value::I64(5)))]);
        let headers = Table::default().with("x-death", made_up).with("x-first-death-queue", Value::text("mine"));
        let living = message(&Properties { headers: Some(headers), ..Properties::default() });
        for (release, count, first) in [(Release::V3_10, 6, "mine"), (Release::V4_0, 1, "q")] {
            let (_, properties) = die(&living, "q", Reason::Rejected, None, release);
            assert_eq!(deaths(&properties), [("q".to_string(), count)]);
            let headers = properties.headers.unwrap();
            assert_eq!(headers.get("x-first-death-queue"), Some(&Value::text(first)));
        }
    }

    #[test]
    fn only_a_loop_without_rejection_is_a_cycle() {
        let come_back_to = |properties: &Properties| -> Vec<String> {
            let queues = cycles(properties.headers.as_ref());
            let mut queues: Vec<_> = queues.into_iter().map(|queue| String::from_utf8_lossy(queue).into()).collect();
            queues.sort_unstable();
            queues
        };
        for release in BOTH {
            let (one, properties) = die(&message(&Properties::default()), "a", Reason::Expired, None, release);
            assert_eq!(come_back_to(&properties), ["a"]);
            let (two, _) = die(&one, "b", Reason::Rejected, None, release);
            let (_, properties) = die(&two, "a", Reason::Expired, None, release);
            assert_eq!(come_back_to(&properties), ["a"], "and not b");
        }
        assert!(cycles(None).is_empty());
    }
}
