//! The broker's one clock thread: it waits for the earliest thing that is due in any virtual host and sees to it.
//!
//! Its lock is a leaf: an alarm may be set under the lock of a virtual host.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::outbox::SessionId;
use super::refusal::Refusal;
use super::vhost::VHost;
use crate::fork::Maker;

/// A channel that has to be closed, because a delivery was not acked in time.
#[derive(Debug)]
pub(crate) struct Overdue {
    pub(crate) session: SessionId,
    pub(crate) channel: u16,
    pub(crate) refusal: Refusal,
}

#[derive(Debug, Default)]
struct Due {
    at: Option<Instant>,
    stopped: bool,
    vhosts: Vec<Weak<VHost>>,
}

#[derive(Debug, Default)]
struct Shared {
    due: Mutex<Due>,
    sooner: Condvar,
}

impl Shared {
    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes the clock. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alarm {
    shared: Arc<Shared>,
}

impl Alarm {
    /// Has every virtual host asked at `at` what is due.
    pub(super) fn at(&self, at: Instant) {
        let mut due = self.shared.due();
        if due.at.is_none_or(|set| at < set) {
            due.at = Some(at);
            self.shared.sooner.notify_one();
        }
    }
}

/// The clock thread. Dropping it ends the thread, as [`stop`](Clock::stop) does.
#[derive(Debug)]
pub(crate) struct Clock {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    maker: Maker,
}

impl Clock {
    /// Starts the clock. `overdue` is called, under no lock, for each channel that has to be closed.
    pub(crate) fn start(overdue: impl Fn(Overdue) + Send + 'static) -> io::Result<Clock> {
        let shared = Arc::<Shared>::default();
        let run = shared.clone();
        let thread = thread::Builder::new().name("coney-broker-clock".into()).spawn(move || tick(&run, overdue))?;
        Ok(Clock { shared, thread: Mutex::new(Some(thread)), maker: Maker::this() })
    }

    /// What a virtual host sets its timers with.
    pub(crate) fn alarm(&self) -> Alarm {
        Alarm { shared: self.shared.clone() }
    }

    /// Has `vhost` ticked from now on, for as long as it lives.
    pub(crate) fn watch(&self, vhost: &Arc<VHost>) {
        self.shared.due().vhosts.push(Arc::downgrade(vhost));
        self.alarm().at(Instant::now());
    }

    /// Ends the thread and waits for it.
    pub(crate) fn stop(&self) {
        self.shared.due().stopped = true;
        self.shared.sooner.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The last holder of the broker may be the clock itself, which cannot wait for its own end.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id())
            && thread.join().is_err()
        {
            log::error!("the clock of the embedded broker panicked");
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if self.maker.is_parent() {
            return;
        }
        self.stop();
    }
}

fn tick(shared: &Shared, overdue: impl Fn(Overdue)) {
    let mut due = shared.due();
    while !due.stopped {
        let now = Instant::now();
        match due.at {
            None => due = shared.sooner.wait(due).unwrap_or_else(PoisonError::into_inner),
            Some(at) if at > now => {
                due = shared.sooner.wait_timeout(due, at - now).unwrap_or_else(PoisonError::into_inner).0;
            }
            Some(_) => {
                due.at = None;
                due.vhosts.retain(|vhost| vhost.strong_count() > 0);
                let vhosts: Vec<Arc<VHost>> = due.vhosts.iter().filter_map(Weak::upgrade).collect();
                drop(due);
                for vhost in &vhosts {
                    let (next, late) = vhost.tick(now);
                    late.into_iter().for_each(&overdue);
                    if let Some(next) = next {
                        Alarm::set(shared, next);
                    }
                }
                drop(vhosts);
                due = shared.due();
            }
        }
    }
}

impl Alarm {
    fn set(shared: &Shared, at: Instant) {
        let mut due = shared.due();
        due.at = Some(due.at.map_or(at, |set| set.min(at)));
    }
}
