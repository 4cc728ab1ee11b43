//! Publishing through the pool: one call that lasts through lost connections, and never repeats what was refused.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{App, ConnectError, Error, Exchange, Message, Overflow, Pool, Queue};

use crate::contract;
use crate::proxy::{Cut, Proxy};
use crate::support::{Broker, PATIENCE, app, bodies, drain, queue, unique, wait_until};

contract! {
    through_a_killed_broker_every_message_arrives_and_a_repetition_bears_the_same_id,
    what_the_broker_refuses_is_told_at_once_and_not_sent_again,
    without_a_broker_nothing_is_sent_and_the_cause_is_told_in_time,
    a_block_is_told_at_the_deadline_and_seen_in_the_status,
    an_id_of_the_callers_is_kept_and_none_is_made_up_twice,
    who_waits_for_a_connection_publishes_in_company_and_a_refusal_costs_only_its_own,
    in_a_line_each_has_its_own_deadline_and_the_rest_goes_on,
    a_pool_that_is_closed_tells_the_whole_line,
    many_threads_and_two_connections_lose_nothing_while_connections_break,
}

fn through_a_killed_broker_every_message_arrives_and_a_repetition_bears_the_same_id(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("heartbeat = \"2s\"\n[pools.publish]\npublish_timeout = \"300s\"");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "outlives");
    let (threads, each) = (2, 1_500);
    let sent = Mutex::new(0);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (name, sent) = (&name, &sent);
            scope.spawn(move || {
                for n in 0..each {
                    pool.publish("", name, format!("{thread}-{n}")).unwrap();
                    *sent.lock().unwrap() += 1;
                }
            });
        }
        for at in [500, 1_500] {
            wait_until("some are sent", || *sent.lock().unwrap() >= at);
            node.kill();
            node.start_again();
        }
    });
    all_arrived(&app, &name, threads * each);
}

/// That so many different messages are in the queue, each under one id, however often.
fn all_arrived(app: &App, queue: &str, count: usize) {
    let received = drain(&app.listen_pool().connection().unwrap(), queue);
    let distinct: HashSet<_> = received.iter().map(|one| one.message().text().unwrap()).collect();
    assert_eq!(distinct.len(), count, "lost");
    let ids: HashSet<_> = received.iter().map(|one| one.message().message_id().expect("an id")).collect();
    assert_eq!(ids.len(), count, "a repetition has an id of its own, or two messages have one");
    println!("{} of {} were repeated", received.len() - distinct.len(), distinct.len());
}

fn what_the_broker_refuses_is_told_at_once_and_not_sent_again(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let full = unique("full");
    connection.queue_declare(&Queue::new(&full).max_length(1).overflow(Overflow::RejectPublish)).unwrap();
    let fanout = unique("heard-by-nobody");
    connection.exchange_declare(&Exchange::fanout(&fanout).auto_delete(true)).unwrap();
    let start = Instant::now();
    pool.publish("", &full, "fits").unwrap();
    let error = pool.publish("", &full, "one too many").unwrap_err();
    assert!(matches!(error, Error::Nacked { .. }), "{error}");
    let error = pool.publish(&fanout, "k", "x").unwrap_err();
    assert!(matches!(error, Error::Returned { code: 312, .. }), "{error}");
    let error = pool.publish("no-such-exchange", "k", "x").unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 404, .. }), "{error}");
    let error = pool.publish("", &"k".repeat(256), "x").unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    let reader = crate::support::app(&broker.reader_url(), "");
    let error = reader.publish_pool().publish("amq.topic", "k", "x").unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 403, .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(25), "it has waited for something: {:?}", start.elapsed());
    assert_eq!(broker.queue_len(&full), 1);
    assert_eq!(pool.status().created, 2, "a refusal costs no connection");
}

fn without_a_broker_nothing_is_sent_and_the_cause_is_told_in_time(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "absent");
    node.kill();
    let start = Instant::now();
    let error = pool.publish_timeout("", &name, "x", Duration::from_secs(1)).unwrap_err();
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    // The first attempt may have begun on the connection that was open, before its end was seen.
    assert!(
        matches!(error, Error::Connect { cause: ConnectError::Io(_) | ConnectError::Handshake(_), .. })
            || matches!(&error, Error::OutcomeUnknown { cause, .. } if cause.is_transient()),
        "{error}"
    );
    let error = pool.publish_timeout("", &name, "x", Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && error.is_transient(), "{error}");
    node.start_again();
    pool.publish("", &name, "after").unwrap();
    assert_eq!(node.queue_len(&name), 1);
    app.shutdown(Duration::from_secs(10)).unwrap();
    let error = pool.publish("", &name, "x").unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
}

