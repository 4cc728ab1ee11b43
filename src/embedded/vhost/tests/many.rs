//! Of what is done in slices, all is done; and what has gone leaves nothing behind.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::super::VHost;
use super::super::rest::SLICE;
use super::bench::{Client, later, table, vhost};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::Value;

/// More than two slices, and no whole number of them.
const MANY: usize = SLICE * 2 + 7;

fn declares_exchange(client: &Client, name: &str, kind: &str, auto_delete: bool) {
    client.does(ExchangeDeclare {
        exchange: name.into(),
        kind: kind.into(),
        auto_delete,
        no_wait: true,
        ..Default::default()
    });
}

fn binds(client: &Client, queue: &str, exchange: &str, number: usize) {
    client.does(QueueBind {
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: "k".into(),
        no_wait: true,
        arguments: table(&[("number", Value::I64(number as i64))]),
        ..Default::default()
    });
}

fn deletes(client: &Client, queue: &str) {
    client.does(QueueDelete { queue: queue.into(), no_wait: true, ..Default::default() });
}

fn numbers(vhost: &VHost, queue: &str) -> Vec<usize> {
    let messages = vhost.messages(queue).unwrap();
    messages.iter().map(|message| String::from_utf8_lossy(&message.body).parse().unwrap()).collect()
}

fn in_order() -> Vec<usize> {
    (0..MANY).collect()
}

/// A queue with its dead letters, and a consumer that has taken all that was in it.
fn taken(vhost: &Arc<VHost>) -> Client {
    let client = Client::new(vhost);
    let dead = [("x-dead-letter-exchange", Value::text("")), ("x-dead-letter-routing-key", Value::text("dead"))];
    client.declares("q", &dead);
    client.declares("dead", &[]);
    in_order().iter().for_each(|number| client.publishes("q", &number.to_string()));
    client.consumes("q", "c");
    assert_eq!(client.hears().len(), MANY);
    client
}

#[test]
fn what_is_settled_at_once() {
    for (requeue, from, to) in [(true, "q", "dead"), (false, "dead", "q")] {
        let vhost = vhost();
        let client = taken(&vhost);
        client.does(BasicCancel { consumer_tag: "c".into(), no_wait: true });
        client.does(BasicNack { delivery_tag: MANY as u64, multiple: true, requeue });
        assert_eq!(numbers(&vhost, from), in_order());
        assert!(numbers(&vhost, to).is_empty());
        assert_eq!(vhost.queue("q").unwrap().unacked, 0);
    }
    let vhost = vhost();
    let client = taken(&vhost);
    client.acks(MANY as u64, true);
    let queue = vhost.queue("q").unwrap();
    assert_eq!((queue.ready, queue.unacked), (0, 0));
    client.publishes("q", "more");
    assert_eq!(client.hears(), [format!("deliver c {} more", MANY + 1)]);
}

#[test]
fn what_is_requeued_at_once_comes_again() {
    let vhost = vhost();
    let client = taken(&vhost);
    client.does(BasicNack { delivery_tag: MANY as u64, multiple: true, requeue: true });
    let again = client.hears();
    let wanted: Vec<String> =
        in_order().iter().map(|number| format!("deliver c {} {number}!", MANY + 1 + number)).collect();
    assert_eq!(again, wanted);
}

#[test]
fn what_a_channel_gives_back() {
    let vhost = vhost();
    let client = taken(&vhost);
    in_order().iter().for_each(|number| client.consumes("q", &number.to_string()));
    let other = Client::new(&vhost);
    other.consumes("q", "other");
    vhost.close_channel(client.key);
    assert_eq!(other.hears().len(), MANY);
    assert_eq!(vhost.queue("q").unwrap().consumers, 1);
    vhost.close_session(other.outbox.id());
    assert_eq!(numbers(&vhost, "q"), in_order());
}

#[test]
fn what_a_connection_gives_back() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    for number in in_order() {
        let queue = number.to_string();
        client.does(QueueDeclare {
            queue: queue.as_str().into(),
            exclusive: true,
            no_wait: true,
            ..Default::default()
        });
        client.consumes(&queue, &queue);
    }
    vhost.close_session(client.outbox.id());
    assert!(vhost.queues().is_empty() && vhost.consumers().is_empty());
}

