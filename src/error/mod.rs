//! What can go wrong, said so that the reader knows which thing it was and what to do.
//!
//! One enum for the whole crate. Nothing in here ever holds a password or an unmasked URL, and no type of the
//! AMQP client underneath shows through.

mod batch;
mod connect;
mod store;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

pub use self::batch::BatchError;
pub use self::connect::ConnectError;
use self::connect::is_transient_code;
pub use self::store::StoreError;
use crate::settings::SettingsError;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
///
/// Errors can be cloned, because one lost connection is the answer to every message that was in flight on it.
/// [`is_transient`](Error::is_transient) tells those that may pass by themselves from those that need a change.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The settings are wrong. Lists every mistake found, each with its key path.
    #[error(transparent)]
    Settings(#[from] SettingsError),

    /// No pool of that name is configured.
    #[error("no pool is named {name:?}; the settings have: {}", known.join(", "))]
    UnknownPool {
        /// The name that was asked for.
        name: String,
        /// The names there are, sorted.
        known: Vec<String>,
    },

    /// Every connection of the pool was lent out for as long as the checkout was willing to wait.
    ///
    /// The wait is `pools.NAME.checkout_timeout`, the number of connections `pools.NAME.size`.
    #[error(
        "pool {pool:?} is exhausted: {} stayed out for {waited:?}{}",
        if *.size == 1 { "its only connection".to_owned() } else { format!("all {size} of its connections") },
        OldestHeld(.oldest)
    )]
    PoolExhausted {
        /// The pool.
        pool: String,
        /// How many connections the pool may hold; all of them are out.
        size: u32,
        /// How long the checkout waited.
        waited: Duration,
        /// The guard that has been out longest.
        oldest: Option<Holder>,
    },

    /// There are as many listeners as the pool has connections, and each keeps one for as long as it lives.
    #[error(
        "pool {pool:?} has {} and a listener on each; raise pools.{pool}.size for one more",
        counted(*.size as usize, "connection")
    )]
    TooManyListeners {
        /// The pool.
        pool: String,
        /// How many connections it may hold.
        size: u32,
    },

    /// A hook that was to run on start failed. What had been started is stopped again.
    #[error("on_start hook {hook}: {source}")]
    Hook {
        /// The hook's name, or its number, counted from 1 in order of registration.
        hook: String,
        /// What it returned.
        #[source]
        source: Box<Error>,
    },

    /// Not everything had ended by the deadline of a stop. What is left ends by itself as soon as it can.
    #[error("not ended after {after:?}: {}", left.join(", "))]
    NotEnded {
        /// What is left, in words.
        left: Vec<String>,
        /// The deadline, from the beginning of the stop.
        after: Duration,
    },

    /// A [`Bus`](crate::bus::Bus) was to process events and has no consumer.
    #[error("no consumer is registered, so there are no events to process")]
    NothingToConsume,

    /// A body could not be turned into what was wanted of it, or a value into a body.
    #[error("{encoding}: {source}")]
    Encoding {
        /// `gzip JSON`, `JSON` or `raw`; `request` or `answer` where it is the content that is wrong.
        encoding: &'static str,
        /// What is wrong.
        #[source]
        source: EncodingError,
    },

    /// The worker that was called has answered with an error.
    #[error("the worker answered with an error: {kind}: {message}")]
    Remote {
        /// The kind of error, as the worker calls it.
        kind: String,
        /// What it says.
        message: String,
        /// Where it came from, in the worker's words; may be empty.
        trace: String,
    },

    /// The program's signals could not be watched.
    #[error("cannot watch signals: {source}")]
    Signals {
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },

    /// The pool has been closed, or its app dropped, and lends no more.
    #[error("pool {pool:?} is closed; was its App closed or dropped?")]
    PoolClosed {
        /// The pool.
        pool: String,
    },

    /// No connection to the broker could be opened. Bounded by `connect_timeout`.
    #[error("pool {pool:?} cannot connect to {url}: {cause}")]
    Connect {
        /// The pool that tried.
        pool: String,
        /// Where to, with the password masked.
        url: String,
        /// Why it failed; where several hosts were tried, why the last one did.
        #[source]
        cause: ConnectError,
    },

    /// The broker closed the connection, with a code of the specification and its own words.
    #[error("the broker closed the connection during the {during}: {code} {text}")]
    ConnectionClosed {
        /// What was being done.
        during: String,
        /// AMQP reply code, such as 320.
        code: u16,
        /// AMQP reply text.
        text: String,
    },

    /// The connection is gone and the broker gave no reason: the socket was closed or reset, or heartbeats stopped.
    #[error("the connection was lost during the {during}: {detail}")]
    ConnectionLost {
        /// What was being done.
        during: String,
        /// What was seen.
        detail: String,
    },

    /// The broker refused an operation by closing the channel it ran on. The connection lives; the next call on
    /// the same guard works.
    #[error("the broker refused the {during}: {code} {text}")]
    ChannelClosed {
        /// What was being done.
        during: String,
        /// AMQP reply code: 403, 404, 405, 406 and the like.
        code: u16,
        /// AMQP reply text.
        text: String,
    },

    /// The connection has as many channels open as the broker allows (`channel_max`). It lives, and so do its channels: the
    /// call works once one of them is closed.
    #[error("the {during} needs a channel, and the connection has as many open as the broker allows (channel_max)")]
    ChannelsExhausted {
        /// What was being done.
        during: String,
    },

    /// This process was forked from the one that made the app, pool or guard. Nothing was sent. A new
    /// [`App`](crate::App) works.
    #[error(
        "this belongs to process {pid}, from which this one was forked; its connections cannot be shared; make a new App \
         in the child"
    )]
    Forked {
        /// The process that it belongs to.
        pid: u32,
    },

    /// The broker refused to take the message (`basic.nack`), for instance because the queue is full and declared
    /// with `x-overflow = reject-publish`.
    #[error("the broker refused the message to exchange {exchange:?} with routing key {routing_key:?} (nack)")]
    Nacked {
        /// Exchange it was published to.
        exchange: String,
        /// Routing key it was published with.
        routing_key: String,
    },

    /// A mandatory message matched no queue and came back (`basic.return`).
    #[error("message to exchange {exchange:?} with routing key {routing_key:?} was returned: {code} {text}")]
    Returned {
        /// AMQP reply code, 312 for a message without a route.
        code: u16,
        /// AMQP reply text.
        text: String,
        /// Exchange it was published to.
        exchange: String,
        /// Routing key it was published with.
        routing_key: String,
    },

    /// The broker has blocked publishing on this connection (a resource alarm) and did not lift it in time.
    ///
    #[error(
        "the broker blocks publishing ({reason}) and still did after {waited:?}{}",
        if *.written { "; the message had been written before, and may be taken once the block is lifted" } else { "" }
    )]
    Blocked {
        /// The broker's reason, such as `low on memory`.
        reason: String,
        /// How long the call waited.
        waited: Duration,
        /// Whether the message had been written before the block came, so that it may be taken once that is lifted. If
        /// not, nothing was sent.
        written: bool,
    },

    /// The time to publish was up while the broker had the message, or part of it, and had not said what became of it.
    ///
    /// It is in its queues or it is not. To publish it again under the same `message_id` lets consumers tell.
    #[error(
        "it is not known after {after:?} whether the broker has taken message {message_id:?} to exchange {exchange:?} \
         with routing key {routing_key:?}: {cause}"
    )]
    OutcomeUnknown {
        /// The `message_id` it was published with.
        message_id: String,
        /// Exchange it was published to.
        exchange: String,
        /// Routing key it was published with.
        routing_key: String,
        /// The time there was.
        after: Duration,
        /// What happened last.
        #[source]
        cause: Box<Error>,
    },

    /// A call passed its deadline. The connection it ran on is given up where the call could not be taken back.
    #[error("the {during} took longer than {after:?}")]
    Timeout {
        /// What was being done.
        during: String,
        /// The deadline it had, from its start.
        after: Duration,
    },

    /// Some messages of a batch were not confirmed.
    #[error(transparent)]
    Batch(#[from] BatchError),

    /// The delivery belongs to a channel that has been closed since. The broker has put the message back into its
    /// queue, so there is nothing to settle.
    #[error("the delivery is stale: its channel was closed and the broker has requeued the message")]
    StaleDelivery,

    /// The broker ended a subscription, usually because the queue was deleted.
    #[error("the broker cancelled the subscription to queue {queue:?}; was the queue deleted?")]
    ConsumerCancelled {
        /// The queue.
        queue: String,
    },

    /// An argument cannot be put on the wire. Nothing was sent.
    #[error("{what}: {problem}")]
    InvalidArgument {
        /// Which argument.
        what: String,
        /// What is wrong with it and what was expected.
        problem: String,
    },

    /// The program would not have the message published: see [`Pool::before_publish`](crate::Pool::before_publish). Nothing
    /// was sent.
    #[error("the message was refused before it was published: {reason}")]
    Refused {
        /// Why, in the program's words.
        reason: String,
    },

    /// A value could not be written as JSON, or a body could not be read as the type asked for.
    #[error("{what}: {source}")]
    Json {
        /// Which body.
        what: String,
        /// What serde_json said.
        #[source]
        source: Arc<serde_json::Error>,
    },

    /// The embedded broker cannot listen on an address, for instance because another program does.
    #[error("the embedded broker cannot listen on {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },

    /// The offset at which a listener is to begin to read a stream could not be had from its
    /// [`OffsetStore`](crate::OffsetStore).
    #[error("the stored offset of the stream cannot be read: {source}")]
    OffsetStore {
        /// What the store said.
        #[source]
        source: Arc<io::Error>,
    },

    /// The database of an [outbox](crate::outbox) or an [inbox](crate::inbox) has not done what it was asked.
    #[error("{during}: {cause}")]
    Store {
        /// What was to be done, and in which database.
        during: String,
        /// Why not.
        #[source]
        cause: StoreError,
    },

    /// The operating system would not start a thread.
    #[error("cannot start thread {name:?}: {source}")]
    Thread {
        /// The thread's name.
        name: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
}

/// `1 message`, `2 messages`.
pub(crate) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

/// Who has held a guard, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// How long the guard had been out.
    pub held: Duration,
    /// The line that checked it out.
    pub location: &'static Location<'static>,
    /// The thread that checked it out.
    pub thread: String,
}

