//! Listeners that rest: by hand, or because most of their messages fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use coney::{
    Binding, Exchange, ExchangeKind, Listener, ListenerBuilder, ListenerState, Outcome, PauseReason, Queue,
    RetryPolicy, Topology,
};

use crate::contract;
use crate::listener::publish_numbers;
use crate::pace::listener;
use crate::support::{Broker, PATIENCE, bodies, drain, unique, wait_until};

contract! {
    by_hand_it_rests_and_goes_on,
    a_handler_may_pause_its_listener,
    the_message_in_hand_is_finished_and_the_rest_goes_back,
    a_message_published_after_the_pause_is_not_handled,
    a_listener_that_recovers_may_be_paused,
    a_paused_listener_stops_at_once,
    a_queue_named_by_the_broker_is_kept,
    most_fail_and_it_rests_tries_one_and_goes_on,
    nothing_is_moved_to_the_dead_meanwhile,
    a_message_that_fails_again_makes_it_rest_again,
    few_failures_do_not_pause,
    panics_count_and_what_cannot_be_decoded_does_not,
    a_failed_batch_pauses_and_goes_back,
    going_on_by_hand_ends_a_pause_because_of_failures,
    all_threads_rest,
    the_settings_of_the_pool_have_it_rest,
}

/// Longer than any test waits.
const NEVER: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(200);

fn reason(listener: &Listener) -> Option<PauseReason> {
    match listener.state() {
        ListenerState::Paused { why, .. } => Some(why),
        _ => None,
    }
}

fn is_paused(listener: &Listener) -> bool {
    reason(listener).is_some()
}

fn consumes(listener: &Listener) -> bool {
    matches!(listener.state(), ListenerState::Consuming)
}

/// A handler of messages that need a database, which is there or is not.
fn database() -> (Arc<AtomicBool>, Receiver<String>, impl Fn(&coney::Context<'_>, &coney::Delivery<'_>) -> Outcome) {
    let is_there = Arc::new(AtomicBool::new(true));
    let (seen, got) = mpsc::channel();
    let switch = Arc::clone(&is_there);
    let handler = move |_: &coney::Context<'_>, delivery: &coney::Delivery<'_>| {
        if switch.load(Ordering::SeqCst) {
            seen.send(delivery.message().text().unwrap().to_owned()).into()
        } else {
            Outcome::Failed("no database".to_owned())
        }
    };
    (is_there, got, handler)
}

fn by_hand_it_rests_and_goes_on(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "by-hand");
    let (seen, got) = mpsc::channel();
    let listener = builder.concurrency(2).spawn(move |_, _| seen.send(()).unwrap()).unwrap();
    publish_numbers(&app, &name, 1);
    got.recv_timeout(PATIENCE).unwrap();
    for round in 1..=2 {
        listener.pause();
        wait_until("it is paused", || reason(&listener) == Some(PauseReason::ByHand));
        assert!(broker.consumers_of(&name).is_empty());
        let health = app.health();
        assert!(!health.is_ready());
        assert!(health.to_string().contains("paused for"), "{health}");
        assert!(health.to_string().contains("it was told to"), "{health}");
        let stats = listener.stats();
        assert_eq!((stats.pauses, stats.workers), (round, 0));
        publish_numbers(&app, &name, 10);
        assert_eq!(broker.queue_len(&name), 10);
        listener.resume();
        for _ in 0..10 {
            got.recv_timeout(PATIENCE).unwrap();
        }
        wait_until("it consumes", || consumes(&listener));
        wait_until("the acks are there", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
        assert_eq!((listener.stats().workers, listener.stats().recoveries), (2, 0));
    }
    // Where nothing rests there is nothing to end.
    listener.resume();
    assert!(consumes(&listener));
    listener.stop().unwrap();
}

fn a_handler_may_pause_its_listener(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "from-within");
    let (own, of_handler) = crossbeam_channel::bounded::<Arc<Listener>>(1);
    let listener = Arc::new(
        builder
            .spawn(move |_, _| {
                of_handler.recv_timeout(PATIENCE).unwrap().pause();
            })
            .unwrap(),
    );
    own.send(Arc::clone(&listener)).unwrap();
    publish_numbers(&app, &name, 3);
    wait_until("it is paused", || is_paused(&listener));
    wait_until("two are back", || broker.queue_len(&name) == 2);
    assert_eq!((listener.stats().acked, listener.stats().delivered), (1, 1));
    app.shutdown(PATIENCE).unwrap();
}

