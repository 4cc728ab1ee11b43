//! Calls: every answer to its own caller, and an error by its deadline where there is none.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::rpc::{RpcClient, RpcWorker};
use coney::{App, Connection, Encoding, Error, Listener, Message, Queue};
use serde_json::{Value, json};

use crate::closed::closed_port;
use crate::contract;
use crate::support::{Broker, PATIENCE, queue, unique, wait_until};

contract! {
    a_call_gets_its_answer_and_an_error_its_words,
    eight_threads_and_one_client_and_every_answer_to_its_own_call,
    callbacks_are_run_once_whatever_happens,
    a_queue_that_is_not_there_fails_at_once_and_a_silent_one_times_out,
    late_double_and_foreign_answers_are_dropped_and_counted,
    on_the_wire_it_is_what_the_guide_says,
    a_request_that_wants_no_answer_and_one_whose_asker_is_gone_cost_nothing,
    a_forged_address_among_others_costs_none_of_them_its_answer,
    a_worker_that_is_replaced_in_the_middle_loses_no_call,
    a_broker_that_restarts_in_the_middle_leaves_no_call_hanging,
    a_closed_client_says_so,
    a_client_that_is_closed_ends_when_the_last_call_does_however_that_ends,
    a_shutdown_waits_for_no_client_that_has_nothing_in_flight,
    a_shutdown_ends_although_calls_are_made_all_the_time,
    a_call_may_wait_for_ever_and_disturbs_no_other,
    a_type_that_panics_when_it_is_read_is_an_error_of_its_call_alone,
    a_type_of_the_worker_s_that_panics_is_answered_at_once,
    an_answer_that_a_hook_does_not_let_out_is_answered_at_once,
    asynchronous_calls_wait_for_room,
    a_callback_may_call_though_there_is_no_room,
    a_call_while_publishing_is_blocked_says_so,
    a_worker_sends_traces_when_it_is_told_to,
    a_worker_declares_no_queues_beside_its_own_unless_it_is_asked,
}

/// Squares numbers, but for 13, which it does not like, and 14, which it panics at.
fn squares(app: &App, name: &str) -> Listener {
    RpcWorker::new(app)
        .route(name, |n: u64| match n {
            13 => Err(std::io::Error::other("not that one")),
            14 => panic!("this panic is part of the test"),
            n => Ok(n * n),
        })
        .run()
        .unwrap()
}

