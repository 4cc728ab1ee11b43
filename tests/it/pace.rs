//! How fast a listener works: more threads while there is more to do, and no more messages than are wanted.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coney::{App, Batch, Concurrency, Error, Listener, ListenerBuilder, Outcome, Queue, Topology};
use crossbeam_channel::Sender;

use crate::contract;
use crate::listener::publish_numbers;
use crate::support::{Broker, PATIENCE, queue, unique, wait_until};

contract! {
    it_grows_while_all_are_busy_and_shrinks_when_they_are_not,
    messages_sent_ahead_to_a_thread_that_is_given_up_are_handled_by_it,
    a_thread_that_settles_later_is_given_up_when_all_is_settled,
    idle_threads_are_not_added_to,
    a_stop_and_a_lost_connection_end_all_threads_there_are,
    settings_say_how_listeners_are_paced,
    what_is_out_of_range_is_an_error_that_names_it,
    messages_are_handled_at_even_distances_by_all_threads_together,
    a_batch_takes_the_time_of_its_messages,
    a_stop_waits_for_no_rate,
}

const SOON: Duration = Duration::from_millis(100);

/// A listener on a queue of its own, and the name of both.
pub fn listener(app: &App, what: &str) -> (ListenerBuilder, String) {
    let name = unique(what);
    (app.listener(&name).topology(Topology::new().queue(Queue::new(&name))), name)
}

/// A handler that waits to be let go on. Tells when it begins, with what.
fn held() -> (Sender<()>, Receiver<String>, impl Fn(&coney::Context<'_>, &coney::Delivery<'_>) + Send + Sync) {
    let (release, gate) = crossbeam_channel::unbounded::<()>();
    let (begun, begins) = mpsc::channel();
    let handler = move |_: &coney::Context<'_>, delivery: &coney::Delivery<'_>| {
        begun.send(delivery.message().text().unwrap().to_owned()).unwrap();
        let _ = gate.recv_timeout(PATIENCE);
    };
    (release, begins, handler)
}

fn workers(listener: &Listener) -> usize {
    listener.stats().workers
}

fn it_grows_while_all_are_busy_and_shrinks_when_they_are_not(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "growing");
    let (release, begins, handler) = held();
    let range = Concurrency::from(1..=3).with_shrink_after(SOON);
    let listener = builder.concurrency(range).prefetch(1).spawn(handler).unwrap();
    assert_eq!((workers(&listener), broker.consumers_of(&name).len()), (1, 1));
    publish_numbers(&app, &name, 10);
    // All three are in their handlers at the same time.
    for _ in 0..3 {
        begins.recv_timeout(PATIENCE).unwrap();
    }
    wait_until("all three count", || workers(&listener) == 3);
    assert_eq!(app.health().listeners[0].workers, 3);
    assert_eq!(broker.consumers_of(&name).len(), 3);
    drop(release);
    wait_until("there is one again", || workers(&listener) == 1);
    wait_until("the broker has seen them go", || broker.consumers_of(&name).len() == 1);
    wait_until("all are acked", || listener.stats().acked == 10);
    assert_eq!((listener.stats().delivered, listener.stats().recoveries), (10, 0));
    listener.stop().unwrap();
}

fn messages_sent_ahead_to_a_thread_that_is_given_up_are_handled_by_it(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "given-up");
    let redelivered = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&redelivered);
    let range = Concurrency::from(1..=4).with_shrink_after(Duration::ZERO);
    let listener = builder
        .concurrency(range)
        .prefetch(2)
        .spawn(move |_, delivery| {
            if delivery.redelivered() {
                *seen.lock().unwrap() += 1;
            }
            // Enough to be busy, and not to be busy for long.
            let _ = crossbeam_channel::never::<()>().recv_timeout(Duration::from_millis(2));
        })
        .unwrap();
    // Waves with nothing between them: threads come and go all the time.
    let mut most = 0;
    for wave in 1..=4 {
        publish_numbers(&app, &name, 500);
        wait_until("the wave is acked", || {
            most = most.max(workers(&listener));
            listener.stats().acked == wave * 500
        });
        wait_until("the threads have gone", || workers(&listener) == 1);
    }
    assert!(most > 1, "it has not grown");
    assert_eq!((listener.stats().delivered, *redelivered.lock().unwrap()), (2000, 0));
    assert_eq!(listener.stats().recoveries, 0);
    listener.stop().unwrap();
}

