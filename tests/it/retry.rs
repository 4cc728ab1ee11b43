//! Messages that fail are tried again by their ladder, and kept when it ends.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use coney::{Error, Exchange, FieldTable, FieldValue, Message, Queue, Received, RetryPolicy};

use crate::contract;
use crate::listener::publish_numbers;
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract! {
    what_a_handler_passes_on_begins_anew_in_the_next_queue,
    a_handler_that_spoils_its_channel_costs_its_message_no_more_than_its_attempts,
    a_message_that_has_expired_before_is_not_lost_by_waiting,
    a_message_whose_headers_fill_the_frame_is_never_rejected,
    a_history_that_does_not_fit_is_left_out_before_the_count_is,
    a_message_that_is_put_back_from_the_dead_by_other_means_begins_anew,
    the_ladder_keeps_its_delays_and_the_dead_know_why,
    poison_among_good_messages_ends_after_exactly_its_attempts,
    what_cannot_be_decoded_is_dead_at_once,
    a_retry_queue_that_is_gone_loses_no_message,
    a_queue_named_by_the_broker_cannot_have_a_ladder,
    a_listener_may_go_without_the_ladder_of_its_pool,
    a_node_killed_at_any_step_of_the_ladder_loses_nothing,
}

fn header<'a>(received: &'a Received, name: &str) -> &'a FieldValue {
    received.message().headers().get(name).unwrap_or_else(|| panic!("no header {name}"))
}

fn millis(delays: &[u64]) -> RetryPolicy {
    RetryPolicy::new(delays.iter().copied().map(Duration::from_millis)).unwrap()
}

fn the_ladder_keeps_its_delays_and_the_dead_know_why(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"500ms\", \"1500ms\"]");
    let connection = app.publish_pool().connection().unwrap();
    let (exchange, name) = (unique("events"), queue(&connection, "ladder"));
    connection.exchange_declare(&Exchange::topic(&exchange)).unwrap();
    connection.queue_bind(&name, &exchange, "order.#").unwrap();
    let (seen, attempts) = mpsc::channel();
    let listener = app
        .spawn_listener(&name, move |_, delivery| {
            let way = (delivery.exchange().to_owned(), delivery.routing_key().to_owned());
            seen.send((Instant::now(), way, delivery.message().headers().get("mine").cloned())).unwrap();
            Err::<(), _>("no stock")
        })
        .unwrap();
    let before = SystemTime::now();
    let message = Message::new("order 1")
        .with_header("mine", 7)
        .with_message_id("id-1")
        .with_user_id("guest")
        .with_expiration(Duration::from_secs(60))
        .with_header("CC", FieldValue::Array(vec![name.as_str().into()]));
    connection.publish(&exchange, "order.created", message).unwrap();
    // The CC sends a second copy to the same queue, by the exchange with another key: it is not bound, so there is one.
    let tries: Vec<_> = (0..3).map(|_| attempts.recv_timeout(PATIENCE).unwrap()).collect();
    for (at, way, mine) in &tries {
        assert_eq!(way, &(exchange.clone(), "order.created".to_owned()), "{at:?}");
        assert_eq!(mine, &Some(7.into()));
    }
    for (n, expected) in [500, 1500].into_iter().enumerate() {
        let waited = (tries[n + 1].0 - tries[n].0).as_secs_f64() * 1000.0;
        assert!(waited >= f64::from(expected) * 0.8, "wait {n}: {waited} ms");
        // The upper bound is a deadline for a busy machine.
        assert!(waited <= f64::from(expected) * 1.2 + 1000.0, "wait {n}: {waited} ms");
    }
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("it ends").ack().unwrap();
    assert_eq!((dead.body(), dead.message().message_id()), (b"order 1".as_slice(), Some("id-1")));
    assert_eq!(header(&dead, "coney-attempts").as_i64(), Some(3));
    assert_eq!(header(&dead, "coney-error").as_str(), Some("no stock"));
    assert_eq!(header(&dead, "coney-queue").as_str(), Some(name.as_str()));
    assert_eq!(header(&dead, "coney-exchange").as_str(), Some(exchange.as_str()));
    assert_eq!(header(&dead, "coney-routing-key").as_str(), Some("order.created"));
    assert_eq!(header(&dead, "coney-user-id").as_str(), Some("guest"));
    let FieldValue::Timestamp(failed_at) = header(&dead, "coney-failed-at") else { panic!("no timestamp") };
    let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!((since(before)..=since(SystemTime::now())).contains(failed_at));
    wait_until("it is counted", || listener.stats().dead == 1);
    let stats = listener.stats();
    assert_eq!((stats.delivered, stats.retried, stats.dead, stats.acked), (3, 2, 1, 0));
    wait_until("nothing is left", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
}

