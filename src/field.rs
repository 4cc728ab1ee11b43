//! AMQP field tables: the headers of a message, the arguments of a declaration; what of them fits on the wire, and
//! their form in amiquip.

use std::collections::BTreeMap;

use amiquip::AmqpValue;
use amq_protocol::types::DecimalValue;

use crate::error::{Error, Result};

/// Longest short string in bytes: AMQP 0-9-1 writes its length in one octet (section 4.2.5.3).
const SHORT_STRING_MAX: usize = 255;

/// Levels of tables and lists in one another, the outermost table included. Encoding and decoding below us recurse.
pub(crate) const DEPTH_MAX: usize = 32;

/// Names and values: message headers, or the `x-…` arguments of queues, exchanges, bindings and consumers.
///
/// Names are at most 255 bytes long. Tables and lists are at most 32 levels deep, the outermost table included.
///
/// In a message from another program that has gone beyond this, or beyond UTF-8, a value that is nested deeper arrives as
/// [`FieldValue::Bytes`], encoded as it came; text that is not UTF-8 arrives as [`FieldValue::Bytes`] too; in names, and in
/// the properties of the message, `?` stands for each byte that is not UTF-8.
pub type FieldTable = BTreeMap<String, FieldValue>;

/// A value in a [`FieldTable`], one variant for each type that RabbitMQ and AMQP 0-9-1 share.
///
/// See the [table of field types](https://www.rabbitmq.com/amqp-0-9-1-errata#section_3) for the tags on the wire.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum FieldValue {
    /// Boolean, `t`.
    Bool(bool),
    /// Signed 8 bits, `b`.
    I8(i8),
    /// Unsigned 8 bits, `B`.
    U8(u8),
    /// Signed 16 bits, `s`.
    I16(i16),
    /// Unsigned 16 bits, `u`.
    U16(u16),
    /// Signed 32 bits, `I`.
    I32(i32),
    /// Unsigned 32 bits, `i`.
    U32(u32),
    /// Signed 64 bits, `l`.
    I64(i64),
    /// IEEE 754 single, `f`.
    F32(f32),
    /// IEEE 754 double, `d`.
    F64(f64),
    /// `value` with `scale` digits after the point, `D`.
    Decimal {
        /// Digits after the decimal point.
        scale: u8,
        /// The digits.
        value: u32,
    },
    /// UTF-8 text, `S`.
    String(String),
    /// Bytes, `x`.
    Bytes(Vec<u8>),
    /// Seconds since 1970 in UTC, `T`.
    Timestamp(u64),
    /// A list, `A`.
    Array(Vec<FieldValue>),
    /// A nested table, `F`.
    Table(FieldTable),
    /// Nothing, `V`.
    Void,
}

impl FieldValue {
    /// The text, if this is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            FieldValue::String(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if this is an integer of any width.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            FieldValue::I8(n) => Some(n.into()),
            FieldValue::U8(n) => Some(n.into()),
            FieldValue::I16(n) => Some(n.into()),
            FieldValue::U16(n) => Some(n.into()),
            FieldValue::I32(n) => Some(n.into()),
            FieldValue::U32(n) => Some(n.into()),
            FieldValue::I64(n) => Some(n),
            _ => None,
        }
    }
}

macro_rules! from {
    ($($from:ty => $variant:ident),* $(,)?) => {$(
        impl From<$from> for FieldValue {
            fn from(value: $from) -> FieldValue {
                FieldValue::$variant(value.into())
            }
        }
    )*};
}

from! {
    bool => Bool, i8 => I8, u8 => U8, i16 => I16, u16 => U16, i32 => I32, u32 => U32, i64 => I64, f32 => F32,
    f64 => F64, &str => String, String => String, Vec<u8> => Bytes, Vec<FieldValue> => Array, FieldTable => Table,
}

/// Refuses a name that does not fit AMQP's short string.
pub(crate) fn check_short_string(what: impl FnOnce() -> String, value: &str) -> Result<()> {
    if value.len() > SHORT_STRING_MAX {
        return Err(Error::invalid(
            what(),
            format!("{} bytes long, expected at most {SHORT_STRING_MAX} (AMQP short string)", value.len()),
        ));
    }
    Ok(())
}

/// Refuses tables whose names do not fit AMQP's short string, at any depth, and what is nested too deep.
pub(crate) fn check_table(table: &FieldTable) -> Result<()> {
    check_level(table, 1)
}

fn check_level(table: &FieldTable, level: usize) -> Result<()> {
    table.iter().try_for_each(|(name, value)| {
        check_short_string(|| format!("field name {:?}…", name.chars().take(40).collect::<String>()), name)?;
        check_value(value, level)
    })
}

