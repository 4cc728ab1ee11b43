//! Many messages in flight: each has an outcome of its own, told exactly once.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{Binding, Error, Exchange, Message, Overflow, Queue, Result};

use crate::contract;
use crate::support::{Broker, PATIENCE, app, bodies, drain, queue, unique, wait_until};

contract! {
    a_guard_may_be_given_back_in_its_own_callback,
    a_channel_that_the_broker_closes_under_a_stream_costs_no_connection,
    ten_thousand_callbacks_each_exactly_once_and_in_order_in_the_queue,
    messages_keep_their_order_in_whatever_way_each_is_sent,
    returns_and_nacks_among_a_thousand_in_flight_find_their_message,
    a_return_finds_its_message_among_others_with_the_same_route,
    when_the_channel_dies_every_callback_gets_the_brokers_words,
    a_channel_replaced_while_a_callback_runs_forgets_no_other,
    back_pressure_begins_at_the_in_flight_limit,
    a_slow_callback_keeps_no_confirm_waiting,
    giving_the_guard_back_waits_for_the_callbacks,
    a_stuck_callback_holds_up_nobody_for_longer_than_the_confirm_timeout,
    a_panic_in_a_callback_is_caught_and_the_others_are_run,
    what_cannot_be_sent_calls_back_too,
    a_batch_says_which_of_its_messages_were_not_confirmed,
    a_batch_goes_on_after_the_channel_was_closed_and_loses_no_failure,
    of_messages_with_one_body_the_right_one_is_returned,
    a_publish_in_the_middle_of_a_batch_takes_none_of_its_outcomes,
    what_was_confirmed_before_the_channel_was_closed_stays_confirmed,
}

#[derive(Clone, Default)]
struct Outcomes(Arc<Mutex<HashMap<usize, Vec<Result<()>>>>>);

impl Outcomes {
    fn callback(&self, n: usize) -> impl FnOnce(Result<()>) + Send + 'static {
        let outcomes = self.clone();
        move |outcome| outcomes.0.lock().unwrap().entry(n).or_default().push(outcome)
    }

    /// The outcome of each of `count` messages; fails unless each has been told exactly once.
    #[track_caller]
    fn each(&self, count: usize) -> Vec<Result<()>> {
        let mut told = std::mem::take(&mut *self.0.lock().unwrap());
        assert_eq!(told.len(), count, "messages with an outcome");
        (0..count)
            .map(|n| {
                let mut outcomes = told.remove(&n).unwrap_or_default();
                assert_eq!(outcomes.len(), 1, "outcomes of message {n}");
                outcomes.remove(0)
            })
            .collect()
    }
}

fn ten_thousand_callbacks_each_exactly_once_and_in_order_in_the_queue(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "many");
    let outcomes = Outcomes::default();
    for n in 0..10_000 {
        // Sync in between keeps its place too.
        if n % 1000 == 999 {
            connection.publish("", &queue, n.to_string()).unwrap();
            outcomes.callback(n)(Ok(()));
        } else {
            connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
        }
    }
    connection.flush(PATIENCE).unwrap();
    assert!(outcomes.each(10_000).iter().all(Result::is_ok));
    let expected: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
    assert_eq!(bodies(&drain(&connection, &queue)), expected);
}

fn messages_keep_their_order_in_whatever_way_each_is_sent(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "mixed");
    let (outcomes, count) = (Outcomes::default(), 400);
    for n in 0..count {
        // Short, and so long that it is several frames.
        let body = " ".repeat(fastrand::choice([0, 20_000, 200_000]).unwrap()) + &n.to_string();
        match fastrand::u8(..10) {
            0..=5 => connection.publish_async("", &name, body, outcomes.callback(n)),
            6..=8 => outcomes.callback(n)(connection.publish("", &name, body)),
            _ => outcomes.callback(n)(connection.publish_batch([("", &*name, body)]).map(drop)),
        }
    }
    connection.flush(PATIENCE).unwrap();
    assert!(outcomes.each(count).iter().all(Result::is_ok));
    let numbers: Vec<usize> =
        bodies(&drain(&connection, &name)).iter().map(|body| body.trim_start().parse().unwrap()).collect();
    assert!(numbers.into_iter().eq(0..count));
}