fn a_call_gets_its_answer_and_an_error_its_words(broker: Broker) {
    let app = broker.app("");
    let name = unique("squares");
    let _worker = squares(&app, &name);
    for encoding in [Encoding::GzipJson, Encoding::Json] {
        let client = RpcClient::new(&app).unwrap().with_encoding(encoding);
        assert_eq!(client.call::<_, u64>(&name, &12).unwrap(), 144);
        match client.call::<_, u64>(&name, &13).unwrap_err() {
            Error::Remote { kind, message, trace } => {
                assert_eq!((kind.as_str(), message.as_str()), ("Error", "not that one"));
                assert_eq!(trace, "", "what is inside is nobody's business unless it is asked for");
            }
            other => panic!("unexpected: {other}"),
        }
        match client.call::<_, u64>(&name, &14).unwrap_err() {
            Error::Remote { kind, message, .. } => {
                assert_eq!((kind.as_str(), message.as_str()), ("panic", "this panic is part of the test"));
            }
            other => panic!("unexpected: {other}"),
        }
        match client.call::<_, u64>(&name, "no number").unwrap_err() {
            Error::Remote { kind, message, .. } => {
                assert!(kind == "DecodeError" && message.contains("u64"), "{message}")
            }
            other => panic!("unexpected: {other}"),
        }
        let error = client.call::<_, String>(&name, &2).unwrap_err();
        assert!(matches!(error, Error::Encoding { .. }), "{error}");
    }
    wait_until("all is acked", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
}

fn eight_threads_and_one_client_and_every_answer_to_its_own_call(broker: Broker) {
    let app = broker.app("");
    let name = unique("busy");
    let _workers = [squares(&app, &name), squares(&app, &name)];
    let client = RpcClient::new(&app).unwrap();
    thread::scope(|scope| {
        for caller in 0..8_u64 {
            let (client, name) = (client.clone(), &name);
            scope.spawn(move || {
                for n in 0..1000 {
                    let n = 100 + caller * 1000 + n;
                    assert_eq!(client.call::<_, u64>(name, &n).unwrap(), n * n);
                }
            });
        }
    });
    assert_eq!((client.stats().calls, client.stats().unmatched), (8000, 0));
}

fn callbacks_are_run_once_whatever_happens(broker: Broker) {
    let app = broker.app("");
    let (name, missing) = (unique("async"), unique("missing"));
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap();
    let (told, tell) = mpsc::channel();
    for n in 0..100_u64 {
        let told = told.clone();
        let to = if n % 10 == 0 { &missing } else { &name };
        client.call_async(to, &n, move |result: Result<u64, Error>| told.send((n, result)).unwrap());
    }
    client.call_async(&name, &1, |_: Result<u64, Error>| panic!("this panic is part of the test"));
    client.close();
    let mut results: Vec<(u64, Result<u64, Error>)> = tell.try_iter().collect();
    results.sort_by_key(|(n, _)| *n);
    assert_eq!(results.len(), 100, "closing waits for what is in flight");
    for (n, result) in results {
        match result {
            Err(Error::Returned { code: 312, .. }) => assert_eq!(n % 10, 0),
            Err(Error::Remote { .. }) => assert!([13, 14].contains(&n)),
            Ok(square) => assert_eq!(square, n * n),
            Err(other) => panic!("{n}: {other}"),
        }
    }
}

fn a_queue_that_is_not_there_fails_at_once_and_a_silent_one_times_out(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let silent = queue(&connection, "silent");
    let client = RpcClient::new(&app).unwrap();
    let start = Instant::now();
    match client.call::<_, Value>(&unique("missing"), &1).unwrap_err() {
        Error::Returned { code, .. } => assert_eq!(code, 312),
        other => panic!("unexpected: {other}"),
    }
    assert!(start.elapsed() < Duration::from_secs(20), "well before its time-out");
    let start = Instant::now();
    let error = client.call_timeout::<_, Value>(&silent, &1, Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }) && error.to_string().contains(&silent), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(300));
    wait_until("the request is not kept for nobody", || connection.get_and_ack(&silent).unwrap().is_none());

    let full = unique("full");
    let declared = Queue::new(&full).max_length(1).overflow(coney::Overflow::RejectPublish);
    connection.queue_declare(&declared).unwrap();
    connection.publish("", &full, "it").unwrap();
    let error = client.call::<_, Value>(&full, &1).unwrap_err();
    assert!(matches!(error, Error::Nacked { .. }), "{error}");
}

/// Takes a request by hand.
pub fn request(connection: &Connection, queue: &str) -> (String, String) {
    let request = connection.get_timeout(queue, PATIENCE).unwrap().expect("a request").ack().unwrap();
    let message = request.message();
    (message.reply_to().unwrap().to_owned(), message.correlation_id().unwrap().to_owned())
}

fn late_double_and_foreign_answers_are_dropped_and_counted(broker: Broker) {
    let app = broker.app("[pools.publish]\nmandatory = false");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "by-hand");
    let client = RpcClient::new(&app).unwrap();
    let answer = |to: &str, id: &str, n: u64| {
        let message = Message::json(&json!({"success": true, "data": n})).unwrap().with_correlation_id(id);
        connection.publish("", to, message).unwrap();
    };
    // The request outlives its call by being taken from the queue in time.
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.call_timeout::<_, u64>(&name, &1, Duration::from_secs(2)));
        let (to, id) = request(&connection, &name);
        assert!(matches!(calling.join().unwrap(), Err(Error::Timeout { .. })));
        answer(&to, &id, 1);
    });
    wait_until("the late one is counted", || client.stats().unmatched == 1);
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.call::<_, u64>(&name, &2));
        let (to, id) = request(&connection, &name);
        answer(&to, "somebody-else", 7);
        answer(&to, "", 8);
        answer(&to, &id, 2);
        answer(&to, &id, 9);
        assert_eq!(calling.join().unwrap().unwrap(), 2);
    });
    wait_until("the others are counted", || client.stats().unmatched == 4);
}

