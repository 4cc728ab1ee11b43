//! From the protocol header to an open connection.

use std::io::Read;
use std::time::{Duration, Instant};

use super::super::{EmbeddedBroker, Release};
use super::raw::{Raw, framed, start_ok};
use crate::amqp::frame::{self, PROTOCOL_HEADER};
use crate::amqp::method::*;
use crate::amqp::value::{Table, Value};

#[test]
fn the_greeting_is_that_of_rabbitmq() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::connect(broker.addr());
    raw.send(&PROTOCOL_HEADER);
    let Method::ConnectionStart(start) = raw.method(0) else { panic!() };
    assert_eq!((start.version_major, start.version_minor), (0, 9));
    assert_eq!(start.mechanisms, b"PLAIN AMQPLAIN");
    assert_eq!(start.server_properties.get("product"), Some(&Value::text("RabbitMQ")));
    let Some(Value::Table(capabilities)) = start.server_properties.get("capabilities") else { panic!() };
    assert_eq!(capabilities.0.len(), 9);

    let (raw, tune) = Raw::log_in(broker.addr());
    assert_eq!(tune, ConnectionTune { channel_max: 2047, frame_max: 131_072, heartbeat: 60 });
    drop(raw);
    Raw::channel(broker.addr()).close();
}

#[test]
fn zero_nine_is_taken_as_zero_nine_one() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::connect(broker.addr());
    raw.send(b"AMQP\x01\x01\x00\x09");
    assert!(matches!(raw.method(0), Method::ConnectionStart(_)));
}

#[test]
fn what_is_not_amqp_gets_the_header_and_the_end() {
    for (release, wanted) in [(Release::V3_10, PROTOCOL_HEADER), (Release::V4_0, *b"AMQP\x03\x01\x00\x00")] {
        let broker = EmbeddedBroker::builder().release(release).start().unwrap();
        for hello in [&b"HTTP/1.1"[..], b"\x9f\x03q!zz\xff\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"] {
            let mut raw = Raw::connect(broker.addr());
            raw.send(hello);
            let mut answer = Vec::new();
            // Bytes behind the first eight may turn the end into a reset.
            let _ = raw.socket.read_to_end(&mut answer);
            assert_eq!(answer, wanted, "{release} {hello:?}");
        }
    }
}

#[test]
fn both_mechanisms_log_in() {
    let broker = EmbeddedBroker::builder().user("ada", "secret").start().unwrap();
    let mut table = Vec::new();
    let login = Table::default().with("LOGIN", Value::text("ada")).with("PASSWORD", Value::text("secret"));
    crate::amqp::cursor::Field::write(&login, &mut crate::amqp::cursor::Writer::new(&mut table));
    for (mechanism, response) in [("PLAIN", &b"\0ada\0secret"[..]), ("AMQPLAIN", &table[4..])] {
        let mut raw = Raw::connect(broker.addr());
        raw.send(&PROTOCOL_HEADER);
        raw.method(0);
        raw.say(0, start_ok(mechanism, response, true));
        assert!(matches!(raw.method(0), Method::ConnectionTune(_)), "{mechanism}");
    }
}

#[test]
fn a_hundred_wrong_logins_are_told_nothing_but_no() {
    let broker = EmbeddedBroker::start().unwrap();
    for round in 0..100 {
        let mut raw = Raw::connect(broker.addr());
        raw.send(&PROTOCOL_HEADER);
        raw.method(0);
        let (mechanism, response): (_, &[u8]) = match round % 3 {
            0 => ("PLAIN", b"\0guest\0wrong"),
            1 => ("PLAIN", b"\0nobody\0guest"),
            _ => ("AMQPLAIN", b"\x05LOGINS\x00\x00\x00\x05guest\x08PASSWORDS\x00\x00\x00\x05wrong"),
        };
        raw.say(0, start_ok(mechanism, response, true));
        let text = format!(
            "ACCESS_REFUSED - Login was refused using authentication mechanism {mechanism}. For details see the broker \
             logfile."
        );
        assert_eq!(raw.refused(), (403, text, (0, 0)));
        raw.close_ok();
    }
    assert_eq!(broker.control().connections(), []);
    Raw::open(broker.addr()).close();
}

