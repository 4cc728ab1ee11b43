//! Listeners outlive whatever happens to their connection.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Error, Listener, ListenerState, Queue, Topology, Unsettled};

use crate::contract;
use crate::listener::publish_numbers;
use crate::support::{Broker, Hurt, PATIENCE, app, hurt_node, queue, unique, wait_until};

contract! {
    a_handler_that_overstays_the_brokers_ack_timeout_costs_a_redelivery_and_no_more,
    a_deleted_queue_is_declared_again_or_waited_for,
    three_stops_and_starts_of_the_broker_lose_nothing,
    ten_closed_connections_and_the_consumers_are_back_each_time,
    a_listener_started_before_its_broker_begins_when_it_is_there,
    server_named_queues_work_across_reconnects,
    what_is_settled_too_late_is_stale_and_settles_nothing_else,
    sessions_that_handle_nothing_follow_ever_more_slowly,
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn distinct(&self) -> usize {
        self.0.lock().unwrap().iter().collect::<HashSet<_>>().len()
    }

    /// A listener with its queue as its topology, which notes what it gets.
    fn listen(&self, app: &App, queue: &str, concurrency: usize) -> Listener {
        let seen = self.clone();
        app.listener(queue)
            .concurrency(concurrency)
            .topology(Topology::new().queue(Queue::new(queue)))
            .spawn(move |_, delivery| {
                seen.0.lock().unwrap().push(delivery.message().text().unwrap().to_owned());
            })
            .unwrap()
    }
}

fn consumers(node: &Hurt, queue: &str) -> usize {
    node.consumers().iter().filter(|consumed| *consumed == queue).count()
}

fn publish_slowly(app: &App, queue: &str, count: usize) {
    for n in 0..count {
        // The publisher has the same broker to live with.
        while let Err(error) =
            app.publish_pool().connection().and_then(|connection| connection.publish("", queue, n.to_string()))
        {
            assert!(error.is_transient(), "{error}");
        }
    }
}

fn three_stops_and_starts_of_the_broker_lose_nothing(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let seen = Seen::default();
    let name = unique("stopped");
    let listener = seen.listen(&app, &name, 2);
    thread::scope(|scope| {
        scope.spawn(|| publish_slowly(&app, &name, 3000));
        for n in 1..=3 {
            wait_until("some are handled", || seen.distinct() >= n * 600);
            node.stop_app();
            wait_until("the loss is seen", || matches!(listener.state(), ListenerState::Recovering { .. }));
            node.start_app();
            wait_until("the consumers are back", || consumers(&node, &name) == 2);
        }
    });
    wait_until("all are handled", || seen.distinct() == 3000);
    wait_until("and acked", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    wait_until("it is counted", || listener.stats().recoveries == 3);
}

fn ten_closed_connections_and_the_consumers_are_back_each_time(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let seen = Seen::default();
    let name = unique("closed");
    let listener = seen.listen(&app, &name, 3);
    for round in 1..=10 {
        // A session that has handled something counts as healthy: the next one follows soon.
        publish_numbers(&app, &name, 1);
        wait_until("it works", || seen.len() >= usize::try_from(round).unwrap());
        node.close_all_connections("for the test");
        wait_until("it is back", || listener.stats().recoveries == round && consumers(&node, &name) == 3);
    }
    publish_numbers(&app, &name, 1);
    wait_until("it works", || seen.len() >= 11);
    // One connection for the listener, and the one that published.
    assert_eq!(node.connections(), 2);
    listener.stop().unwrap();
    assert_eq!(consumers(&node, &name), 0);
}

fn a_listener_started_before_its_broker_begins_when_it_is_there(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "early");
    publish_numbers(&app, &name, 1);
    node.kill();
    let error = app.spawn_listener(&name, |_, _| ()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    let (seen, got) = mpsc::channel();
    let listener = app.listener(&name).in_background().spawn(move |_, _| seen.send(()).unwrap()).unwrap();
    wait_until("it has tried", || matches!(listener.state(), ListenerState::Recovering { attempt: 3.., .. }));
    node.start_again();
    let start = Instant::now();
    got.recv_timeout(PATIENCE).unwrap();
    // The longest wait between attempts is 30 s; after this short a time it is far less.
    assert!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
    wait_until("it says so", || matches!(listener.state(), ListenerState::Consuming));
}

fn a_deleted_queue_is_declared_again_or_waited_for(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let seen = Seen::default();
    let declaring = unique("declaring");
    let listener = seen.listen(&app, &declaring, 1);
    connection.queue_delete(&declaring).unwrap();
    wait_until("it is back", || listener.stats().recoveries == 1);
    connection.publish("", &declaring, "x").unwrap();
    wait_until("it works", || seen.len() == 1);

    let name = queue(&connection, "waiting");
    let (seen, got) = mpsc::channel();
    let listener = app.spawn_listener(&name, move |_, _| seen.send(()).unwrap()).unwrap();
    connection.queue_delete(&name).unwrap();
    wait_until("it looks for its queue", || match listener.state() {
        ListenerState::Recovering { error, attempt } => attempt >= 3 && error.code() == Some(404),
        _ => false,
    });
    connection.queue_declare(&Queue::new(&name)).unwrap();
    connection.publish("", &name, "x").unwrap();
    got.recv_timeout(PATIENCE).unwrap();
    wait_until("it says so", || listener.stats().recoveries == 1);
}

fn a_handler_that_overstays_the_brokers_ack_timeout_costs_a_redelivery_and_no_more(broker: Broker) {
    let node = broker.with_short_ack_timeout();
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "overstayed");
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = app
        .listener(&name)
        .warn_after(Duration::from_secs(1))
        .spawn(move |_, delivery| {
            begun.send(delivery.redelivered()).unwrap();
            if !delivery.redelivered() {
                let _ = gate.recv_timeout(PATIENCE);
            }
        })
        .unwrap();
    publish_numbers(&app, &name, 1);
    assert!(!in_handler.recv_timeout(PATIENCE).unwrap());
    wait_until("the broker takes it back", || node.queue_len(&name) == 1);
    drop(release);
    assert!(in_handler.recv_timeout(PATIENCE).unwrap(), "redelivered");
    wait_until("it is settled", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    wait_until("it is counted", || listener.stats().recoveries == 1);
    let stats = listener.stats();
    assert_eq!((stats.delivered, stats.recoveries, stats.panicked), (2, 1, 0));
}

fn server_named_queues_work_across_reconnects(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let (seen, got) = mpsc::channel();
    let listener = app.listener("").spawn(move |context, _| seen.send(context.queue().to_owned()).unwrap()).unwrap();
    let queue_of = |node: &Hurt| node.consumers().pop().expect("a consumer");
    let first = queue_of(&node);
    app.publish_pool().connection().unwrap().publish("", &first, "x").unwrap();
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), first);
    node.close_all_connections("for the test");
    wait_until("it is back", || listener.stats().recoveries == 1);
    let second = queue_of(&node);
    assert_ne!(first, second);
    app.publish_pool().connection().unwrap().publish("", &second, "x").unwrap();
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), second);
}

