//! An inbox in SQLite.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use rusqlite::{Connection, Transaction, TransactionBehavior, params};

use super::{Inbox, InboxListener, handled_before, is_due};
use crate::connection::Delivery;
use crate::error::{Error, Result, StoreError};
use crate::listener::{Context, Listener};
use crate::outbox::sqlite::{migrate, open};
use crate::outbox::{lock, now, schema};
use crate::outcome::Outcome;

/// A SQLite database with an inbox in it.
#[derive(Debug)]
pub struct Sqlite {
    path: PathBuf,
    /// Connections that no handler has; a leaf among locks.
    idle: Mutex<Vec<Connection>>,
    /// The next time at which old ids are removed; a leaf among locks.
    forget_at: Mutex<Instant>,
}

impl Inbox<Sqlite> {
    /// An inbox in a SQLite database, which is made if it is not there: the one that the handler changes. The tables of the inbox
    /// begin with `coney_`; others in it are yours. It is in WAL mode from then on, so that it has files beside it.
    ///
    /// # Errors
    ///
    /// [`Error::Store`] if the file cannot be opened, is no database, or has tables of a later version.
    pub fn sqlite(path: impl AsRef<Path>) -> Result<Inbox<Sqlite>> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let opened = open(path).and_then(|mut connection| {
            migrate(&mut connection, schema::INBOX, schema::SQLITE_INBOX)?;
            Ok(connection)
        });
        let connection = opened.map_err(|error| Error::store(&format!("opening of inbox {name:?}"), error))?;
        let database =
            Sqlite { path: path.to_owned(), idle: Mutex::new(vec![connection]), forget_at: Mutex::new(Instant::now()) };
        Ok(Inbox::new(name, database))
    }
}

impl InboxListener<Sqlite> {
    /// Starts listening. `handler` is called with each message that has not been handled yet, and with a transaction.
    ///
    /// If it returns [`Outcome::Ack`], the id of the message is noted, the transaction is committed, and then the message is acked. A
    /// message whose id is there already is acked without calling it. With any other outcome, and with a panic, the transaction is
    /// rolled back. If it cannot be committed the message has failed, and is tried again by the retry policy.
    ///
    /// A SQLite database has one writer at a time, so there is little to gain from several threads. An
    /// [outbox](crate::outbox::Outbox::publish_in) in the same database takes the same transaction.
    ///
    /// # Errors
    ///
    /// Those of [`ListenerBuilder::spawn`](crate::ListenerBuilder::spawn).
    pub fn spawn_tx<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &Transaction<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.spawn_with(move |inbox, context, delivery, id| {
            inbox.handle(context.queue(), id, |transaction| handler(context, delivery, transaction).into())
        })
    }
}

impl Inbox<Sqlite> {
    fn handle(
        &self,
        consumer: &str,
        id: &str,
        handler: impl FnOnce(&Transaction<'_>) -> Outcome,
    ) -> Result<Outcome, StoreError> {
        let database = &self.inner.database;
        // Taken out, so that the lock is not held: each thread gets one of its own.
        let idle = lock(&database.idle).pop();
        let mut connection = idle.map_or_else(|| open(&database.path), Ok)?;
        let outcome = {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let note = "INSERT INTO coney_inbox (consumer, message_id, handled_at) VALUES (?1, ?2, ?3)
                ON CONFLICT (consumer, message_id) DO NOTHING";
            if transaction.prepare_cached(note)?.execute(params![consumer, id, now()])? == 0 {
                transaction.rollback()?;
                handled_before(consumer, id)
            } else {
                // Rolled back when it is dropped, by a panic of the handler too.
                let outcome = handler(&transaction);
                if outcome == Outcome::Ack {
                    if is_due(&database.forget_at) {
                        transaction.execute("DELETE FROM coney_inbox WHERE handled_at < ?1", [self.oldest_kept()])?;
                    }
                    transaction.commit()?;
                }
                outcome
            }
        };
        lock(&database.idle).push(connection);
        Ok(outcome)
    }
}
