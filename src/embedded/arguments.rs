//! The `x-…` arguments of queues: what they may be, what they mean, and whether two declarations say the same.
//!
//! Checks and texts are those of RabbitMQ, in its order, since a client sees the first that fails.

use std::hash::{Hash as _, Hasher};
use std::sync::Arc;
use std::time::Duration;

use super::queue_type::QueueType;
use super::refusal::Refusal;
use super::release::Release;
use crate::amqp::ShortString;
use crate::amqp::value::{Table, Value};

/// RabbitMQ's longest time in an argument or an expiration: ten years, in milliseconds.
const LONGEST: i64 = 315_360_000_000;

/// RabbitMQ's largest segment of a stream, in bytes.
const LARGEST_SEGMENT: i64 = 3_000_000_000;

/// What a queue does with a message too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Overflow {
    /// Drops, or dead-letters, from the head.
    #[default]
    DropHead,
    /// Nacks the publish.
    Reject,
    /// Nacks the publish and dead-letters the message.
    RejectAndDeadLetter,
}

/// The arguments of a queue, read.
#[derive(Debug, Clone, Default)]
pub(super) struct QueueArguments {
    pub(super) kind: QueueType,
    pub(super) expires: Option<Duration>,
    pub(super) ttl: Option<Duration>,
    pub(super) dead_letter_exchange: Option<ShortString>,
    /// Of any length: it is only compared until there is a message to deliver.
    pub(super) dead_letter_key: Option<Arc<[u8]>>,
    pub(super) max_length: Option<usize>,
    pub(super) max_bytes: Option<usize>,
    pub(super) max_priority: u8,
    pub(super) overflow: Overflow,
    pub(super) single_active: bool,
    /// How often a message may come back to a quorum queue.
    pub(super) delivery_limit: Option<i64>,
    /// For how long a stream keeps messages at least.
    pub(super) max_age: Option<Duration>,
    /// When a segment of a stream is full.
    pub(super) segment_bytes: Option<usize>,
}

