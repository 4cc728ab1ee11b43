//! A broker that is killed, stopped or short of memory: nothing said to be sent is lost, and no call hangs.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Connection, Error, Message, PooledConnection, Queue};

use crate::contract;
use crate::support::{Broker, app, bodies, drain, hurt_node, queue, wait_until};

contract! {
    killed_under_sync_publishers_nothing_confirmed_is_missing_and_the_pool_serves_again,
    killed_under_async_publishers_every_callback_is_run_once_and_ok_means_kept,
    a_killed_broker_is_a_lost_connection,
    a_blocked_publisher_is_told_so_by_its_deadline_and_consumers_go_on,
    a_block_that_is_lifted_in_time_is_only_a_delay,
    an_app_made_while_the_broker_is_down_works_once_it_is_up,
    the_app_being_stopped_and_started_is_a_transient_loss,
}

/// Heartbeats of 2 s: a silent broker is noticed after 4 to 5 s.
pub const IMPATIENT: &str = r#"
heartbeat = "2s"
connect_timeout = "2s"
operation_timeout = "2s"
[pools.publish]
checkout_timeout = "2s"
confirm_timeout = "2s"
[pools.listen]
checkout_timeout = "2s"
confirm_timeout = "2s"
"#;

/// When a broker that does not answer is noticed at the latest: two heartbeats, and a second to look.
const NOTICED: Duration = Duration::from_secs(5);
/// The longest that any one call above may take: what governs it is 2 s, or the heartbeats, or one after the other.
pub const CALL: Duration = Duration::from_secs(7);
/// The longest that giving a connection back, or closing a pool, may take.
const CLOSE: Duration = Duration::from_secs(5);
/// How soon a pool must be of use again once the broker is.
const RESUMED: Duration = Duration::from_secs(15);

#[track_caller]
pub fn in_time<T>(what: &str, call: impl FnOnce() -> T) -> T {
    in_time_of(CALL, what, call)
}

#[track_caller]
fn in_time_of<T>(limit: Duration, what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = call();
    assert!(start.elapsed() < limit, "{what} took {:?}", start.elapsed());
    result
}

/// A broker's return to life, and what publishers have seen of it.
#[derive(Default)]
struct Progress {
    confirmed: AtomicUsize,
    up: OnceLock<Instant>,
}