fn a_block_is_told_at_the_deadline_and_seen_in_the_status(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "blocked");
    assert_eq!(pool.status().blocked, None);
    node.block_publishers();
    let start = Instant::now();
    let second = Duration::from_secs(1);
    let error = pool.publish_timeout("", &name, "x", second).unwrap_err();
    let is_blocked =
        matches!(&error, Error::Blocked { reason, waited, .. } if reason.contains("memory") && *waited == second);
    assert!(is_blocked, "{error}");
    assert!(start.elapsed() >= second && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let connection = pool.connection().unwrap();
    thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            connection.publish("", &name, "waits").unwrap();
            connection
        });
        wait_until("a connection that is lent shows", || {
            pool.status().blocked.is_some_and(|reason| reason.contains("memory"))
        });
        node.unblock_publishers();
        drop(publishing.join().unwrap());
    });
    wait_until("it is lifted", || pool.status().blocked.is_none());
    pool.publish("", &name, "after").unwrap();
}

fn an_id_of_the_callers_is_kept_and_none_is_made_up_twice(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "ids");
    pool.publish("", &name, Message::new("mine").with_message_id("order-1")).unwrap();
    pool.publish("", &name, "a").unwrap();
    pool.publish("", &name, "b").unwrap();
    let received = drain(&app.listen_pool().connection().unwrap(), &name);
    let ids: Vec<_> = received.iter().map(|one| one.message().message_id().unwrap()).collect();
    assert_eq!(ids[0], "order-1");
    assert!(ids[1] != ids[2] && ids[1].len() == 32 && ids[1].bytes().all(|byte| byte.is_ascii_hexdigit()), "{ids:?}");
}

/// Threads that publish through a pool of one, whose connection is out until all of them wait.
fn in_line<T: Send>(pool: &Pool, publishes: Vec<Box<dyn FnOnce() -> T + Send + '_>>) -> Vec<T> {
    let out = pool.connection().unwrap();
    thread::scope(|scope| {
        let mut waiting = Vec::new();
        for publish in publishes {
            waiting.push(scope.spawn(publish));
            let count = u32::try_from(waiting.len()).unwrap();
            wait_until("it waits", || pool.status().waiting == count);
        }
        drop(out);
        waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn who_waits_for_a_connection_publishes_in_company_and_a_refusal_costs_only_its_own(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let (name, full) = (queue(&connection, "company"), unique("full"));
    connection.queue_declare(&Queue::new(&full).max_length(1).overflow(Overflow::RejectPublish)).unwrap();
    connection.publish("", &full, "fits").unwrap();
    drop(connection);
    let missing = unique("missing");
    let to =
        |exchange: &'static str, key: &'static str, n: usize| -> Box<dyn FnOnce() -> coney::Result<()> + Send + '_> {
            let key = match key {
                "well" => &name,
                "full" => &full,
                _ => &missing,
            };
            Box::new(move || pool.publish(exchange, key, n.to_string()))
        };
    let outcomes = in_line(
        pool,
        vec![
            to("", "well", 0),
            to("", "full", 1),
            to("", "well", 2),
            to("no-such-exchange", "well", 3),
            to("", "well", 4),
            to("", "missing", 5),
            to("", "well", 6),
        ],
    );
    let mut refused = Vec::new();
    for (n, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(()) => {}
            Err(Error::Nacked { .. }) => refused.push((n, 0)),
            Err(error) => refused.push((n, error.code().unwrap_or_else(|| panic!("{n}: {error}")))),
        }
    }
    assert_eq!(refused, [(1, 0), (3, 404), (5, 312)]);
    let received = drain(&app.listen_pool().connection().unwrap(), &name);
    // What was with the one that cost them their channel may be there twice, under one id.
    let mut ids = HashSet::new();
    let mut bodies: Vec<_> = received
        .iter()
        .filter(|one| ids.insert(one.message().message_id().expect("an id")))
        .map(|one| one.message().text().unwrap())
        .collect();
    bodies.sort_unstable();
    assert_eq!(bodies, ["0", "2", "4", "6"]);
    let status = pool.status();
    assert_eq!((status.created, status.waiting, status.in_use), (1, 0, 0), "{status:?}");
}

fn in_a_line_each_has_its_own_deadline_and_the_rest_goes_on(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let out = pool.connection().unwrap();
    let name = queue(&out, "deadlines");
    thread::scope(|scope| {
        // The one that waits for the connection on behalf of all, and one that waits for it.
        let short = Duration::from_millis(300);
        let mut impatient = Vec::new();
        let mut patient = Vec::new();
        for n in 0..6 {
            let name = &name;
            if n % 3 == 0 {
                impatient.push(scope.spawn(move || pool.publish_timeout("", name, n.to_string(), short)));
            } else {
                patient.push(scope.spawn(move || pool.publish_timeout("", name, n.to_string(), PATIENCE)));
            }
            if n == 0 {
                wait_until("it is the first", || pool.status().waiting == 1);
            }
        }
        for thread in impatient {
            let error = thread.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::PoolExhausted { size: 1, .. }), "{error}");
        }
        wait_until("the others wait", || pool.status().waiting == 4);
        drop(out);
        for thread in patient {
            thread.join().unwrap().unwrap();
        }
    });
    let mut bodies = bodies(&drain(&app.listen_pool().connection().unwrap(), &name));
    bodies.sort_unstable();
    assert_eq!(bodies, ["1", "2", "4", "5"], "each once: nothing has been lost");
}

