//! What becomes of the history of a message that has died before.

use std::time::Duration;

use coney::{FieldTable, FieldValue, Message, Queue};

use crate::contract;
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract! {
    [by release:
        deaths_that_a_message_brings_along_are_merged_by_queue_and_reason_or_ignored,
        a_count_goes_on_whatever_type_a_program_has_given_it_or_begins_anew,
        a_death_made_up_by_a_client_ends_a_message_or_does_not,
        the_history_of_a_message_that_dies_again_and_again,
    ]
}

fn text(text: &str) -> FieldValue {
    FieldValue::String(text.to_owned())
}

/// An entry of `x-death`, as a program may have written it.
fn entry(queue: &str, reason: &str, more: &[(&str, FieldValue)]) -> FieldValue {
    let mut entry = FieldTable::new();
    entry.insert("queue".to_owned(), text(queue));
    entry.insert("reason".to_owned(), text(reason));
    entry.extend(more.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    FieldValue::Table(entry)
}

/// Queue, reason and count of each death.
fn deaths(message: &Message) -> Vec<(String, String, Option<i64>)> {
    let Some(FieldValue::Array(deaths)) = message.headers().get("x-death") else { panic!("{message:?}") };
    let read = |death: &FieldValue| {
        let FieldValue::Table(death) = death else { panic!("{death:?}") };
        let text = |name: &str| death[name].as_str().unwrap().to_owned();
        let count = death.get("count").map(|count| match count {
            FieldValue::I64(count) => *count,
            other => panic!("{other:?}"),
        });
        (text("queue"), text("reason"), count)
    };
    deaths.iter().map(read).collect()
}

fn deaths_that_a_message_brings_along_are_merged_by_queue_and_reason_or_ignored(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "merged-dead");
    let name = unique("merged");
    let from = Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&from).unwrap();
    let rejected = |queue: &str| entry(queue, "rejected", &[]);
    let counted = |queue: &str, count: i64| entry(queue, "rejected", &[("count", FieldValue::I64(count))]);
    let new = (name.as_str(), "rejected", Some(1));
    for (brought, wanted) in [
        (
            vec![rejected("q1"), rejected("q1"), rejected("q2"), rejected("q1")],
            vec![new, ("q2", "rejected", Some(1)), ("q1", "rejected", Some(3))],
        ),
        // The first of each has the say, and reasons count by themselves.
        (
            vec![counted("q1", 5), counted("q1", 2), rejected("q2"), entry("q1", "expired", &[]), rejected("q2")],
            vec![new, ("q1", "expired", Some(1)), ("q2", "rejected", Some(2)), ("q1", "rejected", Some(5))],
        ),
        // The queue's own are merged before they are counted on.
        (
            vec![rejected("q2"), rejected(&name), rejected(&name)],
            vec![(name.as_str(), "rejected", Some(3)), ("q2", "rejected", Some(1))],
        ),
        (vec![counted(&name, 4), rejected(&name)], vec![(name.as_str(), "rejected", Some(5))]),
        // One alone is left as it is.
        (vec![rejected("q1")], vec![new, ("q1", "rejected", None)]),
        (vec![], vec![new]),
    ] {
        connection.publish("", &name, Message::new("m").with_header("x-death", FieldValue::Array(brought))).unwrap();
        connection.get(&name).unwrap().expect("the message").reject().unwrap();
        wait_until("it is dead", || broker.queue_len(&dead) == 1);
        let buried = connection.get_and_ack(&dead).unwrap().expect("the dead");
        let wanted = if broker.is_4() { vec![new] } else { wanted };
        let wanted: Vec<_> =
            wanted.into_iter().map(|(queue, reason, count)| (queue.to_owned(), reason.to_owned(), count)).collect();
        assert_eq!(deaths(buried.message()), wanted);
    }
}

