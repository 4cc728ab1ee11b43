//! In which order a channel hears what follows from one method.

use crate::contract;
use crate::raw::{Raw, publish};
use crate::support::{Broker, unique, wait_until};

contract! {
    recover_ok_comes_before_what_is_delivered_again,
    commit_ok_comes_before_what_the_commit_delivers_again,
    returns_of_a_commit_come_before_commit_ok,
}

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
