//! A message as the broker keeps it: what came over the wire, byte for byte, and the little that routing and queues ask
//! of it again and again.

use crate::amqp::ShortString;

/// `delivery-mode` of a message that outlives a restart in a durable queue.
pub(crate) const PERSISTENT: u8 = 2;

/// A message, shared by all the queues it is in.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    /// The property flags and values as they were sent, save what RabbitMQ changes too (`BCC`, direct reply-to).
    pub(crate) properties: Box<[u8]>,
    pub(crate) body: Box<[u8]>,
    /// Further routing keys, from the headers `CC` and `BCC`. Most messages have none.
    pub(crate) copies: Option<Box<[ShortString]>>,
    pub(crate) priority: u8,
    pub(crate) persistent: bool,
}

impl Message {
    /// Every key it is routed by, its own first.
    pub(crate) fn routing_keys(&self) -> impl Iterator<Item = &ShortString> {
        std::iter::once(&self.routing_key).chain(self.copies.iter().flatten())
    }
}

#[cfg(test)]
impl Message {
    /// A message with nothing in it.
    pub(crate) fn for_test() -> Message {
        Message {
            exchange: ShortString::default(),
            routing_key: ShortString::default(),
            properties: Box::new([0, 0]),
            body: Box::default(),
            copies: None,
            priority: 0,
            persistent: false,
        }
    }
}
