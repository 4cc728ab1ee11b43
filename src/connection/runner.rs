//! Brings the broker's answers to the ledger, and the outcomes to the callbacks.
//!
//! A [`SharedLedger`] is where the answers of one publishing channel come in: whoever reads the socket enters them there. Its
//! [`Feed`] sees to what no answer says: deadlines, and the end of the channel. The thread that publishes looks after it while
//! it waits; from the first `publish_async` on so does a thread of the [`Runner`], which also runs the callbacks.
//!
//! Lock order: the ledger's lock is the last one taken but for the leaves, and is never held while a callback runs.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::callback::Callback;
use super::confirms::{Ledger, Return, Route, Settled};
use super::context::PublishContext;
use super::returns::Likeness;
use crate::error::{Error, Result, counted};
use crate::event::PoolEvents;
use crate::session::{Endings, Inbox, Incoming, Session, Sink, Waiters, Waker};

/// How many messages past their deadline are remembered in case the broker still answers. A connection that owes more is
/// given up.
const MOST_STRAYS: usize = 10_000;

#[derive(Debug)]
struct State {
    ledger: Ledger,
    /// Callbacks that are to be run.
    settled: Settled,
}

/// A ledger that the reader of the socket enters answers in, and others look at.
#[derive(Debug)]
pub(crate) struct SharedLedger {
    state: Mutex<State>,
    /// There are callbacks to be run.
    has_settled: AtomicBool,
    /// What is not about messages, and the threads that wait.
    pub(super) inbox: Inbox,
}

impl SharedLedger {
    pub(super) fn new(events: Arc<PoolEvents>) -> SharedLedger {
        let state = Mutex::new(State { ledger: Ledger::new(events), settled: Settled::new() });
        SharedLedger { state, has_settled: AtomicBool::new(false), inbox: Inbox::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the ledger.
    pub(super) fn with<T>(&self, step: impl FnOnce(&mut Ledger) -> T) -> T {
        step(&mut self.state().ledger)
    }

    /// Settles something, and wakes those who wait for it.
    fn settle(&self, step: impl FnOnce(&mut Ledger, &mut Settled)) {
        let mut state = self.state();
        let State { ledger, settled } = &mut *state;
        step(ledger, settled);
        if !settled.is_empty() {
            self.has_settled.store(true, Ordering::Release);
        }
        drop(state);
        self.waiters().wake();
    }

    pub(crate) fn waiters(&self) -> &Waiters {
        self.inbox.waiters()
    }

    fn take_settled(&self) -> Settled {
        if !self.has_settled.swap(false, Ordering::AcqRel) {
            return Settled::new();
        }
        std::mem::take(&mut self.state().settled)
    }
}

impl Sink for SharedLedger {
    fn take(&self, incoming: Incoming) {
        match incoming {
            Incoming::Confirm { tag, multiple, ack } => {
                self.settle(|ledger, settled| ledger.confirmed(tag, multiple, ack, settled));
            }
            Incoming::Returned { code, text, message } => self.with(|ledger| {
                ledger.returned(&Return {
                    code,
                    text,
                    exchange: message.exchange,
                    routing_key: message.routing_key,
                    message: Likeness::of(&Arc::new(message.message)),
                });
            }),
            other => self.inbox.take(other),
        }
    }

    fn ended(&self) {
        self.inbox.ended();
    }
}

/// What looks after the ledger of one publishing channel.
#[derive(Clone)]
pub(crate) struct Feed {
    pub(super) ledger: Arc<SharedLedger>,
    pub(super) session: Arc<Session>,
    pub(super) endings: Endings,
    pub(super) context: Arc<PublishContext>,
    /// How long each message may take.
    pub(super) confirm_timeout: Duration,
}

impl Feed {
    /// Whether there are no more answers than those that have been entered.
    fn has_ended(&self) -> bool {
        self.ledger.inbox.has_ended() || !self.session.is_alive()
    }

    /// Reports what is past its deadline by now, and everything if no more answers come. Returns when there is something to
    /// report next.
    pub(super) fn look(&self, now: Instant) -> Option<Instant> {
        if self.has_ended() {
            self.end();
            return None;
        }
        let due = self.ledger.with(|ledger| ledger.next_deadline());
        if due.is_some_and(|due| due <= now) {
            self.expire(now);
            return self.ledger.with(|ledger| ledger.next_deadline());
        }
        due
    }

    /// Reports what is past its deadline.
    pub(super) fn expire(&self, now: Instant) {
        let blocked = self.session.wire.blocked();
        let limit = self.confirm_timeout;
        let error = |route: &Route| match &blocked {
            Some(reason) => Error::Blocked { reason: reason.clone(), waited: limit, written: true },
            None => Error::Timeout { during: confirm_of(route), after: limit },
        };
        self.ledger.settle(|ledger, settled| {
            if ledger.expire(now, error, settled) {
                // Its answer may still come, and must not meet the next borrower of this connection.
                self.session.suspect();
                if ledger.strays() > MOST_STRAYS {
                    self.session
                        .wire
                        .cut(format!("the broker owes confirms of {}", counted(ledger.strays(), "message")));
                }
            }
        });
    }

    /// Reports everything: there are no more answers on this channel than those already here.
    pub(super) fn end(&self) {
        if self.ledger.with(|ledger| ledger.has_ended()) {
            return;
        }
        if let Some(text) = self.endings.close_text() {
            self.context.heed(text);
        }
        self.ledger.settle(|ledger, settled| {
            ledger.end(|route| self.endings.ending(&publish_to(route)), settled);
        });
    }
}

fn confirm_of(route: &Route) -> String {
    format!("confirm of a message to {}", route_text(route))
}

/// Names a publish in an error.
pub(crate) fn publish_to(route: &Route) -> String {
    format!("publish to {}", route_text(route))
}

fn route_text(Route { exchange, routing_key }: &Route) -> String {
    format!("exchange {exchange:?} with routing key {routing_key:?}")
}

fn run(settled: Settled) {
    for (callback, outcome) in settled {
        callback.run(outcome);
    }
}

/// What the runner's thread is to do.
#[derive(Default)]
struct Jobs {
    /// Whose callbacks to run.
    feed: Option<Feed>,
    /// Other callbacks to run.
    settled: Settled,
    stop: bool,
}

struct Shared {
    jobs: Mutex<Jobs>,
    waker: Waker,
    session: Arc<Session>,
    /// Wakes the thread while there is no socket to wait at.
    wake: Sender<()>,
    /// Nobody but the thread itself.
    waiters: Waiters,
}

impl Shared {
    fn tell(&self, change: impl FnOnce(&mut Jobs)) {
        change(&mut self.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        // If it is full, the thread is about to look.
        let _ = self.wake.try_send(());
        self.waker.wake();
    }
}

/// The thread that runs the callbacks of `publish_async`. It ends when it is stopped or dropped.
pub(crate) struct Runner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Nothing is sent; its end is the sign that the thread is done.
    done: Receiver<()>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").field("thread", &self.thread).finish_non_exhaustive()
    }
}

impl Runner {
    pub(super) fn start(session: &Arc<Session>) -> Result<Runner> {
        let name = "coney-callbacks".to_owned();
        let waker = session.waker(&|| "asynchronous publishing".to_owned())?;
        let (wake, woken) = bounded(1);
        let (alive, done) = bounded(0);
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            waker,
            session: Arc::clone(session),
            wake,
            waiters: Waiters::default(),
        });
        let thread = Builder::new()
            .name(name.clone())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let _alive: Sender<()> = alive;
                    run_all(&shared, &woken);
                }
            })
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(Runner { shared, thread: Some(thread), done })
    }

    /// Runs the callbacks of this feed from now on, behind those of the one before, whose channel is gone.
    pub(super) fn attend(&self, feed: Feed) {
        self.shared.tell(|jobs| {
            if let Some(before) = jobs.feed.replace(feed) {
                // The thread may be in a callback, and would find nothing of it afterwards.
                before.end();
                jobs.settled.append(&mut before.ledger.take_settled());
            }
        });
    }

    /// Runs one callback that is in no ledger.
    pub(super) fn run(&self, callback: Callback, outcome: Result<()>) {
        self.shared.tell(|jobs| jobs.settled.push((callback, outcome)));
    }

    /// Ends the thread: what is unsettled by now is reported as it stands. Waits for callbacks until `deadline`; one that is
    /// stuck keeps its thread, which ends by itself when the callback does. Returns whether all is done.
    pub(super) fn stop(mut self, deadline: Instant, is_own: bool) -> bool {
        self.shared.tell(|jobs| jobs.stop = true);
        if is_own {
            // It ends when the callback that it runs has returned.
            self.thread = None;
            return true;
        }
        if let Err(RecvTimeoutError::Timeout) = self.done.recv_deadline(deadline) {
            log::error!("a publish_async callback does not return; its thread is left to it");
            self.thread = None;
            return false;
        }
        if let Some(thread) = self.thread.take() {
            // Callbacks are run with their panics caught, so there is nothing to learn from the result.
            let _ = thread.join();
        }
        true
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.shared.tell(|jobs| jobs.stop = true);
    }
}

