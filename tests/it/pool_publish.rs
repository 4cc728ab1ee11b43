//! Publishing through the pool: one call that lasts through lost connections, and never repeats what was refused.

use std::collections::HashSet;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{ConnectError, Error, Exchange, Message, Overflow, Queue};

use crate::contract;
use crate::support::{Broker, PATIENCE, app, drain, queue, unique, wait_until};

contract! {
    through_a_killed_broker_every_message_arrives_and_a_repetition_bears_the_same_id,
    what_the_broker_refuses_is_told_at_once_and_not_sent_again,
    without_a_broker_nothing_is_sent_and_the_cause_is_told_in_time,
    a_block_is_told_at_the_deadline_and_seen_in_the_status,
    an_id_of_the_callers_is_kept_and_none_is_made_up_twice,
}

fn through_a_killed_broker_every_message_arrives_and_a_repetition_bears_the_same_id(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("heartbeat = \"2s\"\n[pools.publish]\npublish_timeout = \"60s\"");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "outlives");
    let (threads, each) = (2, 1_500);
    let sent = Mutex::new(0);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (name, sent) = (&name, &sent);
            scope.spawn(move || {
                for n in 0..each {
                    pool.publish("", name, format!("{thread}-{n}")).unwrap();
                    *sent.lock().unwrap() += 1;
                }
            });
        }
        for at in [500, 1_500] {
            wait_until("some are sent", || *sent.lock().unwrap() >= at);
            node.kill();
            node.start_again();
        }
    });
    let received = drain(&app.listen_pool().connection().unwrap(), &name);
    let distinct: HashSet<_> = received.iter().map(|one| one.message().text().unwrap()).collect();
    assert_eq!(distinct.len(), threads * each, "lost");
    let ids: HashSet<_> = received.iter().map(|one| one.message().message_id().expect("an id")).collect();
    assert_eq!(ids.len(), threads * each, "a repetition has an id of its own, or two messages have one");
    println!("{} of {} were repeated", received.len() - distinct.len(), distinct.len());
}

fn what_the_broker_refuses_is_told_at_once_and_not_sent_again(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let full = unique("full");
    connection.queue_declare(&Queue::new(&full).max_length(1).overflow(Overflow::RejectPublish)).unwrap();
    let fanout = unique("heard-by-nobody");
    connection.exchange_declare(&Exchange::fanout(&fanout).auto_delete(true)).unwrap();
    let start = Instant::now();
    pool.publish("", &full, "fits").unwrap();
    let error = pool.publish("", &full, "one too many").unwrap_err();
    assert!(matches!(error, Error::Nacked { .. }), "{error}");
    let error = pool.publish(&fanout, "k", "x").unwrap_err();
    assert!(matches!(error, Error::Returned { code: 312, .. }), "{error}");
    let error = pool.publish("no-such-exchange", "k", "x").unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 404, .. }), "{error}");
    let error = pool.publish("", &"k".repeat(256), "x").unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    let reader = crate::support::app(&broker.reader_url(), "");
    let error = reader.publish_pool().publish("amq.topic", "k", "x").unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 403, .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(25), "it has waited for something: {:?}", start.elapsed());
    assert_eq!(broker.queue_len(&full), 1);
    assert_eq!(pool.status().created, 2, "a refusal costs no connection");
}

fn without_a_broker_nothing_is_sent_and_the_cause_is_told_in_time(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "absent");
    node.kill();
    let start = Instant::now();
    let error = pool.publish_timeout("", &name, "x", Duration::from_secs(1)).unwrap_err();
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    // The first attempt may have begun on the connection that was open, before its end was seen.
    assert!(
        matches!(error, Error::Connect { cause: ConnectError::Io(_) | ConnectError::Handshake(_), .. })
            || matches!(&error, Error::OutcomeUnknown { cause, .. } if cause.is_transient()),
        "{error}"
    );
    let error = pool.publish_timeout("", &name, "x", Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && error.is_transient(), "{error}");
    node.start_again();
    pool.publish("", &name, "after").unwrap();
    assert_eq!(node.queue_len(&name), 1);
    app.shutdown(Duration::from_secs(10)).unwrap();
    let error = pool.publish("", &name, "x").unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
}

