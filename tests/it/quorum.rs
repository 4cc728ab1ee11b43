//! Quorum queues, as clients of one node see them.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{Connection, Delivery, FieldTable, FieldValue, Outcome, Overflow, Queue};

use crate::contract;
use crate::raw::{Raw, long, publish, short};
use crate::support::{self, Broker, PATIENCE, app, bodies, drain, queue, unique, wait_until};

contract! {
    a_quorum_queue_is_declared_and_serves,
    what_a_quorum_queue_cannot_have_is_refused_in_rabbitmqs_words,
    what_a_quorum_queue_may_have_is_accepted,
    a_consumer_hears_of_the_count_once_there_is_one,
    a_lost_channel_counts_as_a_return,
    a_channel_with_a_limit_of_its_own_may_not_consume,
    a_limit_that_is_set_later_is_not_for_consumers_of_quorum_queues,
    conditions_of_deletion_are_not_implemented,
    a_queue_that_is_too_long_drops_from_its_head,
    a_queue_that_is_too_long_refuses_after_one_too_many_until_it_is_shorter_by_a_fifth,
    messages_expire_by_the_queues_time_and_by_their_own,
    two_thousand_messages_are_enough_for_a_consumer_without_a_limit,
    the_settings_of_a_program_serve_both_brokers,
    of_single_active_consumers_a_quorum_queue_counts_one_and_a_classic_queue_all,
    [by release:
        a_quorum_queue_declared_otherwise_is_refused,
        a_message_says_how_often_it_has_come_back,
        what_rejections_and_lost_channels_have_counted_goes_along_to_the_next_queue,
        beyond_its_delivery_limit_a_message_is_dead_lettered_or_dropped,
        without_a_delivery_limit_of_its_own_a_queue_has_none_or_twenty,
        with_a_limit_what_comes_back_is_next_and_without_one_it_is_last,
        of_two_priorities_the_higher_goes_twice_as_often_or_there_is_one,
        an_exclusive_consumer_is_one_among_others,
        a_single_active_consumer_is_followed_by_the_next_in_time_or_priority_and_leaves_nothing_to_get,
        a_single_active_consumer_makes_way_for_a_higher_priority_or_stays,
    ]
}

const DURABLE: u8 = 2;
const EXCLUSIVE: u8 = 4;
const AUTO_DELETE: u8 = 8;

/// A value in a table, as it is on the wire.
#[derive(Debug, Clone, Copy)]
enum Is {
    Text(&'static str),
    Number(i64),
    True,
}

/// The inside of a table with `x-queue-type = quorum` and more.
fn arguments(more: &[(&str, Is)]) -> Vec<u8> {
    let field = |(name, value): &(&str, Is)| {
        let value = match value {
            Is::Text(text) => [&b"S"[..], &long(text.as_bytes())].concat(),
            Is::Number(number) => [&b"l"[..], &number.to_be_bytes()].concat(),
            Is::True => b"t\x01".to_vec(),
        };
        [short(name), value].concat()
    };
    [("x-queue-type", Is::Text("quorum"))].iter().chain(more).map(field).collect::<Vec<_>>().concat()
}

/// Declares a quorum queue with a name of its own.
fn declare(connection: &Connection, what: &str, with: impl FnOnce(Queue) -> Queue) -> String {
    let name = unique(what);
    connection.queue_declare(&with(Queue::new(&name).quorum())).unwrap();
    name
}

/// The next message, which may be a moment under way: RabbitMQ's quorum queues take back and dead-letter in the background.
#[track_caller]
fn next<'c>(connection: &'c Connection, queue: &str) -> Delivery<'c> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(delivery) = connection.get(queue).unwrap() {
            return delivery;
        }
        assert!(Instant::now() < deadline, "no message in {queue}");
    }
}

fn count(delivery: &Delivery<'_>) -> Option<FieldValue> {
    delivery.message().headers().get("x-delivery-count").cloned()
}

/// What the latest death of a message says.
fn death(delivery: &Delivery<'_>) -> FieldTable {
    let Some(FieldValue::Array(deaths)) = delivery.message().headers().get("x-death") else {
        panic!("no death: {delivery:?}")
    };
    let Some(FieldValue::Table(death)) = deaths.first() else { panic!("{deaths:?}") };
    death.clone()
}

fn a_quorum_queue_is_declared_and_serves(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "quorum", |queue| queue);
    connection.publish("", &name, "kept by most").unwrap();
    let delivery = connection.get_timeout(&name, PATIENCE).unwrap().expect("a message");
    assert_eq!(delivery.body(), b"kept by most");
    delivery.ack().unwrap();
    assert_eq!(connection.queue_purge(&name).unwrap(), 0);
    assert_eq!(connection.queue_delete(&name).unwrap(), 0);
}

