//! Bytes meant to do harm.

use std::io::Read;
use std::time::{Duration, Instant};

use super::super::EmbeddedBroker;
use super::raw::{Raw, framed};
use crate::amqp::cursor::{Field, Writer};
use crate::amqp::frame::{self, PROTOCOL_HEADER};
use crate::amqp::method::*;
use crate::amqp::value::{Table, Value};

#[test]
fn two_hundred_sockets_that_say_nothing_slow_nobody_down() {
    let broker = EmbeddedBroker::builder().handshake_timeout(Duration::from_secs(4)).start().unwrap();
    let began = Instant::now();
    let mut silent: Vec<Raw> = (0..200).map(|_| Raw::connect(broker.addr())).collect();
    for raw in silent.iter_mut().step_by(2) {
        raw.send(&PROTOCOL_HEADER[..1]);
    }
    let connecting = Instant::now();
    Raw::channel(broker.addr()).close();
    assert!(connecting.elapsed() < Duration::from_secs(3), "{:?}", connecting.elapsed());
    for raw in &mut silent {
        assert_eq!(raw.socket.read(&mut [0; 8]).unwrap_or(0), 0);
    }
    assert!((4..15).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
}

#[test]
fn frames_that_claim_too_much_or_do_not_end_are_refused() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::connect(broker.addr());
    raw.send(&PROTOCOL_HEADER);
    raw.method(0);
    raw.send(&[1, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    let text = "FRAME_ERROR - type 1, all octets = <<>>: {frame_too_large,4294967295,4088}";
    assert_eq!(raw.refused().1, text);
    raw.ended();

    let mut raw = Raw::channel(broker.addr());
    raw.send(&[3, 0, 1, 0, 2, 0, 9]);
    let text = "FRAME_ERROR - type 3, all octets = <<>>: {frame_too_large,131081,131064}";
    assert_eq!(raw.refused(), (501, text.into(), (0, 0)));
    raw.ended();

    // Eight more bytes than agreed are let pass, for clients that count the frame's own.
    let mut raw = Raw::channel(broker.addr());
    raw.send(&[3, 0, 1, 0, 2, 0, 0]);
    raw.send(&vec![0; 131_072]);
    raw.send(&[frame::FRAME_END]);
    assert_eq!(raw.refused().0, 505);

    let mut raw = Raw::channel(broker.addr());
    raw.send(&[1, 0, 1, 0, 0, 0, 4, 0, 90, 0, 10, 0]);
    let text = "FRAME_ERROR - type 1, all octets = <<0,90,0,10>>: {invalid_frame_end_marker,0}";
    assert_eq!(raw.refused(), (501, text.into(), (0, 0)));
    raw.ended();

    let mut raw = Raw::channel(broker.addr());
    raw.frame(7, 0, b"");
    assert_eq!(raw.refused().1, "FRAME_ERROR - type 7, all octets = <<>>: unknown_frame");

    let mut raw = Raw::channel(broker.addr());
    raw.frame(frame::HEARTBEAT, 0, b"x");
    assert_eq!(raw.refused().1, "FRAME_ERROR - type 8, all octets = <<\"x\">>: unknown_frame");

    let mut raw = Raw::channel(broker.addr());
    raw.frame(frame::METHOD, 1, b"\0\x3c\0\x1e\x02\xff\xfe\0");
    assert_eq!(raw.refused(), (501, "FRAME_ERROR - Malformed UTF-8 in shortstr".into(), (0, 0)));
}

/// `queue.declare` with these bytes for a table.
fn declare_with(table: &[u8]) -> Vec<u8> {
    let mut payload = vec![0, 50, 0, 10, 0, 0, 1, b'q', 0];
    payload.extend_from_slice(table);
    framed(frame::METHOD, 1, &payload)
}

fn bytes_of(table: &Table) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.write(&mut Writer::new(&mut bytes));
    bytes
}

#[test]
fn tables_that_cannot_be_read_end_the_connection_and_nothing_else() {
    let broker = EmbeddedBroker::start().unwrap();
    let nested = |levels: usize| {
        // From the inside out: a length, a name of no bytes, the tag, and again.
        let mut bytes = Vec::new();
        for level in 0..=levels {
            let len = ((levels - level) * 6) as u32;
            bytes.extend_from_slice(&len.to_be_bytes());
            if level < levels {
                bytes.extend_from_slice(&[0, b'F']);
            }
        }
        bytes
    };
    for table in [
        nested(129),
        nested(21_000),
        b"\xff\xff\xff\xff".to_vec(),
        b"\x00\x00\x00\x08\x01kS\x00\x00\x00\x09x".to_vec(),
        b"\x00\x00\x00\x03\x01kQ".to_vec(),
        b"\x00\x00\x00\x02\x09k".to_vec(),
    ] {
        let mut raw = Raw::channel(broker.addr());
        raw.send(&declare_with(&table));
        let (code, text, method) = raw.refused();
        assert_eq!((code, method), (501, (50, 10)));
        assert!(text.starts_with("FRAME_ERROR - cannot decode <<0,0,1,113,0,"), "{text}");
        raw.close_ok();
    }
    let mut raw = Raw::channel(broker.addr());
    raw.send(&declare_with(&nested(32)));
    assert!(matches!(raw.method(1), Method::QueueDeclareOk(_)));
    raw.say(1, BasicPublish { routing_key: "q".into(), ..Default::default() });
    raw.frame(frame::HEADER, 1, b"\x00\x3c\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\xff\xff\xff\xff");
    assert_eq!(raw.refused().0, 501);
    let mut raw = Raw::channel(broker.addr());
    let arguments = Table::default().with("anything", Value::LongString(vec![0xff, 0xfe]));
    raw.send(&declare_with(&bytes_of(&arguments)));
    assert!(matches!(raw.method(1), Method::QueueDeclareOk(_)));
    raw.close();
}

#[test]
fn random_sessions_end_and_the_broker_does_not() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut random = fastrand::Rng::with_seed(20);
    let all = Method::all();
    for _ in 0..300 {
        let mut raw = Raw::channel(broker.addr());
        let mut bytes = Vec::new();
        for _ in 0..random.usize(1..20) {
            match random.u8(..4) {
                0 => {
                    let payload: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
                    bytes.extend(framed(random.u8(1..4), random.u16(..3), &payload));
                }
                1 => frame::write_content(&mut bytes, 1, &[0, 0], b"body", 4096),
                _ => frame::write_method(&mut bytes, 1, &all[random.usize(..all.len())]),
            }
        }
        if random.bool() {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        // The broker may have closed before it has read everything.
        use std::io::Write;
        let _ = raw.socket.write_all(&bytes);
    }
    Raw::channel(broker.addr()).close();
    broker.control().wait_for_connections(0, Duration::from_secs(10)).unwrap();
}

#[test]
fn a_consumer_that_does_not_read_keeps_nobody_else_waiting() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut deaf = Raw::channel(broker.addr());
    deaf.declare("q");
    deaf.say(1, BasicConsume { queue: "q".into(), consumer_tag: "c".into(), no_ack: true, ..Default::default() });
    assert!(matches!(deaf.method(1), Method::BasicConsumeOk(_)));

    let mut raw = Raw::channel(broker.addr());
    raw.say(1, ConfirmSelect::default());
    raw.method(1);
    let mut slowest = Duration::ZERO;
    for _ in 0..400 {
        let began = Instant::now();
        raw.publish("q", &[0, 0], &[7; 100_000]);
        assert!(matches!(raw.method(1), Method::BasicAck(_)));
        slowest = slowest.max(began.elapsed());
    }
    // 40 MB, of which a few stay in the socket and in the outbox; the rest waits in the queue.
    raw.say(1, QueueDeclare { queue: "q".into(), passive: true, ..Default::default() });
    let Method::QueueDeclareOk(ok) = raw.method(1) else { panic!() };
    assert!(ok.message_count > 200, "{}", ok.message_count);
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    // Once it reads, it gets them all.
    let mut bodies = 0;
    while bodies < 400 {
        bodies += usize::from(deaf.next().unwrap().kind == frame::BODY);
    }
    deaf.close();
}
