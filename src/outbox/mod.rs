//! A transactional outbox: messages are stored in a database, with the change that they belong to, and published from there.
//!
//! ```
//! # #[cfg(all(feature = "outbox-sqlite", feature = "embedded"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use coney::outbox::Outbox;
//! use coney::{App, Queue, Settings};
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("shop.db");
//! let app = App::from_settings(Settings::from_url("memory://outbox")?)?;
//! app.publish_pool().connection()?.queue_declare(&Queue::new("orders"))?;
//!
//! let outbox = Outbox::sqlite(&path)?;
//! outbox.publish("", "orders", "stored, whether the broker is there or not")?;
//!
//! // Part of a transaction of your own, in the same database:
//! let mut database = rusqlite::Connection::open(&path)?;
//! database.execute("CREATE TABLE orders (number INTEGER)", [])?;
//! let transaction = database.transaction()?;
//! transaction.execute("INSERT INTO orders VALUES (7)", [])?;
//! outbox.publish_in(&transaction, "", "orders", "order 7")?;
//! transaction.commit()?; // both, or neither
//!
//! outbox.forward(&app)?; // a thread that publishes what is stored, until the app ends
//! while outbox.status()?.pending > 0 {
//!     std::thread::yield_now();
//! }
//! assert_eq!(app.publish_pool().connection()?.queue_declare_passive("orders")?.message_count, 2);
//! app.shutdown(std::time::Duration::from_secs(10))?;
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "outbox-sqlite", feature = "embedded")))]
//! # fn main() {}
//! ```
//!
//! A message is published at least once: if the program ends between the confirm and the note of it, it is published again, with the
//! same `message_id`. An [inbox](crate::inbox) on the other side handles it once.
//!
//! An outbox is in SQLite (feature `outbox-sqlite`), in PostgreSQL (`outbox-postgres`), or in a [`Store`] of your own.

mod forwarder;
mod group;
#[cfg(feature = "outbox-sqlite")]
mod of_settings;
#[cfg(feature = "outbox-postgres")]
pub(crate) mod postgres;
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
mod properties;
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
pub(crate) mod schema;
#[cfg(feature = "outbox-sqlite")]
pub(crate) mod sqlite;
mod store;

use std::fmt;
#[cfg(feature = "outbox-sqlite")]
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use self::group::Group;
pub use self::store::{Entry, EntryState, Forwarding, Limits, Listed, Status, Store, Stored};
use crate::app::App;
use crate::error::{Error, Result, StoreError};
use crate::field::check_short_string;
use crate::message::Message;

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A transaction that a message can be stored in: of `rusqlite` with the feature `outbox-sqlite`, of `postgres` with
/// `outbox-postgres`.
pub trait OutboxTransaction: sealed::Sealed {
    #[doc(hidden)]
    fn store(&mut self, entry: &Entry, limits: &Limits) -> Result<(), StoreError>;
}

/// What an outbox is made with.
///
/// ```no_run
/// # #[cfg(feature = "outbox-sqlite")]
/// # fn main() -> coney::Result<()> {
/// use std::time::Duration;
/// use coney::outbox::Outbox;
///
/// let outbox = Outbox::builder().max_rows(10_000).keep_sent(Duration::from_secs(3600)).sqlite("shop.db")?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "outbox-sqlite"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone)]
#[must_use = "an outbox is made by the last call: `sqlite`, `postgres` or `store`"]
pub struct Builder {
    limits: Limits,
    keep_sent: Option<Duration>,
    poll_interval: Duration,
    blocks_on_refusal: bool,
    ready_within: Duration,
}

impl Default for Builder {
    fn default() -> Builder {
        Builder {
            limits: Limits::default(),
            keep_sent: None,
            poll_interval: Duration::from_millis(100),
            blocks_on_refusal: false,
            ready_within: Duration::from_secs(300),
        }
    }
}

impl Builder {
    /// How many messages may wait to be forwarded; one more is [`StoreError::Full`]. Defaults to 1,000,000.
    pub fn max_rows(mut self, rows: u64) -> Builder {
        self.limits.max_rows = rows;
        self
    }

    /// How many bytes the bodies of all that wait may have; beyond it is [`StoreError::Full`]. Defaults to 1 GiB.
    pub fn max_bytes(mut self, bytes: u64) -> Builder {
        self.limits.max_bytes = bytes;
        self
    }

    /// How long the oldest message may have waited for another one to be stored; beyond it is [`StoreError::TooOld`]. Defaults to
    /// no limit.
    pub fn max_age(mut self, age: Duration) -> Builder {
        self.limits.max_age = Some(age);
        self
    }

    /// For how long messages that were sent are kept in the table, to be looked at. Defaults to not at all.
    pub fn keep_sent(mut self, keep: Duration) -> Builder {
        self.keep_sent = Some(keep).filter(|keep| !keep.is_zero());
        self
    }

    /// How often the database is asked for messages that this outbox does not know of: those of other processes, and those of
    /// transactions that have been committed. Defaults to 100 ms, at least 1 ms. What [`Outbox::publish`] stores is forwarded at
    /// once.
    pub fn poll_interval(mut self, interval: Duration) -> Builder {
        self.poll_interval = interval.max(Duration::from_millis(1));
        self
    }

