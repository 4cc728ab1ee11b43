//! The bus: producers, consumers, and callbacks run when it is said.

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use coney::bus::{self, Bus};
use coney::{Error, ExchangeKind, Outcome};
use serde_json::{Value, json};

use crate::closed::closed_port;
use crate::contract;
use crate::support::{Broker, PATIENCE, unique, wait_until};

contract! {
    a_callback_is_run_with_the_value_and_what_is_known_of_the_message,
    a_key_that_does_not_match_runs_nothing,
    several_keys_and_topic_patterns,
    two_consumers_with_queues_of_their_own_both_receive,
    consumers_with_one_queue_share_its_messages,
    an_exchange_of_another_kind_is_406_and_one_that_nobody_registered_404,
    what_is_not_json_runs_no_callback_and_is_counted,
    outcomes_count_where_messages_are_acknowledged,
    a_thread_of_its_own_stops_when_told_and_gives_the_bus_back,
    callbacks_may_publish_and_stop,
    what_was_not_processed_is_there_for_the_next,
    the_broker_is_restarted_in_between,
}

type Seen<T> = Arc<Mutex<Vec<T>>>;

fn connect(broker: Broker) -> Bus {
    Bus::connect(&broker.url()).unwrap()
}

/// A consumer that notes what it gets.
fn note(bus: &mut Bus, exchange: &str, kind: ExchangeKind, keys: &[&str]) -> Seen<String> {
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    let keys = keys.iter().copied();
    bus.register_consumer(exchange, kind, keys, move |text: String, _| noted.lock().unwrap().push(text)).unwrap();
    seen
}

/// Processes events until `count` callbacks have been run.
#[track_caller]
fn process(bus: &mut Bus, count: usize) {
    let deadline = Instant::now() + PATIENCE;
    let mut processed = 0;
    while processed < count {
        processed += bus.process_events(Some(1)).unwrap();
        assert!(Instant::now() < deadline, "{processed} of {count}");
    }
    assert_eq!(processed, count);
}

fn a_callback_is_run_with_the_value_and_what_is_known_of_the_message(broker: Broker) {
    let mut bus = connect(broker);
    let exchange = unique("in2com");
    let (seen, got) = mpsc::channel();
    bus.register_consumer(&exchange, ExchangeKind::Direct, ["loud"], move |value: Value, received| {
        let of = (received.exchange().to_owned(), received.routing_key().to_owned(), received.redelivered());
        seen.send((value, of, received.message().headers().len())).unwrap();
    })
    .unwrap();
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    producer.publish("loud", &json!({"hello": ["world", 1]})).unwrap();
    assert!(got.try_recv().is_err(), "callbacks are run when events are processed");
    process(&mut bus, 1);
    let (value, of, headers) = got.try_recv().unwrap();
    assert_eq!(value, json!({"hello": ["world", 1]}));
    assert_eq!((of, headers), ((exchange, "loud".to_owned(), false), 0));
    assert_eq!(bus.stats().handled, 1);
    bus.close().unwrap();
}

fn a_key_that_does_not_match_runs_nothing(broker: Broker) {
    let mut bus = connect(broker);
    assert!(matches!(bus.process_events(Some(1)), Err(Error::NothingToConsume)));
    let exchange = unique("quiet");
    let seen = note(&mut bus, &exchange, ExchangeKind::Direct, &["this"]);
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    producer.publish("that", "unheard").unwrap();
    let start = Instant::now();
    assert_eq!(bus.process_events(Some(3)).unwrap(), 0);
    assert!(start.elapsed() >= Duration::from_millis(300), "a cycle waits 100 ms for something to come");
    producer.publish("this", "heard").unwrap();
    process(&mut bus, 1);
    assert_eq!(*seen.lock().unwrap(), ["heard"]);
}

fn several_keys_and_topic_patterns(broker: Broker) {
    let mut bus = connect(broker);
    let (direct, topic) = (unique("direct"), unique("topic"));
    let both = note(&mut bus, &direct, ExchangeKind::Direct, &["one", "two"]);
    let words = note(&mut bus, &topic, ExchangeKind::Topic, &["order.*.paid", "audit.#"]);
    let producer = bus.register_producer(&direct, ExchangeKind::Direct).unwrap();
    for key in ["one", "two", "three"] {
        producer.publish(key, key).unwrap();
    }
    let producer = bus.register_producer(&topic, ExchangeKind::Topic).unwrap();
    for key in ["order.7.paid", "order.paid", "order.7.8.paid", "audit", "audit.x.y", "audits"] {
        producer.publish(key, key).unwrap();
    }
    process(&mut bus, 5);
    assert_eq!(*both.lock().unwrap(), ["one", "two"]);
    assert_eq!(*words.lock().unwrap(), ["order.7.paid", "audit", "audit.x.y"]);
}

