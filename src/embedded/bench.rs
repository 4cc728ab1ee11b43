//! What the benchmarks measure of the parts that do no I/O: codec and routing. Nothing here is part of the interface of
//! this crate.

use super::exchange::{Destination, Exchange, Kind, QueueId};
use super::headers::MessageHeaders;
use crate::amqp::ShortString;
use crate::amqp::cursor::Reader;
use crate::amqp::frame::{self, Scan, scan, write_content, write_method};
use crate::amqp::method::Method;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

const FRAME_MAX: usize = 131_072;

/// An exchange, and a queue for each of its bindings.
#[derive(Debug)]
pub struct Router {
    exchange: Exchange,
    queues: u64,
}

impl Router {
    /// Of type `direct`, `fanout`, `topic` or `headers`.
    pub fn new(kind: &str) -> Option<Router> {
        let kind = Kind::of_name(&ShortString::new(kind.as_bytes()))?;
        Some(Router { exchange: Exchange::new(ShortString::new(b"bench"), kind), queues: 0 })
    }

    /// Binds another queue.
    pub fn bind(&mut self, key: &str, arguments: &[(&str, &str)]) {
        self.queues += 1;
        let queue = Destination::Queue(QueueId(self.queues));
        self.exchange.bind(queue, &ShortString::new(key.as_bytes()), &table(arguments));
    }

    /// How many queues a message goes to.
    pub fn route(&self, message: &Envelope) -> usize {
        let mut found = Vec::new();
        self.exchange.route(
            std::iter::once(message.key.as_bytes()),
            &MessageHeaders::new(Some(&message.headers)),
            &[0, 0],
            &mut found,
        );
        found.len()
    }
}

/// What a message is routed by.
#[derive(Debug)]
pub struct Envelope {
    key: ShortString,
    headers: Table,
}

impl Envelope {
    /// A routing key, and headers of text.
    pub fn new(key: &str, headers: &[(&str, &str)]) -> Envelope {
        Envelope { key: ShortString::new(key.as_bytes()), headers: table(headers) }
    }
}

fn table(fields: &[(&str, &str)]) -> Table {
    fields.iter().fold(Table::default(), |table, (name, text)| table.with(name, Value::text(text)))
}

/// Reads all frames: methods and properties are decoded, bodies are found. Returns how many methods there were.
pub fn decode(mut bytes: &[u8]) -> usize {
    let mut methods = 0;
    while let Scan::Whole(frame, length) = scan(bytes, FRAME_MAX) {
        match (frame.kind, frame.payload) {
            (frame::METHOD, &[c1, c0, m1, m0, ref arguments @ ..]) => {
                let method = Method::decode(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]), arguments);
                methods += usize::from(method.is_some_and(|method| method.is_ok()));
            }
            (frame::HEADER, payload) => {
                let properties = Properties::decode(payload.get(12..).unwrap_or_default());
                std::hint::black_box(properties.is_ok());
            }
            _ => {}
        }
        bytes = &bytes[length..];
    }
    methods
}

/// Writes the first method of `bytes` and a message behind it, `times` times; returns how many bytes that is.
pub fn encode(bytes: &[u8], properties: &[u8], body: &[u8], times: usize) -> Option<usize> {
    let Scan::Whole(frame, _) = scan(bytes, FRAME_MAX) else { return None };
    let mut ids = Reader::new(frame.payload);
    let (class, id) = (ids.u16().ok()?, ids.u16().ok()?);
    let method = Method::decode(class, id, ids.rest())?.ok()?;
    let (mut into, mut written) = (Vec::new(), 0);
    for _ in 0..times {
        into.clear();
        write_method(&mut into, 1, &method);
        write_content(&mut into, 1, properties, body, FRAME_MAX);
        written += into.len();
    }
    Some(written)
}