/// Clients of other languages write the table anew: pika makes 32 bits of a small number, and bytes of what is no UTF-8.
fn a_count_goes_on_whatever_type_a_program_has_given_it_or_begins_anew(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "counted-dead");
    let name = unique("counted");
    let from = Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&from).unwrap();
    let counts = [
        FieldValue::I8(7),
        FieldValue::U8(7),
        FieldValue::I16(7),
        FieldValue::U16(7),
        FieldValue::I32(7),
        FieldValue::U32(7),
        FieldValue::I64(7),
        FieldValue::Timestamp(7),
    ];
    let bytes = |text: &str| FieldValue::Bytes(text.as_bytes().to_vec());
    for (count, in_bytes) in counts.into_iter().flat_map(|count| [(count.clone(), false), (count, true)]) {
        let what = format!("{count:?}, names as bytes: {in_bytes}");
        let mut brought = FieldTable::new();
        let text = |value: &str| if in_bytes { bytes(value) } else { text(value) };
        brought.insert("count".to_owned(), count);
        brought.insert("queue".to_owned(), text(&name));
        brought.insert("reason".to_owned(), text("rejected"));
        let brought = FieldValue::Array(vec![FieldValue::Table(brought)]);
        connection.publish("", &name, Message::new("m").with_header("x-death", brought)).unwrap();
        connection.get(&name).unwrap().expect("the message").reject().unwrap();
        wait_until("it is dead", || broker.queue_len(&dead) == 1);
        let buried = connection.get_and_ack(&dead).unwrap().expect("the dead");
        let Some(FieldValue::Array(deaths)) = buried.message().headers().get("x-death") else { panic!("{buried:?}") };
        let [FieldValue::Table(death)] = &deaths[..] else { panic!("{what}: {deaths:?}") };
        let wanted = if broker.is_4() { 1 } else { 8 };
        assert_eq!(death["count"], FieldValue::I64(wanted), "{what}");
    }
}

fn a_death_made_up_by_a_client_ends_a_message_or_does_not(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let dead = queue(&connection, "made-up-dead");
    let name = unique("made-up");
    let from = Queue::new(&name).message_ttl(Duration::ZERO).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&from).unwrap();
    // As if it had expired where it is to go: that would be a message that only goes round.
    let made_up = FieldValue::Array(vec![entry(&dead, "expired", &[])]);
    connection.publish("", &name, Message::new("made up").with_header("x-death", made_up)).unwrap();
    connection.publish("", &name, "plain").unwrap();
    wait_until("the second is dead", || broker.queue_len(&name) == 0 && broker.queue_len(&dead) > 0);
    let mut came = Vec::new();
    wait_until("it is here", || {
        came.extend(drain(&connection, &dead));
        bodies(&came).contains(&"plain".to_owned())
    });
    let wanted: &[&str] = if broker.is_4() { &["made up", "plain"] } else { &["plain"] };
    assert_eq!(bodies(&came), wanted);
}

fn the_history_of_a_message_that_dies_again_and_again(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let names: Vec<String> = (0..3).map(|_| unique("history")).collect();
    for (name, next) in [(0, 1), (1, 2), (2, 0)] {
        let queue = Queue::new(&names[name]).dead_letter_exchange("").dead_letter_routing_key(&names[next]);
        connection.queue_declare(&queue).unwrap();
    }
    let message = Message::new("m").with_expiration(Duration::from_secs(600));
    let message = message.with_header("CC", FieldValue::Array(vec![text("copy")]));
    connection.publish("", &names[0], message).unwrap();
    for name in [0, 1, 2, 0] {
        connection.get_timeout(&names[name], PATIENCE).unwrap().expect("the message").reject().unwrap();
    }
    let delivery = connection.get_timeout(&names[1], PATIENCE).unwrap().expect("the message");
    let headers = delivery.message().headers();
    let known = |which: &str| {
        ["queue", "reason", "exchange"].map(|what| headers.get(&format!("x-{which}-death-{what}")).cloned())
    };
    let was = |name: usize| [Some(text(&names[name])), Some(text("rejected")), Some(text(""))];
    let order = match broker.is_4() {
        false => {
            assert_eq!(known("last"), [None, None, None]);
            assert_eq!(headers.get("CC"), None);
            // The latest first, and the others turned round each time.
            [0, 1, 2]
        }
        true => {
            assert_eq!(known("last"), was(0));
            assert_eq!(headers.get("CC"), Some(&FieldValue::Array(vec![text("copy")])));
            [0, 2, 1]
        }
    };
    assert_eq!(known("first"), was(0));
    let counted = |name: usize| (names[name].clone(), "rejected".to_owned(), Some(if name == 0 { 2 } else { 1 }));
    assert_eq!(deaths(delivery.message()), order.map(counted));
    let Some(FieldValue::Array(deaths)) = headers.get("x-death") else { panic!("{headers:?}") };
    for (death, name) in deaths.iter().zip(order) {
        let FieldValue::Table(death) = death else { panic!("{death:?}") };
        let own = text(&names[name]);
        let keys = if name == 0 { vec![own, text("copy")] } else { vec![own] };
        assert_eq!(death["routing-keys"], FieldValue::Array(keys));
        assert_eq!(death.get("original-expiration"), (name == 0).then_some(&text("600000")));
    }
    assert_eq!(delivery.message().expiration(), None);
    delivery.ack().unwrap();
}
