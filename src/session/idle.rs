//! The idle reader: one thread that holds every socket nobody leads on.
//!
//! It takes in what comes while no thread waits: heartbeats, closes, blocks, deliveries for a consumer that is busy, answers
//! for amiquip. It sends heartbeats and misses them, and writes what others have left to be written.
//!
//! A thread that begins to lead does not wake it. When something comes both are woken, and the idle reader finds that it is
//! not needed: it then leaves that socket alone until nobody has led for [`QUIET`]. So a thread that waits again and again
//! costs the idle reader a look every [`QUIET`] and nothing more.
//!
//! It looks at a connection when something has come for it, when a thread asks for it, and when the time has come that the last
//! look has named. Connections at rest cost nothing, however many there are, but for their heartbeats.
//!
//! It belongs to an app, or to a pool of its own, and ends with it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::core::{Core, Need};
use super::poller::{Came, Interest, Poller};
use super::waker::WakePipe;
use crate::error::{Error, Result};

/// How long nobody has led before the idle reader takes over, and how long something may wait to be written.
const QUIET: Duration = Duration::from_millis(5);

/// Number of the wake pipe. Connections are counted from 1.
const WAKE_PIPE: u64 = 0;

#[derive(Default)]
struct Inbox {
    joined: Vec<Arc<Core>>,
    /// Connections at which it is to look.
    asked: Vec<u64>,
    stop: bool,
}

/// What others have of the idle reader.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    wake_pipe: Arc<WakePipe>,
    /// It has been woken and has not looked into its inbox yet.
    is_woken: AtomicBool,
    /// How many places there have been.
    places: AtomicU64,
}

/// A connection's place with the idle reader.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    /// It is to look, and has not yet.
    is_asked: AtomicBool,
    /// It looks again within [`QUIET`] by itself.
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

    /// A place for one more connection, which has to [join](Shared::join) then.
    pub(super) fn place(&self) -> Place {
        let number = WAKE_PIPE + 1 + self.places.fetch_add(1, Ordering::Relaxed);
        Place { number, is_asked: AtomicBool::new(false), is_ticking: AtomicBool::new(false) }
    }

    fn wake(&self) {
        if !self.is_woken.swap(true, Ordering::SeqCst) {
            self.wake_pipe.signal();
        }
    }

    /// Has it look at this connection now.
    pub(super) fn ask(&self, place: &Place) {
        if !place.is_asked.swap(true, Ordering::SeqCst) {
            self.inbox().asked.push(place.number);
            self.wake();
        }
    }

    /// Has it look at this connection within [`QUIET`].
    pub(super) fn tick(&self, place: &Place) {
        if !place.is_ticking.load(Ordering::SeqCst) {
            self.ask(place);
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
        let wake_pipe = Arc::new(WakePipe::new().map_err(failed)?);
        let mut poller = Poller::new().map_err(failed)?;
        let readable = Interest { read: true, write: false };
        poller.change(WAKE_PIPE, Arc::clone(&wake_pipe) as _, Interest::default(), readable).map_err(failed)?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            wake_pipe,
            is_woken: AtomicBool::new(false),
            places: AtomicU64::new(0),
        });
        let reading = Reading::new(Arc::clone(&shared), poller);
        let thread = Builder::new().name(name.clone()).spawn(move || reading.run()).map_err(failed)?;
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

/// What the thread has.
struct Reading {
    shared: Arc<Shared>,
    poller: Poller,
    members: HashMap<u64, Member>,
    /// When it looks at whom by itself.
    due: BTreeSet<(Instant, u64)>,
}

/// A connection, as the idle reader sees it.
struct Member {
    core: Arc<Core>,
    /// The turn in which a thread led at the last look.
    turn: u64,
    /// The socket took no more.
    is_full: bool,
    /// What it waits for at the socket.
    interest: Interest,
    /// When it looks by itself.
    due: Option<Instant>,
}

impl Reading {
    fn new(shared: Arc<Shared>, poller: Poller) -> Reading {
        Reading { shared, poller, members: HashMap::new(), due: BTreeSet::new() }
    }

