//! A message in a queue `NAME.dead`: what its headers say, and how it is put on its way again.
//!
//! The library puts messages there with headers of its own; a broker that dead-letters into such a queue with `x-death`
//! (<https://www.rabbitmq.com/docs/dlx#effects>).

use std::time::{Duration, UNIX_EPOCH};

use coney::{FieldTable, FieldValue, Message, Received};
use serde_json::{Value, json};

use crate::lines::{self, Line};
use crate::output::{beginning, count};

const ATTEMPTS: &str = "coney-attempts";
const ERROR: &str = "coney-error";
const FAILED_AT: &str = "coney-failed-at";
const QUEUE: &str = "coney-queue";
const EXCHANGE: &str = "coney-exchange";
const ROUTING_KEY: &str = "coney-routing-key";
const DEATHS: &str = "x-death";
const EARLIER_DEATHS: &str = "coney-x-death";

/// What the broker adds about the first and the last death, and what would send copies elsewhere.
const REMOVED: [&str; 11] = [
    ERROR,
    FAILED_AT,
    QUEUE,
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "CC",
    "BCC",
];

/// How much of a body is shown to people.
const SHOWN: usize = 60;

/// What is known of how a message died.
#[derive(Debug, PartialEq)]
pub struct Letter {
    pub reason: Option<String>,
    pub attempts: Option<i64>,
    /// Seconds since 1970.
    pub failed_at: Option<u64>,
    /// The queue it died in, as the broker says, or else as the headers claim, which anybody may have written.
    queue: Option<String>,
    /// As the broker says.
    died_in: Option<String>,
    exchange: String,
    routing_key: String,
}

impl Letter {
    pub fn of(received: &Received) -> Letter {
        let headers = received.message().headers();
        let own = |name| headers.get(name).and_then(FieldValue::as_str).map(str::to_owned);
        let death = last_death(headers);
        let of_death = |name: &str| death.and_then(|death| death.get(name));
        let text = |value: Option<&FieldValue>| value.and_then(FieldValue::as_str).map(str::to_owned);
        let routing_key = match of_death("routing-keys") {
            Some(FieldValue::Array(keys)) => text(keys.first()),
            _ => None,
        };
        let died_in = text(of_death("queue"));
        Letter {
            reason: own(ERROR).or_else(|| text(of_death("reason"))),
            attempts: headers.get(ATTEMPTS).and_then(FieldValue::as_i64),
            failed_at: match headers.get(FAILED_AT).or(of_death("time")) {
                Some(FieldValue::Timestamp(seconds)) => Some(*seconds),
                _ => None,
            },
            queue: died_in.clone().or_else(|| own(QUEUE)),
            died_in,
            exchange: own(EXCHANGE).or_else(|| text(of_death("exchange"))).unwrap_or(received.exchange().to_owned()),
            routing_key: own(ROUTING_KEY).or(routing_key).unwrap_or(received.routing_key().to_owned()),
        }
    }

    /// The queue to put it back to, of those in `dead`, which are the dead of `original`: that in which the broker has last
    /// found it dead, or else `original`. What else its headers say may be a stranger's, who would choose where it goes.
    pub fn home(&self, original: &str, dead: &str) -> String {
        let is_beside =
            |queue: &str| queue == dead || queue.strip_prefix(original).is_some_and(|rest| rest.starts_with(".retry."));
        self.died_in.clone().filter(|queue| !is_beside(queue)).unwrap_or_else(|| original.to_owned())
    }

    /// For people, in one line.
    pub fn to_line(&self, number: u64, received: &Received) -> String {
        let when = self.failed_at.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        let when =
            when.map_or("at an unknown time".to_owned(), |when| humantime::format_rfc3339_seconds(when).to_string());
        let attempts = match self.attempts {
            Some(1) => ", 1 attempt".to_owned(),
            Some(attempts) => format!(", {attempts} attempts"),
            None => String::new(),
        };
        let reason = self.reason.as_deref().unwrap_or("no reason given");
        let length = received.body().len() as u64;
        let text = match received.message().text() {
            None => "not text".to_owned(),
            // In quotes of its own, it would be hard to read.
            Some(text) if json_of(received).is_some() => beginning(text, SHOWN),
            Some(text) => format!("{:?}", beginning(text, SHOWN)),
        };
        let (exchange, key) = (&self.exchange, &self.routing_key);
        let line = format!(
            "{number}. {when}{attempts}, exchange {exchange:?}, key {key:?}, {} {text}: ",
            count(length, "byte")
        );
        line + &beginning(reason, 2 * SHOWN)
    }

    /// For machines. `message` is the whole of it; `body` is the body once more, as a value where it is JSON.
    pub fn to_json(&self, number: u64, received: &Received) -> Value {
        let body = json_of(received).or_else(|| received.message().text().map(Value::from));
        json!({
            "body": body,
            "number": number,
            "reason": self.reason,
            "attempts": self.attempts,
            "failed_at": self.failed_at,
            "queue": self.queue,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "message": Line::of(received),
        })
    }

    /// Whether the reason has this text in it, no matter in which case.
    pub fn has_reason(&self, text: &str) -> bool {
        self.reason.as_deref().unwrap_or("").to_lowercase().contains(&text.to_lowercase())
    }
}

/// The body, if it is JSON: an object or a list, for `7` and `null` may as well be text.
fn json_of(received: &Received) -> Option<Value> {
    serde_json::from_slice(received.body()).ok().filter(|value: &Value| value.is_object() || value.is_array())
}

/// The broker puts the latest first.
fn last_death(headers: &FieldTable) -> Option<&FieldTable> {
    match headers.get(DEATHS)? {
        FieldValue::Array(deaths) => match deaths.first()? {
            FieldValue::Table(death) => Some(death),
            _ => None,
        },
        _ => None,
    }
}

/// The message as it is to go back to its queue: as if it had never failed, whatever it went through before.
///
/// It goes by the default exchange, straight to the queue, so that no other queue gets it twice. Its own exchange and
/// routing key are in the headers from which a listener gives them back to it, beside a count of no attempts. A broker drops
/// a message that goes in a circle by its `x-death`, so this one starts anew too.
pub fn revived(received: &Received, letter: &Letter, user: &str) -> Message {
    let message = received.message();
    let mut headers = message.headers().clone();
    REMOVED.iter().for_each(|name| drop(headers.remove(*name)));
    headers.remove(DEATHS);
    if let Some(deaths) = headers.remove(EARLIER_DEATHS) {
        headers.insert(DEATHS.to_owned(), deaths);
    }
    headers.insert(ATTEMPTS.to_owned(), 0_i64.into());
    headers.insert(EXCHANGE.to_owned(), letter.exchange.as_str().into());
    headers.insert(ROUTING_KEY.to_owned(), letter.routing_key.as_str().into());
    lines::as_published_by(user, message).with_headers(headers)
}
