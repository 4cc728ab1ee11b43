//! Header values in JSON and back, without loss.
//!
//! What JSON has is written as such: text, true and false, null, whole numbers (64 bits, signed), numbers with a point
//! (double), lists and tables. Any other type is an object with one key that begins with `$`: `{"$i32": 5}`.
//!
//! jq and JavaScript keep numbers as doubles. So a whole number that a double cannot hold is written as text, `{"$i64":
//! "9007199254740993"}`, and a double that is whole, and would come back as a whole number, as `{"$f64": 1.0}`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use coney::{FieldTable, FieldValue};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Number, Value, json};

/// Up to this every whole number is a double: 2^53 and those beyond may be another one's neighbour.
const EXACT: u64 = (1 << 53) - 1;

const TAGS: &str = "$i8, $u8, $i16, $u16, $i32, $u32, $i64, $f32, $f64, $decimal, $bytes, $timestamp, $table";

pub fn table_to_json(table: &FieldTable) -> Map<String, Value> {
    table.iter().map(|(name, value)| (name.clone(), to_json(value))).collect()
}

pub fn table_from_json(map: Map<String, Value>) -> Result<FieldTable, String> {
    map.into_iter()
        .map(|(name, value)| match from_json(value) {
            Ok(value) => Ok((name, value)),
            Err(problem) => Err(format!("{name}: {problem}")),
        })
        .collect()
}

/// What an argument `NAME=TEXT` or `NAME:=JSON` says.
pub fn named(text: &str) -> Result<(String, FieldValue), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=TEXT or NAME:=JSON")?;
    match name.strip_suffix(':') {
        None => Ok((name.to_owned(), value.into())),
        Some(name) => {
            let value = serde_json::from_str(value).map_err(|error| format!("not JSON: {error}"))?;
            Ok((name.to_owned(), from_json(value)?))
        }
    }
}

fn to_json(value: &FieldValue) -> Value {
    match value {
        FieldValue::Bool(value) => json!(value),
        FieldValue::I8(value) => json!({ "$i8": value }),
        FieldValue::U8(value) => json!({ "$u8": value }),
        FieldValue::I16(value) => json!({ "$i16": value }),
        FieldValue::U16(value) => json!({ "$u16": value }),
        FieldValue::I32(value) => json!({ "$i32": value }),
        FieldValue::U32(value) => json!({ "$u32": value }),
        FieldValue::I64(value) if value.unsigned_abs() <= EXACT => json!(value),
        FieldValue::I64(value) => json!({ "$i64": value.to_string() }),
        FieldValue::F32(value) if value.is_nan() => json!({ "$f32": format!("{:#010x}", value.to_bits()) }),
        FieldValue::F32(value) => json!({ "$f32": float(f64::from(*value)) }),
        FieldValue::F64(value) if value.is_nan() => json!({ "$f64": format!("{:#018x}", value.to_bits()) }),
        FieldValue::F64(value) if value.is_finite() && value.fract() != 0.0 => float(*value),
        FieldValue::F64(value) => json!({ "$f64": float(*value) }),
        FieldValue::Decimal { scale, value } => json!({ "$decimal": { "scale": scale, "value": value } }),
        FieldValue::String(value) => json!(value),
        FieldValue::Bytes(value) => json!({ "$bytes": base64(value) }),
        FieldValue::Timestamp(value) => json!({ "$timestamp": Whole(*value) }),
        FieldValue::Array(values) => values.iter().map(to_json).collect(),
        FieldValue::Table(table) => {
            let map = Value::Object(table_to_json(table));
            if table.len() == 1 && table.keys().all(|name| name.starts_with('$')) {
                json!({ "$table": map })
            } else {
                map
            }
        }
        FieldValue::Void => Value::Null,
        // A type this program does not know yet: shown, and refused when it is read.
        other => json!({ "$unknown": format!("{other:?}") }),
    }
}

/// JSON has no infinities; they are written as text. (Of what is not a number, all bits are written.)
fn float(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| Value::from(value.to_string()), Value::Number)
}

