//! Where what comes in on one channel goes: its messages put together, and handed to whoever opened it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};

use super::wire::CloseReason;
use crate::amqp::cursor::Reader;
use crate::amqp::method::{
    BasicAck, BasicCancel, BasicCancelOk, BasicConsumeOk, BasicDeliver, BasicGetEmpty, BasicGetOk, BasicNack,
    BasicQosOk, BasicRecoverOk, BasicReturn, ConfirmSelectOk,
};
use crate::amqp::{Malformed, text};
use crate::message::Message;

/// Room made for a body before any of it has come, in bytes.
const BODY_AT_FIRST: u64 = 128 << 10;

/// A message from the broker, and the way it took.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// 0 for a message that came back.
    pub(crate) tag: u64,
    pub(crate) redelivered: bool,
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
    /// Messages left in the queue, in the answer to a get.
    pub(crate) remaining: Option<u32>,
    pub(crate) message: Message,
}

/// The broker's answer to a request that has one and no message in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Qos,
    Consume,
    Cancel,
    ConfirmSelect,
}

/// What comes in on a channel.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// Messages are confirmed: taken, or refused if `ack` is false.
    Confirm {
        tag: u64,
        multiple: bool,
        ack: bool,
    },
    /// A message that matched no queue.
    Returned {
        code: u16,
        text: String,
        message: Arrived,
    },
    /// For a consumer.
    Delivered(Arrived),
    /// In answer to a get.
    Got(Option<Arrived>),
    /// The broker has ended the consumer.
    Cancelled,
    Answered(Answer),
}

impl Incoming {
    fn name(&self) -> &'static str {
        match self {
            Incoming::Confirm { .. } => "a confirm",
            Incoming::Returned { .. } => "a returned message",
            Incoming::Delivered(_) => "a delivery",
            Incoming::Got(_) => "an answer to a get",
            Incoming::Cancelled => "the end of a consumer",
            Incoming::Answered(Answer::Qos) => "qos-ok",
            Incoming::Answered(Answer::Consume) => "consume-ok",
            Incoming::Answered(Answer::Cancel) => "cancel-ok",
            Incoming::Answered(Answer::ConfirmSelect) => "select-ok",
        }
    }
}

/// Takes what comes in on a channel. Called by whoever reads the socket: it must not block, nor run what is the user's.
pub(crate) trait Sink: Send + Sync {
    fn take(&self, incoming: Incoming);

    /// Nothing more comes: the channel or the connection has ended, and why is known.
    fn ended(&self);
}

/// Threads that wait for something, to be woken for a look.
#[derive(Debug, Default)]
pub(crate) struct Waiters(Mutex<Vec<Thread>>);

impl Waiters {
    fn threads(&self) -> MutexGuard<'_, Vec<Thread>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the calling thread among them until the guard is dropped.
    pub(super) fn add(&self) -> Waiting<'_> {
        self.threads().push(thread::current());
        Waiting(self)
    }

    pub(crate) fn wake(&self) {
        self.threads().iter().for_each(Thread::unpark);
    }
}

/// See [`Waiters::add`].
pub(super) struct Waiting<'a>(&'a Waiters);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let id = thread::current().id();
        let mut threads = self.0.threads();
        if let Some(at) = threads.iter().position(|thread| thread.id() == id) {
            threads.swap_remove(at);
        }
    }
}

/// What the method said of a message whose content is to come.
enum Announced {
    Delivered { tag: u64, redelivered: bool },
    Got { tag: u64, redelivered: bool, remaining: u32 },
    Returned { code: u16, text: String },
}

/// How much of a message is there.
enum Expects {
    Method,
    Header(Announced),
    Body { announced: Announced, message: Message, left: u64 },
}

/// Puts messages together.
struct Assembly {
    expects: Expects,
    /// Of the last message: the next one has often come the same way, and then shares them.
    exchange: Arc<str>,
    routing_key: Arc<str>,
}

/// What is wrong with a frame, for people.
pub(super) type Wrong = String;

