//! What is known about one socket to the broker: how to end it at once, and why it ended.
//!
//! A [`Wire`] is shared by the thread that reads the socket, the threads that wait for answers, and the watchdog. It keeps
//! the *first* cause of an ending: what comes after it is a consequence.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use crate::error::Error;
use crate::event::PoolEvents;
use crate::fork::Maker;
use crate::metrics::meter::Level;

/// The words with which a broker closes a channel or a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CloseReason {
    pub(crate) code: u16,
    pub(crate) text: String,
}

/// An ending without `connection.close`.
#[derive(Debug, Clone)]
pub(crate) enum Loss {
    /// TLS has failed. A broker that wants a certificate of its clients refuses them so when, for them, the handshake
    /// is over (TLS 1.3).
    Tls(String),
    /// The broker does not offer the mechanism of authentication that is wanted.
    Mechanism(String),
    /// amiquip gave the connection up, and told whoever called it why.
    GivenUp,
    /// The broker has closed the socket without a word.
    EndOfStream,
    /// Anything else: reset, end of file, heartbeats missed, cut by us.
    Other(String),
}

#[derive(Debug, Clone)]
enum Ending {
    /// `connection.close` from the broker.
    Closed(CloseReason),
    Lost(Loss),
    /// Closed in order by us.
    Done,
}

#[derive(Debug, Default)]
struct Known {
    ending: Option<Ending>,
    /// The reason of a `connection.blocked` that has not been lifted.
    blocked: Option<String>,
    /// Whose it is, once somebody has it.
    owner: Option<Arc<Owner>>,
    /// While it is blocked and has not ended.
    blocked_level: Option<Level>,
}

/// Whose wire it is, and who is to be told of what happens to it.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) events: Arc<PoolEvents>,
    pub(crate) connection: String,
}

impl Owner {
    fn tell_blocked(&self, reason: Option<&str>) {
        match reason {
            Some(reason) => self.events.blocked(&self.connection, reason),
            None => self.events.unblocked(&self.connection),
        }
    }

    fn tell_end(&self, ending: Ending) {
        match ending.error(format!("use of pool {:?}", self.events.pool())) {
            Some(error) => self.events.lost(&self.connection, error),
            None => self.events.closed(&self.connection),
        }
    }
}

/// The kill switch of a socket and the record of why it ended.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: TcpStream,
    maker: Maker,
    over: AtomicBool,
    is_blocked: AtomicBool,
    known: Mutex<Known>,
    /// The connection has ended, or is not blocked any more.
    eased: Condvar,
    /// What the broker says its version is.
    server_version: OnceLock<String>,
}

impl Wire {
    /// Wraps a second handle of the socket that amiquip polls.
    pub(crate) fn new(socket: TcpStream) -> Wire {
        Wire {
            socket,
            maker: Maker::this(),
            over: AtomicBool::new(false),
            is_blocked: AtomicBool::new(false),
            known: Mutex::default(),
            eased: Condvar::new(),
            server_version: OnceLock::new(),
        }
    }

    /// Notes what the broker says its version is.
    pub(super) fn server_is(&self, version: Option<String>) {
        if let Some(version) = version {
            // It says so once.
            let _ = self.server_version.set(version);
        }
    }

    pub(crate) fn server_version(&self) -> Option<&str> {
        self.server_version.get().map(String::as_str)
    }