    /// Whether a message that the broker refuses holds up those behind it of its ordering key, and is tried again and again.
    /// Defaults to false: it is put aside with the reason, and the rest goes on.
    pub fn block_on_refusal(mut self, blocks: bool) -> Builder {
        self.blocks_on_refusal = blocks;
        self
    }

    /// How long the oldest message may have waited for the app to be ready ([`Health`](crate::Health)). Defaults to 5 minutes.
    pub fn ready_within(mut self, age: Duration) -> Builder {
        self.ready_within = age;
        self
    }

    /// An outbox in a SQLite database, which is made if it is not there. The tables in it begin with `coney_`; others in it are
    /// yours. It is in WAL mode from then on, so that it has files beside it.
    ///
    /// # Errors
    ///
    /// [`Error::Store`] if the file cannot be opened, is no database, or has tables of a later version.
    #[cfg(feature = "outbox-sqlite")]
    pub fn sqlite(self, path: impl AsRef<Path>) -> Result<Outbox> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let store = sqlite::Sqlite::open(path).map_err(|error| Error::store(&opening(&name), error))?;
        Ok(self.over(name, Arc::new(store)))
    }

    /// An outbox in a PostgreSQL database, by its URL, such as `postgresql://user:password@localhost/shop`. The tables in it begin
    /// with `coney_`. It has two connections: one to store, one to forward. There is no TLS.
    ///
    /// Limits are checked by numbers that are a second old, and not for [`Outbox::publish_in`].
    ///
    /// # Errors
    ///
    /// [`Error::Store`] if the server cannot be reached, refuses, or has tables of a later version.
    #[cfg(feature = "outbox-postgres")]
    pub fn postgres(self, url: &str) -> Result<Outbox> {
        let config = postgres::config(url).map_err(|error| Error::store(&opening("PostgreSQL"), error))?;
        let name = postgres::name(&config);
        let store = postgres::Postgres::open(config).map_err(|error| Error::store(&opening(&name), error))?;
        Ok(self.over(name, Arc::new(store)))
    }

    /// An outbox in a database of another kind. `name` is what it is called in logs, metrics and errors.
    pub fn store(self, name: impl Into<String>, store: impl Store + 'static) -> Outbox {
        self.over(name.into(), Arc::new(store))
    }

    fn over(self, name: String, store: Arc<dyn Store>) -> Outbox {
        let (wake, woken) = bounded(1);
        let inner =
            Inner { name, store, builder: self, group: Group::default(), wake, woken, expected: AtomicU64::new(0) };
        Outbox { inner: Arc::new(inner) }
    }
}

#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
fn opening(name: &str) -> String {
    format!("opening of outbox {name:?}")
}

/// Messages that are stored in a database and published from there. Cheap to clone; all clones are the same outbox. See the
/// [module](self).
#[derive(Clone)]
pub struct Outbox {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) name: String,
    store: Arc<dyn Store>,
    builder: Builder,
    group: Group,
    /// Full: the forwarder knows already.
    wake: Sender<()>,
    woken: Receiver<()>,
    /// Before this time a commit may come, in milliseconds since [`epoch`].
    expected: AtomicU64,
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox")
            .field("name", &self.inner.name)
            .field("builder", &self.inner.builder)
            .finish_non_exhaustive()
    }
}

/// The longest frame of RabbitMQ, unless it is configured otherwise (`frame_max`).
const FRAME_MAX: usize = 131_072;

/// How long after [`Outbox::publish_in`] a commit is looked out for more often.
const COMMIT_EXPECTED: Duration = Duration::from_secs(1);

impl Inner {
    fn error(&self, doing: &str, error: StoreError) -> Error {
        Error::store(&format!("{doing} outbox {:?}", self.name), error)
    }

    /// A commit may follow.
    fn expect_commit(&self) {
        let until = epoch().elapsed() + COMMIT_EXPECTED;
        self.expected.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.wake();
    }

    fn is_commit_expected(&self) -> bool {
        epoch().elapsed() < Duration::from_millis(self.expected.load(Ordering::Relaxed))
    }

    fn wake(&self) {
        let _ = self.wake.try_send(());
    }
}

/// Milliseconds since 1970.
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// So long ago, in milliseconds since 1970.
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
pub(crate) fn ago(time: Duration) -> i64 {
    now().saturating_sub(i64::try_from(time.as_millis()).unwrap_or(i64::MAX))
}

/// How long ago that was.
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
fn age(milliseconds: i64) -> Duration {
    Duration::from_millis(u64::try_from(now() - milliseconds).unwrap_or_default())
}

/// The value under a lock, also after a panic of a thread that had it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When this process has first asked.
fn epoch() -> Instant {
    static EPOCH: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *EPOCH
}

impl Outbox {
    /// An outbox with other limits than the usual ones.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// An outbox in a SQLite database. See [`Builder::sqlite`].
    ///
    /// # Errors
    ///
    /// Those of [`Builder::sqlite`].
    #[cfg(feature = "outbox-sqlite")]
    pub fn sqlite(path: impl AsRef<Path>) -> Result<Outbox> {
        Outbox::builder().sqlite(path)
    }

