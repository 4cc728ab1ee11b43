//! `coney partitions`: keys are found, and messages get to another number of partitions in order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use coney::{App, Error, Partitioned, Topology};

use crate::contract;
use crate::program::run;
use crate::support::{Broker, settings, unique, wait_until};

contract!(
    a_key_is_told_its_partition,
    all_messages_are_moved_in_order,
    a_move_that_fails_goes_on_later,
    with_a_consumer_nothing_is_moved,
    what_cannot_be_is_told,
);

const KEYS: usize = 7;
const EACH: usize = 40;

fn app(broker: Broker, partitioned: &Partitioned) -> App {
    let mut settings = settings(&broker.url(), "");
    settings.topology = Topology::new().partitioned(partitioned.clone());
    App::from_settings(settings).unwrap()
}

fn publish_all(app: &App, partitioned: &Partitioned) {
    app.declare_topology().unwrap();
    let exchange = partitioned.exchange();
    let message = |number: usize, key: usize| {
        (exchange.as_str(), partitioned.routing_key(&format!("key-{key}")), number.to_string())
    };
    let messages = (0..EACH).flat_map(|number| (0..KEYS).map(move |key| (number, key)));
    let connection = app.publish_pool().connection().unwrap();
    connection.publish_batch(messages.map(|(number, key)| message(number, key))).unwrap();
}

/// Consumes until everything has come, and says that the order of each key is that of its first publish.
fn all_come_in_order(app: &App, partitioned: &Partitioned, while_it_listens: impl FnOnce()) {
    let seen: Arc<Mutex<HashMap<String, Vec<usize>>>> = Arc::default();
    let (noted, keys) = (Arc::clone(&seen), partitioned.clone());
    let listener = app
        .listener_partitioned(&partitioned.name)
        .spawn(move |_, delivery| {
            let key = keys.key_of(delivery.routing_key()).to_owned();
            noted.lock().unwrap().entry(key).or_default().push(delivery.message().text().unwrap().parse().unwrap());
        })
        .unwrap();
    while_it_listens();
    wait_until("all have come", || {
        let seen = seen.lock().unwrap();
        seen.len() == KEYS && seen.values().all(|numbers| numbers.contains(&(EACH - 1)))
    });
    listener.stop().unwrap();
    for (key, numbers) in seen.lock().unwrap().iter() {
        let mut next = 0;
        for &number in numbers {
            assert!(number <= next, "{key}: {numbers:?}");
            next = next.max(number + 1);
        }
        assert_eq!(next, EACH, "{key}");
    }
}

fn a_key_is_told_its_partition(_broker: Broker) {
    let ran = run(&["partitions", "of", "orders", "customer-7", "--partitions", "16"]).well();
    assert_eq!(ran.text(), "queue orders.8-of-16, exchange orders, routing key 8-of-16.customer-7\n");
    let ran = run(&["partitions", "of", "orders", "customer-7", "--partitions", "12", "--json"]).well();
    let told: serde_json::Value = serde_json::from_str(ran.text()).unwrap();
    assert_eq!((&told["partition"], &told["routing_key"]), (&8.into(), &"8-of-12.customer-7".into()));
}

fn all_messages_are_moved_in_order(broker: Broker) {
    let (name, url) = (unique("moved"), broker.url());
    let (old, new) = (Partitioned::new(&name, 3), Partitioned::new(&name, 5));
    let (before, after) = (app(broker, &old), app(broker, &new));
    publish_all(&before, &old);
    let ran = run(&["partitions", "move", &name, "--from", "3", "--to", "5", "--url", &url]).well();
    assert_eq!(ran.text(), format!("moved {} messages of {name} from 3 to 5 partitions\n", KEYS * EACH));
    // The old partitions are gone, and a publisher that has the old number is told.
    let connection = before.publish_pool().connection().unwrap();
    for queue in old.queue_names().chain([old.members_queue()]) {
        assert_eq!(connection.queue_declare_passive(&queue).unwrap_err().code(), Some(404), "{queue}");
    }
    let error = connection.publish(&old.exchange(), &old.routing_key("key-1"), "late").unwrap_err();
    assert!(matches!(error, Error::Returned { .. }), "{error}");
    all_come_in_order(&after, &new, || ());
    // Nothing is left to be moved.
    run(&["partitions", "move", &name, "--from", "3", "--to", "5", "--url", &url]).failed(1, &["nothing to move"]);
}

fn a_move_that_fails_goes_on_later(broker: Broker) {
    let (name, url) = (unique("full"), broker.url());
    let old = Partitioned::new(&name, 2);
    let new = Partitioned::new(&name, 3).queues(|queue| queue.max_length(10).overflow(coney::Overflow::RejectPublish));
    let (before, after) = (app(broker, &old), app(broker, &new));
    publish_all(&before, &old);
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        "[broker]\nurl = {url:?}\n[[topology.partitioned]]\nname = {name:?}\npartitions = 3\n\
         arguments = {{ x-max-length = 10, x-overflow = \"reject-publish\" }}"
    );
    std::fs::write(directory.path().join("app.toml"), text).unwrap();
    let go = || crate::program::run_in(directory.path(), &["partitions", "move", &name, "--from", "2"]);
    go().failed(1, &["messages moved, and then: ", "(nack)", "run it again to go on"]);
    // With listeners there is room again and again.
    all_come_in_order(&after, &new, || wait_until("all are moved", || go().code == Some(0)));
}

fn with_a_consumer_nothing_is_moved(broker: Broker) {
    let (name, url) = (unique("consumed"), broker.url());
    let old = Partitioned::new(&name, 2);
    let app = app(broker, &old);
    let listener = app.listener_partitioned(&name).spawn(|_, _| ()).unwrap();
    let arguments = ["partitions", "move", &name, "--from", "2", "--to", "3", "--url", &url];
    run(&arguments).failed(1, &[&format!("queue \"{name}.0-of-2\" has a consumer; nothing was moved")]);
    let connection = app.publish_pool().connection().unwrap();
    connection.publish(&old.exchange(), &old.routing_key("k"), "still here").unwrap();
    listener.stop().unwrap();
    run(&arguments).well();
}

fn what_cannot_be_is_told(broker: Broker) {
    let (name, url) = (unique("wrong"), broker.url());
    let moving = |from: &str, to: &str| run(&["partitions", "move", &name, "--from", from, "--to", to, "--url", &url]);
    moving("4", "4").failed(2, &["--from: expected another number than 4"]);
    moving("0", "4").failed(2, &["--from 0", "expected 1 to 1024"]);
    moving("4", "2000").failed(2, &["--to 2000", "expected 1 to 1024"]);
    moving("4", "5").failed(1, &["has no queue of 4 partitions: there is nothing to move"]);
    run(&["partitions", "of", &name, "k", "--url", &url]).failed(2, &["no partitioned queue", "--partitions"]);
}
