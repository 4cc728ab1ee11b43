//! One message at a time: Ok means confirmed, everything else is a typed error from that same call.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coney::embedded::EmbeddedBroker;
use coney::{App, Error, Exchange, FieldTable, FieldValue, Message, Overflow, Queue};

use crate::contract;
use crate::listener::publish_numbers;
use crate::logs;
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract! {
    a_batch_whose_iterator_panics_costs_the_next_borrower_nothing,
    a_batch_that_has_no_chance_leaves_the_rest_in_the_iterator,
    a_number_that_is_not_finite_is_refused_before_it_is_sent,
    every_other_value_is_sent_at_its_ends,
    a_destructor_of_a_thread_local_may_publish,
    smoke,
    a_missing_exchange_is_404_from_that_call_and_the_guard_goes_on,
    unroutable_is_returned_with_code_and_text,
    a_full_queue_nacks_exactly_what_it_does_not_take,
    a_channel_that_goes_on_refusing_is_replaced_and_no_more_than_once_a_second,
    what_is_not_allowed_is_403,
    every_property_and_header_type_arrives,
    json_goes_through_as_the_type_it_was,
    bodies_of_all_sizes_arrive_whole,
    what_cannot_go_on_the_wire_is_refused_by_name_and_nothing_is_sent,
    what_the_broker_would_close_the_channel_for_is_refused_before,
    headers_nested_too_deep_are_refused_before_they_are_sent,
    headers_just_within_the_frame_pass,
    an_unknown_user_id_is_refused_with_the_brokers_words,
    an_exchange_that_goes_away_is_noticed_by_the_next_publish,
}

fn smoke(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "smoke");
    connection.publish("", &queue, "hello").unwrap();
    assert_eq!(broker.queue_len(&queue), 1);
    let received = connection.get_and_ack(&queue).unwrap().expect("a message");
    assert_eq!(received.body(), b"hello");
    assert_eq!((received.exchange(), received.routing_key()), ("", queue.as_str()));
    assert!(!received.redelivered());
    assert_eq!(received.remaining(), Some(0));
    assert_eq!(connection.get_and_ack(&queue).unwrap(), None);
}

fn a_missing_exchange_is_404_from_that_call_and_the_guard_goes_on(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "after404");
    let missing = unique("missing");
    for _ in 0..3 {
        match connection.publish(&missing, "key", "lost").unwrap_err() {
            Error::ChannelClosed { code: 404, text, during } => {
                assert!(text.contains(&format!("no exchange '{missing}'")), "{text}");
                assert!(during.contains(&missing), "{during}");
            }
            other => panic!("unexpected: {other}"),
        }
        connection.publish("", &queue, "kept").unwrap();
    }
    assert_eq!(drain(&connection, &queue).len(), 3);
    drop(connection);
    assert_eq!(app.publish_pool().status().discarded, 0, "a channel error costs a channel, not a connection");
}

fn unroutable_is_returned_with_code_and_text(broker: Broker) {
    let app = broker.app("[pools.lax]\nmandatory = false");
    let connection = app.publish_pool().connection().unwrap();
    let nowhere = unique("nowhere");
    match connection.publish("", &nowhere, "x").unwrap_err() {
        Error::Returned { code, text, exchange, routing_key } => {
            assert_eq!((code, text.as_str()), (312, "NO_ROUTE"));
            assert_eq!((exchange.as_str(), routing_key.as_str()), ("", nowhere.as_str()));
        }
        other => panic!("unexpected: {other}"),
    }
    // The next message is not mistaken for it.
    let queue = queue(&connection, "routed");
    connection.publish("", &queue, "y").unwrap();
    // A pool that does not insist gets Ok: the broker has dealt with the message.
    app.pool("lax").unwrap().connection().unwrap().publish("", &nowhere, "x").unwrap();
}

fn a_full_queue_nacks_exactly_what_it_does_not_take(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = unique("full");
    connection.queue_declare(&Queue::new(&name).max_length(10).overflow(Overflow::RejectPublish)).unwrap();
    let outcomes: Vec<_> = (0..15).map(|n| connection.publish("", &name, n.to_string())).collect();
    let nacked = outcomes.iter().filter(|outcome| matches!(outcome, Err(Error::Nacked { .. }))).count();
    let ok: Vec<String> =
        outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_ok()).map(|(n, _)| n.to_string()).collect();
    assert_eq!((ok.len(), nacked), (10, 5));
    assert_eq!(bodies(&drain(&connection, &name)), ok);
}

