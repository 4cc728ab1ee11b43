//! The calls that a channel has sent and that are not answered, and who wants to know.
//!
//! Whoever reads the socket enters answers here and wakes the thread that asked; callbacks are left to the client's runner.
//! No I/O. The lock is a leaf.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::connection::{PublishContext, Received};
use crate::error::{Error, Result};
use crate::session::{Arrived, Endings, Inbox, Incoming, Sink, Waiters};

/// Runs a callback, which has its own way of being run exactly once.
pub(super) type Callback = Box<dyn FnOnce(Result<Received>) + Send>;

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) calls: AtomicU64,
    pub(super) unmatched: AtomicU64,
}

/// A thread that waits for its answer.
#[derive(Default)]
pub(super) struct Slot {
    result: Mutex<Option<Result<Received>>>,
    pub(super) waiters: Waiters,
}

impl Slot {
    fn fill(&self, result: Result<Received>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.waiters.wake();
    }

    pub(super) fn take(&self) -> Option<Result<Received>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Who asks.
pub(super) enum Asker {
    Thread(Arc<Slot>),
    /// To be run by the client's runner.
    Callback(Callback),
}

/// A callback and what it is to be told. One that is dropped instead is told so.
pub(super) struct Answered {
    pub(super) callback: Callback,
    pub(super) result: Result<Received>,
}

impl Answered {
    pub(super) fn tell(self) {
        (self.callback)(self.result);
    }
}

/// A call that has been sent.
pub(super) struct Call {
    pub(super) queue: String,
    pub(super) deadline: Instant,
    pub(super) timeout: Duration,
    pub(super) asker: Asker,
}

/// Names a call in an error.
pub(super) fn during(queue: &str) -> String {
    format!("call to queue {queue:?}")
}

#[derive(Default)]
struct State {
    last: u64,
    calls: HashMap<u64, Call>,
    /// Of the calls that have a callback: a thread looks at the clock itself.
    deadlines: BTreeSet<(Instant, u64)>,
    /// By delivery tag, which is the number of the call, until the broker has confirmed the request.
    unconfirmed: BTreeSet<u64>,
    /// Callbacks to be run.
    answered: Vec<Answered>,
    has_ended: bool,
}

impl State {
    fn take(&mut self, number: u64) -> Option<Call> {
        let call = self.calls.remove(&number)?;
        if let Asker::Callback(_) = call.asker {
            self.deadlines.remove(&(call.deadline, number));
        }
        Some(call)
    }

    /// Tells the thread that asked, or leaves it to the runner.
    fn answer(&mut self, call: Call, result: Result<Received>) {
        match call.asker {
            Asker::Thread(slot) => slot.fill(result),
            Asker::Callback(callback) => self.answered.push(Answered { callback, result }),
        }
    }

    fn refused(&mut self, number: u64) {
        if let Some(call) = self.take(number) {
            let error = Error::Nacked { exchange: String::new(), routing_key: call.queue.clone() };
            self.answer(call, Err(error));
        }
    }

