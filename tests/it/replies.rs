//! In which order a channel hears what follows from one method, and which mistakes end a connection.

use std::time::Duration;

use coney::{FieldValue, Message};

use crate::contract;
use crate::raw::{Raw, frame, long, method, publish, short};
use crate::support::{Broker, queue, unique, wait_until};

contract! {
    recover_ok_comes_before_what_is_delivered_again,
    commit_ok_comes_before_what_the_commit_delivers_again,
    returns_of_a_commit_come_before_commit_ok,
    a_channel_that_the_broker_has_closed_still_knows_what_may_follow_what,
    a_get_does_not_count_what_has_expired_behind_its_message,
    who_waits_for_an_answer_gets_it_once_however_often_it_is_addressed,
}

const CHANNEL_CLOSE: (u16, u16) = (20, 40);
const CHANNEL_CLOSE_OK: (u16, u16) = (20, 41);
const DELIVER: (u16, u16) = (60, 60);

/// The methods that come, until there have been so many deliveries.
fn until_deliveries(raw: &mut Raw, deliveries: usize) -> Vec<(u16, u16)> {
    let mut heard = Vec::new();
    while heard.iter().filter(|id| **id == DELIVER).count() < deliveries {
        let (kind, _, payload) = raw.frame().expect("the connection has ended");
        if kind == 1 {
            heard.push((u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]])));
        }
    }
    heard
}

/// A queue with three messages that its consumer has and has not acked.
fn three_unacked(raw: &mut Raw, what: &str) -> String {
    let name = unique(what);
    raw.declare(&name);
    (0..3).for_each(|_| raw.send(&publish(&name, 1, b"m")));
    wait_until("they are there", || raw.count(&name) == 3);
    raw.consume(&name, "c");
    until_deliveries(raw, 3);
    // The last body.
    while raw.frame().expect("the connection has ended").0 != 3 {}
    name
}

fn recover_ok_comes_before_what_is_delivered_again(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    three_unacked(&mut raw, "recovered");
    raw.say(1, (60, 110), &[1]);
    assert_eq!(until_deliveries(&mut raw, 3), [(60, 111), DELIVER, DELIVER, DELIVER]);
    raw.close_at_once();
}

fn commit_ok_comes_before_what_the_commit_delivers_again(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    three_unacked(&mut raw, "committed");
    raw.say(1, (90, 10), b"");
    assert_eq!(raw.method().0, (90, 11));
    // Tag 0 and multiple: all of them.
    raw.say(1, (60, 120), &[&[0; 8][..], &[0b11]].concat());
    raw.say(1, (90, 20), b"");
    assert_eq!(until_deliveries(&mut raw, 3), [(90, 21), DELIVER, DELIVER, DELIVER]);
    raw.close_at_once();
}

fn returns_of_a_commit_come_before_commit_ok(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    raw.say(1, (90, 10), b"");
    assert_eq!(raw.method().0, (90, 11));
    raw.send(&crate::raw::publish_mandatory(&unique("nowhere"), b"m"));
    raw.say(1, (90, 20), b"");
    assert_eq!(raw.method().0, (60, 50));
    assert_eq!((raw.frame().unwrap().0, raw.frame().unwrap().0), (2, 3));
    assert_eq!(raw.method().0, (90, 21));
    raw.close();
}

/// Whose channel 1 the broker has just closed.
fn with_a_closed_channel(broker: Broker) -> Raw {
    let mut raw = Raw::open(broker.addr());
    raw.say(1, (50, 10), &[&[0, 0][..], &short(&unique("none")), &[1], &long(b"")].concat());
    let (id, code, _) = raw.refusal();
    assert_eq!((id, code), (CHANNEL_CLOSE, 404));
    raw
}

