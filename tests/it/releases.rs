//! In what the releases of RabbitMQ differ that the embedded broker can be, apart from dead letters and quorum queues.

use std::net::TcpStream;
use std::time::Duration;

use crate::contract;
use crate::raw::{FRAME_MAX, Raw, frame, long, method, short};
use crate::support::{Broker, unique, wait_until};

contract! {
    [by release:
        the_version_is_in_the_properties_that_clients_branch_on,
        an_exchange_type_that_there_is_not_costs_the_connection_or_the_channel,
        what_is_larger_than_a_message_may_be_is_refused,
        any_delivery_mode_is_taken_or_only_those_that_there_are,
        headers_come_as_they_were_sent_or_in_the_order_of_their_names,
        an_expiration_comes_as_it_was_written_or_as_the_number_it_is,
        what_comes_back_unroutable_is_written_as_what_is_delivered,
        arguments_of_consumers_come_and_go,
        a_classic_queue_has_a_leader_locator_or_refuses_it,
    ]
}

const HEADERS: u16 = 1 << 13;
const DELIVERY_MODE: u16 = 1 << 12;
const EXPIRATION: u16 = 1 << 8;
const MANDATORY: u8 = 1;

/// Publishes to a queue, with these flags and these values of properties.
fn publish(raw: &mut Raw, queue: &str, bits: u8, flags: u16, values: &[u8]) {
    raw.send(&method(1, (60, 40), &[&[0, 0][..], &short(""), &short(queue), &[bits]].concat()));
    raw.send(&frame(2, 1, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1][..], &flags.to_be_bytes(), values].concat()));
    raw.send(&frame(3, 1, b"m"));
}

/// Flags and values of the properties in the content that must come next, behind its method.
fn properties(raw: &mut Raw) -> (u16, Vec<u8>) {
    let (kind, _, header) = raw.frame().expect("a content header");
    assert_eq!((kind, raw.frame().expect("a body").2), (2, b"m".to_vec()));
    let (flags, values) = header[12..].split_first_chunk::<2>().unwrap();
    (u16::from_be_bytes(*flags), values.to_vec())
}

/// The same of the message that `basic.get` finds, or why it finds none.
fn get(raw: &mut Raw, queue: &str) -> Result<(u16, Vec<u8>), String> {
    raw.say(1, (60, 70), &[&[0, 0][..], &short(queue), &[1]].concat());
    match raw.method() {
        ((60, 71), _) => Ok(properties(raw)),
        (_, arguments) => Err(String::from_utf8_lossy(&arguments).into_owned()),
    }
}

fn the_version_is_in_the_properties_that_clients_branch_on(broker: Broker) {
    let mut raw = Raw { socket: TcpStream::connect(broker.addr()).unwrap() };
    raw.socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    raw.send(b"AMQP\x00\x00\x09\x01");
    let (start, arguments) = raw.method();
    assert_eq!(start, (10, 10));
    let is_there = |version: &str| {
        let field = [&short("version")[..], b"S", &long(version.as_bytes())].concat();
        arguments.windows(field.len()).any(|part| part == field)
    };
    // Whichever patch of the release it is.
    let release = if broker.is_4() { "4.0" } else { "3.10" };
    let is_release = (0..30).any(|patch| is_there(&format!("{release}.{patch}")));
    assert!(is_release, "not a {release}: {}", String::from_utf8_lossy(&arguments));
}

fn an_exchange_type_that_there_is_not_costs_the_connection_or_the_channel(broker: Broker) {
    for (kind, text) in [("x-coney", "unknown exchange type 'x-coney'"), ("", "invalid exchange type ''")] {
        let mut raw = Raw::open(broker.addr());
        raw.say(1, (40, 10), &[&[0, 0][..], &short("x"), &short(kind), &[0], &long(b"")].concat());
        let wanted = match broker.is_4() {
            true => ((20, 40), 406, format!("PRECONDITION_FAILED - {text}")),
            false => ((10, 50), 503, format!("COMMAND_INVALID - {text}")),
        };
        assert_eq!(raw.refusal(), wanted);
    }
}

fn what_is_larger_than_a_message_may_be_is_refused(broker: Broker) {
    let most: u64 = if broker.is_4() { 16_777_216 } else { 134_217_728 };
    let sizes = [most, most + 1].map(|size| (size, size > most));
    // The larger limit is not tried to the full.
    for (size, is_refused) in if broker.is_4() { sizes } else { [(16_777_216, false), (16_777_217, false)] } {
        let mut raw = Raw::open(broker.addr());
        let name = unique("large");
        raw.declare(&name);
        let mut left = usize::try_from(size).unwrap();
        raw.send(&crate::raw::publish(&name, size, b""));
        while left > 0 {
            let part = left.min(FRAME_MAX as usize - 8);
            raw.send(&frame(3, 1, &vec![0; part]));
            left -= part;
        }
        if is_refused {
            let text = format!("message size {size} is larger than configured max size {most}");
            assert_eq!(raw.refusal(), ((20, 40), 406, format!("PRECONDITION_FAILED - {text}")));
        } else {
            wait_until("the message is there", || raw.count(&name) == 1);
        }
        raw.close_at_once();
    }
}

