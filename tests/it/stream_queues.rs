//! Streams, as any client sees them: what can be declared and consumed, and what becomes of a message in one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coney::{Connection, FieldTable, FieldValue, ListenerState, Message, Offset, Queue};

use crate::contract;
use crate::raw::{Raw, long, method, publish, short};
use crate::support::{Broker, PATIENCE, unique, wait_until};

contract! {
    what_a_stream_cannot_have_is_refused_in_rabbitmqs_words,
    what_a_stream_may_have_is_accepted_and_compared,
    what_is_not_implemented_ends_the_connection,
    a_stream_is_deleted_whatever_is_in_it_and_its_consumers_are_cancelled,
    a_consumer_says_where_to_begin_in_integers_of_any_width,
    a_consumer_waits_for_an_offset_that_is_still_to_come,
    a_time_is_where_to_begin,
    an_ack_makes_room_for_one_more_message,
    a_stream_counts_its_messages_and_no_consumers,
    [by release:
        messages_do_not_expire_and_dead_letters_are_kept_since_4,
        another_type_than_it_has_is_refused,
        a_consumer_has_to_have_a_prefetch_and_to_acknowledge,
        what_a_consumer_of_a_stream_cannot_have_is_refused,
        a_rejection_is_refused_or_as_good_as_an_ack,
        not_all_properties_survive_in_a_stream,
        a_filter_is_for_4_alone,
    ]
}

const DURABLE: u8 = 2;
const EXCLUSIVE: u8 = 4;
const AUTO_DELETE: u8 = 8;

const NO_ACK: u8 = 2;

