//! Pools: a bounded number of connections, opened as they are needed, lent one borrower at a time.
//!
//! r2d2 does the bounding and the waiting. What it lends are *permits*, which cost nothing to make; who has one takes an
//! idle connection, or opens one if there is none. So a pool can be made while the broker is down, the true cause of a
//! failed connect goes to the caller who met it, and one deadline covers waiting and connecting.
//!
//! Lock order: the pool's own locks are leaves; no connection is opened, closed or dropped under one.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::panic::Location;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use scheduled_thread_pool::ScheduledThreadPool;

use crate::connection::{CLOSE_TIMEOUT, Connection};
use crate::deadline::{self, Watchdog};
use crate::error::{ConnectError, Error, Holder, Result};
use crate::settings::{PoolSettings, Settings};
use crate::transport;

/// First wait between two attempts to connect, and the longest; each is twice the one before, less a random part.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// The right to hold one connection of the pool.
#[derive(Debug)]
struct Permit {
    number: u64,
}

#[derive(Debug, Default)]
struct Permits {
    made: AtomicU64,
}

/// Making a permit cannot fail.
#[derive(Debug, thiserror::Error)]
enum Never {}

impl r2d2::ManageConnection for Permits {
    type Connection = Permit;
    type Error = Never;

    fn connect(&self) -> Result<Permit, Never> {
        Ok(Permit { number: self.made.fetch_add(1, Ordering::Relaxed) })
    }

    fn is_valid(&self, _: &mut Permit) -> Result<(), Never> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Permit) -> bool {
        false
    }
}

/// A pool of connections to one broker. Cheap to clone; all clones are the same pool.
///
/// Connections that are idle when the last clone and the last guard are gone are closed, within 5 s.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    settings: Arc<PoolSettings>,
    masked_url: String,
    permits: r2d2::Pool<Permits>,
    watchdog: Arc<Watchdog>,
    /// Open connections that nobody has; the last one given back is lent first. `None` once the pool is closed.
    idle: Mutex<Option<Vec<Connection>>>,
    /// Who has what, by the number of the permit.
    holders: Mutex<HashMap<u64, Lent>>,
    /// Why the last attempt to connect failed, until one succeeds.
    last_failure: Mutex<Option<ConnectError>>,
    waiting: AtomicU32,
    listeners: AtomicU32,
    /// Connections opened, or about to be: what the next one is numbered by.
    numbered: AtomicU64,
    created: AtomicU64,
    discarded: AtomicU64,
    /// Emptied by closing the pool, which ends every wait between attempts.
    open: Mutex<Option<Sender<()>>>,
    closed: Receiver<()>,
}

/// How often to try to connect.
#[derive(Debug, Clone, Copy)]
enum Tries {
    One,
    Many,
}

/// A listener's place in the count.
pub(crate) struct Enlisted(Arc<Shared>);

impl Drop for Enlisted {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, Ordering::AcqRel);
    }
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
    /// Open connections that wait to be lent, those included that have died since they came back.
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

/// The threads that pools share: the watchdog, and the worker that r2d2 makes permits on.
#[derive(Debug, Clone)]
pub(crate) struct Workshop {
    watchdog: Arc<Watchdog>,
    worker: SharedWorker,
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
        let worker = ScheduledThreadPool::builder().num_threads(1).thread_name_pattern("coney-permits").build();
        Ok(Workshop { watchdog: Watchdog::start()?, worker: SharedWorker(Arc::new(worker)) })
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
        let (open, closed) = bounded(0);
        let shared = Shared {
            masked_url: settings.broker.masked_url(),
            name,
            settings: Arc::new(settings),
            permits,
            watchdog: Arc::clone(&workshop.watchdog),
            idle: Mutex::new(Some(Vec::new())),
            holders: Mutex::default(),
            last_failure: Mutex::default(),
            waiting: AtomicU32::new(0),
            listeners: AtomicU32::new(0),
            numbered: AtomicU64::new(0),
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

    /// Lends a connection; if one has to be opened, tries once, for whoever has a rhythm of trying of its own.
    #[track_caller]
    pub(crate) fn connection_or_cause(&self) -> Result<PooledConnection> {
        self.checkout(self.shared.settings.checkout_timeout, Tries::One, Location::caller())
    }

    /// Takes note of a listener, which keeps a connection for as long as it lives.
    pub(crate) fn enlist(&self) -> Result<Enlisted> {
        let shared = &self.shared;
        let size = shared.settings.size;
        let one_more = |listeners| (listeners < size).then_some(listeners + 1);
        match shared.listeners.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more) {
            Ok(_) => Ok(Enlisted(Arc::clone(shared))),
            Err(_) => Err(Error::TooManyListeners { pool: shared.name.clone(), size }),
        }
    }