fn what_is_settled_too_late_is_stale_and_settles_nothing_else(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "late");
    let (pass_on, passed) = mpsc::channel::<Unsettled>();
    let listener = app.listener(&name).spawn_manual(move |_, unsettled| pass_on.send(unsettled).unwrap()).unwrap();
    publish_numbers(&app, &name, 3);
    let old: Vec<Unsettled> = (0..3).map(|_| passed.recv_timeout(PATIENCE).unwrap()).collect();
    node.close_all_connections("for the test");
    wait_until("it is back", || listener.stats().recoveries == 1);
    let new: Vec<Unsettled> = (0..3).map(|_| passed.recv_timeout(PATIENCE).unwrap()).collect();
    for unsettled in old {
        assert!(matches!(unsettled.ack(), Err(Error::StaleDelivery)));
    }
    assert_eq!(node.queue_unacked(&name), 3, "the new ones are not settled by it");
    new.into_iter().for_each(|unsettled| drop(unsettled.ack().unwrap()));
    wait_until("they are", || node.queue_unacked(&name) == 0);
    assert_eq!(listener.stats().recoveries, 1);
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_refusal_is_reported_and_tried_again_slowly() {
    let node = hurt_node();
    let user = unique("listener");
    node.add_user(&user, "right").unwrap();
    node.set_permissions("/", &user, ".*", ".*", "").unwrap();
    let url = node.url().replace("guest:guest", &format!("{user}:right"));
    let owner = app(&node.url(), "");
    let name = queue(&owner.publish_pool().connection().unwrap(), "refused");
    publish_numbers(&owner, &name, 1);
    let app = app(&url, "");
    let attempts = Arc::new(AtomicUsize::new(0));
    let handled = Arc::clone(&attempts);
    let listener = app
        .listener(&name)
        .in_background()
        .spawn(move |_, _| {
            handled.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
    wait_until("it is refused", || match listener.state() {
        ListenerState::Recovering { error, .. } => error.code() == Some(403),
        _ => false,
    });
    let ListenerState::Recovering { attempt, .. } = listener.state() else { panic!("not recovering") };
    assert!(attempt <= 2, "{attempt} attempts");
    node.set_permissions("/", &user, ".*", ".*", ".*").unwrap();
    wait_until("it works once it may", || attempts.load(Ordering::Relaxed) == 1);
}

fn sessions_that_handle_nothing_follow_ever_more_slowly(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let listener = app.spawn_listener(queue(&app.publish_pool().connection().unwrap(), "idle"), |_, _| ()).unwrap();
    let back: Vec<Duration> = (1..=5)
        .map(|round| {
            let start = Instant::now();
            node.close_all_connections("for the test");
            wait_until("it is back", || listener.stats().recoveries == round);
            start.elapsed()
        })
        .collect();
    // 100 ms doubled four times is 1.6 s, less a quarter at most.
    assert!(back[4] >= Duration::from_millis(1200), "{back:?}");
}
