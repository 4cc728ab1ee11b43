//! What a connection has still to be told: frames, in the order in which they were pushed.
//!
//! Frames are pushed by whoever has something to say, usually under the lock of a virtual host, and written by the
//! connection's own threads. Pushing never blocks and never writes. The outbox's lock is a leaf: nothing is called
//! under it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::amqp::frame;
use crate::amqp::method::Method;

/// Above this many bytes a connection's consumers get nothing more.
const HIGH_WATER: usize = 4 << 20;
/// Below it they do again.
const LOW_WATER: usize = 1 << 20;
/// Above this the connection is not read from either: replies and returned messages grow the outbox as well.
const FLOOD: usize = 16 << 20;
/// A buffer that had to hold more than this is given back rather than kept.
const KEPT: usize = 1 << 20;

/// A connection's number, unique in a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId(pub(crate) u64);

/// What to do next for whoever writes.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Write these bytes, then give the buffer back with [`Outbox::written`].
    Write(Vec<u8>),
    /// Nothing was pushed for as long as the call was willing to wait.
    Idle,
    /// The time of the connection is over, whatever there may be to write.
    Over,
    /// Everything is written and nothing more will come.
    Done,
}

#[derive(Debug, Default)]
struct Queued {
    bytes: Vec<u8>,
    /// The buffer that was written last, empty, for the next bytes.
    spare: Vec<u8>,
    /// Somebody is writing bytes taken from here; nobody else may until they are written.
    writing: bool,
    /// The reader is working through a batch and will write what it gave rise to.
    attended: bool,
    /// Nothing more is taken.
    finished: bool,
    /// When the connection is over, if it is about to end.
    ends: Option<Instant>,
    /// What is queued is of no use any more: the socket is gone.
    dead: bool,
}

/// The frames that wait for one connection's socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    id: SessionId,
    /// The largest frame the client takes.
    frame_max: usize,
    queued: Mutex<Queued>,
    /// Something was pushed, or the end has come: for the writer.
    more: Condvar,
    /// Something was written: for the reader of a flooded connection.
    less: Condvar,
    /// Bytes pushed and not yet written to the socket.
    waiting: AtomicUsize,
    /// A consumer was passed over for want of room.
    passed_over: AtomicBool,
}

