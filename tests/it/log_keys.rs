//! What a program can search its log for: the keys beside each line that tells of something that happened.

use std::time::Duration;

use coney::embedded::EmbeddedBroker;
use coney::{Message, Outcome, Queue, RetryPolicy};
use log::Level;

use crate::logs::{self, Line};
use crate::raw::Raw;
use crate::support::{app, unique, wait_until};

/// The first line that contains `what` and has this value under this key.
#[track_caller]
fn line(what: &str, key: &str, value: &str) -> Line {
    let is_it = |line: &Line| line.keys.get(key).is_some_and(|found| found == value);
    wait_until(what, || logs::lines_with(what).iter().any(is_it));
    logs::lines_with(what).into_iter().find(is_it).unwrap()
}

#[track_caller]
fn has(line: &Line, level: Level, keys: &[(&str, &str)]) {
    assert_eq!(line.level, level, "{line:?}");
    for (key, value) in keys {
        assert_eq!(line.keys.get(*key).map(String::as_str), Some(*value), "{key} of {line:?}");
    }
}

#[test]
fn what_happens_to_connections_and_messages_is_logged_with_its_keys() {
    logs::keep();
    let broker = EmbeddedBroker::start().unwrap();
    let control = broker.control();
    let (pool, queue) = (unique("keyed-pool"), unique("keyed-queue"));
    let app = app(&broker.url(), &format!("[pools.{pool}]\nsize = 1\nconfirm_timeout = \"20s\""));
    let pool = app.pool(&pool).unwrap();
    let name = format!("coney {} #1", pool.name());
    let connection = pool.connection().unwrap();
    let connected = line("connected to amqp://", "pool", pool.name());
    has(&connected, Level::Debug, &[("connection", &name)]);

    control.block_publishers("low on disk");
    has(
        &line("takes no messages", "pool", pool.name()),
        Level::Warn,
        &[("connection", &name), ("reason", "low on disk")],
    );
    control.unblock_publishers();
    has(&line("takes messages again", "pool", pool.name()), Level::Info, &[("connection", &name)]);

    connection.queue_declare(&Queue::new(&queue)).unwrap();
    let listener = app
        .listener(&queue)
        .retry(RetryPolicy::new([Duration::from_millis(20)]).unwrap())
        .spawn(|_, delivery| match delivery.message().text() {
            Some("fails") => Outcome::Failed("no stock".to_owned()),
            Some("panics") => panic!("this panic is part of the test"),
            _ => Outcome::Ack,
        })
        .unwrap();
    has(&line("listening", "listener", &queue), Level::Info, &[("pool", "listen")]);
    connection.publish("", &queue, Message::new("fails").with_message_id(format!("{queue}/1"))).unwrap();
    connection.publish("", &queue, Message::new("panics").with_message_id(format!("{queue}/2"))).unwrap();
    let of = |id: &str| format!("{queue}/{id}");
    let common = [("listener", queue.as_str()), ("queue", queue.as_str())];
    let retried = line("it is tried again later", "message_id", &of("1"));
    has(&retried, Level::Warn, &[common[0], common[1], ("outcome", "retried")]);
    assert!(retried.text.contains("no stock"), "the text tells it too: {}", retried.text);
    has(&line(".dead\" now", "message_id", &of("1")), Level::Error, &[common[0], common[1], ("outcome", "dead")]);
    has(&line("panicked", "message_id", &of("2")), Level::Error, &common);

    // So that nothing but what is published below waits for a confirm.
    wait_until("both are dead", || listener.stats().dead == 2);
    control.drop_connections();
    has(&line("to come back in", "listener", &queue), Level::Warn, &[("attempt", "1"), ("pool", "listen")]);
    has(&line(": back", "listener", &queue), Level::Info, &[("pool", "listen")]);
    drop(connection);
    has(&line("given up", "pool", pool.name()), Level::Debug, &[("connection", &name)]);

    // One call, two connections, one message.
    control.withhold_confirms(true);
    std::thread::scope(|scope| {
        let publishing = scope.spawn(|| pool.publish("", &queue, Message::new("fine").with_message_id(of("3"))));
        wait_until("it is written", || listener.stats().acked > 0);
        control.drop_connections();
        control.withhold_confirms(false);
        publishing.join().unwrap().unwrap();
    });
    let again = line("publishing again", "message_id", &of("3"));
    has(&again, Level::Debug, &[("pool", pool.name()), ("exchange", ""), ("routing_key", &queue)]);
    listener.stop().unwrap();
}

/// What the embedded broker logs of a client is quoted, since its name is whatever it likes.
#[test]
fn what_a_client_calls_itself_is_quoted_in_the_log_of_the_embedded_broker() {
    logs::keep();
    let own = unique("evil-name");
    let broker = EmbeddedBroker::start().unwrap();
    let mut client = Raw::open_named(broker.addr(), &format!("{own}\n\u{9b}2J\u{202e}"));
    // A method that is cut short.
    client.say(7, (60, 40), &[]);
    assert_eq!(client.refused(), 501);
    let told = || logs::lines_with("embedded broker: closing").into_iter().find(|line| line.text.contains(&own));
    wait_until("the broker has told it", || told().is_some());
    let text = told().unwrap().text;
    assert!(!text.contains(|one: char| one.is_control() || one == '\u{202e}'), "{text:?}");
}