fn a_channel_that_goes_on_refusing_is_replaced_and_no_more_than_once_a_second(broker: Broker) {
    logs::keep();
    let (pool, full) = (unique("refused"), unique("full"));
    let app = broker.app(&format!("[pools.{pool}]"));
    let connection = app.pool(&pool).unwrap().connection().unwrap();
    connection.queue_declare(&Queue::new(&full).max_length(1).overflow(Overflow::RejectPublish)).unwrap();
    // Before the first channel is opened, whose first second counts.
    let start = Instant::now();
    connection.publish("", &full, "it").unwrap();
    let (mut sent, told) = (0, Arc::new(AtomicUsize::new(0)));
    wait_until("it is replaced twice", || {
        let error = connection.publish("", &full, "sync").unwrap_err();
        assert!(matches!(error, Error::Nacked { .. }), "{error}");
        let told = Arc::clone(&told);
        connection.publish_async("", &full, "async", move |outcome| {
            assert!(matches!(outcome, Err(Error::Nacked { .. })), "{outcome:?}");
            told.fetch_add(1, Ordering::Relaxed);
        });
        connection.flush(PATIENCE).unwrap();
        sent += 1;
        logs::lines_with(&format!("coney {pool} #1: its publishing channel goes on refusing")).len() >= 2
    });
    assert!(start.elapsed() >= Duration::from_secs(2), "it took {:?}", start.elapsed());
    assert_eq!(told.load(Ordering::Relaxed), sent);
    assert_eq!(bodies(&drain(&connection, &full)), ["it"]);
    connection.publish("", &full, "there is room").unwrap();
    drop(connection);
    assert_eq!(app.pool(&pool).unwrap().status().discarded, 0);
}

fn what_is_not_allowed_is_403(broker: Broker) {
    let app = crate::support::app(&broker.reader_url(), "");
    let connection = app.publish_pool().connection().unwrap();
    for (what, error) in [
        ("write", connection.publish("amq.direct", "k", "x").unwrap_err()),
        ("declare", connection.queue_declare(&Queue::new(unique("denied"))).map(drop).unwrap_err()),
    ] {
        assert!(matches!(error, Error::ChannelClosed { code: 403, .. }), "{what}: {error}");
        assert!(!error.is_transient() && !error.to_string().contains("reader-pw"));
    }
}

fn every_property_and_header_type_arrives(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "properties");
    let nested: FieldTable = [("inner".to_owned(), FieldValue::Array(vec![1.into(), "two".into()]))].into();
    let message = Message::new("body")
        .with_content_type("text/plain")
        .with_content_encoding("identity")
        .with_priority(7)
        .with_correlation_id("corr")
        .with_reply_to("reply")
        .with_expiration(Duration::from_secs(600))
        .with_message_id("id")
        .with_timestamp(UNIX_EPOCH + Duration::from_secs(1_700_000_000))
        .with_kind("kind")
        .with_user_id("guest")
        .with_app_id("app")
        .with_cluster_id("")
        .with_header("bool", true)
        .with_header("i8", -8_i8)
        .with_header("u8", 200_u8)
        .with_header("i16", -1600_i16)
        .with_header("u16", 60_000_u16)
        .with_header("i32", -32_i32)
        .with_header("u32", 4_000_000_000_u32)
        .with_header("i64", i64::MIN)
        .with_header("f32", 1.5_f32)
        .with_header("f64", -2.25_f64)
        .with_header("decimal", FieldValue::Decimal { scale: 2, value: 314 })
        .with_header("string", "grüße")
        .with_header("bytes", vec![0_u8, 255, 128])
        .with_header("timestamp", FieldValue::Timestamp(1_700_000_000))
        .with_header("table", nested)
        .with_header("void", FieldValue::Void);
    connection.publish("", &queue, message.clone()).unwrap();
    let received = connection.get_and_ack(&queue).unwrap().unwrap();
    assert_eq!(received.message(), &message);
    assert!(message.is_persistent());

    let message = Message::new("").transient();
    connection.publish("", &queue, message.clone()).unwrap();
    assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().into_message(), message);
}

fn json_goes_through_as_the_type_it_was(broker: Broker) {
    #[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
    struct Order {
        id: u64,
        lines: Vec<String>,
    }
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "json");
    let order = Order { id: 7, lines: vec!["a".into(), "ü".into()] };
    connection.publish("", &queue, Message::json(&order).unwrap()).unwrap();
    let received = connection.get_and_ack(&queue).unwrap().unwrap().into_message();
    assert_eq!(received.content_type(), Some("application/json"));
    assert_eq!(received.decode_json::<Order>().unwrap(), order);
    assert!(matches!(received.decode_json::<u32>(), Err(Error::Json { .. })));
}

