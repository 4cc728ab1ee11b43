//! Reads values out of a tree that `config` built, and keeps a list of what is wrong with them.
//!
//! A reader never stops at a mistake: it notes it and goes on, so that one run finds them all. It never notes the
//! text of a value, because any text may be a password in the wrong place.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::{Problem, check};
use crate::field::{FieldTable, FieldValue};
use crate::topology::shown;

const EXPECTED_DURATION: &str = "expected a duration such as \"10s\" or \"1m 30s\"";

/// Who put a value where it is. A later layer wins over an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    File,
    Profile,
    Environment,
}

/// Where a value came from, as `config` carries it along with the value: nothing for the file, the key of the
/// profile, or the name of a variable behind a `$`.
pub(super) mod origin {
    use config::Value;

    use super::Layer;

    pub(in crate::settings) fn of_variable(name: &str) -> String {
        format!("${name}")
    }

    pub(in crate::settings) fn layer(value: &Value) -> Layer {
        match value.origin() {
            None => Layer::File,
            Some(origin) if origin.starts_with('$') => Layer::Environment,
            Some(_) => Layer::Profile,
        }
    }

    /// The environment variable the value came from.
    pub(in crate::settings) fn variable(value: &Value) -> Option<&str> {
        value.origin()?.strip_prefix('$')
    }
}

/// A value that was read, and by which layer it was given.
#[derive(Debug, Clone)]
pub(super) struct Given<T> {
    pub(super) value: T,
    pub(super) layer: Layer,
}

/// A table whose keys have been compared with those it may have.
#[derive(Debug, Clone)]
pub(super) struct Section<'a> {
    pub(super) key: String,
    table: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    pub(super) fn value(&self, name: &str) -> Option<&'a Value> {
        self.table.get(name)
    }

    pub(super) fn key_of(&self, name: &str) -> String {
        child(&self.key, name)
    }
}

/// The list of what is wrong so far.
#[derive(Debug, Default)]
pub(super) struct Reader {
    problems: Vec<Problem>,
}

impl Reader {
    /// What was found wrong.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    pub(super) fn mistake(&mut self, key: impl Into<String>, problem: impl Into<String>) {
        self.add(Problem::new(key, problem));
    }

    /// Notes what is wrong with a value, and which variable it came from if it did.
    pub(super) fn mistake_in(&mut self, value: &Value, key: impl Into<String>, problem: impl Into<String>) {
        let variable = origin::variable(value).map(str::to_owned);
        self.add(Problem { variable, ..Problem::new(key, problem) });
    }

    /// The first mistake at a key is the cause; what else is wrong there mostly follows from it.
    pub(super) fn add(&mut self, problem: Problem) {
        let is_known = |known: &Problem| known.key == problem.key && known.variable == problem.variable;
        if !self.problems.iter().any(is_known) {
            self.problems.push(problem);
        }
    }

    /// Opens a table and notes every key in it that is not one of `allowed`.
    pub(super) fn section<'a>(&mut self, value: &'a Value, key: String, allowed: &[&str]) -> Option<Section<'a>> {
        let table = self.table(value, &key)?;
        for (name, value) in sorted(table).into_iter().filter(|(name, _)| !allowed.contains(name)) {
            let guess = allowed.iter().find(|allowed| is_near(name, allowed));
            let guess = guess.map(|guess| format!("; did you mean {guess}?")).unwrap_or_default();
            let problem = format!("unknown key; expected one of {}{guess}", allowed.join(", "));
            self.mistake_in(value, child(&key, name), problem);
        }
        Some(Section { key, table })
    }

    /// Opens a table whose keys are the user's own names.
    pub(super) fn table<'a>(&mut self, value: &'a Value, key: &str) -> Option<&'a Map<String, Value>> {
        match &value.kind {
            ValueKind::Table(table) => Some(table),
            other => {
                self.mistake_in(value, key, format!("expected a table, got {}", kind(other)));
                None
            }
        }
    }

    /// Reads the value of a key, if it is there, and notes what `read` says against it.
    pub(super) fn read<T>(
        &mut self,
        section: &Section<'_>,
        name: &str,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<Given<T>> {
        let value = section.value(name)?;
        match read(value) {
            Ok(read) => Some(Given { value: read, layer: origin::layer(value) }),
            Err(problem) => {
                self.mistake_in(value, section.key_of(name), problem);
                None
            }
        }
    }

    pub(super) fn text(&mut self, section: &Section<'_>, name: &str) -> Option<Given<String>> {
        self.read(section, name, |value| text(value).map(str::to_owned))
    }

    pub(super) fn boolean(&mut self, section: &Section<'_>, name: &str) -> Option<Given<bool>> {
        self.read(section, name, boolean)
    }

    pub(super) fn number<T: TryFrom<i64>>(
        &mut self,
        section: &Section<'_>,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Option<T> {
        let read = |value: &Value| {
            let number = whole_number(value, &range)?;
            T::try_from(number).map_err(|_| check::expected_number(&range))
        };
        self.read(section, name, read).map(|given| given.value)
    }

    /// A duration that `check` has nothing against.
    pub(super) fn duration(
        &mut self,
        section: &Section<'_>,
        name: &str,
        check: fn(Duration) -> Result<(), String>,
    ) -> Option<Given<Duration>> {
        let read = |value: &Value| {
            let duration = duration(value)?;
            check(duration).map(|()| duration)
        };
        self.read(section, name, read)
    }

    /// A table of arguments, of any names.
    pub(super) fn arguments(&mut self, section: &Section<'_>, name: &str) -> FieldTable {
        let Some(value) = section.value(name) else { return FieldTable::new() };
        let key = section.key_of(name);
        self.table(value, &key).map(|table| self.field_table(table, &key)).unwrap_or_default()
    }

    fn field_table(&mut self, table: &Map<String, Value>, key: &str) -> FieldTable {
        let mut fields = FieldTable::new();
        for (name, value) in sorted(table) {
            if let Some(field) = self.field(value, &child(key, name)) {
                fields.insert(name.to_owned(), field);
            }
        }
        fields
    }

    fn field(&mut self, value: &Value, key: &str) -> Option<FieldValue> {
        Some(match &value.kind {
            ValueKind::Boolean(boolean) => FieldValue::Bool(*boolean),
            ValueKind::I64(number) => FieldValue::I64(*number),
            ValueKind::Float(number) => FieldValue::F64(*number),
            ValueKind::String(text) => FieldValue::String(text.clone()),
            ValueKind::Table(table) => FieldValue::Table(self.field_table(table, key)),
            ValueKind::Array(values) => {
                let fields =
                    values.iter().enumerate().filter_map(|(index, value)| self.field(value, &item(key, index)));
                FieldValue::Array(fields.collect())
            }
            other @ (ValueKind::Nil | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_)) => {
                self.mistake_in(value, key, format!("expected a value that AMQP has, got {}", kind(other)));
                return None;
            }
        })
    }
}

