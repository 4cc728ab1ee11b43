//! The idle reader: one thread that holds every socket nobody leads on.
//!
//! It takes in what comes while no thread waits: heartbeats, closes, blocks, deliveries for a consumer that is busy, answers
//! for amiquip. It sends heartbeats and misses them, and writes what others have left to be written.
//!
//! A thread that begins to lead does not wake it. When something comes both are woken, and the idle reader finds that it is
//! not needed: it then leaves that socket alone until nobody has led for [`QUIET`]. So a thread that waits again and again
//! costs the idle reader a look every [`QUIET`] and nothing more.
//!
//! It belongs to an app, or to a pool of its own, and ends with it.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::core::{Core, Need};
use super::socket::poll_for;
use super::waker::WakePipe;
use crate::error::{Error, Result};

/// How long nobody has led before the idle reader takes over, and how long something may wait to be written.
const QUIET: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Inbox {
    joined: Vec<Arc<Core>>,
    stop: bool,
}

/// What others have of the idle reader.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    wake_pipe: WakePipe,
    /// It has been woken and has not looked yet.
    woken: AtomicBool,
    /// It looks again soon by itself.
    is_ticking: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it look now.
    pub(super) fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            self.wake_pipe.signal();
        }
    }

    /// Has it look within [`QUIET`].
    pub(super) fn tick(&self) {
        if !self.is_ticking.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    pub(super) fn join(&self, core: Arc<Core>) {
        self.inbox().joined.push(core);
        self.wake();
    }
}

/// See the [module](self).
pub(crate) struct IdleReader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for IdleReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdleReader").finish_non_exhaustive()
    }
}

impl IdleReader {
    pub(crate) fn start() -> Result<IdleReader> {
        let name = "coney-reader".to_owned();
        let failed = |source| Error::Thread { name: name.clone(), source: Arc::new(source) };
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            wake_pipe: WakePipe::new().map_err(failed)?,
            woken: AtomicBool::new(false),
            is_ticking: AtomicBool::new(false),
        });
        let thread = Builder::new()
            .name(name.clone())
            .spawn({
                let shared = Arc::clone(&shared);
                move || read_idly(&shared)
            })
            .map_err(failed)?;
        Ok(IdleReader { shared, thread: Some(thread) })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for IdleReader {
    fn drop(&mut self) {
        self.shared.inbox().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // It runs nothing of the user's, and a panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// A connection, as the idle reader sees it.
struct Member {
    core: Arc<Core>,
    /// The turn in which a thread led at the last look.
    turn: u64,
    /// The socket took no more.
    is_full: bool,
}

fn read_idly(shared: &Shared) {
    let mut members: Vec<Member> = Vec::new();
    let mut is_woken = false;
    loop {
        shared.is_ticking.store(false, Ordering::SeqCst);
        if is_woken {
            shared.wake_pipe.drain();
        }
        // After that, and before the look: whoever wakes it from here on ends the next poll, and whoever did before
        // has done so for something that is seen now.
        shared.woken.store(false, Ordering::SeqCst);
        {
            let mut inbox = shared.inbox();
            if inbox.stop {
                return;
            }
            members.extend(inbox.joined.drain(..).map(|core| Member { core, turn: 0, is_full: false }));
        }
        members.retain(|member| !member.core.has_ended());
        let mut limit: Option<Duration> = None;
        for member in &mut members {
            let due = [member.core.keep_alive(), member.look()].into_iter().flatten().min();
            limit = limit.into_iter().chain(due).min();
        }
        if limit.is_some_and(|limit| limit <= QUIET) {
            shared.is_ticking.store(true, Ordering::SeqCst);
            // What was left to be written just before has been seen by nobody.
            if members.iter().any(|member| !member.is_full && member.core.is_waiting_to_write()) {
                limit = Some(QUIET);
            }
        }
        is_woken = wait_and_read(&shared.wake_pipe, &mut members, limit);
    }
}

impl Member {
    /// Sees what is to be done; returns how long until the next look, if there is to be one.
    fn look(&mut self) -> Option<Duration> {
        let core = &self.core;
        // It has waited for others to join it for long enough.
        self.is_full = core.flush_idly();
        let waits = core.is_waiting_to_write() && !self.is_full;
        if core.watched.load(Ordering::SeqCst) {
            return waits.then_some(QUIET);
        }
        match core.needs_watching(QUIET) {
            Need::Now => {
                core.watched.store(true, Ordering::SeqCst);
                None
            }
            Need::Later => Some(QUIET),
            // The same turn as at the last look: it may be a long one.
            Need::IsLed(turn) if turn == self.turn => (!core.tell_idle_when_released()).then_some(QUIET),
            Need::IsLed(turn) => {
                self.turn = turn;
                Some(QUIET)
            }
        }
    }
}

/// Waits until something comes, for `limit` at most, and takes it in. Returns whether it has been woken.
fn wait_and_read(wake_pipe: &WakePipe, members: &mut [Member], limit: Option<Duration>) -> bool {
    let polled: Vec<usize> = (0..members.len())
        .filter(|&at| members[at].is_full || members[at].core.watched.load(Ordering::SeqCst))
        .collect();
    let mut fds = vec![PollFd::new(wake_pipe, PollFlags::IN)];
    fds.extend(polled.iter().map(|&at| {
        let Member { core, is_full, .. } = &members[at];
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, core.watched.load(Ordering::SeqCst));
        interest.set(PollFlags::OUT, *is_full);
        PollFd::from_borrowed_fd(core.as_fd(), interest)
    }));
    if let Err(error) = poll_for(&mut fds, limit) {
        log::error!("the sockets cannot be polled: {error}");
        // It may pass; until then nobody must be kept busy by it.
        std::thread::sleep(QUIET);
        return true;
    }
    for (fd, &at) in fds[1..].iter().zip(&polled) {
        let core = &members[at].core;
        let came = fd.revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        if came && core.watched.load(Ordering::SeqCst) && !core.read_idly() {
            // A thread leads, or has been faster: it will be back.
            core.watched.store(false, Ordering::SeqCst);
        }
    }
    !fds[0].revents().is_empty()
}
