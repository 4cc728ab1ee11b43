//! Partitioned queues: the messages of a key are handled in order, by whichever listener has its partition.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coney::{
    App, Context, Delivery, Error, HashedBy, Listener, Outcome, Partitioned, PartitionedListenerBuilder, RetryPolicy,
    Settings, Topology,
};

use crate::contract;
use crate::support::{Broker, PATIENCE, settings, unique, wait_until};

contract! {
    messages_of_a_key_are_handled_in_order,
    listeners_share_the_partitions_evenly,
    the_broker_counts_members_and_one_active_consumer,
    what_a_stopped_listener_leaves_is_handled_in_order,
    what_a_paused_listener_leaves_is_handled_in_order,
    cut_connections_lose_nothing_and_no_order,
    a_message_that_fails_is_tried_again_before_any_other,
    a_panic_and_a_requeue_are_tried_again_in_place_too,
    a_message_that_is_given_up_goes_to_the_dead,
    without_a_policy_a_second_failure_is_rejected,
    a_stop_waits_for_no_other_attempt,
    most_failures_make_it_rest_and_keep_the_order,
    values_are_decoded,
    a_message_for_nobody_is_rejected,
    the_broker_may_hash,
    settings_declare_them,
    an_unknown_name_is_an_error_that_names_those_there_are,
    a_rate_is_that_of_all_partitions,
}

/// Apps whose topology has one partitioned queue, and its name.
struct Work {
    partitioned: Partitioned,
    url: String,
}

impl Work {
    fn new(broker: Broker, what: &str, partitions: u16) -> Work {
        Work { partitioned: Partitioned::new(unique(what), partitions), url: broker.url() }
    }

    fn app(&self) -> App {
        let mut settings = settings(&self.url, "");
        settings.topology = Topology::new().partitioned(self.partitioned.clone());
        App::from_settings(settings).unwrap()
    }

    fn listener(&self, app: &App) -> PartitionedListenerBuilder {
        app.listener_partitioned(&self.partitioned.name)
    }

    /// Publishes the numbers of the range, each for one key after another.
    fn publish(&self, app: &App, keys: usize, numbers: std::ops::Range<usize>) {
        let connection = app.publish_pool().connection().unwrap();
        let exchange = self.partitioned.exchange();
        let messages: Vec<(String, String)> = numbers
            .flat_map(|number| {
                (0..keys).map(move |key| (self.partitioned.routing_key(&key_name(key)), number.to_string()))
            })
            .collect();
        let batch = messages.iter().map(|(key, body)| (exchange.as_str(), key.as_str(), body.as_str()));
        connection.publish_batch(batch).unwrap();
    }
}

fn key_name(key: usize) -> String {
    format!("customer.{key}")
}

/// What was handled, in order: the numbers of each key.
#[derive(Clone, Default)]
struct Handled(Arc<Mutex<HashMap<String, Vec<usize>>>>);

impl Handled {
    fn note(&self, partitioned: &Partitioned, delivery: &Delivery<'_>) {
        let number = delivery.message().text().unwrap().parse().unwrap();
        let key = partitioned.key_of(delivery.routing_key()).to_owned();
        self.0.lock().unwrap().entry(key).or_default().push(number);
    }

    /// How many different messages were handled.
    fn distinct(&self) -> usize {
        let all = self.0.lock().unwrap();
        let distinct = |numbers: &Vec<usize>| numbers.iter().collect::<BTreeSet<_>>().len();
        all.values().map(distinct).sum()
    }

    fn has_all(&self, keys: usize, numbers: usize) -> bool {
        self.distinct() == keys * numbers
    }

    /// No message was handled before all that were published before it, repetitions aside.
    fn assert_in_order(&self) {
        for (key, numbers) in self.0.lock().unwrap().iter() {
            let mut next = 0;
            for &number in numbers {
                assert!(number <= next, "{key}: {number} before {next}: {numbers:?}");
                next = next.max(number + 1);
            }
        }
    }

    fn repetitions(&self) -> usize {
        let total: usize = self.0.lock().unwrap().values().map(Vec::len).sum();
        total - self.distinct()
    }
}

/// Listens until it is stopped; each message takes so long.
fn listen(work: &Work, app: &App, handled: &Handled, time: Duration) -> Listener {
    let (handled, partitioned) = (handled.clone(), work.partitioned.clone());
    let handler = move |_: &Context<'_>, delivery: &Delivery<'_>| {
        handled.note(&partitioned, delivery);
        rest(time);
    };
    work.listener(app).prefetch(8).spawn(handler).unwrap()
}

