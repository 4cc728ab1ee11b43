//! The watchdog: one thread that cuts the connection of whoever overstays a deadline.
//!
//! amiquip's calls and destructors wait without a limit. Before each one the caller arms the watchdog with its
//! deadline and the wire it waits on; when the deadline passes, the wire is cut, amiquip's I/O thread ends, and the
//! call returns. A watchdog belongs to a pool or an app and ends with it.
//!
//! Lock order: the watchdog's own lock is never held while a wire is cut.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use super::wire::Wire;
use crate::error::{Error, Result};

#[derive(Default)]
struct State {
    /// By deadline; the number tells equal deadlines apart.
    armed: BTreeMap<(Instant, u64), Arc<Wire>>,
    next_number: u64,
    /// When the thread will look again by itself; `None` while it waits to be woken.
    looks_at: Option<Instant>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").field("armed", &self.shared.state().armed.len()).finish()
    }
}

impl Watchdog {
    pub(crate) fn start() -> Result<Arc<Watchdog>> {
        let shared = Arc::new(Shared::default());
        let name = "coney-watchdog".to_owned();
        let thread = Builder::new()
            .name(name.clone())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared)
            })
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(Arc::new(Watchdog { shared, thread: Some(thread) }))
    }

    /// From now on `wire` is cut at `deadline`, until the guard is dropped.
    pub(crate) fn arm(&self, deadline: Instant, wire: &Arc<Wire>) -> Armed<'_> {
        let mut state = self.shared.state();
        let key = (deadline, state.next_number);
        state.next_number += 1;
        state.armed.insert(key, Arc::clone(wire));
        // The thread need not be woken for a deadline that lies behind its next look; most do.
        let wake = state.looks_at.is_none_or(|looks_at| deadline < looks_at);
        drop(state);
        if wake {
            self.shared.wake.notify_one();
        }
        Armed { watchdog: self, key }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked with anything worth more than what its own message said.
            let _ = thread.join();
        }
    }
}

/// A deadline that is being watched.
pub(crate) struct Armed<'a> {
    watchdog: &'a Watchdog,
    key: (Instant, u64),
}

impl Armed<'_> {
    /// Ends the watch; true if the deadline had passed and the wire was cut for it.
    pub(crate) fn disarm(self) -> bool {
        self.remove()
    }

    fn remove(&self) -> bool {
        self.watchdog.shared.state().armed.remove(&self.key).is_none()
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

fn watch(shared: &Shared) {
    let mut state = shared.state();
    while !state.stop {
        let now = Instant::now();
        match state.armed.first_key_value().map(|(key, _)| key.0) {
            None => {
                state.looks_at = None;
                state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            Some(deadline) if deadline > now => {
                state.looks_at = Some(deadline);
                state = shared.wake.wait_timeout(state, deadline - now).unwrap_or_else(PoisonError::into_inner).0;
            }
            Some(_) => {
                let overstayed = state.armed.pop_first();
                drop(state);
                if let Some((_, wire)) = overstayed {
                    wire.cut("a call on it passed its deadline");
                }
                state = shared.state();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    fn wire() -> (Arc<Wire>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (Arc::new(Wire::new(client)), server)
    }

    #[test]
    fn the_wire_is_cut_once_the_deadline_passes_and_not_before() {
        let watchdog = Watchdog::start().unwrap();
        let (late, mut late_peer) = wire();
        let (soon, mut soon_peer) = wire();
        let start = Instant::now();
        let armed_late = watchdog.arm(start + Duration::from_secs(600), &late);
        let armed_soon = watchdog.arm(start + Duration::from_millis(50), &soon);
        assert_eq!(soon_peer.read(&mut [0]).unwrap(), 0, "end of file once cut");
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert!(soon.is_over() && armed_soon.disarm());
        assert!(!late.is_over() && !armed_late.disarm());
        late.cut("done");
        assert_eq!(late_peer.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_disarmed_deadline_does_nothing_and_a_shorter_one_wakes_the_thread() {
        let watchdog = Watchdog::start().unwrap();
        let (kept, _kept_peer) = wire();
        let (cut, mut cut_peer) = wire();
        assert!(!watchdog.arm(Instant::now() + Duration::from_millis(20), &kept).disarm());
        let _long = watchdog.arm(Instant::now() + Duration::from_secs(600), &kept);
        let _short = watchdog.arm(Instant::now() + Duration::from_millis(20), &cut);
        assert_eq!(cut_peer.read(&mut [0]).unwrap(), 0);
        assert!(!kept.is_over());
    }
}