fn on_the_wire_it_is_what_the_guide_says(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, answers) = (unique("wire"), queue(&connection, "answers"));
    let worker =
        RpcWorker::new(&app).route(&name, |text: String| if text == "no" { Err(text) } else { Ok(text + "!") }).run();
    let _worker = worker.unwrap();
    let ask = |body: Vec<u8>| -> (Message, Value) {
        let message = Message::new(body).with_reply_to(&answers).with_correlation_id("id-7");
        connection.publish("", &name, message).unwrap();
        let answer = connection.get_timeout(&answers, PATIENCE).unwrap().expect("an answer").ack().unwrap();
        let value = Encoding::GzipJson.decode(answer.body(), 1000).unwrap();
        assert_eq!(answer.body()[..2], [0x1f, 0x8b], "gzip");
        (answer.into_message(), value)
    };
    let gzip = |value: Value| Encoding::GzipJson.encode(&value).unwrap().into_body();
    // As {"data": ...} and bare, in gzip and plain.
    for body in [gzip(json!({"data": "hi"})), gzip(json!("hi")), b"{\"data\": \"hi\"}".to_vec(), b"\"hi\"".to_vec()] {
        let (message, value) = ask(body);
        assert_eq!((message.correlation_id(), message.kind()), (Some("id-7"), Some("result")));
        assert_eq!(message.content_encoding(), Some("gzip"));
        assert_eq!(value, json!({"success": true, "data": "hi!"}));
    }
    let (_, value) = ask(gzip(json!("no")));
    let error = json!({"type": "String", "message": "no", "args": ["no"], "trace": ""});
    assert_eq!(value, json!({"success": false, "error": error}));
    let (_, value) = ask(b"{no json".to_vec());
    assert_eq!((value["success"].as_bool(), value["error"]["type"].as_str()), (Some(false), Some("DecodeError")));

    // And the client's requests.
    let asked = queue(&connection, "asked");
    let client = RpcClient::new(&app).unwrap();
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.call_timeout::<_, Value>(&asked, &json!([1]), Duration::from_secs(1)));
        let request = connection.get_timeout(&asked, PATIENCE).unwrap().expect("a request").ack().unwrap();
        assert_eq!(Encoding::GzipJson.decode::<Value>(request.body(), 1000).unwrap(), json!({"data": [1]}));
        calling.join().unwrap().unwrap_err();
    });
}

fn a_request_that_wants_no_answer_and_one_whose_asker_is_gone_cost_nothing(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = unique("no-answer");
    let worker = squares(&app, &name);
    let gone = unique("gone");
    connection.publish("", &name, "1").unwrap();
    connection.publish("", &name, Message::new("2").with_reply_to(&gone)).unwrap();
    // The address of a client that is gone.
    let asked = queue(&connection, "asked");
    let client = RpcClient::new(&app).unwrap();
    let (address, _) = thread::scope(|scope| {
        scope.spawn(|| client.call_timeout::<_, Value>(&asked, &1, Duration::from_secs(1)).unwrap_err());
        request(&connection, &asked)
    });
    client.close();
    connection.publish("", &name, Message::new("3").with_reply_to(address)).unwrap();
    wait_until("all are acked", || worker.stats().acked == 3);
    assert_eq!((worker.stats().recoveries, worker.stats().requeued), (0, 0));
    // A forged one, for which RabbitMQ ends the worker's connection. The request does not go round for ever.
    connection.publish("", &name, Message::new("4").with_reply_to("amq.rabbitmq.reply-to.g1h2.gone==")).unwrap();
    wait_until("it is acked too", || worker.stats().acked == 4 && broker.queue_unacked(&name) == 0);
    assert_eq!(RpcClient::new(&app).unwrap().call::<_, u64>(&name, &4).unwrap(), 16);
}

fn a_forged_address_among_others_costs_none_of_them_its_answer(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = unique("forged");
    let (open, gate) = crossbeam_channel::bounded::<()>(0);
    let worker = RpcWorker::new(&app)
        .route(&name, move |n: u64| {
            // The first one waits until all are there, so that their answers are under way together.
            let _ = gate.recv();
            Ok::<_, String>(n * n)
        })
        .run()
        .unwrap();
    let client = RpcClient::new(&app).unwrap();
    let (tell, told) = mpsc::channel();
    for n in 0..20_u64 {
        let tell = tell.clone();
        client.call_async(&name, &n, move |answer: Result<u64, Error>| tell.send((n, answer)).unwrap());
        if n == 10 {
            wait_until("half of them are there", || client.stats().calls == 11);
            let forged = Message::new("99").with_reply_to("amq.rabbitmq.reply-to.g1h2.gone==");
            connection.publish("", &name, forged).unwrap();
        }
    }
    wait_until("all are there", || client.stats().calls == 20);
    drop(open);
    for _ in 0..20 {
        let (n, answer) = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(answer.unwrap(), n * n);
    }
    wait_until("the forged one is acked too", || broker.queue_unacked(&name) == 0 && worker.stats().acked >= 21);
}

