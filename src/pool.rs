//! Pools: a bounded number of connections, opened as they are needed, lent one borrower at a time.
//!
//! r2d2 does the bounding, the waiting and the fairness. What it holds are *places* for connections, which cost nothing
//! to make; the connection itself is opened by the thread that checks a place out and finds it empty or dead. So a
//! pool can be made while the broker is down, the true cause of a failed connect goes to the caller who met it, and
//! one deadline covers waiting and connecting.
//!
//! Lock order: the pool's own locks are leaves; no connection is opened, closed or dropped under one.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::panic::Location;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use scheduled_thread_pool::ScheduledThreadPool;

use crate::connection::{CLOSE_TIMEOUT, Connection};
use crate::deadline::Watchdog;
use crate::error::{ConnectError, Error, Holder, Result};
use crate::settings::{PoolSettings, Settings};
use crate::transport;

/// First wait between two attempts to connect, and the longest; each is twice the one before, less a random part.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// A place for a connection.
#[derive(Debug)]
struct Place {
    number: u64,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Places {
    next: AtomicU64,
}

/// Making a place cannot fail.
#[derive(Debug, thiserror::Error)]
enum Never {}

impl r2d2::ManageConnection for Places {
    type Connection = Place;
    type Error = Never;

    fn connect(&self) -> Result<Place, Never> {
        Ok(Place { number: self.next.fetch_add(1, Ordering::Relaxed), connection: None })
    }

    fn is_valid(&self, _: &mut Place) -> Result<(), Never> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Place) -> bool {
        false
    }
}

/// A pool of connections to one broker. Cheap to clone; all clones are the same pool.
///
/// Connections that are idle when the last clone and the last guard are gone are closed.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    settings: Arc<PoolSettings>,
    masked_url: String,
    places: r2d2::Pool<Places>,
    watchdog: Arc<Watchdog>,
    /// Who has what, by the number of the place.
    holders: Mutex<HashMap<u64, Lent>>,
    /// Why the last attempt to connect failed, until one succeeds.
    last_failure: Mutex<Option<ConnectError>>,
    waiting: AtomicU32,
    idle: AtomicU32,
    created: AtomicU64,
    discarded: AtomicU64,
    /// Emptied by closing the pool, which ends every wait between attempts.
    open: Mutex<Option<Sender<()>>>,
    closed: Receiver<()>,
}

struct Lent {
    since: Instant,
    location: &'static Location<'static>,
    thread: String,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.shared.name)
            .field("url", &self.shared.masked_url)
            .field("status", &self.status())
            .finish()
    }
}

/// How a pool stands, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatus {
    /// The most connections it lends at a time: the setting `size`.
    pub size: u32,
    /// Open connections that wait to be lent.
    pub idle: u32,
    /// Guards that are out, those that are still connecting included.
    pub in_use: u32,
    /// Threads that wait for a guard.
    pub waiting: u32,
    /// Connections opened so far.
    pub created: u64,
    /// Connections given up so far: found dead, left by a panic, or in doubt after a time-out.
    pub discarded: u64,
}

/// The worker that r2d2 makes places on. One is enough for all pools of a program, since making a place is no work.
#[derive(Debug, Clone)]
pub(crate) struct Workshop {
    watchdog: Arc<Watchdog>,
    places: SharedWorker,
}

#[derive(Clone)]
struct SharedWorker(Arc<ScheduledThreadPool>);

impl fmt::Debug for SharedWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWorker")
    }
}