fn poison_among_good_messages_ends_after_exactly_its_attempts(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "poison");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let handled = Arc::clone(&seen);
    let threads = Arc::new(Mutex::new(HashSet::new()));
    let by = Arc::clone(&threads);
    let listener = app
        .listener(&name)
        .retry(millis(&[50]).with_max_attempts(4))
        .spawn(move |_, delivery| {
            by.lock().unwrap().insert(thread::current().id());
            let text = delivery.message().text().unwrap().to_owned();
            handled.lock().unwrap().push(text.clone());
            match text.as_str() {
                "fails" => Err("always"),
                "panics" => panic!("this panic is part of the test"),
                _ => Ok(()),
            }
        })
        .unwrap();
    publish_numbers(&app, &name, 50);
    connection.publish("", &name, "fails").unwrap();
    connection.publish("", &name, "panics").unwrap();
    publish_numbers(&app, &name, 50);
    let dead = format!("{name}.dead");
    wait_until("both are dead", || broker.queue_len(&dead) == 2);
    wait_until("all are counted", || listener.stats().acked == 100 && listener.stats().dead == 2);
    let count = |text: &str| seen.lock().unwrap().iter().filter(|seen| *seen == text).count();
    assert_eq!((count("fails"), count("panics")), (4, 4));
    let dead = drain(&connection, &dead);
    for received in &dead {
        assert_eq!(header(received, "coney-attempts").as_i64(), Some(4), "as many as it was handled");
        assert!(!received.message().headers().contains_key("x-death"), "the ladder's own waiting is not its history");
    }
    let mut reasons: Vec<String> =
        dead.iter().map(|received| header(received, "coney-error").as_str().unwrap().to_owned()).collect();
    reasons.sort();
    assert_eq!(reasons, ["always", "the handler panicked: this panic is part of the test"]);
    let stats = listener.stats();
    assert_eq!((stats.retried, stats.dead, stats.panicked, stats.recoveries), (6, 2, 4, 0));
    publish_numbers(&app, &name, 1);
    wait_until("the same thread handles on", || listener.stats().acked == 101);
    assert_eq!(threads.lock().unwrap().len(), 1);
}

fn what_cannot_be_decoded_is_dead_at_once(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"1s\"]\nmax_attempts = 10");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "undecodable");
    let listener = app
        .spawn_listener(&name, |_, delivery| -> anyhow::Result<()> {
            let read = delivery.message().decode_json::<u32>();
            read.map(drop).with_context(|| format!("order of {} bytes", delivery.body().len()))
        })
        .unwrap();
    connection.publish("", &name, "{not json").unwrap();
    connection.publish("", &name, "12").unwrap();
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("dead at once");
    assert_eq!(dead.body(), b"{not json");
    assert_eq!(header(&dead, "coney-attempts").as_i64(), Some(1));
    let reason = header(&dead, "coney-error").as_str().unwrap();
    assert!(reason.starts_with("order of 9 bytes: message body from JSON: invalid type"), "{reason}");
    wait_until("the other is acked", || listener.stats().acked == 1);
    assert_eq!((listener.stats().retried, listener.stats().dead), (0, 1));
}

fn a_retry_queue_that_is_gone_loses_no_message(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "gone");
    let (seen, attempts) = mpsc::channel();
    let listener = app
        .listener(&name)
        .retry(millis(&[50]))
        .spawn(move |_, _| {
            seen.send(()).unwrap();
            Err::<(), _>("no")
        })
        .unwrap();
    connection.queue_delete(&format!("{name}.retry.50")).unwrap();
    connection.publish("", &name, "kept").unwrap();
    // The listener comes back, declares its queues again, and the message goes the way it should.
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("it ends");
    assert_eq!(dead.body(), b"kept");
    assert_eq!(listener.stats().recoveries, 1);
    assert!(attempts.try_iter().count() >= 2);
}