/// A value in a table, as it is on the wire.
#[derive(Debug, Clone)]
enum Is {
    Text(&'static str),
    Number(i64),
    Yes,
    Raw(Vec<u8>),
}

fn table(fields: &[(&str, Is)]) -> Vec<u8> {
    let field = |(name, value): &(&str, Is)| {
        let value = match value {
            Is::Text(text) => [&b"S"[..], &long(text.as_bytes())].concat(),
            Is::Number(number) => [&b"l"[..], &number.to_be_bytes()].concat(),
            Is::Yes => b"t\x01".to_vec(),
            Is::Raw(bytes) => bytes.clone(),
        };
        [short(name), value].concat()
    };
    fields.iter().map(field).collect::<Vec<_>>().concat()
}

/// The inside of a table with `x-queue-type = stream` and more.
fn arguments(more: &[(&str, Is)]) -> Vec<u8> {
    [table(&[("x-queue-type", Is::Text("stream"))]), table(more)].concat()
}

/// A stream with a name of its own, and what is said of it.
fn declare(raw: &mut Raw) -> (String, String) {
    let name = unique("log");
    raw.declare_with(&name, DURABLE, &arguments(&[]));
    assert_eq!(raw.method().0, (50, 11));
    let named = format!("queue '{name}' in vhost '/'");
    (name, named)
}

/// Publishes these bodies, each once the one before it is confirmed: so each is a chunk of its own.
fn fill(raw: &mut Raw, stream: &str, bodies: std::ops::Range<u64>) {
    raw.say(1, (85, 10), &[0]);
    assert_eq!(raw.method().0, (85, 11));
    for body in bodies {
        let body = body.to_string();
        raw.send(&publish(stream, body.len() as u64, body.as_bytes()));
        assert_eq!(raw.method().0, (60, 80));
    }
}

fn delete(raw: &mut Raw, stream: &str) {
    raw.say(1, (50, 40), &[&[0, 0][..], &short(stream), &[0]].concat());
    assert_eq!(raw.method().0, (50, 41));
}

/// A stream with the messages 0 to `count`, less one.
fn filled(broker: Broker, count: u64) -> (String, Raw) {
    let mut raw = Raw::open(broker.addr());
    let (name, _) = declare(&mut raw);
    fill(&mut raw, &name, 0..count);
    (name, raw)
}

/// Asks for a consumer. The answer is still to be read.
fn consume(raw: &mut Raw, stream: &str, flags: u8, with: &[(&str, Is)]) {
    let arguments = [&[0, 0][..], &short(stream), &short("c"), &[flags], &long(&table(with))].concat();
    raw.say(1, (60, 20), &arguments);
}

/// A connection that reads a stream from there.
fn reader(broker: Broker, stream: &str, prefetch: u16, offset: Is) -> Raw {
    let mut raw = Raw::open(broker.addr());
    raw.limit(prefetch, false);
    consume(&mut raw, stream, 0, &[("x-stream-offset", offset)]);
    assert_eq!(raw.method().0, (60, 21));
    raw
}

/// The delivery tag and the body, a number, of the delivery that must come next.
#[track_caller]
fn next(raw: &mut Raw) -> (u64, u64) {
    let (_, tag) = raw.delivery();
    let (kind, _, _) = raw.frame().unwrap();
    assert_eq!(kind, 2);
    let (kind, _, body) = raw.frame().unwrap();
    assert_eq!(kind, 3);
    (tag, String::from_utf8(body).unwrap().parse().unwrap())
}

#[track_caller]
fn expect(raw: &mut Raw, bodies: std::ops::Range<u64>) {
    for body in bodies {
        assert_eq!(next(raw).1, body);
    }
}

fn what_a_stream_cannot_have_is_refused_in_rabbitmqs_words(broker: Broker) {
    let kind = " of queue type rabbit_stream_queue";
    let of_others = [
        ("x-expires", Is::Number(1000)),
        ("x-message-ttl", Is::Number(-1)),
        ("x-dead-letter-exchange", Is::Text("")),
        ("x-dead-letter-routing-key", Is::Text("k")),
        ("x-dead-letter-strategy", Is::Text("at-most-once")),
        ("x-max-length", Is::Number(5)),
        ("x-max-in-memory-length", Is::Number(5)),
        ("x-max-in-memory-bytes", Is::Number(5)),
        ("x-max-priority", Is::Number(5)),
        ("x-overflow", Is::Text("drop-head")),
        ("x-queue-mode", Is::Text("lazy")),
        ("x-queue-version", Is::Number(2)),
        ("x-queue-master-locator", Is::Text("client-local")),
        ("x-single-active-consumer", Is::Yes),
        ("x-quorum-initial-group-size", Is::Number(1)),
        ("x-delivery-limit", Is::Number(1)),
    ];
    let values = [
        ("x-max-age", Is::Text("1x"), "invalid_max_age"),
        ("x-max-age", Is::Text("0s"), "invalid_max_age"),
        ("x-max-age", Is::Text("1.5h"), "invalid_max_age"),
        ("x-max-age", Is::Number(5), "{unacceptable_type,long}"),
        ("x-max-length-bytes", Is::Number(-1), "{value_negative,-1}"),
        ("x-stream-max-segment-size-bytes", Is::Number(-1), "{value_negative,-1}"),
        ("x-stream-max-segment-size-bytes", Is::Text("a"), "\"expected integer, got longstr\""),
        ("x-initial-cluster-size", Is::Number(0), "{value_zero,0}"),
        ("x-queue-leader-locator", Is::Text("nowhere"), "invalid_queue_locator_arg"),
    ];
    let of_others =
        of_others.map(|(name, value)| (DURABLE, vec![(name, value)], format!("invalid arg '{name}' for QUEUE{kind}")));
    let values = values
        .map(|(name, value, why)| (DURABLE, vec![(name, value)], format!("invalid arg '{name}' for QUEUE: {why}")));
    let properties = [
        (0, "non-durable"),
        (DURABLE | EXCLUSIVE, "exclusive-owner"),
        (DURABLE | AUTO_DELETE, "auto-delete"),
        (EXCLUSIVE | AUTO_DELETE, "auto-delete"),
    ]
    .map(|(flags, property)| (flags, Vec::new(), format!("invalid property '{property}' for QUEUE")));
    let large = ("x-stream-max-segment-size-bytes", Is::Number(3_000_000_001));
    let more = [
        (DURABLE, vec![large.clone()], "Exceeded max value for x-stream-max-segment-size-bytes".to_owned()),
        (0, vec![large], "invalid property 'non-durable' for QUEUE".to_owned()),
        (0, vec![("x-max-age", Is::Text("1x"))], "invalid arg 'x-max-age' for QUEUE: invalid_max_age".to_owned()),
    ];
    for (flags, more, text) in of_others.into_iter().chain(values).chain(properties).chain(more) {
        let mut raw = Raw::open(broker.addr());
        let name = unique("cannot");
        raw.declare_with(&name, flags, &arguments(&more));
        let text = text.replace("QUEUE", &format!("queue '{name}' in vhost '/'"));
        assert_eq!(raw.refusal(), ((20, 40), 406, format!("PRECONDITION_FAILED - {text}")), "{more:?}");
    }
    let mut raw = Raw::open(broker.addr());
    raw.declare_with("", 0, &arguments(&[("x-expires", Is::Number(1))]));
    let text = "PRECONDITION_FAILED - Cannot declare a server-named queue for type rabbit_stream_queue";
    assert_eq!(raw.refusal(), ((20, 40), 406, text.to_owned()));
}

fn what_a_stream_may_have_is_accepted_and_compared(broker: Broker) {
    for (argument, value, other, text) in [
        ("x-max-age", Is::Text("1h"), Some(Is::Text("60m")), "received '60m' but current is '1h'"),
        ("x-max-length-bytes", Is::Number(0), Some(Is::Number(1)), "received '1' but current is '0'"),
        (
            "x-stream-max-segment-size-bytes",
            Is::Number(3_000_000_000),
            Some(Is::Number(5)),
            "received '5' but current is '3000000000'",
        ),
        ("x-initial-cluster-size", Is::Number(1), Some(Is::Number(2)), "received '2' but current is '1'"),
        (
            "x-queue-leader-locator",
            Is::Text("balanced"),
            Some(Is::Text("client-local")),
            "received 'client-local' but current is 'balanced'",
        ),
        ("x-max-age", Is::Text("7D"), None, "received none but current is the value '7D' of type 'longstr'"),
    ] {
        let mut raw = Raw::open(broker.addr());
        let name = unique("may");
        for with in [&[(argument, value.clone())][..], &[(argument, value.clone()), ("x-expires", Is::Number(5))]] {
            raw.declare_with(&name, DURABLE, &arguments(with));
            assert_eq!(raw.method().0, (50, 11), "{argument} {value:?}");
        }
        let other: Vec<_> = other.into_iter().map(|other| (argument, other)).collect();
        raw.declare_with(&name, DURABLE, &arguments(&other));
        let text =
            format!("PRECONDITION_FAILED - inequivalent arg '{argument}' for queue '{name}' in vhost '/': {text}");
        assert_eq!(raw.refusal(), ((20, 40), 406, text));
        delete(&mut Raw::open(broker.addr()), &name);
    }
    let mut raw = Raw::open(broker.addr());
    let (name, named) = declare(&mut raw);
    raw.declare_with(&name, 0, &arguments(&[]));
    let text =
        format!("PRECONDITION_FAILED - inequivalent arg 'durable' for {named}: received 'false' but current is 'true'");
    assert_eq!(raw.refusal(), ((20, 40), 406, text));
    delete(&mut Raw::open(broker.addr()), &name);
}

fn another_type_than_it_has_is_refused(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = unique("type");
    connection.queue_declare(&Queue::new(&name).stream()).unwrap();
    let fails = |queue: Queue| connection.queue_declare(&queue).unwrap_err().to_string();
    let error = fails(Queue::new(&name));
    let difference = match broker.is_4() {
        false => "received none but current is the value 'stream' of type 'longstr'",
        true => "received 'classic' but current is 'stream'",
    };
    assert!(error.contains(difference), "{error}");
    let error = fails(Queue::new(&name).argument("x-queue-type", "classic"));
    assert!(error.contains("received 'classic' but current is 'stream'"), "{error}");
    connection.queue_delete(&name).unwrap();
    connection.queue_declare(&Queue::new(&name)).unwrap();
    let error = fails(Queue::new(&name).stream());
    let difference = match broker.is_4() {
        false => "received the value 'stream' of type 'longstr' but current is none",
        true => "received 'stream' but current is 'classic'",
    };
    assert!(error.contains(difference), "{error}");
    connection.queue_delete(&name).unwrap();
}

fn what_is_not_implemented_ends_the_connection(broker: Broker) {
    let (name, mut owner) = filled(broker, 1);
    let named = format!("queue '{name}' in vhost '/'");
    let refused = |asks: &dyn Fn(&mut Raw), text: String| {
        let mut raw = Raw::open(broker.addr());
        asks(&mut raw);
        assert_eq!(raw.refusal(), ((10, 50), 540, format!("NOT_IMPLEMENTED - {text}")));
    };
    for no_ack in [0, 1] {
        refused(
            &|raw| raw.say(1, (60, 70), &[&[0, 0][..], &short(&name), &[no_ack]].concat()),
            format!("basic.get not supported by stream queues {named}"),
        );
    }
    refused(
        &|raw| raw.say(1, (50, 30), &[&[0, 0][..], &short(&name), &[0]].concat()),
        format!("queue.purge not supported by stream queues {named}"),
    );
    refused(
        &|raw| {
            raw.limit(5, false);
            raw.limit(1, true);
            consume(raw, &name, 0, &[]);
        },
        format!("{named} does not support global qos"),
    );
    delete(&mut owner, &name);
}

fn a_stream_is_deleted_whatever_is_in_it_and_its_consumers_are_cancelled(broker: Broker) {
    let app = broker.app("");
    let (name, mut owner) = filled(broker, 3);
    let listener = app.listener(&name).offset(Offset::First).spawn(|_, _| {}).unwrap();
    wait_until("it has read all", || listener.stats().acked == 3);
    // If-unused and if-empty.
    owner.say(1, (50, 40), &[&[0, 0][..], &short(&name), &[3]].concat());
    let (id, count) = owner.method();
    assert_eq!((id, count), ((50, 41), vec![0; 4]));
    wait_until("it has lost its consumer", || matches!(listener.state(), ListenerState::Recovering { .. }));
    listener.stop().ok();
}

fn a_consumer_says_where_to_begin_in_integers_of_any_width(broker: Broker) {
    let (name, mut owner) = filled(broker, 5);
    for (bytes, first) in [
        (b"b\x03".to_vec(), 3),
        (b"B\x03".to_vec(), 3),
        (b"s\x00\x03".to_vec(), 3),
        (b"u\x00\x03".to_vec(), 3),
        (b"I\x00\x00\x00\x03".to_vec(), 3),
        (b"i\x00\x00\x00\x03".to_vec(), 3),
        (b"l\x00\x00\x00\x00\x00\x00\x00\x03".to_vec(), 3),
        (b"I\xff\xff\xff\xff".to_vec(), 0),
    ] {
        let mut raw = reader(broker, &name, 9, Is::Raw(bytes));
        expect(&mut raw, first..5);
    }
    for (text, first) in [("first", 0), ("last", 4), ("1h", 0), ("5m", 0), ("2Y", 0)] {
        expect(&mut reader(broker, &name, 9, Is::Text(text)), first..5);
    }
    for text in ["1x", "7 D", "3", "0s", "1.5h", "7d"] {
        let mut raw = Raw::open(broker.addr());
        // Where to begin comes before all else.
        consume(&mut raw, &name, NO_ACK, &[("x-stream-offset", Is::Text(text))]);
        let text = format!(
            "PRECONDITION_FAILED - invalid arg 'x-stream-offset' for queue '{name}' in vhost '/': \
             {{invalid_stream_offset_arg,{{longstr,<<\"{text}\">>}}}}"
        );
        assert_eq!(raw.refusal(), ((20, 40), 406, text));
    }
    delete(&mut owner, &name);
}

fn a_consumer_waits_for_an_offset_that_is_still_to_come(broker: Broker) {
    let (name, mut owner) = filled(broker, 2);
    let mut waits = reader(broker, &name, 9, Is::Number(4));
    let mut next_one = reader(broker, &name, 9, Is::Text("next"));
    // Without an offset it is the next one, too.
    let mut none = Raw::open(broker.addr());
    none.limit(9, false);
    consume(&mut none, &name, 0, &[]);
    assert_eq!(none.method().0, (60, 21));
    for body in 2..6 {
        owner.send(&publish(&name, 1, body.to_string().as_bytes()));
        assert_eq!(owner.method().0, (60, 80));
    }
    expect(&mut waits, 4..6);
    expect(&mut next_one, 2..6);
    expect(&mut none, 2..6);
    delete(&mut owner, &name);
}

fn a_time_is_where_to_begin(broker: Broker) {
    let (name, mut owner) = filled(broker, 3);
    let at = |time: SystemTime| {
        let seconds = time.duration_since(UNIX_EPOCH).unwrap().as_secs();
        Is::Raw([&b"T"[..], &seconds.to_be_bytes()].concat())
    };
    let day = Duration::from_secs(86_400);
    expect(&mut reader(broker, &name, 9, at(SystemTime::now() - day)), 0..3);
    let mut from_tomorrow = reader(broker, &name, 9, at(SystemTime::now() + day));
    owner.send(&publish(&name, 1, b"3"));
    assert_eq!(owner.method().0, (60, 80));
    // There is nothing of tomorrow, so it is what comes.
    expect(&mut from_tomorrow, 3..4);
    delete(&mut owner, &name);
}

fn a_consumer_has_to_have_a_prefetch_and_to_acknowledge(broker: Broker) {
    let (name, mut owner) = filled(broker, 1);
    let named = format!("queue '{name}' in vhost '/'");
    let (no_prefetch, no_acks) = match broker.is_4() {
        true => (format!("stream {named}"), format!("stream {named}")),
        false => (format!("'{named}'"), format!("stream queues {named}")),
    };
    let no_prefetch = format!("PRECONDITION_FAILED - consumer prefetch count is not set for {no_prefetch}");
    for flags in [0, NO_ACK] {
        let mut raw = Raw::open(broker.addr());
        consume(&mut raw, &name, flags, &[]);
        assert_eq!(raw.refusal(), ((20, 40), 406, no_prefetch.clone()));
    }
    let mut raw = Raw::open(broker.addr());
    raw.limit(5, false);
    consume(&mut raw, &name, NO_ACK, &[]);
    let text = format!("NOT_IMPLEMENTED - automatic acknowledgement not supported by {no_acks}");
    assert_eq!(raw.refusal(), ((10, 50), 540, text));
    delete(&mut owner, &name);
}

fn what_a_consumer_of_a_stream_cannot_have_is_refused(broker: Broker) {
    let (name, mut owner) = filled(broker, 1);
    let mut refused = vec![("x-priority", Is::Number(1)), ("x-priority", Is::Text("high"))];
    if !broker.is_4() {
        refused.push(("x-cancel-on-ha-failover", Is::Yes));
    }
    for (argument, value) in refused {
        let mut raw = Raw::open(broker.addr());
        consume(&mut raw, &name, NO_ACK, &[(argument, value)]);
        let text = format!(
            "PRECONDITION_FAILED - invalid arg '{argument}' for queue '{name}' in vhost '/' of queue type rabbit_stream_queue"
        );
        assert_eq!(raw.refusal(), ((20, 40), 406, text));
    }
    let mut accepted = vec![("x-something", Is::Yes)];
    if broker.is_4() {
        accepted.push(("x-cancel-on-ha-failover", Is::Yes));
    }
    for (argument, value) in accepted {
        let mut raw = Raw::open(broker.addr());
        raw.limit(5, false);
        consume(&mut raw, &name, 0, &[("x-stream-offset", Is::Text("first")), (argument, value)]);
        assert_eq!(raw.method().0, (60, 21));
        expect(&mut raw, 0..1);
    }
    // An exclusive consumer is one among others.
    let mut raw = Raw::open(broker.addr());
    raw.limit(5, false);
    consume(&mut raw, &name, 4, &[("x-stream-offset", Is::Text("first"))]);
    assert_eq!(raw.method().0, (60, 21));
    expect(&mut reader(broker, &name, 9, Is::Text("first")), 0..1);
    delete(&mut owner, &name);
}

fn an_ack_makes_room_for_one_more_message(broker: Broker) {
    let (name, mut owner) = filled(broker, 5);
    let mut raw = reader(broker, &name, 2, Is::Text("first"));
    assert_eq!([next(&mut raw), next(&mut raw)], [(1, 0), (2, 1)]);
    raw.ack(1);
    assert_eq!(next(&mut raw), (3, 2));
    // Both at once.
    raw.say(1, (60, 80), &[&3_u64.to_be_bytes()[..], &[1]].concat());
    assert_eq!([next(&mut raw), next(&mut raw)], [(4, 3), (5, 4)]);
    // It is gone from nobody else.
    expect(&mut reader(broker, &name, 9, Is::Text("first")), 0..5);
    delete(&mut owner, &name);
}

fn a_rejection_is_refused_or_as_good_as_an_ack(broker: Broker) {
    let (name, mut owner) = filled(broker, 5);
    let text = format!(
        "NOT_IMPLEMENTED - basic.nack and basic.reject not supported by stream queues queue '{name}' in vhost '/'"
    );
    for (requeue, rejects) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut raw = reader(broker, &name, 1, Is::Text("first"));
        assert_eq!(next(&mut raw), (1, 0));
        if rejects {
            raw.say(1, (60, 90), &[&1_u64.to_be_bytes()[..], &[u8::from(requeue)]].concat());
        } else {
            raw.nack(1, requeue);
        }
        if broker.is_4() {
            assert_eq!(next(&mut raw), (2, 1));
        } else {
            assert_eq!(raw.refusal(), ((10, 50), 540, text.clone()));
        }
    }
    let mut raw = reader(broker, &name, 1, Is::Text("first"));
    assert_eq!(next(&mut raw), (1, 0));
    raw.send(&method(1, (60, 110), &[1]));
    if broker.is_4() {
        // The answer comes before the delivery, or after it.
        assert_eq!(next(&mut raw), (2, 1));
    } else {
        assert_eq!(raw.refusal(), ((10, 50), 541, "INTERNAL_ERROR".to_owned()));
    }
    delete(&mut owner, &name);
}