    /// Says whose it is.
    pub(crate) fn belongs_to(&self, owner: Owner) {
        let mut known = self.known();
        let blocked = known.blocked.clone().filter(|_| known.ending.is_none());
        known.blocked_level = blocked.is_some().then(|| owner.events.one_blocked());
        let owner = known.owner.insert(Arc::new(owner)).clone();
        let ending = known.ending.clone();
        drop(known);
        // What has happened before it was anybody's.
        if let Some(reason) = blocked {
            owner.tell_blocked(Some(&reason));
        }
        if let Some(ending) = ending {
            owner.tell_end(ending);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection from any thread, whatever amiquip waits for. Whoever is blocked on it returns at once.
    pub(crate) fn cut(&self, why: impl Into<String>) {
        self.lost(why);
        self.shut();
    }

    /// Notes that the connection is gone, unless an earlier cause is known.
    pub(crate) fn lost(&self, why: impl Into<String>) {
        self.end(Ending::Lost(Loss::Other(why.into())));
    }

    /// Notes that TLS gave the connection up, unless an earlier cause is known.
    pub(crate) fn tls_failed(&self, why: impl Into<String>) {
        self.end(Ending::Lost(Loss::Tls(why.into())));
    }

    /// Notes the end of the stream, unless an earlier cause is known.
    pub(super) fn end_of_stream(&self) {
        self.end(Ending::Lost(Loss::EndOfStream));
    }

    /// Notes that there is no way to log in, unless an earlier cause is known.
    pub(super) fn mechanism_refused(&self, why: impl Into<String>) {
        self.end(Ending::Lost(Loss::Mechanism(why.into())));
    }

    /// Ends the connection because amiquip has done with it.
    pub(super) fn given_up(&self) {
        self.end(Ending::Lost(Loss::GivenUp));
        self.shut();
    }

    fn shut(&self) {
        // In a child the socket is the parent's too.
        if !self.maker.is_parent() {
            // Fails only when the peer has already ended the connection, which is what is wanted.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }

    /// Notes the broker's `connection.close`, unless an earlier cause is known.
    pub(crate) fn closed(&self, reason: CloseReason) {
        self.end(Ending::Closed(reason));
    }

    /// Notes that we close it in order, unless it has ended otherwise.
    pub(super) fn done(&self) {
        self.end(Ending::Done);
    }

    /// Notes the first cause, and tells it.
    fn end(&self, ending: Ending) {
        let mut known = self.known();
        let is_first = known.ending.is_none();
        let first = known.ending.get_or_insert(ending).clone();
        let owner = known.owner.clone().filter(|_| is_first);
        known.blocked_level = None;
        drop(known);
        self.over.store(true, Ordering::Release);
        self.eased.notify_all();
        if let Some(owner) = owner {
            owner.tell_end(first);
        }
    }

    /// Notes `connection.blocked` with its reason, or with `None` `connection.unblocked`.
    pub(crate) fn set_blocked(&self, reason: Option<String>) {
        self.is_blocked.store(reason.is_some(), Ordering::Release);
        let mut known = self.known();
        let has_changed = known.blocked.is_some() != reason.is_some();
        known.blocked.clone_from(&reason);
        let owner = known.owner.clone();
        // What comes after the end is of no use to anybody.
        let is_news = has_changed && known.ending.is_none();
        if has_changed {
            let level = owner.as_ref().filter(|_| is_news && reason.is_some());
            known.blocked_level = level.map(|owner| owner.events.one_blocked());
        }
        drop(known);
        self.eased.notify_all();
        if let Some(owner) = owner.filter(|_| is_news) {
            owner.tell_blocked(reason.as_deref());
        }
    }

    /// Why the broker takes no publishes on this connection at present.
    pub(crate) fn blocked(&self) -> Option<String> {
        let said = self.is_blocked.load(Ordering::Acquire) && !self.is_over();
        said.then(|| self.known().blocked.clone()).flatten()
    }

    /// Waits while the broker blocks publishing and the connection lives; at `deadline`, returns the reason.
    pub(crate) fn wait_unblocked(&self, deadline: Instant) -> Result<(), String> {
        if !self.is_blocked.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut known = self.known();
        while let (Some(reason), None) = (&known.blocked, &known.ending) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(reason.clone());
            }
            known = self.eased.wait_timeout(known, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Whether the connection has ended. Costs one atomic load.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// The broker's words, if the broker closed the connection.
    pub(crate) fn close_reason(&self) -> Option<CloseReason> {
        match &self.known().ending {
            Some(Ending::Closed(reason)) => Some(reason.clone()),
            Some(Ending::Lost(_) | Ending::Done) | None => None,
        }
    }

    /// Why the connection ended, if it has without the broker's word.
    pub(crate) fn loss(&self) -> Option<Loss> {
        match &self.known().ending {
            Some(Ending::Lost(loss)) => Some(loss.clone()),
            Some(Ending::Closed(_) | Ending::Done) | None => None,
        }
    }

    /// Whether amiquip has given the connection up, and nobody else before it.
    pub(super) fn is_given_up(&self) -> bool {
        matches!(self.known().ending, Some(Ending::Lost(Loss::GivenUp)))
    }

    /// Why the connection ended, if it has.
    pub(crate) fn ending(&self, during: &str) -> Option<Error> {
        let during = during.to_owned();
        let ending = self.known().ending.clone()?;
        let closed = || Error::ConnectionLost { during: during.clone(), detail: "it has been closed".to_owned() };
        Some(ending.error(during.clone()).unwrap_or_else(closed))
    }
}

impl Ending {
    /// What has gone wrong; nothing if the connection was closed in order.
    fn error(self, during: String) -> Option<Error> {
        let detail = match self {
            Ending::Done => return None,
            Ending::Closed(CloseReason { code, text }) => return Some(Error::ConnectionClosed { during, code, text }),
            Ending::Lost(Loss::Tls(text)) => format!("TLS: {text}"),
            Ending::Lost(Loss::GivenUp) => "amiquip gave the connection up".to_owned(),
            Ending::Lost(Loss::EndOfStream) => "the broker closed the socket".to_owned(),
            Ending::Lost(Loss::Mechanism(detail) | Loss::Other(detail)) => detail,
        };
        Some(Error::ConnectionLost { during, detail })
    }
}
