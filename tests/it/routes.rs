//! Handlers of decoded messages, and several handlers on one queue.

use std::sync::mpsc;

use coney::{Context, Delivery, Error, Message, Outcome, Queue, Topology};
use serde::Deserialize;

use crate::contract;
use crate::logs;
use crate::support::{Broker, PATIENCE, drain, unique, wait_until};

contract! {
    a_handler_is_given_what_json_says,
    what_cannot_be_decoded_goes_to_the_dead_at_once_or_is_rejected,
    the_first_pattern_that_matches_has_the_message,
    what_no_pattern_matches_is_rejected_or_has_a_handler,
    a_message_that_is_tried_again_finds_its_route,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Order {
    number: u32,
}

/// A queue that gets all messages of a topic exchange.
fn all_of(exchange: &str, name: &str) -> Topology {
    Topology::new()
        .queue(Queue::new(name))
        .exchange(coney::Exchange::topic(exchange))
        .bind(coney::Binding::queue(name).to(exchange).routing_key("#"))
}

fn order(number: u32) -> Message {
    Message::json(&serde_json::json!({ "number": number })).unwrap()
}

fn a_handler_is_given_what_json_says(broker: Broker) {
    let app = broker.app("");
    let name = unique("orders");
    let (seen, orders) = mpsc::channel();
    let listener = app
        .listener(&name)
        .topology(Topology::new().queue(Queue::new(&name)))
        .spawn_json(move |context, order: Order| {
            assert!(context.queue().starts_with("orders"));
            seen.send(order)
        })
        .unwrap();
    app.publish_pool().publish("", &name, order(1)).unwrap();
    app.publish_pool()
        .publish("", &name, coney::Encoding::GzipJson.encode(&serde_json::json!({ "number": 2 })).unwrap())
        .unwrap();
    for number in [1, 2] {
        assert_eq!(orders.recv_timeout(PATIENCE), Ok(Order { number }));
    }
    wait_until("both are acked", || listener.stats().acked == 2);
    listener.stop().unwrap();
}

fn what_cannot_be_decoded_goes_to_the_dead_at_once_or_is_rejected(broker: Broker) {
    let app = broker.app("[pools.listen]\nretry = [\"1h\"]");
    for (keeps, of_pool) in [(true, true), (false, false)] {
        let name = unique("undecodable");
        let listener = app.listener(&name).topology(Topology::new().queue(Queue::new(&name)));
        let listener = if of_pool { listener } else { listener.without_retry() };
        let listener =
            listener.spawn_json(|_: &Context<'_>, _: Order| -> Outcome { unreachable!("it is no order") }).unwrap();
        app.publish_pool().publish("", &name, "no order").unwrap();
        if keeps {
            let dead = format!("{name}.dead");
            wait_until("it is in the dead queue", || broker.queue_len(&dead) == 1);
            let connection = app.publish_pool().connection().unwrap();
            let dead = drain(&connection, &dead);
            assert!(dead[0].message().header_str("coney-error").is_some_and(|why| why.contains("JSON")), "{dead:?}");
        } else {
            wait_until("it is rejected", || listener.stats().rejected == 1);
        }
        assert_eq!(broker.queue_len(&name), 0);
        listener.stop().unwrap();
    }
}

fn the_first_pattern_that_matches_has_the_message(broker: Broker) {
    let app = broker.app("");
    let (name, exchange) = (unique("events"), unique("exchange"));
    let (seen, handled) = mpsc::channel::<(&'static str, String)>();
    let handler = |which: &'static str| {
        let seen = seen.clone();
        move |_: &Context<'_>, delivery: &Delivery<'_>| seen.send((which, delivery.routing_key().to_owned()))
    };
    let orders = seen.clone();
    let listener = app
        .listener(&name)
        .topology(all_of(&exchange, &name))
        .route("order.eu.*", handler("european"))
        .route_json("order.*.*", move |_, order: Order| orders.send(("order", order.number.to_string())))
        .route("#.order.#", handler("any order"))
        .route("#", handler("rest"))
        .spawn()
        .unwrap();
    for (key, wanted) in [
        ("order.eu.new", ("european", "order.eu.new")),
        ("order.us.new", ("order", "7")),
        ("order", ("any order", "order")),
        ("old.order.eu", ("any order", "old.order.eu")),
        ("", ("rest", "")),
    ] {
        app.publish_pool().publish(&exchange, key, order(7)).unwrap();
        let (which, what) = handled.recv_timeout(PATIENCE).unwrap();
        assert_eq!((which, what.as_str()), wanted, "{key:?}");
    }
    listener.stop().unwrap();
}

fn what_no_pattern_matches_is_rejected_or_has_a_handler(broker: Broker) {
    logs::keep();
    let app = broker.app("");
    for has_handler in [false, true] {
        let name = unique("unmatched");
        let (seen, handled) = mpsc::channel();
        let routes = app
            .listener(&name)
            .topology(Topology::new().queue(Queue::new(&name)))
            .route("order.*", |_, _| -> Outcome { unreachable!("it is no order") });
        let routes = if has_handler { routes.otherwise(move |_, _| seen.send(())) } else { routes };
        let listener = routes.spawn().unwrap();
        app.publish_pool().publish("", &name, "m").unwrap();
        if has_handler {
            assert_eq!(handled.recv_timeout(PATIENCE), Ok(()));
            wait_until("it is acked", || listener.stats().acked == 1);
        } else {
            wait_until("it is rejected", || listener.stats().rejected == 1);
            let said = format!("no route matches the routing key {name:?}");
            assert_eq!(logs::lines_with(&said).len(), 1);
        }
        listener.stop().unwrap();
    }
}

fn a_message_that_is_tried_again_finds_its_route(broker: Broker) {
    let app = broker.app("");
    let (name, exchange) = (unique("again"), unique("exchange"));
    let (seen, handled) = mpsc::channel();
    let policy = coney::RetryPolicy::new([std::time::Duration::from_millis(10)]).unwrap();
    let listener = app
        .listener(&name)
        .topology(all_of(&exchange, &name))
        .retry(policy)
        .route("order.*", move |_, delivery| {
            let _ = seen.send(delivery.routing_key().to_owned());
            Outcome::Retry
        })
        .spawn()
        .unwrap();
    app.publish_pool().publish(&exchange, "order.new", "m").unwrap();
    for _ in 0..2 {
        assert_eq!(handled.recv_timeout(PATIENCE).as_deref(), Ok("order.new"));
    }
    wait_until("it is given up", || broker.queue_len(&format!("{name}.dead")) == 1);
    listener.stop().unwrap();
}

#[test]
fn patterns_that_cannot_be_are_told() {
    let app = Broker::Embedded.app("");
    let ack = |_: &Context<'_>, _: &Delivery<'_>| Outcome::Ack;
    let long = "x".repeat(256);
    for (routes, what) in [
        (app.listener("q").route("a.*", ack).route("a.*", ack), "route \"a.*\": there is one for this pattern already"),
        (app.listener("q").route(&long, ack), "256 bytes"),
    ] {
        let error = routes.spawn().unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(what), "{error}");
    }
}
