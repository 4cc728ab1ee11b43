//! Brings the broker's answers to the ledger, and the outcomes to the callbacks.
//!
//! A [`Feed`] is where the answers of one publishing channel come in. The publishing thread reads it itself until the
//! first `publish_async`; from then on a thread of the [`Dispatcher`] does, and the publishing thread waits for the
//! ledger to change. One of the two reads at any time: with two readers an `ack multiple` could overtake a nack.
//!
//! The dispatcher runs callbacks on a second thread, so that a slow one keeps no answer waiting.
//!
//! Lock order: the ledger's lock is the last one taken but for the leaves, and is never held while a callback runs.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use amiquip::Confirm;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, at, never, select_biased, unbounded};

use crate::callback::Callback;
use crate::confirms::{Ledger, Return, Route, Settled};
use crate::error::{Error, Result};
use crate::likeness::Likeness;
use crate::link::Link;
use crate::message::Message;
use crate::meter::PoolMeter;

/// How many messages past their deadline are remembered in case the broker still answers. A connection that owes more is
/// given up.
const MOST_STRAYS: usize = 10_000;

/// A ledger that two threads look at.
#[derive(Debug)]
pub(crate) struct SharedLedger {
    ledger: Mutex<Ledger>,
    /// Something has been settled.
    changed: Condvar,
    /// Threads that wait for that, counted under the lock. Waking nobody is a system call all the same.
    waiting: AtomicUsize,
}