impl Outbox {
    pub(crate) fn new(id: SessionId, frame_max: usize) -> Outbox {
        Outbox {
            id,
            frame_max,
            queued: Mutex::default(),
            more: Condvar::new(),
            less: Condvar::new(),
            waiting: AtomicUsize::new(0),
            passed_over: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> SessionId {
        self.id
    }

    fn queued(&self) -> MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a method.
    pub(crate) fn push(&self, channel: u16, method: impl Into<Method>) {
        let method = method.into();
        self.enter(|bytes| frame::write_method(bytes, channel, &method));
    }

    /// Queues a method with its content. `properties` are flags and values as they came.
    pub(crate) fn push_content(&self, channel: u16, method: impl Into<Method>, properties: &[u8], body: &[u8]) {
        let method = method.into();
        self.enter(|bytes| {
            frame::write_method(bytes, channel, &method);
            frame::write_content(bytes, channel, properties, body, self.frame_max);
        });
    }

    /// Queues what is not made of methods: protocol headers, heartbeats.
    pub(crate) fn enter(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut queued = self.queued();
        if queued.finished || queued.dead {
            return;
        }
        let before = queued.bytes.len();
        write(&mut queued.bytes);
        self.waiting.fetch_add(queued.bytes.len() - before, Ordering::Relaxed);
        // Who writes at the moment looks here again before it rests.
        if before == 0 && !queued.attended && !queued.writing {
            self.more.notify_one();
        }
    }

    /// Whether a consumer of this connection may be given a message now. If not, it is remembered that one could not.
    pub(crate) fn has_room(&self) -> bool {
        if self.waiting.load(Ordering::Relaxed) < HIGH_WATER {
            return true;
        }
        self.passed_over.store(true, Ordering::SeqCst);
        // The writer may have drained in between and seen nobody passed over.
        self.waiting.load(Ordering::SeqCst) < HIGH_WATER
    }

    /// The reader begins a batch: until [`unattend`](Outbox::unattend), the writer is not woken for what is pushed.
    pub(super) fn attend(&self) {
        self.queued().attended = true;
    }

    /// The reader has finished its batch. It is handed the bytes if nobody else writes, and must then call
    /// [`written`](Outbox::written).
    pub(super) fn unattend(&self) -> Option<Vec<u8>> {
        let mut queued = self.queued();
        queued.attended = false;
        if queued.writing || queued.bytes.is_empty() || queued.dead { None } else { Some(take(&mut queued)) }
    }

    /// Waits for something to write, at most `patience`; for the writer.
    pub(super) fn next(&self, patience: Duration) -> Turn {
        let until = Instant::now() + patience;
        let mut queued = self.queued();
        loop {
            if queued.dead {
                return Turn::Done;
            }
            let now = Instant::now();
            if queued.ends.is_some_and(|ends| ends <= now) {
                return Turn::Over;
            }
            if !queued.writing {
                if !queued.bytes.is_empty() && (!queued.attended || queued.finished) {
                    return Turn::Write(take(&mut queued));
                }
                if queued.finished && queued.bytes.is_empty() {
                    return Turn::Done;
                }
            }
            if until <= now {
                return Turn::Idle;
            }
            let left = queued.ends.map_or(until, |ends| ends.min(until)).saturating_duration_since(now);
            queued = self.more.wait_timeout(queued, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes that `len` more bytes are on their way. True if a consumer that was passed over may be served again.
    pub(super) fn drained(&self, len: usize) -> bool {
        let left = self.waiting.fetch_sub(len, Ordering::SeqCst).saturating_sub(len);
        left <= LOW_WATER && self.passed_over.swap(false, Ordering::SeqCst)
    }

    /// Gives back a buffer of which the first `written` bytes have been written; the rest goes out before anything
    /// else does.
    pub(super) fn written(&self, mut buffer: Vec<u8>, written: usize) {
        let mut queued = self.queued();
        queued.writing = false;
        if written < buffer.len() {
            buffer.drain(..written);
            buffer.append(&mut queued.bytes);
            queued.bytes = buffer;
        } else if buffer.capacity() <= KEPT {
            buffer.clear();
            queued.spare = buffer;
        }
        if !queued.bytes.is_empty() || queued.finished {
            self.more.notify_one();
        }
        drop(queued);
        self.less.notify_all();
    }

    /// Waits until a flooded outbox has drained or died. False if neither happened by `deadline`.
    pub(super) fn wait_out_flood(&self, deadline: Instant) -> bool {
        if self.waiting.load(Ordering::Relaxed) < FLOOD {
            return true;
        }
        let mut queued = self.queued();
        while self.waiting.load(Ordering::Relaxed) >= FLOOD && !queued.dead {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queued = self.less.wait_timeout(queued, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The connection is over at this time, unless it is before. Of several times the first has the say.
    pub(super) fn end_by(&self, at: Instant) {
        let mut queued = self.queued();
        queued.ends = Some(queued.ends.map_or(at, |ends| ends.min(at)));
        drop(queued);
        self.more.notify_all();
    }

    /// Takes nothing more; what is queued is still written.
    pub(super) fn finish(&self) {
        self.queued().finished = true;
        self.more.notify_all();
    }

    /// Drops what is queued and takes nothing more.
    pub(super) fn kill(&self) {
        let mut queued = self.queued();
        queued.dead = true;
        queued.bytes = Vec::new();
        drop(queued);
        self.more.notify_all();
        self.less.notify_all();
    }

    /// Everything queued, as bytes; for tests without a socket.
    #[cfg(test)]
    pub(crate) fn drain(&self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.queued().bytes);
        self.drained(bytes.len());
        bytes
    }
}

fn take(queued: &mut Queued) -> Vec<u8> {
    queued.writing = true;
    let spare = std::mem::take(&mut queued.spare);
    std::mem::replace(&mut queued.bytes, spare)
}