fn a_queue_named_by_the_broker_cannot_have_a_ladder(broker: Broker) {
    let app = broker.app("");
    let error = app.listener("").retry(millis(&[50])).spawn(|_, _| ()).map(drop).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument { what, .. } if what == "retry"), "{error}");
}

fn a_listener_may_go_without_the_ladder_of_its_pool(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"1s\"]\nsize = 3");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "without");
    let listener = app.listener(&name).without_retry().spawn(|_, _| Err::<(), _>("no")).unwrap();
    connection.publish("", &name, "x").unwrap();
    wait_until("it is requeued once and then rejected", || listener.stats().rejected == 1);
    assert_eq!((listener.stats().requeued, listener.stats().retried, listener.stats().dead), (1, 0, 0));
    connection.queue_declare_passive(&format!("{name}.dead")).unwrap_err();
    // Nothing could come back to a queue that ends with its connection.
    let listener = app.spawn_listener("", |_, _| Err::<(), _>("no")).unwrap();
    assert!(matches!(listener.state(), coney::ListenerState::Consuming));
}

fn a_node_killed_at_any_step_of_the_ladder_loses_nothing(broker: Broker) {
    // A classic queue passes an expired message on at most once, and a killed node of 4.0 loses one in some of thirty runs. Quorum
    // queues pass on at least once, but not for minutes after the kill.
    if broker.is_4() && !broker.is_embedded() {
        return;
    }
    let node = broker.hurt();
    let app = node.app("");
    let name = unique("killed-ladder");
    {
        let connection = app.publish_pool().connection().unwrap();
        connection.queue_declare(&Queue::new(&name)).unwrap();
        connection.queue_declare(&Queue::new(format!("{name}.dead"))).unwrap();
    }
    publish_numbers(&app, &name, 200);
    let listener = app.listener(&name).retry(millis(&[300, 600])).spawn(|_, _| Err::<(), _>("never")).unwrap();
    // Some are in hand, some wait, some are dead: whatever this is a moment of.
    for deliveries in [100, 350] {
        wait_until("it is under way", || listener.stats().delivered >= deliveries);
        node.kill();
        node.start_again();
    }
    let dead = format!("{name}.dead");
    let connection = app.publish_pool().connection().unwrap();
    let mut numbers = Vec::new();
    wait_until("each of them is dead", || {
        numbers.extend(bodies(&drain(&connection, &dead)));
        numbers.sort_by_key(|number| number.parse::<u32>().unwrap());
        numbers.dedup();
        numbers.len() == 200
    });
}

fn a_message_that_has_expired_before_is_not_lost_by_waiting(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, expiring) = (queue(&connection, "expired"), unique("expiring"));
    // From here it expires into the queue, and from there it has expired before too.
    let declared = Queue::new(&expiring).message_ttl(Duration::from_millis(1)).dead_letter_exchange("");
    connection.queue_declare(&declared.dead_letter_routing_key(name.clone())).unwrap();
    let entry: FieldTable = [
        ("queue".to_owned(), FieldValue::from(name.as_str())),
        ("reason".to_owned(), "expired".into()),
        ("count".to_owned(), 1.into()),
        ("exchange".to_owned(), "".into()),
        ("routing-keys".to_owned(), FieldValue::Array(vec![name.as_str().into()])),
    ]
    .into();
    let message = Message::new("kept").with_header("x-death", FieldValue::Array(vec![FieldValue::Table(entry)]));
    let tries = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&tries);
    let _listener = app
        .listener(&name)
        .retry(millis(&[50, 50]))
        .spawn(move |_, _| {
            *counted.lock().unwrap() += 1;
            Err::<(), _>("no")
        })
        .unwrap();
    connection.publish("", &name, message).unwrap();
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("it ends");
    assert_eq!((dead.body(), *tries.lock().unwrap()), (b"kept".as_slice(), 3));
    assert!(dead.message().headers().contains_key("coney-x-death"));
}

/// Header tables of so many bytes, up to the longest that fits into a frame: 23 bytes of it are for other things.
fn swollen_headers() -> impl Iterator<Item = usize> {
    (129_500..131_049).step_by(50).chain([131_049])
}

