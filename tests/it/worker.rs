//! Queue workers: typed functions behind queues.

use std::io::Write;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use coney::rpc::RpcWorker;
use coney::worker::{ConnectionParameters, QueueWorker};
use coney::{Connection, Encoding, Error, Message, RetryPolicy};
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::{Value, json};

use crate::closed::closed_port;
use crate::contract;
use crate::support::{Broker, PATIENCE, app, unique, wait_until};

contract! {
    parameters_are_enough_for_a_worker,
    routes_get_what_is_meant_for_them_in_whatever_form_it_comes,
    what_cannot_be_decoded_is_dead_with_the_reason,
    errors_and_panics_follow_the_retry_policy,
    a_worker_needs_routes_and_one_for_each_queue,
    a_worker_too_many_is_an_error_at_once,
    two_workers_share_a_queue,
    all_routes_are_on_one_connection_and_come_back_with_it,
}

fn publish(connection: &Connection, queue: &str, body: impl Into<Vec<u8>>) {
    connection.publish("", queue, Message::new(body)).unwrap();
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn zlib(text: &str) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn routes_get_what_is_meant_for_them_in_whatever_form_it_comes(broker: Broker) {
    let app = broker.app("");
    let (texts, sums, raw) = (unique("texts"), unique("sums"), unique("raw"));
    let (text, got_text) = mpsc::channel();
    let (sum, got_sum) = mpsc::channel();
    let (bytes, got_bytes) = mpsc::channel();
    let worker = QueueWorker::new(&app)
        .route(&texts, move |data: String| text.send(data).unwrap())
        .route_with_context(&sums, move |context, numbers: Vec<u32>| {
            sum.send((context.queue().to_owned(), numbers.iter().sum::<u32>())).unwrap();
        })
        .encoding(Encoding::Raw)
        .route(&raw, move |data: Vec<u8>| bytes.send(data).unwrap())
        .run()
        .unwrap();
    let connection = app.publish_pool().connection().unwrap();
    for body in [gzip("\"grüße\""), zlib("\"grüße\""), "\"grüße\"".into()] {
        publish(&connection, &texts, body);
        assert_eq!(got_text.recv_timeout(PATIENCE).unwrap(), "grüße");
    }
    connection.publish("", &sums, Encoding::default().encode(&[1, 2, 3]).unwrap()).unwrap();
    assert_eq!(got_sum.recv_timeout(PATIENCE).unwrap(), (sums, 6));
    publish(&connection, &raw, gzip("x"));
    assert_eq!(got_bytes.recv_timeout(PATIENCE).unwrap(), gzip("x"));
    worker.stop().unwrap();
}

fn what_cannot_be_decoded_is_dead_with_the_reason(broker: Broker) {
    let app = broker.app("");
    let name = unique("undecodable");
    let (seen, got) = mpsc::channel();
    let worker =
        QueueWorker::new(&app).max_inflated(1000).route(&name, move |n: u32| seen.send(n).unwrap()).run().unwrap();
    let connection = app.publish_pool().connection().unwrap();
    let bomb = gzip(&"1".repeat(1_000_000));
    let cut = gzip("7")[..10].to_vec();
    let bodies = [bomb, cut, b"{no json".to_vec(), b"\"wrong type\"".to_vec()];
    for (body, reason) in bodies.iter().zip(["larger than 1000 bytes", "gzip JSON: ", "line 1", "expected u32"]) {
        publish(&connection, &name, body.clone());
        let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("dead").ack().unwrap();
        assert_eq!(dead.body(), body);
        let told = dead.message().headers()["coney-error"].as_str().unwrap().to_owned();
        assert!(told.contains(reason), "{told}");
    }
    publish(&connection, &name, "7");
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), 7);
    assert_eq!((worker.stats().dead, worker.stats().panicked), (4, 0));
}

fn errors_and_panics_follow_the_retry_policy(broker: Broker) {
    let app = broker.app("");
    let name = unique("failing");
    let policy = RetryPolicy::new([Duration::from_millis(50), Duration::from_millis(50)]).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let worker = QueueWorker::new(&app)
        .retry(policy)
        .route(&name, move |what: String| {
            noted.lock().unwrap().push(what.clone());
            assert_ne!(what, "panic", "this panic is part of the test");
            if what == "fail" { Err("on purpose") } else { Ok(()) }
        })
        .run()
        .unwrap();
    let connection = app.publish_pool().connection().unwrap();
    for what in ["fail", "panic", "fine"] {
        publish(&connection, &name, format!("\"{what}\""));
    }
    wait_until("they are dealt with", || worker.stats().dead == 2 && worker.stats().acked == 1);
    let count = |what: &str| seen.lock().unwrap().iter().filter(|seen| *seen == what).count();
    assert_eq!((count("fail"), count("panic"), count("fine")), (3, 3, 1));
}

fn a_worker_needs_routes_and_one_for_each_queue(broker: Broker) {
    let app = broker.app("");
    let name = unique("twice");
    for (worker, part) in [
        (QueueWorker::new(&app), "no routes"),
        (QueueWorker::new(&app).route(&name, |_: Value| ()).route(&name, |_: Value| ()), name.as_str()),
        (QueueWorker::new(&app).route("", |_: Value| ()), "no name"),
    ] {
        let error = worker.run().unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(part), "{error}");
    }
}