    /// Waits until every guard is back; returns how many are out at `deadline`. For a pool that is closed.
    pub(crate) fn wait_for_guards(&self, deadline: Instant) -> u32 {
        let shared = &self.shared;
        let mut permits = Vec::new();
        while count(permits.len()) < shared.settings.size {
            match shared.permits.get_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(permit) => permits.push(permit),
                Err(_) => break,
            }
        }
        shared.settings.size - count(permits.len())
    }

    /// Lends a connection if an open one is idle. Waits for nothing and opens nothing.
    #[track_caller]
    pub fn try_connection(&self) -> Option<PooledConnection> {
        let location = Location::caller();
        let permit = self.shared.permits.try_get()?;
        let connection = self.shared.take_idle()?;
        Some(self.guard(permit, connection, location))
    }

    /// How the pool stands.
    pub fn status(&self) -> PoolStatus {
        let shared = &self.shared;
        PoolStatus {
            size: shared.settings.size,
            idle: count(shared.idle().as_ref().map_or(0, Vec::len)),
            in_use: count(shared.holders().len()),
            waiting: shared.waiting.load(Ordering::Relaxed),
            created: shared.created.load(Ordering::Relaxed),
            discarded: shared.discarded.load(Ordering::Relaxed),
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
        self.shared.close(deadline);
    }

    /// Whether [`close`](Pool::close) has been called, on any clone.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    fn checkout(
        &self,
        timeout: Duration,
        tries: Tries,
        location: &'static Location<'static>,
    ) -> Result<PooledConnection> {
        let start = Instant::now();
        let deadline = deadline::after(timeout);
        let shared = &self.shared;
        shared.refuse_if_closed()?;
        shared.waiting.fetch_add(1, Ordering::Relaxed);
        let permit = shared.permits.get_timeout(deadline.saturating_duration_since(start));
        shared.waiting.fetch_sub(1, Ordering::Relaxed);
        let Ok(permit) = permit else {
            return Err(shared.no_permit(start.elapsed()));
        };
        let lent = Lending::new(shared, permit.number, location);
        let connection = match shared.take_idle() {
            Some(connection) => connection,
            None => shared.connect(deadline, tries)?,
        };
        lent.keep();
        Ok(PooledConnection { connection: Some(connection), permit, shared: Arc::clone(shared) })
    }

    fn guard(
        &self,
        permit: r2d2::PooledConnection<Permits>,
        connection: Connection,
        location: &'static Location<'static>,
    ) -> PooledConnection {
        Lending::new(&self.shared, permit.number, location).keep();
        PooledConnection { connection: Some(connection), permit, shared: Arc::clone(&self.shared) }
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// An entry among the holders, taken back unless it is kept.
struct Lending<'a> {
    shared: &'a Shared,
    number: Option<u64>,
}

