//! How a listener begins: its place in the pool, its thread, and the wait until the broker has accepted it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use crossbeam_channel::{Sender, bounded};

use super::pause::Pauses;
use super::route::Route;
use super::{Counters, Listener, ListenerState, Shared, Standing, supervisor, thread_name};
use crate::deadline;
use crate::error::{Error, Result};
use crate::event::ListenerEvents;
use crate::pool::Enlisted;

/// Starts a listener on the queues of all routes, at least one. Its name, its pool, and whether it is started in the
/// background are those of the first.
pub(super) fn launch(routes: Vec<Route>) -> Result<Listener> {
    let Some(first) = routes.first() else {
        return Err(Error::invalid("listener", "it has no queue, expected at least one"));
    };
    // Before the broker is waited for: a pool that is full says so at once.
    let enlisted = first.spec.pool.enlist()?;
    launch_enlisted(routes, enlisted)
}

/// The same for a listener that has its place in the pool.
pub(crate) fn launch_enlisted(mut routes: Vec<Route>, enlisted: Enlisted) -> Result<Listener> {
    // Taken out, for an app's list holds the listener and must not be held by it.
    let registry = routes.iter_mut().filter_map(|route| route.spec.registry.take()).next_back();
    let Some(Route { spec, .. }) = routes.first() else {
        return Err(Error::invalid("listener", "it has no queue, expected at least one"));
    };
    if let Some((timeout, patience)) = &spec.patience
        && !spec.in_background
    {
        spec.pool.wait_for_broker(deadline::after(*timeout), patience)?;
    }
    let (stop, stopped) = bounded(0);
    let (alive, done) = bounded(0);
    let (first, accepted) = bounded(1);
    let in_background = spec.in_background;
    // Of one queue for all: what most messages fail of is mostly the same.
    let pause_on_failures = routes.iter().find_map(|route| route.spec.pause_on_failures);
    let name = spec.name.clone().unwrap_or_else(|| spec.queue.clone());
    for route in &routes {
        route.meter(&name);
    }
    let shared = Arc::new(Shared {
        events: ListenerEvents::new(&name, spec.pool.name(), spec.pool.context().events.all().clone()),
        name,
        pool: spec.pool.clone(),
        registry: registry.as_ref().map(Arc::downgrade).unwrap_or_default(),
        in_background,
        routes,
        standing: Mutex::new(Standing::new()),
        pauses: Pauses::new(pause_on_failures),
        counters: Counters::default(),
        stop: Mutex::new(Some(stop)),
        stop_by: Mutex::default(),
        stopped,
        done,
        thread: Mutex::new(None),
    });
    // Before it is accepted, so that a shutdown in between finds it.
    if let Some(registry) = &registry {
        registry.add(&shared);
    }
    let thread_name = thread_name(&format!("coney-listen-{}", shared.name));
    let thread = Builder::new()
        .name(thread_name.clone())
        .spawn({
            let shared = Arc::clone(&shared);
            move || {
                let (_alive, _enlisted): (Sender<()>, Enlisted) = (alive, enlisted);
                supervisor::supervise(&shared, first);
            }
        })
        .map_err(|source| {
            shared.now(ListenerState::Stopped);
            registry.iter().for_each(|registry| registry.forget_ended());
            Error::Thread { name: thread_name, source: Arc::new(source) }
        })?;
    *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
    let listener = Listener { shared, detached: false };
    if !in_background && let Ok(Err(error)) = accepted.recv() {
        listener.stop()?;
        return Err(error);
    }
    Ok(listener)
}