fn returns_and_nacks_among_a_thousand_in_flight_find_their_message(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let open = queue(&connection, "open");
    let full = unique("full");
    connection.queue_declare(&Queue::new(&full).max_length(1).overflow(Overflow::RejectPublish)).unwrap();
    connection.publish("", &full, "the one").unwrap();
    let nowhere = unique("nowhere");
    let outcomes = Outcomes::default();
    for n in 0..1000 {
        let to = match n % 5 {
            1 => &nowhere,
            3 => &full,
            _ => &open,
        };
        connection.publish_async("", to, n.to_string(), outcomes.callback(n));
    }
    connection.flush(PATIENCE).unwrap();
    for (n, outcome) in outcomes.each(1000).into_iter().enumerate() {
        match (n % 5, outcome) {
            (1, Err(Error::Returned { code: 312, routing_key, .. })) => assert_eq!(routing_key, nowhere),
            (3, Err(Error::Nacked { routing_key, .. })) => assert_eq!(routing_key, full),
            (0 | 2 | 4, Ok(())) => {}
            (_, outcome) => panic!("message {n}: {outcome:?}"),
        }
    }
    let expected: Vec<String> = (0..1000).filter(|n| n % 5 != 1 && n % 5 != 3).map(|n| n.to_string()).collect();
    assert_eq!(bodies(&drain(&connection, &open)), expected);
}

fn a_return_finds_its_message_among_others_with_the_same_route(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = unique("comes-and-goes");
    // The route exists for the even hundreds only.
    let outcomes = Outcomes::default();
    for n in 0..400 {
        if n % 200 == 0 {
            connection.queue_declare(&Queue::new(&queue)).unwrap();
        }
        if n % 200 == 100 {
            connection.flush(PATIENCE).unwrap();
            connection.queue_delete(&queue).unwrap();
        }
        connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
        if n % 200 == 199 {
            connection.flush(PATIENCE).unwrap();
        }
    }
    for (n, outcome) in outcomes.each(400).into_iter().enumerate() {
        assert_eq!(outcome.is_ok(), n % 200 < 100, "message {n}: {outcome:?}");
    }
}

fn when_the_channel_dies_every_callback_gets_the_brokers_words(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "behind404");
    let missing = unique("missing");
    for round in 0..5 {
        let outcomes = Outcomes::default();
        connection.publish_async(&missing, "k", "bad", outcomes.callback(0));
        for n in 1..300 {
            connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
        }
        connection.flush(PATIENCE).unwrap();
        let each = outcomes.each(300);
        let bad = each[0].as_ref().unwrap_err();
        assert!(bad.code() == Some(404) && bad.to_string().contains(&missing), "round {round}: {bad}");
        // Those behind it went down with the channel or were sent on a new one.
        for (n, outcome) in each.iter().enumerate().skip(1) {
            assert!(outcome.is_ok() || outcome.as_ref().unwrap_err().code() == Some(404), "{n}: {outcome:?}");
        }
        let arrived = drain(&connection, &queue).len();
        assert!(arrived >= each.iter().filter(|outcome| outcome.is_ok()).count());
    }
    connection.publish("", &queue, "fine").unwrap();
}

fn a_channel_replaced_while_a_callback_runs_forgets_no_other(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "replaced");
    let missing = unique("missing");
    let (go, gate) = mpsc::channel::<()>();
    let (begun, in_callback) = mpsc::channel();
    connection.publish_async("", &queue, "first", move |_| {
        begun.send(()).unwrap();
        let _ = gate.recv_timeout(PATIENCE);
    });
    in_callback.recv_timeout(PATIENCE).unwrap();
    let outcomes = Outcomes::default();
    connection.publish_async(&missing, "k", "bad", outcomes.callback(0));
    // It goes down with the channel, or is sent on the next one: either way the channel is gone then.
    if let Err(error) = connection.publish("", &queue, "behind") {
        assert_eq!(error.code(), Some(404), "{error}");
    }
    connection.publish_async("", &queue, "good", outcomes.callback(1));
    go.send(()).unwrap();
    connection.flush(PATIENCE).unwrap();
    let each = outcomes.each(2);
    let bad = each[0].as_ref().unwrap_err();
    assert!(bad.code() == Some(404) && bad.to_string().contains(&missing), "{bad}");
    each[1].as_ref().unwrap();
}

