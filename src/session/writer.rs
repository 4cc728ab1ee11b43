//! Who writes to the socket: everybody, one after another.
//!
//! Frames are put into one buffer under one lock, whole, and so reach the broker in the order of the calls. Whoever has put
//! something there writes as much as the socket takes, what others put there meanwhile included; those others need not. The
//! lock is not held while the socket is written to. What the socket does not take is written later: by the next writer, by the
//! leader or by the idle reader, whoever comes first.
//!
//! A large message is put there piece by piece, so that an ack of another channel does not wait behind all of it. On its
//! own channel its frames stay together: what amiquip has to say there meanwhile (`close-ok`) is held until it is whole.

use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSlice};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::socket::Socket;
use crate::amqp::frame::{self, FRAME_END};

/// Bytes that wait together for one system call, where there is no hurry.
const TOGETHER: usize = 32 << 10;
/// With more bytes than this waiting, a publisher waits for room.
const ENOUGH: usize = 256 << 10;
/// A buffer that had to hold more than this is given back when it is empty.
const KEPT: usize = 512 << 10;

/// Calls of the socket that one thread makes at most, most of them for others. It has work of its own.
const FOR_OTHERS: usize = 8;

/// When what has been put there is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    Now,
    /// Once there is enough of it for a system call, or with whatever is written next.
    Together,
}

#[derive(Debug, Default)]
struct State {
    /// Frames that nobody is writing yet.
    next: Vec<u8>,
    /// Frames that are being written, of which the socket has `sent` bytes; empty while `is_flushing`, for then a thread has
    /// them.
    now: Out,
    /// A thread writes, and looks again before it is done.
    is_flushing: bool,
    /// What is held on channels with a message that is not whole.
    held: HashMap<u16, Vec<u8>>,
    /// Nothing is taken any more: the socket is broken, or the last word has been said.
    over: bool,
}

/// What is on its way to the socket.
#[derive(Debug, Default)]
struct Out {
    bytes: Vec<u8>,
    sent: usize,
    /// TLS records that the socket has not taken.
    records: Vec<u8>,
}

impl Out {
    fn left(&self) -> usize {
        self.bytes.len() - self.sent + self.records.len()
    }

    /// Writes as much as the socket takes.
    fn write(&mut self, socket: &Socket) -> io::Result<()> {
        socket.write_records(&mut self.records)?;
        while self.sent < self.bytes.len() {
            self.sent += socket.write(&self.bytes[self.sent..], &mut self.records)?;
        }
        if socket.wants_write() {
            socket.write(&[], &mut self.records)?;
        }
        self.bytes.clear();
        self.sent = 0;
        if self.bytes.capacity() > KEPT {
            self.bytes = Vec::new();
        }
        Ok(())
    }
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Writer {
    state: Mutex<State>,
    /// Bytes that wait to be written, for those who need not take the lock for it.
    waiting: AtomicUsize,
    /// Bytes that the socket has taken so far.
    taken: AtomicU64,
}

impl Writer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts frames there, and writes. Returns whether something is left that nobody is writing.
    pub(super) fn write(&self, socket: &Socket, flush: Flush, put: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut state = self.state();
        if state.over {
            return false;
        }
        let before = state.next.len();
        put(&mut state.next);
        self.waiting.fetch_add(state.next.len() - before, Ordering::SeqCst);
        if flush == Flush::Together && state.next.len() < TOGETHER {
            return true;
        }
        self.flush_from(socket, state)
    }