fn a_worker_that_is_replaced_in_the_middle_loses_no_call(broker: Broker) {
    let app = broker.app("");
    let name = unique("replaced");
    let first = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap().with_timeout(PATIENCE);
    let answered = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            let (client, name, answered) = (client.clone(), &name, Arc::clone(&answered));
            scope.spawn(move || {
                for n in 100..300_u64 {
                    assert_eq!(client.call::<_, u64>(name, &n).unwrap(), n * n);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        wait_until("it is under way", || answered.load(Ordering::Relaxed) > 100);
        first.stop().unwrap();
        let second = squares(&app, &name);
        wait_until("all are answered", || answered.load(Ordering::Relaxed) == 800);
        drop(second);
    });
}

fn a_broker_that_restarts_in_the_middle_leaves_no_call_hanging(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = unique("restarted");
    let _worker = squares(&app, &name);
    let timeout = Duration::from_secs(5);
    let client = RpcClient::new(&app).unwrap().with_timeout(timeout);
    let (answered, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    match client.call::<_, u64>(&name, &100) {
                        Ok(square) => {
                            assert_eq!(square, 10_000);
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => {
                            assert!(error.is_transient() || error.code() == Some(312), "{error}");
                            failed.fetch_add(1, Ordering::Relaxed);
                            thread::park_timeout(Duration::from_millis(20));
                        }
                    }
                    assert!(start.elapsed() < timeout + Duration::from_secs(5), "{:?}", start.elapsed());
                }
            });
        }
        wait_until("it is under way", || answered.load(Ordering::Relaxed) > 20);
        node.stop_app();
        wait_until("some have failed", || failed.load(Ordering::Relaxed) > 0);
        node.start_app();
        let before = answered.load(Ordering::Relaxed);
        wait_until("calls are answered again", || answered.load(Ordering::Relaxed) > before + 20);
        stop.store(true, Ordering::Relaxed);
    });
}

fn a_closed_client_says_so(broker: Broker) {
    let app = broker.app("");
    let client = RpcClient::new(&app).unwrap();
    let clone = client.clone();
    client.close();
    let error = clone.call::<_, Value>("q", &1).unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
    assert_eq!(app.publish_pool().status().in_use, 0);
}

fn a_client_that_is_closed_ends_when_the_last_call_does_however_that_ends(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (silent, full) = (queue(&connection, "silent"), unique("full"));
    let declared = Queue::new(&full).max_length(1).overflow(coney::Overflow::RejectPublish);
    connection.queue_declare(&declared).unwrap();
    connection.publish("", &full, "x").unwrap();
    let long = 10 * PATIENCE;
    let ends = [
        (silent.as_str(), Duration::from_secs(1), "took longer than 1s"),
        (full.as_str(), long, "(nack)"),
        ("there is no such queue", long, "312"),
    ];
    for (name, timeout, expected) in ends {
        let client = RpcClient::new(&app).unwrap().with_timeout(timeout);
        let (tell, told) = mpsc::channel();
        client.call_async(name, &1, move |answer: Result<Value, Error>| tell.send(answer).unwrap());
        let (close, closed) = mpsc::channel();
        // Left to itself if it is stuck: the test says so and ends.
        thread::spawn(move || {
            client.close();
            close.send(()).unwrap();
        });
        closed.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the client of {name:?} is stuck in its close"));
        let error = told.try_recv().expect("the outcome is told before the close is done").unwrap_err().to_string();
        assert!(error.contains(expected), "{name:?}: {error}");
    }
}

fn a_shutdown_waits_for_no_client_that_has_nothing_in_flight(broker: Broker) {
    let app = broker.app("");
    let name = unique("left-open");
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap();
    assert_eq!(client.call::<_, u64>(&name, &3).unwrap(), 9);
    app.shutdown(PATIENCE).unwrap();
    let error = client.call::<_, u64>(&name, &3).unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
}