fn any_delivery_mode_is_taken_or_only_those_that_there_are(broker: Broker) {
    for mode in [0, 3, 255] {
        let mut raw = Raw::open(broker.addr());
        let name = unique("mode");
        raw.declare(&name);
        publish(&mut raw, &name, 0, DELIVERY_MODE, &[mode]);
        if broker.is_4() {
            assert_eq!(get(&mut raw, &name), Ok((DELIVERY_MODE, vec![mode])));
        } else {
            let text = format!("PRECONDITION_FAILED - invalid message: {{delivery_mode_unknown,{mode}}}");
            assert_eq!(raw.refusal(), ((20, 40), 406, text));
        }
    }
}

/// Headers as a table of bytes: out of order, one of them twice, and an integer of the type that others write in another way.
fn sent() -> Vec<u8> {
    long(&[&b"\x01zV\x01at\x05\x01bL"[..], &7_i64.to_be_bytes(), b"\x01aV\x01ZV"].concat())
}

/// The same in the order of the names, the first of each alone.
fn sorted() -> Vec<u8> {
    long(&[&b"\x01ZV\x01at\x01\x01bl"[..], &7_i64.to_be_bytes(), b"\x01zV"].concat())
}

fn headers_come_as_they_were_sent_or_in_the_order_of_their_names(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("headers");
    raw.declare(&name);
    publish(&mut raw, &name, 0, HEADERS, &sent());
    assert_eq!(get(&mut raw, &name), Ok((HEADERS, if broker.is_4() { sorted() } else { sent() })));
    // What is inside of a value stays in its order.
    let inner = [&b"\x01zV\x01yL"[..], &7_i64.to_be_bytes(), b"\x01zV"].concat();
    publish(&mut raw, &name, 0, HEADERS, &long(&[&b"\x01FF"[..], &long(&inner)].concat()));
    let rewritten = [&b"\x01zV\x01yl"[..], &7_i64.to_be_bytes(), b"\x01zV"].concat();
    let inner = if broker.is_4() { rewritten } else { inner };
    assert_eq!(get(&mut raw, &name), Ok((HEADERS, long(&[&b"\x01FF"[..], &long(&inner)].concat()))));
    raw.close();
}

fn an_expiration_comes_as_it_was_written_or_as_the_number_it_is(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = unique("expiration");
    raw.declare(&name);
    for written in ["0060000", "+60000", "60000"] {
        publish(&mut raw, &name, 0, EXPIRATION, &short(written));
        let comes = if broker.is_4() { "60000" } else { written };
        assert_eq!(get(&mut raw, &name), Ok((EXPIRATION, short(comes))));
    }
    raw.close();
}

fn what_comes_back_unroutable_is_written_as_what_is_delivered(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    publish(&mut raw, &unique("nowhere"), MANDATORY, HEADERS, &sent());
    assert_eq!(raw.method().0, (60, 50));
    assert_eq!(properties(&mut raw), (HEADERS, if broker.is_4() { sorted() } else { sent() }));
    raw.close();
}

fn arguments_of_consumers_come_and_go(broker: Broker) {
    let name = unique("arguments");
    let mut owner = Raw::open(broker.addr());
    owner.declare(&name);
    let of_stream = " of queue type rabbit_classic_queue";
    for (argument, value, old, new) in [
        ("x-cancel-on-ha-failover", &b"I\0\0\0\x01"[..], Some(": {unacceptable_type,signedint}"), None),
        ("x-cancel-on-ha-failover", b"t\x01", None, None),
        ("x-stream-filter", b"S\0\0\0\x01a", None, Some(of_stream)),
        ("x-stream-match-unfiltered", b"t\x01", None, Some(of_stream)),
        ("x-stream-offset", b"S\0\0\0\x05first", Some(of_stream), Some(of_stream)),
    ] {
        let mut raw = Raw::open(broker.addr());
        let table = long(&[&short(argument)[..], value].concat());
        raw.say(1, (60, 20), &[&[0, 0][..], &short(&name), &short("c"), &[0], &table].concat());
        match if broker.is_4() { new } else { old } {
            Some(why) => {
                let text =
                    format!("PRECONDITION_FAILED - invalid arg '{argument}' for queue '{name}' in vhost '/'{why}");
                assert_eq!(raw.refusal(), ((20, 40), 406, text));
            }
            None => assert_eq!(raw.method().0, (60, 21), "{argument}"),
        }
    }
}

fn a_classic_queue_has_a_leader_locator_or_refuses_it(broker: Broker) {
    let argument = |value: &[u8]| [&short("x-queue-leader-locator")[..], b"S", &long(value)].concat();
    let refusal = |queue: &str, why: &str| {
        let arg = format!("invalid arg 'x-queue-leader-locator' for queue '{queue}' in vhost '/'");
        ((20, 40), 406, format!("PRECONDITION_FAILED - {arg}{why}"))
    };
    let (mut raw, name) = (Raw::open(broker.addr()), unique("locator"));
    raw.declare_with(&name, 0, &argument(b"balanced"));
    if !broker.is_4() {
        assert_eq!(raw.refusal(), refusal(&name, " of queue type rabbit_classic_queue"));
        return;
    }
    assert_eq!(raw.method().0, (50, 11));
    raw.declare_with(&name, 0, b"");
    let text = format!(
        "PRECONDITION_FAILED - inequivalent arg 'x-queue-leader-locator' for queue '{name}' in vhost '/': received none but \
         current is the value 'balanced' of type 'longstr'"
    );
    assert_eq!(raw.refusal(), ((20, 40), 406, text));
    let (mut raw, name) = (Raw::open(broker.addr()), unique("locator"));
    raw.declare_with(&name, 0, &argument(b"nowhere"));
    assert_eq!(raw.refusal(), refusal(&name, ": invalid_queue_locator_arg"));
}