fn what_a_quorum_queue_cannot_have_is_refused_in_rabbitmqs_words(broker: Broker) {
    let kind = " of queue type rabbit_quorum_queue";
    for (flags, argument, value, what, why) in [
        (0, "", Is::True, "property 'non-durable'", ""),
        (DURABLE | EXCLUSIVE, "", Is::True, "property 'exclusive-owner'", ""),
        (DURABLE | AUTO_DELETE, "", Is::True, "property 'auto-delete'", ""),
        (EXCLUSIVE | AUTO_DELETE, "", Is::True, "property 'auto-delete'", ""),
        // What it is asked to have comes before what it is asked to be.
        (0, "x-max-priority", Is::Number(5), "arg 'x-max-priority'", kind),
        (DURABLE, "x-queue-mode", Is::Text("lazy"), "arg 'x-queue-mode'", kind),
        (DURABLE, "x-queue-mode", Is::Text("no mode"), "arg 'x-queue-mode'", kind),
        (DURABLE, "x-queue-version", Is::Number(2), "arg 'x-queue-version'", kind),
        (DURABLE, "x-queue-master-locator", Is::Text("client-local"), "arg 'x-queue-master-locator'", kind),
        (DURABLE, "x-max-age", Is::Text("1h"), "arg 'x-max-age'", kind),
        (DURABLE, "x-stream-max-segment-size-bytes", Is::Number(5), "arg 'x-stream-max-segment-size-bytes'", kind),
        (DURABLE, "x-initial-cluster-size", Is::Number(1), "arg 'x-initial-cluster-size'", kind),
        (DURABLE, "x-message-ttl", Is::Number(-1), "arg 'x-message-ttl'", ": {value_negative,-1}"),
        (DURABLE, "x-expires", Is::Number(0), "arg 'x-expires'", ": {value_zero,0}"),
        (DURABLE, "x-overflow", Is::Text("no way"), "arg 'x-overflow'", ": invalid_overflow"),
        (DURABLE, "x-max-in-memory-length", Is::Number(-5), "arg 'x-max-in-memory-length'", ": {value_negative,-5}"),
        (
            DURABLE,
            "x-dead-letter-strategy",
            Is::Text("never"),
            "arg 'x-dead-letter-strategy'",
            ": invalid_dlx_strategy",
        ),
        (
            DURABLE,
            "x-dead-letter-strategy",
            Is::Number(1),
            "arg 'x-dead-letter-strategy'",
            ": {unacceptable_type,long}",
        ),
        (
            DURABLE,
            "x-quorum-initial-group-size",
            Is::Number(0),
            "arg 'x-quorum-initial-group-size'",
            ": {value_zero,0}",
        ),
        (
            DURABLE,
            "x-quorum-initial-group-size",
            Is::Text("a"),
            "arg 'x-quorum-initial-group-size'",
            ": \"expected integer, got longstr\"",
        ),
        (
            DURABLE,
            "x-queue-leader-locator",
            Is::Text("nowhere"),
            "arg 'x-queue-leader-locator'",
            ": invalid_queue_locator_arg",
        ),
    ] {
        let mut raw = Raw::open(broker.addr());
        let name = unique("cannot");
        let more = if argument.is_empty() { Vec::new() } else { vec![(argument, value)] };
        raw.declare_with(&name, flags, &arguments(&more));
        let text = format!("PRECONDITION_FAILED - invalid {what} for queue '{name}' in vhost '/'{why}");
        assert_eq!(raw.refusal(), ((20, 40), 406, text));
    }
    let mut raw = Raw::open(broker.addr());
    raw.declare_with("", DURABLE, &arguments(&[]));
    let text = "PRECONDITION_FAILED - Cannot declare a server-named queue for type rabbit_quorum_queue";
    assert_eq!(raw.refusal(), ((20, 40), 406, text.to_owned()));
}