fn run_all(shared: &Shared, woken: &Receiver<()>) {
    loop {
        let (feed, mut settled, stop) = {
            let mut jobs = shared.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            (jobs.feed.clone(), std::mem::take(&mut jobs.settled), jobs.stop)
        };
        let mut due = None;
        if let Some(feed) = &feed {
            // What had come counts, before what is too late.
            due = feed.look(Instant::now());
            if stop && settled.is_empty() && !feed.ledger.has_settled.load(Ordering::Acquire) {
                // Stopped with callbacks waiting: whoever stopped this thread has waited long enough.
                feed.expire(Instant::now() + feed.confirm_timeout);
            }
            settled.append(&mut feed.ledger.take_settled());
        }
        if !settled.is_empty() {
            run(settled);
            continue;
        }
        if stop {
            return;
        }
        let feed = feed.filter(|feed| !feed.has_ended());
        let Some(feed) = feed.filter(|_| shared.session.is_alive()) else {
            // The sender lives as long as this thread's `shared`.
            let _ = woken.recv();
            continue;
        };
        // A message that is entered meanwhile is not due before that.
        let until = due.unwrap_or_else(|| Instant::now() + feed.confirm_timeout);
        shared.session.wait(&[feed.ledger.waiters(), &shared.waiters], Some(&shared.waker), until, || {
            let is_due = feed.ledger.has_settled.load(Ordering::Acquire) || feed.has_ended() || !woken.is_empty();
            is_due.then_some(())
        });
        // Its message, if there is one, is among the jobs.
        let _ = woken.try_recv();
    }
}
