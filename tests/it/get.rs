//! Getting messages one by one, and settling them.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{Error, Queue};

use crate::contract;
use crate::support::{Broker, PATIENCE, app, bodies, drain, queue, unique, wait_until};

contract! {
    ack_reject_and_requeue_do_what_they_say,
    dropped_unsettled_goes_back_once_and_is_dead_lettered_the_second_time,
    a_forgotten_delivery_is_requeued_when_the_guard_goes_back,
    a_delivery_is_stale_once_its_channel_is_gone_and_never_acks_another,
    refusals_carry_the_code_and_leave_other_work_alone,
    get_timeout_waits_for_a_message_and_not_longer_than_told,
    get_timeout_ends_when_the_queue_is_deleted,
    get_and_ack_async_calls_back_once_for_each_request,
}

fn ack_reject_and_requeue_do_what_they_say(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let dead = queue(&connection, "dead");
    let name = unique("settled");
    connection
        .queue_declare(&Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(dead.clone()))
        .unwrap();
    for body in ["ack", "reject", "requeue"] {
        connection.publish("", &name, body).unwrap();
    }
    assert_eq!(connection.get(&name).unwrap().unwrap().ack().unwrap().body(), b"ack");
    connection.get(&name).unwrap().unwrap().reject().unwrap();
    connection.get(&name).unwrap().unwrap().requeue().unwrap();
    let again = connection.get(&name).unwrap().unwrap();
    assert_eq!((again.body(), again.redelivered()), (b"requeue".as_slice(), true));
    again.ack().unwrap();
    let rejected = connection.get_timeout(&dead, PATIENCE).unwrap().expect("dead-lettered").ack().unwrap();
    assert_eq!(rejected.body(), b"reject");
    assert!(rejected.message().headers().contains_key("x-death"));
    // Acks have no answer; a round trip on the same channel comes after them.
    assert!(connection.get(&name).unwrap().is_none());
    assert_eq!(broker.queue_len(&name), 0);
}

fn dropped_unsettled_goes_back_once_and_is_dead_lettered_the_second_time(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let dead = queue(&connection, "dead");
    let name = unique("dropped");
    connection
        .queue_declare(&Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(dead.clone()))
        .unwrap();
    connection.publish("", &name, "hot").unwrap();
    drop(connection.get(&name).unwrap().expect("a message"));
    let second = connection.get(&name).unwrap().expect("it is back");
    assert!(second.redelivered());
    drop(second);
    assert!(connection.get(&name).unwrap().is_none(), "it does not go round for ever");
    assert_eq!(connection.get_timeout(&dead, PATIENCE).unwrap().expect("dead-lettered").body(), b"hot");
}

fn a_forgotten_delivery_is_requeued_when_the_guard_goes_back(broker: Broker) {
    let app = broker.app("[pools.listen]\nsize = 1");
    let connection = app.listen_pool().connection().unwrap();
    let queue = queue(&connection, "forgotten");
    connection.publish("", &queue, "x").unwrap();
    std::mem::forget(connection.get(&queue).unwrap());
    drop(connection);
    let connection = app.listen_pool().connection().unwrap();
    assert_eq!(connection.get_timeout(&queue, PATIENCE).unwrap().expect("requeued").body(), b"x");
    drop(connection);
    assert_eq!(app.listen_pool().status().created, 1);
}

fn a_delivery_is_stale_once_its_channel_is_gone_and_never_acks_another(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let queue = queue(&connection, "stale");
    connection.publish("", &queue, "first").unwrap();
    connection.publish("", &queue, "second").unwrap();
    let first = connection.get(&queue).unwrap().expect("first");
    // The refusal closes the channel that `first` came on.
    assert_eq!(connection.get(&unique("missing")).map(drop).unwrap_err().code(), Some(404));
    let second = connection.get_timeout(&queue, PATIENCE).unwrap().expect("a message on the new channel");
    assert!(matches!(first.ack(), Err(Error::StaleDelivery)));
    second.requeue().unwrap(); // so both are still there
    let mut left = bodies(&drain(&connection, &queue));
    left.sort();
    assert_eq!(left, ["first", "second"]);
}

fn refusals_carry_the_code_and_leave_other_work_alone(broker: Broker) {
    let app = broker.app("[pools.other]\nsize = 1");
    let owner = app.listen_pool().connection().unwrap();
    let kept = queue(&owner, "kept");
    let exclusive = unique("exclusive");
    owner.queue_declare(&Queue::new(&exclusive).durable(false).exclusive(true)).unwrap();

    let other = app.pool("other").unwrap().connection().unwrap();
    other.publish("", &kept, "in hand").unwrap();
    let in_hand = other.get(&kept).unwrap().expect("a message");
    // Declarations and publishes run on channels of their own.
    assert_eq!(other.queue_declare_passive(&exclusive).unwrap_err().code(), Some(405));
    assert_eq!(other.publish("missing", "k", "x").unwrap_err().code(), Some(404));
    in_hand.ack().unwrap();
    let error = other.get(&exclusive).map(drop).unwrap_err();
    assert_eq!(error.code(), Some(405), "{error}");
    assert!(error.is_transient() && error.to_string().contains(&exclusive), "{error}");
    assert!(other.get(&kept).unwrap().is_none());
}

