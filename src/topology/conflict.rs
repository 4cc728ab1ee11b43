//! What becomes of a declaration that the broker refuses.

use std::fmt;
use std::str::FromStr;

use super::{Exchange, Queue, Topology};
use crate::error::Error;

/// What a declaration does about a queue or an exchange that is there already with other properties (406,
/// `PRECONDITION_FAILED`), which no broker changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OnConflict {
    /// It is an error, with what differs in the broker's words.
    #[default]
    Fail,
    /// It is used as it is. The log and an event say what differs.
    Warn,
    /// Nothing is declared: it has to be there, with whatever properties, and it is an error (404) if it is not.
    Passive,
}

impl OnConflict {
    pub(crate) const EXPECTED: &'static str = "expected \"fail\", \"warn\" or \"passive\"";

    /// The word in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            OnConflict::Fail => "fail",
            OnConflict::Warn => "warn",
            OnConflict::Passive => "passive",
        }
    }
}

impl fmt::Display for OnConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for OnConflict {
    type Err = Error;

    fn from_str(text: &str) -> Result<OnConflict, Error> {
        let all = [OnConflict::Fail, OnConflict::Warn, OnConflict::Passive];
        let known = all.into_iter().find(|one| one.as_str() == text);
        known.ok_or_else(|| Error::invalid("on_conflict", OnConflict::EXPECTED))
    }
}

impl Topology {
    /// What is done about queues and exchanges that are there with other properties, where they do not say so themselves. Defaults to
    /// [`OnConflict::Fail`], or for a listener to what `[topology]` of the settings says.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Topology {
        self.on_conflict = Some(on_conflict);
        self
    }

    /// Whether what the broker refuses is left out, and the rest is declared. The log, an event and
    /// [`App::health`](crate::App::health) say what was left out. Defaults to false: the first refusal is an error. For a listener it
    /// defaults to what `[topology]` of the settings says.
    #[must_use]
    pub fn skip_failed(mut self, skip_failed: bool) -> Topology {
        self.skip_failed = Some(skip_failed);
        self
    }

    /// The same, with what `defaults` says where it does not say itself.
    pub(crate) fn or_as(mut self, defaults: &Topology) -> Topology {
        self.on_conflict = self.on_conflict.or(defaults.on_conflict);
        self.skip_failed = self.skip_failed.or(defaults.skip_failed);
        self
    }
}

impl Exchange {
    /// What is done if it is there with other properties. Defaults to what the [topology](Topology::on_conflict) says.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Exchange {
        self.on_conflict = Some(on_conflict);
        self
    }
}

impl Queue {
    /// What is done if it is there with other properties. Defaults to what the [topology](Topology::on_conflict) says.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Queue {
        self.on_conflict = Some(on_conflict);
        self
    }
}