impl QueueArguments {
    /// Reads them, or refuses; `queue` is the queue as texts name it, `types` what it may be by `x-queue-type`.
    pub(super) fn read(
        table: &Table,
        queue: &str,
        types: &[&str],
        release: Release,
    ) -> Result<QueueArguments, Refusal> {
        let invalid = |name: &str, why: String| {
            Refusal::precondition_failed(format_args!("invalid arg '{name}' for {queue}: {why}"))
        };
        if let Some(value) = table.get("x-queue-type") {
            one_of(value, types, |text| format!("\"unsupported queue type '{text}'\""))
                .map_err(|why| invalid("x-queue-type", why))?;
        }
        let kind = QueueType::of(table);
        // What the type does not have is refused for that, whatever its value.
        let known = |name: &str| table.get(name).filter(|_| !kind.refuses(name, release));
        let check = |name: &'static str, check: fn(&Value, &Table) -> Result<(), String>| match known(name) {
            Some(value) => check(value, table).map_err(|why| invalid(name, why)),
            None => Ok(()),
        };
        check("x-expires", |value, _| match integer(value)? {
            0 => Err("{value_zero,0}".to_string()),
            number => expiry(number),
        })?;
        check("x-message-ttl", |value, _| expiry(integer(value)?))?;
        check("x-dead-letter-exchange", |value, _| text(value).map(drop))?;
        check("x-dead-letter-routing-key", |value, table| {
            text(value)?;
            match table.get("x-dead-letter-exchange") {
                Some(_) => Ok(()),
                None => Err("routing_key_but_no_dlx_defined".to_string()),
            }
        })?;
        check("x-dead-letter-strategy", |value, _| {
            one_of(value, &["at-most-once", "at-least-once"], |_| "invalid_dlx_strategy".to_string())
        })?;
        check("x-max-length", |value, _| natural(value).map(drop))?;
        check("x-max-length-bytes", |value, _| natural(value).map(drop))?;
        check("x-max-in-memory-length", |value, _| natural(value).map(drop))?;
        check("x-max-in-memory-bytes", |value, _| natural(value).map(drop))?;
        check("x-max-priority", |value, _| match natural(value)? {
            number if number > 255 => Err(format!("{{max_value_exceeded,{number}}}")),
            _ => Ok(()),
        })?;
        check("x-overflow", |value, _| {
            one_of(value, &["drop-head", "reject-publish", "reject-publish-dlx"], |_| "invalid_overflow".to_string())
        })?;
        check("x-queue-mode", |value, _| {
            one_of(value, &["default", "lazy"], |text| format!("\"unsupported queue mode '{text}'\""))
        })?;
        check("x-queue-version", |value, _| match natural(value)? {
            1 | 2 => Ok(()),
            number => Err(format!("\"unsupported queue version '{number}'\"")),
        })?;
        check("x-single-active-consumer", |value, _| boolean(value))?;
        check("x-quorum-initial-group-size", |value, _| match natural(value)? {
            0 => Err("{value_zero,0}".to_string()),
            _ => Ok(()),
        })?;
        check("x-max-age", |value, _| age(text(value)?).map(drop).ok_or_else(|| "invalid_max_age".to_string()))?;
        check("x-stream-max-segment-size-bytes", |value, _| natural(value).map(drop))?;
        check("x-initial-cluster-size", |value, _| match natural(value)? {
            0 => Err("{value_zero,0}".to_string()),
            _ => Ok(()),
        })?;
        check("x-queue-leader-locator", |value, _| {
            let locators = ["client-local", "balanced", "random", "least-leaders"];
            one_of(value, &locators, |_| "invalid_queue_locator_arg".to_string())
        })?;
        if let Some((name, _)) = table.0.iter().find(|(name, _)| kind.refuses(&name.text(), release)) {
            return Err(of_type(&name.text(), queue, kind));
        }
        Ok(QueueArguments::checked(table, kind, release))
    }

    fn checked(table: &Table, kind: QueueType, release: Release) -> QueueArguments {
        let number = |name| table.get(name).and_then(|value| integer(value).ok()).and_then(|n| u64::try_from(n).ok());
        let size = |name| number(name).and_then(|number| usize::try_from(number).ok());
        let bytes = |name| table.get(name).and_then(|value| text(value).ok());
        QueueArguments {
            kind,
            expires: number("x-expires").map(Duration::from_millis),
            ttl: number("x-message-ttl").map(Duration::from_millis),
            dead_letter_exchange: bytes("x-dead-letter-exchange").and_then(whole_name),
            dead_letter_key: bytes("x-dead-letter-routing-key").map(Arc::from),
            max_length: size("x-max-length"),
            max_bytes: size("x-max-length-bytes"),
            max_priority: number("x-max-priority").and_then(|number| u8::try_from(number).ok()).unwrap_or(0),
            overflow: match table.get("x-overflow") {
                Some(Value::LongString(mode)) if mode == b"reject-publish" => Overflow::Reject,
                // A quorum queue takes the word, and drops from the head.
                Some(Value::LongString(mode)) if mode == b"reject-publish-dlx" && kind == QueueType::Classic => {
                    Overflow::RejectAndDeadLetter
                }
                _ => Overflow::DropHead,
            },
            single_active: table.get("x-single-active-consumer") == Some(&Value::Bool(true)),
            // RabbitMQ takes any value. What is no number is a limit that is never reached.
            delivery_limit: release
                .delivery_limit(table.get("x-delivery-limit").map(|value| as_integer(value).unwrap_or(i64::MAX))),
            max_age: bytes("x-max-age").and_then(age),
            segment_bytes: size("x-stream-max-segment-size-bytes"),
        }
    }

    /// What is refused of a stream once everything else about it is well.
    pub(super) fn check_stream(table: &Table, release: Release) -> Result<(), Refusal> {
        let integer = |name| table.get(name).map(as_integer);
        if integer("x-stream-max-segment-size-bytes").flatten() > Some(LARGEST_SEGMENT) {
            return Err(Refusal::precondition_failed("Exceeded max value for x-stream-max-segment-size-bytes"));
        }
        match integer("x-stream-filter-size-bytes") {
            Some(size) if release.has_stream_filters() && !size.is_some_and(|size| (16..=255).contains(&size)) => {
                Err(Refusal::precondition_failed("Invalid value for  x-stream-filter-size-bytes"))
            }
            _ => Ok(()),
        }
    }
}

/// An argument that this type of queue does not have.
pub(super) fn of_type(name: &str, queue: &str, kind: QueueType) -> Refusal {
    Refusal::precondition_failed(format_args!("invalid arg '{name}' for {queue} of queue type {}", kind.module()))
}

