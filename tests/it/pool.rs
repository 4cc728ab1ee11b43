//! Pools on a broker that is there: bounded, honest about it, and never lending a dead connection.

use std::panic::AssertUnwindSafe;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{App, ConnectError, Error, PooledConnection, Settings};

use crate::contract;
use crate::support::{Broker, PATIENCE, app, hurt_node, node, queue, unique, wait_until};

contract! {
    an_exhausted_pool_says_how_many_are_out_and_since_when,
    whoever_waits_gets_the_connection_that_comes_back,
    connections_name_themselves_to_the_broker_and_can_change_threads,
    bad_credentials_and_unknown_vhosts_are_told_at_once_with_the_brokers_words,
    a_guard_dropped_by_a_panic_is_discarded,
    a_closed_pool_closes_what_is_idle_now_and_the_rest_when_it_comes_back,
    eight_threads_share_two_connections_and_every_message_arrives,
    an_open_connection_is_lent_before_another_is_opened,
    the_longest_of_times_are_no_reason_to_panic,
    who_waits_when_the_pool_is_closed_gets_no_connection_from_it,
    a_dropped_app_closes_its_pools,
    a_dead_connection_is_never_lent,
    a_guard_whose_connection_dies_says_why_and_is_not_kept,
}

fn an_exhausted_pool_says_how_many_are_out_and_since_when(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 2\ncheckout_timeout = \"200ms\"");
    let pool = app.publish_pool();
    let held = [pool.connection().unwrap(), pool.connection().unwrap()];
    let start = Instant::now();
    let error = pool.connection().unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(200) && error.is_transient());
    let text = error.to_string();
    match error {
        Error::PoolExhausted { pool, size, oldest: Some(holder), .. } => {
            assert_eq!((pool.as_str(), size), ("publish", 2));
            assert!(holder.held >= Duration::from_millis(200));
            assert!(holder.location.file().ends_with("tests/it/pool.rs"));
            assert!(text.contains("all 2 of its connections") && text.contains("tests/it/pool.rs"), "{text}");
        }
        other => panic!("unexpected: {other:?}"),
    }
    assert!(pool.try_connection().is_none());
    let [one, two] = held;
    drop(one);
    assert!(pool.try_connection().is_some_and(|connection| connection.is_alive()));
    drop(two);
    let status = pool.status();
    assert_eq!((status.size, status.idle, status.in_use, status.created, status.discarded), (2, 2, 0, 2, 0));
}

fn whoever_waits_gets_the_connection_that_comes_back(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.connection().map(|connection| connection.name().to_owned()));
        wait_until("somebody waits", || pool.status().waiting == 1);
        drop(connection);
        assert_eq!(waiting.join().unwrap().unwrap(), "coney publish #1");
    });
    assert_eq!(pool.status().created, 1);
}

fn connections_name_themselves_to_the_broker_and_can_change_threads(broker: Broker) {
    let name = unique("named");
    let app = broker.app(&format!("[pools.{name}]\nsize = 2"));
    let pool = app.pool(&name).unwrap();
    let connections: Vec<PooledConnection> = (0..2).map(|_| pool.connection().unwrap()).collect();
    let mut names = broker.connection_names();
    names.retain(|given| given.contains(&name));
    names.sort();
    assert_eq!(names, [format!("coney {name} #1"), format!("coney {name} #2")]);
    let mut connections = connections.into_iter();
    let one = connections.next().unwrap();
    thread::spawn(move || {
        let queue = queue(&one, "elsewhere");
        one.publish("", &queue, "from another thread").unwrap();
    })
    .join()
    .unwrap();
}

