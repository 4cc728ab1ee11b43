//! Acks, requeues, what dies, what transactions hold back.

use std::time::Duration;

use super::super::super::release::Release;
use super::super::Limits;
use super::bench::{Client, later, vhost, vhost_with};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::Value;

fn bodies(vhost: &super::super::VHost, queue: &str) -> String {
    let messages = vhost.messages(queue).unwrap();
    messages.iter().map(|message| String::from_utf8_lossy(&message.body).into_owned()).collect()
}

#[test]
fn what_is_requeued_goes_where_it_was() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    "123456".chars().for_each(|body| client.publishes("q", &body.to_string()));
    (0..4).for_each(|_| client.does(BasicGet { queue: "q".into(), ..Default::default() }));
    client.nacks(3, true);
    client.nacks(1, true);
    assert_eq!(bodies(&vhost, "q"), "1356");
    client.does(BasicRecover { requeue: true });
    assert_eq!(bodies(&vhost, "q"), "123456");
    client.hears();
    client.consumes("q", "c");
    assert_eq!(client.hears()[..2], ["deliver c 5 1!", "deliver c 6 2!"]);
}

#[test]
fn what_stands_behind_a_message_that_is_taken_expires() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    let dead = [("x-dead-letter-exchange", Value::text("")), ("x-dead-letter-routing-key", Value::text("dead"))];
    client.declares("q", &dead);
    client.declares("full", &[&dead[..], &[("x-max-length", Value::I32(2))]].concat());
    client.declares("dead", &[]);
    let brief = Properties { expiration: Some("1000".into()), ..Default::default() };
    client.publishes("q", "1");
    client.publishes_with("", "q", "2", &brief).unwrap();
    client.does(BasicGet { queue: "q".into(), ..Default::default() });
    client.publishes("full", "3");
    client.publishes_with("", "full", "4", &brief).unwrap();
    client.publishes("full", "5");
    assert_eq!(bodies(&vhost, "dead"), "3");
    later(&vhost, Duration::from_secs(2));
    assert_eq!(bodies(&vhost, "dead"), "324");
}

#[test]
fn a_dropped_connection_gives_everything_back_in_order() {
    let vhost = vhost();
    let (client, other) = (Client::new(&vhost), Client::new(&vhost));
    client.declares("q", &[]);
    client.consumes("q", "c");
    (0..100).for_each(|body| client.publishes("q", &body.to_string()));
    other.consumes("q", "o");
    vhost.close_session(client.outbox.id());
    let wanted: Vec<String> = (0..100).map(|body| format!("deliver o {} {body}!", body + 1)).collect();
    assert_eq!(other.hears(), wanted);
}

#[test]
fn the_dead_go_to_their_exchange_with_their_history() {
    [Release::V3_10, Release::V4_0].into_iter().for_each(the_dead_go_to_their_exchange_as);
}

fn the_dead_go_to_their_exchange_as(release: Release) {
    let vhost = vhost_with(Limits { release, ..Limits::default() });
    let client = Client::new(&vhost);
    let to =
        |key: &str| vec![("x-dead-letter-exchange", Value::text("")), ("x-dead-letter-routing-key", Value::text(key))];
    client.declares("rejects", &to("short"));
    client.declares("short", &[to("brief"), vec![("x-max-length", Value::I32(0))]].concat());
    client.declares("brief", &[to("end"), vec![("x-message-ttl", Value::I32(0))]].concat());
    client.declares("end", &[]);
    client.publishes("rejects", "m");
    client.does(BasicGet { queue: "rejects".into(), ..Default::default() });
    client.nacks(1, false);
    assert_eq!(bodies(&vhost, "end"), "m");
    client.hears();
    client.does(BasicGet { queue: "end".into(), no_ack: true, ..Default::default() });
    let (_, properties, _) = client.reads().remove(0);
    let Some(Value::Array(deaths)) = properties.headers.as_ref().and_then(|headers| headers.get("x-death")) else {
        panic!("{properties:?}")
    };
    let reasons: Vec<&Value> = deaths
        .iter()
        .filter_map(|death| if let Value::Table(table) = death { table.get("reason") } else { None })
        .collect();
    let wanted = match release {
        // The earlier ones are turned round.
        Release::V3_10 => ["expired", "rejected", "maxlen"],
        Release::V4_0 => ["expired", "maxlen", "rejected"],
    };
    assert_eq!(reasons, wanted.map(Value::text).iter().collect::<Vec<_>>());
}

