//! Listeners on a broker that is well: what handlers return is what becomes of the message.

use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use coney::{App, Error, Listener, ListenerState, Message, Outcome, Queue, Topology, Unsettled};

use crate::contract;
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract! {
    a_slow_handler_holds_no_acks_back,
    a_handler_that_holds_the_app_keeps_nothing_alive,
    any_name_that_a_queue_may_have_will_do,
    smoke,
    outcomes_do_what_they_say,
    concurrency_means_as_many_threads_with_consumers_of_their_own,
    handlers_publish_and_reply_and_a_mistake_does_not_disturb_the_listening,
    one_listener_too_many_is_an_error_at_once_that_names_the_setting,
    a_first_refusal_is_returned_and_leaves_nothing_behind,
    a_stop_finishes_the_message_in_hand_and_gives_back_the_rest,
    without_batching_every_message_is_acked_before_the_next,
    a_backlog_is_consumed_within_the_prefetch,
    manual_settling_works_from_another_thread_in_batches_and_by_dropping,
}

/// Publishes numbers from 0 to `count`.
pub fn publish_numbers(app: &App, queue: &str, count: usize) {
    let connection = app.publish_pool().connection().unwrap();
    connection.publish_batch((0..count).map(|n| ("", queue, n.to_string()))).unwrap();
}

fn new_queue(app: &App, what: &str) -> String {
    queue(&app.publish_pool().connection().unwrap(), what)
}

/// A listener that passes on the bodies it gets.
fn echo(app: &App, queue: &str) -> (Listener, Receiver<String>) {
    let (seen, got) = mpsc::channel();
    let listener = app.spawn_listener(queue, move |_, delivery| {
        seen.send(delivery.message().text().unwrap().to_owned()).unwrap();
    });
    (listener.unwrap(), got)
}

fn settled(broker: Broker, queue: &str) -> bool {
    broker.queue_len(queue) == 0 && broker.queue_unacked(queue) == 0
}

fn smoke(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "listen");
    let (listener, got) = echo(&app, &queue);
    assert!(matches!(listener.state(), ListenerState::Consuming));
    let consumers: Vec<_> = broker.consumers_of(&queue);
    assert_eq!((consumers.len(), consumers[0].prefetch, consumers[0].ack_required), (1, 64, true));
    publish_numbers(&app, &queue, 1000);
    for n in 0..1000 {
        assert_eq!(got.recv_timeout(PATIENCE).unwrap(), n.to_string());
    }
    wait_until("all are acked", || settled(broker, &queue));
    let stats = listener.stats();
    assert_eq!((stats.delivered, stats.acked, stats.recoveries), (1000, 1000, 0));
    assert!(stats.last_delivery_age.is_some_and(|age| age < PATIENCE));
    listener.stop().unwrap();
    assert!(broker.consumers_of(&queue).is_empty());
}

fn outcomes_do_what_they_say(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, dead) = (unique("outcomes"), queue(&connection, "outcomes-dead"));
    let declared = Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(dead.clone());
    connection.queue_declare(&declared).unwrap();
    let listener = app
        .spawn_listener(&name, |_, delivery| match (delivery.message().text().unwrap(), delivery.redelivered()) {
            ("ack" | "requeue" | "failed once", true) | ("ack", false) => Outcome::Ack,
            ("reject", _) => Outcome::Reject,
            ("requeue", false) => Outcome::Requeue,
            ("json", _) => Err::<(), _>(delivery.message().decode_json::<u32>().unwrap_err()).into(),
            ("panic", _) => panic!("this panic is part of the test"),
            ("failed once" | "failed", _) => Err::<(), _>("no").into(),
            other => panic!("unexpected: {other:?}"),
        })
        .unwrap();
    for body in ["ack", "reject", "requeue", "json", "panic", "failed once", "failed"] {
        connection.publish("", &name, body).unwrap();
    }
    wait_until("all are dealt with", || settled(broker, &name) && broker.queue_len(&dead) == 4);
    let mut given_up = bodies(&drain(&connection, &dead));
    given_up.sort();
    assert_eq!(given_up, ["failed", "json", "panic", "reject"]);
    let stats = listener.stats();
    assert_eq!((stats.acked, stats.rejected, stats.requeued, stats.panicked), (3, 4, 4, 2));
}

