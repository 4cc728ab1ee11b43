//! Field tables and the values in them, with every type that RabbitMQ reads.
//!
//! What was read is written again as RabbitMQ writes it: order and duplicate names are kept, the tag `L` becomes `l`.

use super::cursor::{Malformed, Reader, Writer};
use super::short_string::ShortString;

/// How deep tables and arrays may lie in the outermost table. Reading recurses, and the stack has an end.
const NESTING_MAX: usize = 32;

/// A value in a table, an array or a header.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
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
    LongString(Vec<u8>),
    /// `A`
    Array(Vec<Value>),
    /// `T`: seconds since 1970.
    Timestamp(u64),
    /// `F`
    Table(Table),
    /// `V`
    Void,
    /// `x`
    Bytes(Vec<u8>),
}

/// Names and values in the order they came in.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Table(pub(crate) Vec<(ShortString, Value)>);

impl Value {
    pub(crate) fn text(text: &str) -> Value {
        Value::LongString(text.as_bytes().to_vec())
    }

    fn read(reader: &mut Reader<'_>, depth: usize) -> Result<Value, Malformed> {
        Ok(match reader.u8()? {
            b't' => Value::Bool(reader.u8()? != 0),
            b'b' => Value::I8(i8::from_be_bytes(reader.array()?)),
            b'B' => Value::U8(reader.u8()?),
            b's' => Value::I16(i16::from_be_bytes(reader.array()?)),
            b'u' => Value::U16(reader.u16()?),
            b'I' => Value::I32(i32::from_be_bytes(reader.array()?)),
            b'i' => Value::U32(reader.u32()?),
            b'l' | b'L' => Value::I64(i64::from_be_bytes(reader.array()?)),
            b'f' => Value::F32(f32::from_be_bytes(reader.array()?)),
            b'd' => Value::F64(f64::from_be_bytes(reader.array()?)),
            b'D' => Value::Decimal { scale: reader.u8()?, value: i32::from_be_bytes(reader.array()?) },
            b'S' => Value::LongString(reader.long()?.to_vec()),
            b'A' => {
                let depth = deeper(depth)?;
                let mut inside = Reader::new(reader.long()?);
                let mut values = Vec::new();
                while !inside.is_empty() {
                    values.push(Value::read(&mut inside, depth)?);
                }
                Value::Array(values)
            }
            b'T' => Value::Timestamp(reader.u64()?),
            b'F' => Value::Table(Table::read_nested(reader, deeper(depth)?)?),
            b'V' => Value::Void,
            b'x' => Value::Bytes(reader.long()?.to_vec()),
            _ => return Err(Malformed("unknown type tag")),
        })
    }

    fn write_to(&self, writer: &mut Writer<'_>) {
        macro_rules! tagged {
            ($tag:literal, $number:expr) => {{
                writer.put(&[$tag]);
                writer.put(&$number.to_be_bytes());
            }};
        }
        match self {
            Value::Bool(value) => tagged!(b't', u8::from(*value)),
            Value::I8(value) => tagged!(b'b', value),
            Value::U8(value) => tagged!(b'B', value),
            Value::I16(value) => tagged!(b's', value),
            Value::U16(value) => tagged!(b'u', value),
            Value::I32(value) => tagged!(b'I', value),
            Value::U32(value) => tagged!(b'i', value),
            Value::I64(value) => tagged!(b'l', value),
            Value::F32(value) => tagged!(b'f', value),
            Value::F64(value) => tagged!(b'd', value),
            Value::Decimal { scale, value } => {
                writer.put(&[b'D', *scale]);
                writer.put(&value.to_be_bytes());
            }
            Value::LongString(bytes) => {
                writer.put(b"S");
                writer.long(bytes);
            }
            Value::Array(values) => {
                writer.put(b"A");
                writer.sized(|writer| values.iter().for_each(|value| value.write_to(writer)));
            }
            Value::Timestamp(value) => tagged!(b'T', value),
            Value::Table(table) => {
                writer.put(b"F");
                table.write_to(writer);
            }
            Value::Void => writer.put(b"V"),
            Value::Bytes(bytes) => {
                writer.put(b"x");
                writer.long(bytes);
            }
        }
    }
}

impl Table {
    /// The first value of this name.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Adds a value at the end.
    pub(crate) fn with(mut self, name: &str, value: Value) -> Table {
        self.0.push((name.into(), value));
        self
    }

    pub(super) fn read_nested(reader: &mut Reader<'_>, depth: usize) -> Result<Table, Malformed> {
        let mut inside = Reader::new(reader.long()?);
        let mut pairs = Vec::new();
        while !inside.is_empty() {
            let name = ShortString::new(inside.short()?);
            pairs.push((name, Value::read(&mut inside, depth)?));
        }
        Ok(Table(pairs))
    }

    pub(super) fn write_to(&self, writer: &mut Writer<'_>) {
        writer.sized(|writer| {
            for (name, value) in &self.0 {
                writer.short(name.as_bytes());
                value.write_to(writer);
            }
        });
    }
}

fn deeper(depth: usize) -> Result<usize, Malformed> {
    if depth == NESTING_MAX { Err(Malformed("tables nested too deep")) } else { Ok(depth + 1) }
}
