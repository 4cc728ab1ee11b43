//! Publishing through a pool: one call that outlives the connection it began on.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::shared::{Backoff, Tries};
use super::{Pool, deadline};
use crate::error::{Error, Result};
use crate::message::Message;

impl Pool {
    /// Publishes a message on a connection of this pool and waits for the broker to confirm it, through a restart of the
    /// broker if need be, for up to the pool's `publish_timeout`.
    ///
    /// Takes a connection, publishes as [`Connection::publish`](crate::Connection::publish) does, and gives it back. When
    /// the connection is lost in between, the message is published again on another, under the same `message_id`; one
    /// that has none is given a random one of 32 hexadecimal digits. So `Ok` means *at least once*: if the broker had taken
    /// it and only the confirm was lost, there are two of it, and a consumer can tell by the id. Messages that one thread
    /// publishes one after the other keep their order, but for such repetitions.
    ///
    /// Where many messages are sent by one thread, borrow a connection once and use
    /// [`publish_async`](crate::Connection::publish_async) or [`publish_batch`](crate::Connection::publish_batch).
    ///
    /// # Errors
    ///
    /// What the broker refuses is returned at once and never tried again: [`Error::Returned`], [`Error::Nacked`],
    /// [`Error::ChannelClosed`] (404 for an exchange that does not exist, 403 where writing is not allowed),
    /// [`Error::ConnectionClosed`] with a code that is not [transient](Error::is_transient), [`Error::Connect`] where
    /// user, password or virtual host are refused, [`Error::InvalidArgument`]. So is what a hook refuses.
    ///
    /// When the time is up:
    ///
    /// - [`Error::OutcomeUnknown`]: the message has been written, at least in part, and there is no word on it.
    /// - [`Error::Blocked`]: the broker takes no messages at present; says whether this one had been written before.
    /// - [`Error::Connect`], [`Error::PoolExhausted`], [`Error::Timeout`]: there was no connection. Nothing was sent.
    /// - [`Error::ConnectionLost`], or [`Error::ConnectionClosed`] with a transient code: the last connection did not last
    ///   long enough. Nothing was sent.
    /// - [`Error::PoolClosed`]: the pool has been closed before anything was sent.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// app.publish_pool().publish("events", "order.created", "{\"order\": 1}")?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        let timeout = self.settings().publish_timeout;
        self.publish_within(exchange, routing_key, message.into(), timeout, Location::caller())
    }

    /// Publishes a message like [`publish`](Pool::publish), for up to `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Pool::publish).
    #[track_caller]
    pub fn publish_timeout(
        &self,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
        timeout: Duration,
    ) -> Result<()> {
        self.publish_within(exchange, routing_key, message.into(), timeout, Location::caller())
    }

    fn publish_within(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Message,
        timeout: Duration,
        location: &'static Location<'static>,
    ) -> Result<()> {
        let deadline = deadline::after(timeout);
        let message = with_id(self.outlet().prepare(exchange, routing_key, message)?);
        let mut backoff = Backoff::new();
        let mut written = false;
        let error = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let connection = match self.checkout(left, Tries::Many, location) {
                Ok(connection) => connection,
                Err(error) => {
                    self.shared.outlet.meter.not_entered(&error);
                    break error;
                }
            };
            let mandatory = self.settings().mandatory;
            let attempt = connection.attempt(exchange, routing_key, Arc::clone(&message), mandatory, deadline);
            written |= attempt.written;
            let error = match attempt.outcome {
                Ok(()) => return Ok(()),
                Err(error @ (Error::ConnectionLost { .. } | Error::ConnectionClosed { .. }))
                    if error.is_transient() =>
                {
                    error
                }
                Err(error @ (Error::Blocked { .. } | Error::Timeout { .. })) => break error,
                // The broker has seen the message and will not have it, or it cannot be sent at all.
                Err(refused) => return Err(refused),
            };
            let (pool, message_id) = (self.name(), message.message_id().unwrap_or_default());
            log::debug!(pool, exchange, routing_key, message_id; "pool {pool:?}: {error}; publishing again");
            drop(connection);
            let wait = backoff.next();
            if Instant::now() + wait >= deadline {
                break error;
            }
            self.outlet().meter.retries.one();
            self.shared.sleep(wait);
        };
        Err(match error {
            Error::Blocked { reason, .. } => Error::Blocked { reason, waited: timeout, written },
            error if written => Error::OutcomeUnknown {
                message_id: message.message_id().unwrap_or_default().to_owned(),
                exchange: exchange.to_owned(),
                routing_key: routing_key.to_owned(),
                after: timeout,
                cause: Box::new(error),
            },
            Error::Timeout { during, .. } => Error::Timeout { during, after: timeout },
            other => other,
        })
    }
}

/// The message with an identity, by which repetitions of it can be told from others.
fn with_id(message: Message) -> Arc<Message> {
    Arc::new(match message.message_id() {
        Some(_) => message,
        None => message.with_message_id(format!("{:032x}", fastrand::u128(..))),
    })
}