fn what_a_quorum_queue_may_have_is_accepted(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    for (argument, value) in [
        ("x-message-ttl", Is::Number(1000)),
        ("x-expires", Is::Number(60_000)),
        ("x-delivery-limit", Is::Number(3)),
        ("x-delivery-limit", Is::Number(-1)),
        ("x-delivery-limit", Is::Text("often")),
        ("x-dead-letter-exchange", Is::Text("amq.direct")),
        ("x-dead-letter-strategy", Is::Text("at-least-once")),
        ("x-dead-letter-strategy", Is::Text("at-most-once")),
        ("x-overflow", Is::Text("drop-head")),
        ("x-overflow", Is::Text("reject-publish")),
        ("x-overflow", Is::Text("reject-publish-dlx")),
        ("x-single-active-consumer", Is::True),
        ("x-max-length", Is::Number(5)),
        ("x-max-length-bytes", Is::Number(5)),
        ("x-max-in-memory-length", Is::Number(5)),
        ("x-max-in-memory-bytes", Is::Number(5)),
        ("x-quorum-initial-group-size", Is::Number(1)),
        ("x-queue-leader-locator", Is::Text("client-local")),
        ("x-queue-leader-locator", Is::Text("balanced")),
        ("x-something-else", Is::True),
    ] {
        let name = unique("may");
        raw.declare_with(&name, DURABLE, &arguments(&[(argument, value)]));
        assert_eq!(raw.method().0, (50, 11), "{argument} {value:?}");
        // The same again is the same queue.
        raw.declare_with(&name, DURABLE, &arguments(&[(argument, value)]));
        assert_eq!(raw.method().0, (50, 11), "{argument} {value:?}");
    }
    raw.close();
}

fn a_quorum_queue_declared_otherwise_is_refused(broker: Broker) {
    for (is, asked, why) in [
        (
            vec![("x-delivery-limit", Is::Number(3))],
            vec![("x-delivery-limit", Is::Number(4))],
            "arg 'x-delivery-limit' for QUEUE: received '4' but current is '3'",
        ),
        (
            vec![],
            vec![("x-delivery-limit", Is::Number(3))],
            "arg 'x-delivery-limit' for QUEUE: received the value '3' of type 'long' but current is none",
        ),
        (
            vec![("x-dead-letter-strategy", Is::Text("at-least-once"))],
            vec![("x-dead-letter-strategy", Is::Text("at-most-once"))],
            "arg 'x-dead-letter-strategy' for QUEUE: received 'at-most-once' but current is 'at-least-once'",
        ),
        (
            vec![("x-queue-leader-locator", Is::Text("balanced"))],
            vec![],
            "arg 'x-queue-leader-locator' for QUEUE: received none but current is the value 'balanced' of type 'longstr'",
        ),
        (
            vec![("x-max-in-memory-bytes", Is::Number(1))],
            vec![("x-max-in-memory-bytes", Is::Number(2))],
            "arg 'x-max-in-memory-bytes' for QUEUE: received '2' but current is '1'",
        ),
    ] {
        let mut raw = Raw::open(broker.addr());
        let name = unique("otherwise");
        raw.declare_with(&name, DURABLE, &arguments(&is));
        assert_eq!(raw.method().0, (50, 11));
        raw.declare_with(&name, DURABLE, &arguments(&asked));
        let why = why.replace("QUEUE", &format!("queue '{name}' in vhost '/'"));
        assert_eq!(raw.refusal(), ((20, 40), 406, format!("PRECONDITION_FAILED - inequivalent {why}")));
    }
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "otherwise", |queue| queue);
    let error = connection.queue_declare(&Queue::new(&name)).unwrap_err().to_string();
    // Without a type it is a classic one, which newer releases say.
    let difference = match broker.is_4() {
        false => "received none but current is the value 'quorum' of type 'longstr'",
        true => "received 'classic' but current is 'quorum'",
    };
    assert!(error.contains(difference), "{error}");
    let error =
        connection.queue_declare(&Queue::new(&name).argument("x-queue-type", "classic")).unwrap_err().to_string();
    assert!(error.contains("received 'classic' but current is 'quorum'"), "{error}");
    // Arguments of the other type do not count.
    let classic = queue(&connection, "otherwise");
    connection.queue_declare(&Queue::new(&classic).argument("x-delivery-limit", 3)).unwrap();
    let error = connection.queue_declare(&Queue::new(&classic).quorum()).unwrap_err().to_string();
    let difference = match broker.is_4() {
        false => "received the value 'quorum' of type 'longstr' but current is none",
        true => "received 'quorum' but current is 'classic'",
    };
    assert!(error.contains(difference), "{error}");
}

fn a_message_says_how_often_it_has_come_back(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "counted", |queue| queue);
    connection.publish("", &name, coney::Message::new("m").with_header("x-delivery-count", "mine")).unwrap();
    for returns in 0..3 {
        let delivery = next(&connection, &name);
        if broker.is_4() && returns == 0 {
            assert_eq!(count(&delivery), Some(FieldValue::String("mine".to_owned())));
        } else {
            assert_eq!(count(&delivery), Some(FieldValue::I64(returns)));
        }
        assert_eq!(delivery.redelivered(), returns > 0);
        delivery.requeue().unwrap();
    }
}