fn bad_credentials_and_unknown_vhosts_are_told_at_once_with_the_brokers_words(broker: Broker) {
    let password = "not-the-password";
    let wrong = broker.url_with(&format!("guest:{password}"), "%2f");
    let start = Instant::now();
    let error = app(&wrong, "").publish_pool().connection().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    assert!(!error.is_transient());
    assert_eq!(error.code(), Some(403));
    match &error {
        Error::Connect { cause: ConnectError::AccessRefused { user, text }, .. } => {
            assert_eq!(user, "guest");
            assert!(text.contains("ACCESS_REFUSED - Login was refused"), "{text}");
        }
        other => panic!("unexpected: {other:?}"),
    }
    assert!(!format!("{error} {error:?}").contains(password));

    let nowhere = broker.url_with("guest:guest", "no-such-vhost");
    let error = app(&nowhere, "").publish_pool().connection().unwrap_err();
    assert_eq!(error.code(), Some(530), "{error}");
    assert!(error.to_string().contains("vhost no-such-vhost not found"), "{error}");
    assert!(!error.is_transient());
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn once_the_mistake_is_mended_on_the_broker_the_same_pool_serves() {
    let late = unique("late");
    let app = app(&Broker::RabbitMq.url_with("guest:guest", &late), "");
    assert_eq!(app.publish_pool().connection().unwrap_err().code(), Some(530));
    node().add_vhost(&late).unwrap();
    app.publish_pool().connection().unwrap();
}

fn a_dead_connection_is_never_lent(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nsize = 3");
    let pool = app.publish_pool();
    let connections: Vec<_> = (0..3).map(|_| pool.connection().unwrap()).collect();
    let queue = queue(&connections[0], "alive");
    drop(connections);
    for round in 1..=5 {
        node.close_all_connections("for the test");
        wait_until("they are gone", || node.connections() == 0);
        for _ in 0..3 {
            let connections: Vec<_> = (0..3).map(|_| pool.connection().unwrap()).collect();
            for connection in &connections {
                connection.publish("", &queue, "x").unwrap();
            }
        }
        let status = pool.status();
        assert_eq!((status.created, status.discarded, status.idle), (3 + 3 * round, 3 * round, 3));
    }
}

fn a_guard_whose_connection_dies_says_why_and_is_not_kept(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let queue = queue(&connection, "closing");
    connection.publish("", &queue, "x").unwrap();
    node.close_all_connections("operator says so");
    wait_until("it is noticed", || !connection.is_alive());
    for error in [
        connection.publish("", &queue, "x").unwrap_err(),
        connection.get(&queue).map(drop).unwrap_err(),
        connection.queue_purge(&queue).map(drop).unwrap_err(),
        connection.publish_batch([("", &queue, "x")]).map(drop).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(error.is_transient(), "{text}");
        assert!(text.contains("320") && text.contains("operator says so"), "{text}");
    }
    drop(connection);
    let status = pool.status();
    assert_eq!((status.idle, status.discarded), (0, 1));
    pool.connection().unwrap().publish("", &queue, "x").unwrap();
}

fn a_guard_dropped_by_a_panic_is_discarded(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let _connection = pool.connection().unwrap();
        panic!("this panic is part of the test");
    }));
    assert!(panicked.is_err());
    let status = pool.status();
    assert_eq!((status.idle, status.in_use, status.discarded), (0, 0, 1));
    assert_eq!(pool.connection().unwrap().name(), "coney publish #2");
}

fn a_closed_pool_closes_what_is_idle_now_and_the_rest_when_it_comes_back(broker: Broker) {
    let name = unique("closing");
    let app = broker.app(&format!("[pools.{name}]\nsize = 3"));
    let pool = app.pool(&name).unwrap();
    let open = || broker.connection_names().iter().filter(|given| given.contains(&name)).count();
    let out = pool.connection().unwrap();
    drop((pool.connection().unwrap(), pool.connection().unwrap()));
    assert_eq!(open(), 3);
    pool.close();
    assert!(pool.is_closed() && matches!(pool.connection(), Err(Error::PoolClosed { .. })));
    assert!(pool.try_connection().is_none());
    wait_until("the idle ones are closed", || open() == 1);
    let queue = queue(&out, "still");
    out.publish("", &queue, "works").unwrap();
    drop(out);
    wait_until("the last one is closed", || open() == 0);
}

fn eight_threads_share_two_connections_and_every_message_arrives(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 2\ncheckout_timeout = \"60s\"");
    let queue = queue(&app.publish_pool().connection().unwrap(), "shared");
    let (threads, each) = (8, 2500);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (app, queue) = (&app, &queue);
            scope.spawn(move || {
                for n in 0..each {
                    let connection = app.publish_pool().connection().unwrap();
                    connection.publish("", queue, format!("{thread}/{n}")).unwrap();
                }
            });
        }
    });
    let connection = app.listen_pool().connection().unwrap();
    let mut arrived = crate::support::bodies(&crate::support::drain(&connection, &queue));
    assert_eq!(arrived.len(), threads * each);
    arrived.sort();
    arrived.dedup();
    assert_eq!(arrived.len(), threads * each, "each of them once");
    assert!(app.publish_pool().status().created <= 2);
}

fn an_open_connection_is_lent_before_another_is_opened(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 4");
    let pool = app.publish_pool();
    let kept = pool.connection().unwrap();
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let _discarded = pool.connection().unwrap();
        panic!("this panic is part of the test");
    }));
    assert!(panicked.is_err());
    drop(kept);
    for _ in 0..3 {
        assert_eq!(pool.try_connection().expect("the idle one").name(), "coney publish #1");
        assert_eq!(pool.connection().unwrap().name(), "coney publish #1");
    }
    assert_eq!(pool.status().created, 2);
}