fn a_stream_counts_its_messages_and_no_consumers(broker: Broker) {
    let (name, mut owner) = filled(broker, 5);
    let _reader = reader(broker, &name, 2, Is::Text("first"));
    // RabbitMQ counts now and then.
    wait_until("there are five", || owner.count(&name) == 5);
    wait_until("an operator sees them too", || broker.queue_len(&name) == 5);
    owner.declare_with(&name, DURABLE, &arguments(&[]));
    let (_, counts) = owner.method();
    assert_eq!(counts[counts.len() - 4..], [0; 4]);
    delete(&mut owner, &name);
}

/// What a listener is given of a stream, from its first message on.
fn read(broker: Broker, stream: &str, count: usize, filter: Option<&str>) -> Vec<Message> {
    let app = broker.app("");
    let (seen, got) = std::sync::mpsc::channel();
    let mut builder = app.listener(stream).offset(Offset::First);
    if let Some(filter) = filter {
        builder = builder.argument("x-stream-filter", filter);
    }
    let listener = builder.spawn(move |_, delivery| seen.send(delivery.message().clone()).unwrap()).unwrap();
    let messages = (0..count).map(|_| got.recv_timeout(PATIENCE).unwrap()).collect();
    listener.stop().unwrap();
    messages
}

fn stream(connection: &Connection, what: &str) -> String {
    let name = unique(what);
    connection.queue_declare(&Queue::new(&name).stream()).unwrap();
    name
}

