//! One client that has logged in: its reader, its writer, its channels, and how it ends.
//!
//! The reader works through whatever has arrived, then tells the client in one go what came of it, if the socket takes
//! that at once. The writer sees to all the rest: what others push, what the socket did not take, heartbeats.
//!
//! Lock order: a session's channels, then its virtual host, then its outbox.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;
use rustix::net::{SendFlags, send};

use super::channel::{Channel, Step, decode_method, unknown_frame};
use super::handshake::{self, Guest, is_capable};
use super::inbound::{Came, Inbound, described};
use super::outbox::{Outbox, SessionId, Turn};
use super::refusal::{Refusal, Scope};
use super::server::Broker;
use super::users::User;
use super::vhost::VHost;
use crate::amqp::frame::{self, Frame};
use crate::amqp::method::*;
use crate::amqp::value::{Table, Value};

/// The longest time a client has to end the socket after the last word, and what it has without heartbeats.
const LINGER_MAX: Duration = Duration::from_secs(30);
/// How long it has if it has sent what is no frame. Nothing is heard any more.
const DEAF: Duration = Duration::from_secs(3);
/// How long a socket may take nothing when everything else is over.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Confirms are told at the end of a batch, and at least after this many messages.
const CONFIRMS_AT_LEAST_EVERY: usize = 256;
/// How often a reader that is held up looks whether it is over.
const HELD_UP: Duration = Duration::from_secs(1);

/// A client, as the rest of the broker sees it.
pub(super) struct Session {
    pub(super) id: SessionId,
    /// `connection_name` of the client, or the two ends of the socket.
    pub(super) name: String,
    pub(super) peer: SocketAddr,
    pub(super) properties: Table,
    pub(super) user: Arc<User>,
    pub(super) host: Arc<VHost>,
    socket: Arc<TcpStream>,
    outbox: Arc<Outbox>,
    channel_max: usize,
    message_max: u64,
    /// The client wants to be told of `connection.blocked`.
    told_of_blocks: bool,
    /// The client has been told that the broker takes no messages.
    blocked: AtomicBool,
    /// The client wants to be told when a consumer of its is cancelled.
    told_of_cancels: bool,
    /// Nothing but `close` and `close-ok` is heard any more.
    closing: AtomicBool,
    /// How long the client has to end the socket once one of the two has said `close`.
    linger: Duration,
    channels: Mutex<HashMap<u16, Channel>>,
}

/// How the reader goes on after a frame.
enum Next {
    Frame,
    /// The broker takes no messages at present; the frame has not been looked at.
    Hold,
    /// What comes is no protocol any more.
    Deaf,
    End,
}

/// How long a client with this heartbeat has to end the socket after `connection.close`, from whichever side.
pub(super) fn linger(heartbeat: u16) -> Duration {
    match heartbeat {
        0 => LINGER_MAX,
        seconds => Duration::from_secs(seconds.into()).min(LINGER_MAX),
    }
}

/// Sees one client through, from its protocol header to the end of its socket. Runs on the client's reader thread.
pub(super) fn run(broker: &Arc<Broker>, id: SessionId, socket: Arc<TcpStream>) {
    let mut inbound = Inbound::new(socket.clone());
    // A handshake's few hundred bytes fit any socket's buffer; later this bounds only the last words.
    if socket.set_nodelay(true).is_err() || socket.set_write_timeout(Some(LAST_WORDS)).is_err() {
        return;
    }
    if let Some(guest) = handshake::receive(broker, &socket, &mut inbound)
        && let Some(session) = ServedSession::new(broker, id, &socket, guest)
    {
        session.serve(broker, &mut inbound);
    }
    // RabbitMQ resets every connection in the end, once the client has had time to read the last frames.
    let _ = set_socket_linger(&*socket, Some(Duration::ZERO));
}

impl Session {
    fn channels(&self) -> MutexGuard<'_, HashMap<u16, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many channels are open.
    pub(super) fn channel_count(&self) -> usize {
        self.channels().values().filter(|channel| !channel.is_closing()).count()
    }

    /// Ends the connection without a word. Its messages are back in their queues when this returns.
    pub(super) fn cut(&self) {
        self.closing.store(true, Ordering::Release);
        let mut channels = self.channels();
        self.outbox.kill();
        // Before the messages go back, or the client might see that they were taken from it.
        let _ = self.socket.shutdown(Shutdown::Both);
        channels.clear();
        self.host.close_session(self.id);
    }

