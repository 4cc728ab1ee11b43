//! Channels, and messages that do not come as they should.

use std::time::Duration;

use super::super::EmbeddedBroker;
use super::raw::{Raw, framed, header};
use crate::amqp::frame;
use crate::amqp::method::*;

/// What a client does, the text it is refused with, and the class and method named.
type Offence<'a> = (&'a dyn Fn(&mut Raw), &'a str, (u16, u16));

fn publish_to(queue: &str) -> BasicPublish {
    BasicPublish { routing_key: queue.into(), ..Default::default() }
}

#[test]
fn frames_out_of_their_turn_end_the_connection() {
    let broker = EmbeddedBroker::start().unwrap();
    let no_header = "expected content header for class 60, got non content header frame instead";
    let no_body = "expected content body, got non content body frame instead";
    let cases: [Offence<'_>; 9] = [
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                // A weight, which there is not.
                raw.frame(frame::HEADER, 1, &[0, 60, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            },
            no_header,
            (60, 40),
        ),
        (
            &|raw| raw.frame(frame::HEADER, 1, &header(60, 0, &[0, 0])),
            "expected method frame, got non method frame instead",
            (0, 0),
        ),
        (&|raw| raw.frame(frame::BODY, 1, b"x"), "expected method frame, got non method frame instead", (0, 0)),
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                raw.say(1, TxSelect {});
            },
            no_header,
            (60, 40),
        ),
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                raw.frame(frame::BODY, 1, b"x");
            },
            no_header,
            (60, 40),
        ),
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                raw.frame(frame::HEADER, 1, &header(3106, 0, &[0, 0]));
            },
            "expected content header for class 60, got one for class 3106 instead",
            (60, 40),
        ),
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                raw.frame(frame::HEADER, 1, &header(60, 1, &[0, 0]));
                raw.say(1, TxSelect {});
            },
            no_body,
            (60, 40),
        ),
        (
            &|raw| {
                raw.say(1, publish_to("q"));
                raw.frame(frame::HEADER, 1, &header(60, 1, &[0, 0]));
                raw.frame(frame::HEADER, 1, &header(60, 1, &[0, 0]));
            },
            no_body,
            (60, 40),
        ),
        (&|raw| raw.frame(frame::HEARTBEAT, 1, b""), "type 8, all octets = <<>>", (0, 0)),
    ];
    for (commit, text, method) in cases {
        let mut raw = Raw::channel(broker.addr());
        commit(&mut raw);
        assert_eq!(raw.refused(), (505, format!("UNEXPECTED_FRAME - {text}"), method));
        raw.close_ok();
    }
}

#[test]
fn channels_are_opened_once_and_before_use() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::open(broker.addr());
    raw.say(1, TxSelect {});
    assert_eq!(raw.refused(), (504, "CHANNEL_ERROR - expected 'channel.open'".into(), (90, 10)));
    raw.close_ok();

    let mut raw = Raw::channel(broker.addr());
    raw.say(1, ChannelOpen::default());
    assert_eq!(raw.refused(), (504, "CHANNEL_ERROR - second 'channel.open' seen".into(), (20, 10)));

    let mut raw = Raw::open_with(broker.addr(), 1, 0);
    raw.open_channel(1);
    raw.say(2, ChannelOpen::default());
    let text = "NOT_ALLOWED - number of channels opened (1) has reached the negotiated channel_max (1)";
    assert_eq!(raw.refused(), (530, text.into(), (0, 0)));
}

#[test]
fn methods_that_are_the_brokers_to_say_are_refused() {
    let broker = EmbeddedBroker::start().unwrap();
    for method in Method::all() {
        let (class, id) = (method.class_id(), method.method_id());
        let from_broker = matches!(
            (class, id),
            (20, 11)
                | (30, 11)
                | (50, 11 | 21 | 31 | 41 | 51)
                | (60, 11 | 21 | 50 | 60 | 71 | 72 | 111)
                | (85, 11)
                | (90, 11 | 21 | 31)
        );
        if from_broker {
            let mut raw = Raw::channel(broker.addr());
            raw.say(1, method);
            assert_eq!(raw.refused(), (503, "COMMAND_INVALID - unimplemented method".into(), (class, id)));
        }
    }
}

#[test]
fn flow_cannot_be_stopped() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.say(1, ChannelFlow { active: true });
    assert_eq!(raw.method(1), ChannelFlowOk { active: true }.into());
    raw.say(1, ChannelFlow { active: false });
    assert_eq!(raw.refused(), (540, "NOT_IMPLEMENTED - active=false".into(), (20, 20)));
}

