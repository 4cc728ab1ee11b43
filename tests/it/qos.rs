//! A prefetch that several consumers share: what is free goes round.

use std::collections::HashMap;

use crate::contract;
use crate::raw::{Raw, publish};
use crate::support::{Broker, unique, wait_until};

contract! {
    two_consumers_of_a_queue_that_share_a_limit_are_served_in_turn,
    three_queues_whose_consumers_share_a_limit_are_all_served,
}

/// So many messages that a queue is not drained by chance before another is served.
const LONG: usize = 300;

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
    let names: Vec<String> = (0..3).map(|_| filled(&mut raw, "sharing", LONG)).collect();
    raw.limit(1, true);
    names.iter().for_each(|name| raw.consume(name, name));
    let mut served: HashMap<String, usize> = HashMap::new();
    // RabbitMQ chooses the queue at random, and not evenly: 2 of 60 have been seen.
    while !names.iter().all(|name| served.get(name).is_some_and(|served| *served >= 3)) {
        let (consumer, delivery) = raw.delivery();
        let count = served.entry(consumer).or_default();
        *count += 1;
        assert!(*count < LONG, "one was drained while another was not served: {served:?}");
        raw.ack(delivery);
    }
    raw.close_at_once();
}
