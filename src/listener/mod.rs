//! Listeners: threads that call back for each message of a queue, and outlive whatever happens to their connection.
//!
//! A listener keeps one connection of its pool. Its supervisor thread ([`supervisor`]) opens a session on it: declares
//! what is to be there, and consumes in a run ([`run`](mod@run)) after another, with rests between them where that is wanted
//! ([`pause`]). A run has one worker thread ([`worker`]) for each unit of concurrency, with a channel and a consumer of its own;
//! more and fewer of them where that varies ([`growth`]). When a session ends for whatever reason other than being told to,
//! another follows.

mod batch;
mod builder;
mod context;
mod dedupe;
mod deferred;
mod growth;
mod in_place;
mod kill_switch;
mod launch;
mod own_thread;
mod pacing;
mod partitioned;
mod pause;
mod post;
mod rate;
mod retry;
mod route;
mod run;
mod settling;
mod share;
mod state;
mod stream;
mod supervisor;
mod typed;
mod unsettled;
mod worker;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};

pub use self::batch::{Batch, BatchItem, Batches};
pub use self::builder::ListenerBuilder;
pub use self::context::Context;
pub(crate) use self::deferred::AfterConfirm;
pub(crate) use self::launch::launch_enlisted;
pub use self::partitioned::PartitionedListenerBuilder;
pub use self::pause::PauseReason;
use self::pause::{Pause, Pauses};
pub(crate) use self::route::{Arounds, Route};
use self::state::{Counters, Standing, count};
pub use self::state::{ListenerState, ListenerStats};
pub use self::stream::{Offset, OffsetFile, OffsetStore};
pub use self::typed::Routes;
pub use self::unsettled::Unsettled;
use crate::deadline;
use crate::error::{Error, Result};
use crate::event::ListenerEvents;
use crate::health::ListenerHealth;
use crate::pool::Pool;

/// How long a listener may take to stop when it is dropped.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A thread's name may not have a NUL in it; a queue's may.
fn thread_name(name: &str) -> String {
    name.replace('\0', "?")
}

/// The listeners of an app.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Vec<Arc<Shared>>>);

impl Registry {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, listener: &Arc<Shared>) {
        self.list().push(Arc::clone(listener));
    }

    /// Lets go of listeners that have ended, and of what their handlers hold on to.
    fn forget_ended(&self) {
        let mut list = self.list();
        let (ended, running): (Vec<_>, Vec<_>) =
            std::mem::take(&mut *list).into_iter().partition(|one| one.has_ended());
        *list = running;
        drop(list);
        // A handler may hold an app, which must not end under the lock.
        drop(ended);
    }

    /// The pool whose connection the calling thread uses, if it is in a handler of one of these.
    pub(crate) fn own_pool(&self) -> Option<String> {
        own_thread::one_of(&self.all()).map(|listener| listener.pool.name().to_owned())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Shared>> {
        self.list().clone()
    }

    /// Stops all listeners but those in `spared`.
    pub(crate) fn stop_all_but(&self, spared: &[Arc<Shared>], timeout: Duration) -> Result<()> {
        let deadline = deadline::after(timeout);
        let is_spared = |listener: &Arc<Shared>| spared.iter().any(|spared| Arc::ptr_eq(spared, listener));
        let listeners: Vec<Arc<Shared>> = self.all().into_iter().filter(|listener| !is_spared(listener)).collect();
        // All are told before any is waited for.
        listeners.iter().for_each(|listener| listener.tell_to_stop(deadline));
        let left: Vec<String> = listeners.iter().filter_map(|listener| listener.wait(deadline).err()).collect();
        self.forget_ended();
        if left.is_empty() { Ok(()) } else { Err(Error::NotEnded { left, after: timeout }) }
    }
}

pub(crate) struct Shared {
    name: String,
    pool: Pool,
    registry: Weak<Registry>,
    in_background: bool,
    /// At least one.
    routes: Vec<Route>,
    standing: Mutex<Standing>,
    pauses: Pauses,
    counters: Counters,
    events: ListenerEvents,
    /// Nothing is sent; dropping it is the sign to stop.
    stop: Mutex<Option<Sender<()>>>,
    /// By when it was to have ended, as somebody has said who waited until then.
    stop_by: Mutex<Option<Instant>>,
    stopped: Receiver<()>,
    /// Nothing is sent; its end is the sign that the supervisor is done.
    done: Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("name", &self.name)
            .field("queues", &self.routes.iter().map(Route::queue).collect::<Vec<_>>())
            .field("state", &self.standing().state)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters another state.
    fn now(&self, state: ListenerState) {
        let level = match state {
            ListenerState::Consuming => Some(self.events.one_consuming()),
            ListenerState::Paused { .. } => Some(self.events.one_paused()),
            _ => None,
        };
        let mut standing = self.standing();
        if let ListenerState::Recovering { error, .. } = &state {
            standing.last_error = Some(error.clone());
        }
        if std::mem::discriminant(&standing.state) != std::mem::discriminant(&state) {
            standing.since = Instant::now();
        }
        standing.state = state;
        standing._level = level;
    }