fn a_pool_that_is_closed_tells_the_whole_line(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let out = pool.connection().unwrap();
    thread::scope(|scope| {
        let line: Vec<_> = (0..5).map(|_| scope.spawn(|| pool.publish("", "nowhere", "x"))).collect();
        wait_until("they wait", || pool.status().waiting == 5);
        pool.close();
        drop(out);
        for thread in line {
            let error = thread.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
        }
    });
}

fn many_threads_and_two_connections_lose_nothing_while_connections_break(broker: Broker) {
    let proxy = Proxy::start(broker.addr()).unwrap();
    let app = app(&format!("amqp://guest:guest@{}/", proxy.addr()), "[pools.publish]\nsize = 2");
    let pool = app.publish_pool();
    let name = queue(&broker.app("").publish_pool().connection().unwrap(), "crowd");
    let (threads, each) = (12, 300);
    let sent = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (name, sent) = (&name, &sent);
            scope.spawn(move || {
                for n in 0..each {
                    pool.publish("", name, format!("{thread}-{n}")).unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 1..=6 {
            wait_until("they go on", || sent.load(Ordering::Relaxed) >= round * threads * each / 8);
            proxy.cut(if round % 2 == 0 { Cut::Reset } else { Cut::Fin });
        }
    });
    all_arrived(&broker.app(""), &name, threads * each);
}

#[test]
fn without_a_word_on_what_was_written_the_outcome_is_unknown_and_says_so() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "unknown");
    broker.control().withhold_confirms(true);
    let error = pool.publish_timeout("", &name, Message::new("x").with_message_id("id-1"), Duration::from_millis(500));
    let error = error.unwrap_err();
    let Error::OutcomeUnknown { message_id, cause, after, .. } = &error else { panic!("{error}") };
    assert_eq!((message_id.as_str(), *after), ("id-1", Duration::from_millis(500)));
    assert!(matches!(**cause, Error::Timeout { .. }), "{cause}");
    assert!(error.to_string().contains("not known") && error.is_transient(), "{error}");
    // Written once, and taken, as this broker happens to have done.
    assert_eq!(broker.control().queue_len(&name), 1);
    // The same when the connection is lost in the meantime and there is no other.
    let losing = thread::spawn({
        let (pool, name) = (pool.clone(), name.clone());
        move || pool.publish_timeout("", &name, "x", Duration::from_secs(2))
    });
    broker.control().wait_for_queue_len(&name, 2, PATIENCE).unwrap();
    broker.control().refuse_connections(true);
    broker.control().drop_connections();
    let error = losing.join().unwrap().unwrap_err();
    let Error::OutcomeUnknown { cause, .. } = &error else { panic!("{error}") };
    assert!(matches!(**cause, Error::Connect { .. } | Error::ConnectionLost { .. }), "{cause}");
}

#[test]
fn who_publishes_for_others_may_run_out_of_time_and_they_go_on() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let out = pool.connection().unwrap();
    let name = queue(&out, "left");
    broker.control().withhold_confirms(true);
    thread::scope(|scope| {
        let first = scope.spawn(|| pool.publish_timeout("", &name, "first", Duration::from_secs(5)));
        wait_until("it waits", || pool.status().waiting == 1);
        let second = scope.spawn(|| pool.publish_timeout("", &name, "second", PATIENCE));
        wait_until("both wait", || pool.status().waiting == 2);
        drop(out);
        broker.control().wait_for_queue_len(&name, 2, PATIENCE).unwrap();
        let error = first.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::OutcomeUnknown { .. }), "{error}");
        broker.control().withhold_confirms(false);
        second.join().unwrap().unwrap();
    });
    let received = drain(&app.listen_pool().connection().unwrap(), &name);
    let ids: HashSet<_> = received.iter().map(|one| one.message().message_id().unwrap()).collect();
    assert_eq!((ids.len(), received.len()), (2, 3), "the second one has been repeated, under its id");
}

#[test]
fn closing_the_pool_ends_the_trying() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    let pool = app.publish_pool().clone();
    broker.control().refuse_connections(true);
    let trying = thread::spawn({
        let pool = pool.clone();
        move || pool.publish_timeout("", "nowhere", "x", Duration::from_secs(600))
    });
    wait_until("it tries", || pool.status().in_use == 1);
    pool.close();
    let error = trying.join().unwrap().unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
}
