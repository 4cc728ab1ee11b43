//! What becomes of the history of a message that has died before.

use coney::{FieldTable, FieldValue, Message, Queue};

use crate::contract;
use crate::support::{Broker, queue, unique, wait_until};

contract! {
    deaths_that_a_message_brings_along_are_merged_by_queue_and_reason,
    a_count_goes_on_whatever_type_a_program_has_given_it,
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

/// RabbitMQ 4 takes none from a client.
fn deaths_that_a_message_brings_along_are_merged_by_queue_and_reason(broker: Broker) {
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
        let wanted = if broker.is_4() { vec![new] } else { wanted };
        connection.publish("", &name, Message::new("m").with_header("x-death", FieldValue::Array(brought))).unwrap();
        connection.get(&name).unwrap().expect("the message").reject().unwrap();
        wait_until("it is dead", || broker.queue_len(&dead) == 1);
        let buried = connection.get_and_ack(&dead).unwrap().expect("the dead");
        let wanted: Vec<_> =
            wanted.into_iter().map(|(queue, reason, count)| (queue.to_owned(), reason.to_owned(), count)).collect();
        assert_eq!(deaths(buried.message()), wanted);
    }
}

/// Clients of other languages write the table anew: pika makes 32 bits of a small number, and bytes of what is no UTF-8.
/// RabbitMQ 4 counts from the beginning.
fn a_count_goes_on_whatever_type_a_program_has_given_it(broker: Broker) {
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
        assert_eq!(death["count"], FieldValue::I64(if broker.is_4() { 1 } else { 8 }), "{what}");
    }
}