/// What `basic.get` shows of a message that has come back so often.
fn shown(broker: Broker, returns: i64) -> Option<FieldValue> {
    (returns > 0 || !broker.is_4()).then_some(FieldValue::I64(returns))
}

fn what_rejections_and_lost_channels_have_counted_goes_along_to_the_next_queue(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let goes_along = broker.is_4();
    let last = declare(&connection, "along", |queue| queue);
    // A classic queue in between carries the count, and does not show it.
    let through = unique("along-classic");
    let through_queue = Queue::new(&through).dead_letter_exchange("").dead_letter_routing_key(&last);
    connection.queue_declare(&through_queue).unwrap();
    for dead in [&last, &through] {
        let first = declare(&connection, "along", |queue| queue.dead_letter_exchange("").dead_letter_routing_key(dead));
        connection.publish("", &first, "m").unwrap();
        // A requeue is of the client's free will, and counts in the queue alone.
        next(&connection, &first).requeue().unwrap();
        let mut raw = Raw::open(broker.addr());
        raw.consume(&first, "c");
        assert_eq!(raw.delivery(), ("c".to_owned(), 1));
        raw.close_at_once();
        let delivery = next(&connection, &first);
        assert_eq!(count(&delivery), Some(FieldValue::I64(2)));
        delivery.reject().unwrap();
        if dead == &through {
            let delivery = next(&connection, &through);
            assert_eq!((count(&delivery), delivery.redelivered()), (None, false));
            delivery.reject().unwrap();
        }
        let delivery = next(&connection, &last);
        let wanted = if goes_along { 2 } else { 0 };
        assert_eq!((count(&delivery), delivery.redelivered()), (shown(broker, wanted), goes_along));
        // From here on it is about this queue.
        delivery.requeue().unwrap();
        let delivery = next(&connection, &last);
        assert_eq!(count(&delivery), Some(FieldValue::I64(1)));
        delivery.ack().unwrap();
    }
}

fn a_consumer_hears_of_the_count_once_there_is_one(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("heard");
    raw.declare_with(&name, DURABLE, &arguments(&[]));
    assert_eq!(raw.method().0, (50, 11));
    raw.consume(&name, "c");
    assert_eq!(raw.method().0, (60, 21));
    raw.send(&publish(&name, 1, b"m"));
    let counts = |header: &[u8]| header.windows(16).any(|part| part == b"x-delivery-count");
    for returns in 0..3 {
        assert_eq!(raw.method().0, (60, 60));
        let (_, _, header) = raw.frame().unwrap();
        assert_eq!(counts(&header), returns > 0, "{header:?}");
        let (_, _, body) = raw.frame().unwrap();
        assert_eq!(body, b"m");
        raw.nack(returns + 1, true);
    }
    raw.close_at_once();
}

fn beyond_its_delivery_limit_a_message_is_dead_lettered_or_dropped(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "poison-dead");
    // Less than nothing is no limit in RabbitMQ 4.
    let least = if broker.is_4() { 0 } else { -1 };
    for (limit, strategy) in [(least, "at-most-once"), (0, "at-most-once"), (2, "at-most-once"), (2, "at-least-once")] {
        let name = declare(&connection, "poison", |queue| {
            let queue = queue.argument("x-delivery-limit", limit).argument("x-dead-letter-strategy", strategy);
            // RabbitMQ asks for it with at-least-once.
            let queue = queue.overflow(Overflow::RejectPublish);
            queue.dead_letter_exchange("").dead_letter_routing_key(&dead)
        });
        connection.publish("", &name, "m").unwrap();
        for returns in 0..=limit.max(0) {
            let delivery = next(&connection, &name);
            assert_eq!(count(&delivery), shown(broker, returns.into()));
            delivery.requeue().unwrap();
        }
        let buried = next(&connection, &dead);
        let death = death(&buried);
        assert_eq!(death["reason"], FieldValue::String("delivery_limit".to_owned()));
        assert_eq!((&death["queue"], &death["count"]), (&FieldValue::String(name.clone()), &FieldValue::I64(1)));
        assert_eq!(buried.message().headers()["x-first-death-reason"], FieldValue::String("delivery_limit".to_owned()));
        assert_eq!(count(&buried), None, "it is its queue's");
        buried.ack().unwrap();
        assert!(connection.get(&name).unwrap().is_none());
    }
    let name = declare(&connection, "poison", |queue| queue.argument("x-delivery-limit", 1));
    connection.publish("", &name, "m").unwrap();
    (0..2).for_each(|_| next(&connection, &name).requeue().unwrap());
    connection.publish("", &name, "behind it").unwrap();
    let delivery = next(&connection, &name);
    assert_eq!(delivery.body(), b"behind it");
    delivery.ack().unwrap();
}

