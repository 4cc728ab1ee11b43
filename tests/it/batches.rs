//! Listeners that take many messages at a time.

use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use coney::{
    App, Batch, BatchItem, Context, Error, ListenerBuilder, ListenerState, Outcome, Queue, RetryPolicy, Topology,
};

use crate::contract;
use crate::listener::publish_numbers;
use crate::logs;
use crate::support::{Broker, PATIENCE, bodies, drain, unique, wait_until};

contract! {
    full_batches_are_handed_out_at_once_in_the_order_of_arrival,
    what_has_come_within_the_wait_is_handed_out,
    one_outcome_is_that_of_all,
    what_is_said_of_one_message_is_not_touched_by_the_outcome,
    a_panic_fails_those_of_which_nothing_was_said,
    without_a_policy_a_failed_batch_is_requeued_once,
    a_handler_may_sort_its_batch,
    a_stop_hands_out_no_half_batch_and_finishes_the_one_in_hand,
    a_lost_connection_gives_the_messages_again,
    the_prefetch_of_the_pool_is_raised_to_the_batch,
}

/// Longer than any test waits.
const NEVER: Duration = Duration::from_secs(60);

fn listener(app: &App, queue: &str) -> ListenerBuilder {
    app.listener(queue).topology(Topology::new().queue(Queue::new(queue)))
}

fn texts(batch: &Batch) -> Vec<String> {
    batch.iter().map(|item| item.message().text().unwrap().to_owned()).collect()
}

/// A handler that tells what is in its batches.
fn telling(told: Sender<Vec<String>>) -> impl Fn(&Context<'_>, &mut Batch) -> Outcome + Send + Sync {
    move |_, batch| told.send(texts(batch)).into()
}

fn again_after_ten_milliseconds() -> RetryPolicy {
    RetryPolicy::new([Duration::from_millis(10)]).unwrap()
}

fn next(batches: &Receiver<Vec<String>>) -> Vec<String> {
    batches.recv_timeout(PATIENCE).unwrap()
}