fn two_consumers_with_queues_of_their_own_both_receive(broker: Broker) {
    let mut bus = connect(broker);
    let exchange = unique("broadcast");
    let one = note(&mut bus, &exchange, ExchangeKind::Fanout, &[]);
    let two = note(&mut bus, &exchange, ExchangeKind::Fanout, &[]);
    let mut elsewhere = connect(broker);
    let three = note(&mut elsewhere, &exchange, ExchangeKind::Fanout, &[]);
    bus.register_producer(&exchange, ExchangeKind::Fanout).unwrap().publish("any", "to all").unwrap();
    process(&mut bus, 2);
    process(&mut elsewhere, 1);
    for seen in [one, two, three] {
        assert_eq!(*seen.lock().unwrap(), ["to all"]);
    }
}

fn consumers_with_one_queue_share_its_messages(broker: Broker) {
    let (exchange, queue) = (unique("shared"), unique("shared"));
    let seen = Seen::<u32>::default();
    let mut buses: Vec<Bus> = (0..2)
        .map(|_| {
            let mut bus = connect(broker);
            let noted = Arc::clone(&seen);
            let consumer = bus.consumer(&exchange, ExchangeKind::Direct).routing_keys(["k"]).queue(&queue);
            consumer.register(move |n: u32, _| noted.lock().unwrap().push(n)).unwrap();
            bus
        })
        .collect();
    let producer = buses[0].register_producer(&exchange, ExchangeKind::Direct).unwrap();
    for n in 0..10 {
        producer.publish("k", &n).unwrap();
    }
    wait_until("each is seen once", || {
        let processed: Vec<usize> = buses.iter_mut().map(|bus| bus.process_events(Some(1)).unwrap()).collect();
        assert!(processed.iter().all(|processed| *processed < 10), "they take turns");
        seen.lock().unwrap().len() == 10
    });
    seen.lock().unwrap().sort_unstable();
    assert_eq!(*seen.lock().unwrap(), (0..10).collect::<Vec<_>>());
}

fn an_exchange_of_another_kind_is_406_and_one_that_nobody_registered_404(broker: Broker) {
    let mut bus = connect(broker);
    let exchange = unique("kind");
    bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    let error = bus.register_producer(&exchange, ExchangeKind::Fanout).unwrap_err();
    assert_eq!(error.code(), Some(406));
    assert!(error.to_string().contains(&exchange), "{error}");
    let error = bus.register_consumer(&exchange, ExchangeKind::Topic, ["#"], |_: Value, _| ()).unwrap_err();
    assert_eq!(error.code(), Some(406), "{error}");
    let error = bus.publish(&unique("nobody"), "k", "lost").unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 404, .. }), "{error}");
    // Neither does the bus any harm.
    bus.publish(&exchange, "k", "fine").unwrap();
}

fn what_is_not_json_runs_no_callback_and_is_counted(broker: Broker) {
    let app = broker.app("[pools.publish]\nmandatory = false");
    for acknowledged in [false, true] {
        let (exchange, queue) = (unique("garbage"), unique("garbage"));
        let mut bus = connect(broker);
        let consumer = bus.consumer(&exchange, ExchangeKind::Direct).routing_keys(["k"]).queue(&queue);
        let seen = Seen::<u32>::default();
        let noted = Arc::clone(&seen);
        consumer.acknowledged(acknowledged).register(move |n: u32, _| noted.lock().unwrap().push(n)).unwrap();
        let raw = app.publish_pool().connection().unwrap();
        for body in ["{no json", "\"no number\"", "7"] {
            raw.publish(&exchange, "k", body).unwrap();
        }
        process(&mut bus, 3);
        assert_eq!(*seen.lock().unwrap(), [7]);
        let stats = bus.stats();
        assert_eq!((stats.handled, stats.undecodable, stats.failed), (1, 2, 0));
        wait_until("none is kept", || broker.queue_len(&queue) + broker.queue_unacked(&queue) == 0);
    }
}

fn outcomes_count_where_messages_are_acknowledged(broker: Broker) {
    let mut bus = connect(broker);
    let (exchange, queue) = (unique("outcomes"), unique("outcomes"));
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    bus.consumer(&exchange, ExchangeKind::Direct)
        .routing_keys(["k"])
        .queue(&queue)
        .acknowledged(true)
        .register(move |what: String, received| {
            noted.lock().unwrap().push((what.clone(), received.redelivered()));
            match what.as_str() {
                "requeue" if !received.redelivered() => Outcome::Requeue,
                "fail" => Err::<(), _>("on purpose").into(),
                "reject" => Outcome::Reject,
                _ => Outcome::Ack,
            }
        })
        .unwrap();
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    for what in ["ack", "requeue", "fail", "reject"] {
        producer.publish("k", what).unwrap();
    }
    process(&mut bus, 6);
    let mut seen = std::mem::take(&mut *seen.lock().unwrap());
    seen.sort();
    let expected =
        [("ack", false), ("fail", false), ("fail", true), ("reject", false), ("requeue", false), ("requeue", true)];
    assert_eq!(seen, expected.map(|(what, redelivered)| (what.to_owned(), redelivered)));
    assert_eq!((bus.stats().handled, bus.stats().failed), (4, 2));
    wait_until("none is kept", || broker.queue_len(&queue) + broker.queue_unacked(&queue) == 0);
}