fn not_all_properties_survive_in_a_stream(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = stream(&connection, "survive");
    let nested = || FieldValue::Array(vec![1.into()]);
    let mut sent = Message::new("all")
        .with_content_type("text/plain")
        .with_content_encoding("none")
        .with_correlation_id("c")
        .with_reply_to("r")
        .with_message_id("m")
        .with_kind("k")
        .with_app_id("a")
        .with_cluster_id("gone")
        .with_priority(3)
        .with_expiration(Duration::from_millis(1))
        .with_timestamp(UNIX_EPOCH + Duration::from_secs(7));
    for (header, value) in [
        ("text", FieldValue::from("t")),
        ("number", FieldValue::I32(-5)),
        ("truth", FieldValue::Bool(true)),
        ("nothing", FieldValue::Void),
        ("array", nested()),
        ("table", FieldValue::Table(FieldTable::new())),
        ("x-array", nested()),
        ("x-death", nested()),
    ] {
        sent = sent.with_header(header, value);
    }
    connection.publish("", &name, sent).unwrap();
    let message = read(broker, &name, 1, None).remove(0);
    let mut names: Vec<&str> = message.headers().keys().map(AsRef::as_ref).collect();
    names.sort_unstable();
    let mut kept = vec!["nothing", "number", "text", "truth", "x-stream-offset"];
    if broker.is_4() {
        kept.insert(4, "x-array");
    }
    assert_eq!(names, kept);
    assert_eq!(message.headers().get("number"), Some(&FieldValue::I32(-5)));
    assert_eq!(message.headers().get("x-stream-offset"), Some(&FieldValue::I64(0)));
    assert_eq!((message.cluster_id(), message.priority()), (None, Some(3)));
    assert_eq!((message.content_type(), message.content_encoding()), (Some("text/plain"), Some("none")));
    assert_eq!((message.correlation_id(), message.reply_to(), message.message_id()), (Some("c"), Some("r"), Some("m")));
    assert_eq!((message.kind(), message.app_id()), (Some("k"), Some("a")));
    assert_eq!(
        (message.expiration(), message.timestamp()),
        (Some(Duration::from_millis(1)), Some(UNIX_EPOCH + Duration::from_secs(7)))
    );
    connection.queue_delete(&name).unwrap();
}

