//! What amiquip has for a connection: a stream of whole control frames, and no messages.
//!
//! amiquip opens and closes channels, declares, binds and deletes, on an I/O thread of its own. It reads what
//! [`inbound`](super::inbound) puts into the [`Control`], and is told that it can by a [`mio::Registration`]; what it writes goes
//! out through the connection's one writer. The handshake is [changed](super::handshake) on its way.
//!
//! What amiquip would do to itself is kept from it:
//!
//! - `connection.close` ends the stream. Its I/O thread panics if a request of ours comes in the same poll as the close.
//! - A `close-ok` for a channel that [both sides have closed](super::closings).
//! - `connection.blocked` is not shown to it: it would give up the handshake if that followed on the heels of `open-ok`.
//! - The end of the stream is shown only after a read that would have blocked: it reads until then and parses afterwards, so an
//!   end that follows a last frame at once would hide that frame from it.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mio::event::Evented;
use mio::{Poll, PollOpt, Ready, Registration, SetReadiness, Token};

use super::core::Core;
use super::handshake::Introduction;
use crate::amqp::Malformed;
use crate::amqp::frame::{self, FRAME_OVERHEAD, PROTOCOL_HEADER, Scan, scan};
use crate::amqp::method::{ConnectionStartOk, ConnectionTuneOk, Method};

/// What amiquip has still to read.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    read: usize,
    /// Nothing more comes.
    ended: bool,
    /// The last read found nothing.
    found_nothing: bool,
}

/// See the [module](self).
pub(super) struct Control {
    inbox: Mutex<Inbox>,
    ready: SetReadiness,
    introduction: Introduction,
    /// Agreed with the broker's `tune`.
    heartbeat: Mutex<Duration>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    pub(super) fn new(introduction: Introduction) -> (Control, Registration) {
        let (registration, ready) = Registration::new2();
        let (inbox, heartbeat) = (Mutex::default(), Mutex::default());
        (Control { inbox, ready, introduction, heartbeat }, registration)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn introduction(&self) -> &Introduction {
        &self.introduction
    }

    fn set_readiness(&self, readiness: Ready) {
        // Fails only if amiquip's poll is gone, and then nobody reads.
        if let Err(error) = self.ready.set_readiness(readiness) {
            log::debug!("amiquip cannot be told: {error}");
        }
    }

    /// Puts a frame there for amiquip.
    pub(super) fn push(&self, frame: &[u8]) {
        self.inbox().bytes.extend_from_slice(frame);
        self.set_readiness(Ready::readable() | Ready::writable());
    }

    pub(super) fn push_method(&self, method: impl Into<Method>) {
        let mut frame = Vec::new();
        frame::write_method(&mut frame, 0, &method.into());
        self.push(&frame);
    }

    pub(super) fn agree_on(&self, heartbeat: Duration) {
        *self.heartbeat.lock().unwrap_or_else(PoisonError::into_inner) = heartbeat;
    }

    /// Nothing more comes.
    pub(super) fn end(&self) {
        self.inbox().ended = true;
        self.set_readiness(Ready::readable() | Ready::writable());
    }

    /// Lets amiquip write at once.
    pub(super) fn begin(&self) {
        self.set_readiness(Ready::writable());
    }

    fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let mut inbox = self.inbox();
        let Inbox { bytes, read, ended, found_nothing } = &mut *inbox;
        if *read < bytes.len() {
            let count = out.len().min(bytes.len() - *read);
            out[..count].copy_from_slice(&bytes[*read..*read + count]);
            *read += count;
            if *read == bytes.len() {
                // What does not fit a few frames was a message on a channel of amiquip's own.
                if bytes.capacity() > 64 << 10 {
                    *bytes = Vec::new()
                } else {
                    bytes.clear()
                }
                *read = 0;
            }
            *found_nothing = false;
            return Ok(count);
        }
        if *ended && *found_nothing {
            return Ok(0);
        }
        *found_nothing = true;
        // Under the lock: what is put there after this look is told after it too.
        self.set_readiness(if *ended { Ready::readable() | Ready::writable() } else { Ready::writable() });
        Err(ErrorKind::WouldBlock.into())
    }

    /// What goes out instead of a frame of amiquip's, if it is another.
    fn replacement(&self, payload: &[u8]) -> Option<Method> {
        let (&[c1, c0, m1, m0], arguments) = payload.split_first_chunk::<4>()?;
        let method = Method::decode(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]), arguments)?;
        match method {
            Ok(Method::ConnectionStartOk(ConnectionStartOk { .. })) => Some(self.introduction.start_ok().into()),
            Ok(Method::ConnectionTuneOk(tune_ok @ ConnectionTuneOk { .. })) => {
                let heartbeat = *self.heartbeat.lock().unwrap_or_else(PoisonError::into_inner);
                Some(Introduction::tune_ok(&tune_ok, heartbeat).into())
            }
            Ok(_) | Err(Malformed(_)) => None,
        }
    }
}

/// The stream that amiquip reads and writes.
pub(super) struct ControlStream {
    core: Arc<Core>,
    registration: Registration,
    /// The beginning of what amiquip writes is no frame.
    begun: bool,
}

impl ControlStream {
    pub(super) fn new(core: Arc<Core>, registration: Registration) -> ControlStream {
        ControlStream { core, registration, begun: false }
    }
}

impl Read for ControlStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.core.control.read(out)
    }
}

impl Write for ControlStream {
    /// Takes everything: amiquip writes whole frames, and control frames are small.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        if !self.begun {
            let Some((_, behind)) = bytes.split_first_chunk::<{ PROTOCOL_HEADER.len() }>() else {
                return Err(ErrorKind::InvalidData.into());
            };
            self.core.write_now(|out| out.extend_from_slice(&PROTOCOL_HEADER));
            (self.begun, rest) = (true, behind);
        }
        while let Scan::Whole(frame, length) = scan(rest, usize::MAX - FRAME_OVERHEAD) {
            let instead = (frame.channel == 0).then(|| self.core.control.replacement(frame.payload)).flatten();
            match instead {
                Some(method) => self.core.write_now(|out| frame::write_method(out, 0, &method)),
                None => {
                    self.core.closings.goes_out(frame.channel, frame.payload);
                    self.core.write_control(frame.channel, &rest[..length]);
                }
            }
            rest = &rest[length..];
        }
        if rest.is_empty() { Ok(bytes.len()) } else { Err(ErrorKind::InvalidData.into()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Evented for ControlStream {
    fn register(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.registration.register(poll, token, interest, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.registration.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        Evented::deregister(&self.registration, poll)
    }
}

impl amiquip::IoStream for ControlStream {}

impl Drop for ControlStream {
    /// amiquip's I/O thread is ending. If nobody knows why, amiquip had a reason of its own.
    fn drop(&mut self) {
        self.core.control_ended();
    }
}
