//! `[outbox]`: where the outbox of a program is, and how much may wait in it.

use std::time::Duration;

use config::Value;

use super::reader::{Given, Reader, text};

pub(super) const OUTBOX_KEYS: [&str; 6] = ["store", "max_rows", "max_bytes", "max_age", "keep_sent", "ready_within"];

/// How a store in a file is written.
const SQLITE: &str = "sqlite:";

const EXPECTED: &str = "expected \"sqlite:\" and the path of a file, such as \"sqlite:outbox.db\"";

/// What the settings say of the program's outbox. What is not said is as [`Outbox::builder`](crate::outbox::Outbox::builder) has it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutboxSettings {
    /// Where it is: `sqlite:` and the path of a file.
    pub store: String,
    /// How many messages may wait, at least 1.
    pub max_rows: Option<u64>,
    /// How many bytes their bodies may have, at least 1.
    pub max_bytes: Option<u64>,
    /// How long the oldest may have waited for another one to be stored; more than zero.
    pub max_age: Option<Duration>,
    /// For how long messages that were sent are kept; more than zero.
    pub keep_sent: Option<Duration>,
    /// How long the oldest may have waited for the app to be ready; more than zero.
    pub ready_within: Option<Duration>,
}

impl OutboxSettings {
    /// An outbox at this place.
    pub fn new(store: impl Into<String>) -> OutboxSettings {
        OutboxSettings {
            store: store.into(),
            max_rows: None,
            max_bytes: None,
            max_age: None,
            keep_sent: None,
            ready_within: None,
        }
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> Result<&str, String> {
        self.store.strip_prefix(SQLITE).filter(|path| !path.is_empty()).ok_or_else(|| EXPECTED.to_owned())
    }

    /// What is wrong with it, by key.
    pub(super) fn check(&self) -> [(&'static str, Result<(), String>); 6] {
        let number = |value: Option<u64>| match value {
            Some(0) => Err("expected a whole number of at least 1, got 0".to_owned()),
            _ => Ok(()),
        };
        let time = |value: Option<Duration>| value.map_or(Ok(()), more_than_zero);
        [
            ("store", self.path().map(drop)),
            ("max_rows", number(self.max_rows)),
            ("max_bytes", number(self.max_bytes)),
            ("max_age", time(self.max_age)),
            ("keep_sent", time(self.keep_sent)),
            ("ready_within", time(self.ready_within)),
        ]
    }
}

fn more_than_zero(duration: Duration) -> Result<(), String> {
    if duration.is_zero() { Err("expected more than zero, got 0s".to_owned()) } else { Ok(()) }
}

/// What `[outbox]` says.
#[derive(Debug, Default)]
pub(super) struct OutboxSection(Option<OutboxSettings>);

impl OutboxSection {
    pub(super) fn read(reader: &mut Reader, value: &Value, key: String) -> OutboxSection {
        let Some(section) = reader.section(value, key, &OUTBOX_KEYS) else { return OutboxSection::default() };
        let store = reader.read(&section, "store", |value| {
            let store = text(value)?.to_owned();
            OutboxSettings::new(store.as_str()).path().map(|_| store)
        });
        let value = |given: Option<Given<Duration>>| given.map(|given| given.value);
        let read = OutboxSettings {
            store: store.map(|given| given.value).unwrap_or_default(),
            max_rows: reader.number(&section, "max_rows", 1..=i64::MAX),
            max_bytes: reader.number(&section, "max_bytes", 1..=i64::MAX),
            max_age: value(reader.duration(&section, "max_age", more_than_zero)),
            keep_sent: value(reader.duration(&section, "keep_sent", more_than_zero)),
            ready_within: value(reader.duration(&section, "ready_within", more_than_zero)),
        };
        OutboxSection(Some(read))
    }

    /// The settings of all layers together. Each layer may leave out where the outbox is, all of them may not.
    pub(super) fn settle(self, reader: &mut Reader) -> Option<OutboxSettings> {
        let settings = self.0?;
        if settings.store.is_empty() {
            reader.mistake("outbox.store", format!("missing; {EXPECTED}"));
            return None;
        }
        Some(settings)
    }
}
