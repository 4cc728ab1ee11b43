//! What happens to connections, listeners and messages, told in one place.
//!
//! Whoever notices something tells [`PoolEvents`] or [`ListenerEvents`]. They move the metric that belongs to it, write its line
//! in the log, and hand it to [`Events`], which tells the handlers that a program has put there. So none of the three can be
//! forgotten. This room decides nothing and knows nothing of who notices.

mod hub;
mod of_listener;
#[cfg(feature = "outbox")]
mod of_outbox;
mod of_pool;

use std::fmt;
use std::time::Duration;

use log::Level;

pub(crate) use self::hub::Events;
pub(crate) use self::of_listener::{Dead, ListenerEvents, Start};
#[cfg(feature = "outbox")]
pub(crate) use self::of_outbox::OutboxEvents;
pub(crate) use self::of_pool::{Noted, PoolEvents};
use crate::error::Error;

/// Something that has happened to a connection, a listener or a message. See [`App::on_event`](crate::App::on_event).
///
/// It is displayed as the line that the log has for it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A pool has opened a connection.
    #[non_exhaustive]
    ConnectionOpened {
        /// The pool.
        pool: String,
        /// The name that the connection has given the broker, such as `coney publish #3`.
        connection: String,
        /// Where to, without the password.
        url: String,
    },
    /// A pool has tried to open a connection, and could not.
    #[non_exhaustive]
    ConnectFailed {
        /// The pool.
        pool: String,
        /// The name that the connection was to have.
        connection: String,
        /// Why: an [`Error::Connect`].
        error: Error,
        /// How long it waits before it tries again; `None` if it has given up.
        wait: Option<Duration>,
    },
    /// An open connection has ended, and not because the program has closed it in order. There is one for each such
    /// connection, as soon as anybody knows of it.
    #[non_exhaustive]
    ConnectionLost {
        /// The pool.
        pool: String,
        /// The connection's name.
        connection: String,
        /// The first cause: [`Error::ConnectionClosed`] if the broker has closed it, otherwise [`Error::ConnectionLost`].
        error: Error,
    },
    /// The program has closed a connection in order. Of each connection that was opened there is this in the end, or
    /// [`ConnectionLost`](Event::ConnectionLost).
    #[non_exhaustive]
    ConnectionClosed {
        /// The pool.
        pool: String,
        /// The connection's name.
        connection: String,
    },
    /// The broker takes no messages on a connection. RabbitMQ says so to a connection that publishes during an alarm.
    #[non_exhaustive]
    ConnectionBlocked {
        /// The pool.
        pool: String,
        /// The connection's name.
        connection: String,
        /// Why, in the broker's words, such as `low on memory`.
        reason: String,
    },
    /// The broker takes messages on a connection again. There is none if the connection ends before that.
    #[non_exhaustive]
    ConnectionUnblocked {
        /// The pool.
        pool: String,
        /// The connection's name.
        connection: String,
    },
    /// A queue or an exchange is there with other properties than were declared, and is used as it is: see
    /// [`OnConflict::Warn`](crate::OnConflict::Warn).
    #[non_exhaustive]
    DeclareConflict {
        /// The pool.
        pool: String,
        /// What it is, such as `queue "orders"`.
        entity: String,
        /// What differs, in the broker's words.
        error: Error,
    },
    /// The broker would not declare something, and the rest of the topology was declared without it: see
    /// [`Topology::skip_failed`](crate::Topology::skip_failed).
    #[non_exhaustive]
    DeclareFailed {
        /// The pool.
        pool: String,
        /// What it is, such as `queue "orders"`.
        entity: String,
        /// Why, in the broker's words.
        error: Error,
    },
    /// A listener has its consumers: messages come.
    #[non_exhaustive]
    ListenerConsuming {
        /// The listener.
        listener: String,
        /// The pool that its connection is from.
        pool: String,
        /// It had lost its consumers, or could not get them.
        again: bool,
        /// It was paused.
        after_pause: bool,
    },
    /// A listener has no consumers, because it has lost them or could not get them. It tries again by itself.
    #[non_exhaustive]
    ListenerRecovering {
        /// The listener.
        listener: String,
        /// The pool that its connection is from.
        pool: String,
        /// Why.
        error: Error,
        /// Which attempt comes next, counted from 1 since it last consumed.
        attempt: u32,
        /// How long it waits before that.
        wait: Duration,
    },
    /// A listener takes no messages for a while: because most of them failed, or because it was told to.
    #[non_exhaustive]
    ListenerPaused {
        /// The listener.
        listener: String,
        /// The pool that its connection is from.
        pool: String,
        /// For how long; `None` if somebody has to say when it is over.
        wait: Option<Duration>,
        /// Why.
        why: String,
    },
    /// A listener that was started has ended.
    #[non_exhaustive]
    ListenerStopped {
        /// The listener.
        listener: String,
        /// The pool that its connection was from.
        pool: String,
        /// Why it has ended, if nobody has stopped it.
        error: Option<Error>,
    },
    /// A listener has given a message up and put it into the queue of the dead.
    #[non_exhaustive]
    MessageDead {
        /// The listener.
        listener: String,
        /// The queue it came from.
        queue: String,
        /// The queue it is in now, `NAME.dead`.
        dead_queue: String,
        /// The message's own id, if it has one.
        message_id: Option<String>,
        /// What its handler has said about it the last time.
        reason: String,
        /// Its headers have no room for the reason, so that this is the only place that has it.
        is_bare: bool,
    },
    /// A message was not published, or nobody knows whether it was. Whoever published it is told the same error. A message
    /// that [`Pool::publish`](crate::Pool::publish) sends again by itself is told of once, when that has failed for good.
    ///
    /// There is none for the requests of an [`RpcClient`](crate::rpc::RpcClient), unless a hook refuses them, and none for what
    /// is published by a handler of events. The log has no line for it.
    #[non_exhaustive]
    PublishFailed {
        /// The pool that its connection is from.
        pool: String,
        /// The exchange it was bound for; empty for the default exchange.
        exchange: String,
        /// Its routing key.
        routing_key: String,
        /// The message's own id, if it has one.
        message_id: Option<String>,
        /// Why.
        error: Error,
    },
    /// An [outbox](crate::outbox) cannot forward what is stored in it: the broker or the database is not there. It tries again by
    /// itself.
    #[non_exhaustive]
    OutboxStalled {
        /// The outbox.
        outbox: String,
        /// Why.
        error: Error,
        /// How long it waits before it tries again.
        wait: Duration,
    },
    /// An [outbox](crate::outbox) that was stalled forwards again.
    #[non_exhaustive]
    OutboxResumed {
        /// The outbox.
        outbox: String,
    },
    /// The broker has refused a message of an [outbox](crate::outbox), or returned it. It stays in the outbox until somebody decides.
    #[non_exhaustive]
    OutboxRefused {
        /// The outbox.
        outbox: String,
        /// The message's own id.
        message_id: String,
        /// Why.
        reason: String,
    },
    /// Handlers have been too slow for what happened: at this place in the order, so many events are missing.
    #[non_exhaustive]
    Missed {
        /// How many.
        count: u64,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::ConnectionOpened { connection, url, .. } => write!(f, "{connection}: connected to {url}"),
            Event::ConnectFailed { connection, error, wait, .. } => {
                match error {
                    // Pool and URL are said by the name and by the lines before.
                    Error::Connect { cause, .. } => write!(f, "{connection}: {cause}")?,
                    other => write!(f, "{connection}: {other}")?,
                }
                wait.map_or(Ok(()), |wait| write!(f, "; waiting {wait:.0?}"))
            }
            Event::ConnectionLost { connection, error, .. } => write!(f, "{connection}: {error}"),
            Event::ConnectionClosed { connection, .. } => write!(f, "{connection}: closed"),
            Event::ConnectionBlocked { connection, reason, .. } => {
                write!(f, "{connection}: the broker takes no messages: {reason}")
            }
            Event::ConnectionUnblocked { connection, .. } => {
                write!(f, "{connection}: the broker takes messages again")
            }
            Event::DeclareConflict { pool, entity, error } => {
                write!(f, "pool {pool:?}: {entity} is there with other properties, and is used as it is: {error}")
            }
            Event::DeclareFailed { pool, entity, error } => {
                write!(f, "pool {pool:?}: {entity} is not declared, the rest is: {error}")
            }
            Event::ListenerConsuming { listener, again, after_pause, .. } => {
                let what = match (again, after_pause) {
                    (true, _) => "back",
                    (false, true) => "goes on",
                    (false, false) => "listening",
                };
                write!(f, "listener {listener:?}: {what}")
            }
            Event::ListenerRecovering { listener, error, attempt, wait, .. } => {
                write!(f, "listener {listener:?}: {error}; attempt {attempt} to come back in {wait:.1?}")
            }
            Event::ListenerPaused { listener, wait: Some(wait), why, .. } => {
                write!(f, "listener {listener:?}: paused for {wait:.1?}: {why}")
            }
            Event::ListenerPaused { listener, wait: None, why, .. } => {
                write!(f, "listener {listener:?}: paused: {why}")
            }
            Event::ListenerStopped { listener, error: None, .. } => write!(f, "listener {listener:?}: stopped"),
            Event::ListenerStopped { listener, error: Some(error), .. } => {
                write!(f, "listener {listener:?}: it ends, for {error}")
            }
            Event::MessageDead { listener, queue, dead_queue, message_id, reason, is_bare } => {
                write!(
                    f,
                    "listener {listener:?}: message from queue {queue:?}, id {message_id:?}: {reason}; it is in queue \
                     {dead_queue:?} now"
                )?;
                if *is_bare { f.write_str("; its headers leave no room to say why there") } else { Ok(()) }
            }
            Event::PublishFailed { pool, exchange, routing_key, message_id, error } => write!(
                f,
                "pool {pool:?}: message to exchange {exchange:?} with routing key {routing_key:?}, id {message_id:?}: {error}"
            ),
            Event::OutboxStalled { outbox, error, wait } => {
                write!(f, "outbox {outbox:?}: {error}; the next attempt in {wait:.1?}")
            }
            Event::OutboxResumed { outbox } => write!(f, "outbox {outbox:?}: forwards again"),
            Event::OutboxRefused { outbox, message_id, reason } => {
                write!(f, "outbox {outbox:?}: message {message_id:?} is put aside: {reason}")
            }
            Event::Missed { count } => write!(f, "events: {count} missed; the handlers of on_event are too slow"),
        }
    }
}