impl Workshop {
    pub(crate) fn start() -> Result<Workshop> {
        let places = ScheduledThreadPool::builder().num_threads(1).thread_name_pattern("coney-places").build();
        Ok(Workshop { watchdog: Watchdog::start()?, places: SharedWorker(Arc::new(places)) })
    }
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
        let places = r2d2::Pool::builder()
            .max_size(settings.size)
            .connection_timeout(settings.checkout_timeout)
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .thread_pool(Arc::clone(&workshop.places.0))
            .build_unchecked(Places { next: AtomicU64::new(1) });
        let (open, closed) = bounded(0);
        let shared = Shared {
            masked_url: settings.broker.masked_url(),
            name,
            settings: Arc::new(settings),
            places,
            watchdog: Arc::clone(&workshop.watchdog),
            holders: Mutex::default(),
            last_failure: Mutex::default(),
            waiting: AtomicU32::new(0),
            idle: AtomicU32::new(0),
            created: AtomicU64::new(0),
            discarded: AtomicU64::new(0),
            open: Mutex::new(Some(open)),
            closed,
        };
        Ok(Pool { shared: Arc::new(shared) })
    }

    /// The name, as in `[pools.NAME]`.
    pub fn name(&self) -> &str {
        &self.shared.name
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
        self.checkout(self.shared.settings.checkout_timeout, Location::caller())
    }

    /// Lends a connection like [`connection`](Pool::connection), waiting up to `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`connection`](Pool::connection).
    #[track_caller]
    pub fn connection_timeout(&self, timeout: Duration) -> Result<PooledConnection> {
        self.checkout(timeout, Location::caller())
    }

    /// Lends a connection if an open one is idle. Waits for nothing and opens nothing.
    #[track_caller]
    pub fn try_connection(&self) -> Option<PooledConnection> {
        let location = Location::caller();
        if self.is_closed() {
            return None;
        }
        let guard = self.guard(self.shared.places.try_get()?, location);
        guard.is_open().then_some(guard)
    }

    /// How the pool stands.
    pub fn status(&self) -> PoolStatus {
        let shared = &self.shared;
        PoolStatus {
            size: shared.settings.size,
            idle: shared.idle.load(Ordering::Relaxed),
            in_use: u32::try_from(shared.holders().len()).unwrap_or(u32::MAX),
            waiting: shared.waiting.load(Ordering::Relaxed),
            created: shared.created.load(Ordering::Relaxed),
            discarded: shared.discarded.load(Ordering::Relaxed),
        }
    }

    /// Closes the pool: nothing more is lent, idle connections are closed now and the others when they are given back.
    ///
    /// Takes at most 5 s. Closing twice does nothing.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Whether [`close`](Pool::close) has been called, on any clone.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    fn checkout(&self, timeout: Duration, location: &'static Location<'static>) -> Result<PooledConnection> {
        let start = Instant::now();
        let deadline = start + timeout;
        let shared = &self.shared;
        if shared.is_closed() {
            return Err(Error::PoolClosed { pool: shared.name.clone() });
        }
        shared.waiting.fetch_add(1, Ordering::Relaxed);
        let place = shared.places.get_timeout(timeout);
        shared.waiting.fetch_sub(1, Ordering::Relaxed);
        let Ok(place) = place else {
            return Err(shared.no_place(start.elapsed()));
        };
        let mut guard = self.guard(place, location);
        if !guard.is_open() {
            guard.place.connection = Some(shared.connect(guard.place.number, deadline)?);
        }
        if shared.is_closed() {
            return Err(Error::PoolClosed { pool: shared.name.clone() });
        }
        Ok(guard)
    }

    /// Takes `place` out, without its connection if that has died.
    fn guard(&self, place: r2d2::PooledConnection<Places>, location: &'static Location<'static>) -> PooledConnection {
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        let lent = Lent { since: Instant::now(), location, thread };
        self.shared.holders().insert(place.number, lent);
        let mut guard = PooledConnection { place, shared: Giver(Arc::clone(&self.shared)) };
        if let Some(connection) = guard.place.connection.take() {
            self.shared.idle.fetch_sub(1, Ordering::Relaxed);
            if connection.is_reusable() {
                guard.place.connection = Some(connection);
            } else {
                self.shared.discard(connection, "it was found dead when it was to be lent");
            }
        }
        guard
    }
}

impl Shared {
    fn holders(&self) -> MutexGuard<'_, HashMap<u64, Lent>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn last_failure(&self) -> MutexGuard<'_, Option<ConnectError>> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect_error(&self, cause: ConnectError) -> Error {
        Error::Connect { pool: self.name.clone(), url: self.masked_url.clone(), cause }
    }

    /// Why there was no place. If the others hold theirs because they cannot connect either, that is the reason.
    fn no_place(&self, waited: Duration) -> Error {
        if let Some(cause) = self.last_failure().clone() {
            return self.connect_error(cause);
        }
        let oldest = self.holders().values().min_by_key(|lent| lent.since).map(|lent| Holder {
            held: lent.since.elapsed(),
            location: lent.location,
            thread: lent.thread.clone(),
        });
        Error::PoolExhausted { pool: self.name.clone(), size: self.settings.size, waited, oldest }
    }

