//! What comes from the broker, on its way to amiquip: held until it is known to be good.
//!
//! Method and header frames are handed on whole, once they have been checked and [mended](super::mend). Body frames and
//! heartbeats are handed on as they come; only their lengths are checked. `connection.blocked` and `connection.unblocked`
//! are kept from amiquip: it does nothing with them, and gives up the handshake if one follows on the heels of
//! `connection.open-ok`. Reading the socket in larger pieces than
//! amiquip's 4 KiB saves system calls, which pays for the checks.

use std::io::{self, Read};

use super::mend;
use crate::wire::CloseReason;

const FRAME_METHOD: u8 = 1;
const FRAME_HEADER: u8 = 2;
/// Method, header, body, heartbeat (AMQP 0-9-1, section 4.2.3).
const FRAME_KINDS: [u8; 4] = [FRAME_METHOD, FRAME_HEADER, 3, 8];
const FRAME_HEADER_LEN: usize = 7;
const FRAME_END: u8 = 0xCE;
/// The content types of TLS records: alert, handshake (RFC 8446, section 5.1). The version follows, beginning with 3.
const TLS_RECORDS: [[u8; 2]; 2] = [[21, 3], [22, 3]];

/// Bytes asked of the socket at a time.
const READ: usize = 64 << 10;

/// What the frames said, as far as somebody else than amiquip wants to know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    ChannelClose { channel: u16, reason: CloseReason },
    Tune { frame_max: u32 },
    Blocked(String),
    Unblocked,
}

/// Why nothing more is for amiquip.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Close(CloseReason),
    /// With the reason, for people.
    NotAcceptable(String),
}

/// What one read has come to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// So many bytes are amiquip's.
    Bytes(usize),
    /// The peer has closed the socket.
    EndOfFile,
    /// Told once. What came before has been handed on.
    End(End),
}

#[derive(Debug)]
pub(super) struct Inbound {
    /// What has been read is `start..end`, and of that amiquip may have what is before `released`.
    buffer: Vec<u8>,
    start: usize,
    released: usize,
    end: usize,
    /// Bytes of a body frame (or a heartbeat) still to come.
    passing: usize,
    /// The longest frame in bytes, all included.
    frame_max: usize,
    /// The longest body in bytes.
    body_max: u64,
    /// Found among what has been read; to be told once the rest is handed on.
    ending: Option<End>,
}

impl Inbound {
    pub(super) fn new(frame_max: u32, body_max: u64) -> Inbound {
        Inbound {
            buffer: Vec::new(),
            start: 0,
            released: 0,
            end: 0,
            passing: 0,
            frame_max: frame_max as usize,
            body_max,
            ending: None,
        }
    }

    /// Reads into `out`: from what is ready, or else from the socket, until there is something or the socket would block.
    pub(super) fn read(
        &mut self,
        out: &mut [u8],
        socket: &mut impl Read,
        mut seen: impl FnMut(Seen),
    ) -> io::Result<Step> {
        loop {
            if self.start < self.released {
                let step = out.len().min(self.released - self.start);
                out[..step].copy_from_slice(&self.buffer[self.start..self.start + step]);
                self.start += step;
                return Ok(Step::Bytes(step));
            }
            if let Some(ending) = self.ending.take() {
                return Ok(Step::End(ending));
            }
            if self.start == self.end && self.passing > 0 {
                let step = out.len().min(self.passing);
                let read = read_some(socket, &mut out[..step])?;
                self.passing -= read;
                return Ok(if read == 0 { Step::EndOfFile } else { Step::Bytes(read) });
            }
            self.make_room();
            match read_some(socket, &mut self.buffer[self.end..])? {
                0 => return Ok(Step::EndOfFile),
                read => self.end += read,
            }
            self.examine(&mut seen);
        }
    }