fn a_worker_too_many_is_an_error_at_once(broker: Broker) {
    // A wait for a connection would be longer than the test.
    let patient = "size = 1\ncheckout_timeout = \"10m\"";
    let app = broker.app(&format!("[pools.listen]\n{patient}"));
    let name = unique("crowded");
    let start = Instant::now();
    let listening = QueueWorker::new(&app).route(&name, |_: u64| ()).run().unwrap();
    let errors = [
        QueueWorker::new(&app).route(&name, |_: u64| ()).run(),
        RpcWorker::new(&app).route(&name, Ok::<u64, String>).run(),
    ];
    for error in errors {
        let error = error.map(drop).unwrap_err();
        assert!(matches!(error, Error::TooManyListeners { size: 1, .. }), "{error}");
        assert!(error.to_string().contains("pools.listen.size"), "{error}");
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    // Those that were refused have taken no place.
    listening.stop().unwrap();
    RpcWorker::new(&app).route(&name, Ok::<u64, String>).run().unwrap().stop().unwrap();
    // Nor has one that did not find its broker.
    let closed = closed_port();
    let down =
        crate::support::app(&format!("amqp://{closed}"), "[pools.listen]\nsize = 1\ncheckout_timeout = \"50ms\"");
    for _ in 0..2 {
        let worker = QueueWorker::new(&down).connect_attempts(1, Duration::ZERO).route(&name, |_: u64| ());
        let error = worker.run().map(drop).unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error}");
    }
}

fn two_workers_share_a_queue(broker: Broker) {
    let (one, other) = (broker.app(""), broker.app(""));
    let name = unique("shared");
    let (seen, got) = mpsc::channel();
    let workers: Vec<_> = [&one, &other]
        .into_iter()
        .enumerate()
        .map(|(who, app)| {
            let seen = seen.clone();
            QueueWorker::new(app).prefetch(1).route(&name, move |n: u32| seen.send((who, n)).unwrap()).run().unwrap()
        })
        .collect();
    let connection = one.publish_pool().connection().unwrap();
    (0..100).for_each(|n| publish(&connection, &name, n.to_string()));
    let mut all: Vec<(usize, u32)> = (0..100).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect();
    assert!([0, 1].iter().all(|who| all.iter().any(|(by, _)| by == who)), "both have some");
    all.sort_by_key(|(_, n)| *n);
    assert_eq!(all.into_iter().map(|(_, n)| n).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
    drop(workers);
}

fn all_routes_are_on_one_connection_and_come_back_with_it(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.listen]\nsize = 1");
    let names = [unique("a"), unique("b"), unique("c")];
    let (seen, got) = mpsc::channel();
    let mut worker = QueueWorker::new(&app).concurrency(2);
    for name in &names {
        let seen = seen.clone();
        worker = worker.route_with_context(name, move |context, _: Value| {
            seen.send(context.queue().to_owned()).unwrap();
        });
    }
    let worker = worker.run().unwrap();
    assert_eq!((node.connections(), node.consumers().len()), (1, 6));
    for round in 0..2 {
        for name in &names {
            let connection = app.publish_pool().connection().unwrap();
            connection.publish("", name, Message::json(&json!(1)).unwrap()).unwrap();
            assert_eq!(got.recv_timeout(PATIENCE).unwrap(), *name);
        }
        if round == 0 {
            // What is not acked yet would come again.
            wait_until("all are acked", || {
                names.iter().all(|name| node.queue_len(name) + node.queue_unacked(name) == 0)
            });
            node.close_all_connections("for the test");
            wait_until("it is back", || worker.stats().recoveries == 1 && node.consumers().len() == 6);
        }
    }
}

#[test]
fn connecting_is_tried_as_often_as_told() {
    let closed = closed_port();
    let app = app(&format!("amqp://{closed}"), "[pools.listen]\ncheckout_timeout = \"50ms\"");
    let start = Instant::now();
    let worker = QueueWorker::new(&app).route("q", |_: Value| ()).connect_attempts(3, Duration::from_millis(100));
    let error = worker.run().unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(200) && start.elapsed() < PATIENCE);

    let parameters = ConnectionParameters { host: closed.ip().to_string(), ..ConnectionParameters::default() };
    assert_eq!((parameters.port, parameters.user.as_str()), (5672, "guest"));
    let parameters = ConnectionParameters { port: closed.port(), ..parameters };
    let worker = QueueWorker::of_parameters(&parameters).unwrap().route("q", |_: Value| ());
    let error = worker.connect_attempts(1, Duration::ZERO).run().unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

fn parameters_are_enough_for_a_worker(broker: Broker) {
    let name = unique("parameters");
    let (seen, got) = mpsc::channel();
    let worker =
        QueueWorker::of_parameters(&broker.parameters()).unwrap().route(&name, move |n: u32| seen.send(n).unwrap());
    let worker = worker.run().unwrap();
    publish(&broker.app("").publish_pool().connection().unwrap(), &name, "7");
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), 7);
    worker.stop().unwrap();
}