    /// Enters a pause.
    fn rests(&self, pause: &Pause) {
        count(&self.counters.pauses);
        let wait = pause.until.map(|until| until.saturating_duration_since(Instant::now()));
        self.events.paused(wait, &pause.why);
        self.now(ListenerState::from(pause));
    }

    /// How it fares, for whoever asks about the program's health.
    pub(crate) fn health(&self) -> ListenerHealth {
        let standing = self.standing();
        ListenerHealth {
            name: self.name.clone(),
            queues: self.routes.iter().map(|route| route.queue().to_owned()).collect(),
            state: standing.state.clone(),
            since: standing.since.elapsed(),
            workers: self.counters.workers.load(Ordering::Relaxed),
            last_error: standing.last_error.clone(),
        }
    }

    /// Its partitions that it knows to be active on.
    fn active_partitions(&self) -> Vec<String> {
        let active = self.routes.iter().filter(|route| route.is_active());
        active.map(|route| route.queue().to_owned()).collect()
    }

    /// Whether it was told to stop.
    fn is_stopped(&self) -> bool {
        self.stopped.try_recv() == Err(TryRecvError::Disconnected)
    }

    fn has_ended(&self) -> bool {
        matches!(self.standing().state, ListenerState::Stopped)
    }

    /// Gives the sign to stop and does not wait. It is to have ended by `deadline`.
    fn tell_to_stop(&self, deadline: Instant) {
        *self.stop_by() = Some(deadline);
        drop(self.stop.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn stop_by(&self) -> MutexGuard<'_, Option<Instant>> {
        self.stop_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end; says what is left at `deadline`. A handler does not wait for itself.
    fn wait(&self, deadline: Instant) -> Result<(), String> {
        if own_thread::is_of(self) {
            return Ok(());
        }
        if let Err(RecvTimeoutError::Timeout) = self.done.recv_deadline(deadline) {
            return Err(format!("listener {:?} is still in its handler or closing", self.name));
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic in it has been printed, and there is nothing to be done about it here.
            let _ = thread.join();
        }
        Ok(())
    }
}

/// A running listener. Dropping it stops it, unless it is [detached](Listener::detach): within 10 s, or by when its app was to
/// have shut down.
#[derive(Debug)]
#[must_use = "a listener stops when its handle is dropped; see Listener::detach"]
pub struct Listener {
    shared: Arc<Shared>,
    detached: bool,
}

impl Listener {
    /// The name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// What it is doing.
    pub fn state(&self) -> ListenerState {
        self.shared.standing().state.clone()
    }

    /// What it has done so far.
    pub fn stats(&self) -> ListenerStats {
        self.shared.counters.stats()
    }

    /// Has it rest until [`resume`](Listener::resume): it cancels its consumers and keeps its connection.
    ///
    /// Returns at once. No message that the broker sends from now on is handled. Handlers that run finish, and their messages are
    /// settled. Those that had been sent ahead go back to their queue, marked as redelivered. Then the
    /// [state](Listener::state) is [`Paused`](ListenerState::Paused).
    ///
    /// A queue that is deleted with its last consumer (`auto_delete`) is deleted by this, with its messages. It is declared again
    /// when the listener goes on, if its [`topology`](ListenerBuilder::topology) has it.
    pub fn pause(&self) {
        self.shared.pauses.by_hand();
    }

    /// Ends a pause, whichever kind it is, and consumes again. Does nothing if there is none.
    pub fn resume(&self) {
        self.shared.pauses.resume();
    }

    /// Stops it: it takes no more messages, finishes the one in hand, settles it, and closes. Messages that had been
    /// sent ahead go back to their queue.
    ///
    /// Called in its own handler, it returns at once. The listener ends once that handler has returned and its message is
    /// settled.
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] after 10 s; it then ends as soon as its handler returns.
    pub fn stop(self) -> Result<()> {
        self.stop_timeout(STOP_TIMEOUT)
    }

    /// Stops it like [`stop`](Listener::stop), waiting up to `timeout`.
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] after `timeout`.
    pub fn stop_timeout(mut self, timeout: Duration) -> Result<()> {
        self.detached = true;
        self.end(timeout)
    }

    /// Waits until it ends, which it does only when it is stopped, by its app for example. In its own handler it does not
    /// wait.
    pub fn join(mut self) {
        self.detached = true;
        // It is told to stop by somebody else; until then there is nothing to hurry for.
        while self.shared.wait(deadline::after(Duration::MAX)).is_err() {}
    }

    /// Leaves it to its app, which stops it when it shuts down.
    pub fn detach(mut self) {
        self.detached = true;
    }

    fn end(&self, timeout: Duration) -> Result<()> {
        let deadline = deadline::after(timeout);
        self.shared.tell_to_stop(deadline);
        self.shared.wait(deadline).map_err(|left| Error::NotEnded { left: vec![left], after: timeout })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.detached || self.shared.pool.maker().is_parent() {
            return;
        }
        // Its app may have waited for it in vain already. Then there is nothing more to wait for, and that has been told.
        let told = *self.shared.stop_by();
        let result = match told {
            Some(deadline) => self.shared.wait(deadline).or(Ok(())),
            None => self.end(STOP_TIMEOUT),
        };
        if let Err(error) = result {
            log::error!("{error}");
        }
    }
}
