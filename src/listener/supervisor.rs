//! The thread behind a listener: session after session until it is told to stop, and rest where that is wanted.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, after, at, never, select};

use super::builder::Part;
use super::pause::{Mode, Next, Pause};
use super::route::Route;
use super::run::{Progress, ack_timeout, run};
use super::{ListenerState, Shared, own_thread, retry};
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::pool::Backoff;
use crate::topology::{Queue, Topology};

/// The first wait before another attempt, and the longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// The least wait after a refusal that will not pass by itself.
const REFUSED_BACKOFF: Duration = Duration::from_secs(5);
/// A session this long makes the next wait a first one.
const HEALTHY: Duration = Duration::from_secs(60);

/// Runs sessions until the listener is stopped. `first` is told what became of the first one's start.
pub(super) fn supervise(shared: &Shared, first: Sender<Result<()>>) {
    own_thread::belongs_to(shared);
    let mut first = Some(first);
    let mut attempt = 0;
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    let mut has_started = true;
    let why = loop {
        // Without a connection, should there be none.
        if rest(shared).is_none() {
            break None;
        }
        let start = Instant::now();
        let mut progress = Progress { first, is_again: attempt > 0, has_consumed: false, has_lived_on: false };
        let ended = session(shared, &mut progress);
        first = progress.first;
        let Err(error) = ended else { break None };
        if let Some(first) = first.take()
            && !shared.in_background
        {
            // Nobody is waiting any more only if the starting thread has panicked.
            let _ = first.send(Err(error));
            has_started = false;
            break None;
        }
        if let Error::PoolClosed { .. } = error {
            break Some(error);
        }
        // That a message has been settled proves as much as a minute does. Accepted and lost again proves nothing: a
        // message that ends every connection it comes by looks like that.
        let has_proven = start.elapsed() >= HEALTHY || progress.has_lived_on;
        // A handler that is too slow for the broker will be so again.
        let was_healthy = progress.has_consumed && has_proven && ack_timeout(&error).is_none();
        if was_healthy {
            backoff.reset();
        }
        if progress.has_consumed {
            attempt = 0;
        }
        attempt += 1;
        let wait = backoff.next().max(if error.takes_a_person() { REFUSED_BACKOFF } else { Duration::ZERO });
        shared.events.recovering(error.clone(), attempt, wait);
        shared.now(ListenerState::Recovering { error, attempt });
        select! {
            recv(shared.stopped) -> _ => break None,
            // It may be told to rest, which needs no attempt.
            recv(shared.pauses.signalled()) -> _ => {}
            recv(after(wait)) -> _ => {}
        }
    };
    if has_started {
        shared.events.stopped(why);
    }
    shared.now(ListenerState::Stopped);
    if let Some(registry) = shared.registry.upgrade() {
        registry.forget_ended();
    }
}

/// One session, from taking a connection to giving it back; it keeps it while it rests. `Ok` only if the listener is stopped.
fn session(shared: &Shared, progress: &mut Progress) -> Result<()> {
    let connection = shared.pool.connection_or_cause()?;
    let queues: Vec<String> = shared.routes.iter().map(|route| declare(route, &connection)).collect::<Result<_>>()?;
    while let Some(mode) = rest(shared) {
        run(shared, &connection, &queues, &mode, progress)?;
    }
    Ok(())
}

/// Waits while the listener is paused. Says how the run is to consume that begins now; `None` if the listener is stopped.
fn rest(shared: &Shared) -> Option<Mode> {
    let mut known: Option<Pause> = None;
    loop {
        if shared.is_stopped() {
            return None;
        }
        let pause = match shared.pauses.next(Instant::now()) {
            Next::Run(mode) => return Some(mode),
            Next::Rest(pause) => pause,
        };
        if known.as_ref() != Some(&pause) {
            shared.rests(&pause);
        }
        let over: Receiver<Instant> = pause.until.map_or_else(never, at);
        known = Some(pause);
        select! {
            recv(shared.stopped) -> _ => {}
            recv(shared.pauses.signalled()) -> _ => {}
            recv(over) -> _ => {}
        }
    }
}

/// Declares what a route needs; returns the name of its queue.
fn declare(route: &Route, connection: &Connection) -> Result<String> {
    let spec = &route.spec;
    let mut topology = spec.topology.clone().or_as(&spec.declare_defaults);
    if spec.queue.is_empty() && !topology.queues.iter().any(|queue| queue.name.is_empty()) {
        topology = topology.queue(Queue::server_named());
    }
    let queues = if topology.is_empty() { Vec::new() } else { connection.declare(&topology)? };
    if route.handler.has_outcomes() && (spec.retry.is_some() || spec.keeps_undecodable) {
        let queue_type = route.retry_queue_type(connection)?;
        // Messages of a partition wait in it.
        let policy = spec.retry.as_ref().filter(|_| spec.part != Part::Partition);
        retry::declare(connection, &spec.queue, policy, queue_type)?;
    }
    Ok(broker_named(&topology, &queues).filter(|_| spec.queue.is_empty()).unwrap_or(&spec.queue).to_owned())
}

fn broker_named<'a>(topology: &Topology, queues: &'a [crate::QueueInfo]) -> Option<&'a str> {
    let named = topology.queues.iter().zip(queues).rfind(|(queue, _)| queue.name.is_empty());
    named.map(|(_, info)| info.name.as_str())
}
