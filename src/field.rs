//! AMQP field tables: the headers of a message, the arguments of a declaration; and what of them fits on the wire.

use std::collections::BTreeMap;

use crate::amqp::cursor::{Reader, Writer};
use crate::amqp::item::Item;
use crate::amqp::value::{Table, Value};
use crate::amqp::{Malformed, text};
use crate::error::{Error, Result};

/// Longest short string in bytes: AMQP 0-9-1 writes its length in one octet (section 4.2.5.3).
const SHORT_STRING_MAX: usize = 255;

/// Levels of tables and lists in one another, the outermost table included. Encoding and decoding recurse.
pub(crate) const DEPTH_MAX: usize = 128;

/// Names and values: message headers, or the `x-…` arguments of queues, exchanges, bindings and consumers.
///
/// Names are at most 255 bytes long. Tables and lists are at most 128 levels deep, the outermost table included.
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

impl From<&FieldValue> for Value {
    fn from(value: &FieldValue) -> Value {
        match value {
            FieldValue::Bool(value) => Value::Bool(*value),
            FieldValue::I8(value) => Value::I8(*value),
            FieldValue::U8(value) => Value::U8(*value),
            FieldValue::I16(value) => Value::I16(*value),
            FieldValue::U16(value) => Value::U16(*value),
            FieldValue::I32(value) => Value::I32(*value),
            FieldValue::U32(value) => Value::U32(*value),
            FieldValue::I64(value) => Value::I64(*value),
            FieldValue::F32(value) => Value::F32(*value),
            FieldValue::F64(value) => Value::F64(*value),
            // The same 32 bits on the wire.
            FieldValue::Decimal { scale, value } => Value::Decimal { scale: *scale, value: value.cast_signed() },
            FieldValue::String(text) => Value::text(text),
            FieldValue::Bytes(bytes) => Value::Bytes(bytes.clone()),
            FieldValue::Timestamp(seconds) => Value::Timestamp(*seconds),
            FieldValue::Array(values) => Value::Array(values.iter().map(Value::from).collect()),
            FieldValue::Table(table) => Value::Table(table.into()),
            FieldValue::Void => Value::Void,
        }
    }
}

