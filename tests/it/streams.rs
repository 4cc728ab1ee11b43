//! Streams: read from where one likes, by any number of listeners, and gone on with behind what was handled.

use std::io;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use coney::{
    App, Batch, Error, Listener, ListenerBuilder, ListenerState, Offset, OffsetFile, OffsetStore, Outcome, Queue,
    RetryPolicy, Topology,
};

use crate::contract;
use crate::listener::publish_numbers;
use crate::support::{Broker, PATIENCE, unique, wait_until};

contract! {
    it_is_read_from_the_first_offset_as_often_as_one_likes,
    it_is_read_from_wherever_one_likes,
    after_a_lost_consumer_it_goes_on_behind_what_was_handled,
    a_stored_offset_counts_for_the_next_start,
    a_store_that_does_not_answer_is_an_error_and_is_asked_again,
    what_fails_is_passed_over,
    what_failed_when_it_paused_comes_again,
    batches_and_later_settling_keep_the_offset_of_what_was_handled,
    old_messages_are_dropped_by_length,
    what_does_not_go_with_a_stream_is_an_error,
    arguments_of_a_consumer_are_passed_on,
}

type Seen = Receiver<(u64, String)>;

fn declare(app: &App, what: &str) -> String {
    let name = unique(what);
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&name).stream()).unwrap();
    name
}

/// What is to be given back at the end: a stream that nobody deletes is kept for ever.
fn delete(app: &App, name: &str) {
    app.publish_pool().connection().unwrap().queue_delete(name).unwrap();
}

/// A listener that tells what it reads, with the offsets.
fn read(builder: ListenerBuilder) -> (Listener, Seen) {
    let (seen, got) = mpsc::channel();
    let listener = builder.spawn(move |_, delivery| {
        seen.send((delivery.stream_offset().unwrap(), delivery.message().text().unwrap().to_owned())).unwrap();
    });
    (listener.unwrap(), got)
}

fn next(got: &Seen) -> (u64, String) {
    got.recv_timeout(PATIENCE).unwrap()
}

/// Messages with the numbers that [`publish_numbers`] has given them, in the order in which they are in the stream.
fn expect(got: &Seen, numbers: std::ops::Range<u64>) {
    for number in numbers {
        assert_eq!(next(got), (number, number.to_string()));
    }
}

fn it_is_read_from_the_first_offset_as_often_as_one_likes(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "replay");
    publish_numbers(&app, &name, 300);
    let readers = [(); 2].map(|()| read(app.listener(&name).offset(Offset::First)));
    for (listener, got) in readers {
        expect(&got, 0..300);
        wait_until("all are acked", || listener.stats().acked == 300);
        listener.stop().unwrap();
    }
    delete(&app, &name);
}

fn it_is_read_from_wherever_one_likes(broker: Broker) {
    let app = broker.app("[pools.listen]\nsize = 5");
    let name = declare(&app, "offsets");
    publish_numbers(&app, &name, 10);
    let reader = |offset| read(app.listener(&name).offset(offset));
    let (_next, from_next) = reader(Offset::Next);
    let (_at, from_seven) = reader(Offset::At(7));
    let (_last, from_last) = reader(Offset::Last);
    let hour = Duration::from_secs(3600);
    let (_since, from_an_hour_ago) = reader(Offset::Since(SystemTime::now() - hour));
    let (_interval, of_the_last_hour) = reader(Offset::Interval("1h".to_owned()));
    expect(&from_seven, 7..10);
    expect(&from_an_hour_ago, 0..10);
    expect(&of_the_last_hour, 0..10);
    // The last chunk is what the broker has written in one go.
    while next(&from_last).0 < 9 {}
    app.publish_pool().publish("", &name, "10").unwrap();
    expect(&from_next, 10..11);
    expect(&from_seven, 10..11);
    app.shutdown(PATIENCE).unwrap();
    delete(&broker.app(""), &name);
}

fn after_a_lost_consumer_it_goes_on_behind_what_was_handled(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let name = declare(&app, "going-on");
    publish_numbers(&app, &name, 100);
    let (listener, got) = read(app.listener(&name).offset(Offset::First));
    expect(&got, 0..100);
    wait_until("all are acked", || listener.stats().acked == 100);
    node.close_all_connections("for the test");
    wait_until("it is back", || listener.stats().recoveries == 1);
    let publisher = app.publish_pool().connection().unwrap();
    publisher.publish("", &name, "100").unwrap();
    expect(&got, 100..101);
    assert_eq!(listener.stats().delivered, 101, "nothing comes twice");
    listener.stop().unwrap();
    drop(publisher);
    delete(&app, &name);
}

