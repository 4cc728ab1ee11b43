//! Reading: whoever waits for something reads for all, or is woken by who does. See [`lead`](super::lead) for who leads.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::channel_state::{Waiters, Waiting};
use super::core::{Core, Counted};
use super::inbound::{End, Inbound};
use super::lead::{Follower, Released, Role};
use super::socket::{Buffer, Patience, READ_PATIENCE, Records};
use super::waker::{At, Waker};
use crate::amqp::frame;
use crate::amqp::method::ConnectionCloseOk;

/// Bytes of a stream that are written between two looks at what has come.
const PASSING: u64 = 64 << 10;

/// What a leader has read.
pub(super) struct Reading {
    buffer: Buffer,
    records: Records,
    inbound: Inbound,
}

impl Reading {
    pub(super) fn new(inbound: Inbound) -> Reading {
        Reading { buffer: Buffer::default(), records: Records::default(), inbound }
    }
}

/// What came of a read.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Something,
    Nothing,
    TheEnd,
}

impl Core {
    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives something, at `deadline` at the latest, or until the connection is over. What had come by
    /// then counts.
    ///
    /// `waiters` are woken by whoever makes `done` true; `waker` if something else than the socket may do so.
    pub(super) fn wait<T>(
        &self,
        waiters: &[&Waiters],
        waker: Option<&Waker>,
        deadline: Instant,
        mut done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if let Some(value) = done() {
            return Some(value);
        }
        if self.is_over() {
            return done();
        }
        let follower = match self.lead.enter() {
            Role::Leader => return Leading(self).until(waker, deadline, done),
            Role::Follower(follower) => follower,
        };
        let waiting = waiters.iter().map(|waiters| waiters.add()).collect();
        let following = Following { core: self, follower, leads: Cell::new(false), _waiting: waiting };
        let parked = waker.map(|waker| waker.attend(At::Parked(thread::current())));
        if self.writer.is_waiting() {
            // Threads that the leader has just woken are about to write as well: one system call then does for all.
            thread::yield_now();
            self.flush();
        }
        loop {
            if following.follower.is_promoted() {
                drop(parked);
                return following.lead().until(waker, deadline, done);
            }
            if let Some(value) = done() {
                return Some(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_over() {
                return done();
            }
            thread::park_timeout(left);
        }
    }

    /// Waits until there is room for more to be written. An error says how long nothing has moved: `patience`.
    ///
    /// Meanwhile somebody must read: a broker that pushes back and a client that does not read stand still for ever.
    pub(super) fn wait_for_room(&self, patience: Duration) -> std::result::Result<(), Duration> {
        if self.writer.has_room() {
            return Ok(());
        }
        let _wanting = Counted::new(&self.want_room);
        let (mut since, mut taken) = (Instant::now(), self.writer.taken());
        while !self.writer.has_room() && !self.is_over() {
            self.flush();
            let now_taken = self.writer.taken();
            if now_taken > taken {
                (since, taken) = (Instant::now(), now_taken);
            }
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(patience);
            }
            let limit = left.min(READ_PATIENCE);
            if self.lead.try_lead() {
                let _leading = Leading(self);
                let mut reading = self.reading();
                // An error of the poll is the reader's to find.
                if self.socket.wait(true, None, limit).map_or(true, |ready| ready.socket) {
                    self.read(&mut reading, Patience::None);
                }
            } else {
                let _ = self.socket.wait_for_room(limit);
            }
        }
        Ok(())
    }

    /// Reads as leader, or as the idle reader.
    fn read(&self, reading: &mut Reading, patience: Patience) -> Came {
        if self.has_ended() {
            return Came::TheEnd;
        }
        let Reading { buffer, records, inbound } = reading;
        match self.socket.read(buffer, records, patience) {
            Ok(0) => {
                self.wire.end_of_stream();
                self.end();
                return Came::TheEnd;
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Came::Nothing,
            Err(error) => {
                match error.kind() {
                    // Sockets know nothing of what they carry; TLS does.
                    ErrorKind::InvalidData => {
                        // It may have said so to the broker.
                        self.flush_tls();
                        self.wire.tls_failed(tls_text(&error));
                    }
                    _ => self.wire.lost(error.to_string()),
                }
                self.end();
                return Came::TheEnd;
            }
        }
        self.came.store(self.now(), Ordering::Relaxed);
        self.flush_tls();
        loop {
            let taken = inbound.take(buffer.unread(), &self.channels, |for_control| self.take_control(for_control));
            match taken {
                Ok(Some(length)) => buffer.consume(length),
                Ok(None) => break,
                Err(End::Close(reason)) => {
                    self.wire.closed(reason);
                    // A courtesy to the broker, which is about to close the socket whether or not it arrives.
                    let mut close_ok = Vec::new();
                    frame::write_method(&mut close_ok, 0, &ConnectionCloseOk {}.into());
                    self.writer.write_last(&self.socket, &close_ok);
                    self.end();
                    return Came::TheEnd;
                }
                Err(End::NotAcceptable(why)) => {
                    self.wire.lost(why);
                    self.end();
                    return Came::TheEnd;
                }
            }
        }
        inbound.set_frame_max(self.frame_max() as u32);
        Came::Something
    }

    fn flush_tls(&self) {
        if self.socket.wants_write() {
            self.writer.flush(&self.socket);
        }
    }

    /// Reads what there is, for the idle reader. False if a thread leads, or if there was nothing.
    pub(super) fn read_idly(&self) -> bool {
        if !self.lead.try_lead() {
            return false;
        }
        let leading = Leading(self);
        let mut reading = self.reading();
        let mut has_read = false;
        // More than a socket's buffer holds, so that one connection does not keep the others waiting.
        for _ in 0..16 {
            match self.read(&mut reading, Patience::None) {
                Came::Something => has_read = true,
                Came::Nothing => break,
                Came::TheEnd => {
                    has_read = true;
                    break;
                }
            }
        }
        drop(reading);
        leading.end_idly();
        has_read
    }

    /// Takes in what there is if nobody leads, for a thread that publishes a stream: it spares the idle reader a wake-up for
    /// each confirm.
    pub(super) fn read_in_passing(&self) {
        let taken = self.writer.taken();
        if taken < self.passed.load(Ordering::Relaxed) + PASSING || !self.lead.try_lead() {
            return;
        }
        let _leading = Leading(self);
        self.passed.store(taken, Ordering::Relaxed);
        self.read(&mut self.reading(), Patience::None);
    }

    /// Takes in what there is if nobody else is about to: whether the connection has ended, for example.
    pub(super) fn glance(&self) {
        if !self.watched.load(Ordering::SeqCst) {
            self.read_idly();
        }
    }
}

/// A thread that leads, until it is dropped.
struct Leading<'a>(&'a Core);

impl Leading<'_> {
    fn until<T>(self, waker: Option<&Waker>, deadline: Instant, mut done: impl FnMut() -> Option<T>) -> Option<T> {
        let core = self.0;
        let mut reading = core.reading();
        // After a read that has waited in vain the exact time counts.
        let mut is_quiet = false;
        loop {
            if let Some(value) = done() {
                return Some(value);
            }
            if core.is_over() {
                return done();
            }
            core.flush();
            let wants_room = core.writer.is_waiting() && core.want_room.load(Ordering::SeqCst) == 0;
            let left = deadline.saturating_duration_since(Instant::now());
            if waker.is_none() && !wants_room && !is_quiet && left >= READ_PATIENCE {
                is_quiet = core.read(&mut reading, Patience::Some) == Came::Nothing;
                continue;
            }
            if core.read(&mut reading, Patience::None) != Came::Nothing {
                continue;
            }
            if left.is_zero() {
                return done();
            }
            let attending = waker.map(|waker| waker.attend(At::Leading));
            if attending.is_some() {
                // It may have been woken before it could be.
                if let Some(value) = done() {
                    return Some(value);
                }
            }
            let wake_pipe = waker.and_then(|_| core.wake_pipe.get());
            let waited = core.socket.wait(wants_room, wake_pipe.map(|pipe| pipe.as_fd()), left);
            drop(attending);
            match waited {
                Ok(ready) if ready.other => wake_pipe.into_iter().for_each(|pipe| pipe.drain()),
                Ok(_) => {}
                Err(error) => core.wire.cut(format!("the socket cannot be polled: {error}")),
            }
        }
    }

