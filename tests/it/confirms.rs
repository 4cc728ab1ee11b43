//! Where confirms stand among the other frames of a channel.

use crate::contract;
use crate::raw::{Raw, long, method, publish, publish_mandatory, short};
use crate::support::{Broker, unique};

contract! {
    what_is_owed_is_confirmed_before_the_next_return,
    what_is_owed_is_confirmed_before_the_next_answer,
}

/// A channel in confirm mode.
fn confirming(broker: Broker) -> Raw {
    let mut raw = Raw::open(broker.addr());
    raw.say(1, (85, 10), &[0]);
    assert_eq!(raw.method().0, (85, 11));
    raw
}

/// The next frames that are methods: their names and, of confirms, up to which tag.
fn heard(raw: &mut Raw, until: &str) -> Vec<String> {
    let mut heard = Vec::new();
    while heard.last().is_none_or(|last| last != until) {
        let (kind, _, payload) = raw.frame().expect("the connection has ended");
        if kind != 1 {
            continue;
        }
        heard.push(match payload[..4] {
            [0, 60, 0, 80] => format!("ack {}", u64::from_be_bytes(*payload[4..].first_chunk().unwrap())),
            [0, 60, 0, 50] => "return".to_owned(),
            [0, 50, 0, 11] => "declare-ok".to_owned(),
            [0, 60, 0, 11] => "qos-ok".to_owned(),
            [0, 60, 0, 72] => "get-empty".to_owned(),
            [0, 20, 0, 41] => "close-ok".to_owned(),
            [0, 20, 0, 40] => "close".to_owned(),
            _ => format!("{:?}", &payload[..4]),
        });
    }
    heard
}

fn what_is_owed_is_confirmed_before_the_next_return(broker: Broker) {
    let nowhere = unique("nowhere");
    let (plain, mandatory) = (publish(&nowhere, 1, b"m"), publish_mandatory(&nowhere, b"m"));
    for (written, wanted) in [
        (vec![&plain, &mandatory], vec!["ack 1", "return", "ack 2"]),
        (vec![&mandatory, &mandatory], vec!["return", "ack 1", "return", "ack 2"]),
        (
            vec![&mandatory, &plain, &mandatory, &plain, &mandatory],
            vec!["return", "ack 2", "return", "ack 4", "return", "ack 5"],
        ),
    ] {
        let mut raw = confirming(broker);
        raw.send(&written.iter().flat_map(|bytes| bytes.to_vec()).collect::<Vec<_>>());
        let mut heard = heard(&mut raw, wanted[wanted.len() - 1]);
        // RabbitMQ confirms each by itself; the last before a return says it all.
        for at in (1..heard.len()).rev() {
            if heard[at].starts_with("ack") && heard[at - 1].starts_with("ack") {
                heard.remove(at - 1);
            }
        }
        assert_eq!(heard, wanted);
        raw.close();
    }
}

fn what_is_owed_is_confirmed_before_the_next_answer(broker: Broker) {
    let mut raw = confirming(broker);
    let (nowhere, queue) = (unique("nowhere"), unique("answers"));
    let declare = method(1, (50, 10), &[&[0, 0][..], &short(&queue), &[0], &long(b"")].concat());
    let limit = method(1, (60, 10), &[0, 0, 0, 0, 0, 5, 0]);
    let get = method(1, (60, 70), &[&[0, 0][..], &short(&queue), &[0]].concat());
    let missing = method(1, (50, 10), &[&[0, 0][..], &short(&nowhere), &[1], &long(b"")].concat());
    for (tag, answer, ask) in
        [(1, "declare-ok", &declare), (2, "qos-ok", &limit), (3, "get-empty", &get), (4, "close", &missing)]
    {
        raw.send(&[&publish(&nowhere, 1, b"m")[..], ask].concat());
        assert_eq!(heard(&mut raw, answer), [format!("ack {tag}"), answer.to_owned()]);
    }
    raw.close();
}