    /// Moves what is held to the front, and sees to it that the rest of its frame has a place.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        (self.start, self.released) = (0, 0);
        let frame = frame_length(&self.buffer[..self.end]).unwrap_or(0);
        if self.buffer.len() < READ.max(frame) {
            self.buffer.resize(READ.max(frame), 0);
        }
    }

    /// Releases as much as is known to be good.
    fn examine(&mut self, seen: &mut impl FnMut(Seen)) {
        while self.released < self.end {
            let rest = &mut self.buffer[self.released..self.end];
            if self.passing > 0 {
                let step = self.passing.min(rest.len());
                self.passing -= step;
                self.released += step;
                continue;
            }
            if let Some(why) = objection(rest, self.frame_max) {
                self.ending = Some(End::NotAcceptable(why));
                return;
            }
            let Some(length) = frame_length(rest) else { return };
            if !matches!(rest[0], FRAME_METHOD | FRAME_HEADER) {
                self.passing = length;
                continue;
            }
            if rest.len() < length {
                return;
            }
            let mut is_for_amiquip = true;
            if let Err(ending) = check(&mut rest[..length], self.body_max, |what| {
                match what {
                    Seen::Tune { frame_max: offered @ 1.. } => self.frame_max = self.frame_max.min(offered as usize),
                    Seen::Blocked(_) | Seen::Unblocked => is_for_amiquip = false,
                    Seen::Tune { .. } | Seen::ChannelClose { .. } => {}
                }
                seen(what);
            }) {
                self.ending = Some(ending);
                return;
            }
            if is_for_amiquip {
                self.released += length;
            } else {
                self.buffer.copy_within(self.released + length..self.end, self.released);
                self.end -= length;
            }
        }
    }
}

fn read_some(socket: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Length of the whole frame, header and end octet included, once its header is there.
pub(super) fn frame_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<FRAME_HEADER_LEN>()?;
    let size = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
    Some(size as usize + FRAME_HEADER_LEN + 1)
}

/// What is wrong with the beginning of a frame, as far as it is there. amiquip would make room for whatever length it
/// reads before the bytes arrive, and for an HTTP answer that is over a gigabyte.
fn objection(bytes: &[u8], frame_max: usize) -> Option<String> {
    let kind = *bytes.first()?;
    if FRAME_KINDS.contains(&kind) {
        let length = frame_length(bytes)?;
        return (length > frame_max).then(|| {
            format!("what came is not AMQP: a frame of {length} bytes, where at most {frame_max} are agreed")
        });
    }
    if bytes.starts_with(b"AMQP") {
        return Some("the broker offers another version of AMQP instead of 0-9-1".to_owned());
    }
    if TLS_RECORDS.iter().any(|record| bytes.starts_with(record)) {
        return Some("what came is not AMQP but TLS; expected a port without TLS, or a URL with amqps://".to_owned());
    }
    // Both may turn out to be one of the above.
    let may_be_amqp = kind == b'A' && bytes.len() < 4;
    let may_be_tls = bytes.len() == 1 && TLS_RECORDS.iter().any(|record| record[0] == kind);
    if may_be_amqp || may_be_tls {
        return None;
    }
    let beginning = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
    Some(format!("what came is not AMQP: frame type {kind} (it begins with {beginning:?})"))
}

/// Checks and mends one whole method or header frame.
fn check(frame: &mut [u8], body_max: u64, seen: impl FnMut(Seen)) -> Result<(), End> {
    let (kind, channel) = (frame[0], u16::from_be_bytes([frame[1], frame[2]]));
    let malformed = |what: String| End::NotAcceptable(format!("the broker sent {what} on channel {channel}"));
    let [_, _, _, _, _, _, _, payload @ .., FRAME_END] = frame else {
        return Err(malformed(format!("a frame of type {kind} without the end octet")));
    };
    if kind == FRAME_HEADER {
        return mend::header(payload, body_max).map_err(malformed);
    }
    mend::method(payload).map_err(malformed)?;
    match look_at(channel, payload, seen) {
        Some(reason) => Err(End::Close(reason)),
        None => Ok(()),
    }
}

/// Looks at a method that has been checked. Returns the reason of a `connection.close`.
fn look_at(channel: u16, payload: &[u8], mut seen: impl FnMut(Seen)) -> Option<CloseReason> {
    let (method, arguments) = payload.split_first_chunk::<4>()?;
    match (u16::from_be_bytes([method[0], method[1]]), u16::from_be_bytes([method[2], method[3]])) {
        (10, 50) if channel == 0 => return close_reason(arguments),
        (20, 40) => seen(Seen::ChannelClose { channel, reason: close_reason(arguments)? }),
        (10, 30) if channel == 0 => {
            // channel-max: short, frame-max: long, heartbeat: short
            let frame_max = u32::from_be_bytes(*arguments.get(2..)?.first_chunk()?);
            seen(Seen::Tune { frame_max });
        }
        (10, 60) if channel == 0 => seen(Seen::Blocked(short_string(arguments)?)),
        (10, 61) if channel == 0 => seen(Seen::Unblocked),
        _ => {}
    }
    None
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