fn a_thread_that_settles_later_is_given_up_when_all_is_settled(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "later");
    let (work, todo) = mpsc::channel();
    let (release, gate) = crossbeam_channel::unbounded::<()>();
    let range = Concurrency::from(1..=2).with_shrink_after(SOON);
    let listener = builder
        .concurrency(range)
        .prefetch(1)
        .spawn_manual(move |_, unsettled| {
            let _ = gate.recv_timeout(PATIENCE);
            work.send(unsettled).unwrap();
        })
        .unwrap();
    publish_numbers(&app, &name, 2);
    wait_until("there are two", || workers(&listener) == 2);
    drop(release);
    let held: Vec<_> = (0..2).map(|_| todo.recv_timeout(PATIENCE).unwrap()).collect();
    wait_until("one takes no more", || broker.consumers_of(&name).len() == 1);
    assert_eq!((workers(&listener), broker.queue_unacked(&name)), (2, 2));
    for unsettled in held {
        unsettled.ack().unwrap();
    }
    wait_until("it has ended", || workers(&listener) == 1);
    wait_until("both are acked", || listener.stats().acked == 2);
    listener.stop().unwrap();
}

fn idle_threads_are_not_added_to(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "idle");
    let (seen, got) = mpsc::channel();
    let listener =
        builder.concurrency(1..=8).prefetch(1).spawn(move |_, _| seen.send(Instant::now()).unwrap()).unwrap();
    // For longer than it takes to look a few times.
    let until = Instant::now() + Duration::from_secs(1);
    let mut sent = 0;
    while Instant::now() < until {
        publish_numbers(&app, &name, 1);
        sent += 1;
        got.recv_timeout(PATIENCE).unwrap();
        got.recv_timeout(Duration::from_millis(20)).unwrap_err();
    }
    assert!(sent > 1);
    assert_eq!((workers(&listener), broker.consumers_of(&name).len()), (1, 1));
    listener.stop().unwrap();
}

fn a_stop_and_a_lost_connection_end_all_threads_there_are(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "ending");
    let (release, begins, handler) = held();
    let listener = builder.concurrency(1..=2).prefetch(1).spawn(handler).unwrap();
    publish_numbers(&app, &name, 4);
    for _ in 0..2 {
        begins.recv_timeout(PATIENCE).unwrap();
    }
    wait_until("both count", || workers(&listener) == 2);
    app.publish_pool().connection().unwrap().queue_delete(&name).unwrap();
    drop(release);
    wait_until("it is back", || listener.stats().recoveries == 1 && workers(&listener) == 1);
    assert_eq!(broker.consumers_of(&name).len(), 1);
    listener.stop().unwrap();
    assert!(broker.consumers_of(&name).is_empty());
}

fn settings_say_how_listeners_are_paced(broker: Broker) {
    let app = broker.app("[pools.listen]\nconcurrency = \"2-3\"\nmax_rate = 0.5\nprefetch = 30");
    let (builder, name) = listener(&app, "configured");
    let (seen, got) = mpsc::channel();
    let listener = builder.spawn(move |_, _| seen.send(Instant::now()).unwrap()).unwrap();
    let prefetches: Vec<usize> = broker.consumers_of(&name).iter().map(|consumer| consumer.prefetch).collect();
    assert_eq!(prefetches, [8, 8], "two threads, each with what is reasonable for a range");
    publish_numbers(&app, &name, 2);
    let [first, second] = [(); 2].map(|()| got.recv_timeout(PATIENCE).unwrap());
    assert!(second - first >= Duration::from_millis(1980), "{:?}", second - first);
    listener.stop().unwrap();
}

