//! The thread behind a listener: session after session until it is told to stop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, Sender, after, bounded, never, select, unbounded};

use super::worker::{Lost, Worker};
use super::{ListenerState, Route, Shared, count, own_thread, retry, thread_name};
use crate::connection::Connection;
use crate::error::{ConnectError, Error, Result};
use crate::pool::Backoff;
use crate::session::{Endings, Waker};
use crate::topology::{Queue, Topology};

/// The first wait before another attempt, and the longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// The least wait after a refusal that will not pass by itself.
const REFUSED_BACKOFF: Duration = Duration::from_secs(5);
/// A session this long makes the next wait a first one.
const HEALTHY: Duration = Duration::from_secs(60);
/// So does one that has settled something and lasted so long after that, or has settled something else. One that ends sooner may
/// have ended by its only message: the ack was sent, and nobody knows whether it arrived.
const PROVEN: Duration = Duration::from_millis(100);

/// What a worker tells its supervisor.
pub(super) enum Event {
    /// It has a consumer.
    Ready(Endings),
    /// It has ended: because it was told to, or with the reason.
    Ended(Result<()>),
}

/// Runs sessions until the listener is stopped. `first` is told what became of the first one's start.
pub(super) fn supervise(shared: &Shared, first: Sender<Result<()>>) {
    own_thread::belongs_to(shared);
    let listener = shared.name.as_str();
    let mut first = Some(first);
    let mut attempt = 0;
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    loop {
        let start = Instant::now();
        let (mut has_consumed, mut has_lived_on) = (false, false);
        let Err(error) = session(shared, &mut first, &mut has_consumed, &mut has_lived_on, attempt > 0) else { break };
        if let Some(first) = first.take()
            && !shared.in_background
        {
            // Nobody is waiting any more only if the starting thread has panicked.
            let _ = first.send(Err(error));
            break;
        }
        if let Error::PoolClosed { .. } = error {
            log::error!(listener; "listener {listener:?}: it ends, for {error}");
            break;
        }
        // That a message has been settled proves as much as a minute does. Accepted and lost again proves nothing: a
        // message that ends every connection it comes by looks like that.
        let has_proven = start.elapsed() >= HEALTHY || has_lived_on;
        // A handler that is too slow for the broker will be so again.
        let was_healthy = has_consumed && has_proven && ack_timeout(&error).is_none();
        if was_healthy {
            backoff.reset();
        }
        if has_consumed {
            attempt = 0;
        }
        attempt += 1;
        let refused = is_refusal(&error);
        let wait = backoff.next().max(if refused { REFUSED_BACKOFF } else { Duration::ZERO });
        let level = if refused { log::Level::Error } else { log::Level::Warn };
        log::log!(
            level, listener, attempt, pool = shared.pool.name();
            "listener {listener:?}: {error}; attempt {attempt} to come back in {wait:.1?}"
        );
        shared.now(ListenerState::Recovering { error, attempt });
        if shared.stopped.recv_timeout(wait) == Err(crossbeam_channel::RecvTimeoutError::Disconnected) {
            break;
        }
    }
    shared.now(ListenerState::Stopped);
    if let Some(registry) = shared.registry.upgrade() {
        registry.forget_ended();
    }
}

/// Whether it takes a person to mend this: who we are, what we may, which virtual host there is.
fn is_refusal(error: &Error) -> bool {
    match error {
        Error::Connect { cause: ConnectError::PasswordFile { .. }, .. } => true,
        other => matches!(other.code(), Some(403 | 530)) && !other.is_transient(),
    }
}

/// The time that the broker gives a consumer to ack, if a channel has ended because it was up.
fn ack_timeout(error: &Error) -> Option<Duration> {
    let Error::ChannelClosed { code: 406, text, .. } = error else { return None };
    if !text.contains("delivery acknowledgement on channel") {
        return None;
    }
    let limit = text.split_once("Timeout value used: ").and_then(|(_, rest)| rest.split(' ').next());
    Some(limit.and_then(|limit| limit.parse().ok()).map_or(Duration::ZERO, Duration::from_millis))
}

