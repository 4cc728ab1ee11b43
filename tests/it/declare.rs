//! Declaring what a program needs, and the broker's words when it will not have it.

use coney::{Binding, Error, Exchange, FieldValue, Message, Queue, Topology};

use crate::contract;
use crate::support::{Broker, bodies, drain, unique};

contract! {
    an_empty_queue_name_is_never_the_queue_that_somebody_else_declared,
    the_topology_of_the_settings_is_declared_and_routes,
    every_kind_of_entity_in_one_topology,
    a_mismatch_names_the_entity_and_carries_the_brokers_words,
    a_topology_that_does_not_fit_together_is_refused_before_anything_is_declared,
    purge_delete_unbind_and_their_conditions,
    arguments_that_the_broker_will_not_have_are_its_406,
}

fn the_topology_of_the_settings_is_declared_and_routes(broker: Broker) {
    let (room, one, two) = (unique("room"), unique("one"), unique("two"));
    let app = broker.app(&format!(
        r#"
        [[topology.exchanges]]
        name = "{room}"
        kind = "direct"
        [[topology.queues]]
        name = "{one}"
        [[topology.queues]]
        name = "{two}"
        [[topology.bindings]]
        exchange = "{room}"
        queue = "{one}"
        routing_key = "user1"
        [[topology.bindings]]
        exchange = "{room}"
        queue = "{two}"
        routing_key = "user2"
        "#
    ));
    app.declare_topology().unwrap();
    app.declare_topology().unwrap(); // changes nothing
    let connection = app.publish_pool().connection().unwrap();
    connection.publish(&room, "user1", "to one").unwrap();
    connection.publish(&room, "user2", "to two").unwrap();
    assert!(matches!(connection.publish(&room, "user3", "to none"), Err(Error::Returned { .. })));
    assert_eq!(bodies(&drain(&connection, &one)), ["to one"]);
    assert_eq!(bodies(&drain(&connection, &two)), ["to two"]);
}

fn every_kind_of_entity_in_one_topology(broker: Broker) {
    let (inner, outer, sorted, spare) = (unique("inner"), unique("outer"), unique("sorted"), unique("spare"));
    let (unrouted, coloured) = (unique("unrouted"), unique("coloured"));
    let topology = Topology::new()
        .exchange(Exchange::topic(&inner))
        .exchange(Exchange::direct(&outer).alternate_exchange(&spare))
        .exchange(Exchange::headers(&sorted).durable(false))
        .exchange(Exchange::fanout(&spare).internal(true))
        .queue(Queue::server_named())
        .queue(Queue::new(&unrouted))
        .queue(Queue::new(&coloured))
        .bind(Binding::exchange(&inner).to(&outer).routing_key("a.b"))
        .bind(Binding::queue("").to(&inner).routing_key("a.#"))
        .bind(Binding::queue(&coloured).to(&sorted).argument("x-match", "all").argument("colour", "red"))
        .bind(Binding::queue(&unrouted).to(&spare));
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queues = connection.declare(&topology).unwrap();
    let named = &queues[0].name;
    assert!(named.starts_with("amq.gen-"), "{named}");
    assert_eq!((queues[1].message_count, queues[1].consumer_count), (0, 0));

    connection.publish(&outer, "a.b", "through two exchanges").unwrap();
    connection.publish(&outer, "elsewhere", "to the alternate").unwrap();
    connection.publish(&sorted, "", Message::new("red").with_header("colour", "red")).unwrap();
    let blue = Message::new("blue").with_header("colour", "blue");
    assert!(matches!(connection.publish(&sorted, "", blue), Err(Error::Returned { .. })));
    assert_eq!(connection.publish(&spare, "", "no").unwrap_err().code(), Some(403), "internal");
    assert_eq!(bodies(&drain(&connection, named)), ["through two exchanges"]);
    assert_eq!(bodies(&drain(&connection, &unrouted)), ["to the alternate"]);
    assert_eq!(bodies(&drain(&connection, &coloured)), ["red"]);
}

fn a_mismatch_names_the_entity_and_carries_the_brokers_words(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (unique("mismatch"), unique("mismatch"));
    connection.queue_declare(&Queue::new(&queue).argument("x-message-ttl", 1000)).unwrap();
    connection.exchange_declare(&Exchange::direct(&exchange)).unwrap();

    let error = connection.declare(&Topology::new().queue(Queue::new(&queue).durable(false))).unwrap_err();
    assert_eq!(error.code(), Some(406));
    let text = error.to_string();
    assert!(text.contains(&format!("declare of queue \"{queue}\"")), "{text}");
    assert!(text.contains("inequivalent arg 'durable'"), "{text}");

    let text = connection.exchange_declare(&Exchange::topic(&exchange)).unwrap_err().to_string();
    assert!(text.contains(&format!("declare of exchange \"{exchange}\"")) && text.contains("'type'"), "{text}");

    let binding = Binding::queue(&queue).to(unique("absent")).routing_key("k");
    let text = connection.bind(&binding).unwrap_err().to_string();
    assert!(text.contains("bind of queue") && text.contains("404"), "{text}");
    connection.queue_declare_passive(&queue).unwrap();
}

