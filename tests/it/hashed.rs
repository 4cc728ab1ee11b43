//! Exchanges of the type `x-consistent-hash`: who gets which messages, whatever the hash.

use std::time::UNIX_EPOCH;

use coney::{Connection, Error, Exchange, ExchangeKind, FieldValue, Message, Queue};

use crate::contract;
use crate::support::{Broker, bodies, drain, unique, wait_until};

contract! {
    the_same_key_goes_to_the_same_queue,
    weights_count_and_a_second_binding_does_not,
    who_comes_takes_from_the_others_and_gives_nothing_between_them,
    headers_and_properties_are_hashed_in_the_place_of_the_key,
    a_message_goes_nowhere_without_a_binding,
    wrong_arguments_and_weights_are_refused_in_rabbitmqs_words,
}

const MANY: u32 = 600;

fn exchange(connection: &Connection, with: impl FnOnce(Exchange) -> Exchange) -> String {
    let name = unique("hash");
    let exchange = Exchange::new(&name, ExchangeKind::Custom("x-consistent-hash".to_owned()));
    connection.exchange_declare(&with(exchange)).unwrap();
    name
}

/// A queue bound with this weight.
fn bound(connection: &Connection, exchange: &str, weight: &str) -> String {
    let name = unique("hashed");
    connection.queue_declare(&Queue::new(&name)).unwrap();
    connection.queue_bind(&name, exchange, weight).unwrap();
    name
}

/// Publishes many messages that are made of a number each, and tells what each of the queues has got of them.
fn publish(
    connection: &Connection,
    exchange: &str,
    queues: &[String],
    message: impl Fn(u32) -> (String, Message),
) -> Vec<Vec<String>> {
    for number in 0..MANY {
        let (key, message) = message(number);
        connection.publish(exchange, &key, message).unwrap();
    }
    queues.iter().map(|queue| bodies(&drain(connection, queue))).collect()
}

fn by_key(number: u32) -> (String, Message) {
    (format!("key-{number}"), Message::new(number.to_string()))
}

fn sum(got: &[Vec<String>]) -> usize {
    got.iter().map(Vec::len).sum()
}

fn the_same_key_goes_to_the_same_queue(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let exchange = exchange(&connection, |exchange| exchange);
    let queues = [(); 3].map(|()| bound(&connection, &exchange, "1"));
    let first = publish(&connection, &exchange, &queues, by_key);
    assert_eq!(sum(&first), MANY as usize, "each goes to one queue");
    assert!(
        first.iter().all(|got| (100..300).contains(&got.len())),
        "{:?}",
        first.iter().map(Vec::len).collect::<Vec<_>>()
    );
    assert_eq!(publish(&connection, &exchange, &queues, by_key), first);
    // Other keys in `CC` do not count.
    let with_cc = |number| {
        let (key, message) = by_key(number);
        (key, message.with_header("CC", FieldValue::Array(vec![format!("other-{number}").into()])))
    };
    assert_eq!(publish(&connection, &exchange, &queues, with_cc), first);
}

fn weights_count_and_a_second_binding_does_not(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let exchange = exchange(&connection, |exchange| exchange);
    let queues = ["1", "3"].map(|weight| bound(&connection, &exchange, weight));
    let got = publish(&connection, &exchange, &queues, by_key);
    assert!((75..225).contains(&got[0].len()), "a quarter: {}", got[0].len());
    connection.queue_bind(&queues[0], &exchange, "50").unwrap();
    assert_eq!(publish(&connection, &exchange, &queues, by_key), got);
    // Without the one that counts there is nothing for it.
    connection.queue_unbind(&queues[0], &exchange, "1").unwrap();
    let got = publish(&connection, &exchange, &queues, by_key);
    assert_eq!([got[0].len(), got[1].len()], [0, MANY as usize]);
}

fn who_comes_takes_from_the_others_and_gives_nothing_between_them(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let exchange = exchange(&connection, |exchange| exchange);
    let mut queues: Vec<String> = (0..3).map(|_| bound(&connection, &exchange, "1")).collect();
    let before = publish(&connection, &exchange, &queues, by_key);
    queues.push(bound(&connection, &exchange, "1"));
    let after = publish(&connection, &exchange, &queues, by_key);
    assert_eq!(sum(&after), MANY as usize);
    assert!((75..250).contains(&after[3].len()), "a quarter: {}", after[3].len());
    for (before, after) in before.iter().zip(&after) {
        assert!(after.iter().all(|body| before.contains(body)));
    }
}

