//! What can go wrong with the database of an outbox or an inbox.

use std::time::Duration;

/// Why the database of an [outbox](crate::outbox) or an [inbox](crate::inbox) has not done what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// So much waits to be forwarded that no more is taken. Nothing was stored.
    #[error("the outbox is full: {there} {what} wait to be forwarded, and at most {most} may ({setting})")]
    Full {
        /// What is counted: `messages` or `bytes`.
        what: &'static str,
        /// How much there is, what was to be added included.
        there: u64,
        /// How much there may be.
        most: u64,
        /// The setting that says so.
        setting: &'static str,
    },
    /// The oldest message has waited for so long that no more is taken. Nothing was stored.
    #[error("the oldest message waits to be forwarded for {age:.0?}, and at most {most:.0?} may be (max_age)")]
    TooOld {
        /// For how long it has waited.
        age: Duration,
        /// For how long it may.
        most: Duration,
    },
    /// Another connection has the database locked, for longer than was waited.
    #[error("the database is locked: {0}")]
    Locked(String),
    /// What is in the file is no database, or a damaged one.
    #[error("the database is damaged, or none: {0}")]
    Corrupt(String),
    /// The disk is full, or the database may not grow.
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// The server cannot be reached, or the connection to it was lost.
    #[error("no connection to the database: {0}")]
    Disconnected(String),
    /// The tables are of a later version than this program knows.
    #[error("the tables are of version {found}, and this program knows up to version {known}")]
    Version {
        /// The version of the tables.
        found: i64,
        /// The latest version that is known.
        known: i64,
    },
    /// Something else, in the words of the database.
    #[error("{0}")]
    Other(String),
}

impl StoreError {
    /// Whether the same call may succeed later though nobody changes anything.
    pub fn is_transient(&self) -> bool {
        match self {
            StoreError::Full { .. }
            | StoreError::TooOld { .. }
            | StoreError::Locked(_)
            | StoreError::DiskFull(_)
            | StoreError::Disconnected(_) => true,
            StoreError::Corrupt(_) | StoreError::Version { .. } | StoreError::Other(_) => false,
        }
    }
}