fn rest(time: Duration) {
    if !time.is_zero() {
        let _ = crossbeam_channel::never::<()>().recv_timeout(time);
    }
}

fn messages_of_a_key_are_handled_in_order(broker: Broker) {
    let work = Work::new(broker, "in-order", 4);
    let app = work.app();
    let handled = Handled::default();
    let listener = listen(&work, &app, &handled, Duration::ZERO);
    work.publish(&app, 20, 0..50);
    wait_until("all are handled", || handled.has_all(20, 50));
    handled.assert_in_order();
    assert_eq!(handled.repetitions(), 0);
    assert_eq!(listener.active_partitions(), work.partitioned.queue_names().collect::<Vec<_>>());
    listener.stop().unwrap();
}

fn listeners_share_the_partitions_evenly(broker: Broker) {
    let work = Work::new(broker, "shared", 7);
    let apps: Vec<App> = (0..3).map(|_| work.app()).collect();
    let handled = Handled::default();
    let mut listeners: Vec<Listener> =
        apps.iter().map(|app| listen(&work, app, &handled, Duration::from_millis(1))).collect();
    let mut numbers = 0;
    let mut until = |what: &str, shares: &[usize], listeners: &[Listener]| {
        wait_until(what, || {
            work.publish(&apps[0], 30, numbers..numbers + 2);
            numbers += 2;
            wait_until("all are handled", || handled.has_all(30, numbers));
            let mut actives: Vec<usize> = listeners.iter().map(|one| one.active_partitions().len()).collect();
            actives.sort_unstable();
            actives == shares
        });
    };
    until("the three have about the same", &[2, 2, 3], &listeners);
    listeners.remove(0).stop().unwrap();
    until("two have all", &[3, 4], &listeners);
    listeners.push(listen(&work, &apps[0], &handled, Duration::from_millis(1)));
    until("the new one has its share", &[2, 2, 3], &listeners);
    handled.assert_in_order();
    assert!(listeners.iter().all(|listener| listener.stats().recoveries == 0));
    listeners.into_iter().for_each(|listener| listener.stop().unwrap());
}

fn the_broker_counts_members_and_one_active_consumer(broker: Broker) {
    let work = Work::new(broker, "counted", 2);
    let (app, handled) = (work.app(), Handled::default());
    let connection = app.publish_pool().connection().unwrap();
    let consumers = |queue: &str| connection.queue_declare_passive(queue).unwrap().consumer_count;
    let (partition, members) = (work.partitioned.queue_name(0), work.partitioned.members_queue());
    let mut listeners = Vec::new();
    for number in 1..=3 {
        listeners.push(listen(&work, &app, &handled, Duration::ZERO));
        assert_eq!((consumers(&partition), consumers(&members)), (1, number));
    }
    for left in (0..3).rev() {
        listeners.remove(0).stop().unwrap();
        wait_until("it is gone", || consumers(&members) == left);
        assert_eq!(consumers(&partition), left.min(1));
    }
}

fn what_a_stopped_listener_leaves_is_handled_in_order(broker: Broker) {
    let work = Work::new(broker, "stopped", 2);
    let apps: Vec<App> = (0..3).map(|_| work.app()).collect();
    let handled = Handled::default();
    let mut listeners: Vec<Listener> =
        apps.iter().map(|app| listen(&work, app, &handled, Duration::from_millis(2))).collect();
    work.publish(&apps[0], 6, 0..100);
    for part in 1..=2 {
        wait_until("some are handled", || handled.distinct() >= part * 150);
        listeners.remove(0).stop().unwrap();
    }
    wait_until("all are handled", || handled.has_all(6, 100));
    handled.assert_in_order();
    listeners.remove(0).stop().unwrap();
}

fn what_a_paused_listener_leaves_is_handled_in_order(broker: Broker) {
    let work = Work::new(broker, "paused", 2);
    let apps: Vec<App> = (0..2).map(|_| work.app()).collect();
    let handled = Handled::default();
    let listeners: Vec<Listener> =
        apps.iter().map(|app| listen(&work, app, &handled, Duration::from_millis(2))).collect();
    work.publish(&apps[0], 6, 0..100);
    wait_until("some are handled", || handled.distinct() >= 100);
    listeners[0].pause();
    wait_until("more are handled", || handled.distinct() >= 300);
    listeners[0].resume();
    wait_until("all are handled", || handled.has_all(6, 100));
    handled.assert_in_order();
    listeners.into_iter().for_each(|listener| listener.stop().unwrap());
}

