//! The `x-…` arguments of consumers: what they may be, by the type of the queue, and what they mean.

use std::time::{Duration, SystemTime};

use super::arguments::{age, boolean, integer, of_type, type_name, whole_number};
use super::queue_type::QueueType;
use super::refusal::Refusal;
use super::release::Release;
use super::stream::{Filter, Start, millis};
use crate::amqp::value::{Table, Value};

/// The arguments of a consumer, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ConsumerArguments {
    /// `x-priority`, 0 if it is not given.
    pub(super) priority: i64,
    /// Of a stream: where to begin.
    pub(super) start: Start,
    /// Of a stream: what of it to be given, if not all.
    pub(super) filter: Option<Filter>,
}

impl ConsumerArguments {
    /// Reads them, or refuses; `queue` is the queue as texts name it.
    pub(super) fn read(
        table: &Table,
        queue: &str,
        kind: QueueType,
        release: Release,
    ) -> Result<ConsumerArguments, Refusal> {
        let invalid = |name: &str, why: String| {
            Refusal::precondition_failed(format_args!("invalid arg '{name}' for {queue}: {why}"))
        };
        if kind == QueueType::Stream {
            let mut refused = vec!["x-priority"];
            if release.has_mirrored_queues() {
                refused.push("x-cancel-on-ha-failover");
            }
            refuse(table, &refused, queue, kind)?;
            let start = table.get("x-stream-offset").map_or(Ok(Start::Next), start);
            return Ok(ConsumerArguments {
                priority: 0,
                start: start.map_err(|why| invalid("x-stream-offset", why))?,
                filter: if release.has_stream_filters() { Filter::read(table) } else { None },
            });
        }
        let priority = table.get("x-priority").map_or(Ok(0), integer);
        let priority = priority.map_err(|why| invalid("x-priority", why))?;
        let mut refused = vec!["x-stream-offset"];
        if release.has_stream_filters() {
            refused.extend(["x-stream-filter", "x-stream-match-unfiltered"]);
        }
        if release.has_mirrored_queues() {
            if kind == QueueType::Quorum {
                refused.push("x-cancel-on-ha-failover");
            } else if let Some(value) = table.get("x-cancel-on-ha-failover") {
                boolean(value).map_err(|why| invalid("x-cancel-on-ha-failover", why))?;
            }
        }
        refuse(table, &refused, queue, kind)?;
        Ok(ConsumerArguments { priority, ..ConsumerArguments::default() })
    }
}

fn refuse(table: &Table, refused: &[&str], queue: &str, kind: QueueType) -> Result<(), Refusal> {
    match table.0.iter().find(|(name, _)| refused.iter().any(|other| name == other)) {
        None => Ok(()),
        Some((name, _)) => Err(of_type(&name.text(), queue, kind)),
    }
}

/// Where a consumer of a stream begins. A number below 0 is as good as 0.
fn start(value: &Value) -> Result<Start, String> {
    let refused = |shown: String| Err(format!("{{invalid_stream_offset_arg,{{{},{shown}}}}}", type_name(value)));
    match value {
        Value::LongString(text) => match &text[..] {
            b"first" => Ok(Start::First),
            b"last" => Ok(Start::Last),
            b"next" => Ok(Start::Next),
            text => match age(text) {
                Some(age) => Ok(Start::Since(before_now(age))),
                None => refused(format!("<<\"{}\">>", String::from_utf8_lossy(text))),
            },
        },
        Value::Timestamp(seconds) => Ok(Start::Since(seconds.saturating_mul(1000))),
        value => match whole_number(value) {
            Some(offset) => Ok(Start::At(u64::try_from(offset).unwrap_or(0))),
            None => refused("...".to_owned()),
        },
    }
}

fn before_now(age: Duration) -> u64 {
    SystemTime::now().checked_sub(age).map_or(0, millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: &str = "queue 's' in vhost '/'";

    fn read(name: &str, value: Value, release: Release) -> Result<ConsumerArguments, String> {
        let table = Table::default().with(name, value);
        ConsumerArguments::read(&table, QUEUE, QueueType::Stream, release).map_err(|refusal| refusal.text)
    }

    #[test]
    fn where_a_consumer_of_a_stream_begins() {
        let begins = |value| read("x-stream-offset", value, Release::V4_0).map(|arguments| arguments.start);
        for (value, start) in [
            (Value::text("first"), Start::First),
            (Value::text("last"), Start::Last),
            (Value::text("next"), Start::Next),
            (Value::I8(7), Start::At(7)),
            (Value::U8(7), Start::At(7)),
            (Value::I16(7), Start::At(7)),
            (Value::U16(7), Start::At(7)),
            (Value::I32(7), Start::At(7)),
            (Value::U32(7), Start::At(7)),
            (Value::I64(7), Start::At(7)),
            (Value::I64(-7), Start::At(0)),
            (Value::Timestamp(7), Start::Since(7000)),
            (Value::Timestamp(u64::MAX), Start::Since(u64::MAX)),
            (Value::text("99999999999Y"), Start::Since(0)),
        ] {
            assert_eq!(begins(value), Ok(start));
        }
        assert_eq!(ConsumerArguments::default().start, Start::Next);
        let hour = before_now(Duration::from_secs(3600));
        let Ok(Start::Since(since)) = begins(Value::text("1h")) else { panic!("no time") };
        assert!((hour..hour + 60_000).contains(&since));
        for (value, why) in [
            (Value::text("1x"), "{longstr,<<\"1x\">>}"),
            (Value::text(""), "{longstr,<<\"\">>}"),
            (Value::text("First"), "{longstr,<<\"First\">>}"),
            (Value::Bool(true), "{bool,...}"),
            (Value::F64(1.0), "{double,...}"),
        ] {
            let text = format!("invalid arg 'x-stream-offset' for {QUEUE}: {{invalid_stream_offset_arg,{why}}}");
            assert_eq!(begins(value), Err(format!("PRECONDITION_FAILED - {text}")));
        }
    }

    #[test]
    fn what_a_consumer_of_a_stream_cannot_have() {
        let text =
            format!("PRECONDITION_FAILED - invalid arg 'x-priority' for {QUEUE} of queue type rabbit_stream_queue");
        assert_eq!(read("x-priority", Value::text("high"), Release::V4_0), Err(text));
        assert!(read("x-cancel-on-ha-failover", Value::Bool(true), Release::V3_10).is_err());
        assert!(read("x-cancel-on-ha-failover", Value::Bool(true), Release::V4_0).is_ok());
        assert_eq!(read("x-stream-filter", Value::text("a"), Release::V3_10).unwrap().filter, None);
        assert!(read("x-stream-filter", Value::text("a"), Release::V4_0).unwrap().filter.is_some());
    }
}