fn full_batches_are_handed_out_at_once_in_the_order_of_arrival(broker: Broker) {
    let app = broker.app("");
    let name = unique("full");
    let (told, batches) = mpsc::channel();
    let listener = listener(&app, &name).batch(4, NEVER).spawn_batch(telling(told)).unwrap();
    publish_numbers(&app, &name, 8);
    assert_eq!(next(&batches), ["0", "1", "2", "3"]);
    assert_eq!(next(&batches), ["4", "5", "6", "7"]);
    wait_until("all are acked", || listener.stats().acked == 8);
    wait_until("the broker has the acks", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    assert_eq!(listener.stats().delivered, 8);
    listener.stop().unwrap();
}

fn what_has_come_within_the_wait_is_handed_out(broker: Broker) {
    let app = broker.app("");
    let name = unique("within");
    let (told, batches) = mpsc::channel();
    let wait = Duration::from_millis(300);
    let listener = listener(&app, &name).batch(60, wait).spawn_batch(telling(told)).unwrap();
    for _ in 0..2 {
        let start = Instant::now();
        publish_numbers(&app, &name, 3);
        let mut got = next(&batches);
        assert!(start.elapsed() >= wait, "handed out after {:?}", start.elapsed());
        // On a machine that stands still meanwhile, the rest is in another one.
        while got.len() < 3 {
            got.extend(next(&batches));
        }
        assert_eq!(got, ["0", "1", "2"]);
    }
    wait_until("all are acked", || listener.stats().acked == 6);
    listener.stop().unwrap();
}

fn one_outcome_is_that_of_all(broker: Broker) {
    let app = broker.app("");
    let name = unique("together");
    let (told, batches) = mpsc::channel();
    let (answer, answers) = crossbeam_channel::unbounded::<Result<Outcome, &str>>();
    let listener = listener(&app, &name)
        .retry(again_after_ten_milliseconds())
        .batch(3, NEVER)
        .spawn_batch(move |_, batch: &mut Batch| {
            told.send(texts(batch)).unwrap();
            answers.recv().unwrap()
        })
        .unwrap();
    publish_numbers(&app, &name, 3);
    for outcome in [Ok(Outcome::Requeue), Err("the database is down"), Ok(Outcome::Ack)] {
        answer.send(outcome).unwrap();
        let mut batch = next(&batches);
        // What has waited comes back in no particular order.
        batch.sort();
        assert_eq!(batch, ["0", "1", "2"]);
    }
    wait_until("all are acked", || listener.stats().acked == 3);
    let stats = listener.stats();
    assert_eq!((stats.delivered, stats.requeued, stats.retried, stats.dead), (9, 3, 3, 0));
    publish_numbers(&app, &name, 3);
    answer.send(Ok(Outcome::Reject)).unwrap();
    wait_until("all are rejected", || listener.stats().rejected == 3);
    wait_until("nothing is left", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    listener.stop().unwrap();
}

fn what_is_said_of_one_message_is_not_touched_by_the_outcome(broker: Broker) {
    let app = broker.app("");
    let name = unique("one-by-one");
    let listener = listener(&app, &name)
        .retry(RetryPolicy::new([Duration::from_secs(3600)]).unwrap())
        .batch(6, NEVER)
        .spawn_batch(|context, batch: &mut Batch| {
            assert!(context.queue().starts_with("one-by-one"));
            assert_eq!(batch.len(), 6);
            batch[0].ack();
            batch[1].fail("this one cannot be stored");
            batch[2].fail(serde_json::from_str::<u32>("no number").unwrap_err());
            batch[3].reject();
            batch[4].fail("what is said last counts");
            batch[4].settle(Outcome::Ack);
            assert_eq!(batch[5].outcome(), None);
            batch.ack_rest();
            assert_eq!(batch[5].outcome(), Some(&Outcome::Ack));
            Outcome::Failed("nothing is left to fail".to_owned())
        })
        .unwrap();
    publish_numbers(&app, &name, 6);
    wait_until("all are settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    wait_until("all are counted", || listener.stats().acked == 3);
    let stats = listener.stats();
    assert_eq!((stats.retried, stats.dead, stats.rejected, stats.requeued), (1, 1, 1, 0));
    let connection = app.publish_pool().connection().unwrap();
    assert_eq!(bodies(&drain(&connection, &format!("{name}.dead"))), ["2"]);
    let waiting = drain(&connection, &format!("{name}.retry.3600000"));
    assert_eq!(waiting[0].message().header_str("coney-error"), Some("this one cannot be stored"));
    assert_eq!(bodies(&waiting), ["1"]);
    listener.stop().unwrap();
}

fn a_panic_fails_those_of_which_nothing_was_said(broker: Broker) {
    logs::keep();
    let app = broker.app("");
    let name = unique("panics");
    let listener = listener(&app, &name)
        .retry(again_after_ten_milliseconds())
        .batch(3, Duration::from_millis(200))
        .spawn_batch(|_, batch: &mut Batch| -> Outcome {
            if let Some(spared) = batch.iter_mut().find(|item| item.body() == b"1") {
                spared.ack();
            }
            panic!("this panic is part of the test");
        })
        .unwrap();
    publish_numbers(&app, &name, 3);
    let dead = format!("{name}.dead");
    wait_until("two are dead", || broker.queue_len(&dead) == 2);
    wait_until("it is counted", || listener.stats().dead == 2);
    let stats = listener.stats();
    // Three were delivered, and two of them once more.
    assert_eq!((stats.acked, stats.retried, stats.panicked, stats.recoveries), (1, 2, 5, 0));
    let dead = drain(&app.publish_pool().connection().unwrap(), &dead);
    for message in &dead {
        let why = message.message().header_str("coney-error");
        assert_eq!(why, Some("the handler panicked: this panic is part of the test"));
    }
    let said = format!("from queue {name:?} panicked: this panic is part of the test");
    assert!(!logs::lines_with(&said).is_empty());
    listener.stop().unwrap();
}

fn without_a_policy_a_failed_batch_is_requeued_once(broker: Broker) {
    let app = broker.app("");
    let name = unique("no-policy");
    let listener = listener(&app, &name)
        .without_retry()
        .batch(2, NEVER)
        .spawn_batch(|_, _: &mut Batch| Err::<(), _>("always"))
        .unwrap();
    publish_numbers(&app, &name, 2);
    wait_until("both are given up", || listener.stats().rejected == 2);
    assert_eq!((listener.stats().requeued, listener.stats().delivered), (2, 4));
    listener.stop().unwrap();
}

fn a_handler_may_sort_its_batch(broker: Broker) {
    let app = broker.app("");
    let (name, dead) = (unique("sorted"), unique("sorted-dead"));
    let topology = Topology::new()
        .queue(Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(&dead))
        .queue(Queue::new(&dead));
    let listener = app
        .listener(&name)
        .topology(topology)
        .batch(5, NEVER)
        .spawn_batch(|_, batch: &mut Batch| {
            batch.sort_by_key(|item: &BatchItem| std::cmp::Reverse(item.body().to_vec()));
            batch[1].reject();
        })
        .unwrap();
    publish_numbers(&app, &name, 5);
    wait_until("one is dead", || broker.queue_len(&dead) == 1);
    wait_until("the others are acked", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    assert_eq!(bodies(&drain(&app.publish_pool().connection().unwrap(), &dead)), ["3"]);
    wait_until("it is counted", || listener.stats().acked == 4);
    listener.stop().unwrap();
}

fn a_stop_hands_out_no_half_batch_and_finishes_the_one_in_hand(broker: Broker) {
    let app = broker.app("");
    let name = unique("stopped");
    let (told, batches) = mpsc::channel();
    let (open, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = listener(&app, &name)
        .prefetch(6)
        .batch(3, NEVER)
        .spawn_batch(move |_, batch: &mut Batch| {
            told.send(texts(batch)).unwrap();
            let _ = gate.recv();
        })
        .unwrap();
    publish_numbers(&app, &name, 5);
    assert_eq!(next(&batches), ["0", "1", "2"]);
    open.send(()).unwrap();
    wait_until("the first are acked", || listener.stats().acked == 3);
    wait_until("two are collected", || broker.queue_unacked(&name) == 2);
    listener.stop().unwrap();
    wait_until("they are back", || (broker.queue_len(&name), broker.queue_unacked(&name)) == (2, 0));
    assert!(batches.try_recv().is_err(), "no half batch was handed out");
}

fn a_lost_connection_gives_the_messages_again(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = unique("lost");
    let (told, batches) = mpsc::channel();
    let (open, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = listener(&app, &name)
        .batch(3, NEVER)
        .spawn_batch(move |_, batch: &mut Batch| {
            told.send(texts(batch)).unwrap();
            gate.recv_timeout(PATIENCE).unwrap();
        })
        .unwrap();
    // While a batch is collected.
    publish_numbers(&app, &name, 2);
    wait_until("two are collected", || node.queue_unacked(&name) == 2);
    node.close_all_connections("for the test");
    wait_until("it is back", || listener.stats().recoveries == 1 && node.queue_unacked(&name) == 2);
    assert!(batches.try_recv().is_err(), "no half batch was handed out");
    app.publish_pool().publish("", &name, "2").unwrap();
    assert_eq!(next(&batches), ["0", "1", "2"]);
    // While one is handled.
    node.close_all_connections("for the test");
    wait_until("they are in the queue", || node.queue_len(&name) == 3);
    // Until it knows, acks go out that reach nobody, and are counted.
    wait_until("the listener knows", || matches!(listener.state(), ListenerState::Recovering { .. }));
    open.send_timeout((), PATIENCE).unwrap();
    assert_eq!(next(&batches), ["0", "1", "2"]);
    open.send_timeout((), PATIENCE).unwrap();
    wait_until("they are acked", || node.queue_len(&name) + node.queue_unacked(&name) == 0);
    wait_until("it is counted", || listener.stats().acked == 3);
    assert_eq!(listener.stats().delivered, 6);
    listener.stop().unwrap();
}

fn the_prefetch_of_the_pool_is_raised_to_the_batch(broker: Broker) {
    let app = broker.app("");
    for (max, wanted) in [(10, 64), (64, 64), (500, 500)] {
        let name = unique("raised");
        let listener = listener(&app, &name).batch(max, NEVER).spawn_batch(|_, _: &mut Batch| ()).unwrap();
        assert_eq!(broker.consumers_of(&name)[0].prefetch, wanted, "{max}");
        listener.stop().unwrap();
    }
}

#[test]
fn batches_that_cannot_be_are_told() {
    let app = Broker::Embedded.app("");
    let second = Duration::from_secs(1);
    for (batches, what) in [
        (app.listener("q").batch(0, second), "batch: max is 0, expected 1 to 65535"),
        (app.listener("q").batch(1, Duration::ZERO), "wait is 0s, expected more than zero and at most 1 minute"),
        (app.listener("q").batch(1, 61 * second), "wait is 1m 1s, expected"),
        (app.listener("q").prefetch(99).batch(100, second), "prefetch: it is 99, expected at least 100"),
    ] {
        let error = batches.spawn_batch(|_, _: &mut Batch| ()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(what), "{error}");
    }
    let batches = app.listener("").prefetch(100).batch(100, second);
    batches.spawn_batch(|_, _: &mut Batch| ()).unwrap().stop().unwrap();
}