fn the_message_in_hand_is_finished_and_the_rest_goes_back(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "in-hand");
    let (begun, begins) = mpsc::channel();
    let (release, gate) = crossbeam_channel::unbounded::<()>();
    let listener = builder
        .spawn(move |_, _| {
            begun.send(()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    publish_numbers(&app, &name, 5);
    begins.recv_timeout(PATIENCE).unwrap();
    listener.pause();
    assert!(!is_paused(&listener), "its handler runs");
    release.send(()).unwrap();
    wait_until("it is paused", || is_paused(&listener));
    assert_eq!((listener.stats().acked, begins.try_iter().count()), (1, 0));
    wait_until("the rest is back", || broker.queue_len(&name) == 4 && broker.queue_unacked(&name) == 0);
    drop(release);
    listener.resume();
    wait_until("the rest is acked", || listener.stats().acked == 5);
    listener.stop().unwrap();
}

fn a_message_published_after_the_pause_is_not_handled(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "after");
    let handled = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&handled);
    let listener = builder
        .spawn(move |_, _| {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    for round in 0..20 {
        listener.pause();
        publish_numbers(&app, &name, 1);
        assert_eq!(handled.load(Ordering::SeqCst), round);
        wait_until("it is paused", || is_paused(&listener));
        assert_eq!(handled.load(Ordering::SeqCst), round);
        listener.resume();
        wait_until("it is handled", || handled.load(Ordering::SeqCst) == round + 1);
    }
    listener.stop().unwrap();
}

fn a_listener_that_recovers_may_be_paused(broker: Broker) {
    let app = broker.app("");
    let admin = app.publish_pool().connection().unwrap();
    let name = unique("gone");
    admin.queue_declare(&Queue::new(&name)).unwrap();
    let listener = app.listener(&name).spawn(|_, _| {}).unwrap();
    admin.queue_delete(&name).unwrap();
    wait_until("it has noticed", || matches!(listener.state(), ListenerState::Recovering { attempt: 1.., .. }));
    listener.pause();
    wait_until("it is paused", || is_paused(&listener));
    admin.queue_declare(&Queue::new(&name)).unwrap();
    listener.resume();
    wait_until("it consumes", || consumes(&listener));
    listener.stop().unwrap();
    admin.queue_delete(&name).unwrap();
}

fn a_paused_listener_stops_at_once(broker: Broker) {
    let app = broker.app("");
    let (builder, _) = listener(&app, "stopped");
    let listener = builder.spawn(|_, _| {}).unwrap();
    listener.pause();
    wait_until("it is paused", || is_paused(&listener));
    listener.stop_timeout(PATIENCE).unwrap();
    let (builder, _) = crate::pace::listener(&app, "shut-down");
    let listener = builder.spawn(|_, _| {}).unwrap();
    listener.pause();
    app.shutdown(PATIENCE).unwrap();
    assert!(matches!(listener.state(), ListenerState::Stopped));
}

fn a_queue_named_by_the_broker_is_kept(broker: Broker) {
    let app = broker.app("");
    let exchange = unique("news");
    let news = Exchange::new(&exchange, ExchangeKind::Fanout);
    let topology = Topology::new().exchange(news).queue(Queue::server_named()).bind(Binding::queue("").to(&exchange));
    let (seen, got) = mpsc::channel();
    let listener = app
        .listener("")
        .topology(topology)
        .spawn(move |context, _| seen.send(context.queue().to_owned()).unwrap())
        .unwrap();
    app.publish_pool().publish(&exchange, "", "before").unwrap();
    let own = got.recv_timeout(PATIENCE).unwrap();
    listener.pause();
    wait_until("it is paused", || is_paused(&listener));
    // It takes messages, or this would be an error.
    app.publish_pool().publish(&exchange, "", "while it rests").unwrap();
    listener.resume();
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), own);
    listener.stop().unwrap();
    app.publish_pool().connection().unwrap().exchange_delete(&exchange, false).unwrap();
}

