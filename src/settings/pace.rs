//! `concurrency`, `max_rate` and `pause_on_failures`: how fast listeners work.

use config::{Value, ValueKind};

use super::check;
use super::reader::{Given, Reader, Section, kind, text};
use crate::pace::{Concurrency, PauseOnFailures, check_rate};

pub(super) const PAUSE_KEYS: [&str; 4] = ["min", "ratio", "within", "pause"];

/// A number, or a text with a number or a range in it.
pub(super) fn concurrency(value: &Value) -> Result<Concurrency, String> {
    let text = match &value.kind {
        ValueKind::I64(threads) => threads.to_string(),
        ValueKind::String(text) => text.clone(),
        other => return Err(format!("{}, got {}", Concurrency::EXPECTED, kind(other))),
    };
    text.trim().parse().map_err(|_| Concurrency::EXPECTED.to_owned())
}

/// Messages per second.
pub(super) fn max_rate(value: &Value) -> Result<f64, String> {
    let per_second = number(value)?;
    check_rate(per_second).map(|()| per_second)
}

fn number(value: &Value) -> Result<f64, String> {
    const EXPECTED: &str = "expected a number such as 100 or 0.5";
    match &value.kind {
        ValueKind::Float(number) => Ok(*number),
        ValueKind::I64(number) => Ok(*number as f64),
        ValueKind::String(_) => text(value)?.trim().parse().map_err(|_| EXPECTED.to_owned()),
        other => Err(format!("{EXPECTED}, got {}", kind(other))),
    }
}

/// Reads `pause_on_failures`: true, false, or a table.
pub(super) fn pause_on_failures(reader: &mut Reader, section: &Section<'_>) -> Option<Option<PauseOnFailures>> {
    let value = section.value("pause_on_failures")?;
    if !matches!(value.kind, ValueKind::Table(_)) {
        let read = |value: &Value| {
            super::reader::boolean(value)
                .map_err(|_| format!("expected true, false or a table, got {}", kind(&value.kind)))
        };
        let Given { value: is_on, .. } = reader.read(section, "pause_on_failures", read)?;
        return Some(is_on.then(PauseOnFailures::default));
    }
    let section = reader.section(value, section.key_of("pause_on_failures"), &PAUSE_KEYS)?;
    let default = PauseOnFailures::default();
    let within = reader.duration(&section, "within", check::duration).map_or(default.within(), |given| given.value);
    let pause = reader.duration(&section, "pause", check::duration).map_or(default.pause(), |given| given.value);
    let policy = PauseOnFailures {
        min: reader.number(&section, "min", check::FAILURES_MIN).unwrap_or(default.min()),
        ratio: reader.read(&section, "ratio", number).map_or(default.ratio(), |given| given.value),
        within,
        pause,
    };
    match policy.check() {
        Ok(()) => Some(Some(policy)),
        Err((key, problem)) => {
            match section.value(key) {
                Some(value) => reader.mistake_in(value, section.key_of(key), problem),
                None => reader.mistake(section.key_of(key), problem),
            }
            None
        }
    }
}