/// A name in a table, which may be too long: then nothing has it.
pub(super) fn whole_name(bytes: &[u8]) -> Option<ShortString> {
    (bytes.len() <= ShortString::MAX).then(|| ShortString::new(bytes))
}

/// The name in an argument that must be an exchange's, `None` if it is not given.
pub(super) fn exchange_name(table: &Table, argument: &str, owner: &str) -> Result<Option<ShortString>, Refusal> {
    match table.get(argument) {
        None => Ok(None),
        Some(Value::LongString(name)) => Ok(Some(ShortString::new(name))),
        Some(other) => Err(Refusal::precondition_failed(format_args!(
            "invalid type '{}' for arg '{argument}' in {owner}",
            type_name(other)
        ))),
    }
}

/// Refuses a queue declared with other arguments than it has.
pub(super) fn same_queue_arguments(
    current: &Table,
    received: &Table,
    queue: &str,
    release: Release,
) -> Result<(), Refusal> {
    let mut compared = QueueType::of(current).compared(release);
    compared.try_for_each(|name| match name {
        "x-queue-type" if release.gives_every_queue_a_type() => {
            let classic = Value::text("classic");
            let [is, got] = [current, received].map(|table| shown(table.get(name).unwrap_or(&classic)));
            same_field(is, got, name, queue)
        }
        name => same_argument(current, received, name, queue),
    })
}

/// Refuses an argument that differs from what it is; types of integers may.
pub(super) fn same_argument(current: &Table, received: &Table, name: &str, owner: &str) -> Result<(), Refusal> {
    let classic = |value: Option<&Value>| name == "x-queue-type" && value == Some(&Value::text("classic"));
    match (current.get(name), received.get(name)) {
        (None, None) => Ok(()),
        (None, given) | (given, None) if classic(given) => Ok(()),
        (Some(is), Some(got)) if class_of(is) == class_of(got) && same(is, got) => Ok(()),
        (Some(is), Some(got)) => {
            Err(inequivalent(name, owner, format!("'{}'", shown(got)), format!("'{}'", shown(is))))
        }
        (is, got) => Err(inequivalent(name, owner, with_type(got), with_type(is))),
    }
}

/// Refuses a flag or a type that differs.
pub(super) fn same_field<T: PartialEq + std::fmt::Display>(
    current: T,
    received: T,
    name: &str,
    owner: &str,
) -> Result<(), Refusal> {
    if current == received {
        return Ok(());
    }
    Err(inequivalent(name, owner, format!("'{received}'"), format!("'{current}'")))
}

fn inequivalent(name: &str, owner: &str, received: String, current: String) -> Refusal {
    Refusal::precondition_failed(format_args!(
        "inequivalent arg '{name}' for {owner}: received {received} but current is {current}"
    ))
}

fn with_type(value: Option<&Value>) -> String {
    match value {
        None => "none".to_string(),
        Some(value) => format!("the value '{}' of type '{}'", shown(value), type_name(value)),
    }
}

/// A value as Erlang prints it.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::LongString(bytes) | Value::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::F32(value) => format!("{value:?}"),
        Value::F64(value) => format!("{value:?}"),
        Value::Decimal { scale, value } => format!("{{{scale},{value}}}"),
        Value::Timestamp(value) => value.to_string(),
        Value::Void => "undefined".to_string(),
        Value::Array(values) => format!("[{}]", values.iter().map(element).collect::<Vec<_>>().join(",")),
        Value::Table(table) => {
            let fields = table
                .0
                .iter()
                .map(|(name, value)| format!("{{<<\"{name}\">>,{},{}}}", type_name(value), quoted(value)));
            format!("[{}]", fields.collect::<Vec<_>>().join(","))
        }
        value => as_integer(value).map_or_else(String::new, |number| number.to_string()),
    }
}

fn element(value: &Value) -> String {
    format!("{{{},{}}}", type_name(value), quoted(value))
}

/// The same, with text as Erlang's binaries.
pub(super) fn quoted(value: &Value) -> String {
    match value {
        Value::LongString(_) | Value::Bytes(_) => format!("<<\"{}\">>", shown(value)),
        value => shown(value),
    }
}

