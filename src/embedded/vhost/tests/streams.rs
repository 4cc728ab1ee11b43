//! Streams: which consumer is given which message.

use std::sync::Arc;
use std::time::Duration;

use super::super::VHost;
use super::super::rest::SLICE;
use super::bench::{Client, later, table, vhost};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::Value;

/// More than two slices, and no whole number of them.
const MANY: usize = SLICE * 2 + 7;

fn stream(client: &Client, name: &str, more: &[(&str, Value)]) {
    let arguments = [&[("x-queue-type", Value::text("stream"))], more].concat();
    client.does(QueueDeclare {
        queue: name.into(),
        durable: true,
        no_wait: true,
        arguments: table(&arguments),
        ..Default::default()
    });
}

/// A stream with so many messages, and who has published them.
fn filled(count: usize) -> (Arc<VHost>, Client) {
    let vhost = vhost();
    let client = Client::new(&vhost);
    stream(&client, "s", &[]);
    (0..count).for_each(|number| client.publishes("s", &number.to_string()));
    (vhost, client)
}

fn reads(client: &Client, tag: &str, offset: Value) {
    client.consumes_with("s", tag, false, &[("x-stream-offset", offset)]);
}

/// What the consumers of this tag were given.
fn bodies(client: &Client, tag: &str) -> Vec<usize> {
    let of_tag = client.reads().into_iter().filter_map(|(method, _, body)| match method {
        Method::BasicDeliver(deliver) if deliver.consumer_tag == tag => Some(body.parse().unwrap()),
        _ => None,
    });
    of_tag.collect()
}

#[test]
fn everybody_reads_from_where_it_likes_and_goes_on_with_what_comes() {
    let (vhost, publisher) = filled(3);
    let client = Client::new(&vhost);
    client.limits(100, false);
    reads(&client, "first", Value::text("first"));
    reads(&client, "second", Value::I8(1));
    client.consumes("s", "next");
    reads(&client, "later", Value::I64(4));
    let lines = client.hears();
    assert_eq!(lines[..3], ["deliver first 1 0", "deliver first 2 1", "deliver first 3 2"]);
    assert_eq!(lines[3..], ["deliver second 4 1", "deliver second 5 2"]);
    (3..6).for_each(|number| publisher.publishes("s", &number.to_string()));
    let mut lines: Vec<String> = client.hears();
    lines.iter_mut().for_each(|line| *line = line.split(' ').nth(1).unwrap().to_owned());
    lines.sort();
    let of = |tag: &str| lines.iter().filter(|line| *line == tag).count();
    assert_eq!([of("first"), of("second"), of("next"), of("later")], [3, 3, 3, 2]);
    assert_eq!(vhost.queue("s").unwrap().ready, 6, "they are all there still");
}

#[test]
fn long_streams_and_many_consumers_are_served_to_the_last() {
    let (vhost, publisher) = filled(MANY);
    let all: Vec<usize> = (0..MANY).collect();
    let client = Client::new(&vhost);
    client.limits(u16::MAX, false);
    reads(&client, "c", Value::text("first"));
    assert_eq!(bodies(&client, "c"), all);
    let many = Client::new(&vhost);
    many.limits(1, false);
    (0..MANY).for_each(|number| reads(&many, &format!("c{number}"), Value::text("next")));
    publisher.publishes("s", "new");
    assert_eq!(many.hears().len(), MANY);
    // One more for each of those that ack.
    publisher.publishes("s", "newer");
    assert!(many.hears().is_empty());
    many.acks(MANY as u64, true);
    assert_eq!(many.hears().len(), MANY);
}

#[test]
fn an_ack_makes_room_for_one_more() {
    let (vhost, _publisher) = filled(9);
    let client = Client::new(&vhost);
    client.limits(2, false);
    reads(&client, "c", Value::text("first"));
    assert_eq!(bodies(&client, "c"), [0, 1]);
    client.acks(2, false);
    assert_eq!(bodies(&client, "c"), [2]);
    // A rejection is as good.
    client.nacks(1, true);
    assert_eq!(bodies(&client, "c"), [3]);
    client.does(BasicRecover { requeue: true });
    assert_eq!(bodies(&client, "c"), [4, 5]);
    assert_eq!(vhost.queue("s").unwrap().unacked, 2);
    client.does(BasicCancel { consumer_tag: "c".into(), no_wait: true });
    client.acks(0, true);
    assert_eq!((client.hears().len(), vhost.queue("s").unwrap().unacked), (0, 0));
}

#[test]
fn what_a_filter_passes_over_is_passed_over_to_the_last() {
    let (vhost, publisher) = filled(MANY);
    let wanted =
        Properties { headers: Some(table(&[("x-stream-filter-value", Value::text("blue"))])), ..Properties::default() };
    let publishes = || publisher.publishes_with("", "s", "7", &wanted).unwrap();
    publishes();
    let client = Client::new(&vhost);
    client.limits(1, false);
    let filter = [("x-stream-filter", Value::text("blue")), ("x-stream-offset", Value::text("first"))];
    client.consumes_with("s", "c", false, &filter);
    assert_eq!(bodies(&client, "c"), [7]);
    client.acks(1, false);
    publisher.publishes("s", "8");
    assert!(bodies(&client, "c").is_empty());
    publishes();
    assert_eq!(bodies(&client, "c"), [7]);
}

#[test]
fn a_stream_that_is_delivered_slowly_is_delivered() {
    let (vhost, _publisher) = filled(3);
    vhost.deliver_slowly("s", Some(Duration::from_secs(60)));
    let client = Client::new(&vhost);
    client.limits(10, false);
    reads(&client, "c", Value::text("first"));
    assert_eq!(bodies(&client, "c"), [0]);
    vhost.deliver_slowly("s", None);
    later(&vhost, Duration::from_secs(61));
    assert_eq!(bodies(&client, "c"), [1, 2]);
}

#[test]
fn its_end_cancels_its_consumers_and_a_restart_leaves_its_messages() {
    let (vhost, publisher) = filled(3);
    vhost.restart();
    let client = Client::new(&vhost);
    client.limits(2, false);
    reads(&client, "c", Value::text("first"));
    assert_eq!(bodies(&client, "c"), [0, 1], "they are transient, and kept");
    drop(publisher);
    client.does(QueueDelete { queue: "s".into(), if_unused: true, if_empty: true, ..Default::default() });
    assert_eq!(client.hears(), ["deleted 0", "cancel c"]);
    client.acks(0, true);
    assert!(client.hears().is_empty());
}

#[test]
fn old_segments_go_while_somebody_reads() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    let short = [("x-max-length-bytes", Value::I32(2000)), ("x-stream-max-segment-size-bytes", Value::I32(1000))];
    stream(&client, "s", &short);
    client.publishes("s", "0");
    let reader = Client::new(&vhost);
    reader.limits(1, false);
    reads(&reader, "c", Value::text("first"));
    assert_eq!(bodies(&reader, "c"), [0]);
    (1..MANY).for_each(|number| client.publishes("s", &number.to_string()));
    let left = vhost.queue("s").unwrap().ready;
    assert!(left < 50, "{left}");
    reader.acks(1, false);
    assert_eq!(bodies(&reader, "c"), [MANY - left], "it goes on with the first that is there");
    assert_eq!(vhost.messages("s").unwrap().len(), left);
}