fn a_shutdown_ends_although_calls_are_made_all_the_time(broker: Broker) {
    let (owner, app) = (broker.app(""), broker.app(""));
    let name = unique("all-the-time");
    // So slow that there is always a call in flight.
    let slow = |n: u64| {
        thread::park_timeout(Duration::from_millis(10));
        Ok::<_, String>(n * n)
    };
    let _worker = RpcWorker::new(&owner).route(&name, slow).run().unwrap();
    let client = RpcClient::new(&app).unwrap();
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let start = Instant::now();
                // Ends by itself, should the shutdown fail.
                while start.elapsed() < 2 * PATIENCE {
                    match client.call::<_, u64>(&name, &3) {
                        Ok(square) => assert_eq!(square, 9),
                        Err(error) => return assert!(matches!(error, Error::PoolClosed { .. }), "{error}"),
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        wait_until("it is under way", || answered.load(Ordering::Relaxed) > 50);
        app.shutdown(PATIENCE).unwrap();
    });
}

fn a_call_may_wait_for_ever_and_disturbs_no_other(broker: Broker) {
    let app = broker.app("");
    let name = unique("for-ever");
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap();
    for timeout in [Duration::MAX, Duration::from_secs(60 * 86_400), Duration::from_secs(40 * 86_400), PATIENCE] {
        assert_eq!(client.call_timeout::<_, u64>(&name, &4, timeout).unwrap(), 16, "{timeout:?}");
    }
}

fn a_type_that_panics_when_it_is_read_is_an_error_of_its_call_alone(broker: Broker) {
    #[derive(Debug)]
    struct Grumpy;
    impl<'de> serde::Deserialize<'de> for Grumpy {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Grumpy, D::Error> {
            panic!("this panic is part of the test")
        }
    }
    let app = broker.app("");
    let name = unique("grumpy");
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap();
    let (tell, told) = mpsc::channel();
    let tell_of = tell.clone();
    client.call_async(&name, &5, move |outcome: Result<Grumpy, Error>| tell_of.send(outcome.map(|_| 0)).unwrap());
    client.call_async(&name, &5, move |outcome: Result<u64, Error>| tell.send(outcome).unwrap());
    let error = told.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error, Error::Encoding { .. }) && error.to_string().contains("part of the test"), "{error}");
    assert_eq!(told.recv_timeout(PATIENCE).unwrap().unwrap(), 25);
}

fn asynchronous_calls_wait_for_room(broker: Broker) {
    let (owner, app) = (broker.app(""), broker.app("[pools.publish]\nmax_in_flight = 10"));
    let name = unique("room");
    let (open, gate) = crossbeam_channel::bounded::<()>(0);
    let slow = move |n: u64| {
        let _ = gate.recv();
        Ok::<_, String>(n * n)
    };
    let _worker = RpcWorker::new(&owner).route(&name, slow).run().unwrap();
    let client = RpcClient::new(&app).unwrap().with_timeout(10 * PATIENCE);
    let (made, (tell, told)) = (AtomicUsize::new(0), mpsc::channel());
    let (made, of_name) = (&made, &name);
    thread::scope(|scope| {
        let calling = client.clone();
        scope.spawn(move || {
            for n in 0..100_u64 {
                let tell = tell.clone();
                calling.call_async(of_name, &n, move |answer: Result<u64, Error>| tell.send((n, answer)).unwrap());
                made.fetch_add(1, Ordering::SeqCst);
            }
        });
        wait_until("there is no more room", || made.load(Ordering::SeqCst) == 10);
        // Another one, with little time, is told in time, and so is one of a clone.
        let (tell, late) = mpsc::channel();
        let hurried = client.clone().with_timeout(Duration::from_millis(100));
        hurried.call_async(of_name, &1, move |answer: Result<u64, Error>| tell.send(answer).unwrap());
        let error = late.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }) && error.to_string().contains("outstanding"), "{error}");
        assert_eq!(made.load(Ordering::SeqCst), 10);
        drop(open);
        for _ in 0..100 {
            let (n, answer) = told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(answer.unwrap(), n * n);
        }
    });
    client.close();
}

