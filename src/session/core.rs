//! The shared heart of a connection: its socket, who reads and writes it, and where what comes in goes.
//!
//! Threads that wait for something from the broker [`wait`](Core::wait) here. One of them reads for all (see
//! [`lead`](super::lead)); while none waits, the idle reader does.
//!
//! Lock order: a thread that leads holds `reading`. Under it come, one at a time, the channels that are open, a channel's
//! assembly, the locks of its sink, and the writer's lock; all of these are leaves. Nothing of the user's runs here.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::channel_state::{ChannelState, ChannelTable, Waiters, Waiting};
use super::control::Control;
use super::idle::Shared as Idle;
use super::inbound::{End, ForControl, Inbound};
use super::lead::{Follower, Lead, Released, Role};
use super::socket::{Buffer, Patience, READ_PATIENCE, Records, Socket};
use super::wire::Wire;
use super::writer::{Flush, Writer};
use crate::amqp::frame;
use crate::amqp::method::{ConnectionCloseOk, ConnectionTune, Method};
use crate::error::Result;
use crate::fork::Maker;

/// RabbitMQ's own default, in bytes. A broker that offers less gets less.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// Bytes of a stream that are written between two looks at what has come.
const PASSING: u64 = 64 << 10;

/// What a leader has read.
struct Reading {
    buffer: Buffer,
    records: Records,
    inbound: Inbound,
}

/// What came of a read.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Something,
    Nothing,
    TheEnd,
}

