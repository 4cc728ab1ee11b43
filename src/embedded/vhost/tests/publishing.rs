//! Where messages go, and what publishers hear.

use std::time::{Duration, Instant};

use super::bench::{Client, later, table, vhost};
use crate::amqp::ShortString;
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

fn exchange(client: &Client, name: &str, kind: &str, arguments: &[(&str, Value)]) {
    client.does(ExchangeDeclare {
        exchange: name.into(),
        kind: kind.into(),
        no_wait: true,
        arguments: table(arguments),
        ..Default::default()
    });
}

fn bind(client: &Client, queue: &str, exchange: &str, key: &str) {
    client.does(QueueBind {
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: key.into(),
        no_wait: true,
        ..Default::default()
    });
}

fn bind_exchange(client: &Client, destination: &str, source: &str) {
    client.does(ExchangeBind {
        destination: destination.into(),
        source: source.into(),
        no_wait: true,
        ..Default::default()
    });
}

#[test]
fn confirms_come_together_but_for_those_owed_before_a_return() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.does(ConfirmSelect { no_wait: false });
    client.publishes("q", "1");
    client.publishes("nowhere", "2");
    client.publishes("q", "3");
    assert_eq!(client.hears(), ["ConfirmSelectOk", "ack 1", "return NO_ROUTE 2", "ack 3*"]);
    client.publishes("q", "4");
    assert_eq!(client.hears(), ["ack 4"]);
}

#[test]
fn nacked_delayed_and_withheld() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.does(ConfirmSelect { no_wait: true });
    vhost.nack_next(1);
    client.publishes("q", "1");
    client.publishes("q", "2");
    assert_eq!(client.hears(), ["nack 1", "ack 2"]);
    vhost.delay_confirms(Some(Duration::from_secs(10)));
    client.publishes("q", "3");
    vhost.delay_confirms(None);
    client.publishes("q", "4");
    assert!(client.hears().is_empty());
    later(&vhost, Duration::from_secs(11));
    assert_eq!(client.hears(), ["ack 4*"]);
    vhost.withhold_confirms(true);
    client.publishes("q", "5");
    assert!(client.hears().is_empty());
    vhost.withhold_confirms(false);
    assert_eq!(client.hears(), ["ack 5"]);
    assert_eq!(vhost.queue("q").unwrap().ready, 4);
}

#[test]
fn a_circle_of_exchanges_delivers_once() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    exchange(&client, "a", "fanout", &[]);
    exchange(&client, "b", "fanout", &[]);
    bind_exchange(&client, "a", "b");
    bind_exchange(&client, "b", "a");
    bind(&client, "q", "a", "");
    bind(&client, "q", "b", "");
    client.publishes_with("a", "", "m", &Properties::default()).unwrap();
    assert_eq!(vhost.queue("q").unwrap().ready, 1);
}

#[test]
fn what_cannot_be_routed_goes_to_the_alternate() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    exchange(&client, "main", "direct", &[("alternate-exchange", Value::text("spare"))]);
    client.publishes_with("main", "k", "1", &Properties::default()).unwrap();
    exchange(&client, "spare", "fanout", &[]);
    bind(&client, "q", "spare", "");
    client.publishes_with("main", "k", "2", &Properties::default()).unwrap();
    assert_eq!(client.hears(), ["return NO_ROUTE 1"]);
    assert_eq!(vhost.queue("q").unwrap().ready, 1);
}

#[test]
fn an_auto_delete_exchange_goes_with_its_last_binding() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    let declare = |name: &str| ExchangeDeclare {
        exchange: name.into(),
        kind: "fanout".into(),
        auto_delete: true,
        no_wait: true,
        ..Default::default()
    };
    client.does(declare("a"));
    client.does(declare("b"));
    bind_exchange(&client, "b", "a");
    bind(&client, "q", "b", "");
    client.does(QueueDelete { queue: "q".into(), no_wait: true, ..Default::default() });
    assert!(vhost.exchanges().iter().all(|exchange| exchange.name.starts_with("amq.")), "b went, and a with it");
}

#[test]
fn copies_are_sent_and_blind_ones_not_shown() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    for queue in ["a", "b", "c"] {
        client.declares(queue, &[]);
    }
    let keys = |key: &str| Value::Array(vec![Value::text(key)]);
    let headers = table(&[("CC", keys("b")), ("BCC", keys("c"))]);
    client.publishes_with("", "a", "m", &Properties { headers: Some(headers), ..Default::default() }).unwrap();
    for queue in ["a", "b", "c"] {
        client.does(BasicGet { queue: queue.into(), no_ack: true, ..Default::default() });
        let (_, properties, _) = client.reads().remove(0);
        assert_eq!(properties.headers, Some(table(&[("CC", keys("b"))])), "{queue}");
    }
    let wrong = Properties { headers: Some(Table::default().with("CC", Value::text("b"))), ..Default::default() };
    let text = client.publishes_with("", "a", "m", &wrong).unwrap_err().text;
    assert_eq!(text, "PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,\"CC\",longstr}");
}

#[test]
fn an_answer_reaches_who_asked() {
    let vhost = vhost();
    let (asker, server) = (Client::new(&vhost), Client::new(&vhost));
    asker.declares("rpc", &[]);
    asker.consumes_with("amq.rabbitmq.reply-to", "r", true, &[]);
    let question = Properties { reply_to: Some("amq.rabbitmq.reply-to".into()), ..Default::default() };
    asker.publishes_with("", "rpc", "?", &question).unwrap();
    server.consumes_with("rpc", "s", true, &[]);
    let (_, properties, _) = server.reads().remove(0);
    let address: ShortString = properties.reply_to.unwrap();
    let passive = QueueDeclare { queue: address.clone(), passive: true, ..Default::default() };
    server.does(passive.clone());
    assert_eq!(server.hears(), [format!("declared {address} 0 1")]);
    server.publishes(&address.to_string(), "!");
    assert_eq!(asker.hears(), ["deliver r 1 !"]);
    assert_eq!(server.hears(), ["return NO_ROUTE !"], "to RabbitMQ an answer is routed nowhere");
    vhost.close_channel(asker.key);
    assert_eq!(server.fails(passive), format!("NOT_FOUND - no queue '{address}' in vhost '/'"));
}

/// Not a measurement, only a guard against something quadratic.
#[test]
fn many_messages_are_no_trouble() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.does(ConfirmSelect { no_wait: true });
    let started = Instant::now();
    for _ in 0..100_000 {
        client.publishes("q", "m");
    }
    client.consumes("q", "c");
    vhost.close_channel(client.key);
    assert_eq!(vhost.queue("q").unwrap().ready, 100_000);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}