fn a_filter_is_for_4_alone(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = stream(&connection, "filtered");
    for (body, colour) in
        [("a", Some("red")), ("b", Some("blue")), ("c", None), ("d", Some("red")), ("e", Some("blue"))]
    {
        let message = Message::new(body);
        let message = match colour {
            Some(colour) => message.with_header("x-stream-filter-value", colour),
            None => message,
        };
        connection.publish("", &name, message).unwrap();
    }
    let wanted = if broker.is_4() { vec!["b", "e"] } else { vec!["a", "b", "c", "d", "e"] };
    let messages = read(broker, &name, wanted.len(), Some("blue"));
    let bodies: Vec<&str> = messages.iter().map(|message| message.text().unwrap()).collect();
    assert_eq!(bodies, wanted);
    connection.queue_delete(&name).unwrap();
}

fn messages_do_not_expire_and_dead_letters_are_kept_since_4(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = stream(&connection, "kept");
    connection.publish("", &name, Message::new("short").with_expiration(Duration::from_millis(1)).transient()).unwrap();
    let classic = unique("dies");
    let queue = Queue::new(&classic).dead_letter_exchange("").dead_letter_routing_key(&name).max_length(0);
    connection.queue_declare(&queue).unwrap();
    connection.publish("", &classic, "dead").unwrap();
    wait_until("it is dead", || broker.queue_len(&classic) == 0);
    connection.publish("", &name, "last").unwrap();
    let wanted = if broker.is_4() { vec!["short", "dead", "last"] } else { vec!["short", "last"] };
    let bodies: Vec<String> =
        read(broker, &name, wanted.len(), None).iter().map(|message| message.text().unwrap().to_owned()).collect();
    assert_eq!(bodies, wanted);
    connection.queue_delete(&classic).unwrap();
    connection.queue_delete(&name).unwrap();
}
