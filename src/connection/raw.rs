//! amiquip itself, for what this crate does not wrap: a channel of one's own, and its types in and out.
//!
//! The feature is called `unstable-amiquip` because with it the version of amiquip is part of what a program depends on, and
//! no promise of this crate's version number covers that.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Publish};

use super::declare::{arguments_of, fields_of};
use super::{Connection, Received};
use crate::error::{Error, Result};
use crate::message::Message;
use crate::session::FRAME_MAX;

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
        let channel = self.session.open_channel(limit.min(timeout), &during, None)?;
        let result = channel.call(timeout, &during, |channel| {
            // The channel is closed in order first: left to itself it waits for the broker without a deadline.
            match catch_unwind(AssertUnwindSafe(|| step(channel))) {
                Ok(result) => result.map(Ok),
                Err(panic) => Ok(Err(panic)),
            }
        });
        channel.close(limit);
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
        Ok(message.to_amiquip_properties())
    }
}

/// A body and its properties.
impl From<(Vec<u8>, AmqpProperties)> for Message {
    fn from((body, properties): (Vec<u8>, AmqpProperties)) -> Message {
        from_amiquip(body, properties)
    }
}

/// The message in it. What settles the delivery is amiquip's: do that before, or keep a clone.
impl From<amiquip::Delivery> for Received {
    fn from(mut delivery: amiquip::Delivery) -> Received {
        let (exchange, routing_key, redelivered) =
            (std::mem::take(&mut delivery.exchange), std::mem::take(&mut delivery.routing_key), delivery.redelivered);
        Received::new(delivery.into(), &exchange, &routing_key, redelivered)
    }
}

impl From<amiquip::Get> for Received {
    fn from(get: amiquip::Get) -> Received {
        Received::from(get.delivery).with_remaining(get.message_count)
    }
}

impl From<amiquip::Delivery> for Message {
    fn from(delivery: amiquip::Delivery) -> Message {
        from_amiquip(delivery.body, delivery.properties)
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
        from_amiquip(returned.content, returned.properties)
    }
}

/// Values of the property `delivery-mode`.
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

impl Message {
    fn to_amiquip_properties(&self) -> AmqpProperties {
        let mode = if self.is_persistent() { PERSISTENT } else { TRANSIENT };
        let mut properties = AmqpProperties::default().with_delivery_mode(mode);
        macro_rules! set {
            ($($get:ident => $with:ident),*) => {$(
                if let Some(value) = self.$get() {
                    properties = properties.$with(value.into());
                }
            )*};
        }
        set!(content_type => with_content_type, content_encoding => with_content_encoding, priority => with_priority,
            correlation_id => with_correlation_id, reply_to => with_reply_to, raw_expiration => with_expiration,
            message_id => with_message_id, raw_timestamp => with_timestamp, kind => with_type_, user_id => with_user_id,
            app_id => with_app_id, cluster_id => with_cluster_id);
        if !self.headers().is_empty() {
            properties = properties.with_headers(arguments_of(self.headers()));
        }
        properties
    }
}

fn from_amiquip(body: Vec<u8>, properties: AmqpProperties) -> Message {
    let mut message = Message::new(body);
    if *properties.delivery_mode() != Some(PERSISTENT) {
        message = message.transient();
    }
    macro_rules! take {
        ($($get:ident => $with:ident),*) => {$(
            if let Some(value) = properties.$get().clone() {
                message = message.$with(value);
            }
        )*};
    }
    take!(content_type => with_content_type, content_encoding => with_content_encoding, priority => with_priority,
        correlation_id => with_correlation_id, reply_to => with_reply_to, expiration => with_raw_expiration,
        message_id => with_message_id, timestamp => with_raw_timestamp, type_ => with_kind, user_id => with_user_id,
        app_id => with_app_id, cluster_id => with_cluster_id);
    match properties.headers() {
        Some(headers) => message.with_headers(fields_of(headers)),
        None => message,
    }
}
