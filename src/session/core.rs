//! The shared heart of a connection: what is put on its way, what is done with what is amiquip's, heartbeats, and what the
//! idle reader wants to know. How threads wait and read is in [`reader`](super::reader).
//!
//! Lock order: a thread that leads holds `reading`. Under it come, one at a time, the channels that are open, a channel's
//! assembly, the locks of its sink, and the writer's lock; all of these are leaves. Nothing of the user's runs here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::channel_state::{ChannelState, ChannelTable};
use super::closings::Closings;
use super::control::Control;
use super::idle::{Place, Shared as Idle};
use super::inbound::{End, ForControl, Inbound};
use super::lead::Lead;
use super::reader::Reading;
use super::socket::Socket;
use super::waker::WakePipe;
use super::wire::Wire;
use super::writer::{Flush, Writer};
use crate::amqp::frame::{self, Frame, Scan, scan};
use crate::amqp::method::{ConnectionTune, Method};

/// RabbitMQ's own default, in bytes. A broker that offers less gets less.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// See the [module](self).
pub(super) struct Core {
    pub(super) wire: Arc<Wire>,
    pub(super) socket: Socket,
    pub(super) control: Control,
    pub(super) closings: Closings,
    pub(super) writer: Writer,
    pub(super) lead: Lead,
    pub(super) reading: Mutex<Reading>,
    pub(super) channels: ChannelTable,
    pub(super) idle: Arc<Idle>,
    /// With the idle reader.
    pub(super) place: Place,
    /// Nothing more will be read.
    ended: AtomicBool,
    /// Calls of amiquip's that wait for an answer: somebody has to read.
    pub(super) control_calls: AtomicUsize,
    /// The idle reader waits for what comes at this socket.
    pub(super) watched: AtomicBool,
    /// The idle reader is to be woken when the lead is given up.
    pub(super) tell_idle: AtomicBool,
    /// Bytes that had been written when a stream was last read for in passing.
    pub(super) passed: AtomicU64,
    /// Threads that wait for room in the socket, and write as soon as there is some.
    pub(super) want_room: AtomicUsize,
    begun: Instant,
    /// Milliseconds since `begun`: when a thread last gave up the lead, when something last came, and last went out.
    pub(super) released: AtomicU64,
    pub(super) came: AtomicU64,
    went: AtomicU64,
    /// Milliseconds between heartbeats; 0 until they are agreed.
    heartbeat: AtomicU64,
    frame_max: AtomicU64,
    /// Wakes a leader that waits for more than the socket.
    pub(super) wake_pipe: OnceLock<Arc<WakePipe>>,
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
        let place = idle.place();
        Core {
            wire,
            socket,
            control,
            closings: Closings::default(),
            writer: Writer::default(),
            lead: Lead::default(),
            reading: Mutex::new(Reading::new(inbound)),
            channels: ChannelTable::default(),
            idle,
            place,
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

    pub(super) fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// The largest frame in bytes that the broker takes.
    pub(super) fn frame_max(&self) -> usize {
        self.frame_max.load(Ordering::Relaxed) as usize
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    pub(super) fn is_over(&self) -> bool {
        self.has_ended() || self.wire.is_over()
    }

    // Writing.

    /// Puts a message with one body frame on its way. A large body is not copied if the socket takes it at once.
    pub(super) fn write_message(
        &self,
        flush: Flush,
        channel: u16,
        begin: impl FnOnce(&mut Vec<u8>) -> bool,
        body: &[u8],
    ) {
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
            self.idle.tick(&self.place);
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

    pub(super) fn take_control(&self, for_control: ForControl<'_>) -> std::result::Result<(), End> {
        match for_control {
            ForControl::Frame(frame) => {
                if let Scan::Whole(Frame { channel, payload, .. }, _) = scan(frame, frame.len()) {
                    self.closings.comes(channel, payload);
                }
                self.control.push(frame);
            }
            ForControl::ChannelClose { channel, reason, frame } => {
                self.closings.close_comes(channel);
                let said = format!("{} {}", reason.code, reason.text);
                if let Some(state) = self.channels.remove(channel) {
                    state.close(reason);
                }
                log::debug!("the broker has closed channel {channel}: {said}");
                self.control.push(&frame);
            }
            ForControl::ChannelCloseOk { channel, .. } if !self.closings.close_ok_comes(channel) => {}
            ForControl::ChannelCloseOk { channel, frame } => {
                if let Some(state) = self.channels.remove(channel) {
                    state.end();
                }
                self.control.push(frame);
            }
            ForControl::Start { mechanisms, version } => match self.control.introduction().shown_start(mechanisms) {
                Ok(shown) => {
                    self.wire.server_is(version);
                    self.control.push_method(shown);
                }
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
                self.idle.ask(&self.place);
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
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.control.end();
        self.channels.take_all().iter().for_each(|state| state.end());
        self.lead.wake_followers();
        self.idle.ask(&self.place);
    }

    /// amiquip's I/O thread has ended.
    pub(super) fn control_ended(&self) {
        if !self.is_over() {
            self.wire.given_up();
        }
    }

    /// By which a leader can be woken.
    pub(super) fn wake_pipe(&self) -> io::Result<&Arc<WakePipe>> {
        if let Some(pipe) = self.wake_pipe.get() {
            return Ok(pipe);
        }
        let pipe = Arc::new(WakePipe::new()?);
        // Another thread may have been faster.
        Ok(self.wake_pipe.get_or_init(|| pipe))
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
            self.idle.ask(&self.place);
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
pub(super) struct Counted<'a>(&'a AtomicUsize);

impl Counted<'_> {
    pub(super) fn new(count: &AtomicUsize) -> Counted<'_> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl AsFd for Core {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
