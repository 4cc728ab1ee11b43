//! The queues beside that of a listener: of which type they are, and that a message in one of them outlives its node.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::{RabbitMq, RabbitMqCluster};
use coney::{App, Connection, Error, Overflow, PooledConnection, Queue, QueueType, RetryPolicy, Settings, Topology};

use crate::contract;
use crate::support::{Broker, PATIENCE, bodies, drain, unique, wait_until};

const DELAY: Duration = Duration::from_millis(50);

fn policy() -> RetryPolicy {
    RetryPolicy::new([DELAY]).unwrap()
}

fn waiting(queue: &str, delay: Duration, queue_type: QueueType) -> Queue {
    let waiting = Queue::new(format!("{queue}.retry.{}", delay.as_millis()));
    let waiting = waiting.message_ttl(delay).dead_letter_exchange("").dead_letter_routing_key(queue);
    match queue_type {
        QueueType::Quorum => {
            waiting.quorum().argument("x-dead-letter-strategy", "at-least-once").overflow(Overflow::RejectPublish)
        }
        _ => waiting,
    }
}

fn dead(queue: &str, queue_type: QueueType) -> Queue {
    let dead = Queue::new(format!("{queue}.dead"));
    if queue_type == QueueType::Quorum { dead.quorum() } else { dead }
}

/// Declaring what exists with the same properties changes nothing; with others, the broker refuses.
fn check_type(connection: &Connection, queue: &str, queue_type: QueueType) {
    for there in [waiting(queue, DELAY, queue_type), dead(queue, queue_type)] {
        connection.queue_declare_passive(&there.name).expect("it is there");
        connection.queue_declare(&there).expect("it is of this type");
    }
}

contract! {
    the_queues_of_a_ladder_are_of_the_type_of_the_queue_that_they_serve,
    queues_that_are_there_as_another_type_are_used_as_they_are,
}

fn at(broker: Broker, extra: &str) -> (App, PooledConnection) {
    let app = broker.app(extra);
    let connection = app.publish_pool().connection().unwrap();
    (app, connection)
}

fn the_queues_of_a_ladder_are_of_the_type_of_the_queue_that_they_serve(broker: Broker) {
    use QueueType::{Classic, Quorum};
    let configured = unique("configured");
    let settings = format!(
        "[[topology.queues]]\nname = {configured:?}\narguments = {{ x-queue-type = \"quorum\" }}\n[pools.listen]\nsize = 10"
    );
    let (app, connection) = at(broker, &settings);
    app.declare_topology().unwrap();
    let long = Duration::from_secs(3600);
    // With arguments that the broker compares before it comes to the type.
    let plain = Queue::new(unique("plain"));
    let laden =
        Queue::new(unique("laden")).message_ttl(long).expires(long).max_priority(3).dead_letter_exchange("it's");
    let passing = Queue::new(unique("passing")).durable(false);
    let quorum = Queue::new(unique("quorum")).quorum();
    let full = Queue::new(unique("full")).quorum().message_ttl(long).max_length(1000).argument("x-delivery-limit", 3);
    for queue in [&plain, &laden, &passing, &quorum, &full] {
        connection.queue_declare(queue).unwrap();
    }
    let expected = [(&plain, Classic), (&laden, Classic), (&passing, Classic), (&quorum, Quorum), (&full, Quorum)];
    for (queue, expected) in expected {
        let listener = app.listener(&queue.name).retry(policy()).spawn(|_, _| Err::<(), _>("no")).unwrap();
        check_type(&connection, &queue.name, expected);
        listener.stop().unwrap();
    }
    // Known without a question: from the settings, and from the topology that the listener declares.
    let declared = Queue::new(unique("declared")).quorum();
    let _listener = app.listener(&configured).retry(policy()).spawn(|_, _| Err::<(), _>("no")).unwrap();
    check_type(&connection, &configured, Quorum);
    let with_topology = app.listener(&declared.name).topology(Topology::new().queue(declared.clone()));
    let listener = with_topology.retry(policy()).spawn(|_, _| Err::<(), _>("no")).unwrap();
    check_type(&connection, &declared.name, Quorum);
    connection.publish("", &declared.name, "goes up the ladder").unwrap();
    wait_until("it is dead", || listener.stats().dead == 1);
    let ended = connection.get_timeout(&format!("{}.dead", declared.name), PATIENCE).unwrap().unwrap().ack().unwrap();
    assert_eq!(ended.message().headers()["coney-attempts"].as_i64(), Some(2));

    // A setting counts for more.
    let (app, _other) = at(broker, "[pools.listen]\nretry = [\"50ms\"]\nretry_queue_type = \"quorum\"");
    let chosen = Queue::new(unique("chosen"));
    connection.queue_declare(&chosen).unwrap();
    let _listener = app.spawn_listener(&chosen.name, |_, _| Err::<(), _>("no")).unwrap();
    check_type(&connection, &chosen.name, Quorum);
    let own = Queue::new(unique("own")).quorum();
    connection.queue_declare(&own).unwrap();
    let _listener = app.listener(&own.name).retry_queue_type(Classic).spawn(|_, _| Err::<(), _>("no")).unwrap();
    check_type(&connection, &own.name, Classic);
}

