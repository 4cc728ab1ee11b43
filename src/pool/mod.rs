//! Pools: a bounded number of connections, opened as they are needed, lent one borrower at a time.
//!
//! r2d2 does the bounding and the waiting. What it lends are *permits*, which cost nothing to make; who has one takes an
//! idle connection, or opens one if there is none. So a pool can be made while the broker is down, the true cause of a
//! failed connect goes to the caller who met it, and one deadline covers waiting and connecting.
//!
//! Lock order: the pool's own locks are leaves; no connection is opened, closed or dropped under one.

mod backoff;
mod delay;
mod group;
mod guard;
mod patience;
mod permits;
mod publish;
mod shared;

use std::fmt;
use std::io;
use std::panic::Location;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

pub(crate) use self::backoff::Backoff;
pub use self::guard::PooledConnection;
pub(crate) use self::patience::Patience;
use self::permits::Permits;
pub(crate) use self::permits::Workshop;
pub(crate) use self::shared::{Enlisted, PoolClosed};
use self::shared::{Lending, Shared, Tries};
use crate::connection::CLOSE_TIMEOUT;
use crate::connection::{Outgoing, PublishContext};
use crate::deadline;
use crate::error::{Error, Result};
use crate::fork::{Kept, Maker};
use crate::health::PoolHealth;
use crate::message::Message;
use crate::metrics::meter::Timer;
use crate::settings::{PoolSettings, Settings};

/// A pool of connections to one broker. Cheap to clone; all clones are the same pool.
///
/// Connections that are idle when the last clone and the last guard are gone are closed, within 5 s.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Kept<Shared>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.name())
            .field("url", &self.shared.context.events.url())
            .field("status", &self.status())
            .finish()
    }
}

/// How a pool stands, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatus {
    /// The most connections it lends at a time: the setting `size`.
    pub size: u32,
    /// Open connections that wait to be lent, those included that have died since they came back.
    pub idle: u32,
    /// Guards that are out, those that are still connecting included.
    pub in_use: u32,
    /// Threads that wait for a guard.
    pub waiting: u32,
    /// Connections opened so far.
    pub created: u64,
    /// Connections lost or given up so far: dead, left by a panic, or in doubt after a time-out.
    pub discarded: u64,
    /// Why the broker takes no messages on a connection of this pool at present (`connection.blocked`), such as
    /// `low on memory`. RabbitMQ says so to a connection that publishes during an alarm, and only then.
    pub blocked: Option<String>,
}

impl Pool {
    /// A pool of its own, not part of an [`App`](crate::App). Nothing is opened yet.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] if a setting is out of range; [`Error::Thread`] if the pool's threads cannot be started.
    pub fn new(name: impl Into<String>, settings: PoolSettings) -> Result<Pool> {
        let name = name.into();
        let mut all = Settings::default();
        all.pools.insert(name.clone(), settings.clone());
        all.check()?;
        Pool::in_workshop(name, settings, &Workshop::start()?)
    }

    pub(crate) fn in_workshop(name: String, settings: PoolSettings, workshop: &Workshop) -> Result<Pool> {
        let permits = r2d2::Pool::builder()
            .max_size(settings.size)
            // How long to wait for the permits to be made, which is no work; each checkout brings its own time-out.
            .connection_timeout(Duration::from_secs(30))
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .thread_pool(Arc::clone(&workshop.worker.0))
            .build(Permits::default())
            .map_err(|_| {
                let source = Arc::new(io::Error::from(io::ErrorKind::TimedOut));
                Error::Thread { name: "coney-permits".to_owned(), source }
            })?;
        Ok(Pool { shared: Arc::new(Kept::new(Shared::new(&name, settings, permits, workshop))) })
    }

    /// The name, as in `[pools.NAME]`.
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &PoolSettings {
        &self.shared.settings
    }

    /// Lends a connection, waiting up to the pool's `checkout_timeout`.
    ///
    /// An open connection is lent if one is idle, otherwise one is opened, within `connect_timeout`. While the broker
    /// is not there this goes on trying until the checkout's time is up; a refusal that will not pass by itself (user,
    /// password, virtual host) is returned at once. A dead connection is never lent; this is known without asking the
    /// broker.
    ///
    /// # Errors
    ///
    /// - [`Error::PoolExhausted`]: all connections stayed out.
    /// - [`Error::Connect`]: the broker cannot be reached or refuses us, with the cause.
    /// - [`Error::PoolClosed`]: the pool has been closed.
    #[track_caller]
    pub fn connection(&self) -> Result<PooledConnection> {
        self.checkout(self.shared.settings.checkout_timeout, Tries::Many, Location::caller())
    }

