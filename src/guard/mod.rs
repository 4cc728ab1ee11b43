//! The stream that amiquip reads and writes through.
//!
//! Inwards it holds every method and header until it is whole, and checks it: what amiquip would die of is made harmless
//! (see [`mend`]), and what cannot come from an AMQP broker ends the stream before amiquip makes room for it (see
//! [`inbound`]). What a few methods say goes to the [`Wire`], where every thread finds it: `connection.close`,
//! `channel.close`, `connection.blocked`, `connection.unblocked` and `connection.tune`. A `connection.close` is answered
//! here and shown to amiquip as the end of the stream, because amiquip's I/O thread panics when a request of ours becomes
//! readable in the same poll as the broker's close.
//!
//! Outwards it replaces the client properties of `connection.start-ok` (see [`greeting`](crate::greeting)) and completes
//! half-sent messages (see [`outbound`](crate::outbound)).

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod inbound;
mod mend;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use mio::event::Evented;
use mio::{Poll, PollOpt, Ready, Token};

use self::inbound::{End, Inbound, Seen, Step};
use crate::transport::{FRAME_MAX, Socket};
use crate::wire::Wire;
use crate::writer::Writer;

/// A whole `connection.close-ok` frame: method (1), channel 0, 4 bytes, class 10, method 51, end octet.
const CLOSE_OK: [u8; 12] = [1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 51, 0xCE];

pub(crate) struct GuardedStream {
    socket: Socket,
    wire: Arc<Wire>,
    inbound: Inbound,
    writer: Arc<Writer>,
    last_read: Instant,
    /// Nothing more is for amiquip.
    ended: bool,
}

impl GuardedStream {
    /// `body_max` is the longest message body in bytes that is let in.
    pub(crate) fn new(socket: Socket, wire: Arc<Wire>, writer: Arc<Writer>, body_max: u64) -> GuardedStream {
        GuardedStream {
            socket,
            wire,
            inbound: Inbound::new(FRAME_MAX, body_max),
            writer,
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
        let wire = &self.wire;
        let step = self.inbound.read(buffer, &mut self.socket, |seen| match seen {
            Seen::ChannelClose { channel, reason } => wire.channel_closed(channel, reason),
            Seen::Tune { frame_max } => wire.tuned(frame_max),
            Seen::Blocked(reason) => wire.set_blocked(Some(reason)),
            Seen::Unblocked => wire.set_blocked(None),
        });
        match step {
            Ok(Step::Bytes(read)) => {
                self.last_read = Instant::now();
                return Ok(read);
            }
            Ok(Step::EndOfFile) => wire.lost("the broker closed the socket"),
            Ok(Step::End(End::Close(reason))) => {
                wire.closed(reason);
                // A courtesy to the broker, which is about to close the socket whether or not it arrives.
                self.writer.write_last(&CLOSE_OK, &mut self.socket);
            }
            Ok(Step::End(End::NotAcceptable(why))) => wire.lost(why),
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::WouldBlock => {}
                    // Sockets know nothing of what they carry; TLS does.
                    io::ErrorKind::InvalidData => wire.tls_failed(error.to_string()),
                    _ => wire.lost(error.to_string()),
                }
                return Err(error);
            }
        }
        self.ended = true;
        Ok(0)
    }
}

impl Write for GuardedStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.writer.write(buffer, &mut self.socket);
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
        self.socket.evented().register(poll, token, interest, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.evented().reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.evented().deregister(poll)
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
