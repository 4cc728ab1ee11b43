//! amiquip itself, for what this crate does not wrap: a channel of one's own, and its types in and out.
//!
//! The feature is called `unstable-amiquip` because with it the version of amiquip is part of what a program depends on, and
//! no promise of this crate's version number covers that.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Publish};

use crate::connection::Connection;
use crate::delivery::Received;
use crate::error::{Error, Result};
use crate::message::Message;
use crate::transport::FRAME_MAX;

/// What is not wrapped.
impl Connection {
    /// Runs `step` on an amiquip channel of its own, which is opened before and closed after it, on this connection.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use std::time::Duration;
    ///
    /// let connection = app.listen_pool().connection()?;
    /// connection.raw(Duration::from_secs(5), |channel| channel.recover(true))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// What holds: a step that waits for the broker has ended after `timeout`, because the connection is then cut, and its
    /// errors are told with their first cause, as everywhere. A refusal of the broker (404, 406) costs the channel, which is
    /// gone anyway, and nothing beside it.
    ///
    /// What does not:
    ///
    /// - A step that waits for something else than this connection is not ended.
    /// - Messages are not checked before they are written. A short string of more than 255 bytes, or a header that does not
    ///   fit a frame, is the caller's to avoid: the conversions of [`Message`] do.
    /// - Publishing is not confirmed unless the step turns confirms on and reads them. `connection.blocked` is not told to
    ///   amiquip: see [`Connection::blocked`].
    /// - A consumer that is dropped while deliveries are on their way can end the connection. Cancel it, and read its
    ///   receiver to its end, before it is dropped.
    /// - An error that the step makes itself, which has no cause on the wire, counts as one of the connection, which is then
    ///   given up. Return such things as a value.
    /// - The channel ends with the step, so neither it nor its consumers can be kept.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] after `timeout`, and the connection is given up; [`Error::ChannelClosed`] where the broker refuses;
    /// [`Error::ConnectionLost`], [`Error::ConnectionClosed`].
    pub fn raw<T>(&self, timeout: Duration, step: impl FnOnce(&Channel) -> amiquip::Result<T>) -> Result<T> {
        let during = || "work on a raw channel".to_owned();
        let limit = self.settings.broker.operation_timeout;
        let open = self.link.open_channel(limit.min(timeout), &during)?;
        let result = self.link.call(timeout, &during, Some(open.id), || {
            // The channel is closed in order first: left to itself it waits for the broker without a deadline.
            match catch_unwind(AssertUnwindSafe(|| step(&open.channel))) {
                Ok(result) => result.map(Ok),
                Err(panic) => Ok(Err(panic)),
            }
        });
        open.close(&self.link, limit);
        result.map(|value| value.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

impl Message {
    /// The message as amiquip publishes it, borrowing the body; `mandatory` and `immediate` are not set.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if it cannot be put on the wire.
    pub fn to_amiquip(&self, routing_key: impl Into<String>) -> Result<Publish<'_>> {
        Ok(Publish::with_properties(self.body(), routing_key, AmqpProperties::try_from(self)?))
    }
}

impl TryFrom<&Message> for AmqpProperties {
    type Error = Error;

    fn try_from(message: &Message) -> Result<AmqpProperties> {
        message.check(FRAME_MAX as usize)?;
        Ok(message.amqp_properties())
    }
}

/// A body and its properties.
impl From<(Vec<u8>, AmqpProperties)> for Message {
    fn from((body, properties): (Vec<u8>, AmqpProperties)) -> Message {
        Message::from_amqp(body, properties)
    }
}

/// The message in it. What settles the delivery is amiquip's: do that before, or keep a clone.
impl From<amiquip::Delivery> for Received {
    fn from(mut delivery: amiquip::Delivery) -> Received {
        Received::take_from(&mut delivery, None)
    }
}

impl From<amiquip::Get> for Received {
    fn from(mut get: amiquip::Get) -> Received {
        Received::take_from(&mut get.delivery, Some(get.message_count))
    }
}

impl From<amiquip::Delivery> for Message {
    fn from(delivery: amiquip::Delivery) -> Message {
        Message::from_amqp(delivery.body, delivery.properties)
    }
}

impl From<amiquip::Get> for Message {
    fn from(get: amiquip::Get) -> Message {
        get.delivery.into()
    }
}

/// The message that came back.
impl From<amiquip::Return> for Message {
    fn from(returned: amiquip::Return) -> Message {
        Message::from_amqp(returned.content, returned.properties)
    }
}
