//! Field tables and the values in them, with every type that RabbitMQ reads.
//!
//! What was read is written again as RabbitMQ writes it: order and duplicate names are kept, the tag `L` becomes `l`.

use super::cursor::{Malformed, Reader, Writer};
use super::item::Item;
use super::short_string::ShortString;

/// How deep tables and arrays may lie in the outermost table. Reading recurses, and the stack has an end.
const NESTING_MAX: usize = 128;

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
        Ok(match Item::read(reader)? {
            Item::Bool(value) => Value::Bool(value),
            Item::I8(value) => Value::I8(value),
            Item::U8(value) => Value::U8(value),
            Item::I16(value) => Value::I16(value),
            Item::U16(value) => Value::U16(value),
            Item::I32(value) => Value::I32(value),
            Item::U32(value) => Value::U32(value),
            Item::I64(value) => Value::I64(value),
            Item::F32(value) => Value::F32(value),
            Item::F64(value) => Value::F64(value),
            Item::Decimal { scale, value } => Value::Decimal { scale, value },
            Item::LongString(bytes) => Value::LongString(bytes.to_vec()),
            Item::Array(inside) => {
                let depth = deeper(depth)?;
                let mut inside = Reader::new(inside);
                let mut values = Vec::new();
                while !inside.is_empty() {
                    values.push(Value::read(&mut inside, depth)?);
                }
                Value::Array(values)
            }
            Item::Timestamp(value) => Value::Timestamp(value),
            Item::Table(inside) => Value::Table(Table::read_inside(inside, deeper(depth)?)?),
            Item::Void => Value::Void,
            Item::Bytes(bytes) => Value::Bytes(bytes.to_vec()),
        })
    }

    fn write_to(&self, writer: &mut Writer<'_>) {
        let item = match self {
            Value::Array(values) => {
                return Item::write_array(writer, |writer| values.iter().for_each(|value| value.write_to(writer)));
            }
            Value::Table(table) => return Item::write_table(writer, |writer| table.write_inside(writer)),
            Value::Bool(value) => Item::Bool(*value),
            Value::I8(value) => Item::I8(*value),
            Value::U8(value) => Item::U8(*value),
            Value::I16(value) => Item::I16(*value),
            Value::U16(value) => Item::U16(*value),
            Value::I32(value) => Item::I32(*value),
            Value::U32(value) => Item::U32(*value),
            Value::I64(value) => Item::I64(*value),
            Value::F32(value) => Item::F32(*value),
            Value::F64(value) => Item::F64(*value),
            Value::Decimal { scale, value } => Item::Decimal { scale: *scale, value: *value },
            Value::LongString(bytes) => Item::LongString(bytes),
            Value::Timestamp(value) => Item::Timestamp(*value),
            Value::Void => Item::Void,
            Value::Bytes(bytes) => Item::Bytes(bytes),
        };
        item.write(writer);
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

    pub(super) fn read_from(reader: &mut Reader<'_>) -> Result<Table, Malformed> {
        Table::read_inside(reader.long()?, 0)
    }

    fn read_inside(bytes: &[u8], depth: usize) -> Result<Table, Malformed> {
        let mut inside = Reader::new(bytes);
        let mut pairs = Vec::new();
        while !inside.is_empty() {
            let name = ShortString::new(inside.short()?);
            pairs.push((name, Value::read(&mut inside, depth)?));
        }
        Ok(Table(pairs))
    }

    pub(super) fn write_to(&self, writer: &mut Writer<'_>) {
        writer.sized(|writer| self.write_inside(writer));
    }

    /// Names and values without a length in front, as the response of the mechanism AMQPLAIN has them.
    pub(crate) fn encode_inside(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_inside(&mut Writer::new(&mut bytes));
        bytes
    }

    fn write_inside(&self, writer: &mut Writer<'_>) {
        for (name, value) in &self.0 {
            writer.short(name.as_bytes());
            value.write_to(writer);
        }
    }
}

fn deeper(depth: usize) -> Result<usize, Malformed> {
    if depth == NESTING_MAX { Err(Malformed("tables nested too deep")) } else { Ok(depth + 1) }
}