fn without_a_delivery_limit_of_its_own_a_queue_has_none_or_twenty(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "twenty-dead");
    let returns = |with: &dyn Fn(Queue) -> Queue, most: i64| {
        let name =
            declare(&connection, "twenty", |queue| with(queue.dead_letter_exchange("").dead_letter_routing_key(&dead)));
        connection.publish("", &name, "m").unwrap();
        (0..=most).for_each(|_| next(&connection, &name).requeue().unwrap());
        name
    };
    let is_limited = broker.is_4();
    let name = returns(&|queue| queue, 20);
    if is_limited {
        let buried = next(&connection, &dead);
        assert_eq!(death(&buried)["reason"], FieldValue::String("delivery_limit".to_owned()));
        buried.ack().unwrap();
        // Less than nothing is no limit.
        let name = returns(&|queue| queue.argument("x-delivery-limit", -1), 25);
        assert_eq!(count(&next(&connection, &name)), Some(FieldValue::I64(26)));
    } else {
        assert_eq!(count(&next(&connection, &name)), Some(FieldValue::I64(21)));
    }
}

fn a_lost_channel_counts_as_a_return(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "abandoned", |queue| queue.argument("x-delivery-limit", 2));
    connection.publish("", &name, "m").unwrap();
    for _ in 0..3 {
        let mut raw = Raw::open(broker.addr());
        raw.consume(&name, "c");
        assert_eq!(raw.delivery(), ("c".to_owned(), 1));
    }
    connection.publish("", &name, "behind it").unwrap();
    assert_eq!(next(&connection, &name).body(), b"behind it");
}

fn with_a_limit_what_comes_back_is_next_and_without_one_it_is_last(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (first, last) = (["3", "1", "4", "5", "6"], ["5", "6", "3", "1", "4"]);
    // RabbitMQ 4 has a limit where none is set.
    let none = if broker.is_4() { Some(-1) } else { None };
    for (limit, wanted) in [(Some(9), first), (None, if broker.is_4() { first } else { last }), (none, last)] {
        let name = declare(&connection, "back", |queue| match limit {
            Some(limit) => queue.argument("x-delivery-limit", limit),
            None => queue,
        });
        (1..7).for_each(|body| connection.publish("", &name, body.to_string()).unwrap());
        let mut taken: Vec<Option<Delivery<'_>>> = (0..4).map(|_| Some(next(&connection, &name))).collect();
        for at in [2, 0, 3] {
            taken[at].take().unwrap().requeue().unwrap();
        }
        let mut came = Vec::new();
        wait_until("they are back", || {
            came.extend(drain(&connection, &name));
            came.len() >= wanted.len()
        });
        if wanted == first || broker.is_embedded() {
            assert_eq!(bodies(&came), wanted);
        } else {
            // They go behind what is there, one after another; what is read meanwhile may be read before.
            assert_eq!(bodies(&came)[..2], wanted[..2]);
        }
        taken.into_iter().flatten().for_each(|delivery| drop(delivery.ack()));
    }
}

fn of_two_priorities_the_higher_goes_twice_as_often_or_there_is_one(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "priorities", |queue| queue);
    for (body, priority) in [("a", 0), ("b", 4), ("c", 4), ("d", 5), ("e", 9), ("f", 255), ("g", 5), ("h", 5)] {
        connection.publish("", &name, coney::Message::new(body).with_priority(priority)).unwrap();
    }
    let came = bodies(&drain(&connection, &name)).concat();
    assert_eq!(came, if broker.is_4() { "deafgbhc" } else { "abcdefgh" });
}

fn a_channel_with_a_limit_of_its_own_may_not_consume(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("unlimited");
    raw.declare_with(&name, DURABLE, &arguments(&[]));
    assert_eq!(raw.method().0, (50, 11));
    raw.limit(5, true);
    raw.consume(&name, "c");
    let text = format!("NOT_IMPLEMENTED - queue '{name}' in vhost '/' does not support global qos");
    assert_eq!(raw.refusal(), ((10, 50), 540, text));
}

fn a_limit_that_is_set_later_is_not_for_consumers_of_quorum_queues(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("later");
    raw.declare_with(&name, DURABLE, &arguments(&[]));
    assert_eq!(raw.method().0, (50, 11));
    // A limit that has been lifted is none.
    raw.limit(5, true);
    raw.limit(0, true);
    raw.consume(&name, "c");
    assert_eq!(raw.method().0, (60, 21));
    raw.limit(1, true);
    (0..3).for_each(|_| raw.send(&publish(&name, 1, b"m")));
    (1..4).for_each(|delivery| assert_eq!(raw.delivery(), ("c".to_owned(), delivery)));
    raw.close_at_once();
}