/// What may come in on a channel because it was asked for, each a bit.
pub(super) mod awaited {
    pub(in crate::session) const QOS: u8 = 1;
    pub(in crate::session) const CONSUME: u8 = 1 << 1;
    pub(in crate::session) const CANCEL: u8 = 1 << 2;
    pub(in crate::session) const CONFIRM_SELECT: u8 = 1 << 3;
    pub(in crate::session) const GET: u8 = 1 << 4;
    /// Deliveries, until the consumer has ended.
    pub(in crate::session) const DELIVERIES: u8 = 1 << 5;
    /// Confirms and returns, for ever.
    pub(in crate::session) const CONFIRMS: u8 = 1 << 6;
}

/// One opening of a channel.
pub(crate) struct ChannelState {
    number: u16,
    /// `None` if all that comes is amiquip's.
    sink: Option<Arc<dyn Sink>>,
    assembly: Mutex<Assembly>,
    /// Shared with whoever asks when the state is long gone.
    closed: Arc<OnceLock<CloseReason>>,
    /// Bytes of content so far: what tells a slow message from one that does not come.
    came: AtomicU64,
    /// What has been [asked for](awaited). Anything else is nothing that a broker sends.
    awaits: AtomicU8,
}

impl fmt::Debug for ChannelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelState")
            .field("number", &self.number)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl ChannelState {
    pub(super) fn new(number: u16, sink: Option<Arc<dyn Sink>>) -> ChannelState {
        let assembly = Assembly { expects: Expects::Method, exchange: "".into(), routing_key: "".into() };
        let (closed, came, awaits) = (Arc::default(), AtomicU64::new(0), AtomicU8::new(0));
        ChannelState { number, sink, assembly: Mutex::new(assembly), closed, came, awaits }
    }

    /// Something is about to be asked for.
    pub(super) fn ask_for(&self, what: u8) {
        self.awaits.fetch_or(what, Ordering::AcqRel);
    }

    /// Whether this was asked for; what comes once is then asked for no more.
    fn is_awaited(&self, incoming: &Incoming) -> bool {
        use awaited::{CANCEL, CONFIRM_SELECT, CONFIRMS, CONSUME, DELIVERIES, GET, QOS};
        let (what, past) = match incoming {
            Incoming::Confirm { .. } | Incoming::Returned { .. } => (CONFIRMS, 0),
            Incoming::Delivered(_) => (DELIVERIES, 0),
            Incoming::Got(_) => (GET, GET),
            Incoming::Cancelled => (DELIVERIES, DELIVERIES),
            Incoming::Answered(Answer::Qos) => (QOS, QOS),
            Incoming::Answered(Answer::Consume) => (CONSUME, CONSUME),
            Incoming::Answered(Answer::Cancel) => (CANCEL, CANCEL | DELIVERIES),
            Incoming::Answered(Answer::ConfirmSelect) => (CONFIRM_SELECT, CONFIRM_SELECT),
        };
        if past == 0 {
            return self.awaits.load(Ordering::Acquire) & what != 0;
        }
        self.awaits.fetch_and(!past, Ordering::AcqRel) & what != 0
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    pub(super) fn is_amiquips(&self) -> bool {
        self.sink.is_none()
    }

    /// The broker has closed it.
    pub(super) fn close(&self, reason: CloseReason) {
        // A channel ends once.
        let _ = self.closed.set(reason);
        self.end();
    }

    pub(super) fn end(&self) {
        if let Some(sink) = &self.sink {
            sink.ended();
        }
    }

    /// The words with which the broker has closed it.
    pub(crate) fn close_reason(&self) -> Option<&CloseReason> {
        self.closed.get()
    }

    pub(super) fn closed(&self) -> &Arc<OnceLock<CloseReason>> {
        &self.closed
    }

    pub(crate) fn came(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }

    fn assembly(&self) -> MutexGuard<'_, Assembly> {
        self.assembly.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, incoming: Incoming) -> Result<(), Wrong> {
        if !self.is_awaited(&incoming) {
            return Err(format!("what nobody has asked for ({})", incoming.name()));
        }
        if let Some(sink) = &self.sink {
            sink.take(incoming);
        }
        Ok(())
    }

    /// Takes a method of class `basic` or `confirm`.
    pub(super) fn method(&self, class: u16, method: u16, arguments: &[u8]) -> Result<(), Wrong> {
        let malformed = |Malformed(_)| format!("a malformed method (class {class}, method {method})");
        let mut assembly = self.assembly();
        if !matches!(assembly.expects, Expects::Method) {
            return Err(format!("method {method} of class {class} in the middle of a message"));
        }
        let incoming = assembly.read(class, method, &mut Reader::new(arguments)).map_err(malformed)?;
        drop(assembly);
        match incoming {
            Said::Something(incoming) => self.give(incoming),
            Said::MessageFollows => Ok(()),
            Said::Nonsense => Err(format!("a method that no server sends (class {class}, method {method})")),
        }
    }

    /// Takes a content header.
    pub(super) fn header(&self, payload: &[u8], body_max: u64) -> Result<(), Wrong> {
        let (size, properties) = content_header(payload, body_max)?;
        self.came.fetch_add(payload.len() as u64, Ordering::Relaxed);
        let mut assembly = self.assembly();
        let Expects::Header(announced) = std::mem::replace(&mut assembly.expects, Expects::Method) else {
            return Err("a content header that was not announced".to_owned());
        };
        let mut message =
            Message::read_properties(properties).map_err(|Malformed(_)| "a malformed content header".to_owned())?;
        if size > 0 {
            // At most this much before the bytes arrive; a larger body grows as they do.
            message.body_mut().reserve_exact(size.min(BODY_AT_FIRST) as usize);
            assembly.expects = Expects::Body { announced, message, left: size };
            return Ok(());
        }
        let incoming = assembly.whole(announced, message);
        drop(assembly);
        self.give(incoming)
    }

    /// Takes a piece of a body.
    pub(super) fn body(&self, payload: &[u8]) -> Result<(), Wrong> {
        self.came.fetch_add(payload.len() as u64, Ordering::Relaxed);
        let mut assembly = self.assembly();
        let Expects::Body { message, left, .. } = &mut assembly.expects else {
            return Err("a body frame that was not announced".to_owned());
        };
        let Some(rest) = left.checked_sub(payload.len() as u64) else {
            return Err(format!("a body frame of {} bytes, where {left} were left", payload.len()));
        };
        *left = rest;
        message.body_mut().extend_from_slice(payload);
        if rest == 0
            && let Expects::Body { announced, message, .. } = std::mem::replace(&mut assembly.expects, Expects::Method)
        {
            let incoming = assembly.whole(announced, message);
            drop(assembly);
            return self.give(incoming);
        }
        Ok(())
    }
}

