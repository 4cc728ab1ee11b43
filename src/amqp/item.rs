//! One field value as it stands in the bytes: numbers read, texts and nested values still encoded.
//!
//! This is the one place that knows the type tags. What builds trees of values, for the broker ([`value`](super::value)) or
//! for programs (`field`), reads items and decides itself how deep it goes.

use super::cursor::{Malformed, Reader, Writer};

/// A value whose bytes have not been copied.
///
/// The tags are RabbitMQ's (<https://www.rabbitmq.com/amqp-0-9-1-errata#section_3>).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Item<'a> {
    /// `t`
    Bool(bool),
    /// `b`
    I8(i8),
    /// `B`
    U8(u8),
    /// `s`; RabbitMQ reads an integer where the specification has a short string.
    I16(i16),
    /// `u`
    U16(u16),
    /// `I`
    I32(i32),
    /// `i`
    U32(u32),
    /// `l` and `L`, which are the same to RabbitMQ: it writes `l`.
    I64(i64),
    /// `f`
    F32(f32),
    /// `d`
    F64(f64),
    /// `D`
    Decimal { scale: u8, value: i32 },
    /// `S`: any bytes.
    LongString(&'a [u8]),
    /// `A`: values without their length.
    Array(&'a [u8]),
    /// `T`: seconds since 1970.
    Timestamp(u64),
    /// `F`: names and values without their length.
    Table(&'a [u8]),
    /// `V`
    Void,
    /// `x`
    Bytes(&'a [u8]),
}

impl<'a> Item<'a> {
    /// Reads a tag and its value.
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Item<'a>, Malformed> {
        Ok(match reader.u8()? {
            b't' => Item::Bool(reader.u8()? != 0),
            b'b' => Item::I8(i8::from_be_bytes(reader.array()?)),
            b'B' => Item::U8(reader.u8()?),
            b's' => Item::I16(i16::from_be_bytes(reader.array()?)),
            b'u' => Item::U16(reader.u16()?),
            b'I' => Item::I32(i32::from_be_bytes(reader.array()?)),
            b'i' => Item::U32(reader.u32()?),
            b'l' | b'L' => Item::I64(i64::from_be_bytes(reader.array()?)),
            b'f' => Item::F32(f32::from_be_bytes(reader.array()?)),
            b'd' => Item::F64(f64::from_be_bytes(reader.array()?)),
            b'D' => Item::Decimal { scale: reader.u8()?, value: i32::from_be_bytes(reader.array()?) },
            b'S' => Item::LongString(reader.long()?),
            b'A' => Item::Array(reader.long()?),
            b'T' => Item::Timestamp(reader.u64()?),
            b'F' => Item::Table(reader.long()?),
            b'V' => Item::Void,
            b'x' => Item::Bytes(reader.long()?),
            _ => return Err(Malformed("unknown type tag")),
        })
    }

    /// Writes the tag and the value.
    pub(crate) fn write(self, writer: &mut Writer<'_>) {
        macro_rules! number {
            ($tag:literal, $number:expr) => {{
                writer.put(&[$tag]);
                writer.put(&$number.to_be_bytes());
            }};
        }
        macro_rules! long {
            ($tag:literal, $bytes:expr) => {{
                writer.put(&[$tag]);
                writer.long($bytes);
            }};
        }
        match self {
            Item::Bool(value) => number!(b't', u8::from(value)),
            Item::I8(value) => number!(b'b', value),
            Item::U8(value) => number!(b'B', value),
            Item::I16(value) => number!(b's', value),
            Item::U16(value) => number!(b'u', value),
            Item::I32(value) => number!(b'I', value),
            Item::U32(value) => number!(b'i', value),
            Item::I64(value) => number!(b'l', value),
            Item::F32(value) => number!(b'f', value),
            Item::F64(value) => number!(b'd', value),
            Item::Decimal { scale, value } => {
                writer.put(&[b'D', scale]);
                writer.put(&value.to_be_bytes());
            }
            Item::LongString(bytes) => long!(b'S', bytes),
            Item::Array(bytes) => long!(b'A', bytes),
            Item::Timestamp(value) => number!(b'T', value),
            Item::Table(bytes) => long!(b'F', bytes),
            Item::Void => writer.put(b"V"),
            Item::Bytes(bytes) => long!(b'x', bytes),
        }
    }

    /// Writes an array whose values `inside` writes.
    pub(crate) fn write_array(writer: &mut Writer<'_>, inside: impl FnOnce(&mut Writer<'_>)) {
        writer.put(b"A");
        writer.sized(inside);
    }

    /// Writes a nested table whose names and values `inside` writes.
    pub(crate) fn write_table(writer: &mut Writer<'_>, inside: impl FnOnce(&mut Writer<'_>)) {
        writer.put(b"F");
        writer.sized(inside);
    }
}
