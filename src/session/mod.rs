//! One connection to a broker: dialling it, reading and writing it, and why it ended.
//!
//! Messages are ours, the ceremony is amiquip's: classes `basic` and `confirm`, content frames and heartbeats are written and
//! read here; connections, channels, exchanges and queues are amiquip's business (see [`control`]). A [`Session`] is shared by
//! the threads that work on one connection; a [`Channel`] belongs to one of them. Neither knows of pools or listeners.

mod channel;
mod channel_state;
mod closings;
mod control;
mod core;
mod dial;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod handshake;
mod idle;
mod inbound;
mod lead;
mod poller;
mod reader;
mod socket;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;
#[cfg(feature = "tls")]
mod tls_files;
#[cfg(feature = "tls")]
mod tls_words;
mod waker;
mod watchdog;
mod wire;
mod writer;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use self::channel::{Channel, Consume, Endings, Inbox, Outgoing, Settlement};
use self::channel_state::ChannelState;
pub(crate) use self::channel_state::{Arrived, Incoming, Sink, Waiters};
use self::core::Core;
#[cfg(feature = "unstable-amiquip")]
pub(crate) use self::core::FRAME_MAX;
pub(crate) use self::dial::{Opened, open};
pub(crate) use self::idle::IdleReader;
pub(crate) use self::waker::Waker;
pub(crate) use self::watchdog::Watchdog;
pub(crate) use self::wire::{Owner, Wire};
pub(crate) use self::writer::Flush;
use crate::deadline;
use crate::error::{Error, Result};
use crate::fork::Kept;

/// Says what is being done, for an error; asked only when there is one.
pub(crate) type During<'a> = &'a dyn Fn() -> String;

/// A connection to the broker.
pub(crate) struct Session {
    core: Arc<Core>,
    /// Empty once closed. Held only to open a channel and to close; both end by the watchdog at the latest.
    amqp: Kept<Mutex<Option<amiquip::Connection>>>,
    pub(crate) wire: Arc<Wire>,
    watchdog: Arc<Watchdog>,
    /// Has to read for as long as there is something to read.
    _idle: Arc<IdleReader>,
    /// Something went wrong that a later borrower must not meet.
    suspect: AtomicBool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(opened: Opened, watchdog: Arc<Watchdog>, idle: Arc<IdleReader>) -> Session {
        let Opened { connection, core } = opened;
        let (amqp, wire) = (Kept::new(Mutex::new(Some(connection))), Arc::clone(&core.wire));
        Session { core, amqp, wire, watchdog, _idle: idle, suspect: AtomicBool::new(false) }
    }

    /// Refuses a call in a process that was forked from the one that connected.
    pub(crate) fn check_process(&self) -> Result<()> {
        Kept::maker(&self.amqp).check()
    }

    /// Whether the connection has not ended, as far as is known without asking the broker.
    pub(crate) fn is_alive(&self) -> bool {
        !self.wire.is_over()
    }

    /// Marks the connection as one that is not to be lent again.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    /// Whether the next borrower may have this connection.
    pub(crate) fn is_reusable(&self) -> bool {
        self.core.glance();
        self.is_alive() && !self.suspect.load(Ordering::Acquire)
    }

    /// The largest frame the broker takes, in bytes.
    pub(crate) fn frame_max(&self) -> usize {
        self.core.frame_max()
    }

    /// Runs one step of amiquip's, and cuts the connection if the step is not done after `limit`.
    pub(crate) fn call<T>(
        &self,
        limit: Duration,
        during: During<'_>,
        channel: Option<&ChannelState>,
        step: impl FnOnce() -> amiquip::Result<T>,
    ) -> Result<T> {
        let (result, overstayed) = self.watched(limit, step);
        match result {
            Ok(value) => Ok(value),
            Err(_) if overstayed => Err(Error::Timeout { during: during(), after: limit }),
            Err(error) => Err(self.cause(&error, during, channel)),
        }
    }

    /// Runs one step of amiquip's, cuts the connection if it is not done after `limit`, and says whether that was so.
    fn watched<T>(&self, limit: Duration, step: impl FnOnce() -> amiquip::Result<T>) -> (amiquip::Result<T>, bool) {
        let armed = self.watchdog.arm(deadline::after(limit), &self.wire);
        let result = self.core.control_call(step);
        (result, armed.disarm())
    }

    /// The reason behind an amiquip error: the first cause on record, which amiquip may have told another caller.
    fn cause(&self, error: &amiquip::Error, during: During<'_>, channel: Option<&ChannelState>) -> Error {
        let during = during();
        if let Some(reason) = channel.and_then(ChannelState::close_reason) {
            return Error::ChannelClosed { during, code: reason.code, text: reason.text.clone() };
        }
        match error {
            amiquip::Error::ServerClosedChannel { code, message, .. } => {
                return Error::ChannelClosed { during, code: *code, text: message.clone() };
            }
            // The connection is none the worse for it.
            amiquip::Error::ExhaustedChannelIds => return Error::ChannelsExhausted { during },
            _ => {}
        }
        // What amiquip says of itself says more than that it has given up.
        let is_its_own = self.wire.is_given_up() && !matches!(error, amiquip::Error::EventLoopDropped);
        self.wire.ending(&during).filter(|_| !is_its_own).unwrap_or_else(|| {
            // An answer that does not fit its question, or an I/O thread that is just ending: either way this
            // connection is of no more use.
            let detail = error.to_string();
            self.wire.cut(detail.clone());
            Error::ConnectionLost { during, detail }
        })
    }

    /// Opens a channel within `limit`; what comes in on it goes to `sink`, or to amiquip if there is none.
    pub(crate) fn open_channel(
        self: &Arc<Self>,
        limit: Duration,
        during: During<'_>,
        sink: Option<Arc<dyn Sink>>,
    ) -> Result<Channel> {
        self.check_process()?;
        if let Some(ending) = self.wire.is_over().then(|| self.wire.ending(&during())).flatten() {
            return Err(ending);
        }
        let mut amqp = self.amqp.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(amqp) = amqp.as_mut() else {
            return Err(Error::ConnectionLost { during: during(), detail: "it has been closed".to_owned() });
        };
        let channel = self.call(limit, during, None, || amqp.open_channel(None))?;
        let state = Arc::new(ChannelState::new(channel.channel_id(), sink));
        self.core.add_channel(Arc::clone(&state));
        Ok(Channel::new(channel, state, Arc::clone(self)))
    }

    /// Writes what waits to be written together.
    pub(crate) fn flush(&self) {
        self.core.flush();
    }

    /// Waits until `done` gives something, until `deadline`, or until the connection is over. See [`Core::wait`].
    pub(crate) fn wait<T>(
        &self,
        waiters: &[&Waiters],
        waker: Option<&Waker>,
        deadline: Instant,
        done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        self.core.wait(waiters, waker, deadline, done)
    }

    /// A waker for a thread that waits for more than this connection.
    pub(crate) fn waker(&self, during: During<'_>) -> Result<Waker> {
        self.core
            .wake_pipe()
            .map(Waker::new)
            .map_err(|error| Error::ConnectionLost { during: during(), detail: error.to_string() })
    }

    /// Closes in order if the connection lives, and within `limit` in any case.
    pub(crate) fn close(&self, limit: Duration) {
        let amqp = self.amqp.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.wire.done();
        if let Some(amqp) = amqp
            && let Err(error) = self.call(limit, &|| "close of the connection".to_owned(), None, || amqp.close())
        {
            log::debug!("connection not closed in order: {error}");
        }
        // The broker has said its last word, or has had the time to.
        self.wire.cut("it has been closed");
    }
}
