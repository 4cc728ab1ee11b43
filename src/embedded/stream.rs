//! What a consumer of a stream is given: where it begins, which messages, and with which properties.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use super::message::{Message, PERSISTENT, set};
use super::release::Release;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

/// Where a consumer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Start {
    First,
    Last,
    #[default]
    Next,
    /// At this offset, which need not be there yet.
    At(u64),
    /// With what was written at this time or later, as [`millis`] has it.
    Since(u64),
}

/// The messages that a consumer wants, by their header `x-stream-filter-value`. RabbitMQ looks whether there may be one in
/// a chunk; here every message is a chunk of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    values: Vec<Vec<u8>>,
    /// Those without such a header as well.
    unfiltered: bool,
}

impl Filter {
    /// The filter in the arguments of a consumer. What is no text is no filter.
    pub(super) fn read(table: &Table) -> Option<Filter> {
        let text = |value: &Value| match value {
            Value::LongString(text) => Some(text.clone()),
            _ => None,
        };
        let values: Vec<Vec<u8>> = match table.get("x-stream-filter")? {
            Value::Array(values) => values.iter().filter_map(text).collect(),
            value => text(value).into_iter().collect(),
        };
        let unfiltered = table.get("x-stream-match-unfiltered") == Some(&Value::Bool(true));
        (!values.is_empty()).then_some(Filter { values, unfiltered })
    }

    /// Whether it lets a message pass.
    pub(super) fn wants(&self, message: &Message) -> bool {
        let headers = Properties::decode(&message.properties).ok().and_then(|properties| properties.headers);
        match headers.as_ref().and_then(|headers| headers.get("x-stream-filter-value")) {
            Some(Value::LongString(value)) => self.values.contains(value),
            _ => self.unfiltered,
        }
    }
}

/// A consumer of a stream and how far it has come.
#[derive(Debug)]
pub(super) struct Reading {
    /// The offset of the message that it is given next.
    pub(super) next: u64,
    pub(super) filter: Option<Filter>,
}

/// A moment in milliseconds since 1970.
pub(super) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The properties of a message with this offset in a stream. A stream keeps messages in the format of AMQP 1.0, which not all of
/// them survive.
pub(super) fn properties(message: &Message, offset: u64, release: Release) -> Cow<'_, [u8]> {
    // They were read when the message came, so they can be read.
    let Ok(mut properties) = Properties::decode(&message.properties) else { return Cow::Borrowed(&message.properties) };
    properties.cluster_id = None;
    if release.stream_writes_delivery_mode() {
        properties.delivery_mode = Some(if message.persistent { PERSISTENT } else { 1 });
    }
    let headers = properties.headers.get_or_insert_default();
    headers.0.retain(|(name, value)| {
        !matches!(value, Value::Table(_) | Value::Array(_))
            || release.stream_keeps_nested(&name.text(), message.has_died)
    });
    set(headers, "x-stream-offset", Value::I64(i64::try_from(offset).unwrap_or(i64::MAX)));
    Cow::Owned(properties.encode())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(headers: Table) -> Message {
        let properties = Properties {
            headers: Some(headers),
            cluster_id: Some("c".into()),
            expiration: Some("1".into()),
            ..Properties::default()
        };
        Message { properties: properties.encode().into(), ..Message::for_test() }
    }

    #[test]
    fn not_all_properties_survive() {
        let nested = || Value::Array(vec![Value::I32(1)]);
        let headers = ["CC", "a", "x-a", "x-death"]
            .into_iter()
            .fold(Table::default().with("b", Value::I32(2)), |headers, name| headers.with(name, nested()));
        let given = |message: &Message, release| Properties::decode(&properties(message, 7, release)).unwrap();
        let names = |properties: &Properties| -> Vec<String> {
            properties.headers.iter().flat_map(|headers| &headers.0).map(|(name, _)| name.to_string()).collect()
        };
        let mut message = message(headers);
        let of_4 = given(&message, Release::V4_0);
        assert_eq!(names(&of_4), ["CC", "b", "x-a", "x-stream-offset"]);
        assert_eq!((of_4.cluster_id, of_4.delivery_mode), (None, Some(1)));
        assert_eq!(of_4.expiration, Some("1".into()));
        let of_3 = given(&message, Release::V3_10);
        assert_eq!(names(&of_3), ["b", "x-stream-offset"]);
        assert_eq!((of_3.cluster_id, of_3.delivery_mode), (None, None));
        assert_eq!(of_3.headers.unwrap().get("x-stream-offset"), Some(&Value::I64(7)));
        message.has_died = true;
        assert!(names(&given(&message, Release::V4_0)).contains(&"x-death".to_owned()));
    }

    #[test]
    fn filters_by_a_header() {
        let of = |name: &str, value| Table::default().with(name, value);
        let message = |value: Option<&str>| {
            self::message(value.map_or_else(Table::default, |value| of("x-stream-filter-value", Value::text(value))))
        };
        let wanted = |filter: &Filter| [Some("a"), Some("b"), None].map(|value| filter.wants(&message(value)));
        let one = of("x-stream-filter", Value::text("a"));
        assert_eq!(wanted(&Filter::read(&one).unwrap()), [true, false, false]);
        let or_none = one.with("x-stream-match-unfiltered", Value::Bool(true));
        assert_eq!(wanted(&Filter::read(&or_none).unwrap()), [true, false, true]);
        let both = of("x-stream-filter", Value::Array(vec![Value::text("a"), Value::text("b")]));
        assert_eq!(wanted(&Filter::read(&both).unwrap()), [true, true, false]);
        for none in [of("x-stream-match-unfiltered", Value::Bool(true)), of("x-stream-filter", Value::I32(5))] {
            assert_eq!(Filter::read(&none), None);
        }
    }
}
