//! Declaring, binding, deleting and purging what a topology is made of.

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, QueueDeclareOptions, QueueDeleteOptions};

use super::Connection;
use crate::error::Result;
use crate::field::{FieldTable, FieldValue, check_queue_name, check_short_string, check_table};
use crate::topology::{Binding, Destination, Exchange, ExchangeKind, Queue};

/// What the broker says of a queue that it has declared or found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueInfo {
    /// The name, also where the broker has chosen it.
    pub name: String,
    /// Messages that wait for a consumer; those delivered and not yet acked do not count.
    pub message_count: u32,
    /// Consumers.
    pub consumer_count: u32,
}

impl QueueInfo {
    /// Of a queue that could not be declared.
    pub(super) fn of_nothing(name: &str) -> QueueInfo {
        QueueInfo { name: name.to_owned(), message_count: 0, consumer_count: 0 }
    }
}

/// Exchanges, queues and bindings.
///
/// Each call waits for the broker's answer, at most the pool's `operation_timeout`. What the broker refuses is
/// [`Error::ChannelClosed`](crate::Error::ChannelClosed) with its code and words: 403 where it is not allowed, 404 for
/// what does not exist, 405 for what another connection holds, 406 for what exists with other properties.
impl Connection {
    /// Declares an exchange, or makes sure that it exists with these properties.
    pub fn exchange_declare(&self, exchange: &Exchange) -> Result<()> {
        let Exchange { name, kind, durable, auto_delete, internal, arguments, on_conflict: _ } = exchange;
        check_names(&[("exchange name", name)], arguments)?;
        let kind = match kind {
            ExchangeKind::Direct => ExchangeType::Direct,
            ExchangeKind::Fanout => ExchangeType::Fanout,
            ExchangeKind::Topic => ExchangeType::Topic,
            ExchangeKind::Headers => ExchangeType::Headers,
            ExchangeKind::Custom(kind) => ExchangeType::Custom(kind.clone()),
        };
        let options = ExchangeDeclareOptions {
            durable: *durable,
            auto_delete: *auto_delete,
            internal: *internal,
            arguments: arguments_of(arguments),
        };
        self.administer(&|| format!("declare of exchange {name:?}"), |channel| {
            channel.exchange_declare(kind, name.as_str(), options).map(drop)
        })
    }

    /// Makes sure that an exchange exists, and creates nothing.
    ///
    /// # Errors
    ///
    /// 404 if it does not exist.
    pub fn exchange_declare_passive(&self, exchange: &str) -> Result<()> {
        check_names(&[("exchange name", exchange)], &FieldTable::new())?;
        self.administer(&|| format!("passive declare of exchange {exchange:?}"), |channel| {
            channel.exchange_declare_passive(exchange).map(drop)
        })
    }

    /// Deletes an exchange with its bindings; with `if_unused`, only if it has none. One that does not exist counts as
    /// deleted.
    pub fn exchange_delete(&self, exchange: &str, if_unused: bool) -> Result<()> {
        check_names(&[("exchange name", exchange)], &FieldTable::new())?;
        self.administer(&|| format!("delete of exchange {exchange:?}"), |channel| {
            channel.exchange_delete(exchange, if_unused)
        })
    }

    /// Passes messages of exchange `source` on to exchange `destination`, by routing key.
    ///
    /// For bindings with arguments see [`bind`](Connection::bind).
    pub fn exchange_bind(&self, destination: &str, source: &str, routing_key: &str) -> Result<()> {
        self.bind(&Binding::exchange(destination).to(source).routing_key(routing_key))
    }

    /// Undoes [`exchange_bind`](Connection::exchange_bind).
    pub fn exchange_unbind(&self, destination: &str, source: &str, routing_key: &str) -> Result<()> {
        self.unbind(&Binding::exchange(destination).to(source).routing_key(routing_key))
    }

    /// Declares a queue, or makes sure that it exists with these properties.
    pub fn queue_declare(&self, queue: &Queue) -> Result<QueueInfo> {
        let Queue { name, durable, exclusive, auto_delete, arguments, on_conflict: _ } = queue;
        check_names(&[("queue name", name)], arguments)?;
        let options = QueueDeclareOptions {
            durable: *durable,
            exclusive: *exclusive,
            auto_delete: *auto_delete,
            arguments: arguments_of(arguments),
        };
        self.administer(&|| format!("declare of queue {name:?}"), |channel| {
            channel.queue_declare(name.as_str(), options).map(queue_info)
        })
    }

