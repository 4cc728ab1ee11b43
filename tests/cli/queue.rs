//! `coney queue`, `exchange`, `bind` and `unbind`: what they make is there, what they remove is gone, and nothing else.

use coney::{Error, Exchange, FieldTable, FieldValue, Message, Queue};

use crate::contract;
use crate::program::{run, run_in, settings};
use crate::support::{Broker, bodies, drain, queue, unique, wait_until};

contract!(
    a_queue_is_what_the_arguments_say,
    messages_are_not_dropped_unasked,
    an_exchange_is_what_the_arguments_say,
    bindings_come_and_go,
    queues_are_counted,
    what_is_not_there_is_told,
);

fn a_queue_is_what_the_arguments_say(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (name, url) = (unique("declared"), broker.url());
    let plain = ["queue", "declare", &name, "--url", &url];
    for _ in 0..2 {
        let words = format!("declared queue {name} (0 messages, 0 consumers)\n");
        assert_eq!(run(&plain).well().text(), words, "and once more, which changes nothing");
    }
    connection.queue_declare(&Queue::new(&name)).expect("it is that one");
    run(&[&plain[..], &["--transient"]].concat()).failed(1, &["406", "inequivalent arg 'durable'"]);
    run(&["queue", "delete", &name, "--url", &url]).well();

    let options = ["--auto-delete", "--argument", "x-message-ttl:=60000", "--argument", "x-dead-letter-exchange=d e"];
    run(&[&plain[..], &options].concat()).well();
    let expected = Queue::new(&name).auto_delete(true).argument("x-message-ttl", 60_000).dead_letter_exchange("d e");
    connection.queue_declare(&expected).expect("it is that one");
    run(&["queue", "declare", "", "--url", &url]).failed(2, &["queue: expected a name"]);
}

fn messages_are_not_dropped_unasked(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "kept"), broker.url());
    for (command, done) in [("purge", "purged 1 message from queue"), ("delete", "deleted queue")] {
        connection.publish("", &queue, "one").unwrap();
        run(&["queue", command, &queue, "--url", &url]).failed(2, &["Drop 1 message in queue", "--yes"]);
        assert_eq!(broker.queue_len(&queue), 1);
        let ran = run(&["queue", command, &queue, "--yes", "--url", &url]).well();
        assert!(ran.text().contains("1 message") && ran.text().starts_with(done), "{ran:?}");
    }
    assert_eq!(connection.queue_declare_passive(&queue).unwrap_err().code(), Some(404));

    // In use, and not.
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    let app = broker.app("");
    let listener = app.spawn_listener(&queue, |_, _| ()).unwrap();
    run(&["queue", "delete", &queue, "--if-unused", "--url", &url]).failed(1, &["406", "in use"]);
    listener.stop().unwrap();
    run(&["queue", "delete", &queue, "--if-unused", "--url", &url]).well();
}

fn an_exchange_is_what_the_arguments_say(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (name, url) = (unique("declared"), broker.url());
    let ran = run(&["exchange", "declare", &name, "topic", "--url", &url]).well();
    assert_eq!(ran.text(), format!("declared exchange {name} (topic)\n"));
    connection.exchange_declare(&Exchange::topic(&name)).expect("it is that one");
    run(&["exchange", "declare", &name, "fanout", "--url", &url]).failed(1, &["406", "inequivalent arg 'type'"]);
    assert_eq!(run(&["exchange", "declare", &name, "tropic", "--url", &url]).code, Some(2));
    let to = queue(&connection, "bound");
    connection.queue_bind(&to, &name, "k").unwrap();
    run(&["exchange", "delete", &name, "--if-unused", "--url", &url]).failed(1, &["406", "in use"]);
    run(&["exchange", "delete", &name, "--url", &url]).well();
    assert_eq!(connection.exchange_declare_passive(&name).unwrap_err().code(), Some(404));

    let options = ["--transient", "--auto-delete", "--internal", "--argument", "alternate-exchange=amq.fanout"];
    run(&[&["exchange", "declare", &name, "headers", "--url", &url], &options[..]].concat()).well();
    let expected = Exchange::headers(&name).durable(false).auto_delete(true).internal(true);
    connection.exchange_declare(&expected.alternate_exchange("amq.fanout")).expect("it is that one");
}

