//! AMQP field tables: the headers of a message, the arguments of a declaration.

use std::collections::BTreeMap;

/// Names and values: message headers, or the `x-…` arguments of queues, exchanges, bindings and consumers.
///
/// Names are at most 255 bytes long.
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