/// Says what an error of the broker means that only names a timeout.
fn explain_ack_timeout(shared: &Shared, posts: &[Post<'_>], error: &Error) {
    let Some(limit) = ack_timeout(error) else { return };
    let Some(post) = posts.iter().max_by_key(|post| post.slowest.load(Ordering::Relaxed)) else { return };
    let slowest = Duration::from_millis(post.slowest.load(Ordering::Relaxed));
    let (listener, queue, prefetch) = (shared.name.as_str(), post.queue.as_str(), post.route.spec.prefetch);
    log::error!(
        listener, queue;
        "listener {listener:?}, queue {queue:?}: a message was not acked within {limit:.1?} of its delivery (the broker's \
         consumer_timeout), and the broker delivers it again; the slowest handler took {slowest:.1?}, and up to {prefetch} \
         messages (prefetch) are delivered ahead"
    );
}

/// One session, from taking a connection to giving it back. `Ok` only if the listener is stopped.
fn session(
    shared: &Shared,
    first: &mut Option<Sender<Result<()>>>,
    has_consumed: &mut bool,
    has_lived_on: &mut bool,
    again: bool,
) -> Result<()> {
    if is_stopped(&shared.stopped) {
        return Ok(());
    }
    let connection = shared.pool.connection_or_cause()?;
    let mut posts = Vec::new();
    for route in &shared.routes {
        let queue = declare(route, &connection)?;
        posts.extend((0..route.spec.concurrency).map(|_| Post {
            route,
            queue: queue.clone(),
            busy: AtomicU64::new(0),
            slowest: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            settlements: AtomicU64::new(0),
            waker: OnceLock::new(),
        }));
    }
    let epoch = Instant::now();
    thread::scope(|scope| {
        let (abort, aborted) = bounded(0);
        let mut abort: Option<Sender<()>> = Some(abort);
        let (events, happened) = unbounded();
        let (lost, is_lost) = bounded(1);
        let mut consumers = Vec::new();
        let mut gone = None;
        let mut running = 0;
        let mut failure = None;
        for (number, post) in posts.iter().enumerate() {
            let side = connection.beside();
            let (events, aborted, lost) = (events.clone(), aborted.clone(), lost.clone());
            let name = thread_name(&format!("coney-{number}-{}", shared.name));
            let worker = Builder::new().name(name.clone()).spawn_scoped(scope, move || {
                let Post { route, queue, busy, slowest, settled, settlements, waker } = post;
                let worker = Worker {
                    shared,
                    route,
                    queue,
                    side: &side,
                    stop: &aborted,
                    waker,
                    busy,
                    slowest,
                    settled,
                    settlements,
                    epoch,
                    lost: &lost,
                };
                own_thread::belongs_to(shared);
                // The supervisor listens until every worker has ended.
                let result =
                    catch_unwind(AssertUnwindSafe(|| worker.run(|endings| drop(events.send(Event::Ready(endings))))));
                let _ = events.send(Event::Ended(result.unwrap_or_else(|_| Err(panicked()))));
            });
            match worker {
                Ok(_) => running += 1,
                Err(source) => {
                    failure = Some(Error::Thread { name, source: source.into() });
                    abort_all(&mut abort, &posts);
                    break;
                }
            }
        }
        let mut stopped = shared.stopped.clone();
        let patience = shared.routes.iter().map(|route| route.spec.warn_after).min().unwrap_or(Duration::MAX);
        let tick = (patience / 2).clamp(Duration::from_millis(10), Duration::from_secs(30));
        let mut warned = vec![0; posts.len()];
        while running > 0 {
            select! {
                recv(happened) -> event => match event {
                    Ok(Event::Ready(endings)) => {
                        consumers.push(endings);
                        if consumers.len() == posts.len() {
                            *has_consumed = true;
                            listening(shared, first, again);
                        }
                    }
                    Ok(Event::Ended(result)) => {
                        running -= 1;
                        abort_all(&mut abort, &posts);
                        if let Err(error) = result {
                            // The others may have handlers to wait for.
                            if failure.is_none() && consumers.len() == posts.len() {
                                shared.now(ListenerState::Recovering { error: error.clone(), attempt: 0 });
                            }
                            failure.get_or_insert(error);
                        }
                    }
                    Err(_) => break,
                },
                recv(is_lost) -> which => gone = Some(which),
                recv(stopped) -> _ => {
                    abort_all(&mut abort, &posts);
                    stopped = never();
                }
                recv(after(tick)) -> _ => warn_of_stuck_handlers(shared, &posts, &mut warned, epoch),
            }
            // The handlers may be busy for long, and know nothing of it.
            if consumers.len() == posts.len()
                && let Some(which) = gone.take()
                && failure.is_none()
                && !is_stopped(&shared.stopped)
            {
                let error = why_lost(shared, which, &consumers);
                shared.now(ListenerState::Recovering { error, attempt: 0 });
            }
        }
        drop(abort);
        let settled =
            posts.iter().map(|post| post.settled.load(Ordering::Relaxed)).filter(|settled| *settled > 0).min();
        let settlements: u64 = posts.iter().map(|post| post.settlements.load(Ordering::Relaxed)).sum();
        let has_lasted = |settled| epoch.elapsed() >= Duration::from_millis(settled) + PROVEN;
        *has_lived_on = settlements > 1 || settled.is_some_and(has_lasted);
        match failure {
            Some(_) if is_stopped(&shared.stopped) => Ok(()),
            Some(error) => {
                explain_ack_timeout(shared, &posts, &error);
                Err(error)
            }
            None => Ok(()),
        }
    })
}

/// Why a consumer is gone whose worker may be in its handler.
fn why_lost(shared: &Shared, lost: Result<Lost, RecvError>, consumers: &[Endings]) -> Error {
    if let Ok(Lost::Cancelled(queue)) = lost {
        return Error::ConsumerCancelled { queue };
    }
    let during = format!("run of listener {:?}", shared.name);
    match consumers.iter().find(|consumer| consumer.has_ended()) {
        Some(ended) => ended.ending(&during),
        None => Error::ConnectionLost { during, detail: "a channel has ended".to_owned() },
    }
}

/// Handlers are caught where they are called; this is for what is around them, a logger that panics for instance.
fn panicked() -> Error {
    Error::ConnectionLost {
        during: "run of a listener".to_owned(),
        detail: "a thread of the listener panicked".to_owned(),
    }
}

/// Where one worker stands.
struct Post<'a> {
    route: &'a Route,
    /// The queue's name, also where the broker has chosen it.
    queue: String,
    /// When the delivery in hand came, in milliseconds since the session's epoch; 0 if there is none.
    busy: AtomicU64,
    /// The longest that a handler has taken, in milliseconds.
    slowest: AtomicU64,
    /// When the first delivery was settled, in milliseconds since the session's epoch; 0 if none has been.
    settled: AtomicU64,
    /// How often something was settled, several deliveries at once counting as one.
    settlements: AtomicU64,
    /// Wakes the worker, once it has a channel.
    waker: OnceLock<Arc<Waker>>,
}