/// Publishes `count` numbers from `first`, each once, through the pool. Returns those confirmed, and how long after the
/// broker was up again the first of those was that were begun since.
fn publish_through(
    app: &App,
    queue: &str,
    first: usize,
    count: usize,
    progress: &Progress,
) -> (HashSet<String>, Option<Duration>) {
    let mut confirmed = HashSet::new();
    let mut resumed = None;
    for n in first..first + count {
        let body = n.to_string();
        let since_up = progress.up.get();
        let connection = in_time("checkout", || app.publish_pool().connection());
        let outcome = connection
            .and_then(|connection| in_time("publish", || connection.publish("", queue, Message::new(body.as_str()))));
        match outcome {
            Ok(()) => {
                confirmed.insert(body);
                progress.confirmed.fetch_add(1, Ordering::Relaxed);
                resumed = resumed.or(since_up.map(Instant::elapsed));
            }
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
    }
    (confirmed, resumed)
}

/// Takes what a queue holds, of which nothing may be there twice.
#[track_caller]
fn contents(connection: &Connection, queue: &str) -> HashSet<String> {
    let received = drain(connection, queue);
    let arrived: HashSet<String> = bodies(&received).into_iter().collect();
    assert_eq!(arrived.len(), received.len(), "something is there twice");
    arrived
}

fn killed_under_sync_publishers_nothing_confirmed_is_missing_and_the_pool_serves_again(broker: Broker) {
    let node = broker.hurt();
    let app = node.app(IMPATIENT);
    let name = queue(&app.publish_pool().connection().unwrap(), "killed");
    let (progress, count) = (Progress::default(), 5_000);
    let mut confirmed = HashSet::new();
    thread::scope(|scope| {
        let publishers: Vec<_> = (0..2)
            .map(|n| {
                let (app, name, progress) = (&app, &name, &progress);
                scope.spawn(move || publish_through(app, name, n * count, count, progress))
            })
            .collect();
        wait_until("2,000 are confirmed", || progress.confirmed.load(Ordering::Relaxed) >= 2_000);
        node.kill();
        node.start_again();
        progress.up.set(Instant::now()).unwrap();
        for publisher in publishers {
            let (mine, resumed) = publisher.join().unwrap();
            confirmed.extend(mine);
            let resumed = resumed.expect("some were published after the restart");
            eprintln!("{broker:?}: confirmed again {resumed:.1?} after the broker was up");
            assert!(resumed < RESUMED, "it took {resumed:?}");
        }
    });
    let connection = in_time("checkout after the restart", || app.publish_pool().connection()).unwrap();
    let arrived = contents(&connection, &name);
    let lost = confirmed.difference(&arrived).count();
    eprintln!("{broker:?}: {} confirmed, {} arrived, {lost} lost", confirmed.len(), arrived.len());
    assert_eq!(lost, 0, "of {} confirmed", confirmed.len());
    assert!(arrived.iter().all(|body| body.parse().is_ok_and(|n: usize| n < 2 * count)), "what nobody sent");
}

fn killed_under_async_publishers_every_callback_is_run_once_and_ok_means_kept(broker: Broker) {
    let node = broker.hurt();
    let app = node.app(IMPATIENT);
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "killed-async");
    let told = Arc::new(Mutex::new((HashSet::new(), 0_usize)));
    let count = 10_000;
    thread::scope(|scope| {
        let told = &told;
        let name = &name;
        let publishing = scope.spawn(move || {
            for n in 0..count {
                let told = Arc::clone(told);
                in_time("publish_async", || {
                    connection.publish_async("", name, n.to_string(), move |outcome| {
                        let mut told = told.lock().unwrap();
                        told.1 += 1;
                        match outcome {
                            Ok(()) => assert!(told.0.insert(n.to_string()), "told twice"),
                            Err(error) => assert!(error.is_transient(), "{error}"),
                        }
                    });
                });
            }
            in_time("giving back", || drop(connection));
        });
        wait_until("2,000 are confirmed", || told.lock().unwrap().0.len() >= 2_000);
        node.kill();
        publishing.join().unwrap();
    });
    assert_eq!(told.lock().unwrap().1, count);
    node.start_again();
    let connection = in_time("checkout after the restart", || app.publish_pool().connection()).unwrap();
    let arrived = contents(&connection, &name);
    let told = told.lock().unwrap();
    assert!(told.0.is_subset(&arrived), "{} confirmed messages are missing", told.0.difference(&arrived).count());
    assert_eq!(app.publish_pool().status().discarded, 1);
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn with_the_node_paused_every_call_and_every_destructor_ends() {
    let node = hurt_node();
    let app = app(&node.url(), &format!("{IMPATIENT}size = 8"));
    let pool = app.listen_pool();
    let guards: Vec<_> = (0..8).map(|_| pool.connection().unwrap()).collect();
    let name = queue(&guards[0], "paused");
    for (n, guard) in guards.iter().enumerate() {
        guard.publish("", &name, format!("before {n}")).unwrap();
    }
    let told = Arc::new(AtomicUsize::new(0));
    node.pause().unwrap();
    thread::scope(|scope| {
        let (name, told) = (name.as_str(), &told);
        type GuardedCall<'a> = Box<dyn FnOnce(&PooledConnection) -> Option<Error> + Send + 'a>;
        let calls: Vec<GuardedCall<'_>> = vec![
            Box::new(move |c| c.publish("", name, "sync").err()),
            Box::new(move |c| c.get(name).map(drop).err()),
            Box::new(move |c| c.get_timeout(name, Duration::from_secs(1)).map(drop).err()),
            Box::new(move |c| c.queue_declare(&Queue::new(name)).map(drop).err()),
            Box::new(move |c| c.publish_batch((0..3000).map(|n| ("", name, format!("batch {n}")))).map(drop).err()),
            Box::new(move |c| c.publish("", name, vec![b'x'; 40_000_000]).err()),
            Box::new(move |c| {
                for n in 0..500 {
                    let told = Arc::clone(told);
                    c.publish_async("", name, format!("async {n}"), move |outcome| {
                        outcome.unwrap_err();
                        told.fetch_add(1, Ordering::Relaxed);
                    });
                }
                c.get_and_ack_async(name, |outcome| drop(outcome.unwrap_err()));
                None
            }),
            Box::new(|_| None), // only given back
        ];
        for (n, (call, guard)) in calls.into_iter().zip(guards).enumerate() {
            scope.spawn(move || {
                if let Some(error) = in_time_of(NOTICED, &format!("call {n}"), || call(&guard)) {
                    let ended = matches!(error, Error::Timeout { .. } | Error::ConnectionLost { .. });
                    let batch = matches!(&error, Error::Batch(batch) if batch.confirmed == 0);
                    assert!(ended || batch, "call {n}: {error}");
                }
                in_time_of(CLOSE, &format!("giving back after call {n}"), || drop(guard));
            });
        }
    });
    assert_eq!(told.load(Ordering::Relaxed), 500);
    // A handshake with a stopped broker ends too.
    let error = in_time("connect", || app.publish_pool().connection()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    node.resume().unwrap();
    let start = Instant::now();
    let connection = app.publish_pool().connection().unwrap();
    assert!(start.elapsed() < RESUMED, "it took {:?}", start.elapsed());
    connection.publish("", &name, "after").unwrap();
    // What was written before the pause is all there, of what was written during it some may be; nothing twice. What a
    // get has taken that had no time left to ack it comes back.
    let mut arrived: Vec<String> = Vec::new();
    wait_until("what was taken is back", || {
        arrived.extend(drain(&connection, &name).iter().map(|one| one.message().text().unwrap().to_owned()));
        (0..8).filter(|n| arrived.contains(&format!("before {n}"))).count() == 8
    });
    let distinct: HashSet<&String> = arrived.iter().collect();
    assert_eq!(distinct.len(), arrived.len(), "something is there twice");
    let known =
        |body: &str| ["before ", "sync", "batch ", "xxx", "async ", "after"].iter().any(|one| body.starts_with(one));
    assert!(arrived.iter().all(|body| known(body)));
    in_time_of(CLOSE, "close of the app", || drop((connection, app)));
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_that_stands_still_is_noticed_by_its_heartbeats() {
    let node = hurt_node();
    // Nothing but the heartbeats can end these calls in time.
    let extra = r#"
        heartbeat = "2s"
        operation_timeout = "60s"
        [pools.publish]
        size = 3
        checkout_timeout = "60s"
        confirm_timeout = "60s"
    "#;
    let app = app(&node.url(), extra);
    let mut guards: Vec<_> = (0..3).map(|_| app.publish_pool().connection().unwrap()).collect();
    let name = queue(&guards[0], "still");
    guards[0].publish("", &name, "before").unwrap();
    node.pause().unwrap();
    thread::scope(|scope| {
        let name = name.as_str();
        let mut spawn = |what: &'static str, call: fn(&Connection, &str) -> Error| {
            let guard = guards.pop().unwrap();
            scope.spawn(move || {
                let start = Instant::now();
                let error = call(&guard, name);
                let took = start.elapsed();
                eprintln!("{what}: {took:.1?}");
                assert!(matches!(error, Error::ConnectionLost { .. }), "{what}: {error}");
                assert!(took < NOTICED + Duration::from_secs(2), "{what}: {took:?}");
                in_time_of(CLOSE, "giving back", || drop(guard));
            });
        };
        spawn("declare", |guard, name| guard.queue_declare(&Queue::new(name)).map(drop).unwrap_err());
        spawn("purge", |guard, name| guard.queue_purge(name).map(drop).unwrap_err());
        spawn("publish", |guard, name| guard.publish("", name, "during").unwrap_err());
    });
    node.resume().unwrap();
    let connection = in_time_of(RESUMED, "checkout", || app.publish_pool().connection()).unwrap();
    connection.publish("", &name, "after").unwrap();
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn each_call_keeps_the_deadline_that_governs_it_and_names_itself() {
    let node = hurt_node();
    // Heartbeats do not come into it.
    let extra = r#"
        heartbeat = "600s"
        operation_timeout = "6s"
        [pools.publish]
        confirm_timeout = "1s"
    "#;
    let app = app(&node.url(), extra);
    let name = queue(&app.publish_pool().connection().unwrap(), "deadlines");
    let guards: Vec<_> = (0..4).map(|_| app.publish_pool().connection().unwrap()).collect();
    guards[1].publish("", &name, "its channel is open").unwrap();
    node.pause().unwrap();
    let timed = |what: &str, at_least: u64, below: u64, call: &dyn Fn() -> Error| {
        let start = Instant::now();
        let error = call();
        let took = start.elapsed();
        assert!(matches!(error, Error::Timeout { .. }) && error.is_transient(), "{what}: {error}");
        assert!(error.to_string().contains(&name), "{what}: {error}");
        assert!(took >= Duration::from_millis(at_least) && took < Duration::from_millis(below), "{what}: {took:?}");
    };
    thread::scope(|scope| {
        let (name, timed) = (name.as_str(), &timed);
        let mut guards = guards.into_iter();
        let mut spawn = |what: &'static str, at_least, below, call: fn(&coney::Connection, &str) -> Error| {
            let guard = guards.next().unwrap();
            scope.spawn(move || timed(what, at_least, below, &|| call(&guard, name)));
        };
        spawn("first publish", 900, 5_900, |guard, name| guard.publish("", name, "x").unwrap_err());
        spawn("publish", 900, 5_900, |guard, name| guard.publish("", name, "x").unwrap_err());
        spawn("get", 5_900, 20_000, |guard, name| guard.get(name).map(drop).unwrap_err());
        spawn("purge", 5_900, 20_000, |guard, name| guard.queue_purge(name).map(drop).unwrap_err());
    });
    node.resume().unwrap();
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn closing_an_app_takes_no_longer_for_many_pools() {
    let node = hurt_node();
    let app = app(&node.url(), "heartbeat = \"600s\"\n[pools.a]\n[pools.b]\n[pools.c]\n");
    for pool in app.pools() {
        drop((pool.connection().unwrap(), pool.connection().unwrap()));
    }
    node.pause().unwrap();
    let start = Instant::now();
    app.shutdown(Duration::from_secs(30)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(9), "it took {:?}", start.elapsed());
    node.resume().unwrap();
}

fn a_killed_broker_is_a_lost_connection(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "lost");
    node.kill();
    let error = connection.publish("", &name, "x").unwrap_err();
    assert!(matches!(error, Error::ConnectionLost { .. }) && error.is_transient(), "{error}");
    assert!(error.to_string().contains(&name), "{error}");
}

fn a_blocked_publisher_is_told_so_by_its_deadline_and_consumers_go_on(broker: Broker) {
    let node = broker.hurt();
    let app = node.app(IMPATIENT);
    let publisher = app.publish_pool().connection().unwrap();
    let consumer = app.listen_pool().connection().unwrap();
    let name = queue(&publisher, "blocked");
    publisher.publish("", &name, "before").unwrap();
    node.block_publishers();
    // The broker notices a publisher by its first publish, and says so.
    let first = in_time("publish", || publisher.publish("", &name, "during")).unwrap_err();
    assert!(matches!(&first, Error::Blocked { reason, .. } if reason.contains("low on memory")), "{first}");
    assert!(publisher.blocked().is_some_and(|reason| reason.contains("memory")));
    let start = Instant::now();
    let second = in_time("publish", || publisher.publish("", &name, "refused")).unwrap_err();
    assert!(matches!(second, Error::Blocked { .. }) && start.elapsed() >= Duration::from_secs(2), "{second}");
    let told = Arc::new(AtomicUsize::new(0));
    publisher.publish_async("", &name, "refused", {
        let told = Arc::clone(&told);
        move |outcome| {
            assert!(matches!(outcome, Err(Error::Blocked { .. })), "{outcome:?}");
            told.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(consumer.get_and_ack(&name).unwrap().expect("consumers go on").body(), b"before");
    in_time_of(CLOSE, "giving back", || drop(publisher));
    assert_eq!(told.load(Ordering::Relaxed), 1);
    // A pool can be closed meanwhile, whoever is blocked in it.
    let other = node.app(IMPATIENT);
    let blocked = other.publish_pool().connection().unwrap();
    assert!(matches!(blocked.publish("", &name, "during too").unwrap_err(), Error::Blocked { .. }));
    in_time_of(CLOSE, "giving back", || drop(blocked));
    in_time_of(CLOSE, "closing the app", || drop(other));
    node.unblock_publishers();
    let publisher = app.publish_pool().connection().unwrap();
    for n in 0..100 {
        publisher.publish("", &name, format!("after {n}")).unwrap();
    }
    let mut left = contents(&consumer, &name);
    for n in 0..100 {
        assert!(left.remove(&format!("after {n}")), "{n} is lost");
    }
    // What was written before the broker said that it blocks may have been taken; nothing else.
    left.retain(|body| body != "during" && body != "during too");
    assert!(left.is_empty(), "{left:?}");
}

fn a_block_that_is_lifted_in_time_is_only_a_delay(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nconfirm_timeout = \"60s\"");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "lifted");
    node.block_publishers();
    thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            connection.publish("", &name, "one").unwrap();
            connection.publish("", &name, "two").unwrap();
            connection
        });
        wait_until("the broker has said so", || node.has_blocked_a_publisher());
        node.unblock_publishers();
        let connection = publishing.join().unwrap();
        assert_eq!(bodies(&drain(&connection, &name)), ["one", "two"]);
    });
}

fn an_app_made_while_the_broker_is_down_works_once_it_is_up(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\ncheckout_timeout = \"60s\"");
    node.kill();
    let error = app.publish_pool().connection_timeout(Duration::from_millis(300)).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    thread::scope(|scope| {
        // This checkout begins while the broker is down and rides out its start.
        let waiting = scope.spawn(|| {
            let connection = app.publish_pool().connection().unwrap();
            let name = queue(&connection, "up");
            connection.publish("", &name, "x").unwrap();
        });
        wait_until("it is trying", || app.publish_pool().status().in_use == 1);
        node.start_again();
        waiting.join().unwrap();
    });
}

fn the_app_being_stopped_and_started_is_a_transient_loss(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "stopped");
    connection.publish("", &name, "kept").unwrap();
    node.stop_app();
    wait_until("it is noticed", || !connection.is_alive());
    let error = connection.publish("", &name, "x").unwrap_err();
    assert!(error.is_transient(), "{error}");
    drop(connection);
    node.start_app();
    let connection = app.publish_pool().connection().unwrap();
    assert_eq!(bodies(&drain(&connection, &name)), ["kept"]);
}