fn back_pressure_begins_at_the_in_flight_limit(broker: Broker) {
    let app = broker.app("[pools.publish]\nmax_in_flight = 10\nconfirm_timeout = \"60s\"");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "window");
    let told = Arc::new(AtomicUsize::new(0));
    let called = AtomicUsize::new(0);
    let (go, gate) = mpsc::channel::<()>();
    let (begun, in_callback) = mpsc::channel();
    // Callbacks are run one after another: while this one waits, none of the others is.
    connection.publish_async("", &queue, "first", move |_| {
        begun.send(()).unwrap();
        let _ = gate.recv_timeout(PATIENCE);
    });
    in_callback.recv_timeout(PATIENCE).unwrap();
    thread::scope(|scope| {
        let (called, told, name) = (&called, &told, &queue);
        scope.spawn(move || {
            for n in 0..100 {
                let told = Arc::clone(told);
                connection.publish_async("", name, n.to_string(), move |outcome| {
                    outcome.unwrap();
                    told.fetch_add(1, Ordering::Relaxed);
                });
                called.fetch_add(1, Ordering::Relaxed);
            }
            drop(connection);
        });
        // The first and nine more make ten.
        wait_until("the window is full", || broker.queue_len(name) == 10);
        wait_until("nine calls have returned", || called.load(Ordering::Relaxed) >= 9);
        assert_eq!((called.load(Ordering::Relaxed), told.load(Ordering::Relaxed)), (9, 0));
        go.send(()).unwrap();
    });
    assert_eq!((called.load(Ordering::Relaxed), told.load(Ordering::Relaxed)), (100, 100));
    assert_eq!(broker.queue_len(&queue), 101);
}

fn a_slow_callback_keeps_no_confirm_waiting(broker: Broker) {
    let app = broker.app("[pools.publish]\nconfirm_timeout = \"2s\"");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "slow");
    let (release, stuck) = mpsc::channel::<()>();
    let (begun, in_callback) = mpsc::channel();
    connection.publish_async("", &queue, "async", move |_| {
        begun.send(()).unwrap();
        let _ = stuck.recv_timeout(PATIENCE);
    });
    in_callback.recv_timeout(PATIENCE).unwrap();
    connection.publish("", &queue, "sync").unwrap();
    connection.publish_batch((0..100).map(|n| ("", &queue, n.to_string()))).unwrap();
    release.send(()).unwrap();
}

fn giving_the_guard_back_waits_for_the_callbacks(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "waited");
    let outcomes = Outcomes::default();
    for n in 0..500 {
        connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
    }
    drop(connection);
    assert!(outcomes.each(500).iter().all(Result::is_ok));
    assert_eq!(app.publish_pool().status().idle, 1);
    // The connection is as good as new, with and without callbacks.
    let connection = app.publish_pool().connection().unwrap();
    connection.publish("", &queue, "again").unwrap();
    connection.publish_batch((0..10).map(|n| ("", &queue, n.to_string()))).unwrap();
    connection.publish_async("", &queue, "async again", outcomes.callback(0));
    connection.flush(PATIENCE).unwrap();
    assert!(outcomes.each(1)[0].is_ok());
}

fn a_stuck_callback_holds_up_nobody_for_longer_than_the_confirm_timeout(broker: Broker) {
    let app = broker.app("[pools.publish]\nconfirm_timeout = \"1s\"");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "stuck");
    let (release, stuck) = mpsc::channel::<()>();
    let outcomes = Outcomes::default();
    connection.publish_async("", &queue, "0", move |_| {
        let _ = stuck.recv();
    });
    for n in 0..5 {
        connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
    }
    let start = Instant::now();
    match connection.flush(Duration::from_millis(300)) {
        Err(Error::Timeout { during, .. }) => assert!(during.contains("outstanding"), "{during}"),
        other => panic!("unexpected: {other:?}"),
    }
    drop(connection);
    assert!(start.elapsed() < Duration::from_secs(20), "giving back took {:?}", start.elapsed());
    assert_eq!(app.publish_pool().status().discarded, 1);
    release.send(()).unwrap();
    wait_until("the others are told too", || outcomes.0.lock().unwrap().len() == 5);
    outcomes.each(5);
}

fn a_panic_in_a_callback_is_caught_and_the_others_are_run(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "panics");
    let outcomes = Outcomes::default();
    for n in 0..20 {
        connection.publish_async("", &queue, n.to_string(), outcomes.callback(n));
        connection.publish_async("", &queue, "bad", |_| panic!("this panic is part of the test"));
    }
    drop(connection);
    assert!(outcomes.each(20).iter().all(Result::is_ok));
}

fn what_cannot_be_sent_calls_back_too(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let outcomes = Outcomes::default();
    connection.publish_async("", &"k".repeat(300), "x", outcomes.callback(0));
    connection.flush(PATIENCE).unwrap();
    assert!(matches!(outcomes.each(1)[0], Err(Error::InvalidArgument { .. })));
}