fn cut_connections_lose_nothing_and_no_order(broker: Broker) {
    let hurt = broker.hurt();
    let work = Work { partitioned: Partitioned::new(unique("cut"), 4), url: hurt.url() };
    let apps: Vec<App> = (0..2).map(|_| work.app()).collect();
    let handled = Handled::default();
    let listeners: Vec<Listener> =
        apps.iter().map(|app| listen(&work, app, &handled, Duration::from_millis(1))).collect();
    let publisher = work.app();
    for round in 0..5 {
        for number in round * 20..(round + 1) * 20 {
            for key in (0..10).map(key_name) {
                let (exchange, key) = (work.partitioned.exchange(), work.partitioned.routing_key(&key));
                publisher.publish_pool().publish(&exchange, &key, number.to_string()).unwrap();
            }
        }
        wait_until("some of them are handled", || handled.distinct() >= 10 * (round * 20 + 5));
        hurt.close_all_connections("a test");
    }
    wait_until("all are handled", || handled.has_all(10, 100));
    handled.assert_in_order();
    listeners.into_iter().for_each(|listener| listener.stop().unwrap());
}

/// A listener on one partition whose handler fails with the message `bad` so often, and tells what it was given.
fn failing(work: &Work, app: &App, policy: Option<RetryPolicy>, failures: usize) -> (Listener, Receiver<String>) {
    let (seen, got) = mpsc::channel();
    let left = AtomicUsize::new(failures);
    let builder = match policy {
        Some(policy) => work.listener(app).retry(policy),
        None => work.listener(app).without_retry(),
    };
    let handler = move |_: &Context<'_>, delivery: &Delivery<'_>| {
        let body = delivery.message().text().unwrap().to_owned();
        seen.send(body.clone()).unwrap();
        let fails =
            body == "bad" && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        if fails { Err("it is bad") } else { Ok(()) }
    };
    (builder.spawn(handler).unwrap(), got)
}

fn publish_bad_among_good(work: &Work, app: &App) {
    let exchange = work.partitioned.exchange();
    let messages =
        ["one", "bad", "two", "three"].map(|body| (exchange.as_str(), work.partitioned.routing_key("k"), body));
    let messages = messages.iter().map(|(exchange, key, body)| (*exchange, key.as_str(), *body));
    app.publish_pool().connection().unwrap().publish_batch(messages).unwrap();
}

fn seen(got: &Receiver<String>, count: usize) -> Vec<String> {
    (0..count).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect()
}

fn policy(delays: &[u64]) -> RetryPolicy {
    RetryPolicy::new(delays.iter().copied().map(Duration::from_millis)).unwrap()
}

fn a_message_that_fails_is_tried_again_before_any_other(broker: Broker) {
    let work = Work::new(broker, "retried", 1);
    let app = work.app();
    let (listener, got) = failing(&work, &app, Some(policy(&[10, 150])), 2);
    publish_bad_among_good(&work, &app);
    let begun = Instant::now();
    assert_eq!(seen(&got, 6), ["one", "bad", "bad", "bad", "two", "three"]);
    assert!(begun.elapsed() >= Duration::from_millis(100), "it has not waited for the second delay");
    wait_until("all are acked", || listener.stats().acked == 4);
    let stats = listener.stats();
    assert_eq!((stats.retried, stats.delivered, stats.requeued, stats.dead), (2, 6, 0, 0));
    listener.stop().unwrap();
}

fn a_panic_and_a_requeue_are_tried_again_in_place_too(broker: Broker) {
    let work = Work::new(broker, "panics", 1);
    let app = work.app();
    let (seen_by, got) = mpsc::channel();
    let calls = AtomicUsize::new(0);
    let handler = move |_: &Context<'_>, delivery: &Delivery<'_>| {
        seen_by.send(delivery.message().text().unwrap().to_owned()).unwrap();
        match (delivery.message().text(), calls.fetch_add(1, Ordering::SeqCst)) {
            (Some("bad"), 1) => panic!("as the test wants it"),
            (Some("bad"), 2) => Outcome::Requeue,
            (Some("bad"), 3) => Outcome::Retry,
            _ => Outcome::Ack,
        }
    };
    let listener = work.listener(&app).retry(policy(&[1]).with_max_attempts(9)).spawn(handler).unwrap();
    publish_bad_among_good(&work, &app);
    assert_eq!(seen(&got, 7), ["one", "bad", "bad", "bad", "bad", "two", "three"]);
    wait_until("all are acked", || listener.stats().acked == 4);
    assert_eq!(listener.stats().panicked, 1);
    listener.stop().unwrap();
}