fn what_is_out_of_range_is_an_error_that_names_it(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "wrong");
    let minute = Duration::from_secs(60);
    let builders: BTreeMap<&str, ListenerBuilder> = BTreeMap::from([
        ("concurrency: it is 8-2, expected", app.listener(&name).concurrency(RangeInclusive::new(8, 2))),
        ("max_rate: expected messages per second", app.listener(&name).max_rate(0)),
        ("max_rate: expected messages per second, from 1 a day", app.listener(&name).max_rate(f64::NAN)),
        ("pause_on_failures, ratio: expected", app.listener(&name).pause_on_failures(1, 1.5, minute, minute)),
        ("pause_on_failures, min: expected", app.listener(&name).pause_on_failures(0, 0.5, minute, minute)),
        ("pause_on_failures, pause: expected", app.listener(&name).pause_on_failures(1, 0.5, minute, Duration::ZERO)),
    ]);
    for (expected, builder) in builders {
        let error = builder.spawn(|_, _| {}).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { .. }) && error.to_string().contains(expected), "{error}");
    }
    let manual = app.listener(&name).pause_on_failures(1, 0.5, minute, minute).spawn_manual(|_, _| {});
    assert!(manual.unwrap_err().to_string().contains("spawn_manual"));
    assert!(broker.consumers_of(&name).is_empty());
}

fn messages_are_handled_at_even_distances_by_all_threads_together(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "rate");
    let (seen, got) = mpsc::channel();
    let listener = builder.concurrency(2).max_rate(50).spawn(move |_, _| seen.send(Instant::now()).unwrap()).unwrap();
    publish_numbers(&app, &name, 40);
    let mut times: Vec<Instant> = (0..40).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect();
    times.sort();
    for (at, first) in times.iter().enumerate() {
        for (count, last) in (0_u32..).zip(&times[at..]) {
            // What was late may be made up for, by 10 ms; the handler's own clock is a little later than the listener's.
            let least = (Duration::from_millis(20) * count).saturating_sub(Duration::from_millis(15));
            let took = *last - *first;
            assert!(took + SLOW_HANDLER >= least, "{count} messages in {took:?}");
        }
    }
    wait_until("all are acked", || listener.stats().acked == 40);
    listener.stop().unwrap();
}

/// How long a thread may be kept from running between its turn and its handler.
const SLOW_HANDLER: Duration = Duration::from_millis(300);

fn a_batch_takes_the_time_of_its_messages(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "rate-of-batches");
    let (seen, got) = mpsc::channel();
    let listener = builder
        .max_rate(20)
        .batch(10, PATIENCE)
        .spawn_batch(move |_, batch: &mut Batch| seen.send((batch.len(), Instant::now())).unwrap())
        .unwrap();
    publish_numbers(&app, &name, 30);
    let batches: Vec<(usize, Instant)> = (0..3).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect();
    assert!(batches.iter().all(|(len, _)| *len == 10), "{batches:?}");
    assert!(batches[2].1 - batches[0].1 >= Duration::from_millis(985) - SLOW_HANDLER, "{batches:?}");
    listener.stop().unwrap();
}

fn a_stop_waits_for_no_rate(broker: Broker) {
    let app = broker.app("");
    let (builder, name) = listener(&app, "slow-rate");
    let (seen, got) = mpsc::channel();
    let listener = builder
        .max_rate(1.0 / 3600.0)
        .spawn(move |_, _| {
            seen.send(()).unwrap();
            Outcome::Ack
        })
        .unwrap();
    publish_numbers(&app, &name, 5);
    got.recv_timeout(PATIENCE).unwrap();
    wait_until("its ack has gone out", || broker.queue_unacked(&name) == 4);
    listener.stop().unwrap();
    wait_until("the rest is back", || broker.queue_len(&name) == 4);
    assert!(got.try_recv().is_err());
}