/// RabbitMQ's name of a type.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "bool",
        Value::I8(_) => "byte",
        Value::U8(_) => "unsignedbyte",
        Value::I16(_) => "short",
        Value::U16(_) => "unsignedshort",
        Value::I32(_) => "signedint",
        Value::U32(_) => "unsignedint",
        Value::I64(_) => "long",
        Value::F32(_) => "float",
        Value::F64(_) => "double",
        Value::Decimal { .. } => "decimal",
        Value::LongString(_) => "longstr",
        Value::Array(_) => "array",
        Value::Timestamp(_) => "timestamp",
        Value::Table(_) => "table",
        Value::Void => "void",
        Value::Bytes(_) => "binary",
    }
}

/// Types that are as good as each other in a declaration.
fn class_of(value: &Value) -> &'static str {
    match value {
        value if as_integer(value).is_some() => "int",
        Value::F32(_) | Value::F64(_) => "float",
        value => type_name(value),
    }
}

fn as_integer(value: &Value) -> Option<i64> {
    Some(match *value {
        Value::I8(number) => number.into(),
        Value::U8(number) => number.into(),
        Value::I16(number) => number.into(),
        Value::U16(number) => number.into(),
        Value::I32(number) => number.into(),
        Value::U32(number) => number.into(),
        Value::I64(number) => number,
        _ => return None,
    })
}

/// The number in a value of any type that RabbitMQ reads as an integer: a time counts as one.
pub(super) fn whole_number(value: &Value) -> Option<i64> {
    match value {
        Value::Timestamp(number) => Some(i64::try_from(*number).unwrap_or(i64::MAX)),
        value => as_integer(value),
    }
}

/// Whether two values are the same, whatever the types of their numbers and strings: what a headers exchange asks.
pub(super) fn same(one: &Value, other: &Value) -> bool {
    let number = |value: &Value| match *value {
        Value::F32(number) => Some(f64::from(number)),
        Value::F64(number) => Some(number),
        _ => None,
    };
    let integer = |value: &Value| match value {
        Value::Timestamp(number) => Some(i128::from(*number)),
        value => as_integer(value).map(i128::from),
    };
    match (one, other) {
        (Value::LongString(one) | Value::Bytes(one), Value::LongString(other) | Value::Bytes(other)) => one == other,
        (one, other) => match (integer(one), integer(other), number(one), number(other)) {
            (Some(one), Some(other), ..) => one == other,
            (Some(one), _, _, Some(other)) | (_, Some(one), Some(other), _) => one as f64 == other,
            (_, _, Some(one), Some(other)) => one == other,
            _ => one == other,
        },
    }
}

/// Hashes a value so that those which are the [`same`] have the same hash.
pub(super) fn hash_value(value: &Value, hasher: &mut impl Hasher) {
    let number = match *value {
        // Of integers that are the same as one float, which may be several, the float is the same.
        Value::Timestamp(number) => Some(number as f64),
        Value::F32(number) => Some(number.into()),
        Value::F64(number) => Some(number),
        ref value => as_integer(value).map(|number| number as f64),
    };
    match (number, value) {
        // There are two zeros, which are the same.
        (Some(number), _) => (0_u8, (number + 0.0).to_bits()).hash(hasher),
        (None, Value::LongString(bytes) | Value::Bytes(bytes)) => (1_u8, bytes).hash(hasher),
        (None, Value::Bool(value)) => (2_u8, value).hash(hasher),
        (None, _) => 3_u8.hash(hasher),
    }
}

pub(super) fn integer(value: &Value) -> Result<i64, String> {
    as_integer(value).ok_or_else(|| format!("\"expected integer, got {}\"", type_name(value)))
}

pub(super) fn boolean(value: &Value) -> Result<(), String> {
    match value {
        Value::Bool(_) => Ok(()),
        other => Err(format!("{{unacceptable_type,{}}}", type_name(other))),
    }
}

fn natural(value: &Value) -> Result<i64, String> {
    match integer(value)? {
        number if number < 0 => Err(format!("{{value_negative,{number}}}")),
        number => Ok(number),
    }
}

/// A time as streams have it: a number above 0 and a unit, such as `7D`. A year has 365 days, and a month 30.
pub(super) fn age(text: &[u8]) -> Option<Duration> {
    let (unit, number) = text.split_last()?;
    let seconds = match unit {
        b'Y' => 365 * 86_400,
        b'M' => 30 * 86_400,
        b'D' => 86_400,
        b'h' => 3600,
        b'm' => 60,
        b's' => 1,
        _ => return None,
    };
    if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = number.iter().fold(0_u64, |sum, digit| sum.saturating_mul(10).saturating_add((digit - b'0').into()));
    (number > 0).then(|| Duration::from_secs(number.saturating_mul(seconds)))
}

