//! A prefetch that several consumers share: what is free goes round.

use std::collections::HashMap;

use crate::contract;
use crate::raw::{Raw, publish};
use crate::support::{Broker, unique, wait_until};

contract! {
    two_consumers_of_a_queue_that_share_a_limit_are_served_in_turn,
    three_queues_whose_consumers_share_a_limit_are_all_served,
}

/// A queue with so many messages.
fn filled(raw: &mut Raw, what: &str, messages: usize) -> String {
    let name = unique(what);
    raw.declare(&name);
    (0..messages).for_each(|_| raw.send(&publish(&name, 1, b"m")));
    wait_until("they are there", || raw.count(&name) as usize == messages);
    name
}

fn two_consumers_of_a_queue_that_share_a_limit_are_served_in_turn(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let name = filled(&mut raw, "shared", 21);
    raw.limit(1, true);
    raw.consume(&name, "a");
    raw.consume(&name, "b");
    let mut served = Vec::new();
    for _ in 0..20 {
        let (consumer, delivery) = raw.delivery();
        served.push(consumer);
        raw.ack(delivery);
    }
    // The first may be served twice before the second has come.
    assert!(served[2..].windows(2).all(|pair| pair[0] != pair[1]), "{served:?}");
    raw.close_at_once();
}

fn three_queues_whose_consumers_share_a_limit_are_all_served(broker: Broker) {
    let mut raw = Raw::open(broker.addr());
    let names: Vec<String> = (0..3).map(|_| filled(&mut raw, "sharing", 61)).collect();
    raw.limit(1, true);
    names.iter().for_each(|name| raw.consume(name, name));
    let mut served: HashMap<String, usize> = HashMap::new();
    for _ in 0..60 {
        let (consumer, delivery) = raw.delivery();
        *served.entry(consumer).or_default() += 1;
        raw.ack(delivery);
    }
    // RabbitMQ chooses the queue at random: that one of three gets less than 4 of 60 comes once in a million times.
    assert!(names.iter().all(|name| served.get(name).is_some_and(|served| *served >= 4)), "{served:?}");
    raw.close_at_once();
}