fn a_channel_that_the_broker_has_closed_still_knows_what_may_follow_what(broker: Broker) {
    let whole = publish("q", 4, b"abcd");
    let begun = method(1, (60, 40), &[&[0, 0][..], &short(""), &short("q"), &[0]].concat());
    // Without its body.
    let half = &whole[..whole.len() - 12];
    let close = method(1, CHANNEL_CLOSE, &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
    let close_ok = method(1, CHANNEL_CLOSE_OK, b"");
    let open = method(1, (20, 10), &short(""));
    for (what, sent, code) in [
        ("a method where a header is due", [&begun[..], &close_ok].concat(), 505),
        ("the client's close where a header is due", [&begun[..], &close].concat(), 505),
        ("a method where a body is due", [half, &close_ok].concat(), 505),
        ("a header where a body is due", [half, &half[begun.len()..]].concat(), 505),
        ("a body where a method is due", whole[whole.len() - 12..].to_vec(), 505),
        ("a header where a method is due", half[begun.len()..].to_vec(), 505),
        ("an open", open.clone(), 504),
    ] {
        let mut raw = with_a_closed_channel(broker);
        raw.send(&sent);
        let (id, refused, text) = raw.refusal();
        assert_eq!((id, refused), ((10, 50), code), "{what}: {text}");
        raw.say(0, (10, 51), b"");
    }
    let mut raw = with_a_closed_channel(broker);
    raw.send(&[&whole[..], &close].concat());
    assert_eq!(raw.method().0, CHANNEL_CLOSE_OK, "the two have crossed");
    raw.send(&[&whole[..], &close_ok, &open].concat());
    assert_eq!(raw.method().0, (20, 11));
    raw.close();
}

fn a_get_does_not_count_what_has_expired_behind_its_message(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "counting");
    // What expires at the head of this one has expired in the other too.
    let beside = queue(&connection, "beside");
    connection.publish("", &name, "stays").unwrap();
    for _ in 0..3 {
        let short_lived = Message::new("goes").with_expiration(Duration::from_millis(1));
        let copies = FieldValue::Array(vec![FieldValue::String(beside.clone())]);
        connection.publish("", &name, short_lived.with_header("CC", copies)).unwrap();
    }
    connection.publish("", &name, "stays too").unwrap();
    wait_until("they have expired", || broker.queue_len(&beside) == 0);
    let first = connection.get_and_ack(&name).unwrap().expect("a message");
    assert_eq!((first.body(), first.remaining()), (&b"stays"[..], Some(1)));
}

fn who_waits_for_an_answer_gets_it_once_however_often_it_is_addressed(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let requests = queue(&connection, "requests");
    let mut raw = Raw::open(broker.addr());
    raw.consume_no_ack("amq.rabbitmq.reply-to");
    raw.send(&method(1, (60, 40), &[&[0, 0][..], &short(""), &short(&requests), &[0]].concat()));
    // The flag of reply-to, and what it is.
    let properties = [&[2, 0][..], &short("amq.rabbitmq.reply-to")].concat();
    raw.send(&frame(2, 1, &[&[0, 60, 0, 0][..], &[0; 8], &properties].concat()));
    wait_until("the request is there", || broker.queue_len(&requests) == 1);
    let request = connection.get_and_ack(&requests).unwrap().expect("the request");
    let address = request.message().reply_to().unwrap().to_owned();
    for (name, body) in [("CC", "first"), ("BCC", "second"), ("CC", "end")] {
        let again = FieldValue::Array(vec![FieldValue::String(address.clone()); 2]);
        // RabbitMQ says of every answer that it is routed nowhere.
        drop(connection.publish("", &address, Message::new(body).with_header(name, again)));
    }
    let mut answers = Vec::new();
    while answers.last().is_none_or(|last| last != b"end") {
        let (kind, _, payload) = raw.frame().expect("the connection has ended");
        if kind == 3 {
            answers.push(payload);
        }
    }
    assert_eq!(answers, [&b"first"[..], b"second", b"end"]);
    raw.close_at_once();
}