    /// Says `connection.close` and hears nothing more but the answer, for as long as the client has for it.
    /// False if it was closing already.
    pub(super) fn close(&self, refusal: &Refusal) -> bool {
        let mut channels = self.channels();
        if self.closing.swap(true, Ordering::AcqRel) {
            return false;
        }
        channels.clear();
        self.host.flush_confirms(self.id);
        self.host.close_session(self.id);
        self.outbox.push(
            0,
            ConnectionClose {
                reply_code: refusal.code,
                reply_text: refusal.text.as_str().into(),
                class_id: refusal.class_id,
                method_id: refusal.method_id,
            },
        );
        self.outbox.end_by(Instant::now() + self.linger);
        true
    }

    /// The socket is over at this time, whatever the client has for it.
    pub(super) fn end_by(&self, at: Instant) {
        self.outbox.end_by(at);
    }

    /// Closes one channel, or all, from this side. Returns how many there were to close.
    pub(super) fn close_channels(&self, number: Option<u16>, refusal: &Refusal) -> usize {
        let mut channels = self.channels();
        let wanted = channels
            .iter_mut()
            .filter(|(key, channel)| number.is_none_or(|number| **key == number) && !channel.is_closing());
        wanted.map(|(_, channel)| channel.close(refusal, &self.host, &self.outbox)).count()
    }

    /// Tells the client that it is in.
    ///
    /// Not that the broker takes no messages, if that is so: as with RabbitMQ it hears of a block that is older than the
    /// connection when it publishes. There are clients that give up when anything follows `open-ok` on its heels.
    pub(super) fn tell_open(&self) {
        self.outbox.push(0, ConnectionOpenOk::default());
    }

    /// Tells the client that the broker takes no messages, or takes them again, unless it knows.
    pub(super) fn tell_blocked(&self, reason: Option<&str>) {
        let news = self.blocked.swap(reason.is_some(), Ordering::AcqRel) != reason.is_some();
        if news && self.told_of_blocks && !self.closing.load(Ordering::Acquire) {
            match reason {
                Some(reason) => self.outbox.push(0, ConnectionBlocked { reason: reason.into() }),
                None => self.outbox.push(0, ConnectionUnblocked {}),
            }
        }
    }

    /// Writes what is queued if the socket takes it at once, and leaves the rest to the writer.
    fn write_now(&self) {
        let Some(bytes) = self.outbox.unattend() else { return };
        // A broken socket is the writer's to find.
        let written = send(&*self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).unwrap_or_default();
        let room = self.outbox.drained(written);
        self.outbox.written(bytes, written);
        if room {
            self.host.room_again(self.id);
        }
    }

    /// Writes until nothing more will come. Runs on the writer's thread.
    fn write(&self, heartbeat: Option<Duration>) {
        loop {
            match self.outbox.next(heartbeat.unwrap_or(Duration::from_secs(60))) {
                Turn::Write(bytes) => {
                    let mut written = 0;
                    while written < bytes.len() {
                        match (&*self.socket).write(&bytes[written..]) {
                            Ok(len) if len > 0 => {
                                written += len;
                                if self.outbox.drained(len) {
                                    self.host.room_again(self.id);
                                }
                            }
                            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                            // The client reads nothing at present. It may: messages wait, and it is not read from.
                            Err(error) if is_timeout(&error) && !self.closing.load(Ordering::Acquire) => (),
                            Ok(_) | Err(_) => {
                                self.outbox.kill();
                                let _ = self.socket.shutdown(Shutdown::Both);
                                return;
                            }
                        }
                    }
                    self.outbox.written(bytes, written);
                }
                Turn::Idle if heartbeat.is_some() => self.outbox.enter(frame::write_heartbeat),
                Turn::Idle => (),
                Turn::Over => {
                    self.outbox.kill();
                    // Wakes the reader, and says nothing to the client.
                    let _ = self.socket.shutdown(Shutdown::Read);
                    return;
                }
                Turn::Done => return,
            }
        }
    }

    /// Takes a frame of any channel.
    fn take(&self, broker: &Broker, frame: &Frame<'_>, published: &mut usize) -> Result<Next, Refusal> {
        if self.closing.load(Ordering::Acquire) {
            return Ok(self.take_while_closing(frame));
        }
        if frame.channel == 0 {
            return self.take_control(broker, frame);
        }
        let mut channels = self.channels();
        let Some(channel) = channels.get_mut(&frame.channel) else {
            return self.open_channel(frame, &mut channels).map(|()| Next::Frame);
        };
        if broker.is_blocked() && channel.begins_publish(frame) {
            drop(channels);
            broker.tell_of_block(self);
            return Ok(Next::Hold);
        }
        match channel.take(frame, &self.host, &self.outbox, self.message_max) {
            Ok(Step::Done) => (),
            Ok(Step::Published) => *published += 1,
            Ok(Step::Closed) => {
                channels.remove(&frame.channel);
            }
            Err(refusal) if refusal.scope == Scope::Channel => channel.close(&refusal, &self.host, &self.outbox),
            Err(refusal) => return Err(refusal),
        }
        Ok(Next::Frame)
    }