fn bodies_of_all_sizes_arrive_whole(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "sizes");
    let frame = 131_072 - 8;
    for size in [0, 1, frame - 1, frame, frame + 1, 2 * frame, 5_000_000] {
        let body: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        connection.publish("", &queue, body.clone()).unwrap();
        let received = connection.get_and_ack(&queue).unwrap().unwrap();
        assert!(received.body() == body, "body of {size} bytes differs");
    }
}

fn what_cannot_go_on_the_wire_is_refused_by_name_and_nothing_is_sent(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let long = "x".repeat(256);
    let many = (0..2_000).map(|n| (format!("header{n}"), FieldValue::from("y".repeat(100)))).collect();
    for (expected, error) in [
        ("routing key", connection.publish("", &long, "m").unwrap_err()),
        ("exchange name", connection.publish(&long, "k", "m").unwrap_err()),
        ("message_id", connection.publish("", "k", Message::new("m").with_message_id(&*long)).unwrap_err()),
        ("field name", connection.publish("", "k", Message::new("m").with_header(&*long, 1)).unwrap_err()),
        ("message headers", connection.publish("", "k", Message::new("m").with_headers(many)).unwrap_err()),
        ("queue name", connection.get(&long).map(drop).unwrap_err()),
    ] {
        assert!(matches!(&error, Error::InvalidArgument { what, .. } if what.contains(expected)), "{error}");
    }
    let queue = queue(&connection, "valid");
    connection.publish("", &queue, "still good").unwrap();
    drop(connection);
    assert_eq!(app.publish_pool().status().discarded, 0);
}

fn what_the_broker_would_close_the_channel_for_is_refused_before(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "in-range");
    let ten_years = Duration::from_secs(10 * 365 * 86_400);
    let expiring = |after: Duration| Message::new("m").with_expiration(after);
    // The longest that the broker takes is not refused.
    connection.publish("", &queue, expiring(ten_years)).unwrap();
    let keys = FieldValue::Array(vec![FieldValue::from("copied")]);
    connection.publish("", &queue, Message::new("m").with_header("CC", keys)).unwrap();
    assert_eq!(drain(&connection, &queue).len(), 2);
    let refused = [
        ("expiration", expiring(ten_years + Duration::from_millis(1)), "0 to 315360000000 milliseconds"),
        ("expiration", expiring(Duration::MAX), "0 to 315360000000 milliseconds"),
        ("header CC", Message::new("m").with_header("CC", "key"), "an array of routing keys"),
        ("header BCC", Message::new("m").with_header("BCC", 1), "an array of routing keys"),
        ("reply_to", Message::new("m").with_reply_to("amq.rabbitmq.reply-to"), "expected a queue"),
    ];
    for (what, message, expected) in refused {
        let (tell, told) = std::sync::mpsc::channel();
        for number in 0..20 {
            let (tell, message) = (tell.clone(), if number == 10 { message.clone() } else { Message::new("innocent") });
            connection.publish_async("", &queue, message, move |outcome| tell.send((number, outcome)).unwrap());
        }
        drop(tell);
        for (number, outcome) in told {
            match outcome {
                Err(Error::InvalidArgument { what: named, problem }) => {
                    assert!(number == 10 && named.contains(what) && problem.contains(expected), "{named}: {problem}");
                }
                outcome => assert!(number != 10 && outcome.is_ok(), "{what}, message {number}: {outcome:?}"),
            }
        }
        assert_eq!(drain(&connection, &queue).len(), 19);
        let error = app.publish_pool().publish("", &queue, message).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
}

fn headers_nested_too_deep_are_refused_before_they_are_sent(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "deep");
    let nested = |levels| {
        (2..=levels).fold(FieldValue::I32(7), |inner, level| match level % 2 {
            0 => FieldValue::Array(vec![inner]),
            _ => FieldValue::Table(FieldTable::from([("n".to_owned(), inner)])),
        })
    };
    connection.publish("", &name, Message::new("x").with_header("n", nested(128))).unwrap();
    let error = connection.publish("", &name, Message::new("x").with_header("n", nested(129))).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains("128 levels"), "{error}");
    let received = connection.get_and_ack(&name).unwrap().unwrap();
    assert_eq!(received.message().headers()["n"], nested(128));
}

fn headers_just_within_the_frame_pass(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "bigheaders");
    let message = Message::new("m")
        .with_timestamp(SystemTime::now())
        .with_header("big", "z".repeat(131_072 - 8 - 12 - 2 - 31 - 4 - 4 - 5));
    connection.publish("", &queue, message.clone()).unwrap();
    assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().message().headers(), message.headers());
}