#[test]
fn the_bindings_and_consumers_of_a_queue_that_goes() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    for kind in ["direct", "topic", "fanout", "headers"] {
        client.declares("q", &[]);
        client.declares("stays", &[]);
        declares_exchange(&client, "x", kind, true);
        in_order().iter().for_each(|number| binds(&client, "q", "x", *number));
        binds(&client, "stays", "x", 0);
        in_order().iter().for_each(|number| client.consumes("q", &number.to_string()));
        deletes(&client, "q");
        assert_eq!(client.hears().iter().filter(|line| line.starts_with("cancel")).count(), MANY, "{kind}");
        assert!(vhost.consumers().is_empty());
        assert_eq!(vhost.bindings().len(), 1, "{kind}");
        deletes(&client, "stays");
        assert!(vhost.exchanges().iter().all(|exchange| exchange.name != "x"), "{kind}: it goes with its last binding");
    }
}

#[test]
fn the_bindings_of_an_exchange_that_goes() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    declares_exchange(&client, "before", "fanout", true);
    declares_exchange(&client, "x", "fanout", false);
    client.does(ExchangeBind { destination: "x".into(), source: "before".into(), no_wait: true, ..Default::default() });
    for number in in_order() {
        client.declares(&number.to_string(), &[]);
        binds(&client, &number.to_string(), "x", 0);
    }
    client.does(ExchangeDelete { exchange: "x".into(), no_wait: true, ..Default::default() });
    assert!(vhost.bindings().is_empty());
    assert!(vhost.exchanges().iter().all(|exchange| exchange.name != "before"), "it goes with its last binding");
    let state = vhost.state();
    assert!(state.queues.values().all(|queue| queue.sources.is_empty()));
}

#[test]
fn a_message_to_all_and_what_dies_of_it() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    declares_exchange(&client, "x", "fanout", false);
    declares_exchange(&client, "dead", "fanout", false);
    let brief = [("x-message-ttl", Value::I32(60_000)), ("x-dead-letter-exchange", Value::text("dead"))];
    for number in in_order() {
        client.declares(&number.to_string(), &brief);
        binds(&client, &number.to_string(), "x", 0);
    }
    for queue in ["one", "other"] {
        client.declares(queue, &[]);
        binds(&client, queue, "dead", 0);
    }
    client.does(ConfirmSelect { no_wait: true });
    client.publishes_with("x", "", "7", &Properties::default()).unwrap();
    assert_eq!(client.hears(), ["ack 1"]);
    assert!(vhost.queues().iter().all(|queue| queue.ready == usize::from(!["one", "other"].contains(&&*queue.name))));
    later(&vhost, Duration::from_secs(61));
    assert_eq!(numbers(&vhost, "one"), vec![7; MANY]);
    let bodies: BTreeSet<_> = ["one", "other"]
        .iter()
        .flat_map(|queue| vhost.messages(queue).unwrap())
        .map(|dead| dead.body.as_ptr())
        .collect();
    assert_eq!(bodies.len(), 1, "they share one body");
}

#[test]
fn consumers_that_share_a_prefetch_take_turns() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.limits(2, true);
    for queue in ["a", "b", "c"] {
        client.declares(queue, &[]);
        client.consumes(queue, queue);
        (0..3).for_each(|number| client.publishes(queue, &number.to_string()));
    }
    let mut heard = client.hears();
    for tag in 1..=7 {
        client.acks(tag, false);
        heard.extend(client.hears());
    }
    let tags: String = heard.iter().map(|line| &line["deliver ".len()..][..1]).collect();
    assert_eq!(tags, "aabcabcbc", "{heard:?}");
}

#[test]
fn a_consumer_that_goes_while_it_waits_for_room() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.limits(1, true);
    client.declares("q", &[]);
    client.declares("p", &[]);
    client.consumes("q", "a");
    client.consumes("q", "b");
    client.consumes("p", "c");
    (0..3).for_each(|number| client.publishes("q", &number.to_string()));
    client.publishes("p", "3");
    assert_eq!(client.hears(), ["deliver a 1 0"]);
    client.does(BasicCancel { consumer_tag: "b".into(), no_wait: true });
    deletes(&client, "p");
    client.hears();
    client.acks(1, false);
    client.acks(2, false);
    assert_eq!(client.hears(), ["deliver a 2 1", "deliver a 3 2"]);
    assert!(vhost.state().channels.values().all(|channel| channel.parked.is_empty()));
}