/// What a method has said.
enum Said {
    Something(Incoming),
    MessageFollows,
    Nonsense,
}

impl Assembly {
    fn read(&mut self, class: u16, method: u16, reader: &mut Reader<'_>) -> Result<Said, Malformed> {
        const DELIVER: u16 = BasicDeliver::METHOD_ID;
        const GET_OK: u16 = BasicGetOk::METHOD_ID;
        const ACK: u16 = BasicAck::METHOD_ID;
        const NACK: u16 = BasicNack::METHOD_ID;
        if class == ConfirmSelectOk::CLASS_ID {
            return Ok(match method {
                ConfirmSelectOk::METHOD_ID => Said::Something(Incoming::Answered(Answer::ConfirmSelect)),
                _ => Said::Nonsense,
            });
        }
        Ok(match method {
            DELIVER => {
                reader.short()?; // whose: a channel of ours has one consumer at a time
                let (tag, redelivered) = (reader.u64()?, reader.bit()?);
                self.route(reader)?;
                self.announce(Announced::Delivered { tag, redelivered })
            }
            GET_OK => {
                let (tag, redelivered) = (reader.u64()?, reader.bit()?);
                self.route(reader)?;
                let remaining = reader.u32()?;
                self.announce(Announced::Got { tag, redelivered, remaining })
            }
            BasicReturn::METHOD_ID => {
                let (code, text) = (reader.u16()?, text(reader.short()?));
                self.route(reader)?;
                self.announce(Announced::Returned { code, text })
            }
            ACK | NACK => {
                let (tag, multiple) = (reader.u64()?, reader.bit()?);
                Said::Something(Incoming::Confirm { tag, multiple, ack: method == ACK })
            }
            BasicGetEmpty::METHOD_ID => Said::Something(Incoming::Got(None)),
            BasicCancel::METHOD_ID => Said::Something(Incoming::Cancelled),
            BasicQosOk::METHOD_ID => Said::Something(Incoming::Answered(Answer::Qos)),
            BasicConsumeOk::METHOD_ID => Said::Something(Incoming::Answered(Answer::Consume)),
            BasicCancelOk::METHOD_ID => Said::Something(Incoming::Answered(Answer::Cancel)),
            BasicRecoverOk::METHOD_ID => Said::MessageFollows,
            _ => Said::Nonsense,
        })
    }

