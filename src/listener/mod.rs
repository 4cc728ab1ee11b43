//! Listeners: threads that call back for each message of a queue, and outlive whatever happens to their connection.
//!
//! A listener keeps one connection of its pool. Its supervisor thread ([`supervisor`]) opens a session on it: declares
//! what is to be there, and starts one worker thread ([`worker`]) for each unit of concurrency, with a channel and a
//! consumer of its own. When a session ends for whatever reason other than being told to, another follows.

mod supervisor;
mod unsettled;
mod worker;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

pub use self::unsettled::Unsettled;
use crate::connection::Connection;
use crate::deadline;
use crate::delivery::{Delivery, Received};
use crate::error::{Error, Result};
use crate::field::check_short_string;
use crate::message::Message;
use crate::outcome::{Outcome, RetryPolicy};
use crate::pool::{Enlisted, Pool};
use crate::topology::Topology;

/// How long a listener may take to stop when it is dropped.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Half of what RabbitMQ gives a consumer to ack (<https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout>).
const WARN_AFTER: Duration = Duration::from_secs(15 * 60);

/// What a handler may do besides returning an [`Outcome`].
pub struct Context<'a> {
    connection: &'a Connection,
    listener: &'a str,
    queue: &'a str,
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("listener", &self.listener).field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Context<'_> {
    /// The listener's name.
    pub fn listener(&self) -> &str {
        self.listener
    }

    /// The queue the message came from, also where the broker has named it.
    pub fn queue(&self) -> &str {
        self.queue
    }

    /// Publishes a message and waits for the confirm, on another channel of the listener's connection: a mistake in it
    /// does not disturb the listening.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::publish`].
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        self.connection.publish(exchange, routing_key, message)
    }

    /// Answers `request`: publishes `message` to its `reply_to`, with its `correlation_id`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the request names no queue for an answer; otherwise those of
    /// [`Connection::publish`].
    pub fn reply(&self, request: &Received, message: impl Into<Message>) -> Result<()> {
        let Some(reply_to) = request.message().reply_to() else {
            return Err(Error::invalid("reply", "the request has no reply_to, expected the queue for the answer"));
        };
        let mut message = message.into();
        if let Some(id) = request.message().correlation_id() {
            message = message.with_correlation_id(id);
        }
        self.connection.publish("", reply_to, message)
    }

    /// The connection itself, for all else. Its channels are not those of the listening.
    pub fn connection(&self) -> &Connection {
        self.connection
    }
}