/// What is wrong with a body, or with a value that was to become one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct EncodingError {
    problem: String,
    /// It is about the answer to a call. A handler that has made the call handles another message.
    of_answer: bool,
}

impl EncodingError {
    pub(crate) fn is_of_answer(&self) -> bool {
        self.of_answer
    }
}

struct OldestHeld<'a>(&'a Option<Holder>);

impl fmt::Display for OldestHeld<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(holder) => write!(
                f,
                "; the oldest has been held for {:?}, by thread {:?} since {}",
                holder.held, holder.thread, holder.location
            ),
            None => Ok(()),
        }
    }
}

impl Error {
    /// The broker's reply code, where the broker gave one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Error::ConnectionClosed { code, .. } | Error::ChannelClosed { code, .. } | Error::Returned { code, .. } => {
                Some(*code)
            }
            Error::Connect { cause, .. } => cause.code(),
            _ => None,
        }
    }

    /// Whether the same call may succeed later though nobody changes anything.
    ///
    /// True for a broker that is not there, a connection lost, a time-out, a pool that is exhausted and a broker
    /// that blocks or nacks; false for what is wrong in itself. Of the broker's own codes it accepts these, in the
    /// words of the AMQP 0-9-1 specification:
    ///
    /// - 311 `content-too-large`: "The client may retry at a later time."
    /// - 320 `connection-forced`: "The client may retry at some later date."
    /// - 405 `resource-locked`: "because another client is working with it".
    /// - 506 `resource-error`: "it lacked sufficient resources".
    /// - 541 `internal-error`: "The server may require intervention by an operator in order to resume normal
    ///   operations."
    pub fn is_transient(&self) -> bool {
        match self {
            Error::PoolExhausted { .. }
            | Error::ConnectionLost { .. }
            | Error::Nacked { .. }
            | Error::ChannelsExhausted { .. }
            | Error::Blocked { .. }
            | Error::OutcomeUnknown { .. }
            | Error::Timeout { .. }
            | Error::StaleDelivery
            | Error::OffsetStore { .. }
            | Error::Thread { .. } => true,
            Error::Connect { cause, .. } => cause.is_transient(),
            Error::Store { cause, .. } => cause.is_transient(),
            Error::ConnectionClosed { code, .. } | Error::ChannelClosed { code, .. } => is_transient_code(*code),
            Error::Batch(batch) => batch.failed.iter().all(|(_, error)| error.is_transient()),
            Error::Hook { source, .. } => source.is_transient(),
            Error::Settings(_)
            | Error::TooManyListeners { .. }
            | Error::NotEnded { .. }
            | Error::Forked { .. }
            | Error::NothingToConsume
            | Error::Encoding { .. }
            | Error::Remote { .. }
            | Error::Signals { .. }
            | Error::UnknownPool { .. }
            | Error::PoolClosed { .. }
            | Error::Returned { .. }
            | Error::ConsumerCancelled { .. }
            | Error::InvalidArgument { .. }
            | Error::Refused { .. }
            | Error::Listen { .. }
            | Error::Json { .. } => false,
        }
    }

    /// Whether it takes a person to mend this: who we are, what we may, which virtual host there is.
    pub(crate) fn takes_a_person(&self) -> bool {
        match self {
            Error::Connect { cause: ConnectError::PasswordFile { .. }, .. } => true,
            other => matches!(other.code(), Some(403 | 530)) && !other.is_transient(),
        }
    }

    /// [`Error::Refused`], for a hook that will not have a message published.
    pub fn refused(reason: impl Into<String>) -> Error {
        Error::Refused { reason: reason.into() }
    }

    #[cfg(feature = "outbox")]
    pub(crate) fn store(during: &str, cause: StoreError) -> Error {
        Error::Store { during: during.to_owned(), cause }
    }

    pub(crate) fn json(what: impl Into<String>, source: serde_json::Error) -> Error {
        Error::Json { what: what.into(), source: Arc::new(source) }
    }

    pub(crate) fn encoding(encoding: &'static str, problem: impl ToString) -> Error {
        Error::Encoding { encoding, source: EncodingError { problem: problem.to_string(), of_answer: false } }
    }

    pub(crate) fn answer(problem: impl ToString) -> Error {
        Error::Encoding { encoding: "answer", source: EncodingError { problem: problem.to_string(), of_answer: true } }
    }

    pub(crate) fn invalid(what: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::InvalidArgument { what: what.into(), problem: problem.into() }
    }
}