fn a_stored_offset_counts_for_the_next_start(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "stored");
    let directory = tempfile::tempdir().unwrap();
    let file = OffsetFile::new(directory.path().join("offset"));
    let builder = app.listener(&name).offset(Offset::First).offset_store(file.clone());
    publish_numbers(&app, &name, 50);
    let (listener, got) = read(builder.clone());
    expect(&got, 0..50);
    wait_until("it is stored", || file.load().unwrap() == Some(49));
    listener.stop().unwrap();
    app.publish_pool().publish("", &name, "50").unwrap();
    let (listener, got) = read(builder);
    expect(&got, 50..51);
    listener.stop().unwrap();
    assert_eq!(file.load().unwrap(), Some(50), "stored when it stops");
    delete(&app, &name);
}

/// A store that fails as long as it is told to.
#[derive(Clone, Default)]
struct Failing(Arc<Mutex<(bool, Option<u64>)>>);

impl OffsetStore for Failing {
    fn load(&self) -> io::Result<Option<u64>> {
        let state = self.0.lock().unwrap();
        if state.0 { Err(io::Error::other("no database")) } else { Ok(state.1) }
    }

    fn store(&self, offset: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if state.0 {
            return Err(io::Error::other("no database"));
        }
        state.1 = Some(offset);
        Ok(())
    }
}

fn a_store_that_does_not_answer_is_an_error_and_is_asked_again(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "no-store");
    let store = Failing::default();
    store.0.lock().unwrap().0 = true;
    let builder = app.listener(&name).offset(Offset::First).offset_store(store.clone());
    let error = builder.clone().spawn(|_, _| {}).unwrap_err();
    assert!(matches!(&error, Error::OffsetStore { .. }) && error.to_string().contains("no database"), "{error}");
    publish_numbers(&app, &name, 3);
    let (listener, got) = read(builder.in_background());
    wait_until("it tries", || matches!(listener.state(), ListenerState::Recovering { .. }));
    *store.0.lock().unwrap() = (false, Some(0));
    expect(&got, 1..3);
    store.0.lock().unwrap().0 = true;
    app.publish_pool().publish("", &name, "3").unwrap();
    expect(&got, 3..4);
    store.0.lock().unwrap().0 = false;
    wait_until("it is stored all the same", || store.0.lock().unwrap().1 == Some(3));
    listener.stop().unwrap();
    delete(&app, &name);
}

fn what_fails_is_passed_over(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"1h\"]");
    let name = declare(&app, "passed-over");
    publish_numbers(&app, &name, 6);
    let (seen, got) = mpsc::channel();
    let listener = app
        .listener(&name)
        .offset(Offset::First)
        .spawn(move |_, delivery| {
            seen.send(delivery.stream_offset().unwrap()).unwrap();
            match delivery.message().text().unwrap() {
                "1" => Outcome::Failed("for the test".to_owned()),
                "2" => Outcome::Requeue,
                "3" => Outcome::Retry,
                "4" => Outcome::Reject,
                _ => Outcome::Ack,
            }
        })
        .unwrap();
    let offsets: Vec<u64> = (0..6).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(offsets, [0, 1, 2, 3, 4, 5]);
    wait_until("all are settled", || listener.stats().acked + listener.stats().rejected == 6);
    let stats = listener.stats();
    assert_eq!((stats.acked, stats.rejected, stats.requeued, stats.retried), (2, 4, 0, 0));
    assert_eq!(stats.recoveries, 0, "the broker has taken no offence");
    listener.stop().unwrap();
    delete(&app, &name);
}

fn what_failed_when_it_paused_comes_again(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "paused");
    publish_numbers(&app, &name, 20);
    let is_away = Arc::new(Mutex::new(true));
    let (seen, got) = mpsc::channel();
    let database = Arc::clone(&is_away);
    let pause = Duration::from_millis(50);
    let listener = app
        .listener(&name)
        .offset(Offset::First)
        .pause_on_failures(1, 1.0, PATIENCE, pause)
        .spawn(move |_, delivery| {
            if *database.lock().unwrap() {
                return Outcome::Failed("no database".to_owned());
            }
            seen.send((delivery.stream_offset().unwrap(), delivery.message().text().unwrap().to_owned())).into()
        })
        .unwrap();
    wait_until("it has tried a few times", || listener.stats().pauses >= 3);
    *is_away.lock().unwrap() = false;
    expect(&got, 0..20);
    wait_until("all are acked", || listener.stats().acked == 20);
    assert_eq!((listener.stats().rejected, listener.stats().recoveries), (0, 0));
    listener.stop().unwrap();
    delete(&app, &name);
}