/// Trips when both of two have failed.
fn pausing(builder: ListenerBuilder, pause: Duration) -> ListenerBuilder {
    builder.pause_on_failures(2, 1.0, NEVER / 2, pause)
}

fn most_fail_and_it_rests_tries_one_and_goes_on(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "failing");
    let (is_there, got, handler) = database();
    is_there.store(false, Ordering::SeqCst);
    let listener = builder.prefetch(1).pause_on_failures(4, 0.5, NEVER / 2, SOON).spawn(handler).unwrap();
    let began = Instant::now();
    publish_numbers(&app, &name, 5);
    wait_until("it is paused", || is_paused(&listener));
    let ListenerState::Paused { since, until, why } = listener.state() else { panic!("{:?}", listener.state()) };
    assert!(since >= began && until.is_some_and(|until| until > since));
    let text = why.to_string();
    assert!(text.starts_with("4 of 4 messages within 30m failed") || text.contains("was tried"), "{text}");
    assert!(text.contains("no database"), "{text}");
    is_there.store(true, Ordering::SeqCst);
    wait_until("it consumes", || consumes(&listener));
    // Without a policy, the first three were requeued once and came again, or were rejected.
    wait_until("the rest is handled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    assert!(got.try_iter().count() >= 2);
    assert_eq!((listener.stats().recoveries, listener.stats().workers), (0, 1));
    listener.stop().unwrap();
}

fn nothing_is_moved_to_the_dead_meanwhile(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "unharmed");
    let (is_there, got, handler) = database();
    is_there.store(false, Ordering::SeqCst);
    // The first failure is the last: whatever is put away is dead.
    let policy = RetryPolicy::new([SOON]).unwrap().with_max_attempts(1);
    let listener =
        builder.retry(policy).pause_on_failures(3, 1.0, NEVER / 2, Duration::from_millis(20)).spawn(handler).unwrap();
    publish_numbers(&app, &name, 10);
    wait_until("it has tried a few times", || listener.stats().pauses >= 5);
    assert_eq!(listener.stats().dead, 2, "those before it paused");
    is_there.store(true, Ordering::SeqCst);
    wait_until("the rest is acked", || listener.stats().acked == 8);
    assert_eq!((listener.stats().dead, got.try_iter().count()), (2, 8));
    listener.stop().unwrap();
    let dead = drain(&app.publish_pool().connection().unwrap(), &format!("{name}.dead"));
    assert_eq!(bodies(&dead).len(), 2);
}

fn a_message_that_fails_again_makes_it_rest_again(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "again");
    let (is_there, _got, handler) = database();
    is_there.store(false, Ordering::SeqCst);
    let listener = pausing(builder, SOON).spawn(handler).unwrap();
    publish_numbers(&app, &name, 2);
    wait_until("it is paused", || is_paused(&listener));
    let ListenerState::Paused { since: first, .. } = listener.state() else { panic!("{:?}", listener.state()) };
    wait_until("it rests again", || matches!(reason(&listener), Some(PauseReason::StillFailing { .. })));
    let ListenerState::Paused { since, .. } = listener.state() else { panic!("{:?}", listener.state()) };
    assert_eq!(since, first, "it is one pause to those who wait");
    assert!(app.health().to_string().contains("the message that was tried failed: no database"));
    listener.stop().unwrap();
}

fn few_failures_do_not_pause(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "few");
    let listener = builder
        .retry(RetryPolicy::new([NEVER / 2]).unwrap())
        .pause_on_failures(4, 0.6, NEVER / 2, NEVER)
        .spawn(|_, delivery| {
            let number: u32 = delivery.message().text().unwrap().parse().unwrap();
            if number.is_multiple_of(2) { Ok(()) } else { Err("odd") }
        })
        .unwrap();
    publish_numbers(&app, &name, 40);
    wait_until("all are settled", || listener.stats().acked + listener.stats().retried == 40);
    assert!(consumes(&listener), "{:?}", listener.state());
    assert_eq!(listener.stats().pauses, 0);
    listener.stop().unwrap();
}