    fn announce(&mut self, announced: Announced) -> Said {
        self.expects = Expects::Header(announced);
        Said::MessageFollows
    }

    /// Exchange and routing key.
    fn route(&mut self, reader: &mut Reader<'_>) -> Result<(), Malformed> {
        share(&mut self.exchange, reader.short()?);
        share(&mut self.routing_key, reader.short()?);
        Ok(())
    }

    fn whole(&self, announced: Announced, message: Message) -> Incoming {
        let (exchange, routing_key) = (Arc::clone(&self.exchange), Arc::clone(&self.routing_key));
        let arrived =
            |tag, redelivered, remaining| Arrived { tag, redelivered, exchange, routing_key, remaining, message };
        match announced {
            Announced::Delivered { tag, redelivered } => Incoming::Delivered(arrived(tag, redelivered, None)),
            Announced::Got { tag, redelivered, remaining } => {
                Incoming::Got(Some(arrived(tag, redelivered, Some(remaining))))
            }
            Announced::Returned { code, text } => Incoming::Returned { code, text, message: arrived(0, false, None) },
        }
    }
}

/// Makes `name` these bytes as text, and leaves it as it is if it is that already.
fn share(name: &mut Arc<str>, bytes: &[u8]) {
    if name.as_bytes() != bytes {
        *name = text(bytes).into();
    }
}

/// Body size and properties.
pub(super) fn content_header(payload: &[u8], body_max: u64) -> Result<(u64, &[u8]), Wrong> {
    let mut reader = Reader::new(payload);
    let mut fixed = || -> Result<u64, Malformed> {
        reader.u32()?; // class and weight
        reader.u64()
    };
    let size = fixed().map_err(|_| "a content header too short for one".to_owned())?;
    if size > body_max {
        return Err(format!("a message of {size} bytes, where at most {body_max} are accepted (max_message_size)"));
    }
    Ok((size, reader.rest()))
}

/// The channels that are open, by number.
#[derive(Debug, Default)]
pub(super) struct ChannelTable {
    open: Mutex<HashMap<u16, Arc<ChannelState>>>,
    /// Counts changes, so that a reader need not look each time.
    changes: AtomicU64,
}

impl ChannelTable {
    fn open(&self) -> MutexGuard<'_, HashMap<u16, Arc<ChannelState>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, state: Arc<ChannelState>) {
        self.open().insert(state.number, state);
        self.changes.fetch_add(1, Ordering::Release);
    }

    pub(super) fn remove(&self, number: u16) -> Option<Arc<ChannelState>> {
        let state = self.open().remove(&number);
        self.changes.fetch_add(1, Ordering::Release);
        state
    }

    pub(super) fn get(&self, number: u16) -> Option<Arc<ChannelState>> {
        self.open().get(&number).cloned()
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Takes all of them out.
    pub(super) fn take_all(&self) -> Vec<Arc<ChannelState>> {
        let channels = std::mem::take(&mut *self.open()).into_values().collect();
        self.changes.fetch_add(1, Ordering::Release);
        channels
    }
}
