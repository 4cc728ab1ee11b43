//! What is refused, and how it is put.

use std::collections::HashMap;

use super::super::super::outbox::SessionId;
use super::super::super::refusal::Scope;
use super::super::super::release::Release;
use super::super::super::users::{Pattern, Permissions};
use super::super::Limits;
use super::bench::{Client, vhost, vhost_with};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

#[test]
fn another_connections_queue_is_locked_and_dies_with_it() {
    let vhost = vhost();
    let (owner, other) = (Client::new(&vhost), Client::new(&vhost));
    let declare = QueueDeclare { queue: "q".into(), exclusive: true, no_wait: true, ..Default::default() };
    owner.does(declare.clone());
    owner.does(declare.clone());
    let locked = "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'. It could be \
                  originally declared on another connection or the exclusive property value does not match that of the \
                  original declaration.";
    assert_eq!(other.fails(declare.clone()), locked);
    assert_eq!(other.fails(QueueDeclare { passive: true, ..declare }), locked);
    assert_eq!(other.fails(BasicGet { queue: "q".into(), ..Default::default() }), locked);
    assert_eq!(other.fails(BasicConsume { queue: "q".into(), ..Default::default() }), locked);
    assert_eq!(other.fails(QueuePurge { queue: "q".into(), ..Default::default() }), locked);
    assert_eq!(other.fails(QueueDelete { queue: "q".into(), ..Default::default() }), locked);
    let bind = QueueBind { queue: "q".into(), exchange: "amq.direct".into(), no_wait: true, ..Default::default() };
    let unbind = |key: &str| QueueUnbind {
        queue: "q".into(),
        exchange: "amq.direct".into(),
        routing_key: key.into(),
        ..Default::default()
    };
    owner.does(QueueBind { routing_key: "bound".into(), ..bind.clone() });
    assert_eq!(other.fails(bind), locked);
    assert_eq!(other.fails(unbind("bound")), locked);
    other.does(unbind("never bound"));
    vhost.close_session(owner.outbox.id());
    assert!(vhost.queue("q").is_none());
}

#[test]
fn refusals_name_the_method_that_gave_offence() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    let refusal = client.tries(BasicGet { queue: "q".into(), ..Default::default() }).unwrap_err();
    assert_eq!((refusal.scope, refusal.code, refusal.class_id, refusal.method_id), (Scope::Channel, 404, 60, 70));
    assert_eq!(refusal.text, "NOT_FOUND - no queue 'q' in vhost '/'");
    let refusal = client.tries(BasicQos { prefetch_size: 1, ..Default::default() }).unwrap_err();
    assert_eq!((refusal.scope, refusal.code, refusal.class_id, refusal.method_id), (Scope::Connection, 540, 60, 10));
    let refusal = client.publishes_with("x", "", "", &Properties::default()).unwrap_err();
    assert_eq!((refusal.code, refusal.class_id, refusal.method_id), (404, 60, 40));
}

#[test]
fn consumers_and_messages_that_cannot_be() {
    let vhost = vhost_with(Limits { release: Release::V3_10, ..Limits::default() });
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    let consume = |name: &str, value: Value| {
        let arguments = Table::default().with(name, value);
        client.fails(BasicConsume { queue: "q".into(), arguments, ..Default::default() })
    };
    let invalid = |name: &str| format!("PRECONDITION_FAILED - invalid arg '{name}' for queue 'q' in vhost '/'");
    let text = consume("x-priority", Value::text("a"));
    assert_eq!(text, invalid("x-priority") + ": \"expected integer, got longstr\"");
    let text = consume("x-cancel-on-ha-failover", Value::I32(1));
    assert_eq!(text, invalid("x-cancel-on-ha-failover") + ": {unacceptable_type,signedint}");
    let text = consume("x-stream-offset", Value::text("first"));
    assert_eq!(text, invalid("x-stream-offset") + " of queue type rabbit_classic_queue");
    let properties = Properties { delivery_mode: Some(3), ..Default::default() };
    let refusal = client.publishes_with("", "q", "", &properties).unwrap_err();
    assert_eq!(refusal.text, "PRECONDITION_FAILED - invalid message: {delivery_mode_unknown,3}");
}

#[test]
fn an_empty_name_is_the_last_declared_queue() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    assert_eq!(client.fails(BasicGet::default()), "NOT_FOUND - no previously declared queue");
    client.does(QueueDeclare::default());
    let (Method::QueueDeclareOk(declared), ..) = client.reads().remove(0) else { panic!("no declare-ok") };
    assert!(declared.queue.text().starts_with("amq.gen-"), "{}", declared.queue);
    client.does(QueueBind { exchange: "amq.direct".into(), no_wait: true, ..Default::default() });
    client.publishes_with("amq.direct", &declared.queue.text(), "m", &Properties::default()).unwrap();
    client.does(BasicGet::default());
    assert_eq!(client.hears(), ["got 1 m"], "the name stood in for the routing key too");
}

#[test]
fn exclusive_consumers_keep_others_out() {
    let vhost = vhost();
    let client = Client::new(&vhost);
    client.declares("q", &[]);
    let exclusive = BasicConsume { queue: "q".into(), consumer_tag: "a".into(), exclusive: true, ..Default::default() };
    client.does(exclusive.clone());
    let refused = "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use";
    assert_eq!(client.fails(BasicConsume { queue: "q".into(), ..Default::default() }), refused);
    client.does(BasicCancel { consumer_tag: "a".into(), no_wait: true });
    client.consumes("q", "b");
    assert_eq!(client.fails(exclusive), refused);
    let text = client.fails(BasicConsume { queue: "q".into(), consumer_tag: "b".into(), ..Default::default() });
    assert_eq!(text, "NOT_ALLOWED - attempt to reuse consumer tag 'b'");
}

#[test]
fn permissions_are_asked_for_before_anything_else() {
    let vhost = vhost();
    let some = || Pattern::parse("^mine").unwrap();
    let permissions = Permissions { configure: some(), write: some(), read: Pattern::None };
    let client = Client::of(&vhost, SessionId(u64::MAX), HashMap::from([("/".to_string(), permissions)]));
    let refused = |what: &str| format!("ACCESS_REFUSED - access to {what} in vhost '/' refused for user 'guest'");
    client.declares("mine", &[]);
    assert_eq!(client.fails(QueueDeclare { queue: "yours".into(), ..Default::default() }), refused("queue 'yours'"));
    assert_eq!(client.fails(BasicGet { queue: "mine".into(), ..Default::default() }), refused("queue 'mine'"));
    let text = client.publishes_with("", "mine", "", &Properties::default()).unwrap_err().text;
    assert_eq!(text, refused("exchange 'amq.default'"));
    let bind = QueueBind { queue: "mine".into(), exchange: "amq.direct".into(), ..Default::default() };
    assert_eq!(client.fails(bind), refused("exchange 'amq.direct'"));
}

#[test]
fn modes_do_not_mix() {
    let vhost = vhost();
    let (one, two) = (Client::new(&vhost), Client::new(&vhost));
    one.does(TxSelect {});
    assert_eq!(one.fails(ConfirmSelect::default()), "PRECONDITION_FAILED - cannot switch from tx to confirm mode");
    assert_eq!(two.fails(TxCommit {}), "PRECONDITION_FAILED - channel is not transactional");
    two.does(ConfirmSelect::default());
    assert_eq!(two.fails(TxSelect {}), "PRECONDITION_FAILED - cannot switch from confirm to tx mode");
}