#[test]
fn a_closing_channel_ignores_everything_but_the_answer() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.say(1, BasicGet { queue: "absent".into(), ..Default::default() });
    let text = "NOT_FOUND - no queue 'absent' in vhost '/'";
    assert_eq!(raw.channel_refused(), (404, text.into(), (60, 70)));
    raw.say(1, BasicAck { delivery_tag: 99, multiple: false });
    raw.publish("q", &[0, 0], b"ignored");
    raw.say(1, QueueDeclare { queue: "q".into(), ..Default::default() });
    raw.say(1, ChannelCloseOk {});
    // The number is free again, and nothing of what was said has been done.
    raw.open_channel(1);
    raw.say(1, QueueDeclare { queue: "q".into(), passive: true, ..Default::default() });
    assert_eq!(raw.channel_refused().0, 404);
    // Closes that cross are both answered.
    raw.say(1, ChannelClose { reply_code: 200, ..Default::default() });
    assert_eq!(raw.method(1), ChannelCloseOk {}.into());
    raw.say(1, ChannelCloseOk {});
    raw.open_channel(1);
    raw.close();
}

#[test]
fn half_a_message_may_be_given_up_by_closing_the_channel_after_a_refusal() {
    let broker = EmbeddedBroker::builder().max_message_size(1000).start().unwrap();
    for size in [1001, 1 << 63, u64::MAX] {
        let mut raw = Raw::channel(broker.addr());
        raw.say(1, publish_to("q"));
        raw.frame(frame::HEADER, 1, &header(60, size, &[0, 0]));
        let text = format!("PRECONDITION_FAILED - message size {size} is larger than configured max size 1000");
        assert_eq!(raw.channel_refused(), (406, text, (60, 40)));
        raw.frame(frame::BODY, 1, &[0; 500]);
        raw.say(1, ChannelCloseOk {});
        raw.open_channel(1);
        raw.close();
    }
}

#[test]
fn a_body_longer_than_announced_ends_the_connection() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.declare("q");
    raw.say(1, publish_to("q"));
    raw.frame(frame::HEADER, 1, &header(60, 3, &[0, 0]));
    raw.frame(frame::BODY, 1, b"four");
    assert_eq!(raw.refused().0, 501);
    raw.close_ok();
}

#[test]
fn a_body_in_many_frames_comes_back_whole_and_an_empty_one_without_a_frame() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.declare("q");
    let body: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
    raw.say(1, publish_to("q"));
    raw.frame(frame::HEADER, 1, &header(60, body.len() as u64, &[0, 0]));
    raw.frame(frame::BODY, 1, b"");
    for part in body.chunks(7_777) {
        raw.frame(frame::BODY, 1, part);
    }
    raw.publish("q", &[0, 0], b"");
    raw.say(1, BasicGet { queue: "q".into(), no_ack: true, ..Default::default() });
    assert!(matches!(raw.method(1), Method::BasicGetOk(_)));
    assert_eq!(raw.next().unwrap().payload, header(60, 300_000, &[0, 0]));
    let mut came = Vec::new();
    while came.len() < body.len() {
        let part = raw.next().unwrap();
        assert!(part.payload.len() == 131_064 || came.len() + part.payload.len() == body.len());
        came.extend(part.payload);
    }
    assert!(came == body);
    raw.say(1, BasicGet { queue: "q".into(), no_ack: true, ..Default::default() });
    assert!(matches!(raw.method(1), Method::BasicGetOk(_)));
    assert_eq!(raw.next().unwrap().payload, header(60, 0, &[0, 0]));
    raw.close();
}

#[test]
fn what_a_killed_connection_has_not_acked_goes_to_another_consumer_in_order() {
    let broker = EmbeddedBroker::start().unwrap();
    let consume = || BasicConsume { queue: "q".into(), consumer_tag: "c".into(), no_wait: true, ..Default::default() };
    let deliveries = |raw: &mut Raw| -> Vec<(u64, bool, String)> {
        (0..100)
            .map(|_| {
                let Method::BasicDeliver(deliver) = raw.method(1) else { panic!() };
                raw.next().unwrap();
                let body = raw.next().unwrap().payload;
                (deliver.delivery_tag, deliver.redelivered, String::from_utf8(body).unwrap())
            })
            .collect()
    };
    let wanted = |redelivered| (0..100).map(|n| (n + 1, redelivered, n.to_string())).collect::<Vec<_>>();

    let mut killed = Raw::channel(broker.addr());
    let control = broker.control();
    let name = control.connections()[0].name.clone();
    killed.declare("q");
    (0..100).for_each(|n| killed.publish("q", &[0, 0], n.to_string().as_bytes()));
    killed.say(1, consume());
    assert_eq!(deliveries(&mut killed), wanted(false));
    let mut other = Raw::channel(broker.addr());
    other.say(1, consume());
    other.declare("another, so that the consumer is there");
    assert_eq!(control.drop_connection(&name), 1);
    assert_eq!(deliveries(&mut other), wanted(true));
    killed.ended();
    other.say(1, BasicAck { delivery_tag: 100, multiple: true });
    other.close();
    let mut raw = Raw::channel(broker.addr());
    raw.say(1, BasicGet { queue: "q".into(), ..Default::default() });
    assert_eq!(raw.method(1), BasicGetEmpty::default().into());
}