#[test]
fn asynchronous_calls_wait_for_room_while_the_broker_is_away() {
    let closed = closed_port();
    let app = crate::support::app(&format!("amqp://{closed}"), "[pools.publish]\nmax_in_flight = 10");
    let client = RpcClient::new(&app).unwrap().with_timeout(Duration::from_millis(300));
    let told = Arc::new(AtomicUsize::new(0));
    for made in 0..30 {
        let noted = Arc::clone(&told);
        client.call_async("q", &made, move |answer: Result<u64, Error>| {
            assert!(matches!(answer, Err(Error::Connect { .. } | Error::Timeout { .. })), "{answer:?}");
            noted.fetch_add(1, Ordering::SeqCst);
        });
        assert!(made + 1 - told.load(Ordering::SeqCst) <= 10 + 1, "call {made} has not waited");
    }
    client.close();
    assert_eq!(told.load(Ordering::SeqCst), 30);
}

fn a_callback_may_call_though_there_is_no_room(broker: Broker) {
    let app = broker.app("[pools.publish]\nmax_in_flight = 1");
    let name = unique("chain");
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap().with_timeout(10 * PATIENCE);
    let (tell, told) = mpsc::channel();
    fn chain(client: &RpcClient, name: &str, n: u64, tell: mpsc::Sender<u64>) {
        let (again, to) = (client.clone(), name.to_owned());
        client.call_async(name, &n, move |answer: Result<u64, Error>| match n {
            120 => tell.send(answer.unwrap()).unwrap(),
            n => chain(&again, &to, n + 1, tell),
        });
    }
    chain(&client, &name, 20, tell);
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 120 * 120);
}

fn a_call_while_publishing_is_blocked_says_so(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = unique("blocked");
    let _worker = squares(&app, &name);
    let client = RpcClient::new(&app).unwrap().with_timeout(PATIENCE);
    assert_eq!(client.call::<_, u64>(&name, &3).unwrap(), 9);
    node.block_publishers();
    // RabbitMQ says so to a connection that publishes, and only then.
    let short = client.clone().with_timeout(Duration::from_millis(500));
    let (tell, told) = mpsc::channel();
    let mut last = None;
    wait_until("a call is told", || {
        let error = short.call::<_, u64>(&name, &4).unwrap_err();
        last = Some(error.clone());
        matches!(error, Error::Blocked { .. })
    });
    assert!(last.unwrap().to_string().contains("low on memory"));
    for call in 0..2 {
        let error = short.call::<_, u64>(&name, &5).unwrap_err();
        assert!(matches!(error, Error::Blocked { written: false, .. }), "{call}: {error}");
        let tell = tell.clone();
        short.call_async(&name, &6, move |answer: Result<u64, Error>| tell.send(answer).unwrap());
        let error = told.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert!(matches!(error, Error::Blocked { .. }), "{call}: {error}");
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.call::<_, u64>(&name, &7));
        node.unblock_publishers();
        assert_eq!(waiting.join().unwrap().unwrap(), 49);
    });
    client.close();
}

/// A type that panics in one of its traits.
#[derive(Clone, Copy, PartialEq)]
enum Bad {
    Read,
    Written,
    Shown,
    Traced,
    Dropped,
}

fn panics() -> ! {
    panic!("this panic is part of the test")
}

struct BadRequest(Bad);

impl<'de> serde::Deserialize<'de> for BadRequest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<BadRequest, D::Error> {
        match u8::deserialize(deserializer)? {
            0 => panics(),
            1 => Ok(BadRequest(Bad::Written)),
            2 => Ok(BadRequest(Bad::Shown)),
            3 => Ok(BadRequest(Bad::Traced)),
            _ => Ok(BadRequest(Bad::Dropped)),
        }
    }
}

struct BadAnswer;

impl serde::Serialize for BadAnswer {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        panics()
    }
}

struct BadError(Bad);

impl std::fmt::Display for BadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == Bad::Shown { panics() } else { f.write_str("shown") }
    }
}

impl std::fmt::Debug for BadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == Bad::Traced { panics() } else { f.write_str("traced") }
    }
}

impl Drop for BadError {
    fn drop(&mut self) {
        if self.0 == Bad::Dropped {
            panics()
        }
    }
}