fn a_message_that_is_given_up_goes_to_the_dead(broker: Broker) {
    let work = Work::new(broker, "given-up", 1);
    let app = work.app();
    let (listener, got) = failing(&work, &app, Some(policy(&[1, 1])), 99);
    publish_bad_among_good(&work, &app);
    assert_eq!(seen(&got, 6), ["one", "bad", "bad", "bad", "two", "three"]);
    let dead_queue = format!("{}.dead", work.partitioned.queue_name(0));
    wait_until("it is with the dead", || broker.queue_len(&dead_queue) == 1);
    let connection = app.listen_pool().connection().unwrap();
    let dead = connection.get(&dead_queue).unwrap().unwrap();
    assert_eq!(dead.message().header_str("coney-error"), Some("it is bad"));
    assert_eq!(dead.message().header_i64("coney-attempts"), Some(3));
    dead.ack().unwrap();
    // Messages of a partition wait in it, and nowhere else.
    let waiting = format!("{}.retry.1", work.partitioned.queue_name(0));
    assert_eq!(connection.queue_declare_passive(&waiting).unwrap_err().code(), Some(404));
    drop(connection);
    listener.stop().unwrap();
}

fn without_a_policy_a_second_failure_is_rejected(broker: Broker) {
    let work = Work::new(broker, "rejected", 1);
    let app = work.app();
    let (listener, got) = failing(&work, &app, None, 99);
    publish_bad_among_good(&work, &app);
    assert_eq!(seen(&got, 5), ["one", "bad", "bad", "two", "three"]);
    wait_until("it is rejected", || listener.stats().rejected == 1);
    wait_until("the others are acked", || listener.stats().acked == 3);
    assert_eq!(listener.stats().requeued, 0);
    listener.stop().unwrap();
}

fn a_stop_waits_for_no_other_attempt(broker: Broker) {
    let work = Work::new(broker, "stops", 1);
    let app = work.app();
    let (listener, got) = failing(&work, &app, Some(policy(&[3_600_000])), 1);
    publish_bad_among_good(&work, &app);
    assert_eq!(seen(&got, 2), ["one", "bad"]);
    wait_until("it waits", || listener.stats().retried == 1);
    listener.stop().unwrap();
    wait_until("what was not handled is back", || broker.queue_len(&work.partitioned.queue_name(0)) == 3);
    let (next, got) = failing(&work, &app, None, 0);
    assert_eq!(seen(&got, 3), ["bad", "two", "three"]);
    next.stop().unwrap();
}

fn most_failures_make_it_rest_and_keep_the_order(broker: Broker) {
    let work = Work::new(broker, "rests", 1);
    let app = work.app();
    let (seen_by, got) = mpsc::channel();
    let left = AtomicUsize::new(3);
    let handler = move |_: &Context<'_>, delivery: &Delivery<'_>| {
        seen_by.send(delivery.message().text().unwrap().to_owned()).unwrap();
        match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Err("the database is down"),
            Err(_) => Ok(()),
        }
    };
    let listener = work
        .listener(&app)
        .retry(policy(&[1]).with_max_attempts(2))
        .pause_on_failures(2, 0.5, Duration::from_secs(60), Duration::from_millis(50))
        .spawn(handler)
        .unwrap();
    publish_bad_among_good(&work, &app);
    // In place, then after the pause, then after another one.
    assert_eq!(seen(&got, 7), ["one", "one", "one", "one", "bad", "two", "three"]);
    wait_until("all are acked", || listener.stats().acked == 4);
    assert_eq!((listener.stats().dead, listener.stats().pauses), (0, 2));
    listener.stop().unwrap();
}