#[test]
fn credentials_that_cannot_be_read_are_not_repeated() {
    let broker = EmbeddedBroker::start().unwrap();
    for (mechanism, response) in [
        ("PLAIN", &b"\0guest\0gu\0est"[..]),
        ("PLAIN", b"guest"),
        ("PLAIN", b""),
        ("AMQPLAIN", b"\x05LOGINS\xff\xff\xff\xffguest"),
        ("AMQPLAIN", b"guest"),
    ] {
        let mut raw = Raw::connect(broker.addr());
        raw.send(&PROTOCOL_HEADER);
        raw.method(0);
        raw.say(0, start_ok(mechanism, response, true));
        let (code, text, _) = raw.refused();
        assert_eq!(code, 502);
        assert!(text.starts_with("SYNTAX_ERROR - response ") && !text.contains("guest"), "{text}");
    }
    let mut raw = Raw::connect(broker.addr());
    raw.send(&PROTOCOL_HEADER);
    raw.method(0);
    raw.say(0, start_ok("EXTERNAL", b"", true));
    assert_eq!(raw.refused().1, "COMMAND_INVALID - unknown authentication mechanism 'EXTERNAL'");
}

#[test]
fn a_client_that_cannot_be_told_is_closed_after_a_while() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::connect(broker.addr());
    raw.send(&PROTOCOL_HEADER);
    raw.method(0);
    let began = Instant::now();
    raw.say(0, start_ok("PLAIN", b"\0guest\0wrong", false));
    raw.ended();
    assert!((2..5).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
}

#[test]
fn limits_that_were_not_offered_are_refused() {
    let broker = EmbeddedBroker::start().unwrap();
    for (channel_max, frame_max, text) in [
        (2047, 100, "negotiated frame_max = 100 is lower than the minimum allowed value (4096)"),
        (2047, 131_073, "negotiated frame_max = 131073 is higher than the maximum allowed value (131072)"),
        (2047, 0, "negotiated frame_max = 0 is higher than the maximum allowed value (131072)"),
        (0, 4096, "negotiated channel_max = 0 (no limit) is higher than the maximum allowed value (2047)"),
        (2048, 4096, "negotiated channel_max = 2048 is higher than the maximum allowed value (2047)"),
    ] {
        let (mut raw, _) = Raw::log_in(broker.addr());
        raw.say(0, ConnectionTuneOk { channel_max, frame_max, heartbeat: 0 });
        assert_eq!(raw.refused(), (530, format!("NOT_ALLOWED - {text}"), (10, 30)));
        raw.close_ok();
    }
}

#[test]
fn a_virtual_host_has_to_be_there_and_to_be_the_users() {
    let broker = EmbeddedBroker::builder().vhost("/v").permissions("guest", "/", ".*", ".*", ".*").start().unwrap();
    for (vhost, text) in [("nope", "vhost nope not found"), ("/v", "access to vhost '/v' refused for user 'guest'")] {
        let (mut raw, _) = Raw::log_in(broker.addr());
        raw.say(0, ConnectionTuneOk { channel_max: 1, frame_max: 4096, heartbeat: 0 });
        raw.say(0, ConnectionOpen { virtual_host: vhost.into(), ..Default::default() });
        assert_eq!(raw.refused(), (530, format!("NOT_ALLOWED - {text}"), (10, 40)));
        raw.close_ok();
    }
}

#[test]
fn methods_out_of_turn_are_refused() {
    let broker = EmbeddedBroker::start().unwrap();
    let (mut raw, tune) = Raw::log_in(broker.addr());
    raw.say(0, ConnectionTuneOk { channel_max: 1, frame_max: tune.frame_max, heartbeat: 0 });
    raw.say(0, ConnectionSecureOk::default());
    let text = "CHANNEL_ERROR - unexpected method in connection state opening";
    assert_eq!(raw.refused(), (504, text.into(), (10, 21)));

    let mut raw = Raw::open(broker.addr());
    raw.say(0, ConnectionTuneOk::default());
    let text = "CHANNEL_ERROR - unexpected method in connection state running";
    assert_eq!(raw.refused(), (504, text.into(), (10, 31)));
    raw.close_ok();
}

#[test]
fn a_silent_client_is_dropped_and_a_beating_one_is_not() {
    let broker = EmbeddedBroker::start().unwrap();
    let addr = broker.addr();
    let mut beating = Raw::open_with(addr, 1, 1);
    let mut silent = Raw::open_with(addr, 1, 1);
    let began = Instant::now();
    let ended = std::thread::spawn(move || {
        let mut beats = 0;
        while let Some(came) = silent.next() {
            assert_eq!((came.kind, came.channel), (frame::HEARTBEAT, 0));
            beats += 1;
        }
        (began.elapsed(), beats)
    });
    // Answers each of the broker's heartbeats, of which there are two in a second.
    while began.elapsed() < Duration::from_millis(3500) {
        assert_eq!(beating.next().unwrap().kind, frame::HEARTBEAT);
        beating.send(&framed(frame::HEARTBEAT, 0, b""));
    }
    let (after, beats) = ended.join().unwrap();
    assert!((2..3).contains(&after.as_secs()), "{after:?}");
    assert!(beats >= 2);
    broker.control().wait_for_connections(1, Duration::from_secs(1)).unwrap();
}