    /// An outbox in a PostgreSQL database. See [`Builder::postgres`].
    ///
    /// # Errors
    ///
    /// Those of [`Builder::postgres`].
    #[cfg(feature = "outbox-postgres")]
    pub fn postgres(url: &str) -> Result<Outbox> {
        Outbox::builder().postgres(url)
    }

    /// The name in logs, metrics and errors: the path of the file, or the address of the server without a password.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Stores a message. `Ok` means that it is on disk, whether the broker is there or not. It has a `message_id` from then on, its
    /// own or a new one.
    ///
    /// Threads that store at the same time share a commit.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]: the outbox is full, or the database does not take it; then nothing is stored. [`Error::InvalidArgument`]
    /// for a name or a property that no broker takes.
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        self.with_ordering_key("").publish(exchange, routing_key, message)
    }

    /// Stores a message in a transaction. It is published if, and only if, that is committed.
    ///
    /// The transaction is one of the outbox's own database, `&rusqlite::Transaction` or `&mut postgres::Transaction`. It is
    /// forwarded within some milliseconds of the commit.
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Self::publish).
    pub fn publish_in(
        &self,
        transaction: impl OutboxTransaction,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
    ) -> Result<()> {
        self.with_ordering_key("").publish_in(transaction, exchange, routing_key, message)
    }

    /// The same outbox for messages that need no order but among those of this key. Messages without a key are of one order.
    ///
    /// What is refused, or cannot be delivered at present, holds up no other key.
    pub fn with_ordering_key<'o>(&'o self, ordering_key: &'o str) -> Ordered<'o> {
        Ordered { outbox: self, ordering_key }
    }

    /// How much waits, and for how long.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn status(&self) -> Result<Status> {
        self.inner.store.status().map_err(|error| self.inner.error("status of", error))
    }

    /// The oldest messages in this state, at most `most`.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn list(&self, state: EntryState, most: usize) -> Result<Vec<Listed>> {
        self.inner.store.list(state, most).map_err(|error| self.inner.error("list of", error))
    }

    /// Has refused messages forwarded once more: those with these ids, or all of them. Returns how many there were.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn retry(&self, ids: Option<&[i64]>) -> Result<u64> {
        let number = self.inner.store.retry(ids).map_err(|error| self.inner.error("retry in", error))?;
        self.inner.wake();
        Ok(number)
    }

    /// Removes refused messages for good: those with these ids, or all of them. Returns how many there were.
    ///
    /// # Errors
    ///
    /// [`Error::Store`].
    pub fn discard(&self, ids: Option<&[i64]>) -> Result<u64> {
        self.inner.store.discard(ids).map_err(|error| self.inner.error("discard in", error))
    }

    /// Starts to publish what is stored, on a connection of the app's publish pool, until the app is shut down or dropped. What
    /// is stored then waits for the next start.
    ///
    /// Several processes may do so. Of one SQLite database one forwards at a time, and another takes over when it ends. Of one
    /// PostgreSQL database all of them do, each with other ordering keys.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`] if the thread cannot be started, [`Error::Forked`] in a child of the process that made the app,
    /// [`Error::PoolClosed`] if it has been shut down.
    pub fn forward(&self, app: &App) -> Result<()> {
        let forwarder = forwarder::start(&self.inner, app.publish_pool())?;
        app.accompany(forwarder)
    }
}

/// An [`Outbox`] with an ordering key.
#[derive(Debug, Clone, Copy)]
pub struct Ordered<'o> {
    outbox: &'o Outbox,
    ordering_key: &'o str,
}

impl Ordered<'_> {
    /// As [`Outbox::publish`].
    ///
    /// # Errors
    ///
    /// Those of [`Outbox::publish`].
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        let entry = self.entry(exchange, routing_key, message.into())?;
        let inner = &self.outbox.inner;
        let limits = &inner.builder.limits;
        inner.group.append(&*inner.store, limits, entry).map_err(|error| inner.error("publish to", error))?;
        inner.wake();
        Ok(())
    }

    /// As [`Outbox::publish_in`].
    ///
    /// # Errors
    ///
    /// Those of [`Outbox::publish_in`].
    pub fn publish_in(
        &self,
        mut transaction: impl OutboxTransaction,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
    ) -> Result<()> {
        let entry = self.entry(exchange, routing_key, message.into())?;
        let inner = &self.outbox.inner;
        transaction.store(&entry, &inner.builder.limits).map_err(|error| inner.error("publish to", error))?;
        inner.expect_commit();
        Ok(())
    }

    fn entry(&self, exchange: &str, routing_key: &str, message: Message) -> Result<Entry> {
        check_short_string(|| "exchange name".to_owned(), exchange)?;
        check_short_string(|| "routing key".to_owned(), routing_key)?;
        message.check(FRAME_MAX)?;
        let message = message.with_some_id();
        let (exchange, routing_key, ordering_key) =
            (exchange.to_owned(), routing_key.to_owned(), self.ordering_key.to_owned());
        Ok(Entry { exchange, routing_key, ordering_key, message })
    }
}