    fn run(mut self) {
        let mut came = Vec::new();
        let mut now = Instant::now();
        loop {
            let limit = self.due.first().map(|(due, _)| due.saturating_duration_since(now));
            if let Err(error) = self.poller.wait(limit, &mut came) {
                log::error!("the sockets cannot be polled: {error}");
                // It may pass; until then nobody must be kept busy by it.
                std::thread::sleep(QUIET);
            }
            for came in &came {
                match came.number {
                    WAKE_PIPE => self.shared.wake_pipe.drain(),
                    _ => self.take(*came),
                }
            }
            // After the pipe has been drained, and before the look into the inbox: whoever wakes it from here on ends the next
            // wait, and what whoever did before has put there is seen now.
            self.shared.is_woken.store(false, Ordering::SeqCst);
            let Inbox { joined, asked, stop } = std::mem::take(&mut *self.shared.inbox());
            if stop {
                return;
            }
            now = Instant::now();
            for core in joined {
                let number = core.place.number;
                self.members.insert(number, Member::new(core));
                self.look(number, now);
            }
            for number in asked {
                self.look(number, now);
            }
            while let Some((_, number)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
                self.look(number, now);
            }
        }
    }

    /// Takes in what has come for a connection, and looks at it.
    fn take(&mut self, came: Came) {
        let Some(Member { core, .. }) = self.members.get(&came.number) else { return };
        if came.is_readable && core.watched.load(Ordering::SeqCst) {
            // It looks afterwards anyway.
            core.place.is_asked.store(true, Ordering::SeqCst);
            if !core.read_idly() {
                // A thread leads, or has been faster: it will be back.
                core.watched.store(false, Ordering::SeqCst);
            }
        }
        self.look(came.number, Instant::now());
    }

    /// Looks at a connection: what is to be done, what to wait for, and when to look again.
    fn look(&mut self, number: u64, now: Instant) {
        // One that has ended may still be asked for.
        let Some(member) = self.members.get_mut(&number) else { return };
        let core = &member.core;
        // Before the look: who asks from here on is looked at once more, and who did before has done so for something that is
        // seen now.
        core.place.is_asked.store(false, Ordering::SeqCst);
        core.place.is_ticking.store(false, Ordering::SeqCst);
        if let Some(due) = member.due.take() {
            self.due.remove(&(due, number));
        }
        let limit = if core.has_ended() {
            None
        } else {
            let limit = [core.keep_alive(), member.look()].into_iter().flatten().min();
            member.core.place.is_ticking.store(limit.is_some_and(|limit| limit <= QUIET), Ordering::SeqCst);
            limit
        };
        let wanted = member.wanted();
        if wanted != member.interest {
            let changed = self.poller.change(number, Arc::clone(&member.core) as _, member.interest, wanted);
            member.changed(wanted, changed);
        }
        if member.core.has_ended() && member.interest == Interest::default() {
            self.members.remove(&number);
            return;
        }
        member.due = limit.map(|limit| now + limit);
        self.due.extend(member.due.map(|due| (due, number)));
    }
}

impl Member {
    fn new(core: Arc<Core>) -> Member {
        Member { core, turn: 0, is_full: false, interest: Interest::default(), due: None }
    }

    /// What is to be waited for at the socket.
    fn wanted(&self) -> Interest {
        if self.core.has_ended() {
            return Interest::default();
        }
        Interest { read: self.core.watched.load(Ordering::SeqCst), write: self.is_full }
    }

    /// Notes what came of a change of what is waited for.
    fn changed(&mut self, wanted: Interest, change: io::Result<()>) {
        match change {
            Ok(()) => self.interest = wanted,
            Err(error) if wanted == Interest::default() => {
                log::debug!("a socket that is no longer waited for: {error}");
                self.interest = wanted;
            }
            Err(error) => {
                // Nobody would hear of what comes.
                self.core.wire.cut(format!("the socket cannot be watched: {error}"));
                self.core.end();
            }
        }
    }

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
                waits.then_some(QUIET)
            }
            Need::Later => Some(QUIET),
            // The same turn as at the last look: it may be a long one.
            Need::IsLed(turn) if turn == self.turn => (!core.tell_idle_when_released() || waits).then_some(QUIET),
            Need::IsLed(turn) => {
                self.turn = turn;
                Some(QUIET)
            }
        }
    }
}
