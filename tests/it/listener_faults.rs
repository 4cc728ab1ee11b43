//! Listeners outlive whatever happens to their connection.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Error, Listener, ListenerState, Queue, Topology, Unsettled};
use log::Level;

use crate::contract;
use crate::listener::publish_numbers;
use crate::logs;
use crate::support::{Broker, Hurt, PATIENCE, app, drain, hurt_node, queue, unique, wait_until};

contract! {
    a_listener_whose_handler_is_busy_says_that_its_consumer_is_gone,
    a_handler_that_ends_its_own_connection_is_called_ever_less_often,
    a_handler_that_overstays_the_brokers_ack_timeout_costs_a_redelivery_and_no_more,
    a_handler_that_always_overstays_is_called_ever_less_often_and_never_counts_as_acked,
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
    logs::keep();
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
    let said = logs::of_listener(&name);
    // The broker's own word for it is code 320, and nothing to give up for.
    let told = said.iter().filter(|line| line.level == Level::Warn && line.text.contains(": 320 CONNECTION_FORCED"));
    // The embedded broker, which is torn down at once, may not get to say it.
    assert!(told.count() == 3 || broker.is_embedded(), "{said:?}");
    assert!(said.iter().all(|line| line.level >= Level::Warn), "{said:?}");
    // It is one and the same listener all along.
    assert!(said.iter().all(|line| line.thread == said[0].thread), "{said:?}");
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
    logs::keep();
    let node = broker.hurt();
    let pool = unique("early");
    let app = node.app(&format!("[pools.{pool}]"));
    let name = queue(&app.publish_pool().connection().unwrap(), "early");
    publish_numbers(&app, &name, 1);
    let down = Instant::now();
    node.kill();
    let error = app.spawn_listener(&name, |_, _| ()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    let (seen, got) = mpsc::channel();
    let listener = app.listener(&name).in_background().spawn(move |_, _| seen.send(()).unwrap()).unwrap();
    let start = Instant::now();
    let timeout = Duration::from_secs(1);
    let error = app.pool(&pool).unwrap().connection_timeout(timeout).map(drop).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(start.elapsed() < timeout + Duration::from_secs(10), "it took {:?}", start.elapsed());
    wait_until("it has tried", || matches!(listener.state(), ListenerState::Recovering { attempt: 5.., .. }));
    node.start_again();
    let start = Instant::now();
    // The longest wait between attempts is 30 s. It is far less by now, unless the broker was slow to start.
    got.recv_timeout(PATIENCE).unwrap();
    eprintln!("{broker:?}: handled {:.1?} after the broker was up", start.elapsed());
    wait_until("it says so", || matches!(listener.state(), ListenerState::Consuming));
    // One line for each attempt, numbered, then one that it is there; and none from below.
    let said: Vec<String> = logs::of_listener(&name).into_iter().map(|line| line.text).collect();
    let (listening, attempts) = said.split_last().unwrap();
    assert!(listening.ends_with(": back") && attempts.len() >= 5, "{said:?}");
    for (n, attempt) in attempts.iter().enumerate() {
        assert!(attempt.contains(&format!("; attempt {} to come back in ", n + 1)), "{said:?}");
    }
    let mut others = logs::lines_with(&format!("coney {pool} #"));
    others.retain(|line| line.at >= down && line.level <= Level::Info);
    assert!(others.is_empty(), "{others:?}");
}

fn a_deleted_queue_is_declared_again_or_waited_for(broker: Broker) {
    logs::keep();
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
        ListenerState::Recovering { error, attempt } => attempt >= 5 && error.code() == Some(404),
        _ => false,
    });
    // Each wait is twice the one before, less a quarter at most: that is nine errors in half a minute.
    let mut errors = logs::of_listener(&name);
    errors.retain(|line| line.level <= Level::Warn);
    for (n, pair) in errors.windows(2).enumerate() {
        assert!(pair[1].at - pair[0].at >= Duration::from_millis(75 << n), "{errors:?}");
    }
    connection.queue_declare(&Queue::new(&name)).unwrap();
    connection.publish("", &name, "x").unwrap();
    let start = Instant::now();
    got.recv_timeout(PATIENCE).unwrap();
    // The wait that has begun is 1.6 s, or by now the next one, of 3.2 s.
    assert!(start.elapsed() < Duration::from_secs(4 + 10), "it took {:?}", start.elapsed());
    wait_until("it says so", || listener.stats().recoveries == 1);
}

