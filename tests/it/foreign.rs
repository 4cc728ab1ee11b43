//! Messages as other programs may send them, with what a recursive parser would die of or drop without a word.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::Duration;

use coney::{App, Error, FieldTable, FieldValue, RetryPolicy};

use crate::contract;
use crate::raw::{Raw, frame, long, method, short};
use crate::support::{Broker, PATIENCE, queue, wait_until};

contract! {
    text_that_is_not_utf8_arrives_as_bytes_and_what_is_behind_it_is_intact,
    properties_and_keys_that_are_not_utf8_do_not_cost_the_connection,
    headers_of_a_hundred_and_twenty_eight_levels_are_read_whole,
}

/// In `property-flags`.
const CONTENT_TYPE: u16 = 1 << 15;
const HEADERS: u16 = 1 << 13;

/// A field of a table: name, type, value.
fn field(name: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
    [&[name.len() as u8], name, &[tag], value].concat()
}

/// A raw message to amq.topic: routing key, property flags, properties; an empty body.
fn publish(broker: Broker, key: &[u8], flags: u16, properties: &[u8]) {
    let mut raw = Raw::open(SocketAddr::from(([127, 0, 0, 1], broker.parameters().port)));
    let arguments = [&[0, 0][..], &short("amq.topic"), &[key.len() as u8], key, &[0]].concat();
    let header = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &flags.to_be_bytes()[..], properties].concat();
    raw.send(&[method(1, (60, 40), &arguments), frame(2, 1, &header)].concat());
    // A channel is served in order: the message has been routed when this is answered.
    raw.say(1, (20, 40), &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
    assert_eq!(raw.method().0, (20, 41));
    raw.close();
}

/// A queue that gets what is published with its name as the routing key, or with its name, a dot and more.
fn bound_queue(app: &App) -> String {
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "foreign");
    connection.queue_bind(&name, "amq.topic", &format!("{name}.#")).unwrap();
    name
}

/// Publishes headers with this content, and gives them back as they arrive.
fn headers_through(broker: Broker, content: &[u8]) -> FieldTable {
    let app = broker.app("");
    let name = bound_queue(&app);
    let connection = app.listen_pool().connection().unwrap();
    publish(broker, name.as_bytes(), HEADERS, &long(content));
    let received = connection.get_and_ack(&name).unwrap().expect("the message");
    // The connection that brought it is none the worse.
    assert!(connection.get(&name).unwrap().is_none());
    received.message().headers().clone()
}

/// Tables in one another, so many levels of them counted with the headers, around a number.
fn nested(levels: usize) -> Vec<u8> {
    let mut content = field(b"n", b'I', &[0, 0, 0, 7]);
    for _ in 1..levels {
        content = field(b"n", b'F', &long(&content));
    }
    content
}

fn text_that_is_not_utf8_arrives_as_bytes_and_what_is_behind_it_is_intact(broker: Broker) {
    let content = [
        field(b"before", b'S', &long("grün".as_bytes())),
        field(b"latin", b'S', &long(b"gr\xfcn")),
        field(b"list", b'A', &long(&[&b"S"[..], &long(b"\xff")].concat())),
        field(b"after", b'S', &long(b"here")),
    ];
    let headers = headers_through(broker, &content.concat());
    assert_eq!(headers["before"], FieldValue::String("grün".to_owned()));
    assert_eq!(headers["latin"], FieldValue::Bytes(b"gr\xfcn".to_vec()));
    assert_eq!(headers["list"], FieldValue::Array(vec![FieldValue::Bytes(vec![0xff])]));
    assert_eq!(headers["after"], FieldValue::String("here".to_owned()));
}

fn properties_and_keys_that_are_not_utf8_do_not_cost_the_connection(broker: Broker) {
    let app = broker.app("");
    let name = bound_queue(&app);
    let (seen, sees) = mpsc::channel();
    let listener = app
        .spawn_listener(&name, move |_, delivery| {
            seen.send((delivery.routing_key().to_owned(), delivery.message().content_type().map(str::to_owned)))
                .unwrap();
            Ok::<(), Error>(())
        })
        .unwrap();
    publish(broker, &[name.as_bytes(), b".k\xffy"].concat(), CONTENT_TYPE, b"\x08text/\xe9\xe8!");
    let connection = app.publish_pool().connection().unwrap();
    connection.publish("amq.topic", &format!("{name}.next"), "well").unwrap();
    let (key, content_type) = sees.recv_timeout(PATIENCE).unwrap();
    assert_eq!(key, format!("{name}.k?y"));
    assert_eq!(content_type.as_deref(), Some("text/??!"));
    assert_eq!(sees.recv_timeout(PATIENCE).unwrap().0, format!("{name}.next"));
    assert_eq!(listener.stats().recoveries, 0);
    listener.stop().unwrap();
}

fn headers_of_a_hundred_and_twenty_eight_levels_are_read_whole(broker: Broker) {
    let mut headers = headers_through(broker, &nested(128));
    for level in 1..128 {
        headers = match headers.remove("n") {
            Some(FieldValue::Table(inner)) => inner,
            other => panic!("level {level}: {other:?}"),
        };
    }
    assert_eq!(headers["n"], FieldValue::I32(7));
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_message_with_five_thousand_levels_of_headers_is_handled_and_can_be_tried_again() {
    let broker = Broker::RabbitMq;
    let app = broker.app("");
    let name = bound_queue(&app);
    publish(broker, name.as_bytes(), HEADERS, &long(&nested(5_000)));
    let (seen, sees) = mpsc::channel();
    let listener = app
        .listener(&name)
        .retry(RetryPolicy::new([Duration::from_millis(50)]).unwrap())
        .spawn(move |_, delivery| {
            seen.send(delivery.message().headers().clone()).unwrap();
            if delivery.message().headers().contains_key("coney-attempts") { Ok(()) } else { Err("not yet") }
        })
        .unwrap();
    for attempt in 1..=2 {
        let mut value = FieldValue::Table(sees.recv_timeout(PATIENCE).unwrap());
        let mut levels = 0;
        while let FieldValue::Table(mut table) = value {
            levels += 1;
            value = table.remove("n").unwrap();
        }
        assert!(matches!(value, FieldValue::Bytes(_)), "attempt {attempt}: {value:?}");
        assert_eq!(levels, 128, "attempt {attempt}");
    }
    wait_until("it is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    assert_eq!(listener.stats().recoveries, 0);
    listener.stop().unwrap();
}
