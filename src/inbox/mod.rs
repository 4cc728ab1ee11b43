//! An inbox: a message that changes a database changes it once, however often it is delivered.
//!
//! ```
//! # #[cfg(all(feature = "outbox-sqlite", feature = "embedded"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use coney::inbox::Inbox;
//! use coney::{App, Message, Queue, Settings, Topology};
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("stock.db");
//! let app = App::from_settings(Settings::from_url("memory://inbox")?)?;
//! let inbox = Inbox::sqlite(&path)?;
//! rusqlite::Connection::open(&path)?.execute("CREATE TABLE sold (number INTEGER)", [])?;
//!
//! let listener = app
//!     .listener("orders")
//!     .topology(Topology::new().queue(Queue::new("orders")))
//!     .inbox(&inbox)
//!     .spawn_tx(|_context, _delivery, transaction| transaction.execute("INSERT INTO sold VALUES (7)", []).map(drop))?;
//! // Published twice under one id, as after a time-out; handled once.
//! for _ in 0..2 {
//!     app.publish_pool().publish("", "orders", Message::new("order 7").with_message_id("order-7"))?;
//! }
//! while listener.stats().acked < 2 {
//!     std::thread::yield_now();
//! }
//! let sold: i64 = rusqlite::Connection::open(&path)?.query_row("SELECT count(*) FROM sold", [], |row| row.get(0))?;
//! assert_eq!(sold, 1);
//! listener.stop()?;
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "outbox-sqlite", feature = "embedded")))]
//! # fn main() {}
//! ```
//!
//! The id of a message is noted in the same transaction as what the handler changes, which is committed before the message is acked.
//! If the program ends in between, the message is delivered again, its id is found, and it is acked without calling the handler.

#[cfg(feature = "outbox-postgres")]
mod postgres;
#[cfg(feature = "outbox-sqlite")]
mod sqlite;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[cfg(feature = "outbox-postgres")]
pub use self::postgres::Postgres;
#[cfg(feature = "outbox-sqlite")]
pub use self::sqlite::Sqlite;
use crate::connection::Delivery;
use crate::error::{Error, Result, StoreError};
use crate::listener::{Context, Listener, ListenerBuilder};
use crate::outbox::{ago, lock};
use crate::outcome::Outcome;

/// How often ids that are old enough are removed.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// For how long ids are kept unless it is said otherwise: a week.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Where the ids of handled messages are noted, in a database of the kind `D`. Cheap to clone; all clones are the same inbox. See
/// the [module](self).
pub struct Inbox<D> {
    inner: Arc<Inner<D>>,
    retention: Duration,
}

struct Inner<D> {
    name: String,
    database: D,
}

/// Whether it is time to remove old ids. If so, the next time is in a minute.
fn is_due(at: &Mutex<Instant>) -> bool {
    let (mut at, now) = (lock(at), Instant::now());
    let is_due = *at <= now;
    if is_due {
        *at = now + FORGET_EVERY;
    }
    is_due
}

impl<D> Clone for Inbox<D> {
    fn clone(&self) -> Inbox<D> {
        Inbox { inner: Arc::clone(&self.inner), retention: self.retention }
    }
}

impl<D> fmt::Debug for Inbox<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("name", &self.inner.name)
            .field("retention", &self.retention)
            .finish_non_exhaustive()
    }
}

impl<D> Inbox<D> {
    fn new(name: String, database: D) -> Inbox<D> {
        Inbox { inner: Arc::new(Inner { name, database }), retention: RETENTION }
    }

    /// For how long the id of a message is kept, for listeners that are given this one: a message that is delivered again later is
    /// handled again. Defaults to 7 days.
    #[must_use]
    pub fn with_retention(mut self, retention: Duration) -> Inbox<D> {
        self.retention = retention;
        self
    }

    /// Ids that were noted before this are removed; in milliseconds since 1970.
    fn oldest_kept(&self) -> i64 {
        ago(self.retention)
    }
}

type IdOf = dyn Fn(&Delivery<'_>) -> Option<String> + Send + Sync;

/// A listener with an [`Inbox`]. Made by [`ListenerBuilder::inbox`].
#[must_use = "a listener does nothing until it is spawned"]
pub struct InboxListener<D> {
    builder: ListenerBuilder,
    inbox: Inbox<D>,
    id_of: Box<IdOf>,
}

impl<D> fmt::Debug for InboxListener<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboxListener")
            .field("builder", &self.builder)
            .field("inbox", &self.inbox)
            .finish_non_exhaustive()
    }
}

impl ListenerBuilder {
    /// Has each message handled once, in a transaction of the inbox's database that also notes its id. See [`Inbox`].
    pub fn inbox<D>(self, inbox: &Inbox<D>) -> InboxListener<D> {
        let id_of = Box::new(|delivery: &Delivery<'_>| delivery.message().message_id().map(str::to_owned));
        InboxListener { builder: self, inbox: inbox.clone(), id_of }
    }
}

impl<D> InboxListener<D> {
    /// What the id of a message is. Defaults to its property `message_id`. A message without one is not handled: it goes to the queue
    /// `NAME.dead` as undecodable, with a reason that says so.
    ///
    /// Ids are told apart by queue: a message that is in two queues is handled once for each.
    pub fn id<F>(mut self, id_of: F) -> InboxListener<D>
    where
        F: Fn(&Delivery<'_>) -> Option<String> + Send + Sync + 'static,
    {
        self.id_of = Box::new(id_of);
        self
    }
}

impl<D: Send + Sync + 'static> InboxListener<D> {
    /// Starts listening. `handle` is given each message that has an id, with the id, and handles it unless it was handled before.
    fn spawn_with<H>(self, handle: H) -> Result<Listener>
    where
        H: Fn(&Inbox<D>, &Context<'_>, &Delivery<'_>, &str) -> Result<Outcome, StoreError> + Send + Sync + 'static,
    {
        let InboxListener { builder, inbox, id_of } = self;
        builder.keeping_undecodable_if_it_may().spawn(move |context, delivery| {
            let Some(id) = id_of(delivery) else {
                let problem = "the message has no message_id, by which an inbox would know it again";
                return Outcome::Undecodable(problem.to_owned());
            };
            handle(&inbox, context, delivery, &id).unwrap_or_else(|error| {
                let during = format!("handling of message {id:?} in inbox {:?}", inbox.inner.name);
                Outcome::from(Err::<(), _>(Error::store(&during, error)))
            })
        })
    }
}

/// The outcome of a message whose id was there already.
fn handled_before(consumer: &str, id: &str) -> Outcome {
    log::debug!(queue = consumer, message_id = id; "inbox: message {id:?} from queue {consumer:?} was handled before");
    Outcome::Ack
}
