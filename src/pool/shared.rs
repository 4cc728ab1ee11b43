//! What the clones of a pool and its guards share: the idle connections, who holds what, and how to connect.

use std::collections::HashMap;
use std::panic::Location;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::Backoff;
use super::group::GroupCommit;
use super::permits::{Permits, Workshop};
use crate::connection::PublishContext;
use crate::connection::{CLOSE_TIMEOUT, Connection};
use crate::error::{ConnectError, Error, Holder, Result};
use crate::event::PoolEvents;
use crate::fork::Kept;
use crate::metrics::meter::Level;
use crate::session::Watchdog;
use crate::session::{self, IdleReader, Session, Wire};
use crate::settings::PoolSettings;

pub(super) struct Shared {
    pub(super) settings: Arc<PoolSettings>,
    pub(super) permits: r2d2::Pool<Permits>,
    watchdog: Arc<Watchdog>,
    idle_reader: Arc<IdleReader>,
    /// What the messages of all connections pass on their way out.
    pub(super) context: Arc<PublishContext>,
    /// Open connections that nobody has; the last one given back is lent first. `None` once the pool is closed.
    idle: Mutex<Option<Vec<Connection>>>,
    /// One has been given back, or the pool has been closed.
    returned: Condvar,
    /// Who has what, by the number of the permit.
    holders: Mutex<HashMap<u64, Lent>>,
    /// One of them has given its connection back.
    released: Condvar,
    /// Why the last attempt to connect failed, until one succeeds.
    last_failure: Mutex<Option<ConnectError>>,
    /// Threads that publish and wait for a connection.
    pub(super) group: GroupCommit,
    pub(super) waiting: AtomicU32,
    pub(super) listeners: AtomicU32,
    /// Connections opened, or about to be: what the next one is numbered by.
    numbered: AtomicU64,
    /// Emptied by closing the pool, which ends every wait between attempts.
    open: Mutex<Option<Sender<()>>>,
    pub(super) closed: Receiver<()>,
    /// Who keeps a connection and gives it back when the pool is closed.
    to_notify: Mutex<Vec<Weak<dyn PoolClosed>>>,
}

/// Somebody who keeps a connection for as long as the pool is open.
pub(crate) trait PoolClosed: Send + Sync {
    /// The connection is wanted back, once what is under way on it is done.
    fn pool_closed(&self);
}

/// How often to try to connect.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tries {
    One,
    Many,
}

/// A listener's place in the count.
pub(crate) struct Enlisted(Arc<Kept<Shared>>);

impl Enlisted {
    /// For a listener that has been counted.
    pub(super) fn new(shared: Arc<Kept<Shared>>) -> Enlisted {
        Enlisted(shared)
    }
}

impl Drop for Enlisted {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(super) struct Lent {
    since: Instant,
    location: &'static Location<'static>,
    thread: String,
    /// Once it has a connection.
    wire: Option<Arc<Wire>>,
    _in_use: Level,
}

/// An entry among the holders, taken back unless it is kept.
pub(super) struct Lending<'a> {
    shared: &'a Arc<Kept<Shared>>,
    number: Option<u64>,
}

impl<'a> Lending<'a> {
    pub(super) fn new(shared: &'a Arc<Kept<Shared>>, number: u64, location: &'static Location<'static>) -> Lending<'a> {
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        let _in_use = shared.context.events.meter.in_use.one();
        shared.holders().insert(number, Lent { since: Instant::now(), location, thread, wire: None, _in_use });
        Lending { shared, number: Some(number) }
    }

    /// Leaves the entry to the guard.
    pub(super) fn keep(mut self, connection: &Connection) -> Arc<Kept<Shared>> {
        if let Some(number) = self.number.take()
            && let Some(lent) = self.shared.holders().get_mut(&number)
        {
            lent.wire = Some(Arc::clone(&connection.session.wire));
        }
        Arc::clone(self.shared)
    }
}

impl Drop for Lending<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared.holds_no_more(number);
        }
    }
}