    fn open_channel(&self, frame: &Frame<'_>, channels: &mut HashMap<u16, Channel>) -> Result<(), Refusal> {
        let number = frame.channel;
        // How many there are, whatever their numbers; and before the frame is looked at.
        if channels.len() >= self.channel_max {
            return Err(Refusal::not_allowed(format_args!(
                "number of channels opened ({}) has reached the negotiated channel_max ({})",
                channels.len(),
                self.channel_max
            )));
        }
        match frame.kind {
            frame::METHOD => (),
            frame::HEADER | frame::BODY => {
                return Err(Refusal::unexpected_frame("expected method frame, got non method frame instead"));
            }
            frame::HEARTBEAT => return Err(Refusal::unexpected_frame(described(frame))),
            _ => return Err(unknown_frame(frame)),
        }
        let method = decode_method(frame)?;
        let (class, id) = (method.class_id(), method.method_id());
        match method {
            Method::ChannelOpen(_) => {
                let key = self.host.open_channel(&self.outbox, &self.user, number, self.told_of_cancels);
                channels.insert(number, Channel::new(number, key));
                self.outbox.push(number, ChannelOpenOk::default());
                Ok(())
            }
            _ => Err(Refusal::channel_error("expected 'channel.open'").by_method(class, id)),
        }
    }

    /// Takes a frame of channel 0.
    fn take_control(&self, broker: &Broker, frame: &Frame<'_>) -> Result<Next, Refusal> {
        match frame.kind {
            frame::METHOD => (),
            frame::HEARTBEAT if frame.payload.is_empty() => return Ok(Next::Frame),
            frame::HEADER | frame::BODY => return Err(Refusal::unexpected_frame(described(frame))),
            _ => return Err(unknown_frame(frame)),
        }
        match decode_method(frame)? {
            Method::ConnectionClose(_) => {
                let mut channels = self.channels();
                self.closing.store(true, Ordering::Release);
                channels.clear();
                self.host.flush_confirms(self.id);
                self.host.close_session(self.id);
                drop(channels);
                broker.leave(self.id);
                self.outbox.push(0, ConnectionCloseOk {});
                self.outbox.end_by(Instant::now() + self.linger);
                Ok(Next::Frame)
            }
            // Internal users have no secret that would run out.
            Method::ConnectionUpdateSecret(_) => {
                self.outbox.push(0, ConnectionUpdateSecretOk {});
                Ok(Next::Frame)
            }
            other => Err(Refusal::channel_error("unexpected method in connection state running")
                .by_method(other.class_id(), other.method_id())),
        }
    }

    fn take_while_closing(&self, frame: &Frame<'_>) -> Next {
        if (frame.kind, frame.channel) != (frame::METHOD, 0) {
            return Next::Frame;
        }
        match decode_method(frame) {
            Ok(Method::ConnectionCloseOk(_)) => Next::End,
            Ok(Method::ConnectionClose(_)) => {
                self.outbox.push(0, ConnectionCloseOk {});
                Next::Frame
            }
            Ok(_) | Err(_) => Next::Frame,
        }
    }
}

/// A session on its own reader thread, with what only that thread needs to know.
struct ServedSession {
    session: Arc<Session>,
    frame_max: u32,
    heartbeat: u16,
}