fn a_topology_that_does_not_fit_together_is_refused_before_anything_is_declared(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let exchange = unique("unfit");
    let topology = Topology::new().exchange(Exchange::direct(&exchange)).bind(Binding::queue("nobody").to(&exchange));
    let text = connection.declare(&topology).unwrap_err().to_string();
    assert!(text.contains("topology.bindings[0].queue") && text.contains("nobody"), "{text}");
    assert_eq!(connection.exchange_declare_passive(&exchange).unwrap_err().code(), Some(404));
}

fn purge_delete_unbind_and_their_conditions(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (exchange, queue) = (unique("gone"), unique("gone"));
    let other = unique("other");
    connection.exchange_declare(&Exchange::direct(&exchange)).unwrap();
    connection.exchange_declare(&Exchange::fanout(&other)).unwrap();
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    connection.queue_bind(&queue, &exchange, "k").unwrap();
    connection.exchange_bind(&other, &exchange, "k2").unwrap();
    connection.publish(&exchange, "k", "1").unwrap();
    connection.publish(&exchange, "k", "2").unwrap();
    assert_eq!(connection.queue_delete_if_empty(&queue).unwrap_err().code(), Some(406));
    assert_eq!(connection.queue_purge(&queue).unwrap(), 2);
    assert_eq!(connection.exchange_delete(&exchange, true).unwrap_err().code(), Some(406), "in use");
    connection.queue_unbind(&queue, &exchange, "k").unwrap();
    connection.exchange_unbind(&other, &exchange, "k2").unwrap();
    assert!(matches!(connection.publish(&exchange, "k", "3"), Err(Error::Returned { .. })));
    connection.exchange_delete(&exchange, true).unwrap();
    connection.publish("", &queue, "left").unwrap();
    assert_eq!(connection.queue_delete_if_unused(&queue).unwrap(), 1);
    assert_eq!(connection.queue_delete(&queue).unwrap(), 0, "absent counts as deleted");
    assert_eq!(connection.queue_declare_passive(&queue).unwrap_err().code(), Some(404));
}

fn arguments_that_the_broker_will_not_have_are_its_406(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    for (argument, value) in [("x-message-ttl", FieldValue::from(-1)), ("x-max-length", "many".into())] {
        let error = connection.queue_declare(&Queue::new(unique("bad")).argument(argument, value)).unwrap_err();
        assert_eq!(error.code(), Some(406), "{error}");
        assert!(error.to_string().contains(argument), "{error}");
    }
}

fn an_empty_queue_name_is_never_the_queue_that_somebody_else_declared(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 1");
    let orders = unique("orders");
    {
        let connection = app.publish_pool().connection().unwrap();
        connection.queue_declare(&Queue::new(&orders)).unwrap();
        connection.publish("", &orders, "kept").unwrap();
    }
    // The same connection, lent to somebody else.
    let connection = app.publish_pool().connection().unwrap();
    let refused = |error: Error| {
        assert!(matches!(&error, Error::InvalidArgument { what, .. } if what == "queue name"), "{error}");
        assert!(error.to_string().contains("it is empty"), "{error}");
    };
    refused(connection.queue_delete("").unwrap_err());
    refused(connection.queue_delete_if_unused("").unwrap_err());
    refused(connection.queue_delete_if_empty("").unwrap_err());
    refused(connection.queue_purge("").unwrap_err());
    refused(connection.queue_declare_passive("").unwrap_err());
    refused(connection.queue_bind("", "amq.direct", "key").unwrap_err());
    refused(connection.queue_unbind("", "amq.direct", "key").unwrap_err());
    refused(connection.get("").map(drop).unwrap_err());
    refused(connection.get_and_ack("").map(drop).unwrap_err());
    let (told, outcome) = std::sync::mpsc::channel();
    connection.get_and_ack_async("", move |result| told.send(result).unwrap());
    refused(outcome.recv().unwrap().unwrap_err());
    assert_eq!(broker.queue_len(&orders), 1);
    // A name that the broker gives is still to be had.
    let named = connection.queue_declare(&Queue::server_named()).unwrap().name;
    connection.queue_bind(&named, "amq.direct", &orders).unwrap();
}
