//! The reading half of a client's socket: bytes in, frames out.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::limits::FRAME_MIN;
use super::refusal::Refusal;
use crate::amqp::frame::{FRAME_OVERHEAD, Frame, Scan, scan};

/// Where a connection begins: enough for a handshake.
const SMALL: usize = 8 << 10;
/// The largest buffer, unless one frame needs more: what a busy client sends is taken in pieces of this size.
const LARGE: usize = 128 << 10;
/// RabbitMQ takes frames this much larger than agreed, for clients that count the eight bytes around a payload or not.
const FUDGE: usize = 8;

/// What came of waiting for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    Bytes,
    TimedOut,
    /// End of file, or the socket is broken.
    End,
}

pub(super) struct Inbound {
    socket: Arc<TcpStream>,
    /// Read so far and not consumed: `buffer[from..to]`.
    buffer: Vec<u8>,
    from: usize,
    to: usize,
    payload_max: usize,
    frame_max: u32,
    timeout: Option<Duration>,
}

impl Inbound {
    pub(super) fn new(socket: Arc<TcpStream>) -> Inbound {
        Inbound {
            socket,
            buffer: vec![0; SMALL],
            from: 0,
            to: 0,
            payload_max: FRAME_MIN as usize - FRAME_OVERHEAD + FUDGE,
            frame_max: FRAME_MIN,
            timeout: None,
        }
    }

    /// The frame size that was agreed on.
    pub(super) fn set_frame_max(&mut self, frame_max: u32) {
        self.frame_max = frame_max;
        self.payload_max = frame_max as usize - FRAME_OVERHEAD + FUDGE;
    }

    /// Reads once, for at most `patience`; for ever if there is none.
    pub(super) fn read(&mut self, patience: Option<Duration>) -> Came {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        } else if self.to == self.buffer.len() {
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        if self.to == self.buffer.len() {
            // A frame larger than the buffer: make room by doubling, so never for much more than what has arrived.
            let most = (self.payload_max + FRAME_OVERHEAD).max(LARGE);
            self.buffer.resize((self.buffer.len() * 2).min(most), 0);
        }
        if self.timeout != patience {
            // Zero would mean for ever.
            let timeout = patience.map(|patience| patience.max(Duration::from_millis(1)));
            if self.socket.set_read_timeout(timeout).is_err() {
                return Came::End;
            }
            self.timeout = patience;
        }
        loop {
            match (&*self.socket).read(&mut self.buffer[self.to..]) {
                Ok(0) => return Came::End,
                Ok(len) => {
                    self.to += len;
                    if self.to == self.buffer.len() && len == self.to && len < LARGE {
                        self.buffer.resize(len * 2, 0);
                    }
                    return Came::Bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Came::TimedOut;
                }
                Err(_) => return Came::End,
            }
        }
    }

    /// Reads until `len` bytes are there and consumes them.
    pub(super) fn exactly<const N: usize>(&mut self, deadline: Instant) -> Option<[u8; N]> {
        loop {
            if let Some(bytes) = self.buffer[self.from..self.to].first_chunk::<N>() {
                self.from += N;
                return Some(*bytes);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.read(Some(left)) == Came::End {
                return None;
            }
        }
    }

    /// The next whole frame among the bytes read, and what to [`consume`](Inbound::consume) once it is dealt with.
    pub(super) fn frame(&self) -> Result<Option<(Frame<'_>, usize)>, Refusal> {
        match scan(&self.buffer[self.from..self.to], self.payload_max) {
            Scan::Whole(frame, len) => Ok(Some((frame, len))),
            Scan::Partial => Ok(None),
            Scan::TooLarge { kind, claimed, .. } => {
                let most = self.frame_max as usize - FRAME_OVERHEAD;
                Err(Refusal::frame_error(format_args!(
                    "type {kind}, all octets = <<>>: {{frame_too_large,{claimed},{most}}}"
                )))
            }
            Scan::BadEnd { frame, end } => {
                Err(Refusal::frame_error(format_args!("{}: {{invalid_frame_end_marker,{end}}}", described(&frame))))
            }
        }
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.from += len;
    }

    /// Reads on and throws away until the client closes, so that closing our end does not reset the connection and
    /// take the last frames with it.
    pub(super) fn drain(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            (self.from, self.to) = (0, 0);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.read(Some(left)) == Came::End {
                return;
            }
        }
    }
}

/// A frame in RabbitMQ's words: its type and its first octets as Erlang prints them.
pub(super) fn described(frame: &Frame<'_>) -> String {
    let (which, shown) = match frame.payload.get(..16) {
        Some(first) if frame.payload.len() > 16 => ("first 16", first),
        _ => ("all", frame.payload),
    };
    format!("type {}, {which} octets = {}", frame.kind, erlang_binary(shown))
}

/// `<<"text">>` if all of it can be printed, else `<<1,2,3>>`.
fn erlang_binary(bytes: &[u8]) -> String {
    let printable = |byte: &u8| matches!(byte, b' '..=b'~') && *byte != b'"' && *byte != b'\\';
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() && bytes.iter().all(printable) => format!("<<\"{text}\">>"),
        _ => erlang_numbers(bytes),
    }
}

/// `<<1,2,3>>`
pub(super) fn erlang_numbers(bytes: &[u8]) -> String {
    let numbers: Vec<String> = bytes.iter().take(255).map(u8::to_string).collect();
    format!("<<{}>>", numbers.join(","))
}