fn headers_and_properties_are_hashed_in_the_place_of_the_key(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let spreads = |argument: &str, value: &str, vary: &dyn Fn(Message, u32) -> Message| {
        let exchange = exchange(&connection, |exchange| exchange.argument(argument, value));
        let queues = [(); 2].map(|()| bound(&connection, &exchange, "1"));
        let got = publish(&connection, &exchange, &queues, |number| {
            ("one key".to_owned(), vary(Message::new(number.to_string()), number))
        });
        assert_eq!(sum(&got), MANY as usize);
        let is_spread = got.iter().all(|got| got.len() > 100);
        // Those that have it not go the same way, whatever their key.
        let got = publish(&connection, &exchange, &queues, |number| (number.to_string(), Message::new("none")));
        let is_together = got.iter().any(|got| got.len() == MANY as usize);
        is_spread && is_together
    };
    assert!(spreads("hash-header", "customer", &|message, number| message.with_header("customer", number.to_string())));
    assert!(spreads("hash-header", "customer", &|message, number| message.with_header("customer", i64::from(number))));
    assert!(
        spreads("hash-property", "correlation_id", &|message, number| message.with_correlation_id(number.to_string()))
    );
    let at = |number: u32| UNIX_EPOCH + std::time::Duration::from_secs(number.into());
    assert!(spreads("hash-property", "timestamp", &|message, number| message.with_timestamp(at(number))));
}

fn a_message_goes_nowhere_without_a_binding(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let exchange = exchange(&connection, |exchange| exchange);
    let unroutable = || matches!(connection.publish(&exchange, "k", "m"), Err(Error::Returned { .. }));
    assert!(unroutable());
    let queue = bound(&connection, &exchange, "1");
    connection.publish(&exchange, "k", "m").unwrap();
    connection.queue_delete(&queue).unwrap();
    wait_until("the binding has gone", unroutable);
    // By way of another exchange.
    let fanout = unique("fanout");
    connection.exchange_declare(&Exchange::new(&fanout, ExchangeKind::Fanout)).unwrap();
    let queue = bound(&connection, &fanout, "");
    connection.exchange_bind(&fanout, &exchange, "7").unwrap();
    connection.publish(&exchange, "k", "by the fanout").unwrap();
    assert_eq!(bodies(&drain(&connection, &queue)), ["by the fanout"]);
}

fn wrong_arguments_and_weights_are_refused_in_rabbitmqs_words(broker: Broker) {
    let app = broker.hashing().app("");
    let connection = app.publish_pool().connection().unwrap();
    let hashed = |name: &str| Exchange::new(name, ExchangeKind::Custom("x-consistent-hash".to_owned()));
    for (exchange, text) in [
        (hashed(&unique("hash")).argument("hash-property", "app_id"), "Unsupported property: app_id"),
        (hashed(&unique("hash")).argument("hash-property", ""), "Unsupported property: "),
        (
            hashed(&unique("hash")).argument("hash-property", "app_id").argument("hash-header", "h"),
            "hash-header and hash-property are mutually exclusive",
        ),
    ] {
        let error = connection.exchange_declare(&exchange).unwrap_err();
        assert!(error.code() == Some(406), "{error}");
        assert!(error.to_string().contains(&format!("PRECONDITION_FAILED - {text}")), "{error}");
    }
    let name = exchange(&connection, |exchange| exchange.argument("hash-header", "h"));
    let queue = bound(&connection, &name, "1");
    for (weight, text) in [
        ("0", "The binding key must be greater than 0"),
        ("-1", "The binding key must be greater than 0"),
        ("", "The binding key must be an integer: <<>>"),
        ("a", "The binding key must be an integer: <<\"a\">>"),
        ("1.5", "The binding key must be an integer: <<\"1.5\">>"),
        ("1 ", "The binding key must be an integer: <<\"1 \">>"),
    ] {
        let error = connection.queue_bind(&queue, &name, weight).unwrap_err();
        assert!(error.code() == Some(406), "{error}");
        assert!(error.to_string().contains(&format!("PRECONDITION_FAILED - {text}")), "{error}");
    }
    // What is hashed is not compared, and the type is.
    connection.exchange_declare(&hashed(&name).argument("hash-property", "message_id")).unwrap();
    let error = connection.exchange_declare(&Exchange::new(&name, ExchangeKind::Fanout)).unwrap_err().to_string();
    assert!(error.contains("received 'fanout' but current is ''x-consistent-hash''"), "{error}");
}