fn an_exclusive_consumer_is_one_among_others(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("together");
    raw.declare_with(&name, DURABLE, &arguments(&[]));
    assert_eq!(raw.method().0, (50, 11));
    for (tag, flags) in [("one", 4), ("two", 0), ("three", 4)] {
        raw.say(1, (60, 20), &[&[0, 0][..], &short(&name), &short(tag), &[flags], &long(b"")].concat());
        assert_eq!(raw.method().0, (60, 21), "{tag}");
    }
    raw.send(&publish(&name, 1, b"m"));
    raw.delivery();
    raw.close_at_once();
    let refused = if broker.is_4() { "x-stream-match-unfiltered" } else { "x-cancel-on-ha-failover" };
    for (argument, value) in [("x-stream-offset", Is::Number(1)), (refused, Is::True)] {
        let mut raw = Raw::open(broker.addr());
        // Without the first of them, which says what a queue is.
        let table = arguments(&[(argument, value)]).split_off(arguments(&[]).len());
        raw.say(1, (60, 20), &[&[0, 0][..], &short(&name), &short("c"), &[0], &long(&table)].concat());
        let text = format!(
            "PRECONDITION_FAILED - invalid arg '{argument}' for queue '{name}' in vhost '/' of queue type \
             rabbit_quorum_queue"
        );
        assert_eq!(raw.refusal(), ((20, 40), 406, text));
    }
}

fn conditions_of_deletion_are_not_implemented(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "kept", |queue| queue);
    for (flags, flag) in [(1, "if-unused"), (2, "if-empty"), (3, "if-unused")] {
        let mut raw = Raw::open(broker.addr());
        raw.say(1, (50, 40), &[&[0, 0][..], &short(&name), &[flags]].concat());
        let text = format!(
            "NOT_IMPLEMENTED - cannot delete queue '{name}' in vhost '/'. queue.delete operations with {flag} flag set are \
             not supported by quorum queues"
        );
        assert_eq!(raw.refusal(), ((10, 50), 540, text));
    }
    connection.queue_delete(&name).unwrap();
}

/// Consumes with this `x-priority`.
fn consume_at(raw: &mut Raw, queue: &str, tag: &str, priority: i64) {
    let table = [&short("x-priority")[..], b"l", &priority.to_be_bytes()].concat();
    raw.say(1, (60, 20), &[&[0, 0][..], &short(queue), &short(tag), &[0], &long(&table)].concat());
    assert_eq!(raw.method().0, (60, 21));
}

/// The tag of the delivery that must come next, and the rest of it.
fn delivered(raw: &mut Raw) -> String {
    let (tag, _) = raw.delivery();
    let _ = (raw.frame(), raw.frame());
    tag
}

fn cancel(raw: &mut Raw, tag: &str) {
    raw.say(1, (60, 30), &[&short(tag)[..], &[0]].concat());
    assert_eq!(raw.method().0, (60, 31));
}

fn of_single_active_consumers_a_quorum_queue_counts_one_and_a_classic_queue_all(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    for (is_quorum, counted) in [(true, 1), (false, 3)] {
        let queue = Queue::new(unique("counted")).single_active_consumer();
        let queue = if is_quorum { queue.quorum() } else { queue };
        connection.queue_declare(&queue).unwrap();
        let listeners: Vec<_> = (0..3).map(|_| app.spawn_listener(&queue.name, |_, _| ()).unwrap()).collect();
        assert_eq!(connection.queue_declare_passive(&queue.name).unwrap().consumer_count, counted);
        listeners.into_iter().for_each(|listener| listener.stop().unwrap());
    }
}

fn a_single_active_consumer_is_followed_by_the_next_in_time_or_priority_and_leaves_nothing_to_get(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("single");
    raw.declare_with(&name, DURABLE, &arguments(&[("x-single-active-consumer", Is::True)]));
    assert_eq!(raw.method().0, (50, 11));
    for (tag, priority) in [("first", 5), ("second", 0), ("third", 2), ("fourth", 2)] {
        consume_at(&mut raw, &name, tag, priority);
    }
    raw.send(&publish(&name, 1, b"m"));
    assert_eq!(delivered(&mut raw), "first");
    cancel(&mut raw, "first");
    raw.send(&publish(&name, 1, b"m"));
    assert_eq!(delivered(&mut raw), if broker.is_4() { "third" } else { "second" });
    let mut other = Raw::open(broker.addr());
    other.say(1, (60, 70), &[&[0, 0][..], &short(&name), &[0]].concat());
    let text = format!(
        "RESOURCE_LOCKED - cannot obtain access to locked queue '{name}' in vhost '/'. basic.get operations are not \
         supported by quorum queues with single active consumer"
    );
    assert_eq!(other.refusal(), ((20, 40), 405, text));
    raw.close_at_once();
}