fn queues_that_are_there_as_another_type_are_used_as_they_are(broker: Broker) {
    let (app, connection) = at(broker, "[pools.listen]\nsize = 10");
    let pairs = [(QueueType::Quorum, QueueType::Classic), (QueueType::Classic, QueueType::Quorum)];
    for (own, beside) in pairs {
        let queue = Queue::new(unique("before"));
        let queue = if own == QueueType::Quorum { queue.quorum() } else { queue };
        connection.queue_declare(&queue).unwrap();
        connection.queue_declare(&waiting(&queue.name, DELAY, beside)).unwrap();
        connection.queue_declare(&dead(&queue.name, beside)).unwrap();
        let listener = app.listener(&queue.name).retry(policy()).spawn(|_, _| Err::<(), _>("no")).unwrap();
        connection.publish("", &queue.name, "kept").unwrap();
        wait_until("it is dead", || listener.stats().dead == 1);
        assert_eq!((listener.stats().retried, listener.stats().recoveries), (1, 0));
        check_type(&connection, &queue.name, beside);
    }
    // What is different in another way is not what is needed.
    let queue = Queue::new(unique("wrong"));
    connection.queue_declare(&queue).unwrap();
    connection.queue_declare(&Queue::new(format!("{}.retry.50", queue.name))).unwrap();
    let error = app.listener(&queue.name).retry(policy()).spawn(|_, _| ()).map(drop).unwrap_err();
    assert!(error.code() == Some(406) && error.to_string().contains("x-message-ttl"), "{error}");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_ladder_on_a_stream_is_refused_with_the_reason() {
    let (app, connection) = at(Broker::RabbitMq, "[pools.listen]\nretry = [\"50ms\"]");
    let stream = Queue::new(unique("stream")).argument("x-queue-type", "stream");
    let refused = |error: Error| {
        assert!(matches!(&error, Error::InvalidArgument { what, .. } if what == "retry"), "{error}");
        assert!(error.to_string().contains("is a stream") && error.to_string().contains("without_retry"), "{error}");
    };
    let declared = app.listener(&stream.name).topology(Topology::new().queue(stream.clone()));
    refused(declared.spawn(|_, _| ()).map(drop).unwrap_err());
    connection.queue_declare(&stream).unwrap();
    refused(app.spawn_listener(&stream.name, |_, _| ()).map(drop).unwrap_err());
    let listener = app.listener(&stream.name).without_retry().spawn(|_, _| ()).unwrap();
    connection.publish("", &stream.name, "read").unwrap();
    // From where it begins by default a stream gives what comes after.
    wait_until("it reads", || listener.stats().acked >= 1);
}

/// Where a message waits, the node that has it may go.
#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn messages_that_wait_outlive_the_node_that_leads_their_queue() {
    const COUNT: usize = 500;
    let cluster = RabbitMq::builder().boot_timeout(Duration::from_secs(180)).start_cluster(3).expect("a cluster");
    let settings = format!(
        r#"
        [broker]
        hosts = {:?}
        heartbeat = "2s"
        connect_timeout = "3s"
        operation_timeout = "10s"
        [pools.publish]
        confirm_timeout = "10s"
        "#,
        cluster.hosts()
    );
    let app = App::from_settings(Settings::from_toml(&settings).expect("settings")).expect("an app");
    let name = unique("outlived");
    let delay = Duration::from_secs(20);
    let queue = Queue::new(&name).quorum();
    let (seen, attempts) = mpsc::channel();
    let listener = app
        .listener(&name)
        .topology(Topology::new().queue(queue))
        .retry(RetryPolicy::new([delay]).unwrap())
        .spawn(move |_, delivery| {
            seen.send(delivery.message().text().unwrap().to_owned()).unwrap();
            Err::<(), _>("no")
        })
        .unwrap();
    publish_all(&app, &name, COUNT);
    wait_until("all wait", || listener.stats().retried as usize >= COUNT);
    let waiting = format!("{name}.retry.{}", delay.as_millis());
    let leader = cluster.leader(&waiting).expect("it is a quorum queue");
    cluster.node(leader).kill().unwrap();
    let killed = Instant::now();
    let dead = format!("{name}.dead");
    let mut numbers = Vec::new();
    wait_until_dead(&app, &dead, &mut numbers, COUNT);
    eprintln!("all {COUNT} are dead {:.1?} after node {leader} was killed", killed.elapsed());
    // Each has been handled twice at least, before the kill and after.
    assert!(attempts.try_iter().count() >= 2 * COUNT);
    cluster.node(leader).start_again().unwrap();
    drop(listener);
    drop::<RabbitMqCluster>(cluster);
}

fn publish_all(app: &App, queue: &str, count: usize) {
    for n in 0..count {
        app.publish_pool().publish("", queue, n.to_string()).unwrap();
    }
}

fn wait_until_dead(app: &App, dead: &str, numbers: &mut Vec<String>, count: usize) {
    let deadline = Instant::now() + 3 * PATIENCE;
    while numbers.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} are dead", numbers.len());
        // Whoever asks may be on the node that was killed.
        if let Ok(connection) = app.publish_pool().connection()
            && connection.queue_declare_passive(dead).is_ok_and(|queue| queue.message_count > 0)
        {
            numbers.extend(bodies(&drain(&connection, dead)));
            numbers.sort();
            numbers.dedup();
        } else {
            thread::park_timeout(Duration::from_millis(50));
        }
    }
}