impl Event {
    /// Writes its line in the log, if it has one.
    fn log(&self) {
        match self {
            Event::ConnectionOpened { pool, connection, .. }
            | Event::ConnectFailed { pool, connection, .. }
            | Event::ConnectionLost { pool, connection, .. }
            | Event::ConnectionClosed { pool, connection } => {
                let (pool, connection) = (pool.as_str(), connection.as_str());
                log::debug!(target: target::POOL, pool, connection; "{self}");
            }
            Event::ConnectionBlocked { pool, connection, reason } => {
                let (pool, connection, reason) = (pool.as_str(), connection.as_str(), reason.as_str());
                log::warn!(target: target::WIRE, pool, connection, reason; "{self}");
            }
            Event::ConnectionUnblocked { pool, connection } => {
                let (pool, connection) = (pool.as_str(), connection.as_str());
                log::info!(target: target::WIRE, pool, connection; "{self}");
            }
            Event::DeclareConflict { pool, .. } => {
                log::warn!(target: target::DECLARE, pool = pool.as_str(); "{self}");
            }
            Event::DeclareFailed { pool, .. } => {
                log::error!(target: target::DECLARE, pool = pool.as_str(); "{self}");
            }
            Event::ListenerConsuming { listener, pool, .. } => {
                let (listener, pool) = (listener.as_str(), pool.as_str());
                log::info!(target: target::LISTENER, listener, pool; "{self}");
            }
            Event::ListenerRecovering { listener, pool, error, attempt, .. } => {
                let level = if error.takes_a_person() { Level::Error } else { Level::Warn };
                let (listener, pool, attempt) = (listener.as_str(), pool.as_str(), *attempt);
                log::log!(target: target::LISTENER, level, listener, attempt, pool; "{self}");
            }
            Event::ListenerPaused { listener, pool, wait, .. } => {
                // Nobody has told it to rest for so long.
                let level = if wait.is_some() { Level::Error } else { Level::Info };
                let (listener, pool) = (listener.as_str(), pool.as_str());
                log::log!(target: target::LISTENER, level, listener, pool; "{self}");
            }
            Event::ListenerStopped { listener, pool, error } => {
                let level = if error.is_some() { Level::Error } else { Level::Debug };
                let (listener, pool) = (listener.as_str(), pool.as_str());
                log::log!(target: target::LISTENER, level, listener, pool; "{self}");
            }
            Event::MessageDead { listener, queue, message_id, .. } => {
                let (listener, queue) = (listener.as_str(), queue.as_str());
                let message_id = message_id.as_deref().unwrap_or_default();
                log::error!(target: target::SETTLING, listener, queue, message_id, outcome = "dead"; "{self}");
            }
            // Whoever publishes is told, and knows whether that is worth a line.
            Event::PublishFailed { .. } => {}
            Event::OutboxStalled { outbox, .. } => {
                log::warn!(target: target::OUTBOX, outbox = outbox.as_str(); "{self}");
            }
            Event::OutboxResumed { outbox } => {
                log::info!(target: target::OUTBOX, outbox = outbox.as_str(); "{self}");
            }
            Event::OutboxRefused { outbox, message_id, .. } => {
                let (outbox, message_id) = (outbox.as_str(), message_id.as_str());
                log::error!(target: target::OUTBOX, outbox, message_id, outcome = "refused"; "{self}");
            }
            Event::Missed { .. } => log::warn!(target: target::EVENTS, "{self}"),
        }
    }
}

/// Under which targets the lines are, as those are for which `RUST_LOG=coney::listener=debug` and the like ask.
mod target {
    pub(super) const POOL: &str = "coney::pool::shared";
    pub(super) const WIRE: &str = "coney::session::wire";
    pub(super) const DECLARE: &str = "coney::connection::topology";
    pub(super) const LISTENER: &str = "coney::listener::supervisor";
    pub(super) const SETTLING: &str = "coney::listener::settling";
    pub(super) const OUTBOX: &str = "coney::outbox::forwarder";
    pub(super) const EVENTS: &str = "coney::event";
}
