//! What a program says of its own health, while the broker is well, gone, silent and short of memory.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{Health, ListenerState, Queue};
use serde_json::Value;

use crate::closed::closed_port;
use crate::support::{PATIENCE, app, wait_until};

/// The longest that a check of a second may take on a busy machine.
const CHECKED: Duration = Duration::from_secs(6);

/// One line for people, a map for programs, and a password in neither.
#[track_caller]
fn said(health: &Health) -> String {
    let (line, map) = (health.to_string(), serde_json::to_value(health).unwrap());
    for text in [line.clone(), map.to_string(), format!("{health:?}")] {
        assert!(!text.contains("correct-horse-battery"), "{text}");
    }
    assert_eq!(line.lines().count(), 1, "{line}");
    assert_eq!(map["ready"], Value::Bool(health.is_ready()));
    assert!(line.starts_with(if health.is_ready() { "ready; " } else { "not ready; " }), "{line}");
    line
}

#[test]
fn health_tells_nothing_of_a_pool_that_nobody_used_and_a_check_asks() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    assert!(app.health().is_ready());
    assert_eq!(broker.control().connections().len(), 0, "health asks nobody");
    let health = app.check(PATIENCE);
    assert!(health.is_ready() && health.pools.iter().all(|pool| pool.round_trip.is_some() && pool.open == 1));
    assert_eq!(health.pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>(), ["publish", "listen"]);
    let line = said(&health);
    assert!(line.contains("pool \"publish\": 1 open, 0 of 4 in use, 0 waiting, answers in"), "{line}");
    assert!(app.check(PATIENCE).pools.iter().all(|pool| pool.round_trip.is_some()), "idle ones are asked");
    assert_eq!(broker.control().connections().len(), 2, "a second check opens no more");

    let guard = app.publish_pool().connection().unwrap();
    let (_keep, asked) = (guard, app.check(PATIENCE));
    assert_eq!((asked.pools[0].in_use, asked.pools[0].round_trip), (1, None), "those who hold it are believed");
    assert!(asked.is_ready());
    app.shutdown(Duration::ZERO).unwrap_err();
    let closed = app.health();
    assert!(!closed.is_ready() && said(&closed).contains("closed"));
}

#[test]
fn without_a_broker_a_check_says_why_in_time_and_health_remembers_until_it_is_back() {
    let closed = closed_port();
    let nobody = app(&format!("amqp://guest:correct-horse-battery@{closed}/%2f"), "");
    let start = Instant::now();
    let health = nobody.check(Duration::from_secs(1));
    assert!(start.elapsed() < CHECKED, "{:?}", start.elapsed());
    assert!(!health.is_ready() && health.pools.iter().all(|pool| pool.error.is_some() && pool.open == 0));
    assert!(said(&health).contains("refused") && said(&health).contains("guest:***@"), "{health}");
    let later = nobody.health();
    assert!(!later.is_ready() && later.pools[0].error.is_none() && said(&later).contains("refused"), "{later}");

    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    broker.control().refuse_connections(true);
    assert!(!app.check(Duration::from_millis(300)).is_ready());
    broker.control().refuse_connections(false);
    wait_until("it is ready again", || app.check(Duration::from_secs(1)).is_ready());
    assert!(app.health().is_ready());
}

#[test]
fn a_blocked_broker_and_one_that_does_not_answer_are_not_ready() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    drop(app.publish_pool().connection().unwrap());
    broker.control().block_publishers("low on memory");
    wait_until("the pool is told", || app.health().pools[0].blocked.is_some());
    let blocked = app.health();
    assert!(!blocked.is_ready() && said(&blocked).contains("blocked by the broker: low on memory"), "{blocked}");
    broker.control().unblock_publishers();
    wait_until("the pool is told", || app.health().is_ready());

    // One that takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://guest:guest@{}/%2f", silent.local_addr().unwrap());
    let mute = crate::support::app(&url, "");
    let start = Instant::now();
    let health = mute.check(Duration::from_secs(1));
    assert!(start.elapsed() < CHECKED, "{:?}", start.elapsed());
    assert!(!health.is_ready() && said(&health).contains("no answer within"), "{health}");
}

#[test]
fn a_listener_tells_its_state_since_when_and_what_went_wrong_last() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new("orders")).unwrap();
    let (handled, seen) = mpsc::channel();
    let listener = app.listener("orders").name("shop").spawn(move |_, _| handled.send(()).unwrap()).unwrap();
    let one = |health: Health| health.listeners.into_iter().next().expect("the listener");
    let well = one(app.health());
    assert_eq!((well.name.as_str(), well.queues.as_slice()), ("shop", ["orders".to_owned()].as_slice()));
    assert!(well.is_ready() && well.last_error.is_none() && well.since < PATIENCE);
    assert!(said(&app.health()).contains("listener \"shop\": consuming for "), "{}", app.health());

    broker.control().refuse_connections(true);
    broker.control().drop_connections();
    wait_until("it cannot come back", || {
        let now = one(app.health());
        matches!(now.state, ListenerState::Recovering { .. }) && now.last_error.is_some()
    });
    let lost = app.health();
    let map = serde_json::to_value(&lost).unwrap();
    assert_eq!((&map["listeners"][0]["state"], &map["listeners"][0]["ready"]), (&"recovering".into(), &false.into()));
    assert!(!lost.is_ready() && said(&lost).contains("listener \"shop\": recovering for "), "{lost}");

    broker.control().refuse_connections(false);
    wait_until("it is back", || one(app.health()).is_ready());
    let back = one(app.health());
    assert!(back.last_error.is_some(), "what went wrong is remembered");
    assert!(!said(&app.health()).contains(" after "), "and not said of one that is well");
    app.publish_pool().publish("", "orders", "1").unwrap();
    seen.recv_timeout(PATIENCE).unwrap();
    listener.stop().unwrap();
    assert!(app.health().listeners.is_empty());
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| assert!(app.check(PATIENCE).is_ready())))));
}