/// See the [module](self).
pub(super) struct Core {
    pub(super) wire: Arc<Wire>,
    pub(super) socket: Socket,
    pub(super) control: Control,
    writer: Writer,
    lead: Lead,
    reading: Mutex<Reading>,
    channels: ChannelTable,
    idle: Arc<Idle>,
    /// Nothing more will be read.
    ended: AtomicBool,
    /// Calls of amiquip's that wait for an answer: somebody has to read.
    control_calls: AtomicUsize,
    /// The idle reader has this socket in its poll.
    pub(super) watched: AtomicBool,
    /// The idle reader is to be woken when the lead is given up.
    tell_idle: AtomicBool,
    /// Bytes that had been written when a stream was last read for in passing.
    passed: AtomicU64,
    /// Threads that wait for room in the socket, and write as soon as there is some.
    want_room: AtomicUsize,
    begun: Instant,
    /// Milliseconds since `begun`: when a thread last gave up the lead, when something last came, and last went out.
    released: AtomicU64,
    came: AtomicU64,
    went: AtomicU64,
    /// Milliseconds between heartbeats; 0 until they are agreed.
    heartbeat: AtomicU64,
    frame_max: AtomicU64,
    /// Wakes a leader that waits for more than the socket.
    wake_pipe: OnceLock<(UnixStream, UnixStream)>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Core {
    pub(super) fn new(
        wire: Arc<Wire>,
        socket: Socket,
        control: Control,
        idle: Arc<Idle>,
        max_message_size: u64,
    ) -> Core {
        let inbound = Inbound::new(FRAME_MAX, max_message_size);
        Core {
            wire,
            socket,
            control,
            writer: Writer::default(),
            lead: Lead::default(),
            reading: Mutex::new(Reading { buffer: Buffer::default(), records: Records::default(), inbound }),
            channels: ChannelTable::default(),
            idle,
            ended: AtomicBool::new(false),
            control_calls: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            tell_idle: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            want_room: AtomicUsize::new(0),
            begun: Instant::now(),
            released: AtomicU64::new(0),
            came: AtomicU64::new(0),
            went: AtomicU64::new(0),
            heartbeat: AtomicU64::new(0),
            frame_max: AtomicU64::new(u64::from(FRAME_MAX)),
            wake_pipe: OnceLock::new(),
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// The largest frame in bytes that the broker takes.
    pub(super) fn frame_max(&self) -> usize {
        self.frame_max.load(Ordering::Relaxed) as usize
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.has_ended() || self.wire.is_over()
    }

    // Writing.

    /// Puts a message with one body frame on its way. A large body is not copied if the socket takes it at once.
    pub(super) fn write_message(&self, flush: Flush, channel: u16, begin: impl FnOnce(&mut Vec<u8>), body: &[u8]) {
        self.after_write(self.writer.write_message(&self.socket, flush, channel, begin, body));
    }

    /// Puts frames on their way.
    pub(super) fn write(&self, flush: Flush, put: impl FnOnce(&mut Vec<u8>)) {
        self.after_write(self.writer.write(&self.socket, flush, put));
    }

    pub(super) fn write_now(&self, put: impl FnOnce(&mut Vec<u8>)) {
        self.write(Flush::Now, put);
    }

    pub(super) fn write_control(&self, channel: u16, frame: &[u8]) {
        self.after_write(self.writer.write_control(&self.socket, channel, frame));
    }

    fn after_write(&self, is_left: bool) {
        if is_left {
            // It waits for others to join it, or the socket is full: the idle reader sees to it that it is not forgotten.
            self.idle.tick();
        } else {
            self.went.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Writes what waits to be written, as far as the socket takes it.
    pub(super) fn flush(&self) {
        if self.writer.is_waiting() {
            self.after_write(self.writer.flush(&self.socket));
        }
    }

    pub(super) fn is_waiting_to_write(&self) -> bool {
        self.writer.is_waiting()
    }

    /// For the idle reader, who sees for itself whether anything is left.
    pub(super) fn flush_idly(&self) -> bool {
        if !self.writer.is_waiting() {
            return false;
        }
        if self.want_room.load(Ordering::SeqCst) > 0 {
            // That thread writes.
            return false;
        }
        let before = self.writer.taken();
        let is_left = self.writer.flush(&self.socket);
        if self.writer.taken() > before {
            self.went.store(self.now(), Ordering::Relaxed);
        }
        is_left
    }

    pub(super) fn begin_message(&self, channel: u16) {
        self.writer.begin_message(channel);
    }

    pub(super) fn end_message(&self, channel: u16) {
        self.after_write(self.writer.end_message(&self.socket, channel));
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

    // Reading.

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

    fn take_control(&self, for_control: ForControl<'_>) -> std::result::Result<(), End> {
        match for_control {
            ForControl::Frame(frame) => self.control.push(frame),
            ForControl::ChannelClose { channel, reason, frame } => {
                if let Some(state) = self.channels.remove(channel) {
                    state.close(reason);
                }
                self.control.push(&frame);
            }
            ForControl::ChannelCloseOk { channel, frame } => {
                if let Some(state) = self.channels.remove(channel) {
                    state.end();
                }
                self.control.push(frame);
            }
            ForControl::Start { mechanisms } => match self.control.introduction().shown_start(mechanisms) {
                Ok(shown) => self.control.push_method(shown),
                Err(why) => {
                    self.wire.mechanism_refused(why.clone());
                    return Err(End::NotAcceptable(why));
                }
            },
            ForControl::Connection(method) => self.take_connection_method(method)?,
        }
        Ok(())
    }

    fn take_connection_method(&self, method: Method) -> std::result::Result<(), End> {
        match method {
            Method::ConnectionTune(tune) => {
                let introduction = self.control.introduction();
                let heartbeat = Duration::from_secs(u64::from(introduction.heartbeat(&tune)));
                self.control.agree_on(heartbeat);
                self.heartbeat.store(heartbeat.as_millis() as u64, Ordering::Relaxed);
                let ConnectionTune { frame_max, .. } = tune;
                let agreed = if frame_max == 0 { FRAME_MAX } else { frame_max.min(FRAME_MAX) };
                self.frame_max.store(u64::from(agreed), Ordering::Relaxed);
                self.control.push_method(introduction.shown_tune(&tune));
                // There is a heartbeat to keep from now on.
                self.idle.wake();
            }
            Method::ConnectionBlocked(blocked) => {
                self.wire.set_blocked(Some(blocked.reason.text().into_owned()));
            }
            Method::ConnectionUnblocked(_) => self.wire.set_blocked(None),
            Method::ConnectionSecure(_) => {
                let why =
                    "the broker asks for another step of authentication, which no mechanism that coney speaks has";
                return Err(End::NotAcceptable(why.to_owned()));
            }
            other => self.control.push_method(other),
        }
        Ok(())
    }

    /// Nothing more will be read, and why is known.
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.control.end();
        self.channels.take_all().iter().for_each(|state| state.end());
        self.lead.wake_followers();
        self.idle.wake();
    }

    /// amiquip's I/O thread has ended.
    pub(super) fn control_ended(&self) {
        if !self.is_over() {
            self.wire.given_up();
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

    // What the idle reader wants to know.

    /// Whether the idle reader has to watch the socket: nobody leads, and nobody has for a while or somebody needs it now.
    pub(super) fn needs_watching(&self, quiet: Duration) -> Need {
        let (is_led, turns) = self.lead.look();
        if is_led {
            return Need::IsLed(turns);
        }
        if self.wire.is_over() {
            // Its end has not been read yet, and nobody may come to do so.
            return Need::Now;
        }
        let quiet_for = self.now().saturating_sub(self.released.load(Ordering::Relaxed));
        if self.control_calls.load(Ordering::SeqCst) > 0 || quiet_for >= quiet.as_millis() as u64 {
            Need::Now
        } else {
            Need::Later
        }
    }

    /// Has the idle reader woken when the lead is given up; false if nobody leads any more.
    pub(super) fn tell_idle_when_released(&self) -> bool {
        self.tell_idle.store(true, Ordering::SeqCst);
        if self.lead.look().0 {
            return true;
        }
        self.tell_idle.store(false, Ordering::SeqCst);
        false
    }

    /// Sends a heartbeat if one is due, and gives the connection up if none has come for two intervals. Returns how long
    /// until there is something to do.
    pub(super) fn keep_alive(&self) -> Option<Duration> {
        let interval = self.heartbeat.load(Ordering::Relaxed);
        if interval == 0 || self.is_over() {
            return None;
        }
        let now = self.now();
        let silent = now.saturating_sub(self.came.load(Ordering::Relaxed));
        if silent >= 2 * interval {
            // This process may have stood still, and not the broker.
            let pending = self.socket.wait(false, None, Duration::ZERO).is_ok_and(|ready| ready.socket);
            if !pending {
                self.wire.cut(format!(
                    "nothing had come from the broker for {:.1?} (two heartbeats of {} s missed)",
                    Duration::from_millis(silent),
                    interval / 1000
                ));
                // Whoever leads sees the end of the stream; otherwise it is the idle reader.
                return Some(Duration::ZERO);
            }
        }
        // Twice in an interval, as the specification advises (section 4.2.7).
        let beat = interval / 2;
        let unsaid = now.saturating_sub(self.went.load(Ordering::Relaxed));
        if unsaid >= beat {
            self.write_now(frame::write_heartbeat);
            self.went.store(now, Ordering::Relaxed);
        }
        let until_beat = beat.saturating_sub(if unsaid >= beat { 0 } else { unsaid });
        let until_silent = (2 * interval).saturating_sub(silent).max(20);
        Some(Duration::from_millis(until_beat.min(until_silent).max(1)))
    }

    // Calls of amiquip's.

    /// Runs a call of amiquip's, which waits for an answer on a thread that cannot read the socket meanwhile.
    pub(super) fn control_call<T>(&self, call: impl FnOnce() -> T) -> T {
        let _calling = Counted::new(&self.control_calls);
        if !self.watched.load(Ordering::SeqCst) && !self.lead.look().0 {
            self.idle.wake();
        }
        call()
    }

    // Channels.

    pub(super) fn add_channel(&self, state: Arc<ChannelState>) {
        self.channels.insert(state);
        if self.has_ended() {
            self.channels.take_all().iter().for_each(|state| state.end());
        }
    }

    // Waking a leader.

    /// The two ends by which a leader can be woken.
    fn wake_pipe(&self) -> io::Result<&(UnixStream, UnixStream)> {
        if let Some(wake_pipe) = self.wake_pipe.get() {
            return Ok(wake_pipe);
        }
        let (rings, hears) = UnixStream::pair()?;
        rings.set_nonblocking(true)?;
        hears.set_nonblocking(true)?;
        // Another thread may have been faster.
        let _ = self.wake_pipe.set((rings, hears));
        self.wake_pipe.get().ok_or_else(|| ErrorKind::Other.into())
    }

    fn signal_wake_pipe(&self) {
        if let Some((rings, _)) = self.wake_pipe.get() {
            // If it is full it has been rung often enough.
            let _ = (&*rings).write(&[1]);
        }
    }

    fn drain_wake_pipe(&self) {
        if let Some((_, hears)) = self.wake_pipe.get() {
            let mut bytes = [0; 64];
            while matches!((&*hears).read(&mut bytes), Ok(read) if read == bytes.len()) {}
        }
    }
}

/// What the idle reader has to do about a socket that it does not watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Watch it.
    Now,
    /// Look again soon.
    Later,
    /// Nothing: a thread leads, in the turn of this number.
    IsLed(u64),
}

/// One more in a count, until it is dropped.
struct Counted<'a>(&'a AtomicUsize);

impl Counted<'_> {
    fn new(count: &AtomicUsize) -> Counted<'_> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
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
                // What was rung for before anybody could hear it.
                if let Some(value) = done() {
                    return Some(value);
                }
            }
            let wake_pipe = waker.and_then(|_| core.wake_pipe.get()).map(|(_, hears)| hears.as_fd());
            let waited = core.socket.wait(wants_room, wake_pipe, left);
            drop(attending);
            match waited {
                Ok(ready) if ready.other => core.drain_wake_pipe(),
                Ok(_) => {}
                Err(error) => core.wire.cut(format!("the socket cannot be polled: {error}")),
            }
        }
    }

    /// Ends a read of the idle reader's, which is no turn.
    fn end_idly(self) {
        self.0.lead.release();
        std::mem::forget(self);
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let core = self.0;
        core.released.store(core.now(), Ordering::Relaxed);
        if core.lead.release() == Released::ToNobody
            && (core.tell_idle.swap(false, Ordering::SeqCst) || core.control_calls.load(Ordering::SeqCst) > 0)
        {
            core.idle.wake();
        }
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

/// Where somebody is whose waker may be rung.
#[derive(Debug, Clone)]
enum At {
    Parked(thread::Thread),
    Leading,
}

/// Wakes a thread that waits for more than the socket: it then looks again at what it waits for.
#[derive(Debug)]
pub(crate) struct Waker {
    /// It may be kept for longer than the connection.
    core: Weak<Core>,
    at: Mutex<Option<At>>,
    maker: Maker,
}

impl Waker {
    pub(super) fn new(core: &Arc<Core>) -> io::Result<Waker> {
        core.wake_pipe()?;
        Ok(Waker { core: Arc::downgrade(core), at: Mutex::default(), maker: Maker::this() })
    }

    fn at(&self) -> MutexGuard<'_, Option<At>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attend(&self, at: At) -> Attending<'_> {
        *self.at() = Some(at);
        Attending(self)
    }

    /// Refuses a call in a process that was forked from the one that connected.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.maker.check()
    }

    /// To be called once what the thread waits for has changed.
    pub(crate) fn wake(&self) {
        let at = self.at().clone();
        match at {
            Some(At::Parked(thread)) => thread.unpark(),
            Some(At::Leading) => {
                if let Some(core) = self.core.upgrade() {
                    core.signal_wake_pipe();
                }
            }
            None => {}
        }
    }
}

struct Attending<'a>(&'a Waker);

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        *self.0.at() = None;
    }
}

impl AsFd for Core {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What TLS says, without the wrapping of an I/O error.
fn tls_text(error: &io::Error) -> String {
    error.get_ref().map_or_else(|| error.to_string(), ToString::to_string)
}