/// Tells all workers to end.
fn abort_all(abort: &mut Option<Sender<()>>, posts: &[Post<'_>]) {
    *abort = None;
    posts.iter().filter_map(|post| post.waker.get()).for_each(|waker| waker.wake());
}

fn is_stopped(stopped: &Receiver<()>) -> bool {
    stopped.try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected)
}

/// The state is the last to change: who sees it also finds what was counted and logged.
fn listening(shared: &Shared, first: &mut Option<Sender<Result<()>>>, again: bool) {
    let (listener, pool) = (shared.name.as_str(), shared.pool.name());
    if again {
        log::info!(listener, pool; "listener {listener:?}: back");
        shared.meter.recoveries.one();
        count(&shared.counters.recoveries);
    } else {
        log::info!(listener, pool; "listener {listener:?}: listening");
    }
    shared.now(ListenerState::Consuming);
    if let Some(first) = first.take() {
        // In the background nobody waits for it.
        let _ = first.send(Ok(()));
    }
}

/// Declares what a route needs; returns the name of its queue.
fn declare(route: &Route, connection: &Connection) -> Result<String> {
    let spec = &route.spec;
    let mut topology = spec.topology.clone();
    if spec.queue.is_empty() && !topology.queues.iter().any(|queue| queue.name.is_empty()) {
        topology = topology.queue(Queue::server_named());
    }
    let queues = if topology.is_empty() { Vec::new() } else { connection.declare(&topology)? };
    if route.handler.has_outcomes() && (spec.retry.is_some() || spec.keeps_undecodable) {
        let queue_type = route.retry_queue_type(connection)?;
        retry::declare(connection, &spec.queue, spec.retry.as_ref(), queue_type)?;
    }
    Ok(broker_named(&topology, &queues).filter(|_| spec.queue.is_empty()).unwrap_or(&spec.queue).to_owned())
}

fn broker_named<'a>(topology: &Topology, queues: &'a [crate::QueueInfo]) -> Option<&'a str> {
    let named = topology.queues.iter().zip(queues).rfind(|(queue, _)| queue.name.is_empty());
    named.map(|(_, info)| info.name.as_str())
}

fn warn_of_stuck_handlers(shared: &Shared, posts: &[Post<'_>], warned: &mut [u64], epoch: Instant) {
    for (post, warned) in posts.iter().zip(warned) {
        let since = post.busy.load(Ordering::Relaxed);
        let held = epoch.elapsed().saturating_sub(Duration::from_millis(since));
        if since > 0 && since != *warned && held >= post.route.spec.warn_after {
            *warned = since;
            log::warn!(
                listener = shared.name.as_str(), queue = post.queue.as_str();
                "listener {:?}, queue {:?}: a handler has been at its message for {held:.0?}; the broker takes a message \
                 back that is not acked in time (consumer_timeout)",
                shared.name,
                post.queue
            );
        }
    }
}