/// A message whose header table takes this many bytes: its length, the name, the type and the length of the text.
fn swollen(table: usize) -> Message {
    Message::new(table.to_string()).with_header("h", "x".repeat(table - 11))
}

fn a_message_whose_headers_fill_the_frame_is_never_rejected(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "swollen");
    let attempts = Arc::new(Mutex::new(HashMap::<String, u32>::new()));
    let noted = Arc::clone(&attempts);
    let reason = "no ".repeat(200);
    let listener = app
        .listener(&name)
        .retry(millis(&[50]))
        .spawn(move |_, delivery| {
            *noted.lock().unwrap().entry(delivery.message().text().unwrap().to_owned()).or_default() += 1;
            if delivery.body() == b"next" { Ok(()) } else { Err(reason.clone()) }
        })
        .unwrap();
    for table in swollen_headers() {
        connection.publish("", &name, swollen(table)).unwrap();
    }
    connection.publish("", &name, "next").unwrap();
    let (dead, sizes) = (format!("{name}.dead"), swollen_headers().count());
    wait_until("all are dead", || broker.queue_len(&dead) == sizes as u64);
    wait_until("and the next is handled", || listener.stats().acked == 1);
    assert_eq!((listener.stats().rejected, listener.stats().recoveries), (0, 0));
    let (mut whole, mut shortened, mut silent, mut bare) = (0, 0, 0, 0);
    for received in drain(&connection, &dead) {
        let body = received.message().text().unwrap().to_owned();
        let headers = received.message().headers();
        let own = headers["h"].as_str().unwrap().len();
        assert_eq!(own + 11, body.parse::<usize>().unwrap(), "its own headers are as they were");
        let tries = attempts.lock().unwrap()[&body];
        match headers.get("coney-error").and_then(FieldValue::as_str).map(str::len) {
            Some(600) => whole += 1,
            Some(1..600) => shortened += 1,
            Some(_) => panic!("{body}: an empty reason, or a longer one than was given"),
            None if headers.contains_key("coney-attempts") => silent += 1,
            None => bare += 1,
        }
        let counted = headers.get("coney-attempts").and_then(FieldValue::as_i64);
        assert_eq!((tries, counted), if counted.is_some() { (2, Some(2)) } else { (1, None) }, "{body}");
    }
    // At the least a table goes through whole, and at the most there is room for nothing.
    assert!(whole > 0 && shortened > 0 && bare > 0, "{whole} {shortened} {silent} {bare}");
}

fn a_history_that_does_not_fit_is_left_out_before_the_count_is(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "history");
    let listener = app.listener(&name).retry(millis(&[50])).spawn(|_, _| Err::<(), _>("no")).unwrap();
    // What a broker has written of a long way, and of it there is no room for a second copy beside the reason.
    let death: FieldTable = [("queue".to_owned(), "elsewhere".into()), ("reason".to_owned(), "rejected".into())].into();
    let deaths = FieldValue::Array(vec![FieldValue::Table(death)]);
    for table in swollen_headers() {
        connection.publish("", &name, swollen(table - 70).with_header("x-death", deaths.clone())).unwrap();
    }
    let dead = format!("{name}.dead");
    wait_until("all are dead", || broker.queue_len(&dead) == swollen_headers().count() as u64);
    assert_eq!((listener.stats().rejected, listener.stats().recoveries), (0, 0));
    let kept = drain(&connection, &dead);
    let with = |name: &str| kept.iter().filter(|one| one.message().headers().contains_key(name)).count();
    let (counted, historic) = (with("coney-attempts"), with("coney-x-death"));
    assert!(historic > 0 && counted > historic, "{counted} {historic}");
}