    /// Ends a read of the idle reader's, or one in passing, which is no turn.
    fn end_idly(self) {
        self.give_up();
        std::mem::forget(self);
    }

    fn give_up(&self) {
        let core = self.0;
        if core.lead.release() == Released::ToNobody
            && (core.tell_idle.swap(false, Ordering::SeqCst) || core.control_calls.load(Ordering::SeqCst) > 0)
        {
            core.idle.ask(&core.place);
        }
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let core = self.0;
        core.released.store(core.now(), Ordering::Relaxed);
        self.give_up();
    }
}

/// A thread that is parked while another one reads, until it is dropped.
struct Following<'a> {
    core: &'a Core,
    follower: Arc<Follower>,
    /// It was promoted, and leads.
    leads: Cell<bool>,
    _waiting: Vec<Waiting<'a>>,
}

impl<'a> Following<'a> {
    /// For one that has been promoted.
    fn lead(&self) -> Leading<'a> {
        self.leads.set(true);
        Leading(self.core)
    }
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        // Promoted and not wanting it any more: it gives the lead up as if it had led.
        if !self.leads.get() && self.core.lead.leave(&self.follower) {
            drop(Leading(self.core));
        }
    }
}

/// What TLS says, without the wrapping of an I/O error. In TLS 1.3 a broker refuses our certificate after the handshake.
fn tls_text(error: &io::Error) -> String {
    #[cfg(feature = "tls")]
    if let Some(rustls::Error::AlertReceived(alert)) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        return format!("the broker {}", super::tls_words::of_alert(*alert, true));
    }
    error.get_ref().map_or_else(|| error.to_string(), ToString::to_string)
}