fn concurrency_means_as_many_threads_with_consumers_of_their_own(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "threads");
    let (busy, ready) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = app
        .listener(&queue)
        .concurrency(4)
        .prefetch(1)
        .spawn(move |_, _| {
            busy.send(thread::current().id()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    publish_numbers(&app, &queue, 4);
    // All four are in their handlers at the same time.
    let mut threads: Vec<_> = (0..4).map(|_| ready.recv_timeout(PATIENCE).unwrap()).collect();
    threads.dedup();
    assert_eq!(threads.len(), 4);
    assert_eq!(broker.consumers_of(&queue).len(), 4);
    drop(release);
    wait_until("all are acked", || settled(broker, &queue));
    listener.stop().unwrap();
}

fn handlers_publish_and_reply_and_a_mistake_does_not_disturb_the_listening(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (requests, answers) = (queue(&connection, "requests"), queue(&connection, "answers"));
    let missing = unique("missing");
    let listener = app
        .listener(&requests)
        .name("calculator")
        .spawn(move |context, delivery| -> coney::Result<()> {
            assert_eq!(context.listener(), "calculator");
            let error = context.publish(&missing, "k", "lost").unwrap_err();
            assert_eq!(error.code(), Some(404));
            let n: u32 = delivery.message().decode_json()?;
            context.reply(delivery, Message::json(&(n * n))?)
        })
        .unwrap();
    for n in 0..20 {
        let request = Message::json(&n).unwrap().with_reply_to(&answers).with_correlation_id(n.to_string());
        connection.publish("", &requests, request).unwrap();
    }
    for n in 0_u32..20 {
        let answer = connection.get_timeout(&answers, PATIENCE).unwrap().expect("an answer").ack().unwrap();
        assert_eq!(answer.message().correlation_id(), Some(n.to_string().as_str()));
        assert_eq!(answer.message().decode_json::<u32>().unwrap(), n * n);
    }
    assert_eq!(listener.stats().recoveries, 0);
}

fn one_listener_too_many_is_an_error_at_once_that_names_the_setting(broker: Broker) {
    let app = broker.app("[pools.listen]\nsize = 2");
    let queue = new_queue(&app, "crowded");
    let listeners = [echo(&app, &queue).0, echo(&app, &queue).0];
    let error = app.spawn_listener(&queue, |_, _| ()).map(drop).unwrap_err();
    assert!(matches!(error, Error::TooManyListeners { size: 2, .. }) && !error.is_transient());
    assert!(error.to_string().contains("pools.listen.size"), "{error}");
    let [one, two] = listeners;
    one.stop().unwrap();
    drop(two);
    let _third = echo(&app, &queue);
}

fn a_first_refusal_is_returned_and_leaves_nothing_behind(broker: Broker) {
    let app = broker.app("[pools.listen]\nsize = 1");
    let missing = unique("missing");
    let error = app.spawn_listener(&missing, |_, _| ()).map(drop).unwrap_err();
    assert_eq!(error.code(), Some(404), "{error}");
    assert!(error.to_string().contains(&missing), "{error}");
    let topology = Topology::new().queue(Queue::new(&missing));
    app.listener(&missing).topology(topology).spawn(|_, _| ()).unwrap().stop().unwrap();
    let exclusive = app.listener(&missing).exclusive(true).consumer_priority(5).spawn(|_, _| ()).unwrap();
    let error = broker.app("").spawn_listener(&missing, |_, _| ()).map(drop).unwrap_err();
    assert_eq!(error.code(), Some(403), "{error}");
    exclusive.stop().unwrap();
}

fn a_stop_finishes_the_message_in_hand_and_gives_back_the_rest(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "stopping");
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = app
        .spawn_listener(&queue, move |_, _| {
            begun.send(()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    publish_numbers(&app, &queue, 10);
    in_handler.recv_timeout(PATIENCE).unwrap();
    let error = listener.stop_timeout(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(&error, Error::NotEnded { left, .. } if left[0].contains(&queue)), "{error}");
    drop(release);
    // One was dealt with, and no second one begun.
    wait_until("the rest is back", || broker.queue_len(&queue) == 9);
    assert_eq!((in_handler.try_iter().count(), broker.queue_unacked(&queue)), (0, 0));
}

fn without_batching_every_message_is_acked_before_the_next(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "one-by-one");
    let held = Arc::new(Mutex::new(Vec::new()));
    for ack_batch in [false, true] {
        publish_numbers(&app, &queue, 50);
        let (name, seen) = (queue.clone(), Arc::clone(&held));
        let listener = app.listener(&queue).prefetch(20).ack_batch(ack_batch).spawn(move |_, _| {
            // Before this message: how many are unsettled beside those that wait ahead.
            seen.lock().unwrap().push(broker.queue_len(&name));
        });
        wait_until("all are acked", || settled(broker, &queue));
        listener.unwrap().stop().unwrap();
    }
    assert_eq!(held.lock().unwrap().len(), 100);
}

fn a_backlog_is_consumed_within_the_prefetch(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "backlog");
    publish_numbers(&app, &queue, 20_000);
    let most = Arc::new(Mutex::new(0));
    let (name, seen) = (queue.clone(), Arc::clone(&most));
    let listener = app
        .listener(&queue)
        .prefetch(50)
        .spawn(move |_, delivery| {
            if delivery.message().text().unwrap().ends_with("000") {
                let mut most = seen.lock().unwrap();
                *most = broker.queue_unacked(&name).max(*most);
            }
        })
        .unwrap();
    wait_until("all are acked", || settled(broker, &queue));
    assert_eq!(listener.stats().acked, 20_000);
    let most = *most.lock().unwrap();
    assert!((1..=50).contains(&most), "{most} were unacked");
}

fn manual_settling_works_from_another_thread_in_batches_and_by_dropping(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, dead) = (unique("manual"), queue(&connection, "manual-dead"));
    let declared = Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(dead.clone());
    connection.queue_declare(&declared).unwrap();
    let (pass_on, passed) = mpsc::channel::<Unsettled>();
    let listener = app.listener(&name).prefetch(100).spawn_manual(move |_, unsettled| {
        pass_on.send(unsettled).unwrap();
    });
    let listener = listener.unwrap();
    publish_numbers(&app, &name, 30);
    let mut held: Vec<Unsettled> = (0..30).map(|_| passed.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(broker.queue_unacked(&name), 30);
    held.pop().unwrap().requeue().unwrap(); // 29
    held.remove(0).ack().unwrap(); // 0
    held.remove(0).reject().unwrap(); // 1
    held.remove(17).ack_up_to().unwrap(); // 19, and with it 2 to 18
    wait_until("20 to 28 and the one that came back are left", || broker.queue_unacked(&name) == 10);
    drop(held); // 2 to 18 are settled already; the others are requeued
    let mut again: Vec<Unsettled> = (0..10).map(|_| passed.recv_timeout(PATIENCE).unwrap()).collect();
    assert!(again.iter().all(|unsettled| unsettled.redelivered()));
    again.pop(); // dropped a second time: rejected
    again.drain(..).for_each(|unsettled| drop(unsettled.ack().unwrap()));
    wait_until("all are settled", || settled(broker, &name));
    listener.stop().unwrap();
    assert_eq!(drain(&connection, &dead).len(), 2);
}

fn a_handler_that_holds_the_app_keeps_nothing_alive(broker: Broker) {
    let name = unique("holding");
    let app = broker.app(&format!("[pools.listen]\nsize = 1\n[pools.{name}]\n"));
    let queue = new_queue(&app, "held");
    let in_handler = app.clone();
    let listener = app.spawn_listener(&queue, move |_, _| drop(in_handler.pool("publish").map(drop))).unwrap();
    let guard = app.pool(&name).unwrap().connection().unwrap();
    drop(guard);
    listener.stop().unwrap();
    drop(app);
    wait_until("its connections are closed", || !broker.connection_names().iter().any(|given| given.contains(&name)));
}

fn any_name_that_a_queue_may_have_will_do(broker: Broker) {
    let app = broker.app("");
    let name = format!("{} \0 ü", unique("odd"));
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&name)).unwrap();
    let (listener, got) = echo(&app, &name);
    publish_numbers(&app, &name, 1);
    assert_eq!(got.recv_timeout(PATIENCE).unwrap(), "0");
    listener.stop().unwrap();
}

fn a_slow_handler_holds_no_acks_back(broker: Broker) {
    let app = broker.app("");
    let queue = new_queue(&app, "slow");
    publish_numbers(&app, &queue, 60);
    let listener = app.spawn_listener(&queue, |_, _| thread::park_timeout(Duration::from_millis(120))).unwrap();
    wait_until("some are acked", || broker.queue_len(&queue) + broker.queue_unacked(&queue) <= 55);
    // Half the prefetch would be 32.
    assert!(listener.stats().delivered < 30, "{:?}", listener.stats());
    listener.stop().unwrap();
}