/// A thread that waits for a connection, in the count.
pub(super) struct Waits<'a> {
    waiting: &'a AtomicU32,
    _level: Level,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn new(name: &str, settings: PoolSettings, permits: r2d2::Pool<Permits>, workshop: &Workshop) -> Shared {
        let (open, closed) = bounded(0);
        let events = PoolEvents::new(name, settings.size, settings.broker.masked_url(), workshop.events.clone());
        Shared {
            context: Arc::new(PublishContext::new(Arc::new(events))),
            settings: Arc::new(settings),
            permits,
            watchdog: Arc::clone(&workshop.watchdog),
            idle_reader: Arc::clone(&workshop.idle),
            idle: Mutex::new(Some(Vec::new())),
            returned: Condvar::new(),
            holders: Mutex::default(),
            released: Condvar::new(),
            last_failure: Mutex::default(),
            group: GroupCommit::default(),
            waiting: AtomicU32::new(0),
            listeners: AtomicU32::new(0),
            numbered: AtomicU64::new(0),
            open: Mutex::new(Some(open)),
            closed,
            to_notify: Mutex::default(),
        }
    }

    pub(super) fn notify_when_closed(&self, observer: Weak<dyn PoolClosed>) {
        let mut to_notify = self.to_notify.lock().unwrap_or_else(PoisonError::into_inner);
        to_notify.retain(|observer| observer.strong_count() > 0);
        to_notify.push(observer);
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Option<Vec<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection that is alive; the dead ones on the way to it are given up.
    pub(super) fn take_idle(&self) -> Option<Connection> {
        loop {
            // A statement of its own, so that the lock is not held while a connection is given up.
            let connection = self.idle().as_mut().and_then(Vec::pop)?;
            if connection.is_reusable() {
                return Some(connection);
            }
            self.discard(connection, "it was found dead when it was to be lent");
        }
    }

    /// An idle connection that is alive, if one is given back before `until`, or the pool closed.
    fn wait_for_idle(&self, until: Instant) -> Option<Connection> {
        loop {
            if let Some(connection) = self.take_idle() {
                return Some(connection);
            }
            let idle = self.idle();
            let left = until.saturating_duration_since(Instant::now());
            match &*idle {
                None => return None,
                Some(_) if left.is_zero() => return None,
                // One has come in between.
                Some(idle) if !idle.is_empty() => {}
                Some(_) => drop(self.returned.wait_timeout(idle, left)),
            }
        }
    }

    /// Counts the calling thread among those who wait, until it is dropped.
    pub(super) fn one_waits(&self) -> Waits<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waits { waiting: &self.waiting, _level: self.context.events.meter.waiting.one() }
    }

    pub(super) fn holders(&self) -> MutexGuard<'_, HashMap<u64, Lent>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one out of the list of those who have something.
    pub(super) fn holds_no_more(&self, number: u64) {
        let lent = self.holders().remove(&number);
        self.released.notify_all();
        // It says so to a metrics library, which is not to happen under the lock.
        drop(lent);
    }

    /// Waits until nobody has anything but `spared` of them; returns how many more do at `deadline`.
    pub(super) fn wait_for_holders(&self, deadline: Instant, spared: u32) -> u32 {
        let mut holders = self.holders();
        loop {
            let more = u32::try_from(holders.len()).unwrap_or(u32::MAX).saturating_sub(spared);
            let left = deadline.saturating_duration_since(Instant::now());
            if more == 0 || left.is_zero() {
                return more;
            }
            holders = self.released.wait_timeout(holders, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.idle().is_none()
    }

    pub(super) fn refuse_if_closed(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::PoolClosed { pool: self.name().to_owned() });
        }
        Ok(())
    }

    /// Waits, unless the pool is closed in the meantime.
    pub(super) fn sleep(&self, wait: Duration) {
        let _ = self.closed.recv_timeout(wait);
    }

    /// The wires of all connections. What they know is to be asked when the pool's locks are free again: they are leaves.
    fn wires(&self) -> Vec<Arc<Wire>> {
        let mut wires: Vec<Arc<Wire>> = self.holders().values().filter_map(|lent| lent.wire.clone()).collect();
        wires.extend(self.idle().iter().flatten().map(|connection| Arc::clone(&connection.session.wire)));
        wires
    }

    /// Why the broker takes no messages on one of the connections, if so.
    pub(super) fn blocked(&self) -> Option<String> {
        self.wires().iter().find_map(|wire| wire.blocked())
    }

    /// How many connections are up.
    pub(super) fn alive(&self) -> usize {
        self.wires().iter().filter(|wire| !wire.is_over()).count()
    }

    pub(super) fn last_failure(&self) -> MutexGuard<'_, Option<ConnectError>> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect_error(&self, cause: ConnectError) -> Error {
        self.context.events.connect_error(cause)
    }

    pub(super) fn name(&self) -> &str {
        self.context.pool()
    }

    /// Why there was no permit. If the others hold theirs because they cannot connect either, that is the reason.
    pub(super) fn no_permit(&self, waited: Duration) -> Error {
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
        Error::PoolExhausted { pool: self.name().to_owned(), size: self.settings.size, waited, oldest }
    }

    /// Opens a connection, trying again until `deadline` where that may help and is wanted. Takes one that is given back
    /// meanwhile.
    pub(super) fn connect(&self, deadline: Instant, tries: Tries) -> Result<Connection> {
        let number = self.numbered.fetch_add(1, Ordering::Relaxed) + 1;
        let (events, name) = (&self.context.events, format!("coney {} #{number}", self.name()));
        let mut backoff = Backoff::of_connecting();
        let mut before: Option<ConnectError> = None;
        loop {
            self.refuse_if_closed()?;
            let began = Instant::now();
            let attempt = deadline.min(began + self.settings.broker.connect_timeout);
            match session::open(&self.settings.broker, &name, attempt, &self.watchdog, &self.idle_reader) {
                Ok(opened) => {
                    *self.last_failure() = None;
                    events.opened(&name);
                    let settings = Arc::clone(&self.settings);
                    let session = Session::new(opened, Arc::clone(&self.watchdog), Arc::clone(&self.idle_reader));
                    return Ok(Connection::new(name, session, settings, Arc::clone(&self.context)));
                }
                Err(cause) => {
                    // An attempt that ran out of the caller's time says less than one that had all of its own.
                    let cut_short = matches!(cause, ConnectError::Timeout { .. }) && attempt == deadline;
                    let cause = before.take().filter(|_| cut_short).unwrap_or(cause);
                    // Who came with no time to try has found nothing out.
                    if attempt > began {
                        *self.last_failure() = Some(cause.clone());
                    }
                    let now = Instant::now();
                    let next = now + backoff.next();
                    let goes_on = matches!(tries, Tries::Many) && cause.is_transient() && next < deadline;
                    // A broker that lets no more in has let the pool's own connections in: one may be free in a moment.
                    let has_others = cause.is_connection_limit() && self.alive() > 0;
                    let until = match (goes_on, has_others) {
                        (true, _) => next,
                        (false, true) => deadline,
                        (false, false) => {
                            events.connect_failed(&name, &cause, None);
                            return Err(self.connect_error(cause));
                        }
                    };
                    events.connect_failed(&name, &cause, Some(until - now));
                    if let Some(connection) = self.wait_for_idle(until) {
                        return Ok(connection);
                    }
                    self.refuse_if_closed()?;
                    if !goes_on {
                        return Err(self.connect_error(cause));
                    }
                    before = Some(cause);
                }
            }
        }
    }

    pub(super) fn discard(&self, connection: Connection, why: &str) {
        log::debug!(pool = self.name(), connection = connection.name(); "{}: given up: {why}", connection.name());
        connection.discard(why);
    }

    pub(super) fn close(&self, deadline: Instant) {
        drop(self.open.lock().unwrap_or_else(PoisonError::into_inner).take());
        let idle = self.idle().take();
        self.returned.notify_all();
        let to_notify = std::mem::take(&mut *self.to_notify.lock().unwrap_or_else(PoisonError::into_inner));
        to_notify.iter().filter_map(Weak::upgrade).for_each(|observer| observer.pool_closed());
        for connection in idle.into_iter().flatten() {
            connection.close(deadline);
        }
    }

    /// Takes back a connection that is fit for the next borrower.
    pub(super) fn put_back(&self, connection: Connection) {
        let refused = match &mut *self.idle() {
            Some(idle) => {
                idle.push(connection);
                None
            }
            None => Some(connection),
        };
        self.returned.notify_one();
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