type AutoHandler = dyn Fn(&Context<'_>, &Delivery<'_>) -> Outcome + Send + Sync;
type ManualHandler = dyn Fn(&Context<'_>, Unsettled) + Send + Sync;

enum Handler {
    /// Returns what is to become of the delivery.
    Auto(Box<AutoHandler>),
    /// Takes the delivery, to settle it some other time.
    Manual(Box<ManualHandler>),
}

/// What a listener is started with. See [`App::listener`](crate::App::listener).
#[derive(Debug, Clone)]
#[must_use = "a listener does nothing until it is spawned"]
pub struct ListenerBuilder {
    pool: Pool,
    queue: String,
    name: Option<String>,
    prefetch: u16,
    concurrency: usize,
    topology: Topology,
    exclusive: bool,
    priority: Option<i32>,
    retry: Option<RetryPolicy>,
    ack_batch: bool,
    in_background: bool,
    warn_after: Duration,
    registry: Option<Arc<Registry>>,
}

impl ListenerBuilder {
    pub(crate) fn new(pool: Pool, queue: impl Into<String>) -> ListenerBuilder {
        let settings = pool.settings();
        ListenerBuilder {
            queue: queue.into(),
            name: None,
            prefetch: settings.prefetch,
            concurrency: 1,
            topology: Topology::new(),
            exclusive: false,
            priority: None,
            retry: settings.retry.clone(),
            ack_batch: settings.ack_batch,
            in_background: false,
            warn_after: WARN_AFTER,
            registry: None,
            pool,
        }
    }

    pub(crate) fn registered_with(mut self, registry: Arc<Registry>) -> Self {
        self.registry = Some(registry);
        self
    }

    /// The name in logs and in the [`Context`]. Defaults to the queue's.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How many deliveries the broker sends each thread ahead of their acks, 1 to 65535; 0 counts as 1. Defaults to the
    /// pool's `prefetch`.
    pub fn prefetch(mut self, prefetch: u16) -> Self {
        self.prefetch = prefetch.max(1);
        self
    }

    /// How many threads handle messages, each with a channel and a consumer of its own; 0 counts as 1. With more than
    /// one, messages are handled in no particular order. Defaults to 1.
    pub fn concurrency(mut self, threads: usize) -> Self {
        self.concurrency = threads.max(1);
        self
    }

    /// What is declared before listening, at the start and after each reconnect. Defaults to nothing; the queue is then
    /// expected to exist. The queue "" is the one that the broker names.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Whether no other consumer may be on the queue. With more than one thread only the first would get in. Defaults
    /// to false.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Which consumers the broker serves first: those with the higher number
    /// (`x-priority`, <https://www.rabbitmq.com/docs/consumer-priority>). Defaults to none, which counts as 0.
    pub fn consumer_priority(mut self, priority: i32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// What becomes of messages that fail. Defaults to the pool's `retry`; without one, to requeueing a message the
    /// first time and rejecting it the second.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// Whether acks are sent for many messages at once while more are waiting, at most for half the prefetch; nothing is
    /// held back once the listener has caught up. Defaults to the pool's `ack_batch`.
    pub fn ack_batch(mut self, ack_batch: bool) -> Self {
        self.ack_batch = ack_batch;
        self
    }

    /// Returns from spawning at once and keeps trying, instead of returning once the broker has accepted the
    /// subscription, or its refusal. Defaults to waiting.
    pub fn in_background(mut self) -> Self {
        self.in_background = true;
        self
    }

    /// After how long in a handler a warning is logged. Defaults to 15 minutes, half of RabbitMQ's `consumer_timeout`,
    /// after which the broker takes the message back.
    pub fn warn_after(mut self, warn_after: Duration) -> Self {
        self.warn_after = warn_after.max(Duration::from_millis(1));
        self
    }

    /// Starts listening. `handler` is called for each message, by as many threads as the concurrency; what it returns
    /// decides what becomes of the message. A panic in it is caught and counts as a failure.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyListeners`] if every connection of the pool has its listener. Unless
    /// [`in_background`](Self::in_background): why the first attempt to listen failed.
    pub fn spawn<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.start(Handler::Auto(Box::new(move |context, delivery| handler(context, delivery).into())))
    }

    /// Starts listening for a handler that settles messages by itself: later, in batches, or on another thread.
    ///
    /// Up to the prefetch may be unsettled at a time. Neither the retry policy nor `ack_batch` has a part in it. When
    /// the listener stops, it waits 5 s for what is unsettled; the broker requeues the rest.
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Self::spawn).
    pub fn spawn_manual<F>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, Unsettled) + Send + Sync + 'static,
    {
        self.start(Handler::Manual(Box::new(handler)))
    }

    fn start(self, handler: Handler) -> Result<Listener> {
        check_short_string(|| "queue name".to_owned(), &self.queue)?;
        self.topology.check()?;
        if self.queue.is_empty() && self.retry.is_some() && matches!(handler, Handler::Auto(_)) {
            let problem =
                "expected a queue with a name: messages that wait could not find back to one the broker names";
            return Err(Error::invalid("retry", problem));
        }
        let enlisted = self.pool.enlist()?;
        let (stop, stopped) = bounded(0);
        let (alive, done) = bounded(0);
        let (first, accepted) = bounded(1);
        let in_background = self.in_background;
        let registry = self.registry.clone();
        let name = self.name.clone().unwrap_or_else(|| self.queue.clone());
        let shared = Arc::new(Shared {
            name,
            spec: self,
            handler,
            state: Mutex::new(ListenerState::Starting),
            counters: Counters::default(),
            stop: Mutex::new(Some(stop)),
            stopped,
            done,
            thread: Mutex::new(None),
        });
        let thread_name = format!("coney-listen-{}", shared.name);
        let thread = Builder::new()
            .name(thread_name.clone())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let (_alive, _enlisted): (Sender<()>, Enlisted) = (alive, enlisted);
                    supervisor::supervise(&shared, first);
                }
            })
            .map_err(|source| Error::Thread { name: thread_name, source: Arc::new(source) })?;
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        let listener = Listener { shared, detached: false };
        if !in_background && let Ok(Err(error)) = accepted.recv() {
            listener.stop()?;
            return Err(error);
        }
        if let Some(registry) = registry {
            registry.add(&listener.shared);
        }
        Ok(listener)
    }
}