impl From<&FieldTable> for Table {
    fn from(table: &FieldTable) -> Table {
        table.iter().fold(Table::default(), |written, (name, value)| written.with(name, value.into()))
    }
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

/// Refuses what is no name of a queue that exists. To AMQP an empty one is the queue that was declared last on the channel
/// (section 1.7.2 of the reference, `queue`), and on the channel of a connection that is lent that may be anybody's.
pub(crate) fn check_queue_name(queue: &str) -> Result<()> {
    if queue.is_empty() {
        return Err(Error::invalid("queue name", "it is empty, expected the name of a queue"));
    }
    check_short_string(|| "queue name".to_owned(), queue)
}

/// Refuses tables whose names do not fit AMQP's short string, at any depth, and what is nested too deep.
pub(crate) fn check_table(table: &FieldTable) -> Result<()> {
    check_level(table, 1)
}

fn check_level(table: &FieldTable, level: usize) -> Result<()> {
    table.iter().try_for_each(|(name, value)| {
        check_short_string(|| format!("field name {:?}…", shown(name)), name)?;
        check_value(name, value, level)
    })
}

fn shown(name: &str) -> String {
    name.chars().take(40).collect()
}

fn check_value(name: &str, value: &FieldValue, level: usize) -> Result<()> {
    let is_finite = match value {
        FieldValue::F32(number) => number.is_finite(),
        FieldValue::F64(number) => number.is_finite(),
        _ => true,
    };
    if !is_finite {
        // RabbitMQ, which has no such numbers, ends the connection (541).
        return Err(Error::invalid(
            format!("field {:?}", shown(name)),
            "expected a finite number, got NaN or an infinity",
        ));
    }
    match value {
        FieldValue::Table(_) | FieldValue::Array(_) if level == DEPTH_MAX => {
            Err(Error::invalid("fields", format!("nested deeper than {DEPTH_MAX} levels, which is more than is read")))
        }
        FieldValue::Table(table) => check_level(table, level + 1),
        FieldValue::Array(values) => values.iter().try_for_each(|value| check_value(name, value, level + 1)),
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

/// Writes a table with its length in front.
pub(crate) fn write_table(table: &FieldTable, writer: &mut Writer<'_>) {
    writer.sized(|writer| write_fields(table, writer));
}

fn write_fields(table: &FieldTable, writer: &mut Writer<'_>) {
    for (name, value) in table {
        writer.short(name.as_bytes());
        write_value(value, writer);
    }
}

fn write_value(value: &FieldValue, writer: &mut Writer<'_>) {
    let item = match value {
        FieldValue::Array(values) => {
            return Item::write_array(writer, |writer| values.iter().for_each(|value| write_value(value, writer)));
        }
        FieldValue::Table(table) => return Item::write_table(writer, |writer| write_fields(table, writer)),
        FieldValue::Bool(value) => Item::Bool(*value),
        FieldValue::I8(value) => Item::I8(*value),
        FieldValue::U8(value) => Item::U8(*value),
        FieldValue::I16(value) => Item::I16(*value),
        FieldValue::U16(value) => Item::U16(*value),
        FieldValue::I32(value) => Item::I32(*value),
        FieldValue::U32(value) => Item::U32(*value),
        FieldValue::I64(value) => Item::I64(*value),
        FieldValue::F32(value) => Item::F32(*value),
        FieldValue::F64(value) => Item::F64(*value),
        FieldValue::Decimal { scale, value } => Item::Decimal { scale: *scale, value: value.cast_signed() },
        FieldValue::String(text) => Item::LongString(text.as_bytes()),
        FieldValue::Bytes(bytes) => Item::Bytes(bytes),
        FieldValue::Timestamp(value) => Item::Timestamp(*value),
        FieldValue::Void => Item::Void,
    };
    item.write(writer);
}

/// Reads a table with its length in front.
pub(crate) fn read_table(reader: &mut Reader<'_>) -> Result<FieldTable, Malformed> {
    read_fields(reader.long()?, 1)
}

/// The table at `level`, the outermost being 1.
fn read_fields(bytes: &[u8], level: usize) -> Result<FieldTable, Malformed> {
    let mut inside = Reader::new(bytes);
    let mut table = FieldTable::new();
    while !inside.is_empty() {
        let name = text(inside.short()?);
        table.insert(name, read_value(&mut inside, level)?);
    }
    Ok(table)
}

/// A value in a table or list at `level`.
fn read_value(reader: &mut Reader<'_>, level: usize) -> Result<FieldValue, Malformed> {
    Ok(match Item::read(reader)? {
        Item::Array(bytes) | Item::Table(bytes) if level == DEPTH_MAX => FieldValue::Bytes(bytes.to_vec()),
        Item::Array(bytes) => {
            let mut inside = Reader::new(bytes);
            let mut values = Vec::new();
            while !inside.is_empty() {
                values.push(read_value(&mut inside, level + 1)?);
            }
            FieldValue::Array(values)
        }
        Item::Table(bytes) => FieldValue::Table(read_fields(bytes, level + 1)?),
        Item::Bool(value) => FieldValue::Bool(value),
        Item::I8(value) => FieldValue::I8(value),
        Item::U8(value) => FieldValue::U8(value),
        Item::I16(value) => FieldValue::I16(value),
        Item::U16(value) => FieldValue::U16(value),
        Item::I32(value) => FieldValue::I32(value),
        Item::U32(value) => FieldValue::U32(value),
        Item::I64(value) => FieldValue::I64(value),
        Item::F32(value) => FieldValue::F32(value),
        Item::F64(value) => FieldValue::F64(value),
        Item::Decimal { scale, value } => FieldValue::Decimal { scale, value: value.cast_unsigned() },
        Item::LongString(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => FieldValue::String(text.to_owned()),
            Err(_) => FieldValue::Bytes(bytes.to_vec()),
        },
        Item::Timestamp(value) => FieldValue::Timestamp(value),
        Item::Void => FieldValue::Void,
        Item::Bytes(bytes) => FieldValue::Bytes(bytes.to_vec()),
    })
}
