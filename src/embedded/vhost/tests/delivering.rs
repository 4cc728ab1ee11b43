//! Who gets what, in which order.

use std::time::Duration;

use super::bench::{Client, vhost};
use crate::amqp::method::{BasicCancel, BasicGet, QueueDelete};
use crate::amqp::value::Value;

#[test]
fn round_robin_among_equals() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.consumes("q", "a");
    client.consumes("q", "b");
    "12345".chars().for_each(|body| client.publishes("q", &body.to_string()));
    assert_eq!(client.hears(), ["deliver a 1 1", "deliver b 2 2", "deliver a 3 3", "deliver b 4 4", "deliver a 5 5"]);
}

#[test]
fn higher_priority_first_until_it_is_full() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.consumes("q", "low");
    client.limits(1, false);
    client.consumes_with("q", "high", false, &[("x-priority", Value::I8(3))]);
    "123".chars().for_each(|body| client.publishes("q", &body.to_string()));
    assert_eq!(client.hears(), ["deliver high 1 1", "deliver low 2 2", "deliver low 3 3"]);
    client.acks(1, false);
    client.publishes("q", "4");
    assert_eq!(client.hears(), ["deliver high 4 4"]);
}

#[test]
fn prefetch_of_each_consumer_and_of_the_channel() {
    for global in [false, true] {
        let vhost = vhost();
        let client = Client::new(&vhost);
        client.declares("q", &[]);
        client.limits(2, global);
        client.consumes("q", "a");
        client.consumes("q", "b");
        (0..6).for_each(|_| client.publishes("q", ""));
        assert_eq!(client.hears().len(), if global { 2 } else { 4 });
        client.acks(2, true);
        assert_eq!(client.hears().len(), 2);
        client.does(BasicGet { queue: "q".into(), ..Default::default() });
        assert_eq!(client.hears(), [if global { "got 5 " } else { "BasicGetEmpty" }]);
    }
}

#[test]
fn a_cancelled_consumer_gets_nothing_more_and_keeps_what_it_has() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.consumes("q", "a");
    client.publishes("q", "1");
    client.does(BasicCancel { consumer_tag: "a".into(), no_wait: false });
    client.publishes("q", "2");
    assert_eq!(client.hears(), ["deliver a 1 1", "BasicCancelOk"]);
    let facts = vhost.queue("q").unwrap();
    assert_eq!((facts.ready, facts.unacked, facts.consumers), (1, 1, 0));
    client.acks(1, false);
    assert_eq!(vhost.queue("q").unwrap().unacked, 0);
}

#[test]
fn the_single_active_consumer_hands_on() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[("x-single-active-consumer", Value::Bool(true))]);
    client.limits(1, false);
    client.consumes("q", "a");
    client.consumes("q", "b");
    "123".chars().for_each(|body| client.publishes("q", &body.to_string()));
    assert_eq!(client.hears(), ["deliver a 1 1"]);
    client.acks(1, false);
    assert_eq!(client.hears(), ["deliver a 2 2"]);
    client.does(BasicCancel { consumer_tag: "a".into(), no_wait: true });
    assert_eq!(client.hears(), ["deliver b 3 3"]);
}

#[test]
fn a_deleted_queue_cancels_its_consumers() {
    let vhost = vhost();
    let (client, other) = (Client::new(&vhost), Client::new(&vhost));
    client.declares("q", &[]);
    other.consumes("q", "c");
    client.publishes("q", "1");
    client.publishes("q", "2");
    client.does(QueueDelete { queue: "q".into(), ..Default::default() });
    assert_eq!(client.hears(), ["deleted 0"]);
    assert_eq!(other.hears(), ["deliver c 1 1", "deliver c 2 2", "cancel c"]);
    other.acks(2, true);
    assert!(vhost.queue("q").is_none());
}

#[test]
fn a_connection_without_room_is_passed_over_until_it_has() {
    let vhost = vhost();
    let (client, other) = (Client::new(&vhost), Client::new(&vhost));
    client.declares("q", &[]);
    client.consumes("q", "slow");
    let body = "x".repeat(5 << 20);
    client.publishes("q", &body);
    client.publishes("q", "1");
    other.consumes("q", "quick");
    client.publishes("q", "2");
    assert_eq!(other.hears(), ["deliver quick 1 1", "deliver quick 2 2"]);
    other.does(BasicCancel { consumer_tag: "quick".into(), no_wait: true });
    client.publishes("q", "3");
    assert_eq!(client.hears().len(), 1);
    vhost.room_again(client.outbox.id());
    assert_eq!(client.hears(), ["deliver slow 2 3"]);
}

#[test]
fn slowly_is_one_at_a_time() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    "123".chars().for_each(|body| client.publishes("q", &body.to_string()));
    assert!(vhost.deliver_slowly("q", Some(Duration::from_secs(3600))));
    client.consumes("q", "c");
    assert_eq!(client.hears(), ["deliver c 1 1"]);
    vhost.deliver_slowly("q", None);
    assert_eq!(client.hears(), ["deliver c 2 2", "deliver c 3 3"]);
}

#[test]
fn server_sent_cancel() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.consumes("q", "a");
    client.consumes("q", "b");
    assert_eq!(vhost.cancel_consumers("q"), 2);
    client.publishes("q", "1");
    assert_eq!(client.hears(), ["cancel a", "cancel b"]);
    client.consumes("q", "a");
    assert_eq!(client.hears(), ["deliver a 1 1"]);
}
