//! Brings the broker's answers to the ledger, and the outcomes to the callbacks.
//!
//! A [`Feed`] is where the answers of one publishing channel come in. The publishing thread reads it itself until the
//! first `publish_async`; from then on the [`Dispatcher`] thread does, and the publishing thread waits for the ledger
//! to change. One of the two reads at any time: with two readers an `ack multiple` could overtake a nack.
//!
//! Lock order: the ledger's lock is the last one taken and is never held while a callback runs.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use amiquip::Confirm;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, after, at, never, select_biased, unbounded};

use crate::callback::Callback;
use crate::confirms::{Ledger, Return, Route, Settled};
use crate::error::{Error, Result};
use crate::link::Link;

/// A ledger that two threads look at.
#[derive(Debug)]
pub(crate) struct SharedLedger {
    ledger: Mutex<Ledger>,
    /// Something has been settled.
    changed: Condvar,
}

impl SharedLedger {
    pub(crate) fn new() -> SharedLedger {
        SharedLedger { ledger: Mutex::new(Ledger::new()), changed: Condvar::new() }
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
            ledger = self.changed.wait_timeout(ledger, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
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
    fn absorb(&self, first: Confirm) -> Settled {
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
        drop(ledger);
        self.ledger.changed.notify_all();
        settled
    }

    fn take_returns(&self, ledger: &mut Ledger) {
        while let Ok(back) = self.returns.try_recv() {
            ledger.returned(&Return {
                code: back.reply_code,
                text: &back.reply_text,
                exchange: &back.exchange,
                routing_key: &back.routing_key,
                body: &back.content,
            });
        }
    }

    /// Reports what is past its deadline.
    pub(crate) fn expire(&self, now: Instant) -> Settled {
        let mut settled = Settled::new();
        let blocked = self.link.wire.blocked();
        let limit = self.confirm_timeout;
        let error = |route: &Route| match &blocked {
            Some(reason) => Error::Blocked { reason: reason.clone(), waited: limit },
            None => Error::Timeout { during: confirm_of(route), after: limit },
        };
        if self.ledger.lock().expire(now, error, &mut settled) {
            // A broker that owes confirms is not for the next borrower of this connection.
            self.link.suspect();
        }
        self.ledger.changed.notify_all();
        settled
    }

    /// Reports everything: there are no more answers on this channel.
    pub(crate) fn end(&self) -> Settled {
        let mut settled = Settled::new();
        let mut ledger = self.ledger.lock();
        self.take_returns(&mut ledger);
        ledger.end(|route| self.link.channel_ending(self.channel, &publish_to(route)), &mut settled);
        drop(ledger);
        self.ledger.changed.notify_all();
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
    /// Run callbacks of messages that did not get as far as a feed.
    Run(Settled),
}

/// The thread that reads a feed and runs callbacks. It ends when it is stopped or dropped.
pub(crate) struct Dispatcher {
    jobs: Sender<Job>,
    /// Nothing is sent; its end is the sign that the thread is done.
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher").field("thread", &self.thread).finish_non_exhaustive()
    }
}

impl Dispatcher {
    pub(crate) fn start() -> Result<Dispatcher> {
        let name = "coney-confirms".to_owned();
        let (jobs, work) = unbounded();
        let (alive, done) = crossbeam_channel::bounded(0);
        let thread = Builder::new()
            .name(name.clone())
            .spawn(move || {
                let _alive: Sender<()> = alive;
                dispatch(&work);
            })
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(Dispatcher { jobs, done, thread })
    }

    /// Hands over the reading of `feed`. The caller has stopped reading it.
    pub(crate) fn read(&self, feed: Feed) {
        self.send(Job::Read(feed));
    }

    /// Runs one callback on the dispatcher's thread.
    pub(crate) fn run(&self, callback: Callback, outcome: Result<()>) {
        self.run_all(vec![(callback, outcome)]);
    }

    pub(crate) fn run_all(&self, settled: Settled) {
        if !settled.is_empty() {
            self.send(Job::Run(settled));
        }
    }

    fn send(&self, job: Job) {
        // The thread lives as long as this sender. Were it gone, the callbacks inside would run on being dropped.
        let _ = self.jobs.send(job);
    }

    /// Ends the thread: what is unsettled by now is reported as it stands. Waits for callbacks until `deadline`; one
    /// that is stuck keeps its thread, which ends by itself when the callback does.
    pub(crate) fn stop(self, deadline: Instant) {
        let Dispatcher { jobs, done, thread } = self;
        drop(jobs);
        match done.recv_deadline(deadline) {
            Err(RecvTimeoutError::Timeout) => {
                log::error!("a publish_async callback does not return; its thread is left to it");
            }
            // Callbacks are run with their panics caught, so there is nothing to learn from the result.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => drop(thread.join()),
        }
    }
}

fn dispatch(jobs: &Receiver<Job>) {
    let mut feed: Option<Feed> = None;
    loop {
        let (confirms, deadline) = match &feed {
            Some(feed) => {
                // A message entered while this thread sleeps is due a whole confirm_timeout later, so looking again
                // after that time at the latest misses no deadline.
                let next = feed.ledger.lock().next_deadline();
                (feed.confirms.clone(), next.map_or_else(|| after(feed.confirm_timeout), at))
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
                Ok(Job::Run(settled)) => run(settled),
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