fn values_are_decoded(broker: Broker) {
    let work = Work::new(broker, "json", 2);
    let app = work.app();
    let (seen_by, got) = mpsc::channel();
    let listener =
        work.listener(&app).spawn_json(move |_, number: u32| seen_by.send(number).map_err(|_| "nobody")).unwrap();
    let pool = app.publish_pool();
    let (exchange, key) = (work.partitioned.exchange(), work.partitioned.routing_key("k"));
    pool.publish(&exchange, &key, "no number").unwrap();
    pool.publish(&exchange, &key, "7").unwrap();
    assert_eq!(got.recv_timeout(PATIENCE), Ok(7));
    let partition = work.partitioned.queue_name(work.partitioned.partition_of("k"));
    wait_until("the other is with the dead", || broker.queue_len(&format!("{partition}.dead")) == 1);
    listener.stop().unwrap();
}

fn a_message_for_nobody_is_rejected(broker: Broker) {
    let work = Work::new(broker, "members", 1);
    let app = work.app();
    let (listener, got) = failing(&work, &app, None, 0);
    let members = work.partitioned.members_queue();
    app.publish_pool().publish("", &members, "hello").unwrap();
    wait_until("it is gone", || listener.stats().rejected == 1);
    assert!(got.try_recv().is_err());
    listener.stop().unwrap();
}

fn settings_declare_them(broker: Broker) {
    let name = unique("configured");
    let extra = format!(
        "[[topology.partitioned]]\nname = {name:?}\npartitions = 8\narguments = {{ x-max-length = 5 }}\n\
         [[profiles.small.topology.partitioned]]\nname = {name:?}\npartitions = 2"
    );
    let text = format!("[broker]\nurl = {:?}\n{extra}", broker.url());
    let settings = Settings::loader().text(text).profile("small").load().unwrap();
    let app = App::from_settings(settings).unwrap();
    app.declare_topology().unwrap();
    let partitioned = app.partitioned(&name).unwrap();
    assert_eq!((partitioned.partitions, partitioned.hashed_by), (2, HashedBy::Publisher));
    let connection = app.publish_pool().connection().unwrap();
    for queue in partitioned.queue_names().chain([partitioned.members_queue()]) {
        assert_eq!(connection.queue_declare_passive(&queue).unwrap().message_count, 0);
    }
    connection.publish(&partitioned.exchange(), &partitioned.routing_key("k"), "x").unwrap();
    let partition = partitioned.queue_name(partitioned.partition_of("k"));
    wait_until("it is in its partition", || broker.queue_len(&partition) == 1);
    // A publisher that was told of another number has no queue of it.
    let other = Partitioned::new(&name, 3);
    let error = connection.publish(&other.exchange(), &other.routing_key("k"), "x").unwrap_err();
    assert!(matches!(error, Error::Returned { .. }), "{error}");
}

fn an_unknown_name_is_an_error_that_names_those_there_are(broker: Broker) {
    let work = Work::new(broker, "known", 1);
    let error = work.app().listener_partitioned("other").spawn(|_, _| ()).unwrap_err().to_string();
    assert!(error.contains("\"other\"") && error.contains(&work.partitioned.name), "{error}");
    assert_eq!(work.app().partitioned("other").unwrap_err().to_string(), error);
}

fn a_rate_is_that_of_all_partitions(broker: Broker) {
    let work = Work::new(broker, "rate", 4);
    let app = work.app();
    let handled = Handled::default();
    let (noted, partitioned) = (handled.clone(), work.partitioned.clone());
    let handler = move |_: &Context<'_>, delivery: &Delivery<'_>| noted.note(&partitioned, delivery);
    let listener = work.listener(&app).max_rate(100.0).spawn(handler).unwrap();
    let begun = Instant::now();
    work.publish(&app, 20, 0..3);
    wait_until("all are handled", || handled.has_all(20, 3));
    assert!(begun.elapsed() >= Duration::from_millis(550), "{:?}", begun.elapsed());
    handled.assert_in_order();
    listener.stop().unwrap();
}

fn the_broker_may_hash(broker: Broker) {
    let broker = broker.hashing();
    let partitioned = Partitioned::new(unique("hashed"), 4).hashed_by(HashedBy::Broker);
    let work = Work { partitioned, url: format!("amqp://guest:guest@{}", broker.addr()) };
    let (app, handled) = (work.app(), Handled::default());
    let listener = listen(&work, &app, &handled, Duration::ZERO);
    work.publish(&app, 50, 0..20);
    wait_until("all are handled", || handled.has_all(50, 20));
    handled.assert_in_order();
    assert_eq!(listener.active_partitions().len(), 4);
    listener.stop().unwrap();
}
