//! What a broker lets through only so far: sizes of messages, and returns to a quorum queue.

use std::sync::mpsc;

use coney::embedded::EmbeddedBroker;
use coney::{Delivery, Error, Message, Outcome, Queue};

use crate::contract;
use crate::logs;
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    [by release:
        a_body_that_has_been_refused_once_is_not_sent_again,
        a_message_is_warned_of_before_its_queue_gives_it_up,
    ]
}

/// One more than fits in a message of RabbitMQ 4, unless it is set otherwise.
const TOO_LARGE: usize = (16 << 20) + 1;

fn is_told_by_broker(error: &Error) -> bool {
    matches!(error, Error::ChannelClosed { code: 406, .. })
}

fn a_body_that_has_been_refused_once_is_not_sent_again(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "large");
    let first = connection.publish("", &name, vec![0; TOO_LARGE]);
    if !broker.is_4() {
        // There it fits.
        first.unwrap();
        return;
    }
    let error = first.unwrap_err();
    assert!(is_told_by_broker(&error), "{error}");
    let error = connection.publish("", &name, vec![0; TOO_LARGE]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("message body: {TOO_LARGE} bytes, expected at most 16777216, as the broker has said")
    );
    assert!(!error.is_transient());
    // Those beside it in a batch do not suffer from it.
    let batch = [vec![1], vec![0; TOO_LARGE], vec![2]];
    let Error::Batch(failed) =
        connection.publish_batch(batch.into_iter().map(|body| ("", name.as_str(), body))).unwrap_err()
    else {
        panic!("no batch error")
    };
    assert!(matches!(failed.error_at(1), Some(Error::InvalidArgument { .. })), "{failed}");
    assert!(failed.error_at(0).is_none() && failed.error_at(2).is_none(), "{failed}");
    assert_eq!(broker.queue_len(&name), 2);
}

#[test]
fn a_limit_that_was_told_holds_for_the_pool_until_it_connects_again() {
    let broker = EmbeddedBroker::builder().max_message_size(100).start().unwrap();
    let app = app(&broker.url(), "");
    let pool = app.publish_pool();
    let (one, other) = (pool.connection().unwrap(), pool.connection().unwrap());
    let name = queue(&one, "small");
    one.publish("", &name, vec![0; 100]).unwrap();
    assert!(is_told_by_broker(&one.publish("", &name, vec![0; 101]).unwrap_err()));
    for connection in [&one, &other] {
        let error = connection.publish("", &name, vec![0; 101]).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        connection.publish("", &name, vec![0; 100]).unwrap();
    }
    // Where the limit is another, it is found out anew.
    let third = pool.connection().unwrap();
    assert!(is_told_by_broker(&third.publish("", &name, vec![0; 101]).unwrap_err()));
    let error = one.publish("", &name, vec![0; 101]).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
}

#[test]
fn a_call_that_is_too_large_is_told_likewise() {
    let broker = EmbeddedBroker::builder().max_message_size(100).start().unwrap();
    let app = app(&broker.url(), "");
    let client = coney::rpc::RpcClient::new(&app).unwrap();
    // It is compressed.
    let numbers: String = (0..1000).map(|number| number.to_string()).collect();
    let call = || client.call::<_, String>("nobody", &numbers).unwrap_err();
    let error = call();
    assert!(is_told_by_broker(&error), "{error}");
    let error = call();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
}

fn a_message_is_warned_of_before_its_queue_gives_it_up(broker: Broker) {
    logs::keep();
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    for (limit, declared, last) in [(Some(4), true, 4), (None, false, if broker.is_4() { 20 } else { 30 })] {
        let (name, listener) = (unique("limited"), unique("listener"));
        let queue = Queue::new(&name).quorum();
        let queue = limit.map_or(queue.clone(), |limit| queue.delivery_limit(limit));
        connection.queue_declare(&queue).unwrap();
        connection.publish("", &name, "m").unwrap();
        let (seen, counts) = mpsc::channel();
        let mut builder = app.listener(&name).name(&listener).without_retry();
        if declared {
            builder = builder.topology(coney::Topology::new().queue(queue));
        }
        let spawned = builder
            .spawn(move |_, delivery: &Delivery| {
                let count = delivery.message().header_i64("x-delivery-count").unwrap_or(0);
                // Where there is no limit, that is enough to see that nothing is said.
                let _ = seen.send(count);
                if count < 30 { Outcome::Requeue } else { Outcome::Ack }
            })
            .unwrap();
        for wanted in 0..=last {
            assert_eq!(counts.recv_timeout(PATIENCE), Ok(wanted), "{name}");
        }
        wait_until("the message is gone", || broker.queue_len(&name) == 0 && broker.queue_unacked(&name) == 0);
        spawned.stop().unwrap();
        assert!(counts.try_recv().is_err());
        let warned: Vec<String> = logs::of_listener(&listener)
            .into_iter()
            .filter(|line| line.level == log::Level::Warn && line.text.contains("has come back"))
            .map(|line| line.text)
            .collect();
        let wanted = match (limit, broker.is_4()) {
            (Some(_), _) => 3..=4,
            (None, true) => 15..=20,
            (None, false) => {
                assert!(warned.is_empty(), "{warned:?}");
                continue;
            }
        };
        assert_eq!(warned.len(), wanted.clone().count(), "{warned:?}");
        for (text, count) in warned.iter().zip(wanted) {
            let says = format!("has come back {count} times; after {last} the broker dead-letters it, or drops it");
            assert!(text.contains(&says), "{text}");
        }
    }
}

#[test]
fn integers_in_headers_are_read_whatever_their_width() {
    let message = Message::new("m").with_header("small", 7_u8).with_header("large", -7_i64).with_header("text", "7");
    assert_eq!([message.header_i64("small"), message.header_i64("large")], [Some(7), Some(-7)]);
    assert_eq!([message.header_i64("text"), message.header_i64("none")], [None, None]);
    assert_eq!([message.header_str("text"), message.header_str("small")], [Some("7"), None]);
}