fn an_unknown_user_id_is_refused_with_the_brokers_words(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "userid");
    let error = connection.publish("", &queue, Message::new("m").with_user_id("somebody")).unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 406, .. }), "{error}");
    assert!(error.to_string().contains("user_id property set to 'somebody'"), "{error}");
    connection.publish("", &queue, "m").unwrap();
}

fn an_exchange_that_goes_away_is_noticed_by_the_next_publish(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = unique("leaving");
    let queue = queue(&connection, "left");
    connection.exchange_declare(&Exchange::fanout(&name)).unwrap();
    connection.queue_bind(&queue, &name, "").unwrap();
    connection.publish(&name, "", "one").unwrap();
    connection.exchange_delete(&name, false).unwrap();
    assert_eq!(connection.publish(&name, "", "two").unwrap_err().code(), Some(404));
    connection.exchange_declare(&Exchange::fanout(&name)).unwrap();
    connection.queue_bind(&queue, &name, "").unwrap();
    connection.publish(&name, "", "three").unwrap();
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "three"]);
}

/// A buffer for each thread that sends what is left in it when the thread ends.
struct SendsAtTheEnd(Option<(App, String)>);

impl Drop for SendsAtTheEnd {
    fn drop(&mut self) {
        let Some((app, queue)) = self.0.take() else { return };
        app.publish_pool().publish("", &queue, "by the pool").unwrap();
        let connection = app.publish_pool().connection().unwrap();
        connection.publish("", &queue, "by a connection").unwrap();
        let (told, outcome) = mpsc::channel();
        connection.publish_async("", &queue, "asynchronously", move |result| told.send(result).unwrap());
        outcome.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().body(), b"before");
    }
}

fn a_destructor_of_a_thread_local_may_publish(broker: Broker) {
    thread_local! {
        static AT_THE_END: std::cell::RefCell<SendsAtTheEnd> = const { std::cell::RefCell::new(SendsAtTheEnd(None)) };
    }
    let app = broker.app("");
    app.before_publish(|_, message| Ok(message.with_app_id("hooked")));
    let name = queue(&app.publish_pool().connection().unwrap(), "last-words");
    let (in_thread, to) = (app.clone(), name.clone());
    // Made before the thread publishes anything, so destroyed after whatever publishing keeps for the thread.
    std::thread::spawn(move || {
        AT_THE_END.with_borrow_mut(|end| end.0 = Some((in_thread.clone(), to.clone())));
        in_thread.publish_pool().publish("", &to, "before").unwrap();
    })
    .join()
    .unwrap();
    let connection = app.publish_pool().connection().unwrap();
    let received = drain(&connection, &name);
    assert_eq!(bodies(&received), ["by the pool", "by a connection", "asynchronously"]);
    assert!(received.iter().all(|one| one.message().app_id() == Some("hooked")));
}

/// A channel that is opened gets the number of one that the broker has closed, and nothing else of it.
#[test]
fn a_refusal_is_told_to_those_it_is_for_however_often_its_channels_number_is_used() {
    const THREADS: usize = 8;
    let broker = EmbeddedBroker::builder().channel_max(40).start().unwrap();
    let app = crate::support::app(&broker.url(), "[pools.listen]\nprefetch = 4");
    let name = queue(&app.publish_pool().connection().unwrap(), "batches");
    let (told, outcomes) = mpsc::channel();
    let listener = app
        .listener(&name)
        .concurrency(THREADS)
        .spawn(move |context, delivery| {
            // An exchange of its own, so that the text tells whose refusal it is.
            let missing = format!("missing-{}", delivery.message().text().unwrap());
            let batch = (0..3).map(|n| (missing.as_str(), "k", n.to_string()));
            told.send((missing.clone(), context.connection().publish_batch(batch))).unwrap();
        })
        .unwrap();
    publish_numbers(&app, &name, 1000);
    for _ in 0..1000 {
        let (missing, outcome) = outcomes.recv_timeout(PATIENCE).unwrap();
        let Err(Error::Batch(batch)) = outcome else { panic!("{missing}: {outcome:?}") };
        assert_eq!((batch.confirmed, batch.failed.len()), (0, 3), "{missing}");
        for (position, error) in &batch.failed {
            let is_own =
                matches!(error, Error::ChannelClosed { code: 404, text, .. } if text.contains(&format!("'{missing}'")));
            assert!(is_own, "{missing}, {position}: {error}");
        }
    }
    assert_eq!(listener.stats().recoveries, 0, "the connection is well");
    assert_eq!(broker.control().connections().len(), 2);
}