fn a_block_is_told_at_the_deadline_and_seen_in_the_status(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nsize = 1");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "blocked");
    assert_eq!(pool.status().blocked, None);
    node.block_publishers();
    let start = Instant::now();
    let second = Duration::from_secs(1);
    let error = pool.publish_timeout("", &name, "x", second).unwrap_err();
    let is_blocked =
        matches!(&error, Error::Blocked { reason, waited, .. } if reason.contains("memory") && *waited == second);
    assert!(is_blocked, "{error}");
    assert!(start.elapsed() >= second && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let connection = pool.connection().unwrap();
    thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            connection.publish("", &name, "waits").unwrap();
            connection
        });
        wait_until("a connection that is lent shows", || {
            pool.status().blocked.is_some_and(|reason| reason.contains("memory"))
        });
        node.unblock_publishers();
        drop(publishing.join().unwrap());
    });
    wait_until("it is lifted", || pool.status().blocked.is_none());
    pool.publish("", &name, "after").unwrap();
}

fn an_id_of_the_callers_is_kept_and_none_is_made_up_twice(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "ids");
    pool.publish("", &name, Message::new("mine").with_message_id("order-1")).unwrap();
    pool.publish("", &name, "a").unwrap();
    pool.publish("", &name, "b").unwrap();
    let received = drain(&app.listen_pool().connection().unwrap(), &name);
    let ids: Vec<_> = received.iter().map(|one| one.message().message_id().unwrap()).collect();
    assert_eq!(ids[0], "order-1");
    assert!(ids[1] != ids[2] && ids[1].len() == 32 && ids[1].bytes().all(|byte| byte.is_ascii_hexdigit()), "{ids:?}");
}

#[test]
fn without_a_word_on_what_was_written_the_outcome_is_unknown_and_says_so() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    let pool = app.publish_pool();
    let name = queue(&pool.connection().unwrap(), "unknown");
    broker.control().withhold_confirms(true);
    let error = pool.publish_timeout("", &name, Message::new("x").with_message_id("id-1"), Duration::from_millis(500));
    let error = error.unwrap_err();
    let Error::OutcomeUnknown { message_id, cause, after, .. } = &error else { panic!("{error}") };
    assert_eq!((message_id.as_str(), *after), ("id-1", Duration::from_millis(500)));
    assert!(matches!(**cause, Error::Timeout { .. }), "{cause}");
    assert!(error.to_string().contains("not known") && error.is_transient(), "{error}");
    // Written once, and taken, as this broker happens to have done.
    assert_eq!(broker.control().queue_len(&name), 1);
    // The same when the connection is lost in the meantime and there is no other.
    let losing = thread::spawn({
        let (pool, name) = (pool.clone(), name.clone());
        move || pool.publish_timeout("", &name, "x", Duration::from_secs(2))
    });
    broker.control().wait_for_queue_len(&name, 2, PATIENCE).unwrap();
    broker.control().refuse_connections(true);
    broker.control().drop_connections();
    let error = losing.join().unwrap().unwrap_err();
    let Error::OutcomeUnknown { cause, .. } = &error else { panic!("{error}") };
    assert!(matches!(**cause, Error::Connect { .. } | Error::ConnectionLost { .. }), "{cause}");
}

#[test]
fn closing_the_pool_ends_the_trying() {
    let broker = EmbeddedBroker::start().unwrap();
    let app = app(&broker.url(), "");
    let pool = app.publish_pool().clone();
    broker.control().refuse_connections(true);
    let trying = thread::spawn({
        let pool = pool.clone();
        move || pool.publish_timeout("", "nowhere", "x", Duration::from_secs(600))
    });
    wait_until("it tries", || pool.status().in_use == 1);
    pool.close();
    let error = trying.join().unwrap().unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
}
