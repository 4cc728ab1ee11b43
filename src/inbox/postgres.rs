//! An inbox in PostgreSQL.

use std::fmt;
use std::sync::Mutex;
use std::time::Instant;

use postgres::{Client, Config, Transaction};

use super::{Inbox, InboxListener, handled_before, is_due};
use crate::connection::Delivery;
use crate::error::{Error, Result, StoreError};
use crate::listener::{Context, Listener};
use crate::outbox::postgres::{config, connect, migrate, name};
use crate::outbox::{lock, now, schema};
use crate::outcome::Outcome;

/// A PostgreSQL database with an inbox in it.
pub struct Postgres {
    config: Config,
    /// Connections that no handler has; a leaf among locks.
    idle: Mutex<Vec<Client>>,
    /// The next time at which old ids are removed; a leaf among locks.
    forget_at: Mutex<Instant>,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("database", &name(&self.config)).finish_non_exhaustive()
    }
}

impl Inbox<Postgres> {
    /// An inbox in a PostgreSQL database, by its URL: the one that the handler changes. The tables of the inbox begin with `coney_`.
    /// Each thread of a listener has a connection of its own. There is no TLS.
    ///
    /// # Errors
    ///
    /// [`Error::Store`] if the server cannot be reached, refuses, or has tables of a later version.
    pub fn postgres(url: &str) -> Result<Inbox<Postgres>> {
        let opening = |name: &str| format!("opening of inbox {name:?}");
        let config = config(url).map_err(|error| Error::store(&opening("PostgreSQL"), error))?;
        let name = name(&config);
        let connected = connect(&config).and_then(|mut client| {
            migrate(&mut client, schema::INBOX, schema::POSTGRES_INBOX)?;
            Ok(client)
        });
        let client = connected.map_err(|error| Error::store(&opening(&name), error))?;
        let database = Postgres { config, idle: Mutex::new(vec![client]), forget_at: Mutex::new(Instant::now()) };
        Ok(Inbox::new(name, database))
    }

    fn handle(
        &self,
        consumer: &str,
        id: &str,
        handler: impl FnOnce(&mut Transaction<'_>) -> Outcome,
    ) -> Result<Outcome, StoreError> {
        let database = &self.inner.database;
        // Taken out, so that the lock is not held: each thread gets one of its own.
        let idle = lock(&database.idle).pop().filter(|client| !client.is_closed());
        let mut client = idle.map_or_else(|| connect(&database.config), Ok)?;
        let outcome = {
            let mut transaction = client.transaction()?;
            let note =
                "INSERT INTO coney_inbox (consumer, message_id, handled_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
            if transaction.execute(note, &[&consumer, &id, &now()])? == 0 {
                transaction.rollback()?;
                handled_before(consumer, id)
            } else {
                // Rolled back when it is dropped, by a panic of the handler too.
                let outcome = handler(&mut transaction);
                if outcome == Outcome::Ack {
                    if is_due(&database.forget_at) {
                        let before = self.oldest_kept();
                        transaction.execute("DELETE FROM coney_inbox WHERE handled_at < $1", &[&before])?;
                    }
                    transaction.commit()?;
                }
                outcome
            }
        };
        lock(&database.idle).push(client);
        Ok(outcome)
    }
}

impl InboxListener<Postgres> {
    /// Starts listening. `handler` is called with each message that has not been handled yet, and with a transaction.
    ///
    /// If it returns [`Outcome::Ack`], the id of the message is noted, the transaction is committed, and then the message is acked. A
    /// message whose id is there already is acked without calling it. With any other outcome, and with a panic, the transaction is
    /// rolled back. If it cannot be committed the message has failed, and is tried again by the retry policy.
    ///
    /// # Errors
    ///
    /// Those of [`ListenerBuilder::spawn`](crate::ListenerBuilder::spawn).
    pub fn spawn_tx<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &mut Transaction<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.spawn_with(move |inbox, context, delivery, id| {
            inbox.handle(context.queue(), id, |transaction| handler(context, delivery, transaction).into())
        })
    }
}