pub(super) fn text(value: &Value) -> Result<&str, String> {
    match &value.kind {
        ValueKind::String(text) => Ok(text),
        other => Err(format!("expected text in quotes, got {}", kind(other))),
    }
}

/// Variables hold text and nothing else, so that `"true"` counts there; in a file it does not.
pub(super) fn boolean(value: &Value) -> Result<bool, String> {
    match &value.kind {
        ValueKind::Boolean(boolean) => Ok(*boolean),
        ValueKind::String(text) if origin::variable(value).is_some() => {
            text.parse().map_err(|_| "expected true or false".to_owned())
        }
        other => Err(format!("expected true or false, got {}", kind(other))),
    }
}

fn whole_number(value: &Value, range: &RangeInclusive<i64>) -> Result<i64, String> {
    let number = match &value.kind {
        ValueKind::I64(number) => *number,
        ValueKind::String(text) if origin::variable(value).is_some() => {
            text.parse().map_err(|_| check::expected_number(range))?
        }
        other => return Err(format!("{}, got {}", check::expected_number(range), kind(other))),
    };
    check::number(number, range).map(|()| number)
}

fn duration(value: &Value) -> Result<Duration, String> {
    match &value.kind {
        ValueKind::String(text) => humantime::parse_duration(text).map_err(|_| EXPECTED_DURATION.to_owned()),
        other => Err(format!("{EXPECTED_DURATION}, got {}", kind(other))),
    }
}

/// What a value is, in words that do not give it away.
pub(super) fn kind(kind: &ValueKind) -> &'static str {
    match kind {
        ValueKind::Nil => "nothing",
        ValueKind::Boolean(_) => "true or false without quotes",
        ValueKind::I64(_) | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_) => "a number without quotes",
        ValueKind::Float(_) => "a number with a fraction",
        ValueKind::String(_) => "text",
        ValueKind::Table(_) => "a table",
        ValueKind::Array(_) => "a list",
    }
}

/// The entries of a table in the order of their names; `config` keeps them in no order.
pub(super) fn sorted(table: &Map<String, Value>) -> BTreeMap<&str, &Value> {
    table.iter().map(|(name, value)| (name.as_str(), value)).collect()
}

/// The path of a key within another, written as TOML would want it.
pub(super) fn child(parent: &str, name: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    let name = match name {
        bare if !bare.is_empty() && bare.bytes().all(is_bare) => bare.to_owned(),
        other => shown(other),
    };
    if parent.is_empty() { name } else { format!("{parent}.{name}") }
}

pub(super) fn item(list: &str, index: usize) -> String {
    format!("{list}[{index}]")
}

/// Whether one or two slips of the finger lie between two keys.
fn is_near(written: &str, meant: &str) -> bool {
    let written: Vec<char> = written.to_lowercase().replace('-', "_").chars().take(64).collect();
    let meant: Vec<char> = meant.chars().collect();
    // Levenshtein distance, one row at a time.
    let mut row: Vec<usize> = (0..=meant.len()).collect();
    for (i, from) in written.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in meant.iter().enumerate() {
            let substituted = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    // Short words are near to too many others.
    row[meant.len()] <= if meant.len() < 5 { 1 } else { 2 }
}
