//! A message as the broker keeps it: what came over the wire, byte for byte, and the little that routing and queues ask
//! of it again and again.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use crate::amqp::ShortString;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

/// `delivery-mode` of a message that outlives a restart in a durable queue.
pub(crate) const PERSISTENT: u8 = 2;

/// Routing keys of any length.
pub(crate) type Keys = Box<[Box<[u8]>]>;

/// The body of a message. All that becomes of one message, dead letters of dead letters too, shares its body.
#[derive(Debug)]
pub(crate) enum Body {
    Own(Box<[u8]>),
    Of(Arc<Message>),
}

impl Body {
    /// The body of this message, for another.
    pub(crate) fn of(message: &Arc<Message>) -> Body {
        match &message.body {
            Body::Own(_) => Body::Of(message.clone()),
            Body::Of(first) => Body::Of(first.clone()),
        }
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Body::Own(bytes) => bytes,
            Body::Of(message) => &message.body,
        }
    }
}

/// A message, shared by all the queues it is in.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    /// The property flags and values as they were sent, save what RabbitMQ changes too (`BCC`, direct reply-to, and what a
    /// release writes anew).
    pub(crate) properties: Box<[u8]>,
    pub(crate) body: Body,
    /// Every key it is routed by, its own first, if that is more than `routing_key` says: there are others in the headers
    /// `CC` and `BCC`, or a dead letter's own is too long for a short string. Most messages have none.
    pub(crate) keys: Option<Keys>,
    pub(crate) priority: u8,
    pub(crate) persistent: bool,
    /// It is a dead letter, so the deaths in its headers are the broker's own.
    pub(crate) has_died: bool,
    /// How often quorum queues before this one have had it rejected, or have lost the channel that had it.
    pub(crate) failures: u32,
}

impl Message {
    /// Every key it is routed by, its own first.
    pub(crate) fn routing_keys(&self) -> impl Iterator<Item = &[u8]> {
        let own = if self.keys.is_some() { None } else { Some(self.routing_key.as_bytes()) };
        own.into_iter().chain(self.keys.iter().flatten().map(AsRef::as_ref))
    }

    /// Its properties, with the header `x-delivery-count` if there is something to say about how often it has come back.
    pub(crate) fn properties_with(&self, delivery_count: Option<u32>) -> Cow<'_, [u8]> {
        let Some(count) = delivery_count else { return Cow::Borrowed(&self.properties) };
        // They were read when the message came, so they can be read.
        let Ok(mut properties) = Properties::decode(&self.properties) else { return Cow::Borrowed(&self.properties) };
        set(properties.headers.get_or_insert_default(), "x-delivery-count", Value::I64(count.into()));
        Cow::Owned(properties.encode())
    }
}

/// Sets a header; RabbitMQ sorts the table whenever it does.
pub(super) fn set(headers: &mut Table, name: &str, value: Value) {
    match headers.0.iter_mut().find(|(other, _)| other == name) {
        Some((_, old)) => *old = value,
        None => headers.0.push((name.into(), value)),
    }
    sort(headers);
}

pub(super) fn sort(table: &mut Table) {
    table.0.sort_by(|(one, _), (other, _)| one.cmp(other));
}

#[cfg(test)]
impl Message {
    /// A message with nothing in it.
    pub(crate) fn for_test() -> Message {
        Message {
            exchange: ShortString::default(),
            routing_key: ShortString::default(),
            properties: Box::new([0, 0]),
            body: Body::Own(Box::default()),
            keys: None,
            priority: 0,
            persistent: false,
            has_died: false,
            failures: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_becomes_of_a_message_shares_its_body() {
        let first = Arc::new(Message { body: Body::Own(b"body".as_slice().into()), ..Message::for_test() });
        let second = Arc::new(Message { body: Body::of(&first), ..Message::for_test() });
        let third = Message { body: Body::of(&second), ..Message::for_test() };
        assert_eq!(&*third.body, b"body");
        assert!(std::ptr::eq(&*third.body, &*first.body));
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (3, 1), "what is between them may go");
    }
}
