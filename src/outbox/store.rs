//! What an outbox asks of the database that it is in.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::error::StoreError;
use crate::message::Message;

/// A message to be stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Entry {
    /// The exchange to publish it to.
    pub exchange: String,
    /// The routing key to publish it with.
    pub routing_key: String,
    /// Messages of one ordering key are published in the order in which they were stored.
    pub ordering_key: String,
    /// The message, with its `message_id`.
    pub message: Message,
}

impl Entry {
    /// How many bytes its body has, which is what [`Limits::max_bytes`] is about.
    pub fn bytes(&self) -> u64 {
        self.message.body().len() as u64
    }
}

/// A message that is stored and waits to be forwarded.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stored {
    /// Its place in the order in which messages were stored.
    pub id: i64,
    /// What was stored.
    pub entry: Entry,
}

impl Stored {
    /// What a store has read.
    pub fn new(id: i64, entry: Entry) -> Stored {
        Stored { id, entry }
    }
}

/// What has become of a message in an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EntryState {
    /// It waits to be forwarded.
    Pending,
    /// The broker has refused or returned it. It stays until somebody decides.
    Refused,
    /// The broker has confirmed it, and it is kept for a while: see [`Builder::keep_sent`](super::Builder::keep_sent).
    Sent,
}

impl EntryState {
    /// As it is written in the column `state`: 0, 1 or 2.
    pub fn code(self) -> i64 {
        match self {
            EntryState::Pending => 0,
            EntryState::Refused => 1,
            EntryState::Sent => 2,
        }
    }

    /// The word for people and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            EntryState::Pending => "pending",
            EntryState::Refused => "refused",
            EntryState::Sent => "sent",
        }
    }
}

impl fmt::Display for EntryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A message in an outbox, for people to look at.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Listed {
    /// What is stored.
    pub stored: Stored,
    /// What has become of it.
    pub state: EntryState,
    /// Why the broker has refused it.
    pub reason: Option<String>,
    /// When it was stored.
    pub stored_at: SystemTime,
}

/// How an outbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Status {
    /// How many messages wait to be forwarded.
    pub pending: u64,
    /// How many bytes their bodies have.
    pub bytes: u64,
    /// How many messages the broker has refused.
    pub refused: u64,
    /// How long ago the oldest of those that wait was stored.
    pub oldest: Option<Duration>,
}

/// How much may wait to be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// How many messages. Defaults to 1,000,000.
    pub max_rows: u64,
    /// How many bytes their bodies may have. Defaults to 1 GiB.
    pub max_bytes: u64,
    /// How old the oldest may be for another one to be stored. Defaults to no limit.
    pub max_age: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_rows: 1_000_000, max_bytes: 1 << 30, max_age: None }
    }
}

impl Limits {
    /// Whether so much more may be stored, where there is so much.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] or [`StoreError::TooOld`] if it may not.
    pub fn check(&self, there: &Status, rows: u64, bytes: u64) -> Result<(), StoreError> {
        let full = |what, there, most, setting| Err(StoreError::Full { what, there, most, setting });
        match there.oldest {
            _ if there.pending + rows > self.max_rows => {
                full("messages", there.pending + rows, self.max_rows, "max_rows")
            }
            _ if there.bytes + bytes > self.max_bytes => {
                full("bytes", there.bytes + bytes, self.max_bytes, "max_bytes")
            }
            Some(age) if self.max_age.is_some_and(|most| age > most) => {
                Err(StoreError::TooOld { age, most: self.max_age.unwrap_or_default() })
            }
            _ => Ok(()),
        }
    }
}

/// A database with an outbox in it.
///
/// coney has two: SQLite (feature `outbox-sqlite`) and PostgreSQL (feature `outbox-postgres`). Implement it for another, and give it
/// to [`Builder::store`](super::Builder::store).
pub trait Store: Send + Sync + fmt::Debug {
    /// Stores messages, all of them or none. When it returns they are where a power failure does not reach them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] or [`StoreError::TooOld`] beyond the limits; else what is wrong with the database.
    fn append(&self, entries: &[Entry], limits: &Limits) -> Result<(), StoreError>;

    /// Begins to forward. `None` if another process forwards, and this one cannot help it.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn forwarding(&self) -> Result<Option<Box<dyn Forwarding>>, StoreError>;

    /// How the outbox stands.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn status(&self) -> Result<Status, StoreError>;

    /// The oldest messages in this state, at most `most`.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn list(&self, state: EntryState, most: usize) -> Result<Vec<Listed>, StoreError>;

    /// Has refused messages wait again, those with these ids or all of them. Returns how many there were.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn retry(&self, ids: Option<&[i64]>) -> Result<u64, StoreError>;

    /// Removes refused messages for good, those with these ids or all of them. Returns how many there were.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn discard(&self, ids: Option<&[i64]>) -> Result<u64, StoreError>;
}

/// The side of a [`Store`] that takes messages out. One thread has it at a time.
pub trait Forwarding: Send {
    /// The oldest pending messages, in the order in which they were stored, at most `most` and not many more than 8 MiB: none of
    /// these ordering keys, and none that another process has. They stay stored until [`settle`](Forwarding::settle).
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn take(&mut self, most: usize, except: &[String]) -> Result<Vec<Stored>, StoreError>;

    /// Removes what was sent, or notes it as sent if it is to be kept for so long; notes why others were refused. Lets go of the
    /// rest of what was taken. All of it or nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with the database.
    fn settle(&mut self, sent: &[i64], refused: &[(i64, String)], keep: Option<Duration>) -> Result<(), StoreError>;
}

/// Not many more bytes than this are taken at a time.
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
pub(crate) const TAKEN_BYTES: u64 = 8 << 20;
