//! A broker that is killed, stopped or short of memory: nothing said to be sent is lost, and no call hangs.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Error, Queue};

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

/// Longest time that any one call above may take, on a busy machine.
pub const CALL: Duration = Duration::from_secs(15);

#[track_caller]
pub fn in_time<T>(what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = call();
    assert!(start.elapsed() < CALL, "{what} took {:?}", start.elapsed());
    result
}

/// Publishes `count` numbers from `first`, through the pool, trying again after errors; returns those confirmed.
fn publish_through(app: &App, queue: &str, first: usize, count: usize, sent: &AtomicUsize) -> HashSet<String> {
    let mut confirmed = HashSet::new();
    for n in first..first + count {
        let body = n.to_string();
        let outcome = in_time("checkout and publish", || {
            app.publish_pool().connection().and_then(|connection| connection.publish("", queue, body.as_str()))
        });
        match outcome {
            Ok(()) => drop(confirmed.insert(body)),
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
        sent.fetch_add(1, Ordering::Relaxed);
    }
    confirmed
}

fn killed_under_sync_publishers_nothing_confirmed_is_missing_and_the_pool_serves_again(broker: Broker) {
    let node = broker.hurt();
    let app = node.app(IMPATIENT);
    let name = queue(&app.publish_pool().connection().unwrap(), "killed");
    let sent = AtomicUsize::new(0);
    let confirmed = thread::scope(|scope| {
        let publishers: Vec<_> = (0..2)
            .map(|n| {
                let (app, name, sent) = (&app, &name, &sent);
                scope.spawn(move || publish_through(app, name, n * 10_000, 2_000, sent))
            })
            .collect();
        wait_until("1,000 are sent", || sent.load(Ordering::Relaxed) >= 1_000);
        node.kill();
        node.start_again();
        publishers.into_iter().flat_map(|publisher| publisher.join().unwrap()).collect::<HashSet<_>>()
    });
    assert!(confirmed.len() >= 1_000);
    let connection = in_time("checkout after the restart", || app.publish_pool().connection()).unwrap();
    connection.publish("", &name, "after").unwrap();
    let arrived: HashSet<String> = bodies(&drain(&connection, &name)).into_iter().collect();
    let lost: Vec<_> = confirmed.difference(&arrived).collect();
    assert!(lost.is_empty(), "{} confirmed messages are missing", lost.len());
    assert!(arrived.contains("after"));
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
    let arrived: HashSet<String> = bodies(&drain(&connection, &name)).into_iter().collect();
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
    for guard in &guards {
        guard.publish("", &name, "before").unwrap();
    }
    let told = Arc::new(AtomicUsize::new(0));
    node.pause().unwrap();
    thread::scope(|scope| {
        let (name, told) = (name.as_str(), &told);
        let calls: Vec<Box<dyn FnOnce(coney::PooledConnection) -> Option<Error> + Send>> = vec![
            Box::new(move |c| c.publish("", name, "x").err()),
            Box::new(move |c| c.get(name).map(drop).err()),
            Box::new(move |c| c.get_timeout(name, Duration::from_secs(1)).map(drop).err()),
            Box::new(move |c| c.queue_declare(&Queue::new(name)).map(drop).err()),
            Box::new(move |c| c.publish_batch((0..3000).map(|n| ("", name, n.to_string()))).map(drop).err()),
            Box::new(move |c| c.publish("", name, vec![0; 40_000_000]).err()),
            Box::new(move |c| {
                for n in 0..500 {
                    let told = Arc::clone(told);
                    c.publish_async("", name, n.to_string(), move |outcome| {
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
                if let Some(error) = in_time(&format!("call {n} and giving back"), || call(guard)) {
                    let ended = matches!(error, Error::Timeout { .. } | Error::ConnectionLost { .. });
                    let batch = matches!(&error, Error::Batch(batch) if batch.confirmed == 0);
                    assert!(ended || batch, "call {n}: {error}");
                }
            });
        }
    });
    assert_eq!(told.load(Ordering::Relaxed), 500);
    // A handshake with a stopped broker ends too, and closing does.
    let error = in_time("connect", || app.publish_pool().connection()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    in_time("close of the app", || drop(app));
    node.resume().unwrap();
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn each_call_keeps_the_deadline_that_governs_it_and_names_itself() {
    let node = hurt_node();
    // Heartbeats do not come into it.
    let extra = r#"
        heartbeat = "600s"
        operation_timeout = "3s"
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
        spawn("first publish", 900, 2_900, |guard, name| guard.publish("", name, "x").unwrap_err());
        spawn("publish", 900, 2_900, |guard, name| guard.publish("", name, "x").unwrap_err());
        spawn("get", 2_900, 10_000, |guard, name| guard.get(name).map(drop).unwrap_err());
        spawn("purge", 2_900, 10_000, |guard, name| guard.queue_purge(name).map(drop).unwrap_err());
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
    in_time("giving back", || drop(publisher));
    assert_eq!(told.load(Ordering::Relaxed), 1);
    node.unblock_publishers();
    let publisher = app.publish_pool().connection().unwrap();
    publisher.publish("", &name, "after").unwrap();
    let left = bodies(&drain(&consumer, &name));
    assert!(left.contains(&"after".to_owned()) && !left.contains(&"refused".to_owned()), "{left:?}");
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