    /// Makes sure that a queue exists, and creates nothing.
    ///
    /// # Errors
    ///
    /// 404 if it does not exist, 405 if it is another connection's exclusive queue.
    pub fn queue_declare_passive(&self, queue: &str) -> Result<QueueInfo> {
        check_queue_name(queue)?;
        self.administer(&|| format!("passive declare of queue {queue:?}"), |channel| {
            channel.queue_declare_passive(queue).map(queue_info)
        })
    }

    /// Passes messages of an exchange on to a queue, by routing key.
    ///
    /// For bindings with arguments see [`bind`](Connection::bind).
    pub fn queue_bind(&self, queue: &str, exchange: &str, routing_key: &str) -> Result<()> {
        self.bind(&Binding::queue(queue).to(exchange).routing_key(routing_key))
    }

    /// Undoes [`queue_bind`](Connection::queue_bind).
    pub fn queue_unbind(&self, queue: &str, exchange: &str, routing_key: &str) -> Result<()> {
        self.unbind(&Binding::queue(queue).to(exchange).routing_key(routing_key))
    }

    /// Makes a binding. One that exists already is left as it is.
    pub fn bind(&self, binding: &Binding) -> Result<()> {
        let Binding { source, destination, routing_key, arguments } = binding;
        check_binding(binding)?;
        let (source, key) = (source.as_str(), routing_key.as_str());
        let arguments = arguments_of(arguments);
        self.administer(&|| binding_text("bind", binding), |channel| match destination {
            Destination::Queue(queue) => channel.queue_bind(queue.as_str(), source, key, arguments),
            Destination::Exchange(exchange) => channel.exchange_bind(exchange.as_str(), source, key, arguments),
        })
    }

    /// Removes a binding. Routing key and arguments have to be those it was made with; one that does not exist counts
    /// as removed.
    pub fn unbind(&self, binding: &Binding) -> Result<()> {
        let Binding { source, destination, routing_key, arguments } = binding;
        check_binding(binding)?;
        let (source, key) = (source.as_str(), routing_key.as_str());
        let arguments = arguments_of(arguments);
        self.administer(&|| binding_text("unbind", binding), |channel| match destination {
            Destination::Queue(queue) => channel.queue_unbind(queue.as_str(), source, key, arguments),
            Destination::Exchange(exchange) => channel.exchange_unbind(exchange.as_str(), source, key, arguments),
        })
    }

    /// Drops all messages that wait in a queue and returns how many there were. Those delivered and not yet acked stay.
    pub fn queue_purge(&self, queue: &str) -> Result<u32> {
        check_queue_name(queue)?;
        self.administer(&|| format!("purge of queue {queue:?}"), |channel| channel.queue_purge(queue))
    }

    /// Deletes a queue with its messages and returns how many there were. One that does not exist counts as deleted.
    pub fn queue_delete(&self, queue: &str) -> Result<u32> {
        self.delete_queue(queue, false, false)
    }

    /// Deletes a queue if it has no consumers.
    ///
    /// # Errors
    ///
    /// 406 if it has.
    pub fn queue_delete_if_unused(&self, queue: &str) -> Result<u32> {
        self.delete_queue(queue, true, false)
    }

    /// Deletes a queue if it has no messages.
    ///
    /// # Errors
    ///
    /// 406 if it has.
    pub fn queue_delete_if_empty(&self, queue: &str) -> Result<()> {
        self.delete_queue(queue, false, true).map(drop)
    }

    fn delete_queue(&self, queue: &str, if_unused: bool, if_empty: bool) -> Result<u32> {
        check_queue_name(queue)?;
        self.administer(&|| format!("delete of queue {queue:?}"), |channel| {
            channel.queue_delete(queue, QueueDeleteOptions { if_unused, if_empty })
        })
    }
}

fn queue_info(queue: amiquip::Queue<'_>) -> QueueInfo {
    QueueInfo {
        name: queue.name().to_owned(),
        // Always given in answer to a declare that waits for one.
        message_count: queue.declared_message_count().unwrap_or(0),
        consumer_count: queue.declared_consumer_count().unwrap_or(0),
    }
}

fn check_names(names: &[(&str, &str)], arguments: &FieldTable) -> Result<()> {
    names.iter().try_for_each(|&(what, name)| check_short_string(|| what.to_owned(), name))?;
    check_table(arguments)
}