fn panics_count_and_what_cannot_be_decoded_does_not(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "panicking");
    let listener = pausing(builder, NEVER)
        .spawn_json(|_, number: u32| {
            if number == 0 {
                panic!("no database");
            }
        })
        .unwrap();
    let publish = |text: &str| app.publish_pool().publish("", &name, text).unwrap();
    for _ in 0..5 {
        publish("no number");
    }
    wait_until("they are dead", || listener.stats().dead == 5);
    publish("1");
    wait_until("it is acked", || listener.stats().acked == 1);
    assert_eq!(listener.stats().pauses, 0);
    listener.stop().unwrap();

    let (builder, name) = crate::pace::listener(&app, "panicking");
    let listener = pausing(builder, NEVER)
        .spawn(|_, _| {
            if true {
                panic!("no database")
            }
        })
        .unwrap();
    publish_numbers(&app, &name, 2);
    wait_until("it is paused", || is_paused(&listener));
    assert!(reason(&listener).unwrap().to_string().contains("the handler panicked: no database"));
    listener.stop().unwrap();
}

fn a_failed_batch_pauses_and_goes_back(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "failed-batch");
    let is_there = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&is_there);
    let listener = pausing(builder, SOON)
        .retry(RetryPolicy::new([NEVER / 2]).unwrap())
        .batch(10, Duration::from_millis(50))
        .spawn_batch(move |_, _| if switch.load(Ordering::SeqCst) { Ok(()) } else { Err("no database") })
        .unwrap();
    publish_numbers(&app, &name, 10);
    wait_until("it is paused", || is_paused(&listener));
    assert_eq!(listener.stats().retried, 1, "the one before it paused");
    is_there.store(true, Ordering::SeqCst);
    wait_until("the others are acked", || listener.stats().acked == 9);
    assert!(listener.stats().requeued >= 9, "{:?}", listener.stats());
    listener.stop().unwrap();
}

fn going_on_by_hand_ends_a_pause_because_of_failures(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "impatient");
    let (is_there, got, handler) = database();
    is_there.store(false, Ordering::SeqCst);
    let listener = pausing(builder, NEVER).retry(RetryPolicy::new([SOON]).unwrap()).spawn(handler).unwrap();
    publish_numbers(&app, &name, 2);
    wait_until("it is paused", || is_paused(&listener));
    is_there.store(true, Ordering::SeqCst);
    listener.resume();
    for _ in 0..2 {
        got.recv_timeout(PATIENCE).unwrap();
    }
    wait_until("it consumes", || consumes(&listener));
    listener.stop().unwrap();
}

fn all_threads_rest(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "threads");
    let (is_there, got, handler) = database();
    is_there.store(false, Ordering::SeqCst);
    let listener = pausing(builder, SOON).concurrency(4).prefetch(5).spawn(handler).unwrap();
    publish_numbers(&app, &name, 100);
    wait_until("it is paused", || is_paused(&listener));
    is_there.store(true, Ordering::SeqCst);
    wait_until("it consumes", || consumes(&listener));
    wait_until("the rest is handled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    let stats = listener.stats();
    assert_eq!((stats.workers, stats.acked + stats.rejected), (4, 100));
    assert!(stats.rejected <= 4, "{stats:?}");
    assert_eq!(got.try_iter().count() as u64, stats.acked);
    listener.stop().unwrap();
}

fn the_settings_of_the_pool_have_it_rest(broker: Broker) {
    let app = broker.app("[pools.listen.pause_on_failures]\nmin = 1\nratio = 1\npause = \"1h\"");
    let (builder, name) = listener(&app, "configured");
    let listener = builder.spawn(|_, _| Err::<(), _>("no database")).unwrap();
    publish_numbers(&app, &name, 1);
    wait_until("it is paused", || is_paused(&listener));
    listener.stop().unwrap();
    let (builder, name) = crate::pace::listener(&app, "without");
    let listener = builder.without_pause_on_failures().spawn(|_, _| Err::<(), _>("no database")).unwrap();
    publish_numbers(&app, &name, 3);
    wait_until("all are given up", || listener.stats().rejected == 3);
    assert_eq!(listener.stats().pauses, 0);
    listener.stop().unwrap();
}