fn a_message_that_is_put_back_from_the_dead_by_other_means_begins_anew(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (exchange, name) = (unique("anew"), queue(&connection, "anew"));
    connection.exchange_declare(&Exchange::direct(&exchange)).unwrap();
    for key in ["first", "second"] {
        connection.queue_bind(&name, &exchange, key).unwrap();
    }
    let (seen, attempts) = mpsc::channel();
    let listener = app
        .listener(&name)
        .retry(millis(&[50]).with_max_attempts(3))
        .spawn(move |_, delivery| {
            seen.send((delivery.exchange().to_owned(), delivery.routing_key().to_owned())).unwrap();
            Err::<(), _>("no")
        })
        .unwrap();
    connection.publish(&exchange, "first", "again").unwrap();
    let dead = format!("{name}.dead");
    let end = || connection.get_timeout(&dead, PATIENCE).unwrap().expect("it ends").ack().unwrap();
    let check = |ended: &Received, key: &str| {
        let ways: Vec<(String, String)> = attempts.try_iter().collect();
        assert_eq!(ways, vec![(exchange.clone(), key.to_owned()); 3]);
        assert_eq!(header(ended, "coney-attempts").as_i64(), Some(3));
        assert_eq!(header(ended, "coney-routing-key").as_str(), Some(key));
    };
    let first = end();
    check(&first, "first");
    // As a shovel does it: with all headers, straight into the queue.
    connection.publish("", &name, first.into_message()).unwrap();
    let second = end();
    check(&second, "first");
    // As a program does it that has a way of its own.
    connection.publish(&exchange, "second", second.into_message()).unwrap();
    check(&end(), "second");
    wait_until("all is counted", || listener.stats().dead == 3);
    assert_eq!(listener.stats().retried, 6);
}

fn a_handler_that_spoils_its_channel_costs_its_message_no_more_than_its_attempts(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    // What it leaves under way ends the channel on which its message is to be put away.
    let spoils: [fn(&coney::Context<'_>); 2] = [
        |context| context.connection().publish_async("no such exchange", "k", "x", |_| {}),
        |context| {
            let batch = (0..2).map(|n| match n {
                0 => ("no such exchange", "k", "x"),
                _ => panic!("this panic is part of the test"),
            });
            let _ = context.connection().publish_batch(batch);
        },
    ];
    for spoil in spoils {
        let name = queue(&connection, "spoils");
        let listener = app
            .listener(&name)
            .retry(millis(&[50]))
            .spawn(move |context, _| {
                spoil(context);
                Err::<(), _>("and fails")
            })
            .unwrap();
        connection.publish("", &name, "poison").unwrap();
        let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("it ends").ack().unwrap();
        assert_eq!(header(&dead, "coney-attempts").as_i64(), Some(2));
        wait_until("it is counted", || listener.stats().dead == 1);
        let stats = listener.stats();
        assert_eq!((stats.delivered, stats.retried, stats.recoveries), (2, 1, 0));
        listener.stop().unwrap();
    }
}

fn what_a_handler_passes_on_begins_anew_in_the_next_queue(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (exchange, name, next) = (unique("first"), queue(&connection, "first"), queue(&connection, "next"));
    connection.exchange_declare(&Exchange::direct(&exchange)).unwrap();
    connection.queue_bind(&name, &exchange, "first").unwrap();
    let to = next.clone();
    let first = app
        .listener(&name)
        .retry(millis(&[50]))
        .spawn(move |context, delivery| {
            // It fails once, and then goes on as it came.
            match delivery.message().headers().contains_key("coney-attempts") {
                false => Err("not yet".to_owned()),
                true => context.publish("", &to, delivery.message().clone()).map_err(|error| error.to_string()),
            }
        })
        .unwrap();
    let (seen, ways) = mpsc::channel();
    let second = app
        .listener(&next)
        .retry(millis(&[50]))
        .spawn(move |_, delivery| {
            seen.send((delivery.exchange().to_owned(), delivery.routing_key().to_owned())).unwrap();
            Err::<(), _>("never")
        })
        .unwrap();
    connection.publish(&exchange, "first", "passed on").unwrap();
    let dead = connection.get_timeout(&format!("{next}.dead"), PATIENCE).unwrap().expect("it ends").ack().unwrap();
    assert_eq!(header(&dead, "coney-attempts").as_i64(), Some(2), "its own attempts");
    assert_eq!(header(&dead, "coney-queue").as_str(), Some(next.as_str()));
    assert_eq!(
        ways.try_iter().collect::<Vec<_>>(),
        vec![(String::new(), next.clone()); 2],
        "the way it came to this queue"
    );
    wait_until("all is counted", || second.stats().dead == 1 && first.stats().acked == 1);
}