pub fn from_json(value: Value) -> Result<FieldValue, String> {
    Ok(match value {
        Value::Null => FieldValue::Void,
        Value::Bool(value) => FieldValue::Bool(value),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(value), _) => FieldValue::I64(value),
            (None, Some(value)) if number.is_f64() => FieldValue::F64(value),
            _ => return Err(format!("{number} is more than 64 bits with a sign can hold")),
        },
        Value::String(value) => FieldValue::String(value),
        Value::Array(values) => FieldValue::Array(values.into_iter().map(from_json).collect::<Result<_, _>>()?),
        Value::Object(map) => {
            let mut entries = map.into_iter();
            match (entries.next(), entries.len()) {
                (Some((tag, value)), 0) if tag.starts_with('$') => tagged(&tag, value)?,
                (first, _) => FieldValue::Table(table_from_json(first.into_iter().chain(entries).collect())?),
            }
        }
    })
}

fn tagged(tag: &str, value: Value) -> Result<FieldValue, String> {
    fn number<N: TryFrom<i64>>(tag: &str, value: &Value) -> Result<N, String> {
        let number = value.as_i64().and_then(|value| N::try_from(value).ok());
        number.ok_or_else(|| format!("{tag}: expected a whole number in its range"))
    }
    let float = |value: &Value| {
        let text = value.as_str().and_then(|text| text.parse().ok());
        value
            .as_f64()
            .or(text)
            .ok_or_else(|| format!("{tag}: expected a number, \"NaN\", \"inf\", \"-inf\", or bits (0x…)"))
    };
    let bits = |value: &Value| {
        let hexadecimal = value.as_str()?.strip_prefix("0x")?;
        u64::from_str_radix(hexadecimal, 16).ok()
    };
    Ok(match tag {
        "$i8" => FieldValue::I8(number(tag, &value)?),
        "$u8" => FieldValue::U8(number(tag, &value)?),
        "$i16" => FieldValue::I16(number(tag, &value)?),
        "$u16" => FieldValue::U16(number(tag, &value)?),
        "$i32" => FieldValue::I32(number(tag, &value)?),
        "$u32" => FieldValue::U32(number(tag, &value)?),
        "$i64" => {
            let text = value.as_str().and_then(|text| text.parse().ok());
            FieldValue::I64(text.map_or_else(|| number(tag, &value), Ok)?)
        }
        "$f32" => match bits(&value).map(u32::try_from) {
            Some(Ok(bits)) => FieldValue::F32(f32::from_bits(bits)),
            _ => FieldValue::F32(float(&value)? as f32),
        },
        "$f64" => match bits(&value) {
            Some(bits) => FieldValue::F64(f64::from_bits(bits)),
            None => FieldValue::F64(float(&value)?),
        },
        "$decimal" => {
            FieldValue::Decimal { scale: number(tag, &value["scale"])?, value: number(tag, &value["value"])? }
        }
        "$bytes" => {
            let text = value.as_str().ok_or_else(|| format!("{tag}: expected text in base64"))?;
            FieldValue::Bytes(from_base64(text).map_err(|problem| format!("{tag}: {problem}"))?)
        }
        "$timestamp" => {
            let Whole(seconds) =
                Whole::deserialize(value).map_err(|_| format!("{tag}: expected seconds since 1970"))?;
            FieldValue::Timestamp(seconds)
        }
        "$table" => match value {
            Value::Object(map) => FieldValue::Table(table_from_json(map)?),
            _ => return Err(format!("{tag}: expected an object")),
        },
        _ => return Err(format!("no type is called {tag:?}; expected one of {TAGS}")),
    })
}

/// A number that is written as text where a double does not hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whole(pub u64);

impl Serialize for Whole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0 <= EXACT { serializer.serialize_u64(self.0) } else { serializer.collect_str(&self.0) }
    }
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Whole, D::Error> {
        let number = match Value::deserialize(deserializer)? {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        number.map(Whole).ok_or_else(|| D::Error::custom("expected a whole number from 0 to 2^64 - 1"))
    }
}

pub fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

