//! The stream that amiquip reads and writes through.
//!
//! Inwards it watches the frames go by, for a few small methods only: `connection.close`, `channel.close`,
//! `connection.blocked`, `connection.unblocked` and `connection.tune`. What they say goes to the [`Wire`], where every thread finds them; and a `connection.close` is
//! answered here and shown to amiquip as the end of the stream, because amiquip's I/O thread panics when a request of
//! ours becomes readable in the same poll as the broker's close. Outwards it replaces the client properties of
//! `connection.start-ok` (see [`greeting`](crate::greeting)) and completes half-sent messages (see
//! [`outbound`](crate::outbound)).
//!
//! What cannot be an AMQP frame of the agreed size ends the stream too, before amiquip makes room for it.
//!
//! It does not parse field tables and does not change any other frame.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use mio::event::Evented;
use mio::net::TcpStream;
use mio::{Poll, PollOpt, Ready, Token};

use crate::greeting::Greeting;
use crate::outbound::Outbound;
use crate::transport::FRAME_MAX;
use crate::wire::{CloseReason, Wire};

const FRAME_METHOD: u8 = 1;
/// Method, header, body, heartbeat (AMQP 0-9-1, section 4.2.3).
const FRAME_KINDS: [u8; 4] = [FRAME_METHOD, 2, 3, 8];
const FRAME_HEADER_LEN: usize = 7;
/// No method that is looked for is longer: `connection.close` is 4 + 2 + 256 + 4 bytes.
const LONGEST_METHOD: usize = 512;
/// A whole `connection.close-ok` frame: method (1), channel 0, 4 bytes, class 10, method 51, end octet.
const CLOSE_OK: [u8; 12] = [FRAME_METHOD, 0, 0, 0, 0, 0, 4, 0, 10, 0, 51, 0xCE];

pub(crate) struct GuardedStream {
    socket: TcpStream,
    wire: Arc<Wire>,
    scanner: Scanner,
    greeting: Greeting,
    outbound: Outbound,
    last_read: Instant,
    /// The broker has closed the connection; nothing after that is for amiquip.
    ended: bool,
}

impl GuardedStream {
    pub(crate) fn new(socket: TcpStream, wire: Arc<Wire>, greeting: Greeting) -> GuardedStream {
        GuardedStream {
            socket,
            wire,
            scanner: Scanner::default(),
            greeting,
            outbound: Outbound::default(),
            last_read: Instant::now(),
            ended: false,
        }
    }
}

impl Read for GuardedStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let read = match self.socket.read(buffer) {
            Ok(0) => {
                self.wire.lost("the broker closed the socket");
                return Ok(0);
            }
            Ok(read) => read,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock && error.kind() != io::ErrorKind::Interrupted {
                    self.wire.lost(error.to_string());
                }
                return Err(error);
            }
        };
        self.last_read = Instant::now();
        let wire = &self.wire;
        let close = self.scanner.scan(&buffer[..read], |seen| match seen {
            Seen::ChannelClose { channel, reason } => wire.channel_closed(channel, reason),
            Seen::Tune { frame_max } => wire.tuned(frame_max),
            Seen::Blocked(reason) => wire.set_blocked(Some(reason)),
            Seen::Unblocked => wire.set_blocked(None),
        });
        match close {
            None => Ok(read),
            Some(End::Close { at, reason }) => {
                self.ended = true;
                self.wire.closed(reason);
                // A courtesy to the broker, which is about to close the socket whether or not it arrives.
                let _ = self.socket.write(&CLOSE_OK);
                Ok(at)
            }
            Some(End::NotAmqp { at, why }) => {
                self.ended = true;
                self.wire.lost(why);
                Ok(at)
            }
        }
    }
}