/// What a listener is doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ListenerState {
    /// It has not been accepted by the broker yet.
    Starting,
    /// Every one of its threads has a consumer on the queue.
    Consuming,
    /// It has lost its consumers and is trying to get new ones.
    Recovering {
        /// What happened last.
        error: Error,
        /// How often it has tried since it last consumed.
        attempt: u32,
    },
    /// It has ended.
    Stopped,
}

#[derive(Debug, Default)]
struct Counters {
    delivered: AtomicU64,
    acked: AtomicU64,
    rejected: AtomicU64,
    requeued: AtomicU64,
    retried: AtomicU64,
    dead: AtomicU64,
    panicked: AtomicU64,
    recoveries: AtomicU64,
    last_delivery: Mutex<Option<Instant>>,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What a listener has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerStats {
    /// Deliveries handed to the handler.
    pub delivered: u64,
    /// Deliveries dealt with.
    pub acked: u64,
    /// Deliveries given up by the broker's means.
    pub rejected: u64,
    /// Deliveries put back into their queue.
    pub requeued: u64,
    /// Deliveries put away to be tried again later.
    pub retried: u64,
    /// Deliveries put into the queue `NAME.dead`.
    pub dead: u64,
    /// Deliveries whose handler panicked; they count under what became of them too.
    pub panicked: u64,
    /// How often the listener came back after it had lost its consumers.
    pub recoveries: u64,
    /// How long ago the last delivery came.
    pub last_delivery_age: Option<Duration>,
}

/// The listeners of an app.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Vec<Arc<Shared>>>);

impl Registry {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, listener: &Arc<Shared>) {
        let mut list = self.list();
        list.retain(|listener| !listener.has_ended());
        list.push(Arc::clone(listener));
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
        listeners.iter().for_each(|listener| listener.tell_to_stop());
        let left: Vec<String> = listeners.iter().filter_map(|listener| listener.wait(deadline).err()).collect();
        self.list().retain(|listener| !listener.has_ended());
        if left.is_empty() { Ok(()) } else { Err(Error::NotEnded { left, after: timeout }) }
    }
}

pub(crate) struct Shared {
    name: String,
    spec: ListenerBuilder,
    handler: Handler,
    state: Mutex<ListenerState>,
    counters: Counters,
    /// Nothing is sent; dropping it is the sign to stop.
    stop: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
    /// Nothing is sent; its end is the sign that the supervisor is done.
    done: Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("name", &self.name)
            .field("queue", &self.spec.queue)
            .field("state", &*self.state())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, ListenerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        matches!(*self.state(), ListenerState::Stopped)
    }

    /// Gives the sign to stop and does not wait.
    fn tell_to_stop(&self) {
        drop(self.stop.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Waits for the end; says what is left at `deadline`.
    fn wait(&self, deadline: Instant) -> Result<(), String> {
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

/// A running listener. Dropping it stops it, unless it is [detached](Listener::detach).
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
        self.shared.state().clone()
    }

    /// What it has done so far.
    pub fn stats(&self) -> ListenerStats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let last = *counters.last_delivery.lock().unwrap_or_else(PoisonError::into_inner);
        ListenerStats {
            delivered: read(&counters.delivered),
            acked: read(&counters.acked),
            rejected: read(&counters.rejected),
            requeued: read(&counters.requeued),
            retried: read(&counters.retried),
            dead: read(&counters.dead),
            panicked: read(&counters.panicked),
            recoveries: read(&counters.recoveries),
            last_delivery_age: last.map(|last| last.elapsed()),
        }
    }

    /// Stops it: it takes no more messages, finishes the one in hand, settles it, and closes. Messages that had been
    /// sent ahead go back to their queue.
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

    /// Waits until it ends, which it does only when it is stopped, by its app for example.
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
        self.shared.tell_to_stop();
        self.shared.wait(deadline::after(timeout)).map_err(|left| Error::NotEnded { left: vec![left], after: timeout })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.detached
            && let Err(error) = self.end(STOP_TIMEOUT)
        {
            log::error!("{error}");
        }
    }
}