fn batches_and_later_settling_keep_the_offset_of_what_was_handled(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "batches");
    publish_numbers(&app, &name, 10);
    let store = Failing::default();
    let stored = || store.0.lock().unwrap().1;
    let builder = app.listener(&name).offset(Offset::First).offset_store(store.clone());
    let (seen, got) = mpsc::channel();
    let listener = builder
        .clone()
        .batch(4, Duration::from_millis(50))
        .spawn_batch(move |_, batch: &mut Batch| seen.send(batch.len()).unwrap())
        .unwrap();
    let mut handled = 0;
    while handled < 10 {
        handled += got.recv_timeout(PATIENCE).unwrap();
    }
    wait_until("it is stored", || stored() == Some(9));
    listener.stop().unwrap();
    publish_numbers(&app, &name, 3);
    let (work, todo) = mpsc::channel();
    let listener = builder.spawn_manual(move |_, unsettled| work.send(unsettled).unwrap()).unwrap();
    let mut held: Vec<_> = (0..3).map(|_| todo.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(held[0].stream_offset(), Some(10));
    held.remove(0).ack().unwrap();
    held.remove(1).reject().unwrap();
    wait_until("the one between is what counts", || stored() == Some(10));
    held.remove(0).ack().unwrap();
    wait_until("all are stored", || stored() == Some(12));
    listener.stop().unwrap();
    delete(&app, &name);
}

fn old_messages_are_dropped_by_length(broker: Broker) {
    let app = broker.app("");
    let name = unique("short");
    let queue = Queue::new(&name).stream().max_length_bytes(20_000).max_segment_bytes(5_000);
    app.publish_pool().connection().unwrap().queue_declare(&queue).unwrap();
    let connection = app.publish_pool().connection().unwrap();
    for number in 0..100 {
        connection.publish("", &name, format!("{number:1000}")).unwrap();
    }
    drop(connection);
    // The broker drops whole segments, now and then.
    let mut first: u32 = 0;
    wait_until("the first ones are gone", || {
        let (seen, got) = mpsc::channel();
        let reader = app.listener(&name).offset(Offset::First).spawn(move |_, delivery| {
            // Nobody waits for more than the first.
            let _ = seen.send(delivery.message().text().unwrap().trim().parse().unwrap());
        });
        first = got.recv_timeout(PATIENCE).unwrap();
        reader.unwrap().stop().unwrap();
        first > 0
    });
    assert!(first < 100, "{first}");
    delete(&app, &name);
}

fn what_does_not_go_with_a_stream_is_an_error(broker: Broker) {
    let app = broker.app("");
    let name = declare(&app, "wrong");
    let policy = RetryPolicy::new([Duration::from_secs(1)]).unwrap();
    let stream = || app.listener(&name).offset(Offset::First);
    for (builder, expected) in [
        (stream().concurrency(2), "concurrency: it is 2, expected 1"),
        (stream().concurrency(1..=3), "concurrency: it is 1-3, expected 1"),
        (stream().retry(policy), "is a stream"),
        (app.listener(&name).offset(Offset::Interval("7 days".to_owned())), "the interval is \"7 days\""),
        (app.listener(&name).offset_store(Failing::default()), "offset_store: expected offset beside it"),
        (app.listener(&name).argument("x-stream-offset", "first"), "expected offset"),
        (app.listener(&name).argument("x".repeat(256), 1), "expected at most 255"),
    ] {
        let error = builder.spawn(|_, _| {}).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(expected), "{error}");
    }
    let fails = |queue: Queue| {
        app.publish_pool().connection().unwrap().declare(&Topology::new().queue(queue)).map(drop).unwrap_err()
    };
    let new = || Queue::new(unique("wrong")).stream();
    for queue in [new().durable(false), new().exclusive(true), new().auto_delete(true)] {
        let error = fails(queue);
        assert!(error.code() == Some(406) && error.to_string().contains("invalid property"), "{error}");
    }
    delete(&app, &name);
}

fn arguments_of_a_consumer_are_passed_on(broker: Broker) {
    let app = broker.app("");
    let name = unique("arguments");
    let listener = app.listener(&name).topology(Topology::new().queue(Queue::new(&name)));
    // A classic queue knows no such argument, and says so.
    let error =
        listener.clone().argument("x-stream-offset-of-nobody", 1).argument("x-priority", "high").spawn(|_, _| {});
    assert!(error.unwrap_err().to_string().contains("x-priority"));
    listener.argument("x-priority", 5).spawn(|_, _| {}).unwrap().stop().unwrap();
}