#[test]
fn timers_go_with_what_they_are_for() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    let brief = [("x-message-ttl", Value::I32(60_000)), ("x-expires", Value::I32(60_000))];
    for number in 0..3 {
        client.declares(&number.to_string(), &brief);
        (0..3).for_each(|_| client.publishes(&number.to_string(), "m"));
        let soon = Properties { expiration: Some((1_000 - number).to_string().as_str().into()), ..Default::default() };
        client.publishes_with("", &number.to_string(), "m", &soon).unwrap();
    }
    vhost.delay_confirms(Some(Duration::from_secs(60)));
    client.does(ConfirmSelect { no_wait: true });
    (0..3).for_each(|_| client.publishes("0", "m"));
    (0..3).for_each(|number| deletes(&client, &number.to_string()));
    vhost.close_session(client.outbox.id());
    assert_eq!(vhost.state().timers.next(), None);
}

/// Clients do whatever comes into their heads at the same time, and leave.
#[test]
fn nothing_is_left_when_all_have_gone() {
    let vhost = vhost();
    let keeper = Client::new(&vhost);
    keeper.declares("dead", &[]);
    thread::scope(|scope| {
        for seed in 0..4 {
            let vhost = &vhost;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..6 {
                    let client = Client::new(vhost);
                    (0..300).for_each(|_| does_something(&client, &mut random));
                    vhost.close_session(client.outbox.id());
                }
            });
        }
    });
    assert!(vhost.consumers().is_empty());
    assert!(vhost.queues().iter().all(|queue| queue.unacked == 0));
    for queue in vhost.queues() {
        deletes(&keeper, &queue.name);
    }
    assert!(vhost.bindings().is_empty());
    let mut state = vhost.state();
    assert!(state.rest.is_empty() && !state.is_attended && state.discarded.is_empty());
    assert_eq!(state.timers.next(), None);
    assert!(state.channels.values().all(|channel| channel.parked.is_empty()));
}

fn does_something(client: &Client, random: &mut fastrand::Rng) {
    let queue = format!("q{}", random.u8(0..3));
    let dead = [
        ("x-dead-letter-exchange", Value::text("")),
        ("x-dead-letter-routing-key", Value::text("dead")),
        ("x-message-ttl", Value::I32(3_600_000)),
        ("x-max-length", Value::I32(1_000)),
    ];
    client.declares(&queue, &dead);
    declares_exchange(client, "x", "headers", false);
    // Another may delete it in between, and then this is refused.
    let _ = client.tries(match random.u8(0..8) {
        0 => BasicQos { prefetch_size: 0, prefetch_count: random.u16(0..3), global: random.bool() }.into(),
        1 => BasicConsume { queue: queue.as_str().into(), no_wait: true, ..Default::default() }.into(),
        2 => BasicGet { queue: queue.as_str().into(), ..Default::default() }.into(),
        3 => BasicNack { delivery_tag: 0, multiple: true, requeue: random.bool() }.into(),
        4 => BasicAck { delivery_tag: 0, multiple: true }.into(),
        5 if random.u8(0..10) == 0 => {
            Method::from(QueueDelete { queue: queue.as_str().into(), no_wait: true, ..Default::default() })
        }
        _ => QueueBind {
            queue: queue.as_str().into(),
            exchange: "x".into(),
            no_wait: true,
            arguments: table(&[("number", Value::I64(random.i64(0..500)))]),
            ..Default::default()
        }
        .into(),
    });
    for _ in 0..random.u8(0..20) {
        // The queue may be gone: then it comes back.
        client.publishes_with("", &queue, "m", &Properties::default()).unwrap();
    }
    client.reads();
    if random.u8(0..4) == 0 {
        client.vhost.room_again(client.outbox.id());
    }
}