fn a_thread_of_its_own_stops_when_told_and_gives_the_bus_back(broker: Broker) {
    let mut bus = connect(broker);
    let exchange = unique("thread");
    let (seen, got) = mpsc::channel();
    bus.register_consumer(&exchange, ExchangeKind::Direct, ["k"], move |n: u32, _| {
        assert_ne!(n, 1, "this panic is part of the test");
        seen.send(n).unwrap();
    })
    .unwrap();
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    let running = bus.spawn().unwrap();
    for n in 0..3 {
        producer.publish("k", &n).unwrap();
    }
    assert_eq!([0, 2], [(); 2].map(|()| got.recv_timeout(PATIENCE).unwrap()));
    let bus = running.stop().unwrap();
    assert_eq!((bus.stats().handled, bus.stats().failed), (2, 1));
    bus.close().unwrap();
    assert!(matches!(producer.publish("k", &4), Err(Error::PoolClosed { .. })));
}

fn callbacks_may_publish_and_stop(broker: Broker) {
    let mut bus = connect(broker);
    let exchange = unique("countdown");
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    let (again, stop) = (producer.clone(), bus.stop_handle());
    bus.register_consumer(&exchange, ExchangeKind::Direct, ["k"], move |n: u32, _| match n {
        0 => {
            stop.stop();
            Ok(())
        }
        n => again.publish("k", &(n - 1)),
    })
    .unwrap();
    producer.publish("k", &5).unwrap();
    assert_eq!(bus.process_events(None).unwrap(), 6);
}

fn what_was_not_processed_is_there_for_the_next(broker: Broker) {
    let (exchange, queue) = (unique("left"), unique("left"));
    for _ in 0..2 {
        // Twice, for what has been redelivered is not to be given up either.
        let mut bus = connect(broker);
        bus.consumer(&exchange, ExchangeKind::Direct)
            .routing_keys(["k"])
            .queue(&queue)
            .register(|_: u32, _| ())
            .unwrap();
        let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
        let start = Instant::now();
        if broker.queue_len(&queue) + broker.queue_unacked(&queue) == 0 {
            for n in 0..20 {
                producer.publish("k", &n).unwrap();
            }
        }
        wait_until("they have come in", || broker.queue_unacked(&queue) == 20);
        bus.close().unwrap();
        assert!(start.elapsed() < PATIENCE);
        wait_until("they are back", || broker.queue_len(&queue) == 20);
    }
}

fn the_broker_is_restarted_in_between(broker: Broker) {
    let node = broker.hurt();
    let mut bus = Bus::connect(&node.url()).unwrap();
    let exchange = unique("restarted");
    let seen = note(&mut bus, &exchange, ExchangeKind::Direct, &["k"]);
    let producer = bus.register_producer(&exchange, ExchangeKind::Direct).unwrap();
    producer.publish("k", "before").unwrap();
    process(&mut bus, 1);
    node.stop_app();
    node.start_app();
    // The queue is the consumer's own and comes back with it; what is published in between has nowhere to go.
    wait_until("it is heard again", || {
        let _ = producer.publish("k", "after");
        bus.process_events(Some(1)).unwrap();
        seen.lock().unwrap().len() > 1
    });
    assert_eq!(seen.lock().unwrap()[..2], ["before", "after"]);
}

#[test]
fn where_no_broker_is_connecting_says_so() {
    let closed = closed_port();
    for error in [
        Bus::connect(&format!("amqp://{closed}?connection_timeout=200")).map(drop).unwrap_err(),
        Bus::connect_to(&closed.ip().to_string(), closed.port(), bus::Broker::Rabbit).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Connect { .. }), "{error}");
    }
    assert!(matches!(Bus::connect("http://localhost").map(drop), Err(Error::Settings(_))));
}

#[test]
fn in_memory_host_and_port_name_the_broker() {
    let mut one = Bus::connect_to("localhost", 1, bus::Broker::InMemory).unwrap();
    let other = Bus::connect_to("localhost", 1, bus::Broker::InMemory).unwrap();
    let apart = Bus::connect_to("localhost", 2, bus::Broker::InMemory).unwrap();
    let seen = note(&mut one, "somewhere", ExchangeKind::Direct, &["k"]);
    other.publish("somewhere", "k", "from the other").unwrap();
    assert_eq!(apart.publish("somewhere", "k", "from apart").unwrap_err().code(), Some(404));
    process(&mut one, 1);
    assert_eq!(*seen.lock().unwrap(), ["from the other"]);
}
