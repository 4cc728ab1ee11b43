//! Every documented metric is there with the right value, none that is not documented is, and gauges come back to 0.
//!
//! A test binary of its own, for it installs recorders.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::outbox::Outbox;
use coney::worker::QueueWorker;
use coney::{App, Error, Message, Outcome, Queue, RetryPolicy, Settings, metrics as names};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

const PATIENCE: Duration = Duration::from_secs(30);

/// What has been recorded so far. The recorder begins anew with each look, and here it is added up.
struct Seen {
    snapshotter: Snapshotter,
    /// By name and labels, such as `coney_pool_size{pool=publish}`.
    values: BTreeMap<String, f64>,
    names: BTreeSet<String>,
}

impl Seen {
    fn new(recorder: &DebuggingRecorder) -> Seen {
        Seen { snapshotter: recorder.snapshotter(), values: BTreeMap::new(), names: BTreeSet::new() }
    }

    fn look(&mut self) {
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let labels = key.key().labels().map(|label| format!("{}={}", label.key(), label.value()));
            let name = key.key().name().to_owned();
            let series = format!("{name}{{{}}}", labels.collect::<Vec<_>>().join(","));
            // How many times there were, of a histogram.
            let more = match value {
                DebugValue::Counter(count) => count as f64,
                // What waits in an outbox is set, and not changed.
                DebugValue::Gauge(now) if name.starts_with("coney_outbox_") => {
                    now.0 - self.values.get(&series).copied().unwrap_or_default()
                }
                DebugValue::Gauge(change) => change.0,
                DebugValue::Histogram(times) => {
                    assert!(
                        times.iter().all(|time| (0.0..60.0).contains(&time.0)),
                        "{series} is in seconds: {times:?}"
                    );
                    times.len() as f64
                }
            };
            *self.values.entry(series).or_default() += more;
            self.names.insert(name);
        }
    }

    #[track_caller]
    fn is(&mut self, series: &str, expected: f64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.look();
            let value = self.values.get(series).copied();
            if value == Some(expected) {
                return;
            }
            assert!(Instant::now() < deadline, "{series} is {value:?}, expected {expected}: {:#?}", self.values);
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

fn app(broker: &EmbeddedBroker, extra: &str) -> App {
    App::from_settings(Settings::from_toml(&format!("[broker]\nurl = {:?}\n{extra}", broker.url())).unwrap()).unwrap()
}

/// A program that meets what there is to be counted; returns the app, idle, with one connection in its publish pool.
fn publish_and_listen(broker: &EmbeddedBroker, seen: &mut Seen) -> App {
    let control = broker.control();
    let app = app(
        broker,
        "[pools.publish]\nsize = 2\nconfirm_timeout = \"300ms\"\npublish_timeout = \"20s\"\n[pools.listen]\nsize = 3",
    );
    seen.is("coney_pool_size{pool=publish}", 2.0);
    let connection = app.publish_pool().connection().unwrap();
    seen.is("coney_pool_in_use{pool=publish}", 1.0);
    seen.is("coney_connections_open{pool=publish}", 1.0);
    connection.queue_declare(&Queue::new("orders")).unwrap();

    // Three confirmed, by each of the ways, and one of each other outcome.
    connection.publish("", "orders", "ack").unwrap();
    connection.publish_async("", "orders", "reject", |outcome| outcome.unwrap());
    connection.flush(PATIENCE).unwrap();
    connection.publish_batch([("", "orders", "fails")]).unwrap();
    control.nack_next(1);
    assert!(matches!(connection.publish("", "orders", ""), Err(Error::Nacked { .. })));
    assert!(matches!(connection.publish("", "nowhere", ""), Err(Error::Returned { .. })));
    assert!(matches!(connection.publish("no exchange", "", ""), Err(Error::ChannelClosed { .. })));
    app.publish_pool().before_publish(|_, message| match message.text() {
        Some("unwanted") => Err(Error::refused("not that one")),
        _ => Ok(message),
    });
    let (by_hook, in_batch) = (connection.publish("", "orders", "unwanted"), [("", "orders", "unwanted")]);
    assert!(matches!(by_hook, Err(Error::Refused { .. })) && connection.publish_batch(in_batch).is_err());
    let too_long = Message::new("").with_kind("x".repeat(256));
    assert!(matches!(connection.publish("", "orders", too_long), Err(Error::InvalidArgument { .. })));
    control.withhold_confirms(true);
    let (told, outcome) = mpsc::channel();
    connection.publish_async("", "orders", "", move |result| told.send(result).unwrap());
    seen.is("coney_publish_in_flight{pool=publish}", 1.0);
    assert!(matches!(outcome.recv_timeout(PATIENCE).unwrap(), Err(Error::Timeout { .. })));
    control.withhold_confirms(false);
    drop(connection);
    seen.is("coney_connections_discarded_total{pool=publish}", 1.0);

    let connection = app.publish_pool().connection().unwrap();
    control.block_publishers("low on memory");
    seen.is("coney_connections_blocked{pool=publish}", 1.0);
    assert!(matches!(connection.publish("", "orders", ""), Err(Error::Blocked { .. })));
    control.unblock_publishers();
    seen.is("coney_connections_blocked{pool=publish}", 0.0);
    control.drop_connections();
    assert!(matches!(connection.publish("", "orders", ""), Err(Error::ConnectionLost { .. })));
    drop(connection);
    app
}

fn store_and_forward(app: &App, seen: &mut Seen) {
    let directory = tempfile::tempdir().unwrap();
    let outbox = Outbox::sqlite(directory.path().join("shop.db")).unwrap();
    let series = |name: &str| format!("coney_outbox_{name}{{outbox={}}}", outbox.name());
    outbox.forward(app).unwrap();
    outbox.publish("", "orders", "stored").unwrap();
    outbox.publish("", "no such queue", "stored").unwrap();
    seen.is(&series("forwarded_total"), 1.0);
    seen.is(&series("refused_total"), 1.0);
    seen.is(&series("pending"), 0.0);
    seen.is(&series("oldest_seconds"), 0.0);
    // Nothing of it for those that come after.
    app.publish_pool().connection().unwrap().queue_purge("orders").unwrap();
}

fn handle_and_come_back(broker: &EmbeddedBroker, app: &App, seen: &mut Seen) {
    let control = broker.control();
    // What was published before; two of these are of calls that did not end well, but whose message is there.
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_purge("orders").unwrap();
    for body in ["ack", "reject", "requeue", "fails", "panics"] {
        connection.publish("", "orders", body).unwrap();
    }
    drop(connection);
    let (gate, open) = crossbeam_channel::bounded::<()>(0);
    let policy = RetryPolicy::new([Duration::from_millis(20)]).unwrap();
    let listener = app
        .listener("orders")
        .name("shop")
        .retry(policy)
        .spawn(move |_, delivery| match (delivery.message().text().unwrap(), delivery.redelivered()) {
            ("reject", _) => Outcome::Reject,
            ("requeue", false) => Outcome::Requeue,
            ("fails", _) => Outcome::Failed("no stock".to_owned()),
            ("panics", _) => panic!("this panic is part of the test"),
            ("wait", _) => {
                let _ = open.recv();
                Outcome::Ack
            }
            _ => Outcome::Ack,
        })
        .unwrap();
    seen.is("coney_listener_consuming{listener=shop}", 1.0);
    let series = |name: &str, outcome: &str| format!("{name}{{listener=shop,queue=orders{outcome}}}");
    for (outcome, count) in [("acked", 2.0), ("rejected", 1.0), ("requeued", 1.0), ("retried", 2.0), ("dead", 2.0)] {
        seen.is(&series("coney_outcomes_total", &format!(",outcome={outcome}")), count);
    }
    seen.is(&series("coney_deliveries_total", ""), 8.0);
    seen.is(&series("coney_handler_panics_total", ""), 2.0);
    seen.is(&series("coney_handler_seconds", ""), 8.0);

    app.publish_pool().publish("", "orders", "wait").unwrap();
    seen.is(&series("coney_handlers_running", ""), 1.0);
    drop(gate);
    seen.is(&series("coney_handlers_running", ""), 0.0);

    control.refuse_connections(true);
    control.drop_connections();
    seen.is("coney_listener_consuming{listener=shop}", 0.0);
    std::thread::scope(|scope| {
        // Begun while the broker is away, on a connection that is found dead.
        let publishing = scope.spawn(|| app.publish_pool().publish("", "orders", "ack"));
        let failures = "coney_connect_failures_total{pool=publish}";
        seen.look();
        let before = seen.values[failures];
        let deadline = Instant::now() + PATIENCE;
        while seen.values[failures] == before {
            assert!(Instant::now() < deadline, "nobody tries to connect");
            std::thread::park_timeout(Duration::from_millis(10));
            seen.look();
        }
        control.refuse_connections(false);
        publishing.join().unwrap().unwrap();
    });
    seen.is("coney_listener_recoveries_total{listener=shop}", 1.0);
    seen.is("coney_listener_consuming{listener=shop}", 1.0);
    seen.is("coney_listener_workers{listener=shop,queue=orders}", 1.0);

    listener.pause();
    seen.is("coney_listener_paused{listener=shop}", 1.0);
    seen.is("coney_listener_pauses_total{listener=shop}", 1.0);
    seen.is("coney_listener_consuming{listener=shop}", 0.0);
    seen.is("coney_listener_workers{listener=shop,queue=orders}", 0.0);
    listener.resume();
    seen.is("coney_listener_paused{listener=shop}", 0.0);
    seen.is("coney_listener_consuming{listener=shop}", 1.0);
    listener.stop().unwrap();
}

#[test]
fn every_documented_name_is_counted_and_no_other_and_gauges_end_at_0() {
    let recorder = DebuggingRecorder::new();
    let mut seen = Seen::new(&recorder);
    metrics::with_local_recorder(&recorder, || {
        let broker = EmbeddedBroker::start().unwrap();
        let app = publish_and_listen(&broker, &mut seen);
        let published = |outcome| format!("coney_publish_total{{pool=publish,outcome={outcome}}}");
        for (outcome, count) in [("confirmed", 3.0), ("nacked", 1.0), ("returned", 1.0), ("refused", 3.0)] {
            seen.is(&published(outcome), count);
        }
        for outcome in ["timeout", "blocked", "lost", "failed"] {
            seen.is(&published(outcome), 1.0);
        }
        seen.is("coney_confirm_seconds{pool=publish}", 5.0);
        seen.is("coney_publish_in_flight{pool=publish}", 0.0);
        handle_and_come_back(&broker, &app, &mut seen);

        // Everybody has one, and the next waits for nothing.
        let held: Vec<_> = (0..2).map(|_| app.publish_pool().connection().unwrap()).collect();
        seen.look();
        let waits = seen.values["coney_pool_wait_seconds{pool=publish}"];
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| app.publish_pool().connection_timeout(Duration::from_millis(500)).map(drop));
            seen.is("coney_pool_waiting{pool=publish}", 1.0);
            assert!(matches!(waiting.join().unwrap(), Err(Error::PoolExhausted { .. })));
        });
        seen.is("coney_pool_waiting{pool=publish}", 0.0);
        seen.is("coney_pool_checkout_failures_total{pool=publish}", 1.0);
        seen.is("coney_pool_wait_seconds{pool=publish}", waits + 1.0);

        drop(held);
        store_and_forward(&app, &mut seen);
        // A message whose connection is lost under it is sent once more.
        let retries = seen.values["coney_publish_retries_total{pool=publish}"];
        broker.control().withhold_confirms(true);
        let slow = app.publish_pool().clone();
        std::thread::scope(|scope| {
            let publishing = scope.spawn(|| slow.publish("", "orders", "again"));
            seen.is("coney_publish_in_flight{pool=publish}", 1.0);
            broker.control().drop_connections();
            broker.control().withhold_confirms(false);
            publishing.join().unwrap().unwrap();
        });
        seen.look();
        // Once for each connection that it found dying.
        assert!(seen.values["coney_publish_retries_total{pool=publish}"] > retries);
        seen.look();
        let status = app.publish_pool().status();
        assert_eq!(seen.values["coney_connections_opened_total{pool=publish}"], status.created as f64);
        assert_eq!(seen.values["coney_connections_discarded_total{pool=publish}"], status.discarded as f64);
    });
    seen.look();
    let documented: BTreeSet<String> = names::NAMES.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(seen.names, documented);
    for (series, value) in &seen.values {
        let name = series.split('{').next().unwrap();
        let is_gauge = !name.ends_with("_total") && !name.ends_with("_seconds");
        assert!(!is_gauge || *value == 0.0, "{series} is {value} after all has ended");
    }
}