    /// Puts a message with one body frame there, whose method and header `begin` writes, unless it says that there is none; a
    /// large body goes to the socket from where it is. Returns whether something is left that nobody is writing.
    pub(super) fn write_message(
        &self,
        socket: &Socket,
        flush: Flush,
        channel: u16,
        begin: impl FnOnce(&mut Vec<u8>) -> bool,
        body: &[u8],
    ) -> bool {
        let mut state = self.state();
        let is_free = !state.is_flushing && state.next.is_empty() && state.now.left() == 0;
        if body.len() < TOGETHER || !is_free || state.over {
            drop(state);
            return self.write(socket, flush, |out| {
                out.reserve(body.len() + 512);
                if begin(out) {
                    frame::write_body(out, channel, body);
                }
            });
        }
        // Its room is kept from one message to the next.
        let mut now = std::mem::take(&mut state.now);
        if !begin(&mut now.bytes) {
            state.now = now;
            return false;
        }
        state.is_flushing = true;
        drop(state);
        frame::write_body_head(&mut now.bytes, channel, body.len());
        let pieces = [IoSlice::new(&now.bytes), IoSlice::new(body), IoSlice::new(&[FRAME_END])];
        let whole = now.bytes.len() + body.len() + 1;
        let head = now.bytes.len();
        let sent = match socket.write_pieces(&pieces) {
            Some(Ok(sent)) => sent,
            // Whatever the error is, the next write has it too.
            Some(Err(_)) | None => 0,
        };
        if sent == whole {
            now.bytes.clear();
        } else {
            now.sent = sent.min(head);
            now.bytes.extend_from_slice(&body[sent.saturating_sub(head).min(body.len())..]);
            now.bytes.push(FRAME_END);
        }
        self.taken.fetch_add(sent as u64, Ordering::Relaxed);
        let mut state = self.state();
        state.is_flushing = false;
        state.now = now;
        let left = state.now.left() + state.next.len();
        self.waiting.store(left, Ordering::SeqCst);
        // Of the rest the socket may take something now, and others may have put something there meanwhile.
        left > 0 && self.flush_from(socket, state)
    }

    /// Writes what is waiting, as far as the socket takes it. Returns whether something is left that nobody is writing.
    pub(super) fn flush(&self, socket: &Socket) -> bool {
        self.flush_from(socket, self.state())
    }

    /// The lock is not held while the socket is written to: what others put there meanwhile goes out with the next call.
    fn flush_from<'a>(&'a self, socket: &Socket, mut state: MutexGuard<'a, State>) -> bool {
        if state.is_flushing {
            return false;
        }
        state.is_flushing = true;
        let mut now = std::mem::take(&mut state.now);
        let mut calls = 0;
        let result = loop {
            if now.left() == 0 {
                std::mem::swap(&mut now.bytes, &mut state.next);
            }
            drop(state);
            let before = now.left();
            let result = now.write(socket);
            let sent = before.saturating_sub(now.left());
            self.taken.fetch_add(sent as u64, Ordering::Relaxed);
            state = self.state();
            calls += 1;
            if result.is_err() || state.next.is_empty() || calls == FOR_OTHERS {
                break result;
            }
        };
        state.is_flushing = false;
        state.now = now;
        if let Err(error) = result
            && error.kind() != ErrorKind::WouldBlock
        {
            // The reader finds out why, for the broker may have said so.
            log::debug!("a connection takes no more bytes: {error}");
            state.over = true;
            (state.now, state.next) = (Out::default(), Vec::new());
        }
        let left = state.now.left() + state.next.len();
        self.waiting.store(left, Ordering::SeqCst);
        left > 0
    }

    /// Puts the last word there and takes nothing after it.
    pub(super) fn write_last(&self, socket: &Socket, last: &[u8]) {
        let mut state = self.state();
        if state.over {
            return;
        }
        state.next.extend_from_slice(last);
        state.over = true;
        self.flush_from(socket, state);
    }

    /// Whether something waits to be written.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Whether a publisher may put more there.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) < ENOUGH
    }

    /// Bytes that the socket has taken so far: what tells progress from standing still.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// From now on a message of `channel` is not whole.
    pub(super) fn begin_message(&self, channel: u16) {
        self.state().held.insert(channel, Vec::new());
    }

    /// The message of `channel` is whole: what was held follows. Returns whether something is left to write.
    pub(super) fn end_message(&self, socket: &Socket, channel: u16) -> bool {
        let held = self.state().held.remove(&channel).unwrap_or_default();
        !held.is_empty() && self.write(socket, Flush::Now, |bytes| bytes.extend_from_slice(&held))
    }

    /// Puts a frame of amiquip's there, behind the message that is being written on its channel if there is one.
    pub(super) fn write_control(&self, socket: &Socket, channel: u16, frame: &[u8]) -> bool {
        let mut state = self.state();
        if let Some(held) = state.held.get_mut(&channel) {
            held.extend_from_slice(frame);
            return false;
        }
        drop(state);
        self.write(socket, Flush::Now, |bytes| bytes.extend_from_slice(frame))
    }
}