/// RabbitMQ ends the connection of whoever sends one (541), and of nothing else at its ends.
fn a_number_that_is_not_finite_is_refused_before_it_is_sent(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "finite");
    let nested = |value: FieldValue| {
        let table: FieldTable = [("deep".to_owned(), FieldValue::Array(vec![1.into(), value]))].into();
        FieldValue::Array(vec![FieldValue::Table(table)])
    };
    let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(FieldValue::F64);
    let wrong = wrong.into_iter().chain([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(FieldValue::F32));
    let refused = |error: Error| {
        assert!(matches!(&error, Error::InvalidArgument { .. }) && !error.is_transient(), "{error}");
        assert!(error.to_string().contains("finite"), "{error}");
    };
    for value in wrong.flat_map(|value| [value.clone(), nested(value)]) {
        let message = Message::new("x").with_header("h", value.clone());
        refused(connection.publish("", &name, message.clone()).unwrap_err());
        refused(app.publish_pool().publish("", &name, message.clone()).unwrap_err());
        let batch =
            [("", name.as_str(), Message::new("before")), ("", &name, message), ("", &name, Message::new("after"))];
        let Err(Error::Batch(mut batch)) = connection.publish_batch(batch) else { panic!("no batch error") };
        assert_eq!((batch.confirmed, batch.failed.len()), (2, 1), "the others are not to blame");
        refused(batch.failed.remove(0).1);
        refused(connection.queue_declare(&Queue::new(unique("args")).argument("h", value)).map(drop).unwrap_err());
        assert_eq!(bodies(&drain(&connection, &name)), ["before", "after"]);
    }
}

fn every_other_value_is_sent_at_its_ends(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "ends");
    let values = [
        FieldValue::Bool(true),
        FieldValue::I8(i8::MIN),
        FieldValue::U8(u8::MAX),
        FieldValue::I16(i16::MIN),
        FieldValue::U16(u16::MAX),
        FieldValue::I32(i32::MIN),
        FieldValue::U32(u32::MAX),
        FieldValue::I64(i64::MIN),
        FieldValue::I64(i64::MAX),
        FieldValue::F32(f32::MAX),
        FieldValue::F32(1e-45),
        FieldValue::F32(-0.0),
        FieldValue::F64(f64::MIN),
        FieldValue::F64(5e-324),
        FieldValue::Decimal { scale: u8::MAX, value: u32::MAX },
        FieldValue::String("a\0b".to_owned()),
        FieldValue::Bytes(vec![u8::MAX; 3]),
        FieldValue::Timestamp(u64::MAX),
        FieldValue::Array(Vec::new()),
        FieldValue::Table(FieldTable::new()),
        FieldValue::Void,
    ];
    for value in &values {
        connection.publish("", &name, Message::new("x").with_header("h", value.clone()).with_header("", 1)).unwrap();
    }
    let received = drain(&connection, &name);
    assert_eq!(
        received.iter().map(|one| &one.message().headers()["h"]).collect::<Vec<_>>(),
        values.iter().collect::<Vec<_>>()
    );
}

fn a_batch_whose_iterator_panics_costs_the_next_borrower_nothing(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let name = queue(&app.publish_pool().connection().unwrap(), "next");
    for round in 0..20 {
        {
            let connection = app.publish_pool().connection().unwrap();
            let batch = (0..2).map(|n| match n {
                0 => ("no such exchange", "k", "x"),
                _ => panic!("this panic is part of the test"),
            });
            let batch = std::panic::AssertUnwindSafe(|| connection.publish_batch(batch));
            assert!(std::panic::catch_unwind(batch).is_err());
        }
        let outcome = app.publish_pool().connection().unwrap().publish("", &name, "good");
        outcome.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

fn a_batch_that_has_no_chance_leaves_the_rest_in_the_iterator(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nmax_in_flight = 100");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "endless");
    let mut numbers = 0_usize..;
    let endless = numbers.by_ref().map(|n| {
        if n == 500 {
            node.close_all_connections("for the test");
        }
        ("", name.as_str(), n.to_string())
    });
    let Err(Error::Batch(batch)) = connection.publish_batch(endless) else { panic!("it does not end") };
    let taken = numbers.next().unwrap();
    assert_eq!((batch.taken, batch.confirmed + batch.failed.len()), (taken, taken));
    assert!(taken > 500 && taken < 100_000, "{taken}");
    assert!(batch.error_at(0).is_none() && batch.error_at(taken - 1).is_some() && batch.error_at(taken).is_some());
    let (last, error) = batch.failed.last().unwrap();
    assert!(*last == taken - 1 && error.is_transient(), "{last} of {taken}: {error}");
}