#[test]
fn messages_that_nobody_waits_for_any_more_are_in_flight_no_longer() {
    let recorder = DebuggingRecorder::new();
    let mut seen = Seen::new(&recorder);
    metrics::with_local_recorder(&recorder, || {
        let broker = EmbeddedBroker::start().unwrap();
        let app = app(&broker, "[pools.publish]\nconfirm_timeout = \"200ms\"");
        let connection = app.publish_pool().connection().unwrap();
        connection.queue_declare(&Queue::new("q")).unwrap();
        broker.control().withhold_confirms(true);
        for _ in 0..10 {
            connection.publish_async("", "q", "x", |outcome| assert!(outcome.is_err()));
        }
        seen.is("coney_publish_in_flight{pool=publish}", 10.0);
    });
    seen.is("coney_publish_in_flight{pool=publish}", 0.0);
    seen.is("coney_pool_size{pool=publish}", 0.0);
    let unconfirmed: f64 = ["timeout", "lost"]
        .iter()
        .map(|outcome| seen.values[&format!("coney_publish_total{{pool=publish,outcome={outcome}}}")])
        .sum();
    assert_eq!(unconfirmed, 10.0);
}

#[test]
fn every_name_is_described_with_a_unit() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        names::describe();
        // A description shows beside a value only.
        let _pool = coney::Pool::new("described", coney::PoolSettings::default()).unwrap();
    });
    let described = snapshotter.snapshot().into_vec();
    assert!(described.len() > 10);
    for (key, unit, text, _) in described {
        let name = key.key().name();
        let seconds = name.ends_with("_seconds");
        let expected = if seconds { metrics::Unit::Seconds } else { metrics::Unit::Count };
        assert_eq!(unit, Some(expected), "{name}");
        assert!(text.is_some_and(|text| text.len() > 10 && text.ends_with('.') && !text.contains("  ")), "{name}");
    }
}

#[test]
fn the_routes_of_a_worker_bear_the_name_of_the_worker() {
    let recorder = DebuggingRecorder::new();
    let mut seen = Seen::new(&recorder);
    metrics::with_local_recorder(&recorder, || {
        let broker = EmbeddedBroker::start().unwrap();
        let app = App::from_settings(Settings::from_url(&broker.url()).unwrap()).unwrap();
        let worker = QueueWorker::new(&app).route("one", |_: u64| ()).route("two", |_: u64| ()).run().unwrap();
        let connection = app.publish_pool().connection().unwrap();
        connection.publish("", "two", "2").unwrap();
        seen.is("coney_deliveries_total{listener=one,queue=two}", 1.0);
        seen.is("coney_deliveries_total{listener=one,queue=one}", 0.0);
        assert!(!seen.values.contains_key("coney_deliveries_total{listener=two,queue=two}"));
        drop(connection);
        worker.stop().unwrap();
    });
}