fn bindings_come_and_go(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (to, url) = (queue(&connection, "bound"), broker.url());
    let [topic, headers] = ["topic", "headers"].map(unique);
    run(&["exchange", "declare", &topic, "topic", "--url", &url]).well();
    run(&["exchange", "declare", &headers, "headers", "--url", &url]).well();

    let ran = run(&["bind", &to, &topic, "a.#", "--url", &url]).well();
    assert_eq!(ran.text(), format!("bound queue {to} to exchange {topic}, key \"a.#\"\n"));
    connection.publish(&topic, "a.b", "by topic").unwrap();
    let options = ["--argument", "x-match=all", "--argument", "kind:={\"$i32\":7}"];
    run(&[&["bind", &to, &headers, "--url", &url], &options[..]].concat()).well();
    let headed = Message::new("by headers").with_headers(FieldTable::from([("kind".to_owned(), FieldValue::I32(7))]));
    connection.publish(&headers, "", headed.clone()).unwrap();
    assert_eq!(bodies(&drain(&connection, &to)), ["by topic", "by headers"]);

    run(&["unbind", &to, &topic, "a.#", "--url", &url]).well();
    run(&[&["unbind", &to, &headers, "--url", &url], &options[..]].concat()).well();
    let gone = |error: Error| assert!(matches!(error, Error::Returned { .. }), "{error}");
    gone(connection.publish(&topic, "a.b", "nobody").unwrap_err());
    gone(connection.publish(&headers, "", headed.clone()).unwrap_err());

    // From exchange to exchange.
    run(&["bind", &headers, &topic, "a.b", "--to-exchange", "--url", &url]).well();
    run(&[&["bind", &to, &headers, "--url", &url], &options[..]].concat()).well();
    connection.publish(&topic, "a.b", headed).unwrap();
    wait_until("it is there", || broker.queue_len(&to) == 1);
    run(&["unbind", &headers, &topic, "a.b", "--to-exchange", "--url", &url]).well();
    gone(connection.publish(&topic, "a.b", "nobody").unwrap_err());
}

fn queues_are_counted(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (one, other, url) = (queue(&connection, "one"), queue(&connection, "other"), broker.url());
    for _ in 0..12 {
        connection.publish("", &one, "body").unwrap();
    }
    let ran = run(&["queue", "list", &one, &other, "--url", &url]).well();
    let expected = format!(" messages consumers  queue\n       12         0  {one}\n        0         0  {other}\n");
    assert_eq!(ran.text(), expected);
    let missing = unique("missing");
    let ran = run(&["queue", "list", &missing, &one, "--json-lines", "--url", &url]).failed(1, &["404", &missing]);
    let expected = serde_json::json!({ "queue": one, "messages": 12, "consumers": 0 });
    assert_eq!(ran.json(), [expected]);

    let text = format!("[broker]\nurl = {url:?}\n[[topology.queues]]\nname = {other:?}\n");
    let ran = run_in(settings(&text).path(), &["queue", "list"]).well();
    assert_eq!(ran.lines()[1..], [format!("        0         0  {other}")]);
    run(&["queue", "list", "--url", &url]).failed(2, &["over AMQP", "name some"]);
}

fn what_is_not_there_is_told(broker: Broker) {
    let (name, url) = (unique("missing"), broker.url());
    let queue = format!("no queue '{name}'");
    let declare = format!("`coney queue declare {name}`");
    for command in ["delete", "purge"] {
        run(&["queue", command, &name, "--url", &url]).failed(1, &["404", &queue, &declare]);
    }
    run(&["bind", &name, "amq.topic", "--url", &url]).failed(1, &["404", &queue, &declare]);
    let exchange = format!("no exchange '{name}'");
    let declare = format!("`coney exchange declare {name} KIND`");
    run(&["exchange", "delete", &name, "--url", &url]).failed(1, &["404", &exchange, &declare]);
    run(&["publish", &name, "k", "body", "--url", &url]).failed(1, &["404", &exchange, &declare]);
}