fn get_timeout_waits_for_a_message_and_not_longer_than_told(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let queue = queue(&connection, "awaited");

    let start = Instant::now();
    assert!(connection.get_timeout(&queue, Duration::from_millis(200)).unwrap().is_none());
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(broker.consumers_of(&queue).len(), 0);

    thread::scope(|scope| {
        let (waiting, wait) = mpsc::channel();
        let (name, publisher) = (&queue, app.publish_pool());
        scope.spawn(move || {
            wait.recv().unwrap();
            wait_until("a consumer", || !broker.consumers_of(name).is_empty());
            publisher.connection().unwrap().publish("", name, "there").unwrap();
        });
        waiting.send(()).unwrap();
        let delivery = connection.get_timeout(&queue, PATIENCE).unwrap().expect("a message");
        assert_eq!((delivery.body(), delivery.remaining()), (b"there".as_slice(), None));
        delivery.ack().unwrap();
    });
    // The consumer is gone, so this waits in the queue.
    connection.publish("", &queue, "later").unwrap();
    assert_eq!(broker.queue_len(&queue), 1);
    assert_eq!(connection.get_timeout(&queue, Duration::ZERO).unwrap().expect("at once").body(), b"later");
}

fn get_timeout_ends_when_the_queue_is_deleted(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let queue = queue(&connection, "deleted");
    thread::scope(|scope| {
        let (name, other) = (&queue, app.publish_pool());
        scope.spawn(move || {
            wait_until("a consumer", || !broker.consumers_of(name).is_empty());
            other.connection().unwrap().queue_delete(name).unwrap();
        });
        match connection.get_timeout(&queue, PATIENCE).map(drop).unwrap_err() {
            Error::ConsumerCancelled { queue: named } => assert_eq!(named, queue),
            other => panic!("unexpected: {other}"),
        }
    });
    assert_eq!(connection.get(&queue).map(drop).unwrap_err().code(), Some(404));
}

fn get_and_ack_async_calls_back_once_for_each_request(broker: Broker) {
    let app = broker.app("");
    let connection = app.listen_pool().connection().unwrap();
    let queue = queue(&connection, "async");
    connection.publish_batch((0..50).map(|n| ("", &queue, n.to_string()))).unwrap();
    let (results, got) = mpsc::channel();
    let missing = unique("missing");
    for n in 0..60 {
        let results = results.clone();
        // A refusal in between costs the requests around it nothing.
        let from = if n % 6 == 5 { &missing } else { &queue };
        connection.get_and_ack_async(from, move |result| results.send((n, result)).unwrap());
    }
    connection.get_and_ack_async(&queue, |_| panic!("caught"));
    let extra = results.clone();
    connection.get_and_ack_async(&queue, move |result| extra.send((60, result)).unwrap());
    drop(results);
    drop(connection); // waits for the callbacks
    let got: Vec<_> = got.try_iter().collect();
    assert_eq!(got.len(), 61);
    let mut expected = 0;
    for (n, result) in got {
        match result {
            Err(error) => assert!(n % 6 == 5 && error.code() == Some(404), "{n}: {error}"),
            Ok(Some(received)) => {
                assert_eq!(received.body(), expected.to_string().as_bytes());
                expected += 1;
            }
            Ok(None) => assert_eq!((n, expected), (60, 50)),
        }
    }
    assert_eq!(broker.queue_len(&queue), 0);
    assert_eq!(broker.queue_unacked(&queue), 0);
}

/// amiquip gives out the number of a channel again that the broker has closed.
#[test]
fn a_late_ack_settles_nothing_on_a_later_channel_of_the_same_number() {
    let builder = EmbeddedBroker::builder().channel_max(1).consumer_timeout(Duration::from_secs(1));
    let broker = builder.start().unwrap();
    let app = app(&broker.url(), "[pools.get]");
    let name = queue(&app.listen_pool().connection().unwrap(), "late");
    app.publish_pool().publish("", &name, "first").unwrap();
    let connection = app.pool("get").unwrap().connection().unwrap();
    let delivery = connection.get(&name).unwrap().expect("a message");
    wait_until("the broker has it back", || broker.control().queue_len(&name) == 1);
    // The broker lets a connection have one channel only, so this one has the number of the one that it has closed.
    // It says so before the client has read that its channel is free again.
    wait_until("the channel is free", || match connection.publish("", &name, "second") {
        Err(Error::ChannelsExhausted { .. }) => false,
        published => {
            published.unwrap();
            true
        }
    });
    let error = delivery.ack().unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 406, .. } | Error::StaleDelivery), "{error}");
    connection.publish("", &name, "third").unwrap();
    assert_eq!(broker.control().queue_len(&name), 3);
}