    /// Lends a connection like [`connection`](Pool::connection), waiting up to `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`connection`](Pool::connection).
    #[track_caller]
    pub fn connection_timeout(&self, timeout: Duration) -> Result<PooledConnection> {
        self.checkout(timeout, Tries::Many, Location::caller())
    }

    /// Lends a connection like [`connection`](Pool::connection); if one has to be opened, tries once. For whoever has a
    /// rhythm of trying of its own, or a person who waits for the answer.
    ///
    /// # Errors
    ///
    /// Those of [`connection`](Pool::connection), and at once while the broker is not there.
    #[track_caller]
    pub fn connection_or_cause(&self) -> Result<PooledConnection> {
        self.connection_once(self.shared.settings.checkout_timeout)
    }

    /// Lends a connection like [`connection_or_cause`](Pool::connection_or_cause), waiting for one up to `timeout`.
    #[track_caller]
    pub(crate) fn connection_once(&self, timeout: Duration) -> Result<PooledConnection> {
        self.checkout(timeout, Tries::One, Location::caller())
    }

    /// Takes note of somebody who keeps a connection and gives it back when the pool is closed.
    pub(crate) fn notify_when_closed(&self, observer: Weak<dyn PoolClosed>) {
        self.shared.notify_when_closed(observer);
    }

