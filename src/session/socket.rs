//! A connection's socket: bytes in and out, plain or by TLS.
//!
//! One thread reads and another one writes at the same time. The socket itself blocks; whoever must not wait says so at each
//! call. TLS is one session for both directions, under a lock that is never held while the socket is waited for.

use std::io::{self, ErrorKind, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
#[cfg(feature = "tls")]
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};
#[cfg(feature = "tls")]
use rustls::ClientConnection;

/// How long a read without a limit of its own waits.
pub(super) const READ_PATIENCE: Duration = Duration::from_secs(1);

/// Bytes asked of the socket at a time.
const READ: usize = 256 << 10;
/// Bytes that a buffer has room for at first.
const READ_AT_FIRST: usize = 16 << 10;

/// Nothing waits for room here, and a peer that is gone is an error and no signal.
#[cfg(not(any(target_vendor = "apple", windows)))]
const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
#[cfg(any(target_vendor = "apple", windows))]
const SEND: SendFlags = SendFlags::DONTWAIT;

/// How a read deals with a socket that has nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It returns at once.
    None,
    /// It waits, for [`READ_PATIENCE`] at most.
    Some,
}

/// What can be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ready {
    pub(super) socket: bool,
    pub(super) other: bool,
}

/// What has been read and not been used.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
    }

    /// Room for more: at least as much as arrived in the last read, and never for much more than what has arrived.
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.bytes.len() - self.end < self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            let wanted = (self.bytes.len() * 2).max(READ_AT_FIRST);
            self.bytes.resize(wanted, 0);
        }
        let to = self.bytes.len().min(self.end + READ);
        &mut self.bytes[self.end..to]
    }

    /// Notes that so many bytes have been put into the room.
    fn filled(&mut self, count: usize) {
        self.end += count;
        // Whoever fills it in one go has more to say.
        if self.end == self.bytes.len() && count == self.end && self.bytes.len() < READ {
            self.bytes.resize(self.bytes.len() * 4, 0);
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Socket {
    tcp: TcpStream,
    #[cfg(feature = "tls")]
    tls: Option<Mutex<ClientConnection>>,
}

/// Bytes of TLS records on their way in.
#[derive(Debug, Default)]
pub(super) struct Records(#[cfg(feature = "tls")] Buffer);

impl Socket {
    pub(super) fn plain(tcp: TcpStream) -> io::Result<Socket> {
        tcp.set_read_timeout(Some(READ_PATIENCE))?;
        Ok(Socket {
            tcp,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    /// Takes over once TLS has shaken hands.
    #[cfg(feature = "tls")]
    pub(super) fn tls(tcp: TcpStream, session: ClientConnection) -> io::Result<Socket> {
        tcp.set_read_timeout(Some(READ_PATIENCE))?;
        Ok(Socket { tcp, tls: Some(Mutex::new(session)) })
    }

    #[cfg(feature = "tls")]
    fn session(&self) -> Option<MutexGuard<'_, ClientConnection>> {
        self.tls.as_ref().map(|tls| tls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether TLS has something of its own to write: an alert, or new keys.
    pub(super) fn wants_write(&self) -> bool {
        #[cfg(feature = "tls")]
        if let Some(session) = self.session() {
            return session.wants_write();
        }
        false
    }

    /// Reads into `buffer`; returns how many bytes came, 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there was nothing, `InvalidData` if TLS fails, else what the system says.
    pub(super) fn read(&self, buffer: &mut Buffer, records: &mut Records, patience: Patience) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return self.read_tls(buffer, &mut records.0, patience);
        }
        let _ = records;
        let read = self.receive(buffer.room(), patience)?;
        buffer.filled(read);
        Ok(read)
    }

    fn receive(&self, room: &mut [u8], patience: Patience) -> io::Result<usize> {
        let flags = if patience == Patience::None { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        loop {
            match recv(&self.tcp, &mut *room, flags) {
                Ok((read, _)) => return Ok(read),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes in records until there is something in them, and then all that is in them: nothing stays behind that no poll
    /// of the socket would tell of.
    #[cfg(feature = "tls")]
    fn read_tls(&self, buffer: &mut Buffer, records: &mut Buffer, patience: Patience) -> io::Result<usize> {
        loop {
            let received = self.receive(records.room(), patience)?;
            records.filled(received);
            let Some(mut session) = self.session() else { return Ok(0) };
            let mut total = 0;
            while !records.unread().is_empty() {
                let taken = session.read_tls(&mut records.unread())?;
                records.consume(taken);
                session.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
                total += drain(&mut session, buffer)?;
            }
            if received == 0 {
                return Ok(0);
            }
            if total > 0 {
                return Ok(total);
            }
            // An alert or new keys: nothing for us.
        }
    }

    /// Writes the beginning of `bytes` without waiting; returns how many it took. TLS records that the socket does not take
    /// at once are kept in `records`, and count as written.
    pub(super) fn write(&self, bytes: &[u8], records: &mut Vec<u8>) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(mut session) = self.session() {
            // What is left of earlier records comes first.
            if !self.write_records(records)? {
                return Err(ErrorKind::WouldBlock.into());
            }
            let taken = io::Write::write(&mut session.writer(), bytes)?;
            while session.wants_write() {
                session.write_tls(records)?;
            }
            drop(session);
            self.write_records(records)?;
            return Ok(taken);
        }
        let _ = records;
        self.send(bytes)
    }

    /// Writes records that are ready, those included by which TLS itself answers. True if nothing of them is left.
    pub(super) fn write_records(&self, records: &mut Vec<u8>) -> io::Result<bool> {
        while !records.is_empty() {
            match self.send(records) {
                Ok(sent) => drop(records.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Writes the beginning of these pieces without waiting, where that needs no copy of them; `None` where it does.
    pub(super) fn write_pieces(&self, pieces: &[IoSlice<'_>]) -> Option<io::Result<usize>> {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return None;
        }
        loop {
            match sendmsg(&self.tcp, pieces, &mut SendAncillaryBuffer::default(), SEND) {
                Ok(sent) => return Some(Ok(sent)),
                Err(Errno::INTR) => {}
                Err(error) => return Some(Err(error.into())),
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send(&self.tcp, bytes, SEND) {
                Ok(sent) => return Ok(sent),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the socket can be read, or if `wants_room` written, or until `other` can be read; for `limit` at most.
    pub(super) fn wait(&self, wants_room: bool, other: Option<BorrowedFd<'_>>, limit: Duration) -> io::Result<Ready> {
        let mut interest = PollFlags::IN;
        if wants_room {
            interest |= PollFlags::OUT;
        }
        let mut fds = [PollFd::new(&self.tcp, interest), PollFd::new(&self.tcp, PollFlags::empty())];
        let fds = match other {
            Some(other) => {
                fds[1] = PollFd::from_borrowed_fd(other, PollFlags::IN);
                &mut fds[..]
            }
            None => &mut fds[..1],
        };
        poll_for(fds, Some(limit))?;
        let socket = fds[0].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        Ok(Ready { socket, other: fds.get(1).is_some_and(|other| !other.revents().is_empty()) })
    }

    /// Waits until the socket can be written, for `limit` at most.
    pub(super) fn wait_for_room(&self, limit: Duration) -> io::Result<()> {
        poll_for(&mut [PollFd::new(&self.tcp, PollFlags::OUT)], Some(limit))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

/// Polls, for `limit` at most; without one for ever. A signal ends it early.
pub(super) fn poll_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<()> {
    let timespec = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(fds, timespec.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes all that TLS has decrypted.
#[cfg(feature = "tls")]
fn drain(session: &mut ClientConnection, buffer: &mut Buffer) -> io::Result<usize> {
    let mut total = 0;
    loop {
        match io::Read::read(&mut session.reader(), buffer.room()) {
            Ok(0) => return Ok(total),
            Ok(read) => {
                buffer.filled(read);
                total += read;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(total),
            // An end without a word is an end all the same: AMQP has words of its own.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(total),
            Err(error) => return Err(error),
        }
    }
}