fn a_single_active_consumer_makes_way_for_a_higher_priority_or_stays(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("makes-way");
    raw.declare_with(&name, DURABLE, &arguments(&[("x-single-active-consumer", Is::True)]));
    assert_eq!(raw.method().0, (50, 11));
    consume_at(&mut raw, &name, "low", 0);
    (0..2).for_each(|_| raw.send(&publish(&name, 1, b"m")));
    (0..2).for_each(|_| assert_eq!(delivered(&mut raw), "low"));
    consume_at(&mut raw, &name, "high", 5);
    raw.send(&publish(&name, 1, b"m"));
    if !broker.is_4() {
        assert_eq!(delivered(&mut raw), "low");
        (1..4).for_each(|delivery| raw.ack(delivery));
        raw.send(&publish(&name, 1, b"m"));
        assert_eq!(delivered(&mut raw), "low");
    } else {
        // Not as long as the one that is active has something unsettled.
        raw.ack(1);
        wait_until("the message waits", || raw.count(&name) == 1);
        raw.ack(2);
        assert_eq!(delivered(&mut raw), "high");
        // It goes at once if it has nothing.
        raw.ack(3);
        consume_at(&mut raw, &name, "top", 9);
        raw.send(&publish(&name, 1, b"m"));
        assert_eq!(delivered(&mut raw), "top");
        // Whoever made way is a consumer still, even if nobody takes the place.
        consume_at(&mut raw, &name, "above", 10);
        cancel(&mut raw, "above");
        raw.send(&publish(&name, 1, b"m"));
        wait_until("the message waits", || raw.count(&name) == 1);
        raw.ack(4);
        assert_eq!(delivered(&mut raw), "top");
        cancel(&mut raw, "top");
        raw.send(&publish(&name, 1, b"m"));
        assert_eq!(delivered(&mut raw), "high");
    }
    raw.close_at_once();
}

fn a_queue_that_is_too_long_drops_from_its_head(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "long-dead");
    // The third is for classic queues; RabbitMQ takes it for the first.
    for overflow in ["drop-head", "reject-publish-dlx"] {
        let name = declare(&connection, "long", |queue| {
            let queue = queue.max_length(2).argument("x-overflow", overflow);
            queue.dead_letter_exchange("").dead_letter_routing_key(&dead)
        });
        (0..5).for_each(|body| connection.publish("", &name, body.to_string()).unwrap());
        assert_eq!(bodies(&drain(&connection, &name)), ["3", "4"]);
        for body in ["0", "1", "2"] {
            let buried = next(&connection, &dead);
            assert_eq!(buried.message().text().unwrap(), body);
            assert_eq!(death(&buried)["reason"], FieldValue::String("maxlen".to_owned()));
            buried.ack().unwrap();
        }
    }
}

fn a_queue_that_is_too_long_refuses_after_one_too_many_until_it_is_shorter_by_a_fifth(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "full", |queue| queue.max_length(10).overflow(Overflow::RejectPublish));
    // One after another, so that the channel of RabbitMQ knows by the next that the queue is full.
    let mut refused = (0..13).map(|_| connection.publish("", &name, "m").is_err()).collect::<Vec<_>>();
    assert_eq!(refused.iter().filter(|refused| !**refused).count(), 11, "{refused:?}");
    assert!(refused[11] && refused[12]);
    refused.clear();
    for _ in 0..3 {
        next(&connection, &name).ack().unwrap();
        refused.push(connection.publish("", &name, "m").is_err());
    }
    assert_eq!(refused[..2], [true, true], "10 and 9 are left");
    if refused[2] {
        // RabbitMQ tells the channel in the background that there is room.
        wait_until("there is room", || connection.publish("", &name, "m").is_ok());
    }
}