fn the_longest_of_times_are_no_reason_to_panic(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection_timeout(Duration::MAX).unwrap();
    let queue = queue(&connection, "max");
    connection.publish_async("", &queue, "x", |outcome| outcome.unwrap());
    connection.flush(Duration::MAX).unwrap();
    assert!(connection.get_timeout(&queue, Duration::MAX).unwrap().is_some());
}

fn who_waits_when_the_pool_is_closed_gets_no_connection_from_it(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.connection_timeout(Duration::from_secs(60)).map(drop));
        wait_until("somebody waits", || pool.status().waiting == 1);
        let impatient = scope.spawn(|| pool.connection_timeout(Duration::from_millis(500)).map(drop));
        wait_until("somebody else waits", || pool.status().waiting == 2);
        pool.close();
        assert!(matches!(impatient.join().unwrap(), Err(Error::PoolClosed { .. })));
        drop(connection);
        assert!(matches!(waiting.join().unwrap(), Err(Error::PoolClosed { .. })));
    });
    assert_eq!(pool.status().created, 1);
}

fn a_dropped_app_closes_its_pools(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool().clone();
    pool.connection().unwrap();
    drop(app);
    let error = pool.connection().map(drop).unwrap_err();
    assert!(error.to_string().contains("App"), "{error}");
}

#[test]
fn a_password_file_is_read_at_each_connect() {
    let builder = EmbeddedBroker::builder().user("app", "s3cret").permissions("app", "/", ".*", ".*", ".*");
    let broker = builder.start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    let settings =
        format!("user = \"app\"\npassword_file = {:?}\nhosts = [\"{}\"]", file.display().to_string(), broker.addr());
    let app = App::from_settings(Settings::from_toml(&format!("[broker]\n{settings}")).unwrap()).unwrap();
    let cause = || match app.publish_pool().connection().map(drop).unwrap_err() {
        error @ Error::Connect { .. } => {
            assert!(!error.is_transient(), "{error}");
            assert!(!format!("{error} {error:?}").contains("wr0ng"), "{error:?}");
            error.to_string()
        }
        other => panic!("unexpected: {other}"),
    };
    let path = file.display().to_string();
    for (content, part) in [
        (None, "No such file"),
        (Some(b"".as_slice()), "it is empty, expected the password"),
        (Some(b"\n"), "it is empty"),
        (Some(b"wr0ng\xff"), "it is not UTF-8"),
    ] {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let cause = cause();
        assert!(cause.contains(part) && cause.contains(&format!("password_file {path}: ")), "{cause}");
    }
    std::fs::write(&file, "wr0ng").unwrap();
    assert!(cause().contains("refused user \"app\""));
    // It is changed, and used without a restart.
    std::fs::write(&file, "s3cret\n").unwrap();
    app.publish_pool().connection().unwrap();
}

/// Be it a virtual host or a user that has as many as it may have; a node has no such limit in RabbitMQ 3.10.
#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_connection_limit_of_the_broker_makes_callers_wait_for_the_connections_there_are() {
    let node = hurt_node();
    node.add_vhost("limited").unwrap();
    node.add_user("limited", "pw").unwrap();
    for (vhost, user) in [("limited", "guest"), ("/", "limited")] {
        node.set_permissions(vhost, user, ".*", ".*", ".*").unwrap();
    }
    let eval = |expression: &str| node.eval(expression).unwrap();
    eval("rabbit_vhost_limit:set(<<\"limited\">>, [{<<\"max-connections\">>, 1}], <<\"test\">>)");
    eval(
        "rabbit_auth_backend_internal:set_user_limits(<<\"limited\">>, #{<<\"max-connections\">> => 1}, <<\"test\">>)",
    );
    let of = |who: &str, vhost: &str| format!("amqp://{who}@127.0.0.1:{}/{vhost}", node.port());
    for url in [of("guest:guest", "limited"), of("limited:pw", "%2f")] {
        let app = app(&url, "[pools.publish]\nsize = 4\ncheckout_timeout = \"300ms\"");
        let pool = app.publish_pool();
        let only = pool.connection().unwrap();
        for tried in [pool.connection(), pool.connection_or_cause()] {
            let error = tried.map(drop).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("connection limit (1) is reached") && error.is_transient(), "{text}");
        }
        drop(only);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let connection = pool.connection_timeout(PATIENCE).unwrap();
                        connection.exchange_declare_passive("amq.direct").unwrap();
                    }
                });
            }
        });
        assert_eq!(pool.status().created, 1);
        let name = queue(&pool.connection_timeout(PATIENCE).unwrap(), "limited");
        pool.publish("", &name, "x").unwrap();
    }
    eval("rabbit_vhost_limit:clear(<<\"limited\">>, <<\"test\">>)");
    eval("rabbit_auth_backend_internal:clear_user_limits(<<\"limited\">>, <<\"max-connections\">>, <<\"test\">>)");
}
