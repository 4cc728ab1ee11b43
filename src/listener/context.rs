//! What a handler is given beside its message.

use std::cell::RefCell;
use std::fmt;

use super::deferred::AfterConfirm;
use crate::connection::{Connection, Received};
use crate::error::{Error, Result};
use crate::message::Message;

/// What a handler may do besides returning an [`Outcome`](crate::Outcome).
pub struct Context<'a> {
    pub(super) connection: &'a Connection,
    pub(super) listener: &'a str,
    pub(super) queue: &'a str,
    /// What the delivery in hand is to wait for, if its handler has said so.
    pub(super) after: RefCell<Option<AfterConfirm>>,
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("listener", &self.listener).field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Context<'_> {
    /// The listener's name.
    pub fn listener(&self) -> &str {
        self.listener
    }

    /// The queue the message came from, also where the broker has named it.
    pub fn queue(&self) -> &str {
        self.queue
    }

    /// Publishes a message and waits for the confirm, on another channel of the listener's connection: a mistake in it
    /// does not disturb the listening.
    ///
    /// # Errors
    ///
    /// Those of [`Connection::publish`].
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        self.connection.publish(exchange, routing_key, message)
    }

    /// Answers `request`: publishes `message` to its `reply_to`, with its `correlation_id`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the request names no queue for an answer; otherwise those of
    /// [`Connection::publish`].
    pub fn reply(&self, request: &Received, message: impl Into<Message>) -> Result<()> {
        let Some(reply_to) = request.message().reply_to() else {
            return Err(Error::invalid("reply", "the request has no reply_to, expected the queue for the answer"));
        };
        let mut message = message.into();
        if let Some(id) = request.message().correlation_id() {
            message = message.with_correlation_id(id);
        }
        self.connection.publish("", reply_to, message)
    }

    /// Has the delivery in hand settled by `after`, if its handler returns `Ack`.
    pub(crate) fn settle_after(&self, after: AfterConfirm) {
        *self.after.borrow_mut() = Some(after);
    }

    /// The connection itself, for all else. Its channels are not those of the listening.
    pub fn connection(&self) -> &Connection {
        self.connection
    }
}