fn a_type_of_the_worker_s_that_panics_is_answered_at_once(broker: Broker) {
    let app = broker.app("");
    let name = unique("bad-types");
    let worker = RpcWorker::new(&app)
        .traces(true)
        .route(&name, |BadRequest(bad)| if bad == Bad::Written { Ok(BadAnswer) } else { Err(BadError(bad)) })
        .run()
        .unwrap();
    // Longer than the test may take: an answer that does not come is seen.
    let client = RpcClient::new(&app).unwrap().with_timeout(10 * PATIENCE);
    let start = Instant::now();
    for bad in [Bad::Read, Bad::Written, Bad::Shown, Bad::Traced, Bad::Dropped] {
        match client.call::<_, Value>(&name, &(bad as u8)).unwrap_err() {
            Error::Remote { kind, message, .. } => {
                assert_eq!((kind.as_str(), message.as_str()), ("panic", "this panic is part of the test"));
            }
            other => panic!("{}: {other}", bad as u8),
        }
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    wait_until("each is handled once", || worker.stats().acked == 5 && broker.queue_unacked(&name) == 0);
    assert_eq!((worker.stats().delivered, worker.stats().requeued, worker.stats().panicked), (5, 0, 0));
}

fn an_answer_that_a_hook_does_not_let_out_is_answered_at_once(broker: Broker) {
    let (asking, app) = (broker.app(""), broker.app(""));
    app.listen_pool().before_publish(|_, message| {
        let value: Value = Encoding::Json.decode(message.body(), 1000)?;
        match value["data"].as_u64() {
            Some(1) => Err(Error::refused("not this one")),
            Some(2) => panics(),
            _ => Ok(message),
        }
    });
    let name = unique("hooked");
    let worker = RpcWorker::new(&app).route(&name, Ok::<u64, String>).run().unwrap();
    let client = RpcClient::new(&asking).unwrap().with_timeout(10 * PATIENCE);
    let start = Instant::now();
    assert_eq!(client.call::<_, u64>(&name, &3).unwrap(), 3);
    for (n, expected, words) in [(1, "SendError", "not this one"), (2, "panic", "part of the test")] {
        match client.call::<_, u64>(&name, &n).unwrap_err() {
            Error::Remote { kind, message, .. } => assert!(kind == expected && message.contains(words), "{message}"),
            other => panic!("{n}: {other}"),
        }
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    wait_until("each is handled once", || worker.stats().acked == 3 && broker.queue_unacked(&name) == 0);
    assert_eq!((worker.stats().delivered, worker.stats().requeued), (3, 0));
}

fn a_worker_sends_traces_when_it_is_told_to(broker: Broker) {
    let app = broker.app("");
    let (loud, quiet) = (unique("loud"), unique("quiet"));
    let fails = |_: u64| Err::<(), _>(std::io::Error::other("not that one"));
    let worker = RpcWorker::new(&app).traces(true).route(&loud, fails).traces(false).route(&quiet, fails);
    let _worker = worker.run().unwrap();
    let client = RpcClient::new(&app).unwrap();
    let trace = |queue: &str| match client.call::<_, ()>(queue, &1).unwrap_err() {
        Error::Remote { trace, .. } => trace,
        other => panic!("unexpected: {other}"),
    };
    assert!(trace(&loud).contains("kind: Other"), "{}", trace(&loud));
    assert_eq!(trace(&quiet), "");
}

fn a_worker_declares_no_queues_beside_its_own_unless_it_is_asked(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"1s\"]");
    let (plain, asked) = (unique("plain"), unique("asked"));
    let policy = coney::RetryPolicy::new([std::time::Duration::from_secs(2)]).unwrap();
    let worker = RpcWorker::new(&app).route(&plain, |n: u64| Ok::<_, String>(n)).retry(policy);
    let _worker = worker.route(&asked, |n: u64| Ok::<_, String>(n)).run().unwrap();
    let client = RpcClient::new(&app).unwrap();
    assert_eq!(client.call::<_, u64>(&plain, &7).unwrap(), 7);
    let connection = app.publish_pool().connection().unwrap();
    let exists = |queue: String| connection.queue_declare_passive(&queue).is_ok();
    assert!(!exists(format!("{plain}.dead")) && !exists(format!("{plain}.retry.1000")));
    assert!(
        exists(format!("{asked}.dead"))
            && exists(format!("{asked}.retry.2000"))
            && !exists(format!("{asked}.retry.1000"))
    );
}