#[test]
fn header_values_come_back_byte_for_byte_even_if_they_are_no_text() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.declare("q");
    let properties = b"\x20\x00\x00\x00\x00\x09\x01kS\x00\x00\x00\x02\xff\xfe";
    raw.publish("q", properties, b"x");
    raw.say(1, BasicGet { queue: "q".into(), no_ack: true, ..Default::default() });
    raw.method(1);
    assert_eq!(raw.next().unwrap().payload, header(60, 1, properties));
    raw.next();
    raw.close();
}

#[test]
fn confirms_come_for_every_message_and_a_batch_needs_one_only() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut raw = Raw::channel(broker.addr());
    raw.declare("q");
    raw.say(1, ConfirmSelect::default());
    assert_eq!(raw.method(1), ConfirmSelectOk {}.into());
    let mut bytes = Vec::new();
    for _ in 0..1000 {
        frame::write_method(&mut bytes, 1, &publish_to("q").into());
        frame::write_content(&mut bytes, 1, &[0, 0], b"hello", 4096);
    }
    raw.send(&bytes);
    let (mut confirmed, mut acks) = (0, 0);
    while confirmed < 1000 {
        let Method::BasicAck(ack) = raw.method(1) else { panic!() };
        assert!(ack.delivery_tag == confirmed + 1 || (ack.multiple && ack.delivery_tag > confirmed), "{ack:?}");
        confirmed = ack.delivery_tag;
        acks += 1;
    }
    assert!(acks < 200, "{acks}");
    raw.close();
}

#[test]
fn a_blocked_publisher_waits_and_everybody_is_told() {
    let broker = EmbeddedBroker::start().unwrap();
    let control = broker.control();
    let mut raw = Raw::channel(broker.addr());
    let mut other = Raw::channel(broker.addr());
    raw.declare("q");
    raw.say(1, ConfirmSelect::default());
    raw.method(1);
    control.block_publishers("low on memory");
    assert_eq!(raw.method(0), ConnectionBlocked { reason: "low on memory".into() }.into());
    assert_eq!(other.method(0), ConnectionBlocked { reason: "low on memory".into() }.into());
    raw.publish("q", &[0, 0], b"x");
    other.say(1, QueueDeclare { queue: "q".into(), passive: true, ..Default::default() });
    let Method::QueueDeclareOk(ok) = other.method(1) else { panic!() };
    assert_eq!(ok.message_count, 0);
    // Who comes later hears of it when it publishes, and not on the heels of `open-ok`.
    let mut later = Raw::channel(broker.addr());
    later.publish("q", &[0, 0], b"y");
    assert_eq!(later.method(0), ConnectionBlocked { reason: "low on memory".into() }.into());
    control.unblock_publishers();
    assert_eq!(raw.method(0), ConnectionUnblocked {}.into());
    assert_eq!(raw.method(1), BasicAck { delivery_tag: 1, multiple: false }.into());
    assert_eq!(later.method(0), ConnectionUnblocked {}.into());
    later.close();

    control.block_publishers("low on disk");
    raw.method(0);
    raw.send(&framed(frame::METHOD, 1, &[0, 60, 0, 40, 0, 0, 0, 1, b'q', 0]));
    // A connection that waits for the end of the block can be dropped all the same.
    assert_eq!(control.drop_connections(), 2);
    control.wait_for_connections(0, Duration::from_secs(5)).unwrap();
    raw.ended();
}

#[test]
fn the_broker_can_close_channels_and_connections() {
    let broker = EmbeddedBroker::start().unwrap();
    let control = broker.control();
    let mut raw = Raw::channel(broker.addr());
    let name = control.connections()[0].name.clone();
    assert_eq!(control.close_channels(&name, Some(1), 406, "PRECONDITION_FAILED - test"), 1);
    assert_eq!(raw.channel_refused(), (406, "PRECONDITION_FAILED - test".into(), (0, 0)));
    raw.say(1, ChannelCloseOk {});
    raw.open_channel(1);
    assert_eq!(control.close_connection(&name, 320, "CONNECTION_FORCED - test"), 1);
    assert_eq!(raw.refused(), (320, "CONNECTION_FORCED - test".into(), (0, 0)));
    raw.close_ok();
    control.wait_for_connections(0, Duration::from_secs(5)).unwrap();

    control.refuse_connections(true);
    Raw::connect(broker.addr()).ended();
    control.refuse_connections(false);
    Raw::open(broker.addr()).close();

    control.refuse_next_opens(2, 320, "CONNECTION_FORCED - not yet");
    for _ in 0..2 {
        let (mut raw, tune) = Raw::log_in(broker.addr());
        raw.say(0, ConnectionTuneOk { channel_max: 1, frame_max: tune.frame_max, heartbeat: 0 });
        raw.say(0, ConnectionOpen { virtual_host: "/".into(), ..Default::default() });
        assert_eq!(raw.refused(), (320, "CONNECTION_FORCED - not yet".into(), (10, 40)));
        raw.close_ok();
    }
    Raw::open(broker.addr()).close();
}
