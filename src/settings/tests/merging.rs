//! A profile's topology over that of the file.

use super::mistakes_of;
use crate::settings::Settings;
use crate::topology::{Binding, Exchange, Partitioned, Queue, Topology};

const FILE: &str = r##"
    [[topology.exchanges]]
    name = "room"
    kind = "topic"
    [[topology.exchanges]]
    name = "other"
    kind = "fanout"
    [[topology.queues]]
    name = "orders"
    arguments = { x-message-ttl = 1000 }
    [[topology.queues]]
    name = "letters"
    durable = false
    [[topology.bindings]]
    exchange = "room"
    queue = "orders"
    routing_key = "order.#"
    [[topology.bindings]]
    exchange = "room"
    queue = "letters"
    [[topology.bindings]]
    exchange = "other"
    destination_exchange = "room"
"##;

fn topology(profile: &str) -> Topology {
    let loader = Settings::loader().text(format!("{FILE}{profile}")).profile("p");
    loader.load().unwrap_or_else(|error| panic!("{error}")).topology
}

fn file() -> Topology {
    Topology::new()
        .exchange(Exchange::topic("room"))
        .exchange(Exchange::fanout("other"))
        .queue(Queue::new("orders").argument("x-message-ttl", 1000_i64))
        .queue(Queue::new("letters").durable(false))
        .bind(Binding::queue("orders").to("room").routing_key("order.#"))
        .bind(Binding::queue("letters").to("room"))
        .bind(Binding::exchange("room").to("other"))
}

#[test]
fn a_profile_says_of_a_queue_what_is_different_and_no_more() {
    let profile = r##"
        [[profiles.p.topology.queues]]
        name = "orders"
        arguments = { x-queue-type = "quorum" }
        [[profiles.p.topology.exchanges]]
        name = "other"
        durable = false
    "##;
    let mut expected = file();
    expected.queues[0] = expected.queues[0].clone().quorum();
    expected.exchanges[1].durable = false;
    assert_eq!(topology(profile), expected, "kind and time-to-live are those of the file");
    assert_eq!(topology("[profiles.p.broker]\nvhost = 'v'"), file());
}

#[test]
fn a_profile_adds_and_takes_out() {
    let profile = r##"
        [[profiles.p.topology.queues]]
        name = "audit"
        [[profiles.p.topology.queues]]
        name = "letters"
        remove = true
        [[profiles.p.topology.bindings]]
        exchange = "room"
        queue = "audit"
        routing_key = "#"
        [[profiles.p.topology.bindings]]
        exchange = "room"
        queue = "orders"
        routing_key = "order.#"
        remove = true
        [[profiles.p.topology.bindings]]
        exchange = "room"
        queue = "orders"
        routing_key = "rush.#"
    "##;
    let read = topology(profile);
    let names: Vec<&str> = read.queues.iter().map(|queue| queue.name.as_str()).collect();
    assert_eq!(names, ["orders", "audit"]);
    let expected = [
        Binding::exchange("room").to("other"),
        Binding::queue("audit").to("room").routing_key("#"),
        Binding::queue("orders").to("room").routing_key("rush.#"),
    ];
    assert_eq!(read.bindings, expected, "a queue that is taken out takes its bindings along");
    let without = topology("[[profiles.p.topology.exchanges]]\nname = 'other'\nremove = true");
    assert_eq!((without.exchanges.len(), without.bindings.len()), (1, 2));
    // Taken out and written anew, nothing of the file's is left.
    let anew = r##"
        [[profiles.p.topology.queues]]
        name = "orders"
        remove = true
        [[profiles.p.topology.queues]]
        name = "orders"
    "##;
    assert_eq!(topology(anew).queues, [Queue::new("letters").durable(false), Queue::new("orders")]);
}

#[test]
fn mistakes_are_told_where_they_are_written() {
    let told = |profile: &str| {
        let error = mistakes_of(Settings::loader().text(format!("{FILE}{profile}")).profile("p"));
        let told: Vec<String> =
            error.problems.iter().map(|problem| format!("{}: {}", problem.key, problem.problem)).collect();
        assert_eq!(told.len(), 1, "{told:?}");
        told[0].clone()
    };
    let one = |profile: &str, key: &str, part: &str| {
        let told = told(profile);
        assert!(told.starts_with(&format!("{key}: ")) && told.contains(part), "{told}");
    };
    let queues = "[[profiles.p.topology.queues]]\nname = 'orders'\n";
    one(&format!("{queues}durabel = false"), "profiles.p.topology.queues[0].durabel", "did you mean durable?");
    one(&format!("{queues}remove = 'yes'"), "profiles.p.topology.queues[0].remove", "expected true or false");
    one(
        "[[profiles.p.topology.queues]]\nname = 'gone'\nremove = true",
        "profiles.p.topology.queues[0].remove",
        "there is no such queue above to take out",
    );
    one(
        "[[profiles.p.topology.exchanges]]\nname = 'new'",
        "profiles.p.topology.exchanges[0].kind",
        "missing; expected \"direct\"",
    );
    one(
        "[[profiles.p.topology.bindings]]\nexchange = 'room'\nqueue = 'gone'",
        "profiles.p.topology.bindings[0].queue",
        "gone",
    );
    one("[profiles.p.topology]\nqueues = {}", "profiles.p.topology.queues", "expected a list of tables");
    let error = mistakes_of(Settings::loader().text(format!("{FILE}[[topology.queues]]\nname = 'x'\nremove = true")));
    assert_eq!(error.problems[0].key, "topology.queues[2].remove", "only a profile takes something out");
    // What only the file says is told under its own key.
    let dangling =
        "[[topology.bindings]]\nexchange = 'room'\nqueue = 'gone'\n[[profiles.p.topology.queues]]\nname = 'more'";
    one(dangling, "topology.bindings[3].queue", "gone");
}

#[test]
fn a_partitioned_queue_is_merged_by_its_name_and_expanded_afterwards() {
    let text = "
        [[topology.partitioned]]
        name = 'orders'
        partitions = 16
        arguments = { x-delivery-limit = 50 }
        [[profiles.p.topology.partitioned]]
        name = 'orders'
        partitions = 2
        [[profiles.none.topology.partitioned]]
        name = 'orders'
        remove = true";
    let load = |profile: &str| Settings::loader().text(text).profile(profile).load().unwrap().topology;
    let expected = Partitioned::new("orders", 2).queues(|queue| queue.delivery_limit(50));
    assert_eq!(load("p"), Topology::new().partitioned(expected));
    assert!(load("none").is_empty());
}