fn check_value(value: &FieldValue, level: usize) -> Result<()> {
    match value {
        FieldValue::Table(_) | FieldValue::Array(_) if level == DEPTH_MAX => {
            Err(Error::invalid("fields", format!("nested deeper than {DEPTH_MAX} levels, which is more than is read")))
        }
        FieldValue::Table(table) => check_level(table, level + 1),
        FieldValue::Array(values) => values.iter().try_for_each(|value| check_value(value, level + 1)),
        _ => Ok(()),
    }
}

/// Encoded length in bytes, its own length field included.
pub(crate) fn table_len(table: &FieldTable) -> usize {
    4 + table.iter().map(|(name, value)| 1 + name.len() + value_len(value)).sum::<usize>()
}

/// Encoded length in bytes, the type octet included.
fn value_len(value: &FieldValue) -> usize {
    1 + match value {
        FieldValue::Void => 0,
        FieldValue::Bool(_) | FieldValue::I8(_) | FieldValue::U8(_) => 1,
        FieldValue::I16(_) | FieldValue::U16(_) => 2,
        FieldValue::I32(_) | FieldValue::U32(_) | FieldValue::F32(_) => 4,
        FieldValue::Decimal { .. } => 5,
        FieldValue::I64(_) | FieldValue::F64(_) | FieldValue::Timestamp(_) => 8,
        FieldValue::String(text) => 4 + text.len(),
        FieldValue::Bytes(bytes) => 4 + bytes.len(),
        FieldValue::Array(values) => 4 + values.iter().map(value_len).sum::<usize>(),
        FieldValue::Table(table) => table_len(table),
    }
}

pub(crate) fn table_to_amqp(table: FieldTable) -> amiquip::FieldTable {
    table.into_iter().map(|(name, value)| (name, value_to_amqp(value))).collect()
}

fn value_to_amqp(value: FieldValue) -> AmqpValue {
    match value {
        FieldValue::Bool(value) => AmqpValue::Boolean(value),
        FieldValue::I8(value) => AmqpValue::ShortShortInt(value),
        FieldValue::U8(value) => AmqpValue::ShortShortUInt(value),
        FieldValue::I16(value) => AmqpValue::ShortInt(value),
        FieldValue::U16(value) => AmqpValue::ShortUInt(value),
        FieldValue::I32(value) => AmqpValue::LongInt(value),
        FieldValue::U32(value) => AmqpValue::LongUInt(value),
        FieldValue::I64(value) => AmqpValue::LongLongInt(value),
        FieldValue::F32(value) => AmqpValue::Float(value),
        FieldValue::F64(value) => AmqpValue::Double(value),
        FieldValue::Decimal { scale, value } => AmqpValue::DecimalValue(DecimalValue { scale, value }),
        FieldValue::String(value) => AmqpValue::LongString(value),
        FieldValue::Bytes(value) => AmqpValue::ByteArray(value),
        FieldValue::Timestamp(value) => AmqpValue::Timestamp(value),
        FieldValue::Array(values) => AmqpValue::FieldArray(values.into_iter().map(value_to_amqp).collect()),
        FieldValue::Table(table) => AmqpValue::FieldTable(table_to_amqp(table)),
        FieldValue::Void => AmqpValue::Void,
    }
}

pub(crate) fn table_from_amqp(table: amiquip::FieldTable) -> FieldTable {
    table.into_iter().map(|(name, value)| (name, value_from_amqp(value))).collect()
}

fn value_from_amqp(value: AmqpValue) -> FieldValue {
    match value {
        AmqpValue::Boolean(value) => FieldValue::Bool(value),
        AmqpValue::ShortShortInt(value) => FieldValue::I8(value),
        AmqpValue::ShortShortUInt(value) => FieldValue::U8(value),
        AmqpValue::ShortInt(value) => FieldValue::I16(value),
        AmqpValue::ShortUInt(value) => FieldValue::U16(value),
        AmqpValue::LongInt(value) => FieldValue::I32(value),
        AmqpValue::LongUInt(value) => FieldValue::U32(value),
        AmqpValue::LongLongInt(value) => FieldValue::I64(value),
        AmqpValue::Float(value) => FieldValue::F32(value),
        AmqpValue::Double(value) => FieldValue::F64(value),
        AmqpValue::DecimalValue(decimal) => FieldValue::Decimal { scale: decimal.scale, value: decimal.value },
        AmqpValue::LongString(value) => FieldValue::String(value),
        AmqpValue::ByteArray(value) => FieldValue::Bytes(value),
        AmqpValue::Timestamp(value) => FieldValue::Timestamp(value),
        AmqpValue::FieldArray(values) => FieldValue::Array(values.into_iter().map(value_from_amqp).collect()),
        AmqpValue::FieldTable(table) => FieldValue::Table(table_from_amqp(table)),
        AmqpValue::Void => FieldValue::Void,
    }
}