pub fn from_base64(text: &str) -> Result<Vec<u8>, String> {
    STANDARD.decode(text).map_err(|error| format!("not base64: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(value: &FieldValue) -> FieldValue {
        let text = to_json(value).to_string();
        from_json(serde_json::from_str(&text).unwrap()).unwrap_or_else(|problem| panic!("{text}: {problem}"))
    }

    #[test]
    fn every_type_comes_back_as_it_was() {
        let table = |name: &str, value: FieldValue| FieldValue::Table(FieldTable::from([(name.to_owned(), value)]));
        let values = [
            FieldValue::Bool(true),
            FieldValue::I8(i8::MIN),
            FieldValue::U8(u8::MAX),
            FieldValue::I16(i16::MIN),
            FieldValue::U16(u16::MAX),
            FieldValue::I32(i32::MIN),
            FieldValue::U32(u32::MAX),
            FieldValue::I64(i64::MIN),
            FieldValue::F32(0.1),
            FieldValue::F32(f32::INFINITY),
            FieldValue::F64(0.1 + 0.2),
            FieldValue::F64(1.0),
            FieldValue::F64(f64::MIN_POSITIVE),
            FieldValue::F64(f64::NEG_INFINITY),
            FieldValue::Decimal { scale: 2, value: u32::MAX },
            FieldValue::String("$i8".to_owned()),
            FieldValue::Bytes(vec![0, 255, 128]),
            FieldValue::Timestamp(u64::MAX),
            FieldValue::Void,
            FieldValue::Array(vec![FieldValue::Void, FieldValue::I8(1), FieldValue::Array(Vec::new())]),
            FieldValue::Table(FieldTable::new()),
            table("a", FieldValue::I8(1)),
            table("$i8", FieldValue::I64(1)),
            table("$table", table("$x", FieldValue::Void)),
        ];
        for value in values {
            assert_eq!(round_trip(&value), value);
        }
        for bits in [0x7ff8_0000_0000_0000_u64, 0xfff0_0000_0000_0001] {
            let nan = round_trip(&FieldValue::F64(f64::from_bits(bits)));
            assert!(matches!(nan, FieldValue::F64(value) if value.to_bits() == bits), "{nan:?}");
            let bits = (bits >> 32) as u32 | 1;
            let nan = round_trip(&FieldValue::F32(f32::from_bits(bits)));
            assert!(matches!(nan, FieldValue::F32(value) if value.to_bits() == bits), "{nan:?}");
        }
        let zero = round_trip(&FieldValue::F64(-0.0));
        assert!(matches!(zero, FieldValue::F64(value) if value.to_bits() == (-0.0_f64).to_bits()), "{zero:?}");
        for text in ["\"NaN\"", "\"0x7ff8000000000000\""] {
            let value = from_json(serde_json::from_str(&format!("{{\"$f64\": {text}}}")).unwrap());
            assert!(matches!(value, Ok(FieldValue::F64(value)) if value.is_nan()), "{value:?}");
        }
    }

    /// A program that keeps every number as a double, and writes whole ones without a point.
    fn through_doubles(value: Value) -> Value {
        match value {
            Value::Number(number) => {
                let double = number.as_f64().unwrap();
                let text = if double.fract() == 0.0 { format!("{double:.0}") } else { format!("{double:?}") };
                serde_json::from_str(&text).unwrap()
            }
            Value::Array(values) => values.into_iter().map(through_doubles).collect(),
            Value::Object(map) => map.into_iter().map(|(name, value)| (name, through_doubles(value))).collect(),
            other => other,
        }
    }

    #[test]
    fn programs_that_keep_numbers_as_doubles_change_none() {
        let around = 1_i64 << 53;
        let mut values: Vec<FieldValue> =
            [0, 1, -1, around - 1, around, around + 1, -around - 1, i64::MAX, i64::MIN].map(FieldValue::I64).to_vec();
        values.extend(
            [0.0, -0.0, 1.0, -7.0, 1e15, 9_007_199_254_740_993.0, 1e300, 0.1, -2.5, f64::MAX].map(FieldValue::F64),
        );
        values.extend([0.0, 1.0, 16_777_216.0, 0.1, f32::MAX].map(FieldValue::F32));
        values.extend([0, 1_700_000_000, u64::MAX, u64::MAX - 1].map(FieldValue::Timestamp));
        for value in values {
            let there = through_doubles(to_json(&value));
            assert_eq!(from_json(there.clone()), Ok(value), "{there}");
        }
    }

    #[test]
    fn what_is_no_value_is_refused_with_the_reason() {
        for (text, part) in [
            (r#"{"$i8": 128}"#, "in its range"),
            (r#"{"$bytes": "?"}"#, "not base64"),
            (r#"{"$int": 1}"#, "expected one of $i8"),
            (r#"{"a": {"$u8": -1}}"#, "a: $u8"),
            ("18446744073709551615", "64 bits"),
            (r#"{"$i64": "9223372036854775808"}"#, "in its range"),
            (r#"{"$timestamp": "soon"}"#, "seconds since 1970"),
        ] {
            let problem = from_json(serde_json::from_str(text).unwrap()).unwrap_err();
            assert!(problem.contains(part), "{text}: {problem}");
        }
    }
}
