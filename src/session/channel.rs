//! A channel of a connection, as the thread sees it that owns it: requests, messages and settlements go out here.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::channel_state::{Answer, ChannelState, Incoming, Sink, Waiters, awaited};
use super::wire::{CloseReason, Wire};
use super::writer::Flush;
use super::{During, Session, Waker};
use crate::amqp::frame;
use crate::amqp::method::{BasicCancel, BasicConsume, BasicGet, BasicQos, ConfirmSelect, Method};
use crate::amqp::value::Table;
use crate::error::{Error, Result};
use crate::fork::Kept;
use crate::message::Message;

/// The longest body in bytes that goes out in one piece. Of a longer one so much is put on its way at a time.
const PIECE: usize = 128 << 10;

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settlement {
    Ack,
    /// With all before it that are not settled.
    AckUpTo,
    Reject,
    Requeue,
}

/// A message, and where it goes.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) exchange: &'a str,
    pub(crate) routing_key: &'a str,
    pub(crate) message: &'a Arc<Message>,
    pub(crate) mandatory: bool,
}

/// Keeps what comes in on a channel until its owner takes it.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    queue: Mutex<VecDeque<Incoming>>,
    waiters: Waiters,
    ended: AtomicBool,
}

impl Inbox {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Incoming>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next thing that has come.
    pub(crate) fn next(&self) -> Option<Incoming> {
        self.queue().pop_front()
    }

    /// Moves all that has come to the end of `into`.
    pub(crate) fn take_all(&self, into: &mut VecDeque<Incoming>) {
        into.append(&mut self.queue());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue().is_empty()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(crate) fn waiters(&self) -> &Waiters {
        &self.waiters
    }
}

impl Sink for Inbox {
    fn take(&self, incoming: Incoming) {
        self.queue().push_back(incoming);
        self.waiters.wake();
    }

    fn ended(&self) {
        self.ended.store(true, Ordering::Release);
        self.waiters.wake();
    }
}

/// What a wait on an inbox came to.
enum Heard<T> {
    Value(T),
    Ended,
}

/// A channel of a [`Session`]. Dropping it closes it, which waits for the broker: see [`Channel::close`].
pub(crate) struct Channel {
    amqp: Kept<Mutex<amiquip::Channel>>,
    state: Arc<ChannelState>,
    session: Arc<Session>,
}

impl Channel {
    pub(super) fn new(amqp: amiquip::Channel, state: Arc<ChannelState>, session: Arc<Session>) -> Channel {
        Channel { amqp: Kept::new(Mutex::new(amqp)), state, session }
    }

    pub(crate) fn number(&self) -> u16 {
        self.state.number()
    }

    /// Why the channel gives no more answers.
    pub(crate) fn ending(&self, during: &str) -> Error {
        self.endings().ending(during)
    }

    /// The same, for whoever has no part of the channel.
    pub(crate) fn endings(&self) -> Endings {
        Endings { wire: Arc::clone(&self.session.wire), closed: Arc::clone(self.state.closed()) }
    }