    /// Opens connection number `number`, trying again until `deadline` where that may help.
    fn connect(&self, number: u64, deadline: Instant) -> Result<Connection> {
        let name = format!("coney {} #{number}", self.name);
        let mut backoff = FIRST_BACKOFF;
        loop {
            let attempt = deadline.min(Instant::now() + self.settings.broker.connect_timeout);
            match transport::open(&self.settings.broker, &name, attempt, &self.watchdog) {
                Ok(opened) => {
                    *self.last_failure() = None;
                    self.created.fetch_add(1, Ordering::Relaxed);
                    log::debug!("{name}: connected to {}", self.masked_url);
                    let settings = Arc::clone(&self.settings);
                    return Ok(Connection::new(name, opened, settings, Arc::clone(&self.watchdog)));
                }
                Err(cause) => {
                    *self.last_failure() = Some(cause.clone());
                    let wait = backoff.mul_f64(1.0 - fastrand::f64() / 4.0);
                    if !cause.is_transient() || Instant::now() + wait >= deadline {
                        return Err(self.connect_error(cause));
                    }
                    log::debug!("{name}: {cause}; trying again in {wait:.0?}");
                    // Ends early only when the pool is closed.
                    if let Err(RecvTimeoutError::Disconnected) = self.closed.recv_timeout(wait) {
                        return Err(Error::PoolClosed { pool: self.name.clone() });
                    }
                    backoff = (backoff * 2).min(LONGEST_BACKOFF);
                }
            }
        }
    }

    fn discard(&self, connection: Connection, why: &str) {
        log::debug!("{}: given up: {why}", connection.name());
        self.discarded.fetch_add(1, Ordering::Relaxed);
        connection.discard(why);
    }

    fn close(&self) {
        drop(self.open.lock().unwrap_or_else(PoisonError::into_inner).take());
        // All at once, or r2d2 would hand out the same place again and again.
        let mut places = Vec::new();
        while let Some(place) = self.places.try_get() {
            places.push(place);
        }
        let idle: Vec<Connection> = places.iter_mut().filter_map(|place| place.connection.take()).collect();
        self.idle.fetch_sub(u32::try_from(idle.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        drop(places);
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        for connection in idle {
            connection.close(deadline);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close();
    }
}

/// Where a guard goes back to. It is dropped after the place is given back, and so sees a pool that was closed between.
struct Giver(Arc<Shared>);

impl Drop for Giver {
    fn drop(&mut self) {
        if self.0.is_closed() {
            self.0.close();
        }
    }
}

/// A lent [`Connection`]; dropping it gives the connection back.
///
/// Giving back waits until the callbacks of [`publish_async`](Connection::publish_async) and
/// [`get_and_ack_async`](Connection::get_and_ack_async) have been run, at most for the pool's `confirm_timeout`; those
/// that have no outcome by then get [`Error::Timeout`]. The connection is given up instead of kept if it is dead, if a
/// time-out has left it in doubt, and if the thread is panicking.
pub struct PooledConnection {
    // Dropped in this order.
    place: r2d2::PooledConnection<Places>,
    shared: Giver,
}

impl fmt::Debug for PooledConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledConnection")
            .field("pool", &self.shared.0.name)
            .field("connection", &self.place.connection)
            .finish()
    }
}

impl PooledConnection {
    fn is_open(&self) -> bool {
        self.place.connection.is_some()
    }
}

impl Deref for PooledConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // Set before a guard leaves this room, and taken out only when it is dropped.
        self.place.connection.as_ref().expect("a lent guard holds a connection")
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        let shared = &self.shared.0;
        if let Some(connection) = self.place.connection.take() {
            connection.settle_down(Instant::now() + shared.settings.confirm_timeout);
            if thread::panicking() {
                shared.discard(connection, "its borrower panicked");
            } else if !connection.is_reusable() {
                shared.discard(connection, "it died, or a time-out left it in doubt");
            } else if shared.is_closed() {
                connection.close(Instant::now() + CLOSE_TIMEOUT);
            } else {
                shared.idle.fetch_add(1, Ordering::Relaxed);
                self.place.connection = Some(connection);
            }
        }
        shared.holders().remove(&self.place.number);
    }
}
