//! The calls that a channel has sent and that are not answered, and who wants to know. No I/O and no threads.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use amiquip::Confirm;
use crossbeam_channel::Sender;

use crate::delivery::Received;
use crate::error::{Error, Result};
use crate::message::Message;

/// Runs a callback, which has its own way of being run exactly once.
type Callback = Box<dyn FnOnce(Result<Received>) + Send>;

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) calls: AtomicU64,
    pub(super) unmatched: AtomicU64,
}

/// Who asks.
pub(super) enum Asker {
    /// A thread that waits.
    Waiting(Sender<Result<Received>>),
    /// A callback, to be run by the thread that is there for it.
    Callback(Callback),
}

/// A callback and what it is to be told. One that is dropped instead is told so.
pub(super) struct Answered {
    callback: Callback,
    result: Result<Received>,
}

impl Answered {
    pub(super) fn new(callback: Callback, result: Result<Received>) -> Answered {
        Answered { callback, result }
    }

    pub(super) fn tell(self) {
        (self.callback)(self.result);
    }
}

/// A call on its way. However it ends, its asker is told once.
pub(super) struct Call {
    pub(super) queue: String,
    /// Taken when it is sent.
    message: Option<Message>,
    pub(super) deadline: Instant,
    timeout: Duration,
    asker: Option<Asker>,
}

impl Call {
    pub(super) fn new(queue: &str, message: Message, deadline: Instant, timeout: Duration, asker: Asker) -> Call {
        Call { queue: queue.to_owned(), message: Some(message), deadline, timeout, asker: Some(asker) }
    }

    /// Tells whoever waits, or leaves the callback among `answered`.
    pub(super) fn answer(mut self, result: Result<Received>, answered: &mut Vec<Answered>) {
        match self.asker.take() {
            // It may have stopped waiting.
            Some(Asker::Waiting(asker)) => drop(asker.try_send(result)),
            Some(Asker::Callback(callback)) => answered.push(Answered { callback, result }),
            None => {}
        }
    }

    pub(super) fn time_out(self, answered: &mut Vec<Answered>) {
        let error = Error::Timeout { during: during(&self.queue), after: self.timeout };
        self.answer(Err(error), answered);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let detail = "the client was closed".to_owned();
        let error = || Error::ConnectionLost { during: during(&self.queue), detail };
        match self.asker.take() {
            Some(Asker::Waiting(asker)) => drop(asker.try_send(Err(error()))),
            Some(Asker::Callback(callback)) => callback(Err(error())),
            None => {}
        }
    }
}

/// Names a call in an error.
pub(super) fn during(queue: &str) -> String {
    format!("call to queue {queue:?}")
}

/// What one channel has in flight.
pub(super) struct Flight {
    /// What correlation ids begin with, so that answers to an earlier channel of ours are strangers'.
    prefix: String,
    next: u64,
    calls: HashMap<u64, Call>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// By delivery tag, which is the number of the call, until the broker has confirmed the request.
    unconfirmed: BTreeSet<u64>,
    /// Callbacks to be run.
    pub(super) answered: Vec<Answered>,
}

impl Flight {
    pub(super) fn new() -> Flight {
        Flight {
            prefix: format!("{:016x}-", fastrand::u64(..)),
            next: 1,
            calls: HashMap::new(),
            deadlines: BTreeSet::new(),
            unconfirmed: BTreeSet::new(),
            answered: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// A call and its message as it is to be sent to `reply_to`; `None` if it is too late for it, or if it cannot be sent.
    pub(super) fn prepare(&mut self, mut call: Call, reply_to: &str, frame_max: usize) -> Option<(Call, Message)> {
        if call.deadline <= Instant::now() {
            call.time_out(&mut self.answered);
            return None;
        }
        let id = format!("{}{}", self.prefix, self.next);
        let message = call.message.take()?.with_reply_to(reply_to).with_correlation_id(id);
        match message.check(frame_max) {
            Ok(()) => Some((call, message)),
            Err(error) => {
                call.answer(Err(error), &mut self.answered);
                None
            }
        }
    }

    /// The call that was prepared last has been sent: the channel's next message, which both sides count from 1.
    pub(super) fn sent(&mut self, call: Call) {
        self.deadlines.insert((call.deadline, self.next));
        self.unconfirmed.insert(self.next);
        self.calls.insert(self.next, call);
        self.next += 1;
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Whether there are calls of which the broker has said nothing yet.
    pub(super) fn awaits_confirms(&self) -> bool {
        !self.unconfirmed.is_empty()
    }

    fn take(&mut self, number: u64) -> Option<Call> {
        let call = self.calls.remove(&number)?;
        self.deadlines.remove(&(call.deadline, number));
        self.unconfirmed.remove(&number);
        Some(call)
    }

    fn take_by_id(&mut self, correlation_id: Option<&str>) -> Option<Call> {
        let number = correlation_id?.strip_prefix(&self.prefix)?.parse().ok()?;
        self.take(number)
    }

    pub(super) fn arrived(&mut self, received: Received, counters: &Counters) {
        match self.take_by_id(received.message().correlation_id()) {
            Some(call) => call.answer(Ok(received), &mut self.answered),
            None => {
                counters.unmatched.fetch_add(1, Ordering::Relaxed);
                log::debug!("rpc client: an answer that nobody waits for was dropped");
            }
        }
    }

    pub(super) fn returned(&mut self, returned: amiquip::Return) {
        let id = returned.properties.correlation_id().as_deref();
        if let Some(call) = self.take_by_id(id) {
            let (exchange, routing_key) = (String::new(), call.queue.clone());
            let error = Error::Returned { code: returned.reply_code, text: returned.reply_text, exchange, routing_key };
            call.answer(Err(error), &mut self.answered);
        }
    }

    pub(super) fn confirmed(&mut self, confirm: Confirm) {
        let (payload, taken) = match confirm {
            Confirm::Ack(payload) => (payload, true),
            Confirm::Nack(payload) => (payload, false),
        };
        let tag = payload.delivery_tag;
        if payload.multiple {
            // Tag 0 means all.
            let next = tag.checked_add(1).filter(|_| tag > 0).unwrap_or(u64::MAX);
            let later = self.unconfirmed.split_off(&next);
            for number in std::mem::replace(&mut self.unconfirmed, later) {
                self.settled(number, taken);
            }
        } else if self.unconfirmed.remove(&tag) {
            self.settled(tag, taken);
        }
    }

    fn settled(&mut self, number: u64, taken: bool) {
        if !taken && let Some(call) = self.take(number) {
            let error = Error::Nacked { exchange: String::new(), routing_key: call.queue.clone() };
            call.answer(Err(error), &mut self.answered);
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((deadline, number)) = self.deadlines.first().copied()
            && deadline <= now
        {
            if let Some(call) = self.take(number) {
                call.time_out(&mut self.answered);
            }
        }
    }

    /// The channel is gone: all in flight get the cause.
    pub(super) fn end(&mut self, error: &Error) {
        for (_, call) in self.calls.drain() {
            call.answer(Err(error.clone()), &mut self.answered);
        }
    }
}