    /// Runs one step of amiquip's on this channel, and cuts the connection if it is not done after `limit`.
    pub(crate) fn call<T>(
        &self,
        limit: Duration,
        during: During<'_>,
        step: impl FnOnce(&amiquip::Channel) -> amiquip::Result<T>,
    ) -> Result<T> {
        self.session
            .call(limit, during, Some(&self.state), || step(&self.amqp.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Puts frames on their way; returns whether it has. The broker ends the connection for a frame that comes after the
    /// answer to its `channel.close`. That answer is written under the same lock, and later than the close is noted.
    fn write(&self, flush: Flush, put: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut is_open = true;
        self.session.core.write(flush, |out| {
            is_open = self.state.close_reason().is_none();
            if is_open {
                put(out);
            }
        });
        is_open
    }

    fn write_method(&self, method: impl Into<Method>) {
        let method = method.into();
        self.write(Flush::Now, |out| frame::write_method(out, self.number(), &method));
    }

    /// Waits for what `pick` picks from what comes in, which is all that may come. Cuts the connection if nothing of it has
    /// come for `limit`: what comes later would be taken for the answer to something else.
    fn hear<T>(
        &self,
        inbox: &Inbox,
        limit: Duration,
        during: During<'_>,
        mut pick: impl FnMut(Incoming) -> Option<T>,
    ) -> Result<T> {
        loop {
            let came = self.state.came();
            let heard = self.session.wait(&[inbox.waiters()], None, crate::deadline::after(limit), || {
                while let Some(incoming) = inbox.next() {
                    if let Some(value) = pick(incoming) {
                        return Some(Heard::Value(value));
                    }
                }
                inbox.has_ended().then_some(Heard::Ended)
            });
            match heard {
                Some(Heard::Value(value)) => return Ok(value),
                Some(Heard::Ended) => return Err(self.ending(&during())),
                None if !self.session.is_alive() => return Err(self.ending(&during())),
                // A large message is on its way.
                None if self.state.came() > came => {}
                None => {
                    self.session.wire.cut("a call on it passed its deadline");
                    return Err(Error::Timeout { during: during(), after: limit });
                }
            }
        }
    }

    fn hear_answer(&self, inbox: &Inbox, limit: Duration, during: During<'_>, answer: Answer) -> Result<()> {
        self.hear(inbox, limit, during, |incoming| {
            matches!(incoming, Incoming::Answered(a) if a == answer).then_some(())
        })
    }

    /// Turns confirms on.
    pub(crate) fn select_confirms(&self, inbox: &Inbox, limit: Duration, during: During<'_>) -> Result<()> {
        self.state.ask_for(awaited::CONFIRM_SELECT | awaited::CONFIRMS);
        self.write_method(ConfirmSelect { no_wait: false });
        self.hear_answer(inbox, limit, during, Answer::ConfirmSelect)
    }

    /// How many deliveries a consumer that comes later is sent ahead of their acks.
    pub(crate) fn qos(&self, inbox: &Inbox, prefetch: u16, limit: Duration, during: During<'_>) -> Result<()> {
        self.state.ask_for(awaited::QOS);
        self.write_method(BasicQos { prefetch_count: prefetch, ..BasicQos::default() });
        self.hear_answer(inbox, limit, during, Answer::Qos)
    }

    /// Begins to consume, by a tag of our own. Deliveries may come before this returns, and stay in the inbox.
    pub(crate) fn consume(
        &self,
        inbox: &Inbox,
        consume: Consume<'_>,
        limit: Duration,
        during: During<'_>,
    ) -> Result<()> {
        let Consume { queue, exclusive, no_ack, arguments } = consume;
        self.state.ask_for(awaited::CONSUME | awaited::DELIVERIES);
        self.write_method(BasicConsume {
            queue: queue.into(),
            consumer_tag: CONSUMER.into(),
            exclusive,
            no_ack,
            arguments,
            ..BasicConsume::default()
        });
        let mut before = VecDeque::new();
        let result = self.hear(inbox, limit, during, |incoming| match incoming {
            Incoming::Answered(Answer::Consume) => Some(()),
            other => {
                before.push_back(other);
                None
            }
        });
        inbox.put_back(before);
        result
    }

    /// Ends the consumer; what crosses it on its way stays in the inbox.
    pub(crate) fn cancel(&self, inbox: &Inbox, limit: Duration, during: During<'_>) -> Result<()> {
        self.state.ask_for(awaited::CANCEL);
        self.write_method(BasicCancel { consumer_tag: CONSUMER.into(), no_wait: false });
        let mut crossed = VecDeque::new();
        let result = self.hear(inbox, limit, during, |incoming| match incoming {
            Incoming::Answered(Answer::Cancel) => Some(()),
            other => {
                crossed.push_back(other);
                None
            }
        });
        inbox.put_back(crossed);
        result
    }

    /// Asks for one message.
    pub(crate) fn get(
        &self,
        inbox: &Inbox,
        queue: &str,
        limit: Duration,
        during: During<'_>,
    ) -> Result<Option<super::Arrived>> {
        self.state.ask_for(awaited::GET);
        self.write_method(BasicGet { queue: queue.into(), ..BasicGet::default() });
        self.hear(inbox, limit, during, |incoming| match incoming {
            Incoming::Got(got) => Some(got),
            _ => None,
        })
    }

    /// Waits for what comes in, until `deadline`, until `waker` wakes it and `done` gives something, or until the channel
    /// has ended; with what has come, in `into`.
    pub(crate) fn listen<T>(
        &self,
        inbox: &Inbox,
        waker: Option<&Waker>,
        others: &[&Waiters],
        deadline: Instant,
        into: &mut VecDeque<Incoming>,
        mut done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let waiters: Vec<&Waiters> = others.iter().copied().chain([inbox.waiters()]).collect();
        self.session
            .wait(&waiters, waker, deadline, || {
                inbox.take_all(into);
                match done() {
                    Some(value) => Some(Some(value)),
                    None => (!into.is_empty() || inbox.has_ended()).then_some(None),
                }
            })
            .flatten()
    }

    /// Settles a delivery that came on this channel; the broker does not answer.
    pub(crate) fn settle(&self, tag: u64, settlement: Settlement, is_hurried: bool, during: During<'_>) -> Result<()> {
        if is_hurried {
            // It may be a while since anybody has looked.
            self.session.core.glance();
        }
        if self.state.close_reason().is_some() || !self.session.is_alive() {
            return Err(self.ending(&during()));
        }
        let number = self.number();
        let flush = if is_hurried { Flush::Now } else { Flush::Together };
        let is_open = self.write(flush, |out| match settlement {
            Settlement::Ack => frame::write_ack(out, number, tag, false),
            Settlement::AckUpTo => frame::write_ack(out, number, tag, true),
            Settlement::Reject => frame::write_reject(out, number, tag, false),
            Settlement::Requeue => frame::write_reject(out, number, tag, true),
        });
        if is_open { Ok(()) } else { Err(self.ending(&during())) }
    }

    /// Puts a message on its way. That it has been sent says nothing about its having arrived.
    ///
    /// Waits for room in the socket as long as something moves, and gives the connection up if nothing has moved for
    /// `patience` in the middle of the message.
    pub(crate) fn publish(
        &self,
        outgoing: Outgoing<'_>,
        flush: Flush,
        patience: Duration,
        during: During<'_>,
    ) -> Result<()> {
        let core = &self.session.core;
        if self.state.close_reason().is_some() || !self.session.is_alive() {
            return Err(self.ending(&during()));
        }
        if let Err(after) = core.wait_for_room(patience) {
            return Err(Error::Timeout { during: during(), after });
        }
        let Outgoing { exchange, routing_key, message, mandatory } = outgoing;
        let (number, body, frame_max) = (self.number(), message.body(), core.frame_max());
        let begin = |out: &mut Vec<u8>| {
            frame::write_publish(out, number, exchange, routing_key, mandatory);
            frame::write_header(out, number, body.len() as u64, |out| message.write_properties(out));
        };
        if body.len() <= PIECE {
            let mut is_open = true;
            if body.is_empty() || body.len() > frame_max - frame::FRAME_OVERHEAD {
                is_open = self.write(flush, |out| {
                    begin(out);
                    frame::body_parts(body, frame_max).for_each(|part| frame::write_body(out, number, part));
                });
            } else {
                let begin = |out: &mut Vec<u8>| {
                    is_open = self.state.close_reason().is_none();
                    if is_open {
                        begin(out);
                    }
                    is_open
                };
                core.write_message(flush, number, begin, body);
            }
            if !is_open {
                return Err(self.ending(&during()));
            }
            if flush == Flush::Together {
                core.read_in_passing();
            }
            return Ok(());
        }
        // From here on the answer to a `channel.close` is held until the message is whole.
        core.begin_message(number);
        if self.state.close_reason().is_some() {
            core.end_message(number);
            return Err(self.ending(&during()));
        }
        core.write(Flush::Together, begin);
        let mut written = 0;
        for part in frame::body_parts(body, frame_max) {
            core.write(Flush::Now, |out| frame::write_body(out, number, part));
            written += part.len();
            if let Err(after) = core.wait_for_room(patience) {
                // Half a message cannot be taken back.
                self.session.wire.cut("a write on it made no progress");
                let during =
                    format!("{} ({written} of {} bytes written, and no more for a while)", during(), body.len());
                return Err(Error::Timeout { during, after });
            }
            if !self.session.is_alive() {
                return Err(self.ending(&during()));
            }
        }
        core.end_message(number);
        Ok(())
    }

    /// Puts a message on its way to a queue, on a channel that many threads publish on. `enter` counts it, under the lock
    /// under which it is written, so that both sides count alike; `id` makes that its correlation id. If `enter` gives
    /// nothing, nothing is sent.
    #[expect(clippy::too_many_arguments, reason = "a message, how it is sent, and how it is counted")]
    pub(crate) fn publish_numbered(
        &self,
        queue: &str,
        message: Message,
        flush: Flush,
        patience: Duration,
        during: During<'_>,
        enter: impl FnOnce() -> Option<u64>,
        id: impl FnOnce(u64) -> String,
    ) -> Result<u64> {
        let core = &self.session.core;
        let (channel, frame_max) = (self.number(), core.frame_max());
        if let Err(after) = core.wait_for_room(patience) {
            return Err(Error::Timeout { during: during(), after });
        }
        let mut entered = None;
        core.write(flush, |out| {
            entered = enter();
            if let Some(number) = entered {
                let message = message.with_correlation_id(id(number));
                frame::write_publish(out, channel, "", queue, true);
                frame::write_header(out, channel, message.body().len() as u64, |out| message.write_properties(out));
                frame::body_parts(message.body(), frame_max).for_each(|part| frame::write_body(out, channel, part));
            }
        });
        entered.ok_or_else(|| self.ending(&during()))
    }

    /// Closes the channel after everything it has been asked to send, within `limit`.
    pub(crate) fn close(self, limit: Duration) {
        let Channel { amqp, state, session } = self;
        let number = state.number();
        let Some(amqp) = Kept::into_inner(amqp) else { return };
        let amqp = amqp.into_inner().unwrap_or_else(PoisonError::into_inner);
        session.flush();
        match session.watched(limit, || amqp.close()).0 {
            Ok(()) => {}
            // It has ended before, and another may have its number by now: that is no fault of the connection's.
            Err(error @ (amiquip::Error::EventLoopDropped | amiquip::Error::ServerClosedChannel { .. })) => {
                log::debug!("channel {number} not closed in order: {error}");
            }
            Err(error) => {
                let cause = session.cause(&error, &|| format!("close of channel {number}"), Some(&state));
                log::debug!("channel {number} not closed in order: {cause}");
            }
        }
    }
}

/// The consumer tag: a channel of ours has one consumer at a time.
const CONSUMER: &str = "coney";

/// What a consumer is to be.
pub(crate) struct Consume<'a> {
    pub(crate) queue: &'a str,
    pub(crate) exclusive: bool,
    pub(crate) no_ack: bool,
    pub(crate) arguments: Table,
}

/// Why one opening of a channel has ended, to be asked whenever that is.
#[derive(Clone)]
pub(crate) struct Endings {
    wire: Arc<Wire>,
    closed: Arc<OnceLock<CloseReason>>,
}

impl Endings {
    /// Whether it has.
    pub(crate) fn has_ended(&self) -> bool {
        self.closed.get().is_some() || self.wire.is_over()
    }

    /// The words with which the broker has closed it.
    pub(crate) fn close_text(&self) -> Option<&str> {
        self.closed.get().map(|reason| reason.text.as_str())
    }

    /// Why the broker takes no messages, if it takes none.
    pub(crate) fn blocked(&self) -> Option<String> {
        self.wire.blocked()
    }

    pub(crate) fn ending(&self, during: &str) -> Error {
        if let Some(reason) = self.closed.get() {
            return Error::ChannelClosed { during: during.to_owned(), code: reason.code, text: reason.text.clone() };
        }
        self.wire.ending(during).unwrap_or_else(|| Error::ConnectionLost {
            during: during.to_owned(),
            detail: "the channel has been closed".to_owned(),
        })
    }
}

impl Inbox {
    /// Puts what has been looked at back to the front.
    fn put_back(&self, mut before: VecDeque<Incoming>) {
        if !before.is_empty() {
            let mut queue = self.queue();
            before.append(&mut queue);
            *queue = before;
        }
    }
}