#[test]
fn a_message_that_only_goes_round_is_dropped() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    let arguments = [
        ("x-dead-letter-exchange", Value::text("")),
        ("x-message-ttl", Value::I32(0)),
        ("x-dead-letter-routing-key", Value::text("q")),
    ];
    client.declares("q", &arguments);
    client.publishes("q", "m");
    assert_eq!(bodies(&vhost, "q"), "");
}

#[test]
fn messages_expire_and_queues_do() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[("x-message-ttl", Value::I32(1000))]);
    client.declares("gone", &[("x-expires", Value::I32(1000))]);
    client.publishes("q", "m");
    later(&vhost, Duration::from_millis(500));
    assert_eq!(bodies(&vhost, "q"), "m");
    later(&vhost, Duration::from_millis(1100));
    assert_eq!(bodies(&vhost, "q"), "");
    assert!(vhost.queue("gone").is_none());
}

#[test]
fn the_three_ways_to_be_full() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.does(ConfirmSelect { no_wait: true });
    client.declares("dead", &[]);
    for (mode, left, told) in [
        ("drop-head", "3", "ack 3*"),
        ("reject-publish", "1", "ack 4,nack 6*"),
        ("reject-publish-dlx", "1", "ack 7,nack 9*"),
    ] {
        let arguments = [
            ("x-max-length", Value::I32(1)),
            ("x-overflow", Value::text(mode)),
            ("x-dead-letter-exchange", Value::text("")),
            ("x-dead-letter-routing-key", Value::text("dead")),
        ];
        client.declares(mode, &arguments);
        "123".chars().for_each(|body| client.publishes(mode, &body.to_string()));
        assert_eq!(bodies(&vhost, mode), left, "{mode}");
        assert_eq!(client.hears().join(","), told, "{mode}");
    }
    assert_eq!(bodies(&vhost, "dead"), "1223");
}

#[test]
fn a_transaction_holds_back_publishes_and_acks() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.does(TxSelect {});
    client.publishes("q", "1");
    assert_eq!(bodies(&vhost, "q"), "");
    client.does(TxRollback {});
    client.publishes("q", "2");
    client.publishes("nowhere", "3");
    client.does(TxCommit {});
    assert_eq!(client.hears(), ["TxSelectOk", "TxRollbackOk", "return NO_ROUTE 3", "TxCommitOk"]);
    client.does(BasicGet { queue: "q".into(), ..Default::default() });
    client.acks(1, false);
    assert_eq!(vhost.queue("q").unwrap().unacked, 1);
    client.does(TxRollback {});
    client.acks(1, false);
    client.does(TxCommit {});
    assert_eq!(vhost.queue("q").unwrap().unacked, 0);
}

#[test]
fn acks_of_an_open_transaction_are_lost_with_the_channel() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.does(TxSelect {});
    client.publishes("q", "1");
    client.does(TxCommit {});
    client.does(BasicGet { queue: "q".into(), ..Default::default() });
    client.acks(1, false);
    vhost.close_channel(client.key);
    assert_eq!(bodies(&vhost, "q"), "1");
}

#[test]
fn an_ack_that_does_not_come_is_overdue() {
    let vhost = vhost_with(Limits { consumer_timeout: Some(Duration::from_secs(10)), ..Limits::default() });
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    client.consumes("q", "c");
    client.publishes("q", "1");
    assert!(later(&vhost, Duration::from_secs(9)).is_empty());
    let overdue = later(&vhost, Duration::from_secs(11));
    assert_eq!((overdue[0].channel, overdue[0].session), (1, client.outbox.id()));
    assert!(overdue[0].refusal.text.starts_with(
        "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 10000 ms."
    ));
}

#[test]
fn a_restart_keeps_what_is_durable() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.does(QueueDeclare { queue: "durable".into(), durable: true, no_wait: true, ..Default::default() });
    client.declares("transient", &[]);
    client.does(ExchangeDeclare { exchange: "x".into(), kind: "fanout".into(), no_wait: true, ..Default::default() });
    client.does(QueueBind { queue: "durable".into(), exchange: "x".into(), no_wait: true, ..Default::default() });
    let persistent = Properties { delivery_mode: Some(2), ..Default::default() };
    client.publishes_with("", "durable", "kept", &persistent).unwrap();
    client.publishes("durable", "lost");
    client.does(BasicGet { queue: "durable".into(), ..Default::default() });
    vhost.restart();
    assert_eq!(bodies(&vhost, "durable"), "kept");
    assert_eq!(vhost.queues().len(), 1);
    assert!(vhost.exchanges().iter().all(|exchange| exchange.name.starts_with("amq.")));
    assert!(vhost.bindings().is_empty());
}