fn a_batch_says_which_of_its_messages_were_not_confirmed(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "batch");
    let count = 5000;
    assert_eq!(connection.publish_batch((0..count).map(|n| ("", &queue, n.to_string()))).unwrap(), count);
    assert_eq!(connection.queue_purge(&queue).unwrap() as usize, count);
    assert_eq!(connection.publish_batch(Vec::<(&str, &str, &str)>::new()).unwrap(), 0);

    let (nowhere, long) = (unique("nowhere"), "x".repeat(256));
    let batch = (0..3000).map(|n| match n {
        7 | 2999 => ("", &nowhere, n.to_string()),
        1500 => ("", &long, n.to_string()),
        _ => ("", &queue, n.to_string()),
    });
    let Err(Error::Batch(error)) = connection.publish_batch(batch) else { panic!("no batch error") };
    assert_eq!(error.confirmed, 2997);
    let failed: Vec<usize> = error.failed.iter().map(|(position, _)| *position).collect();
    assert_eq!(failed, [7, 1500, 2999]);
    assert!(matches!(error.failed[0].1, Error::Returned { .. }));
    assert!(matches!(error.failed[1].1, Error::InvalidArgument { .. }));
    assert!(error.to_string().contains("3 of 3000") && error.to_string().contains("number 7"), "{error}");
    assert_eq!(drain(&connection, &queue).len(), 2997);
}

fn a_batch_goes_on_after_the_channel_was_closed_and_loses_no_failure(broker: Broker) {
    let app = broker.app("[pools.publish]\nmax_in_flight = 50");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "batch404");
    let missing = unique("missing");
    let batch = (0..2000).map(|n| if n % 500 == 250 { (missing.as_str(), "k", n) } else { ("", queue.as_str(), n) });
    let Err(Error::Batch(error)) = connection.publish_batch(batch.map(|(e, k, n)| (e, k, n.to_string()))) else {
        panic!("no batch error")
    };
    assert_eq!(error.confirmed + error.failed.len(), 2000);
    for bad in [250, 750, 1250, 1750] {
        let (_, found) = error.failed.iter().find(|(position, _)| *position == bad).expect("the bad one failed");
        assert_eq!(found.code(), Some(404));
    }
    assert!(error.failed.iter().all(|(_, error)| error.code() == Some(404)));
    let failed: Vec<String> = error.failed.iter().map(|(position, _)| position.to_string()).collect();
    let arrived = bodies(&drain(&connection, &queue));
    let confirmed: Vec<String> = (0..2000).map(|n| n.to_string()).filter(|n| !failed.contains(n)).collect();
    assert!(confirmed.iter().all(|n| arrived.contains(n)), "a confirmed message is missing");
}

fn of_messages_with_one_body_the_right_one_is_returned(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (exchange, queue) = (unique("sorted"), queue(&connection, "sorted"));
    connection.exchange_declare(&Exchange::headers(&exchange)).unwrap();
    connection.bind(&Binding::queue(&queue).to(&exchange).argument("kind", "good")).unwrap();
    let outcomes = Outcomes::default();
    for n in 0..100 {
        let kind = if n % 3 == 1 { "bad" } else { "good" };
        let message = Message::new("same").with_header("kind", kind);
        connection.publish_async(&exchange, "", message, outcomes.callback(n));
    }
    connection.flush(PATIENCE).unwrap();
    for (n, outcome) in outcomes.each(100).into_iter().enumerate() {
        assert_eq!(outcome.is_ok(), n % 3 != 1, "message {n}: {outcome:?}");
    }
}

fn a_publish_in_the_middle_of_a_batch_takes_none_of_its_outcomes(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, nowhere) = (queue(&connection, "nested"), unique("nowhere"));
    let batch = (0..60).map(|n| {
        connection.publish("", &queue, "in between").unwrap();
        ("", if n % 20 == 10 { &nowhere } else { &queue }, n.to_string())
    });
    let Err(Error::Batch(error)) = connection.publish_batch(batch) else { panic!("no batch error") };
    assert_eq!(error.confirmed, 57);
    assert_eq!(error.failed.iter().map(|(position, _)| *position).collect::<Vec<_>>(), [10, 30, 50]);

    // An iterator that panics leaves nothing behind for the next call.
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
        connection.publish_batch((0..20).map(|n| {
            assert!(n < 10, "this panic is part of the test");
            ("", &nowhere, n.to_string())
        }))
    }));
    assert!(panicked.is_err());
    assert_eq!(connection.publish_batch([("", &queue, "fine")]).unwrap(), 1);
}

fn what_was_confirmed_before_the_channel_was_closed_stays_confirmed(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, missing) = (queue(&connection, "before"), unique("missing"));
    let batch = (0..102).map(|n| {
        if n == 100 {
            wait_until("the others are there", || broker.queue_len(&queue) == 100);
            wait_until("and confirmed", || broker.all_confirmed());
        }
        if n == 100 { (missing.as_str(), "k", n.to_string()) } else { ("", queue.as_str(), n.to_string()) }
    });
    let Err(Error::Batch(error)) = connection.publish_batch(batch) else { panic!("no batch error") };
    // The last one was behind the mistake and may have gone down with it.
    let failed: Vec<usize> = error.failed.iter().map(|(position, _)| *position).collect();
    assert!(failed == [100] || failed == [100, 101], "{failed:?}");
}