impl<'a> Lending<'a> {
    fn new(shared: &'a Shared, number: u64, location: &'static Location<'static>) -> Lending<'a> {
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        shared.holders().insert(number, Lent { since: Instant::now(), location, thread });
        Lending { shared, number: Some(number) }
    }

    fn keep(mut self) {
        self.number = None;
    }
}

impl Drop for Lending<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared.holders().remove(&number);
        }
    }
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Option<Vec<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection that is alive; the dead ones on the way to it are given up.
    fn take_idle(&self) -> Option<Connection> {
        loop {
            // A statement of its own, so that the lock is not held while a connection is given up.
            let connection = self.idle().as_mut().and_then(Vec::pop)?;
            if connection.is_reusable() {
                return Some(connection);
            }
            self.discard(connection, "it was found dead when it was to be lent");
        }
    }

    fn holders(&self) -> MutexGuard<'_, HashMap<u64, Lent>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.idle().is_none()
    }

    fn refuse_if_closed(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::PoolClosed { pool: self.name.clone() });
        }
        Ok(())
    }

    fn last_failure(&self) -> MutexGuard<'_, Option<ConnectError>> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect_error(&self, cause: ConnectError) -> Error {
        Error::Connect { pool: self.name.clone(), url: self.masked_url.clone(), cause }
    }

    /// Why there was no permit. If the others hold theirs because they cannot connect either, that is the reason.
    fn no_permit(&self, waited: Duration) -> Error {
        if let Err(closed) = self.refuse_if_closed() {
            return closed;
        }
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

    /// Opens a connection, trying again until `deadline` where that may help and is wanted.
    fn connect(&self, deadline: Instant, tries: Tries) -> Result<Connection> {
        let number = self.numbered.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("coney {} #{number}", self.name);
        let mut backoff = FIRST_BACKOFF;
        loop {
            self.refuse_if_closed()?;
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
                    if matches!(tries, Tries::One) || !cause.is_transient() || Instant::now() + wait >= deadline {
                        return Err(self.connect_error(cause));
                    }
                    log::debug!("{name}: {cause}; trying again in {wait:.0?}");
                    // Ends early only when the pool is closed.
                    let _ = self.closed.recv_timeout(wait);
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

    fn close(&self, deadline: Instant) {
        drop(self.open.lock().unwrap_or_else(PoisonError::into_inner).take());
        let idle = self.idle().take();
        for connection in idle.into_iter().flatten() {
            connection.close(deadline);
        }
    }

    /// Takes back a connection that is fit for the next borrower.
    fn put_back(&self, connection: Connection) {
        let refused = match &mut *self.idle() {
            Some(idle) => {
                idle.push(connection);
                None
            }
            None => Some(connection),
        };
        if let Some(connection) = refused {
            connection.close(Instant::now() + CLOSE_TIMEOUT);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close(Instant::now() + CLOSE_TIMEOUT);
    }
}

/// A lent [`Connection`]; dropping it gives the connection back.
///
/// Giving back waits until the callbacks of [`publish_async`](Connection::publish_async) and
/// [`get_and_ack_async`](Connection::get_and_ack_async) have been run, at most for the pool's `confirm_timeout` and half a
/// second; those that have no outcome by then get [`Error::Timeout`] or [`Error::ConnectionLost`]. The connection is given up instead of kept if it is dead, if a
/// time-out has left it in doubt, and if the thread is panicking.
pub struct PooledConnection {
    /// `None` only while it is being dropped.
    connection: Option<Connection>,
    permit: r2d2::PooledConnection<Permits>,
    shared: Arc<Shared>,
}

impl fmt::Debug for PooledConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledConnection")
            .field("pool", &self.shared.name)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Deref for PooledConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // Taken out only when the guard is dropped, and then nobody can ask for it any more.
        self.connection.as_ref().expect("a guard holds its connection until it is dropped")
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.settle_down(Instant::now() + self.shared.settings.confirm_timeout);
            if thread::panicking() {
                self.shared.discard(connection, "its borrower panicked");
            } else if !connection.is_reusable() {
                self.shared.discard(connection, "it died, or a time-out left it in doubt");
            } else {
                self.shared.put_back(connection);
            }
        }
        // The permit goes back after this, so that whoever gets it finds the connection.
        self.shared.holders().remove(&self.permit.number);
    }
}
