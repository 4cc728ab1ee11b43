//! Wakes a thread that waits for more than the socket.
//!
//! Such a thread may be parked as a follower, or wait in a poll as leader, which a byte in a pipe ends. All locks are leaves.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use crate::error::Result;
use crate::fork::Maker;

/// Ends the poll of a thread that has it there.
#[derive(Debug)]
pub(super) struct WakePipe {
    signals: UnixStream,
    polled: UnixStream,
}

impl WakePipe {
    pub(super) fn new() -> io::Result<WakePipe> {
        let (signals, polled) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        polled.set_nonblocking(true)?;
        Ok(WakePipe { signals, polled })
    }

    pub(super) fn signal(&self) {
        // If it is full there is enough in it to end a poll.
        let _ = (&self.signals).write(&[1]);
    }

    /// Takes all signals out, for the next poll to wait.
    pub(super) fn drain(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.polled).read(&mut bytes), Ok(read) if read == bytes.len()) {}
    }
}

impl AsFd for WakePipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.polled.as_fd()
    }
}

/// Where a thread waits that may be woken.
#[derive(Debug, Clone)]
pub(super) enum At {
    Parked(thread::Thread),
    Leading,
}

/// Wakes a thread that waits for more than the socket: it then looks again at what it waits for.
#[derive(Debug)]
pub(crate) struct Waker {
    /// The connection's. A waker may be kept for longer, and must not keep its descriptors.
    pipe: Weak<WakePipe>,
    at: Mutex<Option<At>>,
    maker: Maker,
}

impl Waker {
    pub(super) fn new(pipe: &Arc<WakePipe>) -> Waker {
        Waker { pipe: Arc::downgrade(pipe), at: Mutex::default(), maker: Maker::this() }
    }

    fn at(&self) -> MutexGuard<'_, Option<At>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the waker wakes the calling thread. Dropping the guard ends that.
    pub(super) fn attend(&self, at: At) -> Attending<'_> {
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
            Some(At::Leading) => self.pipe.upgrade().iter().for_each(|pipe| pipe.signal()),
            None => {}
        }
    }
}

/// See [`Waker::attend`].
pub(super) struct Attending<'a>(&'a Waker);

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        *self.0.at() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waker_keeps_no_descriptors_of_a_connection_that_is_gone() {
        let pipe = Arc::new(WakePipe::new().unwrap());
        let waker = Waker::new(&pipe);
        let kept = Arc::downgrade(&pipe);
        let _attending = waker.attend(At::Leading);
        drop(pipe);
        assert!(kept.upgrade().is_none());
        waker.wake();
    }
}