fn a_handler_that_overstays_the_brokers_ack_timeout_costs_a_redelivery_and_no_more(broker: Broker) {
    let node = broker.with_ack_timeout(Duration::from_secs(2));
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
    publish_numbers(&app, &name, 1);
    assert!(!in_handler.recv_timeout(PATIENCE).unwrap(), "it listens on, and nothing is redelivered again");
    wait_until("it is settled", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    let stats = listener.stats();
    assert_eq!((stats.delivered, stats.recoveries, stats.panicked), (3, 1, 0));
    // The late ack counts too if it went out before the client knew.
    wait_until("what was accepted is counted", || (2..=3).contains(&listener.stats().acked));
    listener.stop().unwrap();

    // The same by hand: the late ack is an error, which no other message suffers by.
    let (pass_on, passed) = mpsc::channel::<Unsettled>();
    let listener = app.listener(&name).spawn_manual(move |_, unsettled| pass_on.send(unsettled).unwrap()).unwrap();
    publish_numbers(&app, &name, 1);
    let late = passed.recv_timeout(PATIENCE).unwrap();
    let again = passed.recv_timeout(PATIENCE).unwrap();
    assert!(again.redelivered() && !late.redelivered());
    assert!(matches!(late.ack(), Err(Error::StaleDelivery)));
    again.ack().unwrap();
    wait_until("it is settled", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    wait_until("it is counted", || listener.stats().recoveries == 1);
    assert_eq!(listener.stats().delivered, 2);
    assert!(drain(&app.publish_pool().connection().unwrap(), &name).is_empty());
}

fn a_handler_that_always_overstays_is_called_ever_less_often_and_never_counts_as_acked(broker: Broker) {
    logs::keep();
    // Its own, so that lines of the log can be told from those of other tests.
    let timeout = Duration::from_millis(if broker.is_embedded() { 1500 } else { 1900 });
    let node = broker.with_ack_timeout(timeout);
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "always-late");
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = app
        .spawn_listener(&name, move |_, _| {
            begun.send(()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    publish_numbers(&app, &name, 1);
    in_handler.recv_timeout(PATIENCE).unwrap();
    let told = format!("Timeout value used: {} ms", timeout.as_millis());
    let closed = || {
        let lines = logs::lines_with(&told);
        lines.iter().filter(|line| line.text.starts_with("the broker has closed channel")).count()
    };
    let waits: Vec<Duration> = (1..=4)
        .map(|round| {
            wait_until("the broker takes it back", || node.queue_len(&name) == 1);
            // An ack that goes out before the client knows counts as sent.
            wait_until("the client knows", || closed() >= round);
            release.send(()).unwrap();
            let returned = Instant::now();
            in_handler.recv_timeout(PATIENCE).unwrap();
            returned.elapsed()
        })
        .collect();
    // 100 ms doubled three times is 800 ms, less a quarter at most.
    assert!(waits[3] >= Duration::from_millis(600), "{waits:?}");
    assert_eq!(listener.stats().acked, 0, "the broker has accepted none");
    let lines = logs::lines_with(&name);
    let told =
        lines.iter().find(|line| line.text.contains("consumer_timeout") && line.text.contains("slowest handler took"));
    assert!(told.is_some_and(|line| line.text.contains(&format!("within {timeout:.1?}"))), "{lines:?}");
    drop(release);
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
    logs::keep();
    let node = hurt_node();
    let user = unique("listener");
    node.add_user(&user, "right").unwrap();
    node.set_permissions("/", &user, ".*", ".*", "").unwrap();
    let url = node.url().replace("guest:guest", &format!("{user}:right"));
    let owner = app(&node.url(), "");
    let name = queue(&owner.publish_pool().connection().unwrap(), "refused");
    publish_numbers(&owner, &name, 1);
    let app = app(&url, "");
    let (handled, wait) = mpsc::channel();
    let listener = app.listener(&name).in_background().spawn(move |_, _| handled.send(()).unwrap()).unwrap();
    let refused_again = |attempts| match listener.state() {
        ListenerState::Recovering { error, attempt } => attempt >= attempts && error.code() == Some(403),
        _ => false,
    };
    wait_until("it is refused twice", || refused_again(2));
    let said = logs::of_listener(&name);
    assert!(said.iter().all(|line| line.level == Level::Error && line.text.contains("403")), "{said:?}");
    assert!(said[1].at - said[0].at >= Duration::from_secs(5), "{said:?}");
    node.set_permissions("/", &user, ".*", ".*", ".*").unwrap();
    wait.recv_timeout(PATIENCE).expect("it works once it may");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_wrong_password_is_tried_slowly_and_told_nowhere_and_works_once_it_is_right() {
    logs::keep();
    let node = hurt_node();
    let (user, password) = (unique("forgetful"), "not-yet-the-password");
    node.add_user(&user, "another").unwrap();
    node.set_permissions("/", &user, ".*", ".*", ".*").unwrap();
    let owner = app(&node.url(), "");
    let name = queue(&owner.publish_pool().connection().unwrap(), "forgotten");
    publish_numbers(&owner, &name, 1);
    let pool = unique("forgetful");
    let url = node.url().replace("guest:guest", &format!("{user}:{password}"));
    let app = app(&url, &format!("[pools.{pool}]"));
    let (handled, wait) = mpsc::channel();
    let listener = app.listener(&name).in_background().spawn(move |_, _| handled.send(()).unwrap()).unwrap();

    let start = Instant::now();
    let error = app.pool(&pool).unwrap().connection().map(drop).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    assert_eq!(error.code(), Some(403));
    let attempts = logs::lines_with(&format!("coney {pool} #1: no connection to "));
    assert_eq!(attempts.len(), 1, "a checkout tries once: {attempts:?}");

    wait_until("the listener is refused twice", || logs::of_listener(&name).len() >= 2);
    let said = logs::of_listener(&name);
    assert!(said[1].at - said[0].at >= Duration::from_secs(5), "{said:?}");
    for text in [error.to_string(), format!("{error:?} {app:?} {listener:?} {:?}", listener.state())] {
        assert!(!text.contains(password), "{text}");
    }

    let expression = "rabbit_auth_backend_internal:change_password(<<\"USER\">>, <<\"PASSWORD\">>, <<\"coney\">>)";
    node.eval(&expression.replace("USER", &user).replace("PASSWORD", password)).unwrap();
    app.pool(&pool).unwrap().connection().expect("it is right now");
    wait.recv_timeout(PATIENCE).expect("for the listener too");
    assert!(logs::lines_with(password).is_empty(), "{:?}", logs::lines_with(password));
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

fn a_handler_that_ends_its_own_connection_is_called_ever_less_often(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "suicidal");
    let (ask, asked) = mpsc::channel();
    let listener = app
        .spawn_listener(&name, move |_, _| {
            // Who has the broker does it, and is waited for.
            let (done, is_done) = crossbeam_channel::bounded::<()>(0);
            ask.send(done).unwrap();
            let _ = is_done.recv();
        })
        .unwrap();
    while let Err(error) = app.publish_pool().publish("", &name, "poison") {
        assert!(error.is_transient(), "{error}");
    }
    let calls: Vec<Instant> = (0..5)
        .map(|_| {
            let _done = asked.recv_timeout(PATIENCE).unwrap();
            node.close_all_connections("by a handler");
            Instant::now()
        })
        .collect();
    // 100 ms doubled three times is 800 ms, less a quarter at most.
    assert!(calls[4] - calls[3] >= Duration::from_millis(600), "{calls:?}");
    drop((asked, listener));
}

fn a_listener_whose_handler_is_busy_says_that_its_consumer_is_gone(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "busy");
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::unbounded::<()>();
    let listener = app
        .listener(&name)
        .topology(Topology::new().queue(Queue::new(&name)))
        .spawn(move |_, _| {
            begun.send(()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    let ready = || app.health().listeners.iter().all(|listener| listener.is_ready());
    // Its connection, and its queue.
    for round in 1..=2 {
        while let Err(error) = app.publish_pool().publish("", &name, "x") {
            assert!(error.is_transient(), "{error}");
        }
        in_handler.recv_timeout(PATIENCE).unwrap();
        assert!(ready() && matches!(listener.state(), ListenerState::Consuming), "round {round}");
        match round {
            1 => node.close_all_connections("for the test"),
            _ => drop(app.publish_pool().connection().unwrap().queue_delete(&name).unwrap()),
        }
        wait_until("it says so", || matches!(listener.state(), ListenerState::Recovering { .. }));
        let ListenerState::Recovering { error, .. } = listener.state() else { panic!("{:?}", listener.state()) };
        match round {
            1 => assert_eq!(error.code(), Some(320), "{error}"),
            _ => assert!(matches!(error, Error::ConsumerCancelled { .. }), "{error}"),
        }
        assert!(!ready());
        release.send(()).unwrap();
        if round == 1 {
            // The message comes again.
            in_handler.recv_timeout(PATIENCE).unwrap();
            release.send(()).unwrap();
        }
        wait_until("it is back", || ready() && listener.stats().recoveries == round);
        wait_until("and has nothing to do", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    }
}