impl SharedLedger {
    pub(crate) fn new(meter: Arc<PoolMeter>) -> SharedLedger {
        SharedLedger { ledger: Mutex::new(Ledger::new(meter)), changed: Condvar::new(), waiting: AtomicUsize::new(0) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, or until `deadline`; returns whether it is done.
    pub(crate) fn wait(&self, deadline: Instant, done: impl Fn(&Ledger) -> bool) -> bool {
        let mut ledger = self.lock();
        while !done(&ledger) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.waiting.fetch_add(1, Ordering::Relaxed);
            ledger = self.changed.wait_timeout(ledger, left).unwrap_or_else(PoisonError::into_inner).0;
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// Wakes whoever waits for what has been changed under `ledger`.
    fn changed(&self, ledger: MutexGuard<'_, Ledger>) {
        let somebody_waits = self.waiting.load(Ordering::Relaxed) > 0;
        drop(ledger);
        if somebody_waits {
            self.changed.notify_all();
        }
    }
}

/// Where the answers of one publishing channel come in.
#[derive(Clone)]
pub(crate) struct Feed {
    pub(crate) confirms: Receiver<Confirm>,
    pub(crate) returns: Receiver<amiquip::Return>,
    pub(crate) ledger: Arc<SharedLedger>,
    pub(crate) link: Arc<Link>,
    pub(crate) channel: u16,
    /// How long each message may take.
    pub(crate) confirm_timeout: Duration,
}

impl Feed {
    /// Takes in the next answers, waiting for the first one until `deadline`. Returns what is settled by them.
    ///
    /// For the thread that reads the feed.
    pub(crate) fn pump(&self, deadline: Instant) -> Settled {
        match self.confirms.recv_deadline(deadline) {
            Ok(confirm) => self.absorb(confirm),
            Err(RecvTimeoutError::Timeout) => self.expire(Instant::now()),
            Err(RecvTimeoutError::Disconnected) => self.end(),
        }
    }

    /// Takes in one answer and all others that are there already.
    pub(crate) fn absorb(&self, first: Confirm) -> Settled {
        let mut settled = Settled::new();
        let mut ledger = self.ledger.lock();
        let mut next = Some(first);
        while let Some(confirm) = next {
            // The broker sends a return before the ack of the same message, so after the ack it is here.
            self.take_returns(&mut ledger);
            match confirm {
                Confirm::Ack(payload) => {
                    ledger.confirmed(payload.delivery_tag, payload.multiple, true, &mut settled);
                }
                Confirm::Nack(payload) => {
                    ledger.confirmed(payload.delivery_tag, payload.multiple, false, &mut settled);
                }
            }
            next = self.confirms.try_recv().ok();
        }
        self.ledger.changed(ledger);
        settled
    }

    fn take_returns(&self, ledger: &mut Ledger) {
        while let Ok(back) = self.returns.try_recv() {
            ledger.returned(&Return {
                code: back.reply_code,
                text: back.reply_text,
                exchange: back.exchange,
                routing_key: back.routing_key,
                message: Likeness::of(&Arc::new(Message::from_amqp(back.content, back.properties))),
            });
        }
    }

    /// Reports what is past its deadline.
    pub(crate) fn expire(&self, now: Instant) -> Settled {
        let mut settled = Settled::new();
        let blocked = self.link.wire.blocked();
        let limit = self.confirm_timeout;
        let error = |route: &Route| match &blocked {
            Some(reason) => Error::Blocked { reason: reason.clone(), waited: limit, written: true },
            None => Error::Timeout { during: confirm_of(route), after: limit },
        };
        let mut ledger = self.ledger.lock();
        if ledger.expire(now, error, &mut settled) {
            // A broker that owes confirms is not for the next borrower of this connection.
            self.link.suspect();
            if ledger.strays() > MOST_STRAYS {
                self.link.wire.cut(format!("the broker owes confirms of {} messages", ledger.strays()));
            }
        }
        self.ledger.changed(ledger);
        settled
    }

    /// Reports everything: there are no more answers on this channel than those already here.
    ///
    /// For the thread that reads the feed.
    pub(crate) fn end(&self) -> Settled {
        let mut settled = match self.confirms.try_recv() {
            Ok(confirm) => self.absorb(confirm),
            Err(_) => Settled::new(),
        };
        let mut ledger = self.ledger.lock();
        self.take_returns(&mut ledger);
        ledger.end(|route| self.link.channel_ending(self.channel, &publish_to(route)), &mut settled);
        self.ledger.changed(ledger);
        settled
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

pub(crate) fn run(settled: Settled) {
    for (callback, outcome) in settled {
        callback.run(outcome);
    }
}

enum Job {
    /// Read this feed from now on.
    Read(Feed),
    /// A message has been entered in an empty ledger: there is a deadline to keep.
    Look,
}

/// The threads that read a feed and run callbacks. They end when it is stopped or dropped.
pub(crate) struct Dispatcher {
    jobs: Sender<Job>,
    callbacks: Sender<Settled>,
    reader: JoinHandle<()>,
    runner: JoinHandle<()>,
    /// Nothing is sent; its end is the sign that the runner is done.
    done: Receiver<()>,
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher").field("reader", &self.reader).field("runner", &self.runner).finish()
    }
}

impl Dispatcher {
    pub(crate) fn start() -> Result<Dispatcher> {
        let (jobs, work) = unbounded();
        let (callbacks, settled) = unbounded();
        let (alive, done) = crossbeam_channel::bounded(0);
        let runner = start("coney-callbacks", move || {
            let _alive: Sender<()> = alive;
            settled.iter().for_each(run);
        })?;
        let reader = start("coney-confirms", {
            let callbacks = callbacks.clone();
            move || read(&work, &callbacks)
        })?;
        Ok(Dispatcher { jobs, callbacks, reader, runner, done })
    }

    /// Hands over the reading of `feed`. The caller has stopped reading it.
    pub(crate) fn read(&self, feed: Feed) {
        self.tell(Job::Read(feed));
    }

    /// Makes the reader look at the ledger's deadlines, of which it had none.
    pub(crate) fn look(&self) {
        self.tell(Job::Look);
    }

    fn tell(&self, job: Job) {
        // The reader lives as long as this sender.
        let _ = self.jobs.send(job);
    }

    /// Runs one callback on the runner's thread.
    pub(crate) fn run(&self, callback: Callback, outcome: Result<()>) {
        self.run_all(vec![(callback, outcome)]);
    }

    pub(crate) fn run_all(&self, settled: Settled) {
        // The runner lives as long as this sender. Were it gone, the callbacks would run on being dropped.
        let _ = self.callbacks.send(settled);
    }

    /// Ends the threads: what is unsettled by now is reported as it stands. Waits for callbacks until `deadline`; one
    /// that is stuck keeps its thread, which ends by itself when the callback does. Returns whether all is done.
    pub(crate) fn stop(self, deadline: Instant) -> bool {
        let Dispatcher { jobs, callbacks, reader, runner, done } = self;
        drop(jobs);
        // The reader runs nothing of the user's, so it ends at once, and a panic in it has been printed.
        let _ = reader.join();
        drop(callbacks);
        if let Err(RecvTimeoutError::Timeout) = done.recv_deadline(deadline) {
            log::error!("a publish_async callback does not return; its thread is left to it");
            return false;
        }
        // Callbacks are run with their panics caught, so there is nothing to learn from the result.
        let _ = runner.join();
        true
    }
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(|source| Error::Thread { name: name.to_owned(), source: Arc::new(source) })
}

fn read(jobs: &Receiver<Job>, callbacks: &Sender<Settled>) {
    let run = |settled: Settled| {
        if !settled.is_empty() {
            // Were the runner gone, the callbacks would run on being dropped.
            let _ = callbacks.send(settled);
        }
    };
    let mut feed: Option<Feed> = None;
    loop {
        let (confirms, deadline) = match &feed {
            Some(feed) => {
                let next = feed.ledger.lock().next_deadline();
                (feed.confirms.clone(), next.map_or_else(never, at))
            }
            None => (never(), never()),
        };
        select_biased! {
            recv(confirms) -> confirm => {
                if let Some(reading) = &feed {
                    match confirm {
                        Ok(confirm) => run(reading.absorb(confirm)),
                        Err(_) => {
                            run(reading.end());
                            feed = None;
                        }
                    }
                }
            }
            recv(jobs) -> job => match job {
                Ok(Job::Read(next)) => feed = Some(next),
                Ok(Job::Look) => {}
                Err(_) => break,
            },
            recv(deadline) -> now => {
                if let (Some(feed), Ok(now)) = (&feed, now) {
                    run(feed.expire(now));
                }
            }
        }
    }
    if let Some(feed) = feed {
        // Stopped with callbacks waiting: whoever stopped this thread has waited long enough.
        run(feed.expire(Instant::now() + feed.confirm_timeout));
    }
}