fn messages_expire_by_the_queues_time_and_by_their_own(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "brief-dead");
    let to_dead = |queue: Queue| queue.dead_letter_exchange("").dead_letter_routing_key(&dead);
    let brief = declare(&connection, "brief", |queue| to_dead(queue.message_ttl(Duration::from_millis(200))));
    let own = declare(&connection, "brief", to_dead);
    connection.publish("", &brief, "by the queue's").unwrap();
    let buried = next(&connection, &dead);
    assert_eq!(death(&buried)["reason"], FieldValue::String("expired".to_owned()));
    buried.ack().unwrap();
    let message = coney::Message::new("by its own").with_expiration(Duration::from_millis(100));
    connection.publish("", &own, message).unwrap();
    let buried = next(&connection, &dead);
    assert_eq!(death(&buried)["original-expiration"], FieldValue::String("100".to_owned()));
    buried.ack().unwrap();
}

fn two_thousand_messages_are_enough_for_a_consumer_without_a_limit(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "greedy", |queue| queue);
    connection.publish_batch((0..2100).map(|_| ("", name.as_str(), "m"))).unwrap();
    let mut raw = Raw::open(broker.addr());
    raw.consume(&name, "c");
    (1..=2000).for_each(|delivery| assert_eq!(raw.delivery(), ("c".to_owned(), delivery)));
    // The rest is left for others.
    for _ in 0..100 {
        assert!(connection.get_and_ack(&name).unwrap().is_some());
    }
    raw.ack(1);
    connection.publish("", &name, "one more").unwrap();
    assert_eq!(raw.delivery(), ("c".to_owned(), 2001));
    raw.close_at_once();
}

fn the_settings_of_a_program_serve_both_brokers(broker: Broker) {
    let (name, dead) = (unique("program"), unique("program-dead"));
    let topology = format!(
        r#"
        [[topology.queues]]
        name = "{name}"
        [topology.queues.arguments]
        x-queue-type = "quorum"
        x-delivery-limit = 2
        x-dead-letter-exchange = ""
        x-dead-letter-routing-key = "{dead}"
        x-dead-letter-strategy = "at-least-once"
        x-overflow = "reject-publish"

        [[topology.queues]]
        name = "{dead}"
        arguments = {{ x-queue-type = "quorum" }}
        "#
    );
    let app = broker.app(&topology);
    app.declare_topology().unwrap();
    let (handled, handles) = mpsc::channel();
    let listener = app
        .spawn_listener(&name, move |_, delivery| {
            let headers = delivery.message().headers();
            handled.send((delivery.redelivered(), headers.get("x-delivery-count").cloned())).unwrap();
            Outcome::Requeue
        })
        .unwrap();
    let connection = app.publish_pool().connection().unwrap();
    connection.publish("", &name, "poison").unwrap();
    for wanted in [None, Some(FieldValue::I64(1)), Some(FieldValue::I64(2))] {
        assert_eq!(handles.recv_timeout(PATIENCE).unwrap(), (wanted.is_some(), wanted));
    }
    let buried = next(&connection, &dead);
    assert_eq!(buried.body(), b"poison");
    assert_eq!(death(&buried)["reason"], FieldValue::String("delivery_limit".to_owned()));
    buried.ack().unwrap();
    listener.stop().unwrap();
    assert!(handles.try_recv().is_err(), "not once more");
}

#[test]
fn behind_memory_urls_there_are_quorum_queues_and_elsewhere_only_where_they_are_allowed() {
    let app = app("memory://quorum", "");
    let connection = app.publish_pool().connection().unwrap();
    declare(&connection, "memory", |queue| queue);
    let broker = EmbeddedBroker::start().unwrap();
    let app = support::app(&broker.url(), "");
    let connection = app.publish_pool().connection().unwrap();
    let error = connection.queue_declare(&Queue::new("q").quorum()).unwrap_err();
    assert_eq!(error.code(), Some(406));
    assert!(error.to_string().contains("\"unsupported queue type 'quorum'\""), "{error}");
}

#[test]
fn a_restart_keeps_what_is_in_a_quorum_queue_and_counts_what_was_out() {
    let broker = EmbeddedBroker::builder().quorum_queues(true).start().unwrap();
    let app = app(&broker.url(), "");
    let connection = app.publish_pool().connection().unwrap();
    let name = declare(&connection, "restarted", |queue| queue);
    connection.publish("", &name, coney::Message::new("1").transient()).unwrap();
    connection.publish("", &name, coney::Message::new("2").transient()).unwrap();
    let out = connection.get(&name).unwrap().expect("the first");
    broker.control().restart();
    drop(out);
    let app = support::app(&broker.url(), "");
    let connection = app.publish_pool().connection().unwrap();
    for (body, returns) in [("1", Some(FieldValue::I64(1))), ("2", None)] {
        let delivery = connection.get(&name).unwrap().expect(body);
        assert_eq!((delivery.message().text().unwrap(), count(&delivery)), (body, returns));
        delivery.ack().unwrap();
    }
}