impl ServedSession {
    fn new(broker: &Broker, id: SessionId, socket: &Arc<TcpStream>, guest: Guest) -> Option<ServedSession> {
        let (peer, local) = (socket.peer_addr().ok()?, socket.local_addr().ok()?);
        let Guest { user, host, properties, tuned } = guest;
        let name = match properties.get("connection_name") {
            Some(Value::LongString(name)) => String::from_utf8_lossy(name).into_owned(),
            _ => format!("{peer} -> {local}"),
        };
        // A maximum of 0 is none at all, which only a broker without one accepts.
        let or_any = |value: u32, any: u32| if value == 0 { any } else { value };
        let frame_max = or_any(tuned.frame_max, 1 << 20);
        let session = Arc::new(Session {
            id,
            name,
            peer,
            told_of_blocks: is_capable(&properties, "connection.blocked"),
            blocked: AtomicBool::new(false),
            told_of_cancels: is_capable(&properties, "consumer_cancel_notify"),
            properties,
            user,
            host,
            socket: socket.clone(),
            outbox: Arc::new(Outbox::new(id, frame_max as usize)),
            channel_max: or_any(tuned.channel_max.into(), 65_535) as usize,
            message_max: broker.limits.message_max(),
            closing: AtomicBool::new(false),
            linger: linger(tuned.heartbeat),
            channels: Mutex::default(),
        });
        Some(ServedSession { session, frame_max, heartbeat: tuned.heartbeat })
    }

    fn serve(self, broker: &Arc<Broker>, inbound: &mut Inbound) {
        let ServedSession { session, frame_max, heartbeat } = self;
        inbound.set_frame_max(frame_max);
        let beat = (heartbeat > 0).then(|| Duration::from_secs(heartbeat.into()) / 2);
        let writer = {
            let session = session.clone();
            thread::Builder::new()
                .name(format!("coney-broker-write-{}", session.id.0))
                .spawn(move || session.write(beat))
        };
        let Ok(writer) = writer else {
            log::error!(target: "coney", "embedded broker: no thread for a client's writer");
            return;
        };
        if broker.enter(&session) {
            // Two heartbeats and a little: a client that sends every half of one has been silent for four.
            let silence = (heartbeat > 0).then(|| Duration::from_millis(u64::from(heartbeat) * 2250));
            session.read(broker, inbound, silence);
        }
        session.closing.store(true, Ordering::Release);
        {
            // Under the lock, so that nobody who closes it at the same time is in the middle of it.
            let mut channels = session.channels();
            channels.clear();
            session.host.close_session(session.id);
        }
        broker.leave(session.id);
        session.outbox.finish();
        if writer.join().is_err() {
            log::error!(target: "coney", "embedded broker: a client's writer panicked");
        }
    }
}

impl Session {
    /// Reads until the connection is over. Runs on the reader's thread.
    fn read(&self, broker: &Broker, inbound: &mut Inbound, silence: Option<Duration>) {
        loop {
            let next = self.batch(broker, inbound);
            self.write_now();
            match next {
                Next::End => return,
                Next::Deaf => return inbound.drain(DEAF),
                Next::Hold => {
                    broker.wait_unblocked(HELD_UP, || self.closing.load(Ordering::Acquire));
                    continue;
                }
                Next::Frame => (),
            }
            // The writer ends it with the connection.
            while !self.outbox.wait_out_flood(Instant::now() + HELD_UP) {}
            // Once it is closing, the writer looks at the time.
            let patience = silence.filter(|_| !self.closing.load(Ordering::Acquire));
            match inbound.read(patience) {
                Came::Bytes => (),
                Came::TimedOut if self.closing.load(Ordering::Acquire) => (),
                Came::TimedOut => {
                    log::info!(target: "coney", "embedded broker: missed heartbeats from {:?}", self.name);
                    self.outbox.kill();
                    return;
                }
                Came::End => return,
            }
        }
    }

    /// Works through the frames that have arrived.
    fn batch(&self, broker: &Broker, inbound: &mut Inbound) -> Next {
        self.outbox.attend();
        let (mut published, mut unconfirmed) = (0, false);
        let next = loop {
            let (refusal, fatal) = match inbound.frame() {
                Ok(None) => break Next::Frame,
                Ok(Some((frame, len))) => match self.take(broker, &frame, &mut published) {
                    Ok(Next::Frame) => {
                        inbound.consume(len);
                        unconfirmed |= published > 0;
                        if published >= CONFIRMS_AT_LEAST_EVERY {
                            self.host.flush_confirms(self.id);
                            published = 0;
                        }
                        continue;
                    }
                    Ok(next) => break next,
                    Err(refusal) => {
                        inbound.consume(len);
                        (refusal, false)
                    }
                },
                Err(refusal) => (refusal, true),
            };
            // Both have in them what clients have made up: ends of lines, commands to a terminal.
            log::info!(target: "coney", "embedded broker: closing {:?}: {:?}", self.name, refusal.to_string());
            self.close(&refusal);
            // What follows a frame with no clear end is no frame.
            if fatal {
                break Next::Deaf;
            }
        };
        if unconfirmed {
            self.host.flush_confirms(self.id);
        }
        next
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