impl Write for GuardedStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = match self.greeting.write(buffer, &mut self.socket) {
            Some(written) => written,
            None => self.outbound.write(buffer, &mut self.socket),
        };
        if let Err(error) = &written
            && error.kind() != io::ErrorKind::WouldBlock
            && error.kind() != io::ErrorKind::Interrupted
        {
            self.wire.lost(error.to_string());
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl Evented for GuardedStream {
    fn register(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.register(poll, token, interest, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.deregister(poll)
    }
}

impl amiquip::IoStream for GuardedStream {}

impl Drop for GuardedStream {
    /// amiquip's I/O thread is ending. If the stream saw no reason, amiquip had one of its own.
    fn drop(&mut self) {
        self.wire.lost(format!(
            "the connection was given up; nothing had come from the broker for {:.1?} (heartbeats missed, or a frame \
             that was not expected)",
            self.last_read.elapsed()
        ));
    }
}

enum Seen {
    ChannelClose { channel: u16, reason: CloseReason },
    Tune { frame_max: u32 },
    Blocked(String),
    Unblocked,
}

/// Why nothing more is for amiquip. What precedes position `at` in the scanned bytes still is.
enum End {
    Close { at: usize, reason: CloseReason },
    NotAmqp { at: usize, why: String },
}

/// Follows the frame boundaries of a byte stream that arrives in pieces.
#[derive(Default)]
struct Scanner {
    /// Header, or small method frame, of which only the beginning has arrived.
    partial: Vec<u8>,
    /// Bytes of the current frame still to come that are of no interest.
    skip: usize,
}

impl Scanner {
    /// Looks at the next bytes. Stops at a `connection.close`.
    fn scan(&mut self, bytes: &[u8], mut seen: impl FnMut(Seen)) -> Option<End> {
        let mut at = 0;
        while at < bytes.len() {
            if self.skip > 0 {
                let step = self.skip.min(bytes.len() - at);
                self.skip -= step;
                at += step;
                continue;
            }
            if self.partial.is_empty() {
                let rest = &bytes[at..];
                if let Some(why) = objection(rest) {
                    return Some(End::NotAmqp { at, why });
                }
                match frame_length(rest) {
                    Some(length) if rest.len() >= length || !is_small_method(rest, length) => {
                        let start = at;
                        let step = length.min(rest.len());
                        self.skip = length - step;
                        at += step;
                        if let Some(reason) = look_at(&rest[..step], length, &mut seen) {
                            return Some(End::Close { at: start, reason });
                        }
                    }
                    Some(_) | None => {
                        self.partial.extend_from_slice(rest);
                        at = bytes.len();
                    }
                }
                continue;
            }
            // The frame began in an earlier read: collect its header first, then the rest of a small method.
            let wanted = match frame_length(&self.partial) {
                None => FRAME_HEADER_LEN,
                Some(length) => length,
            };
            let step = (wanted - self.partial.len()).min(bytes.len() - at);
            self.partial.extend_from_slice(&bytes[at..at + step]);
            at += step;
            if let Some(why) = objection(&self.partial) {
                return Some(End::NotAmqp { at: 0, why });
            }
            if let Some(length) = frame_length(&self.partial) {
                if !is_small_method(&self.partial, length) {
                    self.skip = length - self.partial.len();
                    self.partial.clear();
                } else if self.partial.len() == length {
                    let reason = look_at(&self.partial, length, &mut seen);
                    self.partial.clear();
                    if let Some(reason) = reason {
                        // Its first bytes have been handed on; the end of the stream follows them.
                        return Some(End::Close { at: 0, reason });
                    }
                }
            }
        }
        None
    }
}

/// Length of the whole frame, header and end octet included, once its header is there.
fn frame_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<FRAME_HEADER_LEN>()?;
    let size = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
    Some(size as usize + FRAME_HEADER_LEN + 1)
}

/// What is wrong with the beginning of a frame, as far as it is there. amiquip would make room for whatever length it
/// reads before the bytes arrive, and for an HTTP answer that is over a gigabyte.
fn objection(bytes: &[u8]) -> Option<String> {
    let kind = *bytes.first()?;
    if bytes.starts_with(b"AMQP") {
        return Some("the broker offers another version of AMQP instead of 0-9-1".to_owned());
    }
    if kind != b'A' && !FRAME_KINDS.contains(&kind) {
        let beginning = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
        return Some(format!("what came is not AMQP: frame type {kind} (it begins with {beginning:?})"));
    }
    let length = frame_length(bytes)?;
    (length > FRAME_MAX as usize || kind == b'A')
        .then(|| format!("what came is not AMQP: a frame of {length} bytes, where at most {FRAME_MAX} are agreed"))
}

fn is_small_method(frame: &[u8], length: usize) -> bool {
    frame[0] == FRAME_METHOD && length <= LONGEST_METHOD
}

/// Looks at one frame; `frame` is whole if it is a small method. Returns the reason of a `connection.close`.
fn look_at(frame: &[u8], length: usize, seen: &mut impl FnMut(Seen)) -> Option<CloseReason> {
    if !is_small_method(frame, length) || frame.len() < length {
        return None;
    }
    let channel = u16::from_be_bytes([frame[1], frame[2]]);
    let payload = &frame[FRAME_HEADER_LEN..length - 1];
    let (method, arguments) = payload.split_first_chunk::<4>()?;
    match (u16::from_be_bytes([method[0], method[1]]), u16::from_be_bytes([method[2], method[3]])) {
        (10, 50) if channel == 0 => close_reason(arguments),
        (20, 40) => {
            if let Some(reason) = close_reason(arguments) {
                seen(Seen::ChannelClose { channel, reason });
            }
            None
        }
        (10, 30) if channel == 0 => {
            // channel-max: short, frame-max: long, heartbeat: short
            if let Some(frame_max) = arguments.get(2..6).and_then(|bytes| bytes.first_chunk::<4>()) {
                seen(Seen::Tune { frame_max: u32::from_be_bytes(*frame_max) });
            }
            None
        }
        (10, 60) if channel == 0 => {
            seen(Seen::Blocked(short_string(arguments)?));
            None
        }
        (10, 61) if channel == 0 => {
            seen(Seen::Unblocked);
            None
        }
        _ => None,
    }
}

/// `reply-code` (short) and `reply-text` (short string) at the beginning of the arguments.
fn close_reason(arguments: &[u8]) -> Option<CloseReason> {
    let (code, rest) = arguments.split_first_chunk::<2>()?;
    Some(CloseReason { code: u16::from_be_bytes(*code), text: short_string(rest)? })
}

fn short_string(bytes: &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first()?;
    let text = rest.get(..usize::from(*length))?;
    Some(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(0xCE);
        frame
    }

    fn close(class: u16, method: u16, code: u16, text: &str) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.extend(class.to_be_bytes());
        payload.extend(method.to_be_bytes());
        payload.extend(code.to_be_bytes());
        payload.push(text.len() as u8);
        payload.extend(text.as_bytes());
        payload.extend([0, 0, 0, 0]);
        payload
    }

    #[derive(Default)]
    struct Fed {
        /// What amiquip would get.
        passed: Vec<u8>,
        channels: Vec<(u16, CloseReason)>,
        closed: Option<CloseReason>,
        frame_max: Option<u32>,
    }

    /// Feeds `stream` in pieces of `step` bytes.
    fn feed(stream: &[u8], step: usize) -> Fed {
        let mut scanner = Scanner::default();
        let mut fed = Fed::default();
        for piece in stream.chunks(step) {
            let close = scanner.scan(piece, |seen| match seen {
                Seen::ChannelClose { channel, reason } => fed.channels.push((channel, reason)),
                Seen::Tune { frame_max } => fed.frame_max = Some(frame_max),
                Seen::Blocked(reason) => assert_eq!(reason, "low on memory"),
                Seen::Unblocked => {}
            });
            match close {
                None => fed.passed.extend_from_slice(piece),
                Some(End::Close { at, reason }) => {
                    fed.passed.extend_from_slice(&piece[..at]);
                    fed.closed = Some(reason);
                    break;
                }
                Some(End::NotAmqp { why, .. }) => panic!("{why}"),
            }
        }
        fed
    }

    #[test]
    fn reasons_are_found_however_the_bytes_are_cut() {
        let mut stream = Vec::new();
        stream.extend(frame(1, 0, &[0, 10, 0, 30, 7, 255, 0, 2, 0, 0, 0, 60])); // tune, frame_max 131072
        stream.extend(frame(1, 3, &[0, 60, 0, 60, 1, 2, 3]));
        stream.extend(frame(2, 3, &[0; 900]));
        stream.extend(frame(3, 3, &close(10, 50, 1, "a body that looks like a close")));
        stream.extend(frame(1, 3, &close(20, 40, 404, "NOT_FOUND - no queue 'q'")));
        stream.extend(frame(8, 0, &[]));
        stream.extend(frame(1, 0, b"\0\x0a\0\x3c\x0dlow on memory"));
        stream.extend(frame(1, 0, b"\0\x0a\0\x3d"));
        let before_close = stream.len();
        stream.extend(frame(1, 0, &close(10, 50, 320, "CONNECTION_FORCED - shutdown")));
        for step in 1..=stream.len() {
            let Fed { passed, channels, closed, frame_max } = feed(&stream, step);
            let close = closed.unwrap_or_else(|| panic!("no close seen in steps of {step}"));
            assert_eq!((close.code, close.text.as_str()), (320, "CONNECTION_FORCED - shutdown"));
            assert_eq!(channels.len(), 1, "steps of {step}");
            assert_eq!((channels[0].0, channels[0].1.code), (3, 404));
            assert_eq!(frame_max, Some(131_072));
            assert!(passed.len() >= before_close, "steps of {step} lost frames before the close");
            assert_eq!(passed, stream[..passed.len()]);
        }
        assert_eq!(feed(&stream, stream.len()).passed.len(), before_close);
    }

    #[test]
    fn a_close_too_short_for_its_text_is_not_taken() {
        let stream = frame(1, 0, &[0, 10, 0, 50, 1, 64, 200, b'x']);
        assert!(feed(&stream, 5).closed.is_none());
    }

    #[test]
    fn what_is_not_amqp_is_stopped_before_amiquip_reads_a_length() {
        let huge = frame(1, 0, &vec![0; FRAME_MAX as usize - 7]);
        for (stream, says) in [
            (b"HTTP/1.1 400 Bad Request\r\n".as_slice(), "begins with \"H"),
            (b"AMQP\x00\x01\x00\x00", "AMQP"),
            (b"\x15\x03\x01\x00\x02\x02\x28", "frame type 21"),
            (b"ABCDEFGHIJ", "not AMQP"),
            (&huge, "131073 bytes"),
        ] {
            for step in [1, 3, 5, 7, 8, 1000] {
                let mut scanner = Scanner::default();
                let mut passed = 0;
                let why = stream.chunks(step).find_map(|piece| match scanner.scan(piece, |_| {}) {
                    None => {
                        passed += piece.len();
                        None
                    }
                    Some(End::NotAmqp { at, why }) => {
                        passed += at;
                        Some(why)
                    }
                    Some(End::Close { .. }) => panic!("no close in there"),
                });
                let why = why.unwrap_or_else(|| panic!("{stream:?} passed in steps of {step}"));
                assert!(why.contains(says), "{why}");
                assert!(passed < FRAME_HEADER_LEN, "{passed} bytes passed in steps of {step}");
            }
        }
    }

    #[test]
    fn frames_on_other_channels_do_not_close_the_connection() {
        let stream = frame(1, 7, &close(10, 50, 320, "no"));
        assert!(feed(&stream, 4).closed.is_none());
    }
}
