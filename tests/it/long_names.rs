//! Names in tables have no limit of 255 bytes. One that is longer than the name of anything is nobody's name, cut or not.

use coney::{Error, Exchange, FieldValue, Message, Queue};

use crate::contract;
use crate::support::{Broker, queue, unique, wait_until};

contract! {
    a_key_of_more_than_255_bytes_is_not_cut,
    an_exchange_with_more_than_255_bytes_is_none,
}

/// A name of 255 bytes that no other test uses, and the same with 45 bytes more.
fn names(what: &str) -> (String, String) {
    let mut name = unique(what);
    name.push_str(&"x".repeat(255 - name.len()));
    let long = format!("{name}.{}.end", "x".repeat(40));
    (name, long)
}

fn a_key_of_more_than_255_bytes_is_not_cut(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (key, long) = names("key");
    let exchange = unique("long-keys");
    connection.exchange_declare(&Exchange::topic(&exchange)).unwrap();
    connection.queue_declare(&Queue::new(&key)).unwrap();
    connection.queue_bind(&key, &exchange, &key).unwrap();
    let whole = queue(&connection, "whole-key");
    connection.queue_bind(&whole, &exchange, "*.*.end").unwrap();
    // Whoever has a whole one cannot get it: the key does not fit in a delivery.
    let copied = |key: &str| {
        let copies = FieldValue::Array(vec![FieldValue::String(key.to_owned())]);
        Message::new("m").with_header("CC", copies)
    };
    let error = connection.publish("", "nowhere", copied(&long)).unwrap_err();
    assert!(matches!(error, Error::Returned { .. }), "{error}");
    connection.publish(&exchange, "nowhere", copied(&long)).unwrap();
    assert_eq!((broker.queue_len(&key), broker.queue_len(&whole)), (0, 1));
    connection.publish("", "nowhere", copied(&key)).unwrap();
    assert_eq!(broker.queue_len(&key), 1, "one of 255 bytes is a name");

    let from = unique("long-dead");
    let dead = Queue::new(&from).dead_letter_exchange(&exchange);
    connection.queue_declare(&dead.argument("x-dead-letter-routing-key", long.as_str())).unwrap();
    connection.publish("", &from, "m").unwrap();
    connection.get(&from).unwrap().expect("the message").reject().unwrap();
    wait_until("it has been buried", || broker.queue_len(&whole) == 2);
    assert_eq!(broker.queue_len(&key), 1, "a dead letter's key");
}

fn an_exchange_with_more_than_255_bytes_is_none(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, long) = names("exchange");
    connection.exchange_declare(&Exchange::fanout(&name)).unwrap();
    let bound = queue(&connection, "bound");
    connection.queue_bind(&bound, &name, "").unwrap();

    let first = unique("first");
    connection.exchange_declare(&Exchange::fanout(&first).argument("alternate-exchange", long.as_str())).unwrap();
    let error = connection.publish(&first, "", "m").unwrap_err();
    assert!(matches!(error, Error::Returned { .. }), "an alternate exchange: {error}");

    let from = unique("from");
    connection.queue_declare(&Queue::new(&from).argument("x-dead-letter-exchange", long.as_str())).unwrap();
    connection.publish("", &from, "m").unwrap();
    connection.get(&from).unwrap().expect("the message").reject().unwrap();
    wait_until("it has gone", || broker.queue_len(&from) + broker.queue_unacked(&from) == 0);
    assert_eq!(broker.queue_len(&bound), 0, "a dead letter exchange");
}