    fn confirmed(&mut self, tag: u64, multiple: bool, ack: bool) {
        if multiple {
            // Tag 0 means all.
            let next = tag.checked_add(1).filter(|_| tag > 0).unwrap_or(u64::MAX);
            let later = self.unconfirmed.split_off(&next);
            let settled = std::mem::replace(&mut self.unconfirmed, later);
            if !ack {
                settled.into_iter().for_each(|number| self.refused(number));
            }
        } else if self.unconfirmed.remove(&tag) && !ack {
            self.refused(tag);
        }
    }
}

/// What one channel has in flight.
pub(super) struct Flight {
    /// What correlation ids begin with, so that answers to an earlier channel of ours are strangers'.
    prefix: String,
    state: Mutex<State>,
    counters: Arc<Counters>,
    context: Arc<PublishContext>,
    /// Answers to what is no call, and the threads that wait for any change.
    pub(super) inbox: Inbox,
    /// Once the channel is open.
    endings: OnceLock<Endings>,
}

impl Flight {
    pub(super) fn new(counters: Arc<Counters>, context: Arc<PublishContext>) -> Flight {
        Flight {
            prefix: format!("{:016x}-", fastrand::u64(..)),
            state: Mutex::default(),
            counters,
            context,
            inbox: Inbox::default(),
            endings: OnceLock::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says where to ask why the channel has ended.
    pub(super) fn ends_by(&self, endings: Endings) {
        // A channel is opened once.
        let _ = self.endings.set(endings);
    }

    pub(super) fn waiters(&self) -> &Waiters {
        self.inbox.waiters()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().calls.is_empty()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state().has_ended
    }

    /// Whether there is a callback to run, or one that is waited for.
    pub(super) fn has_callbacks(&self) -> bool {
        let state = self.state();
        !state.deadlines.is_empty() || !state.answered.is_empty()
    }

    pub(super) fn has_answered(&self) -> bool {
        !self.state().answered.is_empty()
    }

    /// The correlation id of call `number`.
    pub(super) fn id(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Enters a call that is about to be put on its way: the channel's next message, which both sides count from 1. The call
    /// comes back if the channel has ended.
    pub(super) fn enter(&self, call: Call) -> std::result::Result<u64, Call> {
        let mut state = self.state();
        if state.has_ended {
            return Err(call);
        }
        state.last += 1;
        let number = state.last;
        if let Asker::Callback(_) = call.asker {
            state.deadlines.insert((call.deadline, number));
        }
        state.unconfirmed.insert(number);
        state.calls.insert(number, call);
        self.counters.calls.fetch_add(1, Ordering::Relaxed);
        Ok(number)
    }

    /// Why call `number` has no answer by its deadline.
    pub(super) fn too_late(&self, number: u64, queue: &str, timeout: Duration) -> Error {
        self.late(&self.state(), number, queue, timeout)
    }

    fn late(&self, state: &State, number: u64, queue: &str, timeout: Duration) -> Error {
        // A request that the broker has confirmed waits for its worker, whatever else is blocked.
        let is_open = state.unconfirmed.contains(&number);
        match self.endings.get().filter(|_| is_open).and_then(Endings::blocked) {
            Some(reason) => Error::Blocked { reason, waited: timeout, written: true },
            None => Error::Timeout { during: during(queue), after: timeout },
        }
    }

    /// Takes a call back that nobody waits for any more.
    pub(super) fn forget(&self, number: u64) {
        drop(self.state().take(number));
        self.waiters().wake();
    }

    /// Takes what callbacks are to be told, of those too whose time is up; and when the next one's is.
    pub(super) fn take_answered(&self, now: Instant) -> (Vec<Answered>, Option<Instant>) {
        let mut state = self.state();
        while let Some((deadline, number)) = state.deadlines.first().copied()
            && deadline <= now
        {
            if let Some(call) = state.take(number) {
                let error = self.late(&state, number, &call.queue, call.timeout);
                state.answer(call, Err(error));
            }
        }
        let next = state.deadlines.first().map(|(deadline, _)| *deadline);
        (std::mem::take(&mut state.answered), next)
    }

    fn settle(&self, step: impl FnOnce(&mut State)) {
        step(&mut self.state());
        self.waiters().wake();
    }

    fn number(&self, arrived: &Arrived) -> Option<u64> {
        arrived.message.correlation_id()?.strip_prefix(&self.prefix)?.parse().ok()
    }

    fn delivered(&self, arrived: Arrived) {
        let number = self.number(&arrived);
        self.settle(|state| match number.and_then(|number| state.take(number)) {
            Some(call) => state.answer(call, Ok(Received::from(arrived))),
            None => {
                self.counters.unmatched.fetch_add(1, Ordering::Relaxed);
                log::debug!("rpc client: an answer that nobody waits for was dropped");
            }
        });
    }
}

impl Sink for Flight {
    fn take(&self, incoming: Incoming) {
        match incoming {
            Incoming::Delivered(arrived) => self.delivered(arrived),
            Incoming::Confirm { tag, multiple, ack } => {
                let mut state = self.state();
                state.confirmed(tag, multiple, ack);
                drop(state);
                // That a request is taken is no news to anybody.
                if !ack {
                    self.waiters().wake();
                }
            }
            Incoming::Returned { code, text, message } => {
                let number = self.number(&message);
                self.settle(|state| {
                    if let Some(call) = number.and_then(|number| state.take(number)) {
                        let (exchange, routing_key) = (String::new(), call.queue.clone());
                        state.answer(call, Err(Error::Returned { code, text, exchange, routing_key }));
                    }
                });
            }
            other => self.inbox.take(other),
        }
    }

    fn ended(&self) {
        let endings = self.endings.get();
        if let Some(text) = endings.and_then(Endings::close_text) {
            self.context.heed(text);
        }
        let error = endings.map(|endings| endings.ending("wait for answers"));
        self.settle(|state| {
            state.has_ended = true;
            for (_, call) in std::mem::take(&mut state.calls) {
                let error = error.clone().unwrap_or_else(|| Error::ConnectionLost {
                    during: during(&call.queue),
                    detail: "the channel was not open yet".to_owned(),
                });
                state.answer(call, Err(error));
            }
            state.deadlines.clear();
            state.unconfirmed.clear();
        });
        self.inbox.ended();
    }
}