    /// Takes note of a listener, which keeps a connection for as long as it lives.
    pub(crate) fn enlist(&self) -> Result<Enlisted> {
        let shared = &self.shared;
        let size = shared.settings.size;
        let one_more = |listeners| (listeners < size).then_some(listeners + 1);
        match shared.listeners.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more) {
            Ok(_) => Ok(Enlisted::new(Arc::clone(shared))),
            Err(_) => Err(Error::TooManyListeners { pool: self.name().to_owned(), size }),
        }
    }

    /// Has `hook` called with each message that is published by a connection of this pool, before it is written, on the
    /// thread that publishes it. The hook returns the message that goes out instead, or why none does:
    /// [`Error::refused`] is for that, and any other error is handed on as it is.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use coney::Error;
    ///
    /// app.publish_pool().before_publish(|to, message| match message.body().len() {
    ///     0 => Err(Error::refused(format!("nothing to say to {:?}", to.routing_key()))),
    ///     _ => Ok(message.with_app_id("orders")),
    /// });
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Hooks are run in the order in which they were added, each with what the one before it returned; the message has the
    /// trace context of its thread by then, and a `message_id` if its publisher has given it one. They see everything that
    /// is published, alone, in batches or asynchronously, by handlers, and the requests and answers of
    /// [`rpc`](crate::rpc): once for each message, however often
    /// [`publish`](Pool::publish) sends it. They do not see the copies by which a failed message waits or is put with the
    /// dead, for those are not new. What was received is not theirs: for that see
    /// [`ListenerBuilder::around`](crate::ListenerBuilder::around).
    ///
    /// A hook may publish. Hooks are not run for what it publishes, be it by this pool or another.
    ///
    /// A hook cannot be taken away again. A panic in it goes through to who publishes.
    pub fn before_publish<F>(&self, hook: F)
    where
        F: Fn(&Outgoing<'_>, Message) -> Result<Message> + Send + Sync + 'static,
    {
        self.shared.context.add(hook);
    }

    /// The process that made the pool.
    pub(crate) fn maker(&self) -> Maker {
        Kept::maker(&self.shared)
    }

    pub(crate) fn context(&self) -> &Arc<PublishContext> {
        &self.shared.context
    }

    /// Waits until every guard is back but `spared`; returns how many more are out at `deadline`. For a pool that is closed.
    pub(crate) fn wait_for_guards(&self, deadline: Instant, spared: u32) -> u32 {
        self.shared.wait_for_holders(deadline, spared)
    }

    /// Lends a connection if an open one is idle. Waits for nothing and opens nothing.
    #[track_caller]
    pub fn try_connection(&self) -> Option<PooledConnection> {
        self.idle_connection(Location::caller())
    }

    fn idle_connection(&self, location: &'static Location<'static>) -> Option<PooledConnection> {
        self.maker().check().ok()?;
        let permit = self.shared.permits.try_get()?;
        let connection = self.shared.take_idle()?;
        let lent = Lending::new(&self.shared, permit.number, location);
        Some(PooledConnection::new(connection, permit, lent))
    }

    /// How the pool stands.
    pub fn status(&self) -> PoolStatus {
        let shared = &self.shared;
        if self.maker().is_parent() {
            let size = shared.settings.size;
            return PoolStatus { size, idle: 0, in_use: 0, waiting: 0, created: 0, discarded: 0, blocked: None };
        }
        // Each a statement of its own: no two locks at a time.
        let idle = shared.idle().as_ref().map_or(0, Vec::len);
        let in_use = shared.holders().len();
        let blocked = shared.blocked();
        PoolStatus {
            size: shared.settings.size,
            idle: count(idle),
            in_use: count(in_use),
            waiting: shared.waiting.load(Ordering::Relaxed) + count(shared.group.followers()),
            created: shared.context.events.connections_opened(),
            discarded: shared.context.events.connections_lost(),
            blocked,
        }
    }

    /// How the pool stands, without asking the broker.
    pub(crate) fn health(&self) -> PoolHealth {
        let PoolStatus { size, in_use, waiting, blocked, .. } = self.status();
        PoolHealth {
            name: self.name().to_owned(),
            size,
            open: if self.maker().is_parent() { 0 } else { count(self.shared.alive()) },
            in_use,
            waiting,
            blocked,
            last_failure: self.shared.last_failure().clone(),
            closed: self.is_closed(),
            not_declared: self.context().events.all_not_declared(),
            round_trip: None,
            error: None,
        }
    }

    /// How the pool stands, after the broker has been asked, on an idle connection or, where none is open, on a new one.
    /// Connections that are lent are in somebody's hands and are believed.
    #[track_caller]
    pub(crate) fn checked_health(&self, timeout: Duration) -> PoolHealth {
        let deadline = deadline::after(timeout);
        let connection = match self.try_connection() {
            Some(connection) => Ok(Some(connection)),
            None if self.shared.alive() > 0 => Ok(None),
            None => self.connection_timeout(timeout).map(Some),
        };
        let asked = connection.and_then(|connection| {
            let left = deadline.saturating_duration_since(Instant::now());
            connection.map(|connection| connection.round_trip(left)).transpose()
        });
        let health = self.health();
        match asked {
            Ok(round_trip) => PoolHealth { round_trip, ..health },
            Err(error) => PoolHealth { error: Some(error), ..health },
        }
    }

    /// Closes the pool: nothing more is lent, idle connections are closed now and the others when they are given back.
    ///
    /// Takes at most 5 s. Who waits for a connection is told when one comes back, or at the end of the wait. Closing
    /// twice does nothing.
    pub fn close(&self) {
        self.close_by(Instant::now() + CLOSE_TIMEOUT);
    }

    pub(crate) fn close_by(&self, deadline: Instant) {
        if !self.maker().is_parent() {
            self.shared.close(deadline);
        }
    }

    /// Whether [`close`](Pool::close) has been called, on any clone.
    pub fn is_closed(&self) -> bool {
        self.maker().is_parent() || self.shared.is_closed()
    }

    /// Refuses a pool that is closed.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.shared.refuse_if_closed()
    }

    fn checkout(
        &self,
        timeout: Duration,
        tries: Tries,
        location: &'static Location<'static>,
    ) -> Result<PooledConnection> {
        self.checkout_or_open(timeout, tries, location, || ())
    }

    /// Calls `opens` if there is no open connection and one is about to be opened.
    fn checkout_or_open(
        &self,
        timeout: Duration,
        tries: Tries,
        location: &'static Location<'static>,
        opens: impl FnOnce(),
    ) -> Result<PooledConnection> {
        let meter = &self.shared.context.events.meter;
        let asked = Timer::start();
        let got = self.take(timeout, tries, location, opens);
        meter.wait.record(asked);
        if got.is_err() {
            meter.checkout_failures.one();
        }
        got
    }

    fn take(
        &self,
        timeout: Duration,
        tries: Tries,
        location: &'static Location<'static>,
        opens: impl FnOnce(),
    ) -> Result<PooledConnection> {
        self.maker().check()?;
        let start = Instant::now();
        let deadline = deadline::after(timeout);
        let shared = &self.shared;
        shared.refuse_if_closed()?;
        let permit = {
            let _waiting = shared.one_waits();
            shared.permits.get_timeout(deadline.saturating_duration_since(start))
        };
        let Ok(permit) = permit else {
            return Err(shared.no_permit(start.elapsed()));
        };
        let lent = Lending::new(shared, permit.number, location);
        let connection = match shared.take_idle() {
            Some(connection) => connection,
            None => {
                opens();
                shared.connect(deadline, tries)?
            }
        };
        Ok(PooledConnection::new(connection, permit, lent))
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