/// A time in milliseconds that RabbitMQ accepts.
pub(super) fn expiry(number: i64) -> Result<(), String> {
    match number {
        ..0 => Err(format!("{{value_negative,{number}}}")),
        0..=LONGEST => Ok(()),
        _ => Err(format!("{{value_too_large,{number}}}")),
    }
}

fn text(value: &Value) -> Result<&[u8], String> {
    match value {
        Value::LongString(text) => Ok(text),
        other => Err(format!("{{unacceptable_type,{}}}", type_name(other))),
    }
}

fn one_of(value: &Value, choices: &[&str], refuse: impl Fn(&str) -> String) -> Result<(), String> {
    let text = String::from_utf8_lossy(text(value)?);
    if choices.contains(&text.as_ref()) { Ok(()) } else { Err(refuse(&text)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: &str = "queue 'q' in vhost '/'";

    fn refusal(name: &str, value: Value) -> String {
        let table = Table::default().with(name, value);
        QueueArguments::read(&table, QUEUE, &["classic"], Release::default()).unwrap_err().text
    }

    #[test]
    fn bad_arguments_in_rabbits_words() {
        for (name, value, why) in [
            ("x-message-ttl", Value::I32(-1), "{value_negative,-1}"),
            ("x-message-ttl", Value::text("a"), "\"expected integer, got longstr\""),
            ("x-expires", Value::U8(0), "{value_zero,0}"),
            ("x-expires", Value::I64(LONGEST + 1), "{value_too_large,315360000001}"),
            ("x-max-priority", Value::I16(256), "{max_value_exceeded,256}"),
            ("x-dead-letter-routing-key", Value::text("k"), "routing_key_but_no_dlx_defined"),
            ("x-overflow", Value::text("x"), "invalid_overflow"),
            ("x-queue-type", Value::text("x"), "\"unsupported queue type 'x'\""),
            ("x-single-active-consumer", Value::I8(1), "{unacceptable_type,byte}"),
        ] {
            let wanted = format!("PRECONDITION_FAILED - invalid arg '{name}' for {QUEUE}: {why}");
            assert_eq!(refusal(name, value), wanted);
        }
    }

    #[test]
    fn the_type_of_an_integer_does_not_matter() {
        let current = Table::default().with("x-message-ttl", Value::I32(1000));
        let same_number = Table::default().with("x-message-ttl", Value::I64(1000)).with("x-other", Value::Void);
        assert_eq!(same_queue_arguments(&current, &same_number, QUEUE, Release::default()), Ok(()));
        let text = same_queue_arguments(&current, &Table::default(), QUEUE, Release::default()).unwrap_err().text;
        assert!(text.ends_with("received none but current is the value '1000' of type 'signedint'"), "{text}");
        let other = Table::default().with("x-message-ttl", Value::I32(5));
        let text = same_queue_arguments(&current, &other, QUEUE, Release::default()).unwrap_err().text;
        assert!(text.ends_with("received '5' but current is '1000'"), "{text}");
    }

    #[test]
    fn ages_are_numbers_with_a_unit() {
        let of = |text: &str| age(text.as_bytes()).map(|age| age.as_secs());
        assert_eq!(
            [of("1Y"), of("2M"), of("7D"), of("1h"), of("5m"), of("30s")].map(Option::unwrap),
            [31_536_000, 5_184_000, 604_800, 3600, 300, 30]
        );
        for wrong in ["", "h", "7", "0s", "1x", "1 h", "1.5h", "-1h", "+1h", "1h ", "7d"] {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
        assert_eq!(of("99999999999999999999999Y"), Some(u64::MAX));
    }

    #[test]
    fn classic_is_as_good_as_nothing() {
        let classic = Table::default().with("x-queue-type", Value::text("classic"));
        assert_eq!(same_queue_arguments(&classic, &Table::default(), QUEUE, Release::default()), Ok(()));
        assert_eq!(same_queue_arguments(&Table::default(), &classic, QUEUE, Release::default()), Ok(()));
    }
}