fn check_binding(binding: &Binding) -> Result<()> {
    match &binding.destination {
        Destination::Queue(queue) => check_queue_name(queue)?,
        Destination::Exchange(exchange) => check_short_string(|| "exchange name".to_owned(), exchange)?,
    }
    check_names(&[("exchange name", &binding.source), ("routing key", &binding.routing_key)], &binding.arguments)
}

pub(super) fn binding_text(what: &str, binding: &Binding) -> String {
    let (kind, destination) = match &binding.destination {
        Destination::Queue(queue) => ("queue", queue),
        Destination::Exchange(exchange) => ("exchange", exchange),
    };
    let Binding { source, routing_key, .. } = binding;
    format!("{what} of {kind} {destination:?} to exchange {source:?} with routing key {routing_key:?}")
}

/// Arguments as amiquip takes them.
pub(super) fn arguments_of(table: &FieldTable) -> amiquip::FieldTable {
    table.iter().map(|(name, value)| (name.clone(), argument(value))).collect()
}

fn argument(value: &FieldValue) -> AmqpValue {
    match value {
        FieldValue::Bool(value) => AmqpValue::Boolean(*value),
        FieldValue::I8(value) => AmqpValue::ShortShortInt(*value),
        FieldValue::U8(value) => AmqpValue::ShortShortUInt(*value),
        FieldValue::I16(value) => AmqpValue::ShortInt(*value),
        FieldValue::U16(value) => AmqpValue::ShortUInt(*value),
        FieldValue::I32(value) => AmqpValue::LongInt(*value),
        FieldValue::U32(value) => AmqpValue::LongUInt(*value),
        FieldValue::I64(value) => AmqpValue::LongLongInt(*value),
        FieldValue::F32(value) => AmqpValue::Float(*value),
        FieldValue::F64(value) => AmqpValue::Double(*value),
        FieldValue::Decimal { scale, value } => decimal(*scale, *value),
        FieldValue::String(value) => AmqpValue::LongString(value.clone()),
        FieldValue::Bytes(value) => AmqpValue::ByteArray(value.clone()),
        FieldValue::Timestamp(value) => AmqpValue::Timestamp(*value),
        FieldValue::Array(values) => AmqpValue::FieldArray(values.iter().map(argument).collect()),
        FieldValue::Table(table) => AmqpValue::FieldTable(arguments_of(table)),
        FieldValue::Void => AmqpValue::Void,
    }
}

/// amiquip does not export the type of its decimals, which can be read from JSON all the same.
fn decimal(scale: u8, value: u32) -> AmqpValue {
    let json = serde_json::json!({ "DecimalValue": { "scale": scale, "value": value } });
    serde_json::from_value(json).unwrap_or(AmqpValue::Void)
}

/// What amiquip has read, as fields.
#[cfg(feature = "unstable-amiquip")]
pub(super) fn fields_of(table: &amiquip::FieldTable) -> FieldTable {
    table.iter().map(|(name, value)| (name.clone(), field(value))).collect()
}

#[cfg(feature = "unstable-amiquip")]
fn field(value: &AmqpValue) -> FieldValue {
    match value {
        AmqpValue::Boolean(value) => FieldValue::Bool(*value),
        AmqpValue::ShortShortInt(value) => FieldValue::I8(*value),
        AmqpValue::ShortShortUInt(value) => FieldValue::U8(*value),
        AmqpValue::ShortInt(value) => FieldValue::I16(*value),
        AmqpValue::ShortUInt(value) => FieldValue::U16(*value),
        AmqpValue::LongInt(value) => FieldValue::I32(*value),
        AmqpValue::LongUInt(value) => FieldValue::U32(*value),
        AmqpValue::LongLongInt(value) => FieldValue::I64(*value),
        AmqpValue::Float(value) => FieldValue::F32(*value),
        AmqpValue::Double(value) => FieldValue::F64(*value),
        AmqpValue::DecimalValue(decimal) => FieldValue::Decimal { scale: decimal.scale, value: decimal.value },
        AmqpValue::LongString(value) => FieldValue::String(value.clone()),
        AmqpValue::ByteArray(value) => FieldValue::Bytes(value.clone()),
        AmqpValue::Timestamp(value) => FieldValue::Timestamp(*value),
        AmqpValue::FieldArray(values) => FieldValue::Array(values.iter().map(field).collect()),
        AmqpValue::FieldTable(table) => FieldValue::Table(fields_of(table)),
        AmqpValue::Void => FieldValue::Void,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decimal_is_one_to_amiquip_too() {
        assert_eq!(format!("{:?}", decimal(2, 314)), "DecimalValue(DecimalValue { scale: 2, value: 314 })");
    }
}