#[test]
fn a_batch_whose_confirms_do_not_come_is_given_up_after_the_first_time_out() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "[pools.publish]\nconfirm_timeout = \"1s\"\nmax_in_flight = 10");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "unconfirmed");
    broker.control().withhold_confirms(true);
    let start = Instant::now();
    // A hundred windows.
    let Err(Error::Batch(error)) = connection.publish_batch((0..1000).map(|n| ("", &queue, n.to_string()))) else {
        panic!("no batch error")
    };
    assert!(start.elapsed() < Duration::from_secs(8), "it took {:?}", start.elapsed());
    assert_eq!((error.confirmed, error.failed.len()), (0, error.taken), "the rest is left where it was");
    assert!(error.failed.iter().all(|(_, error)| matches!(error, Error::Timeout { .. })), "{error}");
    let sent = broker.control().queue_len(&queue);
    assert!(sent <= 11 && error.taken < 1000, "{sent} were sent, {} taken", error.taken);
}

fn a_guard_may_be_given_back_in_its_own_callback(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let name = queue(&app.publish_pool().connection().unwrap(), "own");
    // Alone, and with others behind it on the same thread.
    for others in [0, 5] {
        let connection = app.publish_pool().connection().unwrap();
        let own = Arc::new(Mutex::new(None));
        let (told, outcomes) = mpsc::channel();
        let (held, done) = (Arc::clone(&own), told.clone());
        connection.publish_async("", &name, "first", move |result| {
            let mut guard: Option<coney::PooledConnection> = None;
            wait_until("it is there", || {
                guard = held.lock().unwrap().take();
                guard.is_some()
            });
            let start = Instant::now();
            drop(guard);
            done.send((result, start.elapsed())).unwrap();
        });
        for n in 0..others {
            let told = told.clone();
            connection
                .publish_async("", &name, n.to_string(), move |result| told.send((result, Duration::ZERO)).unwrap());
        }
        *own.lock().unwrap() = Some(connection);
        let (first, took) = outcomes.recv_timeout(PATIENCE).unwrap();
        first.unwrap();
        assert!(took < Duration::from_secs(5), "{took:?}");
        // Each is told once, whatever became of it.
        (0..others).for_each(|_| drop(outcomes.recv_timeout(PATIENCE).unwrap()));
        app.publish_pool().connection().unwrap().publish("", &name, "next").unwrap();
    }
    let connection = app.publish_pool().connection().unwrap();
    drain(&connection, &name);
    connection.publish("", &name, "x").unwrap();
    let own = Arc::new(Mutex::new(None));
    let (held, (told, outcome)) = (Arc::clone(&own), mpsc::channel());
    connection.get_and_ack_async(&name, move |result| {
        let mut guard: Option<coney::PooledConnection> = None;
        wait_until("it is there", || {
            guard = held.lock().unwrap().take();
            guard.is_some()
        });
        drop(guard);
        told.send(result).unwrap();
    });
    *own.lock().unwrap() = Some(connection);
    assert_eq!(outcome.recv_timeout(Duration::from_secs(8)).unwrap().unwrap().unwrap().body(), b"x");
}

/// Publishing goes on while the broker closes the channel, so that messages cross the close on their way.
fn a_channel_that_the_broker_closes_under_a_stream_costs_no_connection(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 2");
    let (name, missing) = (unique("stream"), unique("missing"));
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&coney::Queue::new(&name)).unwrap();
    drop(connection);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let connection = app.publish_pool().connection().unwrap();
                for number in 0..10_000 {
                    let exchange = if number % 100 == 50 { missing.as_str() } else { "" };
                    let tell = tell.clone();
                    // Of one size that is copied, and of one that goes to the socket from where it is.
                    let body = vec![b'x'; if number % 7 == 0 { 40_000 } else { 10 }];
                    connection.publish_async(exchange, &name, body, move |outcome| tell.send(outcome).unwrap());
                }
            });
        }
    });
    drop(tell);
    let failed: Vec<Error> = told.iter().filter_map(Result::err).collect();
    assert!(!failed.is_empty());
    for error in failed {
        assert!(matches!(error, Error::ChannelClosed { code: 404, .. }), "{error}");
    }
    assert_eq!(app.publish_pool().status().discarded, 0);
}
